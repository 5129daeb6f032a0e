"""Block heads in files: what is written is read back, conventions are resolved aloud, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.heads.block_heads import FORMS, some_block
from tests.heads.test_eagle_files import change, change_tensors
from tests.tiny_models import VOCAB
from tokentree.errors import ModelError, OptionError, PairingError
from tokentree.heads.block_files import LAYOUTS, default_places, read_block, write_block
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.saved import About, kind_of

LAYERS = 2  # of the target
OUTER = {"embedding": torch.zeros(VOCAB, 48), "output": torch.ones(VOCAB, 48)}


def fits(form: str, layout: str) -> bool:
    """Whether a layout can say what heads of that form are."""
    told = FORMS[form]
    if layout == "zlab":
        return form == "dflash2" or not (told.get("anchor_first") or told.get("markov_rank"))
    if form == "dflash2":
        return False
    return layout == "deepspec" or ("mask_token" in told and (not told.get("causal") or "window" in told))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "num_layers": 1}])
def test_a_round_trip(form: str, layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    head = some_block(form, **options)
    known = head.sizes.draft_vocab_size or VOCAB
    outer: dict[str, Any] = OUTER | {"output": torch.ones(known, 48)} if layout == "speculators" else {}
    if not fits(form, layout):
        with pytest.raises(OptionError, match=r"layout (has|'.*' has) no"):
            write_block(head, tmp_path, "tiny", layout)
        return
    write_block(head, tmp_path, "tiny", layout, dtype=torch.float32, **outer)
    assert kind_of(tmp_path) == "block"
    saved = read_block(tmp_path, LAYERS)
    own = {"own_embedding": True, "own_output": True} if outer else {}
    assert saved.head.sizes == head.sizes.model_copy(update=own)
    mine, theirs = head.state_dict(), saved.head.state_dict()
    assert {name: tensor for name, tensor in theirs.items() if name in mine}.keys() == mine.keys()
    for name, tensor in mine.items():
        assert torch.equal(theirs[name], tensor), name


def test_names_and_conventions_are_those_of_the_projects(tmp_path: Path) -> None:
    write_block(some_block("dflash"), tmp_path / "zlab", "tiny", "zlab")
    tensors = load_file(tmp_path / "zlab/model.safetensors")
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.1.self_attn.k_norm.weight"} < set(tensors)
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(tensors)
    assert tensors["layers.0.self_attn.k_proj.weight"].shape == (32, 48)
    write_block(some_block("gated"), tmp_path / "deepspec", "tiny", "deepspec")
    tensors = load_file(tmp_path / "deepspec/model.safetensors")
    assert tensors["markov_head.markov_w1.weight"].shape == tensors["markov_head.markov_w2.weight"].shape == (VOCAB, 6)
    assert tensors["markov_head.gate_proj.weight"].shape == (6, 54)
    assert tensors["confidence_head.proj.weight"].shape == (1, 54)
    write_block(some_block("rnn"), tmp_path / "rnn", "tiny", "deepspec")
    tensors = load_file(tmp_path / "rnn/model.safetensors")
    assert tensors["markov_head.joint_proj.weight"].shape == (18, 60)
    assert tensors["markov_head.joint_proj.bias"].shape == (18,)
    assert json.loads((tmp_path / "rnn/config.json").read_text())["markov_head_type"] == "rnn"
    write_block(some_block("dflash2"), tmp_path / "dflash2", "tiny", "zlab")
    tensors = load_file(tmp_path / "dflash2/model.safetensors")
    assert len(tensors) == 3 + 2 * (11 + 4) + 3
    for name in ("attention_conv", "mlp_conv"):
        assert tensors[f"layers.1.{name}.base_kernel"].shape == (2, 2, 48)
        assert tensors[f"layers.1.{name}.kernel_projection.weight"].shape == (2 * 2 * 3, 48)
    assert tensors["candidate_selector.hidden_projection.weight"].shape == (6, 48)
    assert tensors["candidate_selector.predecessor_codebook"].shape == (VOCAB, 6)
    assert tensors["candidate_selector.successor_codebook"].shape == (VOCAB, 6)
    config = json.loads((tmp_path / "dflash2/config.json").read_text())
    assert config["architectures"] == ["DFlash2DraftModel"]
    assert config["dflash_config"].items() >= {
        "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 6, "selector_top_k": 5,
        "output_multiplier": 0.75, "final_logit_softcapping": 9.0, "input_embedding_scale": 1.5,
    }.items()  # fmt: skip
    write_block(some_block("few tokens"), tmp_path / "speculators", "tiny", "speculators")
    tensors = load_file(tmp_path / "speculators/model.safetensors")
    assert tensors["d2t"].dtype is torch.int64
    assert int(tensors["t2d"].sum()) == 60


# -- conventions ------------------------------------------------------------------------------------------------------


def test_default_places_are_z_lab_s() -> None:
    assert default_places(36, 5) == tuple(i + 1 for i in (1, 9, 17, 25, 33))
    assert default_places(24, 5) == tuple(i + 1 for i in (1, 6, 11, 16, 21))
    assert default_places(30, 3) == tuple(i + 1 for i in (1, 14, 27))
    assert default_places(30, 1) == (16,)


def config_of(**own: Any) -> dict[str, Any]:
    """z-lab's nested fields, with the ones of ``own``; those that are None are left out."""
    fields = {"block_size": 4, "mask_token_id": 3} | own
    return {"dflash_config": {name: value for name, value in fields.items() if value is not None}}


