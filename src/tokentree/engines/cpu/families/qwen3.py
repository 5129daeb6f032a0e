"""Qwen3's layers."""

from __future__ import annotations

from typing import ClassVar

from tokentree.engines.cpu.families.llama import Llama
from tokentree.engines.cpu.families.stack import Layer, Mixer
from tokentree.engines.cpu.fused import NormedAttention
from tokentree.engines.cpu.steps import Rows, Step, Steps


class Qwen3(Llama):
    """Llama's, with norms of each head of queries and keys before these are turned."""

    names: ClassVar[tuple[str, ...]] = ("Qwen3",)
    mixers: ClassVar[dict[str, type[Mixer]]] = {"self_attn": NormedAttention}

    def store(self, to: Steps, index: int, layer: Layer, at: Rows) -> list[Step]:
        attention = layer.attention
        assert isinstance(attention, NormedAttention)
        steps = to.multiply(attention.qkv, at.normed, at.qkv)
        steps += to.norm_heads(attention.norms, at.qkv)
        return steps + to.rotary(index, attention, at.qkv, at.queries, layer.table)
