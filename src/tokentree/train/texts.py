"""Texts to train on: from a file, or written by the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokentree.errors import PromptError
from tokentree.llm import LLM
from tokentree.sampling import SamplingParams
from tokentree.train.writing import Writer, rows_for

LEAST = 8  # tokens of a text that is worth reading
AT_ONCE = 256  # texts that a model writes; as one is finished, another joins those that are decoded together
SCORES = 32  # bytes that drawing a token takes for each one of the vocabulary
TURN = 1_000_000_007  # between the seeds of one turn and the next
ROUND = 32  # tokens at most that a chat template puts around a turn of the user and one of the model
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
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = "tokentree-turn"  # stands for what a user says, while the template around it is looked at


@dataclass
class Texts:
    """Token ids of texts, and what was wrong with the lines that were left out."""

    ids: list[list[int]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def read_texts(path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 1024) -> Texts:
    """The texts of a JSON-lines file: objects with ``text``, with ``prompt`` and ``completion``, with ``messages``
    (``role``, ``content``) or with ``conversations`` (``from``, ``value``). The latter two go through the chat
    template.

    Args:
        max_tokens: what a text has beyond these is left out.

    Raises:
        PromptError: if the file can't be read, or no line of it is such a text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PromptError(f"can't read the training data {str(path)!r}: {reason}") from None
    found = Texts()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            ids = _ids(json.loads(line), tokenizer)[:max_tokens]
        except json.JSONDecodeError:
            found.bad.append(f"line {number} is not JSON")
        except PromptError as error:
            found.bad.append(f"line {number} {error}")
        else:
            if len(ids) < LEAST:
                found.bad.append(f"line {number} has fewer than {LEAST} tokens")
            else:
                found.ids.append(ids)
    if not found.ids:
        raise PromptError(f"the training data {str(path)!r} has no text: " + (found.bad or ["it is empty"])[0])
    return found


def _ids(entry: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(entry, dict):
        raise PromptError("is not an object")
    text = entry.get("text")
    if isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
        text = entry["prompt"] + entry["completion"]
    if isinstance(text, str):
        return [int(token) for token in tokenizer(text).input_ids]
    turns = entry.get("messages", entry.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise PromptError('has neither "text", "prompt" and "completion", "messages" nor "conversations"')
    return chat_ids(tokenizer, [_message(turn) for turn in turns], answered=True)


def _message(turn: Any) -> dict[str, str]:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role in ROLES and isinstance(content, str):
            return {"role": ROLES[role], "content": content}
    raise PromptError("has a message without a known role, or without a text")


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answered: bool = False) -> list[int]:
    """``messages`` in the chat template, open for an answer unless they are ``answered``."""
    if not tokenizer.chat_template:
        raise PromptError("is a conversation, and the tokenizer has no chat template")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=not answered, tokenize=True, return_dict=False)
    return [int(token) for token in ids]  # type: ignore[arg-type]


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


