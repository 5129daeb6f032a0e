"""A tokenizer as llguidance reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tokentree.errors import OptionError
from tokentree.grammars.guide import Bits

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

END = "<|the end of a text under a grammar|>"  # a token of our own: which tokens end a text is a request's matter
CUT = b"\xff"  # is in no UTF-8
# what a grammar in Lark has; a name stands for a token if it isn't in a text, an expression or a comment
LARK = re.compile(r'"(?:\\.|[^"\\\n])*"|(?://|#)[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<name><[^<>"\s]+>)')
NOTHING = b"(?!)"


class Tokens:
    """The tokens of a tokenizer, and one more that ends texts.

    Args:
        spelled: they, and how texts are split into them.
        hidden: uint8, a bit for each token that a text is shown without, though it stands for bytes.
        names: added tokens that stand for text, by how a grammar in Lark may name them: ``<…>``.

    Attributes:
        end: the id of `END`.
        texts: an `LLTokenizer` for which these tokens are the text that they stand for.
    """

    def __init__(self, spelled: Spelled, hidden: Bits, names: dict[str, int]) -> None:
        self._spelled, self.hidden, self._names, self.end = spelled, hidden, names, spelled.eos_token_id
        self.texts = spelled.view(names.values())

    @cached_property
    def _named(self) -> LLTokenizer:
        """The same for grammars that name such a token: llguidance knows names of special tokens alone."""
        return self._spelled.view(())

    def of(self, kind: str, grammar: str) -> LLTokenizer:
        """As which tokens a ``grammar`` sees them."""
        named = kind == "lark" and any(found["name"] in self._names for found in LARK.finditer(grammar))
        return self._named if named else self.texts


def read(tokenizer: PreTrainedTokenizerBase | None) -> Tokens:
    """The tokens of ``tokenizer``.

    Raises:
        OptionError: if there is none, or it isn't one whose tokens are known as bytes; if llguidance isn't installed.
    """
    if tokenizer is None:
        raise OptionError("structured_outputs needs a tokenizer: this model came without one, pass tokenizer=")
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise OptionError("structured_outputs needs llguidance: pip install 'tokentree[grammar]'") from None
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise OptionError(f"structured_outputs needs a fast tokenizer, and {type(tokenizer).__name__} is none")
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_padding()
    backend.no_truncation()
    known = set(backend.get_vocab().values())
    backend.add_special_tokens([END])
    end = backend.token_to_id(END)
    if end is None or end in known:
        raise OptionError("structured_outputs can't be used with this tokenizer: its token ids have gaps")
    try:
        whole = LLTokenizer(backend.to_str(), eos_token=end, slices=[])
    except ValueError as error:
        said = str(error).strip().splitlines()[0]
        raise OptionError(f"structured_outputs can't be used with this tokenizer: {said}") from None
    texts = {entry.content: token for token, entry in tokenizer.added_tokens_decoder.items() if not entry.special}
    names = {name: token for name, token in texts.items() if whole.is_special_token(token)}
    odd = [token for token in tokenizer.all_special_ids if token < end and not whole.is_special_token(token)]
    flags = np.zeros(-(-whole.vocab_size // 32) * 32, bool)
    flags[odd] = True
    return Tokens(Spelled(whole, end), np.packbits(flags, bitorder="little"), names)


class Spelled:
    """What llguidance asks of a tokenizer. By itself it would take added tokens of the form ``<…>`` for special ones,
    and a text that spells a special token out for that token.

    Args:
        whole: the tokens, as llguidance takes them by itself.
        end: the token that ends texts.
    """

    bos_token_id = None

    def __init__(self, whole: LLTokenizer, end: int) -> None:
        self._whole, self.eos_token_id = whole, end
        ids = range(whole.vocab_size)
        self.tokens = [whole.decode_bytes([token]) for token in ids]
        self.special_token_ids = [token for token in ids if whole.is_special_token(token)]
        self._names = _any_of(self.tokens[token] for token in self.special_token_ids)

    def view(self, texts: Iterable[int]) -> LLTokenizer:
        """The tokens, where ``texts`` aren't special."""
        from llguidance import LLTokenizer, TokenizerWrapper

        view, known = copy(self), set(texts)
        view.special_token_ids = [token for token in self.special_token_ids if token not in known]
        view._names = _any_of(self.tokens[token] for token in view.special_token_ids)
        return LLTokenizer(TokenizerWrapper(view), eos_token=self.eos_token_id)

    def __call__(self, text: bytes | str) -> list[int]:
        """A text in tokens. A special token that it spells out is cut behind its first byte, so that it stays text."""
        text = text if isinstance(text, bytes) else text.encode()
        cut = self._names.sub(lambda name: name[0][:1] + CUT + name[0][1:], text)
        return [token for part in cut.split(CUT) for token in self._whole.tokenize_bytes(part)]


def _any_of(names: Iterable[bytes]) -> re.Pattern[bytes]:
    """An expression for each of ``names`` that has several bytes."""
    longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile(b"|".join(map(re.escape, longest_first)) or NOTHING)
