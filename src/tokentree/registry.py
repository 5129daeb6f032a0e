"""Drafters and engines by name (`drafters.names`, `engines.names`), imported when asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.merged import Merged
from tokentree.drafters.names import DRAFT_MODELS, DRAFTERS, OWN_LAYERS, REGISTRY, fitting
from tokentree.engines.base import Engine, EngineOptions
from tokentree.engines.drafting import LayerEngines
from tokentree.engines.names import ENGINES, TORCH
from tokentree.errors import ModelError, OptionError, PairingError
from tokentree.heads.mtp_files import find_mtp
from tokentree.heads.saved import kind_of
from tokentree.specs import options_of

Named = str | SequenceOf[str | Drafter] | Drafter | None


def drafter_class(name: str) -> type[Drafter]:
    """The drafter class of that name: one of ours, or of an installed package (entry points ``tokentree.drafters``).

    Raises:
        OptionError: if there is none, or what is there is no drafter.
    """
    found = REGISTRY.named(name)
    if not (isinstance(found, type) and issubclass(found, Drafter)):
        raise OptionError(f"the drafter {name!r} is no class of drafters: {found!r}")
    return found


def _name(drafter: str) -> str:
    """The name in ``name:option=value,…``."""
    return drafter.partition(":")[0]


def _with_options(drafter: str) -> tuple[type[Drafter], dict[str, Any]]:
    """The class that ``name:option=value,…`` names, and the options of its `make`.

    Raises:
        OptionError: if there is none of that name, or it has no such option.
    """
    kind = drafter_class(_name(drafter) if isinstance(drafter, str) else drafter)
    return kind, options_of(drafter.partition(":")[2], kind.make, "drafter")


def check_names(drafter: Named) -> None:
    """Raises `OptionError` unless ``drafter`` is None, a drafter, the name of one, or a list of these in which none
    comes twice."""
    if drafter is None or isinstance(drafter, Drafter):
        return
    if isinstance(drafter, str):
        _with_options(drafter)
        return
    if not isinstance(drafter, list | tuple):
        raise OptionError(f"drafter={drafter!r} is neither a name, a list of names nor a Drafter")
    if not drafter:
        raise OptionError("drafter=[] names none: give at least one drafter")
    for place, one in enumerate(drafter):
        if not isinstance(one, Drafter):
            _with_options(one)
            if _name(one) in [_name(other) for other in drafter[:place] if isinstance(other, str)]:
                raise OptionError(f"the drafter {_name(one)!r} is named twice")
            if one == "none" and len(drafter) > 1:
                raise OptionError("the drafter 'none' proposes nothing: leave it out beside others")


def usable(parts: Parts) -> list[str]:
    """The names of our drafters that ``parts`` allow, those that are merged by default. The target's own layers take
    part where there are neither heads nor draft models."""
    given = set() if parts.heads is None else {DRAFTERS[kind_of(parts.heads)].drafts_from}
    given |= {DRAFT_MODELS} if parts.draft_engines else set()
    if not given and isinstance(parts.engine, LayerEngines) and find_mtp(parts.folder) is not None:
        given = {OWN_LAYERS}
    return fitting(given)


def make_drafter(drafter: Named, parts: Parts) -> Drafter:
    """A drafter by its name, which options may follow (``draft_model:vocabulary=tli``); several names are merged.
    Without a name the draft models draft, if there are any and no heads. Otherwise it is ``merged``: all drafters that
    ``parts`` allow, see `drafters.names.fitting`.

    Raises:
        OptionError: if there is none of that name.
        PairingError: if ``parts`` lacks what it needs.
    """
    if isinstance(drafter, Drafter):
        return drafter
    if drafter is None:
        drafter = "draft_model" if parts.draft_engines and parts.heads is None else "merged"
    if drafter == "merged":
        return Merged(_usable_drafters(parts))
    if isinstance(drafter, str):
        kind, options = _with_options(drafter)
        return kind.make(parts, **options)
    return Merged([make_drafter(name, parts) for name in drafter])


def _usable_drafters(parts: Parts) -> list[Drafter]:
    """Those that are merged by default. Nobody asked for the target's own layers: if they can't be used, a warning says
    why."""
    made = list[Drafter]()
    for name in usable(parts):
        try:
            made.append(make_drafter(name, parts))
        except (ModelError, PairingError) as error:
            if DRAFTERS[name].drafts_from != OWN_LAYERS:
                raise
            warnings.warn(f"the drafter {name!r} is left out: {error}", stacklevel=4)
    return made


def engine_maker(name: str) -> Callable[[Any, EngineOptions], Any]:
    """What makes engines of that name: ours, or an installed package's (entry points ``tokentree.engines``).

    Raises:
        OptionError: if there is none, or what is there can't be called.
    """
    found = ENGINES.named(name)
    if not callable(found):
        raise OptionError(f"the engine {name!r} is nothing that makes engines: {found!r}")
    maker: Callable[[Any, EngineOptions], Any] = found
    return maker


def check_engine(engine: Any, given: Mapping[str, Any]) -> None:
    """Raises `OptionError` unless ``engine`` is None, the name of an engine, or one that is made already: then nothing
    may be ``given`` by its name that an engine is made of."""
    if engine is None:
        return
    if isinstance(engine, str):
        engine_maker(engine)
        return
    _check_complete(engine, f"engine={type(engine).__name__}")
    if extra := [name for name, value in given.items() if value is not None]:
        raise OptionError(f"an engine that is made already takes no {', '.join(extra)}: leave that out")


def make_engine(engine: Engine | str | None, model: Any, options: EngineOptions) -> Engine:
    """``engine``, or the one of that name for ``model``, by default ours.

    Raises:
        OptionError: if there is none of that name, or what is made is none.
        ModelError: if it can't be made of ``model``.
    """
    if engine is not None and not isinstance(engine, str):
        return engine
    name = TORCH if engine is None else engine
    made: Engine = engine_maker(name)(model, options)
    _check_complete(made, f"what engine={name!r} makes")
    return made


def _check_complete(engine: object, what: str) -> None:
    """Raises `OptionError` if ``engine`` lacks something that the protocol `Engine` asks for."""
    members = [*Engine.__annotations__, *(name for name in vars(Engine) if not name.startswith("_"))]
    if missing := [name for name in members if not hasattr(engine, name)]:
        raise OptionError(f"{what} is no engine, it has no {', '.join(missing)}: see tokentree.engines.base.Engine")
