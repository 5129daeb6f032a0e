"""Which engine a model gets, without any model."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from tokentree import ModelError, OptionError
from tokentree.engines.base import EngineOptions, NotCopied
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.plan import KINDS, EnginePlan, Traits, may_be_kept, plan
from tokentree.plugins import imported

QWEN3 = Traits("Qwen3ForCausalLM", "qwen3", "cpu", torch.float32)
LLAMA = Traits("LlamaForCausalLM", "llama", "cpu", torch.bfloat16, one_call=True)
GEMMA2 = replace(QWEN3, name="Gemma2ForCausalLM", family="gemma2", has_softcap=True)
DOGE = replace(QWEN3, name="DogeForCausalLM", family="doge", supports_sdpa=False)
HOOKED = replace(QWEN3, runs_more=True)
ON_GPU: dict[str, Any] = {"device": "cuda", "one_call": False}
WITH_KERNELS: dict[str, Any] = {**ON_GPU, "has_kernels": True}
TREE, SDPA = EngineOptions(attention="tree"), EngineOptions(attention="sdpa")
COMPILED, INT8 = EngineOptions(compile=True), EngineOptions(quantization="int8")
NONE = EngineOptions()


def tried(traits: Traits, options: EngineOptions) -> list[str]:
    """The engines that are tried, in order."""
    found, at = [], plan(traits, options)
    while True:
        found.append(at.engine)
        if at.otherwise is None:
            return found
        at = at.otherwise


@pytest.mark.parametrize(
    ("traits", "options", "engines"),
    [
        (LLAMA, NONE, ["program"]),
        (LLAMA, TREE, ["program"]),
        (LLAMA, INT8, ["program"]),
        (LLAMA, COMPILED, ["program"]),
        (LLAMA, replace(COMPILED, quantization="int8"), ["program"]),
        (LLAMA, SDPA, ["self_attending"]),
        (LLAMA, replace(SDPA, compile=True), ["compiled", "self_attending"]),
        (replace(LLAMA, one_call=False), INT8, ["modules", "self_attending"]),
        (QWEN3, NONE, ["modules", "self_attending"]),
        (QWEN3, TREE, ["modules"]),
        (QWEN3, SDPA, ["self_attending"]),
        (QWEN3, COMPILED, ["compiled", "modules", "self_attending"]),
        (HOOKED, NONE, ["modules", "self_attending"]),
        (replace(LLAMA, **ON_GPU), NONE, ["recorded", "self_attending"]),
        (replace(LLAMA, **ON_GPU), SDPA, ["self_attending"]),
        (replace(LLAMA, **ON_GPU), COMPILED, ["compiled", "self_attending"]),
        (replace(LLAMA, **ON_GPU), replace(SDPA, compile=True), ["compiled", "self_attending"]),
        (replace(LLAMA, **WITH_KERNELS), NONE, ["kernels", "recorded", "self_attending"]),
        (replace(LLAMA, **WITH_KERNELS), TREE, ["kernels"]),
        (replace(QWEN3, **ON_GPU, has_module_kernels=True), NONE, ["module_kernels", "recorded", "self_attending"]),
        (replace(QWEN3, **ON_GPU, has_module_kernels=True), TREE, ["module_kernels"]),
        (replace(LLAMA, **WITH_KERNELS), INT8, ["kernels"]),
        (replace(LLAMA, **WITH_KERNELS), replace(TREE, quantization="int8"), ["kernels"]),
        (replace(LLAMA, **WITH_KERNELS), SDPA, ["self_attending"]),
        (replace(LLAMA, **WITH_KERNELS), COMPILED, ["compiled", "self_attending"]),
        (replace(HOOKED, **ON_GPU), NONE, ["self_attending"]),
        (replace(HOOKED, **ON_GPU), COMPILED, ["compiled", "self_attending"]),
        (replace(QWEN3, device="mps"), NONE, ["self_attending"]),
    ],
)
def test_engines_are_tried_in_this_order(traits: Traits, options: EngineOptions, engines: list[str]) -> None:
    assert tried(traits, options) == engines


@pytest.mark.parametrize(
    ("traits", "options", "sentence"),
    [
        (replace(QWEN3, unsupported="it can't"), TREE, "^it can't$"),
        (
            replace(QWEN3, device="cuda"),
            TREE,
            "^attention='tree' can't be used with Qwen3.*: use attention='sdpa'$",
        ),
        (QWEN3, EngineOptions(attention="flash"), "attention='flash' can't be used with Qwen3ForCausalLM"),
        (QWEN3, INT8, "^quantization='int8' is for models on a CPU with dtype='bfloat16'$"),
        (
            replace(LLAMA, **ON_GPU, without_kernels="it has 3 legs"),
            INT8,
            "^quantization='int8' on a GPU takes kernels of our own, and none run LlamaForCausalLM: it has 3 legs$",
        ),
        (
            replace(LLAMA, **WITH_KERNELS, from_gguf=True),
            EngineOptions(quantization="gguf"),
            "^quantization='gguf' is for models on a CPU with dtype='bfloat16'$",
        ),
        (replace(LLAMA, device="mps"), INT8, "^quantization='int8' is for models on a CPU with dtype='bfloat16'$"),
        (
            replace(LLAMA, **WITH_KERNELS),
            replace(SDPA, quantization="int8"),
            "^attention='sdpa' and quantization='int8' don't go together for LlamaForCausalLM on a GPU$",
        ),
        (
            replace(LLAMA, **WITH_KERNELS, runs_more=True),
            INT8,
            "^quantization='int8' on a GPU is for models without hooks, and LlamaForCausalLM has some$",
        ),
        (
            replace(LLAMA, **WITH_KERNELS),
            replace(INT8, compile=True),
            "^compile=True and quantization='int8' don't go together for LlamaForCausalLM$",
        ),
        (
            QWEN3,
            replace(TREE, compile=True),
            "^compile=True and attention='tree' don't go together for Qwen3",
        ),
        (replace(LLAMA, one_call=False), replace(INT8, compile=True), "compile=True and quantization='int8' don't go"),
    ],
)
def test_what_can_t_be_done_is_refused_in_a_sentence(traits: Traits, options: EngineOptions, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        plan(traits, options)


@pytest.mark.parametrize(
    ("quantization", "sentence"),
    [
        ("int3", "^unknown quantization 'int3': there are 'int8', 'gguf'$"),
        ("gguf", r"name a model by its \.gguf file$"),
    ],
)
def test_a_quantization_that_there_isn_t_is_a_wrong_option(quantization: str, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        plan(LLAMA, EngineOptions(quantization=quantization))
    assert plan(replace(LLAMA, from_gguf=True), EngineOptions(quantization="gguf")).engine == "program"


def test_the_attention_that_a_model_has_by_itself() -> None:
    assert [plan(traits, SDPA).own_attention for traits in (QWEN3, GEMMA2, DOGE)] == ["sdpa", "eager", "eager"]
    assert plan(GEMMA2, NONE).own_attention == "eager"  # of any plan: it is what an engine is compared with


def test_it_is_said_why_no_kernels_of_ours_run() -> None:
    told = plan(replace(LLAMA, **ON_GPU, without_kernels="triton isn't installed"), NONE).caveat
    assert told == "LlamaForCausalLM attends by itself here, and its text is plain's up to ties: triton isn't installed"
    assert not plan(replace(LLAMA, **WITH_KERNELS), NONE).caveat


def every() -> list[tuple[Traits, EngineOptions, EnginePlan]]:
    """All plans there are, those that are tried instead too."""
    found = list[tuple[Traits, EngineOptions, EnginePlan]]()
    for device, dtype in product(("cpu", "cuda", "mps"), (torch.float32, torch.bfloat16)):
        traits = [replace(QWEN3, device=device, dtype=dtype)]
        for flag in ("one_call", "runs_more", "has_softcap"):
            on: dict[str, Any] = {flag: True}
            traits += [replace(one, **on) for one in traits]
        here = [one for one in traits if device == "cuda" and not one.runs_more]
        traits += [replace(one, has_kernels=True) for one in here]
        traits += [replace(one, has_module_kernels=True) for one in here]
        for one, attention, quantization, compile in product(
            traits, (None, "tree", "sdpa"), (None, "int8"), (False, True)
        ):
            options = EngineOptions(attention=attention, quantization=quantization, compile=compile)
            try:
                at: EnginePlan | None = plan(one, options)
            except ModelError:
                continue
            while at is not None:
                found.append((one, options, at))
                at = at.otherwise
    return found


def test_plans_hold_what_they_promise() -> None:
    plans = every()
    assert {planned.engine for *_, planned in plans} == set(KINDS)
    for traits, options, planned in plans:
        kernels = planned.engine in ("kernels", "module_kernels")
        assert planned.attention == "sdpa" or traits.device == "cpu" or kernels
        assert planned.packs is (traits.device == "cpu" and planned.engine != "compiled")
        assert bool(planned.failing) is (planned.otherwise is not None)  # nobody is left without a word
        if options.attention == "tree":
            assert planned.attention == "tree"
            assert planned.hint or kernels
        if options.attention == "sdpa":
            assert planned.attention == "sdpa"
        if options.quantization is not None:
            assert planned.packs or kernels
            assert planned.otherwise is None or planned.packs  # nothing else has 8 bits on a GPU
        assert planned.own_attention == ("eager" if traits.has_softcap else "sdpa")


@pytest.mark.parametrize("name", KINDS)
def test_each_engine_is_where_the_table_says(name: str) -> None:
    engine = imported(KINDS[name])
    assert issubclass(engine, KVEngine) or name in ("kernels", "module_kernels")
    assert issubclass(engine, NotCopied)
    assert callable(engine.of)
    assert engine.attention in ("tree", "sdpa")


def test_what_was_kept_is_a_program_s() -> None:
    bfloat16, half = torch.bfloat16, torch.float16
    assert may_be_kept("cpu", bfloat16, NONE)
    assert may_be_kept("cpu", bfloat16, replace(TREE, quantization="int8", compile=True))
    assert not may_be_kept("cpu", bfloat16, SDPA)
    assert not any(may_be_kept(device, dtype, NONE) for device, dtype in (("cuda", bfloat16), ("cpu", half)))
