"""What engines share that keep the KV of each sequence in storage of their own: all but the forward."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.engines.base import EngineInfo, NotCopied
from tokentree.engines.cpu.linear import weights_of
from tokentree.engines.cpu.quantized import draft_linear
from tokentree.engines.drafting import BlockEngine, DraftEngine, Features
from tokentree.engines.guard import Unwatched
from tokentree.engines.kv import KVLayout, SequenceKV, Storages
from tokentree.engines.model_facts import Facts
from tokentree.engines.output import KEPT, Logits, TargetOutput, tensor_of
from tokentree.engines.prefix import LEAST, PrefixCache
from tokentree.engines.segment import Segment, Upto
from tokentree.engines.self_check import compare, in_trees
from tokentree.errors import ModelError, PairingError
from tokentree.exclusive import Exclusive, exclusive
from tokentree.kernels.threads import num_threads
from tokentree.kernels.topk import top_logits
from tokentree.prompt_kv import PromptKV
from tokentree.sequence import Sequence
from tokentree.tree import Ints, TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from tokentree.heads.assistant import AssistantHead
    from tokentree.heads.block import BlockHead
    from tokentree.heads.eagle import EagleHead
    from tokentree.heads.mtp import MtpHead

PREFILL_ROWS = 256


class KVEngine(NotCopied, ABC):
    """Verifies trees; a subclass has the forward.

    The rows of all sequences go through the model as one batch row, without padding; only attention tells them apart.

    Args:
        facts: of the model.
        vocab_size: width of its logits.
        layout: of its KV.
        dtype: of its logits.
        quantization: see `TorchEngine`.
        prefix_bytes: KV of finished sequences that is kept for texts that begin alike, in bytes.
        guard: tells whether a loaded model is still what this engine was made of.

    Attributes:
        attention: "tree", or "sdpa" where the model attends by itself.
        caveat: see `EngineInfo`.
        recorded: whether forwards are recordings on a GPU.
        traced: whether torch has compiled the forward, or will.
    """

    attention: str
    caveat = ""
    recorded = False
    traced = False

    def __init__(
        self, facts: Facts, vocab_size: int, layout: KVLayout, dtype: torch.dtype, quantization: str | None,
        prefix_bytes: int, guard: Unwatched,
    ) -> None:  # fmt: skip
        self.lock = Exclusive()
        self.facts, self.vocab_size, self.context = facts, vocab_size, facts.context
        self.device, self.dtype, self.quantization = layout.device, dtype, quantization
        self._guard, self._storages, self._on_gpu = guard, Storages(layout), self.device.type == "cuda"
        self._places: list[int] = []  # of the hidden states that are kept
        self._kv: dict[int, tuple[Sequence, SequenceKV]] = {}
        self._branches: dict[int, tuple[Sequence, list[int]]] = {}
        self._prefixes = PrefixCache(prefix_bytes)
        for rows in (1, 2):  # compiled before any request waits for it
            top_logits(torch.zeros(rows, vocab_size, dtype=dtype, device=self.device), min(KEPT, vocab_size))

    # -- what a subclass has ---------------------------------------------------------------------------------------

    @abstractmethod
    def _forward(self, segments: SequenceOf[Segment], upto: Upto, rows: int | None = None) -> Logits:
        """Logits [rows, vocab] of the first ``rows`` rows, by default of all; if they aren't asked for, of any or none.
        Writes KV and hidden states."""

    @abstractmethod
    def _capture(self, places: list[int]) -> None:
        """Keeps the hidden states ``places`` from now on: all of `_places`, and new ones.

        Raises:
            PairingError: if it can't.
        """

    @abstractmethod
    def _outer_layers(self) -> tuple[Any, Any]:
        """The embedding and the output layer, None where there is none."""

    @property
    @abstractmethod
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""

    @property
    @abstractmethod
    def execution(self) -> str:
        """How the forward runs, in words."""

    def _most_probable(self) -> tuple[NDArray[np.float32], Ints] | None:
        """What the last forward found of `TargetOutput.top` beside its logits."""
        return None

    def _check_windows(self, windows: set[int | None]) -> None:
        """Raises `ModelError` if layers asked for other sliding ``windows`` than the model's configuration has."""

    @property
    def model(self) -> PreTrainedModel:
        """What it runs, where that is a transformers model that attends by itself.

        Raises:
            ModelError: where it isn't: by default on CPUs.
        """
        raise ModelError("here the model doesn't attend by itself: use attention='sdpa'")

    def changed(self) -> str | None:
        """What has changed, in words, in a loaded model since this engine was made of it; None if nothing has."""
        return self._guard.changed()

    @property
    def ends(self) -> list[int]:
        """See `TransformersEngine`."""
        return self._guard.ends

    # -- the protocol ----------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            self.facts.name, self.vocab_size, self.context, tuple(self.ends), self.device, self.dtype,
            self.attention, self.execution, self.signature, self.caveat, keeps=self._storages.layout.keeps,
            state_bytes=self._storages.layout.text_nbytes, scores_prompts=True,
        )  # fmt: skip

    @property
    def prefix_nbytes(self) -> int:
        """See `HasPrefixes`."""
        return self._prefixes.nbytes

    @property
    def signature(self) -> str:
        """What the cost of a forward depends on: model, engine, dtype, device and threads."""
        on_cpu = self.device.type == "cpu"
        device = f"cpu {num_threads()} threads" if on_cpu else torch.cuda.get_device_name(self.device)
        numbers = self.quantization or str(self.dtype).removeprefix("torch.")
        return f"{self.facts.size}, {self.execution}, {numbers}, {device}"

    @exclusive
    def begin(self, seq: Sequence) -> int:
        kv = self._kv_of(seq)
        if kv.length:
            return 0
        live = [
            (_ids(other, known), known)
            for other, known in list(self._kv.values())
            if known is not kv and not known.is_private
        ]
        tokens = np.array(seq.tokens[: seq.reusable], np.int64)
        reused = self._prefixes.fill(kv, tokens, live)
        if kv.recurrent.recurrences and (known := self._prefixes.known(tokens, live)) >= reused + LEAST:
            kv.recurrent.mark = known
        return reused

    @exclusive
    def take(self, seq: Sequence, prompt: PromptKV) -> None:
        kv, layout, name = self._kv_of(seq), self._storages.layout, self.facts.name
        shapes = tuple((len(keys), keys.shape[-1], values.shape[-1]) for keys, values in prompt.layers)
        if layout.recurrences or self.recorded or shapes != layout.shapes:
            why = "is recorded as a graph" if self.recorded else "keeps more or other things than its cache has"
            raise ModelError(f"{name} can't go on behind a prompt that it read by itself: it {why} here")
        kv.reserve(prompt.rows + 1)
        for layer, (keys, values) in enumerate(prompt.layers):
            kv.write(layer, prompt.rows - keys.shape[1], keys, values)
        kv.length, kv.shift, kv.is_private = prompt.rows, prompt.shift, True
        last = self._chain(kv, seq.tokens[prompt.rows : prompt.rows + 1], 0)
        got = tensor_of(self._guarded([last], "logits"))[:1].float()
        error, allowed, spread = compare({"logits": prompt.logits[None]}, got, self.quantization is not None)
        if not error <= allowed:
            raise ModelError(
                f"{name} goes on otherwise behind such a prompt than by itself (off by {error:.3g} where logits spread "
                f"by {spread:.3g})"
            )

    @exclusive
    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        reused, kv = self.begin(seq), self._kv_of(seq)
        last = len(seq.tokens) - 1 if upto is None else upto
        self._read_to_mark(kv, seq.tokens, last)
        self._read(kv, seq.tokens[kv.length : last])
        self._remember(kv, seq)
        return reused

    @exclusive
    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None,
        reading: SequenceOf[tuple[Sequence, int]] = (),
    ) -> TargetOutput:  # fmt: skip
        started = time.perf_counter()
        firsts = [0] * len(seqs) if firsts is None else list(firsts)
        segments, starts, start = [], [], 0
        for seq, tree, first in zip(seqs, trees, firsts, strict=True):
            kv = self._kv_of(seq)
            kv.reserve(kv.length + len(tree))
            starts.append(start)
            if first < len(tree):
                segments.append(Segment(kv, tree, first, start))
            start += len(tree) - first
        rows, prompts, read = start, list[Segment](), dict[int, range]()
        for seq, count in sorted(reading, key=lambda one: not one[0].scores_prompt):  # rows with logits come first
            kv = self._kv_of(seq)
            end = kv.length + count
            self._read_to_mark(kv, seq.tokens, end)
            prompts.append(self._chain(kv, seq.tokens[kv.length : end], start))
            start += prompts[-1].count
            if seq.scores_prompt:
                read[seq.id] = range(rows, start)
                rows = start
        logits = self._guarded([*segments, *prompts], "logits" if rows else self._upto_kv, rows)
        for prompt in prompts:
            prompt.kv.commit(range(prompt.count))
        for seq, _ in reading:
            self._remember(self._kv_of(seq), seq)
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        return TargetOutput(logits, starts, firsts, seconds, self._most_probable(), read=read)

    @exclusive
    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        for seq, path in zip(seqs, paths, strict=True):
            self._kv_of(seq).commit(path)

    @exclusive
    def keep(self, seq: Sequence, nodes: SequenceOf[int], committed: int) -> None:
        self._kv_of(seq).keep(nodes, committed)

    @exclusive
    def rewind(self, seq: Sequence, rows: int) -> None:
        kv = self._kv_of(seq)
        kv.length = min(kv.length, rows)

    def committed(self, seq: Sequence) -> int:
        if seq.id in self._branches:
            of, nodes = self._branches[seq.id]
            return self._kv_of(of).length + len(nodes)
        return self._kv_of(seq).length

    def branch(self, seq: Sequence, of: Sequence, nodes: SequenceOf[int]) -> None:
        self._branches[seq.id] = of, list(nodes)

    def nbytes(self, seq: Sequence, rows: int) -> int:
        layout = self._storages.layout
        if seq.id in self._kv:
            kv = self._kv[seq.id][1]
            return kv.grown(rows) * layout.row_nbytes + max(kv.recurrent.nbytes, layout.text_nbytes)
        return layout.capacity(max(rows, self._first_rows(seq))) * layout.row_nbytes + layout.text_nbytes

    @exclusive
    def release(self, seqs: SequenceOf[Sequence]) -> None:
        for seq in seqs:
            self._branches.pop(seq.id, None)
            if seq.id in self._kv:
                _, kv = self._kv.pop(seq.id)
                self._storages.give([kv] if kv.is_private else self._prefixes.keep(_ids(seq, kv), kv))

    @exclusive
    def capture(self, places: SequenceOf[int] | None = None) -> Features:
        embedding, head = self._outer_layers()
        if head is None:
            raise PairingError(f"{self.facts.name} has no output layer, whose inputs heads read")
        size, num_layers = self.facts.hidden_size, self.facts.num_layers
        asked = [num_layers] if places is None else list(places)
        if not all(0 <= place <= num_layers for place in asked):
            raise PairingError(f"{self.facts.name} has hidden states 0 to {num_layers}, not {asked}")
        if new := sorted({*asked} - {*self._places}):
            if self._kv:
                raise PairingError("hidden states can't be asked for while texts are being decoded")
            places = sorted([*self._places, *new])
            self._capture(places)
            self._prefixes.clear()
            self._places = places
            layout = replace(self._storages.layout, states=len(self._places), width=size, state_dtype=self.dtype)
            self._storages = Storages(layout)

        def weights(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return weights_of(head, ids, size, self.dtype)

        return Features(
            size, num_layers, embedding, head, weights, draft_linear, self.dtype, self.device, self.recorded
        )  # fmt: skip

    def hidden(self, seq: Sequence, place: int | None = None) -> torch.Tensor:
        kv, above = self.rows_of(seq)
        states = kv.states[self._places.index(self.facts.num_layers if place is None else place)]
        committed = states[: kv.length]
        return torch.cat([committed, states[above]]) if above else committed

    def hidden_rows(self, seq: Sequence, places: SequenceOf[int], first: int, end: int) -> torch.Tensor:
        kv, above = self.rows_of(seq)
        if above:
            return torch.stack([self.hidden(seq, place)[first:end] for place in places])
        rows = kv.states[:, first : min(end, kv.length)]
        return rows if [*places] == self._places else rows[[self._places.index(place) for place in places]]

    @property
    def layout(self) -> KVLayout:
        """Of its KV."""
        return self._storages.layout

    def rows_of(self, seq: Sequence) -> tuple[SequenceKV, list[int]]:
        """Where the KV of ``seq`` lies: its committed rows, and of a branch, what rows stand behind these."""
        of, nodes = self._branches.get(seq.id, (seq, []))
        kv = self._kv_of(of)
        return kv, [kv.length + node for node in nodes]

    def block_engine(self, head: BlockHead) -> BlockEngine:
        from tokentree.engines.block_call import blocks_of  # few need what it imports

        return blocks_of(head, self)

    def layer_engine(self, head: MtpHead) -> DraftEngine:
        from tokentree.engines.mtp import MtpEngine  # it imports transformers' model classes

        return MtpEngine(head, self)

    def assistant_engine(self, head: AssistantHead) -> DraftEngine:
        from tokentree.engines.assistant import AssistantEngine  # it imports transformers' model classes

        return AssistantEngine(head, self)

    def head_engine(self, head: EagleHead) -> DraftEngine:
        from tokentree.engines.peagle import eagle_engine  # few need what it imports

        return eagle_engine(head, self)

    @exclusive
    def hidden_states(self, ids: SequenceOf[int], places: SequenceOf[int] | None = None) -> torch.Tensor:
        """[len(ids), places x hidden size]: the hidden states of a text, beside one another, once `capture` was called
        for them."""
        kv = self._storages.layout.make(len(ids))
        self._read(kv, ids)
        picked = [self._places.index(place) for place in ([self.facts.num_layers] if places is None else places)]
        return kv.states[picked, : kv.length].transpose(0, 1).flatten(1)

    def hidden_states_of(
        self, texts: SequenceOf[SequenceOf[int]], places: SequenceOf[int] | None = None
    ) -> list[torch.Tensor]:
        """`hidden_states` of several texts."""
        return [self.hidden_states(ids, places) for ids in texts]

    @property
    def bytes_per_token(self) -> int:
        """Of the KV, with all layers."""
        sizes = [heads * (key_width + value_width) for heads, key_width, value_width in self._storages.layout.shapes]
        return sum(sizes) * self._storages.layout.dtype.itemsize

    # -- what a forward needs --------------------------------------------------------------------------------------

    def _kv_of(self, seq: Sequence) -> SequenceKV:
        if seq.id not in self._kv:
            self._guard.before_text(busy=bool(self._kv))
            self._kv[seq.id] = seq, self._storages.take(self._first_rows(seq))
        return self._kv[seq.id][1]

    def _first_rows(self, seq: Sequence) -> int:
        most = min(len(seq.prompt_ids) + seq.params.max_tokens, self.context)
        return self._storages.layout.first_rows(len(seq.tokens), most)

    def _read(self, kv: SequenceKV, ids: SequenceOf[int]) -> None:
        """Commits rows for ``ids``."""
        for begin in range(0, len(ids), PREFILL_ROWS):
            chunk = self._chain(kv, ids[begin : begin + PREFILL_ROWS], 0)
            self._guarded([chunk], self._upto_kv)
            kv.commit(range(chunk.count))

    def _read_to_mark(self, kv: SequenceKV, tokens: SequenceOf[int], end: int) -> None:
        """Commits rows up to where a checkpoint is wanted, if that lies before ``end``, and keeps one there."""
        if kv.length < kv.recurrent.mark < end:
            self._read(kv, tokens[kv.length : kv.recurrent.mark])
            kv.recurrent.remember()

    def _remember(self, kv: SequenceKV, seq: Sequence) -> None:
        """Keeps a checkpoint behind a prompt that has been read, for texts that begin with it."""
        if kv.recurrent.recurrences and kv.length == len(seq.tokens) - 1 and self._prefixes.keeps_any:
            kv.recurrent.remember()

    @staticmethod
    def _chain(kv: SequenceKV, ids: SequenceOf[int], start: int) -> Segment:
        """The rows of ``ids`` behind those that are committed."""
        kv.reserve(kv.length + len(ids))
        return Segment(kv, TokenTree.chain(ids[0], ids[1:]), 0, start, read=True)

    @property
    def _upto_kv(self) -> Upto:
        """How far a forward goes whose logits nobody needs."""
        return "hidden" if self.facts.num_layers in self._places else "kv"

    def _logits(self, segment: Segment) -> torch.Tensor:
        return tensor_of(self._forward([segment], "logits"))

    def _guarded(self, segments: SequenceOf[Segment], upto: Upto, rows: int | None = None) -> Logits:
        """`_forward`, if the model is still what it was."""
        self._guard.before_forward(upto)
        return self._forward(segments, upto, rows)

    def _keep(self, segments: SequenceOf[Segment], states: torch.Tensor | SequenceOf[torch.Tensor]) -> None:
        """Puts hidden states [rows, hidden size] of each place beside the KV of their rows."""
        for segment in segments if self._places else ():
            first = segment.prefix + segment.first
            for kept, rows in zip(segment.kv.states, states, strict=True):
                kept[first : first + segment.count] = rows[segment.start : segment.start + segment.count]

    @exclusive
    def _check_trees(self, own: Mapping[str, torch.Tensor]) -> None:
        """Raises `ModelError` unless trees give what the model says by itself, see `self_check.own_forward`."""
        room = self._storages.layout.make(64)
        got, windows, steady = in_trees(own, self._logits, room, not self.traced)
        error, allowed, spread = compare(own, got, self.quantization is not None)
        itself = self.attention == "sdpa"
        if not error <= allowed:
            raise ModelError(
                f"{self.facts.name} does not give the same logits under a tree attention mask "
                f"(off by {error:.3g} where logits spread by {spread:.3g})"
                + (": trees can't be verified with it" if itself else "")
            )
        if not itself and not steady:
            self.caveat = (
                f"the bits of {self.facts.name}'s logits depend here on the rows beside one: its text is plain's up "
                "to ties"
            )
        self._check_windows(windows)


def _ids(seq: Sequence, kv: SequenceKV) -> Ints:
    """The tokens of the committed rows."""
    return np.array(seq.tokens[: kv.length], np.int64)
