"""Code in a model that isn't what its classes in transformers or torch say: hooks, forwards put in place of others,
adapters, modules of other classes.

What is compiled or fused must stand for nothing else than such a class; where there is other code, the model's own
modules run, and it with them. What can't be run in a copy of the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import unwrap
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokentree.errors import ModelError

HOMES = tuple(str(Path(str(package.__file__)).parent) for package in (torch, transformers))
# whose hooks give out what passes by, or let gradients through, and change nothing
OBSERVERS = {"transformers.utils.output_capturing", "transformers.modeling_utils"}

LIBRARIES = {"bitsandbytes": "bitsandbytes'", "torchao": "torchao's"}  # whose layers and weights are named for them


@dataclass(frozen=True)
class ForeignCode:
    """Where a model has such code; modules are named by their ids.

    Args:
        at: modules that do something else than their class in transformers or torch.
        around: these, and all that contain one.
        below: what is inside of modules that have a forward of their own, which may read any weight there.
    """

    at: set[int]
    around: set[int]
    below: set[int]

    @classmethod
    def of(cls, model: nn.Module) -> ForeignCode:
        found, known = cls(set(), set(), set()), dict[type, bool]()

        def look(module: nn.Module, below: bool) -> bool:
            kind = type(module)
            if kind not in known:
                known[kind] = is_own(kind)
            other = not known[kind] or "forward" in vars(module) or hasattr(module, "parametrizations")
            at = other or next(hooks_of(module), None) is not None
            inside = [look(child, below or other) for child in module._modules.values() if child is not None]
            if at:
                found.at.add(id(module))
            if at or any(inside):
                found.around.add(id(module))
            if below:
                found.below.add(id(module))
            return at or any(inside)

        look(model, False)
        return found

    def leaves(self, module: nn.Module) -> bool:
        """Whether one may stand for ``module``, and all in it, that does what its class says."""
        return id(module) not in self.around and id(module) not in self.below


def hooks_of(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """The hooks around a module's forward, by their numbers, which are never used twice; but for mere observers."""
    for table in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in table.items():
            if getattr(hook, "__module__", None) not in OBSERVERS:
                yield number, hook


def is_own(kind: type[nn.Module]) -> bool:
    """Whether a class is one of transformers or torch, with the forward that it came with, and the functions that this
    calls."""
    if kind.__module__.split(".")[0] not in ("torch", "transformers"):
        return False
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    forward = unwrap(kind.forward)
    named = {f"{owner.__qualname__}.forward", "_forward_unimplemented"}
    return forward.__qualname__ in named and at_home(kind.forward) and not _replaced(forward)


