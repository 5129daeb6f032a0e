"""Models and tokenizers from wherever a user has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokentree.converted import converted, packed_place
from tokentree.engines.base import EngineOptions
from tokentree.engines.from_cache import ready_engine
from tokentree.engines.plan import may_be_kept
from tokentree.engines.support import FOR_ANOTHER
from tokentree.engines.transformers_engine import TransformersEngine
from tokentree.errors import ModelError, OptionError
from tokentree.gguf.header import has_tokenizer, read_header
from tokentree.heads.assistant import ASSISTANTS
from tokentree.misread import told
from tokentree.names import Found, find
from tokentree.uncollected import uncollected
from tokentree.versions import check_transformers

if TYPE_CHECKING:  # its model classes take seconds to import, and aren't needed where a model was packed before
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "tekken.json", "special_tokens_map.json",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | torch.device | None) -> torch.device:
    """``device``, or the first GPU, or the CPU.

    Raises:
        OptionError: if it isn't there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        found = torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OptionError(
            f"device {str(device)!r} can't be used: {str(error).splitlines()[0].partition('. ')[0]}"
        ) from None
    if found.type == "meta":
        raise OptionError("device 'meta' can't be used: there is nothing to compute with")
    return found


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The type asked for; otherwise bfloat16 on CPUs; None elsewhere, which leaves it to the checkpoint, and where that
    is a GGUF file, to `load_model`.

    Raises:
        OptionError: if it is none of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in DTYPES:
            raise OptionError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return torch.bfloat16 if device.type == "cpu" else None


def load_engine(model: str | Path | PreTrainedModel, options: EngineOptions) -> TransformersEngine:
    """An engine for a model by its name, or for a loaded one: see `TorchEngine`. Where the weights of a named one are
    kept with all that a forward needs, they are mapped into memory, and nothing else is read.

    Raises:
        ModelError: if the model can't be loaded, or not be decoded with a tree, with the reason.
    """
    file, place, named = None, None, isinstance(model, str | Path)
    quantization, prefix_bytes = options.quantization, options.prefix_bytes
    if isinstance(model, str | Path):
        device = pick_device(None) if options.device is None else options.device
        numbers = pick_dtype(options.dtype, device)
        file = find(model).file
        place = packed_place(model, quantization or str(numbers).removeprefix("torch."))
        if place and may_be_kept(device.type, numbers, options):
            ready = ready_engine(place, quantization, prefix_bytes)
            if ready is not None:
                return ready
        model = load_model(model, options.dtype, device)
    check_transformers()
    from tokentree.engines.torch import TorchEngine  # and with it transformers' model classes

    return TorchEngine(model, options.attention, named, quantization, prefix_bytes, file, place, options.compile)


def load_model(name: str | Path, dtype: str | torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The causal language model ``name``: a hub name, a folder of safetensors, or a GGUF file. One that sees pictures
    too is loaded whole. Code that comes with it is never run, nor asked for: transformers would ask at a terminal.

    Raises:
        ModelError: if it can't be loaded, with the reason.
    """
    found, wanted = find(name), pick_dtype(dtype, device)
    check_transformers()
    if found.file is None:
        model = _load_model(name, found, wanted or "auto")
    else:
        file, made = found.file, wanted or torch.bfloat16  # its weights have none of torch's types
        model = converted(
            file, str(made).removeprefix("torch."), lambda: _gguf_model(name, file, made),
            lambda folder: _load_model(name, Found(str(folder), local_only=True), made),
        )  # fmt: skip
    model.to(device)  # type: ignore[arg-type]
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def _gguf_model(name: str | Path, file: Path, dtype: torch.dtype) -> PreTrainedModel:
    with told(f"can't load the model {str(name)!r}"):
        from tokentree.gguf.model import gguf_model

        return gguf_model(file, dtype)


def _load_model(name: str | Path, found: Found, dtype: torch.dtype | str) -> PreTrainedModel:
    with told(f"can't load the model {str(name)!r}"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        config = AutoConfig.from_pretrained(
            found.where, local_files_only=found.local_only, trust_remote_code=False
        )  # fmt: skip
        if config.model_type in ASSISTANTS:
            raise ModelError(f"{str(name)!r} {FOR_ANOTHER}")
        if (few := getattr(config, "quantization_config", None)) is not None:
            method = few["quant_method"] if isinstance(few, dict) else few.quant_method
            if method not in AUTO_QUANTIZER_MAPPING:  # transformers would take its numbers as weights
                raise ValueError(f"its weights are quantized by {method!r}, which can't be read here")
        sees: Any = AutoModelForMultimodalLM._model_mapping.get(type(config), None)
        causal: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
        whole = sees is not None and (causal is None or sees.__name__ in (config.architectures or ()))
        kind: Any = AutoModelForMultimodalLM if whole else AutoModelForCausalLM
        model, notes = kind.from_pretrained(
            found.where, config=config, dtype=dtype, output_loading_info=True, local_files_only=found.local_only,
            trust_remote_code=False,
        )  # fmt: skip
        if missing := sorted(notes["missing_keys"]):  # transformers fills them with random numbers
            raise ModelError(f"can't load the model {str(name)!r}: it has no weights {', '.join(missing[:3])}")
        loaded: PreTrainedModel = model
        return loaded


def find_tokenizer(name: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with the model ``name``, or None if none does.

    Raises:
        ModelError: if it can't be loaded, with the reason.
    """
    found = find(name)
    if found.file is None and Path(found.where).is_dir() and not any(
        (Path(found.where) / one).exists() for one in TOKENIZER_FILES
    ):  # fmt: skip
        return None
    try:
        return load_tokenizer(name)
    except _NoTokenizer:
        return None


@uncollected
def load_tokenizer(name: str | Path, local_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model ``name``; with ``local_only``, if it is on this machine already.

    Raises:
        ModelError: if it can't be loaded, with the reason.
    """
    found = find(name, local_only)
    if found.file is not None:
        file = found.file
        return converted(
            file, "tokenizer", lambda: _gguf_tokenizer(name, file),
            lambda folder: _converted_tokenizer(name, folder),
        )  # fmt: skip
    return _load_tokenizer(name, found)


class _NoTokenizer(ModelError):
    """Raised of a GGUF file that holds none."""


def _gguf_tokenizer(name: str | Path, file: Path) -> PreTrainedTokenizerBase:
    with told(f"can't load the model {str(name)!r}"):
        header = read_header(file)
    with told(f"can't load the tokenizer of {str(name)!r}"):
        if not has_tokenizer(header):
            raise _NoTokenizer(f"{str(name)!r} has no tokenizer")
        from tokentree.gguf.tokenizer import gguf_tokenizer

        return gguf_tokenizer(file)


def _converted_tokenizer(name: str | Path, folder: Path) -> PreTrainedTokenizerBase:
    """What `_gguf_tokenizer` made: of a kind that is known, so that nothing else is imported."""
    with told(f"can't load the tokenizer of {str(name)!r}"):
        from transformers import PreTrainedTokenizerFast

        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return tokenizer


def _load_tokenizer(name: str | Path, found: Found) -> PreTrainedTokenizerBase:
    with told(f"can't load the tokenizer of {str(name)!r}"):
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            found.where, local_files_only=found.local_only, trust_remote_code=False
        )
        return tokenizer
