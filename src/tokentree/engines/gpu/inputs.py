"""What one forward is told of its rows: one array of whole numbers, copied to the device at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tokentree.engines.gpu.attending import CHUNK, FAR, FIELDS, TILE
from tokentree.engines.gpu.pages import NOBODY, Text
from tokentree.engines.gpu.tiles import MANY
from tokentree.jit import njit
from tokentree.tree import Ints, TokenTree

MOVES = 256  # rows of KV that are moved before a forward
MOST_ITEMS = 1024  # of attention in a forward; with more, one program has all chunks of a tile

Ints32 = np.ndarray


@dataclass(frozen=True, eq=False)
class Piece:
    """The rows of one text in a forward.

    Args:
        text: whose.
        tree: all nodes; node j goes to row ``text.length + j``.
        first: the first node to compute.
        read: its rows are committed as soon as they are there, such as those of a prompt.
    """

    text: Text
    tree: TokenTree
    first: int = 0
    read: bool = False

    @property
    def count(self) -> int:
        return len(self.tree) - self.first


class Memory(NamedTuple):
    """The same int32 numbers in the host's memory and on a device."""

    host: torch.Tensor
    device: torch.Tensor

    @classmethod
    def make(cls, size: int, device: torch.device) -> Memory:
        """So many zeros."""
        host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        return cls(host, host.to(device, copy=True))

    def copy(self, size: int | None = None) -> None:
        """Copies the first so many, or all, to the device."""
        self.device[:size].copy_(self.host[:size], non_blocking=True)


def _sizes(rows: int, most_items: int | None) -> dict[str, int]:
    """How many numbers each of `Inputs`' attributes has."""
    if most_items is None:
        most_items = MOST_ITEMS if rows <= MANY else 0
    return {
        "ids": rows, "positions": rows, "slots": rows, "firsts": rows, "tiles": 3 * rows, "num_tiles": 1,
        "num_items": 1, "num_moves": 1, "moves": 2 * MOVES, "items": most_items * FIELDS,
        "tails": rows * max(64, rows),
    }  # fmt: skip


