"""What forwards on paged KV share: moving rows, attention, and the most probable tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tokentree.engines.gpu.attending import CHUNK, FIELDS, TILE, attention_kernel, long_attention_kernel
from tokentree.engines.gpu.inputs import MOST_ITEMS, MOVES, Inputs
from tokentree.engines.gpu.pages import Pages
from tokentree.engines.gpu.rows import (
    BEST,
    BLOCK,
    best_kernel,
    best_of_block_kernel,
    block_sums_kernel,
    move_kernel,
    move_states_kernel,
    store_kernel,
)
from tokentree.engines.gpu.tiles import FEW, SHARED, Tile, tile


@dataclass(frozen=True)
class Sizes:
    """What paged KV and attention depend on.

    Args:
        layers: of the model.
        heads, kv_heads, head_size: of attention, in every layer.
        width: of a hidden state.
        vocab_size: of the logits.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    width: int
    vocab_size: int

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Size:
    """What a recording is made for: everything else is in its inputs."""

    rows: int
    head_rows: int
    long: bool


@dataclass(frozen=True, eq=False)
class Rules:
    """How a layer attends.

    Args:
        scale: what scores are multiplied by.
        window: positions that a row sees; 0 for all.
        cap: what scores are capped with, or 0.
        sinks: float32[heads], a score of each head that counts among the weights and has no value, or None.
    """

    scale: float
    window: int = 0
    cap: float = 0.0
    sinks: torch.Tensor | None = None


class KVForward(ABC):
    """A forward over rows of any texts and trees.

    Args:
        sizes: of the model.
        pages: where KV goes.
        most_rows: of one forward.
        places: hidden states that are kept, by the layer that reads them; the last one, behind all layers, comes behind
            the last norm.

    Attributes:
        logits: bfloat16[most_rows, vocab].
        best: int32[most_rows, 2 x BEST + 1]: the most probable tokens, their logits as float32, and the logarithm of
            the sum of all exponentials.
    """

    def __init__(self, sizes: Sizes, pages: Pages, most_rows: int, places: SequenceOf[int] = ()) -> None:
        self.device = device = pages.keys.device
        self.sizes, self.pages, self.places = sizes, pages, list(places)
        cuda = device.type == "cuda"
        properties: Any = torch.cuda.get_device_properties(device) if cuda else None
        self._shared = properties.shared_memory_per_block_optin if cuda else SHARED
        self._processors = properties.multi_processor_count if cuda else 2

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._q = empty(most_rows, sizes.heads, sizes.head_size)
        self._attended = empty(most_rows, sizes.heads * sizes.head_size).zero_()  # rows of padding are never written
        sums = MOST_ITEMS * sizes.kv_heads * TILE
        self._sums = torch.zeros(sums, sizes.head_size, device=device)  # what no row has is joined too, and dropped
        self._bests, self._totals = torch.zeros(sums, device=device), torch.zeros(sums, device=device)
        self._counters = torch.zeros(4096, dtype=torch.int32, device=device)
        self._blocks = -(-sizes.vocab_size // BLOCK)
        self.logits = empty(most_rows, sizes.vocab_size)
        self.best = empty(most_rows, 2 * BEST + 1, dtype=torch.int32)
        self._found = empty(most_rows, BEST, BEST, dtype=torch.int64)
        self._block_sums = empty(most_rows, self._blocks, 2, dtype=torch.float32)

    @abstractmethod
    def run(self, inputs: Inputs, rows: int, head_rows: int, long: bool) -> None:
        """Launches all kernels over the first ``rows`` rows of ``inputs``, padding included.

        Args:
            head_rows: of the first of these, logits and the most probable tokens.
            long: whether a program of attention has all chunks of its tile.
        """

    def move(self, inputs: Inputs) -> None:
        """Moves the rows of KV and hidden states that ``inputs`` name."""
        pages, x = self.pages, inputs.device
        move_kernel[(self.sizes.layers, self.sizes.kv_heads)](
            pages.keys, pages.values, x["moves"], x["num_moves"], pages.keys.stride(0), self.sizes.kv_heads,
            HEAD=self.sizes.head_size, CHUNK=CHUNK, MOVES=MOVES, num_warps=4,
        )  # fmt: skip
        if self.places:
            move_states_kernel[(len(self.places),)](
                pages.states, x["moves"], x["num_moves"], pages.states.stride(0), self.sizes.width,
                BLOCK=triton.next_power_of_2(self.sizes.width), MOVES=MOVES, num_warps=4,
            )  # fmt: skip

    def _store(self, place: int, source: torch.Tensor, x: dict[str, torch.Tensor], rows: int) -> None:
        """Keeps the hidden state ``place`` beside the KV, if somebody wants it."""
        if place in self.places:
            states, width = self.pages.states[self.places.index(place)], self.sizes.width
            store_kernel[(rows,)](
                source, states, x["slots"], width, BLOCK=triton.next_power_of_2(width), num_warps=4
            )  # fmt: skip

    def _attend(self, rules: Rules, number: int, inputs: Inputs, rows: int, long: bool) -> None:
        """What layer ``number`` attends to."""
        w, x, pages = self.sizes, inputs.device, self.pages
        given = (
            self._q, pages.keys[number], pages.values[number], pages.tables, x["tails"], x["firsts"], x["positions"]
        )  # fmt: skip
        sinks = self._bests if rules.sinks is None else rules.sinks
        sizes = sinks, w.heads, w.kv_heads, pages.tables.shape[1], rules.scale, rules.cap
        options: dict[str, Any] = {
            "DEPTH": inputs.depth, "GROUP": w.group, "HEAD": w.head_size, "CHUNK": CHUNK, "WINDOW": rules.window,
            "CAP": rules.cap > 0, "SINKS": rules.sinks is not None, "num_warps": 4 if w.head_size < 128 else 8,
            "num_stages": 1,
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

    def _find_best(self, rows: int) -> None:
        """The most probable tokens of the first ``rows`` rows of logits."""
        vocab_size, blocks = self.sizes.vocab_size, self._blocks
        options: dict[str, Any] = {"BLOCKS": triton.next_power_of_2(blocks), "BEST": BEST, "num_warps": 4}
        block_sums_kernel[(rows, blocks)](
            self.logits, self._block_sums, vocab_size, blocks, BLOCK=BLOCK, num_warps=4
        )  # fmt: skip
        best_of_block_kernel[(rows, BEST)](
            self.logits, self._block_sums, self._found, vocab_size, blocks, BLOCK=BLOCK, **options
        )  # fmt: skip
        best_kernel[(rows,)](self.logits, self._found, self._block_sums, self.best, vocab_size, blocks, **options)

    def _tile(self, rows: int, shape: torch.Size, most_columns: int = 128, bits: int = 16) -> Tile:
        """Of the product of so many rows with a weight of that shape."""
        columns, width = shape
        return tile(rows, columns, width, most_columns, self._shared, bits)


def grid_of(way: Tile, rows: int, columns: int) -> tuple[int, int]:
    """The programs of a product."""
    return triton.cdiv(rows, way.rows), triton.cdiv(columns, way.columns)
