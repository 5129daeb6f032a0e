"""Whether a model is still what an engine was made of: the same modules, hooks, adapters, settings and weights.

torch counts the changes that are made through a tensor. Those that go past it (``.data``, numpy) show in sums over all
values, which take as long to read as one forward does: they are made where a text, or a batch of texts, begins; beside
others that are decoded, now and then. In between, some values of each tensor are looked at.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator
from inspect import unwrap
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokentree.engines.foreign import at_home, drops, global_hooks, hooks_of, is_own, names_in
from tokentree.exclusive import neutral

ROW = 512  # words that are added up
PLACES, TOGETHER = 16, 8  # at which values of each tensor are looked at, so many side by side
ASIDE = {  # settings that don't change what a forward computes
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "_name_or_path", "transformers_version",
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "architectures", "_output_attentions",
}  # fmt: skip
PLAIN = {torch.Tensor, nn.Parameter}
UNREAD = {"training", "config", "generation_config", "gradient_checkpointing", "_gradient_checkpointing_func"}
SCALARS = {bool, int, float, complex, str, type(None)}
TORCH_S = set(vars(nn.Module()))  # what every module has


class Watch:
    """Remembers what ``model`` is made of, but keeps neither it nor its weights.

    Args:
        model: it is looked at now, and whenever `change` is called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._name = weakref.ref(model), type(model).__name__
        self._facts, tensors = _look(model)
        self._values, self._sums = values_of(tensors), sums_of(tensors)

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, or None if it is gone."""
        return self._model()

    def change(self, briefly: bool = False) -> str | None:
        """What is no longer as it was, in words, or None. A model that is gone can't change.

        Args:
            briefly: look at some values of each tensor alone.
        """
        model = self._model()
        if model is None:
            return None
        if global_hooks():
            return "a hook for all modules was set"
        facts, tensors = _look(model)
        if facts != self._facts:
            return _difference(model, self._facts, facts)
        if values_of(tensors) != self._values or not (briefly or sums_of(tensors) == self._sums):
            return f"weights of {self._name} have other values"
        return drops(model)


class Shared:
    """Remembers tensors that a copy of a model has in common with it, to be looked at in every step.

    Args:
        tensors: they are kept, and with them their memory.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        # on a GPU, reading a value takes as long as a small model's step
        self._sampled = [tensor for tensor in self._tensors if tensor.device.type == "cpu"]
        self._seen = self._look()

    def changed(self) -> bool:
        return bool(self._tensors) and self._look() != self._seen

    def _look(self) -> tuple[list[int], list[bytes]]:
        return [version_of(tensor) for tensor in self._tensors], values_of(self._sampled)


