"""How drafters use engines: the protocols of those that draft, and of those whose hidden states are drafted on."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.engines.base import Engine
from tokentree.engines.output import TargetOutput
from tokentree.sequence import Sequence
from tokentree.tree import Floats, Ints, TokenTree

if TYPE_CHECKING:
    from tokentree.heads.assistant import AssistantHead
    from tokentree.heads.block import BlockHead, BlockSizes
    from tokentree.heads.eagle import EagleHead
    from tokentree.heads.markov import Markov
    from tokentree.heads.mtp import MtpHead

CANDIDATES = 10  # tokens that a block engine keeps of each place


class ReadsTexts(Protocol):
    """The part of the protocol `Engine` by which a text is read ahead of its drafts."""

    context: int

    def prefill(self, seq: Sequence, upto: int | None = None) -> int: ...

    def committed(self, seq: Sequence) -> int: ...

    def release(self, seqs: SequenceOf[Sequence]) -> None: ...


class DraftEngine(ReadsTexts, Protocol):
    """The part of the protocol `Engine` that a draft model needs."""

    vocab_size: int

    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None
    ) -> TargetOutput: ...

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None: ...


@runtime_checkable
class Rewinds(DraftEngine, Protocol):
    """A draft engine that can forget the end of a text. Draft models with another tokenizer need one: when a text
    grows, its last tokens there may become others."""

    def rewind(self, seq: Sequence, rows: int) -> None:
        """Keeps at most the first ``rows`` committed rows of ``seq``, and drops all provisional ones. Fewer are kept
        where other texts share what would be overwritten."""
        ...


@dataclass(frozen=True, eq=False)
class DraftLevels:
    """A draft that an engine has grown by itself. A level has at most W parents with W candidates each.

    Args:
        tokens, log_probs: int64 and float32[levels, W, W], the most probable tokens after each parent, best first, and
            their log-probabilities. The first level has one parent, the root.
        chosen: int64[levels, W], the candidates that are the parents of the next level, as indices into the flattened
            level. The last level's entries have no meaning.
    """

    tokens: Ints
    log_probs: NDArray[np.float32]
    chosen: Ints


@runtime_checkable
class GrowsDrafts(DraftEngine, Protocol):
    """A draft engine that grows whole drafts on its device."""

    def grow(self, seqs: SequenceOf[Sequence], levels: int) -> list[DraftLevels] | None:
        """A draft of so many levels below the last token of each of ``seqs``. None if there are too many sequences, or
        no memory is left for their rows."""
        ...


@dataclass(frozen=True, eq=False)
class Features:
    """Properties and layers of the target model, for drafters that read its hidden states.

    Args:
        hidden_size: the width of a hidden state.
        num_layers: the number of layers. It is also the place of the last hidden state, which follows the final norm.
        embedding: maps token ids [...] to embeddings [..., hidden size].
        output_layer: maps hidden states [..., hidden size] to logits [..., vocab].
        output_weights: maps token ids int64[n] to their weights [n, hidden size] and biases [n] (or None) in the output
            layer.
        linear: makes a linear layer for drafting of a weight [outputs, inputs] and a bias [outputs] (or None). It is
            the fastest one that the engine has. On CPUs its weights are rounded to 8 bits.
        dtype, device: of hidden states.
        recorded: whether the engine's forwards are recorded. If so, forwards of heads may be recorded too.
    """

    hidden_size: int
    num_layers: int
    embedding: Callable[[torch.Tensor], torch.Tensor]
    output_layer: Callable[[torch.Tensor], torch.Tensor]
    output_weights: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    linear: Callable[[torch.Tensor, torch.Tensor | None], Callable[[torch.Tensor], torch.Tensor]]
    dtype: torch.dtype
    device: torch.device
    recorded: bool = False


@runtime_checkable
class HasHiddenStates(Engine, Protocol):
    """An engine that stores the target's hidden states beside the KV. Medusa and EAGLE drafters need one."""

    def capture(self, places: SequenceOf[int] | None = None) -> Features:
        """Stores the hidden states ``places`` of all later rows, in addition to those of earlier calls.

        Args:
            places: numbers as in transformers' ``hidden_states``: place i is the input of layer i, and the last place
                is the output of the final norm. By default the last one.

        Raises:
            PairingError: if this engine has no such hidden states, or is decoding.
        """
        ...

    def hidden(self, seq: Sequence, place: int | None = None) -> torch.Tensor:
        """[committed rows, hidden size]: the hidden states ``place`` of ``seq``, by default the last ones."""
        ...

    def hidden_rows(self, seq: Sequence, places: SequenceOf[int], first: int, end: int) -> torch.Tensor:
        """[places, rows, hidden size]: of committed rows ``first`` to ``end`` - 1, the hidden states ``places``."""
        ...


