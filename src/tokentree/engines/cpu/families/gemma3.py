"""Gemma 3's layers, of its models that read text alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from tokentree.engines.cpu.families.qwen3 import Qwen3
from tokentree.engines.cpu.families.stack import Layer
from tokentree.engines.cpu.fused import FusedMLP, FusedNorm, GeluMLP, GemmaNorm
from tokentree.engines.cpu.linear import ScaledEmbedding
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.steps import Rows, Step, Steps
from tokentree.rotary import Rotary, Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIXED = {"default", "linear", "llama3", "yarn"}  # positions that turn alike in texts of any length


class Gemma3(Qwen3):
    """Norms of heads as Qwen3's; norms before and behind attention, before and behind a MLP that GELU gates. Layers
    that see a window turn by another table than those that see all."""

    names: ClassVar[tuple[str, ...]] = ("Gemma3",)
    body: ClassVar[str] = "TextModel"
    norm_names: ClassVar[tuple[str, ...]] = (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    )  # fmt: skip
    a_norm: ClassVar[type[FusedNorm]] = GemmaNorm
    mlp: ClassVar[type[FusedMLP]] = GeluMLP

    @classmethod
    def fits(cls, model: PreTrainedModel, packing: Packing) -> bool:
        if not super().fits(model, packing):
            return False
        body: Any = model.model
        kinds = body.config.layer_types
        return (
            model.config.final_logit_softcapping is None
            and {*body.rotary_emb.rope_type.values()} <= FIXED
            and {*kinds} <= {*body.rotary_emb.rope_type}
            and all(
                layer.self_attn.layer_type == kind and layer.self_attn.is_causal
                for layer, kind in zip(body.layers, kinds, strict=True)
            )
        )

    @classmethod
    def embeds(cls, embedding: nn.Module) -> bool:
        return ScaledEmbedding.fits(embedding)

    @classmethod
    def turns(cls, model: PreTrainedModel) -> tuple[list[nn.Module], list[int]]:
        own: Any = model.model.rotary_emb
        kinds = sorted({*model.model.config.layer_types})
        rotaries: list[nn.Module] = [
            Rotary(
                Rotation(
                    getattr(own, f"{kind}_inv_freq").detach().float(), float(getattr(own, f"{kind}_attention_scaling"))
                )
            )
            for kind in kinds
        ]
        return rotaries, [kinds.index(kind) for kind in model.model.config.layer_types]

    def room(self, to: Steps) -> Rows:
        return to.rows_of_a_layer(
            self.hidden_size, self.inner_size, self.attentions[0], gates=2 * self.inner_size
        )  # fmt: skip

    def attend(self, to: Steps, index: int, layer: Layer, at: Rows) -> list[Step]:
        attention, mlp, (_, behind, before, last) = layer.attention, layer.mlp, layer.norms
        steps = to.attend(index, attention, at.queries, at.attended)
        steps += to.prepare(attention.o_proj, at.attended)
        steps += to.multiply(attention.o_proj, at.attended, at.added)
        steps += to.norm(behind, at.added, at.added, None)
        steps += to.norm(before, at.residual, at.normed, mlp.gate_up, at.added)
        steps += to.multiply(mlp.gate_up, at.normed, at.gates)
        steps += to.gate(mlp.down_proj, at.gates, at.inner)
        steps += to.multiply(mlp.down_proj, at.inner, at.added)
        return steps + to.norm(last, at.added, at.added, None)
