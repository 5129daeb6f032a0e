"""Tokens as they come, with the text that each makes certain."""

from __future__ import annotations

from dataclasses import dataclass

from tokentree.scheduler import Event
from tokentree.sequence import Sequence
from tokentree.text import Detokenizer


@dataclass(frozen=True)
class Piece:
    """One token of a stream.

    Args:
        text: the text that this token completed. It may be empty.
        token_id: None in a last piece that holds the rest of the text only.
        drafted: True for an accepted draft token, False for a bonus token.
    """

    text: str
    token_id: int | None
    drafted: bool


class Pieces:
    """Makes pieces of the events of one request. Text that a stop string may still cut off is held back.

    Args:
        seq: the request.
        detokenizer: None without a tokenizer; pieces have no text then.
    """

    def __init__(self, seq: Sequence, detokenizer: Detokenizer | None) -> None:
        self._seq, self._detokenizer = seq, detokenizer
        self._hold = 0 if detokenizer is None else detokenizer.held_back(seq.params.stop)
        self._held, self._shown = list[Piece](), 0

    def of(self, event: Event) -> list[Piece]:
        """The pieces that are certain with ``event``; all that is left, if it is the last one."""
        detokenizer, finished = self._detokenizer, event.finish_reason is not None
        for place, token in enumerate(event.tokens):
            text = detokenizer.push([token]) if detokenizer is not None else ""
            self._held.append(Piece(text, token, drafted=place < len(event.tokens) - 1))
        if finished and detokenizer is not None:
            self._held.append(Piece(detokenizer.finish(), None, drafted=False))
        limit = (len(detokenizer.text) if detokenizer is not None else 0) - self._hold
        if finished:
            limit = limit + self._hold if self._seq.text_end is None else self._seq.text_end
        certain = list[Piece]()
        while self._held and (self._shown + len(self._held[0].text) <= limit or finished):
            piece = self._held.pop(0)
            certain.append(Piece(piece.text[: max(0, limit - self._shown)], piece.token_id, piece.drafted))
            self._shown += len(piece.text)
        return certain
