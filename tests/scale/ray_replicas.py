"""Two replicas of a tiny model on Ray, run by `make scale`: one is killed, all are drained and replaced, and every text
is the one that is written without replicas and without speculation."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml

from tests.scale.test_figures import samples
from tests.serve.serving import error_of, events_of, until
from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.scale.arguments import Arguments, arguments_of
from tokentree.scale.local import deploy, ray_here, serving
from tokentree.scale.loopback import HERE
from tokentree.serve.run import listen

ROOT = Path(__file__).parent.parent.parent
PROMPTS = [" ".join(["one two three four"] * 8) + f" {number}" for number in range(4)]
LONG = 200  # tokens


@dataclass
class Running:
    """Replicas that run, and what belongs to them."""

    arguments: Arguments
    http: httpx.Client
    plain: dict[str, str]

    def ask(self, prompt: str, **more: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": LONG, "temperature": 0, "ignore_eos": True} | more
        return self.http.post("/v1/completions", json=body)

    def streamed(self, prompt: str) -> list[Any]:
        body = {"prompt": prompt, "max_tokens": LONG, "temperature": 0, "ignore_eos": True, "stream": True}
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            return [*events_of(answer)]

    @property
    def replicas(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/replicas").json()["data"]
        return found


def descendants() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "model"
        model = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96, vocab_size=300)
        save_model(folder, model, tiny_tokenizer())
        llm = LLM(folder, "none")
        params = SamplingParams(max_tokens=LONG, ignore_eos=True)
        plain = dict(zip(PROMPTS, (result.text for result in llm.generate(PROMPTS, params)), strict=True))
        arguments = arguments_of(
            {"model": str(folder), "served_model_name": "tiny", "memory": f"{room}/memory", "memory_seconds": 1,
             "replicas": 2, "cpus": 0.5, "threads": 1, "api_key": ["k"], "log_level": "warning"}
        )  # fmt: skip
        sock = listen(HERE, 0)
        port = sock.getsockname()[1]
        sock.close()
        before = {process.pid for process in descendants()}
        with ray_here(1), serving(arguments, HERE, port):
            headers = {"Authorization": "Bearer k"}
            with httpx.Client(base_url=f"http://{HERE}:{port}", timeout=60, headers=headers) as http:
                until(lambda: http.get("/ready").status_code == 200)
                started = descendants()
                yield Running(arguments, http, plain)
        gone, alive = psutil.wait_procs([one for one in started if one.pid not in before], timeout=20)
        assert not alive
        assert len(gone) > 5
        assert not list(Path(tempfile.gettempdir()).glob("tt-*"))


def test_texts_are_plain_s(running: Running) -> None:
    for prompt in PROMPTS:
        answer = running.ask(prompt)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == running.plain[prompt]
        events = running.streamed(prompt)
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == running.plain[prompt]
    assert len(running.replicas) == 2


def test_only_this_machine_reaches_it_and_only_with_a_key(running: Running) -> None:
    ports = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in descendants()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(ports) > 8
    assert set(ports) == {HERE}
    assert os.environ["RAY_AUTH_MODE"] == "token"
    refused = running.http.post("/v1/completions", json={"prompt": "a"}, headers={"Authorization": "Bearer x"})
    assert refused.status_code == 401
    assert error_of(refused)["code"] == "invalid_api_key"


def test_the_next_turn_goes_where_the_last_one_was(running: Running) -> None:
    for number in range(6):
        first = {"role": "user", "content": f"{number} " + "what is a tree " * 12}
        body = {"messages": [first], "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        answer = running.http.post("/v1/chat/completions", json=body).json()
        said = answer["choices"][0]["message"]
        body["messages"] = [
            first,
            {"role": "assistant", "content": said["content"]},
            {"role": "user", "content": "why"},
        ]
        usage = running.http.post("/v1/chat/completions", json=body).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 30, number


def test_figures_of_all_replicas_are_in_one_scrape(running: Running) -> None:
    names = {one["replica"] for one in running.replicas}
    with ThreadPoolExecutor(8) as pool:  # more than one replica is given
        assert all(one.status_code == 200 for one in pool.map(running.ask, PROMPTS * 4))
    found = samples(running.http.get("/metrics").content)
    tokens = {dict(labels)["replica"]: value for labels, value in found["vllm:generation_tokens_total"].items()}
    assert set(tokens) == names
    assert all(value >= LONG for value in tokens.values())
    assert [*found["tokentree:replicas"].values()] == [2]


def under_load(running: Running, meanwhile: Callable[[], object]) -> tuple[list[httpx.Response], list[list[Any]]]:
    """What clients were told while something happened: whole answers and streams."""
    over, wholes, streams = threading.Event(), list[httpx.Response](), list[list[Any]]()

    def client(number: int) -> None:
        turn = number
        while not over.is_set():
            turn += 1
            prompt = PROMPTS[turn % len(PROMPTS)]
            if number % 2:
                wholes.append(running.ask(prompt))
            else:
                streams.append(running.streamed(prompt))

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(client, number) for number in range(6)]
        try:
            until(lambda: len(wholes) > 4 and len(streams) > 4)
            meanwhile()
            count = len(wholes), len(streams)
            until(lambda: len(wholes) > count[0] + 4 and len(streams) > count[1] + 4)
        finally:
            over.set()
        for one in clients:
            one.result(60)
    return wholes, streams


def lost(running: Running, wholes: list[httpx.Response], streams: list[list[Any]]) -> int:
    """Looks at all texts; how many streams ended in an error."""
    texts = set(running.plain.values())
    for answer in wholes:
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] in texts
    cut = 0
    for events in streams:
        assert events[-1] is None
        text = "".join(event["choices"][0]["text"] for event in events[:-1] if "choices" in event)
        if "error" in events[-2]:
            cut += 1
            assert events[-2]["error"]["code"] == "replica_lost"
            assert any(one.startswith(text) for one in texts)
        else:
            assert text in texts
    return cut


def test_a_replica_that_is_killed_loses_no_request(running: Running) -> None:
    victim = max(running.replicas, key=lambda one: one["running"])

    def kill() -> None:
        os.kill(victim["pid"], signal.SIGKILL)

    wholes, streams = under_load(running, kill)
    assert lost(running, wholes, streams) <= 3  # as many as clients that stream
    until(lambda: len({one["pid"] for one in running.replicas} - {victim["pid"]}) == 2)


def test_replicas_that_are_drained_and_replaced_lose_nothing(running: Running) -> None:
    before = {one["pid"] for one in running.replicas}
    arguments = running.arguments.model_copy(update={"replicas": 1})  # one takes the place of two, to be done sooner
    wholes, streams = under_load(running, lambda: deploy(arguments))
    assert lost(running, wholes, streams) == 0
    until(lambda: len(running.replicas) == 1)
    assert not before & {one["pid"] for one in running.replicas}


def test_what_look_ups_learnt_is_kept_and_exchanged(running: Running) -> None:
    folder = Path(running.arguments.memory or "")
    files = [folder / f"replica-{rank}" / "suffix.safetensors" for rank in range(2)]
    until(lambda: all(file.is_file() for file in files))
    steps = running.ask(PROMPTS[0]).json()["metrics"]["speculative_decoding"]
    assert steps["mean_acceptance_length"] > 2  # the text was written by replicas that are gone


@pytest.mark.parametrize("file", ["serve.yaml", "rayservice.yaml"])
def test_serve_takes_the_configs(running: Running, file: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    from tokentree.scale import app
    from tokentree.scale.application import ROUTERS

    text = yaml.safe_load((ROOT / "deploy" / file).read_text())
    config = yaml.safe_load(text["spec"]["serveConfigV2"]) if "spec" in text else text
    known = ServeDeploySchema.model_validate(config)
    (application,) = known.applications
    given = application.args | {"model": running.arguments.model, "memory": None, "api_key_file": None}
    for routing in ROUTERS:
        made = app(given | {"routing": routing, "max_replicas": 3})
        assert made._bound_deployment.name == "Front"
    assert {one.name for one in application.deployments} == {"Front", "Replica"}
    assert json.dumps(config)
