"""What is made of a model's files once, and kept in the cache: a GGUF file as a folder, which transformers loads in
less than a tenth of the time; and where packed weights are kept."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from tokentree.cache import cache_folder, damaged, digest_of, locked, ours, private, replacing, unkept
from tokentree.engines.kept import Place
from tokentree.errors import ModelError
from tokentree.gguf_settings import RULES

T = TypeVar("T")
logger = logging.getLogger(__name__)
SOURCE = "source.json"  # what a folder was made from


def converted(file: Path, part: str, convert: Callable[[], T], load: Callable[[Path], T]) -> T:
    """The ``part`` (a dtype's weights, or the tokenizer) of the GGUF ``file``: loaded from the cache, or converted and
    put there. A file that changed is converted again, and so is what can't be loaded any more.

    Raises:
        ModelError: from ``convert``.
    """
    folder = _folder(file) / part
    known = _known(folder)
    if known.get("source") == _source(file):
        if _whole(folder, known):
            try:
                return load(folder)
            except ModelError:
                pass
        damaged(folder)
    logger.info("converting %s, %s (once)", file.name, part)
    made = convert()
    _write(folder, made, _source(file))
    return made


def packed_place(named: str | Path, numbers: str) -> Place | None:
    """Where the packed weights of a model are kept, by what ``numbers`` they are: of a GGUF file, or of a folder; not
    of a name on a hub."""
    path = Path(named).expanduser()
    if not path.exists():
        return None
    parts = ("*.safetensors", "*.bin", "*.json")
    sources = [path] if path.is_file() else [file for part in parts for file in sorted(path.glob(part))]
    about = {str(file.name): _source(file) for file in sources}
    return Place(_folder(path) / f"packed-{numbers}.pt", json.dumps(about))


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


def _known(folder: Path) -> dict[str, Any]:
    """What a folder of this user says of itself: what it was made from, and the digests of its files."""
    try:
        found = json.loads((folder / SOURCE).read_text(encoding="utf-8")) if ours(folder) else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(folder: Path, known: dict[str, Any]) -> bool:
    """Whether its files are as they were."""
    try:
        return _digests(folder) == known.get("digests")
    except OSError:
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != SOURCE]
    return {file.relative_to(folder).as_posix(): digest_of(file).hex() for file in files}


def _write(folder: Path, made: Any, source: dict[str, Any]) -> None:
    """Puts ``made`` into ``folder``, whole or not at all. A cache that can't be written is no error."""
    try:
        private(folder.parent)
        with locked(folder), replacing(folder) as part:
            part.mkdir()
            made.save_pretrained(part)
            about = {"source": source, "digests": _digests(part)}
            (part / SOURCE).write_text(json.dumps(about), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # that of a disk that is full is safetensors' own
        unkept("the converted model isn't", folder, error)
