"""The forward of a model in one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial

import numpy as np
import torch

from tokentree.engines.cpu.families.stack import Stack
from tokentree.engines.cpu.reused import Reused, tensor_in
from tokentree.engines.cpu.steps import Step, Steps
from tokentree.engines.cpu.turns import RotaryTables
from tokentree.engines.output import KEPT
from tokentree.engines.segment import Segment, Upto, end_of
from tokentree.tree import Ints


class Program(Steps):
    """The forward of a model of one of `families`, in bfloat16 or few bits on a CPU.

    Args:
        stack: its layers and their weights.

    Attributes:
        states: bfloat16[places, rows or more, hidden size], the hidden states of the last forward that `capture` asked
            for; the last of them only if it went that far.
        best: of the last forward that had logits, those of the most probable tokens after each row, best first,
            float32[rows, `KEPT`], and these tokens, int64[rows, `KEPT`].
    """

    def __init__(self, stack: Stack) -> None:
        self.stack, self._rotary, self._head = stack, RotaryTables(stack.rotaries), stack.head
        sizes = stack.attentions[0]
        super().__init__(max(stack.hidden_size, stack.inner_size, sizes.heads * sizes.width))
        self._places: list[int] = []
        self.states = torch.empty(0, 0, 0)
        self._vocab_size, self._width = self._head.num_outputs, len(self._head.start)
        self._kept, self._logits = min(KEPT, self._vocab_size), Reused()
        self.best = np.empty((0, self._kept), np.float32), np.empty((0, self._kept), np.int64)

    def capture(self, places: list[int]) -> None:
        """Keeps the hidden states ``places``, see `HasHiddenStates.capture`, in `states`."""
        self._places, self._capacity = places, 0

    def forward(
        self, ids: Ints, positions: Ints, segments: SequenceOf[Segment], upto: Upto, rows: int | None = None
    ) -> Callable[[], torch.Tensor]:
        """Writes the KV of all rows of ``segments``, and what their states take in, and returns a function of
        bfloat16[rows, vocab], or of [0, vocab] if it ends before the logits.

        Args:
            ids, positions: int64[n].
            rows: how many of them have logits, the first ones, which are whole segments; by default all.
        """
        self.reserve(len(ids))
        rows = 0 if upto != "logits" else len(ids) if rows is None else rows
        logits = self._logits.take(rows, self._width)
        last, before_head = len(self._steps), len(self._steps) - 2
        whole = last if rows == len(ids) else self._up_to_kv if upto == "kv" else before_head
        if rows:
            self.best = np.empty((rows, self._kept), np.float32), np.empty((rows, self._kept), np.int64)
            self.write_to(logits, *self.best)
        turns = self._rotary.at(positions, end_of(segments))
        self.run(whole, segments, turns, ids)
        if rows and whole < last:
            self.run(last, [one for one in segments if one.start < rows], turns.of(rows), first=before_head)
        return partial(tensor_in, logits, self._vocab_size)

    def build(self) -> list[Step]:
        stack, steps, update = self.stack, list[Step](), None
        at = stack.room(self)
        steps += self.embed(stack.embedding, at.residual)
        self.states = torch.empty(len(self._places), self._capacity, stack.hidden_size, dtype=torch.bfloat16)
        for number, (place, layer) in enumerate(zip(stack.places, stack.layers, strict=True)):
            steps += stack.into_layer(self, layer, at, update)
            steps += self._keep(number, at.residual)
            steps += stack.store(self, place, layer, at)
            self._up_to_kv = len(steps)
            steps += stack.attend(self, place, layer, at)
            update = at.added
        steps += self.norm(stack.norm, at.residual, at.normed, self._head, update)
        steps += self._keep(len(stack.layers), at.normed)
        return steps + self.output(self._head, at.normed, self._kept)

    def _keep(self, place: int, x: torch.Tensor) -> list[Step]:
        """Keeps ``x``, if it is one of the hidden states that are asked for."""
        return self.copy(x, self.states[self._places.index(place)]) if place in self._places else []
