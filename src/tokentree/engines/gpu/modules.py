"""The engine of all other families on a GPU: a model's own modules, with products and attention of ours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from transformers import Cache

from tokentree.engines.cpu.attending import adapt, attended
from tokentree.engines.cpu.attention import TREE, Rule, Sees, attending
from tokentree.engines.cpu.linear import weights_of
from tokentree.engines.cpu.prepare import set_attention, set_experts
from tokentree.engines.drafting import DraftEngine
from tokentree.engines.gpu.attending import CHUNK, TILE
from tokentree.engines.gpu.engine import OuterLayers, TritonEngine
from tokentree.engines.gpu.inputs import Inputs
from tokentree.engines.gpu.kv_forward import KVForward, Rules, Sizes
from tokentree.engines.gpu.pages import Pages
from tokentree.engines.gpu.steady import EXPERTS, Steady
from tokentree.engines.gpu.weights import HEAD_SIZES
from tokentree.engines.prepared import Prepared
from tokentree.engines.support import cache_names, decoder_layers
from tokentree.errors import ModelError, PairingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokentree.heads.eagle import EagleHead


class TritonModulesEngine(TritonEngine):
    """Verifies trees through the model's own modules, with kernels of our own for what decides a row's bits.

    Products with weights, sums over rows, experts and attention are ours (`Steady`); all else is torch's, row by row.
    Whether that is so is tried: with several numbers of rows, a row must have the same bits.

    Args:
        prepared, prefix_bytes, tokens, drops: see `TritonEngine`.

    Raises:
        ModelError: if the model can't be run so, or its bits depend on the number of rows.
    """

    execution = "modules on kernels of our own"
    crowds: tuple[int, ...] = (1, 9, 69)

    @staticmethod
    def _without_kernels(prepared: Prepared) -> str | None:
        return prepared.without_any_kernels

    def _read_model(self, prepared: Prepared, drops: bool) -> Sizes:
        self._model = model = prepared.copy
        if model.dtype is not torch.bfloat16:
            raise ModelError(f"{prepared.name}'s weights are {str(model.dtype).removeprefix('torch.')}, not bfloat16")
        adapt(model)
        found = attended(model)
        set_attention(model, TREE)
        set_experts(model, EXPERTS)
        if bool(found["beyond"].any()):
            raise ModelError(f"{prepared.name} attends in chunks, or with biases, which there is no kernel for")
        shapes, heads = {*map(tuple, found["shapes"].tolist())}, {*found["heads"].tolist()}
        if len(shapes) > 1 or len(heads) > 1:
            raise ModelError(f"the layers of {prepared.name} attend in different sizes")
        ((kv_heads, *widths),), (count,) = shapes, heads
        head = next((size for size in HEAD_SIZES if size >= max(widths)), 0)
        if not head or count % kv_heads or count // kv_heads > TILE:
            raise ModelError(f"{prepared.name} attends in sizes that there is no kernel for")
        times = len(found["shapes"])  # that a forward attends: in some models twice a layer
        return Sizes(times, count, kv_heads, head, prepared.facts.hidden_size, prepared.vocab_size)

    def _new_forward(self) -> KVForward:
        last = self.facts.num_layers
        return ModulesForward(self._model, self._sizes, self.pages, self.sizes[-1], self._places, last)

    def _outer_layers(self) -> OuterLayers:
        head = self._model.get_output_embeddings()
        if head is None:
            raise PairingError(f"{self.facts.name} has no output layer, whose inputs heads read")
        weights = functools.partial(weights_of, head, num_inputs=self.facts.hidden_size, dtype=self.dtype)
        return self._model.get_input_embeddings(), head, weights

    def head_engine(self, head: EagleHead) -> DraftEngine:
        from tokentree.engines.eagle import EagleEngine  # few need what it imports

        return EagleEngine(head, self)


class ModulesForward(KVForward):
    """A forward through the modules of ``model``, a private copy that uses `tree_attention`.

    Args:
        sizes, pages, most_rows, places: see `KVForward`; sizes have a layer for each time that it attends.
        last: the place behind all layers.
    """

    def __init__(
        self, model: PreTrainedModel, sizes: Sizes, pages: Pages, most_rows: int, places: SequenceOf[int], last: int
    ) -> None:  # fmt: skip
        super().__init__(sizes, pages, most_rows, places)
        self._model, self._steady, self._last = model, Steady(self._shared), last
        self._cache_names = cache_names(model)
        option = inspect.signature(type(model).forward).parameters.get("logits_to_keep")
        self._picks_logits = option is not None and "Tensor" in str(option.annotation)  # rows by their numbers
        self._numbers = torch.arange(most_rows, device=self.device)
        self._noted: dict[int, torch.Tensor] = {}

    def run(self, inputs: Inputs, rows: int, head_rows: int, long: bool) -> None:
        self.move(inputs)
        x, cache = inputs.device, PagedKV(self, inputs, rows, long)
        hooks = [self._note_at(place) for place in self.places]
        try:
            with attending(cache), self._steady:
                out = self._model(
                    input_ids=x["ids"][:rows].long()[None], position_ids=x["positions"][:rows].long()[None],
                    attention_mask=None, **dict.fromkeys(self._cache_names, cache), use_cache=True, return_dict=True,
                    **self._to_keep(rows, head_rows),
                )  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
        for place in self.places:
            self._store(place, self._noted.pop(place).contiguous(), x, rows)
        if head_rows:
            self.logits[:head_rows].copy_(out.logits[0, :head_rows])
            self._find_best(head_rows)

    def _to_keep(self, rows: int, head_rows: int) -> dict[str, Any]:
        """What the model is told of the rows that need logits."""
        noted = self._last in self.places  # at the output layer, which must see all rows then
        if not self._picks_logits or noted or head_rows == rows:
            return {}
        return {"logits_to_keep": self._numbers[: max(1, head_rows)]}

    def _note_at(self, place: int) -> Any:
        """A hook that notes the hidden states at ``place``."""
        last = place == self._last
        module: Any = self._model.get_output_embeddings() if last else decoder_layers(self._model)[place]

        def note(_module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._noted[place] = (inputs[0] if inputs else named["hidden_states"])[0]

        return module.register_forward_pre_hook(note, with_kwargs=True)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules, inputs: Inputs,
        long: bool,
    ) -> torch.Tensor:  # fmt: skip
        """bfloat16[rows, heads, value width]: attention of `layer`, whose new keys and values go to their pages.

        Args:
            query: [heads, rows, width].
            key, value: [KV heads, rows, width].
        """
        w, (heads, rows, width), value_width = self.sizes, query.shape, value.shape[2]
        if (heads, len(key), len(value)) != (w.heads, w.kv_heads, w.kv_heads) or max(width, value_width) > w.head_size:
            raise ModelError(f"layer {layer} attends in other sizes than it did before")
        given = [_rows_of(part) for part in (query, key, value)]
        strides = [size for part in given for size in part.stride()[:2]]
        to_pages_kernel[(rows, heads + 2 * w.kv_heads)](
            *given, self._q, self.pages.keys[layer], self.pages.values[layer], inputs.device["slots"], *strides,
            heads, w.kv_heads, width, value_width, HEAD=w.head_size, CHUNK=CHUNK, num_warps=1,
        )  # fmt: skip
        self._attend(rules, layer, inputs, rows, long)
        found = self._attended[:rows].view(rows, heads, w.head_size)[:, :, :value_width]
        return found.clone() if w.layers > self._last else found  # where a layer attends again before it is read


def _rows_of(part: torch.Tensor) -> torch.Tensor:
    """In bfloat16, with the numbers of a head behind one another."""
    part = part.to(torch.bfloat16)
    return part if part.stride(2) == 1 else part.contiguous()


class PagedKV(Cache):
    """What transformers' modules see as the cache of one forward, and what attends for them (`Attending`)."""

    def __init__(self, forward: ModulesForward, inputs: Inputs, rows: int, long: bool) -> None:
        super().__init__(layers=[])
        self._forward, self._inputs, self._rows, self._long = forward, inputs, rows, long
        self._calls = 0  # of attention so far: layers attend in one order

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """See `ForwardKV.get_seq_length`."""
        if layer_idx is None:
            return 0
        positions = self._inputs.device["positions"][: self._rows]
        return positions - torch.arange(self._rows, device=positions.device)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
        layer = self._calls
        self._calls += 1
        rules = Rules(rule.scale, rule.window or 0, rule.softcap or 0.0, rule.sinks)
        return self._forward.attend(layer, query, key, value, rules, self._inputs, self._long)

    def knows(self, window: int | None, chunk: int | None, sees: Sees) -> bool:
        """`attending.attended` has looked."""
        return True

    def chose(self, indices: torch.Tensor) -> bool:
        """See `Attending`. No index is known on GPUs."""
        return False


@triton.jit
def to_pages_kernel(
    q, k, v, queries, keys, values, slots, q_head, q_row, k_head, k_row, v_head, v_row, heads, kv_heads, width,
    value_width, HEAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """queries [rows, heads, HEAD] = q [heads, rows, width], and keys and values [pages, KV heads, CHUNK, HEAD] at
    ``slots[row]`` = k and v; what a head has less than HEAD numbers is zeros."""
    row, head, i = tl.program_id(0), tl.program_id(1), tl.arange(0, HEAD)
    if head < heads:
        x = tl.load(q + head * q_head + row * q_row + i, mask=i < width, other=0.0)
        tl.store(queries + (row * heads + head) * HEAD + i, x)
    else:
        slot, number = tl.load(slots + row).to(tl.int64), (head - heads) % kv_heads
        to = ((slot // CHUNK * kv_heads + number) * CHUNK + slot % CHUNK) * HEAD + i
        if head < heads + kv_heads:
            tl.store(keys + to, tl.load(k + number * k_head + row * k_row + i, mask=i < width, other=0.0))
        else:
            tl.store(values + to, tl.load(v + number * v_head + row * v_row + i, mask=i < value_width, other=0.0))
