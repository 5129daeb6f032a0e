"""The engine protocols, and what engines return: all that the decoder and the drafters know of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.errors import ModelError, RequestError
from tokentree.exclusive import Exclusive
from tokentree.growing import Best
from tokentree.kernels.topk import top_logits
from tokentree.sampling import NOT_NUMBERS
from tokentree.sequence import Accepted, Sequence
from tokentree.tree import Floats, Ints, TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tokentree.engines.model_facts import Facts
    from tokentree.heads.assistant import AssistantHead
    from tokentree.heads.block import BlockHead, BlockSizes
    from tokentree.heads.eagle import EagleHead
    from tokentree.heads.markov import Markov
    from tokentree.heads.mtp import MtpHead
    from tokentree.prompt_kv import PromptKV

CPU = torch.device("cpu")
Logits = torch.Tensor | Callable[[], torch.Tensor]
KEPT = 8  # of the most probable tokens after each node, which the rules and Token Recycling read
CANDIDATES = 10  # tokens that a block engine keeps of each place


def tensor_of(logits: Logits) -> torch.Tensor:
    """Logits that a forward returned."""
    return logits() if callable(logits) else logits


@dataclass(eq=False)
class TargetOutput:
    """The logits of one forward over the nodes of several trees.

    Args:
        given: its logits [rows, vocab], or a function that returns them: most steps read `top` alone. The rows of a
            tree are consecutive, and trees come in the order of the batch.
        starts: the first row of each tree.
        firsts: the node of each tree that its first row belongs to. Earlier nodes were computed by an earlier forward.
        seconds: how long the forward took.
        best_known: the result of `top`, if the engine has computed it already.
        log_sums: float32[rows], the log-sum-exp of each row of logits, if the engine has computed it.
        read: by `Sequence.id`, of each text whose `Sequence.scores_prompt` was set: the rows that follow its tokens
            that were read last.
    """

    given: Logits
    starts: list[int]
    firsts: list[int]
    seconds: float
    best_known: tuple[NDArray[np.float32], Ints] | None = field(default=None, repr=False)
    log_sums: NDArray[np.float32] | None = field(default=None, repr=False)
    read: Mapping[int, range] = field(default_factory=dict)

    @property
    def all_logits(self) -> torch.Tensor:
        """[rows, vocab]."""
        self.given = tensor_of(self.given)
        return self.given

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
        """The k most probable tokens after each row, best first: logits float32[rows, k] and ids int64[rows, k].

        The first call computes them. Later calls with the same or a smaller k reuse them.
        """
        if self.best_known is None or self.best_known[1].shape[1] < k:
            vocab = self.all_logits.shape[1]
            if self.best_known is None or self.best_known[1].shape[1] < min(k, vocab):
                self.best_known = top_logits(self.all_logits, min(max(k, KEPT), vocab))
        values, ids = self.best_known
        return (values, ids) if values.shape[1] == k else (values[:, :k], ids[:, :k])

    def best(self, tree: int, nodes: SequenceOf[int], k: int) -> Best | None:
        """The k most probable tokens after each of ``nodes``, or more. None if the engine hasn't computed them."""
        if self.best_known is None or self.log_sums is None or self.best_known[1].shape[1] < k:
            return None
        return np.array([self.row(tree, node) for node in nodes], np.int64), *self.best_known, self.log_sums

    def of(self, trees: SequenceOf[int]) -> TargetOutput:
        """The output of these ``trees`` alone. Tree ``trees[i]`` gets the number i."""
        if len(trees) == len(self.starts):
            return self
        return replace(self, starts=[self.starts[tree] for tree in trees], firsts=[self.firsts[tree] for tree in trees])

    def after(self, tree: int) -> _TreeLogits:
        """The logits of tree number ``tree``, as an acceptance rule reads them."""
        return _TreeLogits(self, tree)

    def row(self, tree: int, node: int) -> int:
        """The row of `all_logits` that follows ``node`` of tree number ``tree``.

        Raises:
            IndexError: if an earlier forward computed that node.
        """
        if node < self.firsts[tree]:
            raise IndexError(f"node {node} was computed by an earlier forward")
        return self.starts[tree] + node - self.firsts[tree]


class _TreeLogits:
    """`acceptance.NodeLogits` of one tree."""

    def __init__(self, out: TargetOutput, tree: int) -> None:
        self.out, self.tree = out, tree

    def __call__(self, node: int) -> torch.Tensor:
        return self.out.logits(self.tree, node)

    def follow(self, tree: TokenTree) -> Accepted:
        values, ids = self.out.top(KEPT)
        first = self.out.row(self.tree, 0)
        rows = slice(first, first + len(tree))
        largest, best = values[rows, 0].tolist(), ids[rows, 0].tolist()
        # a tree is small: in Python this takes less than the way into a compiled loop
        tokens, path, node, refused = tree.tokens.tolist(), [0], 0, False
        for other, parent in enumerate(tree.parents.tolist()):
            if parent == node:
                refused = tokens[other] != best[node]
                if not refused:
                    node = other
                    path.append(node)
        said = [best[node] for node in path]
        for place, node in enumerate(path):
            if math.isnan(largest[node]):
                return Accepted(path[:place], said[:place], error=RequestError(NOT_NUMBERS))
        return Accepted(path, said, refused)


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


class Engine(Protocol):
    """Owns the target's weights and KV. Every method takes a batch. KV is stored per `Sequence.id`.

    These seven methods are all that decoding needs. The protocols `HasHiddenStates`, `HeadEngines` and `Branches` hold
    what only some engines have. Test for them with ``isinstance``.

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


@runtime_checkable
class TransformersEngine(HeadEngines, Branches, Rewinds, Protocol):
    """An engine of a transformers model.

    Attributes:
        facts: properties of the model, beside its weights.
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
        """The tokens at which transformers' ``generate`` ends a text of the model. They are read from a loaded model at
        each call.

        Raises:
            ModelError: if the generation configuration names something that isn't a token.
        """
        ...

    @property
    def signature(self) -> str:
        """See `EngineInfo`."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """The KV of one token, in all layers."""
        ...

    def changed(self) -> str | None:
        """What has changed in the loaded model since this engine was made of it, in words. None if nothing has."""
        ...

    def hidden_states(self, ids: SequenceOf[int], places: SequenceOf[int] | None = None) -> torch.Tensor:
        """[len(ids), places x hidden size]: the hidden states ``places`` of a text. The places are concatenated along
        the last axis. `capture` must have been called for them."""
        ...

    def hidden_states_of(
        self, texts: SequenceOf[SequenceOf[int]], places: SequenceOf[int] | None = None
    ) -> list[torch.Tensor]:
        """`hidden_states` of each of ``texts``."""
        ...
