"""Texts to token ids and back, with a tokenizer or without one."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from tokentree.chat import chat_ids
from tokentree.errors import PromptError
from tokentree.inputs import Chat, Prompt, Read, read_prompt
from tokentree.text import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vocabulary:
    """The tokens of a model.

    Args:
        tokenizer: None where a model came without one; then only token ids can be read.
        size: how many tokens there are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size

    def ids(self, prompt: Prompt | Read, what: str) -> list[int]:
        """The token ids of a prompt or a reference; ``what`` says which, for errors.

        Raises:
            PromptError: if it is empty, needs a tokenizer that isn't there, or has a token that there isn't.
        """
        read = prompt if isinstance(prompt, Chat) else read_prompt(prompt, what)
        if not read:
            raise PromptError(f"the {what} is empty: give at least one token")
        if isinstance(read, Chat):
            ids = chat_ids(self._tokenizer, read.messages)
        elif isinstance(read, str):
            if self._tokenizer is None:
                raise PromptError("this model came without a tokenizer: give token ids, or pass tokenizer=")
            ids = self._tokenizer(read).input_ids
        else:
            ids = read
        if any(not 0 <= token < self._size for token in ids):
            raise PromptError(f"a token id of the {what} is outside the vocabulary of {self._size}")
        return ids

    @cached_property
    def _special(self) -> dict[int, str]:
        """The tokens that a text is shown without, and how they are written."""
        tokenizer = self._tokenizer
        assert tokenizer is not None
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        hidden = (
            t for t in {*added, *tokenizer.all_special_ids} if not tokenizer.decode([t], skip_special_tokens=True)
        )
        return {token: written for token in hidden if (written := str(tokenizer.decode([token])))}

    @cached_property
    def _raw(self) -> frozenset[int]:
        """The tokens that stand for a byte each, in tokenizers that have such beside pieces of text."""
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        known = self._tokenizer.get_vocab() if self._tokenizer is not None else {}
        return frozenset(known[name] for name in names if name in known)

    def detokenizer(self, exact: bool = False) -> Detokenizer:
        """See `LLM.detokenizer`.

        Raises:
            PromptError: without a tokenizer.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise PromptError("this model came without a tokenizer: pass tokenizer=")
        raw = self._raw if exact else frozenset()
        return Detokenizer(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), self._special, raw)
