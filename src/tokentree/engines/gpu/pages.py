"""Paged KV: rows of KV lie in pages of `CHUNK`, and a text has a list of pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch

from tokentree.engines.gpu.attending import CHUNK
from tokentree.errors import ModelError
from tokentree.tree import Ints

NOBODY = 0  # the page that rows go to which nobody reads


class Pages:
    """The KV of all texts, with reference counts: texts that begin alike share pages.

    Args:
        layers, kv_heads, head_size: of the model.
        count: pages.
        texts: most texts at a time.
        table_width: most pages of a text.

    Attributes:
        keys, values: [layers, pages, KV heads, CHUNK, head size].
        states: [hidden states kept, pages x CHUNK, hidden size].
        tables: int32[texts, table_width], the pages of each text.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_size: int, count: int, texts: int, table_width: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        shape = layers, count, kv_heads, CHUNK, head_size
        self.keys = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.values = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.states = torch.zeros(0, count * CHUNK, 0, dtype=torch.bfloat16, device=device)
        self.tables = torch.zeros(texts, table_width, dtype=torch.int32, device=device)
        self._references = np.zeros(count, np.int64)
        self._references[NOBODY] = 1
        self._free = deque(range(1, count))
        self._rows = deque(range(texts))

    @property
    def page_nbytes(self) -> int:
        """Memory of one page in all layers, in bytes."""
        parts = (self.keys[:, 0], self.values[:, 0], self.states[:, :CHUNK])
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def keep_states(self, count: int, width: int) -> None:
        """From now on each row has so many hidden states of so many numbers too."""
        rows = self.states.shape[1]
        self.states = torch.zeros(count, rows, width, dtype=torch.bfloat16, device=self.states.device)

    def open(self) -> Text:
        """A text without pages.

        Raises:
            ModelError: if there are too many.
        """
        if not self._rows:
            raise ModelError(f"more than {len(self.tables)} texts at a time: use a smaller max_batch")
        return Text(self._rows.popleft())

    def close(self, text: Text) -> None:
        """Gives back what ``text`` has."""
        self.drop(text.pages)
        self._rows.append(text.row)

    def share(self, pages: SequenceOf[int]) -> None:
        """One more refers to ``pages``."""
        for page in pages:
            self._references[page] += 1

    def drop(self, pages: SequenceOf[int]) -> None:
        """One fewer refers to ``pages``; those that nobody refers to are free."""
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def references(self, page: int) -> int:
        """How many refer to it."""
        return int(self._references[page])

    def reserve(self, text: Text, rows: int) -> None:
        """Makes room for so many rows of ``text``.

        Raises:
            ModelError: if there is none; then nothing has changed.
        """
        wanted = -(-rows // CHUNK) - len(text.pages)
        if wanted <= 0:
            return
        if wanted > len(self._free):
            raise ModelError(f"no memory is left for the KV of {rows} rows: {len(self._free)} pages are free")
        self.give(text, [self._free.popleft() for _ in range(wanted)], fresh=True)

    def give(self, text: Text, pages: list[int], fresh: bool = False) -> None:
        """Puts ``pages`` behind those of ``text``, which shares them unless they are ``fresh``."""
        self.share(pages)
        first = len(text.pages)
        text.pages += pages
        assert fresh or not text.length % CHUNK
        self.tables[text.row, first : len(text.pages)] = torch.tensor(pages, dtype=torch.int32).to(self.tables.device)


@dataclass(eq=False)
class Text:
    """The KV of one text.

    Args:
        row: in the tables of pages.
        pages: its pages, in order.
        length: committed rows.
        moves: int64[n, 2]: rows that are to be moved before anybody reads them, each with its new place.
    """

    row: int
    pages: list[int] = field(default_factory=list)
    length: int = 0
    moves: Ints = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def slots(self, rows: Ints) -> Ints:
        """Where ``rows`` lie in all pages."""
        pages = np.array(self.pages, np.int64)
        found: Ints = pages[rows // CHUNK] * CHUNK + rows % CHUNK
        return found

    def keep(self, nodes: SequenceOf[int], committed: int) -> None:
        """Keeps the provisional rows ``nodes``, ascending, and drops the others; the first so many are committed."""
        kept = self.length + np.array(nodes, np.int64)
        places = self.length + np.arange(len(nodes))
        moved = kept != places
        self.moves = np.concatenate([self.moves, np.stack([self.slots(kept[moved]), self.slots(places[moved])], 1)])
        self.length += committed
