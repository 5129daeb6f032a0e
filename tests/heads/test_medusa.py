"""Medusa heads: what they compute, and how they are read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tokentree.errors import ModelError, OptionError
from tokentree.heads.checkpoints import read_medusa, write_medusa
from tokentree.heads.medusa import MedusaHeads

HIDDEN, VOCAB = 6, 11


def some_heads(num_heads: int = 3, num_layers: int = 2, vocab: int | None = VOCAB, bias: bool = True) -> MedusaHeads:
    heads = MedusaHeads(num_heads, num_layers, HIDDEN, vocab, bias)
    generator = torch.Generator().manual_seed(num_heads + 10 * num_layers)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return heads


def some_hidden(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block with the names that it has in FasterDecoding's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.silu(self.linear(x))


def by_modules(tensors: dict[str, torch.Tensor], num_heads: int, num_layers: int) -> nn.ModuleList:
    """Heads made of torch's modules, whose names are the layout's, with every tensor in its place."""
    heads = [
        nn.Sequential(*(Block() for _ in range(num_layers)), nn.Linear(HIDDEN, VOCAB, bias=False))
        for _ in range(num_heads)
    ]
    modules = nn.ModuleList(heads)
    modules.load_state_dict(tensors)
    return modules


NAMES = {"99999999.0.linear.weight", "9999.0.linear.weight", "blocks.9999.layers.0.weight", "lm_heads.9999.weight"}
NAMES |= {"blocks.0.layers.9999.weight", "9" * 5000 + ".0.linear.weight", "0.9999.weight", "٣.0.linear.weight"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_name_sizes_an_allocation(name: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks the|don't have|end at different layers"):
        read_medusa(tmp_path)


WRONG: dict[str, dict[str, torch.Tensor]] = {
    "a width that others don't have": {"blocks.0.layers.0.weight": torch.zeros(1, 1 << 20)},
    "no width": {"blocks.0.layers.0.weight": torch.tensor(1.0)},
    "whole numbers": {"blocks.0.layers.0.weight": torch.zeros(HIDDEN, HIDDEN, dtype=torch.int32)},
    "complex numbers": {"blocks.0.layers.0.weight": torch.zeros(HIDDEN, HIDDEN, dtype=torch.complex64)},
    "no number": {"blocks.0.layers.0.weight": torch.full((HIDDEN, HIDDEN), torch.nan)},
    "infinity": {"lm_heads.1.weight": torch.full((VOCAB, HIDDEN), torch.inf)},
    "a negative token": {"token_map": torch.arange(VOCAB) - 1},
    "a token twice": {"token_map": torch.arange(VOCAB) // 2},
    "half a token": {"token_map": torch.arange(VOCAB) / 2},
    "too few tokens": {"token_map": torch.arange(VOCAB - 1)},
}


@pytest.mark.parametrize("what", WRONG)
def test_values_that_make_no_sense_are_refused(what: str, tmp_path: Path) -> None:
    write_medusa(some_heads(), tmp_path, "base", VOCAB)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | WRONG[what], file)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_medusa(tmp_path)


def test_few_numbers_that_are_said_to_be_many_are_refused(tmp_path: Path) -> None:
    torch.save({"0.0.linear.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ModelError, match="holds more than tensors"):
        read_medusa(tmp_path)


@pytest.mark.parametrize("content", [{3: torch.zeros(1)}, {"a": 1}, [1], torch.zeros(2)])
def test_what_are_no_tensors_by_name_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ModelError):
        read_medusa(tmp_path)


@pytest.mark.parametrize("config", ["[" * 100_000, "9" * 5000, "\ud800", "{"])
def test_a_configuration_that_can_t_be_read_is_one_sentence(config: str, tmp_path: Path) -> None:
    write_medusa(some_heads(), tmp_path, "base", VOCAB)
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_medusa(tmp_path)


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_every_head_is_residual_blocks_and_a_projection(num_layers: int, tmp_path: Path) -> None:
    heads, hidden = some_heads(3, num_layers), some_hidden()
    write_medusa(heads, tmp_path, "base", VOCAB, "fasterdecoding")
    modules = by_modules(load_file(tmp_path / "medusa_lm_head.safetensors"), 3, num_layers)
    expected = torch.stack([module(hidden) for module in modules])
    torch.testing.assert_close(heads.logits(hidden), expected)
    assert heads.logits(hidden).shape == (3, 5, VOCAB)


def test_fresh_heads_predict_as_the_target_does() -> None:
    output_layer, hidden = nn.Linear(HIDDEN, VOCAB, bias=False), some_hidden()
    logits = MedusaHeads(2, 1, HIDDEN).logits(hidden, output_layer)
    torch.testing.assert_close(logits, output_layer(hidden).expand(2, -1, -1))
    with pytest.raises(OptionError, match="share the target's output layer"):
        MedusaHeads(2, 1, HIDDEN).logits(hidden)


@pytest.mark.parametrize("sizes", [(0, 1, 4, None), (1, -1, 4, None), (1, 1, 0, None), (1, 1, 4, 0)])
def test_sizes_that_make_no_sense(sizes: tuple[int, int, int, int | None]) -> None:
    with pytest.raises(OptionError, match="at least 1 head"):
        MedusaHeads(*sizes)


def same(one: MedusaHeads, other: MedusaHeads) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "num_layers", "vocab", "bias"),
    [
        ("fasterdecoding", 0, VOCAB, True),
        ("fasterdecoding", 1, VOCAB, True),
        ("fasterdecoding", 2, VOCAB, True),
        ("vllm", 0, VOCAB, True),
        ("vllm", 2, VOCAB, True),
        ("vllm", 1, VOCAB, False),
        ("vllm", 1, None, True),
        ("vllm", 2, None, False),
    ],
)
def test_what_was_written_is_read(
    layout: str, num_layers: int, vocab: int | None, bias: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    heads = some_heads(3, num_layers, vocab, bias).to(dtype)
    write_medusa(heads, tmp_path, "some/base", 32, layout, about={"recipe": "by hand"})
    found, config = read_medusa(tmp_path)
    assert same(found, heads)
    assert found.weight.dtype is dtype
    assert config["base_model_name_or_path"] == "some/base"
    assert config["recipe"] == "by hand"
    if layout == "vllm":
        assert config["original_lm_head"] is (vocab is None)
        assert config["vocab_size"] == 32
        assert config["truncated_vocab_size"] == (vocab or 32)


def test_a_short_vocabulary_keeps_its_map(tmp_path: Path) -> None:
    heads = some_heads()
    heads.token_map = torch.arange(VOCAB) * 3
    write_medusa(heads, tmp_path, "base", 40)
    assert same(read_medusa(tmp_path)[0], heads)
    with pytest.raises(OptionError, match="whole vocabulary"):
        write_medusa(heads, tmp_path, "base", 40, "fasterdecoding")


def test_shared_projections_are_added_for_a_layout_that_needs_them(tmp_path: Path) -> None:
    heads, output_layer, hidden = some_heads(vocab=None), nn.Linear(HIDDEN, VOCAB, bias=False), some_hidden()
    with pytest.raises(OptionError, match="output_layer="):
        write_medusa(heads, tmp_path, "base", VOCAB, "fasterdecoding")
    write_medusa(heads, tmp_path, "base", VOCAB, "fasterdecoding", output_layer.weight)
    found, _ = read_medusa(tmp_path)
    torch.testing.assert_close(found.logits(hidden), heads.logits(hidden, output_layer))


def test_weights_are_trusted_and_not_the_configuration(tmp_path: Path) -> None:
    write_medusa(some_heads(5, 1), tmp_path, "base", VOCAB, "fasterdecoding", about={"medusa_num_heads": 2})
    found, config = read_medusa(tmp_path)
    assert (found.num_heads, config["medusa_num_heads"]) == (5, 2)


def test_a_pickled_file_and_no_configuration(tmp_path: Path) -> None:
    heads = some_heads()
    write_medusa(heads, tmp_path, "base", VOCAB, "fasterdecoding")
    file = tmp_path / "medusa_lm_head.safetensors"
    torch.save(load_file(file), tmp_path / "medusa_lm_head.pt")
    file.unlink()
    (tmp_path / "config.json").unlink()
    found, config = read_medusa(tmp_path)
    assert same(found, heads)
    assert config == {}


def test_a_merged_model_gives_its_heads(tmp_path: Path) -> None:
    heads = some_heads()
    write_medusa(heads, tmp_path, "base", VOCAB, "fasterdecoding")
    file = tmp_path / "medusa_lm_head.safetensors"
    tensors = {f"medusa_head.{name}": tensor for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors | {"model.norm.weight": torch.ones(HIDDEN)}, tmp_path / "model.safetensors")
    assert same(read_medusa(tmp_path)[0], heads)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("fasterdecoding", {"0.9.extra": torch.zeros(1)}, "don't have: 0.9.extra"),
        ("fasterdecoding", {"1.0.linear.weight": None}, "lacks the weight of head 1, layer 0"),
        ("fasterdecoding", {"2.1.linear.bias": None}, "lacks the bias of head 2, layer 1"),
        ("fasterdecoding", {"1.2.weight": None}, "lacks the projection of head 1"),
        ("fasterdecoding", {"0.2.weight": None, "1.2.weight": None, "2.2.weight": None}, "lacks the projection"),
        (
            "fasterdecoding",
            {"1.0.linear.weight": torch.zeros(HIDDEN, 2)},
            "weight of head 1, layer 0 is .6, 2., not .6, 6.",
        ),
        ("fasterdecoding", {"2.2.weight": torch.zeros(3, HIDDEN)}, "projection of head 2 is .3, 6., not .11, 6."),
        ("fasterdecoding", {"2.2.weight": None, "2.3.weight": torch.zeros(VOCAB, HIDDEN)}, "end at different layers"),
        ("vllm", {"blocks.1.layers.0.weight": None}, "lacks the weight of head 1, layer 0"),
        ("vllm", {"blocks.0.layers.1.bias": None}, "lacks the bias of head 0, layer 1"),
        ("vllm", {"lm_heads.0.weight": None}, "lacks the projection of head 0"),
        ("vllm", {"token_map": torch.arange(3)}, "token_map is .3., not .11."),
        ("vllm", {"model.norm.weight": torch.ones(1)}, "don't have: model.norm.weight"),
    ],
)
def test_a_tensor_too_many_or_too_few_is_named(
    layout: str, change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    write_medusa(some_heads(), tmp_path, "base", VOCAB, layout)
    file = next(tmp_path.glob("*.safetensors"))
    changed: dict[str, Any] = load_file(file) | change
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file)
    with pytest.raises(ModelError, match=message):
        read_medusa(tmp_path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no Medusa heads: none of medusa_lm_head"):
        read_medusa(tmp_path)
    file = tmp_path / "medusa_lm_head.pt"
    file.write_bytes(b"no such thing")
    with pytest.raises(ModelError, match="can't read"):
        read_medusa(tmp_path)
    torch.save({"0.0.weight": Path("code")}, file)  # an object, which could run anything
    with pytest.raises(ModelError, match="can't read"):
        read_medusa(tmp_path)
    torch.save([torch.zeros(1)], file)
    with pytest.raises(ModelError, match="more than tensors"):
        read_medusa(tmp_path)
    torch.save({}, file)
    with pytest.raises(ModelError, match="no Medusa heads in it"):
        read_medusa(tmp_path)
    for text, message in (("{", "can't read"), (json.dumps([1]), "is not a configuration")):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=message):
            read_medusa(tmp_path)


def test_an_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="choose one of fasterdecoding, vllm"):
        write_medusa(some_heads(), tmp_path, "base", VOCAB, "gguf")
