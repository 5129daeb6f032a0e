"""The weights of a transformers model as the kernels read them: Llama's layers, and those of its relatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tokentree.engines.gpu.attending import TILE
from tokentree.engines.gpu.kv_forward import Rules, Sizes
from tokentree.engines.gpu.quantized import GROUP, Int8, Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Gemma2", "Gemma3")
GELU = ("gelu_pytorch_tanh", "gelu_tanh")
LEAST = 16  # inputs that a product takes at a time
HEAD_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer. Gains are float32, weights [outputs, inputs], in bfloat16 or 8 bits.

    Args:
        attention_gain, mlp_gain: of the norms before attention and MLP.
        qkv, qkv_bias: queries, keys and values behind one another. In heads of queries and keys, outputs that turn
            together are neighbours.
        q_gain, k_gain: of the norms of heads, where there are any.
        o, o_bias: behind attention.
        gate_up: gate and up, output by output.
        down: behind them.
        attention_end_gain, mlp_end_gain: of the norms behind attention and MLP, where there are any.
        rotary: which of the model's tables of positions.
        window: positions that a row sees; 0 for all.
        scale, cap: what scores are multiplied by; what they are capped with, or 0.
    """

    attention_gain: torch.Tensor
    qkv: Matrix
    qkv_bias: torch.Tensor | None
    q_gain: torch.Tensor | None
    k_gain: torch.Tensor | None
    o: Matrix
    o_bias: torch.Tensor | None
    mlp_gain: torch.Tensor
    gate_up: Matrix
    down: Matrix
    attention_end_gain: torch.Tensor | None
    mlp_end_gain: torch.Tensor | None
    rotary: int
    window: int
    scale: float
    cap: float

    @property
    def rules(self) -> Rules:
        """How it attends."""
        return Rules(self.scale, self.window, self.cap)


@dataclass(frozen=True, eq=False)
class Weights:
    """A model.

    Args:
        embedding: bfloat16[vocab, hidden size]; what it gives is multiplied by ``embedding_scale``.
        layers: in order.
        gain: of the last norm.
        head: [vocab, hidden size], with ``head_bias``; logits are capped with ``cap``, or not if that is 0.
        rotary: cosines and sines float32[positions, head / 2], one pair for each kind of layer.
        heads, kv_heads, head_size: of attention.
        eps: of the norms.
        gelu: geglu, not swiglu.
    """

    embedding: torch.Tensor
    embedding_scale: float
    layers: list[Layer]
    gain: torch.Tensor
    head: Matrix
    head_bias: torch.Tensor | None
    cap: float
    rotary: list[tuple[torch.Tensor, torch.Tensor]]
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    gelu: bool

    @property
    def width(self) -> int:
        """Of a hidden state."""
        return self.embedding.shape[1]

    @property
    def vocab_size(self) -> int:
        return len(self.head)

    @property
    def sizes(self) -> Sizes:
        return Sizes(len(self.layers), self.heads, self.kv_heads, self.head_size, self.width, self.vocab_size)

    @property
    def nbytes(self) -> int:
        """Of what a forward reads."""
        parts = [self.head, *(x for layer in self.layers for x in (layer.qkv, layer.o, layer.gate_up, layer.down))]
        return sum(part.nbytes for part in parts)


