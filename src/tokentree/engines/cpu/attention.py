"""Attention over a committed prefix and a token tree, for all sequences of a forward at once.

`tree_attention` gives a row the same bits however many rows go with it and wherever its ancestors' KV happens to lie,
so that a tree's logits are those of plain decoding, bit for bit: see `attend`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from tokentree.engines.cpu.choosing import choose_rows
from tokentree.engines.recurrent import Recurrence
from tokentree.engines.segment import Segment, end_of, inputs_of
from tokentree.errors import ModelError
from tokentree.kernels.attention import AttentionCall, attend_worker
from tokentree.kernels.recurrence import StateRows
from tokentree.kernels.threads import address, num_threads, run

if TYPE_CHECKING:
    from tokentree.engines.model_facts import Facts

TREE = "tokentree"  # the name of `tree_attention` among transformers' attentions
UNKNOWN = -1  # stands for a mask that no tree has
KNOWN = {"position_ids", "cache_position", "logits_to_keep"}  # what attention may be given, and has no use for


Sees = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of rows and columns: which rows see which


class ForwardKV(Cache):
    """What transformers' modules see as the cache of one forward: the KV of several sequences, side by side.

    The rows of all segments form one batch row; nothing is padded. A model that attends by itself has its new rows
    stored by `update`, and gets all rows back, one sequence behind another, to be seen through a block-diagonal mask.
    For any other, `update` hands on what it is given, and `attend` stores what attention is given: a model's cache may
    hold something else, such as latents, or nothing for some of its layers.

    Args:
        segments: the rows.
        attends_itself: whether the model does.
        padding: rows behind them that only fill up.
    """

    def __init__(self, segments: SequenceOf[Segment], attends_itself: bool, padding: int = 0) -> None:
        super().__init__(layers=[])
        self.segments, self.padding = segments, padding
        self._attends_itself = attends_itself
        self._calls = self._recurred = 0  # attention, indexes and recurrences so far: they come in one order
        self._chosen: torch.Tensor | None = None
        for segment in segments:
            segment.kv.recurrent.check(segment.prefix)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._attends_itself:
            return key_states, value_states
        self.write(layer_idx, key_states[0], value_states[0])
        stored = [(segment.kv.layer(layer_idx), segment.prefix + len(segment.tree)) for segment in self.segments]
        if len(stored) == 1:
            ((keys, values), end), *_ = stored
            return keys[None, :, :end], values[None, :, :end]
        all_keys = [keys[:, :end] for (keys, _), end in stored]
        all_values = [values[:, :end] for (_, values), end in stored]
        # a padding row, if there is one, sees row 0 of the first sequence
        return torch.cat(all_keys, 1)[None], torch.cat(all_values, 1)[None]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:  # fmt: skip
        """See `Attending`."""
        layer, stores = self.segments[0].kv.layout.read_by(self._calls)
        self._calls += 1
        if stores:
            self.write(layer, key, value)
        return attend_rows(self.segments, layer, query.float(), len(key), value.shape[2], rule)

    def knows(self, window: int | None, chunk: int | None, sees: Sees) -> bool:
        """See `Attending`. `attending.attended` has looked."""
        return True

    def chose(self, indices: torch.Tensor) -> bool:
        """See `Attending`."""
        return same_place(self._chosen, indices)

    def choose(self, queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, most: int) -> torch.Tensor:
        """See `Choosing`."""
        layer, _ = self.segments[0].kv.layout.read_by(self._calls)
        self._calls += 1
        for segment in self.segments:
            _check(segment, layer, (1, keys.shape[1], 0), len(queries))
        self.write(layer, keys[None], keys.new_empty(1, len(keys), 0))
        queries, weights = (given.float().contiguous() for given in (queries, weights))
        self._chosen = choose_rows(self.segments, layer, queries, weights, most)
        return self._chosen

    def recur(self, sizes: Recurrence, rows: torch.Tensor, loop: Callable[[list[StateRows]], None]) -> None:
        """See `Recurring`."""
        number = self._recurred
        self._recurred += 1
        for segment in self.segments:
            states = segment.kv.recurrent
            if states.recurrences[number : number + 1] != (sizes,):
                raise ModelError(f"recurrence {number} of a forward keeps {sizes}, and there is no such storage")
            if not segment.read:
                states.store(number, segment.prefix, segment.first, self._own(segment, rows)[:, : sizes.row])
        loop([segment.state_rows(number) for segment in self.segments])
        for segment in self.segments:
            if segment.read:
                read = self._own(segment, rows)[:, : sizes.row]
                segment.kv.recurrent.advance(number, segment.prefix + segment.count, read)
            else:
                segment.kv.recurrent.advance(number, segment.prefix)

    @staticmethod
    def _own(segment: Segment, rows: torch.Tensor) -> torch.Tensor:
        return rows[segment.start : segment.start + segment.count]

    # What transformers' modules ask of recurrent states: there are none that they could go on from by themselves.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores the new rows of all sequences, [heads, rows, width]."""
        for segment in self.segments:
            rows = slice(segment.start, segment.start + segment.count)
            segment.kv.write(layer, segment.prefix + segment.first, keys[:, rows], values[:, rows])

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Nothing is cached before these rows. A layer that asks for itself adds rows' places to that, to get their
        positions: it is told how far each lies from its place."""
        if layer_idx is None:
            return 0
        _, positions = inputs_of(self.segments, self.padding)
        return torch.from_numpy(positions - np.arange(len(positions))).to(self.segments[0].kv.layout.device)

    def update_indexer(self, keys: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """`choose` stores them."""
        return keys

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def dense_masks(
    segments: SequenceOf[Segment], rows: int, facts: Facts, dtype: torch.dtype, device: torch.device,
    columns: int | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A `dense_mask` for each kind of layer."""
    return {
        kind: dense_mask(segments, rows, window, dtype, device, columns, facts.chunks.get(kind))
        for kind, window in facts.windows.items()
    }


