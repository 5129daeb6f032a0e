"""Which engine a model gets: decided here alone, from what is known of the model before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from tokentree.engines.base import EngineOptions
from tokentree.engines.support import check_quantization
from tokentree.errors import ModelError

Attention = Literal["tree", "sdpa"]

# by the names that plans give them; each is imported when it is made
KINDS = {
    "program": "tokentree.engines.program:ProgramEngine",
    "modules": "tokentree.engines.modules:ModulesEngine",
    "self_attending": "tokentree.engines.self_attending:SelfAttendingEngine",
    "recorded": "tokentree.engines.gpu.recorded:RecordedEngine",
    "compiled": "tokentree.engines.gpu.recorded:CompiledEngine",
    "kernels": "tokentree.engines.gpu.engine:TritonEngine",
    "module_kernels": "tokentree.engines.gpu.modules:TritonModulesEngine",
}


@dataclass(frozen=True)
class Traits:
    """What a plan depends on.

    Args:
        name: of the model's class.
        family: its ``model_type``.
        device: where it is: "cpu", "cuda", or another of torch's.
        dtype: of its weights.
        unsupported: why no tree can be verified with it, None where one can.
        from_gguf: whether its weights come from a GGUF file.
        supports_sdpa: whether transformers has torch's attention for it.
        has_softcap: whether its attention caps scores, which torch's can't.
        ours_alone: what it does, in words, that is right for a tree in our attention on CPUs alone.
        one_call: whether it is of a family, as it came, whose forward is one compiled call: see `families`.
        recurrent: whether it has recurrent states, which are rolled back on CPUs alone.
        runs_more: whether hooks or replaced forwards run with it.
        has_kernels: whether kernels of our own run all of it on a GPU.
        without_kernels: why they don't, where that is known.
        has_module_kernels: whether they may run what decides a row's bits in its modules, where they don't run all.
    """

    name: str
    family: str
    device: str
    dtype: torch.dtype | None
    unsupported: str | None = None
    from_gguf: bool = False
    supports_sdpa: bool = True
    has_softcap: bool = False
    ours_alone: str = ""
    one_call: bool = False
    recurrent: bool = False
    runs_more: bool = False
    has_kernels: bool = False
    without_kernels: str = ""
    has_module_kernels: bool = False


@dataclass(frozen=True)
class EnginePlan:
    """What a model becomes.

    Args:
        engine: which of `KINDS` it is.
        attention: "tree", or "sdpa" where the model attends by itself, under a dense mask.
        own_attention: the attention of transformers that the model has when it is asked what it says by itself.
        packs: whether linear layers and modules are exchanged for packed and fused ones.
        otherwise: the plan that is tried if this engine can't be made: some things are known only then.
        failing: what the user is told then, before the reason.
        hint: what an error says behind the reason, where nothing else is tried.
        caveat: what the user is told of this engine.
    """

    engine: str
    attention: Attention
    own_attention: str = "sdpa"
    packs: bool = False
    otherwise: EnginePlan | None = None
    failing: str = ""
    hint: str = ""
    caveat: str = ""


def plan(traits: Traits, options: EngineOptions) -> EnginePlan:
    """The best engine for such a model, under ``options`` (`attention`, `quantization`, `compile`).

    Raises:
        OptionError: if an option is none.
        ModelError: if the model can't be decoded with a tree, or not so, with the reason.
    """
    if traits.unsupported is not None:
        raise ModelError(traits.unsupported)
    attention, on_cpu, quantization = options.attention, traits.device == "cpu", options.quantization
    check_quantization(quantization, traits.from_gguf)
    if quantization is not None and not (on_cpu and traits.dtype is torch.bfloat16):
        _check_quantized_on_gpu(traits, options)
    attends = on_cpu or ((traits.has_kernels or traits.has_module_kernels) and not traits.runs_more)
    if attention not in (None, "tree", "sdpa") or (attention == "tree" and not attends):
        raise ModelError(f"attention={attention!r} can't be used with {traits.name}: use attention='sdpa'")
    if traits.recurrent:
        _check_recurrent(traits, options)
    if traits.ours_alone:
        return _ours_alone(traits, options)
    own_attention = "sdpa" if traits.supports_sdpa and not traits.has_softcap else "eager"
    itself = EnginePlan("self_attending", "sdpa", own_attention, packs=on_cpu)
    if on_cpu:
        return _on_cpu(traits, options, itself)
    return _elsewhere(traits, options, itself)


def _check_quantized_on_gpu(traits: Traits, options: EngineOptions) -> None:
    """Raises `ModelError` unless kernels of our own are to run the model in 8 bits."""
    name = f"quantization={options.quantization!r}"
    if traits.device != "cuda" or options.quantization != "int8":
        raise ModelError(f"{name} is for models on a CPU with dtype='bfloat16'")
    if options.attention == "sdpa":
        raise ModelError(f"attention='sdpa' and {name} don't go together for {traits.name} on a GPU")
    if not traits.has_kernels:
        reason = f": {traits.without_kernels}" if traits.without_kernels else ""
        raise ModelError(f"{name} on a GPU takes kernels of our own, and none run {traits.name}{reason}")
    if traits.runs_more:
        raise ModelError(f"{name} on a GPU is for models without hooks, and {traits.name} has some")


def _check_recurrent(traits: Traits, options: EngineOptions) -> None:
    """Raises `ModelError` unless the one engine that rolls recurrent states back is asked for."""
    if traits.device != "cpu":
        raise ModelError(f"{traits.name} has recurrent states, which this library rolls back on CPUs alone")
    if options.attention == "sdpa" or options.compile:
        other = "compile=True" if options.compile else "attention='sdpa'"
        raise ModelError(f"{traits.name} has recurrent states, which can't be rolled back with {other}")


def _ours_alone(traits: Traits, options: EngineOptions) -> EnginePlan:
    """The one engine with our attention on CPUs.

    Raises:
        ModelError: if another one is asked for.
    """
    if traits.device != "cpu" or options.attention == "sdpa" or options.compile:
        other = "attention='sdpa'" if options.attention == "sdpa" else "compile=True" if options.compile else "a GPU"
        raise ModelError(
            f"{traits.name} {traits.ours_alone}, as this library's own attention on CPUs does alone: there is no other "
            f"way, and none with {other}"
        )
    own_attention = "sdpa" if traits.supports_sdpa else "eager"
    return EnginePlan("modules", "tree", own_attention, packs=True)


def may_be_kept(device: str, dtype: torch.dtype | None, options: EngineOptions) -> bool:
    """Whether all of a `ProgramEngine` may have been kept when its model was packed before: a `ReadyEngine` is made of
    that, before anything is known of the model."""
    return device == "cpu" and dtype is torch.bfloat16 and options.attention in (None, "tree")


def _on_cpu(traits: Traits, options: EngineOptions, itself: EnginePlan) -> EnginePlan:
    hint = "" if traits.recurrent else ": use attention='sdpa'"
    tree = replace(itself, engine="modules", attention="tree", hint=hint)
    if options.attention != "sdpa" and traits.one_call:
        return replace(tree, engine="program")
    best = itself if options.attention == "sdpa" else tree
    if options.attention is None and not traits.recurrent:
        told = f"{traits.name} attends by itself here, and its text is plain's up to ties"
        best = replace(tree, otherwise=itself, failing=told)
    return _compiled(traits, options, best) if options.compile else best


def _elsewhere(traits: Traits, options: EngineOptions, itself: EnginePlan) -> EnginePlan:
    """On GPUs, and other devices of torch's: the engines from best to worst."""
    if options.compile:
        return _compiled(traits, options, itself)
    if traits.device != "cuda" or options.attention == "sdpa" or traits.runs_more:  # a recording has kernels alone
        return itself
    told = "the forward can't be recorded as a graph, and is slower without"
    recorded = replace(itself, engine="recorded", otherwise=itself, failing=told)
    told = f"{traits.name} attends by itself here, and its text is plain's up to ties"
    if not traits.has_kernels and not traits.has_module_kernels:
        return replace(recorded, caveat=f"{told}: {traits.without_kernels}" if traits.without_kernels else "")
    engine = "kernels" if traits.has_kernels else "module_kernels"
    kernels = replace(itself, engine=engine, attention="tree", hint=": use attention='sdpa'")
    if options.quantization is not None:  # no other engine has 8 bits
        return replace(kernels, hint="")
    return kernels if options.attention else replace(kernels, otherwise=recorded, failing=told)


def _compiled(traits: Traits, options: EngineOptions, otherwise: EnginePlan) -> EnginePlan:
    if options.attention == "tree" or options.quantization:
        other = "attention='tree'" if options.attention == "tree" else f"quantization={options.quantization!r}"
        raise ModelError(f"compile=True and {other} don't go together for {traits.name}")
    told = "compile=True does nothing here, the forward can't be compiled"
    return EnginePlan("compiled", "sdpa", otherwise.own_attention, otherwise=otherwise, failing=told)
