"""The proofs: what the loop writes has exactly the target's distribution, and under `match` it is plain's own text.

On a vocabulary of four, every outcome of every random decision is explored with its probability, those of the drafter
included, and the probabilities of each text are summed. The decisions are made by the real decoder. Rules and trees
that are known to be wrong must fail the same proof.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.conftest import by_night, decode, make_sequence, random_table
from tokentree.acceptance import Acceptance, BestPath, Match, NodeLogits, Rejection, acceptance
from tokentree.decoder import Decoder
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.drafters.pard import Pard
from tokentree.engines.output import TargetOutput
from tokentree.engines.table import TableEngine
from tokentree.errors import PairingError
from tokentree.grammars.guide import Guide
from tokentree.sampling import Noise, SamplingParams, SeededNoise, process_logits, to_probs
from tokentree.sequence import ACCEPT, DRAFT, Accepted, Sequence
from tokentree.shapes import Shape, Static, shape

VOCAB = 4
PROMPT = [1, 2]
TARGET, SMALLER = random_table(VOCAB, 2, seed=1), random_table(VOCAB, 2, seed=2)
# here refused leaves often leave parents with a mass below 1 something to emit, which few random tables do
T3, S3 = random_table(3, 2, seed=8), random_table(3, 2, seed=9)
NOTHING = 1e-14  # branches of less probability are rounding

Law = dict[tuple[int, ...], float]
Key = tuple[int, int, int]


# -- every outcome --------------------------------------------------------------------------------------------------


@dataclass
class Numbers:
    """Every random number that a run uses, each known only as far as the decisions so far tell: an interval.

    `SeededNoise` compares a uniform number with the ends of a cumulative distribution. Here the ends cut the interval
    of that number, each part is an outcome, and its share of the interval is the outcome's probability. A number that
    is asked for again, in another branch of the tree or in a later step, is the same number: its interval is what the
    earlier decisions left of it. So this integrates over the library's own stream, shared numbers included, and not
    over fresh numbers for each decision.

    Args:
        script: which outcome each decision takes; the first one where it says nothing.
    """

    script: list[int]
    widths: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    intervals: dict[Key, tuple[float, float]] = field(default_factory=dict)
    position: int = 0  # of the next token: numbers of earlier ones are used up

    def noise(self, position: int, purpose: int) -> Noise:
        assert position >= self.position
        return _Stream(self, position, purpose)

    def decide(self, key: Key, ends: list[float]) -> int:
        low, high = self.intervals.get(key, (0.0, 1.0))
        parts = [
            (i, max(low, start), min(high, end))
            for i, (start, end) in enumerate(itertools.pairwise([0.0, *ends]))
            if min(high, end) - max(low, start) > NOTHING
        ]
        turn = len(self.widths)
        if turn == len(self.script):
            self.script.append(0)
        outcome, start, end = parts[self.script[turn]]
        self.widths.append(len(parts))
        self.shares.append((end - start) / (high - low))
        self.intervals[key] = start, end
        return outcome

    def known_ahead(self) -> frozenset[tuple[Key, tuple[float, float]]]:
        """What is known of numbers that may still be used."""
        return frozenset(item for item in self.intervals.items() if item[0][0] >= self.position)


@dataclass
class _Stream:
    """A fresh `Noise` of one position and purpose: it starts at the first number again."""

    numbers: Numbers
    position: int
    purpose: int
    used: int = 0

    def choose(self, probs: torch.Tensor) -> int:
        cumulative = probs.cumsum(-1)
        return self._decide((cumulative / cumulative[-1]).tolist())

    def accepts(self, prob: float) -> bool:
        return self._decide([min(prob, 1.0), 1.0]) == 0

    def _decide(self, ends: list[float]) -> int:
        self.used += 1
        return self.numbers.decide((self.position, self.purpose, self.used), ends)


def _outcomes(run: Callable[[Numbers], Sequence], start: list[int]) -> Iterator[tuple[Numbers, Sequence]]:
    """Runs once per script that begins with ``start``, the last decision varying first."""
    script = list(start)
    while True:
        numbers = Numbers(script)
        yield numbers, run(numbers)
        while len(script) > len(start) and script[-1] + 1 == numbers.widths[len(script) - 1]:
            script.pop()
        if len(script) == len(start):
            return
        script = [*script[:-1], script[-1] + 1]


def text_law(
    make: Callable[[], Decoder], guide: Callable[[], Guide | None] = lambda: None, **params: Any
) -> Law:  # fmt: skip
    """The probability of each text that decoders from ``make`` write, by enumeration.

    Goes step by step. What a decoder does next depends on the tokens so far and on what is known of later numbers, so
    ways that agree in both are counted together and explored once.
    """

    def run(numbers: Numbers) -> Sequence:
        seq = make_sequence(PROMPT, noise=numbers.noise, guide=guide(), **params)
        decoder = make()
        decoder.prefill(seq)
        for _ in range(steps):
            numbers.position = len(seq.tokens)
            decoder.step([seq])
            assert decoder.engine.committed(seq) == len(seq.tokens) - 1
        numbers.position = len(seq.tokens)
        return seq

    law: defaultdict[tuple[int, ...], float] = defaultdict(float)
    states: dict[object, tuple[float, list[int], int, int]] = {"start": (1.0, [], 0, 0)}
    while states:
        state = min(states, key=lambda s: states[s][3])  # the shortest text first: nothing can be added to it any more
        reached, script, before, _ = states.pop(state)
        steps = before + 1
        for numbers, seq in _outcomes(run, script):
            prob = reached * math.prod(numbers.shares[len(script) :])
            if seq.finished:
                law[tuple(seq.output_ids)] += prob
            else:
                known = tuple(seq.tokens), numbers.known_ahead()
                first = states.get(known, (0.0, list(numbers.script), steps, len(seq.tokens)))
                states[known] = (first[0] + prob, *first[1:])
    return dict(law)


def target_law(table: torch.Tensor = TARGET, **params: Any) -> Law:
    """The target's own distribution over texts of ``max_tokens`` tokens."""
    options, engine = SamplingParams(**params), TableEngine(table)
    law: Law = {(): 1.0}
    for _ in range(options.max_tokens):
        longer: Law = {}
        for text, prob in law.items():
            logits = process_logits(engine.logits_after([*PROMPT, *text]), options, PROMPT, text)
            for token, share in enumerate(to_probs(logits, options).tolist()):
                if share > 0:
                    longer[*text, token] = prob * share
        law = longer
    return law


