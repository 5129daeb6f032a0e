"""The commands that tell what to expect: of acceptance rates, and of a run elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tokentree.cli.options import JsonOption
from tokentree.cli.terminal import consoles, show, working, write, write_json
from tokentree.errors import OptionError
from tokentree.prompts import read_text


def theory(
    alpha: Annotated[float, typer.Option(help="The chance that a candidate is the token.")] = 0.8,
    branching: Annotated[int, typer.Option(help="Children of every node.")] = 2,
    depth: Annotated[int, typer.Option(help="Candidates on a path.")] = 3,
    ranks: Annotated[
        str | None, typer.Option(help="Acceptance by rank instead of --alpha, such as 0.6,0.15,0.05.")
    ] = None,
    curve: Annotated[Path | None, typer.Option(help="What 'calibrate --json' printed: the cost of a forward.")] = None,
    draft_cost: Annotated[float, typer.Option(help="Of a level of drafting, in plain steps.")] = 0.0,
    trials: Annotated[int, typer.Option(help="Of the simulation that checks it.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulation.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """What to expect of a chain and of a tree, and what is taught about them."""
    import numpy as np
    from rich.table import Table

    from tokentree.theory import check_tree, expected, full_tree, rates_of, read_curve, simulated_tokens, taught_success

    check_tree(branching, depth)
    rates = rates_of(alpha, branching) if ranks is None else _numbers(ranks)
    cost = None if curve is None else read_curve(read_text(curve, "the cost curve"))
    console, errors = consoles()
    found = {
        f"chain of {depth}": (1, expected(rates[:1], 1, depth, cost, draft_cost)),
        f"tree, {branching} children, depth {depth}": (branching, expected(rates, branching, depth, cost, draft_cost)),
    }
    with working(errors, "simulating"):
        generator = np.random.default_rng(seed)
        checked = {
            name: simulated_tokens(rates, full_tree(width, depth), trials, generator)
            for name, (width, _) in found.items()
        }
    taught = taught_success(rates[0], branching, depth)
    if as_json:
        shown = {
            name: asdict(what) | {"speed_up": what.speed_up, "simulated": list(checked[name])}
            for name, (_, what) in found.items()
        }
        write_json({"rates": rates, "taught_success": taught, "expected": shown})
        return
    table = Table(title="acceptance by rank: " + ", ".join(f"{rate:.3g}" for rate in rates))
    for column in ("", "candidates", "a whole path", "tokens a forward", "simulated", "step, x plain", "speed-up"):
        table.add_column(column, justify="right" if column else "left")
    for name, (_, what) in found.items():
        mean, error = checked[name]
        table.add_row(
            name, str(what.nodes), f"{what.whole:.1%}", f"{what.tokens:.3f}", f"{mean:.3f} ± {2 * error:.3f}",
            f"{what.cost:.2f}", f"{what.speed_up:.2f}",
        )  # fmt: skip
    show(console, table)
    write(
        f"1 - (1 - {rates[0]:.3g}^{depth})^({branching}^{depth}) = {taught:.1%} is often taught for the tree. It is no "
        "bound either way: paths that share a prefix fail together, and siblings exclude each other, so that their "
        "chances add up.\n"
    )
    if cost is None:
        write("A forward is taken to cost the same with any number of rows: see --curve.\n")


def simulate(
    folder: Annotated[Path, typer.Argument(help="The folder of a run of 'bench'.")],
    curve: Annotated[
        Path,
        typer.Option(
            help='The cost of a forward there: what \'calibrate --json\' printed, or {"rows": …, "seconds": …}.'
        ),
    ],
    drafting: Annotated[float, typer.Option(help="Times what drafting and accepting took in the run.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """What the steps of a run would take where a forward costs otherwise: on another machine, or for a larger model."""
    from rich.table import Table

    from tokentree.bench.replay import replay
    from tokentree.bench.results import Run
    from tokentree.theory import read_curve

    found = replay(Run.load(folder), read_curve(read_text(curve, "the cost curve")), drafting)
    if as_json:
        write_json([asdict(one) for one in found])
        return
    table = Table(title="times plain's speed")
    table.add_column("method")
    for column in ("tokens a forward", "rows", "measured in the run", "predicted under the curve"):
        table.add_column(column, justify="right")
    for one in found:
        shown = one.tokens_per_forward, one.rows, one.measured, one.predicted
        table.add_row(one.method, *("" if value is None else f"{value:.2f}" for value in shown))
    show(consoles()[0], table)
    if any(one.measured is None for one in found):
        write("This run has no speed of the method plain: what was measured can't be compared with it.\n")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--ranks takes numbers with commas between them, and got {text!r}") from None
