"""How far is what `tokentree plan` foretold from what a load test measured?

    python benchmarks/planned.py LOAD PLAN … [--within 0.15] [--out FILE]

LOAD is what `benchmarks/serving.py --out` wrote. Each PLAN is what ``tokentree plan --clients … --json`` printed for
some of its numbers of clients. The server ``plain`` is compared with plain decoding, ``default`` with speculation. Exit
status 1 if tokens a second, or the 95th of 100 gaps, is further off than ``--within``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

SERVERS = {"plain": "plain", "default": "speculation"}
FIGURES = ("tokens_a_second", "gap_p95", "gap_p50", "first_token_p50", "first_token_p95")
JUDGED = FIGURES[:2]


def compared(load: dict[str, Any], plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each figure that both have, as it was measured and foretold, and how far off that is."""
    ones = [one for plan in plans for one in plan["loads"] if "client" in one["load"]]
    foretold = {(one["load"].split()[0], one["method"]): one for one in ones}
    found = []
    for server, method in SERVERS.items():
        for clients, measured in load["servers"].get(server, {}).get("clients", {}).items():
            one = foretold.get((str(clients), method))
            if one is None:
                continue
            for name in FIGURES:
                if measured.get(name) and one[name] is not None:
                    off = one[name] / measured[name] - 1
                    found.append({"server": server, "clients": int(clients), "figure": name, "off": round(off, 4)}
                                 | {"measured": measured[name], "foretold": round(one[name], 5)})  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", type=Path)
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--within", type=float, default=0.15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load, *plans = (json.loads(path.read_text()) for path in (options.load, *options.plans))
    found = compared(load, plans)
    for one in found:
        print(f"{one['server']:8} {one['clients']:3} clients  {one['figure']:16} measured {one['measured']:9.4g}  "
              f"foretold {one['foretold']:9.4g}  {one['off']:+.1%}")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    if not found:
        sys.exit("nothing was both measured and foretold")
    sys.exit(any(abs(one["off"]) > options.within for one in found if one["figure"] in JUDGED))


if __name__ == "__main__":
    main()
