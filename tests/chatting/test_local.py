"""Chats with a model of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.chatting.talks import answered, letters_alone, spelling_llm
from tests.conftest import random_table
from tests.tiny_models import kv_engine, tiny_tokenizer
from tokentree import LLM, PromptError
from tokentree.chatting.commands import typed
from tokentree.chatting.local import Local
from tokentree.chatting.session import Session
from tokentree.engines.table import TableEngine

PARAMS = letters_alone(max_tokens=40)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return spelling_llm()


@pytest.fixture
def session(llm: LLM) -> Iterator[Session]:
    answerer = Local(llm, "tiny", PARAMS)
    yield Session(answerer)
    asyncio.run(answerer.close())
    assert not kv_engine(llm)._kv


def test_answers_are_those_of_chat_and_a_turn_reads_only_what_is_new(llm: LLM, session: Session) -> None:
    read = list[int]()
    for question in ("how are you?", "and you?", "and she?"):
        session.ask(question)
        whole = llm.chat_prompt(session.messages)
        assert answered(session) == llm.plain().chat(session.messages[:-1], PARAMS).text
        figures = session.figures[-1]
        assert (figures.tokens, figures.prompt_tokens) == (40, len(whole))
        assert figures.reused_tokens is not None
        read.append(len(whole) - figures.reused_tokens)
    first = len(llm.chat_prompt([{"role": "user", "content": "how are you?"}]))
    assert read[0] == first
    new = [len("<uae") + len(text) for text in ("and you?", "and she?")]  # a mark before, its end, and the next mark
    assert read[1:] == [count + 1 for count in new]  # and the answer's last token, which nothing was read behind


def test_trees_and_figures_are_those_of_the_last_answer(session: Session) -> None:
    session.ask("a b a b a b")
    answered(session)
    figures, told = session.figures[-1], typed(session, "/tree").told
    assert figures.forwards is not None
    assert 0 < figures.forwards < 40
    assert sum(figures.by_drafter.values()) >= 40 - figures.forwards
    assert figures.cut
    assert told.count("bonus") == 3
    trees = typed(session, "/tree 16").told
    assert trees.count("  accepted") > 3
    assert "suffix" in trees
    assert len(session.answerer.steps) == min(16, figures.forwards)
    stats = typed(session, "/stats").told
    assert f"{40 / figures.forwards:.2f} tokens a forward" in stats
    assert "accepted by drafter: " in stats


def test_plain_decoding_has_the_same_text_with_a_forward_for_each_token(session: Session) -> None:
    session.ask("a b a b a b")
    text = answered(session)
    typed(session, "/plain")
    assert typed(session, "/tree").told == "there are no steps yet"
    typed(session, "/retry")
    assert answered(session) == text
    assert session.figures[-1].forwards == 40
    assert "accepted" not in typed(session, "/tree").told
    typed(session, "/plain")
    typed(session, "/retry")
    assert answered(session) == text
    assert session.figures[-1].forwards != 40


def test_an_answer_that_is_stopped_leaves_the_model_as_it_was(llm: LLM, session: Session) -> None:
    session.ask("how are you?")
    text = answered(session, most=5)
    assert session.messages[-1] == {"role": "assistant", "content": text}
    assert 0 < len(text) < 40
    assert not session.figures[-1].cut
    session.ask("and you?")
    assert answered(session) == llm.plain().chat(session.messages[:-1], PARAMS).text


def test_a_conversation_that_is_too_long_is_a_sentence_and_the_chat_goes_on(llm: LLM, session: Session) -> None:
    session.ask("a" * llm.engine.context)
    with pytest.raises(PromptError, match="no room for an answer"):
        answered(session)
    assert session.figures[-1].tokens is None
    session.ask("how are you?")
    assert len(session.messages) == 1
    assert len(answered(session)) == 40


def test_a_model_without_a_chat_template_is_told_at_once() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    engine = TableEngine(random_table(6))
    with pytest.raises(PromptError, match="no chat template"):
        Local(LLM(engine=engine, tokenizer=tokenizer), "table", PARAMS)


def test_a_step_has_what_a_drawing_needs(session: Session) -> None:
    session.ask("a b a b a b")
    answered(session)
    for one in session.answerer.steps:
        assert len(one.texts) == len(one.parents) == len(one.log_probs) == len(one.drafters) == len(one.accepted)
        assert one.accepted[0]
        assert one.parents[0] == -1
