"""Llama's layers, and those that are theirs under another name."""

from __future__ import annotations

from typing import ClassVar

from tokentree.engines.cpu.families.stack import Layer, Stack
from tokentree.engines.cpu.steps import Behind, Rows, Step, Steps


class Llama(Stack):
    """A norm before attention, one before a MLP that SiLU gates."""

    names: ClassVar[tuple[str, ...]] = ("Llama", "Mistral", "Qwen2")  # all alike
    norm_names: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")

    def attend(self, to: Steps, index: int, layer: Layer, at: Rows) -> list[Step]:
        attention, mlp = layer.attention, layer.mlp
        behind = Behind(attention.o_proj, layer.norms[1], mlp.gate_up, mlp.down_proj)
        return to.after_rotary(index, attention, behind, at)