def distance(law: Law, other: Law) -> float:
    """Total variation."""
    return sum(abs(law.get(text, 0.0) - other.get(text, 0.0)) for text in {*law, *other}) / 2


def decoder_maker(
    form: str | Shape,
    accept: Acceptance,
    drafter: Callable[[], Drafter] = lambda: DraftModel(TableEngine(SMALLER), VOCAB),
    table: torch.Tensor = TARGET,
) -> Callable[[], Decoder]:
    return lambda: Decoder(TableEngine(table), drafter(), shape(form), accept)


def test_the_proof_cuts_the_unit_interval_where_seeded_noise_does() -> None:
    library, same = SeededNoise(np.random.default_rng(0)), np.random.default_rng(0)
    probs = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3], dtype=torch.float64)
    for turn in range(2000):
        number, prob = same.random(), (turn % 7) / 5
        parts = Numbers([0 if number < prob else 1] if 0 < prob < 1 else [0])
        cut = _Stream(parts, 0, ACCEPT)
        if turn % 2:
            assert library.accepts(prob) == cut.accepts(prob)
        else:
            outcome = library.choose(probs)
            parts.script = [[1, 2, 4].index(outcome)]
            assert cut.choose(probs) == outcome
        low, high = parts.intervals[0, ACCEPT, 1]
        assert low <= number < high


# -- rejection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "params"),
    [
        ("2x1", {"max_tokens": 3, "temperature": 0.7}),
        ("1x3", {"max_tokens": 3}),
        ("4", {"max_tokens": 2}),
        ("chain:3", {"max_tokens": 4, "top_k": 3}),
        ("paths:[[0],[0,1],[2],[2,0]]", {"max_tokens": 3, "top_k": 3}),
        ("dynamic:nodes=4,depth=2,top_k=2", {"max_tokens": 3}),
        ("dynamic:nodes=4,depth=2,top_k=2,min_reach=0.6", {"max_tokens": 3, "top_k": 3}),
        ("2x1", {"max_tokens": 3, "top_p": 0.8}),
        ("2x1", {"max_tokens": 3, "min_p": 0.3, "temperature": 1.4}),
        ("2x1", {"max_tokens": 3, "repetition_penalty": 1.5, "frequency_penalty": 0.4, "top_k": 3}),
    ],
)
def test_rejection_writes_the_target_s_distribution(form: str, params: dict[str, Any]) -> None:
    params = {"temperature": 1.0} | params
    law = text_law(decoder_maker(form, Rejection()), **params)
    assert sum(law.values()) == pytest.approx(1, abs=1e-9)
    assert distance(law, target_law(**params)) < 1e-9


