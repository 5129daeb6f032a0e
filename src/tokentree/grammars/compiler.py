"""Grammars compiled for a tokenizer, by llguidance."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokentree.errors import OptionError
from tokentree.grammars.guide import Beginning, Guide
from tokentree.grammars.options import StructuredOutputs
from tokentree.grammars.tokens import Tokens, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = 64  # compiled grammars
KEPT_CHARS = 1 << 17  # of these, together; one takes up to 2 kB of memory for each character
# llguidance's limits on compiling, and on a step: a grammar takes 0.6 s, and what is ambiguous a few ms a node
LEXER_FUEL, STEP_ITEMS = 1 << 16, 10_000
NAMES = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar"}


class Grammars:
    """The grammars of one tokenizer. Each is compiled once and kept, the latest `KEPT`, of `KEPT_CHARS` at most. Any
    thread may ask for one.

    Args:
        tokenizer: None where a model came without one. It is read when the first grammar is asked for, which takes
            0.5 seconds for 49,000 tokens, and 2 for 152,000.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._kept = OrderedDict[tuple[str, str], Beginning]()
        self._tokens: Tokens | None = None

    def guide(self, wanted: StructuredOutputs, eos_ids: frozenset[int], stop_ids: Sequence[int] = ()) -> Guide:
        """A new guide of a text.

        Args:
            eos_ids: tokens that end a text.
            stop_ids: further ones. Those that stand for text come where the grammar has that text.

        Raises:
            OptionError: if the grammar can't be compiled, allows no text, or llguidance isn't installed; if there is no
                tokenizer, or one whose tokens aren't known as bytes.
        """
        with self._lock:
            tokens = self._read()
            key = wanted.source
            if key not in self._kept or self._kept[key].worn:
                self._kept[key] = Beginning(_compiled(*key, tokens))
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT or (self._chars > KEPT_CHARS and len(self._kept) > 1):
                self._kept.popitem(last=False)
            ends = eos_ids | {
                token for token in stop_ids if token < tokens.end and tokens.texts.is_special_token(token)
            }
            return Guide(self._kept[key], ends, tokens.end, tokens.hidden)

    @property
    def _chars(self) -> int:
        return sum(len(text) for _, text in self._kept)

    def prepare(self) -> None:
        """Reads the tokenizer, if that wasn't done.

        Raises:
            OptionError: as `guide`.
        """
        with self._lock:
            self._read()

    def _read(self) -> Tokens:
        if self._tokens is None:
            self._tokens = read(self._tokenizer)
        return self._tokens


def _compiled(kind: str, text: str, tokens: Tokens) -> Any:
    """An `LLMatcher` at the beginning of a text, which is copied for each text."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        if kind == "json":
            # as Python's json.dumps writes it, so that all that isn't content is certain
            grammar = LLMatcher.grammar_from_json_schema(
                text, defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            )
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        elif text.lstrip()[:1] in ("{", "["):  # llguidance would take it for a format of its own
            raise ValueError("Lark begins with a rule")
        else:
            grammar = LLMatcher.grammar_from_lark(text)
    except ValueError as error:
        raise OptionError(_told(kind, str(error))) from None
    limits = LLParserLimits(verbose_errors=False, initial_lexer_fuel=LEXER_FUEL, step_max_items=STEP_ITEMS)
    matcher = LLMatcher(tokens.of(kind, text), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        first = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error() or not first.any():
            raise OptionError(f"structured_outputs: the {NAMES[kind]} allows no text that this model can write")
    if matcher.is_error():
        raise OptionError(_told(kind, matcher.get_error()))
    return matcher


def _told(kind: str, said: str) -> str:
    """What is wrong with a grammar, in one line."""
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()]
    if any("lexer precomputation" in line or "too big" in line for line in lines):
        return f"structured_outputs: the {NAMES[kind]} can't be compiled: it is too large"
    reason = next((line for line in reversed(lines) if line.startswith("error:")), lines[0] if lines else "unknown")
    return f"structured_outputs: the {NAMES[kind]} can't be compiled: {reason.removeprefix('error:').strip()[:300]}"
