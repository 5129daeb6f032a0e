"""EAGLE: a layer on the target's hidden states that goes on by itself (Li et al. 2024, arXiv:2401.15077; EAGLE-2:
arXiv:2406.16858, the same layer; EAGLE-3: arXiv:2503.01840)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from torch.nn.functional import silu

from tokentree.heads.medusa import Layer
from tokentree.rotary import rotary_of

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class EagleSizes(BaseModel):
    """What a head is made of.

    Args:
        version: 1, which is EAGLE-2's too, or 3.
        hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim: of its layer.
        vocab_size: of the target.
        draft_vocab_size: how many tokens an EAGLE-3 head knows; None: all.
        taps: the hidden states of the target that it reads, numbered as `HasHiddenStates.capture` does; EAGLE-1
            reads the last one.
        target_hidden_size: of the target; None: its own.
        rope: parameters of its rotary positions, as transformers' configurations have them in ``rope_parameters``.
        context: the most positions that it can take.
        eps: of its norms.
        fc_bias, qkv_bias: whether these products have a bias.
        norm_before_residual: whether an EAGLE-3 head adds its attention to what is known after the norm.
        fc_norm: whether each of the hidden states that an EAGLE-3 head reads has a norm of its own (EAGLE-3.1).
        norm_before_fc: whether these have one norm together.
        norm_output: whether an EAGLE-3 head goes on from what its last norm gives, which its output layer reads too.
        own_embedding: whether it has an embedding of its own, not the target's.
        own_output: whether an EAGLE-3 head has an output layer of its own; else it uses the target's, as EAGLE-1 does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1, 3]
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    vocab_size: int = Field(ge=1)
    draft_vocab_size: int | None = Field(None, ge=1)
    taps: tuple[int, ...] = Field(min_length=1)
    target_hidden_size: int | None = Field(None, ge=1)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    context: int = Field(2048, ge=1)
    eps: float = Field(1e-6, gt=0, allow_inf_nan=False)
    fc_bias: bool = False
    qkv_bias: bool = False
    own_embedding: bool = False
    own_output: bool = True
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False

    @model_validator(mode="after")
    def _fits(self) -> EagleSizes:
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        if self.version == 1 and (len(self.taps) > 1 or self.draft_vocab_size is not None):
            raise ValueError("EAGLE-1 reads one hidden state and knows all tokens")
        if not self.own_output and self.draft_vocab_size is not None:
            raise ValueError("a head with the target's output layer knows all tokens")
        if not self.own_output and self.target_hidden_size not in (None, self.hidden_size):
            raise ValueError("a head with the target's output layer is as wide as the target")
        if self.more_norms and self.version == 1:
            raise ValueError("EAGLE-1 has no fc_norm, norm_before_fc or norm_output")
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm and norm_before_fc exclude each other")
        return self

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many heads of queries, keys and values a layer has."""
        return self.num_heads, self.num_kv_heads, self.num_kv_heads

    @property
    def more_norms(self) -> bool:
        """Whether it has norms that EAGLE-3 doesn't have: those of EAGLE-3.1."""
        return self.fc_norm or self.norm_before_fc or self.norm_output


