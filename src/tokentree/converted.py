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
from tokentree.engines.cpu.packed_file import Place
from tokentree.errors import ModelError
from tokentree.gguf.settings import RULES

T = TypeVar("T")
logger = logging.getLogger(__name__)
SOURCE = "source.json"  # what a folder was made from
DIGESTS = "digests.json"  # those of a model's own files, as long as they are not written again


def converted(file: Path, part: str, convert: Callable[[], T], load: Callable[[Path], T]) -> T:
    """The ``part`` (a dtype's weights, or the tokenizer) of the GGUF ``file``: loaded from the cache, or converted and
    put there. A file that changed is converted again, and so is what can't be loaded any more.

    Raises:
        ModelError: from ``convert``.
    """
    folder = _folder(file) / part
    try:
        source = _sources(file, [file])
    except OSError:  # ``convert`` says so better
        return convert()
    known = _known(folder)
    if known.get("source") == source:
        if _whole(folder, known):
            try:
                return load(folder)
            except ModelError:
                pass
        damaged(folder)
    logger.info("converting %s, %s (once)", file.name, part)
    made = convert()
    _write(folder, made, source)
    return made


def packed_place(named: str | Path, numbers: str) -> Place | None:
    """Where the packed weights of a model are kept, by what ``numbers`` they are: of a GGUF file, or of a folder; not
    of a name on a hub, nor where something can't be read."""
    path = Path(named).expanduser()
    if not path.exists():
        return None
    parts = ("*.safetensors", "*.bin", "*.json")
    files = [path] if path.is_file() else [file for part in parts for file in sorted(path.glob(part))]
    try:
        sources = _sources(path, [file for file in files if file.is_file()])
    except OSError:
        return None
    return Place(_folder(path) / f"packed-{numbers}.pt", json.dumps(sources))


def _folder(file: Path) -> Path:
    path = str(file.resolve())
    return cache_folder() / "models" / f"{file.stem}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def _sources(model: Path, files: list[Path]) -> dict[str, Any]:
    """What something was made from: the ``files`` of a model, by what is in them, and the versions of what reads them.
    Times alone don't tell a file from another one: copies may keep them, and clocks are set back. They tell only, with
    all else that a file system counts, whether a file was written since its digest was made.
    """
    folder, known = _folder(model), dict[str, Any]()
    if ours(folder):
        known = _json(folder / DIGESTS)
    found, digests = dict[str, Any](), dict[str, str]()
    for file in files:
        about = file.stat()
        stamp = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev]
        before: Any = known.get(file.name)
        fresh = isinstance(before, list) and before[:-1] == stamp
        digests[file.name] = before[-1] if fresh else digest_of(file).hex()
        found[file.name] = [*stamp, digests[file.name]]
    if found != known:
        try:
            with replacing(private(folder) / DIGESTS) as part:
                part.write_text(json.dumps(found), encoding="utf-8")
        except OSError:  # they are made again next time; that nothing can be written is told of larger things
            pass
    return {"digests": digests, "transformers": version("transformers"), "rules": RULES}


def _json(file: Path) -> dict[str, Any]:
    """What a file says; nothing, where it isn't there, or says something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _known(folder: Path) -> dict[str, Any]:
    """What a folder of this user says of itself: what it was made from, and the digests of its files."""
    return _json(folder / SOURCE) if ours(folder) else {}


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
