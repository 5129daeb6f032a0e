"""LFM2's layers, of its models that read text alone and have no experts."""

from __future__ import annotations

from typing import ClassVar

from tokentree.engines.cpu.families.qwen3 import Qwen3
from tokentree.engines.cpu.families.stack import Layer, Mixer
from tokentree.engines.cpu.fused import FusedMLP, NormedAttention, NumberedMLP
from tokentree.engines.cpu.short_convolution import ShortConvolution
from tokentree.engines.cpu.steps import Rows, Step, Steps


class Lfm2Attention(NormedAttention):
    """Qwen3's, under other names."""

    kinds: ClassVar[set[str]] = {"Lfm2Attention"}
    parts: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    norm_names: ClassVar[tuple[str, ...]] = ("q_layernorm", "k_layernorm")


class Lfm2(Qwen3):
    """A norm before attention as Qwen3's, or before a gated short convolution; one before a MLP that SiLU gates."""

    names: ClassVar[tuple[str, ...]] = ("Lfm2",)
    norm_names: ClassVar[tuple[str, ...]] = ("operator_norm", "ffn_norm")
    last_norm: ClassVar[str] = "embedding_norm"
    mixers: ClassVar[dict[str, type[Mixer]]] = {"self_attn": Lfm2Attention, "conv": ShortConvolution}
    mlp: ClassVar[type[FusedMLP]] = NumberedMLP
    mlp_name: ClassVar[str] = "feed_forward"

    def room(self, to: Steps) -> Rows:
        return to.rows_of_a_layer(self.hidden_size, self.inner_size, self.attentions[0], gates=3 * self.hidden_size)

    def store(self, to: Steps, index: int, layer: Layer, at: Rows) -> list[Step]:
        if isinstance(layer.mixer, ShortConvolution):
            steps = to.multiply(layer.mixer.in_proj, at.normed, at.gates)
            return steps + to.convolve(layer.mixer, at.gates, at.normed)
        return super().store(to, index, layer, at)

    def attend(self, to: Steps, index: int, layer: Layer, at: Rows) -> list[Step]:
        if isinstance(layer.mixer, ShortConvolution):
            steps = to.multiply(layer.mixer.out_proj, at.normed, at.added)
            return steps + to.gated_mlp(layer.norms[1], layer.mlp.gate_up, layer.mlp.down_proj, at)
        return super().attend(to, index, layer, at)