def dense_mask(
    segments: SequenceOf[Segment], rows: int, window: int | None, dtype: torch.dtype, device: torch.device,
    columns: int | None = None, chunk: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """[1, 1, rows, columns], additive: what each row sees, for models that attend by themselves; by default there are
    as many columns as KV rows of all segments."""
    seen = np.zeros((rows, columns or sum(s.prefix + len(s.tree) for s in segments)), np.bool_)
    column = 0
    for segment in segments:
        width = segment.prefix + len(segment.tree)
        seen[segment.start : segment.start + segment.count, column : column + width] = segment.visible(window, chunk)
        column += width
    seen[~seen.any(1), 0] = True
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(torch.from_numpy(~seen), torch.finfo(dtype).min)
    return mask[None, None].to(device)


# -- how a model asks for it -----------------------------------------------------------------------------------------


class Biases:
    """What is added to scaled scores by the position of a key. Only differences count: a row takes what each key has
    more than its own.

    Args:
        make: of a number of positions, float32[heads, positions]; the first ones are the same for any number.
    """

    def __init__(self, make: Callable[[int], torch.Tensor]) -> None:
        self._make, self._table = make, torch.empty(0, 0)

    def upto(self, positions: int) -> torch.Tensor:
        """float32[heads, as many positions or more]."""
        if self._table.shape[1] < positions:
            self._table = self._make(max(1024, 1 << (positions - 1).bit_length())).float().contiguous()
        return self._table


@dataclass(frozen=True)
class Rule:
    """How queries, keys and values become what attention gives, and which positions before a row's own it sees.

    Args:
        scale: products of queries and keys are multiplied by it.
        window: positions that are seen, or None: all.
        softcap: scores x become softcap * tanh(x / softcap), or None.
        sinks: float32[heads], a score for each head that counts among the weights and has no value, or None.
        masked: whether a mask tells the window, as where a model attends by itself.
        chunk: a row sees the positions of its own chunk of so many, or None: all.
        biases: what is added to scaled scores, or None.
        chosen: int32[rows, positions], see `Choosing.choose`, or None: all.
        relative: float32[rows, heads, positions], what a row adds to scaled scores by how far a key lies before it, as
            far as that goes, or None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    masked: bool = True
    chunk: int | None = None
    biases: Biases | None = None
    chosen: torch.Tensor | None = None
    relative: torch.Tensor | None = None


class ByDistance(torch.nn.Module):
    """Biases that rows have for keys before them, left as they are by distance: attention adds them.

    Args:
        own: transformers' module, which spreads them over keys.
    """

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own

    def forward(self, states: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[1, heads, rows, positions] of ``states`` [1, rows, heads, width]; elsewhere than in an engine's forward what
        the own module gives."""
        if running() is None:
            spread: torch.Tensor = self.own(states, queries, keys)
            return spread
        biases: torch.Tensor = states @ self.own.proj
        return biases.transpose(1, 2)


class Attending(Protocol):
    """What runs a model's forward, and attends for it."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
        """[rows, heads, value width] of queries [heads, rows, width], and keys and values of the same new rows
        [KV heads, rows, width]."""
        ...

    def knows(self, window: int | None, chunk: int | None, sees: Sees) -> bool:
        """Whether a mask by which ``sees`` tells who sees whom is that of a tree with this window, or such chunks."""
        ...

    def chose(self, indices: torch.Tensor) -> bool:
        """Whether it knows the positions that a module has its attention see alone."""
        ...


@runtime_checkable
class Recurring(Attending, Protocol):
    """What can compute recurrences for it too."""

    def recur(self, sizes: Recurrence, rows: torch.Tensor, loop: Callable[[list[StateRows]], None]) -> None:
        """The next recurrence of the forward.

        Args:
            sizes: what it keeps of a text.
            rows: float32[rows, numbers], what its rows are. The first ``sizes.row`` numbers are kept.
            loop: computes it, with what it is told of each sequence.
        """
        ...


@runtime_checkable
class Choosing(Attending, Protocol):
    """What can choose for an index too."""

    def choose(self, queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, most: int) -> torch.Tensor:
        """int32[rows, positions]: see `choosing.choose_rows`.

        Args:
            queries: [rows, heads, width].
            keys: [rows, width], of the same new rows.
            weights: [rows, heads].
            most: positions that a row sees.
        """
        ...


_running: ContextVar[Attending | None] = ContextVar("attending", default=None)


@contextlib.contextmanager
def attending(forward: Attending) -> Iterator[None]:
    """A model that uses `tree_attention` has ``forward`` attend in here."""
    token = _running.set(forward)
    try:
        yield
    finally:
        _running.reset(token)


def running() -> Attending | None:
    """What attends for the model that runs now, if it isn't the model itself."""
    return _running.get()


def one(
    forward: Attending, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
) -> torch.Tensor:  # fmt: skip
    """[1, heads, rows, value width], as torch's attention gives it."""
    return forward.attend(query[0], key[0], value[0], rule).transpose(0, 1)[None].to(value.dtype)


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' `AttentionInterface`; ``query`` is [1, heads, rows, width], and so on.

    Returns:
        [1, rows, heads, value width], in the model's dtype; padding rows get zeros.
    """
    forward = running()
    if forward is None:
        raise ModelError(f"{type(module).__name__} is asked to attend outside of an engine's forward")
    unknown = sorted(name for name, given in kwargs.items() if name not in KNOWN and torch.is_tensor(given))
    chosen: torch.Tensor | None = None
    if "indices" in unknown and forward.chose(kwargs["indices"]):
        unknown.remove("indices")
        chosen = kwargs["indices"][0] if isinstance(forward, Choosing) else None
    relative: torch.Tensor | None = None
    if "position_bias" in unknown and isinstance(getattr(module, "rel_logits_proj", None), ByDistance):
        unknown.remove("position_bias")
        relative = kwargs["position_bias"][0].transpose(0, 1).float().contiguous()
    if unknown:
        raise ModelError(f"{type(module).__name__} gives its attention {', '.join(unknown)}, which is unknown here")
    window, chunk = sliding_window, None
    if attention_mask is not None:  # it decides, as it does where a model attends by itself
        window, chunk = window_and_chunk(module, attention_mask)
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    sinks = None if s_aux is None else s_aux.detach().float().flatten()
    if chosen is not None and (window or chunk):
        raise ModelError(f"an index of {type(module).__name__} chooses within a window, which is unknown here")
    rule = Rule(scale, window, softcap, sinks, attention_mask is not None, chunk, chosen=chosen, relative=relative)
    out = forward.attend(query[0], key[0], value[0], rule)
    return out[None].to(value.dtype), None


def window_and_chunk(module: torch.nn.Module, mask: torch.Tensor | None) -> tuple[int | None, int | None]:
    """What `tree_mask` tells ``module``: the window that a row sees, and the size of chunks; None where there is none.

    Raises:
        ModelError: if it is told something else.
    """
    if mask is None:
        return None, None
    if mask.shape != (1, 1, 1, 1) or mask.dtype is not torch.int64:
        raise ModelError(f"{type(module).__name__} makes a mask of its own")
    told = int(mask)
    if told == UNKNOWN:
        raise ModelError(f"a row of {type(module).__name__} sees something else than the rows before it")
    return (told or None, None) if told >= 0 else (None, UNKNOWN - told)


def tree_mask(
    mask_function: Callable[..., torch.Tensor], local_size: int | None = None, **kwargs: Any
) -> torch.Tensor:  # fmt: skip
    """For transformers' `AttentionMaskInterface`: a mask that tells `tree_attention` the window, int64[1, 1, 1, 1], 0
    where there is none, and less than `UNKNOWN` by the size of chunks. Who sees whom in a tree it knows."""
    forward, zero = running(), torch.tensor(0)

    def sees(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return mask_function(zero, zero, row, column)

    chunked = local_size is not None and _in_chunks(local_size, sees)
    window, chunk = (None, local_size) if chunked else (local_size, None)
    known = forward is None or forward.knows(window, chunk, sees)
    return torch.full((1, 1, 1, 1), UNKNOWN if not known else UNKNOWN - chunk if chunk else window or 0)


def _in_chunks(size: int, sees: Sees) -> bool:
    """Whether the first row of the second chunk does not see the row before it, as it does in a window of this size."""
    try:
        return not bool(sees(torch.tensor(size), torch.tensor(size - 1)))
    except IndexError:  # who sees whom depends on something that this text is too short for
        return False


def same_place(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Whether two tensors lie at the same place in memory."""
    return one is not None and one.data_ptr() == other.data_ptr()


AttentionInterface.register(TREE, tree_attention)
AttentionMaskInterface.register(TREE, tree_mask)


# -- the compiled loop -----------------------------------------------------------------------------------------------


def attend_rows(
    segments: SequenceOf[Segment], layer: int, query: torch.Tensor, kv_heads: int, value_width: int, rule: Rule
) -> torch.Tensor:  # fmt: skip
    """float32[rows, heads, value width]: attention of all rows of a forward over what `layer` has stored for them.

    Args:
        query: float32[heads, rows, width].

    Raises:
        ModelError: if the storage of a sequence is not of these sizes, or its rows are none of these.
        IndexError: if its storage has no room for its tree.
    """
    if query.stride(2) != 1:
        query = query.contiguous()
    heads, rows, width = query.shape
    if query.dtype is not torch.float32 or heads % kv_heads or (rule.sinks is not None and len(rule.sinks) != heads):
        raise ModelError(f"attention got {query.dtype} queries of {heads} heads for {kv_heads} heads of keys")
    table = list[int]()
    for segment in segments:
        _check(segment, layer, (kv_heads, width, value_width), rows)
        segment.windows.add(rule.window)
        table += segment.described(layer)
    out = torch.zeros(rows, heads, value_width, dtype=torch.float32)  # rows that only fill up get zeros
    numbers = np.array([rule.scale, rule.softcap or 0.0, *([] if rule.sinks is None else rule.sinks.tolist())])
    biases = None if rule.biases is None else rule.biases.upto(end_of(segments))
    if biases is not None and len(biases) != heads:
        raise ModelError(f"attention got biases of {len(biases)} heads for {heads} heads of queries")
    most = 0 if rule.chosen is None else rule.chosen.shape[1]
    extent = 0 if rule.relative is None else rule.relative.shape[2]
    call = AttentionCall(
        queries=query.data_ptr(), queries_head=4 * query.stride(0), queries_row=4 * query.stride(1),
        results=out.data_ptr(), results_head=4 * out.stride(1), results_row=4 * out.stride(0),
        width=width, value_width=value_width, group=heads // kv_heads, window=rule.window or 0,
        chunk=rule.chunk or 0, biases=0 if biases is None else biases.data_ptr(),
        biases_head=0 if biases is None else 4 * biases.stride(0),
        chosen=0 if rule.chosen is None else address(rule.chosen, torch.int32, rows, most), most=most,
        relative=0 if rule.relative is None else address(rule.relative, torch.float32, rows, heads, extent),
        extent=extent, heads=heads, segments=len(segments), rounded=0,
    )  # fmt: skip
    run(attend_worker(), [num_threads(), *call, *table, numbers.ctypes.data, len(numbers)])
    return out


def _check(segment: Segment, layer: int, sizes: tuple[int, int, int], rows: int) -> None:
    """Raises `ModelError` unless ``layer`` of ``segment`` is stored in these sizes, and its rows are among so many."""
    if (stored := segment.kv.sizes(layer)) != sizes:
        raise ModelError(f"layer {layer} attends to (heads, key width, value width) {sizes}, and {stored} is stored")
    if not 0 <= segment.start <= rows - segment.count:
        raise ModelError(f"rows {segment.start} to {segment.start + segment.count} have no room among {rows}")
