"""Does speculation change this model's output? Plain decoding against a tree, on the user's own prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

import torch

from tokentree.errors import OptionError
from tokentree.llm import LLM, Prompt
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

BLOCK = 8  # rows of the plain chain blocks that numeric noise is measured with


@dataclass(frozen=True)
class Verdict:
    """How one prompt came out.

    Args:
        status: ``identical`` (every token id), ``tie`` (different only from a position on where the target can't tell
            its best tokens apart) or ``WRONG``.
        tokens: how many plain decoding emitted.
        first_difference: position in the output, or None.
        gaps: for each position of the tree's output that is not plain's argmax, from the first difference on, how far
            its logit lies under the best one.
        noise: the largest difference of a logit between forwards of one row and of several, no tree involved; None
            where nothing differed and it wasn't measured.
    """

    status: Literal["identical", "tie", "WRONG"]
    tokens: int
    first_difference: int | None = None
    gaps: tuple[float, ...] = ()
    noise: float | None = None


def check(
    llm: LLM, prompts: SequenceOf[Prompt], max_tokens: int = 128, done: Callable[[], None] = lambda: None
) -> list[Verdict]:
    """Decodes each prompt greedily, plainly and with ``llm``'s drafter, and compares token ids.

    Args:
        done: called after each prompt.

    Raises:
        OptionError: if ``llm``'s rule is lossy, so that there is nothing to check.
    """
    if llm.decoder.accept.lossy:
        raise OptionError("a lossy acceptance rule changes the output by design: check one that is lossless")
    params, verdicts = SamplingParams(max_tokens=max_tokens), []
    plain = llm.plain()
    for prompt in prompts:
        expected, got = plain.generate([prompt], params)[0], llm.generate([prompt], params)[0]
        verdicts.append(_compare(llm, expected.prompt_token_ids, expected.token_ids, got.token_ids))
        done()
    return verdicts


def _compare(llm: LLM, prompt_ids: list[int], plain: list[int], tree: list[int]) -> Verdict:
    if plain == tree:
        return Verdict("identical", len(plain))
    first = next((i for i, pair in enumerate(zip(plain, tree)) if pair[0] != pair[1]), min(len(plain), len(tree)))
    noise = measure_noise(llm, prompt_ids, plain)
    gaps = []
    for position, logits in enumerate(teacher_forced(llm, prompt_ids, tree, 1)):
        if position >= first and int(logits.argmax()) != tree[position]:
            gaps.append(float(logits.max() - logits[tree[position]]))
    # lengths that differ without a differing token can't come from a tie
    fair = first < min(len(plain), len(tree)) and bool(gaps) and max(gaps) <= 2 * noise
    return Verdict("tie" if fair else "WRONG", len(plain), first, tuple(gaps), noise)


def measure_noise(llm: LLM, prompt_ids: list[int], output_ids: list[int]) -> float:
    """The largest difference of a logit between forwards of one row and chain blocks of the same tokens."""
    singles = teacher_forced(llm, prompt_ids, output_ids, 1)
    blocks = teacher_forced(llm, prompt_ids, output_ids, BLOCK)
    return max((float((a - b).abs().max()) for a, b in zip(singles, blocks, strict=True)), default=0.0)


def teacher_forced(llm: LLM, prompt_ids: list[int], output_ids: list[int], rows: int) -> Iterator[torch.Tensor]:
    """float32[vocab] before each token of ``output_ids``, from forwards of at most ``rows`` rows each."""
    seq = Sequence([*prompt_ids], SamplingParams(max_tokens=len(output_ids)), seeded_noise(0, 0), llm.engine.context)
    text = [*prompt_ids, *output_ids]
    try:
        llm.engine.prefill(seq)
        for start in range(len(prompt_ids) - 1, len(text) - 1, rows):
            block = text[start : min(start + rows, len(text) - 1)]
            out = llm.engine.verify([seq], [TokenTree.chain(block[0], block[1:])])
            llm.engine.commit([seq], [list(range(len(block)))])
            for node in range(len(block)):
                yield out.logits(0, node).float()
    finally:
        llm.engine.release([seq])
