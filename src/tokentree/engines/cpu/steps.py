"""A whole forward in one compiled call: which steps there are, and the memory that they share.

A program is a list of steps: a norm, a product, rotary positions, attention, and so on, for each layer. `step_loops`
says what each of them is told, and runs the list.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tokentree.engines.cpu.fused import FusedNorm, GemmaNorm, HeadNorms
from tokentree.engines.cpu.linear import PackedEmbedding, PackedLinear, ScaledEmbedding
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.cpu.short_convolution import ShortConvolution
from tokentree.engines.cpu.step_loops import (
    AS_IT_IS,
    ATTEND,
    BEST,
    CONVOLVE,
    COPY,
    COUNTERS,
    EMBED,
    GATE,
    IN_8_BITS,
    MULTIPLY,
    MULTIPLY_INT4,
    MULTIPLY_INT8,
    NORM,
    NORM_HEADS,
    NORM_HEADS_ONCE,
    NORM_ONCE,
    PREPARE,
    RECORDS,
    ROTARY,
    SCALE,
    STEP,
    WIDER,
    AttendStep,
    BestStep,
    ConvolveStep,
    CopyStep,
    EmbedStep,
    ForwardCall,
    GateStep,
    InputForm,
    NormHeadsStep,
    NormStep,
    PrepareStep,
    RotaryStep,
    ScaleStep,
    forward_worker,
)
from tokentree.engines.cpu.turns import Turns
from tokentree.engines.kv import KVLayout
from tokentree.engines.recurrent import Recurrence
from tokentree.engines.segment import Segment
from tokentree.errors import ModelError
from tokentree.jit import njit
from tokentree.kernels.attention import AttentionCall
from tokentree.kernels.threads import address, num_threads, rest, run
from tokentree.kernels.tile import BFLOAT16_WIDE, BLOCK
from tokentree.tree import Ints

Step = tuple[int, tuple[Any, ...]]  # its kind, and what it is told: a `NamedTuple`, see `RECORDS`
LOGITS, VALUES, TOKENS, SUMS = (1 + BestStep._fields.index(name) for name in ("logits", "values", "tokens", "sums"))
NOTHING, NO_IDS = np.empty(0, np.float32), np.empty(0, np.int64)


class Heads(Protocol):
    """The sizes of an attention; `window` counts positions."""

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def window(self) -> int | None: ...


@dataclass(frozen=True)
class OwnHeads:
    """`Heads` of a model whose modules don't have them."""

    heads: int
    kv_heads: int
    width: int
    scale: float
    window: int | None = None


class Stretch(NamedTuple):
    """Steps ``first`` to ``end``, on rows that are turned so.

    Args:
        ids: int64[rows], if a step reads the tokens.
    """

    first: int
    end: int
    segments: SequenceOf[Segment]
    turns: Turns
    ids: Ints = NO_IDS


@dataclass(frozen=True)
class Rows:
    """Where a layer's intermediate results are, [rows, columns] each; ``gates`` are those that a step gates."""

    residual: torch.Tensor
    normed: torch.Tensor
    added: torch.Tensor
    gates: torch.Tensor
    inner: torch.Tensor
    qkv: torch.Tensor
    queries: torch.Tensor
    attended: torch.Tensor


@dataclass(frozen=True)
class Behind:
    """What a layer has behind its attention: its output, the norm in front of its gated MLP, and that."""

    o_proj: Any
    norm: FusedNorm
    gate_up: Any
    down_proj: Any


