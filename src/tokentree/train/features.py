"""What heads are trained on: the target's hidden states over texts, computed once and kept in files."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from tokentree.train.keeping import keep_tensors
from tokentree.train.progress import Phases

SHARD = 16  # texts in a file
PHASE = "reading the texts"
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
    reader: Reader, texts: Sequence[list[int]], folder: Path, places: Sequence[int], phases: Phases | None = None
) -> HiddenTexts:
    """The hidden states of ``texts`` at ``places``, beside one another, from ``folder`` as far as they are there, else
    computed and put there, some texts at a time: what was done before an interruption, or for other heads that read the
    same, is not done again. An accelerator reads faster than files are: there they are computed, and stay in its memory
    if they fit.

    Args:
        reader: what was computed by another one must not be in ``folder``.
        texts: a file that holds other ones, or is damaged, is made anew.

    Raises:
        OptionError: if a file can't be written.
    """
    phases, total = phases or Phases(Console(), shown=False), sum(map(len, texts))
    if reader.device.type != "cpu":
        with phases.phase(PHASE, total) as show:
            return _compute(reader, texts, places, show)
    shards = [_Shard(texts[first : first + SHARD]) for first in range(0, len(texts), SHARD)]
    names = [f"{number:05}.safetensors" for number in range(len(shards))]
    kept = [
        [shard.kept(folder / str(place) / name) for place in places] for shard, name in zip(shards, names, strict=True)
    ]
    done = sum(shard.tokens for shard, states in zip(shards, kept, strict=True) if all(x is not None for x in states))
    with phases.phase(PHASE, total, begun=done) as show:
        for shard, name, states in zip(shards, names, kept, strict=True):
            missing = [column for column, found in enumerate(states) if found is None]
            read = list[torch.Tensor]()
            for text in shard.texts if missing else ():
                read += reader.hidden_states_of([text], [places[column] for column in missing])
                done += len(text)
                show(done)
            fresh = torch.cat(read).chunk(len(missing), 1) if missing else ()
            for column, hidden in zip(missing, fresh, strict=True):
                states[column] = hidden.contiguous()
                shard.keep(folder / str(places[column]) / name, hidden.contiguous())
    lengths = torch.tensor([*map(len, texts)])
    every = torch.cat([torch.cat([x for x in states if x is not None], 1) for states in kept])
    return HiddenTexts(every, torch.tensor([*chain(*texts)]), lengths.cumsum(0).repeat_interleave(lengths))


class _Shard:
    """Some texts, whose hidden states at one place are one file."""

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self.texts, self.tokens = texts, sum(map(len, texts))
        self._ids, self._lengths = torch.tensor([*chain(*texts)]), torch.tensor([*map(len, texts)])

    def kept(self, file: Path) -> torch.Tensor | None:
        """The hidden states in ``file``, if it holds these texts and is as it was written."""
        try:
            content = load_file(file)
        except (OSError, SafetensorError):
            return None
        if content.keys() != {"ids", "lengths", "hidden", "check"}:
            return None
        hidden = content["hidden"]
        same = torch.equal(content["ids"], self._ids) and torch.equal(content["lengths"], self._lengths)
        return hidden if same and torch.equal(content["check"], _check(hidden)) else None

    def keep(self, file: Path, hidden: torch.Tensor) -> None:
        keep_tensors(file, {"ids": self._ids, "lengths": self._lengths, "hidden": hidden, "check": _check(hidden)})


def _check(hidden: torch.Tensor) -> torch.Tensor:
    """int64[1], a check sum."""
    return torch.tensor([zlib.crc32(hidden.flatten().view(torch.uint8).numpy().data)])


def _compute(
    reader: Reader, texts: Sequence[list[int]], places: Sequence[int], show: Callable[[int], None]
) -> HiddenTexts:
    lengths = torch.tensor([*map(len, texts)])
    ends, hidden = lengths.cumsum(0), torch.empty(0)
    done = 0
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
            done += len(states)
            show(done)
    return HiddenTexts(hidden, torch.tensor([*chain(*texts)]), ends.repeat_interleave(lengths))


def _room(row: torch.Tensor, count: int) -> torch.device:
    """Where so many rows as the first of ``row`` are kept."""
    if row.device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(row.device)
    return row.device if count * row.shape[1] * row.element_size() <= SHARE * free else torch.device("cpu")
