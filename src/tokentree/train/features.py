"""What heads are trained on: the target's hidden states over texts, computed once and kept in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

SHARD = 64  # texts in a file


class Reader(Protocol):
    """An engine that gives the hidden states of a text."""

    def hidden_states(self, ids: Sequence[int]) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class HiddenTexts:
    """Texts behind one another.

    Args:
        hidden: [tokens, width], what heads read of them: one of the target's hidden states, or several.
        ids: int64[tokens].
        ends: int64[tokens]: for each token, where its text ends.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    ends: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def spans(self) -> list[tuple[int, int]]:
        """Per text, its first token, and the one behind its last."""
        ends = torch.unique_consecutive(self.ends).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def labels(self, places: torch.Tensor, num_heads: int) -> torch.Tensor:
        """int64[num_heads, len(places)]: the token that each head should name at each of ``places`` (head k, k + 2
        tokens on), -100 behind the end of a text."""
        ahead = places[None] + torch.arange(2, num_heads + 2)[:, None]
        return torch.where(ahead < self.ends[places], self.ids[ahead.clamp(max=len(self.ids) - 1)], -100)

    def split(self, held_back: float) -> tuple[HiddenTexts, HiddenTexts]:
        """The first texts, and the last ones, which have about this share of all tokens."""
        at = int(len(self) * (1 - held_back))
        at = int(self.ends[min(at, len(self) - 1)])
        if at == len(self):  # the last text is longer than the share
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.ends[:-1][self.ends.diff() > 0]])
            at = int(starts[-1])
        first = HiddenTexts(self.hidden[:at], self.ids[:at], self.ends[:at])
        return first, HiddenTexts(self.hidden[at:], self.ids[at:], self.ends[at:] - at)


def keep_features(
    reader: Reader, texts: Iterable[list[int]], folder: Path, advance: Callable[[int], None] = lambda tokens: None
) -> HiddenTexts:
    """The hidden states of ``texts``, from ``folder`` as far as they are there, else computed and put there, a shard at
    a time: what was done before an interruption is not done again.

    Args:
        texts: a shard that holds other ones is made anew.
        advance: called with the number of tokens of each text that was read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rest, shards = iter(texts), list[dict[str, torch.Tensor]]()
    while texts := list(islice(rest, SHARD)):
        file = folder / f"{len(shards):05}.safetensors"
        wanted = {"ids": torch.tensor([*chain(*texts)]), "lengths": torch.tensor([*map(len, texts)])}
        kept = load_file(file) if file.is_file() else {}
        if not all(name in kept and torch.equal(kept[name], value) for name, value in wanted.items()):
            hidden = list[torch.Tensor]()
            for text in texts:
                hidden.append(reader.hidden_states(text).cpu())
                advance(len(text))
            kept, part = wanted | {"hidden": torch.cat(hidden)}, file.with_suffix(".part")
            save_file(kept, part)
            part.replace(file)
        shards.append(kept)
    ids, lengths, states = (torch.cat([shard[name] for shard in shards]) for name in ("ids", "lengths", "hidden"))
    return HiddenTexts(states, ids, lengths.cumsum(0).repeat_interleave(lengths))
