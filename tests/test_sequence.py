"""Where a text ends, and how tokens become text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import decode, make_sequence, random_table
from tests.strategies import numbers
from tokentree.drafters.draft_model import DraftModel
from tokentree.engines.table import TableEngine
from tokentree.errors import PromptError
from tokentree.sequence import Accepted, Sequence
from tokentree.text import Detokenizer

EOS = frozenset({9})


def _bytes_to_text(ids: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def _step(*tokens: int) -> Accepted:
    """A step that accepted all of ``tokens`` but the last."""
    return Accepted(list(range(len(tokens))), list(tokens))


def _written(text: str, accepted: str, **options: Any) -> tuple[Sequence, Accepted]:
    """A sequence of bytes that has written ``text``, and what it takes of a step with the bytes of ``accepted``."""
    seq = make_sequence([0], detokenizer=Detokenizer(_bytes_to_text), **options)
    for token in text.encode():
        seq.extend(_step(token))
    return seq, seq.truncate(_step(*accepted.encode()))


# -- prompts --------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_raises() -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        make_sequence([])


def test_a_prompt_that_fills_the_context_raises() -> None:
    for length in (4, 5):
        with pytest.raises(PromptError, match=f"the prompt has {length} tokens and the context holds 4"):
            make_sequence([1] * length, context=4)
    assert make_sequence([1] * 3, context=4).room == 1


# -- tokens that end a text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kept", "reason"),
    [
        ({}, [1, 9], "stop"),
        ({"ignore_eos": True}, [1, 9, 2, 3], None),
        ({"stop_token_ids": (2,)}, [1, 9], "stop"),
        ({"stop_token_ids": (2,), "ignore_eos": True}, [1, 9, 2], "stop"),
        ({"stop_token_ids": (9,), "ignore_eos": True}, [1, 9], "stop"),
        ({"stop_token_ids": (3,), "ignore_eos": True}, [1, 9, 2, 3], "stop"),
        ({"stop_token_ids": (1,)}, [1], "stop"),
        ({"max_tokens": 1}, [1], "length"),
        ({"max_tokens": 2}, [1, 9], "stop"),
        ({"max_tokens": 3, "ignore_eos": True}, [1, 9, 2], "length"),
        ({"max_tokens": 4, "ignore_eos": True}, [1, 9, 2, 3], "length"),
        ({"max_tokens": 5, "ignore_eos": True}, [1, 9, 2, 3], None),
        ({"min_tokens": 3}, [1, 9, 2, 3], None),
        ({"min_tokens": 2}, [1, 9], "stop"),
        ({"min_tokens": 4, "stop_token_ids": (2, 3)}, [1, 9, 2, 3], "stop"),
    ],
)
def test_a_step_is_cut_where_the_text_ends(options: dict[str, Any], kept: list[int], reason: str | None) -> None:
    seq = make_sequence([0], eos_ids=EOS, **options)
    step = seq.truncate(Accepted([0, 4, 5, 7], [1, 9, 2, 3], refused=True))
    assert step.tokens == kept
    assert step.path == [0, 4, 5, 7][: len(kept)]
    assert step.finish_reason == reason
    assert step.refused == (len(kept) == 4)  # the walk's end is cut off otherwise
    seq.extend(step)
    assert (seq.output_ids, seq.finished, seq.finish_reason) == (kept, reason is not None, reason)


def test_the_context_ends_a_text_inside_an_accepted_path() -> None:
    seq = make_sequence([0, 0, 0], context=6)
    assert seq.room == 3
    seq.extend(seq.truncate(_step(1)))
    assert seq.room == 2
    step = seq.truncate(_step(1, 2, 3))
    assert (step.tokens, step.finish_reason) == ([1, 2], "length")
    seq.extend(step)
    assert len(seq.tokens) == 6


def test_stop_rules_see_all_ids_and_wait_for_min_tokens() -> None:
    seen: list[list[int]] = []

    def rule(ids: list[int]) -> bool:
        seen.append(ids)
        return ids[-1] == 2

    seq = make_sequence([7, 8], stop_rules=(rule,), min_tokens=2)
    step = seq.truncate(_step(2, 1, 2, 5))
    assert (step.tokens, step.finish_reason) == ([2, 1, 2], "stop")
    assert seen == [[7, 8, 2, 1], [7, 8, 2, 1, 2]]


@given(numbers, st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_limits_end_drafted_text_where_they_end_plain_text(
    seed: int, max_tokens: int, min_tokens: int, ignore_eos: bool
) -> None:
    table, min_tokens = random_table(5, 2, seed, 3.0), min(min_tokens, max_tokens)

    def run(drafter: DraftModel | None) -> tuple[list[int], str | None]:
        engine = TableEngine(table, context=9)
        seq = make_sequence(
            [1, 2], eos_ids=frozenset({0}), context=engine.context, max_tokens=max_tokens, min_tokens=min_tokens,
            ignore_eos=ignore_eos, seed=seed, temperature=1.0, stop_rules=(lambda ids: ids[-2:] == [3, 3],),
        )  # fmt: skip
        decode(engine, [seq], drafter, "1x2x1x1")
        return seq.output_ids, seq.finish_reason

    drafter = DraftModel(TableEngine(table), 5)
    assert run(drafter) == run(None)
    output, reason = run(drafter)
    assert len(output) <= min(max_tokens, 7)
    assert reason == "stop" or len(output) == min(max_tokens, 7)
    assert reason == "length" or len(output) >= min(min_tokens, max_tokens)


# -- stop strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "accepted", "stop", "kept", "text"),
    [
        ("", "abcdef", "cd", "abcd", "ab"),  # inside an accepted path, over two tokens
        ("abc", "def", "cd", "d", "ab"),  # begun by an earlier step
        ("abc", "xdef", "cd", "xdef", None),
        ("", "abcd", "a", "a", ""),
        ("", "abcd", "abcd", "abcd", ""),
        ("", "abcd", ("d", "bc"), "abc", "a"),
        ("", "abcd", ("bc", "abc"), "abc", ""),  # both end here: the earlier one cuts
        ("", "añb", "ñb", "añb", "a"),  # a character of two tokens
        ("", "añb", "ñ", "añ", "a"),
    ],
)
def test_a_stop_string_cuts_an_accepted_path(
    before: str, accepted: str, stop: str | tuple[str, ...], kept: str, text: str | None
) -> None:
    seq, step = _written(before, accepted, stop=stop)
    assert bytes(step.tokens).decode() == kept
    assert step.finish_reason == ("stop" if text is not None else None)
    seq.extend(step)
    assert seq.detokenizer is not None
    assert seq.detokenizer.text[: seq.text_end] == (text if text is not None else before + kept)


def test_a_stop_string_before_min_tokens_does_not_end_the_text() -> None:
    _, step = _written("", "ababab", stop="ab", min_tokens=4)
    assert (bytes(step.tokens), step.text_end) == (b"abab", 2)
    _, step = _written("", "abxxxx", stop="ab", min_tokens=3)
    assert (bytes(step.tokens), step.finish_reason) == (b"abxxxx", None)  # one that was passed stays passed


def test_looking_for_stop_strings_leaves_the_sequence_s_own_text_alone() -> None:
    seq, _ = _written("ab", "cdef", stop="zz")
    assert seq.detokenizer is not None
    assert seq.detokenizer.text == "ab"


@given(st.text("abñ漢", max_size=12), st.text("abñ漢", min_size=1, max_size=3), st.data())
def test_a_stop_string_ends_the_text_the_same_whatever_the_steps(text: str, stop: str, data: st.DataObject) -> None:
    def ended(cuts: list[int]) -> tuple[list[int], int | None]:
        seq = make_sequence([0], detokenizer=Detokenizer(_bytes_to_text), stop=stop)
        for start, end in zip([0, *cuts], [*cuts, len(ids)]):
            if start < end and not seq.finished:
                seq.extend(seq.truncate(_step(*ids[start:end])))
        return seq.output_ids, seq.text_end

    ids = list(text.encode())
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)))))
    one_by_one = ended(list(range(len(ids))))
    assert ended(cuts) == one_by_one
    place = text.find(stop)
    assert one_by_one[1] == (place if place >= 0 else None)


# -- text -----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=20), st.data())
def test_pieces_join_to_the_text_however_tokens_split_characters(text: str, data: st.DataObject) -> None:
    ids = list(text.encode())
    detokenizer, pieces = Detokenizer(_bytes_to_text), list[str]()
    while ids:
        count = data.draw(st.integers(1, 3))
        pieces.append(detokenizer.push(ids[:count]))
        ids = ids[count:]
        assert text.startswith("".join(pieces))
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text == text


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    detokenizer = Detokenizer(_bytes_to_text)
    assert [detokenizer.push([byte]) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]


def test_finish_shows_what_stays_unfinished() -> None:
    detokenizer = Detokenizer(_bytes_to_text)
    detokenizer.push([97])
    assert detokenizer.push("ñ".encode()[:1]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    assert detokenizer.text == "a\ufffd"


def test_a_copy_grows_on_its_own() -> None:
    detokenizer = Detokenizer(_bytes_to_text)
    detokenizer.push("ñ".encode()[:1])
    twin = detokenizer.copy()
    assert twin.push("ñ".encode()[1:]) == "ñ"
    assert detokenizer.text == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_tokenizer_that_drops_a_leading_space_loses_none_inside() -> None:
    words = {0: "▁one", 1: "▁two", 2: "s", 3: ""}
    detokenizer = Detokenizer(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert [detokenizer.push([i]) for i in (0, 1, 2, 3, 1)] == ["one", " two", "s", "", " two"]
