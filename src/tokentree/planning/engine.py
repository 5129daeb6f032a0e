"""An engine that keeps time, and computes nothing."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from tokentree.engines.base import EngineInfo
from tokentree.engines.output import KEPT, TargetOutput
from tokentree.engines.prefix import LEAST
from tokentree.exclusive import Exclusive
from tokentree.planning.clock import Clock
from tokentree.planning.timing import Timing
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

RIGHT = 0  # the token that its target goes on with, after every node
CONTEXT = 1 << 20


class TimedEngine:
    """Sets a clock forward by what each forward takes. Its target goes on with the token `RIGHT` after everything, so a
    candidate is right if it is that token. Which ones are, is the drafter's to draw.

    A prompt is one token, repeated, which tells it from all other prompts. KV is counted in tokens. What was read of a
    text is kept for texts with the same prompt. Prompts that were not used for longest are forgotten first.

    Args:
        timing: what a forward takes.
        clock: is set forward.
        kept_tokens: tokens whose KV is kept for other texts. None: all.
        shared_tokens: that all prompts begin with, and whose KV is always there.
    """

    def __init__(
        self, timing: Timing, clock: Clock, kept_tokens: int | None = None, shared_tokens: int = 0
    ) -> None:  # fmt: skip
        self.vocab_size, self.context, self.lock = 2, CONTEXT, Exclusive()
        self._timing, self._clock, self._kept_tokens = timing, clock, kept_tokens
        self._shared_tokens = shared_tokens
        self._committed: dict[int, int] = {}
        self._kept: dict[int, int] = {}  # of each prompt: tokens whose KV is kept; what was used last comes last
        self._total = 0  # of these tokens

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("a simulated model", self.vocab_size, self.context, execution="a clock that is set forward")

    def keeps(self, prompt: int) -> bool:
        """Whether it has KV of texts that begin with the token ``prompt``."""
        return prompt in self._kept

    def begin(self, seq: Sequence) -> int:
        prompt = seq.prompt_ids[0]
        if prompt in self._kept:
            self._kept[prompt] = self._kept.pop(prompt)
        reused = min(max(self._kept.get(prompt, 0), self._shared_tokens), len(seq.tokens) - 1)
        if reused < LEAST:
            reused = 0
        self._committed[seq.id] = reused
        return reused

    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        reused = self.begin(seq)
        upto = len(seq.tokens) - 1 if upto is None else upto
        if upto > reused:
            self.verify([], [], reading=[(seq, upto - reused)])
        return reused

    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None,
        reading: SequenceOf[tuple[Sequence, int]] = (),
    ) -> TargetOutput:  # fmt: skip
        firsts = [0] * len(seqs) if firsts is None else list(firsts)
        rows, starts = 0, list[int]()
        for tree, first in zip(trees, firsts, strict=True):
            starts.append(rows)
            rows += len(tree) - first
        read = 0
        for seq, count in reading:
            self._committed[seq.id] += count
            self._keep(seq)
            read += count
        seconds = self._timing.forward(rows + read, len(seqs) + len(reading))
        self._clock.advance(seconds)
        best = np.zeros((rows, KEPT), np.float32), np.full((rows, KEPT), RIGHT, np.int64)
        return TargetOutput(torch.zeros(rows, self.vocab_size), starts, firsts, seconds, best)

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        for seq, path in zip(seqs, paths, strict=True):
            self._committed[seq.id] += len(path)

    def committed(self, seq: Sequence) -> int:
        return self._committed.get(seq.id, 0)

    def nbytes(self, seq: Sequence, rows: int) -> int:
        return rows

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        for seq in seqs:
            if seq.id in self._committed:
                self._keep(seq)
                del self._committed[seq.id]

    def _keep(self, seq: Sequence) -> None:
        """Keeps what has been read of ``seq``, and forgets what there is no memory for."""
        prompt = seq.prompt_ids[0]
        before = self._kept.pop(prompt, 0)
        self._kept[prompt] = max(before, self._committed[seq.id])
        self._total += self._kept[prompt] - before
        while self._kept_tokens is not None and self._total > self._kept_tokens:
            self._total -= self._kept.pop(next(iter(self._kept)))
