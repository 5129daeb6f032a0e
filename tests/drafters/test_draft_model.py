"""A draft model as drafter: it proposes what a naive use of the model would, and computes every token once."""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny_models import VOCAB, full_logits, request, some_tokens, tiny, tiny_pair
from tokentree.acceptance import acceptance
from tokentree.decoder import Decoder
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.merged import Merged
from tokentree.drafters.none import NoDrafter
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.output import TargetOutput
from tokentree.engines.torch import TorchEngine
from tokentree.sequence import Accepted
from tokentree.sequence import Sequence as Request
from tokentree.shapes import Shape, Static, shape
from tokentree.tree import TokenTree

STATIC, PATHS, PAPER = "2x2x2", "paths:[[0],[0,0],[0,0,0],[0,2],[1],[3],[3,1]]", "dynamic:nodes=10,depth=4,top_k=3"
SHAPES = [STATIC, PATHS, f"{PAPER},min_prob=0,min_reach=0", "chain:4", "2x1x1"]
PROMPT = some_tokens(11)

Scores = dict[tuple[int, ...], float]  # candidate path -> joint log-probability


class CountingEngine:
    """A `DraftEngine` that writes down every text whose last token it computes a row for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._engine = TorchEngine(model, "tree")
        self.vocab_size, self.context = self._engine.vocab_size, self._engine.context
        self.committed, self.commit = self._engine.committed, self._engine.commit
        self.release = self._engine.release
        self.computed: list[tuple[int, ...]] = []
        self.rows_of_calls: list[int] = []

    def prefill(self, seq: Request, upto: int | None = None) -> int:
        known, upto = self.committed(seq), len(seq.tokens) - 1 if upto is None else upto
        self.computed += [tuple(seq.tokens[: end + 1]) for end in range(known, upto)]
        return self._engine.prefill(seq, upto)

    def verify(
        self, seqs: Sequence[Request], trees: Sequence[TokenTree], firsts: Sequence[int] | None = None,
        reading: Sequence[tuple[Request, int]] = (),
    ) -> TargetOutput:  # fmt: skip
        rows = 0
        for seq, tree, first in zip(seqs, trees, firsts or [0] * len(seqs), strict=True):
            before = seq.tokens[: self.committed(seq)]
            for node in range(first, len(tree)):
                self.computed.append((*before, *tree.tokens[tree.path(node)].tolist()))
            rows += len(tree) - first
        self.rows_of_calls.append(rows)
        return self._engine.verify(seqs, trees, firsts, reading)


class Seen:
    """What a decoder tells after each step: the text before it, the draft, and what was accepted."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[int], int, Draft, Accepted]] = []

    def __call__(self, seq: Request, draft: Draft, accepted: Accepted) -> None:
        before = seq.tokens[: -len(accepted.tokens)]
        room = seq.params.max_tokens - (len(before) - len(seq.prompt_ids))
        self.steps.append((seq.id, before, room, draft, accepted))

    @property
    def num_accepted(self) -> int:
        return sum(len(accepted.path) - 1 for *_, accepted in self.steps)


def decode(
    engine: KVEngine, drafter: Drafter, seqs: list[Request], form: str | Shape, seen: Seen | None = None,
    accept: str = "match", max_batch: int = 8,
) -> list[list[int]]:  # fmt: skip
    for _ in Decoder(engine, drafter, shape(form), acceptance(accept), seen).run(seqs, max_batch):
        pass
    return [seq.output_ids for seq in seqs]


def plain(target: PreTrainedModel, prompt: list[int], **options: Any) -> list[int]:
    return decode(TorchEngine(target, "tree"), NoDrafter(), [request(prompt, **options)], "chain:1")[0]


def log_probs(model: PreTrainedModel, text: list[int], width: int = VOCAB) -> list[float]:
    values: list[float] = full_logits(model, text)[-1, :width].log_softmax(-1).tolist()
    return values


def best_children(model: PreTrainedModel, text: list[int], count: int) -> list[tuple[int, float]]:
    """Most probable first."""
    return heapq.nlargest(count, enumerate(log_probs(model, text)), key=lambda item: item[1])


