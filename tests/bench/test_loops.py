"""Repetition loops, figures up to the first of them, batches, and prompts that methods learn from before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree.bench.loops import COPIES, LEAST, first_loop
from tokentree.bench.methods import TreeMethod, make_method
from tokentree.bench.peers import Output, Peers
from tokentree.bench.report import Work, summarise, table, work
from tokentree.bench.results import Run, Sample, new_run
from tokentree.bench.runner import run_batches, run_bench
from tokentree.llm import LLM
from tokentree.prompts import Conversation
from tokentree.sampling import SamplingParams

TEXTS = ("the quick brown", "one two three one two three", "a tree of tokens", "und mehr", "seven eight nine")
PROMPTS = [Conversation(str(number), "a", (text,), chat=False) for number, text in enumerate(TEXTS)]


# -- where a loop begins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], None),
        (list(range(60)), None),
        ([9, 8, 7] + [1, 2, 3, 4, 5, 6] * 3, 9),
        ([9, 8, 7] + [1, 2, 3, 4, 5, 6] * 2 + [1, 2, 3, 4, 5, 0], None),  # twice and a bit
        ([5] + [7] * 16, 2),
        ([5] + [7] * 15, None),  # too short to matter
        ([1, 2, 3] * 5 + [4], None),
        ([1, 2, 3] * 5 + [1], 3),
        (list(range(40)) * 3, 40),
        ([1, 2] * 20 + [7] * 40, 2),
        ([0] * 10 + [1, 2] * 20 + [7] * 40, 12),
    ],
)
def test_a_loop_begins_at_its_second_copy(ids: list[int], expected: int | None) -> None:
    assert first_loop(ids) == expected


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 9)), max_size=5))
def test_the_first_loop_is_the_one_that_a_plain_search_finds(parts: list[tuple[list[int], int]]) -> None:
    ids = [token for stretch, times in parts for token in stretch * times]
    found = []
    for period in range(1, len(ids)):
        length = max(COPIES * period, LEAST)
        for begin in range(len(ids) - length + 1):
            if all(ids[i] == ids[i + period] for i in range(begin, begin + length - period)):
                found.append(begin + period)
    assert first_loop(ids) == min(found, default=None)


# -- figures up to there --------------------------------------------------------------------------------------------


def _sample(method: str, ids: list[int], steps: list[tuple[int, int, float]]) -> Sample:
    """A sample whose method took ``steps``: rows, tokens and seconds of each forward."""
    tokens, seconds = sum(step[1] for step in steps), sum(step[2] for step in steps)
    known = {"drafted_tokens": sum(step[0] for step in steps) - len(steps)} if steps and steps[0][0] else {}
    return Sample(
        prompt="p", category="c", turn=0, method=method, order=0, token_ids=ids, prefill_seconds=1.0,
        decode_seconds=seconds, decoded_tokens=tokens, same_as_plain=True,
        metrics={"target_forwards": len(steps), "new_tokens": tokens, "steps": steps, **known},
    )  # fmt: skip


def test_work_is_counted_whole_or_up_to_a_token() -> None:
    sample = _sample("tree", list(range(6)), [(4, 2, 0.25), (6, 3, 0.75), (2, 1, 0.5)])
    assert work(sample) == Work(6, 1.5, 3, 12)
    assert work(sample, 2) == Work(2, 0.25, 1, 4)
    assert work(sample, 4) == Work(4, 0.25 + 0.5, 2, 10)  # two of the second step's three tokens
    assert work(sample, 5) == Work(5, 1.0, 2, 10)
    assert work(sample, 99) == work(sample)


def test_tokens_that_came_with_the_prefill_cost_no_decoding() -> None:
    peer = _sample("transformers", list(range(7)), [(0, 1, 0.5)] * 6)
    assert work(peer) == Work(6, 3.0, 6, None)
    assert work(peer, 4) == Work(3, 1.5, 3, None)
    assert work(peer, 1) == Work(0, 0.0, 0, None)


def test_a_sample_without_steps_is_counted_whole() -> None:
    sample = _sample("batch", list(range(6)), [])
    sample.decoded_tokens, sample.decode_seconds, sample.metrics = 6, 3.0, {}
    assert work(sample, 2) == work(sample) == Work(6, 3.0, None, None)


def test_a_speed_up_that_comes_from_a_loop_is_told_without_it() -> None:
    ids = [*range(20), *[1, 2] * 20]  # the second copy starts at token 22
    run = new_run({})
    run.samples += [
        _sample("plain", ids, [(1, 1, 0.1)] * 60),
        _sample("tree", ids, [(5, 1, 0.1)] * 20 + [(11, 10, 0.1)] * 4),
    ]
    whole, cut = summarise(run), summarise(run, cut_loops=True)
    assert [row.speed_up for row in whole] == [1, pytest.approx(2.5)]
    assert [row.speed_up for row in cut] == [1, pytest.approx(2.2 / 2.02)]
    assert [row.tokens_per_second for row in cut] == [pytest.approx(10), pytest.approx(22 / 2.02)]
    assert [row.mean_accepted_length for row in whole] == [1, 60 / 24]
    assert [row.mean_accepted_length for row in cut] == [1, 22 / 21]
    assert [row.rows for row in whole] == [1, (100 + 44) / 24]
    assert [row.rows for row in cut] == [1, (100 + 11) / 21]
    assert str(table(run, cut_loops=True).title) == "all categories, up to the first loop"
    assert str(table(run).title) == "all categories"


def test_the_first_method_says_where_a_text_is_cut() -> None:
    straight, loop = list(range(60)), [*range(20), *[1, 2] * 20]
    run = new_run({})
    run.samples += [_sample("plain", straight, [(1, 1, 0.1)] * 60), _sample("lossy", loop, [(2, 1, 0.1)] * 60)]
    assert summarise(run, cut_loops=True) == summarise(run)


# -- batches and warm prompts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tiny("llama", vocab_size=300), tiny_tokenizer())


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, "none", draft_model=folder, dtype="float32")


class Noted(TreeMethod):
    """Notes what it was asked, and answers with what was asked."""

    def __init__(self, name: str, calls: list[tuple[str, list[list[int]], int]], learns: bool = True) -> None:
        self.name, self.learns, self._calls = name, learns, calls

    def run(self, prompt_ids: list[int], params: SamplingParams) -> Output:
        return self.run_together([prompt_ids], params)

    def run_together(self, prompts: list[list[int]], params: SamplingParams) -> Output:
        self._calls.append((self.name, prompts, params.max_tokens))
        ids = [token for prompt in prompts for token in prompt]
        return Output(ids, 0.5, 2.0, len(ids), {})


def _ids(llm: LLM, *texts: str) -> list[list[int]]:
    return [llm.sequence(text, SamplingParams()).prompt_ids for text in texts]


def test_batches_of_real_methods_give_plains_ids(llm: LLM, folder: Path, tmp_path: Path) -> None:
    specs = ["plain", "ngram:chain:3", "draft_model:2x1", "merged:cost:nodes=12"]
    peers = Peers(str(folder), str(folder), "float32", None, llm)
    methods = [made for spec in specs if isinstance(made := make_method(spec, llm, peers), TreeMethod)]
    seen: list[Sample] = []
    params = SamplingParams(max_tokens=8)
    run = run_batches(llm, methods, PROMPTS, params, new_run({}), tmp_path, 2, seen.append)
    assert [sample.method for sample in run.samples] == specs * 2
    assert seen == run.samples
    assert [sample.error for sample in run.samples] == [None] * 8
    assert all(sample.same_as_plain and sample.decode_seconds > 0 for sample in run.samples)
    assert {sample.prompt for sample in run.samples} == {"0+1", "2+3"}
    assert {sample.category for sample in run.samples} == {"batch of 2"}
    one_by_one = [llm.plain().generate([ids], params)[0].token_ids for ids in _ids(llm, *TEXTS[:2])]
    assert run.samples[0].token_ids == one_by_one[0] + one_by_one[1]
    assert run.samples[0].decoded_tokens == len(run.samples[0].token_ids)
    plain, ngram, *_ = summarise(run)
    assert (plain.mean_accepted_length, plain.rows, plain.same) == (1, 1, 2)
    assert ngram.rows is not None
    assert ngram.rows >= 1
    assert Run.model_validate_json((tmp_path / "results.json").read_text()) == run


def test_batches_rotate_and_warm_up_on_no_ones_prompt(llm: LLM, tmp_path: Path) -> None:
    calls: list[tuple[str, list[list[int]], int]] = []
    methods = [Noted("x", calls), Noted("y", calls)]
    run = run_batches(llm, methods, PROMPTS, SamplingParams(max_tokens=40), new_run({}), tmp_path, 2)
    asked = _ids(llm, *TEXTS)
    assert [name for name, _, _ in calls] == ["x", "y", "y", "x", "x", "y"]
    assert [prompts for _, prompts, _ in calls[2:]] == [asked[:2]] * 2 + [asked[2:4]] * 2
    assert all(len(prompts) == 2 and prompts[0] not in asked for _, prompts, _ in calls[:2])
    assert [most for _, _, most in calls] == [16, 16, 40, 40, 40, 40]
    assert [(sample.method, sample.order) for sample in run.samples] == [("x", 1), ("y", 0), ("x", 0), ("y", 1)]


def test_a_batch_that_fails_leaves_its_error(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    bad = Noted("bad", calls)
    monkeypatch.setattr(bad, "_calls", None)
    run = run_batches(llm, [Noted("x", calls), bad], PROMPTS, SamplingParams(), new_run({}), tmp_path, 5)
    assert [sample.error is None for sample in run.samples] == [True, False]
    assert [row.failures for row in summarise(run)] == [0, 1]


def test_warm_prompts_reach_the_methods_that_learn_and_are_not_counted(llm: LLM, tmp_path: Path) -> None:
    calls: list[tuple[str, list[list[int]], int]] = []
    methods = [Noted("plain", calls, learns=False), Noted("suffix", calls)]
    params = SamplingParams(max_tokens=30)
    run = run_bench(llm, methods, PROMPTS[:1], params, new_run({}), tmp_path, warm=PROMPTS[1:3])
    met = {name: [prompts[0] for who, prompts, _ in calls[2:] if who == name] for name in ("plain", "suffix")}
    first, *warm = _ids(llm, *TEXTS[:3])
    assert met == {"plain": [first], "suffix": [*warm, first]}
    assert [sample.prompt for sample in run.samples] == ["0", "0"]


@pytest.mark.parametrize(
    ("spec", "learns"),
    [("plain", False), ("default", True), ("suffix:cost", True), ("transformers", False)],
)
def test_plain_methods_learn_nothing(llm: LLM, folder: Path, spec: str, learns: bool) -> None:
    assert make_method(spec, llm, Peers(str(folder), None, "float32", None, llm)).learns is learns


def test_warm_prompts_make_a_lookup_know_the_answer(llm: LLM, folder: Path, tmp_path: Path) -> None:
    forwards = []
    for warm in ([], PROMPTS[:1]):
        method = make_method("suffix:chain:4", llm, Peers(str(folder), None, "float32", None, llm))
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        run = run_bench(llm, [method], PROMPTS[:1], params, new_run({}), tmp_path, warm=warm)
        forwards.append(run.samples[0].metrics["target_forwards"])
    assert forwards[1] < forwards[0]
