"""The command that tells what servers would do under a load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentree.cli.options import JsonOption
from tokentree.cli.terminal import consoles, show, write, write_json
from tokentree.errors import OptionError
from tokentree.prompts import read_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tokentree.planning.figures import Figures, Target
    from tokentree.planning.plans import Plan
    from tokentree.planning.recorded import Recorded
    from tokentree.planning.replica import Proposing

LOAD, SERVER = "Load", "Server"  # headings of the help
LOADS, REPLICAS = "1e3/day,1e4/day,1e5/day,1e6/day", "1,2,4,8,16,32,64"  # of the table that needs no load
_Phase = Callable[[str], Callable[[float], None]]  # told what is simulated; gives what is told the share that is done
_Load = tuple[str, Callable[..., "Figures"]]  # its name, and what simulates it: of replicas and a method

CurveOption = Annotated[
    Path,
    typer.Option(help="What 'calibrate --json' printed: what forwards and drafts take, and how often they are right."),
]
AcceptanceOption = Annotated[Path | None, typer.Option(help="Take how often drafts are right from this one instead.")]
RequestsOption = Annotated[
    str | None,
    typer.Option(
        help="Requests a second, such as 2.5, or in another unit, such as 20/min or 1e6/day; several with commas "
        "between them. Or a trace: a file of JSON lines with seconds, prompt_tokens, output_tokens and, for prompts "
        f"that come again, prompt. Default: {LOADS} on {REPLICAS} replicas, up to where more help nobody.",
        rich_help_panel=LOAD,
    ),
]
ClientsOption = Annotated[
    str | None,
    typer.Option(
        help="So many clients, each of which asks again once it has its answer; several numbers with commas.",
        rich_help_panel=LOAD,
    ),
]
SampleOption = Annotated[
    Path | None,
    typer.Option(help="Requests are drawn from this trace, whose times don't count.", rich_help_panel=LOAD),
]
PromptOption = Annotated[
    str, typer.Option(help="Tokens of a prompt; drawn of several with commas.", rich_help_panel=LOAD)
]
OutputOption = Annotated[
    str, typer.Option(help="Tokens of an answer; drawn of several with commas.", rich_help_panel=LOAD)
]
SameOption = Annotated[
    bool,
    typer.Option(
        "--same-prompts", help="Each of --prompt-tokens is one prompt that comes again.", rich_help_panel=LOAD
    ),
]
TurnaroundOption = Annotated[
    float | None,
    typer.Option(
        help="Seconds from an answer to its client's next request; default: as measured with --serving, or none.",
        rich_help_panel=LOAD,
    ),
]
RoundOption = Annotated[
    int | None,
    typer.Option(
        "--round",
        min=1,
        rich_help_panel=LOAD,
        help="Clients share so many requests, and begin anew once all of them have ended, as load tests do. Those of "
        "--sample come in its order.",
    ),
]
ReplicasOption = Annotated[
    str | None,
    typer.Option(help="Servers; several numbers with commas. Default with a load: 1.", rich_help_panel=SERVER),
]
ShapeOption = Annotated[
    str, typer.Option(help="Of trees, as in 'generate', but for 'choices'.", rich_help_panel=SERVER)
]
RoutingOption = Annotated[
    str,
    typer.Option(
        help="Which replica a request goes to: in-turns, least-busy, or prefix: one that has KV of its prompt.",
        rich_help_panel=SERVER,
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Texts that a replica decodes together.", rich_help_panel=SERVER)]
RowsOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Tokens of prompts in a step that decodes texts too; servers on GPUs have 512.",
        rich_help_panel=SERVER,
    ),
]
KvOption = Annotated[
    int | None, typer.Option(min=1, help="Memory for KV, in tokens; default: enough.", rich_help_panel=SERVER)
]
KeptOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Memory for KV of texts that ended, in tokens, which prompts that come again reuse; default: that of the "
        "server that was measured, or enough.",
        rich_help_panel=SERVER,
    ),
]
StepOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Milliseconds of a step beside its forward and drafts, instead of the file's.",
        rich_help_panel=SERVER,
    ),
]
TextOption = Annotated[
    float | None, typer.Option(min=0, help="What each further text adds to these.", rich_help_panel=SERVER)
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Find the fewest replicas that keep to it: p50 or p95 of first-token, gap or request, such as "
        "p95-first-token=0.5 or p95-gap=50ms; may be repeated."
    ),
]


def plan(
    curve: CurveOption,
    acceptance: AcceptanceOption = None,
    requests: RequestsOption = None,
    clients: ClientsOption = None,
    sample: SampleOption = None,
    prompt_tokens: PromptOption = "128",
    output_tokens: OutputOption = "128",
    same_prompts: SameOption = False,
    turnaround: TurnaroundOption = None,
    in_round: RoundOption = None,
    replicas: ReplicasOption = None,
    routing: RoutingOption = "least-busy",
    shape: ShapeOption = "cost",
    max_batch: BatchOption = 8,
    prefill_rows: RowsOption = 64,
    kv_tokens: KvOption = None,
    kept_tokens: KeptOption = None,
    step_ms: StepOption = None,
    text_ms: TextOption = None,
    target: TargetOption = None,
    break_even: Annotated[
        bool, typer.Option("--break-even", help="Find the load under which speculation stops paying.")
    ] = False,
    measured: Annotated[int, typer.Option(min=20, help="Requests of each load that are measured.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """What servers would do under a load: the scheduler itself, on a simulated clock, with what was measured."""
    from tokentree.planning.figures import Target
    from tokentree.planning.load import Lengths, read_trace
    from tokentree.planning.plans import Plan
    from tokentree.planning.replica import ROUTERS, Setup
    from tokentree.planning.timing import Beside

    if routing not in ROUTERS:
        raise OptionError(f"--routing is one of {', '.join(ROUTERS)}, not {routing!r}")
    recorded = _recorded(curve, "the cost curve")
    known = recorded.served
    right = known.acceptance() if acceptance is None else _acceptance(acceptance)
    setup = Setup(
        known.timing().beside(step_ms, text_ms), right, shape, max_batch, prefill_rows, kv_tokens,
        known.kept_tokens if kept_tokens is None else kept_tokens, known.shared_tokens,
    )  # fmt: skip
    counts = _numbers(prompt_tokens, "--prompt-tokens"), _numbers(output_tokens, "--output-tokens")
    lengths = Lengths.of(*counts, same_prompts) if sample is None else Lengths(read_trace(sample))
    turn = Beside(known.turnaround, known.turnaround_per_client) if turnaround is None else Beside(turnaround)
    made = Plan(setup, lengths, ROUTERS[routing], measured, seed, turn, in_round)
    targets, asked = [Target.of(text) for text in target or ()], requests is not None or clients is not None
    if requests is not None and clients is not None:
        raise OptionError("--requests come whatever becomes of others, and --clients wait for these: give one of them")
    if targets and not asked:
        raise OptionError("--target is about a load: give --requests or --clients")
    if break_even and setup.acceptance is None:
        raise OptionError("--break-even compares speculation with plain decoding, and no acceptance is known")
    loads = _loads(made, requests, clients) if asked or not break_even else {}
    several = _numbers(replicas or ("1" if asked else REPLICAS), "--replicas")
    console, errors = consoles()
    with _progress(errors) as phase:
        found = _Found(
            [] if targets else [row for one in loads.items() for row in _rows(made, one, several, phase, not asked)],
            [_needed(made, load, way, targets, phase) for load in loads.items() for way in made.methods if targets],
            list(made.by_texts(max_batch, phase("texts at a time"))) if break_even else [],
        )
    if as_json:
        write_json({"engine": known.engine} | found.as_json())
    else:
        for table in found.tables():
            show(console, table)
        write(_told(recorded, setup.acceptance is not None))


@dataclass(frozen=True)
class _Found:
    """What was simulated: loads, the methods side by side; replicas that keep to targets, by load and method; texts at
    a time."""

    loads: list[list[Figures]]
    needed: list[tuple[str, str, Figures | None]]
    texts: list[tuple[Figures, Figures]]

    def tables(self) -> list[Table]:
        from tokentree.planning import tables
        from tokentree.planning.plans import stops_paying

        shown = [tables.loads(self.loads)] if self.loads else []
        shown += [tables.needed(self.needed)] if self.needed else []
        return shown + ([tables.texts(self.texts, stops_paying(self.texts))] if self.texts else [])

    def as_json(self) -> dict[str, Any]:
        from tokentree.planning.plans import stops_paying

        stop = stops_paying(self.texts)
        return {
            "loads": [asdict(one) for ways in self.loads for one in ways],
            "needed": [{"load": a, "method": b, "figures": c and asdict(c)} for a, b, c in self.needed],
            "by_texts": [asdict(one) for ways in self.texts for one in ways],
            "stops_paying": stop and asdict(stop),
        }


def _rows(plan: Plan, load: _Load, replicas: list[int], phase: _Phase, enough: bool) -> Iterator[list[Figures]]:
    name, run = load

    def one(count: int, method: str) -> Figures:
        return run(count, method, phase(f"{name}, {count} replicas, {method}"))

    return plan.table(one, replicas, enough)


def _needed(
    plan: Plan, load: _Load, method: str, targets: list[Target], phase: _Phase
) -> tuple[str, str, Figures | None]:  # fmt: skip
    name, run = load
    return name, method, plan.needed(partial(run, tell=phase(f"{name}, {method}")), method, targets)


def _told(known: Recorded, speculates: bool) -> str:
    """What a reader of the tables should know of what they rest on."""
    said = ["Simulated, with times that were measured one by one. Contexts are taken to be short."]
    if known.serving is not None:
        said = ["Simulated, with times that were measured in a server under load."]
    if not known.prompt_rows:
        said.append("No time of prompts was recorded: the curve goes on in a straight line.")
    if known.serving is None:
        said.append("What HTTP adds isn't in it: 'calibrate --serving' measures that.")
    if not known.served.step_seconds:
        said.append("Nothing was recorded of what steps take beside forwards and drafts.")
    if not speculates:
        said.append("Nothing was recorded of acceptance: decoding is plain.")
    return " ".join(said) + "\n"


def _recorded(path: Path, what: str) -> Recorded:
    from tokentree.planning.recorded import Recorded

    return Recorded.read(read_text(path, what), f"{what} {str(path)!r}")


def _acceptance(path: Path) -> Proposing:
    found = _recorded(path, "the acceptance").served.acceptance()
    if found is None:
        raise OptionError(f"the acceptance {str(path)!r} has no runs, no rates and no by_rank")
    return found


def _loads(plan: Plan, requests: str | None, clients: str | None) -> dict[str, Callable[..., Figures]]:
    """What simulates each load, by its name."""
    from tokentree.planning.load import rate_of, read_trace

    if clients is not None:
        counts = _numbers(clients, "--clients")
        return {f"{count} client{'s' * (count > 1)}": partial(plan.clients, count) for count in counts}
    rates = [rate_of(part) for part in (requests or LOADS).split(",")]
    known = [rate for rate in rates if rate is not None]
    if len(known) == len(rates):
        names = [part if "/" in part else f"{part}/s" for part in (requests or LOADS).replace(" ", "").split(",")]
        return {name: partial(plan.rate, rate, name=name) for name, rate in zip(names, known, strict=True)}
    path = Path(requests or "")
    if not path.is_file():
        raise OptionError(f"--requests takes requests a second, such as 2.5 or 1e6/day, or a trace, not {requests!r}")
    return {path.name: partial(plan.trace, path.name, read_trace(path))}


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{option} takes whole numbers with commas between them, and got {text[:80]!r}") from None


@contextmanager
def _progress(console: Console) -> Iterator[_Phase]:
    """Shows, on a terminal, how far the simulation of each load is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("simulating", total=1.0)

        def phase(what: str) -> Callable[[float], None]:
            bar.update(task, description=what)
            return lambda share: bar.update(task, completed=share)

        yield phase
