"""What is written in speculators' layout is loaded by that package's own classes, and means the same there.

Run by `make peers`, which installs the package beside the environment: it asks for an older transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from speculators.models.dflash.core import DFlashDraftModel
from speculators.models.dspark.core import DSparkDraftModel
from speculators.models.eagle3.core import Eagle3DraftModel

from tests.drafters.test_eagle import NORMS, some_head
from tests.heads.block_heads import some_block
from tests.tiny_models import save_model, some_tokens, tiny, tiny_tokenizer
from tokentree.heads.block_files import write_block
from tokentree.heads.eagle_files import write_eagle
from tokentree.heads.saved import About

TAPS = (2, 3, 4)


@pytest.mark.parametrize(("known", "norms"), [(None, {}), (60, {}), *((None, norms) for norms in NORMS)])
@torch.inference_mode()
def test_its_own_class_loads_what_is_written(tmp_path: Path, known: int | None, norms: dict[str, bool]) -> None:
    target = tiny("llama", num_hidden_layers=6)
    base = save_model(tmp_path / "base", target, tiny_tokenizer())
    head = some_head(3, known, taps=TAPS, **norms | {"own_output": True})
    write_eagle(head, tmp_path / "head", str(base), "speculators", About(taps=list(TAPS)), dtype=torch.float32)
    theirs: Any = Eagle3DraftModel.from_pretrained(tmp_path / "head")
    assert theirs.config.eagle_aux_hidden_state_layer_ids == list(TAPS)
    loaded = theirs.state_dict()
    for name, tensor in load_file(tmp_path / "head/model.safetensors").items():
        assert torch.equal(loaded[name].to(tensor.dtype), tensor), name

    ids = some_tokens(12)
    rows = len(ids) - 1
    states = target(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    read = torch.cat([states[tap] for tap in TAPS], -1)[:, :rows]
    embed: Any = target.get_input_embeddings()
    embedded = embed(torch.tensor([ids[1:]]))
    normed = read if theirs.input_norm is None else theirs.input_norm(read)
    if theirs.fc_norm is not None:
        normed = torch.cat([norm(tap) for norm, tap in zip(theirs.fc_norm, read.chunk(3, -1), strict=True)], -1)
    x, positions = torch.cat([embedded, theirs.fc(normed)], -1), torch.arange(rows)
    theirs.layers[0].self_attn.config._attn_implementation = "eager"
    said = theirs.layers[0](
        x, attention_mask=torch.full((rows, rows), -1e9).triu(1)[None, None], position_ids=positions[None],
        position_embeddings=theirs.rotary_emb(x, positions[None]),
    )  # fmt: skip
    expected = theirs.lm_head(theirs.norm(said[0] if isinstance(said, tuple) else said))[0]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key = head.rotate(query, positions), head.rotate(key, positions)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    got = head.logits(head(embedded[0], head.fuse(read[0]), attend), lambda hidden: hidden)
    assert torch.allclose(got, expected, atol=1e-4)
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("form", ["dflash", "dspark", "gated"])
@pytest.mark.parametrize("known", [None, 60])
@torch.inference_mode()
def test_its_own_classes_load_block_heads_and_say_the_same_of_their_parts(
    tmp_path: Path, form: str, known: int | None
) -> None:
    target = tiny("llama", num_hidden_layers=6)
    base = save_model(tmp_path / "base", target, tiny_tokenizer())
    head = some_block(form, taps=(2, 4), draft_vocab_size=known)
    output = target.lm_head.weight if head.token_map is None else target.lm_head.weight[head.token_map]
    write_block(
        head, tmp_path / "head", str(base), "speculators", About(taps=[2, 4]), target.model.embed_tokens.weight, output,
        dtype=torch.float32,
    )  # fmt: skip
    kind = DFlashDraftModel if form == "dflash" else DSparkDraftModel
    theirs: Any = kind.from_pretrained(tmp_path / "head")
    assert theirs.config.aux_hidden_state_layer_ids == [2, 4]
    assert theirs.config.sample_from_anchor is head.sizes.anchor_first
    assert (theirs.config.block_size, theirs.config.mask_token_id) == (head.sizes.block_size, head.sizes.mask_token)
    loaded = theirs.state_dict()
    for name, tensor in load_file(tmp_path / "head/model.safetensors").items():
        assert torch.equal(loaded[name].to(tensor.dtype), tensor), name
    ids = some_tokens(12)
    states = target(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    read = torch.cat([states[tap] for tap in (2, 4)], -1)
    assert torch.allclose(theirs.hidden_norm(theirs.fc(read)), head.context(read), atol=1e-5)
