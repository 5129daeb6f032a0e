"""Other libraries' methods, to be measured beside this one's: transformers, llama.cpp and OpenVINO GenAI."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tokentree.bench.figures import PEERS
from tokentree.errors import OptionError
from tokentree.llm import LLM
from tokentree.loading import find_tokenizer
from tokentree.pairing import difference
from tokentree.sampling import SamplingParams

CONTEXT = 4096  # tokens that llama.cpp makes room for


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


class TransformersMethod:
    """transformers' own `generate`: plain, with an assistant model, or with prompt lookup."""

    learns = False

    def __init__(self, name: str, model: PreTrainedModel, eos_ids: list[int], options: dict[str, Any]) -> None:
        self.name = name
        self._model, self._eos_ids, self._options = model, eos_ids, options

    def run(self, prompt_ids: list[int], params: SamplingParams) -> Output:
        _check_greedy(params)
        clock = _Clock()
        out = self._model.generate(  # type: ignore[operator]
            torch.tensor([prompt_ids], device=self._model.device),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long, device=self._model.device),
            max_new_tokens=params.max_tokens,
            do_sample=False,
            eos_token_id=self._eos_ids or None,
            pad_token_id=(self._eos_ids or [0])[0],
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


class LlamaCppMethod:
    """llama.cpp on a GGUF file, plain or with its prompt lookup; llama-cpp-python has no other speculation."""

    learns = False

    def __init__(self, name: str, file: str, lookup: int | None, eos_ids: Collection[int]) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self.name, self._eos_ids = name, set(eos_ids)
        threads, draft = torch.get_num_threads(), None
        if lookup is not None:
            draft = LlamaPromptLookupDecoding(num_pred_tokens=lookup)
        self._model = Llama(
            file,
            n_ctx=CONTEXT,
            n_threads=threads,
            n_threads_batch=threads,
            draft_model=draft,
            verbose=False,
            logits_all=draft is not None,  # else it has no room for a prompt longer than a batch
        )

    def run(self, prompt_ids: list[int], params: SamplingParams) -> Output:
        _check_greedy(params)
        self._model.reset()
        ids, started, first_at = list[int](), time.perf_counter(), 0.0
        for token in self._model.generate(prompt_ids, temp=0.0, repeat_penalty=1.0):
            first_at = first_at or time.perf_counter()
            ids.append(token)
            if len(ids) == params.max_tokens or (token in self._eos_ids and not params.ignore_eos):
                break
        return _timed(ids, first_at - started, time.perf_counter() - first_at)


class OpenVinoMethod:
    """OpenVINO GenAI on an exported folder or a GGUF file, plain or with its prompt lookup."""

    learns = False

    def __init__(self, name: str, model: str, lookup: int | None, eos_ids: Collection[int]) -> None:
        import openvino_genai

        self.name, self._library, self._lookup, self._eos_ids = name, openvino_genai, lookup, set(eos_ids)
        options: dict[str, Any] = {"prompt_lookup": True} if lookup is not None else {}
        self._pipe = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads(), **options)

    def run(self, prompt_ids: list[int], params: SamplingParams) -> Output:
        import openvino

        _check_greedy(params)
        config = self._library.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = params.max_tokens, False, params.ignore_eos
        config.stop_token_ids = self._eos_ids
        if self._lookup is not None:
            config.num_assistant_tokens, config.max_ngram_size = self._lookup, 3
        ids = np.array([prompt_ids], np.int64)
        inputs = self._library.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        started = time.perf_counter()
        result = self._pipe.generate(inputs, config)
        wall = time.perf_counter() - started
        prefill = result.perf_metrics.get_ttft().mean / 1e3
        return _timed(list(result.tokens[0]), prefill, wall - prefill)


def _timed(ids: list[int], prefill: float, decode: float) -> Output:
    """The first token belongs to the prefill."""
    return Output(ids, prefill, decode, len(ids) - 1, {"new_tokens": len(ids) - 1})


def _check_greedy(params: SamplingParams) -> None:
    if not params.is_greedy:
        raise OptionError("other libraries' methods are measured greedily only")


class Peers:
    """Other libraries' methods, and the models that they share, loaded when the first one is asked for."""

    kinds = PEERS

    def __init__(self, model: str, draft_model: str | None, dtype: str | None, device: str | None, llm: LLM) -> None:
        self._names, self._options, self._llm = (model, draft_model), (dtype, device), llm
        self._loaded: dict[str, PreTrainedModel] = {}

    def method(self, spec: str, kind: str, rest: str) -> Method:
        """``rest`` is what stands behind ``kind`` in ``spec``.

        Raises:
            OptionError: if it names no method, or what it needs isn't there.
        """
        if kind == "transformers":
            return self._of_transformers(spec, rest)
        found = re.fullmatch(r"(.+?)(?::lookup:([1-9]\d{0,3}))?", rest)
        if found is None:
            raise OptionError(f"{spec!r} names no model: write {kind}:MODEL or {kind}:MODEL:lookup:N")
        if not Path(found[1]).exists():
            raise OptionError(f"{spec!r} is for a file or folder {found[1]!r}, which isn't there")
        lookup = int(found[2]) if found[2] else None
        method = LlamaCppMethod if kind == "llama.cpp" else OpenVinoMethod
        try:
            return method(spec, found[1], lookup, self._llm.eos_ids)
        except ImportError:
            package = "llama-cpp-python" if kind == "llama.cpp" else "openvino-genai"
            raise OptionError(f"{spec!r} needs the package {package}: pip install {package}") from None

    def _of_transformers(self, spec: str, rest: str) -> Method:
        found = re.fullmatch(r"|(assisted|lookup):([1-9]\d{0,3})", rest)
        if found is None:
            raise OptionError(
                f"{spec!r} is not a method: write transformers, transformers:assisted:N or transformers:lookup:N"
            )
        number, options = found[2], dict[str, Any]()
        if found[1] == "assisted":
            if self._names[1] is None:
                raise OptionError(f"{spec!r} needs a draft model")
            assistant = self._load(self._names[1])
            generation = assistant.generation_config
            assert generation is not None
            generation.num_assistant_tokens, generation.num_assistant_tokens_schedule = int(number), "constant"
            generation.assistant_confidence_threshold = 0.0
            options |= {"assistant_model": assistant, **self._tokenizers(self._names[1])}
        elif found[1] == "lookup":
            options["prompt_lookup_num_tokens"] = int(number)
        return TransformersMethod(spec, self._load(self._names[0]), sorted(self._llm.eos_ids), options)

    def _tokenizers(self, draft_model: str) -> dict[str, Any]:
        """What `generate` is told beside an assistant model, if that has another tokenizer."""
        own, other = self._llm.tokenizer, find_tokenizer(draft_model)
        if own is None or other is None or difference(own, other) is None:
            return {}
        return {"tokenizer": own, "assistant_tokenizer": other}

    def _load(self, name: str) -> PreTrainedModel:
        from tokentree.loading import load_model, pick_device

        if name not in self._loaded:
            dtype, device = self._options
            self._loaded[name] = load_model(name, dtype, pick_device(device))
        return self._loaded[name]
