"""Engines for transformers' decoder-only models: planned, made, tried, and made otherwise where that fails."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tokentree.engines.base import EngineOptions
from tokentree.engines.foreign import explained, inner_model
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.plan import KINDS, EnginePlan, plan
from tokentree.engines.prepared import Prepared
from tokentree.errors import ModelError
from tokentree.exclusive import neutral
from tokentree.plugins import imported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokentree.engines.cpu.packed_file import Place


@neutral()
def TorchEngine(
    model: PreTrainedModel, attention: str | None = None, owns_model: bool = False, quantization: str | None = None,
    prefix_bytes: int = 0, file: Path | None = None, kept: Place | None = None, compile: bool = False,
) -> KVEngine:  # fmt: skip
    """An engine that verifies trees on a transformers model, on CPU or CUDA: which one it is says `plan`.

    Args:
        model: a decoder-only model; it is not changed. Hooks, adapters and forwards that were put into it are run as
            they are. If it changes later, the next request is refused.
        attention: ``"tree"`` (default on CPUs, and only there) uses `tree_attention`, which gives the same bits in any
            batch and any tree; ``"sdpa"`` (default elsewhere) lets the model attend by itself under a dense mask.
        owns_model: nobody else uses ``model``, so its weights may be dropped once they are packed.
        prefix_bytes: KV of finished sequences that is kept for texts that begin alike, in bytes.
        quantization: None, or ``"int8"``: weights in 8 bits with a scale for each output and 64 inputs. On CPUs, inputs
            of linear layers are in 8 bits too, with a scale for each row and 64 of them; on GPUs, where kernels of our
            own run the model or nothing does, they stay bfloat16. Lossy against the model as it came; trees remain
            lossless to the quantised model. Or ``"gguf"``, on CPUs: weights as ``file`` has them, in 4 bits where it
            has them in 4, else in 8, and inputs in 8; lossy against the file's weights in bfloat16 in the same sense.
        file: the GGUF file that ``model`` was loaded from.
        kept: where its packed weights are, or are put.
        compile: compile the whole forward, where it isn't one compiled call anyway (`ProgramEngine`), as a `Graph`,
            which takes minutes the first time. The model then attends by itself, and its text is plain's up to ties.
            Where nothing can be compiled, a warning says so, and the forward runs as it would without.

    Raises:
        OptionError: if there is no such quantization.
        ModelError: if the model can't be decoded with a tree, with the reason.
    """
    prepared = Prepared(inner_model(model), owns_model, quantization, file, kept)
    best = plan(prepared.traits, EngineOptions(attention=attention, quantization=quantization, compile=compile))
    prepared.ask(best.own_attention)
    engine = _first_that_works(prepared, best, prefix_bytes)
    if engine.caveat:
        warnings.warn(engine.caveat, stacklevel=3)
    prepared.finish()
    return engine


def _first_that_works(prepared: Prepared, best: EnginePlan, prefix_bytes: int) -> KVEngine:
    """The engine that ``best`` plans; where it can't be made, or doesn't give what the model says by itself, the one
    that it names instead, and so on.

    Raises:
        ModelError: the last one's, and why our attention can't be used.
    """
    now, caveat, reasons = best, best.caveat, list[str]()
    while True:
        try:
            engine = _made(prepared, now, prefix_bytes)
            with explained(prepared.copy):
                engine._check_trees(prepared.own)
        except ModelError as error:
            if now.otherwise is None:
                others = [reason for reason in reasons if not str(error).startswith(reason)]
                raise ModelError("; ".join([f"{error}{now.hint}", *others])) from error.__cause__
            told = f"{now.failing}: {error}"
            if now.attention == "tree":
                caveat = told
                reasons = [str(error)]
            else:
                warnings.warn(told, stacklevel=4)
            now = now.otherwise
        else:
            engine.caveat = caveat or engine.caveat
            return engine


def _made(prepared: Prepared, planned: EnginePlan, prefix_bytes: int) -> KVEngine:
    made: KVEngine = imported(KINDS[planned.engine]).of(prepared, planned, prefix_bytes)
    return made
