"""Heads that a training goes on with: those that an earlier one has made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokentree.errors import OptionError


def check_equal(folder: str | Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises `OptionError` unless the heads in ``folder`` are made as those that are to be trained."""
    for name, wanted in ours.items():
        if theirs[name] != wanted:
            raise OptionError(
                f"training can't start from the heads in {str(folder)!r}: they have {name} {theirs[name]}, and this "
                f"training {wanted}"
            )


def said_of(start: str | Path | None) -> dict[str, Any]:
    """What settings and a model card say of it."""
    return {} if start is None else {"start": str(start)}


def go_on_from(
    begun: nn.Module | None, heads: nn.Module, own: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Gives ``heads`` the weights of ``begun``, if there is any, but for those that are their ``own``; returns what a
    checkpoint belongs to for that."""
    if begun is None:
        return {}
    heads.load_state_dict({**begun.state_dict(), **(own or {})})
    return {"start": _digest(begun)}


def rows_of(begun: torch.Tensor, theirs: torch.Tensor, fresh: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Rows of an output layer for the tokens ``ours``, ascending: those of ``begun`` for tokens that are among
    ``theirs`` too, and ``fresh`` ones for all others."""
    made = fresh.clone()
    made[torch.isin(ours, theirs)] = begun[torch.isin(theirs, ours)].to(made)
    return made


def _digest(heads: nn.Module) -> str:
    """What tells these weights from others."""
    found = hashlib.sha256()
    for name, weight in sorted(heads.state_dict().items()):
        found.update(name.encode() + weight.detach().cpu().contiguous().float().numpy().tobytes())
    return found.hexdigest()
