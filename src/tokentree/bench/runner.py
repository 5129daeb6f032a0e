"""The one way things are measured here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path

from tokentree.bench.methods import Method
from tokentree.bench.results import Run, Sample
from tokentree.llm import LLM
from tokentree.prompts import Conversation
from tokentree.sampling import SamplingParams


def run_bench(
    llm: LLM,
    methods: SequenceOf[Method],
    prompts: SequenceOf[Conversation],
    params: SamplingParams,
    run: Run,
    folder: Path,
    progress: Callable[[Sample], None] = lambda _: None,
) -> Run:
    """Decodes every turn of every prompt with every method and saves each sample as it comes.

    Methods take turns on each prompt, in an order that rotates, so that a machine that drifts drifts under all of
    them. The first method answers for all: its text is the history of a later turn. One uncounted round on the first
    prompt warms up. A method that fails on a prompt leaves a sample with the error in it, and goes on with the next.

    Returns:
        ``run``, with the samples in it.
    """
    ids = _prompt_ids(llm, prompts[0], [])
    for method in methods:
        _sample(method, prompts[0], 0, 0, ids, params.model_copy(update={"max_tokens": min(16, params.max_tokens)}))
    for number, prompt in enumerate(prompts):
        history: list[dict[str, str]] = []
        for turn in range(len(prompt.turns)):
            ids = _prompt_ids(llm, prompt, history)
            if len(ids) + params.max_tokens >= llm.engine.context:
                break  # later turns are longer still
            order = [(number + turn + place) % len(methods) for place in range(len(methods))]
            samples = {
                which: _sample(methods[which], prompt, turn, place, ids, params) for place, which in enumerate(order)
            }
            first = samples[0]
            for which in range(len(methods)):
                sample = samples[which]
                if sample.error is None and first.error is None:
                    sample.same_as_plain = sample.token_ids == first.token_ids
                sample.text = _text(llm, sample.token_ids)
                run.samples.append(sample)
                progress(sample)
            run.save(folder)
            history += [
                {"role": "user", "content": prompt.turns[turn]},
                {"role": "assistant", "content": first.text},
            ]
    return run


def _prompt_ids(llm: LLM, prompt: Conversation, history: list[dict[str, str]]) -> list[int]:
    turn = prompt.turns[len(history) // 2]
    if prompt.chat and llm.tokenizer is not None and llm.tokenizer.chat_template:
        return llm.chat_prompt([*history, {"role": "user", "content": turn}])
    text = "\n\n".join([*(message["content"] for message in history), turn])
    return llm.sequence(text, SamplingParams()).prompt_ids


def _text(llm: LLM, ids: list[int]) -> str:
    return str(llm.tokenizer.decode(ids, skip_special_tokens=True)) if llm.tokenizer is not None else ""


def _sample(
    method: Method, prompt: Conversation, turn: int, order: int, ids: list[int], params: SamplingParams
) -> Sample:
    sample = Sample(prompt=prompt.name, category=prompt.category, turn=turn, method=method.name, order=order)
    try:
        out = method.run(ids, params)
    except Exception as error:  # noqa: BLE001  a failed method is a result, and the others go on
        sample.error = f"{type(error).__name__}: {error}"
        return sample
    sample.prompt_tokens, sample.token_ids = len(ids), out.token_ids
    sample.prefill_seconds, sample.decode_seconds = out.prefill_seconds, out.decode_seconds
    sample.decoded_tokens, sample.metrics = out.decoded_tokens, out.metrics
    return sample
