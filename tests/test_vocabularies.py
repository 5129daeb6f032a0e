"""Texts in the tokens of two vocabularies."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import TEXTS, sentence_pieces, tiny_tokenizer
from tokentree.errors import PairingError
from tokentree.vocabularies import Continuation, DraftText, Spelling, Vocabularies

OTHER_TEXTS = [
    "Another text, and another one: the lazy fox.",
    "der Baum wächst; 東京 und Köln",
    "        spaces\n\n  here",
]
SIZE = 1000


@cache
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    composed = tiny_tokenizer(OTHER_TEXTS, size=320)
    composed.backend_tokenizer.normalizer = normalizers.NFC()
    return {
        "bytes": tiny_tokenizer(),
        "other bytes": tiny_tokenizer(OTHER_TEXTS, size=340),
        "composed": composed,
        "pieces": sentence_pieces(),
        "unknown": sentence_pieces(OTHER_TEXTS, with_bytes=False),
    }


@cache
def spelling(name: str) -> Spelling:
    return Spelling(tokenizers()[name], SIZE)


@cache
def pair(target: str, draft: str) -> Vocabularies:
    return Vocabularies(spelling(target), spelling(draft))


PAIRS = [(one, other) for one in ("bytes", "other bytes", "pieces") for other in tokenizers() if one != other]
WORDS = " ".join([*TEXTS, *OTHER_TEXTS, "  \n\t", "🙂👩\u200d👧é"]).split(" ")
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join))


def spelled(name: str, ids: list[int]) -> bytes:
    return b"".join(spelling(name).piece(token) for token in ids)


# -- one vocabulary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tokenizers())
@given(text=texts)
def test_tokens_spell_the_text_that_they_are_decoded_to(name: str, text: str) -> None:
    tokenizer = tokenizers()[name]
    ids = tokenizer(text).input_ids
    pieces = spelled(name, ids).decode("utf-8", "replace")
    plain = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert pieces.removeprefix(" " if spelling(name).spaced else "") == plain


@pytest.mark.parametrize("name", ["bytes", "other bytes", "pieces"])
@given(data=st.one_of(st.binary(max_size=40), texts.map(str.encode)), begins=st.booleans())
def test_any_bytes_are_tokens_that_spell_them(name: str, data: bytes, begins: bool) -> None:
    one = spelling(name)
    ids = one.encode(data, begins)
    assert ids is not None
    ends = one.ends(ids, data)
    assert ends is not None
    assert ends[-1:] == ([len(data)] if data else [])
    assert ends == sorted(ends)
    assert spelled(name, ids) in (data, b" " + data if begins else data)
    assert not any(one.name(token) for token in ids)


def test_special_tokens_in_a_text_are_no_special_tokens() -> None:
    one = spelling("bytes")
    ids = one.encode(b"a<|end|>b", True)
    assert ids is not None
    assert one.special["<|end|>"] not in ids
    assert spelled("bytes", ids) == b"a<|end|>b"


def test_a_byte_that_has_no_token_is_waited_for_at_the_end_alone() -> None:
    one = spelling("unknown")
    assert one.encode("fox 🙂".encode()[:-1], True) is None
    ids = one.encode(b"fox \xf0\x9f and", True)
    assert ids is not None
    assert one.ends(ids, b"fox \xf0\x9f and") is None


def test_a_tokenizer_whose_tokens_are_not_pieces_of_text_is_refused() -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    for one in (words, Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))):
        with pytest.raises(PairingError, match="can't be told as pieces of text: use models of one tokenizer"):
            Spelling(PreTrainedTokenizerFast(tokenizer_object=one), 3)


# -- two vocabularies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_shared_tokens_are_the_same_text_one_to_one(target: str, draft: str) -> None:
    ours, theirs = pair(target, draft).shared
    assert len(set(ours.tolist())) == len(set(theirs.tolist())) == len(ours) > 20
    assert ours.tolist() == sorted(ours.tolist())
    for one, other in zip(ours.tolist(), theirs.tolist()):
        assert spelling(target).pieces[one] == spelling(draft).pieces[other]
        assert spelling(target).name(one) == spelling(draft).name(other)
    assert 0 < pair(target, draft).overlap < 1
    assert pair(target, draft).overlap == pair(draft, target).overlap


def test_a_piece_is_shared_rather_than_the_byte_that_is_the_same() -> None:
    ours, theirs = pair("bytes", "pieces").shared
    names = tokenizers()["pieces"].convert_ids_to_tokens(theirs.tolist())
    token = tokenizers()["bytes"].convert_tokens_to_ids("T")
    assert names[ours.tolist().index(token)] == "T"
    assert "<0xE3>" in names


def test_no_token_beyond_the_model_s_logits_is_shared() -> None:
    small = Vocabularies(Spelling(tokenizers()["bytes"], 280), Spelling(tokenizers()["other bytes"], 270))
    ours, theirs = small.shared
    assert max(ours) < 280
    assert max(theirs) < 270
    assert len(ours) > 200
    assert {*Spelling(tokenizers()["bytes"], 1).special} == {"<|end|>"}


def test_special_tokens_of_one_name_are_shared() -> None:
    ours, theirs = pair("bytes", "other bytes").shared
    special = spelling("bytes").special
    assert {*special} == {"<|end|>", "<|user|>", "<|assistant|>"}
    assert {*special.values()} <= {*ours.tolist()}
    assert not {*special.values()} & {*pair("bytes", "pieces").shared[0].tolist()}
    assert {spelling("other bytes").name(token) for token in theirs.tolist()} == {None, *special}


# -- a text that grows ------------------------------------------------------------------------------------------------


def steps(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """``ids`` as they grow by ``sizes``, and at last all of them."""
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [ids[:end] for end in ends if end < len(ids)] + [ids]


@pytest.mark.parametrize(("target", "draft"), PAIRS)
@given(text=texts, sizes=st.lists(st.integers(1, 7), max_size=30))
@example(text="🙂🙂 東京の木 é", sizes=[1] * 40)
@example(text=" ".join(TEXTS), sizes=[1] * 400)
def test_a_growing_text_is_cut_as_the_whole(target: str, draft: str, text: str, sizes: list[int]) -> None:
    grown = DraftText(pair(target, draft))
    exact = draft in ("bytes", "other bytes", "pieces")
    for ids in steps(tokenizers()[target](text).input_ids, sizes):
        grown.follow(ids)
        so_far = spelled(target, ids).removeprefix(b" " if spelling(target).spaced else b"")
        if exact:
            assert grown.whole
            ends = spelling(draft).ends(grown.ids, so_far)
            assert ends is not None
        assert grown.whole == (exact or so_far.decode("utf-8", "ignore").encode() == so_far or draft == "composed")
    if set(text) <= set(" ".join(TEXTS)) and "  " not in text and not text.startswith(" "):
        assert grown.ids == tokenizers()[draft](text).input_ids


@given(ids=st.lists(st.integers(0, 299), max_size=60), sizes=st.lists(st.integers(1, 5), max_size=30))
@pytest.mark.parametrize("draft", ["other bytes", "pieces"])
def test_any_tokens_of_the_target_are_a_text(draft: str, ids: list[int], sizes: list[int]) -> None:
    """Special ones and bytes that are no character too: whatever a model writes."""
    grown, vocabularies = DraftText(pair("bytes", draft)), pair("bytes", draft)
    for tokens in steps(ids, sizes):
        grown.follow(tokens)
        assert grown.whole
    names = [vocabularies.target.name(token) for token in ids]
    known = [name for name in names if name in vocabularies.draft.special]
    begin = [vocabularies.draft.name(token) for token in vocabularies.draft.begin]
    assert [name for token in grown.ids if (name := vocabularies.draft.name(token))] == [*begin, *known]
    if not any(names):
        assert spelled(draft, grown.ids) in [space + spelled("bytes", ids) for space in (b"", b" ")]


def test_only_the_end_is_cut_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(TEXTS) * 20
    ids, asked = tokenizers()["bytes"](text).input_ids, list[int]()
    grown = DraftText(pair("bytes", "other bytes"))
    grown.follow(ids[:-60])
    own = spelling("other bytes").encode

    def counted(data: bytes, begins: bool) -> list[int] | None:
        asked.append(len(data))
        return own(data, begins)

    monkeypatch.setattr(spelling("other bytes"), "encode", counted)
    for count in range(len(ids) - 60, len(ids) + 1):
        grown.follow(ids[:count])
    assert len(asked) < 80
    assert max(asked) < 100
    monkeypatch.undo()
    assert grown.ids == tokenizers()["other bytes"](text).input_ids


def test_the_end_of_a_text_may_become_other_tokens() -> None:
    grown = DraftText(pair("other bytes", "bytes"))
    target, draft = tokenizers()["other bytes"], tokenizers()["bytes"]
    ids = target("A fox. Th").input_ids
    grown.follow(ids)
    before = grown.ids.copy()
    assert before == draft("A fox. Th").input_ids
    grown.follow([*ids, *target("e").input_ids])
    assert grown.ids == draft("A fox. The").input_ids
    assert len(grown.ids) < len(before)


def test_as_many_tokens_are_cut_anew_as_change() -> None:
    """Some tokenizers cut numbers into threes from their ends: one more digit changes all of these tokens."""
    tokenizer = Tokenizer(models.BPE({"1": 0, "11": 1, "111": 2, "a": 3}, [("1", "1"), ("11", "1")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(\d{3})*(\D|$))"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    draft = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    single = Tokenizer(models.BPE({"a": 0, "1": 1}, []))
    single.decoder = decoders.Fuse()
    target = PreTrainedTokenizerFast(tokenizer_object=single)
    grown = DraftText(Vocabularies(Spelling(target, 2), Spelling(draft, 4)))
    text = "a" * 30 + "1" * 61 + "a" * 3 + "1" * 8
    for count in range(1, len(text) + 1):
        grown.follow(target(text[:count]).input_ids)
        assert grown.ids == draft(text[:count]).input_ids


def test_another_text_is_begun_anew() -> None:
    grown = DraftText(pair("bytes", "pieces"))
    tokenizer, draft = tokenizers()["bytes"], tokenizers()["pieces"]
    for text in ("A tree of tokens", "A tree grows", "the dog"):
        grown.follow(tokenizer(text).input_ids)
        assert grown.ids == draft(text).input_ids


def test_a_text_that_ends_within_a_character_has_tokens_of_bytes_until_it_is_whole() -> None:
    target = tokenizers()["bytes"]
    ids = target("ab 🙂").input_ids
    assert len(ids) == 7
    grown, waiting = DraftText(pair("bytes", "pieces")), DraftText(pair("bytes", "unknown"))
    grown.follow(ids[:-1])
    waiting.follow(ids[:-1])
    names = tokenizers()["pieces"].convert_ids_to_tokens(grown.ids)
    assert names[-3:] == ["<0xF0>", "<0x9F>", "<0x99>"]
    assert (grown.whole, waiting.whole) == (True, False)
    waiting.follow(ids)
    assert waiting.whole


def test_accepted_tokens_stay_as_they_were_drafted_until_more_shows() -> None:
    target, draft = tokenizers()["bytes"], tokenizers()["other bytes"]
    grown = DraftText(pair("bytes", "other bytes"))
    prompt, more = target("The lazy").input_ids, target(" fox and").input_ids
    grown.follow(prompt)
    grown.accept(more, draft(" fox").input_ids)
    assert grown.ids == draft("The lazy fox").input_ids
    grown.follow([*prompt, *more])
    assert grown.ids == draft("The lazy fox and").input_ids


# -- texts behind a text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["bytes", "other bytes", "pieces"])
@given(before=texts, behind=texts)
def test_a_continuation_extends_the_tokens_that_are_there(target: str, before: str, behind: str) -> None:
    ids = tokenizers()[target](before).input_ids
    found = Continuation(spelling(target), ids).tokens(behind.encode())
    assert spelled(target, [token for token, _ in found]) in (b"", behind.encode())
    ends = [end for _, end in found]
    assert ends == sorted(ends)
    together = tokenizers()[target](before + behind).input_ids
    words = " ".join(TEXTS)
    if together[: len(ids)] == ids and set(before + behind) <= set(words) and "  " not in before + behind:
        assert [token for token, _ in found] == together[len(ids) :]


def test_what_would_change_the_tokens_that_are_there_is_no_continuation() -> None:
    ids = tokenizers()["bytes"]("A fox. Th").input_ids
    behind = Continuation(spelling("bytes"), ids)
    assert tokenizers()["bytes"]("A fox. The").input_ids[: len(ids)] != ids
    assert behind.tokens(b"e") == []
    assert [token for token, _ in behind.tokens(b" brown")] == tokenizers()["bytes"](" brown").input_ids


def test_a_continuation_ends_with_a_whole_character() -> None:
    behind = Continuation(spelling("bytes"), tokenizers()["bytes"]("The fox").input_ids)
    whole = [token for token, _ in behind.tokens(b" dog")]
    assert [token for token, _ in behind.tokens(" dog🙂".encode()[:-1])] == whole
    assert behind.tokens("🙂".encode()[:2]) == []


def test_special_tokens_are_where_a_text_begins() -> None:
    user = spelling("bytes").special["<|user|>"]
    behind = Continuation(spelling("bytes"), [*tokenizers()["bytes"]("A fox. Th").input_ids, user])
    assert [token for token, _ in behind.tokens(b"e")] == tokenizers()["bytes"]("e").input_ids
