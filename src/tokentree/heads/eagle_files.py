"""EAGLE heads in files: SafeAILab's layouts for EAGLE-1 (and 2) and EAGLE-3, SpecForge's, and speculators'.

Names and fields are those that the projects' own loaders read. Sizes are inferred from the weights where they can be.
A tensor that is unknown or missing is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from tokentree.errors import ModelError, OptionError
from tokentree.heads.checkpoints import check_part, read_config, read_tensors, write_tensors
from tokentree.heads.eagle import EagleHead, EagleSizes
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.peagle import PEagleHead, PEagleSizes
from tokentree.heads.peagle_files import MASK, masks_of, with_masks
from tokentree.heads.saved import About, check_made_for, read_about

if TYPE_CHECKING:
    from tokentree.heads.block import BlockHead

Head = TypeVar("Head", EagleHead, "BlockHead")

LAYOUTS = ("safeailab", "speculators")
FILES = ("model.safetensors", "pytorch_model.bin")
LAYER = {1: "layers.0.", 3: "midlayer."}  # what stands before a layer's tensors; speculators' EAGLE-3 has EAGLE-1's
IDS = "eagle_aux_hidden_state_layer_ids"
# fields that say where an EAGLE-3 head has norms, and what the tensors of these norms begin with
NORMS = {"norm_before_residual": None, "fc_norm": "fc_norm.", "norm_before_fc": "input_norm.", "norm_output": None}


# what a configuration may lead to that makes no sense
MEANINGLESS = (
    ValidationError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
    RuntimeError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class SavedEagle:
    """A head, and what is known of it.

    Args:
        head: in float32.
        told: how the places of the hidden states that it reads were found out, in words.
    """

    head: EagleHead
    about: About
    told: str


def read_eagle(folder: str | Path, num_layers: int, target: Fingerprint | None = None) -> SavedEagle:
    """The head in ``folder``, in any of the layouts.

    Args:
        num_layers: of the target, by which EAGLE-3's default places are counted.

    Raises:
        ModelError: if there is none, or a tensor is unknown, missing or of another size; it is named.
        PairingError: if the folder says that it belongs to another model than ``target``.
    """
    folder, where = opened(folder, "EAGLE")
    config = read_config(folder)
    about = read_about(config, str(folder))
    check_made_for(about, config, folder, target)
    tensors = _renamed(read_tensors(Path(where)), where)
    sizes, told = _sizes(config, tensors, num_layers, where)
    if isinstance(sizes, PEagleSizes):
        masked: EagleHead = filled(lambda: PEagleHead(sizes), _places, tensors, where, "a P-EAGLE head")
        return SavedEagle(masked, about, told)
    head = filled(lambda: EagleHead(sizes), _places, tensors, where, f"an EAGLE-{sizes.version} head")
    return SavedEagle(head, about, told)


def opened(folder: str | Path, kind: str) -> tuple[Path, str]:
    """The folder of a head of this ``kind``, and the file of its tensors.

    Raises:
        ModelError: if there is none.
    """
    folder = Path(folder).expanduser()
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"the folder {str(folder)!r} has no {kind} head: none of {', '.join(FILES)}")
    return folder, str(file)


def filled(
    make: Callable[[], Head], places: Callable[[Head], dict[str, torch.Tensor]], tensors: dict[str, torch.Tensor],
    where: str, what: str,
) -> Head:  # fmt: skip
    """The head that ``make`` makes, with ``tensors`` in its ``places``.

    Args:
        where: the file that they come from.
        what: the head, in words.

    Raises:
        ModelError: if a tensor is unknown, missing or of another size, or no such head can be.
    """
    try:
        with torch.device("meta"):  # what it would be, before any memory is taken for it
            planned = places(make())
        for name, into in planned.items():
            check_part(tensors.get(name), list(into.shape), f"tensor {name}", where)
        head = make()
    except MEANINGLESS as error:
        raise meaningless(where, error) from None
    with torch.no_grad():
        for name, into in places(head).items():
            into.copy_(tensors.pop(name))
    offsets, known = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if head.token_map is not None:
        head.token_map = token_map_of(offsets, known, head.token_map, head.sizes.vocab_size, where)
    if tensors:
        raise ModelError(f"{where!r} has a tensor that {what} doesn't have: {min(tensors)}")
    return head


def write_eagle(
    head: EagleHead, folder: str | Path, base_model: str, layout: str = "safeailab", about: About | None = None,
    embedding: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16, architecture: str = "LlamaForCausalLM",
) -> None:  # fmt: skip
    """Writes ``head`` and a configuration into ``folder``, in one of `LAYOUTS`; EAGLE-1 has SafeAILab's alone, P-EAGLE
    speculators'.

    Args:
        base_model: the name of the target.
        embedding: [vocab, hidden size], the target's, to be written beside a head that has none of its own, for loaders
            that don't take it from the target, as SafeAILab's for EAGLE-1.
        architecture: of the target, for speculators' configuration.

    Raises:
        OptionError: if there is no such layout, or not for this version.
    """
    sizes = head.sizes
    if layout not in LAYOUTS:
        raise OptionError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if layout == "speculators" and sizes.version == 1:
        raise OptionError("speculators' layout is for EAGLE-3: use layout='safeailab'")
    if layout != "speculators" and isinstance(sizes, PEagleSizes):
        raise OptionError("P-EAGLE heads are written in speculators' layout: use layout='speculators'")
    tensors = {name: tensor.detach().to(dtype) for name, tensor in _places(head).items()}
    if head.embed_tokens is None and embedding is not None:
        tensors["embed_tokens.weight"] = embedding.detach().to(dtype)
    if head.token_map is not None:
        ids = head.token_map.cpu()
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(sizes.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    if layout == "speculators":
        tensors = {name.replace(LAYER[3], LAYER[1]): tensor for name, tensor in tensors.items()}
    config = _config(sizes, base_model, layout, architecture)
    if isinstance(sizes, PEagleSizes):
        config = with_masks(config, sizes)
    if about is not None:
        config["tokentree"] = about.model_dump(mode="json")
    write_tensors(Path(folder), "model.safetensors", tensors, config)


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """The hidden states that EAGLE-3 reads of a target with so many layers."""
    return 2, num_layers // 2, num_layers - 3


def tap_places(ids: list[int]) -> tuple[tuple[int, ...], str]:
    """The hidden states, as transformers numbers them, that a configuration's layer ids mean, and the rule in words.

    Two conventions are about: counted by a layer's input (SafeAILab, vLLM), the first is 2; by its output, 1.
    """
    if ids and ids[0] == 1:
        return tuple(i + 1 for i in ids), f"{IDS} {ids} are taken as layers whose output is read"
    return tuple(ids), f"{IDS} {ids} are taken as layers whose input is read"


def _renamed(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """``tensors`` as SafeAILab names those of the version that they are of."""
    third = any(name.startswith(("midlayer.", "lm_head.", "norm.", "layers.0.hidden_norm.")) for name in tensors)
    prefix = LAYER[3] if third else LAYER[1]
    found = {
        name.replace("layers.0.", prefix) if name.startswith("layers.0.") else name: tensor
        for name, tensor in tensors.items()
    }
    if "fc.weight" not in found or f"{prefix}mlp.gate_proj.weight" not in found:
        raise ModelError(f"{where!r} has no EAGLE head in it: fc.weight or the layer is missing")
    return found


class _Layer(BaseModel):
    """What is read of a configuration."""

    model_config = ConfigDict(strict=True)

    hidden_size: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]


def layer_of(config: Mapping[str, Any]) -> Any:
    """A `_Layer`; where ``config`` doesn't say all of that, transformers' configuration, which knows the rest."""
    if all(config.get(name) is not None for name in _Layer.model_fields):
        return _Layer(**{name: config[name] for name in _Layer.model_fields})
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig  # takes a second

    try:
        return LlamaConfig.from_dict(dict(config))
    except StrictDataclassError as error:
        raise ValueError(str(error)) from None


def _sizes(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], num_layers: int, where: str
) -> tuple[EagleSizes, str]:
    """What the head is made of, and how its places were found out."""
    version = 3 if f"{LAYER[3]}mlp.gate_proj.weight" in tensors else 1
    own_output = version == 1 or "lm_head.weight" in tensors  # else it uses the target's
    if not own_output and "d2t" in tensors and bool(tensors["d2t"].any()):
        raise ModelError(f"{where!r} knows some tokens alone (d2t), and lacks the tensor lm_head.weight for them")
    try:
        inner = layer_of(config.get("transformer_layer_config") or config)
        hidden, width = tensors["fc.weight"].shape
        kv = tensors[f"{LAYER[version]}self_attn.k_proj.weight"].shape[0]
        target = int(config.get("target_hidden_size") or hidden)
        kept = (config.get("tokentree") or {}).get("taps")
        ids = config.get(IDS) or (config.get("eagle_config") or {}).get(IDS)
        if version == 1:
            taps: tuple[int, ...]
            taps, told = (num_layers,), "EAGLE-1 reads the last hidden state"
        elif kept:
            taps, told = tuple(kept), f"hidden states {kept}, as the head's configuration says"
        elif ids:
            taps, told = tap_places([int(i) for i in ids])
        else:
            taps = default_taps(num_layers)
            told = f"hidden states {list(taps)}, EAGLE-3's own choice for {num_layers} layers"
        if version == 3 and width != len(taps) * target:
            raise ModelError(f"in {where!r} fc.weight takes {width} numbers, not {len(taps)} hidden states of {target}")
        if not all(0 <= tap <= num_layers for tap in taps):
            raise ModelError(f"in {where!r} the hidden states {list(taps)} aren't all there in {num_layers} layers")
        own_tokens = version == 3 and own_output and "d2t" in tensors
        known = int(tensors["lm_head.weight"].shape[0]) if own_tokens else None
        masks = masks_of(config, tensors, where) if version == 3 else {}
        return (PEagleSizes if masks else EagleSizes)(
            version=version, hidden_size=hidden,
            intermediate_size=tensors[f"{LAYER[version]}mlp.gate_proj.weight"].shape[0],
            num_heads=inner.num_attention_heads, num_kv_heads=kv // inner.head_dim, head_dim=inner.head_dim,
            vocab_size=len(tensors["t2d"]) if "t2d" in tensors else inner.vocab_size, draft_vocab_size=known, taps=taps,
            target_hidden_size=None if target == hidden else target, rope=dict(inner.rope_parameters),
            context=inner.max_position_embeddings, eps=inner.rms_norm_eps, fc_bias="fc.bias" in tensors,
            qkv_bias=f"{LAYER[version]}self_attn.q_proj.bias" in tensors,
            own_embedding="embed_tokens.weight" in tensors, own_output=own_output,
            **(_norms(config, tensors) if version == 3 else {}), **masks,
        ), told  # fmt: skip
    except MEANINGLESS as error:
        raise meaningless(where, error) from None


def _norms(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, bool]:
    """Which of `NORMS` a head has: those that are said, at the top or in ``eagle_config``, and those whose tensors are
    there."""
    inner = config.get("eagle_config") or {}
    return {
        field: bool(config.get(field, inner.get(field)))
        or (prefix is not None and any(name.startswith(prefix) for name in tensors))
        for field, prefix in NORMS.items()
    }


def meaningless(where: str, error: Exception) -> ModelError:
    """An error that says what is wrong with a configuration."""
    if isinstance(error, ModelError):
        return error
    said = [*str(error).splitlines(), type(error).__name__][0]
    if isinstance(error, ValidationError):
        wrong = error.errors()[0]
        said = ".".join(map(str, wrong["loc"])) + ": " * bool(wrong["loc"]) + wrong["msg"].removeprefix("Value error, ")
    return ModelError(f"the configuration beside {where!r} makes no sense: {said}")


def _places(head: EagleHead) -> dict[str, torch.Tensor]:
    """Where each tensor of SafeAILab's layout lies in ``head``, as views; but for the maps between vocabularies."""
    sizes, prefix = head.sizes, LAYER[head.sizes.version]
    found = {"fc.weight": head.fc.weight} | _layer_places(head, prefix)
    if sizes.fc_bias:
        found["fc.bias"] = head.fc.bias
    if isinstance(head, PEagleHead):
        found[MASK] = head.mask_hidden
        for number, layer in enumerate(head.layers, 1):
            found |= _layer_places(layer, f"layers.{number}.")
            found[f"layers.{number}.input_layernorm.weight"] = layer.get_parameter("input_layernorm.weight")
    if sizes.version == 3:
        found[f"{prefix}input_layernorm.weight"] = head.input_layernorm.weight
        found[f"{prefix}hidden_norm.weight"] = head.hidden_norm.weight
        found["norm.weight"] = head.norm.weight
        found |= {f"fc_norm.{number}.weight": norm.get_parameter("weight") for number, norm in enumerate(head.fc_norm)}
        if head.input_norm is not None:
            found["input_norm.weight"] = head.input_norm.weight
        if head.lm_head is not None:
            found["lm_head.weight"] = head.lm_head.weight
    if head.embed_tokens is not None:
        found["embed_tokens.weight"] = head.embed_tokens.weight
    return found


