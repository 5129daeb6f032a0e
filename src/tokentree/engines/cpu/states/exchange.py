"""How a private copy of a model comes to compute its recurrences here.

transformers' modules call functions for what depends on other rows, by names that many families share. In a copy they
call those of this folder instead. All else, projections, gates and norms, is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from tokentree.engines.cpu.attention import Recurring, running
from tokentree.engines.cpu.states.convolution import causal_conv1d
from tokentree.engines.cpu.states.gated_delta import gated_delta_rule
from tokentree.engines.cpu.steady import in_whole_vectors
from tokentree.engines.foreign import is_own
from tokentree.errors import ModelError

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
}


def carries_state(module: nn.Module) -> bool:
    """Whether ``module`` has a recurrence that is known here, and does what its class says."""
    kind = type(module)
    known = bool(set(FUNCTIONS) & {*unwrap(kind.forward).__code__.co_names})
    return known and "forward" not in vars(module) and is_own(kind)


def exchange(model: nn.Module) -> list[nn.Module]:
    """Has the modules of ``model`` (a `private_copy`) compute their recurrences here; returns those that do."""
    found = [module for module in model.modules() if carries_state(module)]
    for module in found:
        own = unwrap(type(module).forward)
        scope = own.__globals__ | {name: _running(ours) for name, ours in FUNCTIONS.items()}
        forward = FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
        module.forward = in_whole_vectors(MethodType(forward, module))
    return found


@contextmanager
def exchanged(model: nn.Module) -> Iterator[None]:
    """`exchange`, and back."""
    found = exchange(model)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _running(ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours``, told of the forward that runs."""

    def function(*args: Any, **kwargs: Any) -> Any:
        forward = running()
        if not isinstance(forward, Recurring):
            raise ModelError("a recurrence is asked for outside of a forward that has states")
        return ours(forward, *args, **kwargs)

    return function
