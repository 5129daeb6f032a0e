"""What an engine is: the protocol, and what not every engine has."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol, runtime_checkable

import torch

from tokentree.engines.output import TargetOutput
from tokentree.errors import ModelError
from tokentree.exclusive import Exclusive
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

if TYPE_CHECKING:
    from tokentree.prompt_kv import PromptKV

CPU = torch.device("cpu")


@dataclass(frozen=True)
class EngineOptions:
    """Options for making an engine. They have the names that they have in `LLM`.

    Args:
        dtype, device: for a model that is given by name.
        attention, quantization, compile: see `TorchEngine`.
        prefix_bytes: the size of the prefix cache in bytes.
    """

    dtype: str | torch.dtype | None = None
    device: torch.device | None = None
    attention: str | None = None
    quantization: str | None = None
    compile: bool = False
    prefix_bytes: int = 0


@dataclass(frozen=True)
class EngineInfo:
    """A description of an engine.

    Args:
        name: the model's name, for messages.
        vocab_size: the width of the logits.
        context: the largest number of positions that the model can take.
        ends: the tokens that end a text. For a transformers model, they are those at which ``generate`` ends it.
        device: where it computes. On "cpu", a step reads fewer rows of prompts than elsewhere.
        dtype: of logits.
        attention: "tree" if a row has the same bits in any tree and any batch; "sdpa" if the model attends by itself.
        execution: how the forward runs, in words.
        signature: a text that names all that the cost of a forward depends on: model, engine, dtype, device and
            threads. Measured costs are stored under it. Without a signature, they are measured in each process.
        caveat: a sentence that says why texts equal plain decoding's only up to ties, although `attention` is "tree".
        kv_bytes: the size of the memory for the KV of all texts in bytes. None if that memory grows as needed.
        keeps: what it keeps of a text, and takes back where a tree's nodes are dropped: "rows" of KV, recurrent
            "states", or both.
        state_bytes: the memory of a text's recurrent states in bytes, however long the text is.
        scores_prompts: whether it gives the logits of prompts, see `TargetOutput.read`.
    """

    name: str
    vocab_size: int
    context: int
    ends: tuple[int, ...] = ()
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    attention: str = "tree"
    execution: str = ""
    signature: str = ""
    caveat: str = ""
    kv_bytes: int | None = None
    keeps: tuple[str, ...] = ("rows",)
    state_bytes: int = 0
    scores_prompts: bool = False


class NotCopied:
    """Objects of subclasses can't be copied or pickled, because compiled loops and recordings hold addresses of their
    memory."""

    def __reduce__(self) -> NoReturn:
        """Refuses to copy or pickle.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "an LLM can't be copied, nor sent to another process: make a new one there; its tokenizer can be"
        )


class Engine(Protocol):
    """Owns the target's weights and KV. Every method takes a batch. KV is stored per `Sequence.id`.

    These seven methods are all that decoding needs. `HasPrefixes`, `TakesPrompts`, `Branches` and the protocols in
    `engines/drafting.py` hold what only some engines have. Test for them with ``isinstance``.

    Attributes:
        vocab_size: the width of the logits.
        context: the largest number of positions that the model can take.
        lock: the decoder holds it for a whole step. It protects drafters and shapes too.
    """

    vocab_size: int
    context: int
    lock: Exclusive

    @property
    def info(self) -> EngineInfo:
        """A description of this engine."""
        ...

    def begin(self, seq: Sequence) -> int:
        """Makes room for a new ``seq``. Reuses KV rows of a text that begins alike, and returns how many. They are at
        most `Sequence.reusable`."""
        ...

    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        """Calls `begin` for ``seq``, computes the missing KV of its first ``upto`` tokens, and commits it.

        By default ``upto`` is all tokens but the last. Returns the result of `begin`.
        """
        ...

    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None,
        reading: SequenceOf[tuple[Sequence, int]] = (),
    ) -> TargetOutput:  # fmt: skip
        """One forward over the nodes of all trees, each under its tree attention mask.

        The KV of the nodes is provisional until `commit`. The root's position follows the committed ones.

        Args:
            firsts: the first node of each tree to compute. Earlier nodes keep the provisional KV of earlier calls.
            reading: pairs of a sequence, which has begun and is none of ``seqs``, and a number of tokens. So many of
                its next tokens go through the same forward, and their KV is committed.
        """
        ...

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        """Commits the KV of ``paths``, and drops all other provisional KV. A path lists nodes of the last tree, from
        the root on."""
        ...

    def committed(self, seq: Sequence) -> int:
        """How many tokens of ``seq`` have committed KV."""
        ...

    def nbytes(self, seq: Sequence, rows: int) -> int:
        """The bytes of KV storage for ``seq`` once it has ``rows`` rows, committed and provisional ones together."""
        ...

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        """Frees the KV of ``seqs``."""
        ...


@runtime_checkable
class HasPrefixes(Protocol):
    """An engine that keeps KV of finished texts.

    Attributes:
        prefix_nbytes: its memory, in bytes.
    """

    @property
    def prefix_nbytes(self) -> int: ...


@runtime_checkable
class TakesPrompts(Engine, Protocol):
    """An engine that goes on behind a prompt which the model has read by itself."""

    def take(self, seq: Sequence, prompt: PromptKV) -> None:
        """Instead of `begin`: commits the rows of ``prompt``, which are those of all tokens of ``seq``'s prompt but the
        last one.

        Raises:
            ModelError: if its KV isn't such as this engine keeps, or the engine goes on otherwise than the model.
        """
        ...


@runtime_checkable
class Branches(Engine, Protocol):
    """An engine whose beams share the KV of one text. Beam search needs one."""

    def keep(self, seq: Sequence, nodes: SequenceOf[int], committed: int) -> None:
        """Keeps the KV of ``nodes`` of the last tree, and drops all other provisional KV.

        Args:
            nodes: in ascending order. Those behind the committed ones become the first nodes of the next tree.
            committed: how many of ``nodes``, the first ones, are committed.
        """
        ...

    def branch(self, seq: Sequence, of: Sequence, nodes: SequenceOf[int]) -> None:
        """Makes KV rows of ``of`` visible under ``seq``, until the next `branch` or `release` of ``seq``.

        These are the committed rows of ``of``, and behind them ``nodes`` of those that `keep` kept. `committed` and
        `hidden` of ``seq`` then read them. ``seq`` has no KV of its own.
        """
        ...
