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
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError

from tokentree.cache import replacing
from tokentree.errors import OptionError

RESULTS = "results.json"


class Sample(BaseModel):
    """One method on one turn of one prompt. ``error`` is set where it failed, and then nothing else is."""

    prompt: str
    category: str
    turn: int
    method: str
    order: int = Field(description="place among the methods on this turn; it rotates")
    error: str | None = None
    prompt_tokens: int = 0
    token_ids: list[int] = []
    text: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = Field(0, description="tokens emitted within decode_seconds")
    same_as_plain: bool | None = None
    metrics: dict[str, Any] = {}

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
    memory_mb: float = Field(0.0, description="the most that the process had resident, all methods together")
    samples: list[Sample] = []

    @classmethod
    def load(cls, folder: Path) -> Run:
        """What `save` wrote.

        Raises:
            OptionError: if there is none in ``folder``, or it can't be read, or is none.
        """
        file = folder / RESULTS
        try:
            return cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise OptionError(f"there is no run in {str(folder)!r}: {error.strerror}") from None
        except ValidationError:
            raise OptionError(f"there is no run in {str(folder)!r}: {RESULTS} isn't what `bench` writes") from None

    def save(self, folder: Path) -> Path:
        """Writes ``folder/results.json``, whole or not at all.

        Raises:
            OSError: if it can't be written.
        """
        file = folder / RESULTS
        with replacing(file) as part:
            part.write_text(json.dumps(self.model_dump(), indent=1), encoding="utf-8")
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
        command=shlex.join(["tokentree", *sys.argv[1:]]),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        commit=_commit(),
        versions={"python": platform.python_version()} | {name: _version(name) for name in names},
        machine=machine,
        settings=settings,
    )


def peak_memory() -> float:
    """The most that this process has had resident, in MB; 0 where the system can't tell."""
    try:
        import resource
    except ImportError:  # not a Unix
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1024)


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
