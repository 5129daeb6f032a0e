"""A forward over rows of any texts and trees: seven kernels a layer."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tokentree.engines.gpu.attending import CHUNK, FIELDS, TILE, attention_kernel, long_attention_kernel
from tokentree.engines.gpu.inputs import MOST_ITEMS, MOVES, Inputs
from tokentree.engines.gpu.pages import Pages
from tokentree.engines.gpu.products import gated_kernel, output_kernel, residual_kernel, rotary_kernel
from tokentree.engines.gpu.quantized import Int8, Matrix
from tokentree.engines.gpu.rows import (
    BEST,
    BLOCK,
    add_norm_kernel,
    best_kernel,
    best_of_block_kernel,
    block_sums_kernel,
    embed_kernel,
    heads_kernel,
    move_kernel,
    move_states_kernel,
    norm_kernel,
    store_kernel,
)
from tokentree.engines.gpu.tiles import FEW, MANY, SHARED, Tile, parts_of, tile
from tokentree.engines.gpu.weights import Layer, Weights


class Forward:
    """The kernels of a model's forward, in order.

    Args:
        weights: of the model.
        pages: where KV goes.
        most_rows: of one forward.
        places: hidden states that are kept, by the layer that reads them; the last one, behind all layers, comes behind
            the last norm.

    Attributes:
        hidden: bfloat16[most_rows, hidden size], what the layers gave.
        logits: bfloat16[most_rows, vocab].
        best: int32[most_rows, 2 x BEST + 1]: the most probable tokens, their logits as float32, and the logarithm of
            the sum of all exponentials.
    """

    def __init__(self, weights: Weights, pages: Pages, most_rows: int, places: SequenceOf[int] = ()) -> None:
        device, w = weights.embedding.device, weights
        self.weights, self.pages, self.places = weights, pages, list(places)
        self._cuda = device.type == "cuda"
        properties: Any = torch.cuda.get_device_properties(device) if self._cuda else None
        self._shared = properties.shared_memory_per_block_optin if self._cuda else SHARED
        self._processors = properties.multi_processor_count if self._cuda else 2

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        width, columns = w.width, (w.heads + 2 * w.kv_heads) * w.head_size
        inner = max(len(layer.gate_up) for layer in w.layers) // 2
        self.hidden, self._q = empty(most_rows, width), empty(most_rows, w.heads, w.head_size)
        self._normed, self._block = empty(most_rows, width), triton.next_power_of_2(width)
        self._attended = empty(most_rows, w.heads * w.head_size).zero_()  # rows that are padding are never written
        self._gated = empty(most_rows, inner)
        normed = any(layer.attention_end_gain is not None for layer in w.layers)
        self._between = empty(most_rows if normed else 0, width)
        self._raw = empty(most_rows if any(layer.q_gain is not None for layer in w.layers) else 0, columns)
        added = [part for layer in w.layers for part in (layer.o, layer.down)]
        parts = max(parts_of(len(part), part.shape[1], _bits(part)) for part in added)
        self._partial = empty(parts if parts > 1 else 0, MANY, width, dtype=torch.float32)
        self._counters = torch.zeros(4096, dtype=torch.int32, device=device)
        sums = MOST_ITEMS * w.kv_heads * TILE
        self._sums = torch.zeros(sums, w.head_size, device=device)  # what no row has is joined too, and dropped
        self._bests, self._totals = torch.zeros(sums, device=device), torch.zeros(sums, device=device)
        self._blocks = -(-w.vocab_size // BLOCK)
        self.logits = empty(most_rows, w.vocab_size)
        self.best = empty(most_rows, 2 * BEST + 1, dtype=torch.int32)
        self._found = empty(most_rows, BEST, BEST, dtype=torch.int64)
        self._block_sums = empty(most_rows, self._blocks, 2, dtype=torch.float32)

    def run(self, inputs: Inputs, rows: int, head_rows: int, long: bool) -> None:
        """Launches all kernels over the first ``rows`` rows of ``inputs``, padding included.

        Args:
            head_rows: of the first of these, logits and the most probable tokens.
            long: whether a program of attention has all chunks of its tile.
        """
        w, x, block = self.weights, inputs.device, self._block
        self.move(inputs)
        embed_kernel[(rows,)](
            x["ids"], w.embedding, self.hidden, w.width, w.embedding_scale, BLOCK=block, num_warps=4
        )  # fmt: skip
        for number, layer in enumerate(w.layers):
            self._store(number, self.hidden, x, rows)
            self._norm(layer.attention_gain, rows)
            self._heads(layer, number, x, rows, self._normed)
            self._attend(layer, number, inputs, rows, long)
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

    def move(self, inputs: Inputs) -> None:
        """Moves the rows of KV and hidden states that ``inputs`` name."""
        w, pages, x = self.weights, self.pages, inputs.device
        move_kernel[(len(w.layers), w.kv_heads)](
            pages.keys, pages.values, x["moves"], x["num_moves"], pages.keys.stride(0), w.kv_heads,
            HEAD=w.head_size, CHUNK=CHUNK, MOVES=MOVES, num_warps=4,
        )  # fmt: skip
        if self.places:
            move_states_kernel[(len(self.places),)](
                pages.states, x["moves"], x["num_moves"], pages.states.stride(0), w.width,
                BLOCK=self._block, MOVES=MOVES, num_warps=4,
            )  # fmt: skip

    # -- the parts of it -------------------------------------------------------------------------------------------

    def _store(self, place: int, source: torch.Tensor, x: dict[str, torch.Tensor], rows: int) -> None:
        """Keeps the hidden state ``place`` beside the KV, if somebody wants it."""
        if place in self.places:
            states = self.pages.states[self.places.index(place)]
            store_kernel[(rows,)](source, states, x["slots"], self.weights.width, BLOCK=self._block, num_warps=4)

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
            rotary_kernel[_grid(way, rows, columns)](
                source, given, bias, *to, rows, width, w.heads, w.kv_heads,
                BIAS=layer.qkv_bias is not None, HEAD=w.head_size, CHUNK=CHUNK, **options,
            )  # fmt: skip
            return
        output_kernel[_grid(way, rows, columns)](
            source, given, bias, self._raw, rows, columns, width, 0.0,
            BIAS=layer.qkv_bias is not None, CAP=False, PARTS=way.parts, **options,
        )  # fmt: skip
        heads_kernel[(rows, w.heads + 2 * w.kv_heads)](
            self._raw, layer.q_gain, layer.k_gain, *to, w.heads, w.kv_heads, w.eps,
            HEAD=w.head_size, CHUNK=CHUNK, num_warps=1,
        )  # fmt: skip

    def _attend(self, layer: Layer, number: int, inputs: Inputs, rows: int, long: bool) -> None:
        w, x, pages = self.weights, inputs.device, self.pages
        given = (
            self._q, pages.keys[number], pages.values[number], pages.tables, x["tails"], x["firsts"], x["positions"]
        )  # fmt: skip
        sizes = w.heads, w.kv_heads, pages.tables.shape[1], layer.scale, layer.cap
        options: dict[str, Any] = {
            "DEPTH": inputs.depth, "GROUP": w.group, "HEAD": w.head_size, "CHUNK": CHUNK, "WINDOW": layer.window,
            "CAP": layer.cap > 0, "num_warps": 4 if w.head_size < 128 else 8, "num_stages": 1,
        }  # fmt: skip
        if long:
            long_attention_kernel[(rows, w.kv_heads)](
                *given, x["tiles"], x["num_tiles"], self._attended, *sizes, **options
            )
            return
        programs = max(1, (2 if rows <= FEW else 4) * self._processors // w.kv_heads)
        attention_kernel[(programs, w.kv_heads)](
            *given, x["items"], x["num_items"], self._sums, self._bests, self._totals, self._counters, self._attended,
            *sizes, FIELDS=FIELDS, **options,
        )  # fmt: skip

    def _gate(self, layer: Layer, rows: int) -> None:
        """What the MLP's last product reads."""
        w, columns = self.weights, len(layer.gate_up)
        way, options = self._way(rows, layer.gate_up)
        gated_kernel[_grid(way, rows, columns)](
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
            residual_kernel[(*_grid(way, rows, columns), way.parts if way.spread else 1)](
                x, matrix, given, self.hidden, self._partial, self._counters, rows, columns, width, SPREAD=way.spread,
                **options,
            )  # fmt: skip
            return
        output_kernel[_grid(way, rows, columns)](
            x, matrix, given, self._between, rows, columns, width, 0.0, CAP=False, **options
        )  # fmt: skip
        add_norm_kernel[(rows,)](
            self.hidden, self._between, gain, columns, w.eps, BLOCK=self._block, num_warps=4
        )  # fmt: skip

    def _way(self, rows: int, weight: Matrix, most_columns: int = 128) -> tuple[Tile, dict[str, Any]]:
        """The tile of a product, and what a kernel is told of it."""
        way = tile(rows, len(weight), weight.shape[1], most_columns, self._shared, _bits(weight))
        options: dict[str, Any] = {
            "SWAP": way.swap, "TILE": way.rows, "COLUMNS": way.columns, "INPUTS": way.inputs, "num_warps": way.warps,
            "num_stages": way.stages,
        }  # fmt: skip
        return way, options | {"scales": weight.scales} if isinstance(weight, Int8) else options

    def _head(self, rows: int) -> None:
        """Logits and the most probable tokens, of what the last norm gave."""
        w, blocks = self.weights, self._blocks
        (way, options), head = self._way(rows, w.head), _numbers(w.head)
        output_kernel[_grid(way, rows, w.vocab_size)](
            self._normed, head, head if w.head_bias is None else w.head_bias, self.logits, rows, w.vocab_size,
            w.width, w.cap, BIAS=w.head_bias is not None, CAP=w.cap > 0, PARTS=way.parts, **options,
        )  # fmt: skip
        sizes: dict[str, Any] = {"BLOCKS": triton.next_power_of_2(blocks), "BEST": BEST, "num_warps": 4}
        block_sums_kernel[(rows, blocks)](
            self.logits, self._block_sums, w.vocab_size, blocks, BLOCK=BLOCK, num_warps=4
        )  # fmt: skip
        best_of_block_kernel[(rows, BEST)](
            self.logits, self._block_sums, self._found, w.vocab_size, blocks, BLOCK=BLOCK, **sizes
        )  # fmt: skip
        best_kernel[(rows,)](self.logits, self._found, self._block_sums, self.best, w.vocab_size, blocks, **sizes)


def _grid(way: Tile, rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, way.rows), triton.cdiv(columns, way.columns)


def _bits(weight: Matrix) -> int:
    return 8 if isinstance(weight, Int8) else 16


def _numbers(weight: Matrix) -> torch.Tensor:
    """What a kernel reads as the weight."""
    return weight.codes if isinstance(weight, Int8) else weight


@dataclass(frozen=True)
class Size:
    """What a recording is made for: everything else is in its inputs."""

    rows: int
    head_rows: int
    long: bool
