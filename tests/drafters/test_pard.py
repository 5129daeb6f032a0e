"""Draft models that guess several tokens at once: what their trees are made of, what is kept of texts, that they are
lossless, and which are refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import by_night, decode, shown
from tests.drafters.sampled import assert_has_the_target_s_distribution
from tests.drafters.test_draft_model import CountingEngine
from tests.tiny_models import VOCAB, full_logits, request, save_model, some_tokens, tiny, tiny_pair, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.draft import Draft
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.drafters.pard import Pard
from tokentree.engines.drafting import DraftEngine
from tokentree.engines.from_cache import ReadyEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError, OptionError, PairingError
from tokentree.sampling import to_probs
from tokentree.sequence import Sequence
from tokentree.shapes import shape

MASK, SLOTS = 7, 5
SHAPES = ["cost", "3x2x1", "chain:8", "dynamic:nodes=12", "paths:[[0],[1],[0,0],[4],[1,2],[1,2,0]]"]
WIDE = {"hidden_size": 64, "intermediate_size": 96}
MODELS = [("llama", torch.bfloat16), ("gemma3", torch.float32)]
CASES = [(form, *MODELS[place % 2]) for place, form in enumerate(SHAPES)]
PARD = {"spd_type": "pard", "pard_token": MASK}


class Kept(Pard):
    """Remembers what it proposed."""

    def __init__(self, engine: DraftEngine) -> None:
        super().__init__(engine, VOCAB, MASK, SLOTS)
        self.seen = list[tuple[list[int], int, Draft]]()
        self.passes = 0  # that had a draft

    def propose(self, seqs: list[Sequence], shape: Any, sampled: bool) -> list[Draft]:
        drafts = super().propose(seqs, shape, sampled)
        self.passes += any(len(draft) > 1 for draft in drafts)
        self.seen += [(list(seq.tokens), seq.room, draft) for seq, draft in zip(seqs, drafts, strict=True)]
        return drafts


def said_by(model: PreTrainedModel, tokens: list[int], masks: int = SLOTS - 1) -> torch.Tensor:
    """float32[masks + 1, vocab]: logits of what comes behind ``tokens``, all computed anew."""
    return full_logits(model, [*tokens, *[MASK] * masks])[len(tokens) - 1 :]


def decoded(target: PreTrainedModel, drafter: Kept, lengths: Any, form: str) -> list[Sequence]:
    """Texts, decoded beside a look-up that knows how they go on."""
    engine = TorchEngine(target)
    prompts = [some_tokens(length, seed=length) for length in lengths]
    plain = decode(engine, [request(prompt, max_tokens=16) for prompt in prompts])
    seqs = [request(prompt, max_tokens=16) for prompt in prompts]
    for seq, text in zip(seqs, plain, strict=True):
        seq.references = [[*seq.tokens, *text]]
    assert decode(engine, seqs, Merged([drafter, NGram()]), form) == plain
    assert max(step[1] for seq in seqs for step in seq.metrics.steps) > 2  # paths of several tokens were accepted
    return seqs


# -- what it drafts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "lengths"), [("llama", (11, 40, 1)), ("gemma3", (11,))])
def test_each_node_has_the_probability_that_computing_it_anew_gives(family: str, lengths: tuple[int, ...]) -> None:
    target, model = tiny("llama"), tiny(family, seed=3)
    drafter, grown = Kept(TorchEngine(model)), 0
    decoded(target, drafter, lengths, "3x2x1x1x1")
    for tokens, room, draft in drafter.seen:
        assert draft.depth == min(SLOTS, room - 1)
        expected = said_by(model, tokens).log_softmax(-1)
        for node in range(1, len(draft)):
            row, token = expected[draft.depths[node] - 1], draft.tokens[node]
            assert draft.log_probs[node] == pytest.approx(float(row[token]), abs=2e-3)
            assert abs(int((row > row[token]).sum()) - draft.ranks[node]) <= 1  # equal but for rounding
            grown += 1
    assert grown > 50


def test_children_are_drawn_from_what_is_said_of_their_place() -> None:
    model = tiny("llama", seed=3)
    drafter = Pard(TorchEngine(model), VOCAB, MASK, SLOTS)
    seq = request(some_tokens(9), temperature=0.7, top_k=20, max_tokens=20)
    draft = drafter.propose([seq], shape("3x2x1"), sampled=True)[0]
    expected = said_by(model, seq.tokens)
    assert draft.sampled is not None
    assert len(draft.sampled) == 10  # of all nodes that have children
    for node, probs in draft.sampled.items():
        assert torch.allclose(probs, to_probs(expected[draft.depths[node]], seq.params), atol=1e-4)


@pytest.mark.parametrize(("target_vocab", "draft_vocab"), [(120, 128), (128, 120)])
def test_vocabularies_padded_to_different_sizes_go_together(target_vocab: int, draft_vocab: int) -> None:
    target, draft = tiny_pair(target_vocab, draft_vocab)
    engine, drafter = TorchEngine(target), Pard(TorchEngine(draft), target_vocab, draft_vocab - 1)
    for accept, temperature in (("match", 0.0), ("rejection", 1.0)):
        seq = request(some_tokens(9), max_tokens=20, temperature=temperature)
        decode(engine, [seq], drafter, "2x2", accept)
        assert seq.metrics.accepted_tokens > 0
    assert not any(token >= 120 for token in seq.output_ids)


def test_a_token_that_it_does_not_have_ends_drafting_and_not_decoding() -> None:
    target, draft = tiny_pair(128, 120)
    engine, drafter = TorchEngine(target), Pard(TorchEngine(draft), 128, MASK)
    prompt = [*some_tokens(9), 125, 9]
    seq = request(prompt, max_tokens=12)
    assert decode(engine, [seq], drafter, "2x2") == decode(engine, [request(prompt, max_tokens=12)])
    assert seq.metrics.drafted_tokens == 0


# -- what is kept of a text --------------------------------------------------------------------------------------------


def test_each_token_is_computed_once_and_masks_are_never_kept() -> None:
    target, draft = tiny_pair()
    engine = CountingEngine(draft)
    drafter = Kept(engine)
    seqs = decoded(target, drafter, (11, 5), "3x2x1x1x1")
    for seq in seqs:
        texts = [text for text in engine.computed if text == tuple(seq.tokens[: len(text)])]
        assert max(Counter(texts).values()) == 1
    masked = [text for text in engine.computed if text[-1] == MASK]
    drafted = sum(draft.depth for *_, draft in drafter.seen)
    assert len(masked) == drafted - sum(len(draft) > 1 for *_, draft in drafter.seen)
    assert len(engine.rows_of_calls) == drafter.passes
    assert all(text in {tuple(seq.tokens[: len(text)]) for seq in seqs} for text in {*engine.computed} - {*masked})
    assert not drafter._rows


def test_a_text_that_begins_alike_reuses_rows_and_gives_the_same_drafts() -> None:
    target, draft = tiny_pair()
    engine, own = TorchEngine(target), TorchEngine(draft, prefix_bytes=10_000_000)
    drafter, text = Kept(own), some_tokens(40)
    results = [decode(engine, [request([*text, 7], max_tokens=8)], drafter, "2x2") for _ in range(2)]
    assert results[0] == results[1]
    assert own.prefix_nbytes > 0
    half = len(drafter.seen) // 2
    assert [str(one[2]) for one in drafter.seen[:half]] == [str(one[2]) for one in drafter.seen[half:]]


def test_no_draft_reaches_beyond_its_context() -> None:
    target, draft = tiny_pair(draft={"max_position_embeddings": 30})
    engine, drafter = TorchEngine(target), Kept(TorchEngine(draft))
    plain = decode(engine, [request(some_tokens(11), max_tokens=40)])
    assert decode(engine, [request(some_tokens(11), max_tokens=40)], drafter, "chain:8") == plain
    for tokens, room, draft_ in drafter.seen:
        # the row of the n-th mask lies at position len(tokens) - 1 + n
        assert draft_.depth == max(0, min(SLOTS, room - 1, 30 - len(tokens) + 1))


# -- losslessness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "family", "dtype"), by_night(CASES, but=CASES[:2]), ids=shown)
def test_greedy_ids_and_sampled_ids_are_plain_s(form: str, family: str, dtype: torch.dtype) -> None:
    engine = TorchEngine(tiny(family, dtype, **WIDE))
    drafter = Pard(TorchEngine(tiny(family, dtype, seed=3, **WIDE)), VOCAB, MASK)
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        prompts = [some_tokens(11), some_tokens(4, seed=1), some_tokens(1, seed=2)]
        plain = decode(engine, [request(p, max_tokens=12, **options) for p in prompts])
        seqs = [request(p, max_tokens=12, **options) for p in prompts]
        assert decode(engine, seqs, drafter, form) == plain
        assert sum(seq.metrics.drafted_tokens for seq in seqs) > 0


@pytest.mark.parametrize("accept", by_night(["rejection", "match", "traversal"], but=["rejection"]))
def test_sampling_has_the_target_s_distribution(accept: str) -> None:
    model = tiny("llama", vocab_size=6)
    drafter = Pard(TorchEngine(tiny("llama", vocab_size=6, seed=3)), 6, mask_token=2)
    assert_has_the_target_s_distribution(model, TorchEngine(model), drafter, "3x2", accept)


# -- which draft models do so ------------------------------------------------------------------------------------------


def saved(folder: Path, model: PreTrainedModel, said: dict[str, Any], **options: Any) -> Path:
    for name, value in said.items():
        setattr(model.config, name, value)
    return save_model(folder, model, tiny_tokenizer(**options))


def test_a_configuration_says_that_a_model_guesses_several_tokens_at_once(tmp_path: Path) -> None:
    target, smaller = tiny_pair(300, 300, **WIDE)
    model = saved(tmp_path / "target", target, {})
    pard, other = saved(tmp_path / "pard", smaller, PARD), saved(tmp_path / "other", tiny_pair(300, 300, **WIDE)[1], {})
    params, prompts = SamplingParams(max_tokens=20), ["A tree of", "one two"]
    for again in range(2):
        llm = LLM(model, draft_model=[pard, other], shape="2x2x1")
        assert isinstance(llm._parts.draft_engines[0][1], ReadyEngine) == bool(again)
        assert isinstance(llm.decoder.drafter, Merged)
        assert [type(one) for one in llm.decoder.drafter.drafters] == [Pard, DraftModel]
        results = llm.generate(prompts, params)
        assert [one.token_ids for one in results] == [one.token_ids for one in llm.plain().generate(prompts, params)]
        assert all(one.metrics.accepted_by_source["pard"] > 0 for one in results)
    smaller.config.spd_type = None  # the mask token alone says so too
    alone = LLM(target, draft_model=smaller, accept="rejection", shape="3x1x1")
    assert isinstance(alone.decoder.drafter, Pard)
    few = alone.using("draft_model:slots=2", "chain:4", "match")
    seq = request(some_tokens(5))
    assert few.decoder.drafter.propose([seq], few.decoder.shape, False)[0].depth == 2
    with pytest.raises(OptionError, match="slots=0 is no number of tokens"):
        alone.using("draft_model:slots=0")
    with pytest.raises(PairingError, match="slots=2 is for a draft model that guesses several tokens at once"):
        LLM(target, "draft_model:slots=2", tiny("llama", vocab_size=300))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"spd_type": "pard"}, "pard_token=None of its configuration is none of its 120 tokens"),
        (PARD | {"pard_token": -1}, "pard_token=-1 "),
        (PARD | {"pard_token": VOCAB}, "pard_token=120 "),
        (PARD | {"pard_token": True}, "pard_token=True "),
        (PARD | {"pard_token": "7"}, "pard_token='7' "),
        (PARD | {"spd_type": "pard2"}, "has spd_type 'pard2' in its configuration: only 'pard' is read"),
        (PARD | {"spd_type": ["pard"]}, r"has spd_type \['pard'\]"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(said: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    for name, value in said.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelError, match=message):
        LLM(tiny("llama"), draft_model=model)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    target = saved(tmp_path / "target", tiny("llama", vocab_size=300), {})
    draft = saved(tmp_path / "draft", tiny("llama", vocab_size=300), PARD, texts=["other texts"])
    with pytest.raises(PairingError, match=r"'draft' guesses several tokens at once .* and has another tokenizer"):
        LLM(target, draft_model=draft)
