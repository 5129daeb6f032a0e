"""Texts to train on: from a file, or written by the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokentree.errors import PromptError
from tokentree.llm import LLM
from tokentree.sampling import SamplingParams

LEAST = 8  # tokens of a text that is worth reading
AT_ONCE = 256  # texts that a model writes; as one is finished, another joins those that are decoded together
TEMPERATURES = (0.0, 0.3, 0.5, 0.8)  # of the answers that a model writes
SAID = {"temperature": 1.0, "top_k": 50}  # how it writes what a user says
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


def open_turn(tokenizer: PreTrainedTokenizerBase, bos_ids: list[int]) -> list[int]:
    """What stands before the first thing a user says; ``bos_ids`` where there is no chat template."""
    if not tokenizer.chat_template:
        return bos_ids
    messages = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    before: list[int] = tokenizer(str(text).partition(MARK)[0], add_special_tokens=False).input_ids
    return before


def write_texts(
    llm: LLM, first: int = 0, seed: int = 0, prompt_tokens: int = 64, answer_tokens: int = 256
) -> Iterator[list[list[int]]]:
    """Texts that the model writes itself, without end, a batch at a time: first what a user might say, as its chat
    template leaves the user's turn open, drawn as `SAID` says; then an answer, at one of `TEMPERATURES`. A model
    without a template just writes. Nothing is written on a turn that came out empty.

    What comes in a batch follows from ``seed`` and its number, of which ``first`` is the first.

    Raises:
        PromptError: if there is no tokenizer.
    """
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise PromptError("a model without a tokenizer can't write its own training data: give a file")
    start = open_turn(tokenizer, sorted(llm.eos_ids)[:1] or [0])
    for number in count(first):
        places = range(number * AT_ONCE, (number + 1) * AT_ONCE)
        drawn = [SamplingParams(seed=seed + 2 * place, max_tokens=prompt_tokens, **SAID) for place in places]
        said = _write(llm, [start] * len(places), drawn)
        if tokenizer.chat_template:
            texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in said]
            prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) if text else [] for text in texts]
        else:
            prompts = [[*start, *ids] for ids in said]
        kept = [(place, prompt) for place, prompt in zip(places, prompts, strict=True) if prompt]
        drawn = [
            SamplingParams(
                temperature=TEMPERATURES[place % len(TEMPERATURES)], seed=seed + 2 * place + 1, max_tokens=answer_tokens
            )
            for place, _ in kept
        ]
        answers = _write(llm, [prompt for _, prompt in kept], drawn)
        yield [[*prompt, *answer] for (_, prompt), answer in zip(kept, answers, strict=True)]


def keep_texts(
    llm: LLM, file: Path, tokens: int, seed: int = 0, advance: Callable[[int], None] = lambda tokens: None
) -> Texts:
    """Texts of so many ``tokens`` that the model writes itself, from ``file`` as far as they are there, else written
    and put there batch by batch.

    Args:
        advance: called with the number of tokens that came.

    Raises:
        PromptError: if ``file`` is something else, or there is no tokenizer.
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
            out.write(json.dumps(batch) + "\n")
            out.flush()
            found.ids += [ids for ids in batch if len(ids) >= LEAST]
            advance(sum(map(len, batch)))
            if found.tokens >= tokens:
                break
    return found


def _write(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """The continuation of each prompt, all decoded together: so many that guesses would not pay for their rows."""
    seqs = [llm.sequence(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    for _ in llm.plain().decoder.run(seqs, llm.max_batch):
        pass
    return [seq.output_ids for seq in seqs]
