"""The header of a GGUF file, read strictly: every count, size and offset is checked against the file before it is used,
as llama.cpp does, and the tensors must fill the rest of it."""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")


def is_gguf(name: str | Path) -> bool:
    """Whether a file of that name is a GGUF file."""
    return Path(name).suffix.lower() == ".gguf"


@dataclass(frozen=True)
class Tensor:
    """Where one tensor is.

    Args:
        shape: the slowest dimension first, as torch has it.
        kind: of ggml's types, by name.
        begin, size: in bytes, from the begin of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    begin: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights."""

    file: Path
    entries: dict[str, Any]
    tensors: dict[str, Tensor]

    def raw(self, tensor: Tensor) -> Raw:
        """What is in the file of ``tensor``, mapped into memory."""
        import gguf

        data = np.memmap(self.file, np.uint8, "r", tensor.begin, tensor.size)
        numbers = {"F32": "<f4", "F16": "<f2"}.get(tensor.kind)
        shaped = data.view(numbers) if numbers else data
        return Raw(gguf.GGMLQuantizationType[tensor.kind], shaped.reshape(*tensor.shape[:-1], -1))

    def values(self, tensor: Tensor) -> np.ndarray:
        """A tensor's numbers, float32[tensor.shape]."""
        import gguf

        raw = self.raw(tensor)
        return np.array(gguf.quants.dequantize(raw.data, raw.tensor_type), np.float32).reshape(tensor.shape)


class Raw(NamedTuple):
    """A tensor as gguf's own reader has it: its type, and its numbers or, row by row, the bytes of its blocks."""

    tensor_type: Any
    data: np.ndarray


def has_tokenizer(header: Header) -> bool:
    return "tokenizer.ggml.model" in header.entries


class GgufError(ValueError):
    """Why a GGUF file can't be read. Whoever was given the file tells its name."""


def read_header(file: Path) -> Header:
    """The header of ``file``.

    Raises:
        GgufError: if it can't be read, is no GGUF file, is damaged, or is one part of a model.
    """
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            if size < 24:
                raise GgufError(f"it has {size} bytes, and a header alone has more")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = Header(file, *_read(_Cursor(data, size), file))
    except ImportError:
        raise GgufError("such files are read with the package gguf: pip install 'tokentree[gguf]'") from None
    except OSError as error:
        raise GgufError(f"it can't be opened: {error.strerror}") from None
    if not header.tensors:
        raise GgufError("it has no weights")
    return header


class _Cursor:
    """Takes one thing after another from the bytes of a file."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data, self.size, self.place = data, size, 0

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        width = struct.calcsize(f"<{code}")
        begin = self._skip(count * width)
        if code == "?" and (odd := set(self._data[begin : self.place]) - {0, 1}):
            raise GgufError(f"a truth value is {odd.pop()}")
        return struct.unpack_from(f"<{count}{code}", self._data, begin)

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        begin = self._skip(self.number("Q"))
        try:
            return self._data[begin : self.place].decode()
        except UnicodeDecodeError:
            raise GgufError(f"the text at byte {begin} is not UTF-8") from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise GgufError(f"a value is of type {kind}, which there is not")
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            return list(self.numbers(_NUMBERS[kind], count))
        if kind != _STRING:
            raise GgufError(f"a list is of type {kind}, which lists can't hold")
        if count * 8 > self.size - self.place:
            raise GgufError(f"a list of {count} texts doesn't fit into it")
        return [self.text() for _ in range(count)]

    def _skip(self, count: int) -> int:
        begin = self.place
        if count > self.size - begin:
            raise GgufError(f"it ends within its header, or is damaged at byte {begin}")
        self.place += count
        return begin


def _read(cursor: _Cursor, file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if bytes(cursor.numbers("B", 4)) != b"GGUF":
        raise GgufError("it doesn't begin with GGUF, so it is something else")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise GgufError("its numbers are big-endian: convert it for this machine first")
    if version not in _VERSIONS:
        raise GgufError(f"it is of version {version}, and only {' and '.join(map(str, _VERSIONS))} can be read")
    count_tensors, count_entries = cursor.numbers("Q", 2)
    entries = dict[str, Any]()
    for _ in range(count_entries):
        key = cursor.text()
        if key in entries:
            raise GgufError(f"it says {key} twice")
        entries[key] = cursor.value()
    _check_whole(entries, file)
    listed = list(_tensors(cursor, count_tensors))
    tensors = {tensor.name: tensor for tensor in listed}
    if len(tensors) < len(listed):
        raise GgufError("two of its tensors have one name")
    align = entries.get("general.alignment", 32)
    if not isinstance(align, int) or align < 8 or align & (align - 1):
        raise GgufError(f"its general.alignment is {align!r}")
    begin = end = -(-cursor.place // align) * align
    for tensor in listed:
        if begin + tensor.begin != -(-end // align) * align:
            raise GgufError(f"its tensor {tensor.name} doesn't lie behind the one before")
        end = begin + tensor.begin + tensor.size
        if end > cursor.size:
            raise GgufError(f"it is cut short, within {tensor.name}")
    if cursor.size - end >= align:
        raise GgufError(f"it has {cursor.size - end} bytes at its end that belong to no tensor")
    placed = {
        name: Tensor(name, one.shape, one.kind, begin + one.begin, one.size) for name, one in tensors.items()
    }  # fmt: skip
    return entries, placed


def _tensors(cursor: _Cursor, count: int) -> Iterator[Tensor]:
    """As they are listed, their begins counted from where the first one begins."""
    import gguf

    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        if not 1 <= dimensions <= 4:
            raise GgufError(f"its tensor {name} has {dimensions} dimensions")
        shape = tuple(reversed(cursor.numbers("Q", dimensions)))
        code, begin = cursor.number("I"), cursor.number("Q")
        try:
            kind = gguf.GGMLQuantizationType(code)
            values, width = gguf.GGML_QUANT_SIZES[kind]
            if kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                gguf.quants.dequantize(np.zeros((1, width), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            raise GgufError(f"its tensor {name} is of ggml's type {code}, which nothing here unpacks") from None
        if 0 in shape or prod(shape) * width > cursor.size * values or shape[-1] % values:
            raise GgufError(f"its tensor {name} of {'x'.join(map(str, shape))} doesn't fit into it")
        yield Tensor(name, shape, kind.name, begin, prod(shape) // values * width)


def _check_whole(entries: dict[str, Any], file: Path) -> None:
    """Raises `GgufError` for one part of a model that was split."""
    count = entries.get("split.count", 0)
    if type(count) is not int:
        raise GgufError(f"its split.count is {count!r}")
    if count < 2:
        return
    found = _PART.search(file.stem)
    found = found if found and int(found[2]) == count else None  # else its name is about something else
    stem = file.stem[: found.start()] if found else ""
    names = [f"{stem}-{part:05d}-of-{found[2]}{file.suffix}" for part in range(1, count + 1)] if found else []
    missing = [name for name in names[:1000] if not file.with_name(name).exists()]
    also = f"; {', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'}n't here" if missing else ""
    first, joined = (names[0], f"{stem}{file.suffix}") if names else ("FIRST_PART", "WHOLE_FILE")
    raise GgufError(
        f"it is one of {count} parts: join them first, with `llama-gguf-split --merge {first} {joined}`{also}"
    )
