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
from tokentree.engines.cpu.short_convolution import ShortConvolution
from tokentree.engines.cpu.steps import Rows, Step, Steps
from tokentree.engines.cpu.turns import fixed
from tokentree.engines.recurrent import Recurrence
from tokentree.kernels.tile import BLOCK
from tokentree.rotary import Rotary, Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Embedding = nn.Embedding | PackedEmbedding | ScaledEmbedding
Mixer = FusedAttention | ShortConvolution  # what a layer reads other rows by


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer.

    Args:
        norms: in the order of `Stack.norm_names`.
        mixer, mlp: its weights.
        table: which of the model's rotaries turns its queries and keys, if it has any.
    """

    norms: tuple[FusedNorm, ...]
    mixer: Mixer
    mlp: FusedMLP
    table: int = 0

    @property
    def attention(self) -> FusedAttention:
        """The mixer of a layer that attends."""
        assert isinstance(self.mixer, FusedAttention)
        return self.mixer

    def modules(self) -> Iterator[nn.Module]:
        yield from (*self.norms, self.mixer, self.mlp)


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
        norm_names, mlp_name, last_norm: those of a layer's norms, of its MLP, of the norm behind all layers.
        a_norm: what norms become.
        mixers: what a layer's mixer becomes, by what it is called. A layer has one of them.
        mlp: what a layer's MLP becomes.
    """

    names: ClassVar[tuple[str, ...]]
    body: ClassVar[str] = "Model"
    norm_names: ClassVar[tuple[str, ...]]
    last_norm: ClassVar[str] = "norm"
    a_norm: ClassVar[type[FusedNorm]] = FusedNorm
    mixers: ClassVar[dict[str, type[Mixer]]] = {"self_attn": FusedAttention}
    mlp: ClassVar[type[FusedMLP]] = FusedMLP
    mlp_name: ClassVar[str] = "mlp"

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
            and cls.a_norm.fits(getattr(body, cls.last_norm))
            and all(cls._fits_layer(layer, packing) for layer in body.layers)
            and any(issubclass(cls.mixers[cls._mixer_name(layer)], FusedAttention) for layer in body.layers)
        )

    @classmethod
    def _fits_layer(cls, layer: Any, packing: Packing) -> bool:
        """Whether ``layer`` is one of this family, as it came."""
        name, mlp = cls._mixer_name(layer), getattr(layer, cls.mlp_name)
        kind, mixer = cls.mixers[name], getattr(layer, name)
        return (
            kind.fits(mixer, packing)
            and cls.mlp.fits(mlp, packing)
            and all(cls.a_norm.fits(getattr(layer, name)) for name in cls.norm_names)
            and not any(part.out_features % BLOCK for part in (*kind.products(mixer), *cls.mlp.products(mlp)))
        )

    @classmethod
    def _mixer_name(cls, layer: Any) -> str:
        """Under which of the names of `mixers` ``layer`` has one."""
        return next(name for name in cls.mixers if hasattr(layer, name))

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
            Layer(
                tuple(getattr(layer, name) for name in cls.norm_names), getattr(layer, cls._mixer_name(layer)),
                getattr(layer, cls.mlp_name), table,
            )
            for layer, table in zip(body.layers, tables, strict=True)
        ]  # fmt: skip
        return cls(body.embed_tokens, rotaries, layers, getattr(body, cls.last_norm), model.lm_head)

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

    @property
    def attentions(self) -> list[FusedAttention]:
        """Of the layers that attend, in order: so their KV is stored."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, FusedAttention)]

    @property
    def recurrences(self) -> tuple[Recurrence, ...]:
        """Those of the other layers, in order."""
        return tuple(layer.mixer.recurrence for layer in self.layers if isinstance(layer.mixer, ShortConvolution))

    @property
    def places(self) -> list[int]:
        """For each layer, how many of its kind come before it: where its KV is stored, or its state."""
        kinds = [layer.mixer.name for layer in self.layers]
        return [kinds[:at].count(kind) for at, kind in enumerate(kinds)]

    def room(self, to: Steps) -> Rows:
        """Room for a layer's intermediate results."""
        return to.rows_of_a_layer(self.hidden_size, self.inner_size, self.attentions[0])

    def into_layer(self, to: Steps, layer: Layer, at: Rows, update: torch.Tensor | None) -> list[Step]:
        """Adds what the layer before gave to the rows, and norms them for ``layer``."""
        return to.norm(layer.norms[0], at.residual, at.normed, layer.mixer.first, update)

    def store(self, to: Steps, index: int, layer: Layer, at: Rows) -> list[Step]:
        """Queries, keys and values, stored as those of attention ``index``; or what another mixer keeps."""
        steps = to.multiply(layer.attention.qkv, at.normed, at.qkv)
        return steps + to.rotary(index, layer.attention, at.qkv, at.queries, layer.table)

    def attend(self, to: Steps, index: int, layer: Layer, at: Rows) -> list[Step]:
        """The layer from there on. What it gives is left in ``at.added``, for the next norm to add."""
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
                "norms": [norm.state() for norm in layer.norms], layer.mixer.name: layer.mixer.state(),
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
                cls._mixer_of_state(part, kind), cls.mlp.of_state(part["mlp"], kind), part["table"],
            )
            for part in state["layers"]
        ]  # fmt: skip
        embedding = _embedding(state["embedding"], len(norm.weight))
        made = cls(embedding, [Rotary(one) for one in rotations], layers, norm, kind.of_state(state["head"]))
        made._check(rotations)
        return made

    @classmethod
    def _mixer_of_state(cls, part: dict[str, Any], kind: Kind) -> Mixer:
        """That of a layer that is kept."""
        found = [mixer for mixer in cls.mixers.values() if mixer.name in part]
        expect("a layer", len(found) == 1)
        return found[0].of_state(part[found[0].name], kind)

    def _check(self, rotations: list[Rotation]) -> None:
        """Raises `ModelError` unless the sizes of all parts fit one another: addresses are computed from them."""
        hidden, head = self.hidden_size, self.head
        expect("an output layer", not head.gated, head.num_inputs == hidden)
        expect("layers", len(self.attentions) > 0)
        for layer in self.layers:
            mixer, mlp = layer.mixer, layer.mlp
            expect("positions", is_count(layer.table, 0), layer.table < len(rotations))
            if isinstance(mixer, FusedAttention):
                expect("positions", is_tensor(rotations[layer.table].frequencies, torch.float32, mixer.width // 2))
            else:
                expect("a convolution", mixer.recurrence.row == hidden)
            inner = mlp.down_proj.num_inputs
            gates = inner if mlp.gated else 2 * inner
            products = mixer.sizes_of_products(hidden) | {
                mlp.gate_up: (hidden, gates), mlp.down_proj: (inner, hidden)
            }  # fmt: skip
            for product, inputs_outputs in products.items():
                expect("a product", (product.num_inputs, product.num_outputs) == inputs_outputs)
                expect("a product", product.gated is (mlp.gated and product is mlp.gate_up))
                expect("a product", not product.num_outputs % BLOCK)
            expect("norms", len(layer.norms) == len(self.norm_names))
            expect("norms", all(len(norm.weight) == hidden for norm in layer.norms))
        for rotation in rotations:
            expect("positions", is_number(rotation.scale), bool(rotation.frequencies.isfinite().all()))
        # they share one room for what is between them
        expect("layers", len({layer.mlp.down_proj.num_inputs for layer in self.layers}) == 1)
        expect("layers", len({(one.heads, one.kv_heads, one.width) for one in self.attentions}) == 1)


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
