"""A model made ready for an engine, without touching the one that was given.

`private_copy` copies the tree of modules and shares the weights; `pack` then exchanges, in that copy, the linear layers
for ones whose weights are packed once (`linear`), and whole modules for compiled ones (`fused`). torch's `F.linear`
packs weights again at every call on a CPU, which takes as long as the product itself. `steady_activations` exchanges
activations whose bits depend on how many values they are computed with.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokentree.engines.cpu.attention import TREE
from tokentree.engines.cpu.families.stack import Stack
from tokentree.engines.cpu.fused import FusedMLP, GeluMLP, NumberedMLP, fused_norm
from tokentree.engines.cpu.linear import (
    PackedEmbedding,
    PackedLinear,
    ReadableLinear,
    ScaledEmbedding,
    packed_linear,
)
from tokentree.engines.cpu.packing import Packing, is_plain
from tokentree.engines.foreign import ForeignCode, is_own
from tokentree.engines.rebound import Rebound
from tokentree.engines.support import decoder_layers
from tokentree.errors import ModelError


def private_copy(model: PreTrainedModel, owned: bool = False) -> PreTrainedModel:
    """A copy of the modules of ``model``, and of every configuration that one of them holds, at any depth. It shares
    the memory of the weights.

    What a user has put into the model comes along: a forward of a module's own runs on the copy's modules; a hook is
    called in the copy, and given the model's own module.

    Args:
        owned: nobody else uses ``model``, so its very parameters are shared. Otherwise each gets a twin, which stays as
            it is when the model's is converted, moved or freed.

    Raises:
        ModelError: if a forward was replaced by something that can't be made to run on the copy's modules.
    """
    copies: dict[int, Any] = {}  # of configurations, which hold one another
    seen: dict[int, nn.Module] = {}
    twins: dict[int, torch.Tensor] = {}

    def shared(tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors if owned else {name: _twin_of(tensor, twins) for name, tensor in tensors.items()}

    def own(value: Any) -> Any:
        if isinstance(value, PreTrainedConfig):
            return copy.deepcopy(value, copies)
        return copy.copy(value) if isinstance(value, dict) else value

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in seen:
            return seen[id(module)]
        if "_orig_mod" in module._modules:  # what `torch.compile` was given computes the same
            new = seen[id(module)] = twin(module._modules["_orig_mod"])  # type: ignore[arg-type]
            return new
        new = seen[id(module)] = module.__class__.__new__(module.__class__)
        new.__dict__ = {name: own(value) for name, value in module.__dict__.items()}
        new.__dict__.pop("_compiled_call_impl", None)
        new._modules = {name: child if child is None else twin(child) for name, child in module._modules.items()}
        new._parameters, new._buffers = shared(new._parameters), shared(new._buffers)
        for table in (new._forward_pre_hooks, new._forward_hooks):
            table.update((number, OnOriginal(hook, module)) for number, hook in table.items() if _is_a_user_s(hook))
        return new

    result = twin(model).eval()
    _rebind(model, seen)
    assert isinstance(result, PreTrainedModel)
    return result


class OnOriginal:
    """A hook that is given the model's own module, which a user may know it by, and not its twin."""

    def __init__(self, hook: Any, module: nn.Module) -> None:
        self._hook, self._module = hook, weakref.ref(module)

    def __call__(self, twin: nn.Module, *rest: Any) -> Any:
        return self._hook(self._module() or twin, *rest)


def _is_a_user_s(hook: Any) -> bool:
    """Whether a hook isn't of a kind of torch's or transformers' own: those, as for pruning, change the module that
    they're given."""
    homes = {(getattr(part, "__module__", None) or "").split(".")[0] for part in (hook, *type(hook).__mro__)}
    return not homes & {"torch", "transformers"}


def _twin_of(tensor: torch.Tensor | None, twins: dict[int, torch.Tensor]) -> torch.Tensor | None:
    """Another tensor in the same memory; the same one for all modules that share it."""
    if tensor is None or type(tensor) not in (torch.Tensor, nn.Parameter) or type(tensor.data) is not torch.Tensor:
        return tensor
    if id(tensor) not in twins:
        values, parameter = tensor.detach(), isinstance(tensor, nn.Parameter)
        if not parameter and values.ndim == 1:  # such as frequencies, which forwards of the model's own may change
            values = values.clone()
        twins[id(tensor)] = nn.Parameter(values, False) if parameter else values
    return twins[id(tensor)]


