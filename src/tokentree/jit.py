# numba is typed in part:
# mypy: allow-untyped-calls
"""Compiled functions that know their sources.

numba keeps compiled code by the file that defines a function, and knows nothing of those whose functions it calls: they
are compiled into it, and after a change the old ones would run. Here code is kept by the text of all files of this
package that its own file imports, of those that they import, and so on; by the versions of what compiles it, and by the
CPU. It lies in the cache folder, each file behind a digest.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import pickle
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import llvmlite.binding
import numba
import numpy as np
from numba.core import sigutils
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from tokentree.cache import cache_folder, intact, private, replacing, seal, tell, unkept

F = TypeVar("F", bound=Callable[..., Any])
PACKAGE = Path(__file__).parent
VERSIONS_KEPT = 8  # of the code of one source file
IMPORTS = re.compile(r"^[ \t]*(?:from tokentree(?:\.([\w.]+))? import (\([^)]*\)|.*)|import tokentree\.([\w.]+))", re.M)
NAME = re.compile(r"(\w+)(?: +as +\w+)?")  # of what is imported from a package


@overload
def njit(function: F) -> F: ...
@overload
def njit(*, cache: bool = False, **options: Any) -> Callable[[F], F]: ...
def njit(function: Any = None, *, cache: bool = False, **options: Any) -> Any:
    """`numba.njit`. With ``cache``, which is for functions that Python calls, compiled code is kept as said above."""
    if function is None:
        return functools.partial(njit, cache=cache, **options)
    made = numba.njit(function, **options)
    if cache and hasattr(made, "_cache"):  # without, numba is told not to compile
        made._cache = KeptCode(function, options)
    return made


def cfunc(signature: Any, *, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.cfunc`, likewise."""

    def wrap(function: Callable[..., Any]) -> Any:
        made: Any = CFunc(function, sigutils.normalize_signature(signature), {}, options)
        if cache:
            made._cache = KeptCode(function, options)
        made.compile()
        return made

    return wrap


def compiled_folder() -> Path:
    """Where compiled code is kept: ``$TOKENTREE_COMPILED``, or a folder in the cache."""
    own = os.environ.get("TOKENTREE_COMPILED")
    return Path(own) if own else cache_folder() / "kernels"


class KeptCode(NullCache):
    """Where numba keeps the code of ``function``, compiled with these options: one file for each signature."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._function, self._options = function, sorted(options.items())
        try:
            source = Path(inspect.getfile(function))
            # what a closure holds may come from anywhere
            roots = [source, *(sorted(PACKAGE.rglob("*.py")) if function.__closure__ else ())]
            self._folder: str | None = f"{source.stem}-{fingerprint(tuple(roots))}"
        except OSError as error:  # there is no source
            unkept("compiled code isn't", compiled_folder(), error)
            self._folder = None

    @property
    def cache_path(self) -> str | None:
        return None if self._folder is None else str(compiled_folder() / self._folder)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        if self._folder is None or not intact(file := self._file(sig, target_context.codegen())):
            return None
        try:
            content = file.read_bytes()
        except OSError:  # another process removed it as old
            return None
        _used(file.parent)
        return CompileResult._rebuild(target_context, *pickle.loads(content))

    def save_overload(self, sig: Any, data: Any) -> None:
        if self._folder is None:
            return
        if data.library.has_dynamic_globals:
            tell(f"{self._function.__qualname__} holds addresses, and is compiled at each start")
            return
        try:
            file = self._file(sig, data.codegen)
            private(file.parent)
            with replacing(file) as part:
                part.write_bytes(dumps(data._reduce()))
                seal(part)
            _used(file.parent)
        except OSError as error:
            unkept("compiled code isn't", compiled_folder(), error)

    def _file(self, sig: Any, codegen: Any) -> Path:
        cells = tuple(cell.cell_contents for cell in self._function.__closure__ or ())
        key = repr((str(sig), codegen.magic_tuple(), self._options, dumps(cells) if cells else b""))
        name = re.sub(r"[^\w.]", "", self._function.__qualname__)
        line = self._function.__code__.co_firstlineno
        return Path(self.cache_path or "") / f"{name}-{line}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


@functools.cache
def fingerprint(roots: tuple[Path, ...]) -> str:
    """What code of the first of these files belongs to: all that they import of this package, what compiles it, with
    which settings, and the CPU."""
    about = [np.__version__, numba.__version__, llvmlite.__version__, sys.version, platform.machine(), _cpu()]
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("NUMBA_"))
    sources = sorted((_name(file), _digest(file)) for file in imported(roots))
    return hashlib.sha256(repr((_name(roots[0]), sources, about, settings)).encode()).hexdigest()[:16]


def imported(roots: Iterable[Path]) -> set[Path]:
    """``roots`` and the files of this package that they import, those that these import, and so on."""
    found, left = set[Path](), list(roots)
    while left:
        if (file := left.pop()) not in found:
            found.add(file)
            left += _imports(file)
    return found


def _name(file: Path) -> str:
    return str(file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file)


@functools.cache
def _imports(file: Path) -> list[Path]:
    """What ``file`` imports: of a package its modules, or itself where a name is no module of it."""
    found, files = list[str](), _files()
    for package, names, module in IMPORTS.findall(_text(file)):
        inside = [f"{package}.{name}".lstrip(".") for name in NAME.findall(names)]
        found += [module] if module else [name if name in files else package for name in inside]
    return [files[name] for name in found if name in files]


@functools.cache
def _files() -> dict[str, Path]:
    """The files of this package, by the names of their modules in it."""
    known = ((file.relative_to(PACKAGE).with_suffix("").parts, file) for file in PACKAGE.rglob("*.py"))
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): file for parts, file in known}


@functools.cache
def _text(file: Path) -> str:
    """A source, as it is when it is first asked for, which is when it is imported."""
    return file.read_text(encoding="utf-8")


@functools.cache
def _digest(file: Path) -> str:
    return hashlib.sha256(_text(file).encode()).hexdigest()


@functools.cache
def _cpu() -> tuple[str, str]:
    try:
        return llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM can't tell
        return platform.processor(), ""


@functools.cache
def _used(folder: Path) -> None:
    """Marks ``folder`` as in use, and removes those of the same source that were in use longest ago."""
    try:
        os.utime(private(folder))
        versions = folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*")
        latest = sorted(versions, key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:  # another process removes them too, or nothing can be written
        return
    for old in [path for path in latest if path != folder][VERSIONS_KEPT - 1 :]:  # whatever the clock says
        shutil.rmtree(old, ignore_errors=True)
