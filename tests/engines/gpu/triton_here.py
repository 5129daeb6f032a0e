"""Triton's kernels where the tests run: on a GPU, or in Triton's interpreter (see tests/__init__.py)."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import torch
from transformers import PreTrainedModel
from triton import language
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from tests.tiny_models import tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")


def small(family: str = "llama", **options: object) -> PreTrainedModel:
    """A tiny model whose sizes there are kernels for."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, **options}
    made: PreTrainedModel = tiny(family, torch.bfloat16, **sizes).to(DEVICE)  # type: ignore[arg-type]
    return made


def quicken() -> None:
    """Has Triton's interpreter do once what it would do in each call, and leave what it does for nothing: most of its
    time.

    - It puts its functions into Triton's modules in each launch, and in each call of a function from a kernel.
    - It looks up numpy's types in a table that it makes for each.
    - It looks whether sums of whole numbers overflow, and tells nobody, as a kernel's assertions are off.
    - It makes the type of each value anew, with a name and a checked shape, see `know_types`.
    """
    patch, patched = interpreter._patch_lang, dict[int, Any]()

    def patch_once(fn: Any) -> interpreter._LangPatchScope:
        if id(fn.__globals__) not in patched:
            patched[id(fn.__globals__)] = fn.__globals__
            patch(fn)
        return interpreter._LangPatchScope()  # nothing to take back

    interpreter._patch_lang = patch_once
    numpy_type = interpreter._get_np_dtype
    known = functools.cache(numpy_type)
    interpreter._get_np_dtype = lambda kind: (known if type(kind.scalar) is language.dtype else numpy_type)(kind.scalar)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    know_types()


def know_types() -> None:
    """Has the interpreter keep the types of blocks, and the sizes that belong to each."""
    block, broadcast, known = language.block_type, TritonSemantic.broadcast_impl_value, dict[Any, dict[str, Any]]()
    check = block.__init__

    def begin_block(self: Any, element: Any, shape: Any) -> None:
        key = element.name, tuple(shape)
        if key not in known:
            check(self, element, shape)
            known[key] = self.__dict__
        self.__dict__ = known[key]

    def begin(self: Any, handle: Any, type: Any) -> None:
        if "sizes" not in type.__dict__:
            shape = type.shape.values if type.is_block() else ()
            type.sizes = language.constexpr(math.prod(shape)), language.tuple([*map(language.constexpr, shape)])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.sizes

    def broadcast_unlike(self: Any, left: Any, right: Any) -> Any:
        both = left.type.is_block() and right.type.is_block()
        if both and left.type.shape.values == right.type.shape.values:
            return left, right
        return broadcast(self, left, right)

    block.__init__ = begin_block
    block.to_ir = lambda self, builder: self  # the interpreter's types are the language's
    language.tensor.__init__ = begin
    TritonSemantic.broadcast_impl_value = broadcast_unlike


if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()
