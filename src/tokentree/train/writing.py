"""Thousands of texts that a model on an accelerator writes at once.

Verifying trees is made for few sequences. Here are neither trees nor drafts, but as many rows as memory takes, each
with one new token a step: a loop of its own, whose steps are recorded on GPUs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tokentree.engines.gpu.recording import Recording
from tokentree.engines.support import cache_names, layer_chunks, layer_windows

COLUMNS = 128  # KV rows that a step reads are a multiple of it
PREFILL_TOKENS = 1 << 16  # read in one forward
LOOK = 8  # steps between two looks whether all texts have ended
MOST_ROWS = 2048
SHARE = 0.4  # of an accelerator's memory that texts may take
NAME = "tokentree rows"


class Writer:
    """Continues many texts, and draws each token from softmax(logits / temperature).

    Args:
        model: attends by itself, under dense masks; it stays as it is.
        rows: texts at most.
        capacity: the most tokens of a text, prompt and continuation.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        self._model, self._device, self.rows = model, model.device, rows
        self.capacity = -(-capacity // COLUMNS) * COLUMNS
        config = model.config.get_text_config()
        self._windows, self._chunks = layer_windows(config), layer_chunks(config)
        keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self._cache_names = cache_names(model)
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
        self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=self._device)
        self._kv = RowsKV(rows, self.capacity, self._device)
        self._steps: dict[int, Recording[torch.Tensor]] = {}  # by the KV rows that they read

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """The model attends by `attend_one` meanwhile, which needs masks: without one it knows of no sliding window."""
        config, own = self._model.config, self._model.config._attn_implementation
        config._attn_implementation = NAME if own == "sdpa" else own
        try:
            yield
        finally:
            config._attn_implementation = own

    @torch.inference_mode()
    def write(
        self, prompts: SequenceOf[SequenceOf[int]], max_tokens: int, temperatures: SequenceOf[float],
        ends: Collection[int], seed: int, top_k: int | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """What follows each of ``prompts``, up to one of ``ends``, which is part of it, or to ``max_tokens`` tokens, or
        to the capacity.

        Args:
            temperatures: of each text; at 0 it goes on with the most probable token.
            top_k: draw from so many of the most probable tokens only.
        """
        count, device, longest = len(prompts), self._device, max(map(len, prompts))
        generator = torch.Generator(device).manual_seed(seed)
        spread, last = torch.zeros(self.rows, 1, device=device), torch.tensor(sorted(ends), device=device)
        spread[:count, 0] = torch.tensor(temperatures, device=device)
        alive, taken = torch.arange(self.rows, device=device) < count, list[torch.Tensor]()
        self._read(prompts)
        for step in range(min(max_tokens, self.capacity - longest + 1)):
            tokens = _draw(self._step(longest + step), spread, generator, top_k)
            taken.append(torch.where(alive, tokens, -1))
            alive = alive & ~torch.isin(tokens, last)
            if step % LOOK == LOOK - 1 and not bool(alive.any()):
                break
            self._ids.copy_(tokens[:, None])
            self._kv.places += 1
        drawn = torch.stack(taken, 1)[:count].tolist() if taken else [[] for _ in prompts]
        return [[token for token in row if token >= 0] for row in drawn]

    def _read(self, prompts: SequenceOf[SequenceOf[int]]) -> None:
        """Puts the KV of each prompt there, and its last token where the next step finds it."""
        longest = max(map(len, prompts))
        padded = torch.zeros(self.rows, longest, dtype=torch.int64)
        for row, ids in zip(padded[: len(prompts)], prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        places = torch.zeros(self.rows, dtype=torch.int64)
        places[: len(prompts)] = torch.tensor([len(ids) - 1 for ids in prompts])
        self._kv.places.copy_(places)
        self._ids.copy_(padded.gather(1, places[:, None]))
        each = max(1, PREFILL_TOKENS // longest)
        for first in range(0, len(prompts) if longest > 1 else 0, each):
            # no row sees what stands behind it, and so no text what fills it up
            with self._kv.reading(first):
                self._forward(padded[first : min(len(prompts), first + each), :-1].to(self._device))

    def _step(self, seen: int) -> torch.Tensor:
        """Logits [rows, vocab] after the last tokens, where no text has more than ``seen`` tokens."""
        columns = -(-seen // COLUMNS) * COLUMNS
        if self._device.type != "cuda":
            return self._next(columns)
        if columns not in self._steps:
            self._steps[columns] = Recording(lambda: self._next(columns))
        return self._steps[columns].play()

    def _next(self, columns: int) -> torch.Tensor:
        self._kv.columns, places = columns, self._kv.places[:, None]
        column, masks = torch.arange(columns, device=self._device), dict[str, torch.Tensor]()
        for kind, window in self._windows.items():
            seen = column <= places
            if window is not None:
                seen &= column > places - window
            if kind in self._chunks:
                seen &= column // self._chunks[kind] == places // self._chunks[kind]
            masks[kind] = torch.where(seen, 0.0, torch.finfo(self._model.dtype).min)[:, None, None].to(
                self._model.dtype
            )
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        with self._attending():
            return self._forward(self._ids, position_ids=places, attention_mask=mask)

    def _forward(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Logits [rows, vocab] after the last token of each row."""
        options |= dict.fromkeys(self._cache_names, self._kv) | self._last_only
        out = self._model(input_ids=ids, use_cache=True, return_dict=True, **options)
        logits: torch.Tensor = out.logits[:, -1]
        return logits


def rows_for(device: torch.device, each: int) -> int:
    """How many texts are written at once, where each takes so many bytes: a power of two, the same at any time."""
    if device.type != "cuda":
        return 16
    fit = int(SHARE * torch.cuda.get_device_properties(device).total_memory) // each
    return max(1, min(MOST_ROWS, 1 << (fit.bit_length() - 1)))


class RowsKV(Cache):
    """The KV of many texts, row by row, each as long as it is. Prompts are read some rows at a time; a step then adds a
    token to every row.

    Attributes:
        places: int64[rows], where the next token of each text goes.
        columns: how many KV rows a step sees.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self._rows, self._capacity = rows, capacity
        self._stored: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._first: int | None = None  # the row from which on prompts are being read, if they are
        self._every = torch.arange(rows, device=device)
        self.columns, self.places = capacity, torch.zeros(rows, dtype=torch.int64, device=device)

    @contextmanager
    def reading(self, first: int) -> Iterator[None]:
        """What is stored meanwhile are prompts, of row ``first`` and those behind it, from their beginnings on."""
        self._first = first
        try:
            yield
        finally:
            self._first = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = key_states, value_states  # [rows, heads, tokens, width]
        if layer_idx == len(self._stored):
            sizes = [(self._rows, x.shape[1], self._capacity, x.shape[3]) for x in new]
            self._stored.append((new[0].new_zeros(sizes[0]), new[1].new_zeros(sizes[1])))
        if self._first is not None:
            for stored, x in zip(self._stored[layer_idx], new, strict=True):
                stored[self._first : self._first + len(x), :, : x.shape[2]] = x
            return new
        for stored, x in zip(self._stored[layer_idx], new, strict=True):
            stored[self._every, :, self.places] = x[:, :, 0]
        keys, values = self._stored[layer_idx]
        return keys[:, :, : self.columns], values[:, :, : self.columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def attend_one(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention for transformers' `AttentionInterface`, of one row a text: query heads that share keys and values are
    one product, so that these are read once, where torch's own would copy them for each. Else torch's own."""
    texts, heads, rows, width = query.shape
    if rows > 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(texts, key.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
    weights = (grouped @ key.transpose(2, 3) + attention_mask).softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).reshape(texts, 1, heads, -1), None


AttentionInterface.register(NAME, attend_one)


def _draw(
    logits: torch.Tensor, temperatures: torch.Tensor, generator: torch.Generator, top_k: int | None
) -> torch.Tensor:
    """int64[rows], a token drawn from softmax(logits / temperature) of each row, as the largest of logits + temperature
    x Gumbel noise (Maddison et al. 2014, arXiv:1411.0030)."""
    scores = logits.float()
    if top_k is not None and top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -math.inf)
    gumbel = -torch.empty_like(scores).exponential_(generator=generator).log()
    return (scores + temperatures * gumbel).argmax(-1)
