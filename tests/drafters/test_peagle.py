"""P-EAGLE: what its trees are made of, what is kept of texts, its files, and that it is lossless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PreTrainedModel

from tests.conftest import decode
from tests.drafters.sampled import assert_has_the_target_s_distribution
from tests.drafters.test_eagle import some_head
from tests.heads.test_eagle_files import LAYERS, assert_same, change, change_tensors
from tests.tiny_models import VOCAB, request, some_tokens, tiny
from tokentree import LLM, SamplingParams
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.eagle import peagle
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.drafters.pard import Pard
from tokentree.engines.base import Engine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError, OptionError, PairingError
from tokentree.heads.eagle_files import read_eagle, write_eagle
from tokentree.heads.peagle import PEagleHead
from tokentree.heads.saved import About, kind_of
from tokentree.sampling import to_probs
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes import Shape, shape
from tokentree.train.run_eagle import _begun

MASK, SLOTS, FILE = 9, 5, "model.safetensors"
FORMS: dict[str, dict[str, Any]] = {
    "four layers": {"num_layers": 4, "own_embedding": True},
    "few tokens": {"known": 60, "num_layers": 2, "norm_before_residual": True, "fc_norm": True, "norm_output": True},
    "one layer": {"norm_before_fc": True, "own_output": False},
}
WIDE = {"hidden_size": 64, "intermediate_size": 96}


def some_peagle(form: str = "four layers", seed: int = 0, **sizes: Any) -> PEagleHead:
    made = some_head(3, seed=seed, **{"mask_token": MASK, "slots": SLOTS} | FORMS[form] | sizes)
    assert isinstance(made, PEagleHead)
    return made


@torch.inference_mode()
def said_by(head: PEagleHead, model: PreTrainedModel, tokens: list[int], masks: int = SLOTS - 1) -> torch.Tensor:
    """float32[masks + 1, vocab]: log-probabilities of what comes behind ``tokens``, by the paper's formulas. All is
    computed anew, of the states that the model itself gives for all tokens but the last."""
    states = model(input_ids=torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    taps = torch.cat([states[tap][0] for tap in head.sizes.taps], -1)
    known = head.fuse(torch.cat([taps, head.mask_hidden[0].expand(masks, -1)]))
    embed: Any = model.get_input_embeddings() if head.embed_tokens is None else head.embed_tokens
    embedded, positions = embed(torch.tensor([*tokens[1:], *[MASK] * masks])), torch.arange(len(known))

    def behind(layer: Any, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        q, k, v = layer.qkv(x).unflatten(-1, (-1, head.sizes.head_dim)).split([4, 2, 2], 1)
        q, k, v = (part.transpose(0, 1)[None] for part in (head.rotate(q, positions), head.rotate(k, positions), v))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)
        x = residual + layer.o_proj(seen)
        gate, up = layer.gate_up(layer.post_attention_layernorm(x)).chunk(2, -1)
        return x + layer.down_proj(silu(gate) * up)  # type: ignore[no-any-return]

    normed = head.hidden_norm(known)
    residual = normed if head.sizes.norm_before_residual else known
    x = behind(head, torch.cat([head.input_layernorm(embedded), normed], -1), residual)
    for layer in head.layers:
        x = behind(layer, layer.input_layernorm(x), x)  # type: ignore[operator]
    output: Any = model.get_output_embeddings() if head.lm_head is None else head.lm_head
    logits = output(head.norm(x[len(tokens) - 2 :]))
    if head.token_map is not None:
        logits = torch.full((len(logits), VOCAB), -torch.inf).index_copy(1, head.token_map, logits)
    said: torch.Tensor = logits.log_softmax(-1)
    return said


class Kept(Pard):
    """A drafter that remembers what it proposed."""

    seen: list[tuple[list[int], int, Draft]]

    @classmethod
    def of(cls, head: PEagleHead, engine: Engine) -> Kept:
        made = object.__new__(cls)
        made.__dict__.update(peagle(head, engine).__dict__, seen=[])
        return made

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = super().propose(seqs, shape, sampled)
        self.seen += [(list(seq.tokens), seq.room, draft) for seq, draft in zip(seqs, drafts, strict=True)]
        return drafts


# -- what it drafts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "family", "lengths"),
    [("four layers", "llama", (11, 40, 1)), ("few tokens", "gemma3", (11,)), ("one layer", "llama", (2,))],
)
def test_each_node_has_the_probability_that_computing_it_anew_gives(
    form: str, family: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokentree.engines.head_engine.PREFILL_ROWS", 7)
    model, head = tiny(family), some_peagle(form)
    engine = TorchEngine(model)
    drafter, grown = Kept.of(head, engine), 0
    prompts = [some_tokens(length, seed=length) for length in lengths]
    plain = decode(engine, [request(prompt, max_tokens=14) for prompt in prompts])
    seqs = [request(prompt, max_tokens=14) for prompt in prompts]
    for seq, text in zip(seqs, plain, strict=True):
        seq.references = [[*seq.tokens, *text]]
    assert decode(engine, seqs, Merged([drafter, NGram()]), "3x2x1x1x1") == plain
    assert max(step[1] for seq in seqs for step in seq.metrics.steps) > 2  # paths of several tokens were accepted
    for tokens, room, draft in drafter.seen:
        assert draft.depth == (min(SLOTS, room - 1) if len(tokens) > 1 else 0)  # of one token nothing has been read
        expected = said_by(head, model, tokens) if len(draft) > 1 else torch.empty(0)
        for node in range(1, len(draft)):
            row, token = expected[draft.depths[node] - 1], draft.tokens[node]
            assert draft.log_probs[node] == pytest.approx(float(row[token]), abs=2e-3)
            assert abs(int((row > row[token]).sum()) - draft.ranks[node]) <= 1  # equal but for rounding
            grown += 1
    assert grown > 30


def test_children_are_drawn_from_what_is_said_of_their_place() -> None:
    model, head = tiny("llama"), some_peagle("few tokens")
    engine, seq = TorchEngine(model), request(some_tokens(9), temperature=0.7, top_k=20, max_tokens=20)
    drafter = peagle(head, engine)
    engine.prefill(seq)
    draft = drafter.propose([seq], shape("3x2x1"), sampled=True)[0]
    expected = said_by(head, model, seq.tokens)
    assert draft.sampled is not None
    assert len(draft.sampled) == 10  # of all nodes that have children
    for node, probs in draft.sampled.items():
        assert torch.allclose(probs, to_probs(expected[draft.depths[node]], seq.params), atol=1e-4)


def test_rows_of_masks_are_never_kept() -> None:
    engine = TorchEngine(tiny("llama"))
    drafter = peagle(some_peagle(), engine)
    seq = request(some_tokens(9), max_tokens=30)
    engine.prefill(seq)
    drafter.prefill([seq])
    heads: Any = drafter
    assert heads._engine.committed(seq) == 8  # of 9 tokens: the last one goes with the masks
    draft = drafter.propose([seq], shape("1x1x1"), sampled=False)[0]
    assert draft.depth == 3
    drafter.observe([seq], [draft], None, [Accepted([0, 1, 2], [*draft.path_tokens(2), 7])])  # type: ignore[arg-type]
    assert heads._engine.committed(seq) == 9
    drafter.release([seq])
    assert not heads._engine._states
    assert not heads._rows


# -- losslessness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "cut", "family", "dtype"),
    [("four layers", "cost", "llama", torch.bfloat16), ("few tokens", "3x2x1", "gemma3", torch.float32)],
)
def test_greedy_ids_and_sampled_ids_are_plain_s(form: str, cut: str, family: str, dtype: torch.dtype) -> None:
    engine = TorchEngine(tiny(family, dtype, **WIDE))
    drafter = peagle(some_peagle(form, **WIDE), engine)
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        prompts = [some_tokens(11), some_tokens(4, seed=1), some_tokens(1, seed=2)]
        plain = decode(engine, [request(p, max_tokens=12, **options) for p in prompts])
        seqs = [request(p, max_tokens=12, **options) for p in prompts]
        assert decode(engine, seqs, drafter, cut) == plain
        assert sum(seq.metrics.drafted_tokens for seq in seqs) > 0


@pytest.mark.nightly
def test_sampling_has_the_target_s_distribution() -> None:
    model = tiny("llama", vocab_size=6)
    engine = TorchEngine(model)
    drafter: Drafter = peagle(some_peagle("few tokens", 1, known=4, vocab_size=6, mask_token=2), engine)
    assert_has_the_target_s_distribution(model, engine, drafter, "3x2", "rejection")


# -- files -------------------------------------------------------------------------------------------------------------


def write(head: PEagleHead, folder: Path) -> None:
    write_eagle(head, folder, "tiny", "speculators", About(taps=[0, 1, 2]))


def flatten(folder: Path) -> None:
    """What lies in ``folder``, with names of EAGLE-3's own code, and all fields at the top."""
    config = json.loads((folder / "config.json").read_text())
    nested = {"speculators_config": None, "speculators_model_type": None, "transformer_layer_config": None}
    change(folder, **nested, **config["transformer_layer_config"])
    tensors = {name.replace("layers.0.", "midlayer."): t for name, t in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE)


