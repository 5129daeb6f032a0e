"""What stands before replicas, without Ray: replicas of the test's own answer, end, and are tried again."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Message

from tests.serve.serving import events_of, tiny_llm, until
from tokentree.scale.beginnings import Marks, marks_of
from tokentree.scale.calls import messages
from tokentree.scale.front import create_front
from tokentree.scale.retry import ReplicaLost, gives
from tokentree.serve.app import create_app
from tokentree.serve.errors import TOO_MANY, ApiError
from tokentree.serve.run import listen
from tokentree.serve.settings import Settings

SETTINGS = Settings("tiny", keys=("k",))
BODY: dict[str, Any] = {"prompt": "one two three", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]} | {
    name: BODY[name] for name in ("max_tokens", "temperature", "ignore_eos")
}
RESPONSE: dict[str, Any] = {"input": "a", "max_output_tokens": 20, "temperature": 0}


class Replicas:
    """Replicas in this process.

    Attributes:
        plans: what becomes of each request: the number of messages after which its replica ends, None for none, or an
            error that is raised at once; without a plan a request is answered.
        asked: the marks, the scope and the body of each request.
    """

    def __init__(self) -> None:
        self.app = create_app(Settings("tiny"), tiny_llm())
        self.plans = list[int | Exception | None]()
        self.asked = list[tuple[Marks, Mapping[str, Any], bytes]]()
        self.ready, self.waits, self.ended = True, 0.0, 0

    async def answer(self, marks: Marks, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message]:
        self.asked.append((marks, scope, body))
        plan, count = self.plans.pop(0) if self.plans else None, 0
        if isinstance(plan, Exception):
            raise plan
        try:
            async for message in messages(self.app, dict(scope), body):
                if count == plan:
                    await asyncio.sleep(self.waits)
                    raise ReplicaLost
                yield message
                count += 1
            if plan is not None:
                raise ReplicaLost
        finally:
            self.ended += 1

    async def ask_all(self, name: str) -> list[Any]:
        return (
            [("one", self.app.state.service.metrics.scrape().decode())] if name == "figures" else [{"replica": "one"}]
        )


@contextmanager
def fronted(replicas: Replicas, settings: Settings = SETTINGS) -> Iterator[tuple[httpx.Client, Any]]:
    """A front in a thread."""
    app = create_front(settings, replicas, "front")
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer k"}) as http:
            yield http, app.state.hand
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[Replicas, httpx.Client]]:
    replicas = Replicas()
    with fronted(replicas) as (http, _):
        yield replicas, http
    asyncio.run(replicas.app.state.service.close())


@pytest.fixture
def replicas(made: tuple[Replicas, httpx.Client]) -> Iterator[Replicas]:
    found = made[0]
    found.plans, found.asked, found.ended = [], [], 0
    yield found
    until(lambda: not found.app.state.service._open)


@pytest.fixture
def http(made: tuple[Replicas, httpx.Client]) -> httpx.Client:
    return made[1]


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def said(answer: httpx.Response) -> list[Any]:
    """The events of a stream."""
    return [*events_of(answer)]


def written(events: list[Any]) -> str:
    """The text of a stream, in which steps may have more or fewer tokens each time."""
    parts = list[str]()
    for event in events:
        choices = event.get("choices", []) if event else []
        parts += [one.get("text") or one["delta"].get("content", "") for one in choices]
        parts += [event["delta"]] if event and "delta" in event else []
    return "".join(parts)


def counted(http: httpx.Client, name: str) -> int:
    lines = http.get("/metrics").text.splitlines()
    return int(float(next(line.split()[-1] for line in lines if line.startswith(name))))


def test_a_replica_answers_whatever_is_asked(replicas: Replicas, http: httpx.Client) -> None:
    for path in ("/v1/models", "/version", "/", "/web/app.js", "/docs", "/openapi.json"):
        assert http.get(path).status_code == 200, path
    assert http.get("/nothing").json()["error"]["code"] == "not_found"
    assert http.post("/metrics").status_code == 405
    assert http.post("/v1/completions", json=BODY | {"n": 0}).json()["error"]["param"] == "n"
    text_of(http.post("/v1/completions", json=BODY))
    marks, scope, body = replicas.asked[-1]
    assert marks == marks_of(body)
    assert json.loads(body) == BODY
    assert b"authorization" not in dict(scope["headers"])


def test_keys_are_looked_at_before_any_replica(replicas: Replicas, http: httpx.Client) -> None:
    headers = {"Authorization": "Bearer wrong"}
    for path in ("/v1/models", "/metrics", "/replicas"):
        assert http.get(path, headers=headers).status_code == 401
    assert http.post("/v1/completions", json=BODY, headers=headers).status_code == 401
    assert http.post("/v1/completions", content=b"x" * (SETTINGS.body_bytes + 1)).status_code == 413
    assert http.get("/health", headers=headers).status_code == 200
    assert not replicas.asked


@pytest.mark.parametrize("count", [0, 1])
def test_a_request_that_has_no_answer_yet_is_tried_again(replicas: Replicas, http: httpx.Client, count: int) -> None:
    expected, before = (
        text_of(http.post("/v1/completions", json=BODY)),
        counted(http, "tokentree:requests_tried_again_t"),
    )
    replicas.plans, replicas.asked = [count], []
    assert text_of(http.post("/v1/completions", json=BODY)) == expected
    assert len(replicas.asked) == 2
    assert replicas.asked[0] == replicas.asked[1]
    assert counted(http, "tokentree:requests_tried_again_t") == before + 1


@pytest.mark.parametrize(
    ("path", "body", "heads"), [("completions", BODY, 1), ("chat/completions", CHAT, 2), ("responses", RESPONSE, 3)]
)
def test_a_stream_is_tried_again_while_there_is_no_text_in_it(
    replicas: Replicas, http: httpx.Client, path: str, body: dict[str, Any], heads: int
) -> None:
    body = body | {"stream": True}
    expected = http.post(f"/v1/{path}", json=body)
    replicas.plans, replicas.asked = [heads], []
    with http.stream("POST", f"/v1/{path}", json=body) as answer:
        found = said(answer)
    assert len(replicas.asked) == 2
    assert written(found) == written(said(expected))
    assert len(written(found)) >= 10


@pytest.mark.parametrize(("path", "body"), [("completions", BODY), ("chat/completions", CHAT)])
def test_a_stream_ends_in_an_error_once_there_is_text_in_it(
    replicas: Replicas, http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    before = counted(http, "tokentree:requests_lost_t")
    replicas.plans = [4]
    more = {"stream": True, "speculation": "off", "max_tokens": 60}
    with http.stream("POST", f"/v1/{path}", json=body | more) as answer:
        assert answer.status_code == 200
        found = said(answer)
    assert len(replicas.asked) == 1
    assert found[-1] is None
    assert found[-2]["error"]["code"] == "replica_lost"
    assert all("choices" in event for event in found[:-2])
    assert counted(http, "tokentree:requests_lost_t") == before + 1


def test_a_stream_of_responses_has_an_error_of_its_own_form(replicas: Replicas, http: httpx.Client) -> None:
    replicas.plans = [7]
    with http.stream("POST", "/v1/responses", json=RESPONSE | {"stream": True}) as answer:
        lines = [*answer.iter_lines()]
    assert lines[-3] == "event: error"
    assert json.loads(lines[-2].removeprefix("data: "))["code"] == "replica_lost"


def test_a_request_is_tried_again_once(replicas: Replicas, http: httpx.Client) -> None:
    replicas.plans = [0, 0]
    answer = http.post("/v1/completions", json=BODY)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "replica_lost"
    assert answer.headers["retry-after"] == "1"
    assert len(replicas.asked) == 2


def test_a_refusal_is_told_as_it_is(replicas: Replicas, http: httpx.Client) -> None:
    replicas.plans = [ApiError(TOO_MANY, "too many", code="queue_full")]
    assert http.post("/v1/completions", json=BODY).json()["error"]["code"] == "queue_full"
    replicas.plans = [0, ApiError(TOO_MANY, "too many", code="queue_full")]
    assert http.post("/v1/completions", json=BODY | {"stream": True}).status_code == 429


def test_a_request_isn_t_tried_again_behind_its_deadline(replicas: Replicas) -> None:
    with fronted(replicas, Settings("tiny", request_timeout=0.2)) as (http, _):
        replicas.plans, replicas.waits = [0], 0.4
        assert http.post("/v1/completions", json=BODY).json()["error"]["code"] == "replica_lost"
        replicas.waits = 0.0
        assert len(replicas.asked) == 1


def test_the_second_try_ends_at_the_deadline_of_the_first(replicas: Replicas) -> None:
    class Slow(Replicas):
        async def answer(self, marks: Marks, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message]:
            self.asked.append((marks, scope, body))
            if len(self.asked) == 1:
                raise ReplicaLost
            await asyncio.sleep(60)
            yield {}

    slow = Slow()
    with fronted(slow, Settings("tiny", request_timeout=0.3)) as (http, _):
        answer = http.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    asyncio.run(slow.app.state.service.close())


def test_a_client_that_goes_away_ends_its_request(replicas: Replicas, http: httpx.Client) -> None:
    def aborted() -> int:
        return counted(http, 'vllm:request_success_total{finished_reason="abort"')

    before = aborted()
    with http.stream("POST", "/v1/completions", json=BODY | {"stream": True, "max_tokens": 300}) as answer:
        next(events_of(answer))
    until(lambda: aborted() == before + 1)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=BODY | {"n": 16, "max_tokens": 300}, timeout=0.05)
    until(lambda: aborted() >= before + 2)


def test_requests_wait_for_the_first_replica_and_end_with_the_front(replicas: Replicas) -> None:
    with fronted(replicas) as (http, hand):
        replicas.ready = False
        assert http.get("/health").status_code == 200
        assert http.get("/ready").json()["error"]["code"] == "loading"
        text_of(http.post("/v1/completions", json=BODY))  # it waits where replicas are asked
        replicas.ready = True
        assert http.get("/ready").status_code == 200
        assert asyncio.run(hand.drain(1))
        assert http.get("/ready").json()["error"]["code"] == "shutting_down"
        assert http.post("/v1/completions", json=BODY).status_code == 503


def test_figures_and_facts_are_of_all_replicas(replicas: Replicas, http: httpx.Client) -> None:
    assert 'replica="one"' in http.get("/metrics").text
    assert counted(http, "tokentree:replicas") == 1
    assert http.get("/replicas").json()["data"] == [{"replica": "one"}]


@pytest.mark.parametrize(
    ("event", "does"),
    [
        (b": ping\n\n", False),
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n', False),
        (b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n', True),
        (b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n', True),
        (b'data: {"choices":[{"text":"","finish_reason":null}]}\n\n', True),
        (b'data: {"choices":[],"usage":{}}\n\n', True),
        (b'data: {"error":{"message":"x"}}\n\n', True),
        (b'event: response.created\ndata: {"type":"response.created"}\n\n', False),
        (b'data: {"type":"response.output_item.added","item":{"type":"message"}}\n\n', False),
        (b'data: {"type":"response.output_item.added","item":{"type":"function_call"}}\n\n', True),
        (b'data: {"type":"response.output_text.delta","delta":"a"}\n\n', True),
        (b"data: [DONE]\n\n", True),
    ],
)  # fmt: skip
def test_what_counts_as_an_answer(event: bytes, does: bool) -> None:
    assert gives(event) is does
