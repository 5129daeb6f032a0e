"""An engine in a package of its own: once it is installed, `LLM(engine="echo")` finds it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from tokentree.engines.base import EngineInfo, EngineOptions
from tokentree.engines.output import TargetOutput
from tokentree.exclusive import Exclusive
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

VOCAB_SIZE, CONTEXT = 256, 4096


class EchoEngine:
    """A model that repeats: after a token comes what came after it the last time, and token 0 if it is new.

    Its KV is the tokens that are committed. A model of weights keeps keys and values of them instead.
    """

    def __init__(self) -> None:
        self.vocab_size, self.context, self.lock = VOCAB_SIZE, CONTEXT, Exclusive()
        self._committed: dict[int, list[int]] = {}  # by `Sequence.id`
        self._trees: dict[int, TokenTree] = {}  # the last one of each

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("the echo", self.vocab_size, self.context, signature="echo")

    def begin(self, seq: Sequence) -> int:
        self._committed[seq.id] = []
        return 0  # nothing is reused

    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        self._committed[seq.id] = seq.tokens[: -1 if upto is None else upto]
        return 0

    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None,
        reading: SequenceOf[tuple[Sequence, int]] = (),
    ) -> TargetOutput:  # fmt: skip
        firsts = [0] * len(seqs) if firsts is None else list(firsts)
        rows, starts = list[torch.Tensor](), list[int]()
        for seq, tree, first in zip(seqs, trees, firsts, strict=True):
            starts.append(len(rows))
            self._trees[seq.id] = tree
            before = self._committed[seq.id]
            for node in range(first, len(tree)):  # each sees the text and the nodes on its path
                rows.append(logits_after([*before, *tree.tokens[tree.path(node)].tolist()]))
        for seq, count in reading:  # parts of prompts, beside the trees
            self._committed[seq.id] = seq.tokens[: len(self._committed[seq.id]) + count]
        logits = torch.stack(rows) if rows else torch.empty(0, self.vocab_size)
        return TargetOutput(logits, starts, firsts, seconds=0.0)

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        for seq, path in zip(seqs, paths, strict=True):
            self._committed[seq.id] += self._trees[seq.id].tokens[path].tolist()

    def committed(self, seq: Sequence) -> int:
        return len(self._committed.get(seq.id, ()))

    def nbytes(self, seq: Sequence, rows: int) -> int:
        return 8 * rows

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        for seq in seqs:
            self._committed.pop(seq.id, None)
            self._trees.pop(seq.id, None)


def logits_after(tokens: list[int]) -> torch.Tensor:
    """float32[vocab]: 9 for the token that comes next, and 0 for all others."""
    before = [place for place, token in enumerate(tokens[:-1]) if token == tokens[-1]]
    logits = torch.zeros(VOCAB_SIZE)
    logits[tokens[before[-1] + 1] if before else 0] = 9.0
    return logits


def make(model: Any, options: EngineOptions) -> EchoEngine:
    """What the entry point names. An engine with weights would load those of ``model`` here."""
    return EchoEngine()