def write_texts(
    llm: LLM,
    first: int = 0,
    seed: int = 0,
    prompt_tokens: int = 64,
    answer_tokens: int = 256,
    turns: int | None = None,
) -> Iterator[list[list[int]]]:
    """Texts that the model writes itself, without end, a batch at a time: first what a user might say, as its chat
    template leaves the user's turn open, drawn as `SAID` says; then an answer, at one of `TEMPERATURES`; then what the
    user says to that, and so on. In every other text the user's further turns are one of `TASKS` and what the model
    answered in the next text, since much of what models are asked is about a text that is given to them. A model
    without a template just writes. A text ends before a turn that came out empty.

    What comes in a batch follows from ``seed`` and its number, of which ``first`` is the first.

    Args:
        turns: of the user and the model in a text; by default two, and one on CPUs, where reading the first one again
            takes as long as writing it.

    Raises:
        PromptError: if there is no tokenizer.
    """
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise PromptError("a model without a tokenizer can't write its own training data: give a file")
    bos_ids = sorted(llm.eos_ids)[:1] or [0]
    turns = turns or (1 if llm.engine.device.type == "cpu" else 2)
    task = max(len(tokenizer(one).input_ids) for one in TASKS)
    said = max(prompt_tokens, answer_tokens + task) if tokenizer.chat_template else prompt_tokens
    each, again = answer_tokens + ROUND, max(turns - 1, 0)
    longest = len(open_turn(tokenizer, bos_ids)) + prompt_tokens + each + again * (said + each)
    longest = min(longest, llm.engine.context)
    at_once, write = _by_engine(llm) if llm.engine.device.type == "cpu" else _by_writer(llm, longest)
    for number in count(first):
        talks = [_Talk(place) for place in range(number * at_once, (number + 1) * at_once)]
        for turn in range(turns):
            growing = [talk for talk in talks if talk.turns == turn]
            tasks = _tasks(growing) if turn and tokenizer.chat_template else {}
            speaking, room = list[_Talk](), longest - answer_tokens if turn else longest - 1
            for talk in growing:
                if talk.place in tasks:
                    talk.say(tokenizer, tasks[talk.place], room)
                elif talk.open(tokenizer, bos_ids, longest - prompt_tokens - each if turn else longest):
                    speaking.append(talk)
            seeds = {talk.place: seed + 2 * talk.place + TURN * turn for talk in growing}
            params = [SamplingParams(seed=seeds[talk.place], max_tokens=prompt_tokens, **SAID) for talk in speaking]
            for talk, ids in zip(speaking, write([talk.prompt for talk in speaking], params), strict=True):
                talk.hear(tokenizer, ids, room)
            answering = [talk for talk in growing if talk.prompt]
            params = [
                SamplingParams(
                    temperature=TEMPERATURES[talk.place // 2 % len(TEMPERATURES)],
                    seed=seeds[talk.place] + 1,
                    max_tokens=answer_tokens,
                )
                for talk in answering
            ]
            answers = write([talk.prompt for talk in answering], params)
            for talk, ids in zip(answering, answers, strict=True):
                talk.answer(tokenizer, ids)
        yield [talk.ids for talk in talks if talk.ids]


@dataclass
class _Talk:
    """A text while it is being written.

    Args:
        place: among all texts.
        ids: as far as it is written.
        turns: of the user and the model, that it has.
        messages: the same, as the chat template takes them.
        prompt: what comes next goes on from it; empty if nothing does.
    """

    place: int
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


def _tasks(talks: Sequence[_Talk]) -> dict[int, str]:
    """What the user says in every other one of ``talks``, by their places: a task about the last answer in the next."""
    others = [*talks[1:], *talks[:1]]
    return {
        talk.place: f"{TASKS[talk.place // 2 % len(TASKS)]}\n\n{other.messages[-1]['content']}"
        for talk, other in zip(talks, others, strict=True)
        if talk.place % 2
    }


def keep_texts(
    llm: LLM, file: Path, tokens: int, seed: int = 0, advance: Callable[[int], None] = lambda tokens: None
) -> Texts:
    """Texts of so many ``tokens`` that the model writes itself, from ``file`` as far as they are there, else written
    and put there batch by batch.

    Args:
        advance: called with the number of tokens that came.

    Raises:
        PromptError: if ``file`` is something else, there is no tokenizer, or the model writes nothing.
    """
    found, batches = Texts(), 0
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        try:
            for line in file.read_text(encoding="utf-8").splitlines():
                found.ids += [[int(token) for token in ids] for ids in json.loads(line)]
                batches += 1
        except (ValueError, TypeError) as error:
            raise PromptError(f"{str(file)!r} doesn't hold what a model wrote: {error}") from None
    advance(found.tokens)
    with file.open("a", encoding="utf-8") as out:
        for batch in write_texts(llm, batches, seed) if found.tokens < tokens else ():
            if not batch:
                raise PromptError("the model writes nothing on an open turn of its chat template: give a file of texts")
            out.write(json.dumps(batch) + "\n")
            out.flush()
            found.ids += [ids for ids in batch if len(ids) >= LEAST]
            advance(sum(map(len, batch)))
            if found.tokens >= tokens:
                break
    return found


Write = Callable[[list[list[int]], list[SamplingParams]], list[list[int]]]


def _by_engine(llm: LLM) -> tuple[int, Write]:
    """How many texts are written at once, and how: all are decoded together, so many that guesses would not pay for
    their rows."""

    def write(prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
        seqs = [llm.sequence(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        for _ in llm.plain().decoder.run(seqs, llm.max_batch):
            pass
        if failed := next((seq.error for seq in seqs if seq.error is not None), None):
            raise failed
        return [seq.output_ids for seq in seqs]

    return AT_ONCE, write


def _by_writer(llm: LLM, capacity: int) -> tuple[int, Write]:
    """The same on an accelerator: as many as its memory takes, all drawn with the seed of the first."""
    rows = rows_for(llm.engine.device, capacity * llm.engine.bytes_per_token + SCORES * llm.engine.vocab_size)
    writer = Writer(llm.engine.model, rows, capacity)

    def write(prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
        if not prompts:
            return []
        spread, one = [each.temperature for each in params], params[0]
        assert one.seed is not None
        return writer.write(prompts, one.max_tokens, spread, llm.eos_ids, one.seed, one.top_k or None)

    return rows, write
