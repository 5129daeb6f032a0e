"""Weights that are no linear layer's, such as routers' and experts', in products that give a row the same bits beside
any others.

torch picks the loops of a product by how many rows there are, and an expert has as many as a batch happens to send to
it. A `SteadyWeight` takes the place of a parameter in a private copy of a model: the model's own code multiplies with
it as before, and gets the product of packed weights instead (`linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu, softplus
from torch.overrides import TorchFunctionMode

from tokentree.engines.cpu.linear import PACKED, OneDNNLinear, linear_of
from tokentree.engines.cpu.packing import is_plain
from tokentree.engines.cpu.prepare import SPLIT
from tokentree.engines.foreign import kind_of
from tokentree.errors import ModelError

LEAST = 4  # rows of a product in float32: fewer take other loops

VECTOR = 64  # the most numbers that one step of a loop computes
_OF_NUMBERS = {torch.exp, Tensor.exp, torch.sigmoid, Tensor.sigmoid, silu, softplus, torch.tanh, Tensor.tanh}
_NAMES = {"exp", "sigmoid", "silu", "soft_cap", "softplus", "tanh"}
_GATES = {"sigmoid", "softplus"}  # those that no layer of ours computes
_TURNED: set[Any] = {Tensor.t, torch.t, *(vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT"))}
APART = (slice(None), None)  # the index by which the parts of a weight multiply apart
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_ABOUT = {
    "__get__",
    "__repr__",
    "dim",
    "element_size",
    "is_floating_point",
    "numel",
    "size",
    "stride",
    "untyped_storage",
}
_CONVERTED = {Tensor.float, Tensor.to, Tensor.type, Tensor.bfloat16}


class SteadyWeight(Tensor):
    """A weight [outputs, inputs] or [experts, outputs, inputs], whose products with rows are steady, and also those of
    its transpose. It is packed when it is first used. For all else it is the tensor that it was, unless that was
    released."""

    _layers: dict[int | None, tuple[nn.Module, Tensor | None]]  # by the address of a bias, which is kept beside it
    _parts: dict[Any, SteadyWeight]  # made of it
    _release: bool  # once it is packed, so that memory doesn't double
    _owner: Tensor | None  # what holds the same numbers, and lets go of them too
    _gone: bool

    @classmethod
    def of(cls, weight: Tensor, owner: Tensor | None = None, release: bool = False) -> SteadyWeight:
        made = weight.detach().as_subclass(cls)
        made._layers, made._parts, made._owner, made._release, made._gone = {}, {}, owner, release, False
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is linear:
            given = *args, *(named[name] for name in ("input", "weight", "bias") if name in named), None
            x, weight, bias = given[:3]
            if isinstance(weight, cls) and weight.ndim == 2 and not isinstance(x, cls):
                return weight._times(x, bias)
        elif func in _PRODUCTS and isinstance(args[1], cls) and args[1].ndim == 2 and not isinstance(args[0], cls):
            return args[1]._turned()._times(args[0], None)
        elif func in _PRODUCTS and isinstance(args[0], cls) and "each" in args[0]._parts:
            each: Any = args[0]._parts["each"]
            turned = (rows.transpose(-1, -2) for rows in args[1])
            made = [each[part]._times(rows, None).transpose(-1, -2) for part, rows in enumerate(turned)]
            return torch.stack(made)
        elif func in _PRODUCTS and isinstance(args[0], cls) and args[0].ndim == 2 and not isinstance(args[1], cls):
            return args[0]._times(args[1].transpose(-1, -2), None).transpose(-1, -2)
        elif func is torch.baddbmm and isinstance(args[2], cls) and not named and not isinstance(args[1], cls):
            bias, x, weight = args
            return torch.stack([rows @ weight[part] for part, rows in enumerate(x)]) + bias
        elif func in _TURNED and args[0].ndim == 2:
            return args[0]._turned()
        elif func is Tensor.__getitem__ and isinstance(args[0], cls) and args[0].ndim == 3 and _whole(args[1]):
            return args[0]._part(int(args[1]))
        elif func is Tensor.__getitem__ and isinstance(args[0], cls) and args[0].ndim == 3 and args[1] == APART:
            return args[0]._apart()
        elif func is Tensor.view and isinstance(args[0], cls) and args[0].ndim == 2:
            return args[0]._viewed(args[1:])
        if func.__name__ not in _ABOUT and any(isinstance(x, cls) and x._gone for x in args):
            raise ModelError(f"weights that were packed and released are asked for {func.__name__}")
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **named)
            if func in _CONVERTED and isinstance(args[0], cls):
                own = args[0]
                return own if made.dtype is own.dtype else own._parts.setdefault(made.dtype, cls.of(made))
        return made

    def _part(self, index: int) -> SteadyWeight:
        with torch._C.DisableTorchFunctionSubclass():
            if index not in self._parts and self._release:
                self._parts = {at: SteadyWeight.of(part.clone(), release=True) for at, part in enumerate(self)}
                self._let_go()
            elif index not in self._parts:
                self._parts[index] = SteadyWeight.of(self[index])
            return self._parts[index]

    def _apart(self) -> SteadyWeight:
        """[parts, 1, outputs, inputs], by which each part multiplies rows of its own."""
        with torch._C.DisableTorchFunctionSubclass():
            if "apart" not in self._parts:
                made = self._parts["apart"] = SteadyWeight.of(self[:, None])
                made._parts["each"] = self
            return self._parts["apart"]

    def _viewed(self, shape: tuple[Any, ...]) -> SteadyWeight:
        """The same numbers in another shape."""
        with torch._C.DisableTorchFunctionSubclass():
            if shape not in self._parts:
                self._parts[shape] = SteadyWeight.of(self.view(*shape))
            return self._parts[shape]

    def _turned(self) -> SteadyWeight:
        with torch._C.DisableTorchFunctionSubclass():
            if "turned" not in self._parts:
                self._parts["turned"] = SteadyWeight.of(self.t(), self, self._release)
            return self._parts["turned"]

    def _times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., outputs] of ``x`` [..., inputs]."""
        if not x.numel():  # an expert that no row was sent to
            return x.new_zeros(*x.shape[:-1], self.shape[0])
        with torch._C.DisableTorchFunctionSubclass():
            own = bias if isinstance(bias, nn.Parameter | SteadyWeight) else None  # any other is made for one call
            key = None if own is None else own.data_ptr()
            if key not in self._layers:
                if self._gone:
                    raise ModelError("weights that were packed and released are asked for another bias")
                weight = self.contiguous().as_subclass(Tensor)
                self._layers[key] = linear_of(weight, own), own
                if self._release:
                    self._let_go()
            layer, _ = self._layers[key]
            rows = x.reshape(-1, x.shape[-1])
            if isinstance(layer, OneDNNLinear) and len(rows) < LEAST:
                out = layer(pad(rows, (0, 0, 0, LEAST - len(rows))))[: len(rows)]
            else:
                out = layer(rows)
            made: Tensor = out.reshape(*x.shape[:-1], -1)
            return made if own is bias or bias is None else made + bias

    def _let_go(self) -> None:
        """Drops the numbers, and keeps the shape."""
        self.data, self._gone = self.new_zeros(1).expand(self.shape), True
        if isinstance(self._owner, SteadyWeight):
            self._owner._let_go()
        elif self._owner is not None:
            self._owner.data = self._owner.data.new_empty(0)


