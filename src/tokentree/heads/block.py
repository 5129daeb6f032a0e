"""Block heads: a few layers on the target's hidden states that guess a whole block of tokens in one pass (DFlash,
arXiv:2602.06036, and its successor DFlash 2; DSpark, arXiv:2607.05147; JetSpec, arXiv:2606.18394)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from torch.nn.functional import silu

from tokentree.heads.convolution import Bare, Convolution
from tokentree.heads.eagle import RMSNorm
from tokentree.heads.markov import PARTS, Markov
from tokentree.heads.medusa import Layer
from tokentree.rotary import rotary_of

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class BlockSizes(BaseModel):
    """What a head is made of.

    Args:
        hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, num_layers: of its layers.
        vocab_size: of the target.
        draft_vocab_size: how many tokens it knows; None: all.
        taps: the hidden states of the target that it reads, numbered as `HasHiddenStates.capture` does.
        target_hidden_size: of the target; None: its own.
        block_size: rows of a block, the anchor's included.
        anchor_first: whether row k guesses the token k + 1 places behind the anchor (DSpark), so that the anchor's row
            guesses too. Otherwise row k guesses the token k places behind it (DFlash), and the anchor's row none.
        causal: whether a row sees no later rows of its block.
        window: how far a row sees, in positions; None: all.
        mask_token: the token that stands where one is to be guessed; None: an embedding of its own does.
        markov_rank: numbers by which a token tells of its successor; 0: guesses depend on their place alone.
        markov: what is made of these, see `tokentree.heads.markov`; ``selector`` is DFlash 2's.
        candidates: the most probable tokens of a place that a selector takes from.
        conv_taps: rows of a block that convolutions around attention and MLPs take of (DFlash 2); 0: there are none.
        conv_group: channels that these treat alike.
        confidence: whether it tells how sure it is.
        confident_by_token: whether that depends on the token before too.
        rope: parameters of its rotary positions, as transformers' configurations have them in ``rope_parameters``.
        context: the most positions that it can take.
        eps: of its norms.
        attention_bias: whether products of attention have a bias.
        own_embedding: whether it has an embedding of its own, not the target's.
        own_output: whether it has an output layer of its own, not the target's.
        embedding_scale: by which embeddings of tokens are multiplied.
        logit_scale: by which logits are multiplied.
        softcap: the size that logits don't reach, as Gemma 2's; None: any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_layers: int = Field(ge=1, le=1024)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    vocab_size: int = Field(ge=1)
    draft_vocab_size: int | None = Field(None, ge=1)
    taps: tuple[int, ...] = Field(min_length=1)
    target_hidden_size: int | None = Field(None, ge=1)
    block_size: int = Field(ge=1, le=1024)
    anchor_first: bool = False
    causal: bool = False
    window: int | None = Field(None, ge=1)
    mask_token: int | None = Field(None, ge=0)
    markov_rank: int = Field(0, ge=0)
    markov: Literal["vanilla", "gated", "rnn", "selector"] = "vanilla"
    candidates: int | None = Field(None, ge=1, le=256)
    conv_taps: int = Field(0, ge=0, le=64)
    conv_group: int = Field(16, ge=1)
    confidence: bool = False
    confident_by_token: bool = False
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    context: int = Field(2048, ge=1)
    eps: float = Field(1e-6, gt=0, allow_inf_nan=False)
    attention_bias: bool = False
    own_embedding: bool = False
    own_output: bool = False
    embedding_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    logit_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    softcap: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits(self) -> BlockSizes:
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        if self.num_guesses < 1:
            raise ValueError("a block whose anchor guesses nothing has at least two rows")
        if self.mask_token is not None and self.mask_token >= self.vocab_size:
            raise ValueError(f"the mask token {self.mask_token} is none of {self.vocab_size}")
        if self.markov_rank < 1 and (self.markov != "vanilla" or self.confident_by_token):
            raise ValueError("a gate, a recurrence, a selector or a confidence by the token before needs a Markov head")
        if (self.candidates is None) is (self.markov == "selector"):
            raise ValueError("a selector takes from some candidates, and nothing else does")
        if (self.candidates or 0) > (self.draft_vocab_size or self.vocab_size):
            raise ValueError(f"a selector can't take from {self.candidates} tokens: the head knows fewer")
        if self.conv_taps and self.hidden_size % self.conv_group:
            raise ValueError("hidden_size must be a multiple of conv_group")
        return self

    @property
    def num_guesses(self) -> int:
        """The number of tokens that one pass guesses."""
        return self.block_size - (not self.anchor_first)


