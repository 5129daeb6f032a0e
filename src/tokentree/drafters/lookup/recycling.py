"""Token Recycling: what the target last thought would follow each token (Luo et al. 2024, arXiv:2408.08696)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.best_first import best_first
from tokentree.drafters.lookup.base import Lookup
from tokentree.drafters.lookup.storage import Array, read_arrays, write_arrays
from tokentree.engines.output import TargetOutput
from tokentree.errors import OptionError
from tokentree.growing import PARENT, TOKEN, join_grown
from tokentree.jit import njit
from tokentree.kernels.copying import copy_into
from tokentree.sequence import Accepted, Sequence
from tokentree.tree import Floats, Ints

SUCCESSORS = 8  # of a token or a pair that are kept, where there are as many
PAIRS = 1 << 17  # rows for pairs of tokens
HASH = 0x9E3779B1
HOLDS_ALONE, HOLDS_IN_PAIR = 0.5, 0.7  # how far a successor's probability holds in another context
LEAST_PROB = 0.01


class Recycling(Lookup):
    """An adjacency matrix: for each token the k most probable successors when the target last scored it, on the
    accepted path or beside it, with their probabilities among those k. Trees grow best-first along it.

    Beyond the paper, the last scores of a *pair* of tokens are kept too, in a table of fixed size in which a newer
    pair takes the place of an older one, and go before those of the single token.

    The matrix is shared by all requests: vocabulary + 131,072 rows of k entries, 8 bytes each.

    Args:
        vocab_size: width of the target's logits.
        k: successors kept for each token.

    Raises:
        OptionError: if ``k`` is below 1 or above the vocabulary.
    """

    name = "recycling"

    def __init__(self, vocab_size: int, k: int = SUCCESSORS) -> None:
        if not 1 <= k <= vocab_size:
            raise OptionError("recycling needs k of at least 1, and no more than there are tokens")
        self._k, self._vocab_size = k, vocab_size
        self._successors = np.full((vocab_size + PAIRS, k), -1, np.int32)
        self._probs = np.zeros((vocab_size + PAIRS, k), np.float32)
        self._pairs = np.full(PAIRS, -1, np.int64)  # which pair a row belongs to
        self._rows = self._successors, self._probs, self._pairs, vocab_size
        self._compile()

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        return cls(parts.engine.vocab_size, min(SUCCESSORS, parts.engine.vocab_size))

    @property
    def nbytes(self) -> int:
        return self._successors.nbytes + self._probs.nbytes + self._pairs.nbytes

    def look_up(self, seq: Sequence, draft: Draft, source: int, nodes: int, depth: int) -> None:
        draft.grow(_add, nodes, source, *self._rows, _before(seq), nodes, depth)

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        logits, successors = out.top(self._k)
        logits, successors = np.ascontiguousarray(logits), np.ascontiguousarray(successors)
        for i, (seq, draft, step) in enumerate(zip(seqs, drafts, accepted, strict=True)):
            told = _before(seq), draft.ints, len(draft), np.array(step.path, np.int64)
            _remember(*self._rows, successors, logits, out.starts[i], *told)

    def save(self, folder: Path) -> None:
        arrays: dict[str, Array] = {"successors": self._successors, "probs": self._probs, "pairs": self._pairs}
        write_arrays(folder / "recycling.safetensors", arrays)

    def merging(self, folder: Path) -> Iterator[Callable[[], None]]:
        """Rows of tokens and pairs that are empty here."""
        found = self._read(folder)
        if found is None:
            return
        successors, probs, pairs = found

        def fill() -> None:
            filled = np.concatenate([successors[: self._vocab_size, 0], pairs]) >= 0
            empty = np.concatenate([self._successors[: self._vocab_size, 0], self._pairs]) < 0
            rows = np.flatnonzero(filled & empty)
            self._successors[rows], self._probs[rows] = successors[rows], probs[rows]
            slots = rows[rows >= self._vocab_size] - self._vocab_size
            self._pairs[slots] = pairs[slots]

        yield fill

    def load(self, folder: Path) -> None:
        found = self._read(folder)
        if found is not None:
            self._successors[:], self._probs[:], self._pairs[:] = found

    def _read(self, folder: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None:
        """What `save` wrote, checked; None if it wrote nothing."""
        dtypes: dict[str, np.dtype[np.generic]] = {
            "successors": np.dtype(np.int32),
            "probs": np.dtype(np.float32),
            "pairs": np.dtype(np.int64),
        }
        arrays = read_arrays(folder / "recycling.safetensors", dtypes)
        if arrays is None:
            return None
        shapes = [self._successors.shape, self._probs.shape, self._pairs.shape]
        if [arrays[name].shape for name in dtypes] != shapes:
            raise OptionError(
                f"{str(folder / 'recycling.safetensors')!r} was written with another model: it holds "
                f"{'x'.join(map(str, arrays['successors'].shape))} successors, and this one has "
                f"{'x'.join(map(str, self._successors.shape))}"
            )
        successors, probs, pairs = (np.asarray(arrays[name], dtype) for name, dtype in dtypes.items())
        if not self._makes_sense(successors, probs, pairs):
            raise OptionError(
                f"{str(folder / 'recycling.safetensors')!r} doesn't hold successors out of {self._vocab_size} tokens "
                f"and their probabilities: it is damaged, or was not written by this drafter"
            )
        return successors, probs, pairs

    def _makes_sense(self, successors: NDArray[Any], probs: NDArray[Any], pairs: NDArray[Any]) -> bool:
        """Whether these are what compiled loops may read: tokens index arrays there."""
        ranked = np.sort(successors, 1)
        twice = (ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)
        known = (successors >= -1).all() and (successors < self._vocab_size).all()
        known = known and (pairs >= -1).all() and (pairs < self._vocab_size**2).all()
        return bool(known and not twice.any() and ((probs >= 0) & (probs <= 1)).all())  # nor is it NaN

    def _compile(self) -> None:
        """Before any request waits for it."""
        none, draft = np.zeros(0, np.int64), Draft(0)
        draft.grow(_add, 1, 1, *self._rows, 0, 1, 1)
        _remember(*self._rows, np.zeros((0, self._k), np.int64), self._probs[:0], 0, 0, draft.ints, 0, none)


def _before(seq: Sequence) -> int:
    """The token before the root; a text's first token has none, and counts as standing after token 0."""
    return seq.tokens[-2] if len(seq.tokens) > 1 else 0


