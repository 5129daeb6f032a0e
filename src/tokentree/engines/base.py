"""What decoder and drafters know of an engine."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.errors import ModelError, RequestError
from tokentree.exclusive import Exclusive
from tokentree.growing import walk
from tokentree.kernels.topk import top_logits
from tokentree.sampling import NOT_NUMBERS
from tokentree.sequence import Accepted, Sequence
from tokentree.tree import Ints, TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tokentree.engines.model_facts import Facts
    from tokentree.heads.eagle import EagleHead

CPU = torch.device("cpu")
KEPT = 8  # of the most probable tokens after each node, which the rules and Token Recycling read


@dataclass(eq=False)
class TargetOutput:
    """What one forward says about the nodes of several trees.

    Args:
        all_logits: [rows, vocab], the rows of all trees behind one another.
        starts: per tree, its first row.
        firsts: per tree, the node that this row belongs to; earlier nodes were computed by an earlier forward.
        seconds: the time of the forward.
        best_known: what `top` gives, where the engine has found it already.
        log_sums: float32[rows], the logarithms of the sums of all exponentials of a row, where it has those too.
    """

    all_logits: torch.Tensor
    starts: list[int]
    firsts: list[int]
    seconds: float
    best_known: tuple[NDArray[np.float32], Ints] | None = field(default=None, repr=False)
    log_sums: NDArray[np.float32] | None = field(default=None, repr=False)

    def logits(self, tree: int, node: int) -> torch.Tensor:
        """[vocab], the raw logits after ``node`` of tree number ``tree``."""
        return self.all_logits[self.row(tree, node)]

    def rows(self, tree: int, nodes: SequenceOf[int]) -> torch.Tensor:
        """[len(nodes), vocab], the raw logits after each of ``nodes``."""
        rows = [self.row(tree, node) for node in nodes]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return self.all_logits[rows[0] : rows[0] + len(rows)]
        return self.all_logits[rows]

    def top(self, k: int) -> tuple[NDArray[np.float32], Ints]:
        """The k most probable tokens after each row, best first: logits float32[rows, k] and ids int64[rows, k]. They
        are looked for once."""
        if self.best_known is None or self.best_known[1].shape[1] < min(k, self.all_logits.shape[1]):
            self.best_known = top_logits(self.all_logits, min(max(k, KEPT), self.all_logits.shape[1]))
        values, ids = self.best_known
        return values[:, :k], ids[:, :k]

    def top_logprobs(self, tree: int, nodes: SequenceOf[int], k: int) -> tuple[NDArray[np.float32], Ints] | None:
        """The k most probable tokens after each of ``nodes``, best first, if the engine has found them:
        log-probabilities float32[nodes, k] and ids int64[nodes, k]."""
        if self.best_known is None or self.log_sums is None or self.best_known[1].shape[1] < k:
            return None
        rows, (values, ids) = [self.row(tree, node) for node in nodes], self.best_known
        return values[rows, :k] - self.log_sums[rows, None], ids[rows, :k]

    def of(self, trees: SequenceOf[int]) -> TargetOutput:
        """The part that speaks of these ``trees``, numbered anew."""
        if len(trees) == len(self.starts):
            return self
        return replace(self, starts=[self.starts[tree] for tree in trees], firsts=[self.firsts[tree] for tree in trees])

    def after(self, tree: int) -> _TreeLogits:
        """What `acceptance` reads of tree number ``tree``."""
        return _TreeLogits(self, tree)

    def row(self, tree: int, node: int) -> int:
        """Where the logits after ``node`` of tree number ``tree`` lie."""
        if node < self.firsts[tree]:
            raise IndexError(f"node {node} was computed by an earlier forward")
        return self.starts[tree] + node - self.firsts[tree]


@dataclass(frozen=True)
class _TreeLogits:
    """`acceptance.NodeLogits` of one tree."""

    out: TargetOutput
    tree: int

    def __call__(self, node: int) -> torch.Tensor:
        return self.out.logits(self.tree, node)

    def follow(self, tree: TokenTree) -> Accepted:
        values, ids = map(np.ascontiguousarray, self.out.top(KEPT))
        first = self.out.row(self.tree, 0)
        nodes, refused, broken = walk(tree.tokens, tree.parents, ids, values, first)
        path, tokens = nodes.tolist(), ids[first + nodes, 0].tolist()
        if broken:
            return Accepted(path[:-1], tokens[:-1], error=RequestError(NOT_NUMBERS))
        return Accepted(path, tokens, refused=refused)


@dataclass(frozen=True, eq=False)
class Features:
    """What drafters that read the target's hidden states need to know of it.

    Args:
        hidden_size: width of a hidden state.
        num_layers: of the target, and so the number of its last hidden state, that after the final norm.
        embedding: makes embeddings [..., hidden size] of token ids.
        output_layer: makes logits [..., vocab] of hidden states [..., hidden size].
        output_weights: given token ids int64[n], the weight [n, hidden size] and bias [n] (or None) of that layer.
        linear: given weight [outputs, inputs] and bias [outputs] (or None), the linear layer for drafts that the engine
            runs fastest; on CPUs it is rounded to 8 bits.
        dtype, device: of hidden states.
        recorded: whether the engine's forwards are recorded, and those of heads may be too.
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


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to be made: what `LLM` was given, under the same names.

    Args:
        dtype, device: of a model that is given by its name.
        attention, quantization, compile: see `TorchEngine`.
        prefix_bytes: KV of finished texts that may be kept for those that begin alike, in bytes.
    """

    dtype: str | torch.dtype | None = None
    device: torch.device | None = None
    attention: str | None = None
    quantization: str | None = None
    compile: bool = False
    prefix_bytes: int = 0


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is.

    Args:
        name: of the model, as messages call it.
        vocab_size: width of the logits.
        context: the most positions that the model can take.
        ends: the tokens that end a text; of a transformers model, those at which ``generate`` ends it.
        device: where it computes; "cpu" or elsewhere decides how many rows of prompts go into a step.
        dtype: of logits.
        attention: "tree" where a row has the same bits in any tree and batch; "sdpa" where the model attends by itself.
        execution: how the forward runs, in words.
        signature: what the cost of a forward depends on: model, engine, dtype, device and threads. Measured costs are
            kept under it; without one they are measured anew.
        caveat: why its text is plain's up to ties, in a sentence, where its attention alone would make it plain's.
        kv_bytes: memory that it has for the KV of all texts, in bytes; None if it takes as much as they need.
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


class NotCopied:
    """What is neither copied nor sent to another process: compiled loops and recordings hold addresses of what an
    engine has."""

    def __reduce__(self) -> NoReturn:
        """It can't be.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "an LLM can't be copied, nor sent to another process: make a new one there; its tokenizer can be"
        )


