"""What an `LLM` may be told, checked before anything is loaded."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch

from tokentree.errors import ModelError, OptionError
from tokentree.heads.saved import saved_choices
from tokentree.loading import load_tokenizer
from tokentree.registry import Named
from tokentree.sampling import SamplingParams
from tokentree.shapes import Shape, Static
from tokentree.shapes import shape as parse_shape
from tokentree.shapes.static import DEEPEST

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model = Union[str, Path, "PreTrainedModel"]
DEFAULT_SHAPE = "cost"


def shape_of(shape: str | Shape | None, drafter: Named, heads: str | Path | None) -> Shape:
    """The shape of that name; without one the default, for plain decoding one that sizes nothing.

    Raises:
        OptionError: if there is none, or it is kept beside heads and there aren't any.
    """
    if isinstance(shape, str) and shape == "choices":
        return Static(paths=saved_choices(heads))
    if shape is None:
        shape = "chain:1" if isinstance(drafter, str) and drafter == "none" else DEFAULT_SHAPE
    return parse_shape(shape)


def one_spelling(draft_model: Any, shape: Any, speculative_model: Any, speculative_config: Any) -> tuple[Any, Any]:
    """``draft_model`` and ``shape``, in whichever of the two spellings they are given.

    Raises:
        OptionError: if one is given in both.
    """
    if speculative_model is not None:
        if draft_model is not None:
            raise OptionError("speculative_model is another word for draft_model: give one of them")
        draft_model = speculative_model
    if speculative_config is not None:
        if shape is not None:
            raise OptionError("speculative_config says what shape says: give one of them")
        shape = shape_in(speculative_config)
    return draft_model, shape


def shape_in(config: Any) -> str:
    """The shape that a ``speculative_config`` asks for.

    Raises:
        OptionError: if it makes no sense.
    """
    known = ("branching_factor", "depth", "mode", "num_speculative_tokens")
    if not isinstance(config, dict):
        raise OptionError(f"speculative_config={_shown(config)} is not a dict with {', '.join(known)}")
    if unknown := [str(key) for key in config if key not in known]:
        raise OptionError(f"unknown speculative_config key {unknown[0]!r}: it takes {', '.join(known)}")
    mode = config.get("mode", "tree" if "depth" in config else "chain")
    depth = config.get("depth", config.get("num_speculative_tokens", 3))
    width = config.get("branching_factor", 2 if mode == "tree" else 1)
    if not isinstance(mode, str) or mode not in ("tree", "chain") or (mode == "chain" and width != 1):
        raise OptionError('speculative_config takes mode "tree", or mode "chain" with one branch')
    if type(depth) is not int or type(width) is not int or min(depth, width) < 1:
        raise OptionError("depth and branching_factor of speculative_config are whole numbers of at least 1")
    if depth > DEEPEST:
        raise OptionError(f"depth of speculative_config is at most {DEEPEST}")
    return "x".join([str(width)] * depth)


def models_in(models: Any) -> list[Model]:
    """The draft models that are given, each as `model_in` has it.

    Raises:
        OptionError, ModelError: if one isn't.
    """
    if models is None:
        return []
    listed = list(models) if isinstance(models, list | tuple) else [models]
    return [model_in(model, "draft_model") for model in listed]


def model_in(model: Any, what: str = "model") -> Model:
    """``model``, if it is a name or a path; of a loaded one, the transformers model in what a library put around it.

    Raises:
        ModelError: if it is none of these.
    """
    if isinstance(model, str | Path):
        if not str(model).strip():
            raise ModelError(f"{what}={_shown(model)} names no model: give a hub name, a folder or a GGUF file")
        return model
    from torch import nn

    if isinstance(model, nn.Module):
        from tokentree.engines.foreign import inner_model  # and with it transformers' model classes

        return inner_model(model)
    told = f"the class {model.__name__}" if isinstance(model, type) else f"of the type {type(model).__name__}"
    raise ModelError(f"{what} is {told}: give a hub name, a folder, a GGUF file or a loaded transformers model")


def tokenizer_in(given: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that ``tokenizer=`` stands for: one that is loaded, that of a processor, or one by name.

    Raises:
        OptionError: if it stands for none.
        ModelError: if it can't be loaded.
    """
    if given is None:
        return None
    if isinstance(given, str | Path):
        model_in(given, "tokenizer")
        return load_tokenizer(given)
    from transformers import PreTrainedTokenizerBase

    inner = getattr(given, "tokenizer", None)
    for one in (given, inner):
        if isinstance(one, PreTrainedTokenizerBase):
            return one
    kind = given.__name__ if isinstance(given, type) else type(given).__name__
    hint = ": wrap it as PreTrainedTokenizerFast(tokenizer_object=…)" if type(given).__module__ == "tokenizers" else ""
    raise OptionError(f"tokenizer={kind} is not a tokenizer of transformers{hint}")


