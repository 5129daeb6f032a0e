"""A forward as one graph, for models that have no `program`: GPUs, and other families on CPUs.

A graph is worth it only if the same one serves every tree. So nothing of a tree is in it: which rows see which is a
mask, where rows stand are positions, and where their KV goes are indices, all inputs of fixed sizes. Rows are padded to
one of few numbers, and the KV to its storage, whose capacities are few (`kv.KVLayout.fixed`).

On a GPU a step of a small model is little more than the launches of its kernels. There a graph is a recording of them
(a CUDA graph), which one call plays again.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from tokentree.cache import cache_folder
from tokentree.engines.cpu.attention import dense_masks
from tokentree.engines.gpu.recording import ROWS, Recordings, padded
from tokentree.engines.kv import KVLayout, SequenceKV
from tokentree.engines.model_facts import Facts
from tokentree.engines.segment import Segment
from tokentree.engines.support import cache_names
from tokentree.errors import ModelError
from tokentree.tree import TokenTree

TOGETHER = 7  # sequences whose recordings play one after another: on an H200, launching takes as long as 8 of them
BACKEND = "inductor"
CACHE = "TORCHINDUCTOR_CACHE_DIR"

Layers = list[tuple[torch.Tensor, torch.Tensor]]
Said = tuple[torch.Tensor, list[torch.Tensor]]


class Graph:
    """The forward over the tree of one sequence: recorded on GPUs, and compiled by `torch.compile` where that is asked
    for.

    On CPUs one compiled graph serves all sizes, as rows and capacity are symbols in it. On GPUs each number of rows has
    its recording, for each storage that it writes to. What was compiled is kept in the cache folder.

    Args:
        model: attends by itself, under a dense mask.
        facts: of the model.
        noted: hidden states by place, which hooks in ``model`` put there; a compiled graph has the last one alone.
        compile: compile what is run, or recorded.

    Attributes:
        recordings: of forwards, on a GPU.
    """

    def __init__(
        self, model: PreTrainedModel, facts: Facts, noted: dict[int, torch.Tensor], compile: bool
    ) -> None:  # fmt: skip
        self._model, self._facts, self._noted, self._compiles = model, facts, noted, compile
        self._cache_names = cache_names(model)
        self._on_cpu, self._head_input = model.device.type == "cpu", torch.empty(0)
        self._run: Callable[..., Said] = self._forward
        self._hook: RemovableHandle | None = None
        if compile:
            head = model.get_output_embeddings()
            if head is not None:
                self._hook = head.register_forward_pre_hook(self._note)
            self._run = _compiled(self._forward)
        self.recordings: Recordings[Said] = Recordings()

    @torch.inference_mode()
    def check(self, layout: KVLayout) -> None:
        """Compiles for all numbers of rows, with a progress bar, or records the widest.

        Raises:
            ModelError: if this machine can't, or not this model.
        """
        kv, console = layout.make(ROWS[-1]), Console(stderr=True)
        sizes, silent = ROWS if self._compiles else ROWS[-1:], not (self._compiles and console.is_terminal)
        try:
            for rows in track(sizes, "compiling", console=console, transient=True, disable=silent):
                self.forward([Segment(kv, TokenTree.chain(0, [0] * (rows - 1)), 0, 0)])
        except RuntimeError as error:  # dynamo's are too
            if self._hook is not None:  # the model goes on without
                self._hook.remove()
            reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
            raise ModelError(reason) from error

    def fits(self, segments: SequenceOf[Segment]) -> bool:
        """Whether it computes these: no more rows than the widest graph has, of one sequence. Of several it does where
        one after another takes less time than launching the kernels for all, one by one."""
        most = 1 if self._on_cpu else TOGETHER
        return len(segments) <= most and all(segment.count <= ROWS[-1] for segment in segments)

    def forward(self, segments: SequenceOf[Segment]) -> Said:
        """Writes the KV of all rows, and returns logits [rows, vocab] and hidden states [rows, hidden size] of each
        place, which hold until the next forward."""
        if len(segments) == 1:
            return self._forward_of(segments[0])
        parts = list[list[torch.Tensor]]()
        for segment in segments:
            logits, states = self._forward_of(replace(segment, start=0))
            parts.append([part.clone() for part in (logits, *states)])
        logits, *states = map(torch.cat, zip(*parts, strict=True))
        return logits, states

    @torch.inference_mode()
    def _forward_of(self, segment: Segment) -> Said:
        count, kv = segment.count, segment.kv
        rows = padded(count)
        start = segment.prefix + segment.first
        kv.reserve(start + rows)
        layers = [kv.layer(layer) for layer in range(kv.num_layers)]
        columns, numbers = layers[0][0].shape[1], np.zeros((3, rows), np.int64)
        numbers[0, :count], numbers[1, :count] = segment.tree.tokens[segment.first :], segment.positions
        numbers[2] = np.arange(start, start + rows)
        masks = dense_masks([segment], rows, self._facts, self._model.dtype, torch.device("cpu"), columns)
        inputs = torch.from_numpy(numbers)
        logits, states = (
            self._compute(inputs, masks, layers) if self._on_cpu else self._replay(kv, inputs, masks, layers)
        )
        return logits[:count], [state[:count] for state in states]

    def _compute(self, numbers: torch.Tensor, masks: dict[str, torch.Tensor], layers: Layers) -> Said:
        ids, positions, places = numbers.clone()
        torch._dynamo.maybe_mark_dynamic(places, (0,))
        ids, positions = ids[None].clone(), positions[None].clone()
        for tensor in (ids, positions, *masks.values()):
            torch._dynamo.maybe_mark_dynamic(tensor, (tensor.ndim - 1,))
        for mask in masks.values():
            torch._dynamo.maybe_mark_dynamic(mask, (2,))
        for keys, values in layers:
            torch._dynamo.maybe_mark_dynamic(keys, (1,))
            torch._dynamo.maybe_mark_dynamic(values, (1,))
        return self._run(ids, positions, masks, layers, places)

    def _replay(self, kv: SequenceKV, numbers: torch.Tensor, masks: dict[str, torch.Tensor], layers: Layers) -> Said:
        def run(kept: list[torch.Tensor]) -> Said:
            ids, positions, places = kept[0]
            return self._run(ids[None], positions[None], dict(zip(masks, kept[1:], strict=True)), layers, places)

        inputs = [numbers, *masks.values()]
        return self.recordings.play(kv, numbers.shape[1], inputs, self._model.device, run)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, masks: dict[str, torch.Tensor], layers: Layers,
        places: torch.Tensor,
    ) -> Said:  # fmt: skip
        out = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            **dict.fromkeys(self._cache_names, FixedKV(layers, places, positions[0])),
            use_cache=True,
            return_dict=True,
        )
        states = [self.head_input()] if self._compiles else [self._noted[place] for place in sorted(self._noted)]
        return out.logits[0], states

    def head_input(self) -> torch.Tensor:
        """[rows, hidden size]: what the output layer was given last, in a compiled graph or outside."""
        hidden, self._head_input = self._head_input, torch.empty(0)
        return hidden

    def _note(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._head_input = inputs[0][0]


def _compiled(run: Callable[..., Said]) -> Callable[..., Said]:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # what compiles takes a second to import

    if os.environ.get(CACHE, default_cache_dir()) == default_cache_dir():  # torch's own, in a temporary folder
        os.environ[CACHE] = str(cache_folder() / "compiled")
    limits: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}
    known = inspect.signature(torch.compile).parameters  # of torch's versions, not all have them
    options: dict[str, Any] = {"options": {}} if BACKEND == "inductor" else {}
    options |= {name: value for name, value in limits.items() if name in known}
    made: Callable[..., Said] = torch.compile(run, dynamic=False, backend=BACKEND, **options)
    return made


class FixedKV(Cache):
    """What transformers' modules see as their cache in a graph: storage of one size, and where new rows go in it.

    Args:
        layers: keys and values [heads, capacity, width] of each.
        places: int64[rows].
        positions: int64[rows].
    """

    def __init__(
        self, layers: list[tuple[torch.Tensor, torch.Tensor]], places: torch.Tensor, positions: torch.Tensor
    ) -> None:
        super().__init__(layers=[])
        self.stored, self.places, self.positions = layers, places, positions

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.stored[layer_idx]
        keys.index_copy_(1, self.places, key_states[0])
        values.index_copy_(1, self.places, value_states[0])
        return keys[None], values[None]

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """See `ForwardKV.get_seq_length`."""
        if layer_idx is None:
            return 0
        return self.positions - torch.arange(len(self.positions), device=self.positions.device)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0
