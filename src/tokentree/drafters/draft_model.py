"""A smaller model grows the tree (SpecInfer, Miao et al. 2023, arXiv:2305.09781)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.drawing import draw, whole
from tokentree.engines.drafting import DraftEngine, ReadsTexts
from tokentree.engines.output import TargetOutput
from tokentree.errors import RequestError
from tokentree.growing import DEPTH, PARENT, TOKEN
from tokentree.kernels.topk import top_logprobs
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import Ints, TokenTree

LEFT = 16  # tokens at the end of a text that are read with the root, in one forward


class DraftModel(Drafter):
    """Level by level: one forward of the draft model for the whole frontier of all sequences.

    Its own KV is committed along the accepted path. What it has not seen yet, the new root and accepted leaves that
    were never expanded, goes in as a chain before the next tree's root, in the same forward.

    Args:
        engine: holds the draft model.
        vocab_size: the target's; candidates beyond it are never proposed.
        name: shown beside the tokens it earned.
        token_map: int64[n], ascending: the target's ids for the engine's logits, if these are others.
    """

    draws_children = by_levels = True
    _part = 256  # tokens of a text that are read in one step of a batch

    def __init__(
        self, engine: DraftEngine, vocab_size: int, name: str = "draft_model", token_map: Ints | None = None
    ) -> None:
        self.name, self._token_map = name, token_map
        self._engine = engine
        self._vocab_size = vocab_size
        self._mapped = np.empty(0, np.int64) if token_map is None else token_map
        self._all_known = vocab_size >= (engine.vocab_size if token_map is None else len(token_map))
        self._rows: dict[int, Rows] = {}
        self._level_seconds = 0.0
        self._unknown: set[int] = set()  # sequences with a token that the draft model doesn't have

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        for seq in seqs:
            if max(seq.tokens) >= self._engine.vocab_size:
                self._unknown.add(seq.id)
            elif len(seq.tokens) <= self._engine.context:
                self._engine.prefill(seq, upto)

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = [
            Draft(seq.tokens[-1], {} if sampled and not seq.params.is_greedy else None, self._level_seconds / len(seqs))
            for seq in seqs
        ]
        frontiers = [self._begin(seq, draft, shape, len(seqs)) for seq, draft in zip(seqs, drafts, strict=True)]
        rows = [Rows(seq.tokens[self._engine.committed(seq) :]) for seq in seqs]
        done = [0] * len(seqs)
        while any(frontiers):
            for draft, row, frontier in zip(drafts, rows, frontiers, strict=True):
                row.expand(draft, frontier)
            active = [i for i, frontier in enumerate(frontiers) if frontier]
            trees = [rows[i].tree() for i in active]
            started = time.perf_counter()
            out = self._engine.verify([seqs[i] for i in active], trees, [done[i] for i in active])
            for place, i in enumerate(active):
                done[i] = len(trees[place])
                drafts[i].levels += 1
                nodes = [rows[i].of_node[node] for node in frontiers[i]]
                level = self._add_children(seqs[i], drafts[i], frontiers[i], out, place, nodes, shape)
                if level and self._may_grow(seqs[i], int(drafts[i].ints[DEPTH, level[0]]), shape):
                    frontiers[i] = shape.select(seqs[i], drafts[i], level)
                else:
                    frontiers[i] = []
            self._learn_pace(time.perf_counter() - started)
        self._rows |= {seq.id: row for seq, row, seen in zip(seqs, rows, done, strict=True) if seen}
        return drafts

    def observe_prompt(self, seqs: list[Sequence], upto: int) -> None:
        """Nothing yet: `propose` reads the prompts of those for whom it drafts."""

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        grown = [(seq, step) for seq, step in zip(seqs, accepted, strict=True) if seq.id in self._rows]
        paths = [self._rows.pop(seq.id).path(step.tokens) for seq, step in grown]
        self._engine.commit([seq for seq, _ in grown], paths)

    def release(self, seqs: list[Sequence]) -> None:
        self._engine.release(seqs)
        for seq in seqs:
            self._rows.pop(seq.id, None)
            self._unknown.discard(seq.id)

    def _begin(self, seq: Sequence, draft: Draft, shape: Shape, texts: int) -> list[int]:
        """The first frontier: the root, if a draft of ``seq`` is wanted and its text has been read."""
        if not self._may_begin(seq, shape):
            return []
        frontier = shape.select(seq, draft, [0])
        return frontier if frontier and self._has_read(seq, texts) else []

    def _may_begin(self, seq: Sequence, shape: Shape) -> bool:
        """Whether there may be a draft of ``seq``: its last token, which the draft model must have, has no row yet."""
        unseen = seq.tokens[self._engine.committed(seq) :]
        if max(unseen, default=0) >= self._engine.vocab_size:
            self._unknown.add(seq.id)
        return bool(unseen) and self._may_grow(seq, 0, shape)

    def _has_read(self, seq: Sequence, texts: int) -> bool:
        """Reads what is new of ``seq``, but for a few tokens at its end. Of one text among several it reads a part, so
        that nobody waits for long. Returns whether that was all."""
        return caught_up(self._engine, seq, None if texts == 1 else self._part, seq)

    def _may_grow(self, seq: Sequence, depth: int, shape: Shape) -> bool:
        """Nodes below what may still be emitted are useless, and so are rows past the draft model's own context."""
        fits = len(seq.tokens) + depth <= self._engine.context and seq.id not in self._unknown
        return fits and depth < min(shape.max_depth, seq.room - 1)

    def _learn_pace(self, seconds: float) -> None:
        """The time of a level. One that took far longer was disturbed; and if one took far less, what is believed goes
        back to such a one, often the first, in which all is touched for the first time."""
        known = self._level_seconds or seconds
        if seconds < known / 3:
            known = seconds
        self._level_seconds = known + 0.1 * (min(seconds, 2 * known) - known)

    def _add_children(
        self, seq: Sequence, draft: Draft, frontier: list[int], out: TargetOutput, tree: int, nodes: list[int],
        shape: Shape,
    ) -> list[int]:  # fmt: skip
        """Adds the children of ``frontier``, whose draft logits are those of ``out`` after ``nodes`` of its tree number
        ``tree``."""
        counts, level = shape.counts(seq, draft, frontier), list[int]()
        if draft.sampled is None and self._all_known and seq.takes_best:
            found = out.best(tree, nodes, max(counts, default=0))
            if found is not None:
                return draft.add_best(frontier, counts, found, self._mapped)
        logits = out.rows(tree, nodes)[:, : self._vocab_size]
        counts = [min(count, logits.shape[1]) for count in counts]
        if draft.sampled is not None:
            for node, count, row in zip(frontier, counts, self._whole(logits), strict=True):
                level += self._draw(seq, draft, node, count, row)
            return level
        token_map = self._token_map
        if seq.changes_logits:  # rules name tokens by the target's ids
            ruled = [
                (i, row)
                for i, (node, logit) in enumerate(zip(frontier, self._whole(logits), strict=True))
                if (row := _ruled(seq, draft, node, logit)) is not None
            ]
            if not ruled:
                return []
            frontier, counts = [frontier[i] for i, _ in ruled], [counts[i] for i, _ in ruled]
            logits, token_map = torch.stack([row for _, row in ruled]), None
        divisor = 1.0 if seq.params.is_greedy else seq.params.temperature
        log_probs, ids = top_logprobs(logits, max(counts, default=0), divisor)
        return draft.add_level(frontier, counts, ids if token_map is None else token_map[ids], log_probs)

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """float32[n, vocab of the target], -inf where the draft model knows no token."""
        return whole(logits, self._vocab_size, self._token_map)

    def _draw(self, seq: Sequence, draft: Draft, node: int, count: int, logits: torch.Tensor) -> list[int]:
        """Draws ``count`` children of ``node``, see `draw`."""
        return draw(seq, draft, node, count, logits, seq.noise_below(node))


