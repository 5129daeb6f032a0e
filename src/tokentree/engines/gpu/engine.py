"""The engine on kernels of our own: a step is one recording, and bits depend on absolute positions alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from triton.errors import TritonError

from tokentree.engines.base import EngineInfo, NotCopied
from tokentree.engines.cpu.quantized import draft_linear
from tokentree.engines.drafting import BlockEngine, DraftEngine, Features
from tokentree.engines.gpu.attending import CHUNK
from tokentree.engines.gpu.forward import Forward
from tokentree.engines.gpu.inputs import MOVES, Inputs, Piece
from tokentree.engines.gpu.kv_forward import KVForward, Size, Sizes
from tokentree.engines.gpu.pages import Pages, SharedPages, Text
from tokentree.engines.gpu.quantized import linear
from tokentree.engines.gpu.recording import Recording
from tokentree.engines.gpu.rows import BEST
from tokentree.engines.gpu.tiles import MANY
from tokentree.engines.gpu.weights import read
from tokentree.engines.output import TargetOutput
from tokentree.engines.plan import EnginePlan
from tokentree.engines.prepared import Prepared
from tokentree.engines.self_check import Routes, compare
from tokentree.errors import ModelError, PairingError
from tokentree.exclusive import Exclusive, exclusive, neutral
from tokentree.sequence import Sequence
from tokentree.tree import Ints, TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokentree.heads.block import BlockHead
    from tokentree.heads.eagle import EagleHead
    from tokentree.heads.mtp import MtpHead

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # numbers of rows that are recorded
TEXTS = 256  # at a time
OuterLayers = tuple[
    Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor],
    Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
]  # fmt: skip
Said = tuple[torch.Tensor, tuple[NDArray[np.float32], Ints] | None, NDArray[np.float32] | None]
KV_PART = 0.6  # of the memory that is free, at most, for KV
KV_TOKENS = 1 << 18  # of all texts, at most, by default


class TritonEngine(NotCopied):
    """Verifies trees with kernels of our own, on a CUDA device.

    A row has the same bits in any batch, any tree and any number of rows, prompt or not. So a text is plain decoding's,
    bit for bit. Nothing of a tree is in a recording: one for each number of rows serves all.

    Args:
        prepared: a model of `weights.FAMILIES` in bfloat16, which was asked what it says by itself. Its weights are
            taken in 8 bits if it says so, which is lossy; trees are lossless to the model in 8 bits.
        prefix_bytes: KV of finished texts that is kept for texts that begin alike, in bytes.
        tokens: of all texts, that there is room for in KV; by default as many as memory allows, up to 262,144.
        drops: whether weights are dropped from an owned model while they are copied: no other engine can be made of it
            then.

    Attributes:
        caveat: see `EngineInfo`.
        pages: the KV of all texts.
        sizes: numbers of rows that are recorded. A forward is padded to the next one, and the largest is a limit.

    Raises:
        ModelError: if the model can't be run so.
    """

    attention, execution = "tree", "kernels of our own"
    sizes: tuple[int, ...] = ROWS
    recorded = traced = False
    crowds: tuple[int, ...] = (9,)  # rows beside which a row's bits are compared with those that it has alone

    @neutral()
    def __init__(
        self, prepared: Prepared, prefix_bytes: int = 0, tokens: int | None = None, drops: bool = False
    ) -> None:  # fmt: skip
        if reason := self._without_kernels(prepared):
            raise ModelError(f"no kernels of ours run {prepared.name}: {reason}")
        self.lock, self._guard, self.caveat = Exclusive(), prepared.guard, ""
        self.facts, self.config, self.quantization = prepared.facts, prepared.config, prepared.quantization
        self.context, self.device, self.dtype = self.facts.context, prepared.device, prepared.dtype
        self._sizes = sizes = self._read_model(prepared, drops and prepared.owned)
        self.vocab_size = sizes.vocab_size
        longest = self.context + self.sizes[-1]  # rows of a text, with a tree behind the last one
        most, count = -(-longest // CHUNK), 1 + -(-(self._tokens(longest) if tokens is None else tokens) // CHUNK)
        self.pages = Pages(sizes.layers, sizes.kv_heads, sizes.head_size, count, TEXTS, most, self.device)
        self._shared = SharedPages(self.pages, prefix_bytes)
        self._inputs = {rows: Inputs(rows, self.device) for rows in self.sizes}
        self._said = torch.zeros(self.sizes[-1], 2 * BEST + 1, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self._places: list[int] = []
        self._texts: dict[int, tuple[Sequence, Text]] = {}
        self._branches: dict[int, tuple[Sequence, list[int]]] = {}
        self._records = self.device.type == "cuda"
        self._make_forward()

    @classmethod
    def of(cls, prepared: Prepared, plan: EnginePlan, prefix_bytes: int) -> Self:
        """As ``plan`` has it."""
        return cls(prepared, prefix_bytes, drops=plan.otherwise is None)

    def _tokens(self, least: int) -> int:
        """Room for KV by default: as much as memory allows, but no less than so much."""
        row = 2 * self._sizes.layers * self._sizes.kv_heads * self._sizes.head_size * 2
        if self.device.type != "cuda":
            return 4 * least
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(least, min(KV_TOKENS, int(KV_PART * free) // row))

    # -- what runs: another engine has another forward ---------------------------------------------------------------

    @staticmethod
    def _without_kernels(prepared: Prepared) -> str | None:
        """Why it can't be run so."""
        return prepared.without_kernels

    def _read_model(self, prepared: Prepared, drops: bool) -> Sizes:
        """Takes what the forward needs of a model."""
        self.weights = read(prepared.copy, self.context, drops, self.quantization is not None)
        return self.weights.sizes

    def _new_forward(self) -> KVForward:
        return Forward(self.weights, self.pages, self.sizes[-1], self._places)

    def _outer_layers(self) -> OuterLayers:
        w = self.weights

        def embedding(ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.embedding(ids, w.embedding) * w.embedding_scale

        def head(hidden: torch.Tensor) -> torch.Tensor:
            logits = linear(hidden, w.head, w.head_bias)
            return torch.tanh(logits / w.cap) * w.cap if w.cap else logits

        def rows_of_head(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return w.head[ids].clone(), None if w.head_bias is None else w.head_bias[ids].clone()

        return embedding, head, rows_of_head

    def _make_forward(self) -> None:
        self._forward = self._new_forward()
        self._recordings: dict[Size, Recording[None]] = {}

    # -- one forward -----------------------------------------------------------------------------------------------

    def _run(self, pieces: SequenceOf[Piece], head_rows: int) -> None:
        """Computes all ``pieces``, and logits of so many rows."""
        rows, deepest = sum(piece.count for piece in pieces), 0
        if rows > self.sizes[-1]:
            raise ModelError(f"{rows} rows in one forward, and there may be {self.sizes[-1]}")
        for piece in pieces:
            levels = int(piece.tree.depths.max()) + 1
            deepest = max(deepest, levels)
            if piece.text.length + levels > self.context:
                raise ModelError(f"a node behind the last of the model's {self.context} positions")
            self._reserve(piece.text, piece.text.length + len(piece.tree))
        moves = self._moves()
        branched = any(not piece.tree.is_chain for piece in pieces)
        wide = (one for one in self.sizes if one >= rows and (not branched or self._inputs[one].depth >= deepest))
        if (fits := next(wide, None)) is None:
            raise ModelError(f"a tree of depth {deepest}, and one with branches may have {self.sizes[-1]}")
        inputs = self._inputs[fits]
        itemized = inputs.fill(pieces, moves, self._sizes.group)
        head = fits if head_rows and fits <= MANY else next((size for size in self.sizes if size >= head_rows > 0), 0)
        size = Size(fits, head, fits > MANY or not itemized)
        if not self._records:
            self._forward.run(inputs, size.rows, size.head_rows, size.long)
            return
        if size not in self._recordings:  # it runs before it is recorded, and what moved once must not move again
            self._forward.move(inputs)
            inputs.device["num_moves"].zero_()
            pool = next((one.pool for one in self._recordings.values()), None)
            self._recordings[size] = Recording(
                lambda: self._forward.run(inputs, size.rows, size.head_rows, size.long), pool
            )
        self._recordings[size].play()

    def _reserve(self, text: Text, rows: int) -> None:
        """Makes room for so many rows, if need be by forgetting what is kept of finished texts.

        Raises:
            ModelError: if there is none.
        """
        wanted = -(-rows // CHUNK) - len(text.pages)
        while wanted > self.pages.free and self._shared.nbytes:  # what live texts have too frees nothing
            self._shared.evict((wanted - self.pages.free) * self.pages.page_nbytes)
        self.pages.reserve(text, rows)

    def _moves(self) -> Ints:
        """What `Text.keep` left to do, of all texts: done by the forward that comes now, before anything else."""
        waiting = [text for _, text in self._texts.values() if len(text.moves)]
        if not waiting:
            return np.zeros((0, 2), np.int64)
        moves = np.concatenate([text.moves for text in waiting])
        for text in waiting:
            text.moves = text.moves[:0]
        while len(moves) > MOVES:  # as many as go into one forward's inputs
            self._move(moves[:MOVES])
            moves = moves[MOVES:]
        return moves

    def _flush(self, text: Text) -> None:
        """Does what `Text.keep` left to do."""
        if len(text.moves):
            self._move(text.moves)
            text.moves = text.moves[:0]

    def _move(self, moves: Ints) -> None:
        inputs = self._inputs[self.sizes[0]]
        inputs.fill([], moves, self._sizes.group)
        self._forward.move(inputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- the protocol ----------------------------------------------------------------------------------------------

    @property
    def signature(self) -> str:
        """What the cost of a forward depends on: model, engine, dtype and device."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "interpreted"
        return f"{self.facts.size}, kernels of our own, {self.quantization or 'bfloat16'}, {device}"

    @property
    def prefix_nbytes(self) -> int:
        """See `HasPrefixes`."""
        return self._shared.nbytes

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            self.facts.name, self.vocab_size, self.context, tuple(self.ends), self.device, self.dtype,
            "tree", self.execution, self.signature, self.caveat, self.pages.nbytes, scores_prompts=True,
        )  # fmt: skip

    def changed(self) -> str | None:
        """What has changed, in words, in a loaded model since this engine was made of it; None if nothing has."""
        return self._guard.changed()

    @property
    def ends(self) -> list[int]:
        """See `TransformersEngine`."""
        return self._guard.ends

    @property
    def model(self) -> PreTrainedModel:
        raise ModelError("here the model doesn't attend by itself: use attention='sdpa'")

    @exclusive
    def begin(self, seq: Sequence) -> int:
        self._guard.before_text(bool(self._texts))
        text = self._text(seq)
        if text.pages:
            return 0
        live = [(_ids(other, one), one) for other, one in list(self._texts.values()) if one is not text]
        return self._shared.fill(text, np.array(seq.tokens[: seq.reusable], np.int64), live)

    @exclusive
    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        reused, text = self.begin(seq), self._text(seq)
        self._read(text, seq.tokens[text.length : -1 if upto is None else upto])
        return reused

    @exclusive
    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None,
        reading: SequenceOf[tuple[Sequence, int]] = (),
    ) -> TargetOutput:  # fmt: skip
        started = time.perf_counter()
        firsts = [0] * len(seqs) if firsts is None else list(firsts)
        pieces = [Piece(self._text(seq), tree, first) for seq, tree, first in zip(seqs, trees, firsts, strict=True)]
        starts = np.cumsum([0, *(piece.count for piece in pieces)]).tolist()
        row, read = starts.pop(), dict[int, range]()
        for seq, count in reading:
            if seq.scores_prompt:
                pieces += self._parts(seq, count)
                read[seq.id] = range(row, row + count)
                row += count
        self._guard.before_forward("logits" if pieces else "kv")
        groups = _groups([piece for piece in pieces if piece.count], self.sizes[-1])
        rows = sum(piece.count for piece in groups[-1]) if groups else 0
        prompts = self._prompts([one for one in reading if one[0].id not in read], self.sizes[-1] - rows)
        said = [_copied(self._ask(group)) for group in groups[:-1]]
        said.append(self._ask([*(groups[-1] if groups else []), *prompts], rows))
        logits, best, sums = said[0] if len(said) == 1 else _behind_one_another(said)
        seconds = time.perf_counter() - started
        return TargetOutput(logits, starts, firsts, seconds, best, sums, read)

    def _parts(self, seq: Sequence, count: int) -> list[Piece]:
        """So many of its next tokens, each part as long as a forward may be."""
        text, most = self._text(seq), self.sizes[-1]
        ids = seq.tokens[text.length : text.length + count]
        parts = [ids[start : start + most] for start in range(0, count, most)]
        return [Piece(text, TokenTree.chain(part[0], part[1:]), read=True) for part in parts]

    def _prompts(self, reading: SequenceOf[tuple[Sequence, int]], room: int) -> list[Piece]:
        """So many of the next tokens of each, as far as there is room for rows; what is more is read now."""
        left, prompts = sum(count for _, count in reading), list[Piece]()
        for seq, count in reading:
            text = self._text(seq)
            ids = seq.tokens[text.length : text.length + count]
            now = min(len(ids), max(0, left - room))
            self._read(text, ids[:now])
            left -= now
            if ids[now:]:
                prompts.append(Piece(text, TokenTree.chain(ids[now], ids[now + 1 :]), read=True))
        return prompts

    def _read(self, text: Text, ids: SequenceOf[int]) -> None:
        """Commits rows for ``ids``."""
        for start in range(0, len(ids), self.sizes[-1]):
            part = ids[start : start + self.sizes[-1]]
            self._run([Piece(text, TokenTree.chain(part[0], part[1:]))], 0)
            text.length += len(part)
            self._wait()

    def _ask(self, pieces: SequenceOf[Piece], rows: int | None = None) -> Said:
        """Computes ``pieces``. Logits of the first ``rows`` rows, by default of all, hold until the next forward; then
        come the most probable tokens, and the logarithms of the sums of exponentials."""
        rows = sum(piece.count for piece in pieces) if rows is None else rows
        if pieces:
            self._run(pieces, rows)
        for piece in pieces:
            piece.text.length += piece.count * piece.read
        self._said[:rows].copy_(self._forward.best[:rows], non_blocking=True)
        self._wait()
        said = self._said[:rows].numpy().copy()
        floats = said.view(np.float32)
        best = floats[:, BEST : 2 * BEST].copy(), said[:, :BEST].astype(np.int64)
        return self._forward.logits[:rows], best if rows else None, floats[:, 2 * BEST].copy() if rows else None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @exclusive
    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        for seq, path in zip(seqs, paths, strict=True):
            self.keep(seq, path, len(path))

    @exclusive
    def keep(self, seq: Sequence, nodes: SequenceOf[int], committed: int) -> None:
        text = self._text(seq)
        self._flush(text)  # where no forward came between
        text.keep(nodes, committed)

    @exclusive
    def rewind(self, seq: Sequence, rows: int) -> None:
        text = self._text(seq)
        self._flush(text)
        self.pages.rewind(text, rows)

    def committed(self, seq: Sequence) -> int:
        if seq.id in self._branches:
            of, nodes = self._branches[seq.id]
            return self._text(of).length + len(nodes)
        return self._text(seq).length

    def branch(self, seq: Sequence, of: Sequence, nodes: SequenceOf[int]) -> None:
        self._branches[seq.id] = of, list(nodes)

    def nbytes(self, seq: Sequence, rows: int) -> int:
        return -(-rows // CHUNK) * self.pages.page_nbytes

    @property
    def bytes_per_token(self) -> int:
        """Of the KV, with all layers."""
        return self.pages.page_nbytes // CHUNK

    @exclusive
    def release(self, seqs: SequenceOf[Sequence]) -> None:
        for seq in seqs:
            self._branches.pop(seq.id, None)
            if seq.id in self._texts:
                _, text = self._texts.pop(seq.id)
                self._flush(text)
                self._shared.keep(_ids(seq, text), text)
                self.pages.close(text)

    def _text(self, seq: Sequence) -> Text:
        if seq.id not in self._texts:
            self._texts[seq.id] = seq, self.pages.open()
        return self._texts[seq.id][1]

    def check(self) -> None:
        """Raises `InvariantError` if the counts of pages are wrong."""
        self._shared.check()
        self.pages.check([text for _, text in self._texts.values()], self._shared)

    # -- hidden states ---------------------------------------------------------------------------------------------

    @exclusive
    def capture(self, places: SequenceOf[int] | None = None) -> Features:
        size, num_layers = self.facts.hidden_size, self.facts.num_layers
        asked = [num_layers] if places is None else list(places)
        if not all(0 <= place <= num_layers for place in asked):
            raise PairingError(f"{self.facts.name} has hidden states 0 to {num_layers}, not {asked}")
        if new := sorted({*asked} - {*self._places}):
            if self._texts:
                raise PairingError("hidden states can't be asked for while texts are being decoded")
            self._shared.clear()
            self._places = sorted([*self._places, *new])
            self.pages.keep_states(len(self._places), size)
            self._make_forward()

        return Features(
            size, num_layers, *self._outer_layers(), draft_linear, self.dtype, self.device,
            self.device.type == "cuda",
        )  # fmt: skip

    def hidden(self, seq: Sequence, place: int | None = None) -> torch.Tensor:
        return self.hidden_rows(seq, [self.facts.num_layers if place is None else place], 0, self.context)[0]

    def hidden_rows(self, seq: Sequence, places: SequenceOf[int], first: int, end: int) -> torch.Tensor:
        of, nodes = self._branches.get(seq.id, (seq, []))
        text = self._text(of)
        self._flush(text)
        rows = np.concatenate([np.arange(text.length), text.length + np.array(nodes, np.int64)])[first:end]
        slots = torch.from_numpy(text.slots(rows)).to(self.device)
        return torch.stack([self.pages.states[self._places.index(place), slots] for place in places])

    def block_engine(self, head: BlockHead) -> BlockEngine:
        from tokentree.engines.block_call import blocks_of  # few need what it imports

        return blocks_of(head, self)

    def layer_engine(self, head: MtpHead) -> DraftEngine:
        from tokentree.engines.mtp import MtpEngine  # it imports transformers' model classes

        return MtpEngine(head, self)

    def head_engine(self, head: EagleHead) -> DraftEngine:
        from tokentree.engines.gpu.eagle import TritonEagle  # few need what these import
        from tokentree.engines.peagle import eagle_engine

        return TritonEagle(head, self) if TritonEagle.fits(head, self) else eagle_engine(head, self)

    @property
    def places(self) -> list[int]:
        """The hidden states that are kept, in their order in `Pages.states`."""
        return self._places

    def slots_of(self, seq: Sequence, rows: Ints) -> Ints:
        """Where the hidden states of these committed rows lie now."""
        text = self._text(seq)
        slots = text.slots(rows)
        for source, target in text.moves:
            slots[slots == target] = source
        return slots

    @exclusive
    def hidden_states(self, ids: SequenceOf[int], places: SequenceOf[int] | None = None) -> torch.Tensor:
        """[len(ids), places x hidden size]: the hidden states of a text, beside one another, once `capture` was called
        for them."""
        text = self.pages.open()
        try:
            self._read(text, ids)
            slots = torch.from_numpy(text.slots(np.arange(text.length))).to(self.device)
            picked = [self._places.index(place) for place in ([self.facts.num_layers] if places is None else places)]
            return self.pages.states[picked][:, slots].transpose(0, 1).flatten(1)
        finally:
            self.pages.close(text)

    def hidden_states_of(
        self, texts: SequenceOf[SequenceOf[int]], places: SequenceOf[int] | None = None
    ) -> list[torch.Tensor]:
        """`hidden_states` of several texts."""
        return [self.hidden_states(ids, places) for ids in texts]

    # -- at construction -------------------------------------------------------------------------------------------

    @exclusive
    def _check_trees(self, own: Mapping[str, torch.Tensor]) -> None:
        """Raises `ModelError` unless trees give what the model says by itself, see `self_check.own_forward`, or if a
        row has other bits alone than in a tree."""
        a, b, c, d, e, f, g = own["tokens"].tolist()
        other, text, got = d - 1 if d else 1, self.pages.open(), list[torch.Tensor]()
        records, self._records = self._records, False  # a recording would keep what routers choose here

        def said(nodes: list[int], parents: list[int], path: SequenceOf[int]) -> torch.Tensor:
            tree, rows = TokenTree(np.array(nodes), np.array(parents)), np.full(len(nodes), -1)
            rows[list(path)] = sum(map(len, got)) + np.arange(len(path))
            with Routes(own, rows):
                self._try(text, tree)
            return self._forward.logits[: len(tree)].float()

        def keep(logits: torch.Tensor, path: list[int]) -> None:
            got.append(logits[path])
            text.keep(path, len(path))
            self._flush(text)

        try:
            keep(said([a, b, other, c, d, c, d], [-1, 0, 0, 1, 2, 2, 3], [0, 1, 3, 6]), [0, 1, 3, 6])
            beside = [[token % self.vocab_size for token in range(count)] for count in self.crowds]
            crowd = [said([e, *others], [-1, *(0 for _ in others)], [0])[:1] for others in beside]
            alone = said([e], [-1], [0])
            steady = all(torch.equal(one, alone) for one in crowd)
            keep(alone, [0])
            keep(said([f, other, g, g], [-1, 0, 1, 0], [0, 3]), [0, 3])
        finally:
            self.pages.close(text)
            self._records = records
        error, allowed, spread = compare(own, torch.cat(got).to(own["logits"].device), self.quantization is not None)
        if not error <= allowed:
            raise ModelError(
                f"kernels of our own give other logits than {self.facts.name} "
                f"(off by {error:.3g} where logits spread by {spread:.3g})"
            )
        if not steady:
            raise ModelError(f"on this device the bits of {self.facts.name}'s rows depend on how many there are")
        if self._records:
            self._record_trees()

    def _record_trees(self) -> None:
        """Records forwards over all numbers of rows that one tree has, before any request waits for it."""
        for rows in (size for size in self.sizes if size <= MANY):
            text = self.pages.open()
            try:
                self._try(text, TokenTree.chain(0, [0] * (rows - 1)))
            finally:
                self.pages.close(text)

    def _try(self, text: Text, tree: TokenTree) -> None:
        """A forward over ``tree``.

        Raises:
            ModelError: if this GPU, or this version of Triton, can't, or a model's own modules can't so.
        """
        try:
            self._run([Piece(text, tree)], len(tree))
            self._wait()
        except (RuntimeError, TypeError, LookupError, TritonError) as error:
            raise ModelError(f"kernels of our own can't be run here: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _groups(pieces: list[Piece], most: int) -> list[list[Piece]]:
    """Pieces that fit into one forward of ``most`` rows, and so on, in order."""
    groups, rows = list[list[Piece]](), most
    for piece in pieces:
        if rows + piece.count > most:
            groups.append([])
            rows = 0
        groups[-1].append(piece)
        rows += piece.count
    return groups


def _copied(said: Said) -> Said:
    """What holds longer than until the next forward."""
    logits, *rest = said
    return logits.clone(), *rest  # type: ignore[return-value]


def _behind_one_another(said: list[Said]) -> Said:
    parts = [(logits, best, sums) for logits, best, sums in said if best is not None and sums is not None]
    best = tuple(np.concatenate([best[i] for _, best, _ in parts]) for i in (0, 1))
    return torch.cat([logits for logits, _, _ in parts]), best, np.concatenate([sums for _, _, sums in parts])  # type: ignore[return-value]


def _ids(seq: Sequence, text: Text) -> Ints:
    """The tokens of the committed rows."""
    return np.array(seq.tokens[: text.length], np.int64)