def unfit(model: PreTrainedModel, few_bits: bool = False) -> str | None:
    """Why the kernels can't run ``model``, which is as its class in transformers says; None if they can.

    Args:
        few_bits: with weights in 8 bits.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    family = name.removesuffix("ForCausalLM")
    if family not in FAMILIES or not name.endswith("ForCausalLM"):
        return f"{name} is none of {', '.join(FAMILIES)}"
    if model.dtype is not torch.bfloat16:
        return f"its weights are {str(model.dtype).removeprefix('torch.')}, not bfloat16"
    least = GROUP if few_bits else LEAST
    if not sizes_fit(*_attention_sizes(config), config.hidden_size, config.intermediate_size, least):
        return f"it has sizes that there is no kernel for{' in 8 bits' if few_bits else ''}"
    if _activation(config) not in ("silu", *GELU):
        return f"its MLPs use {_activation(config)}"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f"its positions depend on the length of a text ({kind})"
    if getattr(config, "use_bidirectional_attention", False):
        return "it attends in both directions"
    return None


def sizes_fit(heads: int, kv_heads: int, head_size: int, width: int, inner: int, least: int = LEAST) -> bool:
    """Whether there are kernels for layers of ``width`` numbers with MLPs of ``inner``, if products take inputs in
    multiples of ``least``."""
    return (
        heads % kv_heads == 0
        and heads // kv_heads <= TILE
        and head_size in HEAD_SIZES
        and not any(size % least for size in (width, heads * head_size, inner))
    )


@torch.inference_mode()
def read(model: PreTrainedModel, positions: int, drop: bool, few_bits: bool = False) -> Weights:
    """The weights of a model that isn't `unfit`, with tables for so many positions.

    Args:
        drop: nobody else uses ``model``: what is copied is dropped from it, layer by layer.
        few_bits: layers and the output layer are taken in 8 bits. Where the output layer is the embedding, that stays
            in bfloat16 beside it: a token reads one row of the one, and all of the other.
    """
    config, body = model.config.get_text_config(), model.model
    heads, kv_heads, head = _attention_sizes(config)
    gemma = type(model).__name__.startswith("Gemma")

    def gain(norm: Any) -> torch.Tensor:
        weight = norm.weight.detach().float()
        found: torch.Tensor = (1.0 + weight if gemma else weight).contiguous()
        return found

    def matrix(weight: torch.Tensor, *modules: Any) -> Matrix:
        """``weight``, made of those of ``modules``, which are dropped."""
        made = Int8.of(weight) if few_bits else weight.contiguous()
        for module in modules if drop else ():
            module.weight.data = module.weight.data.new_empty(0)
        return made

    kinds = list(dict.fromkeys(_rotary_kind(config, layer) for layer in range(len(body.layers))))
    tables, turned = _rotary_tables(body.rotary_emb, kinds, head, positions, model.device)
    order = neighbours(heads, kv_heads, head, turned).to(model.device)
    in_head = order[:head]
    layers = list[Layer]()
    for number, module in enumerate(body.layers):
        attention, mlp = module.self_attn, module.mlp
        fused = hasattr(attention, "qkv_proj")
        parts = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
        qkv = matrix(torch.cat([part.weight.detach() for part in parts])[order], *parts)
        bias = None
        if parts[0].bias is not None:
            bias = torch.cat([part.bias.detach() for part in parts])[order]
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj.weight.detach().chunk(2)
            merged = [mlp.gate_up_proj]
        else:
            gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
            merged = [mlp.gate_proj, mlp.up_proj]
        gate_up = matrix(torch.stack([gate, up], 1).flatten(0, 1), *merged)
        del gate, up
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        o_bias = attention.o_proj.bias
        layers.append(
            Layer(
                attention_gain=gain(module.input_layernorm),
                qkv=qkv,
                qkv_bias=bias,
                q_gain=None if q_norm is None else gain(q_norm)[in_head].contiguous(),
                k_gain=None if k_norm is None else gain(k_norm)[in_head].contiguous(),
                o=matrix(attention.o_proj.weight.detach(), attention.o_proj),
                o_bias=None if o_bias is None else o_bias.detach(),
                mlp_gain=gain(module.pre_feedforward_layernorm if gemma else module.post_attention_layernorm),
                gate_up=gate_up,
                down=matrix(mlp.down_proj.weight.detach(), mlp.down_proj),
                attention_end_gain=gain(module.post_attention_layernorm) if gemma else None,
                mlp_end_gain=gain(module.post_feedforward_layernorm) if gemma else None,
                rotary=kinds.index(_rotary_kind(config, number)),
                window=_window(config, attention) or 0,
                scale=float(attention.scaling),
                cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
            )
        )
    tied = model.lm_head.weight.data_ptr() == body.embed_tokens.weight.data_ptr()
    output = matrix(model.lm_head.weight.detach(), *(() if tied else [model.lm_head]))
    if drop and few_bits and model.device.type == "cuda":
        torch.cuda.empty_cache()  # what was dropped is room for KV
    return Weights(
        embedding=body.embed_tokens.weight.detach(),
        embedding_scale=float(body.embed_tokens.embed_scale.to(torch.bfloat16)) if gemma else 1.0,
        layers=layers,
        gain=gain(body.norm),
        head=output,
        head_bias=None if model.lm_head.bias is None else model.lm_head.bias.detach(),
        cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        rotary=tables,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head,
        eps=float(config.rms_norm_eps),
        gelu=_activation(config) in GELU,
    )


def _attention_sizes(config: Any) -> tuple[int, int, int]:
    heads = int(config.num_attention_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(head)


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None))


def _window(config: Any, attention: Any) -> int | None:
    """The sliding window that a layer's own forward tells its attention of."""
    own = getattr(attention, "sliding_window", None)
    if own is None and type(attention).__name__ in ("Phi3Attention", "MistralAttention"):
        own = getattr(config, "sliding_window", None)
    return None if own is None else int(own)


def _rotary_kind(config: Any, layer: int) -> str:
    """What tells the positions of a layer from those of others: "none" where it has none."""
    turned = getattr(config, "no_rope_layers", None)
    if turned is not None and not turned[layer]:
        return "none"
    several = config.model_type.startswith("gemma3")
    return str(config.layer_types[layer]) if several else "every"


def _rotary_tables(
    module: Callable[..., tuple[torch.Tensor, torch.Tensor]], kinds: list[str], head: int, positions: int,
    device: torch.device,
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:  # fmt: skip
    """Cosines and sines of the pairs of a head for each of ``kinds``, where pairs that don't turn have 1 and 0; and how
    many numbers of a head turn."""
    where, tables, turned = torch.arange(positions, device=device)[None], [], head
    for kind in kinds:
        cos = torch.ones(positions, head // 2, device=device)
        sin = torch.zeros(positions, head // 2, device=device)
        if kind != "none":
            options = () if kind == "every" else (kind,)
            own_cos, own_sin = module(torch.zeros(1, 1, dtype=torch.float32, device=device), where, *options)
            turned = own_cos.shape[-1]
            cos[:, : turned // 2], sin[:, : turned // 2] = own_cos[0, :, : turned // 2], own_sin[0, :, : turned // 2]
        tables.append((cos, sin))
    return tables, turned


def neighbours(heads: int, kv_heads: int, head: int, turned: int) -> torch.Tensor:
    """int64[(heads + 2 KV heads) x head]: the outputs of queries, keys and values in the kernels' order, if so many of
    a head turn."""
    pairs = torch.stack([torch.arange(turned // 2), torch.arange(turned // 2, turned)], 1).flatten()
    inside = torch.cat([pairs, torch.arange(turned, head)])
    queries_and_keys = torch.arange(heads + kv_heads)[:, None] * head + inside
    values = torch.arange((heads + kv_heads) * head, (heads + 2 * kv_heads) * head)
    return torch.cat([queries_and_keys.flatten(), values])
