"""Going without what doesn't pay, and trying it again now and then."""

from __future__ import annotations


class Pause:
    """Counts the steps without something. After each pause that ends in vain the next one is twice as long.

    Args:
        least: steps of the first pause.
        most: steps of the longest one.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self.stop()

    def stop(self) -> None:
        """It pays again."""
        self.steps, self._patience = 0.0, self._least

    def count(self, steps: float = 1.0) -> bool:
        """Counts so many steps; whether it is time to try again, which begins the next pause."""
        self.steps += steps
        if self.steps < self._patience:
            return False
        self.steps, self._patience = 0.0, min(2 * self._patience, self._most)
        return True
