"""What is measured of a server under load, and what plans make of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.test_cli import Command, folder, run  # noqa: F401  fixtures
from tests.serve.serving import tiny_llm
from tests.tiny_models import some_tokens
from tokentree.calibrate import Calibration
from tokentree.draft import Draft
from tokentree.errors import OptionError, PromptError
from tokentree.planning import fitted as fitting
from tokentree.planning.counting import Counting
from tokentree.planning.fitted import clients_of, fit, fitted, going_on, turnaround
from tokentree.planning.load import Clients, Lengths
from tokentree.planning.recorded import Recorded
from tokentree.planning.replica import Setup
from tokentree.planning.served import Load, Part, Step, read_requests, served
from tokentree.planning.simulation import Simulation, Window
from tokentree.planning.timing import Beside, Timing
from tokentree.sampling import SamplingParams
from tokentree.serve.settings import Settings
from tokentree.shapes import CostCurve
from tokentree.shapes.rates import Tally

ALONE = Calibration(
    engine="a model", rows=[1, 64], seconds=[0.010, 0.073], per_sequence=0.001, drafting_seconds=0.0, rates=[],
    by_rank=[], picks=[], measured_speed_up=1.0, mean_accepted_length=1.0, prompt_rows=[256], prompt_seconds=[0.3],
)  # fmt: skip
BODY = {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 4, "ignore_eos": True}


def _part(clients: int, tokens: int, drafting: bool, beside: Beside) -> Part:
    """Steps of a server in which a forward takes 1.5 times as long, 2 ms more, and 3 ms more for each further text.

    Each text has two steps, and its client comes back 20 ms after them, with 5 ms more for each further client."""
    part, now, curve = Part(clients), 0.0, CostCurve(ALONE.rows, ALONE.seconds, ALONE.per_sequence)
    turn = 0.020 + 0.005 * (clients - 1)
    for number in range(8):
        first = number * clients
        texts = {first + place: now for place in range(clients)}
        for rows in (clients * tokens, clients * tokens + 4):
            forward = 1.5 * curve.seconds(rows, clients) + 0.002 + 0.003 * (clients - 1)
            drafts = 0.001 + 0.0005 * (clients - 1) if drafting else None
            end = now + forward + (drafts or 0.0)
            over = frozenset(texts) if rows > clients * tokens else frozenset[int]()
            reused = [17 + number]
            part.steps.append(Step(now, end, texts, {}, over, clients * tokens, rows, forward, drafts, reused))
            now = end + beside.seconds(clients, clients * tokens)
        now += turn
    return part


def test_what_steps_take_is_found_again() -> None:
    plain, tree = Beside(0.004, 0.002), Beside(0.005, 0.001, 0.0005)
    found = fit(
        ALONE, [_part(n, 1, False, plain) for n in (1, 3, 8)],
        [_part(n, tokens, True, tree) for n, tokens in ((1, 3), (3, 1), (8, 2))],
    )  # fmt: skip
    assert found.seconds == pytest.approx([1.5 * 0.010 + 0.002, 1.5 * 0.073 + 0.002])
    assert found.prompt_seconds == pytest.approx([1.5 * 0.3 + 0.002])
    assert found.per_sequence == pytest.approx(1.5 * 0.001 + 0.003)
    assert (found.drafting_seconds, found.drafting_per_sequence) == pytest.approx((0.001, 0.0005))
    assert (found.plain_step_seconds, found.plain_step_per_sequence) == pytest.approx((0.004, 0.002))
    told = found.step_seconds, found.step_per_sequence, found.step_per_token
    assert told == pytest.approx((0.005, 0.001, 0.0005))
    assert [one.explained for one in found.loads] == pytest.approx([1.0] * 6)
    assert [(one.clients, one.method, one.texts) for one in found.loads] == [
        (clients, method, clients) for method in ("plain", "speculation") for clients in (1, 3, 8)
    ]
    assert (found.turnaround, found.turnaround_per_client) == pytest.approx((0.020, 0.005))
    assert found.loads[3].tokens_a_forward == 3
    assert found.shared_tokens == 17


def test_what_would_take_less_than_nothing_takes_nothing() -> None:
    rows = [([1.0, x, 2 * x], 5.0 - x) for x in (0.0, 1.0, 2.0)]
    assert fitted([rows]) == pytest.approx([4.0, 0.0, 0.0], rel=0.2)
    parts = [[([1.0], 1.0)] * 90, [], [([1.0], 3.0)]]  # each part counts as much as another, in relation to its mean
    assert fitted(parts)[0] == pytest.approx((1 / 1 + 1 / 3) / (1 / 1 + 1 / 9))
    with pytest.raises(OptionError, match="too few steps"):
        fitted([[], []])
    with pytest.raises(OptionError, match="too few steps"):
        fit(ALONE, [Part(1)], [_part(1, 1, True, Beside())])


def test_a_step_behind_which_no_text_goes_on_says_nothing_of_the_next_one() -> None:
    part = _part(2, 1, False, Beside(0.004))
    assert [place for place, (one, _) in enumerate(pairwise(part.steps)) if (one, _) in going_on(part)] == [
        *range(0, 15, 2)
    ]


def test_a_client_is_turning_while_it_waits_for_nothing() -> None:
    assert turnaround(_part(1, 1, False, Beside())) == pytest.approx(0.020)
    assert turnaround(_part(4, 1, False, Beside())) == pytest.approx(0.035)
    part = _part(1, 1, False, Beside())
    assert turnaround(Part(1, part.steps[:1])) is None


def test_numbers_of_clients_are_one_all_and_one_between() -> None:
    assert [clients_of(most) for most in (1, 2, 8, 16)] == [[1], [1, 2], [1, 3, 8], [1, 4, 16]]


# -- the server itself -------------------------------------------------------------------------------------------------


def test_a_server_s_steps_are_clocked_while_clients_ask_it() -> None:
    llm, told = tiny_llm(max_batch=2), list[None]()
    form = Counting(CostCurve([1, 64], [0.01, 0.0101]))
    tree, bodies = llm.using(shape=form), [json.dumps(BODY | {"max_tokens": 4 + n}) for n in range(6)]
    part = served(tree, Settings("model", max_batch=2), Load(2, bodies, 0.6), lambda: told.append(None))
    assert (part.clients, len(told)) == (2, 1)
    steps, over = part.steps, frozenset[int]()
    for step, following in pairwise(steps):
        assert step.began < step.ended <= following.began
    for step in steps:
        assert 0 < step.forward < step.ended - step.began
        assert step.rows >= len(step.decoded) + len(step.read)
        assert step.tokens >= len(step.decoded)
        assert step.over <= step.decoded.keys()
        assert len(step.reused) == len(step.read)
        assert (step.drafting is not None) <= bool(step.decoded)
        assert not over & step.decoded.keys()
        over |= step.over
    assert len(over) >= 2
    assert any(step.drafting is not None for step in steps)
    assert {len(step.decoded) for step in steps} >= {1, 2}
    assert sum(step.tokens for step in steps if step.decoded) >= 4 * len(over)
    assert form.tally().drafts > 0
    refused = json.dumps(BODY | {"max_tokens": 10**6})
    with pytest.raises(OptionError, match="the server didn't answer a request: max_tokens"):
        served(llm.plain(), Settings("model", max_tokens=9), Load(1, [refused], 5.0))


def test_requests_are_chats_whose_model_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(BODY | {"model": "x"}) + "\n\n" + json.dumps(BODY) + "\n")
    assert [json.loads(one) for one in read_requests(file)] == [BODY | {"model": None}] * 2
    for text, says in (
        ("", "has no requests"),
        ("{}", "line 1 of .* is no chat request: messages"),
        (json.dumps(BODY) + "\n[]", "line 2"),
        ("x", "line 1 of .*: Invalid JSON"),
        (json.dumps(BODY | {"tempreature": 1}), "tempreature"),
    ):
        file.write_text(text)
        with pytest.raises(OptionError, match=says):
            read_requests(file)
    with pytest.raises(PromptError, match="can't read the requests"):
        read_requests(tmp_path / "none")


def test_a_tally_forgets_nothing() -> None:
    tally = Tally()
    draft = Draft.grown(0, np.array([1, 2]), np.array([0, 0]), np.array([0.5, 0.2]))
    for place in range(1000):
        tally.count(draft, np.array([1 if place < 400 else 2]))
    assert tally.drafts == 1000
    assert tally.by_rank() == [0.4, 0.6, 0.0, 0.0]


def test_a_shape_that_counts_decides_as_cost_does() -> None:
    llm, curve, params = tiny_llm(), CostCurve([1, 64], [0.01, 0.0101]), SamplingParams(max_tokens=40)
    form = Counting(curve)
    llm.using(shape=form).generate([some_tokens(9, seed) for seed in range(3)], params)
    tally, cells = form.tally(), form.rates.cells(["suffix", "ngram"])
    assert sorted(tally.cells(["suffix", "ngram"])) == sorted(cells) != []  # too few for any to fade


# -- what plans make of it ---------------------------------------------------------------------------------------------


def _simulated(setup: Setup, requests: int, prompt: int, turn: float = 0.0) -> tuple[list[float], list[float], float]:
    """First tokens, gaps and the end of a lone client's requests of 3 tokens."""
    load = Clients(1, Lengths.of([prompt], [3]), np.random.default_rng(0), turn)
    found = Simulation(setup, 1, load, Window(0, requests), np.random.default_rng(0)).run()
    return list(found.first), list(found.gaps), found.end


