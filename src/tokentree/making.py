"""What an `LLM` is made of, beside its target's engine."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokentree.drafters.pard import mask_token
from tokentree.engines.base import Engine, EngineOptions
from tokentree.engines.model_facts import Facts
from tokentree.engines.transformers_engine import TransformersEngine
from tokentree.errors import ModelError, PairingError
from tokentree.heads.fingerprint import Fingerprint
from tokentree.loading import find_tokenizer, load_engine, load_tokenizer
from tokentree.names import find
from tokentree.options import Model, kv_memory
from tokentree.pairing import difference
from tokentree.scheduler import PREFILL_ROWS
from tokentree.vocabularies import Spelling, Vocabularies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a named model, if it has one; of a loaded one, if the place it was loaded from still has it."""
    if isinstance(model, str | Path):
        return find_tokenizer(model)
    try:
        return load_tokenizer(model.config._name_or_path, local_only=True) if model.config._name_or_path else None
    except ModelError:  # weights alone, or a place that is gone
        return None


def folder_of(model: Model | None) -> Path | None:
    """The folder of safetensors that ``model`` is in, or was loaded from, if it is on this machine."""
    name = model if isinstance(model, str | Path) or model is None else model.config._name_or_path
    if not name:
        return None
    try:
        found = find(name, local_only=True)
    except ModelError:  # it was loaded from a place that is gone
        return None
    folder = Path(found.where).expanduser()
    return folder if found.file is None and folder.is_dir() else None


class DraftEngines(NamedTuple):
    """The engines of draft models.

    Args:
        engines: each behind what its model is called in figures.
        vocabularies: by these names, those of draft models whose tokenizer isn't the target's.
        masks: by these names, the mask tokens of draft models that guess several tokens at once.
    """

    engines: tuple[tuple[str, TransformersEngine], ...]
    vocabularies: dict[str, Vocabularies]
    masks: dict[str, int]


def draft_engines_of(
    drafts: SequenceOf[Model], target: Engine, tokenizer: PreTrainedTokenizerBase | None, options: EngineOptions
) -> DraftEngines:
    """The engines of ``drafts``, for a target with ``tokenizer``. A model whose own isn't known is taken to have that.

    Raises:
        PairingError: if the tokens of another tokenizer can't be told as text, or are to be guessed several at once.
        ModelError: if a model can't be loaded, or what it says of its mask token makes no sense.
    """
    engines, vocabularies = list[tuple[str, TransformersEngine]](), dict[str, Vocabularies]()
    masks = dict[str, int]()
    for draft in drafts:
        name = str(draft) if isinstance(draft, str | Path) else draft.config._name_or_path
        own = None if tokenizer is None else tokenizer_of(draft)
        short = short_name(name, [known for known, _ in engines])
        engine = load_engine(draft, options)
        if (mask := mask_token(engine.facts.drafting, short, engine.vocab_size)) is not None:
            masks[short] = mask
        if tokenizer is not None and own is not None and difference(tokenizer, own) is not None:
            if mask is not None:
                raise PairingError(
                    f"the draft model {short!r} guesses several tokens at once (PARD) and has another tokenizer: use "
                    "one with the target's"
                )
            spelled = Spelling(tokenizer, target.vocab_size), Spelling(own, engine.vocab_size)
            vocabularies[short] = Vocabularies(*spelled)
        engines.append((short, engine))
    return DraftEngines(tuple(engines), vocabularies, masks)


def short_name(name: str, taken: SequenceOf[str]) -> str:
    """What a draft model is called in figures: the end of its name, numbered where another one is called so too."""
    short = Path(name).name.removesuffix(".gguf") or "draft_model"
    alike = sum(known.split(" #")[0] == short for known in taken)
    return f"{short} #{alike + 1}" if alike else short


def fingerprint_of(engine: Engine, tokenizer: PreTrainedTokenizerBase | None, heads: Path | None) -> Fingerprint | None:
    """What heads must have been made for; None without heads, or for a target that they are no use to."""
    facts = getattr(engine, "facts", None)
    if heads is None or not isinstance(facts, Facts):
        return None
    return Fingerprint.of_sizes(facts.sizes, tokenizer)


def prefill_rows_of(engine: Engine, asked: int | None) -> int:
    """Rows of prompts in a step: as many as were asked for, or as suit the device."""
    return asked or (PREFILL_ROWS if engine.info.device.type == "cpu" else 8 * PREFILL_ROWS)


def kv_bytes_of(engine: Engine, asked: int | None) -> int | None:
    """Memory for KV: as much as was asked for, or as there is; no more than the engine has."""
    info = engine.info
    if info.kv_bytes is None:
        return kv_memory(info.device) if asked is None else asked
    return info.kv_bytes if asked is None else min(asked, info.kv_bytes)
