"""What a model is asked for when it writes texts itself: turns of a user and of the model, in its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from tokentree.errors import PromptError
from tokentree.llm import LLM
from tokentree.sampling import SamplingParams
from tokentree.train.kinds import TEXT, Chat, plan
from tokentree.train.texts import Text, chat_ids

PROMPT_TOKENS, ANSWER_TOKENS = 64, 256  # of a turn of the user that the model makes up, and of an answer, at most
TEXT_TOKENS = 1024  # of a whole text, at most
LEAST_ROOM = 16  # tokens that an answer must have room for
TURN = 1_000_000_007  # between the seeds of one turn and the next
TEMPERATURES = (0.0, 0.0, 0.0, 0.3, 0.7, 1.0)  # of the answers that a model writes
SAID = {"temperature": 1.0, "top_k": 50}  # how it writes what a user says
MARK = "tokentree-turn"  # stands for what a user says, while the template around it is looked at
BARE = "text"  # the kind of what a model without a chat template writes
CHAT = "chat"  # of a chat in which the model says what the user does, for want of room for anything else


@dataclass(frozen=True)
class Ask:
    """What is to be written next.

    Args:
        prompt: token ids that it goes on from.
        params: how it is drawn, and how much of it, at most.
        answer: whether it is an answer of the model, or what a user says.
    """

    prompt: list[int]
    params: SamplingParams
    answer: bool


def open_turn(
    tokenizer: PreTrainedTokenizerBase, bos_ids: list[int], messages: Sequence[dict[str, str]] = ()
) -> list[int]:
    """What stands before the next thing a user says, after ``messages``; ``bos_ids`` where there is no chat
    template."""
    if not tokenizer.chat_template:
        return bos_ids
    turns = [*messages, {"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=False, tokenize=False)
    before: list[int] = tokenizer(str(text).rpartition(MARK)[0], add_special_tokens=False).input_ids
    return before


class Talk:
    """The texts with one number, while they are written: chats, of which the later ones may be about what the model
    wrote in the first. They follow from the seed, the number, and what is `take`n.

    Args:
        bos_ids: what a text begins with, where there is no chat template.
        context: tokens of a text, at most.

    Attributes:
        ask: what is to be written next; None once all is.
        parts: what was written so far, one `ask` after another.
        texts: that are finished.
    """

    def __init__(
        self, number: int, seed: int, tokenizer: PreTrainedTokenizerBase, bos_ids: list[int], context: int
    ) -> None:  # fmt: skip
        self.number, self.parts, self.texts = number, list[list[int]](), list[Text]()
        self._seed, self._tokenizer, self._bos_ids = seed, tokenizer, bos_ids
        self._room = min(context, TEXT_TOKENS)
        self._temperature = Random(f"{seed} {number} how").choice(TEMPERATURES)
        self._answer, self._text = "", Text([], "")  # the last answer; the chat that goes on
        self._asks = self._all(plan(number, seed)) if tokenizer.chat_template else self._alone()
        self.ask = next(self._asks, None)

    @property
    def tokens(self) -> int:
        """How many there are in what is written, up to the last answer."""
        return sum(len(text.ids) for text in (*self.texts, self._text))

    def take(self, ids: list[int]) -> None:
        """What was asked for."""
        self.parts.append(ids)
        self.ask = next(self._asks, None)

    def _params(self, tokens: int, answer: bool) -> SamplingParams:
        seed = self._seed + 2 * self.number + TURN * len(self.parts) + answer
        if answer:
            return SamplingParams(temperature=self._temperature, seed=seed, max_tokens=tokens)
        return SamplingParams(seed=seed, max_tokens=tokens, **SAID)

    def _alone(self) -> Iterator[Ask]:
        yield Ask(self._bos_ids, self._params(PROMPT_TOKENS, False), False)
        begun = [*self._bos_ids, *self.parts[0]]
        if len(begun) < self._room:
            yield Ask(begun, self._params(min(ANSWER_TOKENS, self._room - len(begun)), True), True)
            begun += self.parts[1]
        self.texts.append(Text(begun, BARE))

    def _all(self, chats: Sequence[Chat]) -> Iterator[Ask]:
        about = ""
        for number, chat in enumerate(chats):
            turns = [None if turn is None else turn.replace(TEXT, about) for turn in chat.turns]
            yield from self._begun(chat, str(turns[0])) if chat.bare else self._chat(chat, turns)
            about = about if number else self._answer

    def _begun(self, chat: Chat, text: str) -> Iterator[Ask]:
        """A text that the model goes on with."""
        prompt = [int(token) for token in self._tokenizer(text).input_ids]
        if len(prompt) + LEAST_ROOM <= self._room:
            yield Ask(prompt, self._params(min(chat.tokens or ANSWER_TOKENS, self._room - len(prompt)), True), True)
            self.texts.append(_longer(Text([], chat.kind, ()), prompt, self.parts[-1]))

    def _chat(self, chat: Chat, turns: Sequence[str | None]) -> Iterator[Ask]:
        """A chat; it ends before a turn that is empty or has no room. Where there is none for the first, the model says
        what the user does."""
        messages, self._text = list[dict[str, str]](), Text([], chat.kind, ())
        for turn in turns:
            said = turn
            if said is not None and self._asked(messages, said) is None and not messages:
                said, self._text = None, Text([], CHAT, ())
            if said is None:
                opened = open_turn(self._tokenizer, self._bos_ids, messages)
                room = min(PROMPT_TOKENS, self._room - LEAST_ROOM - len(opened))
                if room < 1:
                    break
                yield Ask(opened, self._params(room, False), False)
                said = self._decoded()
            prompt = self._asked(messages, said)
            if prompt is None:
                break
            yield Ask(prompt, self._params(min(chat.tokens or ANSWER_TOKENS, self._room - len(prompt)), True), True)
            self._answer = self._decoded()
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": self._answer}]
            self._text = _longer(self._text, prompt, self.parts[-1])
        if self._text.ids:
            self.texts.append(self._text)
        self._text = Text([], "")

    def _asked(self, messages: Sequence[dict[str, str]], said: str) -> list[int] | None:
        """The prompt in which a user says something after ``messages``; None if that is nothing, or too much."""
        if not said:
            return None
        try:
            prompt = chat_ids(self._tokenizer, [*messages, {"role": "user", "content": said}])
        except PromptError:  # a template that takes no such turn
            return None
        return prompt if len(prompt) + LEAST_ROOM <= self._room else None

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self.parts[-1], skip_special_tokens=True)).strip()


def new_talk(llm: LLM, number: int, seed: int) -> Talk:
    """The texts with this number, of which nothing is written."""
    assert llm.tokenizer is not None
    bos_ids = sorted(llm.eos_ids)[:1] or [0]
    return Talk(number, seed, llm.tokenizer, bos_ids, llm.engine.context)


def _longer(text: Text, prompt: list[int], answer: list[int]) -> Text:
    """The text with another turn. Answers that the template took over as they were still count as the model's."""
    before = [(start, end) for start, end in text.answers or () if prompt[:end] == text.ids[:end]]
    return Text([*prompt, *answer], text.kind, (*before, (len(prompt), len(prompt) + len(answer))))
