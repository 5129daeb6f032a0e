"""Suffix matching: what followed the longest end of the text that was seen before."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.lookup.automaton import SuffixAutomaton, warm_up
from tokentree.drafters.lookup.base import Lookup
from tokentree.drafters.lookup.storage import read_arrays, write_arrays
from tokentree.errors import OptionError
from tokentree.sequence import Sequence

END = -1
REMATCHED = 64  # tokens that are matched again when the store was rebuilt
LEAST_PROB = 0.01
PART = 4096  # tokens that are merged between two steps, about
TOKEN_NBYTES = 280  # of a token in the store, at most: two states and three edges, in arrays that double

Int32s = NDArray[np.int32]


class Suffix(Lookup):
    """Grows the most probable continuations of the longest match (SuffixDecoding, Oliaro et al. 2024,
    arXiv:2411.04975), in the request itself with its references, or in what earlier requests have answered, whichever
    expects more tokens.

    Args:
        vocab_size: the target's; a store that holds other tokens is another model's.
        max_store: tokens of finished outputs that are remembered; when there are more, the older half is forgotten.

    Raises:
        OptionError: if ``max_store`` is negative.
    """

    name = "suffix"

    def __init__(self, vocab_size: int | None = None, max_store: int = 5_000_000) -> None:
        if max_store < 0:
            raise OptionError("suffix needs max_store of at least 0 tokens")
        self._vocab_size, self._max_store = vocab_size, max_store
        self._store = _Store()
        self._requests: dict[int, _Request] = {}
        self._seen: dict[Path, frozenset[bytes]] = {}  # of each folder that was merged: digests of its texts then
        warm_up()

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        if parts.lookup_bytes is None:
            return cls(parts.engine.vocab_size)
        return cls(parts.engine.vocab_size, parts.lookup_bytes // TOKEN_NBYTES)

    @property
    def nbytes(self) -> int:
        return self._store.automaton.nbytes + 4 * len(self._store.tokens)

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        for seq in seqs:
            self._request(seq).follow(seq.tokens[:upto], self._store)

    def look_up(self, seq: Sequence, draft: Draft, source: int, nodes: int, depth: int) -> None:
        self._request(seq).add_to(draft, source, seq.tokens, self._store, nodes, depth)

    def release(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            if self._requests.pop(seq.id, None) is not None and self._max_store:
                self._store = self._store.with_text(seq.output_ids, self._max_store)

    def save(self, folder: Path) -> None:
        write_arrays(folder / "suffix.safetensors", {"tokens": np.array(self._store.tokens, np.int32)})

    def load(self, folder: Path) -> None:
        self._learn(self._read(folder))

    def merging(self, folder: Path) -> Iterator[Callable[[], None]]:
        """Texts that aren't in the store, but for those of the last time: what is full has forgotten them."""
        texts, seen = self._read(folder), self._seen.get(folder, frozenset())
        own = {_digest(text) for text in _texts(np.array(self._store.tokens[:], np.int32))}
        self._seen[folder] = frozenset(map(_digest, texts))
        new = [text for text in texts if _digest(text) not in own and _digest(text) not in seen]
        sizes = np.cumsum([len(text) for text in new])
        for part in range(sizes[-1] // PART + 1 if new else 0):
            first, last = np.searchsorted(sizes, [part * PART, (part + 1) * PART])
            yield partial(self._learn, new[first:last])

    def _learn(self, texts: SequenceOf[Int32s]) -> None:
        for text in texts:
            self._store = self._store.with_text(text.tolist(), self._max_store)

    def _read(self, folder: Path) -> list[Int32s]:
        """The texts that `save` wrote, checked; none if it wrote nothing."""
        arrays = read_arrays(folder / "suffix.safetensors", {"tokens": np.dtype(np.int32)})
        if arrays is None:
            return []
        tokens, file = np.asarray(arrays["tokens"], np.int32), str(folder / "suffix.safetensors")
        if tokens.ndim != 1 or (tokens.size and tokens.min() < END):
            raise OptionError(f"{file!r} holds no texts: it is damaged, or was not written by this drafter")
        if self._vocab_size is not None and tokens.size and tokens.max() >= self._vocab_size:
            raise OptionError(
                f"{file!r} was written with another model: it holds token {tokens.max()}, and this one's "
                f"vocabulary has {self._vocab_size}"
            )
        return _texts(tokens)

    def _request(self, seq: Sequence) -> _Request:
        """What is known of ``seq``."""
        request = self._requests.get(seq.id)
        if request is None:
            request = self._requests[seq.id] = _Request(seq)
        return request


def _texts(tokens: Int32s) -> list[Int32s]:
    """The texts of a store, without what closes them."""
    parts = np.split(tokens, np.flatnonzero(tokens == END) + 1)
    return [part[part != END] for part in parts if (part != END).any()]


def _digest(text: Int32s) -> bytes:
    return hashlib.blake2b(text.tobytes(), digest_size=8).digest()


class _Request:
    """An automaton over one request, and where the request stands in the store."""

    def __init__(self, seq: Sequence) -> None:
        self.automaton = SuffixAutomaton(len(seq.tokens) + sum(map(len, seq.references)) + 64)
        for reference in seq.references:
            self.automaton.extend(reference)
            self.automaton.start_text()
        self.known = 0
        self.place = np.zeros(2, np.int64)  # a state of the store, and how many tokens match there
        self.store: _Store | None = None

    def follow(self, tokens: list[int], store: _Store) -> None:
        """Takes in those of ``tokens`` that are new."""
        new = tokens[self.known :]
        self.automaton.extend(new)
        self.known = max(self.known, len(tokens))
        if self.store is not store:
            self.store, new = store, tokens[-REMATCHED:]
            self.place[:] = 0
        state, length = self.place.tolist()
        self.place[:] = store.automaton.match(state, length, new)

    def add_to(self, draft: Draft, source: int, tokens: list[int], store: _Store, nodes: int, depth: int) -> None:
        """Takes in those of ``tokens`` that are new, and joins to ``draft`` what may follow them."""
        if self.store is not store:
            self.follow(tokens, store)
        new = tokens[self.known :]
        self.automaton.add_to(draft, source, store.automaton, self.place, new, nodes, depth, LEAST_PROB)
        self.known += len(new)


@dataclass(eq=False)
class _Store:
    """What finished requests have answered: the tokens, each text closed by `END`, and an automaton over them."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)

    def with_text(self, text: list[int], most: int) -> _Store:
        """The store with one more text: itself, or one rebuilt from its newer half when it is full."""
        store = self
        if len(self.tokens) + len(text) >= most:
            store = _Store()
            kept = self.tokens[len(self.tokens) // 2 :]
            store._append(kept[kept.index(END) + 1 :] if END in kept else kept[:0])
            text = text[max(0, len(text) - most // 2) :]
        if text:
            store._append(array("i", [*text, END]))
        return store

    def _append(self, tokens: array[int]) -> None:
        self.tokens.extend(tokens)
        ids = np.array(tokens, np.int32)
        begin = 0
        for end in np.flatnonzero(ids == END).tolist():
            self.automaton.start_text()
            self.automaton.extend(ids[begin:end])
            begin = end + 1
