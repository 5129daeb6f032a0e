"""Tokens become the same text a few at a time as all at once, whatever a tokenizer does with spaces and bytes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.strategies import numbers
from tests.tiny_models import tiny_tokenizer
from tokentree.text import Detokenizer

SPECIAL = ["<s>", "</s>", "<|x|>"]


def _pieces() -> dict[str, int]:
    """A vocabulary as sentencepiece's are: special tokens, bytes, and pieces of words."""
    words = ["▁", "▁a", "▁the", "b", "▁▁", "ing", "▁ñ", "漢", "\n", ".", "▁.", "'s", "▁'", "\ufffd", "x▁y", "▁é"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return {name: i for i, name in enumerate(names)}


def _sentencepiece(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(_pieces(), [], byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL)
    if kind == "llama":
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "gemma":
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


TOKENIZERS = {kind: _sentencepiece(kind) for kind in ("llama", "gemma", "metaspace")}
TOKENIZERS["bytes"] = tiny_tokenizer().backend_tokenizer


def _specials(tokenizer: Tokenizer) -> dict[int, str]:
    return {token: entry.content for token, entry in tokenizer.get_added_tokens_decoder().items() if entry.special}


def _some_ids(tokenizer: Tokenizer, seed: int, length: int) -> list[int]:
    """Tokens of any kind, those of bytes often in an order that makes characters."""
    draw, ids = random.Random(seed), list[int]()
    while len(ids) < length:
        text = "".join(draw.choices("añ漢🌳 \n", k=draw.randint(1, 3)))
        if draw.random() < 0.4:
            ids += tokenizer.encode(text, add_special_tokens=False).ids[: draw.randint(1, 6)]
        ids.append(draw.randrange(tokenizer.get_vocab_size()))
        if draw.random() < 0.2:
            ids.append(draw.choice([*_specials(tokenizer)]))
    return ids[:length]


@pytest.mark.parametrize(
    ("kind", "known"), [*((kind, True) for kind in TOKENIZERS), ("metaspace", False), ("bytes", False)]
)
@given(seed=numbers, length=st.integers(0, 24), steps=st.integers(1, 4))
def test_pieces_join_to_what_all_tokens_decode_to(kind: str, known: bool, seed: int, length: int, steps: int) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = _some_ids(tokenizer, seed, length)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    vocab = tokenizer.get_vocab()
    raw = frozenset(vocab[f"<0x{byte:02X}>"] for byte in range(256) if f"<0x{byte:02X}>" in vocab)
    detokenizer = Detokenizer(tokenizer.decode, _specials(tokenizer) if known else None, raw)
    pieces = [detokenizer.push(ids[start : start + steps]) for start in range(0, length, steps)]
    pieces.append(detokenizer.copy().finish())
    assert "".join(pieces) == whole
    detokenizer.finish()
    assert detokenizer.text == whole
    marked = detokenizer.marked
    if known:
        for name in SPECIAL if kind != "bytes" else _specials(tokenizer).values():
            assert marked.count(name) == sum(tokenizer.id_to_token(token) == name for token in ids)
            marked = marked.replace(name, "")
    assert marked == whole


def test_what_is_held_back_is_no_more_than_a_stop_string_may_need() -> None:
    detokenizer = Detokenizer(lambda ids: "", {7: "<|x|>"})
    assert detokenizer.held_back([]) == 0
    assert detokenizer.held_back(["abc"]) == 2
    assert detokenizer.held_back(["<|x|>"]) == 0
    assert detokenizer.held_back(["ab<|x|>"]) == 2
    assert detokenizer.held_back(["<|x|>abc<|x|>", "a"]) == 3


def test_a_long_run_of_tokens_without_text_is_read_once_each() -> None:
    """Each piece is decoded behind a few tokens, however many special ones lie between."""
    lengths: list[int] = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return "".join(chr(97 + token) for token in ids)

    detokenizer = Detokenizer(decode, {7: "<|x|>"})
    for token in [1, *[7] * 500, 2, *[7] * 500, 3]:
        detokenizer.push([token])
    assert detokenizer.text == "bcd"
    assert max(lengths) <= 3
