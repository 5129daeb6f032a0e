"""Paged KV: rows of KV lie in pages of `CHUNK`, and a text has a list of pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch

from tokentree.engines.gpu.attending import CHUNK
from tokentree.engines.radix import RadixTree, shared_length
from tokentree.errors import InvariantError, ModelError
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
        page_nbytes: memory of one page in all layers, in bytes.
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
        self.page_nbytes = self._nbytes_of_a_page()
        self._references = np.zeros(count, np.int64)
        self._references[NOBODY] = 1
        self._free = deque(range(1, count))
        self._rows = deque(range(texts))

    def _nbytes_of_a_page(self) -> int:
        parts = (self.keys[:, 0], self.values[:, 0], self.states[:, :CHUNK])
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def nbytes(self) -> int:
        """Memory of the pages that texts can have, in bytes."""
        return self.page_nbytes * (len(self._references) - 1)

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def keep_states(self, count: int, width: int) -> None:
        """From now on each row has so many hidden states of so many numbers too."""
        rows = self.states.shape[1]
        self.states = torch.zeros(count, rows, width, dtype=torch.bfloat16, device=self.states.device)
        self.page_nbytes = self._nbytes_of_a_page()

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

    def check(self, texts: Iterable[Text], shared: SharedPages) -> None:
        """Raises `InvariantError` unless every page is free, or has as many references as there are."""
        found = np.zeros_like(self._references)
        found[NOBODY] = 1
        for pages in [*(text.pages for text in texts), *shared.runs()]:
            np.add.at(found, np.array(pages, np.int64), 1)
        if not np.array_equal(found, self._references):
            raise InvariantError("pages of KV are referred to by others than their counts say")
        if sorted(self._free) != np.flatnonzero(found == 0).tolist():
            raise InvariantError("the free pages of KV aren't those that nobody refers to")

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
        self.give(text, [self._free.popleft() for _ in range(wanted)])

    def rewind(self, text: Text, rows: int) -> None:
        """Keeps at most the first ``rows`` rows of ``text``. A page that others refer to is never written to again, so
        if such a page would be, all of it is given back."""
        if rows >= text.length:
            return
        whole = rows // CHUNK
        shared = any(self._references[page] > 1 for page in text.pages[whole:])
        text.length = whole * CHUNK if shared else rows
        kept = -(-text.length // CHUNK)
        self.drop(text.pages[kept:])
        text.pages = text.pages[:kept]

    def give(self, text: Text, pages: list[int]) -> None:
        """Puts ``pages`` behind those of ``text``, which refers to them from now on."""
        self.share(pages)
        first = len(text.pages)
        text.pages = [*text.pages, *pages]
        self.tables[text.row, first : len(text.pages)] = torch.tensor(pages, dtype=torch.int32).to(self.tables.device)


@dataclass(frozen=True)
class PageRun:
    """Whole pages as the rows of a run of tokens, for a radix tree.

    Args:
        pages: in order.
        page_nbytes: memory of one.
    """

    pages: tuple[int, ...]
    page_nbytes: int

    def __len__(self) -> int:
        return len(self.pages) * CHUNK

    @property
    def nbytes(self) -> int:
        return len(self.pages) * self.page_nbytes

    def split(self, at: int) -> tuple[PageRun, PageRun]:
        """See `Run.split`; ``at`` is a multiple of `CHUNK`."""
        first, rest = self.pages[: at // CHUNK], self.pages[at // CHUNK :]
        return PageRun(first, self.page_nbytes), PageRun(rest, self.page_nbytes)


class SharedPages:
    """Whole pages of finished texts, for texts that begin alike: by reference, no row is copied.

    Args:
        pages: all of them.
        max_bytes: of those that are kept; with 0 nothing is kept, nor shared.
    """

    def __init__(self, pages: Pages, max_bytes: int) -> None:
        self._pages, self._max_bytes = pages, max_bytes
        self._tree = RadixTree[PageRun](CHUNK)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return self._tree.nbytes

    def check(self) -> None:
        """See `RadixTree.check`."""
        self._tree.check()

    def runs(self) -> list[tuple[int, ...]]:
        """The pages that are kept, run by run."""
        return [node.rows.pages for node in self._tree.nodes()]

    def clear(self) -> None:
        """Forgets all that is kept."""
        self.evict(self._tree.nbytes)

    def keep(self, tokens: Ints, text: Text) -> None:
        """Keeps the whole pages of the committed rows of ``text``, which belong to ``tokens``."""
        if self._max_bytes:
            self._tree.insert(tokens, lambda start, end: self._taken(text.pages[start // CHUNK : end // CHUNK]))
            self.evict(self._tree.nbytes - self._max_bytes)

    def fill(self, text: Text, tokens: Ints, live: Iterable[tuple[Ints, Text]]) -> int:
        """Gives the empty ``text`` the whole pages of the longest beginning of ``tokens`` that is known, from what is
        kept or from a ``live`` text; returns how many rows that are."""
        if not self._max_bytes:
            return 0
        path = self._tree.match(tokens)
        pages = [page for node, length in path for page in node.rows.pages[: length // CHUNK]]
        if path:
            self._tree.lock(path[-1][0])  # a use of it
            self._tree.unlock(path[-1][0])
        for known, other in live:
            whole = shared_length(known, tokens) // CHUNK
            if whole > len(pages):
                pages = other.pages[:whole]
        self._pages.give(text, pages)
        text.length = len(pages) * CHUNK
        return text.length

    def evict(self, nbytes: int) -> None:
        """Forgets so many bytes, or all there are: what was used longest ago."""
        if nbytes > 0:
            for run in self._tree.evict(nbytes):
                self._pages.drop(run.pages)

    def _taken(self, pages: list[int]) -> PageRun:
        self._pages.share(pages)
        return PageRun(tuple(pages), self._pages.page_nbytes)


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
        first = next((i for i, node in enumerate(nodes) if i != node), len(nodes))
        if first < len(nodes):
            kept = self.length + np.array(nodes[first:], np.int64)
            places = self.length + np.arange(first, len(nodes))
            self.moves = np.concatenate([self.moves, np.stack([self.slots(kept), self.slots(places)], 1)])
        self.length += committed