def params_in(params: Any, count: int) -> list[SamplingParams]:
    """The options of so many requests.

    Raises:
        OptionError: if these are none, or of another number.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(one, SamplingParams) for one in params):
        raise OptionError(f"params must be SamplingParams(…), or a list of them, and not {type(params).__name__}")
    if len(params) != count:
        raise OptionError(f"there are {len(params)} params for {count} prompts: give one, or one for each")
    return list(params)


def whole_number(value: Any, name: str, least: int) -> int:
    """``value`` as an int.

    Raises:
        OptionError: unless it is a whole number of at least ``least``.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < least:
        raise OptionError(f"{name} must be at least {least}: a whole number, and not {_shown(value)}")
    return int(value)


def megabytes(value: Any, name: str) -> int:
    """``value`` megabytes in bytes.

    Raises:
        OptionError: unless it is a number of at least 0.
    """
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise OptionError(f"{name} must be at least 0: a number of megabytes, and not {_shown(value)}")
    return int(value * 1_000_000)


def kv_memory(device: torch.device) -> int | None:
    """Bytes that the KV of texts may take by default; None where nobody says how much there is."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):  # Windows has none
        return None


def folder_in(value: Any, name: str) -> Path | None:
    """``value`` as a path to a folder, which need not be there.

    Raises:
        OptionError: if it is no path, or that of a file.
    """
    if value is None:
        return None
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise OptionError(f"{name}={_shown(value)} is not a folder: name one")
    path = Path(value).expanduser()
    try:
        if path.exists() and not path.is_dir():
            raise OptionError(f"{name}={str(value)!r} is a file: name a folder")
    except OSError as error:
        raise OptionError(f"{name}={_shown(str(value))} can't be looked at: {error.strerror}") from None
    return path


def heads_in(value: Any) -> Path | None:
    """``heads=`` as the folder that it names.

    Raises:
        OptionError: if it is no path, or that of a file.
        ModelError: if it isn't there.
    """
    path = folder_in(value, "heads")
    if path is not None and not path.is_dir():
        raise ModelError(f"there is no folder {str(value)!r} with heads")
    return path


def check_callable(value: Any, name: str) -> None:
    """Raises `OptionError` unless ``value`` is None or can be called."""
    if value is not None and not callable(value):
        raise OptionError(f"{name}={_shown(value)} is not a function")


def check_attention(value: Any) -> None:
    """Raises `OptionError` unless ``value`` is None or names a way to attend."""
    if value is not None and value not in ("tree", "sdpa"):
        raise OptionError(f"attention={_shown(value)} can't be used: there are 'tree' and 'sdpa'")


def check_placed(model: Any, dtype: Any, device: Any) -> None:
    """Raises `OptionError` if a loaded model is to change its type or place, or these aren't such."""
    if not isinstance(model, str | Path) and not (dtype is None and device is None):
        raise OptionError("a loaded model keeps its dtype and device: leave dtype and device out")
    if not isinstance(dtype, str | torch.dtype | None):
        raise OptionError(f"dtype={_shown(dtype)} is not one: choose float32, bfloat16 or float16")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise OptionError(f"dtype={dtype} is not one that models compute in: choose float32, bfloat16 or float16")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