class BlockHead(nn.Module):
    """A few decoder layers over a block of rows: the anchor, which is the last token of the text, and rows of the mask.

    The rows attend to each other and to the target's hidden states at all tokens before the anchor. `context` makes one
    vector of these for each token; every layer takes its keys and values of it, as of its rows.

    Args:
        sizes: see there.

    Attributes:
        token_map: int64[draft_vocab_size], ascending: the target's ids for the logits of a head that knows fewer
            tokens, or None.
        mask_embedding: float32[hidden size], or None where a token of the target is the mask.
    """

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.sizes = sizes
        size, known = sizes.hidden_size, sizes.draft_vocab_size or sizes.vocab_size
        self.fc = nn.Linear(len(sizes.taps) * (sizes.target_hidden_size or size), size, bias=False)
        self.hidden_norm, self.norm = RMSNorm(size, sizes.eps), RMSNorm(size, sizes.eps)
        self.layers = nn.ModuleList(BlockLayer(sizes) for _ in range(sizes.num_layers))
        self.lm_head = nn.Linear(size, known, bias=False) if sizes.own_output else None
        self.embed_tokens = nn.Embedding(sizes.vocab_size, size) if sizes.own_embedding else None
        self.mask_embedding = nn.Parameter(torch.zeros(size)) if sizes.mask_token is None else None
        self.markov: Markov | None = PARTS[sizes.markov](sizes) if sizes.markov_rank else None
        width = size + sizes.markov_rank * sizes.confident_by_token
        self.confidence = nn.Linear(width, 1) if sizes.confidence else None
        self.rotary = rotary_of(sizes.rope, sizes.head_dim, sizes.context)
        self.token_map: torch.Tensor | None
        map_ = None if sizes.draft_vocab_size is None else torch.arange(sizes.draft_vocab_size)
        self.register_buffer("token_map", map_)
        self.float()  # whatever torch's default type is

    def context(self, states: torch.Tensor) -> torch.Tensor:
        """[..., hidden size], of the target's hidden states [..., taps x hidden size of the target]."""
        found: torch.Tensor = self.hidden_norm(self.fc(states))
        return found

    def keys_values(self, context: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each layer, the keys, turned, and the values [..., rows, KV heads, head_dim] of what `context` gave, at
        ``positions`` int64[..., rows]."""
        turn = self._turn(context, positions)
        pairs = [layer.keys_values(context) for layer in self._layers]
        return [(turn(keys), values) for keys, values in pairs]

    def embed(self, anchors: torch.Tensor, embedding: Layer) -> torch.Tensor:
        """[..., block size, hidden size], what goes into the rows of blocks with ``anchors`` int64[...].

        Args:
            embedding: the target's, for heads without one of their own.
        """
        own, scale = embedding if self.embed_tokens is None else self.embed_tokens, self.sizes.embedding_scale
        anchors = anchors[..., None]
        if self.mask_embedding is None:
            assert self.sizes.mask_token is not None
            masks = torch.full_like(anchors, self.sizes.mask_token).expand(
                *anchors.shape[:-1], self.sizes.block_size - 1
            )
            return own(torch.cat([anchors, masks], -1)) * scale
        first = own(anchors) * scale
        rest = self.mask_embedding.to(first.dtype).expand(*anchors.shape[:-1], self.sizes.block_size - 1, -1)
        return torch.cat([first, rest], -2)

    def forward(self, embedded: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The states of the rows that guess, [..., guesses, hidden size], after the last norm.

        Args:
            embedded: [..., block size, hidden size], see `embed`.
            positions: int64[..., block size], from the anchor's on.
            attend: given the number of a layer and its queries, keys and values [..., rows, heads, head_dim], turned,
                what the rows attend to, [..., rows, heads x head_dim].
        """
        turn = self._turn(embedded, positions)
        x: torch.Tensor = embedded
        for number, layer in enumerate(self._layers):
            x = layer(x, turn, lambda *parts, number=number: attend(number, *parts))
        x = self.norm(x)
        return x if self.sizes.anchor_first else x[..., 1:, :]

    def logits(self, states: torch.Tensor, output_layer: Layer) -> torch.Tensor:
        """[..., guesses, tokens that the head knows], of what `forward` gave, without what `Markov` adds.

        Args:
            output_layer: the target's, for heads without one of their own: for the tokens in `token_map` alone, if
                there is one.
        """
        found: torch.Tensor = (output_layer if self.lm_head is None else self.lm_head)(states)
        scale, cap = self.sizes.logit_scale, self.sizes.softcap
        found = found if scale == 1 else found * scale
        return found if cap is None else torch.tanh(found / cap) * cap

    def sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """bool[..., rows, keys]: whether rows of a block at positions ``queries`` int64[..., rows] see what is at
        positions ``keys`` int64[..., keys]: tokens before the anchor, and rows of the same block. None: they see all.
        """
        if not self.sizes.causal and self.sizes.window is None:
            return None
        away = queries[..., :, None] - keys[..., None, :]
        near = away.abs() < (self.sizes.window or self.sizes.context + self.sizes.block_size)
        return near & (away >= 0) if self.sizes.causal else near

    def confidences(self, states: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """[..., guesses], the logits of how probable it is that the guesses of rows with ``states`` [..., guesses,
        hidden size] are accepted if those before them are. ``before`` int64[..., guesses] are the tokens before."""
        assert self.confidence is not None
        if self.sizes.confident_by_token:
            assert self.markov is not None
            states = torch.cat([states, self.markov.first(before).to(states.dtype)], -1)
        found: torch.Tensor = self.confidence(states)[..., 0]
        return found

    @property
    def _layers(self) -> list[BlockLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> Layer:
        """Turns heads [..., rows, heads, head_dim] to ``positions`` int64[..., rows] (arXiv:2104.09864)."""
        cos, sin = (part.view(*positions.shape, 1, -1) for part in self.rotary(x, positions.reshape(1, -1)))
        half = self.sizes.head_dim // 2
        return lambda x: x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class BlockLayer(nn.Module):
    """One decoder layer, with norms of queries and keys, as Qwen3's; and, as in DFlash 2, convolutions around attention
    and MLP, if there are any."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        size, self.head_dim = sizes.hidden_size, sizes.head_dim
        wide, narrow = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(size, wide, sizes.attention_bias)
        self.kv_proj = nn.Linear(size, 2 * narrow, sizes.attention_bias)
        self.o_proj = nn.Linear(wide, size, sizes.attention_bias)
        self.q_norm, self.k_norm = RMSNorm(sizes.head_dim, sizes.eps), RMSNorm(sizes.head_dim, sizes.eps)
        self.gate_up = nn.Linear(size, 2 * sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, size, bias=False)
        self.input_layernorm = RMSNorm(size, sizes.eps)
        self.post_attention_layernorm = RMSNorm(size, sizes.eps)
        taps, group = sizes.conv_taps, sizes.conv_group
        self.around_attention, self.around_mlp = (Convolution(size, taps, group) if taps else Bare() for _ in range(2))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, not yet turned, and values [..., rows, KV heads, head_dim] of ``x`` [..., rows, hidden size]."""
        keys, values = self.kv_proj(x).unflatten(-1, (-1, self.head_dim)).chunk(2, -2)
        return self.k_norm(keys), values

    def forward(self, x: torch.Tensor, turn: Layer, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        """[..., rows, hidden size], of ``x`` of that size; see `BlockHead.forward`."""

        def attention(x: torch.Tensor) -> torch.Tensor:
            queries = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
            keys, values = self.keys_values(x)
            attended: torch.Tensor = self.o_proj(attend(turn(queries), turn(keys), values))
            return attended

        x = x + self.around_attention(self.input_layernorm(x), attention)
        made: torch.Tensor = x + self.around_mlp(self.post_attention_layernorm(x), self._mlp)
        return made

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        made: torch.Tensor = self.down_proj(silu(gate) * up)
        return made
