"""The bench: interleaved, nothing shared, failures kept as failures, figures pooled."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.drafters.test_eagle import some_head
from tests.drafters.test_medusa import random_heads
from tests.tiny_models import save_model, some_tokens, tiny, tiny_tokenizer
from tokentree.bench.methods import TreeMethod, make_method
from tokentree.bench.peers import Output, Peers
from tokentree.bench.report import summarise, table
from tokentree.bench.results import Run, Sample, new_run
from tokentree.bench.runner import run_bench
from tokentree.drafters.eagle import Eagle
from tokentree.drafters.medusa import Medusa
from tokentree.errors import OptionError, PairingError
from tokentree.heads.eagle_files import write_eagle
from tokentree.heads.saved import About, write_heads
from tokentree.llm import LLM
from tokentree.prompts import Conversation
from tokentree.sampling import SamplingParams

PROMPTS = [
    Conversation("one", "a", ("the quick brown", "and again"), chat=True),
    Conversation("two", "b", ("one two three one two three",), chat=False),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tiny("llama", vocab_size=300), tiny_tokenizer())


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, "none", draft_model=folder, dtype="float32")


class Noted:
    """A method that notes what it was asked, and answers with the prompt's first tokens."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[int, ...]]], fails: bool = False) -> None:
        self.name, self.learns, self._calls, self._fails = name, False, calls, fails

    def run(self, prompt_ids: list[int], params: SamplingParams) -> Output:
        self._calls.append((self.name, tuple(prompt_ids)))
        if self._fails:
            raise RuntimeError("it broke")
        counts = {"new_tokens": 4, "target_forwards": 2, "accepted_tokens": 2, "refused_steps": 1, "drafted_tokens": 6}
        return Output(prompt_ids[:4], 0.5, 2.0, 4, counts)


def _run(llm: LLM, methods: list[Any], out: Path, prompts: list[Conversation] = PROMPTS) -> Run:
    return run_bench(llm, methods, prompts, SamplingParams(max_tokens=8), new_run({}), out)


def test_methods_take_turns_on_each_turn_and_see_the_same_prompt(llm: LLM, tmp_path: Path) -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    run = _run(llm, [Noted("x", calls), Noted("y", calls), Noted("z", calls)], tmp_path)
    counted = calls[3:]  # the first round warms up and is not counted
    assert [name for name, _ in calls[:3]] == ["x", "y", "z"]
    rounds = [counted[i : i + 3] for i in range(0, 9, 3)]
    assert all(len({ids for _, ids in one}) == 1 for one in rounds)
    assert [[name for name, _ in one] for one in rounds] == [["x", "y", "z"], ["y", "z", "x"], ["y", "z", "x"]]
    assert len(run.samples) == 9
    assert Counter(s.order for s in run.samples) == {0: 3, 1: 3, 2: 3}


def test_a_later_turn_has_the_first_methods_answer_as_its_history(llm: LLM, tmp_path: Path) -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    _run(llm, [Noted("x", calls)], tmp_path, PROMPTS[:1])
    assert llm.tokenizer is not None
    first, second = calls[1][1], calls[2][1]
    answer = llm.tokenizer.decode(list(first[:4]), skip_special_tokens=True)
    assert llm.tokenizer.decode(list(second)).count(f"<|assistant|>{answer}") == 1


def test_a_method_that_fails_leaves_its_error_and_no_time(llm: LLM, tmp_path: Path) -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    run = _run(llm, [Noted("x", calls), Noted("bad", calls, fails=True)], tmp_path)
    bad = [s for s in run.samples if s.method == "bad"]
    assert {s.error for s in bad} == {"RuntimeError: it broke"}
    assert all(s.decode_seconds == 0 and not s.token_ids and s.same_as_plain is None for s in bad)
    rows = {row.method: row for row in summarise(run)}
    assert rows["bad"].failures == 3
    assert rows["x"].samples == 0  # turns that a method failed on are left out for all


def test_prompts_of_one_name_in_two_files_are_two_prompts(llm: LLM, tmp_path: Path) -> None:
    prompts = [Conversation("1", file, (text,), chat=False) for file, text in (("a", "one"), ("b", "x" * 9))]
    calls: list[tuple[str, tuple[int, ...]]] = []
    run = _run(llm, [Noted("x", calls)], tmp_path, prompts[:1])
    run.samples[0].error = "it broke"
    run = run_bench(llm, [Noted("x", calls)], prompts, SamplingParams(max_tokens=8), run, tmp_path)
    assert [sample.category for sample in run.samples] == ["a", "b"]
    assert [row.samples for row in summarise(run)] == [1]


