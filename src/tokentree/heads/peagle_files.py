"""What files of P-EAGLE heads have beside those of EAGLE-3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from tokentree.errors import ModelError
from tokentree.heads.peagle import PEagleSizes

MASK = "mask_hidden"  # the tensor by which a head is known
TOKENS = "mask_token_id", "pard_token", "ptd_token_id"  # fields that name its mask token: speculators', and vLLM's
FURTHER = re.compile(r"layers\.([1-9][0-9]?)\.")  # tensors of layers behind the first
KIND = "peagle"


def masks_of(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, Any]:
    """What `PEagleSizes` has beside `EagleSizes`; nothing of a head that isn't one.

    Raises:
        ModelError: if configuration and tensors contradict each other, or a head like this isn't read.
    """
    said = {name: config[name] for name in TOKENS if config.get(name) is not None}
    if MASK not in tensors:
        if said or config.get("speculators_model_type") == KIND:
            raise ModelError(f"{where!r} is a P-EAGLE head by its configuration, and lacks the tensor {MASK}")
        return {}
    if len({repr(token) for token in said.values()}) != 1:
        raise ModelError(f"the configuration beside {where!r} names no mask token, or several: {said}")
    layer = config.get("transformer_layer_config") or config
    num_layers = 1 + max((int(found[1]) for found in map(FURTHER.match, tensors) if found), default=0)
    if (other := layer.get("num_hidden_layers")) not in (None, num_layers):
        raise ModelError(f"{where!r} has {num_layers} layers, and num_hidden_layers={other} in its configuration")
    if "sliding_attention" in (layer.get("layer_types") or ()):
        raise ModelError(f"{where!r} has layers that see a window alone, and P-EAGLE heads with these aren't read")
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    slots = methods[0].get("speculative_tokens")
    found = {"num_layers": num_layers, "mask_token": next(iter(said.values()))}
    return found if slots is None else found | {"slots": slots}


def with_masks(config: dict[str, Any], sizes: PEagleSizes) -> dict[str, Any]:
    """The configuration of a P-EAGLE head, of that of an EAGLE-3 head in speculators' layout."""
    layer = config["transformer_layer_config"] | {"num_hidden_layers": sizes.num_layers}
    method = config["speculators_config"]["proposal_methods"][0] | {"speculative_tokens": sizes.slots}
    return config | {
        "architectures": ["PEagleSpeculator"], "speculators_model_type": KIND, "transformer_layer_config": layer,
        "speculators_config": config["speculators_config"] | {"algorithm": KIND, "proposal_methods": [method]},
        "mask_token_id": sizes.mask_token,
    }  # fmt: skip
