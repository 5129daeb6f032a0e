"""Files that make no sense to a library that reads them."""

from __future__ import annotations

import pickle
import zipfile
from contextlib import AbstractContextManager
from types import TracebackType

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from tokentree.errors import ModelError


class told(AbstractContextManager[None]):
    """Whatever is raised of files that make no sense, as a `ModelError` that begins so."""

    kinds = (
        OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, ImportError,
        RuntimeError, EOFError, pickle.PickleError, zipfile.BadZipFile, SafetensorError, StrictDataclassError,
    )  # fmt: skip

    def __init__(self, what: str) -> None:
        self._what = what

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, ModelError):
            return
        if isinstance(error, self.kinds) or kind is Exception:  # the tokenizers package raises nothing narrower
            raise ModelError(f"{self._what}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The first sentence of an error that was written for a longer page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
