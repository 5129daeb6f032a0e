"""Does a server stay what it is under load and faults? Its memory over time, its statuses, and whether each text is the
one that is written alone and plainly.

    python -m benchmarks.soak MODEL --prompts FILE [--heads DIR] [--clients 16] [--seconds 600] [--rounds 10]
        [--bodies 200] [--settle 180] [--out FILE]

Each client makes one request after another. Most are drawn from ``--bodies`` different ones: chats and completions of
8 to 256 tokens, streamed or not, greedy or with a seed, of one or two texts, under a schema, with another speculation.
One in four is a fault: a stream that is left, a whole answer that isn't waited for, a body that stops in its midst, a
stream that nobody reads for a while, a request that is wrong. That one must get a status 4xx in OpenAI's form.

Memory (RSS) and what the server says of its own memory are written down every two seconds. The load comes in rounds:
behind each of them all requests end, and the server has nothing to do for a moment. What it has then, without the KV of
finished texts and what look-ups learnt, which have limits of their own, is what stays. Under load, memory depends on
which texts are under way: KV is counted with the room that they have ahead, which is no memory before it is written.

Memory is level if what stays grows by at most 5% from the first pause behind ``--settle`` to the last one, along the
line through all pauses between (Theil and Sen: the median of the slopes of all pairs). Growth under load is told too.
At the end the finished requests are made again, one by one, with ``speculation: "off"``, and token ids are compared.

Exit status 1 if ids differ, a request failed, a status was 5xx or not the one expected, or memory isn't level.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import re
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from benchmarks.schemas import SCHEMAS
from benchmarks.serving import Server, free_port, running
from rich.progress import Progress

from tokentree.prompts import read_prompts

LENGTHS = 8, 16, 32, 64, 128, 256
FAULTS = 0.25  # share of requests that are one
SAMPLE = 2.0  # seconds between two looks at memory
LEVEL = 1.05
PAUSES = 3  # behind which a trend is told
COUNTED = "kv", "prefixes", "lookups"  # memory that the server tells itself
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
NAMES = {
    "vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi"}]
WRONG: list[tuple[str, bytes]] = [
    (CHAT, b"{"), (CHAT, b"[]"), (CHAT, b'{"messages": []}'), (CHAT, b'{"messages": [{"role": "user"}], "n": 0}'),
    (CHAT, json.dumps({"messages": MESSAGES, "temperature": -1}).encode()),
    (CHAT, json.dumps({"messages": MESSAGES, "unknown": 1}).encode()),
    (CHAT, json.dumps({"messages": MESSAGES, "structured_outputs": {"regex": "(a{1,1000}){1,1000}"}}).encode()),
    (CHAT, json.dumps({"messages": MESSAGES, "structured_outputs": {"regex": "("}}).encode()),
    (COMPLETION, json.dumps({"prompt": [10**9]}).encode()), (COMPLETION, b'{"prompt": "\\ud800"}'),
    (COMPLETION, b'{"prompt": "a", "max_tokens": 1e400}'), (COMPLETION, json.dumps({"prompt": "a " * 20000}).encode()),
    (COMPLETION, json.dumps({"prompt": "a", "logit_bias": {"x": 1}}).encode()), ("/v1/nothing", b"{}"),
]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request: its route and body."""

    path: str
    body: dict[str, Any]


@dataclass
class Found:
    """What came of all requests."""

    counts: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    tokens: int = 0
    ids: list[tuple[int, list[list[int]]]] = field(default_factory=list)  # the number of a body, and its texts
    samples: list[dict[str, float]] = field(default_factory=list)
    pauses: list[dict[str, float]] = field(default_factory=list)  # such samples, of a server with nothing to do


def bodies(prompts: list[str], count: int, seed: int) -> list[Asked]:
    """Requests that are right."""
    dice, made = random.Random(seed), list[Asked]()
    for _ in range(count):
        body: dict[str, Any] = {"max_tokens": dice.choice(LENGTHS), "temperature": 0.0, "return_token_ids": True}
        if dice.random() < 0.4:
            body |= {"temperature": 0.8, "top_p": 0.95, "seed": dice.randrange(1000), "n": dice.choice((1, 1, 2))}
        if dice.random() < 0.15:
            body["structured_outputs"] = {"json": dice.choice([*SCHEMAS.values()])}
        if dice.random() < 0.1:
            body["speculation"] = {"drafter": dice.choice(("suffix", "suffix+ngram")), "shape": "chain:4"}
        if dice.random() < 0.7:
            body["stream"] = True
        prompt = dice.choice(prompts)
        if dice.random() < 0.6:
            made.append(Asked(CHAT, body | {"messages": [{"role": "user", "content": prompt}]}))
        else:
            made.append(Asked(COMPLETION, body | {"prompt": prompt}))
    return made


