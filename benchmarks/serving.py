"""How a server does under load: tokens a second, the wait for a first token, the gaps between tokens, and whether each
text is the one that is written alone.

    python benchmarks/serving.py MODEL --prompts FILE [--heads DIR] [--clients 1,4,8,16] [--requests 48]
        [--servers default,plain,transformers] [--transformers FOLDER] [--rounds 3] [--out FILE] [--sample FOLDER]
    python benchmarks/serving.py MODEL --prompts FILE --requests 400 --write FILE

Servers are started once, each in a process of its own, and get their load in turns, round by round, so that none has
a quieter machine than another. ``default`` is ``tokentree serve``; ``plain`` is the same with ``--drafter none``;
``transformers`` is ``transformers serve`` on a FOLDER with the same model.

In a round each server gets the same requests, others for each number of clients, and each client takes the next one
when it is through with one: chats with the prompts of FILE, greedy or with a seed, of 16 to 128 tokens, streamed; to
our own servers one in ten is left in its midst, and one in ten writes under a schema.

``relative`` has each server's tokens a second over those of ``plain``, of all rounds and of each. At the end the texts
of ``default`` are asked for again, one by one, from the server without speculation. Exit status 1 if one differs, or a
request failed. With ``--sample`` the lengths of what one of our servers was asked and answered are kept, in the order
of the requests: for each number of clients a trace for ``tokentree plan``, such as FOLDER/4.jsonl.

With ``--write`` no server is started: other requests of the same kinds are written, one a line, for ``tokentree
calibrate --serving``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from tokentree.prompts import read_prompts

LENGTHS = 16, 32, 64, 128
SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip
WRITTEN = 999_999  # a seed that no round has
READY = 300  # seconds that a server may take to load


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    process: subprocess.Popen[bytes]
    model: str = "model"  # what it calls its model

    @property
    def is_ours(self) -> bool:
        return self.name != "transformers"

    @property
    def mebibytes(self) -> int:
        """Its memory now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


@dataclass
class Load:
    """What came of the requests to one server by so many clients."""

    seconds: float = 0.0
    tokens: int = 0
    rates: list[float] = field(default_factory=list)  # tokens a second, of each round
    asked: int = 0
    requests: int = 0
    left: int = 0
    failed: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    texts: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    lengths: dict[int, tuple[str, int, int]] = field(default_factory=dict)  # by the order in which requests were made:
    # the prompt, its tokens if they are known, those of the answer

    def figures(self) -> dict[str, Any]:
        def at(values: list[float], share: float) -> float | None:
            return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 4) if values else None

        return {
            "tokens_a_second": round(self.tokens / self.seconds, 1), "requests": self.requests, "left": self.left,
            "failed": self.failed[:5], "first_token_p50": at(self.first, 0.5), "first_token_p95": at(self.first, 0.95),
            "gap_p50": at(self.gaps, 0.5), "gap_p95": at(self.gaps, 0.95),
            "gap_mean": round(statistics.fmean(self.gaps), 4) if self.gaps else None,
        }  # fmt: skip


