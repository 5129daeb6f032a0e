"""Block heads with random weights, for tiny models."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_models import CONTEXT, VOCAB
from tokentree.heads.block import BlockHead, BlockSizes
from tokentree.heads.markov import GatedMarkov, RecurrentMarkov, Selector

# what published forms of heads differ in
FORMS: dict[str, dict[str, Any]] = {
    "dflash": {"mask_token": 3},
    "jetspec": {"mask_token": 3, "causal": True},
    "window": {"mask_token": 3, "causal": True, "window": 4},
    "dspark": {"anchor_first": True, "mask_token": 3, "markov_rank": 6},
    "gated": {
        "anchor_first": True, "mask_token": 3, "markov_rank": 6, "markov": "gated", "confidence": True,
        "confident_by_token": True,
    },
    "rnn": {"anchor_first": True, "mask_token": 3, "markov_rank": 6, "markov": "rnn"},
    "dflash2": {
        "mask_token": 3, "window": 9, "markov_rank": 6, "markov": "selector", "candidates": 5, "conv_taps": 2,
        "conv_group": 16, "embedding_scale": 1.5, "logit_scale": 0.75, "softcap": 9.0,
    },
    "own mask": {"anchor_first": True, "markov_rank": 4, "confidence": True},
    "few tokens": {"mask_token": 3, "draft_vocab_size": 60, "own_output": True, "own_embedding": True},
    "shared output": {"anchor_first": True, "markov_rank": 4, "draft_vocab_size": 60},
}  # fmt: skip


def some_block(form: str = "dflash", seed: int = 0, **sizes: Any) -> BlockHead:
    """A head of that form; ``sizes`` are others than the tiny models'."""
    made = BlockHead(
        BlockSizes(**{
            "hidden_size": 48, "intermediate_size": 80, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
            "head_dim": 16, "vocab_size": VOCAB, "taps": (0, 1), "block_size": 4, "context": CONTEXT,
        } | FORMS[form] | sizes)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for weight in made.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=1.5 / weight.shape[1] ** 0.5, generator=generator)
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
    if made.token_map is not None:
        known = len(made.token_map)
        made.token_map = torch.randperm(made.sizes.vocab_size, generator=generator)[:known].sort().values
    return made.requires_grad_(False)


@torch.no_grad()
def said_after(head: BlockHead, states: torch.Tensor, logits: torch.Tensor, path: list[int]) -> torch.Tensor:
    """The logits [known tokens] of the token behind ``path``, from the anchor on, by the papers' formulas, all computed
    anew. ``states`` [guesses, hidden size] and ``logits`` [guesses, known tokens] are what the head says of each place
    by itself."""
    markov, place = head.markov, len(path) - 1
    state, row = states[place], logits[place]
    if markov is None:
        return row
    first, second = markov.first.weight, markov.second.weight
    if isinstance(markov, Selector):
        said = torch.full_like(row, -torch.inf)
        for token in row.sort(descending=True).indices[: head.sizes.candidates].tolist():
            pair = sum(first[path[-1]] * (markov.weighing.weight @ state) * second[token])
            said[token] = row[token] + pair
        return said
    if isinstance(markov, RecurrentMarkov):
        memory, told = torch.zeros(head.sizes.markov_rank), torch.zeros(0)
        for token, own in zip(path, states, strict=False):
            joint = markov.joint(torch.cat([memory, first[token], own]))
            stays, new, told = joint.split(head.sizes.markov_rank)
            memory = stays.sigmoid() * memory + (1 - stays.sigmoid()) * new.tanh()
        return row + second @ told.tanh()
    told = first[path[-1]]
    if isinstance(markov, GatedMarkov):
        told = markov.gate(torch.cat([state, told])).sigmoid() * told
    return row + second @ told
