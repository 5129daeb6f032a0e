"""Whether what is sampled with a drafter has the target's distribution."""

from __future__ import annotations

import math
from collections import Counter

from transformers import PreTrainedModel

from tests.conftest import decode, make_sequence
from tests.tiny_models import CONTEXT, full_logits, some_tokens
from tokentree.drafters.base import Drafter
from tokentree.engines.kv_engine import KVEngine

SAMPLES = 1000


def assert_has_the_target_s_distribution(
    model: PreTrainedModel, engine: KVEngine, drafter: Drafter, form: str, accept: str, least_taken: float = 0.1
) -> None:
    """Chi-square of the first two tokens together, merged into the most probable ones and a rest. With a vocabulary of
    six, those of drafter and target are often the same ones, with other probabilities, so that a wrong rule shows.

    Args:
        least_taken: how many candidates are accepted at least, of each sample.
    """
    prompt, counts, taken = [token % engine.vocab_size for token in some_tokens(6)], Counter[tuple[int, ...]](), 0
    for start in range(0, SAMPLES, 100):
        seqs = [
            make_sequence(prompt, sample=sample, seed=1, temperature=1.0, top_k=4, max_tokens=2, context=CONTEXT)
            for sample in range(start, start + 100)
        ]
        counts.update(map(tuple, decode(engine, seqs, drafter, form, accept, max_batch=100)))
        taken += sum(seq.metrics.accepted_tokens for seq in seqs)
    assert least_taken * SAMPLES < taken < SAMPLES
    expected = dict[tuple[int, ...], float]()
    first = full_logits(model, prompt)[-1].topk(4)
    for token, prob in zip(first.indices.tolist(), first.values.softmax(-1).tolist(), strict=True):
        second = full_logits(model, [*prompt, token])[-1].topk(4)
        for other, part in zip(second.indices.tolist(), second.values.softmax(-1).tolist(), strict=True):
            expected[token, other] = SAMPLES * prob * part
    assert set(counts) <= set(expected)
    cells = [(counts[key], mean) for key, mean in expected.items() if mean >= 5]
    rest = SAMPLES - sum(mean for _, mean in cells)
    if rest >= 1:
        cells.append((SAMPLES - sum(count for count, _ in cells), rest))
    freedom = len(cells) - 1
    assert freedom > 8
    chi_square = sum((count - mean) ** 2 / mean for count, mean in cells)
    # its 99.99% point, by Wilson and Hilferty
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
