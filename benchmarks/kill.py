"""Does a server that is killed (kill -9) under load come back at once, with all its files whole?

    python -m benchmarks.kill MODEL [--heads DIR] [--rounds 10] [--clients 8] [--seconds 5] [--seed 0] [--out FILE]

The first start makes what is kept: converted weights, packed ones, compiled loops, costs. It is ended by a signal, so
memories are written too. Then, round by round, a server is started on these files, loaded by clients and killed
after up to ``--seconds``; every third one while it still loads. Behind each kill no file that was there may have
changed. At the end a text must have the ids of before the first kill.

It tells the seconds from the start of the process to the first status 200 of ``/ready``, of the starts that came so
far, and the files that a kill left behind. Exit status 1 if a file changed, a server complained or a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from benchmarks.serving import free_port

ASKED: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 48, "temperature": 0, "return_token_ids": True}
PATIENCE = 300  # seconds for a first start


class Started:
    """A server that was just started.

    Attributes:
        url: where it listens.
        log: what it says.
    """

    def __init__(self, command: list[str], cache: Path, log: Path) -> None:
        port, self.log = free_port(), log
        self.url, self._began = f"http://127.0.0.1:{port}", time.perf_counter()
        env = os.environ | {"TOKENTREE_CACHE": str(cache)}
        with log.open("wb") as said:
            self.process = subprocess.Popen([*command, "--port", str(port)], stdout=said, stderr=said, env=env)

    def wait_ready(self) -> float:
        """Waits until requests are taken. Returns the seconds since the start of the process.

        Raises:
            SystemExit: if it ends before.
        """
        while time.perf_counter() - self._began < PATIENCE and self.process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/ready", timeout=1).status_code == 200:
                    return time.perf_counter() - self._began
            time.sleep(0.02)
        self.process.kill()
        raise SystemExit(f"the server isn't ready: {self.log.read_text()}")

    def ids(self) -> list[int]:
        """The tokens of a text."""
        answer = httpx.post(f"{self.url}/v1/completions", json=ASKED, timeout=120).json()
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    def end(self, how: signal.Signals) -> None:
        """Sends a signal, and waits for the end."""
        self.process.send_signal(how)
        self.process.wait(60)


async def load(url: str, clients: int, seconds: float) -> int:
    """Requests of so many clients, for so long; how many were answered."""
    statuses, end = list[int](), time.perf_counter() + seconds

    async def client(number: int) -> None:
        while time.perf_counter() < end:
            body = ASKED | {"prompt": f"{number} {len(statuses)} words", "max_tokens": 16}
            with suppress(httpx.HTTPError):
                statuses.append((await http.post(f"{url}/v1/completions", json=body)).status_code)

    async with httpx.AsyncClient(timeout=60) as http:
        tasks = [asyncio.create_task(client(number)) for number in range(clients)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
    return statuses.count(200)


def files(*folders: Path) -> dict[str, str]:
    """Digests of all files."""
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--heads")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dice, wrong = random.Random(options.seed), list[str]()
    ready, answered = list[float](), list[int]()
    with tempfile.TemporaryDirectory() as room:
        cache, memory, log = (Path(room) / name for name in ("cache", "memory", "log"))
        command = [sys.executable, "-m", "tokentree", "serve", "--model", options.model, "--memory", str(memory)]
        command += ["--heads", options.heads] if options.heads else []
        server = Started(command, cache, log)
        first, expected = server.wait_ready(), server.ids()
        server.end(signal.SIGTERM)
        known = files(cache, memory)
        for number in range(options.rounds):
            server = Started(command, cache, log)
            if number % 3 == 2:
                time.sleep(dice.uniform(0.1, 3))
            else:
                ready.append(server.wait_ready())
                answered.append(asyncio.run(load(server.url, options.clients, dice.uniform(0.5, options.seconds))))
            server.end(signal.SIGKILL)
            now = files(cache, memory)
            wrong += [f"{path} has changed" for path, digest in known.items() if now.get(path) != digest]
            wrong += [line for line in log.read_text().splitlines() if "made again" in line or "Traceback" in line]
        server = Started(command, cache, log)
        ready.append(server.wait_ready())
        if server.ids() != expected:
            wrong.append("a text differs")
        server.end(signal.SIGTERM)
        left = sorted(set(now) - set(known))
    told = {
        "first_start": round(first, 2), "ready": [round(one, 2) for one in ready], "answered": answered,
        "wrong": wrong[:20], "left_behind": left[:20],
    }  # fmt: skip
    print(json.dumps(told, indent=1))
    if options.out:
        options.out.write_text(json.dumps(told, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