class DraftEngine(Protocol):
    """What is asked of an engine that holds a draft model; see `Engine`."""

    vocab_size: int
    context: int

    def prefill(self, seq: Sequence, upto: int | None = None) -> int: ...

    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None
    ) -> TargetOutput: ...

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None: ...

    def committed(self, seq: Sequence) -> int: ...

    def release(self, seqs: SequenceOf[Sequence]) -> None: ...


@dataclass(frozen=True, eq=False)
class DraftLevels:
    """A draft that grew without its drafter: levels of at most W nodes with W candidates each.

    Args:
        tokens, log_probs: int64 and float32[levels, W, W], of each level's parents the most probable tokens, best
            first, and their log-probabilities. The first level has one parent, the root.
        chosen: int64[levels, W], the candidates of a level that are the next one's parents, by their numbers in the
            flattened level; without meaning in the last.
    """

    tokens: Ints
    log_probs: NDArray[np.float32]
    chosen: Ints


@runtime_checkable
class GrowsDrafts(DraftEngine, Protocol):
    """An engine that grows whole drafts by itself, on its device."""

    def grow(self, seqs: SequenceOf[Sequence], levels: int) -> list[DraftLevels] | None:
        """So many levels below the last token of each of ``seqs``; None if there are too many of them."""
        ...


