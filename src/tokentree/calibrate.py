"""What a forward costs on this machine, what drafts are worth on these texts, and the trees that follow from both."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from pydantic import BaseModel, Field
from rich.table import Table

from tokentree.busy import waited
from tokentree.costs import cost_curve, prompt_costs
from tokentree.llm import LLM
from tokentree.planning.counting import Counting
from tokentree.planning.runs import Runs
from tokentree.sampling import SamplingParams
from tokentree.shapes import optimal_paths

BATCHES = (1, 2, 4, 8)
SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
DEPTH = 12
TOGETHER = 4  # texts that tell what each further one adds to a step
BUSY_WAITING, BUSY_SPREAD = 0.1, 1.3  # above these, other programs took part in what was measured
PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "A farmer has 12 cows and buys 7 more, then sells 5. How many cows are left? Explain step by step.",
    "Summarise in two sentences: The river rose for three days. On the fourth day the mayor closed the bridge, and the "
    "people of the town crossed by boat until the water fell.",
    "What is the meaning of life?",
)


class Rate(BaseModel):
    """How often candidates of one kind were what the text went on with, once their parent was."""

    drafters: str
    depth: str
    rank: str
    hits: float
    trials: float


class Cell(Rate):
    """The same of candidates that claimed about the same of themselves."""

    claim: int = Field(description="the number of the bucket of probabilities that has what they claimed")


class Pick(BaseModel):
    """The best fixed tree for one batch size."""

    batch: int
    nodes: int = Field(description="rows per sequence, root included; 1 is no speculation")
    shape: str
    tokens: float = Field(description="expected per sequence and forward")
    speed_up: float
    by_size: list[float] = Field(description="expected speed-up of the best tree of each of `SIZES`")


class Loaded(BaseModel):
    """What so many clients got of a server."""

    clients: int
    method: str = Field(description="plain or speculation")
    tokens_a_second: float
    texts: float = Field(description="that a step decoded, on average")
    tokens_a_forward: float = Field(description="that each of these got in a step")
    requests: int = Field(description="that were answered to their ends")
    explained: float = Field(description="share of the time of steps that the times of `Serving` come to")


class Serving(BaseModel):
    """What parts of a step take in a server under load, with clients on the same machine. Fields that a `Calibration`
    has too mean the same here."""

    rows: list[int]
    seconds: list[float]
    per_sequence: float
    prompt_rows: list[int]
    prompt_seconds: list[float]
    drafting_seconds: float = Field(0.0, description="of making drafts, in a step with one text that makes some")
    drafting_per_sequence: float = 0.0
    step_seconds: float = Field(0.0, description="of all else beside the forward, with speculation and one text")
    step_per_sequence: float = 0.0
    step_per_token: float = Field(0.0, description="what each token beyond one of a text adds")
    plain_step_seconds: float = Field(0.0, description="the same without speculation")
    plain_step_per_sequence: float = 0.0
    turnaround: float = Field(0.0, description="seconds from the end of a text to its lone client's next request")
    turnaround_per_client: float = Field(0.0, description="what each further client adds")
    kept_tokens: int | None = Field(None, description="whose KV there is memory for, of texts that ended")
    shared_tokens: int = Field(0, description="that all prompts began with: their KV was there for each of them")
    steps: int = Field(0, description="that made drafts of a text, in which `cells` were counted")
    cells: list[Cell] = []
    runs: Runs = Field(Runs(), description="drafts of these texts, in their order")
    loads: list[Loaded] = Field([], description="what clients got meanwhile")


class Calibration(BaseModel):
    """Everything that `calibrate` found."""

    engine: str
    rows: list[int]
    seconds: list[float]
    per_sequence: float
    drafting_seconds: float = Field(description="of a step, beside the target's forward")
    rates: list[Rate]
    by_rank: list[float] = Field(description="acceptance by rank, all drafters and depths together")
    picks: list[Pick]
    measured_speed_up: float = Field(description="of the cost shape over plain on these prompts")
    mean_accepted_length: float
    one_row: list[float] = Field([], description="seconds of plain steps: the 10th, 50th and 90th of 100")
    waiting: float | None = Field(None, description="share of the time that a thread waited for a CPU, where known")
    steps: int = Field(0, description="that made drafts of a text, in which `rates` and `cells` were counted")
    cells: list[Cell] = Field([], description="`rates`, by what candidates claimed too")
    runs: Runs = Field(Runs(), description="drafts of these texts, in their order")
    prompt_rows: list[int] = Field([], description="tokens of a prompt that a forward reads, and nothing else")
    prompt_seconds: list[float] = Field([], description="of such forwards")
    drafting_per_sequence: float = Field(0.0, description="what each further text adds to `drafting_seconds`")
    step_seconds: float = Field(0.0, description="of a step with one text, beside what the loop itself does")
    step_per_sequence: float = Field(0.0, description="what each further text adds to `step_seconds`")
    serving: Serving | None = Field(None, description="what a server adds, if it was measured")

    @property
    def spread(self) -> float:
        """How many times as long as a fast plain step a slow one took."""
        return self.one_row[2] / self.one_row[0] if self.one_row and self.one_row[0] else 1.0

    @property
    def busy(self) -> bool:
        """Whether other programs took CPUs meanwhile, so that seconds are those of a busy machine."""
        return self.spread > BUSY_SPREAD if self.waiting is None else self.waiting > BUSY_WAITING


def calibrate(
    llm: LLM, prompts: SequenceOf[list[int]], max_tokens: int, step: Callable[[], None] = lambda: None
) -> Calibration:
    """Measures T(n), decodes ``prompts`` with the cost shape and plainly, and works out the best static trees.

    The acceptance by rank that these trees rest on is an average over steps. The cost shape knows each step's own
    candidates, so it does better than they.
    """
    began, before = time.perf_counter(), waited()
    curve = cost_curve(llm.engine, again=True)
    prompt_rows, prompt_seconds = prompt_costs(llm.engine)
    step()
    form = Counting(curve)
    tree, plain, params = llm.using(llm.decoder.drafter, form), llm.plain(), SamplingParams(max_tokens=max_tokens)
    spent = dict.fromkeys(("tree", "plain"), 0.0)
    drafting, forwards, tokens, singles = 0.0, 0, 0, list[float]()
    for ids in prompts:
        slow, fast = plain.generate([ids], params)[0].metrics, tree.generate([ids], params)[0].metrics
        spent["plain"] += slow.decode_seconds
        spent["tree"] += fast.decode_seconds
        singles += [seconds for _, _, seconds in slow.steps]
        drafting += fast.draft_seconds + fast.accept_seconds
        forwards += fast.target_forwards
        tokens += fast.new_tokens
        step()
    drafting /= max(1, forwards)
    after, took = waited(), time.perf_counter() - began
    waiting = None if before is None or after is None else (after - before) / took / torch.get_num_threads()
    tally, names = form.tally(), tree.decoder.drafter.names
    by_rank = tally.by_rank()
    rates = [
        Rate(drafters="+".join(who), depth=depth, rank=rank, hits=hits, trials=trials)
        for who, depth, rank, hits, trials in tally.table(names)
    ]
    cells = [
        Cell(drafters="+".join(who), claim=claim, depth=depth, rank=rank, hits=hits, trials=trials)
        for who, claim, depth, rank, hits, trials in tally.cells(names)
    ]
    alone, together = prompts[:1], [*prompts[:1]] * TOGETHER
    beside, further = (_outside(plain, some, params) for some in (alone, together))
    drafts = _drafting(tree, together, params) if together else 0.0
    plain_seconds = [curve.seconds(batch, batch) for batch in BATCHES]
    trees = {size: optimal_paths(by_rank, size, DEPTH) for size in SIZES}
    picks = []
    for batch, slow_step in zip(BATCHES, plain_seconds, strict=True):
        gains = [trees[size][0] * slow_step / (curve.seconds(size * batch, batch) + drafting) for size in SIZES]
        best = max(range(len(SIZES)), key=lambda i: gains[i])
        expected, paths = trees[SIZES[best]]
        if gains[best] <= 1:
            picks.append(Pick(batch=batch, nodes=1, shape="none", tokens=1, speed_up=1, by_size=gains))
        else:
            picks.append(
                Pick(batch=batch, nodes=1 + len(paths), shape=_name(paths), tokens=expected, speed_up=gains[best],
                     by_size=gains)
            )  # fmt: skip
    return Calibration(
        engine=llm.engine.info.signature, rows=curve.rows, seconds=curve.points, per_sequence=curve.per_sequence,
        drafting_seconds=drafting, rates=rates, by_rank=by_rank, picks=picks,
        measured_speed_up=spent["plain"] / spent["tree"] if spent["tree"] else 1.0,
        mean_accepted_length=tokens / max(1, forwards),
        one_row=np.quantile(singles, (0.1, 0.5, 0.9)).tolist() if singles else [], waiting=waiting,
        steps=tally.drafts, cells=cells, runs=form.runs(names), prompt_rows=prompt_rows, prompt_seconds=prompt_seconds,
        drafting_per_sequence=max(0.0, (drafts - drafting) / (TOGETHER - 1)), step_seconds=beside,
        step_per_sequence=max(0.0, (further - beside) / (TOGETHER - 1)),
    )  # fmt: skip


def _outside(llm: LLM, prompts: SequenceOf[list[int]], params: SamplingParams) -> float:
    """Seconds that a step takes which decodes all of ``prompts``, beside those of the loop: choosing the requests, and
    handing out their tokens. The median of all such steps; 0 if there is none."""
    scheduler, found = llm.scheduler(), list[float]()
    seqs = [llm.sequence(ids, params) for ids in prompts]
    pieces = {scheduler.add(seq): llm.pieces(seq) for seq in seqs}
    while not scheduler.idle:
        started = time.perf_counter()
        events = scheduler.step()
        for event in events:
            pieces[event.request_id].of(event)
        took = time.perf_counter() - started
        if sum(bool(event.tokens) for event in events) == len(seqs) > 0:
            found.append(took - seqs[0].metrics.steps[-1][2])
    return float(np.median(found)) if found else 0.0


def _drafting(llm: LLM, prompts: SequenceOf[list[int]], params: SamplingParams) -> float:
    """Seconds of a step that decodes all of ``prompts`` in which drafts are made and accepted."""
    longest = max((one.metrics for one in llm.generate(prompts, params)), key=lambda one: one.target_forwards)
    return (longest.draft_seconds + longest.accept_seconds) / max(1, longest.target_forwards)


def certainty(found: Calibration) -> str:
    """How sure the seconds are, and whether the machine was busy, as one line."""
    told = "the steps of plain decoding were too few to tell how sure this is"
    if found.one_row:
        low, _, high = (1e3 * seconds for seconds in found.one_row)
        told = f"8 of 10 plain steps took {low:.1f} to {high:.1f} ms, where T(1) is {1e3 * found.seconds[0]:.1f}"
    if not found.busy:
        return told
    waiting = "" if found.waiting is None else f" (threads waited for a CPU {found.waiting:.0%} of the time)"
    return f"the machine is busy{waiting}: {told}; measure again when it is idle"


def _name(paths: list[tuple[int, ...]]) -> str:
    """As users write it."""
    if all(set(path) == {0} for path in paths):
        return f"chain:{len(paths)}"
    return "paths:" + str([list(path) for path in paths]).replace(" ", "")


def tables(found: Calibration) -> list[Table]:
    """The curve, the rates and the picks, for a terminal."""
    curve = Table(title=f"T(n): one forward, {found.engine}")
    for name in ("rows", "ms", "x one row"):
        curve.add_column(name, justify="right")
    for rows, seconds in zip(found.rows, found.seconds, strict=True):
        curve.add_row(str(rows), f"{1e3 * seconds:.1f}", f"{seconds / found.seconds[0]:.2f}")
    curve.caption = f"a further sequence costs {1e3 * found.per_sequence:.1f} ms beside its rows"
    rates = Table(title="acceptance, where the parent was right")
    for name in ("drafters", "depth", "rank", "accepted", "of"):
        rates.add_column(name, justify="left" if name == "drafters" else "right")
    for rate in found.rates:
        rates.add_row(rate.drafters, rate.depth, rate.rank, f"{rate.hits / rate.trials:.0%}", f"{rate.trials:.0f}")
    picks = Table(
        title=f"the best fixed trees (the cost shape itself: {found.measured_speed_up:.2f}x plain on these prompts, "
        f"{found.mean_accepted_length:.2f} tokens per forward)",
    )
    for name in ("batch", "rows each", "expected tokens", "expected speed-up", "shape"):
        picks.add_column(name, justify="left" if name == "shape" else "right", overflow="fold")
    for pick in found.picks:
        picks.add_row(str(pick.batch), str(pick.nodes), f"{pick.tokens:.2f}", f"{pick.speed_up:.2f}x", pick.shape)
    return [curve, rates, picks, *([_served(found.serving)] if found.serving is not None else [])]


def _served(found: Serving) -> Table:
    table = Table(title="what clients of a server got")
    for name in ("clients", "method", "tokens/s", "texts at a time", "tokens a forward", "answers", "explained"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for one in found.loads:
        table.add_row(
            str(one.clients), one.method, f"{one.tokens_a_second:.4g}", f"{one.texts:.1f}",
            f"{one.tokens_a_forward:.2f}", str(one.requests), f"{one.explained:.0%}",
        )  # fmt: skip
    table.caption = (
        f"beside forwards a step takes {1e3 * found.plain_step_seconds:.2g} ms, and each further text adds "
        f"{1e3 * found.plain_step_per_sequence:.2g} ms; with drafts {1e3 * found.step_seconds:.2g} and "
        f"{1e3 * found.step_per_sequence:.2g} ms"
    )
    return table