@runtime_checkable
class HeadEngines(HasHiddenStates, Protocol):
    """An engine that can make draft engines of EAGLE heads."""

    def head_engine(self, head: EagleHead) -> DraftEngine:
        """A draft engine that runs ``head`` on the hidden states of this engine.

        Raises:
            PairingError: if the head doesn't fit the target.
        """
        ...


@runtime_checkable
class LayerEngines(HasHiddenStates, Protocol):
    """An engine on which a layer for multi-token prediction can draft."""

    def layer_engine(self, head: MtpHead) -> DraftEngine:
        """A draft engine that runs ``head`` on the hidden states of this engine.

        Raises:
            PairingError: if the head doesn't fit the target.
        """
        ...


@runtime_checkable
class AssistantEngines(HasHiddenStates, Protocol):
    """An engine on whose keys and values a Gemma 4 assistant can draft."""

    def assistant_engine(self, head: AssistantHead) -> DraftEngine:
        """A draft engine that runs ``head`` on the keys, values and hidden states of this engine.

        Raises:
            PairingError: if the assistant doesn't fit the target.
        """
        ...


class Slots(NamedTuple):
    """Tokens that are guessed for places ahead, best first, after each token that is guessed for the place before.

    Args:
        tokens: int64[places, before, k].
        probs: float64[places, before, k], given the one before.
        ranks: int64[places, before, k], which of the ``before`` of the next place each of them is; -1: none, so what
            follows isn't known. Where guesses don't depend on the token before, there is one ``before``, and all are 0.
    """

    tokens: Ints
    probs: Floats
    ranks: Ints

    @classmethod
    def independent(cls, tokens: Ints, probs: Floats) -> Slots:
        """Of ``tokens`` and ``probs`` [places, k] that hold whatever stands before."""
        tokens, probs = np.ascontiguousarray(tokens), np.ascontiguousarray(probs)
        return cls(tokens[:, None], probs[:, None], np.zeros_like(tokens)[:, None])

    @classmethod
    def empty(cls, places: int, k: int) -> Slots:
        """With k tokens before each place, and none filled in."""
        size = places, k, k
        return cls(np.zeros(size, np.int64), np.zeros(size), np.zeros(size, np.int64))


class BlockEngine(ReadsTexts, Protocol):
    """What runs a block head on the hidden states of a target.

    Attributes:
        sizes: of the head.
        markov: its Markov part, in the target's type, or None.
    """

    sizes: BlockSizes
    markov: Markov | None

    def guess(self, seqs: SequenceOf[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """The states [texts, guesses, hidden size] of a block behind each of ``seqs``, and the logits [texts, guesses,
        tokens that the head knows] of what it guesses, without what the tokens before add; see `BlockHead`. Both may be
        overwritten by the next call."""
        ...

    def slots(self, seqs: SequenceOf[Sequence]) -> list[Slots]:
        """The `CANDIDATES` most probable tokens of each place of such a block, as the target knows them, at each text's
        temperature.

        Where the head has a Markov part, they are the most probable ones after the most probable one before. After
        another one they are the same tokens: they keep their sum of probabilities, and share it by what the Markov part
        says of each pair. Where it is a selector, they are all that it takes from, so that sum is 1. Where it is
        recurrent, what stands before is a whole path: one of the `CANDIDATES` most probable ones.
        """
        ...


@runtime_checkable
class BlockEngines(HasHiddenStates, Protocol):
    """An engine on which block heads can draft."""

    def block_engine(self, head: BlockHead) -> BlockEngine:
        """What runs ``head`` on the hidden states of this engine.

        Raises:
            PairingError: if the head doesn't fit the target.
        """
        ...