def caught_up(engine: ReadsTexts, seq: Sequence, most: int | None, charged: Sequence) -> bool:
    """Reads up to ``most`` tokens of ``seq``, or all but the last, if many are new. The seconds are part of what it
    took to read the prompt of ``charged``. Returns whether few are left."""
    done, end = engine.committed(seq), len(seq.tokens) - 1
    if end - done <= LEFT:
        return True
    started = time.perf_counter()
    engine.prefill(seq, end if most is None else min(end, done + most))
    charged.metrics.prefill_seconds += time.perf_counter() - started
    return end - engine.committed(seq) <= LEFT


def _ruled(seq: Sequence, draft: Draft, node: int, logits: torch.Tensor) -> torch.Tensor | None:
    """float32[vocab]: ``logits`` after ``node`` with the request's rules applied; None where they fail, and there is
    nothing to propose. Whether they fail in the text too is found when the target comes there."""
    try:
        return seq.processed(logits, draft.path_tokens(node))
    except RequestError:
        return None


@dataclass
class Rows:
    """The rows of a draft model's own tree: first what it had not seen, ending in the root, then expanded nodes.

    Args:
        unseen: tokens without KV, the last of them the root.
    """

    unseen: list[int]
    tokens: list[int] = field(init=False)
    parents: list[int] = field(init=False)
    of_node: dict[int, int] = field(init=False)  # draft node -> row

    def __post_init__(self) -> None:
        self.tokens, self.parents = list(self.unseen), list(range(-1, len(self.unseen) - 1))
        self.of_node = {0: len(self.unseen) - 1}

    def expand(self, draft: Draft, frontier: list[int]) -> None:
        for node in frontier:
            if node not in self.of_node:
                self.of_node[node] = len(self.tokens)
                self.tokens.append(int(draft.ints[TOKEN, node]))
                self.parents.append(self.of_node[int(draft.ints[PARENT, node])])

    def tree(self) -> TokenTree:
        return TokenTree(np.array(self.tokens), np.array(self.parents))

    def path(self, tokens: list[int]) -> list[int]:
        """The rows to keep when the text goes on with ``tokens``: all up to the root, then as far as was expanded."""
        places = {place: row for row, place in enumerate(zip(self.parents, self.tokens, strict=True))}
        path, row = list(range(len(self.unseen))), len(self.unseen) - 1
        for token in tokens[:-1]:  # the last one is the next root: its row belongs to the next tree
            child = places.get((row, token))
            if child is None:
                break
            path.append(child)
            row = child
        return path