def naive_draft(model: PreTrainedModel, text: list[int], form: str, room: int) -> Scores:
    """The candidates of ``form``, from a full forward of transformers for each path."""
    found: Scores = {}

    def grow(path: tuple[int, ...], score: float, count: int) -> list[tuple[int, ...]]:
        children = best_children(model, [*text, *path], count)
        found.update({(*path, token): score + value for token, value in children})
        return [(*path, token) for token, _ in children]

    depth_limit = room - 1
    if form.startswith("dynamic"):
        level: list[tuple[int, ...]] = [()]
        for _ in range(min(4, depth_limit)):
            below = [child for path in level for child in grow(path, found.get(path, 0.0), 3)]
            level = heapq.nlargest(3, below, key=found.__getitem__)
        return {path: found[path] for path in heapq.nlargest(9, found, key=found.__getitem__)}
    if form.startswith("paths"):
        choices = {(0,), (0, 0), (0, 0, 0), (0, 2), (1,), (3,), (3, 1)}
        ranks: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}  # candidate path -> its ranks
        kept: Scores = {}
        for depth in range(min(3, depth_limit)):
            for path in [path for path in ranks if len(path) == depth]:
                for rank, child in enumerate(grow(path, found.get(path, 0.0), 4)):
                    if (*ranks[path], rank) in choices:
                        ranks[child] = (*ranks[path], rank)
                        kept[child] = found[child]
        return kept
    widths = [1] * 4 if form == "chain:4" else [int(width) for width in form.split("x")]
    level = [()]
    for width in widths[: max(0, depth_limit)]:
        level = [child for path in level for child in grow(path, found.get(path, 0.0), width)]
    return found


def proposed(draft: Draft) -> Scores:
    return {tuple(draft.path_tokens(node)): draft.log_scores[node] for node in range(1, len(draft))}


def assert_proposes(draft: Draft, expected: Scores) -> None:
    got = proposed(draft)
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("form", SHAPES)
def test_it_proposes_at_every_step_what_a_naive_use_of_the_model_would(form: str) -> None:
    target, draft = tiny_pair()
    seen = Seen()
    text = decode(
        TorchEngine(target), DraftModel(TorchEngine(draft), VOCAB), [request(PROMPT, max_tokens=28)], form, seen
    )
    assert text == [plain(target, PROMPT, max_tokens=28)]
    assert seen.num_accepted >= 5
    for _, before, room, drafted, _ in seen.steps:
        assert_proposes(drafted, naive_draft(draft, before, form, room))


@pytest.mark.parametrize("form", [STATIC, PATHS, "chain:4", "4x1"])
def test_no_token_of_a_text_is_computed_twice(form: str) -> None:
    target, draft = tiny_pair()
    engine, seen = CountingEngine(draft), Seen()
    seqs = [request(prompt, max_tokens=30) for prompt in (PROMPT, some_tokens(4, seed=5))]
    decode(TorchEngine(target), DraftModel(engine, VOCAB), seqs, form, seen)
    assert max(Counter(engine.computed).values()) == 1
    assert seen.num_accepted > 5
    for seq in seqs:  # and what the text is made of was computed, up to the last draft
        known = {text for text in engine.computed if text == tuple(seq.tokens[: len(text)])}
        last = max(len(before) for id_, before, room, *_ in seen.steps if id_ == seq.id and room > 1)
        assert {len(text) for text in known} >= set(range(1, last + 1))


def test_a_step_computes_the_new_tokens_and_the_nodes_that_get_children_and_no_other_row() -> None:
    target, draft = tiny_pair()
    engine, seen = CountingEngine(draft), Seen()
    decode(TorchEngine(target), DraftModel(engine, VOCAB), [request(PROMPT, max_tokens=24)], STATIC, seen)
    calls = iter(engine.rows_of_calls)
    unseen = len(PROMPT)  # short enough to be read with the first root
    for _, _, room, _, accepted in seen.steps:
        rows = [next(calls) for _ in range(min(3, room - 1))]
        assert rows == [unseen, 2, 4][: len(rows)]
        # a leaf was never expanded: it goes in with the next root
        unseen = 2 if len(accepted.path) == 4 else 1
    assert next(calls, None) is None


class WantedFor(Static):
    """Wants drafts of texts of an even length alone."""

    def select(self, seq: Request, draft: Draft, level: Any) -> list[int]:
        return super().select(seq, draft, level) if len(seq.prompt_ids) % 2 == 0 else []


