"""What a model is asked for when it writes texts itself: turns of a user and of the model, in its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from tokentree.sampling import SamplingParams
from tokentree.train.texts import chat_ids

PROMPT_TOKENS, ANSWER_TOKENS = 64, 256  # of a turn of the user and of the model, at most
TURN = 1_000_000_007  # between the seeds of one turn and the next
TEMPERATURES = (0.0, 0.3, 0.5, 0.8)  # of the answers that a model writes
SAID = {"temperature": 1.0, "top_k": 50}  # how it writes what a user says
TASKS = (
    "Summarize this text in a few sentences.",
    "Rewrite this text so that a child understands it.",
    "What are the main points of this text? Answer with a list.",
    "Correct the spelling and the grammar of this text.",
    "Answer three questions that a reader of this text might ask.",
    "Continue this text.",
    "Translate this text into French.",
    "Which names, numbers and places are in this text? Answer as JSON.",
    "Is there anything wrong in this text? Explain step by step.",
    "Turn this text into a short email.",
)  # that a user sets about a text
MARK = "tokentree-turn"  # stands for what a user says, while the template around it is looked at


def said_params(number: int, seed: int, max_tokens: int, turn: int = 0) -> SamplingParams:
    """How the model writes what the user says in a turn of the text with this number."""
    return SamplingParams(seed=_seed(number, seed, turn), max_tokens=max_tokens, **SAID)


def answer_params(number: int, seed: int, max_tokens: int, turn: int = 0) -> SamplingParams:
    """How the model answers there."""
    temperature = TEMPERATURES[number // 2 % len(TEMPERATURES)]
    return SamplingParams(temperature=temperature, seed=_seed(number, seed, turn) + 1, max_tokens=max_tokens)


def _seed(number: int, seed: int, turn: int) -> int:
    return seed + 2 * number + TURN * turn


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


@dataclass
class Talk:
    """A text while it is being written.

    Args:
        number: among all texts.
        ids: as far as it is written.
        turns: of the user and the model, that it has.
        messages: the same, as the chat template takes them.
        prompt: what comes next goes on from it; empty if nothing does.
    """

    number: int
    ids: list[int] = field(default_factory=list)
    turns: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)

    def open(self, tokenizer: PreTrainedTokenizerBase, bos_ids: list[int], room: int) -> bool:
        """Opens the user's turn; False, and nothing comes next, where its prompt would have more than ``room``
        tokens."""
        without = self.ids or bos_ids
        self._go_on(open_turn(tokenizer, without, self.messages) if tokenizer.chat_template else without, room)
        return bool(self.prompt)

    def hear(self, tokenizer: PreTrainedTokenizerBase, said: list[int], room: int) -> None:
        """What the user said, in the turn that was opened."""
        if not tokenizer.chat_template:
            self.prompt = [*self.prompt, *said]
            return
        self.say(tokenizer, str(tokenizer.decode(said, skip_special_tokens=True)).strip(), room)

    def say(self, tokenizer: PreTrainedTokenizerBase, text: str, room: int) -> None:
        """What the user says; nothing comes next if that is nothing, or too much."""
        self.messages.append({"role": "user", "content": text})
        self._go_on(chat_ids(tokenizer, self.messages) if text else [], room)

    def _go_on(self, prompt: list[int], room: int) -> None:
        self.prompt = prompt if len(prompt) <= room else []

    def answer(self, tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> None:
        text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        self.messages.append({"role": "assistant", "content": text})
        self.ids, self.turns = [*self.prompt, *answer], self.turns + 1


def tasks_for(talks: Sequence[Talk]) -> dict[int, str]:
    """What the user says in every other one of ``talks``, by their numbers: a task about the last answer in the next
    one."""
    others = [*talks[1:], *talks[:1]]
    return {
        talk.number: f"{TASKS[talk.number // 2 % len(TASKS)]}\n\n{other.messages[-1]['content']}"
        for talk, other in zip(talks, others, strict=True)
        if talk.number % 2
    }