def test_so_it_does_where_tokens_are_guessed_at_once() -> None:
    form = "dynamic:nodes=4,depth=2,top_k=2"
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 3, "frequency_penalty": 0.4}
    law = text_law(decoder_maker(form, Rejection(), lambda: Pard(TableEngine(SMALLER), VOCAB, 3)), **params)
    assert distance(law, target_law(**params)) < 1e-9


def _without(table: torch.Tensor, *tokens: int) -> torch.Tensor:
    return table.index_fill(-1, torch.tensor(tokens), -math.inf)


@pytest.mark.parametrize(
    ("table", "smaller"),
    [
        (TARGET, _without(SMALLER, 0, 2)),  # support of two below three branches
        (TARGET, _without(SMALLER, 0, 1, 2)),
        (_without(TARGET, 0, 1), SMALLER),  # what the target can't write is drafted
        (_without(TARGET, 0, 1), _without(SMALLER, 2, 3)),  # nothing in common
        (TARGET, TARGET),  # the drafter is the target
        (TARGET, 5 * SMALLER),
        (_without(TARGET, 3), random_table(VOCAB - 1, 2, seed=3)),  # a smaller vocabulary
    ],
)
def test_rejection_holds_for_any_support(table: torch.Tensor, smaller: torch.Tensor) -> None:
    for form, max_tokens in (("3", 2), ("2x1", 3)):
        make = decoder_maker(form, Rejection(), lambda: DraftModel(TableEngine(smaller), VOCAB), table)
        params: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 1.0}
        assert distance(text_law(make, **params), target_law(table, **params)) < 1e-9


def test_a_drafter_that_is_the_target_is_never_refused() -> None:
    seqs = [make_sequence(PROMPT, temperature=1.0, max_tokens=40, seed=seed) for seed in range(5)]
    decode(TableEngine(TARGET), seqs, DraftModel(TableEngine(TARGET), VOCAB), "2x1x1", "rejection")
    assert [seq.metrics.refused_steps for seq in seqs] == [0] * 5


@pytest.mark.parametrize("accept", ["match", "rejection"])
@pytest.mark.parametrize("form", ["2x2x1", "dynamic:nodes=7,depth=3,top_k=2"])
def test_the_draft_model_keeps_the_rows_of_the_accepted_path(form: str, accept: str) -> None:
    engine = TableEngine(SMALLER)
    decoder = Decoder(TableEngine(TARGET), DraftModel(engine, VOCAB), shape(form), acceptance(accept))
    seq = make_sequence(PROMPT, temperature=1.0, max_tokens=40)
    for steps, _ in enumerate(decoder.run([seq])):
        if seq.finished:  # and so dropped
            assert steps > 10
            break
        kept = engine._committed[seq.id]
        assert kept == seq.tokens[: len(kept)]
        # all but the root and an accepted leaf; where only one token fits, nothing is drafted or read
        assert len(kept) >= len(seq.tokens) - (2 if seq.room > 0 else 3)


# -- match ----------------------------------------------------------------------------------------------------------


def _merged() -> Drafter:
    return Merged([DraftModel(TableEngine(S3), 3), NGram(2), DraftModel(TableEngine(T3), 3)])


@pytest.mark.parametrize("form", ["2x2", "chain:3", "dynamic:nodes=6,depth=3,top_k=2"])
@pytest.mark.parametrize(
    "drafter",
    [lambda: DraftModel(TableEngine(S3), 3), lambda: Pard(TableEngine(S3), 3, 2), lambda: NGram(2), _merged],
    ids=["model", "pard", "ngram", "merged"],
)
def test_match_writes_the_target_s_distribution(form: str, drafter: Callable[[], Drafter]) -> None:
    params: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0, "presence_penalty": 0.3}
    law = text_law(decoder_maker(form, Match(), drafter, T3), **params)
    assert distance(law, target_law(T3, **params)) < 1e-9


# -- the proof fails where it must ----------------------------------------------------------------------------------


class DropsTheLeastLikelyDraw(Static):
    """Prunes drawn children by score, past the guard of `Draft.take`."""

    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        children = draft.tree.children[0]
        if draft.sampled is None or len(children) < 2:
            return draft
        least = min(children, key=lambda child: draft.log_scores[child])
        part = draft._taken([node for node in range(len(draft)) if node != least])
        part.sampled = draft.sampled
        return part


