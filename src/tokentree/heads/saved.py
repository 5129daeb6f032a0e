"""Heads in a folder, and which model they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tokentree.errors import ModelError, OptionError, PairingError
from tokentree.heads.assistant import ASSISTANTS
from tokentree.heads.checkpoints import read_config, read_medusa, write_medusa
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.medusa import MedusaHeads


class About(BaseModel):
    """What a folder says of its heads beside their sizes, in the field ``tokentree`` of its ``config.json``.

    Args:
        fingerprint: of the model that they were made for.
        temperatures: per head, what its logits are divided by so that its probabilities are true.
        accuracies: per head and rank, how often that candidate was right, on texts that were held back.
        choices: rank paths of the static tree that these accuracies make the best.
        recipe: how they were trained.
        taps: the target's hidden states that an EAGLE-3 head reads, as transformers numbers them.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    fingerprint: Fingerprint | None = None
    temperatures: list[float] | None = None
    accuracies: list[list[float]] | None = None
    choices: list[list[int]] | None = None
    recipe: dict[str, Any] = {}
    taps: list[int] | None = None


@dataclass(frozen=True, eq=False)
class Saved:
    """Heads, and what is known of them."""

    heads: MedusaHeads
    about: About


def read_heads(folder: str | Path, target: Fingerprint | None = None) -> Saved:
    """The Medusa heads in ``folder``.

    Raises:
        ModelError: if there are none, see `read_medusa`.
        PairingError: if the folder says that they belong to another model than ``target``.
    """
    heads, config = read_medusa(folder)
    about = read_about(config, str(folder))
    check_made_for(about, config, folder, target)
    return Saved(heads, about)


def check_made_for(about: About, config: Mapping[str, Any], folder: str | Path, target: Fingerprint | None) -> None:
    """Raises `PairingError` if the heads in ``folder`` say that they belong to another model than ``target``."""
    theirs = about.fingerprint
    if target is not None and theirs is not None:
        other = "configuration" if theirs.config != target.config else ""
        if None not in (theirs.tokenizer, target.tokenizer) and theirs.tokenizer != target.tokenizer:
            other = other or "tokenizer"
        if other:
            base = config.get("base_model_name_or_path") or "another model"
            raise PairingError(
                f"the heads in {str(folder)!r} were made for {base}, whose {other} is not this model's: use heads that "
                "were made for it, or train some"
            )


def kind_of(folder: str | Path) -> str:
    """Which heads what ``config.json`` in ``folder`` says is of: "medusa", "eagle", "block" or "assistant"; the name of
    the drafter that they are for.

    Raises:
        ModelError: if it can't be read.
    """
    config = read_config(folder)
    if not config or "medusa_num_heads" in config or config.get("model_type") == "medusa":
        return "medusa"
    if config.get("model_type") in ASSISTANTS:
        return "assistant"
    kinds = " ".join(map(str, [*(config.get("architectures") or ()), config.get("speculators_model_type")])).lower()
    blocks = "dflash_config" in config or "block_size" in config or "dflash" in kinds or "dspark" in kinds
    return "block" if blocks else "eagle"


def saved_choices(folder: str | Path | None) -> list[list[int]]:
    """The rank paths of the static tree that is kept beside the heads in ``folder``.

    Raises:
        OptionError: if there is no folder, or none in it.
        ModelError: if the configuration there can't be read.
    """
    if folder is None:
        raise OptionError("shape='choices' is the tree that is kept beside heads: give heads=... too")
    choices = read_about(read_config(folder), str(folder)).choices
    if not choices:
        raise OptionError(f"no choices are kept beside the heads in {str(folder)!r}: use another shape")
    return choices


def write_heads(folder: str | Path, heads: MedusaHeads, base_model: str, vocab_size: int, about: About) -> None:
    """Writes heads as `read_heads` reads them: vLLM's layout, with ``about`` beside its fields."""
    write_medusa(heads, folder, base_model, vocab_size, about={"tokentree": about.model_dump(mode="json")})


def read_about(config: Mapping[str, Any], where: str) -> About:
    """What ``config`` says of heads.

    Raises:
        ModelError: if it can't be understood.
    """
    try:
        return About.model_validate(config.get("tokentree") or {})
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        raise ModelError(f"in {where!r} the configuration's field tokentree.{wrong} makes no sense") from None
