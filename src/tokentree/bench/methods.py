"""What can be measured: this library's own methods, and transformers' beside them."""

from __future__ import annotations

import copy
import re
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tokentree.errors import OptionError
from tokentree.llm import LLM
from tokentree.sampling import SamplingParams

FORMS = (
    "plain, default, DRAFTER:SHAPE such as merged:cost, draft_model:chain:3 or ngram+draft_model:2x2x1, transformers, "
    "transformers:assisted:N or transformers:lookup:N"
)


@dataclass(frozen=True)
class Output:
    """What a method made of one prompt; ``decoded_tokens`` of the tokens came within ``decode_seconds``. The metrics
    hold ``steps``: per forward the rows (0: unknown), the tokens and the seconds."""

    token_ids: list[int]
    prefill_seconds: float
    decode_seconds: float
    decoded_tokens: int
    metrics: dict[str, Any]


class Method(Protocol):
    """A way to decode a prompt. One that ``learns`` may be faster on a prompt for those it met before."""

    name: str
    learns: bool

    def run(self, prompt_ids: list[int], params: SamplingParams) -> Output: ...


class TreeMethod:
    """A drafter and a shape of this library. Each has its own drafter: what one learns, no other sees."""

    def __init__(self, name: str, llm: LLM) -> None:
        self.name, self.learns = name, name != "plain"
        self._llm = llm

    def run(self, prompt_ids: list[int], params: SamplingParams) -> Output:
        result = self._llm.generate([prompt_ids], params)[0]
        metrics = result.metrics
        return Output(
            result.token_ids, metrics.prefill_seconds, metrics.decode_seconds, metrics.new_tokens, metrics.to_dict()
        )

    def run_together(self, prompts: list[list[int]], params: SamplingParams) -> Output:
        """All prompts as one batch: the ids behind one another, the wall time of all steps, counts added up."""
        llm = copy.copy(self._llm)
        llm.max_batch = len(prompts)
        started = time.perf_counter()
        results = llm.generate(prompts, params)
        wall = time.perf_counter() - started
        counted = [result.metrics.to_dict() for result in results]
        prefill = sum(m["prefill_seconds"] for m in counted)
        names = ("new_tokens", "target_forwards", "drafted_tokens", "accepted_tokens", "refused_steps")
        metrics = {name: sum(m[name] for m in counted) for name in names}
        ids = [token for result in results for token in result.token_ids]
        return Output(ids, prefill, wall - prefill, metrics["new_tokens"], metrics)


class TransformersMethod:
    """transformers' own `generate`: plain, with an assistant model, or with prompt lookup."""

    learns = False

    def __init__(self, name: str, model: PreTrainedModel, eos_ids: list[int], options: dict[str, Any]) -> None:
        self.name = name
        self._model, self._eos_ids, self._options = model, eos_ids, options

    def run(self, prompt_ids: list[int], params: SamplingParams) -> Output:
        if not params.is_greedy:
            raise OptionError("transformers' methods are measured greedily only")
        clock = _Clock()
        out = self._model.generate(  # type: ignore[operator]
            torch.tensor([prompt_ids], device=self._model.device),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long, device=self._model.device),
            max_new_tokens=params.max_tokens,
            do_sample=False,
            eos_token_id=self._eos_ids,
            pad_token_id=self._eos_ids[0],
            streamer=clock,
            **self._options,
        )
        finished = time.perf_counter()
        return Output(
            out[0, len(prompt_ids) :].tolist(),
            clock.first_at - clock.started,
            finished - clock.first_at,
            clock.tokens - clock.first,
            {"steps": clock.steps, "new_tokens": clock.tokens - clock.first, "target_forwards": len(clock.steps)},
        )


class _Clock(BaseStreamer):
    """Notes when tokens came; the first ones end the prefill."""

    def __init__(self) -> None:
        self.started, self.first_at, self._last = time.perf_counter(), 0.0, 0.0
        self.tokens, self.first, self._saw_prompt, self._last = 0, 0, False, 0.0
        self.steps: list[tuple[int, int, float]] = []

    def put(self, value: torch.Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        now = time.perf_counter()
        self.tokens += value.numel()
        if self.first:
            self.steps.append((0, value.numel(), now - self._last))
        else:
            self.first, self.first_at = self.tokens, now
        self._last = now

    def end(self) -> None:
        pass


def make_method(spec: str, llm: LLM, peers: Peers) -> Method:
    """The method that ``spec`` names.

    Raises:
        OptionError: if it names none.
    """
    if spec == "plain":
        return TreeMethod(spec, llm.plain())
    if spec == "default":
        return TreeMethod(spec, llm.using())
    kind, _, rest = spec.partition(":")
    if kind == "transformers":
        return peers.method(spec, rest)
    if not rest:
        raise OptionError(f"{spec!r} is not a method: write {FORMS}")
    names = kind.split("+")
    return TreeMethod(spec, llm.using(names if len(names) > 1 else kind, rest))


class Peers:
    """transformers models for its own methods, loaded when the first one is asked for."""

    def __init__(self, model: str, draft_model: str | None, dtype: str | None, device: str | None, llm: LLM) -> None:
        self._names, self._options, self._llm = (model, draft_model), (dtype, device), llm
        self._loaded: dict[str, PreTrainedModel] = {}

    def method(self, spec: str, rest: str) -> Method:
        """``rest`` is empty, ``assisted:N`` or ``lookup:N``."""
        found = re.fullmatch(r"|(assisted|lookup):([1-9]\d*)", rest)
        if found is None:
            raise OptionError(f"{spec!r} is not a method: write {FORMS}")
        kind, number, options = found[1], found[2], dict[str, Any]()
        if kind == "assisted":
            if self._names[1] is None:
                raise OptionError(f"{spec!r} needs a draft model")
            assistant = self._load(self._names[1])
            generation = assistant.generation_config
            assert generation is not None
            generation.num_assistant_tokens, generation.num_assistant_tokens_schedule = int(number), "constant"
            generation.assistant_confidence_threshold = 0.0
            options["assistant_model"] = assistant
        elif kind == "lookup":
            options["prompt_lookup_num_tokens"] = int(number)
        return TransformersMethod(spec, self._load(self._names[0]), sorted(self._llm.eos_ids), options)

    def _load(self, name: str) -> PreTrainedModel:
        from tokentree.loading import load_model, pick_device

        if name not in self._loaded:
            dtype, device = self._options
            self._loaded[name] = load_model(name, dtype, pick_device(device))
        return self._loaded[name]
