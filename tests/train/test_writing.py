"""What a model writes on its own, many texts at once: what it writes one by one."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.tiny_models import full_logits, some_tokens, tiny
from tokentree.train.writing import Writer, _draw

PROMPTS = [some_tokens(1), some_tokens(9, 1), some_tokens(4, 2)]


def greedily(family: str, prompt: list[int], count: int, end: int) -> list[int]:
    ids = list(_greedily(family, tuple(prompt), count))
    return ids[: ids.index(end) + 1] if end in ids else ids


@functools.cache
def _greedily(family: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(full_logits(tiny(family), ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt2"])
def test_at_temperature_0_each_text_goes_on_as_it_would_alone(family: str) -> None:
    writer = Writer(tiny(family), 5, 60)
    for prompts in (PROMPTS, PROMPTS[::-1], [[3]]):  # storage is used again
        alone = [greedily(family, prompt, 20, -1) for prompt in prompts]
        end = alone[0][7]
        expected = [greedily(family, prompt, 20, end) for prompt in prompts]
        assert writer.write(prompts, 20, [0.0] * len(prompts), [end], seed=1) == expected


def test_texts_end_with_the_capacity() -> None:
    writer = Writer(tiny("llama"), 2, 128)
    (text,) = writer.write([some_tokens(100)], 60, [0.0], [], seed=0)
    assert text == greedily("llama", some_tokens(100), 29, -1)


def test_temperatures_are_those_of_each_text_and_draws_follow_from_the_seed() -> None:
    writer, prompts = Writer(tiny("llama"), 4, 60), [some_tokens(5)] * 4
    first = writer.write(prompts, 12, [0.0, 1.0, 1.0, 0.0], [], seed=3)
    assert first[0] == first[3] == greedily("llama", prompts[0], 12, -1)
    assert first[1] != first[2]
    assert writer.write(prompts, 12, [0.0, 1.0, 1.0, 0.0], [], seed=3) == first
    assert writer.write(prompts, 12, [0.0, 1.0, 1.0, 0.0], [], seed=4) != first


@pytest.mark.parametrize("top_k", [None, 3])
def test_draws_have_the_distribution(top_k: int | None) -> None:
    logits = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, -3.0])
    rows, generator = 40_000, torch.Generator().manual_seed(0)
    drawn = _draw(logits.expand(rows, 6), torch.full((rows, 1), 0.7), generator, top_k)
    kept = logits if top_k is None else logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    expected = rows * (kept / 0.7).softmax(-1)
    counts, some = torch.bincount(drawn, minlength=6), expected > 0
    assert not counts[~some].any()
    assert float(((counts - expected)[some].square() / expected[some]).sum()) < 20.5  # 0.1 per cent of chi-square(5)