@pytest.mark.parametrize(
    ("fields", "taps", "told"),
    [
        (config_of(target_layer_ids=[3, 7]), (4, 8), "output is read"),
        (config_of(layer_ids=[3, 7]), (3, 7), "input is read"),
        (config_of() | {"target_layer_ids": [-1, 7]}, (0, 8), "output is read"),
        (config_of() | {"aux_hidden_state_layer_ids": [3, 7]}, (3, 7), "input is read"),
        (config_of() | {"eagle_aux_hidden_state_layer_ids": [3, 7]}, (3, 7), "input is read"),
        (config_of(target_layer_ids=[2, 6], layer_ids=[3, 7]), (3, 7), "output is read"),  # both say the same
        (config_of(), (2, 8), "z-lab's own choice of 2 in 10 layers"),
    ],
)
def test_ids_of_layers_come_in_two_conventions(fields: Any, taps: Any, told: str, tmp_path: Path) -> None:
    write_block(some_block("dflash"), tmp_path, "tiny", "zlab")
    change(tmp_path, **fields)
    saved = read_block(tmp_path, 10)
    assert saved.head.sizes.taps == taps
    assert told in saved.told


@pytest.mark.parametrize(
    ("fields", "first", "told"),
    [
        ({}, False, "guesses nothing, as in DFlash"),
        ({"sample_from_anchor": True}, True, "guesses the next token, as the configuration says"),
        (config_of(target_layer_ids=[0, 1], query_zero_predicts_next=True), True, "as the configuration says"),
        ({"architectures": ["DSparkDraftModel"]}, True, "as in DSpark"),
        ({"speculators_model_type": "dspark"}, True, "as in DSpark"),
        (config_of(target_layer_ids=[0, 1], projector_type="dspark"), True, "as in DSpark"),
        ({"markov_rank": 0}, True, "as in what DeepSpec trains"),
        ({"architectures": ["DSparkDraftModel"], "sample_from_anchor": False}, False, "as the configuration says"),
    ],
)
def test_rows_come_in_two_layouts(fields: dict[str, Any], first: bool, told: str, tmp_path: Path) -> None:
    write_block(some_block("dflash"), tmp_path, "tiny", "zlab")
    change(tmp_path, **(config_of(target_layer_ids=[0, 1]) | fields))
    saved = read_block(tmp_path, 10)
    assert saved.head.sizes.anchor_first is first
    assert saved.head.sizes.num_guesses == 3 + first
    assert told in saved.told


