"""Whether the model that an engine was made of is still what it was, looked at where texts begin and in every step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tokentree.engines.model_facts import ends_of
from tokentree.engines.segment import Upto
from tokentree.errors import ModelError

if TYPE_CHECKING:  # it imports transformers' model classes
    from tokentree.engines.watch import Shared, Watch

PAUSE = 20  # times as long as a look at all weights took until the next one, where texts are decoded beside it


class Unwatched:
    """Of a model that nobody else has, and so nobody changes.

    Args:
        ends: the tokens at which transformers' ``generate`` ended its texts when an engine was made of it.
    """

    def __init__(self, ends: list[int]) -> None:
        self._ends = ends

    @property
    def ends(self) -> list[int]:
        """The tokens at which it ends them now.

        Raises:
            ModelError: if the model names something else there.
        """
        return self._ends

    def changed(self) -> str | None:
        """What has changed, in words; None if nothing has."""
        return None

    def before_text(self, busy: bool) -> None:
        """Raises `ModelError` if the model has changed. A text begins now, ``busy`` where others are decoded."""

    def before_forward(self, upto: Upto) -> None:
        """Raises `ModelError` if weights that the engine shares with the model have changed."""


class Guard(Unwatched):
    """Of a model that its user has too.

    Args:
        name: of its class.
        ends: see `Unwatched`.
        watch: remembers what it was.
    """

    def __init__(self, name: str, ends: list[int], watch: Watch) -> None:
        super().__init__(ends)
        self._name, self._watch = name, watch
        self._shared: Shared | None = None
        self._looked = False  # at the model, since the last step
        self._next = 0.0  # when all weights are looked at again, though others are decoded

    @property
    def ends(self) -> list[int]:
        if (model := self._watch.model) is not None:  # it may be told others at any time
            self._ends = ends_of(model)
        return self._ends

    def share(self, shared: Shared) -> None:
        """From now on ``shared`` is looked at in every step."""
        self._shared = shared

    def check_forward_of_its_own(self) -> None:
        """Raises `ModelError` if the model is changed by its own forward, which has run."""
        if told := self.changed():
            raise ModelError(f"{self._name} is changed by its own forward ({told}): a tree's must leave no trace")

    def changed(self) -> str | None:
        return self._watch.change()

    def before_text(self, busy: bool) -> None:
        if self._looked and busy:  # once for all that join before the next step
            return
        started = time.perf_counter()
        whole = not busy or started >= self._next
        if told := self._watch.change(briefly=not whole):
            raise ModelError(f"{self._name} has changed since it was given ({told}): make a new LLM of it")
        self._looked, now = True, time.perf_counter()
        if whole:
            self._next = now + PAUSE * (now - started)

    def before_forward(self, upto: Upto) -> None:
        if upto == "logits":
            self._looked = False
        if upto != "kv" and self._shared is not None and self._shared.changed():  # prompts are looked at before
            raise ModelError(f"weights of {self._name} were changed while a text was decoded: make a new LLM of it")
