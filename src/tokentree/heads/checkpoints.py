"""Medusa heads in files: FasterDecoding's layout and vLLM's.

Names, and which fields a configuration has, are those that the two projects' own loaders read. What a configuration
says of sizes is often wrong, so sizes are inferred from the weights. A tensor that is unknown or missing is an error.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from tokentree.cache import replacing
from tokentree.errors import ModelError, OptionError
from tokentree.heads.medusa import MedusaHeads

LAYOUTS = ("fasterdecoding", "vllm")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors", "pytorch_model.bin")
OWN_BLOCK = re.compile(r"(?:medusa_head\.)?([0-9]{1,4})\.([0-9]{1,4})\.linear\.(weight|bias)")  # FasterDecoding's
OWN_PROJECTION = re.compile(r"(?:medusa_head\.)?([0-9]{1,4})\.([0-9]{1,4})\.weight")
BLOCK = re.compile(r"blocks\.([0-9]{1,4})\.layers\.([0-9]{1,4})\.(weight|bias)")  # vLLM's
PROJECTION = re.compile(r"lm_heads\.([0-9]{1,4})\.weight")


# what torch raises for files that are damaged, or are none of its own
UNREADABLE = (
    OSError, SafetensorError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
    AssertionError, EOFError, MemoryError, struct.error, pickle.UnpicklingError,
)  # fmt: skip


def read_medusa(folder: str | Path) -> tuple[MedusaHeads, dict[str, Any]]:
    """The heads in ``folder``, in either layout, and what its ``config.json`` says.

    A merged model (Medusa-2, `medusa_head.` before the names) gives its heads; its other weights are the target's.

    Raises:
        ModelError: if there are none, or a tensor is unknown, missing or of another size; it is named.
    """
    folder = Path(folder).expanduser()
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"the folder {str(folder)!r} has no Medusa heads: none of {', '.join(FILES)}")
    config = read_config(folder)
    return medusa_of(read_tensors(file), str(file)), config


def read_config(folder: str | Path) -> dict[str, Any]:
    """What the ``config.json`` in ``folder`` says; nothing, if there is none.

    Raises:
        ModelError: if it can't be read.
    """
    file = Path(folder).expanduser() / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # broken UTF-8 is a ValueError
        raise ModelError(f"can't read {str(file)!r}: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{str(file)!r} is not a configuration")
    return config


def medusa_of(tensors: Mapping[str, torch.Tensor], where: str) -> MedusaHeads:
    """Heads with these ``tensors``; ``where`` they came from is named in errors.

    Raises:
        ModelError: as `read_medusa`.
    """
    found = _Found.of(tensors, where)
    blocks, projections = found.blocks, found.projections
    if not blocks and not projections:
        raise ModelError(f"{where!r} has no Medusa heads in it")
    num_heads = 1 + max([*(head for _, head in blocks), *projections])
    num_layers = max(found.ends, default=1 + max((layer for layer, _ in blocks), default=-1))
    some = next(iter([*blocks.values(), *projections.values()]))
    vocab = next(iter(projections.values())).shape[0] if projections else None
    if found.fasterdecoding and not projections:
        raise ModelError(f"{where!r} lacks the projection of head 0")
    if len(found.ends) > 1 or any(layer >= num_layers for layer, _ in (*blocks, *found.biases)):
        raise ModelError(f"in {where!r} the heads end at different layers")
    bias = bool(found.biases) or found.fasterdecoding
    found.check(num_heads, num_layers, bias, where)  # before anything is made of sizes that names and shapes tell
    heads = MedusaHeads(num_heads, num_layers, some.shape[-1], vocab, bias).to(some.dtype)
    with torch.no_grad():
        for head in range(num_heads):
            for layer in range(num_layers):
                heads.weight[layer, head].copy_(blocks[layer, head])
                if heads.bias is not None:
                    heads.bias[layer, head].copy_(found.biases[layer, head])
            if heads.projection is not None:
                heads.projection[head].copy_(projections[head])
    if found.token_map is not None:
        heads.token_map = found.token_map.to(torch.int64)
    return heads


@dataclass
class _Found:
    """The tensors of a checkpoint, blocks by layer and head."""

    blocks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    biases: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    projections: dict[int, torch.Tensor] = field(default_factory=dict)
    token_map: torch.Tensor | None = None
    ends: set[int] = field(default_factory=set)  # the numbers that FasterDecoding's projections have as layers
    fasterdecoding: bool = False

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], where: str) -> _Found:
        merged = {name: tensor for name, tensor in tensors.items() if name.startswith("medusa_head.")}
        found = cls()
        for name, tensor in (merged or tensors).items():
            if part := OWN_BLOCK.fullmatch(name) or BLOCK.fullmatch(name):
                (found.blocks if part[3] == "weight" else found.biases)[int(part[2]), int(part[1])] = tensor
                found.fasterdecoding |= ".linear." in name
            elif part := OWN_PROJECTION.fullmatch(name):
                found.projections[int(part[1])] = tensor
                found.ends.add(int(part[2]))
                found.fasterdecoding = True
            elif part := PROJECTION.fullmatch(name):
                found.projections[int(part[1])] = tensor
            elif name == "token_map":
                found.token_map = tensor
            else:
                raise ModelError(f"{where!r} has a tensor that Medusa heads don't have: {ascii(name[:80])[1:-1]}")
        return found

    def check(self, num_heads: int, num_layers: int, bias: bool, where: str) -> None:
        """Raises `ModelError` unless all parts of so many heads are there, and fit one another."""
        some = next(iter([*self.blocks.values(), *self.projections.values()]))
        hidden = some.shape[-1] if some.ndim else 0
        vocab = len(next(iter(self.projections.values()))) if self.projections and some.ndim else None
        for head in range(num_heads):
            for layer in range(num_layers):
                name = f"of head {head}, layer {layer}"
                check_part(self.blocks.get((layer, head)), [hidden, hidden], f"weight {name}", where)
                if bias:
                    check_part(self.biases.get((layer, head)), [hidden], f"bias {name}", where)
            if vocab is not None:
                check_part(self.projections.get(head), [vocab, hidden], f"projection of head {head}", where)
        if (ids := self.token_map) is not None:
            sizes = [len(ids) if vocab is None and ids.ndim else vocab or 0]
            check_part(ids, sizes, "token_map", where, (torch.int64, torch.int32))
            if not len(ids) or int(ids.min()) < 0 or len(ids.unique()) != len(ids):
                raise ModelError(f"in {where!r} the token_map names no tokens, or one of them twice")


def check_part(
    part: torch.Tensor | None, sizes: list[int], what: str, where: str, kinds: tuple[torch.dtype, ...] = FLOATS
) -> None:  # fmt: skip
    """Raises `ModelError` unless ``part`` is a tensor of these sizes and kinds, of finite numbers."""
    if part is None:
        raise ModelError(f"{where!r} lacks the {what}")
    if list(part.shape) != sizes:
        raise ModelError(f"in {where!r} the {what} is {list(part.shape)}, not {sizes}")
    if part.dtype not in kinds:
        raise ModelError(f"in {where!r} the {what} has the type {part.dtype}, which it can't have")
    if not bool(part.isfinite().all()):
        raise ModelError(f"in {where!r} the {what} holds what is no finite number")


def write_medusa(
    heads: MedusaHeads,
    folder: str | Path,
    base_model: str,
    vocab_size: int,
    layout: str = "vllm",
    output_layer: torch.Tensor | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``heads`` and a configuration into ``folder``, in one of `LAYOUTS`.

    Args:
        base_model: the name of the model that they belong to.
        vocab_size: of that model.
        output_layer: [vocab, hidden], the target's output weight. FasterDecoding's layout needs it for heads that share
            it, as each head has a projection of its own there; vLLM's names it only if heads don't share it.
        about: further fields of the configuration.

    Raises:
        OptionError: if there is no such layout, or it can't say what these heads are.
    """
    if layout not in LAYOUTS:
        raise OptionError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    projection = heads.projection
    if layout == "fasterdecoding":
        if projection is None and output_layer is not None:
            projection = output_layer.detach().expand(heads.num_heads, *output_layer.shape)  # type: ignore[assignment]
        if projection is None or heads.token_map is not None or (heads.bias is None and heads.num_layers > 0):
            raise OptionError(
                "FasterDecoding's layout has a bias in each block and a projection over the whole vocabulary for each "
                "head: pass output_layer= for heads that share the target's, or use layout='vllm'"
            )
        block, last = "{head}.{layer}.linear.{kind}", "{head}." + f"{heads.num_layers}.weight"
    else:
        block, last = "blocks.{head}.layers.{layer}.{kind}", "lm_heads.{head}.weight"
    tensors = dict[str, torch.Tensor]()
    for head in range(heads.num_heads):
        for layer in range(heads.num_layers):
            tensors[block.format(head=head, layer=layer, kind="weight")] = heads.weight[layer, head]
            if heads.bias is not None:
                tensors[block.format(head=head, layer=layer, kind="bias")] = heads.bias[layer, head]
        if projection is not None:
            tensors[last.format(head=head)] = projection[head]
    if heads.token_map is not None:
        tensors["token_map"] = heads.token_map
    file = "medusa_lm_head.safetensors" if layout == "fasterdecoding" else "model.safetensors"
    write_tensors(Path(folder), file, tensors, _config(heads, base_model, vocab_size, layout) | dict(about or {}))