def in_common(model: nn.Module, copy: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of ``copy`` that lie in the memory of those of ``model``."""

    def tensors(module: nn.Module) -> Iterator[torch.Tensor]:
        return itertools.chain(module.parameters(), module.buffers())

    theirs = {_storage(tensor) for tensor in tensors(model)} - {0}
    return [tensor for tensor in tensors(copy) if _storage(tensor) in theirs]


def _storage(tensor: torch.Tensor) -> int:
    plain = type(tensor) in PLAIN and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def _look(model: nn.Module) -> tuple[list[Any], list[torch.Tensor]]:
    """What tells a model from one that was changed: facts, those of modules first, in order; and its tensors."""
    facts, tensors, seen = list[Any](), list[torch.Tensor](), set[int]()
    kinds: dict[type, tuple[bool, frozenset[str]]] = {}
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own, kind = module.__dict__, type(module)
        if kind not in kinds:
            kinds[kind] = _names(kind, kind.forward)  # type: ignore[arg-type]
        as_it_came, named = kinds[kind]
        fact: list[Any] = [weakref.ref(module), kind]
        if own["_forward_pre_hooks"] or own["_forward_hooks"]:
            fact += [number for number, _ in hooks_of(module)]
        if "forward" in own:
            as_it_came = False
            named = named | _spoken_of(own["forward"]) | {"forward"}
        found = list(own["_parameters"].values())
        if own.get("rope_type") in ("dynamic", "longrope"):  # what they keep follows the length of a text
            named = frozenset[str]()
        else:
            found += own["_buffers"].values()
        for name in sorted(own.keys() & named):
            value = own[name]
            fact += name, value if type(value) in SCALARS else _known(value)
            if not as_it_came:  # transformers' own modules leave there what they computed
                found.append(value)
        for value in found:
            if isinstance(value, torch.Tensor):
                fact += _tensor(value)
                tensors.append(value)
        facts.append(fact)
        stack += [child for child in reversed(own["_modules"].values()) if child is not None]
    facts += ([kind, *_functions(kind)] for kind in kinds)
    config: Any = model.config
    attention = ALL_ATTENTION_FUNCTIONS.get(config.get_text_config()._attn_implementation)
    facts += [None if attention is None or at_home(attention) else attention, _settings(config)]
    return facts, tensors


def _tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    return _address(tensor), version_of(tensor), tensor.dtype, tensor.shape


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return id(tensor)


def version_of(tensor: torch.Tensor) -> int:
    """How often torch knows it to have been changed."""
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
@neutral()
def sums_of(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """What tells all values of each from others: sums of its words, row by row."""
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        if not _can_be_read(tensor):
            continue
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
        rows = len(bits) // (8 * ROW)
        whole, rest = bits[: rows * 8 * ROW], bits[rows * 8 * ROW :]
        if whole.data_ptr() % 8:
            whole = whole.clone()
        sums.setdefault(tensor.device, []).extend((whole.view(torch.int64).view(-1, ROW).sum(1), rest.long()))
    return [torch.cat(parts).cpu().numpy().tobytes() for parts in sums.values()]


def _can_be_read(tensor: torch.Tensor) -> bool:
    strided = type(tensor) in PLAIN and tensor.layout is torch.strided
    return strided and not tensor.is_meta and tensor.numel() > 0


@torch.no_grad()
@neutral()
def values_of(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """Some values of each, those of a type and device behind one another."""
    groups: dict[tuple[torch.dtype, torch.device, int], list[torch.Tensor]] = {}
    for tensor in tensors:
        count = tensor.numel()
        if not _can_be_read(tensor):
            continue
        if not tensor.is_contiguous():
            part = tensor.flatten()[:: max(1, count // PLACES)]
        elif count >= PLACES * TOGETHER:
            part = tensor.as_strided((PLACES, TOGETHER), (count // PLACES, 1))
        else:
            part = tensor.view(-1)
        groups.setdefault((tensor.dtype, tensor.device, part.ndim), []).append(part)
    return [torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes() for parts in groups.values()]


def _known(value: Any) -> Any:
    """What is remembered of an attribute."""
    if type(value) in SCALARS:
        return value
    if isinstance(value, list | tuple):
        return [_known(part) for part in value]
    if isinstance(value, dict):
        return [(name, _known(part)) for name, part in value.items()]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, torch.Tensor):
        return None  # with the other tensors
    try:
        return weakref.ref(value)
    except TypeError:
        return type(value)


@functools.cache
def _names(kind: Any, forward: Any) -> tuple[bool, frozenset[str]]:
    """Whether a class is as it came with transformers or torch, and the attributes that its own methods speak of:
    others are a user's, and may count the calls of a hook."""
    found = set[str]()
    for base in kind.__mro__:
        if base in PreTrainedModel.__mro__ or base.__module__.startswith("transformers.generation"):
            continue
        for member in vars(base).values():
            found |= _spoken_of(member)
    return is_own(kind), frozenset((found | _spoken_of(forward)) - TORCH_S - UNREAD)


def _spoken_of(member: Any) -> set[str]:
    """The names in the code of a function, a property, or what stands for one."""
    function = getattr(member, "fget", member)
    function = getattr(function, "func", getattr(function, "__func__", function))  # of a partial, of a method
    code = getattr(unwrap(function), "__code__", None) if callable(function) else None
    return names_in(code) if code is not None else set()


def _functions(kind: type[nn.Module]) -> list[Any]:
    """A class's forward, and the functions that this calls by name."""
    forward = unwrap(kind.forward)
    scope, code = getattr(forward, "__globals__", {}), getattr(forward, "__code__", None)
    named = () if code is None else code.co_names
    return [kind.forward, *(scope[name] for name in named if callable(scope.get(name)))]


def _settings(config: Any) -> Any:
    """A configuration's values, also those of its parts, but for what doesn't matter."""
    if not hasattr(config, "to_dict"):
        return _known(config)
    own = vars(config).items()
    return [(name, _settings(value)) for name, value in own if name not in ASIDE and not name.startswith("_attn")]


def _difference(model: nn.Module, before: list[Any], after: list[Any]) -> str:
    if len(after) != len(before):
        return f"it has {'more' if len(after) > len(before) else 'fewer'} modules"
    names = [name for name, _ in model.named_modules()]
    place = next(i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new)
    kind = type(model).__name__
    if place < len(names):
        return f"{names[place] or kind} is not as it was"
    if place >= len(after) - 2:
        return f"the {'configuration' if place == len(after) - 1 else 'attention'} of {kind} is not as it was"
    return f"the class {after[place][0].__name__} is not as it was"
