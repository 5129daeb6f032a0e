"""Heads on the target guess several tokens ahead (Medusa, Cai et al. 2024, arXiv:2401.10774)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch.nn.functional import silu

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.slots import compile_growth, grown
from tokentree.engines.base import Engine
from tokentree.engines.drafting import Features, HasHiddenStates, Slots
from tokentree.errors import PairingError
from tokentree.heads.medusa import Layer, MedusaHeads
from tokentree.heads.saved import read_heads
from tokentree.kernels.topk import top_logprobs
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import Floats, Ints

TOP = 10  # tokens that are kept of each head


class Medusa(Drafter):
    """The target's hidden state at the last accepted token goes through all heads at once; head k proposes the token
    k + 2 places on, whatever stands between. So a node's children are the same for all nodes of a level, and a node is
    as probable as the product of what the heads give the tokens on its path.

    Trees grow best-first by that product; of a static shape, the very paths that it names are taken. A text of one
    token has no token before it, so its first step has no draft.

    Args:
        heads: made for this target.
        engine: the target's.
        temperatures: per head, what its logits are divided by so that its probabilities are true; by default 1.

    Raises:
        PairingError: if the heads don't fit the target.
    """

    name = "medusa"

    def __init__(self, heads: MedusaHeads, engine: Engine, temperatures: SequenceOf[float] | None = None) -> None:
        if not isinstance(engine, HasHiddenStates):
            raise PairingError(f"{engine.info.name} has no hidden states, which Medusa heads read")
        features = engine.capture()
        if heads.hidden_size != features.hidden_size:
            raise PairingError(
                f"these Medusa heads read hidden states of {heads.hidden_size} numbers, and the target has "
                f"{features.hidden_size}: they were made for another model"
            )
        if heads.token_map is not None and int(heads.token_map.max()) >= engine.vocab_size:
            raise PairingError("these Medusa heads know tokens that the target doesn't have")
        self._heads, self._engine = FastHeads(heads, features), engine
        self._ids = None if heads.token_map is None else heads.token_map.cpu().numpy()
        divisors = [1.0] * heads.num_heads if temperatures is None else list(temperatures)
        if len(divisors) != heads.num_heads or not all(divisor > 0 for divisor in divisors):
            raise PairingError(f"{heads.num_heads} Medusa heads need as many temperatures, all above 0")
        self._divisors = np.array(divisors, np.float32)
        compile_growth()  # before any request waits for it

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        if parts.heads is None:
            raise PairingError("drafter='medusa' needs heads=..., a folder with Medusa heads for this model")
        saved = read_heads(parts.heads, parts.fingerprint)
        return cls(saved.heads, parts.engine, saved.about.temperatures)

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = {seq.id: Draft(seq.tokens[-1]) for seq in seqs}
        ready = [seq for seq in seqs if self._engine.committed(seq) and min(shape.max_depth, seq.room - 1) > 0]
        if ready:
            tokens, probs = self._guess(torch.stack([self._engine.hidden(seq)[-1] for seq in ready]))
            for i, seq in enumerate(ready):
                depth = min(shape.max_depth, seq.room - 1)
                slots = Slots.independent(tokens[:, i], probs[:, i])
                drafts[seq.id] = grown(slots, seq.tokens[-1], shape, depth)
        return [drafts[seq.id] for seq in seqs]

    @torch.inference_mode()
    def _guess(self, hidden: torch.Tensor) -> tuple[Ints, Floats]:
        """Of ``hidden`` [rows, hidden size], the most probable tokens int64[heads, rows, TOP] of each head, best first,
        and their probabilities."""
        logits = self._heads.logits(hidden)[..., : self._engine.vocab_size]
        heads, rows, vocab = logits.shape
        divisors = self._divisors.repeat(rows)
        logprobs, ids = top_logprobs(logits.reshape(-1, vocab), min(TOP, vocab), divisors)
        probs, ids = np.exp(np.nan_to_num(logprobs, nan=-np.inf)), ids.reshape(heads, rows, -1)  # of what overflowed
        probs = probs.reshape(heads, rows, -1)
        return ids if self._ids is None else self._ids[ids], probs.astype(np.float64)


class FastHeads:
    """Heads on the linear layers that the target's engine runs fastest, in its type.

    Args:
        heads: stay as they are.
        features: of the target.
    """

    def __init__(self, heads: MedusaHeads, features: Features) -> None:
        def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
            place = features.device, features.dtype
            return features.linear(weight.detach().to(*place), None if bias is None else bias.detach().to(*place))

        self._num_heads, self._first, self._rest = heads.num_heads, list[Layer](), list[list[Layer]]()
        for layer in range(heads.num_layers):
            weight, bias = heads.weight[layer], None if heads.bias is None else heads.bias[layer]
            if layer == 0:  # all heads read the same, and are one product
                self._first.append(linear(weight.flatten(0, 1), None if bias is None else bias.flatten()))
            else:
                parts = zip(weight, [None] * heads.num_heads if bias is None else bias, strict=True)
                self._rest.append([linear(*part) for part in parts])
        if heads.projection is not None:
            self._outputs = [linear(weight, None) for weight in heads.projection]
        elif heads.token_map is not None:
            known = heads.token_map.to(features.device)
            self._outputs = [features.linear(*features.output_weights(known))]
        else:
            self._outputs = [features.output_layer]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[heads, rows, vocab], as `MedusaHeads.logits`, of ``hidden`` [rows, hidden]."""
        x = hidden.expand(self._num_heads, *hidden.shape)
        for layer in self._first:
            x = x + silu(layer(hidden)).view(len(hidden), self._num_heads, -1).transpose(0, 1)
        for layers in self._rest:
            x = x + silu(_each(layers, x))
        return self._outputs[0](x) if len(self._outputs) == 1 else _each(self._outputs, x)


def _each(layers: SequenceOf[Layer], x: torch.Tensor) -> torch.Tensor:
    """What each layer makes of its part of ``x``, behind one another."""
    return torch.stack([layer(part) for layer, part in zip(layers, x, strict=True)])
