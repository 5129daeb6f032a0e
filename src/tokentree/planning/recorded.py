"""What was measured of a model on a machine, read from what ``tokentree calibrate --json`` printed."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from tokentree.errors import OptionError
from tokentree.planning.drawn import Acceptance
from tokentree.planning.runs import Runs
from tokentree.planning.timing import Beside, Timing
from tokentree.shapes.curve import CostCurve
from tokentree.shapes.rates import CLAIMED, CLAIMS, DEPTH_NAMES, RANK_NAMES, RANKS
from tokentree.theory import check_rates

Seconds = Annotated[float, Field(ge=0, le=1e5, allow_inf_nan=False)]
Times = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
MOST_DRAFTERS, MOST_TOKENS = 32, 10**15


class Counted(BaseModel):
    """Candidates of one kind, whose parent was right: how many there were, and how many of them were right."""

    drafters: str
    claim: Annotated[int, Field(ge=0, lt=CLAIMS)] | None = None
    depth: Literal["1", "2", "3-4", "5-"]
    rank: Literal["0", "1", "2", "3-"]
    hits: Times
    trials: Times

    @model_validator(mode="after")
    def _check(self) -> Counted:
        if self.hits > self.trials:
            raise ValueError("more candidates were right than there were")
        return self


class Recorded(BaseModel):
    """A part of a `Calibration`, or what somebody wrote down.

    Only ``rows`` and ``seconds`` have to be there. What is missing takes no time, and without acceptance there is plain
    decoding alone.

    Args:
        engine: what was measured, in words.
        rows, seconds, per_sequence: T(n), see `CostCurve`.
        prompt_rows, prompt_seconds: a forward that reads so many tokens of a prompt takes so long.
        drafting_seconds, drafting_per_sequence: what drafts take in a step with one text, and what each further one
            adds.
        step_seconds, step_per_sequence: all else that a step takes beside its forward, likewise.
        step_per_token: what each token beyond one of a text adds to it.
        plain_step_seconds, plain_step_per_sequence: the same in plain decoding. None: it takes as long.
        turnaround, turnaround_per_client: seconds from the end of a text to its client's next request, with one client,
            and what each further one adds.
        kept_tokens: tokens of ended texts whose KV there is memory for. None: without end.
        shared_tokens: tokens that all prompts begin with.
        runs: drafts as they were made, text by text.
        steps: that made drafts of a text, in which these were counted.
        cells: how often candidates were right, by drafters, depth, rank and what they claimed of themselves, for whom
            has no ``runs``.
        rates: the same whatever they claimed, for whom has no ``cells``.
        by_rank: the same by rank alone, for whom has neither.
        mean_accepted_length: tokens for each forward, where they were counted.
        serving: the same of a server under load.
    """

    engine: str = ""
    rows: list[int]
    seconds: list[float]
    per_sequence: float = 0.0
    prompt_rows: list[Annotated[int, Field(ge=1)]] = []
    prompt_seconds: list[Annotated[float, Field(gt=0, le=1e5, allow_inf_nan=False)]] = []
    drafting_seconds: Seconds = 0.0
    drafting_per_sequence: Seconds = 0.0
    step_seconds: Seconds = 0.0
    step_per_sequence: Seconds = 0.0
    step_per_token: Seconds = 0.0
    plain_step_seconds: Seconds | None = None
    plain_step_per_sequence: Seconds = 0.0
    turnaround: Seconds = 0.0
    turnaround_per_client: Seconds = 0.0
    kept_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    shared_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    runs: Runs = Runs()
    steps: Times | None = None
    cells: list[Counted] = []
    rates: list[Counted] = []
    by_rank: list[float] = []
    mean_accepted_length: float | None = None
    serving: Recorded | None = None

    @classmethod
    def read(cls, text: str, called: str) -> Recorded:
        """What ``text`` says, which is called so in messages.

        Raises:
            OptionError: if it says something else, or what makes no sense.
        """
        try:
            found = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            said = f"{where}: {first['msg']}" if where else "it is no JSON object"
            raise OptionError(f"{called} isn't what 'calibrate --json' prints: {said}") from None
        for one in filter(None, (found, found.serving)):
            one.timing()
            one.acceptance()
        return found

    @property
    def served(self) -> Recorded:
        """That of a server, where it was measured."""
        return self if self.serving is None else self.serving.model_copy(update={"engine": self.engine})

    def timing(self) -> Timing:
        """What steps take. Beyond the rows of T(n), forwards cost what it took to read prompts of so many tokens.

        Raises:
            OptionError: unless the numbers make curves.
        """
        if len(self.prompt_rows) != len(self.prompt_seconds):
            raise OptionError("prompt_rows and prompt_seconds of a curve are as many as each other")
        curve = CostCurve(self.rows, self.seconds, self.per_sequence)
        further = sorted(
            (n, t) for n, t in zip(self.prompt_rows, self.prompt_seconds, strict=True) if n > self.rows[-1]
        )
        if further:
            rows, seconds = zip(*further, strict=True)
            curve = CostCurve([*self.rows, *rows], [*self.seconds, *seconds], self.per_sequence)
        return Timing(
            curve, Beside(self.drafting_seconds, self.drafting_per_sequence),
            Beside(self.step_seconds, self.step_per_sequence, self.step_per_token),
            None if self.plain_step_seconds is None else Beside(self.plain_step_seconds, self.plain_step_per_sequence),
        )  # fmt: skip

    def acceptance(self) -> Acceptance | Runs | None:
        """Drafts, or how often their candidates are right; None where nothing was recorded of any.

        Raises:
            OptionError: if rates are none.
        """
        if self.runs.texts:
            return self.runs
        for counted in (self.cells, self.rates):
            if any(one.trials for one in counted):
                return _of_counts(counted, self.steps)
        if any(self.by_rank):
            check_rates(self.by_rank)
            return _of_ranks(self.by_rank)
        return None


def _of_ranks(by_rank: list[float]) -> Acceptance:
    """Below every node there is a candidate of each rank; the last rate is one for all ranks from there on."""
    depths, ranks = len(DEPTH_NAMES), RANKS
    rates = [*by_rank, *[0.0] * ranks][:ranks]
    right = np.tile(np.array(rates)[None, :, None], (depths, 1, 1))
    offered = np.tile(np.array(rates) > 0, (depths, 1)).astype(np.float64)
    ones = np.ones_like(right)
    return Acceptance.of(["recorded"], np.ones(1, np.int64), offered, ones, right, np.full(1, math.nan))


def _of_counts(counted: list[Counted], steps: float | None) -> Acceptance:
    names = list(dict.fromkeys(name for one in counted for name in one.drafters.split("+")))
    if len(names) > MOST_DRAFTERS:
        raise OptionError(f"acceptance is of at most {MOST_DRAFTERS} drafters")
    kinds = list(dict.fromkeys((one.drafters, one.claim) for one in counted))
    hits, trials = np.zeros((2, len(DEPTH_NAMES), RANKS, len(kinds)))
    for one in counted:
        place = DEPTH_NAMES.index(one.depth), RANK_NAMES.index(one.rank), kinds.index((one.drafters, one.claim))
        hits[place] += one.hits
        trials[place] += one.trials
    tried = trials.sum(2)
    parents = _parents(hits.sum((1, 2)), float(tried[0, 0]) if steps is None else steps)
    before = np.column_stack([parents, tried[:, :-1]])  # how often a candidate of a rank could have been there
    offered = np.divide(tried, before, out=np.zeros_like(tried), where=before > 0)
    offered[:, :-1] = np.minimum(offered[:, :-1], 1.0)
    shares = np.divide(trials.cumsum(2), tried[..., None], out=np.ones_like(trials), where=tried[..., None] > 0)
    right = np.divide(hits, trials, out=np.zeros_like(hits), where=trials > 0)
    sources = [sum(1 << names.index(name) for name in drafters.split("+")) for drafters, _ in kinds]
    claims = np.array([math.nan if claim is None else CLAIMED[claim] for _, claim in kinds])
    return Acceptance.of(names, np.array(sources, np.int64), offered, shares, right, claims)


def _parents(hits: np.ndarray, steps: float) -> np.ndarray:
    """float64[depths]: right nodes that candidates of each depth could have been below, as ``hits`` by depth tell.

    Depths 3 and 4 are counted together, and all from 5 on. Of depths 3 and 4 it is taken that as many of the right
    nodes of each go on.
    """
    first, second, third, last = hits.tolist()
    on = (math.sqrt(1 + 4 * third / second) - 1) / 2 if second else 0.0
    return np.array([steps, first, second * (1 + on), second * on * on + last])
