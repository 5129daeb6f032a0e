"""An EAGLE head's forward in one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.engines.cpu.fused import FusedNorm
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.cpu.reused import Reused, tensor_in
from tokentree.engines.cpu.steps import Behind, OwnHeads, Step, Steps
from tokentree.engines.cpu.turns import RotaryTables
from tokentree.engines.output import KEPT
from tokentree.engines.segment import Segment, end_of
from tokentree.heads.eagle import EagleHead
from tokentree.kernels.tile import BLOCK
from tokentree.tree import Ints


class EagleProgram(Steps):
    """What `EagleHead.forward` and, of heads with an output layer, `EagleHead.logits` do, step by step, in bfloat16 on
    a CPU, with weights in 8 bits: drafts needn't be exact.

    Args:
        head: one that `fits`, in bfloat16; it stays as it is.
        embedding: given token ids int64[rows], bfloat16[rows, hidden size].

    Attributes:
        best, log_sums: of the last `forward` of a head with an output layer, see `output.TargetOutput`; None of others.
    """

    def __init__(self, head: EagleHead, embedding: Callable[[torch.Tensor], torch.Tensor]) -> None:
        sizes = head.sizes
        self._version, self._rotary, self._width = sizes.version, RotaryTables([head.rotary]), sizes.hidden_size
        self._heads = OwnHeads(sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.head_dim**-0.5)
        self._inner_size = sizes.intermediate_size
        packing = Packing(QuantizedLinear)
        self._qkv, norm = packing.pack(head.qkv), FusedNorm(head.post_attention_layernorm)
        gate_up, down_proj = packing.pack_halves(head.gate_up), packing.pack(head.down_proj)
        self._behind = Behind(packing.pack(head.o_proj), norm, gate_up, down_proj)
        self._fc, self._embedding, self._taps = packing.pack(head.fc), embedding, len(sizes.taps)
        self._tap_norms = [FusedNorm(norm) for norm in head.fc_norm]
        self._wide_norm = None if head.input_norm is None else FusedNorm(head.input_norm)
        self._normed_residual, self._normed_output = sizes.norm_before_residual, sizes.norm_output
        if sizes.version == 3:
            self._norms = FusedNorm(head.input_layernorm), FusedNorm(head.hidden_norm)
            self._last = FusedNorm(head.norm)
        self._says = head.lm_head is not None
        if head.lm_head is not None:
            self._lm_head = packing.pack(head.lm_head)
            self._vocab_size, self._columns = self._lm_head.num_outputs, len(self._lm_head.start)
            self._kept, self._logits = min(KEPT, self._vocab_size), Reused()
        self.best: tuple[NDArray[np.float32], Ints] | None = None
        self.log_sums: NDArray[np.float32] | None = None
        widest = max(2, self._taps) * sizes.hidden_size
        super().__init__(max(widest, sizes.intermediate_size, sizes.num_heads * sizes.head_dim))

    @staticmethod
    def fits(head: EagleHead) -> bool:
        """Whether sizes and type suit."""
        sizes = head.sizes
        layers = [head.fc, head.qkv, head.o_proj, head.gate_up, head.down_proj]
        columns = [sizes.hidden_size, sizes.intermediate_size, sizes.num_heads * sizes.head_dim, head.qkv.out_features]
        return (
            Packing(QuantizedLinear).fits(*layers)
            and not any(count % BLOCK for count in columns)
            and (sizes.target_hidden_size or sizes.hidden_size) == sizes.hidden_size
        )

    @property
    def fuses(self) -> bool:
        """Whether `forward` can be given the target's hidden states as they are."""
        return self._version == 3

    def forward(
        self, ids: Ints, known: torch.Tensor, positions: Ints, segments: SequenceOf[Segment]
    ) -> tuple[torch.Tensor, Callable[[], torch.Tensor] | None]:
        """Writes the KV of all rows of ``segments``, and returns what is known of the next positions, bfloat16[rows,
        hidden size]; and, of a head with an output layer, a function of logits bfloat16[rows, tokens], of which `best`
        and `log_sums` then are.

        Args:
            ids, positions: int64[rows].
            known: bfloat16[rows, hidden size]; or, if it `fuses`, the hidden states that this is made of,
                bfloat16[taps, rows, hidden size].
        """
        rows = len(ids)
        first = self._take_in(ids, known)
        said = None
        if self._says:
            logits = self._logits.take(rows, self._columns)
            self.best = np.empty((rows, self._kept), np.float32), np.empty((rows, self._kept), np.int64)
            self.log_sums = np.empty(rows, np.float32)
            self.write_to(logits, *self.best, self.log_sums)
            said = partial(tensor_in, logits, self._vocab_size)
        self.run(len(self._steps), segments, self._rotary.at(positions, end_of(segments)), ids, first)
        return self._given[:rows].clone(), said

    def store(self, ids: Ints, known: torch.Tensor, positions: Ints, segments: SequenceOf[Segment]) -> None:
        """As `forward`, but nothing is wanted of these rows except their KV."""
        first = self._take_in(ids, known)
        self.run(self._up_to_kv, segments, self._rotary.at(positions, end_of(segments)), ids, first)

    def _take_in(self, ids: Ints, known: torch.Tensor) -> int:
        """Puts what is given where the steps read it; returns the first step to run."""
        rows = len(ids)
        self.reserve(rows)
        states = known.ndim == 3
        if states:
            self._read[:, :rows] = known
        elif self._version == 3:
            self._residual[:rows] = known
        else:
            self._x[:rows, self._width :] = known
        if not self.embeds(self._embedding):
            self._embedded[:rows] = self._embedding(torch.from_numpy(ids))
        return 0 if states else self._fusing

    def build(self) -> list[Step]:
        width, sizes, steps = self._width, self._heads, list[Step]()
        at = self.rows_of_a_layer(width, self._inner_size, sizes)
        # in the last step the sum of the residual and what is added is what is known of the next positions, or its norm
        self._residual, self._x = at.residual, self.room(2 * width)
        self._given = at.normed if self._normed_output else at.residual
        third = self._version == 3
        self._embedded = self.room(width) if third else self._x[:, :width]
        if third:
            states = self.room(self._taps * width)
            steps += self._norm_states(states)
            steps += self.multiply(self._fc, states, at.residual)
        self._fusing = len(steps)
        if self.embeds(self._embedding):
            steps += self.embed(self._embedding, self._embedded)
        if third:
            steps += self.norm(self._norms[0], self._embedded, self._x[:, :width], None)
            steps += self.norm(self._norms[1], at.residual, self._x[:, width:], None)
            if self._normed_residual:
                steps += self.norm(self._norms[1], at.residual, at.residual, None)
            steps += self.prepare(self._qkv, self._x)
            steps += self.multiply(self._qkv, self._x, at.qkv)
        else:
            steps += self.prepare(self._fc, self._x)
            steps += self.multiply(self._fc, self._x, at.residual)
            steps += self.prepare(self._qkv, at.residual)
            steps += self.multiply(self._qkv, at.residual, at.qkv)
        steps += self.rotary(0, sizes, at.qkv, at.queries)
        self._up_to_kv = len(steps)
        steps += self.after_rotary(0, sizes, self._behind, at)
        if self._says:
            steps += self.norm(self._last, at.residual, at.normed, self._lm_head, at.added)
            return steps + self.output(self._lm_head, at.normed, self._kept)
        # without `norm_output` the sum alone is wanted: what this norm makes of it is not looked at
        last = self._last if third else self._behind.norm
        return steps + self.norm(last, at.residual, at.normed, None, at.added)

    def _norm_states(self, states: torch.Tensor) -> list[Step]:
        """Norms the target's hidden states, if the head does, and makes of ``states`` [rows, taps x width] what ``fc``
        takes. They are given in `_read`, [taps, rows, hidden size]."""
        parts, steps = states.split(self._width, 1), list[Step]()
        self._read = states.view(len(states), -1, self._width).transpose(0, 1)
        if self._wide_norm is not None:
            return self.norm(self._wide_norm, states, states, self._fc)
        if self._tap_norms:
            self._read = self.room(self._taps * self._width).view(self._taps, -1, self._width)
            for norm, tap, part in zip(self._tap_norms, self._read, parts, strict=True):
                steps += self.norm(norm, tap, part, None)
        return steps + self.prepare(self._fc, states)
