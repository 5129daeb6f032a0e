"""What the name of a model may be: a folder, a GGUF file, or a name on the hub; anything else is told at once."""

from __future__ import annotations

import difflib
import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tokentree.errors import ModelError
from tokentree.gguf.header import is_gguf

REACHED_WITHIN = 5  # seconds, in which the hub must answer


@dataclass(frozen=True)
class Found:
    """What a name stands for.

    Args:
        where: a folder, or a name on the hub.
        file: the GGUF file, if it is one.
        local_only: nothing is to be asked of the hub.
    """

    where: str
    file: Path | None = None
    local_only: bool = False


def find(name: str | Path, local_only: bool = False) -> Found:
    """What ``name`` stands for; with ``local_only``, nothing is asked of the hub.

    Raises:
        ModelError: if it is nothing that a model can be in.
    """
    path = Path(name)
    try:
        path = path.expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
        if is_file:
            return _file(name, path)
        if is_folder and str(name):
            return _folder(name, path)
    except ModelError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a folder that may not be read, no home
        raise ModelError(f"{_short(name)} can't be looked up: {_reason(error)}") from None
    if not str(name).strip():
        raise ModelError("the name of the model is empty: give a folder, a .gguf file, or a name on the hub")
    if is_gguf(path):
        raise ModelError(f"there is no file {_short(name)}{_alike(path)}")
    return _hub(name, path, local_only)


def _file(name: str | Path, path: Path) -> Found:
    if is_gguf(path):
        return Found(str(path.parent), path)
    with path.open("rb") as opened:
        begin = opened.read(4)
    if begin == b"GGUF":
        raise ModelError(f"{_short(name)} holds a GGUF file, and is read as one if its name ends in .gguf")
    inside = f": name its folder, {str(path.parent)!r}" if (path.parent / "config.json").is_file() else ""
    raise ModelError(f"{_short(name)} is a file, where a model is a folder, a .gguf file, or a name on the hub{inside}")


def _folder(name: str | Path, path: Path) -> Found:
    config = path / "config.json"
    if not config.is_file():
        files = sorted(one.name for one in path.iterdir() if is_gguf(one) and one.is_file())
        also = f", but GGUF files: name one of them, such as {str(path / files[0])!r}" if files else ""
        raise ModelError(f"the folder {_short(name)} has no config.json, so it is not a model{also}")
    for one in (config, path / "generation_config.json"):
        try:
            said = json.loads(one.read_text(encoding="utf-8")) if one.is_file() else {}
        except ValueError as error:
            raise ModelError(f"can't load the model {_short(name)}: its {one.name} is not JSON: {error}") from None
        if not isinstance(said, dict):
            raise ModelError(f"can't load the model {_short(name)}: its {one.name} is no table of settings")
    return Found(str(path))


def _hub(name: str | Path, path: Path, local_only: bool) -> Found:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    text = str(name)
    parts = path.parts
    local = path.is_absolute() or text.startswith((".", "~")) or text.endswith("/") or "\\" in text
    if local or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir()):
        raise ModelError(f"there is no folder {_short(name)}{_alike(path)}")
    try:
        cached = try_to_load_from_cache(text, "config.json")
    except HFValidationError:
        raise ModelError(f"{_short(name)} is no folder, and no name on the hub can be spelled so") from None
    kept = Found(str(Path(cached).parent), local_only=True) if isinstance(cached, str) else None
    if len(parts) == 1 and kept is None:
        raise ModelError(
            f"there is no folder {_short(name)}, and names on the hub have the form owner/name{_alike(path)}"
        )
    if local_only or constants.is_offline_mode() or not _reached(constants.ENDPOINT):
        if kept is None:
            raise ModelError(f"there is no folder {_short(name)}, and the hub can't be reached to look there")
        return kept
    return Found(text)


def _reached(endpoint: str) -> bool:
    """Whether the hub answers. Its own client would try again for most of a minute."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=REACHED_WITHIN):
            return True
    except urllib.error.HTTPError:
        return True  # it says something
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # its own client may have other certificates
    except (OSError, ValueError):
        return False


def _alike(path: Path) -> str:
    """A folder or file nearby that may be meant, as the end of a sentence."""
    try:
        near = [one.name for one in path.parent.iterdir() if is_gguf(one) or (one / "config.json").is_file()]
    except OSError:
        return ""
    same = [one for one in near if one.lower() == path.name.lower()]
    close = same or difflib.get_close_matches(path.name, near, 1)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


def _short(name: str | Path) -> str:
    text = repr(str(name))
    return text if len(text) <= 200 else f"{text[:197]}..."


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
