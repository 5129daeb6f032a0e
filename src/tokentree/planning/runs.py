"""Drafts as they were made, text by text, and a drafter that proposes them again.

What is right of a draft depends on the text: where one repeats itself, drafts are right for many steps on end. Rates
of all texts together don't show that, see `drawn`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, model_validator

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.growing import DEPTH, LOG_PROB, LOG_SCORE, PARENT, RANK, SOURCES, TOKEN
from tokentree.planning.clock import Clock
from tokentree.planning.engine import RIGHT
from tokentree.planning.timing import Beside
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape
from tokentree.shapes.rates import CLAIMED, CLAIMS, CONFIDENCE
from tokentree.tree import Floats, Ints

MOST_DRAFTS = 2000  # that are recorded
MOST_NODES, MOST_DRAFTERS = 1 << 14, 32
NEAR = 12  # texts from which one is chosen: those that were decoded beside about as many others
Places = list[Annotated[int, Field(ge=0, le=1 << 40)]]


class Kind(BaseModel):
    """Candidates of the same drafters, which claim about the same of themselves: see `Rates.cells`."""

    drafters: str
    claim: int = Field(ge=0, lt=CLAIMS)


class TextRun(BaseModel):
    """The drafts of a text in their order.

    Args:
        tokens: that came, those of steps without a draft included.
        texts: that were decoded in the same steps, on average.
        at: for each draft, how many of the tokens had come.
        parents: for each draft, the parent of each candidate. Node 0 is the end of the text; candidates follow, parents
            before children.
        kinds: for each draft, the kind of each candidate, as a place in `Runs.kinds`.
        right: for each draft, the nodes that the text went on with, parents before children.
    """

    tokens: int = Field(ge=1, le=1 << 40)
    texts: float = Field(ge=1, le=1e6)
    at: Places
    parents: list[Annotated[Places, Field(max_length=MOST_NODES)]]
    kinds: list[Places]
    right: list[Places]

    @model_validator(mode="after")
    def _check(self) -> TextRun:
        sizes = [len(self.at), len(self.parents), len(self.kinds), len(self.right)]
        if not self.at or len(set(sizes)) > 1:
            raise ValueError("a text has some drafts, each with parents, kinds and what is right")
        if any(a >= b for a, b in pairwise([*self.at, self.tokens])):
            raise ValueError("drafts of a text come behind ascending numbers of tokens")
        for parents, kinds, right in zip(self.parents, self.kinds, self.right, strict=True):
            if len(parents) != len(kinds) or any(parent > node for node, parent in enumerate(parents)):
                raise ValueError("each candidate has a kind, and a parent before it")
            before = 0
            for node in right:
                if not 1 <= node <= len(parents) or parents[node - 1] != before:
                    raise ValueError("what is right of a draft is one path")
                before = node
        return self


class Runs(BaseModel):
    """The drafts of some texts.

    Args:
        kinds: of their candidates.
        texts: each with its drafts.
    """

    kinds: list[Kind] = []
    texts: list[TextRun] = []

    @model_validator(mode="after")
    def _check(self) -> Runs:
        if any(kind >= len(self.kinds) for text in self.texts for kinds in text.kinds for kind in kinds):
            raise ValueError("there is no such kind of candidates")
        if len(self.names) > MOST_DRAFTERS:
            raise ValueError(f"runs are of at most {MOST_DRAFTERS} drafters")
        return self

    @property
    def names(self) -> list[str]:
        """Of the drafters."""
        return list(dict.fromkeys(name for kind in self.kinds for name in kind.drafters.split("+")))

    @classmethod
    def of(cls, texts: Iterable[SequenceOf[Seen]], names: SequenceOf[str]) -> Runs:
        """Those of some texts, of which each is all of its steps.

        There are at most `MOST_DRAFTS` drafts; of more, each n-th text is taken.
        """
        drafted = [steps for steps in texts if any(step.draft is not None for step in steps)]
        count = sum(step.draft is not None for steps in drafted for step in steps)
        kinds = dict[tuple[int, int], int]()
        runs = [_run(steps, kinds) for steps in drafted[:: math.ceil(count / MOST_DRAFTS) or 1]]
        told = ["+".join(name for bit, name in enumerate(names) if bits >> bit & 1) for bits, _ in kinds]
        found = [Kind(drafters=who, claim=claim) for who, (_, claim) in zip(told, kinds, strict=True)]
        return cls(kinds=found, texts=runs)

    def drafter(self, seconds: Beside, clock: Clock, generator: np.random.Generator) -> Drafter:
        """One that proposes them again."""
        return Replayed(self, seconds, clock, generator)


@dataclass(frozen=True)
class Seen:
    """A step of a text.

    Args:
        draft: as it was before the cut; None: none was made.
        tokens: that came.
        texts: that were decoded in this step.
    """

    draft: Draft | None
    tokens: list[int]
    texts: int


def _run(steps: SequenceOf[Seen], kinds: dict[tuple[int, int], int]) -> TextRun:
    """What became of the drafts of a text. Adds kinds that are new."""
    tokens = [token for step in steps for token in step.tokens]
    at, parents, of_kinds, right, come = list[int](), list[list[int]](), list[list[int]](), list[list[int]](), 0
    for step in steps:
        if step.draft is not None and step.tokens:
            claims = np.searchsorted(CONFIDENCE, step.draft.log_probs[1:]).tolist()
            known = zip(step.draft.sources[1:], claims, strict=True)
            at.append(come)
            parents.append(step.draft.parents[1:])
            of_kinds.append([kinds.setdefault(kind, len(kinds)) for kind in known])
            right.append(_right(step.draft, tokens[come:]))
        come += len(step.tokens)
    texts = sum(step.texts for step in steps) / len(steps)
    return TextRun(tokens=come, texts=texts, at=at, parents=parents, kinds=of_kinds, right=right)


def _right(draft: Draft, tokens: SequenceOf[int]) -> list[int]:
    """The nodes of ``draft`` along ``tokens``, with which its text goes on."""
    edges = zip(draft.parents, draft.tokens, strict=True)
    children = {edge: node for node, edge in enumerate(edges)}
    node, found = 0, list[int]()
    for token in tokens:
        following = children.get((node, token))
        if following is None:
            break
        found.append(node := following)
    return found


class Replayed(Drafter):
    """Proposes drafts that were recorded. A step that asks for some takes the time that drafting takes.

    Each text plays one that was recorded. It gets the draft that was made behind as many tokens, or the next one; once
    there is none, it plays another. It is one of those that were decoded beside about as many others: drafts are larger
    where fewer texts share a step.

    Args:
        runs: what was recorded, of one text or more.
        seconds: what drafting takes.
        clock: is set forward.
        generator: chooses the texts.
    """

    name = "replayed"

    def __init__(self, runs: Runs, seconds: Beside, clock: Clock, generator: np.random.Generator) -> None:
        self._names, self._seconds, self._clock, self._generator = runs.names, seconds, clock, generator
        sources = [sum(1 << self._names.index(name) for name in kind.drafters.split("+")) for kind in runs.kinds]
        claims = np.log(CLAIMED)[[kind.claim for kind in runs.kinds]]
        self._texts = sorted(runs.texts, key=lambda text: text.texts)
        self._beside = [math.log(text.texts) for text in self._texts]
        self._drafts = [_arrays(text, np.array(sources, np.int64), claims) for text in self._texts]
        self._playing = dict[int, tuple[int, int]]()  # which text, and behind how many tokens of the sequence it begins

    @property
    def names(self) -> list[str]:
        return self._names

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        self._clock.advance(self._seconds.seconds(len(seqs)))
        return [self._next(seq, shape, len(seqs)) for seq in seqs]

    def release(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self._playing.pop(seq.id, None)

    def _next(self, seq: Sequence, shape: Shape, texts: int) -> Draft:
        length, root = len(seq.tokens), seq.tokens[-1]
        deepest = min(shape.max_depth, seq.room - 1)
        if deepest < 1:
            return Draft(root)
        number, begin = self._playing.get(seq.id, (-1, length))
        place = bisect_left(self._texts[number].at, length - begin) if number >= 0 else 0
        if number < 0 or place == len(self._drafts[number]):
            number, begin, place = self._chosen(texts), length, 0
            self._playing[seq.id] = number, begin
        return _cut(*self._drafts[number][place], root, shape.max_nodes, deepest)

    def _chosen(self, texts: int) -> int:
        """A recorded text."""
        middle = bisect_left(self._beside, math.log(texts))
        first, last = middle, middle  # those between them are nearest
        while last - first < min(NEAR, len(self._beside)):
            down = math.log(texts) - self._beside[first - 1] if first else math.inf
            up = self._beside[last] - math.log(texts) if last < len(self._beside) else math.inf
            first, last = (first - 1, last) if down <= up else (first, last + 1)
        return int(self._generator.integers(first, last))


def _arrays(text: TextRun, sources: Ints, claims: Floats) -> list[tuple[Ints, Floats]]:
    """The arrays of the drafts of a text, see `Draft`."""
    made = []
    for parents, kinds, right in zip(text.parents, text.kinds, text.right, strict=True):
        ints, floats = np.zeros((5, len(parents) + 1), np.int64), np.zeros((2, len(parents) + 1))
        ints[PARENT, 0], ranks = -1, [0] * (len(parents) + 1)
        for node, (parent, kind) in enumerate(zip(parents, kinds, strict=True), start=1):
            rank = ranks[parent]
            ranks[parent] += 1
            token = RIGHT if node in right else RIGHT + 1 + rank
            ints[[TOKEN, PARENT, DEPTH, RANK, SOURCES], node] = (
                token, parent, ints[DEPTH, parent] + 1, rank, sources[kind],
            )  # fmt: skip
            floats[[LOG_PROB, LOG_SCORE], node] = claims[kind], floats[LOG_SCORE, parent] + claims[kind]
        made.append((ints, floats))
    return made


def _cut(ints: Ints, floats: Floats, root: int, most: int, deepest: int) -> Draft:
    """The first ``most`` nodes that are no deeper than that."""
    kept = np.flatnonzero(ints[DEPTH] <= deepest)[:most]
    places = np.zeros(ints.shape[1], np.int64)
    places[kept] = np.arange(len(kept))
    ints, floats = ints[:, kept], floats[:, kept]
    ints[PARENT, 1:] = places[ints[PARENT, 1:]]
    ints[TOKEN, 0] = root
    return Draft(root, grown=(ints, floats, len(kept)))
