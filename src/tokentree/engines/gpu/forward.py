"""A forward over rows of any texts and trees: seven kernels a layer."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
import triton

from tokentree.engines.gpu.attending import CHUNK
from tokentree.engines.gpu.inputs import Inputs
from tokentree.engines.gpu.kv_forward import KVForward, grid_of
from tokentree.engines.gpu.pages import Pages
from tokentree.engines.gpu.products import gated_kernel, output_kernel, residual_kernel, rotary_kernel
from tokentree.engines.gpu.quantized import Int8, Matrix
from tokentree.engines.gpu.rows import add_norm_kernel, embed_kernel, heads_kernel, norm_kernel
from tokentree.engines.gpu.tiles import MANY, Tile, parts_of
from tokentree.engines.gpu.weights import Layer, Weights


class Forward(KVForward):
    """The kernels of a model's forward, in order.

    Args:
        weights: of the model.
        pages, most_rows, places: see `KVForward`.

    Attributes:
        hidden: bfloat16[most_rows, hidden size], what the layers gave.
    """

    def __init__(self, weights: Weights, pages: Pages, most_rows: int, places: SequenceOf[int] = ()) -> None:
        super().__init__(weights.sizes, pages, most_rows, places)
        self.weights = w = weights

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        width, columns = w.width, (w.heads + 2 * w.kv_heads) * w.head_size
        inner = max(len(layer.gate_up) for layer in w.layers) // 2
        self.hidden, self._normed, self._block = (
            empty(most_rows, width), empty(most_rows, width), triton.next_power_of_2(width),
        )  # fmt: skip
        self._gated = empty(most_rows, inner)
        normed = any(layer.attention_end_gain is not None for layer in w.layers)
        self._between = empty(most_rows if normed else 0, width)
        self._raw = empty(most_rows if any(layer.q_gain is not None for layer in w.layers) else 0, columns)
        added = [part for layer in w.layers for part in (layer.o, layer.down)]
        parts = max(parts_of(len(part), part.shape[1], _bits(part)) for part in added)
        self._partial = empty(parts if parts > 1 else 0, MANY, width, dtype=torch.float32)

    def run(self, inputs: Inputs, rows: int, head_rows: int, long: bool) -> None:
        w, x, block = self.weights, inputs.device, self._block
        self.move(inputs)
        embed_kernel[(rows,)](
            x["ids"], w.embedding, self.hidden, w.width, w.embedding_scale, BLOCK=block, num_warps=4
        )  # fmt: skip
        for number, layer in enumerate(w.layers):
            self._store(number, self.hidden, x, rows)
            self._norm(layer.attention_gain, rows)
            self._heads(layer, number, x, rows, self._normed)
            self._attend(layer.rules, number, inputs, rows, long)
            self._add(self._attended, layer.o, layer.o_bias, layer.attention_end_gain, rows)
            self._norm(layer.mlp_gain, rows)
            self._gate(layer, rows)
            self._add(self._gated, layer.down, None, layer.mlp_end_gain, rows)
        last = rows if len(w.layers) in self.places else head_rows
        if last:
            self._norm(w.gain, last)
            self._store(len(w.layers), self._normed, x, rows)
        if head_rows:
            self._head(head_rows)

    # -- the parts of it -------------------------------------------------------------------------------------------

    def _norm(self, gain: torch.Tensor, rows: int) -> None:
        w = self.weights
        norm_kernel[(rows,)](self.hidden, gain, self._normed, w.width, w.eps, BLOCK=self._block, num_warps=4)

    def _heads(
        self, layer: Layer, number: int, x: dict[str, torch.Tensor], rows: int, source: torch.Tensor
    ) -> None:  # fmt: skip
        """Queries, and keys and values in their pages, of ``source`` [rows, inputs]."""
        w, pages = self.weights, self.pages
        (columns, width), raw = layer.qkv.shape, layer.q_gain is not None
        way, options = self._way(rows, layer.qkv, 128 if raw else min(w.head_size, 64))
        given = _numbers(layer.qkv)
        bias = given if layer.qkv_bias is None else layer.qkv_bias
        to = *w.rotary[layer.rotary], x["positions"], x["slots"], self._q, pages.keys[number], pages.values[number]
        if not raw:
            rotary_kernel[grid_of(way, rows, columns)](
                source, given, bias, *to, rows, width, w.heads, w.kv_heads,
                BIAS=layer.qkv_bias is not None, HEAD=w.head_size, CHUNK=CHUNK, **options,
            )  # fmt: skip
            return
        output_kernel[grid_of(way, rows, columns)](
            source, given, bias, self._raw, rows, columns, width, 0.0,
            BIAS=layer.qkv_bias is not None, CAP=False, PARTS=way.parts, **options,
        )  # fmt: skip
        heads_kernel[(rows, w.heads + 2 * w.kv_heads)](
            self._raw, layer.q_gain, layer.k_gain, *to, w.heads, w.kv_heads, w.eps,
            HEAD=w.head_size, CHUNK=CHUNK, num_warps=1,
        )  # fmt: skip

    def _gate(self, layer: Layer, rows: int) -> None:
        """What the MLP's last product reads."""
        w, columns = self.weights, len(layer.gate_up)
        way, options = self._way(rows, layer.gate_up)
        gated_kernel[grid_of(way, rows, columns)](
            self._normed, _numbers(layer.gate_up), self._gated, rows, columns, w.width, GELU=w.gelu, **options
        )  # fmt: skip

    def _add(
        self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, gain: torch.Tensor | None, rows: int
    ) -> None:  # fmt: skip
        """Adds the product of x and ``weight``, behind a norm if it has a ``gain``, to the hidden states."""
        w, (columns, width) = self.weights, weight.shape
        way, options = self._way(rows, weight)
        options |= {"BIAS": bias is not None, "PARTS": way.parts}
        matrix = _numbers(weight)
        given = matrix if bias is None else bias
        if gain is None:
            residual_kernel[(*grid_of(way, rows, columns), way.parts if way.spread else 1)](
                x, matrix, given, self.hidden, self._partial, self._counters, rows, columns, width, SPREAD=way.spread,
                **options,
            )  # fmt: skip
            return
        output_kernel[grid_of(way, rows, columns)](
            x, matrix, given, self._between, rows, columns, width, 0.0, CAP=False, **options
        )  # fmt: skip
        add_norm_kernel[(rows,)](
            self.hidden, self._between, gain, columns, w.eps, BLOCK=self._block, num_warps=4
        )  # fmt: skip

    def _way(self, rows: int, weight: Matrix, most_columns: int = 128) -> tuple[Tile, dict[str, Any]]:
        """The tile of a product, and what a kernel is told of it."""
        way = self._tile(rows, weight.shape, most_columns, _bits(weight))
        options: dict[str, Any] = {
            "SWAP": way.swap, "TILE": way.rows, "COLUMNS": way.columns, "INPUTS": way.inputs, "num_warps": way.warps,
            "num_stages": way.stages,
        }  # fmt: skip
        return way, options | {"scales": weight.scales} if isinstance(weight, Int8) else options

    def _head(self, rows: int) -> None:
        """Logits and the most probable tokens, of what the last norm gave."""
        w = self.weights
        (way, options), head = self._way(rows, w.head), _numbers(w.head)
        output_kernel[grid_of(way, rows, w.vocab_size)](
            self._normed, head, head if w.head_bias is None else w.head_bias, self.logits, rows, w.vocab_size,
            w.width, w.cap, BIAS=w.head_bias is not None, CAP=w.cap > 0, PARTS=way.parts, **options,
        )  # fmt: skip
        self._find_best(rows)


def _bits(weight: Matrix) -> int:
    return 8 if isinstance(weight, Int8) else 16


def _numbers(weight: Matrix) -> torch.Tensor:
    """What a kernel reads as the weight."""
    return weight.codes if isinstance(weight, Int8) else weight
