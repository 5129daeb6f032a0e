"""How a private copy of a model comes to compute its recurrences here.

transformers' modules call functions for what depends on other rows, by names that many families share. In a copy they
call those of this folder instead. All else, projections, gates and norms, is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import unwrap
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from tokentree.engines.cpu.attention import Recurring, running
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.cpu.states.convolution import causal_conv1d
from tokentree.engines.cpu.states.gated_delta import gated_delta_rule
from tokentree.engines.cpu.states.lightning import lightning_attention
from tokentree.engines.cpu.states.linear_unit import convolution, linear_unit
from tokentree.engines.cpu.states.mamba import leave_weights, mamba_selective_scan
from tokentree.engines.cpu.states.mamba2 import mamba2_chunk_scan
from tokentree.engines.cpu.states.mlstm import matrix_memory
from tokentree.engines.cpu.states.wkv import row_before, weighted_values
from tokentree.engines.cpu.steady import computes_numbers, in_whole_vectors
from tokentree.engines.foreign import is_own
from tokentree.errors import ModelError

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": mamba2_chunk_scan,
    "mamba_selective_scan": mamba_selective_scan,
    "rwkv_linear_attention": weighted_values,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
}


# Of classes whose code has no such function: what stands for a method, of the module itself or of one in it.
METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "MiniMaxLightningAttention": ("forward", lightning_attention),
    "RecurrentGemmaRecurrentBlock": ("conv_1d.forward", convolution),
    "RecurrentGemmaRglru": ("_rnn_scan", linear_unit),
    "RwkvFeedForward": ("time_shift.forward", row_before),
    "RwkvSelfAttention": ("time_shift.forward", row_before),
    "xLSTMBackend": ("forward", matrix_memory),
}

Changed = list[tuple[nn.Module, str]]  # modules, and the names of attributes that they were given


def carries_state(module: nn.Module) -> bool:
    """Whether ``module`` has a recurrence that is known here, and does what its class says."""
    kind = type(module)
    known = kind.__name__ in METHODS or _calls_functions(kind)
    return known and "forward" not in vars(module) and is_own(kind)


def _calls_functions(kind: type[nn.Module]) -> bool:
    """Whether modules of a class call any of `FUNCTIONS`."""
    return bool(set(FUNCTIONS) & {*unwrap(kind.forward).__code__.co_names})


def before_packing(model: nn.Module) -> None:
    """Sees to it that modules of ``model`` (a `private_copy`) find what they read once linear layers are packed. It has
    an effect on those that carry states, and on blocks around them."""
    found = [module for module in model.modules() if carries_state(module)]
    for module in found:
        leave_weights(module)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    if found and any(_reads_types(module) for module in model.modules() if module not in norms):
        for module in norms:  # it may be given float32, which a fused one doesn't take
            module.forward = module.forward


def exchange(model: nn.Module) -> Changed:
    """Has the modules of ``model`` (a `private_copy`) compute their recurrences here. If there are any, gates in other
    modules are computed in the same way whatever rows there are, too. Returns what was changed."""
    found: Changed = []
    for module in [module for module in model.modules() if carries_state(module)]:
        if type(module).__name__ in METHODS:
            where, ours = METHODS[type(module).__name__]
            path, _, name = where.rpartition(".")
            owner = module.get_submodule(path)
            setattr(owner, name, in_whole_vectors(partial(_running(ours), owner)))
            found.append((owner, name))
        if _calls_functions(type(module)):
            module.forward = in_whole_vectors(MethodType(_with_our_functions(module), module))
            found.append((module, "forward"))
    for module in model.modules() if found else ():
        if _reads_types(module):
            _tell_types(module)
        if _has_gates(module):
            module.forward = in_whole_vectors(module.forward)
            found.append((module, "forward"))
    return found


def _with_our_functions(module: nn.Module) -> FunctionType:
    """The forward of a module's class, which calls the functions of this folder."""
    own = unwrap(type(module).forward)
    scope = own.__globals__ | {name: _running(ours) for name, ours in FUNCTIONS.items()}
    forward = FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def _has_gates(module: nn.Module) -> bool:
    """Whether ``module``, which does what its class says, computes gates, and is no activation itself."""
    plain = "forward" not in vars(module) and bool(module._modules or module._parameters)
    return plain and computes_numbers(module) and is_own(type(module))


def _reads_types(module: nn.Module) -> bool:
    """Whether the forward of ``module`` converts what it gives its parts to the type of their weights."""
    return {"weight", "dtype", "to"} <= {*unwrap(type(module).forward).__code__.co_names}


def _tell_types(module: nn.Module) -> None:
    """Has packed layers in such a module tell the type that they had."""
    for name, part in list(module._modules.items()):
        if isinstance(part, PackedLinear | QuantizedLinear) and name in unwrap(type(module).forward).__code__.co_names:
            module._modules[name] = Typed(part)


class Typed(nn.Module):
    """A packed layer in bfloat16, whose weight seems to be so too."""

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.packed, self.weight = packed, torch.empty(0, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.packed(x)
        return out


@contextmanager
def exchanged(model: nn.Module) -> Iterator[None]:
    """`exchange`, and back."""
    changed = exchange(model)
    try:
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def _running(ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours``, told of the forward that runs."""

    def function(*args: Any, **kwargs: Any) -> Any:
        forward = running()
        if not isinstance(forward, Recurring):
            raise ModelError("a recurrence is asked for outside of a forward that has states")
        with torch._C.DisableTorchFunction():  # nobody needs to look at each of its steps
            return ours(forward, *args, **kwargs)

    return function