def test_a_prompt_is_read_in_parts_once_a_draft_of_its_text_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftModel, "_part", 20)
    engine, shape = CountingEngine(tiny_pair()[1]), WantedFor([2, 1])
    drafter = DraftModel(engine, VOCAB)
    even, odd = seqs = [request([*PROMPT, *range(5, 65 + more)]) for more in (1, 2)]
    drafter.observe_prompt(seqs, 60)
    assert [engine.committed(seq) for seq in seqs] == [0, 0]
    read = list[int]()
    for _ in range(4):
        drafts = drafter.propose(seqs, shape, False)
        read.append(engine.committed(even))
        assert [len(draft) > 1 for draft in drafts] == [len(even.tokens) - read[-1] <= 17, False]
        assert even.metrics.prefill_seconds > 0
    assert read == [20, 40, 60, 60]  # the last tokens go with the root
    assert (engine.committed(odd), odd.metrics.prefill_seconds) == (0, 0)
    drafter.propose([alone := request([*PROMPT, *range(8, 69)])], shape, False)
    assert engine.committed(alone) == 71  # nobody else waits


class Uncut(Static):
    """Grows as a static tree and keeps whatever was proposed."""

    def prune(self, seq: Request, draft: Draft) -> Draft:
        return draft


def test_tokens_accepted_from_elsewhere_are_caught_up_in_the_next_forward() -> None:
    """The verified tree may hold paths that another drafter proposed."""
    target, draft = tiny_pair()
    text = plain(target, PROMPT, max_tokens=20)
    engine = CountingEngine(draft)

    class Oracle(DraftModel):
        def propose(self, seqs: list[Request], shape: Any, sampled: bool) -> list[Draft]:
            super().propose(seqs, shape, sampled)
            known = Draft(seqs[0].tokens[-1])
            node = 0
            for token in text[len(seqs[0].output_ids) :][:3]:
                node = known.add(node, token, 0.0, 0)
            return [known]

    seen = Seen()
    assert decode(TorchEngine(target), Oracle(engine, VOCAB), [request(PROMPT, max_tokens=20)], Uncut([1]), seen) == [
        text
    ]
    assert [len(accepted.tokens) for *_, accepted in seen.steps] == [4] * 5
    assert engine.rows_of_calls == [len(PROMPT), 4, 4, 4, 4]
    assert max(Counter(engine.computed).values()) == 1


class DropsAll(Static):
    """Grows a tree and throws it away, as a shape may do with nodes that turn out not to be worth their time."""

    def prune(self, seq: Request, draft: Draft) -> Draft:
        return draft.take([0])


def test_a_node_that_was_pruned_and_comes_true_is_read_again_as_the_next_root() -> None:
    target, draft = tiny_pair()
    seen = Seen()
    seq = request(PROMPT, max_tokens=20)
    decoder = Decoder(
        TorchEngine(target), DraftModel(TorchEngine(draft), VOCAB), DropsAll([2, 2]), acceptance("match"), seen
    )
    for _ in decoder.run([seq]):
        pass
    assert seq.output_ids == plain(target, PROMPT, max_tokens=20)
    assert seen.num_accepted == 0
    grown = [naive_draft(draft, before, "2x2", room) for _, before, room, *_ in seen.steps]
    assert any(tuple(step[4].tokens) in scores for step, scores in zip(seen.steps, grown, strict=True))


