"""What a server is protected from: strangers, too much, too many, too long, too slow, and clients that go away."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import by_night
from tests.serve.serving import NAME, Served, error_of, events_of, serving, slowed, tiny_llm, until
from tests.tiny_models import kv_engine, some_tokens
from tokentree import SamplingParams
from tokentree.serve import streaming
from tokentree.sharing import AHEAD

LONG: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 300, "ignore_eos": True, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 300, "ignore_eos": True}


@pytest.fixture(scope="module")
def slow() -> Iterator[Served]:
    """A server whose steps take some time, for one text at a time, with one that waits."""
    llm = tiny_llm()
    slowed(llm, 0.008)
    with serving(llm, max_batch=1, max_queue=1) as served:
        yield served


@pytest.fixture
def served(slow: Served) -> Iterator[Served]:
    yield slow
    slow.wait_idle()


# -- keys ----------------------------------------------------------------------------------------------------------


def test_keys_are_needed_but_for_health(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = list[tuple[bytes, bytes]]()

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("tokentree.serve.protection.hmac.compare_digest", compare)
    with serving(tiny_llm(), keys=("first", "zweiter-ä")) as served:
        assert served.client.models.list().data[0].id == NAME
        assert compared == [(b"first", key.encode()) for key in ("first", "zweiter-ä")]  # all of them, each time
        with httpx.Client(base_url=served.url) as stranger:
            for path in ("/health", "/ready"):
                assert stranger.get(path).status_code == 200
            for path in ("/version", "/metrics", "/docs", "/openapi.json", "/v1/models", "/nothing"):
                for header in (
                    {},
                    {"Authorization": "Bearer wrong"},
                    {"Authorization": "first"},
                    {"Authorization": "Basic first"},
                ):
                    answer = stranger.get(path, headers=header)
                    assert answer.status_code == 401, (path, header)
                    assert error_of(answer)["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"
            assert stranger.post("/v1/completions", json=LONG).status_code == 401
            second = {b"Authorization": "bearer zweiter-ä".encode()}
            assert stranger.get("/v1/models", headers=second).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            served.client.with_options(api_key="wrong").models.list()


def test_pages_of_other_origins_only_where_asked_for(served: Served) -> None:
    origin = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in served.http.get("/health", headers=origin).headers
    with serving(None, cors_origins=("https://a.example",), keys=("k",)) as other:
        told = other.http.options("/v1/chat/completions", headers=origin | {"Authorization": ""})
        assert told.status_code == 200
        assert told.headers["access-control-allow-origin"] == "https://a.example"
        refused = other.http.options("/v1/completions", headers=origin | {"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in refused.headers


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_bodies_are_bounded() -> None:
    with serving(tiny_llm(), body_bytes=1000) as served:
        assert served.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
        assert served.refused("/v1/completions", {"prompt": "a" * 1000}, 413)["code"] == "request_too_large"

        def drops() -> Iterator[bytes]:  # without a length
            for _ in range(2000):
                yield b" "

        answer = served.http.post("/v1/completions", content=drops(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
        error_of(answer)


def test_prompts_are_bounded() -> None:
    with serving(tiny_llm(), prompt_tokens=10) as served:
        assert served.post("/v1/completions", {"prompt": some_tokens(10), "max_tokens": 1}).status_code == 200
        error = served.refused("/v1/completions", {"prompt": [[5], some_tokens(11)]})
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        error = served.refused("/v1/chat/completions", {"messages": [{"role": "user", "content": "a b " * 9}]})
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


# -- the queue -----------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once(served: Served) -> None:
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(served.post, "/v1/completions", LONG | {"max_tokens": 150}) for _ in range(2)]
        until(lambda: served.service._open == 2)
        until(lambda: served.service._sum("running") == 1 and served.service._sum("waiting") == 1)
        answer = served.post("/v1/completions", LONG)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert error_of(answer)["code"] == "queue_full"
        assert served.http.get("/health").status_code == 200
        texts = [one.result().json()["choices"][0]["text"] for one in running]
    assert texts[0] == texts[1]


def test_a_request_of_many_texts_is_taken_where_nothing_else_is(served: Served) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 2}
    assert served.post("/v1/completions", body).status_code == 200


# -- time ----------------------------------------------------------------------------------------------------------


def test_a_request_ends_at_its_time_and_is_gone() -> None:
    llm = tiny_llm()
    slowed(llm, 0.02)
    with serving(llm, request_timeout=0.3, max_batch=1) as served, ThreadPoolExecutor(3) as pool:
        started = time.monotonic()
        refused = [pool.submit(served.refused, "/v1/completions", LONG, 504) for _ in range(2)]  # one waits
        streamed = pool.submit(lambda: [*events_of(served.post("/v1/chat/completions", CHAT | {"stream": True}))])
        assert {one.result()["code"] for one in refused} == {"timeout"}
        events = streamed.result()
        assert time.monotonic() - started < 20
        assert events[-1] is None
        assert events[-2]["error"]["code"] == "timeout"
        served.wait_idle()
        assert served.post("/v1/completions", LONG | {"max_tokens": 1}).status_code == 200
        with pytest.raises(openai.APIError, match="longer than"):
            for _ in served.client.completions.create(
                model=NAME, prompt="a", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
            ):
                pass


# -- clients that go away, or don't read ---------------------------------------------------------------------------


@pytest.mark.parametrize("body", [LONG, LONG | {"stream": True}, LONG | {"n": 2}], ids=["whole", "stream", "samples"])
def test_a_client_that_goes_away_ends_its_request(served: Served, body: dict[str, Any]) -> None:
    with httpx.Client(base_url=served.url) as http:
        thread = threading.Thread(target=lambda: _ignored(http, body))
        thread.start()
        until(lambda: kv_engine(served.llm)._kv and served.service._sum("running"))
        (seq, _) = next(iter(kv_engine(served.llm)._kv.values()))
        until(lambda: len(seq.output_ids) > 2)
        written = len(seq.output_ids)
        _cut(http)
    until(lambda: not kv_engine(served.llm)._kv)
    assert len(seq.output_ids) < written + 100  # of 300
    thread.join()


def _ignored(http: httpx.Client, body: dict[str, Any]) -> None:
    try:
        with http.stream("POST", "/v1/completions", json=body) as answer:
            for _ in answer.iter_bytes():
                pass
    except (httpx.HTTPError, OSError):
        pass


def _cut(http: httpx.Client) -> None:
    """Closes the connection, as a client that crashes does."""
    (connection,) = http._transport._pool.connections  # type: ignore[attr-defined]
    stream = connection._connection._network_stream
    stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def test_a_stream_that_nobody_reads_stops_and_is_ended(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops a few steps ahead, and after a while it is gone. Others go on meanwhile."""
    monkeypatch.setattr(
        streaming, "_event", lambda chunk, event=streaming._event: event(chunk | {"filler": "a" * 100_000})
    )
    with serving(tiny_llm(), stall_timeout=0.5) as served, caplog.at_level(logging.WARNING):
        address = served.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            said = httpx.Request("POST", f"{served.url}/v1/completions", json=LONG | {"stream": True})
            head = "".join(f"{name}: {value}\r\n" for name, value in said.headers.items())
            stalled.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + said.read())
            until(lambda: kv_engine(served.llm)._kv)
            (seq, _) = next(iter(kv_engine(served.llm)._kv.values()))
            other = served.post("/v1/completions", LONG | {"max_tokens": 100})
            assert len(other.json()["choices"][0]["text"]) > 0
            until(lambda: not kv_engine(served.llm)._kv)
        assert 0 < len(seq.output_ids) < 200
        assert seq.metrics.target_forwards >= AHEAD
        served.wait_idle()
        assert "reads nothing" in caplog.text