def _layer_places(layer: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Those of one layer's products, and of the norm between."""
    rows, found = [count * layer.sizes.head_dim for count in layer.sizes.counts], dict[str, torch.Tensor]()
    for kind in ("weight", "bias") if layer.sizes.qkv_bias else ("weight",):
        for name, part in zip("qkv", getattr(layer.qkv, kind).split(rows), strict=True):
            found[f"{prefix}self_attn.{name}_proj.{kind}"] = part
    found[f"{prefix}self_attn.o_proj.weight"] = layer.o_proj.weight
    for name, part in zip(("gate", "up"), layer.gate_up.weight.chunk(2), strict=True):
        found[f"{prefix}mlp.{name}_proj.weight"] = part
    found[f"{prefix}mlp.down_proj.weight"] = layer.down_proj.weight
    found[f"{prefix}post_attention_layernorm.weight"] = layer.post_attention_layernorm.weight
    return found


def token_map_of(
    offsets: torch.Tensor | None, known: torch.Tensor | None, into: torch.Tensor, vocab_size: int, where: str
) -> torch.Tensor:
    """The target's ids, of what each lies beyond the head's own (SafeAILab's ``d2t``)."""
    if offsets is None or offsets.shape != into.shape:
        raise ModelError(f"in {where!r} the tensor d2t is not one number for each of the head's {len(into)} tokens")
    ids = torch.arange(len(into)) + offsets.to(torch.int64)
    if not len(ids) or int(ids[0]) < 0 or bool((ids.diff() <= 0).any()):
        raise ModelError(f"in {where!r} the tensor d2t doesn't name tokens in ascending order")
    if int(ids[-1]) >= vocab_size:
        raise ModelError(f"in {where!r} the tensor d2t names token {int(ids[-1])} of {vocab_size}")
    if known is not None and not torch.equal(torch.nonzero(known)[:, 0], ids):
        raise ModelError(f"in {where!r} the tensors d2t and t2d name different tokens")
    return ids


def _config(sizes: EagleSizes, base_model: str, layout: str, architecture: str) -> dict[str, Any]:
    layer = {
        "model_type": "llama", "hidden_size": sizes.hidden_size, "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_kv_heads, "head_dim": sizes.head_dim,
        "num_hidden_layers": 1, "vocab_size": sizes.vocab_size, "rms_norm_eps": sizes.eps, "hidden_act": "silu",
        "max_position_embeddings": sizes.context, "rope_parameters": sizes.rope, "attention_bias": sizes.qkv_bias,
        "rope_theta": sizes.rope.get("rope_theta", 10000.0), "tie_word_embeddings": False,
    }  # fmt: skip
    norms = {field: True for field in NORMS if getattr(sizes, field)}
    if layout == "safeailab":
        own: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "bias": sizes.fc_bias}
        own |= {"qkv_bias": sizes.qkv_bias, "base_model_name_or_path": base_model}
        if sizes.version == 3:
            own["architectures"] = ["LlamaForCausalLMEagle3"]
            own |= norms
            own |= {"draft_vocab_size": sizes.draft_vocab_size or sizes.vocab_size}
            own |= {"target_hidden_size": sizes.target_hidden_size or sizes.hidden_size, IDS: list(sizes.taps)}
        return layer | own
    method = {
        "proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0,
    }  # fmt: skip
    return {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.2.0",
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy", "proposal_methods": [method],
            "verifier": {"name_or_path": base_model, "architectures": [architecture]},
        },
        "transformer_layer_config": layer, "draft_vocab_size": sizes.draft_vocab_size or sizes.vocab_size,
        "norm_before_residual": sizes.norm_before_residual, "target_hidden_size": sizes.target_hidden_size,
        IDS: list(sizes.taps), "base_model_name_or_path": base_model,
    } | norms  # fmt: skip
