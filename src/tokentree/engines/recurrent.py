"""The recurrent state of one text, beside its KV.

Rows of KV can be dropped, a state can't be taken back. So a state lies behind committed rows alone, and what later rows
do to it lies beside it, in rows of its own: inputs of a convolution, keys, values and decays of a recurrence. They are
committed, moved and dropped as KV is. The next forward takes the committed ones into the state, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from tokentree.errors import ModelError


@dataclass(frozen=True)
class Recurrence:
    """What one recurrence of a model keeps of a text, in numbers (float32).

    Args:
        row: of each row that came behind the state.
        back: how many rows before these are kept too: of a convolution, its taps without the last one.
        state: the state itself; 0 for a convolution, whose window is all that it sees.
    """

    row: int
    back: int
    state: int


@dataclass(frozen=True)
class Checkpoint:
    """All states of a text behind its first ``length`` rows.

    Args:
        length: of the text.
        state: float32[numbers].
        window: float32[back, numbers of a row], the rows before ``length``.
    """

    length: int
    state: torch.Tensor
    window: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.window.nbytes


class RecurrentStates:
    """The states of one text, of all recurrences of a model, and the rows behind them.

    Args:
        recurrences: in the order in which a forward comes to them.

    Attributes:
        back: the most rows that a recurrence reads before its state.
        held: for each recurrence, how many rows of the text its state holds.
        checkpoints: of this text, kept for others that begin alike, the shortest first.
        mark: behind so many rows another one is wanted, 0 if none is.
    """

    def __init__(self, recurrences: tuple[Recurrence, ...]) -> None:
        self.recurrences = recurrences
        self.back = max((one.back for one in recurrences), default=0)
        self.held = [0] * len(recurrences)
        self.checkpoints, self.mark = list[Checkpoint](), 0
        self._states = [sum(one.state for one in recurrences[:at]) for at in range(len(recurrences))]
        self._columns = [sum(one.row for one in recurrences[:at]) for at in range(len(recurrences))]
        self.width = sum(one.row for one in recurrences)
        self._state = torch.zeros(sum(one.state for one in recurrences), dtype=torch.float32)
        # row i is that of the text's row _origin + i - back; behind the committed ones lie the nodes of a tree
        self._rows, self._origin = torch.zeros(self.back, self.width, dtype=torch.float32), 0

    @staticmethod
    def nbytes_of(recurrences: tuple[Recurrence, ...]) -> int:
        """Memory of the states of a text without a tree, in bytes."""
        back = max((one.back for one in recurrences), default=0)
        return 4 * sum(one.state + back * one.row for one in recurrences)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self._state.nbytes + self._rows.nbytes + sum(known.nbytes for known in self.checkpoints)

    def check(self, length: int) -> None:
        """Raises `ModelError` if a state holds more than the first ``length`` rows, all that are committed: a forward
        was left in its midst."""
        if max(self.held, default=0) > length:
            raise ModelError("a forward that failed has left this text's states in disorder: release it")

    def state(self, number: int) -> torch.Tensor:
        """The state of a recurrence, to be changed in place."""
        begin = self._states[number]
        return self._state[begin : begin + self.recurrences[number].state]

    def stored(self, number: int) -> torch.Tensor:
        """[back + rows, numbers]: the rows that a recurrence keeps: those before its state, the committed ones behind
        it, and the nodes of the tree."""
        begin, one = self._columns[number], self.recurrences[number]
        return self._rows[self.held[number] - self._origin :, begin : begin + one.row]

    def reserve(self, length: int, nodes: int) -> None:
        """Makes room for the rows of so many ``nodes`` behind ``length`` committed ones."""
        end = self.back + length - self._origin + nodes
        if end > len(self._rows):
            more = self._rows.new_zeros(max(end, 3 * len(self._rows) // 2), self.width)
            more[: len(self._rows)] = self._rows
            self._rows = more

    def store(self, number: int, length: int, first: int, rows: torch.Tensor) -> None:
        """Stores the rows of nodes ``first`` and on, [nodes, numbers], behind ``length`` committed ones."""
        self.reserve(length, first + len(rows))
        begin, column = self.back + length - self._origin + first, self._columns[number]
        self._rows[begin : begin + len(rows), column : column + rows.shape[1]] = rows

    def advance(self, number: int, length: int, read: torch.Tensor | None = None) -> None:
        """A state holds ``length`` rows from now on.

        Args:
            read: [rows, numbers], the last of these rows, where they are in the state at once and weren't stored.
        """
        if read is not None and self.recurrences[number].back:
            column, width = self._columns[number], self.recurrences[number].row
            begin = length - len(read) - self._origin
            last = torch.cat([self._rows[begin : begin + self.back, column : column + width], read])
            self._rows[: self.back, column : column + width] = last[-self.back :]
        self.held[number] = length

    def hold(self, length: int, read: int) -> None:
        """All states hold ``length`` rows from now on, and ``read`` ones behind these, of which the last ones were
        stored there, at most `back`. For a model whose states are windows alone."""
        if read:
            begin = length - self._origin + min(self.back, read)
            self._rows = self._rows[begin : begin + self.back].clone()
        self.held = [length + read] * len(self.recurrences)

    def keep(self, length: int, nodes: SequenceOf[int], committed: int) -> None:
        """Keeps the rows of ``nodes``, ascending, behind ``length`` committed ones, and drops those of all others, and
        those that all states hold. The first so many of ``nodes`` are ``committed``."""
        if not self.recurrences:
            return
        at = min(self.held)
        if at <= length:
            before = range(at - self._origin, self.back + length - self._origin)
            index = [*before, *(before.stop + node for node in nodes)]
            if index != list(range(len(index))):
                self._rows[: len(index)] = self._rows[index]
        self._origin = at

    def checkpoint(self) -> Checkpoint | None:
        """A copy of the states; None if they don't all hold as many rows."""
        if len(set(self.held)) != 1:
            return None
        begin = self.held[0] - self._origin
        return Checkpoint(self.held[0], self._state.clone(), self._rows[begin : begin + self.back].clone())

    def remember(self) -> None:
        """Keeps a checkpoint."""
        known = self.checkpoint()
        if known is not None and all(one.length != known.length for one in self.checkpoints):
            self.checkpoints.append(known)

    def all_checkpoints(self) -> list[Checkpoint]:
        """Those that are kept, and one of now."""
        self.remember()
        return self.checkpoints

    def latest(self, most: int) -> Checkpoint | None:
        """The longest checkpoint of at most so many rows, the states of now included."""
        if self.held and max(self.held) <= most and (now := self.checkpoint()) is not None:
            return now
        return next((known for known in reversed(self.checkpoints) if known.length <= most), None)

    def restore(self, known: Checkpoint) -> None:
        """Takes over what `checkpoint` gave."""
        self._state.copy_(known.state)
        self._rows[: self.back] = known.window
        self.held, self._origin = [known.length] * len(self.recurrences), known.length