class EagleHead(nn.Module):
    """One decoder layer, with row i for token i + 1 of a text and what is known of position i.

    What is known is a vector of the head's own width: at a position that the target has read, `fuse` makes it of the
    target's hidden states; behind it, it is what the layer gave there itself. The layer takes it together with the
    token's embedding, and gives the next position's. `logits` of that say which token comes.

    - EAGLE-1: ``x = fc([embedding; known])``, then a layer without a norm in front, which adds its attention to ``x``.
    - EAGLE-3: the layer attends with ``[norm(embedding); norm(known)]`` and adds that to ``known``; `fuse` is ``fc`` of
      the hidden states of several of the target's layers.
    - EAGLE-3.1: the same, with norms in front of ``fc`` and behind the layer, see `EagleSizes`.

    Args:
        sizes: see there.

    Attributes:
        token_map: int64[draft_vocab_size], ascending: the target's ids for the logits of a head that knows fewer
            tokens, or None.
    """

    def __init__(self, sizes: EagleSizes) -> None:
        super().__init__()
        self.sizes = sizes
        size, target_size = sizes.hidden_size, sizes.target_hidden_size or sizes.hidden_size
        wide, narrow = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        third = sizes.version == 3
        self.fc = nn.Linear(len(sizes.taps) * target_size if third else size + target_size, size, sizes.fc_bias)
        self.qkv = nn.Linear(2 * size if third else size, wide + 2 * narrow, sizes.qkv_bias)
        self.o_proj = nn.Linear(wide, size, bias=False)
        self.gate_up = nn.Linear(size, 2 * sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, size, bias=False)
        self.post_attention_layernorm = RMSNorm(size, sizes.eps)
        if third:
            self.input_layernorm, self.hidden_norm = RMSNorm(size, sizes.eps), RMSNorm(size, sizes.eps)
            self.norm = RMSNorm(size, sizes.eps)
        taps = sizes.taps if sizes.fc_norm else ()
        self.fc_norm = nn.ModuleList(RMSNorm(target_size, sizes.eps) for _ in taps)
        self.input_norm = RMSNorm(self.fc.in_features, sizes.eps) if sizes.norm_before_fc else None
        says, known_tokens = third and sizes.own_output, sizes.draft_vocab_size or sizes.vocab_size
        self.lm_head = nn.Linear(size, known_tokens, bias=False) if says else None
        self.embed_tokens = nn.Embedding(sizes.vocab_size, size) if sizes.own_embedding else None
        self.rotary = rotary_of(sizes.rope, sizes.head_dim, sizes.context)
        self.token_map: torch.Tensor | None
        known = None if sizes.draft_vocab_size is None else torch.arange(sizes.draft_vocab_size)
        self.register_buffer("token_map", known)
        self.float()  # whatever torch's default type is

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """[..., hidden size]: what is known of positions where the target's hidden states are ``states`` [..., taps x
        hidden size of the target]."""
        if self.sizes.version == 1:
            return states
        if self.sizes.fc_norm:
            taps = states.chunk(len(self.sizes.taps), -1)
            states = torch.cat([norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)], -1)
        elif self.input_norm is not None:
            states = self.input_norm(states)
        fused: torch.Tensor = self.fc(states)
        return fused

    def forward(self, embedded: torch.Tensor, known: torch.Tensor, attend: Attend) -> torch.Tensor:
        """What is known of the next positions, [..., hidden size].

        Args:
            embedded: [..., hidden size], the rows' tokens.
            known: [..., hidden size].
            attend: given queries, keys and values [..., heads, head_dim] before they are turned, what the rows attend
                to, [..., heads x head_dim].
        """
        given = self.run(embedded, known, attend)
        return self.norm(given) if self.sizes.norm_output else given

    def run(self, embedded: torch.Tensor, known: torch.Tensor, attend: Attend) -> torch.Tensor:
        """As `forward`, without a norm behind."""
        if self.sizes.version == 3:
            normed = self.hidden_norm(known)
            x = torch.cat([self.input_layernorm(embedded), normed], -1)
            residual = normed if self.sizes.norm_before_residual else known
        else:
            x = residual = self.fc(torch.cat([embedded, known], -1))
        return through(self, x, residual, attend)

    def logits(self, known: torch.Tensor, output_layer: Layer) -> torch.Tensor:
        """[..., tokens that the head knows], of what `forward` gave; ``output_layer`` is the target's, for EAGLE-1, and
        for heads without one of their own."""
        if self.sizes.version == 1:
            return output_layer(known)
        normed = known if self.sizes.norm_output else self.norm(known)
        return (output_layer if self.lm_head is None else self.lm_head)(normed)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``x`` [..., rows, heads, head_dim] turned to ``positions`` int64[..., rows] (Su et al. 2021,
        arXiv:2104.09864)."""
        flat = positions.reshape(1, -1)
        cos, sin = (part.view(*positions.shape, 1, -1) for part in self.rotary(x, flat))
        half = x.shape[-1] // 2
        turned: torch.Tensor = x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
        return turned


def through(layer: Any, x: torch.Tensor, residual: torch.Tensor, attend: Attend) -> torch.Tensor:
    """``residual`` [..., hidden size] with what a ``layer``'s attention to ``x`` adds, and its MLP."""
    heads = layer.qkv(x).unflatten(-1, (-1, layer.sizes.head_dim))
    residual = residual + layer.o_proj(attend(*heads.split(layer.sizes.counts, -2)))
    gate, up = layer.gate_up(layer.post_attention_layernorm(residual)).chunk(2, -1)
    given: torch.Tensor = residual + layer.down_proj(silu(gate) * up)
    return given


class RMSNorm(nn.Module):
    """Divides by the root of the mean of squares (Zhang and Sennrich 2019, arXiv:1910.07467), in float32.

    Args:
        size: numbers of a row.
        eps: what is added to the mean.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., size], normed, in its type."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)
