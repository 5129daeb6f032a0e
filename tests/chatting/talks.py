"""What tests of chats share: somebody who answers by heart, and a model whose texts have one spelling in tokens."""

from __future__ import annotations

import asyncio
import string
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import CHAT, tiny
from tokentree import LLM, SamplingParams
from tokentree.chat import Message
from tokentree.chatting.answers import Figures, Part
from tokentree.chatting.session import Session
from tokentree.cli.trees import Step
from tokentree.errors import OptionError, TokenTreeError

MARKS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
LETTERS = (*string.ascii_lowercase, " ", "?", ".")


class ByHeart:
    """Says ``answers``, one after another, a letter at a time. An error among them is raised where it stands."""

    def __init__(self, *answers: str | TokenTreeError | list[str | TokenTreeError]) -> None:
        self.name, self.figures = "somebody", Figures()
        self.steps: list[Step] = []
        self.drafters = ["suffix", "ngram"]
        self.heard: list[list[Message]] = []
        self.closed = 0
        self._answers = list(answers)

    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[Part]:
        self.heard.append([dict(message) for message in messages])
        given = self._answers.pop(0)
        self.figures = Figures(tokens=10, seconds=2.0, forwards=4, by_drafter={"suffix": 6}, prompt_tokens=7)
        try:
            for one in given if isinstance(given, list) else [given]:
                if isinstance(one, TokenTreeError):
                    raise one
                for letter in one:
                    yield Part(letter, drafted=letter.isupper())
        finally:
            self.closed += 1

    def speculate(self, on: bool) -> None:
        if not self.drafters:
            raise OptionError("nobody drafts here")

    def check_trees(self) -> None:
        if not self.drafters:
            raise OptionError("there are no trees here")

    async def close(self) -> None:
        pass


async def _all(session: Session, most: int | None) -> str:
    parts, found = session.answer(), list[str]()
    try:
        async for part in parts:
            found.append(part.text)
            if most is not None and len(found) >= most:
                break
    finally:
        await parts.aclose()
        if isinstance(session.answerer, ByHeart):  # at once, and not when it is collected
            assert session.answerer.closed == len(session.answerer.heard)
    return "".join(found)


def answered(session: Session, most: int | None = None) -> str:
    """The answer to what was asked last; it is stopped after ``most`` parts."""
    return asyncio.run(_all(session, most))


def step(*nodes: tuple[str, int, bool]) -> Step:
    """A step with these nodes: text, parent, whether it was accepted."""
    texts, parents, accepted = (list(column) for column in zip(*nodes))
    return Step(texts, parents, [-0.1] * len(nodes), [["suffix"]] * len(nodes), accepted, "'bonus'")


def spelling_llm(**options: Any) -> LLM:
    """A model of letters: what it writes has the tokens that its text has. Its drafts are often right."""
    vocab = {token: number for number, token in enumerate((*MARKS, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"additional_special_tokens": list(MARKS)})
    fast.chat_template = CHAT
    model = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96, vocab_size=len(vocab))
    return LLM(model, ["suffix", "recycling"], shape="2x1", tokenizer=fast, **options)


def letters_alone(**options: Any) -> SamplingParams:
    """Sampling options by which that model writes nothing but letters."""
    return SamplingParams(logit_bias=dict.fromkeys(range(len(MARKS)), -100.0), ignore_eos=True, **options)
