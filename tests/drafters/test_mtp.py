"""Layers for multi-token prediction: what their trees are made of, that they are lossless, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import by_night, decode
from tests.drafters.test_eagle import some_head
from tests.heads.mtp_layers import FAMILIES, FILE, WithLayer, save_with_layer
from tests.tiny_models import request, save_model, some_tokens, tiny
from tokentree import LLM
from tokentree.draft import Draft
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.drafters.mtp import Mtp
from tokentree.engines.kv import Storages
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError, PairingError
from tokentree.heads.eagle_files import write_eagle
from tokentree.heads.mtp_files import INDEX, find_mtp, read_mtp
from tokentree.heads.saved import About
from tokentree.making import folder_of
from tokentree.sampling import SamplingParams
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

PROMPTS = [some_tokens(11), some_tokens(4, seed=1), some_tokens(1, seed=2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WithLayer]:
    """A model of each family in float32, which no test changes."""
    return {family: save_with_layer(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


class Kept(Mtp):
    """Remembers what it proposed."""

    def propose(self, seqs: list[Sequence], shape: Any, sampled: bool) -> list[Draft]:
        drafts = super().propose(seqs, shape, sampled)
        self.__dict__.setdefault("seen", []).extend((list(s.tokens), d) for s, d in zip(seqs, drafts, strict=True))
        return drafts


# -- what it drafts ----------------------------------------------------------------------------------------------------


KINDS = [*((family, None) for family in FAMILIES), ("deepseek_v3", "sdpa"), ("deepseek_v3", "mask")]


@pytest.mark.parametrize(
    ("family", "attention"),
    by_night(KINDS, but=KINDS[::4]),
)
def test_each_node_has_the_probability_that_computing_it_anew_gives(
    saved: dict[str, WithLayer], family: str, attention: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokentree.engines.head_engine.PREFILL_ROWS", 4)
    made = saved[family]
    engine = TorchEngine(made.target, None if attention == "mask" else attention)
    drafter = Kept(read_mtp(made.folder, torch.float32), engine)
    if attention == "mask":  # as on other devices than CPUs
        own: Any = drafter._engine
        own._storages = Storages(replace(own._storages.layout, blocked=False))
    plain = decode(engine, [request(prompt, max_tokens=7) for prompt in PROMPTS])
    seqs = [request(prompt, max_tokens=7) for prompt in PROMPTS]
    for seq, text in zip(seqs, plain, strict=True):
        seq.references = [[*seq.tokens, *text]]  # so that the lookup knows what comes, and paths are accepted
    assert decode(engine, seqs, Merged([drafter, NGram()]), "2x2x1") == plain
    grown = 0
    for tokens, draft in drafter.__dict__["seen"]:
        for node in range(1, len(draft)):
            expected = made.said(tokens, draft.path_tokens(draft.parents[node]))
            assert draft.log_probs[node] == pytest.approx(float(expected[draft.tokens[node]]), abs=2e-3)
            grown += 1
    assert grown > 10
    assert max(step[1] for seq in seqs for step in seq.metrics.steps) > 1  # paths longer than the root were accepted
    assert not drafter._engine._states  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3"])
def test_in_8_bits_it_says_nearly_the_same(saved: dict[str, WithLayer], family: str) -> None:
    made, found = saved[family], list[torch.Tensor]()
    for dtype in (torch.float32, torch.bfloat16):
        target: Any = made.target.to(dtype)  # type: ignore[arg-type]
        drafter = Mtp(read_mtp(made.folder, dtype), TorchEngine(target))
        engine: Any = drafter._engine
        kinds = {type(module).__name__ for module in engine._head.model.modules()}
        assert ("QuantizedLinear" in kinds) == (dtype is torch.bfloat16)
        seq = request(some_tokens(9))
        engine._target.prefill(seq)
        engine.prefill(seq)
        found.append(engine.verify([seq], [TokenTree.root(seq.tokens[-1])]).all_logits.float())
    made.target.float()
    assert float((found[0] - found[1]).std() / found[0].std()) < 0.1


def test_a_text_that_begins_alike_gives_the_same_drafts(saved: dict[str, WithLayer]) -> None:
    made = saved["qwen3_5_text"]
    engine = TorchEngine(made.target, prefix_bytes=10_000_000)
    drafter, text = Kept(read_mtp(made.folder, torch.float32), engine), some_tokens(40)
    results = [decode(engine, [request([*text, 7], max_tokens=6)], drafter, "2x2") for _ in range(2)]
    assert results[0] == results[1]
    seen = drafter.__dict__["seen"]
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for (tokens, one), (again, other) in zip(first, second, strict=True):
        assert tokens == again
        assert one.tokens == other.tokens
        assert np.allclose(one.log_probs, other.log_probs, atol=1e-4)


# -- losslessness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "form", "dtype"),
    [
        ("qwen3_next", "dynamic:nodes=12", "bfloat16"),
        ("deepseek_v3", "3x2x1", "bfloat16"),
    ],
)
def test_greedy_ids_and_sampled_ids_are_plain_s(
    saved: dict[str, WithLayer], family: str, form: str, dtype: str
) -> None:  # fmt: skip
    llm = LLM(saved[family].folder, "mtp", shape=form, dtype=dtype)
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        params = SamplingParams(max_tokens=9, **options)
        results = llm.generate(PROMPTS, params)
        assert [one.token_ids for one in results] == [one.token_ids for one in llm.plain().generate(PROMPTS, params)]
        assert sum(one.metrics.drafted_tokens for one in results) > 0
        assert [piece.token_id for piece in llm.stream(PROMPTS[0], params)] == results[0].token_ids
    drawn = llm.using(accept="traversal", shape="2x2")
    assert len(drawn.generate(PROMPTS[:1], SamplingParams(max_tokens=5, temperature=1.0, seed=1))[0].token_ids) == 5


# -- where it is taken -------------------------------------------------------------------------------------------------


def test_it_is_merged_where_a_model_has_one(saved: dict[str, WithLayer], tmp_path: Path) -> None:
    made = saved["deepseek_v3"]
    llm = LLM(made.folder, shape="2x1")
    assert llm.decoder.drafter.names == ["mtp", "recycling", "suffix", "ngram"] == llm.drafters
    params = SamplingParams(max_tokens=8)
    assert llm.generate(PROMPTS, params)[0].token_ids == llm.plain().generate(PROMPTS, params)[0].token_ids
    loaded: Any = type(made.target).from_pretrained(made.folder)
    assert folder_of(loaded) == folder_of(str(made.folder)) == made.folder
    assert folder_of(made.target) is None
    write_eagle(some_head(3, hidden_size=64), tmp_path, "tiny", about=About(taps=[0, 1, 2]))
    assert "mtp" not in llm.using(heads=tmp_path).decoder.drafter.names


def test_one_that_can_t_be_read_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    made = save_with_layer(tmp_path, "qwen3_5_text")
    made.change(norm=None)
    with pytest.warns(UserWarning, match=r"'mtp' is left out: .* lacks the tensor mtp.norm.weight"):
        llm = LLM(made.folder, shape="2x1")
    assert "mtp" not in llm.decoder.drafter.names
    with pytest.raises(ModelError, match=r"lacks the tensor mtp.norm.weight"):
        llm.using("mtp")


def test_models_without_one_are_told_so(tmp_path: Path) -> None:
    folder = save_model(tmp_path, tiny("llama"))
    llm = LLM(folder, shape="2x1")
    assert "mtp" not in llm.drafters
    with pytest.raises(ModelError, match="no layer for multi-token prediction in a known layout"):
        llm.using("mtp")
    with pytest.raises(PairingError, match="drafter='mtp' needs a model that is loaded from a folder"):
        LLM(tiny("llama"), "mtp")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tensors", "message"),
    [
        ("qwen3_5_text", {"hidden": None}, "lacks the tensor mtp.pre_fc_norm_hidden.weight"),
        ("qwen3_5_text", {"norm": None}, "lacks the tensor mtp.norm.weight"),
        ("qwen3_5_text", {"projection": torch.zeros(64, 64)}, r"mtp.fc.weight is \[64, 64\], not \[64, 128\]"),
        ("qwen3_5_text", {"mtp__extra": torch.zeros(1)}, "doesn't have: mtp.extra"),
        (
            "qwen3_5_text", {"mtp__layers__0__self_attn__q_proj__weight": None},
            "lacks the tensor mtp.layers.0.self_attn.q_proj.weight",
        ),
        (
            "qwen3_5_text", {"mtp__layers__0__mlp__up_proj__weight": torch.zeros(3, 64)},
            r"mtp.layers.0.mlp.up_proj.weight is \[3, 64\], not \[96, 64\]",
        ),
        (
            "qwen3_5_text", {"mtp__layers__0__mlp__up_proj__weight": torch.full((96, 64), torch.nan)},
            "mtp.layers.0.mlp.up_proj.weight holds what is no finite number",
        ),
        (
            "qwen3_5_text", {"mtp__layers__0__mlp__up_proj__qweight": torch.zeros(8, 64, dtype=torch.int32)},
            "mtp.layers.0.mlp.up_proj.qweight has the type torch.int32",
        ),
        ("deepseek_v3", {"norm": torch.zeros(3)}, r"model.layers.2.shared_head.norm.weight is \[3\], not \[64\]"),
        (
            "deepseek_v3", {"model__layers__2__self_attn__foreign": torch.zeros(1)},
            "doesn't have: model.layers.2.self_attn.foreign",
        ),
        (
            "deepseek_v3", {"model__layers__2__mlp__gate__weight_scale_inv": torch.ones(9, 9)},
            "model.layers.2.mlp.gate.weight_scale_inv has no scale for each block",
        ),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(tmp_path: Path, family: str, tensors: dict[str, Any], message: str) -> None:
    made = save_with_layer(tmp_path, family)
    made.change(**tensors)
    with pytest.raises(ModelError, match=message) as raised:
        read_mtp(made.folder, torch.float32)
    assert "\n" not in str(raised.value)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_mtp(folder, torch.float32).state_dict()


def test_only_files_that_have_some_of_it_are_read(tmp_path: Path) -> None:
    made = save_with_layer(tmp_path, "qwen3_next")
    expected, tensors = weights(made.folder), load_file(tmp_path / FILE)
    parts: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}, "c": {}}
    for name, tensor in tensors.items():
        parts["a" if not name.startswith("mtp.") else "b" if "experts" in name else "c"][name] = tensor
    for part, some in parts.items():
        save_file(some, tmp_path / f"{part}.safetensors", {"format": "pt"})
    index = {name: f"{part}.safetensors" for part, some in parts.items() for name in some}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / FILE).unlink()
    assert find_mtp(tmp_path) is not None
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    found = weights(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"can't read .*b.safetensors"):
        weights(tmp_path)
    (tmp_path / INDEX).write_text("[")
    with pytest.raises(ModelError, match="can't read the tensors in"):
        weights(tmp_path)
    assert find_mtp(tmp_path) is None


def test_the_first_of_several_layers_is_read_without_copies_of_the_target_s(tmp_path: Path) -> None:
    made = save_with_layer(tmp_path, "deepseek_v3")  # which has copies
    expected = weights(tmp_path)
    further = {name.replace("layers.2.", "layers.3."): one for name, one in load_file(tmp_path / FILE).items()}
    made.change(**{name: one + 1 for name, one in further.items() if "layers.3." in name})
    found = weights(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    qwen = save_with_layer(tmp_path / "qwen", "qwen3_5_text")
    qwen.change(mtp__layers__1__self_attn__q_proj__weight=torch.zeros(3))
    weights(qwen.folder)


def test_weights_in_8_bit_floats_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    made = save_with_layer(tmp_path, "deepseek_v3", hidden_size=192)
    weight = load_file(tmp_path / FILE)["model.layers.2.mlp.shared_experts.down_proj.weight"]  # [192, 64]
    scales = torch.tensor([[0.25], [2.0]])  # one for 128 rows, and one for the rest
    each = torch.cat([scales[:1].expand(128, 64), scales[1:].expand(64, 64)])
    rounded = (weight / each).to(torch.float8_e4m3fn)
    made.change(
        model__layers__2__mlp__shared_experts__down_proj__weight=rounded,
        model__layers__2__mlp__shared_experts__down_proj__weight_scale_inv=scales,
    )
    found = weights(tmp_path)["model.layers.0.mlp.shared_experts.down_proj.weight"]
    assert torch.equal(found, rounded.float() * each)
    assert torch.allclose(found, weight, atol=0.05 * float(weight.abs().max()))


def test_a_layer_without_experts_is_one_though_the_family_has_some(tmp_path: Path) -> None:
    made = save_with_layer(tmp_path, "deepseek_v3")
    first = {name: one for name, one in load_file(tmp_path / FILE).items() if "layers.0.mlp." in name}
    named = {name.replace("layers.0.", "layers.2."): one for name, one in first.items()}
    gone = {name: None for name in load_file(tmp_path / FILE) if "layers.2.mlp." in name}
    made.change(**gone, **named)
    head = read_mtp(tmp_path, torch.float32)
    assert "model.layers.0.mlp.gate_proj.weight" in head.state_dict()
    engine = TorchEngine(made.target)
    seq = request(PROMPTS[0], max_tokens=4)
    assert decode(engine, [seq], Mtp(head, engine)) == decode(engine, [request(PROMPTS[0], max_tokens=4)])
