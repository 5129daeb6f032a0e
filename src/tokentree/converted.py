"""What is made of a model's files once, and kept in the cache: a GGUF file as a folder, which transformers loads in
less than a tenth of the time; and where packed weights are kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from tokentree.engines.kept import Place
from tokentree.errors import ModelError
from tokentree.gguf_settings import RULES
from tokentree.storage import cache_folder

T = TypeVar("T")
SOURCE = "source.json"  # what a folder was made from


def converted(file: Path, part: str, convert: Callable[[], T], load: Callable[[Path], T]) -> T:
    """The ``part`` (a dtype's weights, or the tokenizer) of the GGUF ``file``: loaded from the cache, or converted and
    put there. A file that changed is converted again, and so is what can't be loaded any more.

    Raises:
        ModelError: from ``convert``.
    """
    folder = _folder(file) / part
    if _source_of(folder) == _source(file):
        try:
            return load(folder)
        except ModelError:
            pass  # spoilt: made again below
    made = convert()
    _write(folder, made, _source(file))
    return made


def packed_place(named: str | Path, quantization: str | None) -> Place | None:
    """Where the packed weights of a model are kept: of a GGUF file, or of a folder; not of a name on a hub."""
    path = Path(named).expanduser()
    if not path.exists():
        return None
    parts = ("*.safetensors", "*.bin", "*.json")
    sources = [path] if path.is_file() else [file for part in parts for file in sorted(path.glob(part))]
    about = {str(file.name): _source(file) for file in sources}
    return Place(_folder(path) / f"packed-{quantization or 'bfloat16'}.pt", json.dumps(about))


def _folder(file: Path) -> Path:
    path = str(file.resolve())
    return cache_folder() / "models" / f"{file.stem}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def _source(file: Path) -> dict[str, Any]:
    found = file.stat()
    return {
        "size": found.st_size,
        "changed": found.st_mtime_ns,
        "transformers": version("transformers"),
        "rules": RULES,
    }


def _source_of(folder: Path) -> object:
    try:
        return json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(folder: Path, made: Any, source: dict[str, Any]) -> None:
    """Puts ``made`` into ``folder``, whole or not at all. A cache that can't be written is no error."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        made.save_pretrained(part)
        (part / SOURCE).write_text(json.dumps(source), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        warnings.warn(f"the converted model isn't kept: {error}", stacklevel=2)
    finally:
        shutil.rmtree(part, ignore_errors=True)