def test_a_run_goes_on_where_it_stopped(llm: LLM, tmp_path: Path) -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    whole = _run(llm, [Noted("x", calls), Noted("y", calls)], tmp_path / "whole")
    asked = calls[2:]
    half = Run.load(tmp_path / "whole")
    half.samples = half.samples[:2]  # the first turn
    calls.clear()
    params = SamplingParams(max_tokens=8)
    run_bench(llm, [Noted("x", calls), Noted("y", calls)], PROMPTS, params, half, tmp_path / "half")
    assert calls[2:] == asked[2:]  # with the same history
    assert Run.load(tmp_path / "half").samples == whole.samples


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_what_is_no_run_cannot_go_on(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(OptionError, match="there is no run in"):
        Run.load(tmp_path)


def test_results_are_written_whole_and_read_back(llm: LLM, tmp_path: Path) -> None:
    run = _run(llm, [Noted("x", [])], tmp_path / "new" / "folder")
    raw = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert Run(**raw) == run
    assert {"command", "started", "commit", "versions", "machine", "settings", "samples"} <= set(raw)
    assert raw["machine"]["threads"] >= 1
    assert raw["versions"]["torch"]
    with pytest.raises(ValidationError):
        Sample(prompt="p")  # type: ignore[call-arg]


def test_figures_are_pooled_over_samples() -> None:
    run = new_run({})
    for method, seconds in (("plain", (4.0, 4.0)), ("tree", (1.0, 3.0))):
        for prompt, (tokens, time) in enumerate(zip((10, 30), seconds, strict=True)):
            counts = {"new_tokens": tokens, "target_forwards": 10, "accepted_tokens": tokens - 10, "refused_steps": 5}
            run.samples.append(
                Sample(
                    prompt=str(prompt),
                    category="a" if prompt else "b",
                    turn=0,
                    method=method,
                    order=0,
                    token_ids=list(range(tokens)),
                    prefill_seconds=1.0,
                    decode_seconds=time,
                    decoded_tokens=tokens,
                    same_as_plain=True,
                    metrics=counts | {"drafted_tokens": 50},
                )
            )
    plain, tree = summarise(run)
    assert (plain.tokens_per_second, tree.tokens_per_second) == (5.0, 10.0)
    assert tree.speed_up == 2.0
    assert plain.end_to_end == 1.0
    assert tree.end_to_end == pytest.approx((40 / 6) / (40 / 10))
    assert tree.mean_accepted_length == 2.0
    assert tree.acceptance_rate == pytest.approx(20 / 30)
    assert (plain.rows, tree.rows) == (6.0, 6.0)
    assert [row.tokens_per_second for row in summarise(run, "a")] == [7.5, 10.0]
    assert table(run).row_count == 2
    cells = [list(column.cells) for column in table(run).columns]
    assert [str(column.header) for column in table(run).columns][1:4] == ["tokens/s", "x plain", "end to end"]
    assert cells[1:4] == [["5.0", "10.0"], ["1.00", "2.00"], ["1.00", "1.67"]]  # as times plain, as in the report


def test_real_methods_agree_and_share_nothing(llm: LLM, folder: Path, tmp_path: Path) -> None:
    peers = Peers(str(folder), str(folder), "float32", None, llm)
    specs = [
        "plain",
        "default",
        "merged:cost:nodes=9",
        "ngram:chain:3",
        "draft_model:2x1",
        "ngram+draft_model:2x1",
        "transformers",
        "transformers:lookup:3",
    ]
    methods = [make_method(spec, llm, peers) for spec in [*specs, "transformers:assisted:2"]]
    run = _run(llm, methods, tmp_path)
    assert [s.error for s in run.samples] == [None] * len(run.samples)
    assert all(s.same_as_plain for s in run.samples)
    assert all(s.decoded_tokens <= len(s.token_ids) and s.decode_seconds > 0 for s in run.samples)
    drafters = [m._llm.decoder.drafter for m in methods if isinstance(m, TreeMethod)]
    assert len({id(drafter) for drafter in drafters}) == len(drafters)


@pytest.mark.parametrize(
    "spec", ["", "foo", "ngram", "ngram:", "foo:2x2", "ngram:zz", "transformers:beam:2", "transformers:lookup:0"]
)
def test_what_is_no_method_raises(llm: LLM, folder: Path, spec: str) -> None:
    with pytest.raises(OptionError):
        make_method(spec, llm, Peers(str(folder), None, "float32", None, llm))


def test_an_assisted_method_needs_a_draft_model(llm: LLM, folder: Path) -> None:
    with pytest.raises(OptionError, match="draft model"):
        make_method("transformers:assisted:2", llm, Peers(str(folder), None, "float32", None, llm))


def test_a_method_drafts_with_the_heads_of_the_kind_that_it_names(tmp_path: Path) -> None:
    eagle, medusa = tmp_path / "eagle", tmp_path / "medusa"
    write_eagle(some_head(3, 60), eagle, "tiny", about=About(taps=[0, 1, 2]))
    write_heads(medusa, random_heads(48), "tiny", 120, About())
    llm = LLM(tiny("llama"))
    peers = Peers("tiny", None, "float32", None, llm)
    for spec, kind in (("eagle:chain:2", Eagle), ("medusa:2x2", Medusa)):
        method = make_method(spec, llm, peers, [eagle, medusa])
        assert isinstance(method, TreeMethod)
        assert type(method._llm.decoder.drafter) is kind
        params = SamplingParams(max_tokens=9)
        plain = llm.plain().generate([some_tokens(5)], params)[0]
        assert method.run(some_tokens(5), params).token_ids == plain.token_ids
    with pytest.raises(PairingError, match="needs heads"):
        make_method("medusa:2x2", llm, peers, [])
