"""The entries of a GGUF file, each taken once: what nothing takes is refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from tokentree.gguf.header import GgufError, Header

# entries that change nothing, and those that change nothing where they have one of these values
INFORMATIVE = ("rope.scaling.finetuned", "tensor_data_layout", "quantized_by")
OFF = (0, 0.0, False)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.clamp_kqv": OFF, "attention.max_alibi_bias": OFF,
    "attention.sliding_window": OFF, "attention.temperature_scale": OFF, "attn_logit_softcapping": OFF,
    "embedding_scale": (0.0, 1.0), "expert_count": OFF, "expert_gating_func": (0, 1), "expert_group_count": OFF,
    "expert_shared_count": OFF, "expert_used_count": OFF, "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": OFF, "leading_dense_block_count": OFF, "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": OFF, "pooling_type": OFF, "residual_scale": (0.0, 1.0), "use_parallel_residual": OFF,
}  # fmt: skip


@dataclass
class Entries:
    """The entries of a header, each to be taken once.

    Raises:
        GgufError: from all methods, if an entry is missing, of another type, or makes no sense.
    """

    header: Header
    architecture: str
    _left: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        begin = f"{self.architecture}."
        own = self.header.entries.items()
        self._left = {key.removeprefix(begin): value for key, value in own if key.startswith(begin)}

    def says(self, key: str) -> Any:
        """The value of ``key``, which remains to be taken."""
        return self._left.get(key)

    def refuse(self, why: str) -> NoReturn:
        raise GgufError(why)

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``; without a default it has to be there."""
        value = self.take(key, default)
        if value is None:
            self.refuse(f"it doesn't say {self.architecture}.{key}")
        if type(value) is not int or not least <= value < 1 << 31:
            self.refuse(f"{self.architecture}.{key} is {shown(value)}, which no {self.architecture} here has")
        return value

    def number(self, key: str, default: float | None = None, zero: bool = False) -> float:
        """A finite number above zero, or at least ``zero``, as the shortest decimal that is the file's float32."""
        value = self.take(key, default)
        if value is None:
            self.refuse(f"it doesn't say {self.architecture}.{key}")
        fits = type(value) in (int, float) and math.isfinite(value) and (value > 0 or (zero and value == 0))
        if not fits:
            self.refuse(f"{self.architecture}.{key} is {shown(value)}, which no {self.architecture} here has")
        return float(str(np.float32(value)))

    def refuse_rest(self) -> None:
        """Raises `GgufError` for an entry that nothing took and that may change the text."""
        for key, value in self._left.items():
            if key not in INFORMATIVE and value not in NEUTRAL.get(key, ()):
                self.refuse(f"it says {self.architecture}.{key} = {shown(value)}, which can't be honoured here")


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