class SortsDraws(Static):
    """Puts drawn children in the order of their probability."""

    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        best = sorted(range(1, len(draft)), key=lambda node: -draft.log_scores[node])
        part = draft._taken([0, *best])
        part.sampled = draft.sampled
        return part


@pytest.mark.parametrize("form", [DropsTheLeastLikelyDraw([2]), DropsTheLeastLikelyDraw([3]), SortsDraws([2])])
def test_a_drawn_tree_pruned_or_sorted_by_score_is_not_lossless(form: Shape) -> None:
    params: dict[str, Any] = {"max_tokens": 2, "temperature": 1.0}
    assert distance(text_law(decoder_maker(form, Rejection()), **params), target_law(**params)) > 1e-3


class DrawsWithReplacement(DraftModel):
    """Draws each child from the full distribution. A tree can't hold a token twice below one node, so a draw that
    repeats adds no node; ``draws`` remembers it."""

    def __init__(self) -> None:
        super().__init__(TableEngine(SMALLER), VOCAB)
        self.draws: dict[tuple[Draft, int], list[int]] = {}

    def _draw(self, seq: Sequence, draft: Draft, node: int, count: int, logits: torch.Tensor) -> list[int]:
        path = draft.path_tokens(node)
        probs = to_probs(seq.processed(logits, path), seq.params)
        noise, level = seq.noise_after(path, DRAFT), dict[int, int]()
        assert draft.sampled is not None
        draft.sampled[node] = probs
        drawn = [noise.choose(probs) for _ in range(count)]
        for token in drawn:
            if token not in level:
                level[token] = draft.add(node, token, float(probs[token].log()), len(level))
        self.draws[draft, node] = [level[token] for token in drawn]
        return list(level.values())


class RejectionWithReplacement(Acceptance):
    """The rule for draws with replacement: draft_probs stays as it is, and a repeated draw is tried again.

    Args:
        drafter: who knows of the repeated draws; without it, a merged tree's nodes are all there is to try.
    """

    lossy: ClassVar[bool] = False
    draws_children: ClassVar[bool] = True
    takes_picked: ClassVar[bool] = False

    def __init__(self, drafter: DrawsWithReplacement | None) -> None:
        self.drafter = drafter

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
        path, tokens = [0], list[int]()
        while True:
            node, noise = path[-1], seq.noise_after(tokens, ACCEPT)
            target_probs = to_probs(seq.processed(logits(node), tokens), seq.params)
            tries = list(draft.tree.children[node])
            if self.drafter is not None:
                tries = self.drafter.draws.get((draft, node), [])
            for child in tries:
                assert draft.sampled is not None
                draft_probs, token = draft.sampled[node], draft.tokens[child]
                if noise.accepts(float(target_probs[token] / draft_probs[token])):
                    path.append(child)
                    tokens.append(token)
                    break
                target_probs = (target_probs - draft_probs).clamp(min=0)
                target_probs = target_probs / target_probs.sum()
            else:
                return Accepted(path, [*tokens, noise.choose(target_probs)])


@pytest.mark.parametrize("form", ["2", "3"])
def test_a_merge_that_drops_a_repeated_draw_is_not_lossless(form: str) -> None:
    params: dict[str, Any] = {"max_tokens": 2, "temperature": 1.0}

    def make(drops: bool) -> Decoder:
        drafter = DrawsWithReplacement()
        rule = RejectionWithReplacement(None if drops else drafter)
        return Decoder(TableEngine(TARGET), drafter, shape(form), rule)

    assert distance(text_law(lambda: make(drops=False), **params), target_law(**params)) < 1e-9
    assert distance(text_law(lambda: make(drops=True), **params), target_law(**params)) > 1e-3


class MergesDraws(DraftModel):
    """Joins what two draft models drew, as if the first had drawn it all."""

    def __init__(self) -> None:
        super().__init__(TableEngine(SMALLER), VOCAB)
        self.other = DraftModel(TableEngine(random_table(VOCAB, 2, seed=5)), VOCAB)

    def propose(self, seqs: list[Sequence], form: Shape, sampled: bool) -> list[Draft]:
        ours, theirs = super().propose(seqs, form, sampled), self.other.propose(seqs, form, sampled)
        for draft, more in zip(ours, theirs, strict=True):
            for token in sorted({*more.tokens[1:]} - {*draft.tokens[1:]}):
                draft.add(0, token, 0.0, len(draft) - 1)
        return ours


