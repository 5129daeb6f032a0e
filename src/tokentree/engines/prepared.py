"""A loaded model, made ready for an engine: a private copy, how that is packed, and what the model says by itself."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokentree.engines.cpu.attending import adapt, attended
from tokentree.engines.cpu.families.names import family_of, name_of
from tokentree.engines.cpu.families.stack import Stack
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.packed_file import KeptPacking, Place
from tokentree.engines.cpu.packing import GgufPacking, Packing
from tokentree.engines.cpu.prepare import in_float32, pack, private_copy, set_attention
from tokentree.engines.cpu.program import Program
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.foreign import ForeignCode, changes_weights, explained, not_in_a_copy, of_libraries, runs_more
from tokentree.engines.from_cache import READY
from tokentree.engines.guard import Guard, Unwatched
from tokentree.engines.kv import KVLayout
from tokentree.engines.model_facts import Facts, settings_of
from tokentree.engines.plan import Traits
from tokentree.engines.recurrent import Recurrence
from tokentree.engines.self_check import ATTENDED, OWN, own_forward
from tokentree.engines.support import has_softcap, is_recurrent, ours_alone, unsupported
from tokentree.engines.watch import Shared, Watch, in_common
from tokentree.errors import ModelError
from tokentree.gguf.header import is_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW_BITS = (torch.bfloat16, torch.float16)  # what numbers are rounded to, so that an engine can't be compared exactly

OLDEST = (8, 0)  # compute capability of the first GPUs that multiply bfloat16

Shapes = tuple[tuple[int, int, int], ...]  # of the KV of each layer: heads, key width, value width


class Prepared:
    """A model from which engines are made, one after another until one works. It is not changed; its copy is.

    Args:
        model: a transformers model.
        owned: nobody else uses it, so its weights may be dropped once they are packed.
        quantization, file, kept: see `TorchEngine`.

    Attributes:
        name, config, device, dtype: the model's.
        owned, quantization: as given.
        own: what it says by itself, see `own_forward`; there once it was asked, as is
        guard: tells whether the model is still what it was.
    """

    def __init__(
        self, model: PreTrainedModel, owned: bool, quantization: str | None, file: Path | None, kept: Place | None
    ) -> None:  # fmt: skip
        self.guard: Unwatched
        self._model, self.owned, self._file, self._kept = model, owned, file, kept
        self.name, self.config, self.quantization = type(model).__name__, model.config, quantization
        self.device, self.dtype = model.device, model.dtype
        self.own: dict[str, torch.Tensor] = {}
        self._packed = False
        for module in model.modules() if owned else ():
            if changes_weights(module):
                module._rescale_layers()  # type: ignore[operator]

    @functools.cached_property
    def facts(self) -> Facts:
        return Facts.of(self._model)

    @functools.cached_property
    def copy(self) -> PreTrainedModel:
        """Its private copy, which engines run and change."""
        return private_copy(self._model, self.owned)

    @functools.cached_property
    def packing(self) -> Packing:
        """How linear layers are packed on a CPU."""

        def make() -> Packing:
            if self.quantization == "gguf" and self._file:
                return GgufPacking(self.copy, self._file)
            return Packing(self._kind)

        return make() if self._kept is None else KeptPacking(self._kind, make, self.copy, self._kept)

    @property
    def _kind(self) -> type[PackedLinear] | type[QuantizedLinear]:
        return QuantizedLinear if self.quantization else PackedLinear

    @functools.cached_property
    def traits(self) -> Traits:
        """What `plan` reads. Nothing is computed, and no weight is read."""
        known = Traits(
            self.name, self.config.model_type, self.device.type, self.dtype,
            unsupported=unsupported(self._model) or not_in_a_copy(self._model),
            from_gguf=self._file is not None and is_gguf(self._file),
            supports_sdpa=bool(getattr(type(self._model), "_supports_sdpa", False)),
            has_softcap=has_softcap(self.config.get_text_config()), ours_alone=ours_alone(self._model),
            recurrent=is_recurrent(self._model),
        )  # fmt: skip
        if known.unsupported is not None:
            return known
        runs = replace(known, one_call=self.family is not None, runs_more=runs_more(self.copy))
        if self.device.type != "cuda":
            return runs
        reason, none = self.without_kernels, self.without_any_kernels
        modules = none is None and self.dtype is torch.bfloat16
        return replace(
            runs, has_kernels=reason is None, without_kernels=reason or "",
            has_module_kernels=reason is not None and modules,
        )  # fmt: skip

    @functools.cached_property
    def family(self) -> type[Stack] | None:
        """The one whose forward is one compiled call, if the model, as it came, is of one."""
        return family_of(self.copy, Packing(self._kind)) if self.device.type == "cpu" else None

    @functools.cached_property
    def without_any_kernels(self) -> str | None:
        """Why no kernels of our own run here, or on a model with such code; None if some may."""
        if find_spec("triton") is None:
            return "triton isn't installed: pip install 'tokentree[gpu]'"
        if ForeignCode.of(self._model).at:
            return "there is code in it that isn't its class's own"
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) < OLDEST:
            return "this GPU multiplies no bfloat16"
        return None

    @functools.cached_property
    def without_kernels(self) -> str | None:
        """Why no kernels of our own run the whole model on a GPU, in 8 bits where those are asked for; None if they
        do."""
        if self.without_any_kernels is not None:
            return self.without_any_kernels
        from tokentree.engines.gpu.weights import unfit  # needs triton

        return unfit(self._model, self.quantization is not None)

    def ask(self, attention: str) -> None:
        """Asks the model what it says by itself, with transformers' attention of that name.

        Raises:
            ModelError: if it can't read a text, or its forward leaves a trace.
        """
        guard = None if self.owned else Guard(self.name, self.facts.ends, Watch(self._model))
        set_attention(self.copy, attention)
        with explained(self.copy):
            if self.device.type == "cpu":
                few, exact = self.dtype in FEW_BITS, functools.partial(in_float32, self._model, attention)
                recurrent = self.traits.recurrent
                self.own = self.packing.recall(OWN, lambda: own_forward(self.copy, exact if few else None, recurrent))
            else:
                self.own = own_forward(self.copy)
        if guard is not None:
            self._check_forward(guard)
        self.guard = guard or Unwatched(self.facts.ends)

    def _check_forward(self, guard: Guard) -> None:
        """Raises `ModelError` if the model's own forward, which has run, has changed it."""
        try:
            guard.check_forward_of_its_own()
        except ModelError as error:
            if not (others := of_libraries(self._model)):
                raise
            kinds = " and ".join(others)
            raise ModelError(
                f"{error}; {kinds} may ready its weights in a first forward: let the model run once before"
            ) from None

    @property
    def vocab_size(self) -> int:
        return int(self.own["logits"].shape[1])

    @property
    def shapes(self) -> Shapes:
        """Of the KV that the model keeps by itself."""
        return shapes_of(self.own)

    def attended(self) -> KVLayout:
        """Of what attention is given each time that a forward attends, for an attention of ours; and of what
        recurrences keep.

        Raises:
            ModelError: if the model has to attend by itself.
        """
        adapt(self.copy)
        found = self.packing.recall(ATTENDED, lambda: attended(self.copy))
        shapes = shapes_of(found)
        reads = found["reads"].tolist() if "reads" in found else list(range(len(shapes)))
        stored = sorted(set(reads))  # what comes again is kept once
        kept = found["recurrences"].tolist() if "recurrences" in found else []
        return KVLayout(
            tuple(shapes[call] for call in stored), torch.float32, self.device, blocked=True,
            recurrences=tuple(Recurrence(*sizes) for sizes in kept),
            reads=() if len(stored) == len(reads) else tuple(stored.index(call) for call in reads),
        )  # fmt: skip

    def pack(self) -> None:
        """Exchanges modules of the copy for packed and fused ones, once."""
        if not self._packed:
            pack(self.copy, self.packing, self.owned)
            self.packing.keep()
            self._packed = True

    def program(self) -> Program:
        """The whole forward as a program, for a model with the trait `one_call`; the copy can't run by itself then."""
        assert self.family is not None
        pack(self.copy, self.packing, self.owned, self.family)
        stack = self.family.of(self.copy)
        self.packing.remember(READY, lambda: self._state(stack))
        self.packing.keep()
        return Program(stack)

    def _state(self, stack: Stack) -> dict[str, Any] | None:
        """What a `ReadyEngine` is made of the next time."""
        state, about = stack.state(), {"facts": asdict(self.facts), "settings": settings_of(self.config)}
        return state and {**about, "family": name_of(stack), "stack": state}

    def finish(self) -> None:
        """An engine is made of it: from now on the model must stay as it is.

        Raises:
            ModelError: if it has changed meanwhile.
        """
        if isinstance(self.guard, Guard):
            self.guard.share(Shared(in_common(self._model, self.copy)))
            self.guard.check_forward_of_its_own()


def shapes_of(found: dict[str, torch.Tensor]) -> Shapes:
    return tuple((heads, keys, values) for heads, keys, values in found["shapes"].tolist())
