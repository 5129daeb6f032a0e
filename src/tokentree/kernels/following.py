# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,operator"
"""The most probable tokens of a place after each of those of the place before, where a table of low rank says what a
token adds to the logits of its successor (DSpark, arXiv:2607.05147)."""

from __future__ import annotations

import numba
import numpy as np

from tokentree.kernels.bfloat16 import exponentials, narrow, widen
from tokentree.kernels.copying import copy_into
from tokentree.kernels.threads import float32_at, float64_at, int16_at, int64_at
from tokentree.kernels.topk import largest, sum_of


@numba.njit
def follow(step, text):
    """One place of a text, as `step_loops.FollowStep` says. The candidates are the most probable tokens after the first
    one before. After each other one they are the same, and share their sum of probabilities anew."""
    kept, vocab, rank, befores = step.kept, step.vocab, step.rank, step.befores
    said, more = np.empty(vocab, np.float32), np.empty(vocab, np.float32)
    widen(int16_at(step.logits + step.logits_stride * text, vocab), said)
    widen(int16_at(step.added + step.added_stride * text, vocab), more)
    factor = np.float32(1) / float32_at(step.divisors + 4 * text, 1)[0]
    for i in range(vocab):
        said[i] = (said[i] + more[i]) * factor
    best = largest(said, kept)
    values = said[best]
    said -= values[0]
    exponentials(said)
    mass = sum_of(said[best]) / sum_of(said)  # of all candidates

    before, mapped = int64_at(step.before + 8 * kept * text, kept), int64_at(step.map, vocab)
    weights, told = np.empty((kept, rank), np.float32), np.empty((2, rank), np.float32)
    rounded = np.empty(rank, np.int16)
    for j in range(kept):
        widen(int16_at(step.second + 2 * rank * best[j], rank), weights[j])
    widen(int16_at(step.first + 2 * rank * before[0], rank), told[0])
    cell = kept * kept * step.places * text
    shape = kept, kept
    tokens, ranks = int64_at(step.tokens + 8 * cell, shape), int64_at(step.ranks + 8 * cell, shape)
    probs, shares = float64_at(step.probs + 8 * cell, shape), np.empty(kept, np.float32)
    for b in range(befores):
        widen(int16_at(step.first + 2 * rank * before[b], rank), told[1])
        for i in range(rank):
            told[1, i] -= told[0, i]
        narrow(told[1], rounded)
        widen(rounded, told[1])
        for j in range(kept):
            shares[j] = values[j] + sum_of(told[1] * weights[j]) * factor
        shares -= shares.max()
        exponentials(shares)
        order = largest(shares, kept)
        scale = mass / sum_of(shares)
        for j in range(kept):
            tokens[b, j], probs[b, j], ranks[b, j] = mapped[best[order[j]]], shares[order[j]] * scale, order[j]
    for j in range(kept):
        before[j] = mapped[best[j]]
    copy_into(int16_at(step.told + 2 * rank * text, rank), int16_at(step.first + 2 * rank * before[0], rank))
