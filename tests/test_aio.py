"""`AsyncLLM`: requests that are coroutines, and the thread that decodes them."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from tests import forked
from tests.tiny_models import kv_engine, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, AsyncLLM, OptionError, RequestError, SamplingParams, StepError
from tokentree.sharing import AHEAD

FEW, LONG = SamplingParams(max_tokens=12, ignore_eos=True), SamplingParams(max_tokens=250, ignore_eos=True)


def llm_of(**options: Any) -> LLM:
    model = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96, vocab_size=300)
    return LLM(model, ["suffix", "ngram"], tokenizer=tiny_tokenizer(), **options)


def run(work: Callable[[LLM, AsyncLLM], Coroutine[Any, Any, None]], **options: Any) -> LLM:
    """Runs ``work`` with an `AsyncLLM`, and looks whether anything is left."""
    llm = llm_of(**options)

    async def inside() -> None:
        async with AsyncLLM(llm) as asked:
            await asyncio.wait_for(work(llm, asked), 300)
        assert not asked._thread.is_alive()
        assert not asked._owners

    asyncio.run(inside())
    assert not kv_engine(llm)._kv
    return llm


async def read(stream: Any) -> list[int]:
    return [piece.token_id async for piece in stream if piece.token_id is not None]


def test_mixed_requests_get_the_texts_written_alone() -> None:
    async def work(llm: LLM, asked: AsyncLLM) -> None:
        dice, plain, jobs = random.Random(2), llm.plain(), list[Any]()
        for i in range(16):
            params = SamplingParams(
                max_tokens=dice.randint(1, 20), temperature=dice.choice([0.0, 0.8]), seed=i, n=1 + i % 3 // 2
            )
            jobs.append((some_tokens(dice.choice([1, 5, 60]), seed=i % 4), params))
        expected = [[one.token_ids for one in plain.generate([prompt], params)] for prompt, params in jobs]

        async def write(number: int) -> list[list[int]]:
            prompt, params = jobs[number]
            await asyncio.sleep(dice.random() / 10)
            if number % 2 and params.n == 1:
                return [await read(asked.stream(prompt, params))]
            return [one.token_ids for one in await asked.generate([prompt], params)]

        assert await asyncio.gather(*map(write, range(len(jobs)))) == expected

    run(work, prefill_rows=7)


def test_pieces_are_those_of_a_stream() -> None:
    async def work(llm: LLM, asked: AsyncLLM) -> None:
        for params in (FEW, SamplingParams(max_tokens=40, stop=("e", "zz"))):
            stream = asked.stream("one two three", params)
            expected = llm.stream("one two three", params)
            got = [(piece.text, piece.token_id) async for piece in stream]  # what was drafted is the drafter's matter
            assert got == [(piece.text, piece.token_id) for piece in expected]
            assert stream.result.text == expected.result.text
            assert stream.result.finish_reason == expected.result.finish_reason

    run(work)


def test_leaving_cancelling_and_aborting_end_a_request_and_no_other() -> None:
    async def work(llm: LLM, asked: AsyncLLM) -> None:
        async def some(stream: Any) -> None:
            async for piece in stream:
                if piece.token_id is not None:
                    return

        other = asyncio.create_task(asked.generate([some_tokens(5)], LONG))
        left = asked.stream(some_tokens(6), LONG)
        await some(left)
        await left.close()
        task = asyncio.create_task(asked.generate([some_tokens(7)], LONG))
        while not any(seq.prompt_ids == some_tokens(7) for seq, _ in kv_engine(llm)._kv.values()):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        aborted = asked.stream(some_tokens(8), LONG)
        reading = asyncio.create_task(read(aborted))
        while not aborted.result.token_ids:
            await asyncio.sleep(0.001)
        asked.abort(aborted.request_id)
        asked.abort(aborted.request_id)
        got = await reading
        for stream in (left, aborted):
            assert stream.result.finish_reason == "interrupted"
            assert 0 < len(stream.result.token_ids) < 250
        assert got == aborted.result.token_ids[: len(got)]
        (result,) = await other
        assert result.token_ids == llm.plain().generate([some_tokens(5)], LONG)[0].token_ids
        assert len(asked._owners) == 0

    run(work)


def test_what_fails_raises_and_the_others_go_on() -> None:
    def bad(ids: list[int], logits: torch.Tensor) -> Any:
        return logits[:-1] if len(ids) > 12 else logits

    async def work(llm: LLM, asked: AsyncLLM) -> None:
        other = asyncio.create_task(asked.generate([some_tokens(5)], FEW))
        failing = FEW.model_copy(update={"logits_processors": (bad,)})
        stream = asked.stream(some_tokens(10), failing)
        with pytest.raises(RequestError):
            await read(stream)
        assert len(stream.result.token_ids) == 3
        results = await asked.generate([some_tokens(10), some_tokens(5)], [failing, FEW])
        assert [one.finish_reason for one in results] == ["error", "length"]
        with pytest.raises(RequestError):
            await asked.generate([some_tokens(10)], failing)
        late = await asked.generate([some_tokens(4)], LONG.model_copy(update={"timeout": 0.0}))
        assert late[0].finish_reason == "timeout"
        with pytest.raises(OptionError, match="no beams"):
            await asked.generate([some_tokens(4)], SamplingParams(num_beams=2))
        assert (await other)[0].token_ids == results[1].token_ids

    run(work)


def test_a_request_that_nobody_reads_waits_for_its_reader_and_holds_up_no_other() -> None:
    async def work(llm: LLM, asked: AsyncLLM) -> None:
        expected = [one.token_ids for one in llm.plain().generate([some_tokens(5), some_tokens(6)], LONG)]
        unread = [asked.stream(some_tokens(5), LONG) for _ in range(2)]
        first = [(await anext(aiter(stream))).token_id for stream in unread]
        (other,) = await asked.generate([some_tokens(6)], LONG)
        assert other.token_ids == expected[1]
        for stream in unread:
            steps = stream._seq.metrics.target_forwards
            await asyncio.sleep(0.05)
            assert AHEAD <= stream._seq.metrics.target_forwards == steps <= AHEAD + 2
        for stream, token in zip(unread, first, strict=True):
            assert [token, *await read(stream)] == expected[0]

    run(work)


def test_a_request_that_nobody_reads_ends_at_its_deadline() -> None:
    async def work(llm: LLM, asked: AsyncLLM) -> None:
        stream = asked.stream(some_tokens(5), LONG.model_copy(update={"timeout": 0.5}))
        await anext(aiter(stream))
        while stream.result.finish_reason != "timeout":
            await asyncio.sleep(0.01)
        assert 0 < len(stream.result.token_ids) < 250
        await read(stream)

    run(work)


def test_what_is_running_and_waiting_is_counted() -> None:
    async def work(llm: LLM, asked: AsyncLLM) -> None:
        scheduler, seqs = asked.scheduler, [llm.sequence(some_tokens(4 + i), LONG) for i in range(3)]
        seen, used = set[tuple[int, int]](), set[int]()
        async for _ in asked.events(seqs):
            seen.add((scheduler.running, scheduler.waiting))
            used.add(scheduler.kv_used)
        assert (2, 1) in seen
        assert max(used) > 0
        assert (scheduler.running, scheduler.waiting, scheduler.kv_used) == (0, 0, 0)
        queued = [seq.metrics.queue_seconds for seq in seqs]
        assert 0 < queued[0] < queued[2]

    run(work, max_batch=2)


def test_closing_interrupts_and_nothing_can_be_asked_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, together = llm_of(), set[int]()
    step = llm.decoder.step

    def counted(seqs: Any, reading: Any = ()) -> None:
        together.add(len(seqs) + len(reading))
        step(seqs, reading)

    monkeypatch.setattr(llm.decoder, "step", counted)

    async def inside() -> None:
        asked = AsyncLLM(llm, max_batch=1)
        streams = [asked.stream(some_tokens(5 + i), LONG) for i in range(2)]
        tasks = [asyncio.create_task(read(stream)) for stream in streams]
        while not streams[0].result.token_ids:
            await asyncio.sleep(0.001)
        await asked.close()
        await asyncio.gather(*tasks)
        assert together == {1}  # the other one may go on where nobody reads the first
        assert [stream.result.finish_reason for stream in streams] == ["interrupted"] * 2
        with pytest.raises(OptionError, match="is closed"):
            await asked.generate([some_tokens(5)], FEW)
        assert not asked._owners

    asyncio.run(inside())
    assert not kv_engine(llm)._kv
    assert len(llm.generate([some_tokens(5)], FEW)[0].token_ids) == 12


def test_nobody_waits_for_a_thread_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of()

    async def inside() -> None:
        async with AsyncLLM(llm) as asked:
            monkeypatch.setattr(asked._scheduler, "step", lambda held: 1 / 0)
            for _ in range(2):
                with pytest.raises(StepError, match="division"):
                    await asyncio.wait_for(asked.generate([some_tokens(5)], FEW), 60)

    asyncio.run(inside())


@pytest.mark.parametrize("wrong", [None, 3, "model"])
def test_what_is_no_llm_is_refused(wrong: Any) -> None:
    with pytest.raises(OptionError, match="takes an LLM"):
        AsyncLLM(wrong)


FORKS = """
import asyncio, os
from tests.test_aio import FEW, llm_of
from tests.tiny_models import some_tokens
from tokentree import AsyncLLM, ForkError
llm = llm_of()

async def inside():
    async with AsyncLLM(llm) as asked:
        expected = (await asked.generate([some_tokens(5)], FEW))[0].token_ids
        child = os.fork()
        if not child:
            try:
                await asked.generate([some_tokens(5)], FEW)
            except ForkError:
                os._exit(7)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert (await asked.generate([some_tokens(5)], FEW))[0].token_ids == expected

asyncio.run(inside())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_fork_is_refused_at_once_and_leaves_the_parent_alone() -> None:
    done = forked.run([sys.executable, "-W", "ignore", "-c", FORKS])
    assert done.returncode == 0, done.stderr