@pytest.mark.parametrize(
    ("fields", "causal", "window"),
    [
        ({}, False, None),
        ({"is_causal": True}, True, None),
        (config_of(target_layer_ids=[0, 1], causal_head=True), True, None),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 7}, True, 7),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 7, "is_causal": False}, False, 7),
        ({"sliding_window": 7}, False, None),
    ],
)
def test_rows_see_each_other_or_not(fields: dict[str, Any], causal: bool, window: int | None, tmp_path: Path) -> None:
    write_block(some_block("dflash"), tmp_path, "tiny", "zlab")
    change(tmp_path, **({"is_causal": None} | config_of(target_layer_ids=[0, 1]) | fields))
    sizes = read_block(tmp_path, 10).head.sizes
    assert (sizes.causal, sizes.window) == (causal, window)


def test_other_names_of_tensors_are_known(tmp_path: Path) -> None:
    head = some_block("dflash", num_layers=1)
    write_block(head, tmp_path, "tiny", "zlab", dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed: dict[str, Any] = {name.replace(".", "__"): None for name in tensors}
    for name, tensor in tensors.items():
        new = name.replace("layers.0.", "midlayer.").replace("hidden_norm.", "encoder.output_norm_enc.")
        renamed[("encoder.fc.weight" if name == "fc.weight" else new).replace(".", "__")] = tensor
    change_tensors(tmp_path, **renamed, verifier_norm__weight=torch.ones(48))
    assert torch.equal(read_block(tmp_path, 10).head.fc.weight, head.fc.weight)


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 9}, "contradicts itself: block_size 9 and block_size 4"),
        ({"aux_hidden_state_layer_ids": [5, 6]}, r"contradicts itself: outputs of layers \[-1, 0\], and inputs"),
        ({"sample_from_anchor": True}, "contradicts itself: sample_from_anchor True and sample_from_anchor False"),
        (config_of(target_layer_ids=[0, 9]) | {"is_causal": None}, "0 to 9 before its last norm"),
        (config_of(target_layer_ids=[0, 1, 2]), "fc.weight takes 96 numbers, not 3 hidden states of 48"),
        (config_of(mask_token_id=None, target_layer_ids=[0, 1]), "lacks block_size or mask_token_id"),
        (config_of(mask_token_id=VOCAB, target_layer_ids=[0, 1]), "makes no sense"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layers of several kinds"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "sliding layers, and no sliding_window"),
        ({"markov_head_type": "fir"}, "a Markov head of the kind 'fir'"),
        ({"markov_rank": 6}, "lacks the tensor markov_head.markov_w1.weight"),
        ({"architectures": ["DFlash2DraftModel"]}, "lacks selector_top_k"),
        ({"num_attention_heads": "many"}, "makes no sense"),
        ({"target_hidden_size": 10**12}, "hidden states"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(fields: Any, message: str, tmp_path: Path) -> None:
    write_block(some_block("dflash"), tmp_path, "tiny", "zlab")
    change(tmp_path, **fields)
    with pytest.raises(ModelError, match=message):
        read_block(tmp_path, 10)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc__weight": None}, "no block head"),
        ({"layers__1__self_attn__k_norm__weight": None}, "lacks the tensor layers.1.self_attn.k_norm.weight"),
        ({"candidate_selector__successor_codebook": torch.zeros(1)}, "lacks selector_top_k"),
        ({"prefix_gru__weight_ih_l0": torch.zeros(1)}, "doesn't have: prefix_gru.weight_ih_l0"),
        ({"norm__weight": torch.zeros(3)}, r"norm.weight is \[3\], not \[48\]"),
        ({"norm__weight": torch.full((48,), torch.nan)}, "no finite number"),
    ],
)
def test_wrong_tensors_are_named(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_block(some_block("dflash"), tmp_path, "tiny", "zlab")
    change_tensors(tmp_path, **tensors)
    with pytest.raises(ModelError, match=message):
        read_block(tmp_path, 10)


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({"candidate_selector__predecessor_codebook": None}, {}, "lacks the tensor candidate_selector.predecessor"),
        ({"candidate_selector__successor_codebook": torch.zeros(9, 6)}, {}, r"codebook is \[9, 6\], not \[120, 6\]"),
        ({"layers__1__mlp_conv__base_kernel": None}, {}, "lacks the tensor layers.1.mlp_conv.base_kernel"),
        ({"layers__0__attention_conv__base_kernel": torch.zeros(48)}, {}, "makes no sense|not"),
        ({"layers__0__mlp_conv__kernel_projection__weight": torch.zeros(6, 48)}, {}, r"is \[6, 48\], not \[12, 48\]"),
        ({"markov_head__markov_w1__weight": torch.zeros(VOCAB, 6)}, {}, "doesn't have: markov_head.markov_w1"),
        ({}, {"conv_group_size": 24}, r"kernel_projection.weight is \[12, 48\], not \[8, 48\]"),
        ({}, {"conv_group_size": 7}, "multiple of conv_group"),
        ({}, {"selector_top_k": 0}, "makes no sense: candidates"),
        ({}, {"selector_top_k": VOCAB + 1}, "can't take from 121 tokens"),
        ({}, {"final_logit_softcapping": -1.0}, "makes no sense: softcap"),
        ({}, {"output_multiplier": "much"}, "makes no sense: logit_scale"),
    ],
)
def test_wrong_heads_of_dflash_2_are_refused(
    tensors: Any, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_block(some_block("dflash2"), tmp_path, "tiny", "zlab")
    change_tensors(tmp_path, **tensors)
    own = json.loads((tmp_path / "config.json").read_text())["dflash_config"]
    change(tmp_path, dflash_config=own | fields)
    with pytest.raises(ModelError, match=message):
        read_block(tmp_path, LAYERS)


def test_what_a_configuration_of_dflash_2_may_leave_out(tmp_path: Path) -> None:
    write_block(head := some_block("dflash2"), tmp_path, "tiny", "zlab")
    own = json.loads((tmp_path / "config.json").read_text())["dflash_config"]
    for name in ("conv_kernel_size", "conv_group_size", "selector_rank", "output_multiplier"):
        del own[name]
    change(tmp_path, dflash_config=own | {"final_logit_softcapping": None}, input_embedding_scale=None)
    scales = {"logit_scale": 1.0, "softcap": None}
    assert read_block(tmp_path, LAYERS).head.sizes == head.sizes.model_copy(update=scales)


@pytest.mark.parametrize(("form", "said"), [("rnn", "gated"), ("gated", "vanilla"), ("dspark", "rnn")])
def test_a_markov_head_is_of_the_kind_that_it_is_said_to_be(form: str, said: str, tmp_path: Path) -> None:
    write_block(some_block(form), tmp_path, "tiny", "deepspec")
    change(tmp_path, markov_head_type=said)
    with pytest.raises(ModelError, match=f"is said to be '{said}'"):
        read_block(tmp_path, LAYERS)


def test_wrong_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no block head"):
        read_block(tmp_path, 10)
    with pytest.raises(OptionError, match="unknown layout 'other'"):
        write_block(some_block(), tmp_path, "tiny", "other")
    with pytest.raises(OptionError, match="give embed_tokens too"):
        write_block(some_block(), tmp_path, "tiny", "speculators")
    write_block(some_block(), tmp_path, "Other-7B", "zlab", About(fingerprint=Fingerprint(config="else")))
    with pytest.raises(PairingError, match="made for Other-7B"):
        read_block(tmp_path, 10, Fingerprint(config="this"))


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 3},
        {"block_size": 1},
        {"mask_token": VOCAB},
        {"markov": "gated"},
        {"confident_by_token": True},
        {"markov": "selector", "markov_rank": 2},
        {"candidates": 4},
        {"markov": "selector", "markov_rank": 2, "candidates": VOCAB + 1},
        {"conv_taps": 2, "conv_group": 7},
    ],
)
def test_sizes_that_make_no_sense_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"multiple of|two rows|none of 120|Markov head|selector"):
        some_block(**sizes)
