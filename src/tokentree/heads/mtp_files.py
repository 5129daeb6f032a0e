"""Layers for multi-token prediction, read from a model's own folder, where transformers leaves them.

There are two layouts: Qwen3-Next's and Qwen3.5's, whose tensors begin with ``mtp.``; and DeepSeek-V3's and GLM-4.x's,
in which the layer stands behind the model's last one. A tensor that is unknown or missing is an error.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tokentree.errors import ModelError
from tokentree.heads.checkpoints import check_part
from tokentree.heads.mtp import MtpHead

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

INDEX = "model.safetensors.index.json"
PROJECTION = re.compile(r"(?P<layer>(?:.*\.)?layers\.(?P<number>[0-9]{1,4})\.)eh_proj\.weight")
SCALES = "_scale_inv"  # behind the name of a weight in 8-bit floating point: a scale for each of its blocks
BLOCK = (128, 128)
EXPERTS = re.compile(r"mlp\.(?:experts|gate|router)\.")
# fields of a configuration that speak of layers by their numbers, and what they say of a lone one: sparse, or dense
NUMBERED: dict[str, tuple[Any, Any]] = {
    "num_hidden_layers": (1, 1), "mlp_layer_types": (["sparse"], ["dense"]), "first_k_dense_replace": (0, 1),
    "mlp_only_layers": ([], [0]), "decoder_sparse_step": (1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint has the parts of a layer for multi-token prediction. There may be several such layers, and the
    first one is meant.

    Args:
        whole: what all their names begin with.
        layer: what the names of its decoder layer begin with.
        embedding_norm, hidden_norm, projection, norm: the names of its other weights.
        left: what other names begin with: those of further layers, and of copies of the target's.
    """

    whole: str
    layer: str
    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str
    left: re.Pattern[str]


def find_mtp(folder: Path | None) -> Layout | None:
    """Where the model in ``folder`` has a layer for multi-token prediction; None if it has none of a known layout."""
    try:
        return None if folder is None else _layout(tensor_files(folder))
    except ModelError:
        return None


@torch.no_grad()
def read_mtp(folder: Path, dtype: torch.dtype) -> MtpHead:
    """The layer of the model in ``folder``, in ``dtype``.

    Raises:
        ModelError: if there is none, or a tensor is unknown, missing or of another size; it is named.
    """
    files, where = tensor_files(folder), str(folder)
    layout = _layout(files)
    if layout is None:
        raise ModelError(f"the model in {where!r} has no layer for multi-token prediction in a known layout")
    tensors = _read(layout, files)
    _widen(tensors, where)
    for name, tensor in tensors.items():
        check_part(tensor, list(tensor.shape), f"tensor {name}", where)
    config = _one_layer(folder, any(EXPERTS.match(name.removeprefix(layout.layer)) for name in tensors))
    size = config.hidden_size
    embedding_gain, hidden_gain = (
        taken(tensors, name, [size], where) for name in (layout.embedding_norm, layout.hidden_norm)
    )
    weight = taken(tensors, layout.projection, [size, 2 * size], where)
    check_part(tensors.get(layout.norm), [size], f"tensor {layout.norm}", where)
    model = _model(config, tensors, layout, dtype, where)
    projection = nn.Linear(2 * size, size, bias=False, device="meta")
    projection.weight = nn.Parameter(weight.to(dtype))
    embedding_norm, hidden_norm = (_norm(model.norm, gain.to(dtype)) for gain in (embedding_gain, hidden_gain))
    return MtpHead(model, embedding_norm, hidden_norm, projection).requires_grad_(False).eval()


def _norm(like: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A norm of the family's kind, such as it has ``like``, with this weight."""
    norm = copy.deepcopy(like)
    norm.weight = nn.Parameter(weight)
    return norm


def _layout(names: Iterable[str]) -> Layout | None:
    if "mtp.fc.weight" in names:
        embedding, hidden = (f"mtp.pre_fc_norm_{one}.weight" for one in ("embedding", "hidden"))
        rest = "mtp.fc.weight", "mtp.norm.weight"
        return Layout("mtp.", "mtp.layers.0.", embedding, hidden, *rest, re.compile(r"mtp\.layers\.[1-9]"))
    found = [match for name in names if (match := PROJECTION.fullmatch(name))]
    if not found:
        return None
    layer = min(found, key=lambda match: int(match["number"]))["layer"]
    names = [f"{layer}{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")]
    left = re.compile(re.escape(layer) + r"(?:shared_head\.head|embed_tokens)\.")
    return Layout(layer, layer, names[0], names[1], names[2], names[3], left)


def tensor_files(folder: Path) -> dict[str, Path]:
    """The names of all tensors in ``folder``, and the files that they are in.

    Raises:
        ModelError: if it can't be told.
    """
    index = folder / INDEX
    try:
        if index.is_file():
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): folder / file for name, file in found.items()}
        files = dict[str, Path]()
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        return files
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"can't read the tensors in {str(folder)!r}: {error}") from None


