"""What look-ups of several replicas learn, in one folder; and engines that get on, or don't."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve.serving import tiny_llm, until
from tests.tiny_models import some_tokens
from tokentree import AsyncLLM, OptionError, SamplingParams, StepError
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.drafters.lookup.suffix import PART, Suffix
from tokentree.scale.memories import Memories


def learnt(*texts: list[int], most: int = 1000) -> Suffix:
    drafter = Suffix(300, most)
    drafter._learn([np.array(text, np.int32) for text in texts])
    return drafter


def texts_of(drafter: Suffix) -> list[list[int]]:
    text, found = list[int](), list[list[int]]()
    for token in drafter._store.tokens:
        if token < 0:
            found, text = [*found, text], []
        else:
            text.append(token)
    return found


def merge(drafter: Suffix | Recycling, folder: Path) -> int:
    """How many parts there were."""
    parts = list(drafter.merging(folder))
    for part in parts:
        part()
    return len(parts)


def test_texts_of_others_are_taken_once(tmp_path: Path) -> None:
    learnt([1, 2, 3], [4, 5]).save(tmp_path)
    drafter = learnt([4, 5], [6])
    assert merge(drafter, tmp_path) == 1
    assert texts_of(drafter) == [[4, 5], [6], [1, 2, 3]]
    assert merge(drafter, tmp_path) == 0
    learnt([1, 2, 3], [4, 5], [7]).save(tmp_path)
    merge(drafter, tmp_path)
    assert texts_of(drafter) == [[4, 5], [6], [1, 2, 3], [7]]


def test_what_was_forgotten_doesn_t_come_back(tmp_path: Path) -> None:
    learnt([1, 2, 3]).save(tmp_path)
    drafter = learnt(most=20)
    merge(drafter, tmp_path)
    drafter._learn([np.arange(10, 18, dtype=np.int32), np.arange(20, 28, dtype=np.int32)])
    assert [1, 2, 3] not in texts_of(drafter)
    merge(drafter, tmp_path)
    assert [1, 2, 3] not in texts_of(drafter)


def test_many_texts_come_in_parts(tmp_path: Path) -> None:
    texts = [some_tokens(100, seed=seed, vocab=300) for seed in range(3 * PART // 100)]
    learnt(*texts, most=10**6).save(tmp_path)
    drafter = learnt(most=10**6)
    assert merge(drafter, tmp_path) == 3
    assert texts_of(drafter) == texts
    assert merge(learnt(), tmp_path / "none") == 0


def test_rows_that_are_empty_are_filled(tmp_path: Path) -> None:
    one, other = Recycling(50), Recycling(50)
    other._successors[[3, 4]], other._probs[[3, 4]] = np.arange(8), 0.125
    other._pairs[7], other._successors[57], other._probs[57] = 99, np.arange(8), 0.125
    one._successors[3], one._probs[3] = np.arange(8)[::-1], 0.1
    other.save(tmp_path)
    assert merge(one, tmp_path) == 1
    assert one._successors[3].tolist() == [*range(7, -1, -1)]  # its own stays
    assert one._successors[4].tolist() == one._successors[57].tolist() == [*range(8)]
    assert (one._pairs[7], (one._pairs >= 0).sum()) == (99, 1)
    with pytest.raises(OptionError, match="another model"):
        merge(Recycling(60), tmp_path)


def memories(llm: Any, folder: Path, rank: int, seconds: float = 3600) -> Memories:
    return Memories(llm, str(folder), lambda: rank, seconds)


def written(llm: Any, seed: int) -> Any:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    (result,) = llm.generate([some_tokens(20, seed=seed)], params)
    return result


def test_replicas_learn_from_one_another(tmp_path: Path) -> None:
    first, second = tiny_llm(), tiny_llm()
    one, other = memories(first, tmp_path, 0), memories(second, tmp_path, 1)
    alone = written(first, 1)
    one.exchange()
    other.exchange()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replica-0", "replica-1"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "replica-0").iterdir()}
    again = written(second, 1)
    assert again.token_ids == alone.token_ids
    assert again.metrics.mean_accepted_length > alone.metrics.mean_accepted_length
    other.exchange()
    assert {path: path.stat().st_mtime_ns for path in files} == files  # it writes its own alone
    one.close()
    other.close()


def test_a_new_replica_begins_with_what_all_knew_and_writes_at_its_end(tmp_path: Path) -> None:
    first = tiny_llm()
    one = memories(first, tmp_path, 0)
    alone = written(first, 2)
    one.close()
    second = tiny_llm()
    other = memories(second, tmp_path, 0, 0.02)
    assert written(second, 2).metrics.mean_accepted_length > alone.metrics.mean_accepted_length
    stamp = (tmp_path / "replica-0" / "suffix.safetensors").stat().st_mtime_ns
    until(lambda: (tmp_path / "replica-0" / "suffix.safetensors").stat().st_mtime_ns > stamp)
    other.close()


def test_a_damaged_memory_is_told_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = tiny_llm()
    one = memories(llm, tmp_path, 0)
    (tmp_path / "replica-1").mkdir()
    (tmp_path / "replica-1" / "suffix.safetensors").write_bytes(b"nothing")
    one.exchange()
    assert "memories aren't exchanged: can't read" in caplog.text
    one.exchange()
    assert (tmp_path / "replica-0" / "suffix.safetensors").is_file()
    one.close()
    Memories(llm, None, lambda: 0, 1).close()


def test_an_engine_that_makes_no_step_is_noticed() -> None:
    llm, goes_on = tiny_llm(), threading.Event()
    written(llm, 1)
    monkey: Any = llm.decoder
    step = monkey.step

    def stuck(*args: Any) -> None:
        goes_on.wait(60)
        step(*args)

    monkey.step = stuck

    async def asks() -> None:
        async with AsyncLLM(llm) as asked:
            asked.check(0)  # nothing is asked for
            events = asked.events([llm.sequence([5, 6], SamplingParams(max_tokens=3, ignore_eos=True))])
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.2)
            asked.check(60)
            with pytest.raises(StepError, match="no step was made for 0 seconds, and there are requests"):
                asked.check(0.1)
            goes_on.set()
            await waiting
            await events.aclose()
            until(lambda: asked.scheduler.idle)
            asked.check(0)

    asyncio.run(asks())


def test_a_step_and_the_first_request_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    llm = tiny_llm()
    monkeypatch.setattr(llm.decoder, "clock", lambda: now[0])
    scheduler = llm.scheduler()
    now[0] += 10
    assert scheduler.still == 0
    seqs = [llm.sequence([5, 6 + number], SamplingParams(max_tokens=3)) for number in range(2)]
    scheduler.add(seqs[0])
    assert scheduler.still == 0
    now[0] += 3
    scheduler.add(seqs[1])
    assert scheduler.still == 3  # a further request doesn't hide it
    scheduler.step()
    assert scheduler.still == 0
