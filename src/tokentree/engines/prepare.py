"""A model made ready for an engine, without touching the one that was given.

`private_copy` copies the tree of modules and shares the weights; `pack_linears` then exchanges, in that copy, the
linear layers for ones whose weights are packed once. torch's `F.linear` packs them again at every call on a CPU,
which takes as long as the product itself. `steady_activations` exchanges activations whose bits depend on how many
values they are computed with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, SiLUActivation
from transformers.pytorch_utils import Conv1D

from tokentree.engines import kernels


def private_copy(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A copy of the modules and the configuration of ``model`` that shares its weights and uses ``attention``."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = attention
    seen: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in seen:
            return seen[id(module)]
        new = seen[id(module)] = module.__class__.__new__(module.__class__)
        own = module.__dict__.items()
        new.__dict__ = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in own}
        new._modules = {name: child if child is None else twin(child) for name, child in module._modules.items()}
        if new.__dict__.get("config") is model.config:
            new.__dict__["config"] = config
        return new

    result = twin(model).eval()
    assert isinstance(result, PreTrainedModel)
    return result


class PackedLinear(nn.Module):
    """A linear layer on weights that are packed once, by `kernels`. A row has the same bits beside any others."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = kernels.pack(weight)
        self.start = torch.zeros(len(weight)) if bias is None else bias.detach().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.product(x.flatten(0, -2), self.weight, self.start).view(*x.shape[:-1], len(self.start))


class OneDNNLinear(nn.Module):
    """A linear layer on oneDNN's own weight layout. A row has the same bits beside any number of rows from 2 on."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine's torch can pack linear layers of that type."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: PreTrainedModel, release: bool) -> None:
    """Exchanges the linear layers of ``model`` (a `private_copy`) for packed ones.

    Args:
        release: drop each weight from the layer it came from once it is packed, so that memory does not double. Only
            for a model that nobody else uses. Embeddings that are tied to a layer stay.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parent, name, layer in list(_linears(model)):
        weight = layer.weight.t().contiguous() if isinstance(layer, Conv1D) else layer.weight
        setattr(parent, name, (PackedLinear if kernels.fits(weight) else OneDNNLinear)(weight, layer.bias))
        if release and id(layer.weight) not in embeddings:
            layer.weight.data = layer.weight.data.new_empty(0)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | Conv1D]]:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            # other subclasses may do more than a product; Falcon's computes the same in two steps
            if type(child).__name__ in ("Linear", "Conv1D", "FalconLinear") and isinstance(child, nn.Linear | Conv1D):
                yield parent, name, child


class SteadyActivation(nn.Module):
    """An activation, on a CPU, that gives a value the same bits beside any other values.

    torch splits a tensor among threads and computes what is left at the end of each share, less than a vector, by other
    instructions, which round differently. Where rows are wide enough that nothing is ever left, its own function runs;
    elsewhere one made of operations that round the same either way.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self._steady = steady_silu if isinstance(own, nn.SiLU | SiLUActivation) else steady_gelu_tanh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = math.lcm(*range(1, torch.get_num_threads() + 1))
        if x.shape[-1] % (VECTOR * shares) == 0:
            return self.own(x.contiguous())  # type: ignore[no-any-return]
        return self._steady(x.float()).to(x.dtype)


VECTOR = 64  # the most values that one step of a loop computes: two vectors of bfloat16


def steady_silu(x: torch.Tensor) -> torch.Tensor:
    return x / x.neg().exp_().add_(1)


def steady_gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    inner = (x * x).mul_(0.044715).add_(1).mul_(x).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1).mul_(x).mul_(0.5)


def steady_activations(model: PreTrainedModel) -> None:
    """Exchanges the activations of ``model`` (a `private_copy`) whose bits depend on how many rows there are."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.SiLU | SiLUActivation | GELUTanh):
                setattr(parent, name, SteadyActivation(child))