@pytest.mark.parametrize(("target_vocab", "draft_vocab"), [(120, 128), (128, 120)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vocabularies_padded_to_different_sizes_go_together(
    target_vocab: int, draft_vocab: int, temperature: float
) -> None:
    target, draft = tiny_pair(target_vocab, draft_vocab)
    options: dict[str, Any] = {"max_tokens": 24, "temperature": temperature, "top_k": 20, "seed": 3}
    drafter, seen = DraftModel(TorchEngine(draft), target_vocab), Seen()
    got = decode(TorchEngine(target), drafter, [request(PROMPT, **options)], STATIC, seen)
    assert got == [plain(target, PROMPT, **options)]
    assert all(token < 120 for *_, drafted, _ in seen.steps for token in drafted.tokens[1:])
    assert seen.num_accepted > 3
    if not temperature:
        for _, before, room, drafted, _ in seen.steps:
            assert_proposes(drafted, naive_draft(draft, before, STATIC, room))


@pytest.mark.parametrize("where", ["prompt", "output"])
def test_a_token_that_the_draft_model_does_not_have_ends_drafting_and_not_decoding(where: str) -> None:
    target, draft = tiny_pair(128, 120)
    prompt = [*PROMPT, 125, 9] if where == "prompt" else PROMPT
    if where == "output":
        text = plain(target, PROMPT, max_tokens=24)
        hidden = full_logits(target, [*PROMPT, *text[:8]])[-1]
        head = target.state_dict()["lm_head.weight"]
        head[125] = 2 * head[int(hidden.argmax())]  # a token beyond the draft model's takes the place of a known one
    seen = Seen()
    drafter = DraftModel(TorchEngine(draft), 128)
    got = decode(TorchEngine(target), drafter, [request(prompt, max_tokens=24)], STATIC, seen)
    assert got == [plain(target, prompt, max_tokens=24)]
    drafted = [len(step[3]) > 1 for step in seen.steps if step[2] > 1]
    assert 125 in [*prompt, *got[0]]
    assert not drafted[-1]
    assert drafted == sorted(drafted, reverse=True)
    assert any(drafted) == (where == "output")


CHOICES: list[dict[str, Any]] = [
    {"max_tokens": 32},
    {"max_tokens": 32, "temperature": 1.0, "seed": 1},
    {"max_tokens": 32, "temperature": 0.7, "seed": 2, "top_k": 20, "top_p": 0.9},
    {"max_tokens": 32, "repetition_penalty": 1.3, "presence_penalty": 0.5},
]


@functools.cache
def plain_texts() -> list[list[int]]:
    return [plain(tiny_pair()[0], PROMPT, **options) for options in CHOICES]


@pytest.mark.parametrize("form", SHAPES)
def test_the_text_is_plains_greedily_and_sampled_with_a_seed(form: str) -> None:
    target, draft = tiny_pair()
    engine, drafter = TorchEngine(target), DraftModel(TorchEngine(draft), VOCAB)
    for options, expected in zip(CHOICES, plain_texts(), strict=True):
        seen = Seen()
        assert decode(engine, drafter, [request(PROMPT, **options)], form, seen) == [expected], options
        assert seen.num_accepted > 0


@pytest.mark.parametrize("form", [STATIC, f"{PAPER},min_prob=0,min_reach=0"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ragged_batch_drafts_and_decodes_each_prompt_as_alone(form: str, temperature: float) -> None:
    target, draft = tiny_pair()
    prompts = [some_tokens(length, seed=length) for length in (3, 66, 20, 1, 9)]
    lengths = [12, 25, 7, 30, 16]

    def requests() -> list[Request]:
        return [
            request(prompt, max_tokens=count, temperature=temperature, seed=count)
            for prompt, count in zip(prompts, lengths, strict=True)
        ]

    engine, draft_engine = TorchEngine(target), TorchEngine(draft)
    together, drafter = Seen(), DraftModel(draft_engine, VOCAB)
    seqs = requests()
    got = decode(engine, drafter, seqs, form, together, max_batch=3)
    for seq, other, ids in zip(seqs, requests(), got, strict=True):
        alone = Seen()
        assert decode(engine, DraftModel(draft_engine, VOCAB), [other], form, alone) == [ids]
        steps = [step for step in together.steps if step[0] == seq.id]
        assert [proposed(step[3]) for step in steps] == [proposed(step[3]) for step in alone.steps]
    assert not engine._kv
    assert not draft_engine._kv
    assert not drafter._rows


def test_two_draft_models_make_one_tree_of_both_proposals() -> None:
    target, first = tiny_pair()
    second = tiny("llama", num_hidden_layers=1, seed=7)
    drafters: list[Drafter] = [
        DraftModel(TorchEngine(model), VOCAB, name) for model, name in ((first, "near"), (second, "far"))
    ]
    seen, seq = Seen(), request(PROMPT, max_tokens=24)
    got = decode(TorchEngine(target), Merged(drafters), [seq], Uncut([2, 2, 2]), seen)
    assert got == [plain(target, PROMPT, max_tokens=24)]
    assert seen.num_accepted > 0
    for _, before, room, drafted, _ in seen.steps:
        proposals = [naive_draft(model, before, STATIC, room) for model in (first, second)]
        assert proposed(drafted).keys() == proposals[0].keys() | proposals[1].keys()
        for node in range(1, len(drafted)):
            path = tuple(drafted.path_tokens(node))
            assert drafted.sources[node] == sum((path in scores) << bit for bit, scores in enumerate(proposals))
            best = max(s[path] - s.get(path[:-1], 0.0) for s in proposals if path in s)
            assert drafted.log_probs[node] == pytest.approx(best, abs=2e-3)
    assert seq.metrics.accepted_by_source["near"] >= seq.metrics.accepted_by_source.get("far", 0)


def test_two_draft_models_keep_their_kv_right_when_the_others_path_is_accepted() -> None:
    target, first = tiny_pair()
    second = tiny("llama", num_hidden_layers=1, seed=7)
    engines = [CountingEngine(model) for model in (second, first)]
    seen = Seen()
    drafters: list[Drafter] = [DraftModel(engine, VOCAB) for engine in engines]
    decode(TorchEngine(target), Merged(drafters), [request(PROMPT, max_tokens=24)], "2x2", seen)
    assert seen.num_accepted > 3
    for engine in engines:
        assert max(Counter(engine.computed).values()) == 1


def test_a_draft_model_stops_drafting_at_the_end_of_its_own_context() -> None:
    target, draft = tiny_pair(draft={"max_position_embeddings": 30})
    seen = Seen()
    drafter = DraftModel(TorchEngine(draft), VOCAB)
    got = decode(TorchEngine(target), drafter, [request(PROMPT, max_tokens=40)], STATIC, seen)
    assert got == [plain(target, PROMPT, max_tokens=40)]
    for _, before, room, drafted, _ in seen.steps:
        # the row of a node at depth d lies at position len(before) - 1 + d
        levels = max(0, min(3, room - 1, 30 - len(before) + 1))
        assert max(drafted.depths) == levels
    assert {max(step[3].depths) for step in seen.steps[:-1]} >= {0, 3}


def test_a_prompt_beyond_the_draft_models_context_is_decoded_without_drafts() -> None:
    target, draft = tiny_pair(draft={"max_position_embeddings": 8})
    engine, seen = CountingEngine(draft), Seen()
    got = decode(TorchEngine(target), DraftModel(engine, VOCAB), [request(PROMPT, max_tokens=6)], STATIC, seen)
    assert got == [plain(target, PROMPT, max_tokens=6)]
    assert not engine.computed
    assert all(len(step[3]) == 1 for step in seen.steps)


def test_drawn_children_come_from_the_draft_models_own_distribution() -> None:
    """What the rejection rule needs: the right probabilities, no child twice, none that has probability 0."""
    target, draft = tiny_pair()
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "top_k": 6, "seed": 5}
    texts = []
    for _ in range(2):
        seen = Seen()
        drafter = DraftModel(TorchEngine(draft), VOCAB)
        texts += decode(TorchEngine(target), drafter, [request(PROMPT, **options)], "3x2", seen, accept="rejection")
    assert texts[0] == texts[1]
    assert seen.num_accepted > 0
    for _, before, _, drafted, _ in seen.steps:
        assert drafted.sampled is not None
        for node, probs in drafted.sampled.items():
            logits = full_logits(draft, [*before, *drafted.path_tokens(node)])[-1] / 0.8
            kept = logits >= logits.topk(6).values[-1]
            expected = logits.double().masked_fill(~kept, float("-inf")).softmax(-1)
            torch.testing.assert_close(probs, expected, rtol=1e-3, atol=1e-6)
            children = drafted.tree.children[node]
            assert len(children) in (0, 2, 3)
            assert all(probs[drafted.tokens[child]] > 0 for child in children)


def test_a_level_that_was_disturbed_is_not_believed_for_long() -> None:
    drafter = DraftModel(TorchEngine(tiny_pair()[1]), 128)
    for seconds in (1.0, 0.002, 0.002, 0.9, 0.002):  # in the first one all is touched for the first time
        drafter._learn_pace(seconds)
    assert 0.002 <= drafter._level_seconds < 0.0023
