"""Imports run one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tokentree

SOURCE = Path(tokentree.__file__).parent
LAYERS = {
    "errors": 0,
    **dict.fromkeys(
        (
            "cache",
            "jit",
            "plugins",
            "specs",
            "kernels",
            "tree",
            "exclusive",
            "text",
            "chat",
            "inputs",
            "metrics",
            "sampling",
            "grammars",
            "draft",
            "growing",
            "rotary",
            "vocabularies",
            "sequence",
            "prompt_kv",
            "gguf.header",
            "misread",
            "uncollected",
            "versions",
        ),
        1,
    ),
    **dict.fromkeys(("acceptance", "shapes"), 2),
    **dict.fromkeys(("engines", "drafters", "heads"), 3),
    **dict.fromkeys(("registry", "scheduler", "sharing", "pieces", "decoder", "beam"), 4),
    **dict.fromkeys(
        (
            "gguf",
            "converted",
            "names",
            "pairing",
            "loading",
            "costs",
            "options",
            "making",
            "progress",
            "result",
            "stream",
            "vocabulary",
            "llm",
        ),
        5,
    ),
}
TOP = 6  # everything else: ways to use the library
KNOWN = {"engines.base", "engines.output", "engines.drafting"}  # all that drafters know of engines


def _modules() -> dict[str, Path]:
    """Every module by its name below the package; the package itself is the empty name."""
    names = {path: path.relative_to(SOURCE).with_suffix("").as_posix() for path in SOURCE.rglob("*.py")}
    return {name.removesuffix("__init__").strip("/").replace("/", "."): path for path, name in names.items()}


MODULES = _modules()


def _imports(node: ast.AST) -> Iterator[str]:
    """The modules of this package that are imported in ``node``, inside functions too."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names = [alias.name for alias in part.names]
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, "imports are absolute"
            inside = [f"{part.module}.{alias.name}" for alias in part.names]
            names = [full if _below(full) in MODULES else str(part.module) for full in inside]
        else:
            continue
        yield from (_below(name) for name in names if name.split(".")[0] == "tokentree")


def _below(name: str) -> str:
    return name.removeprefix("tokentree").removeprefix(".")


def _layer(module: str) -> int:
    """Of the longest of its names that the table has."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((LAYERS[name] for name in names if name in LAYERS), TOP)


def test_the_table_names_modules_that_exist() -> None:
    assert set(LAYERS) <= set(MODULES)


def _check(module: str) -> None:
    """Whether a module imports from its own layer or a lower one."""
    imports = sorted(set(_imports(ast.parse(MODULES[module].read_text()))))
    above = [name for name in imports if _layer(name) > _layer(module)]
    assert not above, f"{module or '__init__'} imports {above} from a higher layer"
    unknown = [name for name in imports if name not in MODULES]
    assert not unknown, f"{module} imports {unknown}, which are not there"
    if module.startswith("drafters."):
        assert {name for name in imports if name.startswith("engines")} <= KNOWN
    if module.startswith("engines."):
        assert not [name for name in imports if name.startswith("drafters")]


@pytest.mark.parametrize("room", sorted({module.partition(".")[0] for module in MODULES}))
def test_modules_import_from_their_own_layer_or_a_lower_one(room: str) -> None:
    for module in MODULES:
        if module.partition(".")[0] == room:
            _check(module)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {
            name for part in ast.parse(path.read_text()).body if not isinstance(part, ast.If) for name in _imports(part)
        }
        for module, path in MODULES.items()
        if module
    }
    tuple(TopologicalSorter(graph).static_order())  # raises on a circle
