"""Texts that a model on an accelerator writes itself, as many at once as its memory takes."""

from __future__ import annotations

from collections.abc import Sequence

from tokentree.engines.kv_engine import KVEngine
from tokentree.errors import ModelError
from tokentree.llm import LLM
from tokentree.sampling import SamplingParams
from tokentree.train.talks import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    TASKS,
    Talk,
    answer_params,
    open_turn,
    said_params,
    tasks_for,
)
from tokentree.train.target import engine_of
from tokentree.train.writing import Writer, rows_for

SCORES = 32  # bytes that drawing a token takes for each one of the vocabulary
ROUND = 32  # tokens at most that a chat template puts around a turn of the user and one of the model
EACH = 128  # tokens that a text has at least, most often


class Batches:
    """Writes batches of texts: first what a user might say, as the chat template leaves the user's turn open; then an
    answer; then what the user says to that, and so on. In every other text the user's further turns are a task and what
    the model answered in the next text, since much of what models are asked is about a text that is given to them. A
    model without a template just writes. A text ends before a turn that came out empty.

    What comes in a batch follows from ``seed`` and the numbers of its texts.

    Args:
        tokens: that are wanted in all; few of them make small batches.
        turns: of the user and the model in a text.

    Attributes:
        size: texts in a batch, at most.
    """

    def __init__(
        self, llm: LLM, tokens: int, seed: int = 0, turns: int = 2, prompt_tokens: int = PROMPT_TOKENS,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> None:  # fmt: skip
        assert llm.tokenizer is not None
        self._llm, self._tokenizer, self._seed, self._turns = llm, llm.tokenizer, seed, turns
        self._prompt_tokens, self._answer_tokens = prompt_tokens, answer_tokens
        self._bos_ids = sorted(llm.eos_ids)[:1] or [0]
        task = max(len(self._tokenizer(one).input_ids) for one in TASKS)
        said = max(prompt_tokens, answer_tokens + task) if self._tokenizer.chat_template else prompt_tokens
        self._each, opened = answer_tokens + ROUND, len(open_turn(self._tokenizer, self._bos_ids))
        longest = opened + prompt_tokens + self._each + max(turns - 1, 0) * (said + self._each)
        self._longest = min(longest, llm.engine.context)
        engine = engine_of(llm)
        bytes_each = self._longest * engine.bytes_per_token + SCORES * engine.vocab_size
        self.size = min(rows_for(engine.device, bytes_each), 1 << max(1, (tokens // EACH).bit_length()))
        if not isinstance(engine, KVEngine):
            raise ModelError("texts are written by a model that attends by itself: use attention='sdpa'")
        self._writer = Writer(engine.model, self.size, self._longest)

    def write(self, numbers: Sequence[int]) -> dict[int, list[int]]:
        """The texts with these numbers, at most `size`; empty ones of which nothing came."""
        talks = [Talk(number) for number in numbers]
        for turn in range(self._turns):
            growing = [talk for talk in talks if talk.turns == turn]
            self._let_speak(growing, turn)
            answering = [talk for talk in growing if talk.prompt]
            params = [answer_params(talk.number, self._seed, self._answer_tokens, turn) for talk in answering]
            for talk, ids in zip(answering, self._go_on(answering, params), strict=True):
                talk.answer(self._tokenizer, ids)
        return {talk.number: talk.ids for talk in talks}

    def _let_speak(self, talks: list[Talk], turn: int) -> None:
        """The user's turn in each of ``talks``."""
        tasks = tasks_for(talks) if turn and self._tokenizer.chat_template else {}
        longest, speaking = self._longest, list[Talk]()
        room = longest - self._answer_tokens if turn else longest - 1
        for talk in talks:
            if talk.number in tasks:
                talk.say(self._tokenizer, tasks[talk.number], room)
            elif talk.open(
                self._tokenizer, self._bos_ids, longest - self._prompt_tokens - self._each if turn else longest
            ):
                speaking.append(talk)
        params = [said_params(talk.number, self._seed, self._prompt_tokens, turn) for talk in speaking]
        for talk, ids in zip(speaking, self._go_on(speaking, params), strict=True):
            talk.hear(self._tokenizer, ids, room)

    def _go_on(self, talks: list[Talk], params: list[SamplingParams]) -> list[list[int]]:
        """What follows the prompt of each talk, all drawn with the seed of the first."""
        if not talks:
            return []
        spread, one = [each.temperature for each in params], params[0]
        assert one.seed is not None
        prompts = [talk.prompt for talk in talks]
        return self._writer.write(prompts, one.max_tokens, spread, self._llm.eos_ids, one.seed, one.top_k or None)