def same_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` computes as a ``kind`` of transformers does, instruction by instruction."""
    return same_code(type(module).forward, kind.forward) and is_own(type(module)) and is_own(kind)


def same_code(one: Any, other: Any) -> bool:
    """Whether two functions compute the same, instruction by instruction."""
    ours, theirs = (unwrap(each).__code__ for each in (one, other))
    return (ours.co_code, ours.co_names, ours.co_consts) == (theirs.co_code, theirs.co_names, theirs.co_consts)


def not_in_a_copy(model: PreTrainedModel) -> str | None:
    """Why ``model`` can't be run as a copy: it has code that a copy would leave out. None if it can be."""
    name = type(model).__name__
    if global_hooks():
        return (
            "a hook for all modules is set (register_module_forward_hook), and an engine runs a copy of a model's: "
            "register it on the modules that it is for, or remove it"
        )
    kind = model.config.get_text_config()._attn_implementation
    attends = ALL_ATTENTION_FUNCTIONS.get(kind) if kind else None
    if attends is not None and "/" not in kind and not at_home(attends):
        return (
            f"{name} attends by the function {_name(attends)!r} that was registered as {kind!r}, and it can't be told "
            "of a tree: use model.set_attn_implementation('sdpa')"
        )
    if any(changes_weights(module) for module in model.modules()):
        return f"{name} divides its weights in its first forward: let the model run once before"
    if told := drops(model):
        return f"{name} would give another text each time: {told}; call model.eval() first"
    for module in model.modules():
        if getattr(module, "merged", False) and getattr(module, "disable_adapters", False):
            return (
                f"{name} has adapters that are merged and disabled at once, so that its next forward would change its "
                "weights: call unmerge_adapter() first"
            )
        if kind in (None, "eager") and "eager_attention_forward" in _replaced(unwrap(type(module).forward)):
            return (
                f"the eager attention of {name} was replaced by a function of another library, which can't be told of "
                "a tree: use model.set_attn_implementation('sdpa')"
            )
    return None


def changes_weights(module: nn.Module) -> bool:
    """Whether the next forward of ``module`` changes its weights, as RWKV's first one does."""
    return getattr(module, "layers_are_rescaled", True) is False and not module.training


def drops(model: nn.Module) -> str | None:
    """Which module drops values at random, in words: one in training mode that has a probability for it."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        chances = {key: value for key, value in vars(module).items() if "dropout" in key or "layerdrop" in key}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            chances["p"] = module.p
        for key, value in chances.items():
            if isinstance(value, float) and value > 0:
                return f"{name or type(model).__name__} is in training mode, and its {key} is {value:g}"
    return None


def runs_more(model: nn.Module) -> bool:
    """Whether a forward runs hooks, or forwards of modules' own, which may do more than compute."""
    return any("forward" in vars(module) or next(hooks_of(module), None) for module in model.modules())


@contextmanager
def explained(model: nn.Module) -> Iterator[None]:
    """Errors of a forward in which such code runs as `ModelError`, with what it may be that went wrong."""
    try:
        yield
    except ModelError as error:
        if not runs_more(model):
            raise
        raise ModelError(f"{error}; its hooks or replaced forwards see a tree's rows, which are in no order") from None
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if not runs_more(model):
            raise
        raise ModelError(
            f"hooks or replaced forwards in {type(model).__name__} fail on the rows of a tree: "
            f"{type(error).__name__}: {error}"
        ) from error


def global_hooks() -> bool:
    """Whether there are hooks around the forwards of all modules."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def inner_model(model: Any) -> PreTrainedModel:
    """The transformers model in what a library put around one: peft's, or `torch.compile`.

    Raises:
        ModelError: if there is none in it, or peft puts numbers of its own in front of a text.
    """
    whole = model
    while not isinstance(model, PreTrainedModel):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ModelError("peft's prompts and prefixes stand in front of a text as no tokens do: merge or drop them")
        parts = getattr(model, "_modules", {})
        model = next((parts[name] for name in ("_orig_mod", "base_model", "model") if name in parts), None)
        if model is None:
            raise ModelError(f"a {type(whole).__name__} is not a transformers model: give that, a name or a folder")
    return model


def kind_of(layer: nn.Module) -> str:
    """What a layer is called: by its class, or by what one of `LIBRARIES` made of it or of its weights."""
    held = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    for kind in (type(layer), *map(type, held)):
        library = kind.__module__.split(".")[0]
        if library in LIBRARIES:
            return f"{LIBRARIES[library]} {kind.__name__}"
    return type(layer).__name__


def of_libraries(model: nn.Module) -> list[str]:
    """What `LIBRARIES` put into ``model``."""
    return sorted({kind for kind in map(kind_of, model.modules()) if kind.startswith(tuple(LIBRARIES.values()))})


def names_in(code: CodeType) -> set[str]:
    """All names that code speaks of, also in functions within it."""
    inner = (names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return {*code.co_names}.union(*inner)


def _replaced(function: Any) -> set[str]:
    """The functions that ``function`` calls by name and that come from elsewhere."""
    scope = function.__globals__
    named = ((name, scope.get(name)) for name in function.__code__.co_names)
    return {name for name, value in named if isinstance(value, FunctionType) and not at_home(value)}


def at_home(function: Any) -> bool:
    """Whether a function, and all that is wrapped around it, was written in torch or transformers."""
    while function is not None:
        function = getattr(function, "func", function)  # of a partial
        code = getattr(function, "__code__", None)
        if code is not None and not code.co_filename.startswith(HOMES):
            return False
        if code is None and type(function).__module__.split(".")[0] not in ("builtins", "torch", "transformers"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
