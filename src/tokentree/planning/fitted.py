"""What parts of a step take in a server, worked out from the clocks of its steps."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import pairwise

import numpy as np

from tokentree.calibrate import Calibration, Cell, Loaded, Serving
from tokentree.errors import OptionError
from tokentree.llm import LLM
from tokentree.planning.counting import Counting
from tokentree.planning.recorded import Recorded
from tokentree.planning.served import Load, Part, Step, served
from tokentree.planning.timing import Timing
from tokentree.sampling import SamplingParams
from tokentree.serve.settings import Settings
from tokentree.shapes.curve import CostCurve

TOO_FEW = "the server made too few steps to tell what they take: measure for longer (--serving-seconds)"
MANY = 1024  # rows, whose KV takes about so many times as much as that of one
WARM = 0.2  # of the time of each load: so long all clients ask before anything is measured
Row = tuple[list[float], float]  # what a part of a step depends on, and the seconds that it took


def clients_of(max_batch: int) -> list[int]:
    """The numbers of clients that are tried: one, as many as the server decodes together, and one between them."""
    return sorted({1, round(max_batch**0.5), max_batch})


def serving(
    llm: LLM, known: Calibration, bodies: SequenceOf[str], settings: Settings, seconds: float, kept_bytes: int,
    tell: Callable[[], None] = lambda: None,
) -> Serving:  # fmt: skip
    """What a server does with this model, plainly and with drafts, while clients ask it for chats.

    Args:
        known: what was measured of the model alone.
        bodies: the chats, in JSON.
        settings: of the server.
        seconds: for which each number of clients asks.
        kept_bytes: memory for the KV of finished texts, which ``llm`` was loaded with.
        tell: called behind each of them, and once before the first one of each method.

    Raises:
        OptionError: if the server refuses a request, or made too few steps.
    """
    counts = clients_of(settings.max_batch)
    loads = [Load(settings.max_batch, bodies, WARM * seconds)]
    for place, count in enumerate(counts):
        first = place * len(bodies) // len(counts)
        loads.append(Load(count, [*bodies[first:], *bodies[:first]], seconds))
    form = Counting(CostCurve(known.rows, known.seconds, known.per_sequence))
    ways = [llm.plain(), llm.using(shape=form)]
    parts = [[served(one, settings, load, tell) for one in ways] for load in loads]  # in turns, as machines change
    plain, tree = ([pair[way] for pair in parts[1:]] for way in range(len(ways)))
    tally, names = form.tally(), ways[1].decoder.drafter.names
    cells = [
        Cell(drafters="+".join(who), claim=claim, depth=depth, rank=rank, hits=hits, trials=trials)
        for who, claim, depth, rank, hits, trials in tally.cells(names)
    ]
    of_token = llm.engine.nbytes(llm.sequence([0], SamplingParams(max_tokens=1)), MANY) / MANY
    kept = None if not of_token else int(kept_bytes / of_token)
    seen = {"steps": tally.drafts, "cells": cells, "runs": form.runs(names), "kept_tokens": kept}
    return fit(known, plain, tree).model_copy(update=seen)


def fit(known: Calibration, plain: list[Part], tree: list[Part]) -> Serving:
    """What parts of a step took in a server.

    - A forward: as in ``known``, by a factor, with something for each forward and for each text.
    - Drafts, and all else of a step: something for each step, and for each further text. The latter also something for
      each token beyond one of a text. It ends where the next step begins, so waiting for other threads is in it.
    - A turn: from the step that ends a text to its client's next request.

    Raises:
        OptionError: if there are too few steps.
    """
    if not all(part.steps for part in (*plain, *tree)):
        raise OptionError(TOO_FEW)
    alone = Recorded.model_validate(known.model_dump(exclude={"serving"})).timing().curve

    def forward(step: Step) -> Row:
        texts = len(step.decoded) + len(step.read)
        return [alone.seconds(step.rows, texts), 1.0, texts - 1.0], step.forward

    factor, each, further = fitted([[forward(step) for step in part.steps] for part in (*plain, *tree)])
    drafts = [[_drafting(step) for step in part.steps if step.drafting is not None] for part in tree]
    found = Serving(
        rows=known.rows, seconds=[factor * one + each for one in known.seconds],
        per_sequence=factor * known.per_sequence + further,
        prompt_rows=known.prompt_rows, prompt_seconds=[factor * one + each for one in known.prompt_seconds],
    )  # fmt: skip
    found.shared_tokens = min(
        (count for part in (*plain, *tree) for one in part.steps for count in one.reused), default=0
    )
    if any(drafts):
        found.drafting_seconds, found.drafting_per_sequence = fitted(drafts)
    besides = [[[_beside(*pair) for pair in going_on(part)] for part in parts] for parts in (plain, tree)]
    singles = [[(on[:2], seconds) for on, seconds in part] for part in besides[0]]
    found.plain_step_seconds, found.plain_step_per_sequence = fitted(singles)
    found.step_seconds, found.step_per_sequence, found.step_per_token = fitted(besides[1])
    timing = Recorded.model_validate(found.model_dump()).timing()
    turns = [
        ([1.0, part.clients - 1.0], max(0.0, turn - one.step.seconds(*_sizes(part))))
        for one, parts in ((timing.plainly(), plain), (timing, tree))
        for part in parts
        if (turn := turnaround(part)) is not None
    ]
    if turns:
        found.turnaround, found.turnaround_per_client = fitted([turns])
    found.loads = [
        _loaded(method, part, one)
        for method, one, parts in (("plain", timing.plainly(), plain), ("speculation", timing, tree))
        for part in parts
    ]
    return found


def _drafting(step: Step) -> Row:
    return [1.0, len(step.decoded) - 1.0], step.drafting or 0.0


def _beside(step: Step, following: Step) -> Row:
    texts = len(step.decoded)
    took = following.began - step.began - step.forward - (step.drafting or 0.0)
    return [1.0, texts - 1.0, float(step.tokens - texts)], took


def going_on(part: Part) -> list[tuple[Step, Step]]:
    """The steps that decode texts, each with the next one. Left out are those behind which no text went on, where the
    server may have waited for clients."""
    return [
        (step, following)
        for step, following in pairwise(part.steps)
        if step.decoded and not following.decoded.keys().isdisjoint(step.decoded.keys() - step.over)
    ]


def _sizes(part: Part) -> tuple[float, float]:
    """Texts that a step decodes, and tokens that it gives, on average."""
    sizes = [(len(step.decoded), step.tokens) for step in part.steps if step.decoded]
    texts, tokens = np.mean(sizes, axis=0).tolist() if sizes else (0.0, 0.0)
    return texts, tokens


def turnaround(part: Part) -> float | None:
    """Seconds from the step that ended a text to its client's next request, on average: a client either waits for an
    answer, or is turning. None where no client asked twice."""
    if not part.steps:
        return None
    begin, end = part.steps[0].began, part.steps[-1].ended
    came, left = dict[int, float](), dict[int, float]()
    for step in part.steps:
        for one, when in {**step.decoded, **step.read}.items():
            came[one], left[one] = max(when, begin), step.ended
    turns, waited = len(came) - part.clients, sum(left[one] - came[one] for one in came)
    return max(0.0, part.clients * (end - begin) - waited) / turns if turns > 0 else None


def _loaded(method: str, part: Part, timing: Timing) -> Loaded:
    """What so many clients got of a server, and how much of its steps' time ``timing`` comes to."""
    took, forwards = part.steps[-1].ended - part.steps[0].began, [step for step in part.steps if step.decoded]
    tokens, texts = sum(step.tokens for step in forwards), sum(len(step.decoded) for step in forwards)
    believed = actual = 0.0
    for step, following in going_on(part):
        drafting = 0.0 if step.drafting is None else timing.drafting.seconds(len(step.decoded))
        forward = timing.forward(step.rows, len(step.decoded) + len(step.read))
        believed += drafting + forward + timing.step.seconds(len(step.decoded), step.tokens)
        actual += following.began - step.began
    return Loaded(
        clients=part.clients, method=method, tokens_a_second=tokens / took, texts=texts / max(1, len(forwards)),
        tokens_a_forward=tokens / max(1, texts), requests=sum(len(step.over) for step in part.steps),
        explained=believed / actual if actual else 1.0,
    )  # fmt: skip


def fitted(parts: SequenceOf[SequenceOf[Row]]) -> list[float]:
    """What each unit of what the rows depend on takes, at least 0: by least squares of the errors in
    relation to a part's mean, each part counting as much as another.

    Raises:
        OptionError: if there are no rows.
    """
    given = [part for part in parts if part]
    if not given:
        raise OptionError(TOO_FEW)
    weights = list[float]()
    for part in given:
        mean = sum(seconds for _, seconds in part) / len(part)
        weights += [1.0 / (mean * len(part) ** 0.5)] * len(part) if mean > 0 else [0.0] * len(part)
    weight = np.array(weights)
    on = np.array([on for part in given for on, _ in part]) * weight[:, None]
    seconds = np.array([seconds for part in given for _, seconds in part]) * weight
    found, kept = np.zeros(on.shape[1]), list(range(on.shape[1]))
    while kept:
        best = np.linalg.lstsq(on[:, kept], seconds, rcond=None)[0]
        if best.min() >= 0:
            found[kept] = best
            break
        kept.pop(int(best.argmin()))
    return [float(one) for one in found]
