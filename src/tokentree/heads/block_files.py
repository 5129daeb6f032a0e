"""Block heads in files: z-lab's layout (DFlash, DFlash 2, JetSpec), DeepSpec's (DSpark) and speculators' (both).

Names and fields are those that the projects' own loaders read. Sizes are inferred from the weights where they can be. A
tensor that is unknown or missing is an error. Two conventions differ between the layouts, and a wrong one makes a head
guess nothing: which hidden states an id means, and which token a row guesses. `SavedBlock.told` says how each was found
out. What is said twice has to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokentree.errors import ModelError, OptionError
from tokentree.heads.block import BlockHead, BlockLayer, BlockSizes
from tokentree.heads.checkpoints import read_config, read_tensors, write_tensors
from tokentree.heads.convolution import Convolution
from tokentree.heads.eagle_files import MEANINGLESS, filled, layer_of, meaningless, opened
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.markov import GatedMarkov, Markov, RecurrentMarkov, Selector
from tokentree.heads.saved import About, check_made_for, read_about

LAYOUTS = ("zlab", "deepspec", "speculators")
OUTPUTS = ("target_layer_ids",)  # fields of ids that count layers whose output is read; -1 is the embedding
INPUTS = ("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids", "layer_ids")  # ... whose input is read
FIRST = ("sample_from_anchor", "query_zero_predicts_next")  # fields that say whether the anchor's row guesses
OTHER_NAMES = {
    "midlayer.": "layers.0.",
    "encoder.fc.": "fc.",
    "encoder.output_norm_enc.": "hidden_norm.",
    "logit_head.": "",
}
KINDS = {"gated": "markov_head.gate_proj.weight", "rnn": "markov_head.joint_proj.weight"}  # tensors of Markov heads
CONVOLUTION = ("base_kernel", "kernel_projection.weight")  # tensors of a convolution
SCALES = {  # fields of DFlash 2's configurations
    "embedding_scale": "input_embedding_scale",
    "logit_scale": "output_multiplier",
    "softcap": "final_logit_softcapping",
}
SETTLED = ("verifier_lm_head.", "verifier_norm.")  # the target's own, which some files repeat


@dataclass(frozen=True, eq=False)
class SavedBlock:
    """A head, and what is known of it.

    Args:
        head: in float32.
        told: how its conventions were found out, in words.
    """

    head: BlockHead
    about: About
    told: str


def read_block(folder: str | Path, num_layers: int, target: Fingerprint | None = None) -> SavedBlock:
    """The head in ``folder``, in any of the layouts.

    Args:
        num_layers: of the target, by which default places of hidden states are counted.

    Raises:
        ModelError: if there is none, a tensor is unknown, missing or of another size, or the configuration doesn't say
            what the head needs, or says it twice in two ways.
        PairingError: if the folder says that it belongs to another model than ``target``.
    """
    folder, where = opened(folder, "block")
    config = read_config(folder)
    about = read_about(config, str(folder))
    check_made_for(about, config, folder, target)
    tensors = _renamed(read_tensors(Path(where)), where)
    try:
        sizes, told = _Read(config, tensors, num_layers, where).sizes()
    except MEANINGLESS as error:
        raise meaningless(where, error) from None
    head = filled(lambda: BlockHead(sizes), _places, tensors, where, "a block head")
    return SavedBlock(head, about, told)


def write_block(
    head: BlockHead, folder: str | Path, base_model: str, layout: str = "deepspec", about: About | None = None,
    embedding: torch.Tensor | None = None, output: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16,
    num_layers: int | None = None, architecture: str = "LlamaForCausalLM",
) -> None:  # fmt: skip
    """Writes ``head`` and a configuration into ``folder``, in one of `LAYOUTS`.

    Args:
        base_model: the name of the target.
        embedding, output: [vocab, hidden size] and [tokens that the head knows, hidden size], the target's, to be
            written beside a head that has none of its own. speculators' loader needs them.
        num_layers: of the target, for the configuration.
        architecture: of the target, for speculators' configuration.

    Raises:
        OptionError: if there is no such layout, or it can't say what this head is.
    """
    sizes = head.sizes
    if layout not in LAYOUTS:
        raise OptionError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    selects, convolves = sizes.markov == "selector", sizes.conv_taps > 0
    if layout == "zlab" and (sizes.anchor_first or (sizes.markov_rank and not selects) or sizes.confidence):
        raise OptionError("z-lab's layout has no guess of the anchor's row, no Markov head and no confidence head")
    if (layout == "zlab" and selects is not convolves) or (layout != "zlab" and (selects or convolves)):
        raise OptionError(f"the layout {layout!r} has no head like this: z-lab's has a selector with convolutions")
    if not selects and (sizes.embedding_scale, sizes.logit_scale, sizes.softcap) != (1, 1, None):
        raise OptionError(f"the layout {layout!r} has no scales of a head without a selector")
    if layout == "speculators" and sizes.mask_token is None:
        raise OptionError("speculators' layout has no embedding of the mask: name a token for it")
    if layout == "speculators" and sizes.causal and sizes.window is None:
        raise OptionError("speculators' layout has no causal layers without a window")
    tensors = {name: tensor.detach().to(dtype) for name, tensor in _places(head).items()}
    for name, own, given in (("embed_tokens", head.embed_tokens, embedding), ("lm_head", head.lm_head, output)):
        if own is None and given is not None:
            tensors[f"{name}.weight"] = given.detach().to(dtype)
        elif own is None and layout == "speculators":
            raise OptionError(f"speculators' layout has the target's embedding and output layer: give {name} too")
    if head.token_map is not None:
        ids = head.token_map.cpu()
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(sizes.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    config = _config(sizes, base_model, layout, num_layers, architecture)
    if about is not None:
        config["tokentree"] = about.model_dump(mode="json")
    write_tensors(Path(folder), "model.safetensors", tensors, config)


def default_places(num_layers: int, count: int) -> tuple[int, ...]:
    """The ``count`` hidden states that z-lab's heads read of a target with so many layers, where none are named."""
    if count == 1:
        return (num_layers // 2 + 1,)
    return tuple(round(1 + k * (num_layers - 4) / (count - 1)) + 1 for k in range(count))


def _renamed(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """``tensors`` as z-lab and DeepSpec name them."""
    found = dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        other = next((start for start in OTHER_NAMES if name.startswith(start)), "")
        if not name.startswith(SETTLED):
            found[OTHER_NAMES.get(other, "") + name.removeprefix(other)] = tensor
    if "fc.weight" not in found or "layers.0.mlp.gate_proj.weight" not in found:
        raise ModelError(f"{where!r} has no block head in it: fc.weight or the first layer is missing")
    return found


class _Read:
    """What a configuration and tensors say of a head."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], layers: int, where: str) -> None:
        self._config, self._tensors, self._layers, self._where = config, tensors, layers, where
        own = config.get("dflash_config") or {}
        self._parts = [config, own, config.get("transformer_layer_config") or {}]
        self._kind = " ".join([*map(str, config.get("architectures") or ()), str(self._one("speculators_model_type"))])
        self._kind = f"{self._kind} {self._one('projector_type')}".lower()

    def sizes(self) -> tuple[BlockSizes, str]:
        """What the head is made of, and how its conventions were found out."""
        tensors, one = self._tensors, self._one
        inner = layer_of(self._config.get("transformer_layer_config") or self._config)
        hidden, width = tensors["fc.weight"].shape
        target = int(one("target_hidden_size") or hidden)
        confidence = tensors.get("confidence_head.proj.weight")
        taps, told_taps = self._taps(width // target if width % target == 0 else 0)
        if width != len(taps) * target:
            raise ModelError(f"fc.weight takes {width} numbers, not {len(taps)} hidden states of {target}")
        anchor_first, told_rows = self._anchor_first()
        causal, window = self._sight()
        vocab = next((len(t) for name in ("t2d", "embed_tokens.weight") if (t := tensors.get(name)) is not None), None)
        size = one("block_size")
        mask = one("mask_token_id")
        if size is None or (mask is None and "mask_embedding" not in tensors):
            raise ModelError(f"the configuration beside {self._where!r} lacks block_size or mask_token_id")
        known = len(tensors["d2t"]) if "d2t" in tensors else None
        made = BlockSizes(
            hidden_size=hidden, intermediate_size=tensors["layers.0.mlp.gate_proj.weight"].shape[0],
            num_layers=1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("layers.")),
            num_heads=inner.num_attention_heads, head_dim=inner.head_dim,
            num_kv_heads=tensors["layers.0.self_attn.k_proj.weight"].shape[0] // inner.head_dim,
            vocab_size=vocab or inner.vocab_size, draft_vocab_size=known, taps=taps,
            target_hidden_size=None if target == hidden else target, block_size=int(size), anchor_first=anchor_first,
            causal=causal, window=window, mask_token=None if "mask_embedding" in tensors else int(mask),
            **self._markov(), **self._convolutions(hidden), confidence=confidence is not None,
            confident_by_token=confidence is not None and confidence.shape[1] > hidden,
            rope=dict(inner.rope_parameters), context=inner.max_position_embeddings, eps=inner.rms_norm_eps,
            attention_bias="layers.0.self_attn.q_proj.bias" in tensors, own_embedding="embed_tokens.weight" in tensors,
            own_output="lm_head.weight" in tensors,
        )  # fmt: skip
        return made, f"{told_taps}; {told_rows}"

    def _one(self, *names: str) -> Any:
        """The value of one of these fields, wherever it stands; None if nowhere.

        Raises:
            ModelError: if it stands in two places with two values.
        """
        found = [(name, part[name]) for part in self._parts for name in names if part.get(name) is not None]
        if any(value != found[0][1] for _, value in found):
            told = " and ".join(f"{name} {value}" for name, value in found)
            raise ModelError(f"the configuration beside {self._where!r} contradicts itself: {told}")
        return found[0][1] if found else None

    def _markov(self) -> dict[str, Any]:
        """What a token says of its successor."""
        one, tensors = self._one, self._tensors
        said, kind = one("markov_head_type"), next((k for k, name in KINDS.items() if name in tensors), "vanilla")
        if said not in (None, "vanilla", *KINDS):
            raise ModelError(
                f"the block head in {self._where!r} has a Markov head of the kind {said!r}, which isn't read"
            )
        first = tensors.get("markov_head.markov_w1.weight")
        if first is not None and said not in (None, kind):
            raise ModelError(f"the Markov head in {self._where!r} is said to be {said!r}, and its tensors are {kind!r}")
        if not self._second():
            return {"markov_rank": int(one("markov_rank") or 0) if first is None else first.shape[1], "markov": kind}
        count, codes = one("selector_top_k"), tensors.get("candidate_selector.predecessor_codebook")
        if count is None:
            raise ModelError(f"the configuration beside {self._where!r} lacks selector_top_k")
        scales = {field: one(name) for field, name in SCALES.items()}
        return {
            "markov_rank": int(one("selector_rank") or 0) if codes is None else codes.shape[1], "markov": "selector",
            "candidates": int(count), **{field: scale for field, scale in scales.items() if scale is not None},
        }  # fmt: skip

    def _convolutions(self, hidden: int) -> dict[str, int]:
        """What convolutions are made of, which DFlash 2's heads have."""
        if not self._second():
            return {}
        base, told = (self._tensors.get(f"layers.0.attention_conv.{name}") for name in CONVOLUTION)
        taps = int(self._one("conv_kernel_size") or 0) if base is None else base.shape[1]
        group = self._one("conv_group_size") or (2 * taps * hidden // len(told) if told is not None else 16)
        return {"conv_taps": taps, "conv_group": int(group)}

    def _second(self) -> bool:
        """Whether it is a head of DFlash 2's kind."""
        return "dflash2" in self._kind or any("candidate_selector." in n or "_conv." in n for n in self._tensors)

    def _taps(self, count: int) -> tuple[tuple[int, ...], str]:
        """The hidden states that are read, as transformers numbers them, and how that was found out."""
        kept = (self._config.get("tokentree") or {}).get("taps")
        outputs, inputs = self._one(*OUTPUTS), self._one(*INPUTS)
        if kept:
            taps, told = tuple(kept), f"hidden states {kept}, as the head's configuration says"
        elif outputs is not None and inputs is not None and [i + 1 for i in outputs] != list(inputs):
            raise ModelError(
                f"the configuration beside {self._where!r} contradicts itself: outputs of layers {outputs}, and inputs "
                f"of layers {inputs}"
            )
        elif outputs is not None:
            taps, told = (
                tuple(int(i) + 1 for i in outputs),
                f"layer ids {outputs} are taken as layers whose output is read",
            )
        elif inputs is not None:
            taps, told = tuple(int(i) for i in inputs), f"layer ids {inputs} are taken as layers whose input is read"
        else:
            taps = default_places(self._layers, count) if count else ()
            told = f"hidden states {list(taps)}, z-lab's own choice of {count} in {self._layers} layers"
        if not taps or not all(0 <= tap < self._layers for tap in taps):
            raise ModelError(
                f"the block head in {self._where!r} reads hidden states {list(taps)}, of which not all are there: a "
                f"target with {self._layers} layers has 0 to {self._layers - 1} before its last norm"
            )
        return taps, told

    def _anchor_first(self) -> tuple[bool, str]:
        """Whether the anchor's row guesses, and how that was found out."""
        said, markov = self._one(*FIRST), self._one("markov_rank")
        guesses = {True: "the anchor's row guesses the next token", False: "the anchor's row guesses nothing"}
        if said is not None:
            return bool(said), f"{guesses[bool(said)]}, as the configuration says"
        if "dspark" in self._kind or "domino" in self._kind:
            return True, f"{guesses[True]}, as in DSpark"
        if markov is not None or "markov_head.markov_w1.weight" in self._tensors:
            return True, f"{guesses[True]}, as in what DeepSpec trains (markov_rank {markov})"
        return False, f"{guesses[False]}, as in DFlash"

    def _sight(self) -> tuple[bool, int | None]:
        """Whether rows see no later ones of their block, and how far they see."""
        kinds = {*(self._one("layer_types") or ())}
        if self._one("use_swa") and not kinds:
            kinds = {"sliding_attention"}
        if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
            raise ModelError(
                f"the block head in {self._where!r} has layers of several kinds: {', '.join(sorted(kinds))}"
            )
        slides = kinds == {"sliding_attention"}
        causal = self._one("is_causal", "causal", "causal_head")
        if causal is None:
            causal = slides and not self._one("sliding_window_non_causal")
        window = self._one("swa_window_size") or self._one("sliding_window") if slides else None
        if slides and window is None:
            raise ModelError(f"the block head in {self._where!r} has sliding layers, and no sliding_window")
        return bool(causal), window


def _places(head: BlockHead) -> dict[str, torch.Tensor]:
    """Where each tensor of the layouts lies in ``head``, as views; but for the maps between vocabularies."""
    found = {"fc.weight": head.fc.weight, "hidden_norm.weight": head.hidden_norm.weight}
    for number, layer in enumerate(head._layers):
        found |= {f"layers.{number}.{name}": part for name, part in _places_of_layer(layer).items()}
    found["norm.weight"] = head.norm.weight
    for name, part in (("embed_tokens", head.embed_tokens), ("lm_head", head.lm_head)):
        if part is not None:
            found[f"{name}.weight"] = part.weight
    if head.mask_embedding is not None:
        found["mask_embedding"] = head.mask_embedding
    if head.markov is not None:
        found |= _places_of_markov(head.markov)
    if head.confidence is not None:
        found["confidence_head.proj.weight"] = head.confidence.weight
        found["confidence_head.proj.bias"] = head.confidence.bias
    return found


def _places_of_layer(layer: BlockLayer) -> dict[str, torch.Tensor]:
    """Likewise, in a layer."""
    found = dict[str, torch.Tensor]()
    for kind in ("weight", "bias") if layer.q_proj.bias is not None else ("weight",):
        found[f"self_attn.q_proj.{kind}"] = getattr(layer.q_proj, kind)
        for name, part in zip("kv", getattr(layer.kv_proj, kind).chunk(2), strict=True):
            found[f"self_attn.{name}_proj.{kind}"] = part
        found[f"self_attn.o_proj.{kind}"] = getattr(layer.o_proj, kind)
    found |= {f"self_attn.{name}.weight": getattr(layer, name).weight for name in ("q_norm", "k_norm")}
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"{name}.weight"] = getattr(layer, name).weight
    for name, part in zip(("gate", "up"), layer.gate_up.weight.chunk(2), strict=True):
        found[f"mlp.{name}_proj.weight"] = part
    found["mlp.down_proj.weight"] = layer.down_proj.weight
    for name, around in (("attention_conv", layer.around_attention), ("mlp_conv", layer.around_mlp)):
        if isinstance(around, Convolution):
            parts = zip(CONVOLUTION, (around.base, around.told.weight), strict=True)
            found |= {f"{name}.{kind}": part for kind, part in parts}
    return found


def _places_of_markov(markov: Markov) -> dict[str, torch.Tensor]:
    """Likewise, of what a token says of its successor."""
    if isinstance(markov, Selector):
        parts = markov.first.weight, markov.second.weight, markov.weighing.weight
        names = "predecessor_codebook", "successor_codebook", "hidden_projection.weight"
        return {f"candidate_selector.{name}": part for name, part in zip(names, parts, strict=True)}
    found = {"markov_w1.weight": markov.first.weight, "markov_w2.weight": markov.second.weight}
    if isinstance(markov, GatedMarkov):
        found |= {"gate_proj.weight": markov.gate.weight, "gate_proj.bias": markov.gate.bias}
    if isinstance(markov, RecurrentMarkov):
        found |= {"joint_proj.weight": markov.joint.weight, "joint_proj.bias": markov.joint.bias}
    return {f"markov_head.{name}": part for name, part in found.items()}


def _config(
    sizes: BlockSizes, base_model: str, layout: str, num_layers: int | None, architecture: str
) -> dict[str, Any]:
    slides = sizes.window is not None
    layer = {
        "model_type": "qwen3", "hidden_size": sizes.hidden_size, "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_kv_heads, "head_dim": sizes.head_dim,
        "num_hidden_layers": sizes.num_layers, "vocab_size": sizes.vocab_size, "rms_norm_eps": sizes.eps,
        "hidden_act": "silu", "max_position_embeddings": sizes.context, "rope_parameters": sizes.rope,
        "rope_theta": sizes.rope.get("rope_theta", 10000.0), "attention_bias": sizes.attention_bias,
        "tie_word_embeddings": False, "use_sliding_window": slides, "sliding_window": sizes.window,
        "layer_types": ["sliding_attention" if slides else "full_attention"] * sizes.num_layers,
    }  # fmt: skip
    outputs = [tap - 1 for tap in sizes.taps]
    known = sizes.draft_vocab_size or sizes.vocab_size
    target = sizes.target_hidden_size or sizes.hidden_size
    markov = {
        "markov_rank": sizes.markov_rank, "markov_head_type": sizes.markov,
        "enable_confidence_head": sizes.confidence, "confidence_head_with_markov": sizes.confident_by_token,
    }  # fmt: skip
    shared = {"base_model_name_or_path": base_model, "target_hidden_size": target, "draft_vocab_size": known}
    if layout == "zlab":
        own = {
            "block_size": sizes.block_size, "mask_token_id": sizes.mask_token, "target_layer_ids": outputs,
            "causal": sizes.causal, "sample_from_anchor": False,
        }  # fmt: skip
        kind = "DFlashDraftModel" if sizes.markov != "selector" else "DFlash2DraftModel"
        if sizes.markov == "selector":
            own |= {
                "conv_kernel_size": sizes.conv_taps, "conv_group_size": sizes.conv_group,
                "selector_rank": sizes.markov_rank, "selector_top_k": sizes.candidates,
            } | {name: getattr(sizes, field) for field, name in SCALES.items()}  # fmt: skip
        more = {"architectures": [kind], "block_size": sizes.block_size, "is_causal": sizes.causal}
        return layer | shared | more | {"num_target_layers": num_layers, "dflash_config": own}
    if layout == "deepspec":
        return layer | shared | markov | {
            "architectures": ["Qwen3DSparkModel"], "block_size": sizes.block_size, "num_target_layers": num_layers,
            "target_layer_ids": outputs, "mask_token_id": sizes.mask_token, "is_causal": sizes.causal,
            "sample_from_anchor": sizes.anchor_first,
        }  # fmt: skip
    dspark = bool(sizes.anchor_first or sizes.markov_rank or sizes.confidence)
    kind = "dspark" if dspark else "dflash"
    method = {"proposal_type": "greedy", "speculative_tokens": sizes.num_guesses, "verifier_accept_k": 1}
    return shared | (markov if dspark else {}) | {
        "architectures": ["DSparkSpeculator" if dspark else "DFlashSpeculator"], "speculators_model_type": kind,
        "speculators_version": "0.5.0", "transformer_layer_config": layer, "block_size": sizes.block_size,
        "aux_hidden_state_layer_ids": list(sizes.taps), "mask_token_id": sizes.mask_token,
        "sliding_window_non_causal": slides and not sizes.causal, "sample_from_anchor": sizes.anchor_first,
        "speculators_config": {
            "algorithm": kind, "default_proposal_method": "greedy", "proposal_methods": [method],
            "verifier": {"name_or_path": base_model, "architectures": [architecture]},
        },
    }  # fmt: skip
