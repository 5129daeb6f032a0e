"""How soon does another version of this library write its first token, and in how much memory?

    python benchmarks/start.py OLD NEW MODEL [--runs 7] [--heads DIR] [--out FILE]

OLD and NEW are folders with a `tokentree` package, such as ``src`` in two checkouts. Each run is a process of its own:
it imports the package, loads MODEL, and writes one token, then fifty more. Runs of both alternate, after one of each
that isn't counted, which fills caches. Prints medians: seconds to the first token, and the most memory in MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.progress import track

WORKER = """
import json, sys, time
began = time.perf_counter()
from tokentree import LLM, SamplingParams
llm = LLM(sys.argv[1], heads=sys.argv[2] or None)
stream = llm.stream("Three colours are", SamplingParams(max_tokens=50))
next(iter(stream))
first = time.perf_counter() - began
for _ in stream:
    pass
most = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([first, most / 1024]), file=sys.__stdout__)
"""


def run(source: Path, cache: Path, model: str, heads: str) -> tuple[float, float]:
    # sources are compiled once, as they are for users, whatever this shell says
    environment = os.environ | {"PYTHONPATH": str(source.resolve()), "TOKENTREE_CACHE": str(cache)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache / "bytecode")}
    command = [sys.executable, "-W", "ignore", "-c", WORKER, model, heads]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, mebibytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, mebibytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("model")
    parser.add_argument("--heads", default="")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    versions = {"old": options.old, "new": options.new}
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: Path(folder) / name for name in versions}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in versions}
        for number in track(range(options.runs + 1), "runs", disable=not sys.stderr.isatty()):
            for name, source in versions.items():
                found = run(source, caches[name], options.model, options.heads)
                if number:
                    taken[name].append(found)
    said = {
        name: {
            "first_token_seconds": round(statistics.median(seconds for seconds, _ in found), 3),
            "most_mebibytes": round(statistics.median(most for _, most in found)),
            "runs": len(found),
        }
        for name, found in taken.items()
    }
    print(json.dumps(said, indent=1))
    if options.out:
        options.out.write_text(json.dumps(said | {"all": taken}, indent=1))


if __name__ == "__main__":
    main()
