"""Do requests that come, go and fail at once leave each other alone?

    python benchmarks/clients.py MODEL [--heads DIR] [--clients 8] [--requests 40] [--asyncio] [--out FILE]

Each client makes so many requests, one after another, of mixed lengths and kinds: whole texts, streams, streams that
are left, bad options, prompts that are too long, rules that fail, and deadlines. Clients are threads that call one
`LLM`, or with ``--asyncio`` tasks that ask one `AsyncLLM`. All texts are written alone first, plainly. Counted are
texts that differ from these, requests that end otherwise than they should, and requests that were left and still have
KV in the second forward after that. Exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from tokentree import LLM, AsyncLLM, OptionError, PromptError, RequestError, SamplingParams

PROMPTS = (
    "List the days of the week.",
    "Write a Python function that adds two numbers, and explain it line by line.",
    "Why is the sky blue?",
    "Repeat three times: the quick brown fox jumps over the lazy dog.",
    "Translate to French: good morning, my friend.",
    "Count from one to twenty.",
    "Tell me a story about a lighthouse. " * 20,
    "What is 12 times 12?",
)
LENGTHS = 1, 9, 24, 70
KINDS = {"whole": 6, "stream": 6, "left": 4, "bad option": 1, "too long": 1, "failing rule": 2, "deadline": 1}


def failing(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """A rule that gives too few logits."""
    return logits[:-1]


@dataclass(frozen=True)
class Job:
    kind: str
    prompt: int
    tokens: int
    seeded: bool

    @property
    def params(self) -> SamplingParams:
        rest: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7} if self.seeded else {}
        if self.kind == "failing rule":
            rest["logits_processors"] = (failing,)
        if self.kind == "deadline":
            rest["timeout"] = 0.0
        return SamplingParams(max_tokens=self.tokens, **rest)


class Held:
    """The requests that have KV in ``llm``'s engine, forward by forward."""

    def __init__(self, llm: LLM) -> None:
        engine: Any = llm.engine
        self.forwards, self.late = 0, 0
        self._live, self._left = set[int](), dict[int, int]()
        begin, verify, release = engine.begin, engine.verify, engine.release

        def watched_begin(seq: Any) -> int:
            self._live.add(seq.id)
            return int(begin(seq))

        def watched_verify(*args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            self.late += sum(1 for one, at in list(self._left.items()) if one in self._live and self.forwards > at + 2)
            return verify(*args, **kwargs)

        def watched_release(seqs: Any) -> None:
            self._live.difference_update(seq.id for seq in seqs)
            release(seqs)

        engine.begin, engine.verify, engine.release = watched_begin, watched_verify, watched_release

    def leave(self, request_id: int) -> None:
        """From the next forward on, ``request_id`` may have no KV; one may be under way."""
        self._left[request_id] = self.forwards

    @property
    def left(self) -> int:
        """Requests that have KV now."""
        return len(self._live)


class Alone:
    """The texts that are written alone."""

    def __init__(self, llm: LLM) -> None:
        self.ids = [llm.chat_prompt([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
        self._texts = {
            seeded: [
                one.token_ids
                for ids in self.ids
                for one in llm.plain().generate([ids], Job("whole", 0, max(LENGTHS), seeded).params)
            ]
            for seeded in (False, True)
        }

    def text(self, job: Job) -> list[int]:
        return self._texts[job.seeded][job.prompt][: job.tokens]


def expected_error(job: Job) -> type[Exception] | None:
    return {"bad option": OptionError, "too long": PromptError, "failing rule": RequestError}.get(job.kind)


def asked(job: Job, alone: Alone, context: int, vocab: int) -> tuple[list[int], SamplingParams]:
    """Prompt and options of a request, of which one may be wrong."""
    ids, params = alone.ids[job.prompt], job.params
    if job.kind == "bad option":
        params = params.model_copy(update={"logit_bias": {vocab: 1.0}})
    return (ids * (1 + context // len(ids)) if job.kind == "too long" else ids), params


def of_thread(llm: LLM, alone: Alone, held: Held, job: Job) -> bool:
    """Whether a request of a thread ends as it should."""
    ids, params = asked(job, alone, llm.engine.context, llm.engine.vocab_size)
    if error := expected_error(job):
        try:
            llm.generate([ids], params)
        except error:
            return True
        return False
    if job.kind in ("whole", "deadline"):
        result = llm.generate([ids], params)[0]
        if job.kind == "deadline":
            return result.finish_reason == "timeout" and not result.token_ids
        return result.token_ids == alone.text(job)
    stream, got = llm.stream(ids, params), list[int]()
    for piece in stream:
        if piece.token_id is not None:
            got.append(piece.token_id)
        if job.kind == "left" and len(got) == 1 + job.tokens // 3:
            stream.close()
            held.leave(stream._seq.id)
            break
    return got == alone.text(job)[: len(got)] and (job.kind == "left" or len(got) == len(alone.text(job)))


async def of_task(llm: AsyncLLM, alone: Alone, held: Held, job: Job) -> bool:
    """Whether a request of a task ends as it should."""
    engine = llm.llm.engine
    ids, params = asked(job, alone, engine.context, engine.vocab_size)
    if error := expected_error(job):
        try:
            await llm.generate([ids], params)
        except error:
            return True
        return False
    if job.kind in ("whole", "deadline"):
        result = (await llm.generate([ids], params))[0]
        if job.kind == "deadline":
            return result.finish_reason == "timeout" and not result.token_ids
        return result.token_ids == alone.text(job)
    stream, got = llm.stream(ids, params), list[int]()
    async for piece in stream:
        if piece.token_id is not None:
            got.append(piece.token_id)
        if job.kind == "left" and len(got) == 1 + job.tokens // 3:
            await stream.close()
            held.leave(stream.request_id)
            break
    return got == alone.text(job)[: len(got)] and (job.kind == "left" or len(got) == len(alone.text(job)))


def threads(llm: LLM, alone: Alone, held: Held, plans: list[list[Job]], tell: Callable[[Job, bool], None]) -> None:
    def client(plan: list[Job]) -> None:
        for job in plan:
            tell(job, of_thread(llm, alone, held, job))

    with ThreadPoolExecutor(len(plans)) as pool:
        for done in as_completed([pool.submit(client, plan) for plan in plans]):
            done.result()


async def tasks(llm: LLM, alone: Alone, held: Held, plans: list[list[Job]], tell: Callable[[Job, bool], None]) -> None:
    async def client(one: AsyncLLM, plan: list[Job]) -> None:
        for job in plan:
            tell(job, await of_task(one, alone, held, job))

    async with AsyncLLM(llm) as one:
        await asyncio.gather(*(client(one, plan) for plan in plans))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=40, help="of each client")
    parser.add_argument("--asyncio", action="store_true", help="tasks that ask an AsyncLLM, instead of threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    llm = LLM(options.model, heads=options.heads)
    alone, held, dice = Alone(llm), Held(llm), random.Random(options.seed)
    plans = [
        [
            Job(
                dice.choices([*KINDS], [*KINDS.values()])[0], dice.randrange(len(PROMPTS)), dice.choice(LENGTHS),
                dice.random() < 0.4,
            )
            for _ in range(options.requests)
        ]
        for _ in range(options.clients)
    ]  # fmt: skip
    counts, wrong, started = Counter[str](), list[Job](), time.perf_counter()
    with Progress(disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task(f"{options.clients} clients", total=options.clients * options.requests)

        def tell(job: Job, right: bool) -> None:
            counts[job.kind] += 1
            if not right:
                wrong.append(job)
            bar.advance(line)

        if options.asyncio:
            asyncio.run(tasks(llm, alone, held, plans, tell))
        else:
            threads(llm, alone, held, plans, tell)
    found = {
        "clients": options.clients, "requests": sum(counts.values()), "asyncio": options.asyncio,
        "seconds": round(time.perf_counter() - started, 1), "forwards": held.forwards, "counts": dict(counts),
        "wrong": [vars(job) for job in wrong], "kv_after_leaving": held.late, "kv_at_the_end": held.left,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    sys.exit(bool(wrong or held.late or held.left))


if __name__ == "__main__":
    main()