def write_tensors(folder: Path, file: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Writes ``tensors`` into ``file`` in ``folder``, and ``config`` into its ``config.json``, whole or not at all.

    Raises:
        OSError: if it can't be written.
    """
    with replacing(folder / file) as part:
        part.write_bytes(save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}))
    with replacing(folder / "config.json") as part:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(heads: MedusaHeads, base_model: str, vocab_size: int, layout: str) -> dict[str, Any]:
    known = vocab_size if heads.projection is None else heads.projection.shape[1]
    if layout == "fasterdecoding":
        return {
            "medusa_num_heads": heads.num_heads,
            "medusa_num_layers": heads.num_layers,
            "base_model_name_or_path": base_model,
        }
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "base_model_name_or_path": base_model,
        "hidden_size": heads.hidden_size,
        "vocab_size": vocab_size,
        "num_heads": heads.num_heads,
        "num_hidden_layers": heads.num_layers,
        "medusa_fc_bias": heads.bias is not None,
        "original_lm_head": heads.projection is None,
        "truncated_vocab_size": known if heads.token_map is None else len(heads.token_map),
    }


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in ``file``.

    Raises:
        ModelError: if it can't be read, or holds anything else.
    """
    try:
        tensors: Any
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        said = [*str(error).splitlines(), type(error).__name__][0]
        raise ModelError(f"can't read {str(file)!r}: {said}") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and _whole(tensors[name]) for name in tensors):
        raise ModelError(f"{str(file)!r} holds more than tensors by their names")
    return tensors


def _whole(tensor: Any) -> bool:
    """Whether it is a tensor whose numbers are all there: few of them can be said to fill any size."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
