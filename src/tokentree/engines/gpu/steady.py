"""What transformers' modules compute row by row, with our kernels in place of torch's.

torch picks the loops of a product, and of a sum over a row, by how many rows there are. So a row's bits depend on those
beside it. In `Steady`, products with a weight, means and sums over rows, and experts, are kernels whose bits depend on
the row and the weight alone. The model's own code runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tokentree.engines.gpu.bfloat16 import dot, rounded, widened
from tokentree.engines.gpu.kv_forward import grid_of
from tokentree.engines.gpu.products import output_kernel
from tokentree.engines.gpu.tiles import SHARED, tile
from tokentree.errors import ModelError

EXPERTS = "tokentree"  # the name of `experts` among transformers' implementations
LEAST = 16  # inputs that a product takes at a time
COLUMNS = 64  # of an expert's outputs, in one program

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_SUMS = {torch.mean: True, Tensor.mean: True, torch.sum: False, Tensor.sum: False}


class Steady(TorchFunctionMode):
    """In here rows are multiplied with weights, and summed up, by kernels of our own.

    Args:
        memory: shared memory that a program may have, in bytes.
    """

    def __init__(self, memory: int = SHARED) -> None:
        super().__init__()
        self._memory = memory
        self._turned: dict[int, tuple[Tensor, Tensor]] = {}  # weights [inputs, outputs] by address, and their transpose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is linear:
            x, weight, bias = (*args, *(named[name] for name in ("input", "weight", "bias") if name in named), None)[:3]
            if _multiplies(x, weight):
                return product(x, weight, bias, self._memory)
        elif func in _PRODUCTS and len(args) == 2 and not named:
            x, weight = args
            if _fits(x, weight) and weight.shape[0] == x.shape[-1]:
                return product(x, self._transposed(weight), None, self._memory)
        elif func is torch.addmm and len(args) == 3 and not named:
            bias, x, weight = args
            if _fits(x, weight) and bias.ndim == 1:
                return product(x, self._transposed(weight), bias, self._memory)
        elif func in _SUMS and (summed := _over_rows(args, named)) is not None:
            return row_sums(*summed, mean=_SUMS[func])
        return func(*args, **named)

    def _transposed(self, weight: Tensor) -> Tensor:
        """``weight`` [inputs, outputs] as [outputs, inputs]: copied once, unless it is the transpose of such a one."""
        if weight.t().is_contiguous():
            return weight.t()
        known = self._turned.get(weight.data_ptr())
        if known is None or known[0].shape != weight.shape:
            known = self._turned[weight.data_ptr()] = weight, weight.t().contiguous()
        return known[1]


def _fits(x: Any, weight: Any) -> bool:
    return (
        isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.ndim == 2
        and x.dtype is torch.bfloat16 and weight.dtype is torch.bfloat16 and x.numel() > 0
        and x.shape[-1] % LEAST == 0
    )  # fmt: skip


def _multiplies(x: Any, weight: Any) -> bool:
    return _fits(x, weight) and weight.is_contiguous()


def _over_rows(args: Any, named: Any) -> tuple[Tensor, bool] | None:
    """The tensor and ``keepdim`` of a sum over its last axis alone; None if it is another sum."""
    x, *rest = args
    axis = rest[0] if rest else named.get("dim")
    keep = rest[1] if len(rest) > 1 else named.get("keepdim", False)
    if isinstance(axis, tuple | list) and len(axis) == 1:
        axis = axis[0]
    known = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16) and x.ndim > 1 and x.numel() > 0
    if not known or not isinstance(axis, int) or axis not in (-1, x.ndim - 1):
        return None
    return (x, bool(keep)) if not {*named} - {"dim", "keepdim"} and len(rest) < 3 else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, memory: int = SHARED) -> Tensor:
    """x [..., inputs] times ``weight`` [outputs, inputs], plus ``bias`` [outputs], in bfloat16."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    out = torch.empty(rows, outputs, dtype=torch.bfloat16, device=x.device)
    way = tile(rows, outputs, inputs, memory=memory)
    output_kernel[grid_of(way, rows, outputs)](
        x.reshape(rows, inputs).contiguous(), weight, weight if bias is None else bias.to(torch.bfloat16), out, rows,
        outputs, inputs, 0.0, BIAS=bias is not None, CAP=False, PARTS=way.parts, SWAP=way.swap, TILE=way.rows,
        COLUMNS=way.columns, INPUTS=way.inputs, num_warps=way.warps, num_stages=way.stages,
    )  # fmt: skip
    return out.view(*x.shape[:-1], outputs)