def test_a_token_beyond_one_of_a_text_takes_time_too() -> None:
    curve = CostCurve([1, 64], [1.0, 1.0])
    known = Recorded(rows=[1, 2], seconds=[1, 1], by_rank=[1.0])
    timing = Timing(curve, step=Beside(0.5, 0.25, 0.125), plain=Beside(0.0625))
    setup = Setup(timing, known.acceptance(), "chain:1")
    assert _simulated(setup, 1, 1)[:2] == ([1.5 + 0.125], [1.5])  # two tokens, and the last one
    assert _simulated(setup.plain(), 1, 1)[:2] == ([1.0625], [1.0625] * 2)
    other = timing.beside(250, None)
    assert (other.step, other.plain) == (Beside(0.25, 0.25, 0.125), Beside(0.25))


def test_what_all_prompts_share_is_not_read_again() -> None:
    timing = Timing(CostCurve([1, 64], [0.001, 0.064]))
    assert _simulated(Setup(timing), 1, 101)[0] == [pytest.approx(0.101)]
    assert _simulated(Setup(timing, shared_tokens=40), 1, 101)[0] == [pytest.approx(0.061)]
    assert _simulated(Setup(timing, shared_tokens=400), 1, 101)[0] == [pytest.approx(0.001)]
    assert _simulated(Setup(timing, shared_tokens=40, kept_tokens=0), 1, 101)[0] == [pytest.approx(0.061)]


