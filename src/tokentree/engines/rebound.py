"""Functions of a model's modules, bound to the modules of a copy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from tokentree.engines.foreign import names_in
from tokentree.errors import ModelError

LIBRARIES = {"torch", "transformers", "peft", "accelerate"}  # whose own functions know no module but what they're given


class Rebound:
    """Makes of a value that reaches a model's modules one that reaches their twins: of modules, of their methods, of
    functions that close over them, name them among their globals, or are given them beforehand. What a function keeps
    beside them is shared.

    Args:
        twins: by the id of the original.
    """

    def __init__(self, twins: Mapping[int, nn.Module]) -> None:
        self._twins = twins
        self._seen: dict[int, Any] = {}
        self._alive: list[Any] = []  # as ids are of what is alive

    def of(self, value: Any, where: str) -> Any:
        """``value``, or its twin.

        Raises:
            ModelError: if it is an object that can't be known and that reaches modules, named by ``where``.
        """
        if isinstance(value, nn.Module):
            return self._twins.get(id(value), value)
        if id(value) in self._seen:
            return self._seen[id(value)]
        if not isinstance(value, list | tuple | MethodType | functools.partial | FunctionType) and not callable(value):
            return value
        self._alive.append(value)
        self._seen[id(value)] = value  # what reaches itself
        self._seen[id(value)] = made = self._made(value, where)
        return made

    def _made(self, value: Any, where: str) -> Any:
        if isinstance(value, list | tuple):
            parts = [self.of(part, where) for part in value]
            same = all(part is own for part, own in zip(parts, value, strict=True))
            return value if same else parts if isinstance(value, list) else tuple(parts)
        if isinstance(value, MethodType):
            owner, function = self.of(value.__self__, where), self.of(value.__func__, where)
            return value if owner is value.__self__ and function is value.__func__ else MethodType(function, owner)
        if isinstance(value, functools.partial):
            return self._partial(value, where)
        if isinstance(value, FunctionType):
            return self._function(value, where)
        if not isinstance(value, type):
            held = getattr(value, "__dict__", {})
            if any(self.of(part, where) is not part for part in held.values()):
                raise ModelError(
                    f"{where} is a {type(value).__name__} that holds modules of the model, and an engine runs a copy "
                    "of them: put a function there, or a forward hook"
                )
        return value

    def _partial(self, value: functools.partial[Any], where: str) -> Any:
        function = self.of(value.func, where)
        given = [self.of(part, where) for part in value.args]
        named = {name: self.of(part, where) for name, part in value.keywords.items()}
        same = [function is value.func, *(a is b for a, b in zip(given, value.args, strict=True))]
        if all(same) and all(named[name] is part for name, part in value.keywords.items()):
            return value
        made = functools.partial(function, *given, **named)
        made.__dict__.update(value.__dict__)
        return made

    def _function(self, value: FunctionType, where: str) -> Any:
        compiled = getattr(value, "_torchdynamo_orig_callable", None)
        if compiled is not None:  # what `torch.compile` was given computes the same
            return self.of(compiled, where)
        if (value.__module__ or "").split(".")[0] in LIBRARIES and not value.__closure__:
            return value
        cells = [self._cell(cell, where) for cell in value.__closure__ or ()]
        defaults = self.of(value.__defaults__, where) if value.__defaults__ else value.__defaults__
        scope = value.__globals__
        other = dict[str, Any]()
        if (value.__module__ or "").split(".")[0] not in LIBRARIES:
            named = {name: scope[name] for name in names_in(value.__code__) if name in scope}
            made = {name: self.of(part, where) for name, part in named.items() if _reaches(part)}
            other = {name: part for name, part in made.items() if part is not named[name]}
        same = all(cell is own for cell, own in zip(cells, value.__closure__ or (), strict=True))
        if same and defaults is value.__defaults__ and not other:
            return value
        made_scope = _Scope(scope, other) if other else scope
        twin = FunctionType(value.__code__, made_scope, value.__name__, defaults, tuple(cells) or None)
        twin.__kwdefaults__ = value.__kwdefaults__
        twin.__dict__.update(value.__dict__)
        twin.__qualname__, twin.__module__ = value.__qualname__, value.__module__
        return twin

    def _cell(self, cell: CellType, where: str) -> CellType:
        try:
            held = cell.cell_contents
        except ValueError:  # empty yet
            return cell
        twin = self.of(held, where)
        return cell if twin is held else CellType(twin)


class _Scope(dict[str, Any]):
    """A function's globals as they are at any time, but for some."""

    def __init__(self, own: dict[str, Any], other: dict[str, Any]) -> None:
        super().__init__(other)
        self._own, self._other = own, other
        self.setdefault("__builtins__", own["__builtins__"])

    def __getitem__(self, name: str) -> Any:
        return self._other[name] if name in self._other else self._own[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._own[name] = value


def _reaches(value: Any) -> bool:
    """Whether a global may reach a module."""
    return isinstance(value, nn.Module | MethodType | functools.partial | FunctionType)
