"""A P-EAGLE head on the target's hidden states, as an engine that guesses in the places of masks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf

import torch

from tokentree.engines.drafting import HasHiddenStates
from tokentree.engines.eagle import EagleEngine, fast, features_for, turned
from tokentree.engines.head_engine import HeadEngine, Known, beside
from tokentree.engines.kv import KVLayout
from tokentree.engines.output import Logits
from tokentree.engines.segment import Segment, inputs_of
from tokentree.heads.eagle import EagleHead
from tokentree.heads.peagle import PEagleHead


class PEagleEngine(HeadEngine):
    """Guesses with a P-EAGLE head, by its modules.

    A tree is a chain: the tokens that have no row yet, and mask tokens behind them. Rows of masks are never kept.

    Args:
        head: made for this target; it stays as it is.
        target: its engine.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    def __init__(self, head: PEagleHead, target: HasHiddenStates) -> None:
        sizes, features = head.sizes, features_for(head, target)
        shape = (sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
        layout = KVLayout(
            (shape,) * sizes.num_layers, features.dtype, features.device, blocked=features.device.type == "cpu"
        )
        super().__init__(target, features, sizes.taps, sizes.hidden_size, sizes.context, layout)
        self._head = fast(head, features)
        own = self._head.embed_tokens
        self._embedding = features.embedding if own is None else own
        with torch.inference_mode():
            self._mask = self._head.mask

    def _fused(self, states: torch.Tensor) -> torch.Tensor:
        return self._head.fuse(beside(states))

    def _above(self, given: torch.Tensor, parents: list[int]) -> torch.Tensor:
        return self._mask.expand(len(parents), -1)

    def _forward(self, known: Known, segments: SequenceOf[Segment]) -> tuple[torch.Tensor, Logits]:
        given = self._run(known, segments)
        return given, self._head.logits(given, self._features.output_layer)

    @torch.inference_mode()
    def _store(self, known: Known, segment: Segment) -> None:
        self._run(known, [segment])

    def _run(self, known: Known, segments: SequenceOf[Segment]) -> torch.Tensor:
        """What the last layer gives, [rows, hidden size]."""
        tokens, positions = (torch.from_numpy(part).to(known.device) for part in inputs_of(segments))
        layers = itertools.count()

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            parts = turned(self._head, positions, query, key, value)
            return self._attend(segments, *parts, query.shape[2] ** -0.5, next(layers)).flatten(1)

        given: torch.Tensor = self._head(self._embedding(tokens), known, attend)
        return given


def eagle_engine(head: EagleHead, target: HasHiddenStates) -> HeadEngine:
    """What runs ``head`` on the hidden states of ``target``, by its kind.

    Raises:
        PairingError: if the head doesn't fit the target.
    """
    return PEagleEngine(head, target) if isinstance(head, PEagleHead) else EagleEngine(head, target)