@contextmanager
def running(name: str, command: list[str], port: int, health: str, model: str) -> Iterator[Server]:
    log = (Path(tempfile.gettempdir()) / f"serving-{name}.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY
        while True:
            try:
                if httpx.get(url + health, timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server {name} isn't ready: see {log.name}")
            time.sleep(0.2)
        yield Server(name, url, process, model)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def bodies(prompts: list[str], seed: int, ours: bool, count: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """So many requests, and whether each is left in its midst. ``ours`` changes nothing else about them."""
    dice = random.Random(seed)
    for _ in range(count):
        body: dict[str, Any] = {
            "model": "model", "messages": [{"role": "user", "content": dice.choice(prompts)}],
            "max_tokens": dice.choice(LENGTHS), "temperature": 0.0, "stream": True,
        }  # fmt: skip
        if dice.random() < 0.4:
            body |= {"temperature": 0.8, "top_p": 0.95, "seed": dice.randrange(8)}
        structured, left = dice.random() < 0.1, dice.random() < 0.1
        if ours:
            body["stream_options"] = {"include_usage": True}
            if structured:
                body |= {"structured_outputs": {"json": SCHEMA}, "max_tokens": 96}
        yield body, ours and left


async def ask(http: httpx.AsyncClient, server: Server, body: dict[str, Any], leave: bool, load: Load) -> None:
    body = body | {"model": server.model}
    began, previous, text, tokens, pieces = time.perf_counter(), 0.0, "", 0, 0
    prompt, prompt_tokens, place = body["messages"][0]["content"], 0, load.asked
    load.asked += 1
    async with http.stream("POST", server.url + "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            load.failed.append(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
            await asyncio.sleep(1)  # a server that refuses everything is no load
            return
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                load.failed.append(str(event["error"])[:200])
                return
            if event.get("usage"):
                tokens, prompt_tokens = event["usage"]["completion_tokens"], event["usage"]["prompt_tokens"]
            delta = event["choices"][0]["delta"].get("content") if event.get("choices") else None
            if delta:
                now = time.perf_counter()
                (load.gaps if previous else load.first).append(now - (previous or began))
                previous, text, pieces = now, text + delta, pieces + 1
                if leave and pieces == 4:
                    load.left += 1
                    load.tokens += pieces
                    load.lengths[place] = prompt, 0, pieces
                    return
    load.tokens += tokens or pieces
    load.lengths[place] = prompt, prompt_tokens, tokens or pieces
    load.requests += 1
    load.texts.append((body, text))


async def loaded(server: Server, clients: int, requests: int, prompts: list[str], seed: int, load: Load) -> None:
    """So many requests of so many clients."""
    limits, before = httpx.Limits(max_connections=2 * clients), load.tokens
    waiting = bodies(prompts, seed, server.is_ours, requests)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:

        async def client() -> None:
            for body, leave in waiting:
                await ask(http, server, body, leave, load)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - began
    load.seconds += seconds
    load.rates.append((load.tokens - before) / seconds)


def relative(of: Load, to: Load) -> dict[str, Any]:
    """Tokens a second of one server over another's: of all rounds, and of each. None where the other one failed."""

    def over(one: float, other: float) -> float | None:
        return round(one / other, 3) if other else None

    return {
        "all": over(of.tokens / of.seconds, to.tokens / to.seconds),
        "rounds": [over(one, other) for one, other in zip(of.rates, to.rates, strict=True)],
    }


async def alone(server: Server, texts: list[tuple[dict[str, Any], str]], tell: Any) -> list[dict[str, Any]]:
    """Those of ``texts`` that the server writes otherwise when nobody else asks."""
    known, wrong = dict[str, str](), list[dict[str, Any]]()
    async with httpx.AsyncClient(timeout=600) as http:
        for body, text in texts:
            key = json.dumps(body, sort_keys=True)
            if key not in known:
                load = Load()
                await ask(http, server, body, False, load)
                known[key] = load.texts[0][1]
            if known[key] != text:
                wrong.append({"body": body, "got": text, "alone": known[key]})
            tell()
    return wrong


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def told(found: dict[str, Any], out: Path | None) -> None:
    """Prints what was found, and keeps it."""
    print(json.dumps(found, indent=1), flush=True)
    if out:
        out.write_text(json.dumps(found, indent=1))


def keep_sample(loads: dict[int, Load], folder: Path) -> None:
    """Writes, for each number of clients, a line for each request whose prompt one was answered to the end with."""
    known = {prompt: tokens for load in loads.values() for prompt, tokens, _ in load.lengths.values() if tokens}
    names = {prompt: str(place) for place, prompt in enumerate(known)}
    folder.mkdir(parents=True, exist_ok=True)
    for clients, load in loads.items():
        lines = [
            {"prompt": names[prompt], "prompt_tokens": known[prompt], "output_tokens": answer}
            for _, (prompt, _, answer) in sorted(load.lengths.items())
            if prompt in known and answer
        ]
        (folder / f"{clients}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--heads")
    parser.add_argument("--clients", default="1,4,8,16")
    parser.add_argument("--requests", type=int, default=48, help="in a round, of all clients together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", default="default,plain")
    parser.add_argument("--transformers", help="a folder with the same model, for transformers serve")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sample", type=Path)
    parser.add_argument("--write", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    prompts = [entry.turns[0] for entry in read_prompts(options.prompts)]
    if options.write:
        asked = (json.dumps(body) for body, _ in bodies(prompts, WRITTEN, True, options.requests))
        options.write.write_text("".join(f"{line}\n" for line in asked))
        return
    names, counts = options.servers.split(","), [int(count) for count in options.clients.split(",")]
    ours = [sys.executable, "-W", "ignore", "-m", "tokentree", "serve", "--model", options.model, "--max-batch", "16"]
    ours += ["--served-model-name", "model"]
    if options.heads:
        ours += ["--heads", options.heads]
    with ExitStack() as stack:
        servers = list[Server]()
        for name in names:
            port = free_port()
            command = [*ours, "--port", str(port), *(["--drafter", "none"] if name == "plain" else [])]
            health, model = "/ready", "model"
            if name == "transformers":
                program = str(Path(sys.executable).with_name("transformers"))
                command = [program, "serve", options.transformers, "--port", str(port), "--dtype", "bfloat16"]
                health, model = "/health", options.transformers
            servers.append(stack.enter_context(running(name, command, port, health, model)))
        before = {server.name: server.mebibytes for server in servers}
        loads = {(server.name, count): Load() for server in servers for count in counts}
        with Progress(disable=not sys.stderr.isatty()) as bar:
            line = bar.add_task("load", total=len(loads) * options.rounds)
            for number in range(options.rounds):
                for count in counts:
                    seed = 1000 * number + count  # drafters remember what they have seen
                    for server in servers if number % 2 == 0 else reversed(servers):
                        asyncio.run(loaded(server, count, options.requests, prompts, seed, loads[server.name, count]))
                        bar.advance(line)
            by_name = {server.name: server for server in servers}
            to = "plain" if "plain" in by_name else servers[0].name
            found: dict[str, Any] = {
                "servers": {
                    name: {
                        "mebibytes": [before[name], by_name[name].mebibytes],
                        "clients": {count: loads[name, count].figures() for count in counts},
                    }
                    for name in by_name
                },
                "relative": {
                    name: {count: relative(loads[name, count], loads[to, count]) for count in counts}
                    for name in by_name
                },
            }
            if options.sample:
                last = [name for name in by_name if by_name[name].is_ours][-1]
                keep_sample({count: loads[last, count] for count in counts}, options.sample)
            told(found, options.out)  # the comparison takes minutes, and is left out where it is cut off
            texts = [one for (name, _), load in loads.items() if name == "default" for one in load.texts]
            line = bar.add_task("alone", total=len(texts))
            reference = by_name.get("plain", servers[0])
            wrong = asyncio.run(alone(reference, texts, lambda: bar.advance(line)))
    told(found | {"texts_compared": len(texts), "texts_that_differ": wrong[:5], "differ": len(wrong)}, options.out)
    sys.exit(bool(wrong or any(load.failed for load in loads.values())))


if __name__ == "__main__":
    main()
