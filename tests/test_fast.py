"""What `make test-fast` leaves out."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import slow_tests

HERE = Path(__file__).parent
FILES = {
    file.relative_to(HERE).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in HERE.rglob("test_*.py")
}
TESTS = {
    name: {f"{name}::{part.name}" for part in tree.body if isinstance(part, ast.FunctionDef) and "test_" in part.name}
    for name, tree in FILES.items()
}
# processes that train, read damaged files, or compile, and nothing else
WHOLE = {"test_fuzz.py", "engines/gpu/test_compiled.py", "train/test_processes.py"}


def test_all_that_is_left_out_is_there() -> None:
    assert slow_tests() <= set().union(*TESTS.values())


def test_something_of_every_file_is_left() -> None:
    assert {name for name, tests in TESTS.items() if tests <= slow_tests()} <= WHOLE