class Engine(Protocol):
    """Owns weights and KV. Batch-first: a batch of one is a list of one. KV is kept per `Sequence.id`.

    This is all that decoding needs. What only some engines have is in `HasHiddenStates`, `HeadEngines` and `Branches`;
    who needs that asks for it with ``isinstance``.

    Attributes:
        vocab_size: width of the logits.
        context: the most positions that the model can take.
        lock: whoever decodes holds it for a whole step, since drafters are no use to two threads at once either.
    """

    vocab_size: int
    context: int
    lock: Exclusive

    @property
    def info(self) -> EngineInfo:
        """What it is."""
        ...

    def begin(self, seq: Sequence) -> int:
        """Makes room for a new ``seq``, and takes over the rows of a text that begins alike; returns how many."""
        ...

    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        """Begins ``seq`` and commits KV for its first ``upto`` tokens, as far as it isn't there; by default for all but
        the last. Returns what `begin` did."""
        ...

    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None,
        reading: SequenceOf[tuple[Sequence, int]] = (),
    ) -> TargetOutput:  # fmt: skip
        """One forward over the nodes of all trees, each under its tree attention mask.

        Writes provisional KV; a tree's root takes the position after the committed ones. With ``firsts``, the nodes
        of tree i below ``firsts[i]`` keep the provisional KV of the calls before, and only the others are computed.

        Args:
            reading: sequences that have begun, none of ``seqs``, each with a number of tokens. So many of its next
                tokens go through the same forward, and their KV is committed.
        """
        ...

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        """Makes the KV of ``paths`` permanent (nodes of the last trees, root included) and drops the rest."""
        ...

    def committed(self, seq: Sequence) -> int:
        """How many tokens of ``seq`` have permanent KV."""
        ...

    def nbytes(self, seq: Sequence, rows: int) -> int:
        """Bytes of storage that ``seq`` takes when it has so many rows, committed and provisional."""
        ...

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        """Forgets the KV of ``seqs``."""
        ...


@runtime_checkable
class HasHiddenStates(Engine, Protocol):
    """An engine that keeps the target's hidden states for drafters that read them: Medusa's."""

    def capture(self, places: SequenceOf[int] | None = None) -> Features:
        """From now on the hidden states ``places`` of all rows are kept, beside those asked for before; by default the
        last one. They are numbered as transformers does: i is what layer i reads, and the last one, behind all layers,
        comes after the final norm.

        Raises:
            PairingError: if this engine has no such hidden states, or is decoding.
        """
        ...

    def hidden(self, seq: Sequence, place: int | None = None) -> torch.Tensor:
        """[committed rows, hidden size]: the hidden state ``place`` of the committed rows, by default the last one."""
        ...


@runtime_checkable
class HeadEngines(HasHiddenStates, Protocol):
    """An engine on whose hidden states an EAGLE head drafts."""

    def head_engine(self, head: EagleHead) -> DraftEngine:
        """An engine that drafts with ``head``, on this one's hidden states.

        Raises:
            PairingError: if it doesn't fit.
        """
        ...


@runtime_checkable
class Branches(Engine, Protocol):
    """An engine that decodes the beams of one text over KV that they share."""

    def keep(self, seq: Sequence, nodes: SequenceOf[int], committed: int) -> None:
        """Keeps the KV of ``nodes`` of the last tree, ascending, and drops the rest: the first so many of them become
        permanent, the others are the first nodes of the next tree."""
        ...

    def branch(self, seq: Sequence, of: Sequence, nodes: SequenceOf[int]) -> None:
        """``seq`` has no KV of its own. From now on `committed` and `hidden` answer for it with the committed rows of
        ``of``, followed by ``nodes`` of those that `keep` kept: until the next call, or `release`."""
        ...


@runtime_checkable
class TransformersEngine(HeadEngines, Branches, Protocol):
    """An engine of a transformers model.

    Attributes:
        facts: of the model.
        dtype, device: of its weights.
        caveat: see `EngineInfo`.
    """

    facts: Facts
    dtype: torch.dtype
    device: torch.device
    caveat: str

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        ...

    @property
    def ends(self) -> list[int]:
        """The tokens at which transformers' ``generate`` ends a text of the model. A loaded one is asked each time.

        Raises:
            ModelError: if it names something else there.
        """
        ...

    @property
    def signature(self) -> str:
        """What the cost of a forward depends on."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Of the KV, with all layers."""
        ...

    def changed(self) -> str | None:
        """What has changed, in words, in a loaded model since this engine was made of it; None if nothing has."""
        ...

    def hidden_states(self, ids: SequenceOf[int], places: SequenceOf[int] | None = None) -> torch.Tensor:
        """[len(ids), places x hidden size]: the hidden states of a text, beside one another, once `capture` was called
        for them."""
        ...

    def hidden_states_of(
        self, texts: SequenceOf[SequenceOf[int]], places: SequenceOf[int] | None = None
    ) -> list[torch.Tensor]:
        """`hidden_states` of several texts."""
        ...