class Inputs:
    """The numbers of a forward over at most ``rows`` rows.

    Attributes:
        ids, positions, slots: int32[rows].
        firsts: int32[rows]: positions from here on lie where ``tails`` says; `FAR` if none does.
        tails: int32[rows, depth]: logical places of the positions from ``firsts`` on.
        tiles, items: see `attending`.
        num_tiles, num_items, num_moves: int32[1].
        moves: int32[2, MOVES]: slots of rows that are moved first, and where they go.
    """

    def __init__(
        self, rows: int, device: torch.device, most_items: int | None = None, memory: Memory | None = None
    ) -> None:  # fmt: skip
        self.rows, self.depth = rows, max(64, rows)
        sizes = _sizes(rows, most_items)
        host, there = Memory.make(sum(sizes.values()), device) if memory is None else memory
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, torch.Tensor] = {}
        start, numbers = 0, host.numpy()
        for name, size in sizes.items():
            self.host[name], self.device[name] = numbers[start : start + size], there[start : start + size]
            start += size
        self._memory = Memory(host, there)
        self._before_items = start - sizes["tails"] - sizes["items"]

    @staticmethod
    def several(count: int, rows: int, device: torch.device, most_items: int) -> tuple[list[Inputs], Memory]:
        """So many, behind one another in memory that is copied at once."""
        size = sum(_sizes(rows, most_items).values())
        whole = Memory.make(count * size, device)
        parts = [slice(size * i, size * (i + 1)) for i in range(count)]
        return [Inputs(rows, device, most_items, Memory(*(x[part] for x in whole))) for part in parts], whole

    def fill(self, pieces: SequenceOf[Piece], moves: Ints, group: int) -> bool:
        """Describes ``pieces``, whose rows lie behind one another, and copies it to the device; returns whether there
        are items for all of them.

        Args:
            moves: int64[n, 2], slots.
            group: heads of queries that share one of keys.
        """
        host, row, tile, branches = self.host, 0, 0, False
        counts = np.zeros(3, np.int64)  # items, chunks, and whether there were too many of either
        for piece in pieces:
            tree = piece.tree
            row, tile, branched = _describe(
                host["ids"], host["positions"], host["slots"], host["firsts"], host["tails"], self.depth, host["tiles"],
                host["items"], counts, row, tile, tree.tokens, tree.parents, tree.depths, piece.first,
                piece.text.length, piece.text.row, np.array(piece.text.pages, np.int64), TILE // group,
            )  # fmt: skip
            branches = branches or branched
        host["ids"][row:], host["positions"][row:], host["firsts"][row:] = 0, 0, FAR
        host["slots"][row:] = NOBODY * CHUNK
        host["num_tiles"][0], host["num_items"][0], host["num_moves"][0] = tile, counts[0], len(moves)
        host["moves"][: len(moves)], host["moves"][MOVES : MOVES + len(moves)] = moves[:, 0], moves[:, 1]
        self._memory.copy(None if branches else self._before_items + int(counts[0]) * FIELDS)
        return not counts[2]

    def fill_level(self, texts: SequenceOf[tuple[Text, int]], level: int, width: int, group: int) -> bool:
        """Describes the rows of a draft's level, without copying: ``width`` for each text, whose tokens and ancestors
        are found on the device. Node ``n`` of a text that has so many rows by then lies that far behind them:
        ``level * width + n``.

        Returns:
            whether there are items for all of them.
        """
        counts, host = np.zeros(3, np.int64), self.host
        for number, (text, length) in enumerate(texts):
            _describe_level(
                host["positions"], host["slots"], host["firsts"], host["tiles"], host["items"], counts, number, level,
                width, length, text.row, np.array(text.pages, np.int64), TILE // group,
            )  # fmt: skip
        host["num_items"][0], host["num_tiles"][0] = counts[0], len(texts) * -(-width // (TILE // group))
        host["slots"][len(texts) * width :] = NOBODY * CHUNK
        return not counts[2]


@njit(cache=True)
def _describe(
    ids: Ints32, positions: Ints32, slots: Ints32, firsts: Ints32, tails: Ints32, depth: int, tiles: Ints32,
    items: Ints32, counts: Ints, row: int, tile: int, tokens: Ints, parents: Ints, depths: Ints, first: int,
    length: int, text: int, pages: Ints, tile_height: int,
) -> tuple[int, int, bool]:  # fmt: skip
    """One piece, from ``row`` and ``tile`` on; returns what comes behind it, and whether a row has a tail."""
    branched, start = False, row
    away = np.full(len(tokens), FAR, np.int64)  # the depth from which on a node's path isn't at its own places
    for node in range(len(tokens)):
        if parents[node] >= 0 and away[parents[node]] < FAR:
            away[node] = away[parents[node]]
        elif node != depths[node]:
            away[node] = depths[node]
        if node < first:
            continue
        place = length + node
        ids[row], positions[row] = tokens[node], length + depths[node]
        slots[row] = pages[place // CHUNK] * CHUNK + place % CHUNK
        firsts[row] = FAR
        if away[node] < FAR:
            firsts[row], branched, ancestor = length + away[node], True, node
            while ancestor >= 0 and depths[ancestor] >= away[node]:
                tails[row * depth + depths[ancestor] - away[node]] = length + ancestor
                ancestor = parents[ancestor]
        row += 1
    for begin in range(start, row, tile_height):
        count = min(tile_height, row - begin)
        tiles[3 * tile], tiles[3 * tile + 1], tiles[3 * tile + 2] = begin, count, text
        _itemize(items, counts, tile, begin, count, text, positions, firsts, pages)
        tile += 1
    return row, tile, branched


@njit(cache=True)
def _describe_level(
    positions: Ints32, slots: Ints32, firsts: Ints32, tiles: Ints32, items: Ints32, counts: Ints, number: int,
    level: int, width: int, length: int, text: int, pages: Ints, tile_height: int,
) -> None:  # fmt: skip
    start = number * width
    for node in range(width):
        place = length + level * width + node
        positions[start + node], firsts[start + node] = length + level, length
        slots[start + node] = pages[place // CHUNK] * CHUNK + place % CHUNK
    tile = number * (-(-width // tile_height))
    for begin in range(start, start + width, tile_height):
        count = min(tile_height, start + width - begin)
        tiles[3 * tile], tiles[3 * tile + 1], tiles[3 * tile + 2] = begin, count, text
        _itemize(items, counts, tile, begin, count, text, positions, firsts, pages)
        tile += 1


@njit(cache=True)
def _itemize(
    items: Ints32, counts: Ints, tile: int, begin: int, count: int, text: int, positions: Ints32, firsts: Ints32,
    pages: Ints,
) -> None:  # fmt: skip
    """The items of one tile: one for each chunk that all its rows see alike, and one for each row in other chunks."""
    chunks = positions[begin : begin + count].max() // CHUNK + 1
    shared = min(chunks, firsts[begin : begin + count].min() // CHUNK)
    there = shared + (chunks - shared) * count
    most = len(items) // FIELDS
    if counts[0] + there > most or counts[1] + chunks > most:
        counts[2] = 1
        return
    number = counts[0]
    for chunk in range(chunks):
        for only in range(-1, 0) if chunk < shared else range(count):
            at = number * FIELDS
            items[at], items[at + 1], items[at + 2], items[at + 3] = begin, count, only, chunk
            items[at + 4], items[at + 5], items[at + 6], items[at + 7] = counts[1], chunks, there, tile
            items[at + 8], items[at + 9] = text, pages[chunk]
            number += 1
    counts[0], counts[1] = number, counts[1] + chunks
