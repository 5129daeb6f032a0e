"""What a token says of its successor: the Markov parts of block heads (DSpark, arXiv:2607.05147), and DFlash 2's
selector. All of them are tables of low rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from tokentree.heads.block import BlockSizes


class Markov(nn.Module):
    """What a token adds to the logits of its successor, whatever stands before it.

    A part says it in two steps: `told` gives a few numbers, by the token before, the state of the row that guesses, and
    what is remembered of the path to it; `after` makes logits of these.

    Args:
        sizes: of the head.

    Attributes:
        first: embeddings [vocab of the target, rank] of the token before.
        second: a linear layer from these numbers to [tokens that the head knows].
        remembered: how many numbers are remembered of a path.
    """

    remembered = 0

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.first = nn.Embedding(sizes.vocab_size, sizes.markov_rank)
        self.second = nn.Linear(sizes.markov_rank, sizes.draft_vocab_size or sizes.vocab_size, bias=False)

    def at_anchor(self, *shape: int) -> torch.Tensor:
        """[*shape, remembered], what is remembered where blocks begin."""
        return self.first.weight.new_zeros(*shape, self.remembered)

    def told(
        self, before: torch.Tensor, states: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers [..., rank] by which `after` makes logits, and what is remembered of the path from then on.

        Args:
            before: int64[...], the token before, in the target's ids.
            states: [..., hidden size], of the row that guesses the successor.
            memory: [..., remembered], of the path up to the row before.
        """
        told: torch.Tensor = self.first(before)
        return told, memory

    def told_along(self, before: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """[..., guesses, rank], what `told` gives along whole blocks.

        Args:
            before: int64[..., guesses], the tokens before, from the anchor on.
            states: [..., guesses, hidden size].
        """
        return self.told(before, states, self.at_anchor(*before.shape))[0]

    def after(self, logits: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """[..., tokens that the head knows], the logits of what follows, where the row by itself says ``logits`` of
        that size, and `told` gave ``told`` [..., rank]."""
        said: torch.Tensor = logits + self.second(told)
        return said

    def added(self, told: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """[..., n], what is added to the logits of the head's tokens ``numbers`` int64[..., n]."""
        return torch.einsum("...r,...nr->...n", told, self.second.weight[numbers])


class GatedMarkov(Markov):
    """The row's state weighs what a token says.

    Attributes:
        gate: a linear layer from the row's state and the token's numbers to weights of these.
    """

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__(sizes)
        self.gate = nn.Linear(sizes.hidden_size + sizes.markov_rank, sizes.markov_rank)

    def told(
        self, before: torch.Tensor, states: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        told = self.first(before)
        return torch.sigmoid(self.gate(torch.cat([states.to(told.dtype), told], -1))) * told, memory


class RecurrentMarkov(Markov):
    """All tokens of the path say something: a gated recurrence goes along it.

    Attributes:
        joint: a linear layer from what is remembered, the token's numbers and the row's state to three times as many
            numbers as are remembered: how much of each stays, what comes in its place, and what is told.
    """

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__(sizes)
        self.remembered = sizes.markov_rank
        self.joint = nn.Linear(2 * sizes.markov_rank + sizes.hidden_size, 3 * sizes.markov_rank)

    def told(
        self, before: torch.Tensor, states: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.first(before)
        stays, new, told = self.joint(torch.cat([memory, first, states.to(first.dtype)], -1)).chunk(3, -1)
        stays = torch.sigmoid(stays)
        return torch.tanh(told), stays * memory + (1 - stays) * torch.tanh(new)

    def told_along(self, before: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        memory, along = self.at_anchor(*before.shape[:-1]), list[torch.Tensor]()
        for place in range(before.shape[-1]):
            told, memory = self.told(before[..., place], states[..., place, :], memory)
            along.append(told)
        return torch.stack(along, -2)


class Selector(Markov):
    """DFlash 2's: it takes one of the few tokens that a row by itself finds most probable. The row's state weighs what
    the token before says of them.

    Attributes:
        count: how many tokens it takes from.
        weighing: a linear layer from the row's state to weights of the token's numbers.
    """

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__(sizes)
        assert sizes.candidates is not None
        self.count = sizes.candidates
        self.weighing = nn.Linear(sizes.hidden_size, sizes.markov_rank, bias=False)

    def told(
        self, before: torch.Tensor, states: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        told = self.first(before)
        return told * self.weighing(states.to(told.dtype)), memory

    def after(self, logits: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """See `Markov`; -inf for all tokens but those that it takes from."""
        numbers, scores = self.among(logits, told)
        return torch.full_like(logits, -torch.inf).scatter(-1, numbers, scores.to(logits.dtype))

    def among(self, logits: torch.Tensor, told: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that it takes from, by the head's own numbers int64[..., count], and their logits; see `after`."""
        best = logits.topk(self.count, dim=-1)
        return best.indices, best.values + self.added(told, best.indices)


PARTS: dict[str, type[Markov]] = {
    "vanilla": Markov,
    "gated": GatedMarkov,
    "rnn": RecurrentMarkov,
    "selector": Selector,
}