@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip(form: str, tmp_path: Path) -> None:
    head = some_peagle(form)
    write(head, tmp_path)
    assert kind_of(tmp_path) == "eagle"
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / FILE).items()}
    assert shapes["mask_hidden"] == [1, 1, 144]
    layers = [name for name in shapes if name.startswith("layers.")]
    assert len(layers) == 9 * head.sizes.num_layers + 1  # the first one's hidden_norm
    saved = read_eagle(tmp_path, LAYERS)
    assert isinstance(saved.head, PEagleHead)
    assert saved.head.sizes == head.sizes
    assert_same(saved.head, head)
    flatten(tmp_path)
    change(tmp_path, mask_token_id=None, ptd_token_id=MASK, pard_token=MASK)
    assert read_eagle(tmp_path, LAYERS).head.sizes == head.sizes.model_copy(update={"slots": 8})
    with pytest.raises(OptionError, match="P-EAGLE heads are written in speculators' layout"):
        write_eagle(head, tmp_path, "tiny")


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"mask_token_id": None}, {}, r"names no mask token, or several: \{\}"),
        ({"pard_token": 3}, {}, "names no mask token, or several: {'mask_token_id': 9, 'pard_token': 3}"),
        ({"mask_token_id": VOCAB}, {}, "the mask token 120 is none of 120 tokens"),
        ({"mask_token_id": "9"}, {}, "mask_token: Input should be a valid integer"),
        ({"mask_token_id": True}, {}, "mask_token: Input should be a valid integer"),
        ({"num_hidden_layers": 3}, {}, "has 2 layers, and num_hidden_layers=3"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, {}, "layers that see a window alone"),
        ({"speculators_config": {"proposal_methods": [{"speculative_tokens": -1}]}}, {}, "slots: Input should be"),
        ({"speculators_config": {"proposal_methods": 3}}, {}, "makes no sense"),
        ({"layer_types": 3}, {}, "makes no sense"),
        ({}, {"mask_hidden": None}, "lacks the tensor mask_hidden"),
        ({}, {"mask_hidden": torch.zeros(1, 1, 48)}, r"mask_hidden is \[1, 1, 48\], not \[1, 1, 144\]"),
        ({}, {"layers__1__mlp__up_proj__weight": None}, r"lacks the tensor layers.1.mlp.up_proj.weight"),
        ({}, {"layers__1__self_attn__q_norm__weight": torch.zeros(16)}, "head doesn't have: layers.1.self_attn"),
        ({}, {"layers__1__input_layernorm__weight": torch.zeros(3)}, r"input_layernorm.weight is \[3\], not \[48\]"),
        ({"num_hidden_layers": None}, {"layers__7__mlp__up_proj__weight": torch.zeros(3)}, "lacks the tensor layers.2"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(fields: Any, tensors: Any, message: str, tmp_path: Path) -> None:
    write(some_peagle("few tokens"), tmp_path)
    flatten(tmp_path)
    change(tmp_path, **fields)
    change_tensors(tmp_path, **tensors)
    with pytest.raises(ModelError, match=message):
        read_eagle(tmp_path, LAYERS)


def test_a_head_of_another_model_is_refused() -> None:
    engine = TorchEngine(tiny("llama"))
    with pytest.raises(PairingError, match="hidden states of 32 numbers, and the target has 48"):
        peagle(some_peagle(hidden_size=32), engine)
    wrong = some_peagle("few tokens")
    assert wrong.token_map is not None
    wrong.token_map[-1] = VOCAB
    with pytest.raises(PairingError, match="tokens that the target doesn't have"):
        peagle(wrong, engine)


def test_a_folder_is_a_drafter(tmp_path: Path) -> None:
    write(some_peagle(), tmp_path)
    params = SamplingParams(max_tokens=30)
    llm = LLM(tiny("llama"), heads=tmp_path, drafter="eagle", shape="2x1x1")
    assert isinstance(llm.decoder.drafter, Pard)
    result = llm.generate([some_tokens(9)], params)[0]
    assert result.token_ids == llm.plain().generate([some_tokens(9)], params)[0].token_ids
    assert llm.using("merged").decoder.drafter.names[0] == "eagle"
    with pytest.raises(OptionError, match="P-EAGLE heads aren't trained here"):
        _begun(llm, tmp_path, some_head(3).sizes, 2)