class Client:
    """Makes requests, right and wrong."""

    def __init__(self, server: Server, http: httpx.AsyncClient, found: Found, dice: random.Random) -> None:
        self._server, self._http, self._found, self._dice = server, http, found, dice

    async def ask(self, number: int, asked: Asked) -> None:
        """A request whose answer is waited for."""
        ids = await texts_of(self._http, self._server.url, asked)
        if isinstance(ids, str):
            self._found.failed.append(ids)
            await asyncio.sleep(1)  # a server that refuses everything is no load
            return
        self._found.counts["finished"] += 1
        self._found.tokens += sum(map(len, ids))
        self._found.ids.append((number, ids))

    async def fail(self, asked: Asked) -> None:
        """One of the faults."""
        kind = self._dice.choice(("leave", "abandon", "half", "idle", "wrong"))
        self._found.counts[kind] += 1
        if kind == "wrong":
            await self._wrong()
        elif kind == "half":
            await self._half(asked)
        elif kind == "abandon":
            body, patience = asked.body | {"stream": False, "max_tokens": 256}, self._dice.uniform(0.01, 2)
            with suppress(httpx.TimeoutException):
                await self._http.post(self._server.url + asked.path, json=body, timeout=patience)
        else:
            await self._leave(asked, self._dice.randrange(6), self._dice.uniform(1, 5) if kind == "idle" else 0)

    async def _wrong(self) -> None:
        path, content = self._dice.choice(WRONG)
        answer = await self._http.post(
            self._server.url + path, content=content, headers={"Content-Type": "application/json"}
        )
        try:
            said = answer.json()["error"]["message"]
        except (ValueError, KeyError):
            said = ""
        if not 400 <= answer.status_code < 500 or not said:
            self._found.failed.append(f"{answer.status_code} to {path} {content[:100]!r}: {answer.text[:200]}")

    async def _half(self, asked: Asked) -> None:
        """Less of a body than was told."""
        port = httpx.URL(self._server.url).port
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        content = json.dumps(asked.body).encode()
        head = f"POST {asked.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[: len(content) // 2])
        await writer.drain()
        await asyncio.sleep(self._dice.uniform(0, 1))
        writer.close()

    async def _leave(self, asked: Asked, pieces: int, seconds: float) -> None:
        """Reads so many lines of a stream, and nothing for so many seconds, and goes."""
        body = asked.body | {"stream": True, "max_tokens": 256}
        async with self._http.stream("POST", self._server.url + asked.path, json=body) as answer:
            if answer.status_code != 200:
                self._found.failed.append(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
                return
            async for _ in answer.aiter_lines():
                if pieces == 0:
                    break
                pieces -= 1
            await asyncio.sleep(seconds)


async def texts_of(http: httpx.AsyncClient, url: str, asked: Asked) -> list[list[int]] | str:
    """The token ids of each text of an answer; what went wrong, if something did."""
    texts: list[list[int]] = [[] for _ in range(asked.body.get("n", 1))]
    try:
        if not asked.body.get("stream"):
            answer = await http.post(url + asked.path, json=asked.body)
            if answer.status_code != 200:
                return f"{answer.status_code}: {answer.text[:200]}"
            return [choice["token_ids"] for choice in answer.json()["choices"]]
        async with http.stream("POST", url + asked.path, json=asked.body) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code}: {(await answer.aread())[:200]!r}"
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return str(event["error"])[:200]
                for choice in event["choices"]:
                    texts[choice["index"]] += choice.get("token_ids", [])
    except httpx.HTTPError as error:
        return repr(error)
    return texts


async def sampled(server: Server, http: httpx.AsyncClient, began: float) -> dict[str, float]:
    """The server's memory in MiB, and what it tells of it."""
    answer = await http.get(server.url + "/metrics", timeout=30)
    figures = re.findall(r"^([a-z_:]+){([^}]*)} (\S+)$", answer.text, re.MULTILINE)
    sample: dict[str, float] = {"seconds": round(time.perf_counter() - began, 1), "mebibytes": server.mebibytes}
    sample |= {NAMES[name]: float(value) for name, _, value in figures if name in NAMES}
    for name, labels, value in figures:
        if name == "tokentree:memory_bytes":
            sample[re.findall(r'part="([^"]*)"', labels)[0]] = round(float(value) / 2**20, 1)
    return sample


async def watch(server: Server, http: httpx.AsyncClient, found: Found, began: float) -> None:
    """Looks at the server's memory until it is cancelled."""
    while True:
        try:
            found.samples.append(await sampled(server, http, began))
        except httpx.HTTPError as error:
            found.failed.append(f"/metrics: {error!r}")
            return
        await asyncio.sleep(SAMPLE)


