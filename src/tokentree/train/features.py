"""What heads are trained on: the target's hidden states over texts, computed once and kept in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

SHARD = 64  # texts in a file
PACK = 1 << 15  # tokens that an accelerator reads at once
SHARE = 0.6  # of an accelerator's free memory that hidden states may take


class Reader(Protocol):
    """An engine that gives the hidden states of texts at several places, beside one another."""

    device: torch.device

    def hidden_states_of(self, texts: Sequence[Sequence[int]], places: Sequence[int]) -> list[torch.Tensor]: ...


@dataclass(frozen=True, eq=False)
class HiddenTexts:
    """Texts behind one another.

    Args:
        hidden: [tokens, width], what heads read of them: one of the target's hidden states, or several. They may be on
            an accelerator.
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
    reader: Reader, texts: Sequence[list[int]], folder: Path, places: Sequence[int],
    advance: Callable[[int], None] = lambda tokens: None,
) -> HiddenTexts:  # fmt: skip
    """The hidden states of ``texts`` at ``places``, beside one another, from ``folder`` as far as they are there, else
    computed and put there, some texts at a time: what was done before an interruption, or for other heads that read the
    same, is not done again. An accelerator reads faster than files are: there they are computed, and stay in its memory
    if they fit.

    Args:
        reader: what was computed by another one must not be in ``folder``.
        texts: a file that holds other ones is made anew.
        advance: called with the number of tokens of each text that was read.
    """
    if reader.device.type != "cpu":
        return _compute(reader, texts, places, advance)
    shards = [texts[first : first + SHARD] for first in range(0, len(texts), SHARD)]
    columns = [list[torch.Tensor]() for _ in places]
    for number, shard in enumerate(shards):
        files = [folder / str(place) / f"{number:05}.safetensors" for place in places]
        ids, lengths = torch.tensor([*chain(*shard)]), torch.tensor([*map(len, shard)])
        kept = [_kept(file, ids, lengths) for file in files]
        missing = [place for place, states in zip(places, kept, strict=True) if states is None]
        read = list[torch.Tensor]()
        for text in shard if missing else ():
            read += reader.hidden_states_of([text], missing)
            advance(len(text))
        fresh = iter(torch.cat(read).chunk(len(missing), 1) if missing else ())
        for file, states, column in zip(files, kept, columns, strict=True):
            if states is None:
                column.append(next(fresh).contiguous())
                _keep(file, {"ids": ids, "lengths": lengths, "hidden": column[-1]})
            else:
                column.append(states)
    lengths = torch.tensor([*map(len, texts)])
    hidden = torch.cat([torch.cat(parts, 1) for parts in zip(*columns, strict=True)])
    return HiddenTexts(hidden, torch.tensor([*chain(*texts)]), lengths.cumsum(0).repeat_interleave(lengths))


def _compute(
    reader: Reader, texts: Sequence[list[int]], places: Sequence[int], advance: Callable[[int], None]
) -> HiddenTexts:
    lengths = torch.tensor([*map(len, texts)])
    ends, hidden = lengths.cumsum(0), torch.empty(0)
    order, start = sorted(range(len(texts)), key=lambda number: len(texts[number])), 0
    while start < len(order):  # texts of about one length
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(texts[order[end]]) <= PACK:
            end += 1
        pack, start = order[start:end], end
        read = reader.hidden_states_of([texts[number] for number in pack], places)
        if not len(hidden):
            hidden = torch.empty(
                int(ends[-1]), read[0].shape[1], dtype=read[0].dtype, device=_room(read[0], int(ends[-1]))
            )
        for number, states in zip(pack, read, strict=True):
            hidden[int(ends[number]) - len(states) : int(ends[number])] = states
            advance(len(states))
    return HiddenTexts(hidden, torch.tensor([*chain(*texts)]), ends.repeat_interleave(lengths))


def _room(row: torch.Tensor, count: int) -> torch.device:
    """Where so many rows as the first of ``row`` are kept."""
    if row.device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(row.device)
    return row.device if count * row.shape[1] * row.element_size() <= SHARE * free else torch.device("cpu")


def _kept(file: Path, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor | None:
    """The hidden states in ``file``, if it holds these texts."""
    if not file.is_file():
        return None
    content = load_file(file)
    same = torch.equal(content["ids"], ids) and torch.equal(content["lengths"], lengths)
    return content["hidden"] if same else None


def _keep(file: Path, content: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file(content, part)
    part.replace(file)
