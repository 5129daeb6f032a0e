"""Which family a model is of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokentree.engines.cpu.families.gemma3 import Gemma3
from tokentree.engines.cpu.families.lfm2 import Lfm2
from tokentree.engines.cpu.families.llama import Llama
from tokentree.engines.cpu.families.qwen3 import Qwen3
from tokentree.engines.cpu.families.stack import Stack
from tokentree.engines.cpu.packing import Packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# by the names that are kept
FAMILIES: dict[str, type[Stack]] = {"llama": Llama, "qwen3": Qwen3, "gemma3": Gemma3, "lfm2": Lfm2}


def family_of(model: PreTrainedModel, packing: Packing) -> type[Stack] | None:
    """The family of ``model``, as it came, if it is of one, and its layers can be packed so."""
    return next((family for family in FAMILIES.values() if family.fits(model, packing)), None)


def name_of(stack: Stack) -> str:
    """The name of its family."""
    return next(name for name, family in FAMILIES.items() if type(stack) is family)
