"""Sends a server of a tiny model what its own OpenAPI document allows and forbids, by schemathesis.

    python -m benchmarks.fuzz_openapi [--examples 100] [--seed 1]

From the root of the repository, with schemathesis installed (`make fuzz` does both). No answer may have a status 5xx.
Each answer must have a status, a content type and a form that the document tells of. Exit status 1 if one doesn't, or
if something of a request is left behind all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.fuzz_serving import serving_alone

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="requests of each kind and route")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with serving_alone() as served:
        status = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json",
             "--checks", CHECKS, "--max-examples", str(options.examples), "--seed", str(options.seed),
             "--request-timeout", "30"], check=False,
        ).returncode  # fmt: skip
        left = served.left()
        print(f"{served.mebibytes} MiB at the end")
    if left:
        print(left)
    sys.exit(bool(status or left))


if __name__ == "__main__":
    main()
