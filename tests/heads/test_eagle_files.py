"""EAGLE heads in files: what is written is read back, in each layout, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.drafters.test_eagle import KINDS, NORMS, some_head
from tests.tiny_models import VOCAB, some_tokens, tiny
from tokentree import LLM, SamplingParams
from tokentree.errors import ModelError, OptionError, PairingError
from tokentree.heads.eagle import EagleHead
from tokentree.heads.eagle_files import default_taps, read_eagle, tap_places, write_eagle
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.medusa import MedusaHeads
from tokentree.heads.saved import About, kind_of, write_heads

LAYERS = 2  # of the target


def assert_same(one: EagleHead, other: EagleHead) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value.to(torch.bfloat16), theirs[name].to(torch.bfloat16)), name


def change(folder: Path, **fields: Any) -> None:
    """Changes the configuration in ``folder``; a field that is None is taken out."""
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    found = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in found.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 10**9}, {"num_attention_heads": -4}, {"num_attention_heads": 0}, {"head_dim": 1 << 40},
        {"hidden_size": "wide"}, {"rms_norm_eps": float("nan")}, {"rms_norm_eps": float("inf")},
        {"max_position_embeddings": -1}, {"max_position_embeddings": 1e30}, {"target_hidden_size": 10**12},
        {"target_hidden_size": float("nan")}, {"rope_parameters": {"rope_type": "yarn", "factor": "x"}},
        {"rope_parameters": 7}, {"eagle_config": [1], "eagle_aux_hidden_state_layer_ids": None, "tokentree": None},
        {"eagle_aux_hidden_state_layer_ids": [1 << 40, 2, 3], "tokentree": None}, {"tokentree": {"taps": [0, 1, -1]}},
        {"tokentree": {"temperatures": [float("nan")]}}, {"tokentree": [1]}, {"transformer_layer_config": "x"},
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    head = some_head(3, 60)
    write_eagle(head, tmp_path, "tiny", about=About(taps=list(head.sizes.taps)))
    change(tmp_path, **fields)
    with pytest.raises(ModelError):
        read_eagle(tmp_path, LAYERS)


@pytest.mark.parametrize("known", [-5, VOCAB, 1 << 40, 0])
def test_a_map_that_leads_out_of_the_vocabulary_is_refused(known: int, tmp_path: Path) -> None:
    write_eagle(some_head(3, 60), tmp_path, "tiny")
    offsets = load_file(tmp_path / "model.safetensors")["d2t"]
    offsets[-1] = known - 59
    change_tensors(tmp_path, d2t=offsets, t2d=torch.ones(VOCAB, dtype=torch.bool))
    with pytest.raises(ModelError, match="d2t"):
        read_eagle(tmp_path, LAYERS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    write_eagle(some_head(3, 60), tmp_path, "tiny")
    change_tensors(tmp_path, norm__weight=torch.full((48,), value))
    with pytest.raises(ModelError, match="no finite number"):
        read_eagle(tmp_path, LAYERS)


@pytest.mark.parametrize(("version", "known"), KINDS)
@pytest.mark.parametrize("layout", ["safeailab", "speculators"])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "own_embedding": True, "fc_bias": True}])
def test_a_round_trip(tmp_path: Path, version: int, known: int | None, layout: str, options: dict[str, Any]) -> None:
    head = some_head(version, known, **options)
    about = About(taps=list(head.sizes.taps)) if version == 3 else About()
    if version == 1 and layout == "speculators":
        with pytest.raises(OptionError, match="speculators' layout is for EAGLE-3"):
            write_eagle(head, tmp_path, "tiny", layout)
        return
    write_eagle(head, tmp_path, "tiny", layout, about)
    assert kind_of(tmp_path) == "eagle"
    saved = read_eagle(tmp_path, LAYERS)
    assert saved.head.sizes == head.sizes
    assert_same(saved.head, head)


@pytest.mark.parametrize("layout", ["safeailab", "speculators"])
@pytest.mark.parametrize("norms", NORMS)
def test_norms_of_eagle_3_1_are_read_and_written(tmp_path: Path, layout: str, norms: dict[str, bool]) -> None:
    head = some_head(3, **norms)
    write_eagle(head, tmp_path, "tiny", layout, About(taps=[0, 1, 2]))
    said = {name: True for name in norms if name != "own_output"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: value for name, value in config.items() if "norm" in name and value is True} == said
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    taps = {f"fc_norm.{tap}.weight": [48] for tap in range(3)}
    assert (taps if head.sizes.fc_norm else {"input_norm.weight": [144]}).items() <= shapes.items()
    saved = read_eagle(tmp_path, LAYERS)
    assert saved.head.sizes == head.sizes
    assert_same(saved.head, head)
    change(tmp_path, **dict.fromkeys(said), eagle_config=said)
    assert read_eagle(tmp_path, LAYERS).head.sizes == head.sizes
    change(tmp_path, eagle_config={"norm_output": True})  # tensors say the rest
    assert read_eagle(tmp_path, LAYERS).head.sizes == head.sizes.model_copy(update={"norm_before_residual": False})


def test_norms_that_are_said_and_not_there_are_missed(tmp_path: Path) -> None:
    write_eagle(some_head(3, **NORMS[0]), tmp_path, "tiny", about=About(taps=[0, 1, 2]))
    change_tensors(tmp_path, fc_norm__1__weight=None)
    with pytest.raises(ModelError, match=r"lacks the tensor fc_norm.1.weight"):
        read_eagle(tmp_path, LAYERS)
    change_tensors(tmp_path, input_norm__weight=torch.ones(144))
    with pytest.raises(ModelError, match="fc_norm and norm_before_fc exclude each other"):
        read_eagle(tmp_path, LAYERS)
    change_tensors(tmp_path, fc_norm__0__weight=None, fc_norm__2__weight=None, input_norm__weight=None)
    with pytest.raises(ModelError, match=r"lacks the tensor fc_norm.0.weight"):
        read_eagle(tmp_path, LAYERS)


def test_names_and_maps_are_those_of_the_projects(tmp_path: Path) -> None:
    head = some_head(3, 60)
    write_eagle(head, tmp_path / "a", "tiny")
    write_eagle(head, tmp_path / "b", "tiny", "speculators")
    mine, theirs = load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "b/model.safetensors")
    assert {
        "fc.weight", "midlayer.self_attn.q_proj.weight", "midlayer.mlp.up_proj.weight",
        "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight", "midlayer.post_attention_layernorm.weight",
        "norm.weight", "lm_head.weight", "d2t", "t2d",
    } < set(mine)  # fmt: skip
    assert {name.replace("midlayer.", "layers.0.") for name in mine} == set(theirs)
    assert head.token_map is not None
    assert mine["d2t"].dtype is torch.int64
    assert mine["t2d"].dtype is torch.bool
    assert [i + int(mine["d2t"][i]) for i in range(60)] == head.token_map.tolist()
    assert mine["t2d"].nonzero()[:, 0].tolist() == head.token_map.tolist()
    write_eagle(some_head(1), tmp_path / "c", "tiny", embedding=torch.zeros(VOCAB, 48))
    first = load_file(tmp_path / "c/model.safetensors")
    assert {"embed_tokens.weight", "fc.bias", "layers.0.self_attn.k_proj.weight"} < set(first)
    assert not any("norm" in name and "post_attention" not in name for name in first)


def test_layer_ids_come_in_two_conventions(tmp_path: Path) -> None:
    assert default_taps(32) == (2, 16, 29)
    assert tap_places([2, 16, 29])[0] == (2, 16, 29)
    assert tap_places([1, 15, 28])[0] == (2, 16, 29)
    assert "output is read" in tap_places([1, 15, 28])[1]
    assert "input is read" in tap_places([2, 16, 29])[1]
    write_eagle(some_head(3, 60, taps=(2, 16, 29)), tmp_path, "tiny")
    key = "eagle_aux_hidden_state_layer_ids"
    for ids, taps in (([2, 16, 29], (2, 16, 29)), ([1, 15, 28], (2, 16, 29)), (None, (2, 16, 29))):
        change(tmp_path, **{key: ids})
        saved = read_eagle(tmp_path, 32)
        assert saved.head.sizes.taps == taps
        assert saved.told
    change(tmp_path, eagle_config={key: [3, 9, 12], "use_aux_hidden_state": True})  # SpecForge's
    assert read_eagle(tmp_path, 32).head.sizes.taps == (3, 9, 12)


def test_weights_say_what_a_configuration_hides(tmp_path: Path) -> None:
    write_eagle(some_head(3, 60), tmp_path, "tiny", about=About(taps=[0, 1, 2]))
    change(tmp_path, draft_vocab_size=7, num_key_value_heads=1, intermediate_size=9, attention_bias=True, qkv_bias=True)
    sizes = read_eagle(tmp_path, LAYERS).head.sizes
    assert (sizes.draft_vocab_size, sizes.num_kv_heads, sizes.intermediate_size, sizes.qkv_bias) == (60, 2, 80, False)


@pytest.mark.parametrize("layout", ["safeailab", "speculators"])
@pytest.mark.parametrize("maps", [{}, {"d2t": torch.zeros(VOCAB, dtype=torch.int64), "t2d": torch.ones(VOCAB).bool()}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_without_an_output_layer_uses_the_target_s(
    tmp_path: Path, layout: str, maps: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """As heads are published whose vocabulary is the target's."""
    model = tiny("llama", dtype, hidden_size=64, intermediate_size=96)
    head = some_head(3, 0, hidden_size=64, intermediate_size=96)
    write_eagle(head, tmp_path, "tiny", layout, about=About(taps=[0, 1, 2]))
    if maps:
        change_tensors(tmp_path, **maps)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    saved = read_eagle(tmp_path, LAYERS).head
    assert saved.lm_head is None
    assert_same(saved, head)
    llm = LLM(model, heads=tmp_path, drafter="eagle", shape="2x2")
    params = SamplingParams(max_tokens=30)
    result = llm.generate([some_tokens(9)], params)[0]
    assert result.token_ids == llm.plain().generate([some_tokens(9)], params)[0].token_ids
    assert result.metrics.drafted_tokens > 0
    change_tensors(tmp_path, d2t=torch.arange(60), t2d=None)
    with pytest.raises(ModelError, match=r"knows some tokens alone \(d2t\), and lacks the tensor lm_head.weight"):
        read_eagle(tmp_path, LAYERS)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc__weight": None}, "no EAGLE head"),
        ({"midlayer__self_attn__q_proj__weight": None}, "lacks the tensor midlayer.self_attn.q_proj.weight"),
        ({"extra": torch.zeros(1)}, "doesn't have: extra"),
        ({"norm__weight": torch.zeros(3)}, r"norm.weight is \[3\], not \[48\]"),
        ({"fc__weight": torch.zeros(48, 96)}, "fc.weight takes 96 numbers, not 3 hidden states of 48"),
        ({"d2t": torch.zeros(5, dtype=torch.int64)}, "d2t is not one number"),
        ({"t2d": torch.ones(VOCAB, dtype=torch.bool)}, "name different tokens"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    write_eagle(some_head(3, 60), tmp_path, "tiny", about=About(taps=[0, 1, 2]))
    change_tensors(tmp_path, **tensors)
    with pytest.raises(ModelError, match=message):
        read_eagle(tmp_path, LAYERS)


def test_wrong_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no EAGLE head"):
        read_eagle(tmp_path, LAYERS)
    write_eagle(some_head(3, 60), tmp_path, "tiny", about=About(taps=[0, 1, 2]))
    change(tmp_path, num_attention_heads="many")
    with pytest.raises(ModelError, match="makes no sense"):
        read_eagle(tmp_path, LAYERS)
    with pytest.raises(OptionError, match="unknown layout 'other'"):
        write_eagle(some_head(3), tmp_path, "tiny", "other")


def test_a_head_made_for_another_model_is_refused(tmp_path: Path) -> None:
    about = About(taps=[0, 1, 2], fingerprint=Fingerprint(config="else"))
    write_eagle(some_head(3, 60), tmp_path, "Other-7B", about=about)
    with pytest.raises(PairingError, match="made for Other-7B, whose configuration is not this model's"):
        LLM(tiny("llama"), heads=tmp_path)


def test_heads_of_both_kinds_are_told_apart(tmp_path: Path) -> None:
    write_heads(tmp_path / "medusa", MedusaHeads(2, 1, 48), "tiny", VOCAB, About())
    write_eagle(some_head(3, 60), tmp_path / "eagle", "tiny", about=About(taps=[0, 1, 2]))
    model = tiny("llama")
    assert LLM(model, heads=tmp_path / "medusa").decoder.drafter.names[0] == "medusa"
    assert LLM(model, heads=tmp_path / "eagle").decoder.drafter.names[0] == "eagle"