def _rebind(model: nn.Module, twins: dict[int, nn.Module]) -> None:
    """Makes what the twins keep beside parameters and modules, such as a forward of their own, reach twins alone."""
    rebound = Rebound(twins)
    for name, module in model.named_modules():
        own = twins[id(module)].__dict__
        for key, value in own.items():
            if key in OF_TORCH:
                continue
            where = f"{name}.{key}" if name else key
            if isinstance(value, dict):
                own[key].update((part, rebound.of(held, f"{where}[{part!r}]")) for part, held in value.items())
            else:
                own[key] = rebound.of(value, where)


OF_TORCH = set(nn.Module().__dict__)  # what every module keeps


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Makes all modules of ``model``, a `private_copy`, use the attention of that name."""
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, PreTrainedConfig):
                value._attn_implementation = name
    if name == TREE:  # experts one after another, as they are in any batch
        set_experts(model, "eager")


def set_experts(model: PreTrainedModel, name: str) -> None:
    """Makes all modules of ``model``, a `private_copy`, use the implementation of experts of that name."""
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, PreTrainedConfig):
                value._experts_implementation = name


def in_float32(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A `private_copy` of ``model`` that computes in float32, on weights converted when a layer runs, and dropped
    behind it: no more than one layer is there twice."""
    copied = private_copy(model)
    set_attention(copied, attention)
    try:
        layers = list(decoder_layers(copied))
    except ModelError:  # it has no list of them
        layers = []
    inside = {id(module) for layer in layers for module in layer.modules()}
    _widen([module for module in copied.modules() if id(module) not in inside], {})
    for layer in layers:
        modules = list(layer.modules())
        rounded = [(module._parameters, module._buffers) for module in modules]

        def widen(_module: nn.Module, _inputs: Any, modules: list[nn.Module] = modules) -> None:
            _widen(modules, {})

        def restore(
            _module: nn.Module, _inputs: Any, _out: Any, modules: list[nn.Module] = modules, rounded: Any = rounded
        ) -> None:
            for module, (parameters, buffers) in zip(modules, rounded, strict=True):
                module._parameters, module._buffers = parameters, buffers

        layer.register_forward_pre_hook(widen)
        layer.register_forward_hook(restore)
    return copied


def _widen(modules: list[nn.Module], known: dict[int, Any]) -> None:
    """Exchanges what ``modules`` hold, in new dictionaries, for the same numbers in float32."""

    def wide(value: Any) -> Any:
        if value is None or value.dtype not in (torch.bfloat16, torch.float16):
            return value
        if id(value) not in known:
            known[id(value)] = nn.Parameter(value.detach().float(), requires_grad=False)
        return known[id(value)] if isinstance(value, nn.Parameter) else known[id(value)].data

    for module in modules:
        module._parameters = {name: wide(value) for name, value in module._parameters.items()}
        module._buffers = {name: wide(value) for name, value in module._buffers.items()}


def pack(model: PreTrainedModel, packing: Packing, release: bool, whole: type[Stack] | None = None) -> None:
    """Exchanges, in ``model`` (a `private_copy` of one on a CPU), linear layers for packed ones where this CPU has any
    for them, and modules that `fused` has.

    Args:
        packing: how, where types and sizes suit.
        release: drop each weight from the layer it came from once it is packed, so that memory does not double. Only
            for a model that nobody else uses. Embeddings that share a weight with a layer read it there (bfloat16), or
            keep it.
        whole: exchange all that a `Stack` of this family takes, which must fit; ``model`` can't run by itself then.
    """
    code = ForeignCode.of(model)
    for parent, name, child in _children(model) if whole is not None else ():
        if ScaledEmbedding.fits(child):
            setattr(parent, name, ScaledEmbedding.of(child))
    tables = [entry for entry in _children(model) if isinstance(entry[2], nn.Embedding)]

    def drop(*layers: Any, packed: nn.Module | None = None) -> None:
        for layer in layers if release else ():
            tied = [entry for entry in tables if entry[2].weight is layer.weight]
            if isinstance(packed, PackedLinear) and all(type(table) is nn.Embedding for _, _, table in tied):
                for parent, name, _ in tied:
                    setattr(parent, name, PackedEmbedding(packed))
            elif tied:
                continue
            layer.weight.data = layer.weight.data.new_empty(0)

    fusing: list[Any] = [FusedMLP, GeluMLP, NumberedMLP, *(whole.mixers.values() if whole is not None else ())]
    for parent, name, child in _children(model):
        if not code.leaves(child):
            continue
        if (fused := next((kind for kind in fusing if kind.fits(child, packing)), None)) is not None:
            setattr(parent, name, fused(child, packing))
            drop(*fused.joined(child))
        elif (norm := fused_norm(child)) is not None:
            setattr(parent, name, norm)
    shared: dict[tuple[Any, ...], nn.Module] = {}  # packed layers, by the weights that several layers may have
    for parent, name, layer in _children(model):
        weights = type(layer), id(getattr(layer, "weight", None)), id(getattr(layer, "bias", None))
        read = id(layer) in code.at or name in weights_read(type(parent).forward)
        packed = None if read else shared.get(weights) or _packed(layer, packing)
        if packed is not None and id(layer) not in code.below:
            setattr(parent, name, packed)
            shared[weights] = packed
            drop(layer, packed=packed)
        elif packed is not None and isinstance(layer, nn.Linear):
            setattr(parent, name, ReadableLinear(layer, packed))


