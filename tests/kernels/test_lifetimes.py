"""Compiled loops read no memory that is free already."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import forked
from tests.test_layers import MODULES

COMPILERS = {"njit", "cfunc", "vectorize"}
# a forward's logits for a tree behind a prefix, of layers that compiled loops compute in each precision
FORWARDS = """
import hashlib
import torch
from tests.hybrids import HYBRIDS, tiny_hybrid
from tests.tiny_models import request, some_tokens, some_tree, tiny
from tokentree.engines.torch import TorchEngine
ways = ("llama", None), ("llama", "int8"), ("gemma2", None), ("mixtral", None), ("jamba", None), ("qwen3_5_text", None)
for family, quantization in ways:
    make = tiny_hybrid if family in HYBRIDS else tiny
    model = make(family, torch.bfloat16, hidden_size=64, intermediate_size=96)
    engine = TorchEngine(model, quantization=quantization)
    one = request(some_tokens(70))
    engine.prefill(one)
    logits = engine.verify([one], [some_tree(one.tokens[-1], 9)]).all_logits
    print(family, quantization, hashlib.sha256(logits.float().numpy().tobytes()).hexdigest())
"""
# glibc overwrites with this byte what is freed (a float32 of such bytes is 3.0), and keeps nothing for the same thread
OVERWRITTEN = "glibc.malloc.tcache_count=0:glibc.malloc.perturb=64"


def is_compiled(function: ast.FunctionDef) -> bool:
    names = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
             for decorator in function.decorator_list for node in ast.walk(decorator)}  # fmt: skip
    return bool(names & COMPILERS)


def addressed(function: ast.FunctionDef) -> Iterator[str]:
    """The arrays, made in ``function``, that it takes addresses of."""
    given = {argument.arg for argument in function.args.args}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "ctypes":
            of = node.value.value
            while isinstance(of, ast.Subscript):
                of = of.value
            name = of.id if isinstance(of, ast.Name) else ast.unparse(of)
            if name not in given:
                yield name


def kept(function: ast.FunctionDef) -> set[str]:
    """What its last statement keeps until then, or returns."""
    last = function.body[-1]
    returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
    if returns == [last] and isinstance(last, ast.Return):
        parts = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        return {part.id for part in parts if isinstance(part, ast.Name)}
    if returns:
        return set()
    if not (isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and ast.unparse(last.value.func) == "keep"):
        return set()
    return {node.id for argument in last.value.args for node in ast.walk(argument) if isinstance(node, ast.Name)}


def faults(source: str) -> list[str]:
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and is_compiled(function):
            found += [f"{function.name}: {name}" for name in addressed(function) if name not in kept(function)]
    return found


def test_a_compiled_loop_keeps_what_it_takes_addresses_of() -> None:
    found = {module: faults(path.read_text()) for module, path in MODULES.items()}
    assert not {module: told for module, told in found.items() if told}


@pytest.mark.parametrize(
    "body",
    [
        "x = make()\n    use(x.ctypes.data)",
        "x = make()\n    keep(x)\n    use(x[0].ctypes.data)",
        "x = make()\n    at = x.ctypes.data\n    if at:\n        return\n    keep(x)",
        "use(make().ctypes.data)\n    keep(x)",
        "x = make()\n    return x.ctypes.data",
        "x = make()\n    if y:\n        return x, 0\n    return x, x.ctypes.data",
    ],
)
def test_that_one_which_doesn_t_is_found(body: str) -> None:
    assert faults(f"@numba.njit\ndef f(y):\n    {body}\n")
    assert not faults(f"def f(y):\n    {body}\n")
    for right in ("use(x.ctypes.data, y.ctypes.data)\n    keep((x, z))", "return x, x.ctypes.data"):
        assert not faults(f"@numba.njit\ndef f(y):\n    x = make()\n    {right}\n")


@pytest.mark.nightly  # processes in which nothing is fast
def test_free_memory_that_is_overwritten_changes_no_bit() -> None:
    if sys.platform != "linux":
        pytest.skip("only glibc overwrites what is freed when it is told to")

    command, env = [sys.executable, "-c", FORWARDS], {**os.environ, "GLIBC_TUNABLES": OVERWRITTEN}
    overwritten = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    as_it_is = forked.run(command)
    for done in (overwritten, as_it_is):
        assert not done.returncode, done.stderr
    assert overwritten.stdout == as_it_is.stdout
