"""Requests that are wrong in every way: one sentence each, and nothing changes for others."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from benchmarks.fuzz_serving import GOOD, SETTINGS, Answer, Sent, complaint, fuzz, fuzzed_llm, growth, send

from tests.serve.serving import Served, error_of, serving
from tokentree.serve.protocol import MOST_VALUES

REQUESTS = 400  # `python -m benchmarks.fuzz_serving` sends ten thousand
HALF = "a\ud800"
MANY = 1_000_000


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with serving(fuzzed_llm(), **SETTINGS) as served:
        yield served


@pytest.fixture
def address(running: Served) -> Iterator[tuple[str, int]]:
    url = httpx.URL(running.url)
    assert url.port is not None
    yield url.host, url.port
    running.wait_idle()


def test_wrong_requests_get_errors_and_change_no_text(running: Served, address: tuple[str, int]) -> None:
    def text() -> Any:
        return running.post("/v1/completions", {"prompt": "one two", "max_tokens": 8, "temperature": 0}).json()[
            "choices"
        ]

    before = text()
    found = fuzz(address, seed=3, numbers=range(REQUESTS), clients=4)
    assert found.wrong == []
    assert found.counts[200] > REQUESTS / 20
    assert found.counts[400] > REQUESTS / 3
    running.wait_idle()
    assert text() == before


@pytest.mark.parametrize(("route", "body"), GOOD)
def test_requests_that_others_are_made_of_are_good(address: tuple[str, int], route: str, body: dict[str, Any]) -> None:
    assert send(address, Sent(route, [json.dumps(body).encode()])).status == 200


def test_growth_is_seen_and_a_cache_that_fills_at_first_is_none() -> None:
    assert growth([600, 650, *[700] * 18]) == pytest.approx(1.0, abs=0.001)
    assert growth([600 + 10 * look for look in range(20)]) > 1.1
    assert growth([600, 900, 1200]) == 1.0


def test_complaints_are_made() -> None:
    sent = Sent("/", [b""])
    right = b'{"error": {"message": "m", "type": "a_error", "param": null, "code": null}}'
    for status, body in ((500, right), (400, b"no"), (400, right.replace(b'"m"', b'"a\\nb"')), (0, b""), (404, b"{}")):
        assert complaint(sent, Answer(status, {}, body)) is not None
    assert complaint(sent, Answer(400, {}, right)) is None


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": HALF}, "prompt"),
        ("/v1/completions", {"prompt": "a", "user": HALF}, "user"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": {HALF: 1}}}, "structured_outputs.json"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}, "messages[0].content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "", HALF: 1}]}, "messages[0]"),
        ("/v1/responses", {"input": "a", "metadata": {"a": HALF}}, "metadata"),
        ("/tokenize", {"prompt": HALF}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a", "name": HALF}]}, "messages[0].name"),
    ],
)
def test_half_of_a_character_is_refused_wherever_it_stands(
    running: Served, path: str, body: dict[str, Any], param: str
) -> None:
    answer = running.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["message"] == f"{param}: it holds half of a character"
    assert error["param"] == param


@pytest.mark.parametrize("name", ["a" * 5000, "ü" * 5000, "a\nb"])
def test_a_message_is_a_sentence_whatever_a_request_calls_things(running: Served, name: str) -> None:
    for body in (
        {"prompt": "a", name: 1},
        {"prompt": "a", "model": name},
        {"prompt": "a", "speculation": {"shape": name}},
    ):
        error = error_of(running.post("/v1/completions", body))
        assert len(error["message"]) <= 500
        assert len(error["param"]) <= 200


LARGE: list[tuple[str, bytes]] = [
    ("/v1/completions", b'{"prompt": [' + b'"",' * MANY + b'""]}'),
    ("/v1/completions", b'{"prompt": [' + b"5," * MANY + b"5]}"),
    ("/v1/completions", b'{"prompt": "a", "stop": [' + b"5," * MANY + b"5]}"),
    ("/v1/completions", b'{"prompt": "a", "structured_outputs": {"json": {"a": [' + b"{}," * MANY + b"{}]}}}"),
    ("/v1/completions", b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}"),
    ("/v1/chat/completions", b'{"messages": [' + b"{}," * MANY + b"{}]}"),
    ("/v1/chat/completions", b'{"messages": [' + b"{}," * (MOST_VALUES - 10) + b"{}]}"),
    ("/v1/responses", b'{"input": [' + b"{}," * (MOST_VALUES - 10) + b"{}]}"),
]


@pytest.mark.parametrize(("path", "body"), LARGE, ids=lambda one: str(one)[:50])
def test_a_large_body_doesn_t_stop_the_server(running: Served, path: str, body: bytes) -> None:
    """Each of them took it 3 to 50 seconds once."""
    with ThreadPoolExecutor(1) as pool:
        headers = {"Content-Type": "application/json"}
        sent, longest = pool.submit(running.http.post, path, content=body, headers=headers), 0.0
        while not sent.done():
            began = time.monotonic()
            assert running.http.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.005)
        assert sent.result().status_code == 400
        error_of(sent.result())
        assert longest < 2
