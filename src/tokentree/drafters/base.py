"""The base class of drafters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokentree.draft import Draft
from tokentree.engines.base import Engine
from tokentree.engines.output import TargetOutput
from tokentree.heads.fingerprint import Fingerprint
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes.base import Shape
from tokentree.vocabularies import Vocabularies


@dataclass(frozen=True)
class Parts:
    """The parts of an `LLM` that a drafter may use.

    Args:
        engine: the target's engine.
        draft_engines: the name and the engine of each draft model. The name is shown beside its tokens.
        heads: a folder with heads for the target, or None.
        folder: the target's own folder of safetensors, or None.
        fingerprint: the fingerprint of the target. Heads must have been made for a model with the same one.
        lookup_bytes: memory for what a drafter's look-ups learn from all sequences. None: as the drafter likes.
        draws_children: whether the acceptance rule asks for drawn children.
        vocabularies: those of each draft model whose tokenizer isn't the target's, and of the target, by its name.
        masks: the mask token of each draft model that guesses several tokens at once, by its name.
    """

    engine: Engine
    draft_engines: tuple[tuple[str, Engine], ...] = ()
    heads: Path | None = None
    fingerprint: Fingerprint | None = None
    lookup_bytes: int | None = None
    draws_children: bool = False
    vocabularies: Mapping[str, Vocabularies] = field(default_factory=dict)
    masks: Mapping[str, int] = field(default_factory=dict)
    folder: Path | None = None


class Drafter(ABC):
    """Proposes a tree for each sequence.

    A drafter stores the state of a sequence under its `Sequence.id`. What it learns from all sequences may be shared.

    Attributes:
        name: its name in the registry. It is shown beside the accepted tokens that this drafter proposed.
        by_levels: whether each level of a draft takes a forward of its own.
        draws_children: whether it can draw children from a distribution. The rule ``rejection`` needs that;
            ``block`` and ``traversal`` accept more so.
    """

    name: str
    draws_children: bool = False
    by_levels: bool = False

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        """Makes the drafter that is registered under this class's name.

        Raises:
            PairingError: if ``parts`` lacks something that the drafter needs.
        """
        return cls()

    @property
    def names(self) -> list[str]:
        """The names of all who propose here, in the order of the bits in `Draft.sources`."""
        return [self.name]

    @property
    def nbytes(self) -> int:
        """Memory of what it learnt from all sequences, in bytes."""
        return 0

    @abstractmethod
    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        """A draft for each sequence. Its root is the sequence's last token.

        A draft should have about `Shape.max_nodes` nodes. No node may be deeper than `Shape.max_depth`, or than the
        sequence has room for. The loop cuts the draft to ``shape`` afterwards.

        Args:
            sampled: whether children must be drawn from the drafter's distribution, without replacement. This holds
                for requests that aren't greedy.
        """

    def add_to(self, drafts: list[Draft], seqs: list[Sequence], shape: Shape, source: int) -> None:
        """Adds to each of ``drafts`` what it proposes, marked with the bit ``source``: see `Draft.join`."""
        for draft, proposed in zip(drafts, self.propose(seqs, shape, sampled=False), strict=True):
            draft.join(proposed, source)

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        """Reads the first ``upto`` tokens of new sequences, by default all, as far as it hasn't read them yet."""

    def observe_prompt(self, seqs: list[Sequence], upto: int) -> None:
        """Learns that the target has read the first ``upto`` tokens of new sequences. By default it reads them too.

        A drafter with a model or a head of its own leaves that to `propose`: in a large batch it may never be asked. It
        adds the seconds to `Metrics.prefill_seconds` of the sequence.
        """
        self.prefill(seqs, upto)

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        """Learns from a step. The accepted tokens are not yet part of ``seqs``."""

    def release(self, seqs: list[Sequence]) -> None:
        """Drops the state of ``seqs``."""

    def save(self, folder: Path) -> None:
        """Writes what it learnt from all sequences into the existing ``folder``."""

    def merging(self, folder: Path) -> Iterator[Callable[[], None]]:
        """The parts of adding what another drafter of this kind `save`d, as far as it isn't known here. Files are read
        between the parts, beside steps; each part is called between two steps.

        Raises:
            OptionError: as `load`.
        """
        return iter(())

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. Does nothing if `save` wrote nothing.

        Raises:
            OptionError: if a file is damaged, or belongs to a model with another vocabulary.
        """
