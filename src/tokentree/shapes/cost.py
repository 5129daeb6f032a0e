"""Trees sized by what they cost and what they bring on this machine, for this text."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokentree.draft import Draft
from tokentree.errors import OptionError
from tokentree.growing import DEPTH, PARENT, RANK
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes import worth
from tokentree.shapes.base import Shape
from tokentree.shapes.curve import CostCurve
from tokentree.shapes.pause import Pause
from tokentree.shapes.rates import Ahead, Cells, Rates, tried
from tokentree.tree import Floats, Ints

PACE = 0.1
FADE, DOUBT = 0.99, 10.0  # a step; tokens that count as promised and kept before any were
LEAST_OFFER = 8  # candidates that drafters are asked for even where small trees have paid best
LEVELS_PAUSE = 16, 256  # steps without levels that cost a forward before they are tried again: at first, and at most
DRAFTS_PAUSE = 2, 16  # steps without any draft
NEWS = 0.5  # of a batch: once so much of it came or went, drafts are tried again
HOPE = 1.3  # what drafting is believed to bring before anything is known, relative to plain decoding


class Cost(Shape):
    """Maximises expected tokens per second: of all candidates it takes the n most probable ones, with the n for which
    (1 + the sum of their probabilities) / (drafting + T(n)) is largest. That may be a tree, a chain, or nothing.

    T(n) is the measured cost of the target's forward, refined at every step (`CostCurve`). Probabilities are learnt
    from what happened to candidates like them (`Rates`); candidates that were not taken teach as well, since the text
    tells afterwards whether they were right. A batch shares one budget: the candidates of all its sequences compete.

    For a drafter whose levels cost a forward of their own, a level is drafted if it raises tokens per second; where
    not even the first one does, the drafter rests and is tried again after 16 steps, then 32, and so on.

    The same objective, for static trees and with fixed costs, is that of Sequoia (Chen et al. 2024, arXiv:2402.12374).

    Args:
        nodes: most nodes of one sequence's tree, root included.
        depth: most candidates on a path.
        top_k: children asked for per expanded node, and most nodes expanded per level.
        curve: T(n); by default a guess that is corrected while decoding.

    Raises:
        OptionError: if a number is too small to make a tree.
    """

    def __init__(self, nodes: int = 64, depth: int = 32, top_k: int = 4, curve: CostCurve | None = None) -> None:
        if nodes < 2 or depth < 1 or top_k < 1:
            raise OptionError("a cost shape needs nodes of at least 2, depth of at least 1 and top_k of at least 1")
        self._nodes, self.max_nodes, self.max_depth, self.top_k = nodes, nodes, depth, top_k
        self.measured = curve is not None
        self.curve = CostCurve.guess() if curve is None else curve.copy()
        self.rates = Rates()
        self._picked = Ahead([0.7, *[0.1] * (top_k - 1)])
        self._drawn = Ahead([0.3] * top_k)
        self._requests: dict[int, _Request] = {}
        self._others: dict[int, Draft] = {}  # what others propose for this step
        self._typical = float(nodes)  # nodes that lately paid best
        self._overhead = 0.0  # seconds of a step beside the forward
        self._batch = 1
        self._promised = 0.0  # tokens that the candidates taken last were expected to bring
        self._hoped = self._came = 0.0  # the same of lately, and what came true
        self._worth = HOPE  # lately: tokens per second with drafts, relative to what they would be without
        self._changed = 0.0  # how much of the batch came or went since
        self._levels, self._drafts = Pause(*LEVELS_PAUSE), Pause(*DRAFTS_PAUSE)
        self._resting = False
        _compile()

    def use_curve(self, curve: CostCurve) -> None:
        """Replaces the guess by a measured curve."""
        self.curve, self.measured = curve.copy(), True

    # -- while a drafter grows a tree level by level ---------------------------------------------------------------

    def counts(self, seq: Sequence, draft: Draft, frontier: SequenceOf[int]) -> list[int]:
        if draft.sampled is None:
            return [min(self.top_k, self._nodes - 1)] * len(frontier)
        # fixed before any is drawn: as many as rank by rank are worth a row
        joint = self._joint(seq, draft)
        spent = draft.level_seconds * draft.levels
        price = worth.price(self._times(len(draft) + 4), len(draft), float(joint.sum()), spent)
        ahead, counts, left = self._drawn.at(0), list[int](), self._nodes - len(draft)
        for node in frontier:
            counts.append(min(left, max(1, int((joint[node] * ahead > price).sum()))))
            left -= counts[-1]
        return counts

    def beside(self, seq: Sequence, draft: Draft) -> None:
        self._others[seq.id] = draft

    def select(self, seq: Sequence, draft: Draft, level: SequenceOf[int]) -> list[int]:
        if not level or (depth := draft.ints[DEPTH, level[0]]) >= self.max_depth:
            return []
        if draft.levels and not draft.level_seconds:
            return []  # after the first level, what one costs is known
        drawn = draft.sampled is not None
        theirs = self._others.get(seq.id)
        theirs, count = (draft, 1) if theirs is None else (theirs, len(theirs))  # by default the root alone
        most = count + len(draft) + max(4, self.top_k**2)  # rows
        nodes, costs = np.array(level, np.int64), (draft.level_seconds * draft.levels, draft.level_seconds)
        if drawn:
            joint, rows, ahead = self._joint(seq, draft), len(draft), self._drawn.at(0)
            _, covered = worth.beside(draft.ints, joint, theirs.ints, self._joint(seq, theirs)[:count])
            given = nodes, ahead, self.top_k, rows, float(joint.sum()), self._times(most)
            pays, best = worth.expanded(joint, covered, *given, *costs)
        else:
            told = self.rates.told(self._request(seq).local)
            further: Any = nodes, self.top_k, *self._picked.told(int(depth) + 1), *self._shares(most), *costs
            rows, pays, best = worth.further(
                draft.ints, draft.floats, len(draft), *told, theirs.ints, theirs.floats, count, *further
            )
        if rows >= self._nodes:
            return []
        if level[0] == 0:
            return [0] if self._starts(pays) else []
        return best.tolist() if pays else []

    def _starts(self, pays: bool) -> bool:
        """Whether to draft at all: if it pays, and now and then to see whether it would."""
        if pays:
            self._levels.stop()
        return pays or self._levels.count(1 / self._batch)

    def rests(self, seqs: list[Sequence], reading: int = 0) -> bool:
        """Drafting takes time too, and more of a step the larger the batch: where it isn't earned back, no draft is
        made for 2 steps, then for 4, and so on up to 16; or until half of the batch is another.

        Nor is one made while a prompt is read. Its tokens fill the forward, so that each further row costs as much as
        a token brings, and a first token would wait for these rows."""
        if reading:
            self._resting = True
            return True
        came = [seq for seq in seqs if seq.id not in self._requests]
        for seq in came:
            self._request(seq)
        self._changed += (len(came) + max(0, self._batch - len(seqs))) / max(len(seqs), self._batch)
        self._batch = len(seqs)
        if self._changed >= NEWS:
            self._worth, self._changed = max(self._worth, 1.0), 0.0
        if self._worth >= 1:
            self._drafts.stop()
        self._resting = self._worth < 1 and not self._drafts.count()
        if self._resting and self._levels.steps:
            self._levels.steps += 1
        return self._resting

    # -- the cut ---------------------------------------------------------------------------------------------------

    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        return self.cut([seq], [draft])[0]

    def cut(self, seqs: list[Sequence], drafts: list[Draft]) -> list[Draft]:
        self._batch = len(seqs)
        self._others.clear()
        spent = self._overhead + _level_seconds(drafts)
        if len(drafts) == 1 and drafts[0].sampled is None:
            return [self._cut_alone(seqs[0], drafts[0], spent)]
        rows, tokens, count, offers, starts = 0, 0.0, 0, list[Floats](), list[int]()
        for seq, draft in zip(seqs, drafts, strict=True):
            joint, whole = self._joint(seq, draft, remember=True), draft.sampled is not None
            rows += len(draft) if whole else 1
            tokens += float(joint.sum()) if whole else 1.0
            offers.append(joint[:0] if whole else joint[1:])
            starts.append(count)
            count += len(offers[-1])
        offered = offers[0] if len(offers) == 1 else np.concatenate(offers)
        ends = np.array([*starts[1:], count])
        times = self.curve.upto(rows + count, len(seqs))
        keep, taken, pace, self._promised = worth.best_cut(
            offered, ends, self._nodes - 1, rows, tokens, self._trust, spent, times
        )
        self._adapt(pace * float(times[len(seqs)]) / len(seqs), (rows + taken) / len(seqs))
        return [
            draft.take_marked(keep, start) if draft.sampled is None else draft
            for draft, start in zip(drafts, starts, strict=True)
        ]

    def _cut_alone(self, seq: Sequence, draft: Draft, spent: float) -> Draft:
        """`cut` of one draft whose children were not drawn, in one compiled call."""
        request, times = self._request(seq), self.curve.upto(len(draft))
        marked, taken, pace, self._promised = worth.cut(
            draft.ints, draft.floats, len(draft), *self.rates.told(request.local), self._nodes - 1, self._trust, spent,
            times,
        )  # fmt: skip
        request.draft = draft
        self._adapt(pace * float(times[1]), 1 + taken)
        return draft.taken(*marked)

    def _adapt(self, worth: float, used: float) -> None:
        """What drafts are worth now, relative to none, and for how many drafters are asked, if a sequence ``used`` so
        many nodes."""
        self._worth += PACE * (worth - self._worth)
        self._typical += (PACE if used < self._typical else 0.5) * (used - self._typical)
        self.max_nodes = min(self._nodes, max(LEAST_OFFER, int(2 * self._typical)))

    def observe(
        self, seqs: list[Sequence], drafts: list[Draft], accepted: list[Accepted], draft_seconds: float,
        verify_seconds: float,
    ) -> None:  # fmt: skip
        rows = sum(map(len, drafts))
        if not self.measured and verify_seconds:
            self.curve.first_seen(rows, verify_seconds)
            self.measured = True
        if not self._resting:
            self._overhead += PACE * (max(0.0, draft_seconds - _level_seconds(drafts)) - self._overhead)
        came = sum([len(step.path) - 1 for draft, step in zip(drafts, accepted, strict=True) if draft.sampled is None])
        self._hoped, self._came = FADE * self._hoped + self._promised, FADE * self._came + came
        self._promised = 0.0
        forward, lessons = (rows, len(seqs), verify_seconds), list[_Lesson]()
        for seq, step in zip(seqs, accepted, strict=True):
            request = self._requests.get(seq.id)
            if request is not None and request.draft is not None:
                lessons.append((request, request.draft, np.array(step.tokens, np.int64)))
                request.draft = None
        if len(lessons) == 1 and lessons[0][1].sampled is None:
            self._learn_at_once(forward, *lessons[0])
        else:
            self.curve.observe(*forward)
            for lesson in lessons:
                self._learn(*lesson)

    def branch(self, seq: Sequence, of: Sequence) -> None:
        if of.id in self._requests:
            self._requests[seq.id] = _Request(copy.deepcopy(self._requests[of.id].local))

    def release(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self._requests.pop(seq.id, None)

    def _learn(self, request: _Request, draft: Draft, accepted: Ints) -> None:
        """From every candidate whose parent was right, taken or not."""
        if draft.sampled is not None:
            nodes, hits = tried(draft, accepted)
            self._drawn.learn(0 * nodes, draft.ints[RANK, nodes], hits)
        else:
            self.rates.learn(draft, accepted, request.local)
            self._learn_ahead(draft, accepted)

    def _learn_at_once(
        self, forward: tuple[int, int, float], request: _Request, draft: Draft, accepted: Ints
    ) -> None:  # fmt: skip
        """`CostCurve.observe` and `_learn`, of a draft whose children were not drawn, in one compiled call."""
        ratio = worth.learn(
            *self.curve.told(*forward), draft.ints, draft.floats, len(draft), accepted, *self.rates.told(request.local)
        )
        self.curve.refined(ratio)
        self._learn_ahead(draft, accepted)

    def _learn_ahead(self, draft: Draft, accepted: Ints) -> None:
        """From candidates whose level cost a forward."""
        if draft.paid:
            self._picked.learn_proposed(draft, accepted, draft.paid)

    # -- what it believes ------------------------------------------------------------------------------------------

    def _joint(self, seq: Sequence, draft: Draft, remember: bool = False) -> Floats:
        """float64[n]: how probable it is that each node gets accepted."""
        request = self._request(seq)
        if draft.sampled is not None:  # drawn children are accepted by their place, whatever they are
            joint, ahead = np.ones(len(draft)), self._drawn.at(0)
            for node in range(1, len(draft)):
                joint[node] = joint[draft.ints[PARENT, node]] * ahead[draft.ints[RANK, node]]
        else:
            joint = self.rates.estimate(draft, request.local)
        if remember:
            request.draft = draft
        return joint

    def _request(self, seq: Sequence) -> _Request:
        request = self._requests.get(seq.id)
        if request is None:
            request = self._requests[seq.id] = _Request(self.rates.new_request())
        return request

    @property
    def _trust(self) -> float:
        """What candidates bring, relative to what they promise: the best of many estimates are mostly too high."""
        return min(1.0, (self._came + DOUBT) / (self._hoped + DOUBT))

    def _times(self, rows: int) -> Floats:
        """float64[rows + 1]: one sequence's share of a step with so many rows for each."""
        times: Floats = worth.shares(*self._shares(rows))
        return times

    def _shares(self, rows: int) -> tuple[Floats, float, float, int, int]:
        """What `worth.shares` is told of up to so many rows for each sequence."""
        table, others = self.curve.upto(rows * self._batch), self.curve.per_sequence * (self._batch - 1)
        return table, others, self._overhead, self._batch, rows

    def __repr__(self) -> str:
        return f"cost:nodes={self._nodes},depth={self.max_depth},top_k={self.top_k}"