def row_sums(x: Tensor, keep: bool, mean: bool) -> Tensor:
    """Sums, or means, over the last axis of x, float32 or bfloat16."""
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    sums_kernel[(rows,)](
        x.reshape(rows, width).contiguous().float(), out, width, 1.0 / width if mean else 1.0,
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out.to(x.dtype).view(*x.shape[:-1], *([1] if keep else []))


@triton.jit
def sums_kernel(x, out, width, scale, BLOCK: tl.constexpr):
    """out float32[rows] = scale times the sums of x float32[rows, width]."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out + row, tl.sum(tl.load(x + row * width + i, mask=i < width, other=0.0)) * scale)


# -- experts -----------------------------------------------------------------------------------------------------------


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts of ``module`` make of rows, for transformers' `ExpertsInterface`.

    Args:
        hidden_states: [rows, hidden size].
        top_k_index, top_k_weights: [rows, k], the experts of each row and how much they count.
    """
    (rows, count), ids = top_k_index.shape, top_k_index.reshape(-1).to(torch.int32)
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def times(x: Tensor, name: str, shared: int) -> Tensor:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return expert_product(x, getattr(module, name), bias, ids, shared, module.is_transposed)

    y = times(hidden_states, first, count)
    y = times(module._apply_gate(y) if module.has_gate else module.act_fn(y), "down_proj", 1)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    parts = (y.float() * top_k_weights.reshape(-1, 1).float()).view(rows, count, -1)
    total = parts[:, 0]
    for place in range(1, count):  # in one order
        total = total + parts[:, place]
    return total.to(hidden_states.dtype)


def expert_product(
    x: Tensor, weights: Tensor, bias: Tensor | None, ids: Tensor, shared: int, turned: bool
) -> Tensor:  # fmt: skip
    """bfloat16[n, outputs]: row ``i // shared`` of x times the weight of expert ``ids[i]``, plus its bias.

    Args:
        weights: [experts, outputs, inputs], or where ``turned`` [experts, inputs, outputs].
        bias: [experts, outputs].
        ids: int32[n].

    Raises:
        ModelError: if inputs are no multiple of 16.
    """
    outputs, inputs = weights.shape[1:] if not turned else (weights.shape[2], weights.shape[1])
    out = torch.empty(len(ids), outputs, dtype=torch.bfloat16, device=x.device)
    size = next(size for size in (128, 64, 32, 16, 1) if inputs % size == 0)
    if size == 1:
        raise ModelError(f"there is no kernel for experts of {inputs} inputs")
    across, along = (weights.stride(2), weights.stride(1)) if turned else (weights.stride(1), weights.stride(2))
    expert_kernel[(len(ids), triton.cdiv(outputs, COLUMNS))](
        x.contiguous(), weights, weights if bias is None else bias, ids, out, shared, outputs, inputs,
        weights.stride(0), across, along, BIAS=bias is not None, COLUMNS=COLUMNS, INPUTS=size, num_warps=4,
        num_stages=4,
    )  # fmt: skip
    return out


@triton.jit
def expert_kernel(
    x, w, bias, ids, out, shared, num_columns, width, expert_size, across, along,
    BIAS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """See `expert_product`. Matrix instructions take 16 rows at least: fifteen of them are none."""
    row, columns, one = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, 16)
    expert, known = tl.load(ids + row).to(tl.int64), columns < num_columns
    w += expert * expert_size
    total = tl.zeros((COLUMNS, 16), tl.float32)
    for k in range(0, width, INPUTS):
        here = k + tl.arange(0, INPUTS)
        a = tl.load(
            w + columns[:, None].to(tl.int64) * across + here[None, :].to(tl.int64) * along, mask=known[:, None],
            other=0.0,
        )  # fmt: skip
        b = tl.load(
            x + row // shared * width + here[:, None] + 0 * one[None, :], mask=(one == 0)[None, :], other=0.0
        )  # fmt: skip
        total = dot(a, b, total)
    y = tl.sum(tl.where((one == 0)[None, :], total, 0.0), 1)
    if BIAS:
        y += widened(tl.load(bias + expert * num_columns + columns, mask=known, other=0.0))
    tl.store(out + row.to(tl.int64) * num_columns + columns, rounded(y), mask=known)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts)
