"""Triton's kernels where the tests run: on a GPU, or in Triton's interpreter (see tests/__init__.py)."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
from transformers import PreTrainedModel
from triton import language
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
    """Has Triton's interpreter do once what it would do in each call, and leave what it does for nothing: two thirds of
    its time.

    - It puts its functions into Triton's modules in each launch, and in each call of a function from a kernel.
    - It looks up numpy's types in a table that it makes for each.
    - It looks whether sums of whole numbers overflow, and tells nobody, as a kernel's assertions are off.
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
    interpreter._get_np_dtype = lambda kind: (known if type(kind) is language.dtype else numpy_type)(kind)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()
