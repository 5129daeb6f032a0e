"""The one way things are measured here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from pathlib import Path

from tokentree.bench.methods import TreeMethod
from tokentree.bench.peers import Method, Output
from tokentree.bench.results import Run, Sample, peak_memory
from tokentree.llm import LLM
from tokentree.prompts import Conversation
from tokentree.sampling import SamplingParams

WARM_UP = Conversation("warm-up", "", ("Which way does the wind blow?",), chat=False)  # no one's prompt


def run_bench(
    llm: LLM,
    methods: SequenceOf[Method],
    prompts: SequenceOf[Conversation],
    params: SamplingParams,
    run: Run,
    folder: Path,
    progress: Callable[[Sample], None] = lambda _: None,
    warm: SequenceOf[Conversation] = (),
) -> Run:
    """Decodes every turn of every prompt with every method and saves each sample as it comes.

    Methods take turns on each prompt, in an order that rotates, so that a machine that drifts drifts under all of
    them. The first method answers for all: its text is the history of a later turn. One uncounted round on a text of
    its own warms the machine up. Drafters start without memories, but for ``warm``: prompts whose first turns they
    decode before, uncounted. Turns that ``run`` has already are not measured again. A method that fails on a prompt
    leaves a sample with the error in it, and goes on.

    Returns:
        ``run``, with the samples in it.
    """
    known = {sample.place: sample for sample in run.samples if sample.method == methods[0].name}
    ids = _prompt_ids(llm, WARM_UP, [])
    for method in methods:
        _sample(method, WARM_UP, 0, 0, ids, params.model_copy(update={"max_tokens": min(16, params.max_tokens)}))
    for other in warm:
        ids = _prompt_ids(llm, other, [])
        for method in methods:
            if method.learns:
                _sample(method, other, 0, 0, ids, params)
    for number, prompt in enumerate(prompts):
        history: list[dict[str, str]] = []
        for turn in range(len(prompt.turns)):
            ids = _prompt_ids(llm, prompt, history)
            if len(ids) + params.max_tokens >= llm.engine.context:
                break  # later turns are longer still
            first = known.get((prompt.category, prompt.name, turn))
            if first is None:
                order = [(number + turn + place) % len(methods) for place in range(len(methods))]
                samples = {
                    which: _sample(methods[which], prompt, turn, place, ids, params)
                    for place, which in enumerate(order)
                }
                first = samples[0]
                _keep(llm, run, folder, [samples[which] for which in range(len(methods))], progress)
            history += [
                {"role": "user", "content": prompt.turns[turn]},
                {"role": "assistant", "content": first.text},
            ]
    return run


def run_batches(
    llm: LLM,
    methods: SequenceOf[TreeMethod],
    prompts: SequenceOf[Conversation],
    params: SamplingParams,
    run: Run,
    folder: Path,
    size: int,
    progress: Callable[[Sample], None] = lambda _: None,
) -> Run:
    """As `run_bench`, but ``size`` first turns are decoded together, whatever their lengths; a sample is one batch,
    its ids those of all its prompts behind one another. Prompts that fill no batch are left out."""
    short = params.model_copy(update={"max_tokens": min(16, params.max_tokens)})
    groups = [prompts[i : i + size] for i in range(0, len(prompts) - size + 1, size)]
    for number, group in enumerate([[WARM_UP] * size, *groups]):
        texts = [_prompt_ids(llm, prompt, []) for prompt in group]
        order = [(number + place) % len(methods) for place in range(len(methods))]
        samples: dict[int, Sample] = {}
        for place, which in enumerate(order):
            sample = Sample(
                prompt="+".join(prompt.name for prompt in group), category=f"batch of {size}", turn=0,
                method=methods[which].name, order=place, prompt_tokens=sum(map(len, texts)),
            )  # fmt: skip
            samples[which] = sample
            asked = partial(methods[which].run_together, texts, params if number else short)
            _fill(sample, asked)
        if number:  # the first round warms up
            _keep(llm, run, folder, [samples[which] for which in range(len(methods))], progress)
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
    sample = Sample(
        prompt=prompt.name, category=prompt.category, turn=turn, method=method.name, order=order, prompt_tokens=len(ids)
    )
    _fill(sample, lambda: method.run(ids, params))
    return sample


def _fill(sample: Sample, measure: Callable[[], Output]) -> None:
    """Puts what was measured into ``sample``, or the error that it ended with."""
    try:
        out = measure()
    except Exception as error:  # noqa: BLE001  a failed method is a result, and the others go on
        sample.error = f"{type(error).__name__}: {error}"
        return
    sample.token_ids, sample.metrics = out.token_ids, out.metrics
    sample.prefill_seconds, sample.decode_seconds = out.prefill_seconds, out.decode_seconds
    sample.decoded_tokens = out.decoded_tokens


def _keep(llm: LLM, run: Run, folder: Path, samples: list[Sample], progress: Callable[[Sample], None]) -> None:
    """Compares the samples of one turn with the first method's, and saves them."""
    first = samples[0]
    for sample in samples:
        if sample.error is None and first.error is None:
            sample.same_as_plain = sample.token_ids == first.token_ids
        sample.text = _text(llm, sample.token_ids)
        run.samples.append(sample)
        progress(sample)
    run.memory_mb = max(run.memory_mb, peak_memory())
    run.save(folder)