def _level_seconds(drafts: list[Draft]) -> float:
    """What the levels of a batch's drafts took; each draft knows its share of a level."""
    return sum([draft.level_seconds * draft.levels for draft in drafts])


@functools.cache
def _compile() -> None:
    """Before any request waits for it."""
    rates, draft = Rates(), Draft.grown(0, np.array([1]), np.array([0]), np.array([0.5]))
    request = rates.new_request()
    rates.estimate(draft, request)
    rates.learn(draft, np.array([1]), request)
    tried(draft, np.array([1]))
    Ahead([0.5]).learn_proposed(draft, np.array([1]), 1)
    curve = CostCurve.guess()
    worth.learn(*curve.told(1, 1, 0.0), draft.ints, draft.floats, 2, np.array([1]), *rates.told(request))
    one, times, level = np.ones(1), np.ones(6), np.zeros(1, np.int64)
    worth.best_cut(one, level + 1, 1, 1, 1.0, 1.0, 0.0, times)
    worth.cut(draft.ints, draft.floats, len(draft), *rates.told(request), 1, 1.0, 0.0, times)
    worth.beside(draft.ints, one, draft.ints, one)
    worth.expanded(one, one, level, one, 1, 1, 1.0, times, 0.0, 0.0)
    told = rates.told(request)
    drafts, ahead = (draft.ints, draft.floats, 2, *told, draft.ints, draft.floats, 1), Ahead([0.5]).told(1)
    worth.further(*drafts, level, 1, *ahead, times, 0.0, 0.0, 1, 5, 0.0, 0.0)


@dataclass(eq=False)
class _Request:
    """What is known of one request, and its last draft before the cut."""

    local: Cells
    draft: Draft | None = None


_Lesson = tuple[_Request, Draft, Ints]  # a request, its draft before the cut, and the tokens that were accepted
