"""What a run leaves behind, `RESULTS`."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, with_config
from typing_extensions import TypedDict  # pydantic's, for Python 3.11

from tokentree.cache import replacing
from tokentree.errors import OptionError

Count = Annotated[int, Field(ge=0, le=2**53)]
Rows = Annotated[int, Field(ge=0, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


@with_config(ConfigDict(extra="allow"))
class Counts(TypedDict, total=False):
    """What is read of a sample's metrics. Other fields are kept as they are."""

    new_tokens: Count
    target_forwards: Count
    drafted_tokens: Count
    accepted_tokens: Count
    refused_steps: Count
    accepted_by_depth: list[Count]
    offered_by_depth: list[Count]
    steps: list[tuple[Rows, Annotated[int, Field(ge=1, le=2**53)], Seconds]]
    draft_seconds: Seconds
    verify_seconds: Seconds
    accept_seconds: Seconds


_COUNTS = TypeAdapter(Counts)
RESULTS = "results.json"


class Sample(BaseModel):
    """One method on one turn of one prompt. ``error`` is set where it failed, and then nothing else is."""

    prompt: str
    category: str
    turn: Count
    method: str
    order: Count = Field(description="place among the methods on this turn; it rotates")
    error: str | None = None
    prompt_tokens: Count = 0
    token_ids: list[Count] = []
    text: str = ""
    prefill_seconds: Seconds = 0.0
    decode_seconds: Seconds = 0.0
    decoded_tokens: Count = Field(0, description="tokens emitted within decode_seconds")
    same_as_plain: bool | None = None
    metrics: dict[str, Any] = {}

    @field_validator("metrics")
    @classmethod
    def _check(cls, metrics: dict[str, Any]) -> dict[str, Any]:
        checked: dict[str, Any] = dict(_COUNTS.validate_python(metrics))
        accepted, offered = (checked.get(f"{what}_by_depth", []) for what in ("accepted", "offered"))
        if len(accepted) != len(offered) or any(a > o for a, o in zip(accepted, offered, strict=True)):
            raise ValueError("accepted_by_depth doesn't fit offered_by_depth")
        return checked

    @property
    def place(self) -> tuple[str, str, int]:
        """What tells its turn from all others of the run."""
        return self.category, self.prompt, self.turn


class Run(BaseModel):
    """A whole run: where and how it was made, and every raw sample."""

    command: str
    started: str
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, Any]
    settings: dict[str, Any]
    memory_mb: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="the most that the process had resident, all methods together"
    )
    samples: list[Sample] = []

    @classmethod
    def load(cls, folder: Path) -> Run:
        """What `save` wrote.

        Raises:
            OptionError: if there is none in ``folder``, or it can't be read, or what it says makes no sense.
        """
        file = folder / RESULTS
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            reason = f"{error.strerror}; name the folder that 'bench' wrote"
        except UnicodeDecodeError:
            reason = "it is not UTF-8 text"
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            reason = f"{where}: {first['msg']}" if where else f"it is no whole JSON file ({first['msg']})"
        raise OptionError(f"there is no run in {str(file)!r}: {reason}")

    def save(self, folder: Path) -> Path:
        """Writes ``folder/results.json``, whole or not at all.

        Raises:
            OptionError: if it can't be written; what was there stays.
        """
        file = folder / RESULTS
        try:
            with replacing(file) as part:
                part.write_text(json.dumps(self.model_dump(), indent=1), encoding="utf-8")
        except OSError as error:
            raise OptionError(f"can't write {str(file)!r}: {error.strerror or error}") from None
        return file


def new_run(settings: dict[str, Any]) -> Run:
    """A run without samples, made here and now."""
    device = settings.get("device", "cpu")
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "system": platform.platform(),
    }
    names = ("tokentree", "torch", "transformers", "numpy")
    return Run(
        command=_valid(shlex.join(["tokentree", *sys.argv[1:]])),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        commit=_commit(),
        versions={"python": platform.python_version()} | {name: _version(name) for name in names},
        machine=machine,
        settings=_valid(settings),
    )


def peak_memory() -> float:
    """The most that this process has had resident, in MB; 0 where the system can't tell."""
    try:
        import resource
    except ImportError:  # not a Unix
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1024)


def _valid(value: Any) -> Any:
    """``value`` with bytes in its texts that are no UTF-8, as a path may have them, escaped: JSON can't hold them."""
    if isinstance(value, dict):
        return {_valid(key): _valid(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(inner) for inner in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _commit() -> str | None:
    """The commit of the source tree this runs from, marked where it has changes that are not committed."""
    here = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
