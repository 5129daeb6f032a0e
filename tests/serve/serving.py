"""A server in a thread, and clients of it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch
import uvicorn
from openai import OpenAI

from tests.tiny_models import kv_engine, tiny, tiny_tokenizer
from tokentree import LLM
from tokentree.serve.app import create_app
from tokentree.serve.run import listen
from tokentree.serve.service import Service
from tokentree.serve.settings import Settings

NAME = "tiny"


def tiny_llm(**options: Any) -> LLM:
    """A model whose texts are random, with drafts that are often right."""
    model = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96, vocab_size=300)
    return LLM(model, ["suffix", "ngram"], tokenizer=tiny_tokenizer(), **options)


@dataclass
class Served:
    """A server that runs, and what belongs to it."""

    llm: LLM
    service: Service
    url: str
    http: httpx.Client
    client: OpenAI

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def refused(self, path: str, body: Any, status: int = 400, **options: Any) -> dict[str, Any]:
        """The error of an answer that must be one."""
        answer = self.post(path, body, **options)
        assert answer.status_code == status, answer.text
        return error_of(answer)

    def wait_idle(self) -> None:
        """Waits until no request is left, and looks whether it left anything."""
        until(lambda: not self.service._open)
        schedulers = [one.asked.scheduler for one in self.service.backends.all]
        until(lambda: all(one.idle for one in schedulers))
        assert not any(one.running or one.waiting or one.kv_used for one in schedulers)
        assert not kv_engine(self.llm)._kv
        assert not any(one.users for one in self.service.backends.all)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error that an answer tells, in OpenAI's form."""
    body = answer.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["type"].endswith("_error")
    return error


def until(there: Callable[[], Any], seconds: float = 60) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def events_of(answer: httpx.Response) -> Iterator[Any]:
    """What a stream says, each part as JSON, and its end as None."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            said = line.removeprefix("data: ")
            yield None if said == "[DONE]" else json.loads(said)


@contextmanager
def serving(llm: LLM | None, **settings: Any) -> Iterator[Served]:
    """A server for ``llm`` in a thread, on a port of its own."""
    app = create_app(Settings(NAME, **settings), llm)
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    service: Service = app.state.service
    key = (settings.get("keys") or ["none"])[0]
    headers = {"Authorization": f"Bearer {key}"}
    try:
        with (
            httpx.Client(base_url=url, timeout=60, headers=headers) as http,
            OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client,
        ):
            yield Served(llm, service, url, http, client)  # type: ignore[arg-type]
    finally:
        asyncio.run(service.close())
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def slowed(llm: LLM, seconds: float) -> None:
    """From now on each step of ``llm`` takes so much longer."""
    step = llm.decoder.step

    def slow(*args: Any) -> None:
        time.sleep(seconds)
        step(*args)

    monkey: Any = llm.decoder
    monkey.step = slow
