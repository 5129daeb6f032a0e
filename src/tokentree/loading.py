"""Models and tokenizers from wherever a user has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from tokentree.converted import converted, packed_place
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.ready import ready_engine
from tokentree.errors import ModelError, OptionError, PairingError

if TYPE_CHECKING:  # its model classes take seconds to import, and aren't needed where a model was packed before
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {str(device)!r} can't be used: {str(error).splitlines()[0]}") from None
    return torch.device(device)


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


def load_engine(
    model: str | Path | PreTrainedModel, dtype: str | torch.dtype | None, device: torch.device,
    quantization: str | None = None, prefix_bytes: int = 0, attention: str | None = None, compile: bool = False,
) -> KVEngine:  # fmt: skip
    """An engine for a model by its name, or for a loaded one: see `TorchEngine`. Where the weights of a named one are
    kept with all that a forward needs, they are mapped into memory, and nothing else is read.

    Raises:
        ModelError: if the model can't be loaded, or not be decoded with a tree, with the reason.
    """
    file, place, named = None, None, isinstance(model, str | Path)
    if isinstance(model, str | Path):
        file = Path(model).expanduser() if Path(model).suffix == ".gguf" else None
        place = packed_place(model, quantization)
        plain = attention in (None, "tree") and device.type == "cpu" and pick_dtype(dtype, device) is torch.bfloat16
        if place and plain and (ready := ready_engine(place, quantization, prefix_bytes)):
            return ready
        model = load_model(model, dtype, device)
    from tokentree.engines.torch import TorchEngine  # and with it transformers' model classes

    return TorchEngine(model, attention, named, quantization, prefix_bytes, file, place, compile)


def taken_out(model: Any) -> Any:
    """The name of a model as it is; of a loaded one, the transformers model in what a library put around it.

    Raises:
        ModelError: if there is none in it.
    """
    if isinstance(model, str | Path):
        return model
    from tokentree.engines.foreign import inner_model  # and with it transformers' model classes

    return inner_model(model)


def load_model(name: str | Path, dtype: str | torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The causal language model ``name``: a hub name, a folder of safetensors, or a GGUF file.

    Raises:
        ModelError: if it can't be loaded, with the reason.
    """
    from transformers import GgufConfig

    where, options = _where(name)
    wanted = pick_dtype(dtype, device) or "auto"
    if options:
        if wanted == "auto":  # a GGUF file's weights have none of torch's types, and would become float32
            wanted = torch.bfloat16
        # unpack the blocks: packed ones can be multiplied only by kernels that few machines have
        options["quantization_config"] = GgufConfig(dequantize=True)
        part = str(wanted).removeprefix("torch.")
        model = converted(
            Path(where, options["gguf_file"]), part,
            lambda: _plain(_load_model(name, where, wanted, options)),
            lambda folder: _load_model(name, str(folder), wanted, {}),
        )  # fmt: skip
    else:
        model = _load_model(name, where, wanted, options)
    model.to(device)  # type: ignore[arg-type]
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def _load_model(name: str | Path, where: str, dtype: torch.dtype | str, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, PreTrainedModel

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"can't load the model {str(name)!r}: {_reason(error)}") from None
    model, notes = loaded
    assert isinstance(model, PreTrainedModel)
    if missing := sorted(notes["missing_keys"]):  # transformers fills them with random numbers
        raise ModelError(f"can't load the model {str(name)!r}: it has no weights {', '.join(missing[:3])}")
    return model


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """``model``, which was unpacked when it was loaded, without the memory of having been packed."""
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def load_tokenizer(name: str | Path, local_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model ``name``; with ``local_only``, if it is on this machine already.

    Raises:
        ModelError: if it can't be loaded, with the reason.
    """
    where, options = _where(name)
    if options:
        return converted(
            Path(where, options["gguf_file"]), "tokenizer",
            lambda: _load_tokenizer(name, where, local_only, options),
            lambda folder: _load_tokenizer(name, str(folder), True, {}),
        )  # fmt: skip
    return _load_tokenizer(name, where, local_only, options)


def _load_tokenizer(name: str | Path, where: str, local_only: bool, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local_only, **options)
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as error:
        raise ModelError(f"can't load the tokenizer of {str(name)!r}: {_reason(error)}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _where(name: str | Path) -> tuple[str, dict[str, Any]]:
    """What transformers wants to be told: a name, and the GGUF file if it is one."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {str(name)!r}")
        return str(path.parent), {"gguf_file": path.name}
    looks_local = path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelError(f"there is no folder {str(name)!r}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"the folder {str(name)!r} has no config.json, so it is not a model")
    return str(path if path.is_dir() else name), {}


def _reason(error: Exception) -> str:
    """The first sentence of an error that was written for a longer page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_same_tokenizer(
    target: PreTrainedTokenizerBase | None, draft: PreTrainedTokenizerBase | None, name: str
) -> None:
    """Raises `PairingError` unless both give a text the same ids. Vocabulary sizes say nothing: they are padded."""
    if target is None or draft is None:
        return
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    odd = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])[0][0]
    raise PairingError(
        f"the draft model {name!r} has another tokenizer ({len(theirs)} tokens, the target {len(ours)}; they differ on "
        f"{odd!r}): choose a draft model of the target's own family"
    )