def test_two_drafters_draws_in_one_tree_are_not_lossless() -> None:
    params: dict[str, Any] = {"max_tokens": 2, "temperature": 1.0}
    law = text_law(decoder_maker("1", Rejection(), MergesDraws), **params)
    assert distance(law, target_law(**params)) > 1e-3


def test_how_many_children_are_drawn_may_depend_on_those_drawn_before() -> None:
    # Distinct draws in the order of their first appearance are draws without replacement. Only their number is left to
    # chance, and whether there is a next one never depends on what it would be: nothing is lost.
    params: dict[str, Any] = {"max_tokens": 2, "temperature": 1.0}
    law = text_law(decoder_maker("3", Rejection(), DrawsWithReplacement), **params)
    assert distance(law, target_law(**params)) < 1e-9


@pytest.mark.parametrize("form", ["2", "2x2", "chain:2"])
def test_best_path_is_lossy_and_says_so(form: str) -> None:
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 1.0}
    assert distance(text_law(decoder_maker(form, BestPath()), **params), target_law(**params)) > 1e-3
    seqs = [make_sequence(PROMPT, **params) for _ in range(3)]
    for seq, accept in zip(seqs, ("best_path", "match", "rejection"), strict=True):
        decode(TableEngine(TARGET), [seq], DraftModel(TableEngine(SMALLER), VOCAB), form, accept)
    assert [seq.metrics.lossy for seq in seqs] == [True, False, False]
    assert [seq.metrics.to_dict()["lossy"] for seq in seqs] == [True, False, False]
    assert (BestPath.lossy, Match.lossy, Rejection.lossy) == (True, False, False)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_drawn_children_can_not_be_taken_apart() -> None:
    draft = Draft(0, {0: torch.full((VOCAB,), 0.25, dtype=torch.float64)})
    for rank in range(2):
        draft.add(0, rank, -1.0, rank)
    with pytest.raises(PairingError, match="can't be pruned: use accept='match'"):
        draft.take([0, 2])
    assert draft.take([0, 1, 2]) is draft
    assert len(draft.cut(0)) == 1  # whole levels may go


def test_rejection_refuses_picked_children() -> None:
    draft = Draft(0)
    draft.add(0, 1, -1.0, 0)
    with pytest.raises(PairingError, match="needs children drawn from draft_probs"):
        Rejection()(make_sequence(PROMPT, temperature=1.0), draft, TargetOutput(TARGET[0, :1], [0], [0], 0.0).after(0))


@pytest.mark.parametrize("drafter", [NGram(), Merged([NGram()])])
def test_rejection_refuses_drafters_that_only_pick(drafter: Drafter) -> None:
    with pytest.raises(PairingError, match=f"the drafter '{drafter.name}' picks them: use accept='match'"):
        Decoder(TableEngine(TARGET), drafter, shape("2"), Rejection())


# -- match is plain, token by token ---------------------------------------------------------------------------------

WIDE = random_table(50, 2, seed=7, sharpness=2.5)