@functools.cache
def weights_read(forward: Callable[..., Any]) -> frozenset[str]:
    """The parts of a module whose weights its ``forward`` reads, as routers' do."""
    names, before = set[str](), ""
    for step in dis.get_instructions(inspect.unwrap(forward)):
        if step.opname == "LOAD_ATTR" and step.argval == "weight":
            names.add(before)
        before = step.argval if step.opname == "LOAD_ATTR" else ""
    return frozenset(names)


def _packed(layer: nn.Module, packing: Packing) -> nn.Module | None:
    """The packed layer that stands for ``layer``, if it is a linear one and there is one."""
    # other subclasses may do more than a product; Falcon's computes the same in two steps
    if type(layer).__name__ not in ("Linear", "Conv1D", "FalconLinear") or not isinstance(layer, nn.Linear | Conv1D):
        return None
    if not is_plain(layer.weight):
        return None
    plain = layer if type(layer) is nn.Linear else _plain(layer)
    return packing.pack(plain) if packing.fits(plain) else packed_linear(plain.weight, plain.bias)


def _plain(layer: nn.Linear | Conv1D) -> nn.Linear:
    """A linear layer with the weight and bias of one that computes the same in another way."""
    weight = layer.weight.detach()
    weight = weight.t().contiguous() if isinstance(layer, Conv1D) else weight
    plain = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return plain


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every module with its parent and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]


class SteadyActivation(nn.Module):
    """An activation, on a CPU, that gives a value the same bits beside any other values.

    torch splits a large tensor among threads, and computes what is left at the end of each share, less than a vector,
    by other instructions, which round differently. Where rows are whole vectors, its own function runs, on few enough
    rows at a time that torch doesn't split them; elsewhere one made of operations that round the same either way.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self._steady = STEADY[type(own).__name__]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        if width % VECTOR == 0 and width < SPLIT:
            parts = x.contiguous().view(-1, width).split((SPLIT - 1) // width)
            return torch.cat([self.own(part) for part in parts]).view(x.shape)
        return self._steady(x.float()).to(x.dtype)


SPLIT = 16384  # values of a tensor from which on torch may split it (its GELU's least, 0x4000; others' is larger)
VECTOR = 64  # the most values that one step of a loop computes: two vectors of bfloat16


def steady_silu(x: torch.Tensor) -> torch.Tensor:
    return x / x.neg().exp_().add_(1)


def steady_gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    inner = (x * x).mul_(0.044715).add_(1).mul_(x).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1).mul_(x).mul_(0.5)


def steady_bloom_gelu(x: torch.Tensor) -> torch.Tensor:
    return (x * x).mul_(0.044715).add_(1).mul_(x).mul_(0.79788456).tanh_().add_(1).mul_(x).mul_(0.5)


STEADY = {
    "SiLU": steady_silu, "SiLUActivation": steady_silu, "GELUTanh": steady_gelu_tanh, "BloomGelu": steady_bloom_gelu
}  # fmt: skip


def steady_activations(model: PreTrainedModel) -> None:
    """Exchanges the activations of ``model`` (a `private_copy`) whose bits depend on how many rows there are."""
    code = ForeignCode.of(model)
    for parent, name, child in _children(model):
        if type(child).__name__ in STEADY and is_own(type(child)) and id(child) not in code.at:
            setattr(parent, name, SteadyActivation(child))
