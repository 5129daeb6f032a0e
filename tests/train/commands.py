"""Runs commands one after another in each of two processes that train together: to start these takes longer than the
commands. Each is a JSON list of words. Behind each, the first process writes `DONE` to both streams."""

from __future__ import annotations

import json
import sys

from accelerate import PartialState

from tokentree.__main__ import start

DONE = "\f"


def main() -> None:
    processes = PartialState(cpu=True)  # as it would be by itself where there are GPUs
    assert processes.num_processes == 2
    for command in sys.argv[1:]:
        sys.argv = json.loads(command)
        try:
            start()
        except SystemExit as end:
            if end.code:
                raise
        for stream in (sys.stdout, sys.stderr) if processes.is_main_process else ():
            stream.write(DONE)
            stream.flush()


if __name__ == "__main__":
    main()
