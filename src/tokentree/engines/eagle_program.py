"""An EAGLE head's forward in one compiled call."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import nn

from tokentree.engines.attention import Segment
from tokentree.engines.fused import FusedNorm
from tokentree.engines.kernels import BLOCK
from tokentree.engines.packing import Packing
from tokentree.engines.program import Behind, Steps, Turns
from tokentree.engines.quantized import QuantizedLinear
from tokentree.heads.eagle import EagleHead
from tokentree.tree import Ints


@dataclass
class _Heads:
    heads: int
    kv_heads: int
    width: int
    scale: float
    window: int | None = None


class EagleProgram(Steps):
    """What `EagleHead.forward` and, of EAGLE-3, `EagleHead.logits` do, step by step, in bfloat16 on a CPU, with weights
    in 8 bits: drafts needn't be exact.

    Args:
        head: one that `fits`, in bfloat16; it stays as it is.
    """

    def __init__(self, head: EagleHead) -> None:
        sizes = head.sizes
        self._version, self._turns, self._width = sizes.version, Turns(head.rotary), sizes.hidden_size
        self._heads = _Heads(sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.head_dim**-0.5)
        self._inner_size = sizes.intermediate_size
        packing, half = Packing(QuantizedLinear), sizes.intermediate_size
        halves = [nn.Linear(sizes.hidden_size, half, bias=False, device="meta") for _ in range(2)]
        for layer, weight in zip(halves, head.gate_up.weight.split(half), strict=True):
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self._qkv, norm = packing.pack(head.qkv), FusedNorm(head.post_attention_layernorm)
        gate_up, down_proj = packing.pack(*halves, gated=True), packing.pack(head.down_proj)
        self._behind = Behind(packing.pack(head.o_proj), norm, gate_up, down_proj)
        if sizes.version == 3:
            self._norms = FusedNorm(head.input_layernorm), FusedNorm(head.hidden_norm)
            self._last, self._lm_head = FusedNorm(head.norm), packing.pack(head.lm_head)
        else:
            self._fc = packing.pack(head.fc)
        super().__init__(max(2 * sizes.hidden_size, sizes.intermediate_size, sizes.num_heads * sizes.head_dim))

    @staticmethod
    def fits(head: EagleHead) -> bool:
        """Whether sizes and type suit."""
        sizes = head.sizes
        layers = [head.fc, head.qkv, head.o_proj, head.gate_up, head.down_proj]
        columns = [sizes.hidden_size, sizes.intermediate_size, sizes.num_heads * sizes.head_dim, head.qkv.out_features]
        return (
            Packing(QuantizedLinear).fits(*layers)
            and not any(count % BLOCK for count in columns)
            and not sizes.norm_before_residual
            and (sizes.target_hidden_size or sizes.hidden_size) == sizes.hidden_size
        )

    def forward(
        self, embedded: torch.Tensor, known: torch.Tensor, positions: Ints, segments: SequenceOf[Segment]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Writes the KV of all rows of ``segments``, and returns what is known of the next positions, bfloat16[rows,
        hidden size]; and, of EAGLE-3, logits bfloat16[rows, tokens].

        Args:
            embedded, known: bfloat16[rows, hidden size].
            positions: int64[rows].
        """
        rows = len(embedded)
        self.reserve(rows)
        if self._version == 3:
            self._embedded[:rows], self._residual[:rows] = embedded, known
        else:
            self._x[:rows, : self._width], self._x[:rows, self._width :] = embedded, known
        logits = None
        if self._version == 3:
            logits = torch.empty(rows, len(self._lm_head.start), dtype=torch.bfloat16)
            self._steps[-1, 1 + self._lm_head.RESULT] = logits.data_ptr()
            logits = logits[:, : self._lm_head.num_outputs]
        self.run(len(self._steps), segments, self._turns.at(positions))
        return self._residual[:rows].clone(), logits

    def build(self) -> list[list[int]]:
        width, sizes, steps = self._width, self._heads, list[list[int]]()
        at = self.rows_of_a_layer(width, self._inner_size, sizes)
        # in the last step the sum of the residual and what is added is what is known of the next positions
        self._residual, self._x = at.residual, self.room(2 * width)
        if self._version == 3:
            self._embedded = self.room(width)
            steps += self.norm(self._norms[0], self._embedded, self._x[:, :width], None)
            steps += self.norm(self._norms[1], at.residual, self._x[:, width:], None)
            steps += self.prepare(self._qkv, self._x)
            steps += self.multiply(self._qkv, self._x, at.qkv)
        else:
            steps += self.prepare(self._fc, self._x)
            steps += self.multiply(self._fc, self._x, at.residual)
            steps += self.prepare(self._qkv, at.residual)
            steps += self.multiply(self._qkv, at.residual, at.qkv)
        steps += self.turn(0, sizes, at.qkv, at.queries)
        steps += self.after_turning(0, sizes, self._behind, at)
        if self._version == 3:
            steps += self.norm(self._last, at.residual, at.normed, self._lm_head, at.added)
            return steps + self.multiply(self._lm_head, at.normed, None)
        # the sum alone is wanted: what this norm makes of it is not looked at
        return steps + self.norm(self._behind.norm, at.residual, at.normed, None, at.added)
