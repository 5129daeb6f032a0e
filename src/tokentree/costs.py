"""Measuring what a forward of an engine costs, once per machine, and remembering it."""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from tokentree.engines.kv_engine import KVEngine
from tokentree.errors import OptionError
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Sequence
from tokentree.shapes.curve import CostCurve
from tokentree.storage import cache_folder
from tokentree.tree import TokenTree

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 48, 64)
PREFIX = 256  # tokens before the tree
ROUNDS = 3
logger = logging.getLogger(__name__)


class Measured(BaseModel):
    """One engine's curve in the cache file."""

    rows: list[int]
    seconds: list[float]
    per_sequence: float


class CostFile(BaseModel):
    """The cache file: curves by `KVEngine.signature`."""

    curves: dict[str, Measured] = {}

    def curve(self, signature: str) -> CostCurve | None:
        """The curve of that engine, if the file has one that makes sense."""
        kept = self.curves.get(signature)
        try:
            return None if kept is None else CostCurve(kept.rows, kept.seconds, kept.per_sequence)
        except OptionError:
            return None


def cost_curve(engine: KVEngine, again: bool = False) -> CostCurve:
    """T(n) of ``engine`` on this machine: from the cache file, or measured (some 60 forwards) and put there.

    Args:
        again: measure even if the file has it.
    """
    file = cache_folder() / "costs.json"
    known = _read(file)
    kept = None if again else known.curve(engine.signature)
    if kept is None:
        logger.info("measuring what a forward costs here (once)")
        curve = measure(engine)
        found = Measured(rows=curve.rows, seconds=curve.points, per_sequence=curve.per_sequence)
        known = _read(file)  # another process may have added its own meanwhile
        known.curves[engine.signature] = found
        _write(file, known)
        return curve
    return kept


def measure(engine: KVEngine) -> CostCurve:
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


def _read(file: Path) -> CostFile:
    try:
        return CostFile.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):  # a cache that can't be read is measured anew
        return CostFile()


def _write(file: Path, content: CostFile) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content.model_dump_json(indent=1), encoding="utf-8")
        part.replace(file)
    except OSError:  # a read-only home: it is measured again next time
        return