class RandomTrees(Drafter):
    """Any tree at all, in any order; its tokens are often what the target finds likely, so that paths are accepted."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self.random, self.likely = np.random.default_rng(seed), TableEngine(WIDE)

    def propose(self, seqs: list[Sequence], form: Shape, sampled: bool) -> list[Draft]:
        return [self._tree(seq) for seq in seqs]

    def _tree(self, seq: Sequence) -> Draft:
        draft, known = Draft(seq.tokens[-1]), set[tuple[int, int]]()
        for _ in range(int(self.random.integers(0, 24))):
            parent = int(self.random.integers(0, len(draft)))
            logits = self.likely.logits_after([*seq.tokens, *draft.path_tokens(parent)])
            token = int(self.random.choice(logits.topk(4).indices)) if self.random.random() < 0.9 else 3
            if (parent, token) not in known:
                known.add((parent, token))
                draft.add(parent, token, -1.0, 0)
        return draft


def _wide_drafter(kind: str, seed: int, context: int = 1 << 20) -> Drafter:
    if kind == "random":
        return RandomTrees(seed)
    if kind == "ngram":
        return NGram()
    noisy = TableEngine(WIDE + random_table(50, 2, seed), context)
    if kind == "pard":
        return Pard(noisy, 50, 49)
    model = DraftModel(noisy, 50)
    return model if kind == "model" else Merged([model, NGram(), RandomTrees(seed)])


def _wide_requests(seed: int, **params: Any) -> list[Sequence]:
    """Texts of different lengths with different seeds; the last one is greedy."""
    random = np.random.default_rng(seed)
    seqs = []
    for request in range(5):
        prompt = random.integers(0, 50, int(random.integers(1, 12))).tolist()
        options = {"temperature": 1.0, "seed": seed + request, "max_tokens": int(random.integers(1, 30))} | params
        options["temperature"] *= request < 4
        seqs.append(make_sequence(prompt, **options))
    return seqs


@pytest.mark.parametrize("kind", ["random", "ngram", "model", "merged"])
@pytest.mark.parametrize("seed", by_night(range(4), but=[0, 1]))
def test_match_gives_plain_s_ids_under_any_tree_and_batch(kind: str, seed: int) -> None:
    params = [
        {},
        {"top_p": 0.9},
        {"top_k": 7, "temperature": 1.3},
        {"presence_penalty": 1.0, "repetition_penalty": 1.2},
    ]
    options = params[seed % len(params)]
    plain = [decode(TableEngine(WIDE), [seq])[0] for seq in _wide_requests(seed, **options)]
    for form in ("chain:4", "3x2x1", "dynamic:nodes=12,depth=5,top_k=4", "paths:[[1],[0,0,1],[3,0]]"):
        for max_batch in (1, 3):
            seqs = _wide_requests(seed, **options)
            assert decode(TableEngine(WIDE), seqs, _wide_drafter(kind, seed), form, "match", max_batch) == plain
    if kind in ("random", "model", "merged"):
        assert sum(seq.metrics.accepted_tokens for seq in seqs) > 0


@pytest.mark.parametrize("kind", ["random", "ngram", "model", "pard", "merged"])
def test_no_draft_reaches_beyond_the_context_of_either_model(kind: str) -> None:
    # a `TableEngine` raises where a node lies beyond its context
    def requests() -> list[Sequence]:
        return [make_sequence([1] * n, temperature=1.0, context=20, max_tokens=99, seed=n) for n in (1, 5, 19)]

    plain = [decode(TableEngine(WIDE, context=20), [seq])[0] for seq in requests()]
    assert list(map(len, plain)) == [19, 15, 1]
    for context in (3, 12, 20):
        drafter = _wide_drafter(kind, 1, context)
        assert decode(TableEngine(WIDE, context=20), requests(), drafter, "2x1x1") == plain


@pytest.mark.parametrize("accept", ["match", "rejection", "traversal"])
def test_what_else_is_in_the_batch_does_not_matter(accept: str) -> None:
    def run(max_batch: int) -> list[list[int]]:
        return decode(TableEngine(WIDE), _wide_requests(3), _wide_drafter("model", 3), "2x2x1", accept, max_batch)

    assert run(1) == run(2) == run(5)


def test_a_seed_fixes_the_text_of_rejection_for_a_fixed_shape() -> None:
    def run(seed: int) -> list[int]:
        seq = make_sequence([1], temperature=1.0, max_tokens=30, seed=seed)
        return decode(TableEngine(WIDE), [seq], _wide_drafter("model", 3), "2x2", "rejection")[0]

    assert run(1) == run(1) != run(2)


def test_samples_differ_and_each_is_plain_s() -> None:
    def samples() -> list[Sequence]:
        return [make_sequence([1], sample=i, temperature=1.0, max_tokens=20, seed=4) for i in range(6)]

    plain = [decode(TableEngine(WIDE), [seq])[0] for seq in samples()]
    assert decode(TableEngine(WIDE), samples(), _wide_drafter("merged", 1), "3x2") == plain
    assert len(set(map(tuple, plain))) == 6


# -- through the seeded stream --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "accept"), [("2x1", "rejection"), ("2x1", "match"), ("chain:2", "block"), ("2x2", "traversal")]
)
def test_texts_of_many_seeds_follow_the_target(form: str, accept: str) -> None:
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 3}
    runs = 1000
    seqs = [make_sequence(PROMPT, seed=seed, **params) for seed in range(runs)]
    drafter = DraftModel(TableEngine(SMALLER), VOCAB)
    counts = Counter(map(tuple, decode(TableEngine(TARGET), seqs, drafter, form, accept, max_batch=64)))
    expected = {text: runs * prob for text, prob in target_law(**params).items()}
    rare = [text for text in expected if expected[text] < 8]  # counted as one
    cells = [([text], expected[text]) for text in expected if text not in rare]
    cells.append((rare, sum(expected[text] for text in rare)))
    statistic = sum((sum(counts[t] for t in texts) - mean) ** 2 / mean for texts, mean in cells)
    p_value = torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2))
    assert float(p_value) > 1e-4
