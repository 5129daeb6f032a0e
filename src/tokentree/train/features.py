"""What heads are trained on: the target's hidden states over texts, computed once and kept in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
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
        hidden: [tokens, hidden size], after the final norm.
        ids: int64[tokens].
        ends: int64[tokens]: for each token, where its text ends.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    ends: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

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
        texts: in the same order each time; those in finished shards are taken from there, so an iterator that skips
            nothing but is lazy costs what it takes to walk over them.
        advance: called with the number of tokens of each text that was read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rest, number = iter(texts), 0
    while shard := list(islice(rest, SHARD)):
        file = folder / f"{number:05}.safetensors"
        if not file.is_file():
            tensors = dict[str, list[torch.Tensor]](hidden=[], ids=[])
            for ids in shard:
                tensors["hidden"].append(reader.hidden_states(ids).cpu())
                tensors["ids"].append(torch.tensor(ids))
                advance(len(ids))
            lengths = torch.tensor([len(ids) for ids in shard])
            part = file.with_suffix(".part")
            save_file({name: torch.cat(parts) for name, parts in tensors.items()} | {"lengths": lengths}, part)
            part.replace(file)
        number += 1
    return read_features(folder)


def read_features(folder: Path) -> HiddenTexts:
    """What `keep_features` put into ``folder``."""
    shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    lengths = torch.cat([shard["lengths"] for shard in shards])
    ends = lengths.cumsum(0).repeat_interleave(lengths)
    return HiddenTexts(torch.cat([shard["hidden"] for shard in shards]), torch.cat([s["ids"] for s in shards]), ends)
