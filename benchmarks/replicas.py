"""Are all requests answered, with plain's texts, while one of two replicas is killed, and while both are drained and
replaced? And what does it save to send a request where its beginning was read?

    python -m benchmarks.replicas MODEL --prompts FILE [--heads DIR] [--clients 8] [--seconds 300] [--chats 40]
        [--turns 4] [--cpus 1] [--seed 0] [--out FILE]

First, clients ask two replicas for ``--seconds``, whole answers and streams, greedy or with a seed. After a third of
the time the busier replica is killed (kill -9); after two thirds all replicas are drained and replaced, one by one.
Texts are then compared with those of one server without speculation. A stream whose replica is killed ends in an error;
what it had told must be the beginning of plain's text.

Then the clients hold ``--chats`` conversations of ``--turns`` turns, once with routing by beginnings and once by load
alone (Serve's choice of the less busy of two random replicas), and tell how many tokens of prompts were read already.

What is known is printed before texts are compared, which takes as long as writing them one by one. Exit status 1 if a
request had no answer, or a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from benchmarks.serving import alone, bodies, free_port, running
from benchmarks.serving import told as show
from rich.progress import Progress

from tokentree.prompts import read_prompts
from tokentree.scale.arguments import Arguments, arguments_of
from tokentree.scale.local import deploy, ray_here, serving
from tokentree.scale.loopback import HERE

PATIENCE = 600  # seconds for an answer


class Told:
    """What came of all requests.

    Attributes:
        texts: of each request that was answered, its body and its text.
        cut: the same of streams that ended in an error, with what they had told by then.
        wrong: what else was told.
    """

    def __init__(self) -> None:
        self.texts, self.cut = list[tuple[dict[str, Any], str]](), list[tuple[dict[str, Any], str]]()
        self.wrong = list[str]()
        self.slowest = 0.0


async def ask(http: httpx.AsyncClient, body: dict[str, Any], told: Told) -> None:
    """Makes one request, streamed or not."""
    began, text = time.perf_counter(), ""
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                told.wrong.append(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
                return
            if not body["stream"]:
                text = json.loads(await answer.aread())["choices"][0]["message"]["content"]
            else:
                async for line in answer.aiter_lines():
                    event = json.loads(line[6:]) if line.startswith("data: {") else {}
                    if "error" in event:
                        lost = event["error"]["code"] == "replica_lost"
                        told.cut.append((body, text)) if lost else told.wrong.append(str(event)[:200])
                        return
                    for choice in event.get("choices", ()):
                        text += choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        told.wrong.append(f"no answer: {error!r}")
        return
    told.slowest = max(told.slowest, time.perf_counter() - began)
    told.texts.append((body, text))


async def load(
    url: str, clients: int, seconds: float, prompts: list[str], seed: int, faults: list[Callable[[], Any]]
) -> Told:
    """Requests of so many clients, for about so long, while ``faults`` come at equal distances."""
    told, end = Told(), time.perf_counter() + seconds

    async def client(number: int) -> None:
        dice = random.Random(1000 * seed + number)
        for body, _ in bodies(prompts, 1000 * seed + number, ours=False, count=sys.maxsize):
            if time.perf_counter() > end:
                return
            await ask(http, body | {"stream": dice.random() < 0.5}, told)

    async with httpx.AsyncClient(
        base_url=url, timeout=PATIENCE, limits=httpx.Limits(max_connections=2 * clients)
    ) as http:
        working = asyncio.gather(*map(client, range(clients)))
        for fault in faults:
            await asyncio.sleep(seconds / (len(faults) + 1))
            await asyncio.to_thread(fault)
        await working
    return told


async def chats(url: str, clients: int, count: int, turns: int, prompts: list[str], seed: int) -> dict[str, Any]:
    """Conversations; what of their prompts was read already. All are under way at once: a client goes on with the one
    that has waited longest, as people read and think between two turns. Who went on at once would come back to the
    replica that has just become the less busy one, which is its own, however requests are routed."""
    sizes, began = [0, 0], time.perf_counter()
    waiting = deque([(random.Random(1000 * seed + number), list[dict[str, Any]]()) for number in range(count)])

    async def client() -> None:
        while waiting:
            dice, messages = waiting.popleft()
            messages.append({"role": "user", "content": dice.choice(prompts)})
            body = {"model": "model", "messages": messages, "max_tokens": 48, "temperature": 0}
            answer = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
            sizes[0] += answer["usage"]["prompt_tokens"]
            sizes[1] += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            if len(messages) < 2 * turns:
                waiting.append((dice, messages))

    async with httpx.AsyncClient(
        base_url=url, timeout=PATIENCE, limits=httpx.Limits(max_connections=2 * clients)
    ) as http:
        await asyncio.gather(*(client() for _ in range(clients)))
    seconds = round(time.perf_counter() - began, 1)
    return {"prompt_tokens": sizes[0], "reused": sizes[1], "share": round(sizes[1] / sizes[0], 3), "seconds": seconds}


def faults(url: str, arguments: Arguments, said: list[str]) -> list[Callable[[], Any]]:
    """What happens to replicas."""

    def replicas() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{url}/replicas", timeout=30).json()["data"]
        return found

    def kill() -> None:
        victim = max(replicas(), key=lambda one: one["running"])
        os.kill(victim["pid"], signal.SIGKILL)
        said.append(f"killed with {victim['running']} requests running and {victim['waiting']} waiting")

    def replace() -> None:
        began, before = time.perf_counter(), {one["pid"] for one in replicas()}
        deploy(arguments)
        after = {one["pid"] for one in replicas()}
        said.append(f"replaced {len(before - after)} of {len(before)} in {time.perf_counter() - began:.0f} s")

    return [kill, replace]


def differing(plain: Any, told: Told) -> list[dict[str, Any]]:
    """Texts that the server without speculation writes otherwise."""

    def streamed(texts: list[tuple[dict[str, Any], str]]) -> list[tuple[dict[str, Any], str]]:
        return [(body | {"stream": True}, text) for body, text in texts]

    with Progress(transient=True) as shown:
        line = shown.add_task("comparing texts", total=len(told.texts) + len(told.cut))
        wrong = asyncio.run(alone(plain, streamed(told.texts), lambda: shown.advance(line)))
        cut = asyncio.run(alone(plain, streamed(told.cut), lambda: shown.advance(line)))
    return wrong + [one for one in cut if not one["alone"].startswith(one["got"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--heads")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--chats", type=int, default=40)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--cpus", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prompts = [entry.turns[0] for entry in read_prompts(options.prompts)]
    given = {
        "model": options.model, "heads": options.heads, "served_model_name": "model", "replicas": 2, "threads": 1,
        "cpus": options.cpus, "log_level": "warning",
    }  # fmt: skip
    said, routed = list[str](), dict[str, Any]()
    with ray_here(2 * options.cpus):
        arguments, port = arguments_of(given), free_port()
        url = f"http://{HERE}:{port}"
        with serving(arguments, HERE, port):
            wait_ready(url)
            told = asyncio.run(
                load(url, options.clients, options.seconds, prompts, options.seed, faults(url, arguments, said))
            )
        for routing in ("beginning", "balanced"):
            with serving(arguments_of(given | {"routing": routing}), HERE, port):
                wait_ready(url)
                routed[routing] = asyncio.run(
                    chats(url, options.clients, options.chats, options.turns, prompts, options.seed)
                )
    found = {
        "answered": len(told.texts), "streams_that_ended_in_an_error": len(told.cut), "failed": told.wrong[:10],
        "slowest": round(told.slowest, 1), "faults": said, "routing": routed,
    }  # fmt: skip
    show(found, options.out)
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "tokentree", "serve", "--model", options.model]
    command += ["--drafter", "none", "--served-model-name", "model", "--port", str(port)]
    with running("plain", command, port, "/ready", "model") as plain:
        wrong = differing(plain, told)
    show(found | {"differ": len(wrong), "texts_that_differ": wrong[:3]}, options.out)
    sys.exit(bool(wrong or told.wrong or len(said) < 2))


def wait_ready(url: str) -> None:
    while httpx.get(f"{url}/ready", timeout=30).status_code != 200:
        time.sleep(0.1)


if __name__ == "__main__":
    main()
