"""A forward as one compiled graph, for models that have no `program`: GPUs, and other families on CPUs.

Compiling a forward is worth it only if the same graph serves every tree. So nothing of a tree is in it: which rows see
which is a mask, where rows stand are positions, and where their KV goes are indices, all inputs of fixed sizes. Rows
are padded to one of few numbers, and the KV to its storage, whose capacities are few (`kv.KVLayout.fixed`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import Cache, PreTrainedModel

from tokentree.engines.attention import Segment, dense_mask
from tokentree.engines.kv import KVLayout
from tokentree.storage import cache_folder
from tokentree.tree import TokenTree

ROWS = (2, 4, 8, 16, 32, 64)  # a single row would be compiled for itself
BACKEND = "inductor"
CACHE = "TORCHINDUCTOR_CACHE_DIR"


class Graph:
    """The forward over the tree of one sequence, compiled by `torch.compile`.

    On CPUs one graph serves all sizes, as rows and capacity are symbols in it. On GPUs each size has its graph, which
    is captured as a CUDA graph. What was compiled is kept in the cache folder.

    Args:
        model: attends by itself, under a dense mask.
        windows: the sliding window of each kind of attention layer, as `support.layer_windows` has them.
    """

    def __init__(self, model: PreTrainedModel, windows: Mapping[str, int | None]) -> None:
        self._model, self._windows = model, windows
        self._on_cpu, self._head_input = model.device.type == "cpu", torch.empty(0)
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(self._note)
        if os.environ.get(CACHE, default_cache_dir()) == default_cache_dir():  # torch's own, in a temporary folder
            os.environ[CACHE] = str(cache_folder() / "compiled")
        options: dict[str, Any] = {} if self._on_cpu else {"triton.cudagraphs": True}
        limits: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}
        self._compiled: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.compile(
            self._run, dynamic=False, backend=BACKEND, options=options if BACKEND == "inductor" else None, **limits
        )

    @torch.inference_mode()
    def compiles(self, layout: KVLayout) -> bool:
        """Compiles for all numbers of rows, with a progress bar; False, and a warning, where this machine can't."""
        kv, console = layout.make(ROWS[-1]), Console(stderr=True)
        try:
            for rows in track(ROWS, "compiling", console=console, transient=True, disable=not console.is_terminal):
                self.forward(Segment(kv, TokenTree.chain(0, [0] * (rows - 1)), 0, 0))
        except TorchDynamoException as error:
            reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
            warnings.warn(f"compile=True does nothing here, the forward can't be compiled: {reason}", stacklevel=3)
            return False
        return True

    def fits(self, segments: SequenceOf[Segment]) -> bool:
        """Whether one graph computes these: one sequence, and no more rows than the widest has."""
        return len(segments) == 1 and segments[0].count <= ROWS[-1]

    @torch.inference_mode()
    def forward(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the KV of all rows, and returns logits [rows, vocab] and hidden states [rows, hidden size] after the
        final norm (empty, if the model has no output layer)."""
        count, kv = segment.count, segment.kv
        rows = next(rows for rows in ROWS if rows >= count)
        start = segment.prefix + segment.first
        kv.reserve(start + rows)
        layers = [kv.layer(layer) for layer in range(kv.num_layers)]
        device, columns = self._model.device, layers[0][0].shape[1]
        ids, positions = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        ids[:count], positions[:count] = segment.tree.tokens[segment.first :], segment.positions
        masks = {
            kind: dense_mask([segment], rows, window, self._model.dtype, device, columns)
            for kind, window in self._windows.items()
        }
        inputs = [torch.from_numpy(row)[None].to(device) for row in (ids, positions)]
        places = torch.arange(start, start + rows, device=device)
        if self._on_cpu:
            for tensor in (*inputs, *masks.values()):
                torch._dynamo.maybe_mark_dynamic(tensor, (tensor.ndim - 1,))
            for mask in masks.values():
                torch._dynamo.maybe_mark_dynamic(mask, (2,))
            torch._dynamo.maybe_mark_dynamic(places, (0,))
            for keys, values in layers:
                torch._dynamo.maybe_mark_dynamic(keys, (1,))
                torch._dynamo.maybe_mark_dynamic(values, (1,))
        else:
            for keys, values in layers:
                torch._dynamo.mark_static_address(keys)
                torch._dynamo.mark_static_address(values)
            torch.compiler.cudagraph_mark_step_begin()
        logits, hidden = self._compiled(*inputs, masks, layers, places)
        return logits[:count], hidden[:count]

    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        masks: dict[str, torch.Tensor],
        layers: list[tuple[torch.Tensor, torch.Tensor]],
        places: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=FixedKV(layers, places),
            use_cache=True,
            return_dict=True,
        )
        return out.logits[0], self.head_input()

    def head_input(self) -> torch.Tensor:
        """[rows, hidden size]: what the output layer was given last, in this graph or outside."""
        hidden, self._head_input = self._head_input, torch.empty(0)
        return hidden

    def _note(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._head_input = inputs[0][0]


class FixedKV(Cache):
    """What transformers' modules see as their cache in a graph: storage of one size, and where new rows go in it.

    Args:
        layers: keys and values [heads, capacity, width] of each.
        places: int64[rows].
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], places: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.stored, self.places = layers, places

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.stored[layer_idx]
        keys.index_copy_(1, self.places, key_states[0])
        values.index_copy_(1, self.places, value_states[0])
        return keys[None], values[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0
