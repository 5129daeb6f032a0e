"""Measuring what a forward of an engine costs, once per machine, and remembering it."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from tokentree.cache import cache_folder, damaged, locked, ours, private, replacing
from tokentree.engines.base import Engine
from tokentree.errors import OptionError
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Sequence
from tokentree.shapes.curve import CostCurve
from tokentree.tree import TokenTree

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 48, 64)
PREFIX = 256  # tokens before the tree
ROUNDS = 3
PROMPTS = (64, 128, 256, 512, 1024)  # tokens of a prompt that a forward reads
MOST_ROWS, MOST_SECONDS = 1 << 16, 1e5  # that make sense in a file
logger = logging.getLogger(__name__)


class Measured(BaseModel):
    """One engine's curve in the cache file."""

    rows: Annotated[list[Annotated[int, Field(ge=1, le=MOST_ROWS)]], Field(min_length=2)]
    seconds: Annotated[list[Annotated[float, Field(gt=0, le=MOST_SECONDS)]], Field(min_length=2)]
    per_sequence: Annotated[float, Field(ge=0, le=MOST_SECONDS)]


class CostFile(BaseModel):
    """The cache file: curves by `EngineInfo.signature`."""

    curves: dict[str, Measured] = {}

    def curve(self, signature: str) -> CostCurve | None:
        """The curve of that engine, if the file has one that makes sense."""
        kept = self.curves.get(signature)
        try:
            return None if kept is None else CostCurve(kept.rows, kept.seconds, kept.per_sequence)
        except OptionError:
            return None


def cost_curve(engine: Engine, again: bool = False) -> CostCurve:
    """T(n) of ``engine`` on this machine: from the cache file, or measured (some 60 forwards) and put there.

    Args:
        again: measure even if the file has it.
    """
    file, signature = cache_folder() / "costs.json", engine.info.signature
    if not signature:
        return measure(engine)
    known = _read(file)
    kept = None if again else known.curve(signature)
    if kept is None:
        logger.info("measuring what a forward costs here (once)")
        curve = measure(engine)
        found = Measured(rows=curve.rows, seconds=curve.points, per_sequence=curve.per_sequence)
        _add(file, signature, found)
        return curve
    return kept


def measure(engine: Engine) -> CostCurve:
    """Times forwards over chains of `ROWS` nodes behind a prefix, and over four sequences at once, in rounds, so that a
    drift meets all of them, and keeps the fastest of each. A tree costs what a chain of as many nodes does."""
    most = max(4, engine.context // 2)
    rows = [n for n in ROWS if n <= most] if most < ROWS[-1] else list(ROWS)
    prefix = max(1, min(PREFIX, engine.context - max(rows) - 1))
    generator = np.random.default_rng(0)
    ids = generator.integers(0, engine.vocab_size, prefix + 1).tolist()
    seqs = [
        Sequence(ids, SamplingParams(max_tokens=1), seeded_noise(0, i), engine.context + prefix + 2) for i in range(4)
    ]

    def time_of(count: int, nodes: int) -> float:
        started = time.perf_counter()
        engine.verify(seqs[:count], [TokenTree.chain(0, [0] * (nodes - 1))] * count)
        took = time.perf_counter() - started
        engine.commit(seqs[:count], [[]] * count)
        return took

    with engine.lock:  # nothing else is to compute meanwhile
        try:
            for seq in seqs:
                engine.prefill(seq)
            alone, together = dict.fromkeys(rows, math.inf), math.inf
            for _ in range(ROUNDS):
                for nodes in rows:
                    alone[nodes] = min(alone[nodes], time_of(1, nodes))
                together = min(together, time_of(4, 4))
        finally:
            engine.release(seqs)
    curve = CostCurve(rows, [alone[nodes] for nodes in rows])
    return CostCurve(rows, curve.points, max(0.0, (together - curve.seconds(16)) / 3))


def prompt_costs(engine: Engine) -> tuple[list[int], list[float]]:
    """Times forwards that read so many tokens of a new prompt, and nothing else; the fastest of some rounds. Without
    those for which the engine has no room."""
    counts = [count for count in PROMPTS if count < engine.context]
    generator = np.random.default_rng()  # other prompts each time: the engine may have KV of earlier ones
    fastest = dict.fromkeys(counts, math.inf)
    with engine.lock:
        for _ in range(ROUNDS):
            for count in counts:
                ids = generator.integers(0, engine.vocab_size, count + 1).tolist()
                seq = Sequence(ids, SamplingParams(max_tokens=1), seeded_noise(0, 0), count + 2)
                try:
                    left = count - engine.begin(seq)
                    started = time.perf_counter()
                    engine.verify([], [], reading=[(seq, left)])
                    fastest[count] = min(fastest[count], time.perf_counter() - started)
                finally:
                    engine.release([seq])
    return counts, [fastest[count] for count in counts]


def _read(file: Path) -> CostFile:
    """What the file has; nothing, where it can't be read, or isn't this user's."""
    try:
        return CostFile.model_validate_json(file.read_text(encoding="utf-8")) if ours(file) else CostFile()
    except (OSError, UnicodeDecodeError, ValidationError):
        if file.is_file():
            damaged(file)
        return CostFile()


def _add(file: Path, signature: str, found: Measured) -> None:
    """Puts a curve into the file, whatever other processes put there meanwhile."""
    try:
        private(file.parent)
        with locked(file):
            known = _read(file)
            known.curves[signature] = found
            with replacing(file) as part:
                part.write_text(known.model_dump_json(indent=1), encoding="utf-8")
    except OSError:  # it is measured again next time; that nothing can be written was told of larger things
        return
