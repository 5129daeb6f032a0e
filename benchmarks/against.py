"""Does another version of this library write the same ids, and how fast?

    python benchmarks/against.py OLD NEW MODEL --prompts FILE [--heads DIR] [--max-tokens 48] [--turns 0] [--out FILE]

OLD and NEW are folders with a `tokentree` package, such as ``src`` in two checkouts. Each gets a process of its own.
They decode one after another, turn by turn, plainly and by default, from the same ids: those that NEW makes of a
prompt. What OLD's tokenizer makes of it is only counted. Prints how many turns have the same ids, and the ratio of all
seconds, with a 95% interval over turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

WORKER = """
import json, sys
answers, sys.stdout = sys.stdout, sys.stderr  # what loading prints is no answer
from tokentree import LLM, SamplingParams
told = json.loads(sys.stdin.readline())
llm = LLM(told["model"], heads=told["heads"], prefix_mb=0)
ways = {"plain": llm.plain(), "default": llm}
print("ready", file=answers, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "messages" in asked:
        print(json.dumps(llm.chat_prompt(asked["messages"])), file=answers, flush=True)
        continue
    params = SamplingParams(max_tokens=told["max_tokens"])
    result = ways[asked["way"]].generate([asked["ids"]], params)[0]
    metrics = result.metrics
    said = [result.token_ids, result.text, metrics.decode_seconds, metrics.prefill_seconds]
    print(json.dumps(said), file=answers, flush=True)
"""


class Version:
    """One of the two, in a process of its own."""

    def __init__(self, source: Path, cache: Path, told: dict[str, Any]) -> None:
        environment = os.environ | {"PYTHONPATH": str(source.resolve()), "TOKENTREE_CACHE": str(cache)}
        command = [sys.executable, "-W", "ignore", "-c", WORKER]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._tell(told)

    def _tell(self, told: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a version ended before its time")
        return line

    def ask(self, **asked: Any) -> Any:
        self._tell(asked)
        return json.loads(self.hear())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True, action="append")
    parser.add_argument("--heads")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--turns", type=int, default=0, help="at most so many; 0 is all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    entries = [json.loads(line) for file in options.prompts for line in file.read_text("utf-8").split("\n") if line]
    talks = [entry.get("turns") or [entry["prompt"]] for entry in entries]
    total = options.turns or sum(map(len, talks))
    told = {"model": options.model, "heads": options.heads, "max_tokens": options.max_tokens}
    found = list[dict[str, Any]]()
    print(f"load average before: {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory() as room, Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("turns", total=total)
        versions = {name: Version(getattr(options, name), Path(room) / name, told) for name in ("old", "new")}
        for version in versions.values():
            version.hear()
        for talk in talks:
            messages = list[dict[str, str]]()
            for turn in talk:
                if len(found) == total:
                    break
                messages.append({"role": "user", "content": turn})
                asked = {name: version.ask(messages=messages) for name, version in versions.items()}
                said: dict[str, dict[str, Any]] = {}
                for way in ("plain", "default"):
                    for name in ("old", "new") if len(found) % 2 else ("new", "old"):
                        said.setdefault(way, {})[name] = versions[name].ask(way=way, ids=asked["new"])
                messages.append({"role": "assistant", "content": said["plain"]["new"][1]})
                one: dict[str, Any] = {"prompt": asked["old"] == asked["new"], "tokens": len(said["plain"]["new"][0])}
                for way, both in said.items():
                    one[way] = {
                        "same": both["old"][0] == both["new"][0],
                        "plain": both["new"][0] == said["plain"]["new"][0],
                        "seconds": [both[name][2] for name in ("old", "new")],
                        "prefill": [both[name][3] for name in ("old", "new")],
                        "ids": [] if both["old"][0] == both["new"][0] else [both[name][0] for name in ("old", "new")],
                    }
                found.append(one)
                bar.advance(task)
    rng = np.random.default_rng(0)
    print(f"{len(found)} turns, {sum(one['prompt'] for one in found)} of equal prompt ids")
    for way in ("plain", "default"):
        same, own = (sum(one[way][name] for one in found) for name in ("same", "plain"))
        print(f"{way}: {same}/{len(found)} turns have the ids of before, {own}/{len(found)} those of plain")
        for what in ("seconds", "prefill"):
            pairs = np.array([one[way][what] for one in found])
            picks = rng.integers(0, len(pairs), (2000, len(pairs)))
            ratios = pairs[picks, 1].sum(1) / pairs[picks, 0].sum(1)
            low, high = np.quantile(ratios, (0.025, 0.975))
            whole = pairs[:, 1].sum() / pairs[:, 0].sum()
            name = "decoding" if what == "seconds" else "reading prompts"
            print(f"  {name}: new / old seconds {whole:.3f} ({low:.3f} to {high:.3f})")
    if options.out:
        options.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
