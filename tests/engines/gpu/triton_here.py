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
    - It works out anew for each two values what type both are to have, see `know_operands`.
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
    know_operands()


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


def know_operands() -> None:
    """Has the interpreter take operands of one type as they are, and keep blocks of a constant."""
    own, cast, equal, unwrap = (
        TritonSemantic.binary_op_type_checking_impl, TritonSemantic.cast, language.dtype.__eq__,
        language.core._unwrap_if_constexpr,
    )  # fmt: skip
    same = {language.int32, language.int64, language.float32, language.float64}  # what two of these give
    blocks = dict[Any, Any]()
    builtin = language.core.builtin(lambda: None).__code__

    def operands(self: Any, left: Any, right: Any, *given: Any, **options: Any) -> Any:
        if type(left) is not language.tensor:
            return own(self, left, right, *given, **options)
        if type(right) is language.tensor:
            alike = left.type is right.type or left.type.__dict__ is right.type.__dict__
            return (left, right) if alike and left.dtype in same else own(self, left, right, *given, **options)
        key = right, type(right), left.type.name, given, *options.items()
        if key in blocks:
            return left, blocks[key]
        first, second = own(self, left, right, *given, **options)
        if first is left:
            blocks[key] = second
        return first, second

    def cast_unlike(self: Any, value: Any, kind: Any, *given: Any) -> Any:
        return value if value.dtype is kind.scalar else cast(self, value, kind, *given)

    def unwrapped(value: Any) -> Any:
        return value if type(value) in (language.tensor, int, float, bool) else unwrap(value)

    def patch_attribute(place: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        plain = member.__wrapped__ if getattr(member, "__code__", None) is builtin else member

        def called(*given: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return plain(*given, **options)

        scope.set_attr(place, name, called)

    TritonSemantic.binary_op_type_checking_impl = operands
    TritonSemantic.cast = cast_unlike
    language.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    language.core._unwrap_if_constexpr = unwrapped
    interpreter._patch_attr = patch_attribute


if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()