def _whole(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and not index.ndim and not index.is_floating_point())


def steady_weights(model: nn.Module, release: bool = False) -> None:
    """Exchanges the parameters of ``model`` (a `private_copy`) that are multiplied with, and aren't packed, for steady
    ones. Where their sizes leave less than a vector over, what is done to their products is steady too.

    Args:
        release: drop experts' weights once they are packed, as `prepare.pack` does.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.Conv1d):  # nobody multiplies with those
            continue
        for name, weight in module._parameters.items():
            if is_plain(weight) and weight.ndim in (2, 3) and _fits(weight):
                lets_go = release and weight.ndim == 3
                steady = SteadyWeight.of(weight, weight if lets_go else None, lets_go)
                module._parameters[name] = steady  # type: ignore[assignment]
    for module in [module for module in model.modules() if _leaves_vectors(module)]:
        module.forward = in_whole_vectors(module.forward)


def _leaves_vectors(module: nn.Module) -> bool:
    """Whether ``module`` may compute functions of single numbers on less than whole vectors."""
    return any(map(_leaves_over, [module, *module.children()])) or bool(_GATES & _named_in(module))


def _leaves_over(module: nn.Module) -> bool:
    """Whether a weight of ``module`` itself makes rows that aren't whole vectors."""
    held = [weight for weight in module.parameters(recurse=False) if isinstance(weight, SteadyWeight)]
    return any(size % VECTOR for weight in held for size in weight.shape[-2:])


def computes_numbers(module: nn.Module) -> bool:
    """Whether the forward of ``module`` itself calls functions of single numbers."""
    return bool(_NAMES & _named_in(module))


def _named_in(module: nn.Module) -> set[str]:
    """What the forward of a module's class names."""
    return {*unwrap(type(module).forward).__code__.co_names}


def in_whole_vectors(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, in which functions of single numbers give a number the same bits beside any others."""

    def steady(*args: Any, **kwargs: Any) -> Any:
        with _WholeVectors():
            return forward(*args, **kwargs)

    return steady


def whole_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` of single numbers, computed on whole vectors, and in one thread: torch computes what is left of a
    vector, at the end of each thread's share, by other instructions, which round differently."""
    left = -x.numel() % VECTOR
    if not left and x.numel() < SPLIT:
        return function(x)
    parts = pad(x.reshape(-1), (0, left)).split(SPLIT - VECTOR)
    return torch.cat([function(part) for part in parts])[: x.numel()].view(x.shape)


class _WholeVectors(TorchFunctionMode):
    """In here functions of single numbers are computed by `whole_vectors`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func not in _OF_NUMBERS
            or len(args) != 1
            or type(args[0]) is not Tensor
            or (kwargs and any(kwargs.values()))
        ):
            return func(*args, **(kwargs or {}))
        return whole_vectors(func, args[0])


def foreign_layers(model: nn.Module) -> list[str]:
    """The kinds of linear layers in ``model``, a copy with packed layers and steady weights, that multiply in a way
    of their own: those of other libraries, such as bitsandbytes' or GPTQ's, and types that nothing here packs."""
    return sorted(
        {
            kind_of(module)
            for module in model.modules()
            if hasattr(module, "in_features") and hasattr(module, "out_features") and _multiplies(module)
        }
    )


def _multiplies(module: nn.Module) -> bool:
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(value.ndim > 1 and not isinstance(value, SteadyWeight) for value in held)


def _fits(weight: Tensor) -> bool:
    return any(kind.fits(weight[0] if weight.ndim == 3 else weight) for kind in PACKED)
