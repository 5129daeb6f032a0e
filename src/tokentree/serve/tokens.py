"""What single tokens are called."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # what stands for a part of a character


def _byte_letters() -> dict[str, int]:
    """The letters by which tokenizers of bytes (GPT-2's and later ones) write bytes: those that can be printed stand
    for themselves, and the others follow from U+0100 on (Radford et al. 2019)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenTexts:
    """Texts and bytes of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._letters = _byte_letters()
        self.text = lru_cache(1 << 16)(self._text)

    @cached_property
    def special(self) -> dict[str, int]:
        """How special tokens are written, and their ids."""
        known = self._tokenizer.added_tokens_decoder.items()
        return {entry.content: token for token, entry in known if entry.special}

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token behind which others are decoded, as some tokenizers drop a text's first space."""
        ids = list(self._tokenizer("a", add_special_tokens=False).input_ids)[-1:]
        return ids, str(self._tokenizer.decode(ids))

    def _text(self, token: int) -> str:
        ids, before = self._anchor
        whole = str(self._tokenizer.decode([*ids, token], skip_special_tokens=False))
        return whole[len(before) :] if whole.startswith(before) else str(self._tokenizer.decode([token]))

    def bytes(self, token: int) -> list[int]:
        """The bytes of a token, which may be a part of a character."""
        text = self.text(token)
        if HALF not in text:
            return list(text.encode())
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return list(text.encode())
        if len(piece) == 6 and piece.startswith("<0x"):
            return [int(piece[3:5], 16)]
        known = [self._letters.get(letter) for letter in piece]
        return [byte for byte in known if byte is not None] if None not in known else list(text.encode())