def _begun(served: Served, head: str, content: bytes) -> socket.socket:
    """A connection on which so much of a request was sent."""
    url = httpx.URL(served.url)
    made = socket.create_connection((url.host, url.port or 0), timeout=30)
    made.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{head}\r\n".encode())
    made.sendall(content)
    return made


HEADS = ["Content-Length: 100\r\n", "Transfer-Encoding: chunked\r\n"]


@pytest.mark.parametrize("head", by_night(HEADS, but=HEADS[1:]))
def test_a_body_that_doesn_t_come_is_not_waited_for(head: str) -> None:
    with serving(tiny_llm(), stall_timeout=0.3) as served:
        with _begun(served, head, b'5\r\n{"pro\r\n' if "chunked" in head else b'{"pro') as slow:
            assert served.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
            said = b"".join(iter(lambda: slow.recv(4096), b""))
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"\r\nconnection: close\r\n" in said  # else it is kept for some seconds
        error = json.loads(said.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "body_timeout"
        body = {"prompt": "a", "max_tokens": 40, "ignore_eos": True}
        slowed(served.llm, 0.02)  # the text takes longer than a body may
        assert served.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 40
        served.wait_idle()


# -- what is logged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_and_texts_are_logged_only_where_asked_for(wanted: bool, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tiny_llm(), log_prompts=wanted) as served, caplog.at_level(logging.DEBUG):
        for stream in (False, True):
            body: dict[str, Any] = {"prompt": "one secret", "max_tokens": 20, "seed": 1, "stream": stream}
            assert served.post("/v1/completions", body).status_code == 200
        served.refused("/v1/completions", {"prompt": "one secret", "n": "secret"})
        text = served.llm.generate("one secret", SamplingParams(max_tokens=20, temperature=1, seed=1))[0].text
        served.wait_idle()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("tokentree", "uvicorn"))]
    assert (sum("secret" in said for said in ours), sum(repr(text) in said for said in ours)) == (
        (2, 2) if wanted else (0, 0)
    )
