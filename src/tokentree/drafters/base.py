"""What every drafter answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from tokentree.draft import Draft
from tokentree.engines.base import Engine, TargetOutput
from tokentree.heads.saved import Fingerprint
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes.base import Shape


@dataclass(frozen=True)
class Parts:
    """What a drafter may be made of.

    Args:
        engine: the target's.
        draft_engines: those of the draft models, each with the name that is shown beside its tokens.
        heads: the folder of heads for the target, if there are any.
        fingerprint: of the target, for which they must have been made.
    """

    engine: Engine
    draft_engines: tuple[tuple[str, Engine], ...] = ()
    heads: Path | None = None
    fingerprint: Fingerprint | None = None


class Drafter(ABC):
    """Proposes a tree per sequence. State is kept per `Sequence.id`; what is learnt from all of them may be shared.

    Attributes:
        name: as in the registry; shown beside the tokens it earned.
        by_levels: whether each level of a draft costs it a forward of its own.
        draws_children: whether it can draw children from a distribution, as `accept="rejection"` needs.
    """

    name: str
    draws_children: bool = False
    by_levels: bool = False

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        """The drafter that its name in the registry stands for.

        Raises:
            PairingError: if ``parts`` lacks what it needs.
        """
        return cls()

    @property
    def names(self) -> list[str]:
        """Who proposes, in the order of the bits in `Draft.sources`."""
        return [self.name]

    @abstractmethod
    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        """A draft per sequence, rooted at its last token. The loop cuts it to ``shape`` afterwards; it should hold
        about `Shape.max_nodes` nodes, none deeper than `Shape.max_depth` or than the sequence has room for.

        Args:
            sampled: draw the children of requests that are not greedy from their distribution, without replacement.
        """

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        """Reads the first ``upto`` tokens of new sequences, those of which it hasn't read yet; by default all. The
        loop calls it whenever the target has read a part of a prompt."""

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        """Learns from a step. The accepted tokens are not yet part of ``seqs``."""

    def release(self, seqs: list[Sequence]) -> None:
        """Forgets what it keeps for ``seqs``."""

    def save(self, folder: Path) -> None:
        """Writes what it learnt from all sequences into ``folder``, which exists."""

    def load(self, folder: Path) -> None:
        """Takes in what `save` wrote; nothing, if it wrote nothing.

        Raises:
            OptionError: if it belongs to a model with another vocabulary, or isn't such a file.
        """