class Steps:
    """A forward as a list of steps, and the memory that they share: the rows' intermediate results.

    A subclass says which steps there are, in `build`, whenever there must be room for more rows. Steps read memory by
    address. So the sizes of all that they read are checked when they are built, and those of KV and rows at each run;
    and tensors that they read are kept, whatever their owner does with them.

    Args:
        widest: numbers that the widest product takes of a row.
    """

    def __init__(self, widest: int) -> None:
        self._widest, self._capacity = -(-widest // 128) * 128, 0
        self._numbers: list[np.ndarray] = []
        self._memory: list[torch.Tensor] = []
        self._windows: set[int | None] = set()
        self._tokens = 0  # that all steps know which look them up
        self._stored: dict[int, tuple[int, int]] = {}  # by layer that a step stores or reads: KV heads, their width
        self._recurrences: list[Recurrence] = []  # in the order of the steps that have them
        self._turned: dict[int, int] = {}  # by table of cosines and sines that a step reads: its width
        # those that have been checked against that
        self._fitting: KVLayout | None = None
        self._turning: object = None

    def build(self) -> list[Step]:
        """The steps, in memory from `room`."""
        raise NotImplementedError

    def reserve(self, rows: int) -> None:
        """Makes room for so many rows."""
        if rows <= self._capacity:
            return
        self._capacity = max(64, 1 << (rows - 1).bit_length())
        self._numbers, self._memory, self._windows = [], [], set()
        self._fitting = self._turning = None
        self._recurrences = []
        self._prepared = self.room(self._widest, torch.float32)
        self._scales, self._totals = (self.room(self._widest // 32, torch.float32) for _ in range(2))
        steps = self.build()
        self._steps = np.zeros((len(steps), STEP), np.int64)  # a step's kind, then its fields
        self._counters = np.zeros((len(steps), COUNTERS), np.int64)
        recurring = [place for place, (kind, _) in enumerate(steps) if kind == CONVOLVE]
        self._recurring = recurring[-1] + 1 if recurring else 0  # steps, with the last one that has a state
        self._addresses = self._steps.ctypes.data, self._counters.ctypes.data
        for row, (kind, fields) in zip(self._steps, steps, strict=True):
            row[0], dtype = kind, RECORDS[kind]
            told = row[1 : 1 + dtype.itemsize // 8].view(dtype)
            told[0] = fields
        fields_of_last_but_one: Any = RECORDS[steps[-2][0]].fields
        place = fields_of_last_but_one.get("results", (None, -8))[1]
        self._results = 1 + place // 8  # where a product's results are told, if it is one

    def room(self, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """[rows, columns], kept as long as the steps are."""
        self._memory.append(torch.empty(self._capacity, columns, dtype=dtype))
        return self._memory[-1]

    def run(
        self, count: int, segments: SequenceOf[Segment], turns: Turns, ids: Ints = NO_IDS, first: int = 0
    ) -> None:  # fmt: skip
        """Runs one stretch, steps ``first`` to ``count``: see `run_all`."""
        self.run_all([Stretch(first, count, segments, turns, ids)])

    def run_all(self, stretches: SequenceOf[Stretch]) -> None:
        """Runs ``stretches`` in one call, one after another. No step may be in two of them.

        Raises:
            IndexError: if a token is none of the embedding's, or a row or a position is none of those that there is
                room for.
            ModelError: if the KV or the states of a segment, or rotary positions, have other sizes than the steps.
        """
        told = [len(stretches)]
        for stretch in stretches:
            told += self._told(stretch)
        run(forward_worker(), told)
        for stretch in stretches:
            for segment in self._recurring_in(stretch):
                segment.kv.recurrent.hold(segment.prefix, segment.count if segment.read else 0)

    def _told(self, stretch: Stretch) -> list[int]:
        """What `forward_worker` is told of it."""
        first, end, segments, turns, ids = stretch
        rows = len(turns.places)
        self._check(segments, turns, rows)
        fits, known, places_at, ids_at = _begin(self._counters, turns.places, turns.positions, ids, self._tokens)
        if rows > self._capacity or not fits:
            raise IndexError(f"there is room for {self._capacity} rows, and positions up to {turns.positions}")
        if not known:
            raise IndexError(f"a token id is outside the embedding of {self._tokens}")
        steps_at, counters_at = self._addresses
        recurring = self._recurring_in(stretch)
        for segment in recurring:
            self._make_room(segment)
        states = [segment.state_rows(0) for segment in recurring]
        call = ForwardCall(
            rows=rows, threads=num_threads(), rest=rest(), num_steps=end - first, steps=steps_at + 8 * STEP * first,
            counters=counters_at + 8 * COUNTERS * first, num_segments=len(segments), turns=turns.at, places=places_at,
            ids=ids_at, num_states=len(states),
        )  # fmt: skip
        told = list[int](call)
        for part in [*[segment.described(0) for segment in segments], *states]:
            told += part
        return told

    def _recurring_in(self, stretch: Stretch) -> SequenceOf[Segment]:
        """The segments whose states its steps move."""
        return stretch.segments if stretch.first < self._recurring else ()

    @staticmethod
    def _make_room(segment: Segment) -> None:
        """Readies the states of a segment for its rows.

        Raises:
            ModelError: if they are in disorder.
        """
        states = segment.kv.recurrent
        states.check(segment.prefix)
        states.reserve(segment.prefix, min(states.back, segment.count) if segment.read else len(segment.tree))

    def _check(self, segments: SequenceOf[Segment], turns: Turns, rows: int) -> None:
        """See `run_all`."""
        if turns.tables is not self._turning:
            for place, width in self._turned.items():
                if place >= len(turns.tables) or any(part.shape[1] != width for part in turns.tables[place]):
                    raise ModelError(f"heads of {width} numbers have no rotary positions of that width")
            self._turning = turns.tables
        for segment in segments:
            if segment.start + segment.count > rows:
                raise IndexError(f"a segment ends at row {segment.start + segment.count} of {rows}")
            if segment.kv.layout is not self._fitting:
                for layer, sizes in self._stored.items():
                    segment.kv.layout.check(layer, *sizes)
                if segment.kv.layout.recurrences != tuple(self._recurrences):
                    raise ModelError("the states of a text have other sizes than the model's layers")
                self._fitting = segment.kv.layout
            segment.windows |= self._windows

    def _at(self, tensor: torch.Tensor, dtype: torch.dtype, *sizes: int) -> int:
        """The address of a tensor of these sizes, which is kept as long as the steps are."""
        self._memory.append(tensor.detach())  # of a parameter, not the parameter, which its owner may give other memory
        return address(tensor, dtype, *sizes)

    # -- the kinds of steps ----------------------------------------------------------------------------------------

    @staticmethod
    def embeds(embedding: Any) -> bool:
        """Whether `embed` can look up the rows of ``embedding``."""
        if type(embedding) is ScaledEmbedding:
            return Steps.embeds(embedding.table)
        plain = type(embedding) is nn.Embedding and embedding.weight.dtype is torch.bfloat16
        return plain or type(embedding) is PackedEmbedding

    def embed(self, embedding: Any, result: torch.Tensor) -> list[Step]:
        """Looks up the rows' tokens."""
        if isinstance(embedding, ScaledEmbedding):
            scaled = ScaleStep(result.data_ptr(), result.shape[1], result.stride(0), float(embedding.scale))
            return [*self.embed(embedding.table, result), (SCALE, scaled)]
        count, width = int(embedding.num_embeddings), result.shape[1]
        self._tokens = min(self._tokens or count, count)
        packed = isinstance(embedding, PackedEmbedding)
        if packed:
            table = self._at(embedding.weight, torch.int32, -(-count // BLOCK), width // 2, BLOCK)
        else:
            table = self._at(embedding.weight, torch.bfloat16, count, width)
        return [(EMBED, EmbedStep(table, width, int(packed), result.data_ptr(), result.stride(0)))]

    def norm(
        self, norm: FusedNorm, x: torch.Tensor, result: torch.Tensor, before: PackedLinear | QuantizedLinear | None,
        update: torch.Tensor | None = None,
    ) -> list[Step]:  # fmt: skip
        """Adds ``update`` to ``x``, norms it, and makes what the layer ``before`` which the norm comes takes."""
        form, width = InputForm() if before is None else self._form(before), x.shape[1]
        _same(width, result.shape[1], width if update is None else update.shape[1])
        weight = self._at(norm.weight, torch.float32, width)
        fields = NormStep(
            residual=x.data_ptr(), update=0 if update is None else update.data_ptr(), width=width, weight=weight,
            eps=float(norm.eps), result=result.data_ptr(), stride=result.stride(0), form=form,
        )  # fmt: skip
        return [(NORM_ONCE if isinstance(norm, GemmaNorm) else NORM, fields)]

    def norm_heads(self, norms: HeadNorms, qkv: torch.Tensor) -> list[Step]:
        """Norms queries and keys, which ``qkv`` begins with, each head by itself."""
        heads, width = norms.weights.shape
        _same(max(heads * width, qkv.shape[1]), qkv.shape[1])
        weights = self._at(norms.weights, torch.float32, heads, width)
        fields = NormHeadsStep(qkv.data_ptr(), qkv.stride(0), heads, width, weights, float(norms.eps))
        return [(NORM_HEADS_ONCE if norms.once else NORM_HEADS, fields)]

    def prepare(self, before: PackedLinear | QuantizedLinear, x: torch.Tensor) -> list[Step]:
        """Makes of ``x`` what the layer ``before`` which that comes takes."""
        form = self._form(before)
        return [(PREPARE, PrepareStep(x.data_ptr(), x.shape[1], form))] if form.kind != AS_IT_IS else []

    def gate(self, before: PackedLinear | QuantizedLinear, x: torch.Tensor, result: torch.Tensor) -> list[Step]:
        """gelu(g) * u of ``x``, which has g and u, and makes what the layer ``before`` which that comes takes."""
        width = result.shape[1]
        _same(x.shape[1], 2 * width)
        return [(GATE, GateStep(x.data_ptr(), width, result.data_ptr(), self._form(before)))]

    def multiply(self, layer: PackedLinear | QuantizedLinear, x: torch.Tensor, y: torch.Tensor | None) -> list[Step]:
        """``layer`` of ``x``, which was prepared, into ``y``; None: see `write_to`."""
        results, prepared = 0 if y is None else y.data_ptr(), self._prepared.data_ptr()
        _same(layer.num_inputs, x.shape[1])
        _same(layer.num_results, layer.num_results if y is None else y.shape[1])
        self._memory += [layer.weight, layer.start]
        if isinstance(layer, QuantizedLinear):
            call = layer.call(prepared, self._scales.data_ptr(), self._totals.data_ptr(), results)
            return [(MULTIPLY_INT8 if layer.bits == 8 else MULTIPLY_INT4, call)]
        source, word = (prepared, 4) if BFLOAT16_WIDE else (x.data_ptr(), 2)
        return [(MULTIPLY, layer.call(source, word * x.shape[1], results))]

    def output(self, head: PackedLinear | QuantizedLinear, x: torch.Tensor, kept: int) -> list[Step]:
        """The output layer of ``x``, and the ``kept`` most probable tokens of each row: the last two steps. `write_to`
        says where."""
        best = BestStep(stride=len(head.start), vocab=head.num_outputs, kept=kept)
        return [*self.multiply(head, x, None), (BEST, best)]

    def write_to(
        self,
        logits: NDArray[np.int16],
        values: NDArray[np.float32],
        tokens: Ints,
        sums: NDArray[np.float32] | None = None,
    ) -> None:
        """Where the last two steps write from now on.

        Args:
            logits: for bfloat16[rows, tokens that the output layer has, with what fills up a block].
            values, tokens: float32[rows, kept], int64[rows, kept].
            sums: float32[rows], for the logarithms of the sums of a row's exponentials, or None.
        """
        _write_to(self._steps[-2:], self._results, logits, values, tokens, NOTHING if sums is None else sums)

    def most_probable(
        self, logits: torch.Tensor, vocab: int, values: torch.Tensor, tokens: torch.Tensor, sums: torch.Tensor,
        divisors: torch.Tensor,
    ) -> list[Step]:  # fmt: skip
        """The most probable tokens of each row of ``logits``, which have ``vocab`` columns and what fills up a block.

        Args:
            values, tokens: float32 and int64[rows, kept], logits and ids, best first.
            sums: float32[rows, 1], for the logarithms of the sums of a row's exponentials.
            divisors: float32[rows, 1], of the logits in these sums.
        """
        _same(values.shape[1], tokens.shape[1], min(vocab, tokens.shape[1]))
        _same(vocab, min(vocab, logits.shape[1]))
        best = BestStep(
            stride=logits.shape[1], vocab=vocab, kept=tokens.shape[1], logits=logits.data_ptr(),
            values=values.data_ptr(), tokens=tokens.data_ptr(), sums=sums.data_ptr(), divisors=divisors.data_ptr(),
        )  # fmt: skip
        return [(BEST, best)]

    def rotary(
        self, index: int, sizes: Heads, qkv: torch.Tensor, queries: torch.Tensor, table: int = 0
    ) -> list[Step]:  # fmt: skip
        """Gives queries and keys their rotary positions, of that ``table``, and stores keys and values as layer
        ``index``."""
        _same((sizes.heads + 2 * sizes.kv_heads) * sizes.width, qkv.shape[1])
        _same(sizes.heads * sizes.width, queries.shape[1])
        _same(sizes.width, self._turned.setdefault(table, sizes.width))
        self._stored[index] = sizes.kv_heads, sizes.width
        fields = RotaryStep(index, table, sizes.heads, sizes.kv_heads, sizes.width, qkv.data_ptr(), queries.data_ptr())
        return [(ROTARY, fields)]

    def attend(self, index: int, sizes: Heads, queries: torch.Tensor, result: torch.Tensor) -> list[Step]:
        """Attention over what layer ``index`` has stored."""
        width, heads = sizes.width, sizes.heads
        _same(heads * width, queries.shape[1], result.shape[1])
        _same(heads % sizes.kv_heads, 0)
        self._windows.add(sizes.window)
        self._stored[index] = sizes.kv_heads, width
        call = AttentionCall(
            queries=queries.data_ptr(), queries_head=4 * width, queries_row=4 * heads * width,
            results=result.data_ptr(), results_head=2 * width, results_row=2 * heads * width,
            width=width, value_width=width, group=heads // sizes.kv_heads, window=sizes.window or 0, chunk=0,
            biases=0, biases_head=0, chosen=0, most=0, relative=0, extent=0, heads=heads, segments=0, rounded=1,
        )  # fmt: skip
        self._numbers.append(np.array([sizes.scale, 0.0]))
        return [(ATTEND, AttendStep(index, self._numbers[-1].ctypes.data, call))]

    def convolve(
        self, layer: ShortConvolution, gates: torch.Tensor, result: torch.Tensor
    ) -> list[Step]:  # fmt: skip
        """The convolution of ``gates``, which has B, C and x, and makes what its last product takes."""
        taps, width = layer.weight.shape
        _same(gates.shape[1], 3 * width)
        _same(result.shape[1], width)
        column = sum(one.row for one in self._recurrences)
        self._recurrences.append(layer.recurrence)
        fields = ConvolveStep(
            gates=gates.data_ptr(), width=width, taps=taps, weight=self._at(layer.weight, torch.float32, taps, width),
            bias=self._at(layer.bias, torch.float32, width), column=column, result=result.data_ptr(),
            form=self._form(layer.out_proj),
        )  # fmt: skip
        return [(CONVOLVE, fields)]

    def rows_of_a_layer(self, hidden: int, inner: int, sizes: Heads, gates: int = 0) -> Rows:
        """Room for a layer's intermediate results, ``gates`` of which a step gates."""
        wide = sizes.heads * sizes.width
        return Rows(
            residual=self.room(hidden), normed=self.room(hidden), added=self.room(hidden), gates=self.room(gates),
            inner=self.room(inner), qkv=self.room(wide + 2 * sizes.kv_heads * sizes.width),
            queries=self.room(wide, torch.float32), attended=self.room(wide),
        )  # fmt: skip

    def after_rotary(self, index: int, sizes: Heads, layer: Behind, at: Rows) -> list[Step]:
        """A layer from its attention on; what its gated MLP gives is left in ``at.added``, for the next norm to add."""
        steps = self.attend(index, sizes, at.queries, at.attended)
        steps += self.prepare(layer.o_proj, at.attended)
        steps += self.multiply(layer.o_proj, at.attended, at.added)
        return steps + self.gated_mlp(layer.norm, layer.gate_up, layer.down_proj, at)

    def gated_mlp(self, norm: FusedNorm, gate_up: Any, down_proj: Any, at: Rows) -> list[Step]:
        """Adds ``at.added`` to the rows, and leaves in its place what the MLP behind a ``norm`` gives."""
        steps = self.norm(norm, at.residual, at.normed, gate_up, at.added)
        steps += self.multiply(gate_up, at.normed, at.inner)
        steps += self.prepare(down_proj, at.inner)
        return steps + self.multiply(down_proj, at.inner, at.added)

    def copy(self, x: torch.Tensor, result: torch.Tensor) -> list[Step]:
        """Keeps ``x``."""
        _same(x.shape[1], result.shape[1])
        return [(COPY, CopyStep(x.data_ptr(), result.data_ptr(), x.shape[1]))]

    def _form(self, layer: PackedLinear | QuantizedLinear) -> InputForm:
        """How ``layer`` takes its inputs, and where."""
        _same(max(self._widest, layer.width), self._widest)
        if isinstance(layer, QuantizedLinear):
            _same(max(self._scales.shape[1], layer.groups), self._scales.shape[1])
            return InputForm(
                kind=IN_8_BITS, prepared=self._prepared.data_ptr(), groups=layer.groups, group=layer.group,
                scales=self._scales.data_ptr(), totals=self._totals.data_ptr(),
            )  # fmt: skip
        return InputForm(kind=WIDER if BFLOAT16_WIDE else AS_IT_IS, prepared=self._prepared.data_ptr())


@njit(cache=True)
def _begin(counters: Ints, places: Ints, end: int, ids: Ints, tokens: int) -> tuple[bool, bool, int, int]:
    """Sets ``counters`` to 0. Whether all ``places`` lie before ``end``, and all ``ids`` before ``tokens``, where these
    are looked up; and where places and ids lie, 0 where there are no ids."""
    counters[:] = 0
    known = not len(ids) or not tokens or _within(ids, tokens)
    # of an unsigned and a signed integer numba would make a float
    ids_at: int = np.int64(ids.ctypes.data) if len(ids) else 0  # type: ignore[assignment]
    return _within(places, end), known, places.ctypes.data, ids_at


@njit(cache=True)
def _write_to(
    last: Ints, results: int, logits: NDArray[np.int16], values: NDArray[np.float32], tokens: Ints,
    sums: NDArray[np.float32],
) -> None:  # fmt: skip
    """Tells the last two steps."""
    last[0, results] = last[1, LOGITS] = logits.ctypes.data
    last[1, VALUES], last[1, TOKENS] = values.ctypes.data, tokens.ctypes.data
    last[1, SUMS] = sums.ctypes.data if len(sums) else 0


@njit
def _within(numbers: Ints, end: int) -> bool:
    """Whether there are any, all from 0 to below ``end``."""
    for number in numbers:
        if not 0 <= number < end:
            return False
    return len(numbers) > 0


def _same(*sizes: int) -> None:
    if len({*sizes}) > 1:
        raise ModelError(f"the sizes of this model's layers don't fit each other: {', '.join(map(str, sizes))}")