def _read(layout: Layout, files: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The tensors of ``layout`` by their names."""
    return read_from(
        {name: file for name, file in files.items() if name.startswith(layout.whole) and not layout.left.match(name)}
    )


def read_from(files: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Tensors by their names, from those files alone that have some.

    Args:
        files: what `tensor_files` found of them.

    Raises:
        ModelError: if one can't be read.
    """
    found = dict[str, torch.Tensor]()
    for file in sorted(set(files.values())):
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name, place in files.items() if place == file}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"can't read {str(file)!r}: {error}") from None
    return found


def _widen(tensors: dict[str, torch.Tensor], where: str) -> None:
    """Multiplies weights in 8-bit floating point by the scales of their blocks, as DeepSeek-V3 has them."""
    for name in [name for name in tensors if name.endswith(SCALES)]:
        scales, weight = tensors.pop(name).float(), tensors.get(name.removesuffix(SCALES), torch.empty(0))
        rows, columns = weight.shape if weight.ndim == 2 else (0, 0)
        blocks = [-(-rows // BLOCK[0]), -(-columns // BLOCK[1])]
        if weight.ndim != 2 or list(scales.shape) != blocks:
            raise ModelError(f"in {where!r} the tensor {name} has no scale for each block of a weight")
        wide = scales.repeat_interleave(BLOCK[0], 0)[:rows].repeat_interleave(BLOCK[1], 1)[:, :columns]
        tensors[name.removesuffix(SCALES)] = weight.float() * wide


def taken(tensors: dict[str, torch.Tensor], name: str, shape: list[int], where: str) -> torch.Tensor:
    """Takes a tensor out; raises `ModelError` unless it is there, and of this size."""
    check_part(tensors.get(name), shape, f"tensor {name}", where)
    return tensors.pop(name)


def _one_layer(folder: Path, sparse: bool) -> PreTrainedConfig:
    """The configuration of the text model in ``folder``, with one layer and one token."""
    from transformers import AutoConfig  # takes a second

    from tokentree.misread import told

    with told(f"can't read the configuration in {str(folder)!r}"):
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = copy.deepcopy(config.get_text_config())
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = ["full_attention" if "full_attention" in kinds else kinds[-1]]
        for field, values in NUMBERED.items():
            if getattr(config, field, None) is not None:
                setattr(config, field, values[not sparse])
        config.vocab_size, config.pad_token_id = 1, None
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        made: PreTrainedConfig = config
        return made


def _model(
    config: PreTrainedConfig, tensors: dict[str, torch.Tensor], layout: Layout, dtype: torch.dtype, where: str
) -> Any:
    """The model with one layer that ``config`` says, with these ``tensors``, read as transformers reads the family's.

    Raises:
        ModelError: as `read_mtp`.
    """
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None:
        raise ModelError(f"{where!r} is of the family {config.model_type}, which has no model of text alone")
    base = kind.base_model_prefix
    inside = [name for name in tensors if name.startswith(layout.layer) and name != layout.norm]
    names = {f"{base}.layers.0.{name.removeprefix(layout.layer)}": name for name in inside}
    names[f"{base}.norm.weight"] = layout.norm
    state = {new: tensors[old] for new, old in names.items()}
    if foreign := sorted({*tensors} - {*names.values()}):
        raise ModelError(f"{where!r} has a tensor that a layer for multi-token prediction doesn't have: {foreign[0]}")
    nothing = torch.zeros(1, config.hidden_size, dtype=dtype)  # transformers would draw what it lacks
    state |= {f"{base}.embed_tokens.weight": nothing, "lm_head.weight": nothing.clone()}

    def told_name(name: str) -> str:
        return names.get(name, name.replace(f"{base}.layers.0.", layout.layer))

    model = model_of(kind, config, state, dtype, told_name, where, "layer for multi-token prediction")
    return getattr(model, base)


def model_of(
    kind: Any, config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype: torch.dtype,
    told_name: Callable[[str], str], where: str, what: str,
) -> Any:  # fmt: skip
    """A model of ``kind``, made of ``config``, with just the tensors ``state``, read as transformers reads them.

    Args:
        told_name: what a tensor is called in the folder ``where``.
        what: is read, in words.

    Raises:
        ModelError: if a tensor is unknown, missing or of another size; it is named.
    """
    from tokentree.misread import told

    with told(f"can't read the {what} in {where!r}"):
        model, notes = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    for name, found, wanted in sorted(notes["mismatched_keys"]):
        raise ModelError(f"in {where!r} the tensor {told_name(name)} is {list(found)}, not {list(wanted)}")
    if missing := sorted(map(told_name, notes["missing_keys"])):
        raise ModelError(f"{where!r} lacks the tensor {missing[0]}")
    if unknown := sorted(map(told_name, notes["unexpected_keys"])):
        raise ModelError(f"{where!r} has a tensor that a {what} doesn't have: {unknown[0]}")
    return model
