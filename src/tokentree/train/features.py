"""What heads are trained on: the target's hidden states over texts, computed once and kept in files."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from tokentree.train.keeping import keep_tensors
from tokentree.train.progress import Phases
from tokentree.train.texts import OTHER, Texts

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
        answers: bool[tokens], whether heads learn to name a token: whether the model wrote it; None: all of them.
        kinds: of each text; empty: they are of one kind.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    ends: torch.Tensor
    answers: torch.Tensor | None = None
    kinds: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def spans(self) -> list[tuple[int, int]]:
        """Per text, its first token, and the one behind its last."""
        ends = torch.unique_consecutive(self.ends).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def labels(self, places: torch.Tensor, num_heads: int) -> torch.Tensor:
        """int64[num_heads, len(places)]: the token that each head should name at each of ``places`` (head k, k + 2
        tokens on), -100 behind the end of a text, and where it is none that they learn."""
        ahead = places[None] + torch.arange(2, num_heads + 2)[:, None]
        there, ahead = ahead < self.ends[places], ahead.clamp(max=len(self.ids) - 1)
        if self.answers is not None:
            there &= self.answers[ahead]
        return torch.where(there, self.ids[ahead], -100)

    def kinds_of(self) -> list[str]:
        """The kind of each text."""
        return [*self.kinds] or [OTHER] * len(self.spans())

    def split(self, count: int) -> tuple[HiddenTexts, HiddenTexts]:
        """The first ``count`` texts, and the others."""
        at = self.spans()[count][0]
        one, other = slice(None, at), slice(at, None)
        answers = (None, None) if self.answers is None else (self.answers[one], self.answers[other])
        return (
            HiddenTexts(self.hidden[one], self.ids[one], self.ends[one], answers[0], self.kinds[:count]),
            HiddenTexts(self.hidden[other], self.ids[other], self.ends[other] - at, answers[1], self.kinds[count:]),
        )


def read_parts(
    reader: Reader, texts: Texts, folder: Path, places: Sequence[int], held_back: float, phases: Phases
) -> tuple[HiddenTexts, HiddenTexts]:  # fmt: skip
    """The hidden states of the texts that are trained on, and of those that are held back; see `keep_features`."""
    last = texts.held_back(held_back)
    order = [*sorted({*range(len(texts.texts))} - {*last}), *last]
    read = keep_features(reader, texts.ids, folder, places, phases, order)
    answers = torch.zeros(len(read), dtype=torch.bool)
    for (first, end), number in zip(read.spans(), order, strict=True):
        for start, stop in ((0, end - first),) if (text := texts.texts[number]).answers is None else text.answers:
            answers[first + start : first + stop] = True
    kinds = tuple(texts.texts[number].kind for number in order)
    return replace(read, answers=answers, kinds=kinds).split(len(order) - len(last))


def keep_features(
    reader: Reader, texts: Sequence[list[int]], folder: Path, places: Sequence[int], phases: Phases | None = None,
    order: Sequence[int] | None = None,
) -> HiddenTexts:  # fmt: skip
    """The hidden states of ``texts`` at ``places``, beside one another, from ``folder`` as far as they are there, else
    computed and put there, some texts at a time: what was done before an interruption, or for other heads that read the
    same, is not done again. An accelerator reads faster than files are: there they are computed, and stay in its memory
    if they fit.

    Args:
        reader: what was computed by another one must not be in ``folder``.
        texts: a file that holds other ones, or is damaged, is made anew.
        order: in which they lie behind one another in what is returned; files don't depend on it.

    Raises:
        OptionError: if a file can't be written.
    """
    phases, total = phases or Phases(Console(), shown=False), sum(map(len, texts))
    room = _Room(texts, order or range(len(texts)))
    if reader.device.type != "cpu":
        with phases.phase(PHASE, total) as show:
            _compute(reader, texts, places, room, show)
        return room.filled()
    missing, done = list[tuple[int, list[torch.Tensor | None]]](), 0
    shards = [_Shard(texts[first : first + SHARD]) for first in range(0, len(texts), SHARD)]
    for number, shard in enumerate(shards):
        kept = [shard.kept(_file(folder, place, number)) for place in places]
        there = [states for states in kept if states is not None]
        if len(there) < len(places):
            missing.append((number, kept))
        else:
            room.put(number * SHARD, torch.cat(there, 1), shard.lengths)
            done += shard.tokens
    with phases.phase(PHASE, total, begun=done) as show:
        for number, states in missing:
            shard, read = shards[number], list[torch.Tensor]()
            columns = [column for column, found in enumerate(states) if found is None]
            for text in shard.texts:
                read += reader.hidden_states_of([text], [places[column] for column in columns])
                done += len(text)
                show(done)
            for column, hidden in zip(columns, torch.cat(read).chunk(len(columns), 1), strict=True):
                states[column] = hidden.contiguous()
                shard.keep(_file(folder, places[column], number), hidden.contiguous())
            room.put(number * SHARD, torch.cat([x for x in states if x is not None], 1), shard.lengths)
    return room.filled()


def _file(folder: Path, place: int, shard: int) -> Path:
    return folder / str(place) / f"{shard:05}.safetensors"


class _Room:
    """Memory for the hidden states of all texts, as soon as their type is known.

    Args:
        order: of the texts in it.
    """

    def __init__(self, texts: Sequence[list[int]], order: Sequence[int]) -> None:
        lengths = torch.tensor([len(texts[number]) for number in order])
        ends = lengths.cumsum(0)
        self._ids = torch.tensor([token for number in order for token in texts[number]])
        self._ends = ends.repeat_interleave(lengths)
        self._starts = dict(zip(order, (ends - lengths).tolist(), strict=True))
        self._hidden: torch.Tensor | None = None

    def put(self, number: int, states: torch.Tensor, lengths: Sequence[int]) -> None:
        """The hidden states of texts from ``number`` on, of these lengths, behind one another."""
        if self._hidden is None:
            count, width = len(self._ids), states.shape[1]
            self._hidden = torch.empty(count, width, dtype=states.dtype, device=_device_for(states, count))
        for text, part in enumerate(states.split([*lengths]), start=number):
            self._hidden[self._starts[text] : self._starts[text] + len(part)] = part

    def filled(self) -> HiddenTexts:
        assert self._hidden is not None
        return HiddenTexts(self._hidden, self._ids, self._ends)


class _Shard:
    """Some texts, whose hidden states at one place are one file."""

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self.texts, self.tokens, self.lengths = texts, sum(map(len, texts)), [*map(len, texts)]
        self._ids, self._lengths = torch.tensor([*chain(*texts)]), torch.tensor(self.lengths)

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
    reader: Reader, texts: Sequence[list[int]], places: Sequence[int], room: _Room, show: Callable[[int], None]
) -> None:
    done, order, start = 0, sorted(range(len(texts)), key=lambda number: len(texts[number])), 0
    while start < len(order):  # texts of about one length
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(texts[order[end]]) <= PACK:
            end += 1
        pack, start = order[start:end], end
        read = reader.hidden_states_of([texts[number] for number in pack], places)
        for number, states in zip(pack, read, strict=True):
            room.put(number, states, [len(states)])
            done += len(states)
            show(done)


def _device_for(row: torch.Tensor, count: int) -> torch.device:
    """Where so many rows as the first of ``row`` are kept."""
    if row.device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(row.device)
    return row.device if count * row.shape[1] * row.element_size() <= SHARE * free else torch.device("cpu")