@njit(cache=True)
def _row(pairs: Ints, vocab_size: int, before: int, token: int) -> int:
    """The row of the pair, or of the single token where the pair is not known."""
    pair = before * vocab_size + token
    slot = pair * HASH % PAIRS
    return vocab_size + slot if pairs[slot] == pair else token


@njit(cache=True)
def _remember(
    successors: NDArray[np.int32], chances: NDArray[np.float32], pairs: Ints, vocab_size: int, ids: Ints,
    logits: NDArray[np.float32], first: int, before: int, ints: Ints, size: int, path: Ints,
) -> None:  # fmt: skip
    """Writes what the target said after the nodes of a draft, ``ids`` and ``logits`` [rows, k] from row ``first`` on;
    of one token's rows, the one on the ``path`` stays."""
    for turn in range(size + len(path)):
        node = turn if turn < size else path[turn - size]
        token = ints[TOKEN, node]
        probs = np.exp(logits[first + node] - logits[first + node].max())
        probs /= probs.sum()
        pair = (before if node == 0 else ints[TOKEN, ints[PARENT, node]]) * vocab_size + token
        slot = pair * HASH % PAIRS
        pairs[slot] = pair
        for row in (token, vocab_size + slot):
            copy_into(successors[row], ids[first + node])
            copy_into(chances[row], probs)


@njit(cache=True)
def _add(
    ints: Ints, floats: Floats, size: int, source: int, successors: NDArray[np.int32], chances: NDArray[np.float32],
    pairs: Ints, vocab_size: int, before: int, max_nodes: int, max_depth: int,
) -> int:  # fmt: skip
    """See `Draft.grow` and `best_first`; ``before`` is the token before the root."""
    rows = successors, chances, pairs, vocab_size
    found = _best_first(rows, before, ints[TOKEN, 0], max_nodes, max_depth, LEAST_PROB, successors.shape[1])
    return join_grown(ints, floats, size, source, found[0], found[1], found[2])


@njit
def _follow(
    source: tuple[NDArray[np.int32], NDArray[np.float32], Ints, int], before: int, token: int, depth: int,
    tokens: Ints, probs: Floats, befores: Ints, nexts: Ints,
) -> int:  # fmt: skip
    """What may follow ``token`` where it follows ``before``; that pair says which node it is."""
    successors, chances, pairs, vocab_size = source
    row = _row(pairs, vocab_size, before, token)
    holds = HOLDS_IN_PAIR if row >= vocab_size else HOLDS_ALONE
    for rank in range(successors.shape[1]):
        if successors[row, rank] < 0:
            return rank
        tokens[rank] = nexts[rank] = successors[row, rank]
        probs[rank], befores[rank] = holds * chances[row, rank], token
    return len(tokens)


_best_first = best_first(_follow)