def test_plans_take_what_was_measured_of_a_server(
    run: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    loads = list[Load]()

    def as_served(llm: Any, settings: Settings, load: Load, tell: Any) -> Part:
        loads.append(load)
        assert settings.max_batch == 4
        drafts = isinstance(llm.decoder.shape, Counting)
        return _part(load.clients, 1 + drafts, drafts, Beside(0.004, 0.002))

    monkeypatch.setattr(fitting, "served", as_served)
    monkeypatch.setattr("tokentree.calibrate.cost_curve", lambda *_, **__: CostCurve(ALONE.rows, ALONE.seconds, 0.001))
    (tmp_path / "requests.jsonl").write_text(json.dumps(BODY))
    words = "calibrate", "-m", folder, "--drafter", "suffix", "--max-tokens", 4, "--serving", "requests.jsonl"
    code, out, _ = run(*words, "--max-batch", 4, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["serving"]["plain_step_seconds"] == pytest.approx(0.004)
    assert found["serving"]["kept_tokens"] > 0
    asked_for = [(load.clients, load.seconds) for load in loads]
    assert asked_for == [(4, 3.0)] * 2 + [(count, 15.0) for count in (1, 1, 2, 2, 4, 4)]
    (tmp_path / "curve.json").write_text(out)
    asked = "--clients", "1", "--prompt-tokens", "1", "--output-tokens", "10", "--measured", "20"
    code, out, err = run("plan", "--curve", "curve.json", *asked, "--json")
    assert (code, err) == (0, "")
    step, turn = 1.5 * 0.010 + 0.002 + 0.004, found["serving"]["turnaround"]
    assert turn == pytest.approx(0.020)
    plain = next(one for one in json.loads(out)["loads"] if one["method"] == "plain")
    assert plain["tokens_a_second"] == pytest.approx(200 / (200 * step + 19 * turn))
    code, out, _ = run("plan", "--curve", "curve.json", *asked, "--turnaround", "1", "--step-ms", "0", "--json")
    plain = next(one for one in json.loads(out)["loads"] if one["method"] == "plain")
    assert plain["tokens_a_second"] == pytest.approx(200 / (200 * (step - 0.004) + 19))
    assert "measured in a server under load" in run("plan", "--curve", "curve.json", *asked)[1]
    # the second of two equal prompts is read again, or nothing of it, or what all prompts share
    same = "--clients", "1", "--prompt-tokens", "101", "--same-prompts", "--output-tokens", "1", "--measured", "20"
    firsts = list[float]()
    for memory in ({"kept_tokens": 0}, {"kept_tokens": 1000}, {"kept_tokens": 0, "shared_tokens": 50}):
        found["serving"] |= {"shared_tokens": 0} | memory
        (tmp_path / "curve.json").write_text(json.dumps(found))
        out = run("plan", "--curve", "curve.json", *same, "--json")[1]
        firsts.append(next(one["first_token_p50"] for one in json.loads(out)["loads"] if one["method"] == "plain"))
    again, kept, shared = firsts
    assert kept < shared < again
    assert run("plan", "--curve", "curve.json", *same, "--kept-tokens", "1000", "--json")[1] != out


def test_without_a_server_s_packages_it_says_what_to_install(
    run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    code, out, err = run("calibrate", "-m", folder, "--serving", "none")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "pip install 'tokentree[serve,chat]'" in err
