"""A model whose layers are Llama's, in packed weights: what its `program` computes with, and how that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokentree.engines.cpu.checked import expect, is_count, is_number, is_tensor
from tokentree.engines.cpu.fused import FusedAttention, FusedMLP, FusedNorm
from tokentree.engines.cpu.linear import PackedEmbedding, PackedLinear, restored
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.cpu.steps import Heads, RotaryTable, Steps
from tokentree.kernels.tile import BLOCK
from tokentree.rotary import Rotary, Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("Llama", "Mistral", "Qwen2")  # of transformers, all alike

Kind = type[PackedLinear] | type[QuantizedLinear]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: the norm before its attention, that, the norm behind it, and a gated MLP."""

    before: FusedNorm
    attention: FusedAttention
    after: FusedNorm
    mlp: FusedMLP


@dataclass(frozen=True, eq=False)
class Llama:
    """All that a model computes with.

    Args:
        embedding: of tokens.
        rotary: makes cosines and sines of positions, see `rotary`.
        layers: in order.
        norm: behind them.
        head: makes logits.
    """

    embedding: nn.Embedding | PackedEmbedding
    rotary: nn.Module
    layers: list[Layer]
    norm: FusedNorm
    head: PackedLinear | QuantizedLinear

    @staticmethod
    def fits(model: PreTrainedModel, packing: Packing) -> bool:
        """Whether ``model``, as it came, is one, with layers that can be packed so."""
        from tokentree.engines.foreign import ForeignCode  # takes seconds

        if not _is_a(model, "ForCausalLM") or ForeignCode.of(model).at:
            return False
        body, head = model.model, model.lm_head
        return (
            _is_a(body, "Model")
            and _is_a(body.rotary_emb, "RotaryEmbedding")
            and len(body.layers) == model.config.num_hidden_layers
            and all(_is_a(layer, "DecoderLayer") for layer in body.layers)
            and packing.fits(head)
            and Steps.embeds(body.embed_tokens)
            and FusedNorm.fits(body.norm)
            and all(
                FusedAttention.fits(layer.self_attn, packing)
                and FusedMLP.fits(layer.mlp, packing)
                and FusedNorm.fits(layer.input_layernorm)
                and FusedNorm.fits(layer.post_attention_layernorm)
                and not any(part.out_features % BLOCK for part in _products(layer))
                for layer in body.layers
            )
        )

    @classmethod
    def of(cls, model: PreTrainedModel) -> Llama:
        """Of one that `fits`, whose modules were exchanged for packed ones."""
        body: Any = model.model
        layers = [
            Layer(layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
            for layer in body.layers
        ]
        return cls(body.embed_tokens, body.rotary_emb, layers, body.norm, model.lm_head)

    def modules(self) -> Iterator[nn.Module]:
        """All modules, those inside of others too."""
        layers = (part for layer in self.layers for part in (layer.before, layer.attention, layer.after, layer.mlp))
        for part in (self.embedding, self.rotary, *layers, self.norm, self.head):
            yield from part.modules()

    def state(self) -> dict[str, Any] | None:
        """What `of_state` makes a model of: tensors, numbers and their names. None if its positions depend on the
        length of a text, which only the model's own module knows how to compute."""
        if not RotaryTable.fixed(self.rotary):
            return None
        packed, turns = isinstance(self.embedding, PackedEmbedding), asdict(Rotation.of(self.rotary))
        embedding = {
            "packed": packed, "weight": self.embedding.weight.detach(), "count": self.embedding.num_embeddings
        }  # fmt: skip
        layers = [
            {
                "before": _norm(layer.before), "after": _norm(layer.after),
                "attention": {name: getattr(layer.attention, name) for name in Heads.__annotations__},
                "qkv": layer.attention.qkv.state(), "o_proj": layer.attention.o_proj.state(),
                "gate_up": layer.mlp.gate_up.state(), "down_proj": layer.mlp.down_proj.state(),
            }
            for layer in self.layers
        ]  # fmt: skip
        return {
            "embedding": embedding, "rotary": turns, "layers": layers, "norm": _norm(self.norm),
            "head": self.head.state(),
        }  # fmt: skip

    @classmethod
    def of_state(cls, state: dict[str, Any], kind: Kind) -> Llama:
        """A model that is kept, whose linear layers are of this kind.

        Raises:
            KeyError: if something is missing.
            ModelError: if something doesn't belong to the rest.
        """
        norm, layers = FusedNorm.of_state(state["norm"]), list[Layer]()
        embedding = _embedding(state["embedding"], len(norm.weight))
        for part in state["layers"]:
            linear = {name: kind.of_state(part[name]) for name in ("qkv", "o_proj", "gate_up", "down_proj")}
            attention = {"qkv": linear["qkv"], "o_proj": linear["o_proj"], **part["attention"]}
            mlp = {"gate_up": linear["gate_up"], "down_proj": linear["down_proj"]}
            layers.append(
                Layer(
                    FusedNorm.of_state(part["before"]), restored(FusedAttention, attention),
                    FusedNorm.of_state(part["after"]), restored(FusedMLP, mlp),
                )
            )  # fmt: skip
        rotation = Rotation(**state["rotary"])
        made = cls(embedding, Rotary(rotation), layers, norm, kind.of_state(state["head"]))
        made._check(rotation)
        return made

    def _check(self, rotation: Rotation) -> None:
        """Raises `ModelError` unless the sizes of all parts fit one another: addresses are computed from them."""
        hidden, head = len(self.norm.weight), self.head
        expect("an output layer", not head.gated, head.num_inputs == hidden)
        expect("layers", len(self.layers) > 0)
        for layer in self.layers:
            sizes: Any = layer.attention
            counts = map(is_count, (sizes.heads, sizes.kv_heads, sizes.width))
            expect("attention", *counts, is_number(sizes.scale), sizes.window is None or is_count(sizes.window))
            expect("attention", not sizes.heads % sizes.kv_heads, not sizes.width % 2)
            expect("attention", is_tensor(rotation.frequencies, torch.float32, sizes.width // 2))
            wide, rows = sizes.heads * sizes.width, (sizes.heads + 2 * sizes.kv_heads) * sizes.width
            inner = layer.mlp.gate_up.num_outputs
            products = {sizes.qkv: (hidden, rows), sizes.o_proj: (wide, hidden), layer.mlp.down_proj: (inner, hidden)}
            for product, inputs_outputs in {**products, layer.mlp.gate_up: (hidden, inner)}.items():
                expect("a product", (product.num_inputs, product.num_outputs) == inputs_outputs)
                expect("a product", product.gated is (product is layer.mlp.gate_up), not product.num_outputs % BLOCK)
            expect("a norm", len(layer.before.weight) == hidden, len(layer.after.weight) == hidden)
        expect("positions", is_number(rotation.scale), bool(rotation.frequencies.isfinite().all()))
        alike = {(layer.mlp.gate_up.num_outputs, layer.attention.heads, layer.attention.kv_heads, layer.attention.width)
                 for layer in self.layers}  # fmt: skip
        expect("layers", len(alike) == 1)  # they share one room for what is between them


def _is_a(module: nn.Module, part: str) -> bool:
    """Whether ``module`` is that part of a model of one of these kinds."""
    kind = type(module)
    return kind.__module__.startswith("transformers.") and kind.__name__ in {f"{name}{part}" for name in KINDS}


def _norm(norm: FusedNorm) -> dict[str, Any]:
    return {"weight": norm.weight, "eps": float(norm.eps)}


def _embedding(state: dict[str, Any], hidden_size: int) -> nn.Embedding | PackedEmbedding:
    """One that is kept, of rows of so many numbers.

    Raises:
        KeyError: if something is missing.
        ModelError: if it is none.
    """
    weight, count, packed = state["weight"], state["count"], state["packed"]
    expect("an embedding", is_count(count), type(packed) is bool)
    if not packed:
        expect("an embedding", is_tensor(weight, torch.bfloat16, count, hidden_size))
        table: nn.Embedding = nn.Embedding.from_pretrained(weight)
        return table
    expect("an embedding", is_tensor(weight, torch.int32, None, hidden_size // 2, BLOCK))
    expect("an embedding", count <= len(weight) * BLOCK)
    return restored(PackedEmbedding, {"weight": weight, "num_embeddings": count})


def _products(layer: Any) -> list[nn.Linear]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.up_proj, mlp.down_proj]
