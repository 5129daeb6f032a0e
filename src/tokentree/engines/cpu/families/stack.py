"""What families have in common whose forward is one compiled call: a stack of layers in packed weights, how it is found
in a model, and how it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from tokentree.engines.cpu.checked import expect, is_count, is_number, is_tensor
from tokentree.engines.cpu.fused import FusedAttention, FusedMLP, FusedNorm, Kind
from tokentree.engines.cpu.linear import PackedEmbedding, PackedLinear, ScaledEmbedding, restored
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.cpu.steps import Rows, Step, Steps
from tokentree.engines.cpu.turns import fixed
from tokentree.kernels.tile import BLOCK
from tokentree.rotary import Rotary, Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Embedding = nn.Embedding | PackedEmbedding | ScaledEmbedding


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer.

    Args:
        norms: in the order of `Stack.norm_names`.
        attention, mlp: its weights.
        table: which of the model's rotaries turns its queries and keys.
    """

    norms: tuple[FusedNorm, ...]
    attention: FusedAttention
    mlp: FusedMLP
    table: int = 0

    def modules(self) -> Iterator[nn.Module]:
        yield from (*self.norms, self.attention, self.mlp)


@dataclass(frozen=True, eq=False)
class Stack:
    """All that a model computes with. A family is a subclass, which names the parts of its models and says which steps
    a layer has.

    Args:
        embedding: of tokens.
        rotaries: make cosines and sines of positions, see `turns.RotaryTables`.
        layers: in order.
        norm: behind them.
        head: makes logits.

    Attributes:
        names: what the classes of such models begin with, in transformers.
        body: what the name of the class of all layers ends with.
        norm_names: those of a layer's norms.
        a_norm: what norms become.
        attention, mlp: what a layer's parts become.
    """

    names: ClassVar[tuple[str, ...]]
    body: ClassVar[str] = "Model"
    norm_names: ClassVar[tuple[str, ...]]
    a_norm: ClassVar[type[FusedNorm]] = FusedNorm
    attention: ClassVar[type[FusedAttention]] = FusedAttention
    mlp: ClassVar[type[FusedMLP]] = FusedMLP

    embedding: Embedding
    rotaries: list[nn.Module]
    layers: list[Layer]
    norm: FusedNorm
    head: PackedLinear | QuantizedLinear

    # -- found in a model ------------------------------------------------------------------------------------------

    @classmethod
    def fits(cls, model: PreTrainedModel, packing: Packing) -> bool:
        """Whether ``model``, as it came, is one of this family, with layers that can be packed so."""
        if not cls._is_a(model, "ForCausalLM"):
            return False
        from tokentree.engines.foreign import ForeignCode  # takes seconds

        if ForeignCode.of(model).at:
            return False
        body, head = model.model, model.lm_head
        return (
            cls._is_a(body, cls.body)
            and cls._is_a(body.rotary_emb, "RotaryEmbedding")
            and len(body.layers) == model.config.num_hidden_layers
            and all(cls._is_a(layer, "DecoderLayer") for layer in body.layers)
            and packing.fits(head)
            and cls.embeds(body.embed_tokens)
            and cls.a_norm.fits(body.norm)
            and all(
                cls.attention.fits(layer.self_attn, packing)
                and cls.mlp.fits(layer.mlp, packing)
                and all(cls.a_norm.fits(getattr(layer, name)) for name in cls.norm_names)
                and not any(part.out_features % BLOCK for part in _products(layer))
                for layer in body.layers
            )
        )

    @classmethod
    def embeds(cls, embedding: nn.Module) -> bool:
        """Whether ``embedding``, as it came, is such a model's."""
        return Steps.embeds(embedding)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Of one that `fits`, whose modules were exchanged for packed ones."""
        body: Any = model.model
        rotaries, tables = cls.turns(model)
        layers = [
            Layer(tuple(getattr(layer, name) for name in cls.norm_names), layer.self_attn, layer.mlp, table)
            for layer, table in zip(body.layers, tables, strict=True)
        ]
        return cls(body.embed_tokens, rotaries, layers, body.norm, model.lm_head)

    @classmethod
    def turns(cls, model: PreTrainedModel) -> tuple[list[nn.Module], list[int]]:
        """The rotaries of ``model``, and which of them is each layer's."""
        return [model.model.rotary_emb], [0] * len(model.model.layers)

    @classmethod
    def _is_a(cls, module: nn.Module, part: str) -> bool:
        """Whether ``module`` is that part of a model of this family."""
        kind = type(module)
        return kind.__module__.startswith("transformers.") and kind.__name__ in {f"{name}{part}" for name in cls.names}

    # -- as steps --------------------------------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        return len(self.norm.weight)

    @property
    def inner_size(self) -> int:
        """Width of what gates give."""
        return int(self.layers[0].mlp.down_proj.num_inputs)

    def room(self, to: Steps) -> Rows:
        """Room for a layer's intermediate results."""
        return to.rows_of_a_layer(self.hidden_size, self.inner_size, self.layers[0].attention)

    def into_attention(self, to: Steps, layer: Layer, at: Rows, update: torch.Tensor | None) -> list[Step]:
        """Adds what the layer before gave to the rows, and norms them for ``layer``."""
        return to.norm(layer.norms[0], at.residual, at.normed, layer.attention.qkv, update)

    def store(self, to: Steps, index: int, layer: Layer, at: Rows) -> list[Step]:
        """Queries, keys and values, stored as layer ``index``."""
        steps = to.multiply(layer.attention.qkv, at.normed, at.qkv)
        return steps + to.rotary(index, layer.attention, at.qkv, at.queries, layer.table)

    def attend(self, to: Steps, index: int, layer: Layer, at: Rows) -> list[Step]:
        """The layer from its attention on. What it gives is left in ``at.added``, for the next norm to add."""
        raise NotImplementedError

    # -- kept ------------------------------------------------------------------------------------------------------

    def modules(self) -> Iterator[nn.Module]:
        """All modules, those inside of others too."""
        layers = (part for layer in self.layers for part in layer.modules())
        for part in (self.embedding, *self.rotaries, *layers, self.norm, self.head):
            yield from part.modules()

    def state(self) -> dict[str, Any] | None:
        """What `of_state` makes a model of: tensors, numbers and their names. None if its positions depend on the
        length of a text, which only the model's own module knows how to compute."""
        if not all(map(fixed, self.rotaries)):
            return None
        layers = [
            {
                "norms": [norm.state() for norm in layer.norms], "attention": layer.attention.state(),
                "mlp": layer.mlp.state(), "table": layer.table,
            }
            for layer in self.layers
        ]  # fmt: skip
        return {
            "embedding": _state_of(self.embedding), "rotaries": [asdict(Rotation.of(one)) for one in self.rotaries],
            "layers": layers, "norm": self.norm.state(), "head": self.head.state(),
        }  # fmt: skip

    @classmethod
    def of_state(cls, state: dict[str, Any], kind: Kind) -> Self:
        """A model that is kept, whose linear layers are of this kind.

        Raises:
            KeyError: if something is missing.
            ModelError: if something doesn't belong to the rest.
        """
        norm, rotations = cls.a_norm.of_state(state["norm"]), [Rotation(**found) for found in state["rotaries"]]
        layers = [
            Layer(
                tuple(cls.a_norm.of_state(found) for found in part["norms"]),
                cls.attention.of_state(part["attention"], kind), cls.mlp.of_state(part["mlp"], kind), part["table"],
            )
            for part in state["layers"]
        ]  # fmt: skip
        embedding = _embedding(state["embedding"], len(norm.weight))
        made = cls(embedding, [Rotary(one) for one in rotations], layers, norm, kind.of_state(state["head"]))
        made._check(rotations)
        return made

    def _check(self, rotations: list[Rotation]) -> None:
        """Raises `ModelError` unless the sizes of all parts fit one another: addresses are computed from them."""
        hidden, head = self.hidden_size, self.head
        expect("an output layer", not head.gated, head.num_inputs == hidden)
        expect("layers", len(self.layers) > 0)
        for layer in self.layers:
            sizes, mlp = layer.attention, layer.mlp
            expect("positions", is_count(layer.table, 0), layer.table < len(rotations))
            expect("positions", is_tensor(rotations[layer.table].frequencies, torch.float32, sizes.width // 2))
            wide, rows = sizes.heads * sizes.width, (sizes.heads + 2 * sizes.kv_heads) * sizes.width
            inner = mlp.down_proj.num_inputs
            gates = inner if mlp.gated else 2 * inner
            products = {
                sizes.qkv: (hidden, rows), sizes.o_proj: (wide, hidden), mlp.gate_up: (hidden, gates),
                mlp.down_proj: (inner, hidden),
            }  # fmt: skip
            for product, inputs_outputs in products.items():
                expect("a product", (product.num_inputs, product.num_outputs) == inputs_outputs)
                expect("a product", product.gated is (mlp.gated and product is mlp.gate_up))
                expect("a product", not product.num_outputs % BLOCK)
            expect("norms", len(layer.norms) == len(self.norm_names))
            expect("norms", all(len(norm.weight) == hidden for norm in layer.norms))
        for rotation in rotations:
            expect("positions", is_number(rotation.scale), bool(rotation.frequencies.isfinite().all()))
        alike = {
            (layer.mlp.down_proj.num_inputs, layer.attention.heads, layer.attention.kv_heads, layer.attention.width)
            for layer in self.layers
        }
        expect("layers", len(alike) == 1)  # they share one room for what is between them


def _state_of(embedding: Embedding) -> dict[str, Any]:
    if isinstance(embedding, ScaledEmbedding):
        return _state_of(embedding.table) | {"scale": float(embedding.scale)}
    return {
        "packed": isinstance(embedding, PackedEmbedding), "weight": embedding.weight.detach(),
        "count": embedding.num_embeddings, "scale": None,
    }  # fmt: skip


def _embedding(state: dict[str, Any], hidden_size: int) -> Embedding:
    """One that is kept, of rows of so many numbers.

    Raises:
        KeyError: if something is missing.
        ModelError: if it is none.
    """
    weight, count, packed, scale = state["weight"], state["count"], state["packed"], state["scale"]
    expect("an embedding", is_count(count), type(packed) is bool, scale is None or is_number(scale))
    table: nn.Embedding | PackedEmbedding
    if packed:
        expect("an embedding", is_tensor(weight, torch.int32, None, hidden_size // 2, BLOCK))
        expect("an embedding", count <= len(weight) * BLOCK)
        table = restored(PackedEmbedding, {"weight": weight, "num_embeddings": count})
    else:
        expect("an embedding", is_tensor(weight, torch.bfloat16, count, hidden_size))
        table = nn.Embedding.from_pretrained(weight)
    return table if scale is None else ScaledEmbedding(table, torch.tensor(scale, dtype=torch.bfloat16))


def _products(layer: Any) -> list[nn.Linear]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.up_proj, mlp.down_proj]