async def load(server: Server, made: list[Asked], clients: int, seconds: float, rounds: int, found: Found) -> None:
    """Requests of so many clients in so many rounds, which take so long together. Behind each, what is under way is
    finished, and there is a pause."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:

        async def client(number: int, end: float) -> None:
            dice = random.Random(number)
            one = Client(server, http, found, dice)
            while time.perf_counter() < end:
                place = dice.randrange(len(made))
                if dice.random() < FAULTS:
                    await one.fail(made[place])
                else:
                    await one.ask(place, made[place])

        began = time.perf_counter()
        watching = asyncio.create_task(watch(server, http, found, began))
        for turn in range(rounds):
            end = time.perf_counter() + seconds / rounds
            await asyncio.gather(*(client(turn * clients + number, end) for number in range(clients)))
            await asyncio.sleep(3 * SAMPLE)
            found.pauses.append(await sampled(server, http, began))
        watching.cancel()


async def compare(server: Server, made: list[Asked], found: Found, tell: Any) -> list[dict[str, Any]]:
    """Those of the texts found that are others when they are written alone and plainly."""
    alone, wrong = dict[int, list[list[int]] | str](), list[dict[str, Any]]()
    async with httpx.AsyncClient(timeout=600) as http:
        for number, ids in found.ids:
            if number not in alone:
                asked = Asked(made[number].path, made[number].body | {"speculation": "off", "stream": False})
                alone[number] = await texts_of(http, server.url, asked)
            if ids != alone[number]:
                wrong.append({"body": made[number].body, "got": ids, "alone": alone[number]})
            tell()
    return wrong


def growth(samples: list[dict[str, float]], settle: float) -> dict[str, float]:
    """What of the server's memory is not counted by itself, in MiB, behind ``settle``: in the first and the last of
    ``samples``, and along the line through all of them its growth in an hour, and its ratio from first to last."""
    known = [one for one in samples if one["seconds"] >= settle]
    rest = [one["mebibytes"] - sum(one[part] for part in COUNTED) for one in known]
    times = [one["seconds"] for one in known]
    pairs = [pair for pair in itertools.combinations(range(len(known)), 2) if times[pair[0]] < times[pair[1]]]
    if not pairs:
        return {}
    slope = statistics.median((rest[j] - rest[i]) / (times[j] - times[i]) for i, j in pairs)
    begin = statistics.median(value - slope * (time - times[0]) for value, time in zip(rest, times, strict=True))
    return {
        "samples": len(known), "first": round(rest[0], 1), "last": round(rest[-1], 1),
        "an_hour": round(3600 * slope, 1), "ratio": round(1 + slope * (times[-1] - times[0]) / begin, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--heads")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--settle", type=float, default=180)
    parser.add_argument("--bodies", type=int, default=200)
    parser.add_argument("--serve", default="", help="further options of the server, as one text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.rounds * (1 - options.settle / options.seconds) < PAUSES:
        parser.error(f"a trend needs {PAUSES} rounds behind --settle: give more --seconds or --rounds")
    prompts = [entry.turns[0] for entry in read_prompts(options.prompts)]
    made, found, port = bodies(prompts, options.bodies, seed=1), Found(), free_port()
    command = [sys.executable, "-W", "ignore", "-m", "tokentree", "serve", "--model", options.model]
    command += ["--port", str(port), "--max-batch", "16", "--max-queue", "1000", *options.serve.split()]
    command += ["--heads", options.heads] if options.heads else []
    with running("soak", command, port, "/ready", "model") as server, Progress(disable=not sys.stderr.isatty()) as bar:
        asyncio.run(load(server, made, options.clients, options.seconds, options.rounds, found))
        line = bar.add_task("alone", total=len(found.ids))
        wrong = asyncio.run(compare(server, made, found, lambda: bar.advance(line)))
    memory = growth(found.pauses, options.settle)
    under_load = growth([one for one in found.samples if one["running"]], options.settle)
    told = {
        "seconds": options.seconds, "clients": options.clients, "counts": dict(found.counts), "tokens": found.tokens,
        "failed": found.failed[:20], "num_failed": len(found.failed), "compared": len(found.ids), "differ": len(wrong),
        "texts_that_differ": wrong[:5], "memory": memory, "memory_under_load": under_load,
        "pauses": found.pauses, "samples": found.samples,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(told, indent=1))
    print(json.dumps(told | {"samples": found.samples[:: max(1, len(found.samples) // 20)]}, indent=1))
    sys.exit(bool(wrong or found.failed or memory.get("ratio", math.inf) > LEVEL))


if __name__ == "__main__":
    main()
