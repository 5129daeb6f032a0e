"""The engine for transformers' decoder-only models, through their own forward."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tokentree.engines.cpu.attending import adapt, attended
from tokentree.engines.cpu.attention import TREE, ForwardKV, attending, dense_mask
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.llama import Llama
from tokentree.engines.cpu.packed_file import KeptPacking, Place
from tokentree.engines.cpu.packing import GgufPacking, Packing
from tokentree.engines.cpu.prepare import in_float32, pack, private_copy, set_attention, steady_activations
from tokentree.engines.cpu.program import Program
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.cpu.steady import foreign_layers, steady_weights
from tokentree.engines.foreign import check_runs_in_a_copy, explained, inner_model, runs_more
from tokentree.engines.from_cache import READY
from tokentree.engines.kv import KVLayout, Storages
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.model_facts import Facts, ends_of, settings_of
from tokentree.engines.segment import Segment, Upto, inputs_of
from tokentree.engines.self_check import ATTENDED, OWN, own_forward
from tokentree.engines.support import check_quantization, check_supported, decoder_layers, has_softcap
from tokentree.engines.watch import Shared, Watch, in_common
from tokentree.errors import ModelError, PairingError
from tokentree.exclusive import exclusive, neutral
from tokentree.sequence import Sequence

if TYPE_CHECKING:
    from tokentree.engines.gpu.graph import Graph

FEW_BITS = (torch.bfloat16, torch.float16)  # what numbers are rounded to, so that an engine can't be compared exactly


class TorchEngine(KVEngine):
    """Verifies trees on a transformers model, on CPU or CUDA.

    Args:
        model: a decoder-only model; it is not changed. Hooks, adapters and forwards that were put into it are run as
            they are. If it changes later, the next request is refused.
        attention: ``"tree"`` (default on CPUs, and only there) uses `tree_attention`, which gives the same bits in any
            batch and any tree; ``"sdpa"`` (default elsewhere) lets the model attend by itself under a dense mask.
        owns_model: nobody else uses ``model``, so its weights may be dropped once they are packed.
        prefix_bytes: KV of finished sequences that is kept for texts that begin alike, in bytes.
        quantization: None, or ``"int8"``: weights in 8 bits with a scale for each output and 64 inputs, and inputs of
            linear layers in 8 bits with a scale for each row and 64 of them. Lossy against the model as it came; trees
            remain lossless to the quantised model. Or ``"gguf"``: weights as ``file`` has them, in 4 bits where it has
            them in 4, else in 8, and inputs in 8; lossy against the file's weights in bfloat16 in the same sense.
        file: the GGUF file that ``model`` was loaded from.
        kept: where its packed weights are, or are put.
        compile: compile the whole forward, where it isn't one compiled call anyway (`program`), as a `Graph`, which
            takes minutes the first time. The model then attends by itself, and its text is plain's up to ties. Where
            nothing can be compiled, a warning says so, and the forward runs as it would without.

    Raises:
        ModelError: if the model can't be decoded with a tree, with the reason.
    """

    @neutral()
    def __init__(
        self, model: PreTrainedModel, attention: str | None = None, owns_model: bool = False,
        quantization: str | None = None, prefix_bytes: int = 0, file: Path | None = None, kept: Place | None = None,
        compile: bool = False,
    ) -> None:  # fmt: skip
        model = inner_model(model)
        check_supported(model)
        check_runs_in_a_copy(model)
        check_quantization(quantization, model, file)
        facts, device, dtype = Facts.of(model), model.device, model.dtype
        self.attention = attention or ("tree" if device.type == "cpu" else "sdpa")
        self._attends_itself = self.attention == "sdpa"
        self._name, self._foreign, self._ends = facts.name, list[str](), facts.ends
        if self.attention not in ("tree", "sdpa") or (self.attention == "tree" and device.type != "cpu"):
            raise ModelError(f"attention={attention!r} can't be used with {facts.name}: use attention='sdpa'")

        softcap = has_softcap(model.config.get_text_config())
        own_attention = "sdpa" if getattr(type(model), "_supports_sdpa", False) and not softcap else "eager"
        self._watch = None if owns_model else Watch(model)
        self._shared: Shared | None = None
        self._looked = False  # at the model, since the last step
        self._model, self._config = private_copy(model, owns_model), model.config
        set_attention(self._model, own_attention)
        option = inspect.signature(type(model).forward).parameters.get("logits_to_keep")
        self._keeps_logits = option is not None
        self._picks_logits = option is not None and "Tensor" in str(option.annotation)  # rows by their numbers
        packing = _packing(self._model, quantization, file, kept) if device.type == "cpu" else None
        own = self._said_by(model, packing, own_attention)
        self._check_unchanged()
        cached = shapes = _shapes(own)
        whole = packing is not None and not self._attends_itself and Llama.fits(self._model, packing)
        self._noted: dict[int, torch.Tensor] = {}  # of the last forward of `_model`, [rows, hidden size]
        self._compiles = compile and not whole
        self._graph = None if whole else self._graph_for(attention, quantization, facts, shapes)
        if packing is not None and not self._attends_itself and not whole:
            shapes = self._attended(packing, attention, own_attention) or shapes
        program: Program | None = None
        if packing is not None and self._graph is None:
            program = pack(self._model, packing, owns_model, whole)
            if program is not None:
                packing.remember(READY, lambda: self._state(program, facts))
            packing.keep()
        super().__init__(
            facts, own["logits"].shape[1], self._layout_for(shapes, device, dtype), program, dtype, quantization,
            prefix_bytes,
        )  # fmt: skip
        # On a CPU a product of fewer than four rows takes other code paths, whose bits differ, and is no faster.
        self._min_rows = 4 if device.type == "cpu" else 1
        if not self._attends_itself:
            set_attention(self._model, TREE)
            steady_activations(self._model)
            steady_weights(self._model, owns_model)
            self._foreign = foreign_layers(self._model)
        self._prove(own, cached, own_attention, attention is not None)
        self._tell()
        if not owns_model:
            self._shared = Shared(in_common(model, self._model))
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if told := self.changed():
            raise ModelError(f"{self._name} is changed by its own forward ({told}): a tree's must leave no trace")

    def changed(self) -> str | None:
        return None if self._watch is None else self._watch.change()

    @property
    def ends(self) -> list[int]:
        model = None if self._watch is None else self._watch.model
        if model is not None:  # a loaded one may be told others at any time
            self._ends = ends_of(model)
        return self._ends

    @exclusive
    def begin(self, seq: Sequence) -> int:
        watch = None if self._looked else self._watch
        if watch is not None and (told := watch.change(briefly=bool(self._kv))):  # briefly where others are decoded
            raise ModelError(f"{self.facts.name} has changed since it was given ({told}): make a new LLM of it")
        self._looked = True  # for those that join before the next step too
        return super().begin(seq)

    @exclusive
    def release(self, seqs: SequenceOf[Sequence]) -> None:
        self._looked = False
        super().release(seqs)

    @property
    def config(self) -> PreTrainedConfig:
        return self._config

    @property
    def model(self) -> PreTrainedModel:
        return self._model if self._attends_itself else super().model

    @property
    def form(self) -> str:
        if self._graph is None:
            return f"{super().form}, {' and '.join(self._foreign)}" if self._foreign else super().form
        return "one graph" if self._compiles else "one recording"

    @property
    def recorded(self) -> bool:
        return self._graph is not None and self.device.type == "cuda"

    @property
    def traced(self) -> bool:
        return self._graph is not None and self._compiles

    @exclusive
    def hidden_states_of(
        self, texts: SequenceOf[SequenceOf[int]], places: SequenceOf[int] | None = None
    ) -> list[torch.Tensor]:
        """`hidden_states` of several texts; elsewhere than on a CPU they are read together, by the model's own
        forward."""
        if self.device.type == "cpu":
            return super().hidden_states_of(texts, places)
        picked = [self.facts.num_layers] if places is None else places
        padded = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for row, ids in zip(padded, texts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        options = {"logits_to_keep": 1} if self._keeps_logits else {}
        # no row sees what stands behind it, and so no text what fills it up
        out = self._model(
            input_ids=padded.to(self.device), use_cache=False, output_hidden_states=True, return_dict=True, **options
        )
        states = torch.cat([out.hidden_states[place] for place in picked], -1)
        return [states[row, : len(ids)] for row, ids in enumerate(texts)]

    # -- one forward -----------------------------------------------------------------------------------------------

    def _forward(self, segments: SequenceOf[Segment], upto: Upto, rows: int | None = None) -> torch.Tensor:
        if upto == "logits":
            self._looked = False
        if upto != "kv" and self._shared is not None and self._shared.changed():  # prompts are looked at before
            raise ModelError(
                f"weights of {self.facts.name} were changed while a text was decoded: make a new LLM of it"
            )
        if self._program is not None:
            return self._by_program(self._program, segments, upto, rows)
        if self._graph is not None and upto != "kv" and self._graph.fits(segments):
            logits, states = self._graph.forward(segments)
            self._keep(segments, states)
            return logits[:rows]
        there = sum(segment.count for segment in segments)
        padding = max(0, self._min_rows - there)
        ids, positions = inputs_of(segments, padding)
        cache = ForwardKV(segments, self._attends_itself)
        options = self._to_keep(upto, there if rows is None else rows, there)
        mask: Any = None
        if self._attends_itself:
            by_kind = {
                kind: dense_mask(segments, there + padding, window, self.dtype, self.device)
                for kind, window in self.facts.windows.items()
            }
            mask = by_kind if len(by_kind) > 1 else next(iter(by_kind.values()))
        with contextlib.nullcontext() if self._attends_itself else attending(cache):
            out = self._model(
                input_ids=torch.from_numpy(ids)[None].to(self.device),
                position_ids=torch.from_numpy(positions)[None].to(self.device),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **options,
            )
        if self._graph is not None and self._compiles:
            self._noted[self.facts.num_layers] = self._graph.head_input()
        self._keep(segments, [self._noted[place] for place in self._places])
        said: torch.Tensor = out.logits[0]
        return said if upto == "kv" else said[: there if rows is None else rows]

    def _to_keep(self, upto: Upto, rows: int, there: int) -> dict[str, Any]:
        """What the model is told of the rows that need logits: of ``there``, the first ``rows`` ones."""
        noted = self.facts.num_layers in self._places  # at the output layer, which must see all rows then
        if not self._keeps_logits or noted:
            return {}
        if upto == "kv":
            return {"logits_to_keep": 1}
        if rows == there or not self._picks_logits:
            return {}
        return {"logits_to_keep": torch.arange(max(rows, self._min_rows), device=self.device)}

    def _outer_layers(self) -> tuple[Any, Any]:
        return self._model.get_input_embeddings(), self._model.get_output_embeddings()

    def _capture(self, places: list[int]) -> None:
        if self._graph is not None:
            if self._compiles and places != [self.facts.num_layers]:
                raise PairingError("with compile=True, only the last hidden state is there: leave it out")
            self._graph.recordings.forget()
        if self._program is not None or (self._graph is not None and self._compiles):
            return
        for place in places:
            last = place == self.facts.num_layers
            module = self._model.get_output_embeddings() if last else decoder_layers(self._model)[place]
            module.register_forward_pre_hook(functools.partial(self._note, place), with_kwargs=True)

    def _note(self, place: int, module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keeps what a module is given."""
        self._noted[place] = (inputs[0] if inputs else named["hidden_states"])[0]

    # -- at construction -------------------------------------------------------------------------------------------

    def _said_by(
        self, model: PreTrainedModel, packing: Packing | None, own_attention: str
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """See `own_forward`."""
        with explained(self._model):
            if packing is None:
                return own_forward(self._model)
            exact = functools.partial(in_float32, model, own_attention) if model.dtype in FEW_BITS else None
            return packing.recall(OWN, lambda: own_forward(self._model, exact))

    def _try_trees(self, own: dict[str, torch.Tensor]) -> None:
        try:
            self._check_trees(own)
        except (RuntimeError, TypeError, LookupError) as error:  # torch's, or of a model that wants something else
            if self._program is not None or runs_more(self._model):
                raise
            raise ModelError(f"{self._name} can't read a tree: {' '.join(str(error).split())}") from error

    def _prove(
        self, own: dict[str, torch.Tensor], cached: tuple[tuple[int, int, int], ...], own_attention: str, asked: bool
    ) -> None:  # fmt: skip
        """Checks trees with our attention, and, where that fails and nobody ``asked`` for it, with the model's own.

        Raises:
            ModelError: if they can't be verified.
        """
        with explained(self._model):
            try:
                self._try_trees(own)
            except ModelError as error:
                if self._attends_itself:
                    raise
                if asked or self._program:
                    raise ModelError(f"{error}: use attention='sdpa'") from None
                self._attend_by_itself(own_attention, error)
                self._storages = Storages(self._layout_for(cached, self.device, self.dtype))
                self._check_trees(own)

    def _attended(
        self, packing: Packing, attention: str | None, own_attention: str
    ) -> tuple[tuple[int, int, int], ...] | None:  # fmt: skip
        """What our attention is given in each layer. None where the model has to attend by itself, and may."""
        adapt(self._model)
        try:
            return _shapes(packing.recall(ATTENDED, lambda: attended(self._model)))
        except ModelError as error:
            if attention is not None:
                raise ModelError(f"attention='tree' can't be used: {error}: use attention='sdpa'") from None
            self._attend_by_itself(own_attention, error)
            return None

    def _tell(self) -> None:
        """Warns, in one sentence, where a text is plain's up to ties although nobody chose so."""
        if self._foreign and not self._attends_itself:
            self.caveat = (
                f"{self._name} has linear layers of another kind here ({', '.join(self._foreign)}), whose bits may "
                "depend on the rows beside one: its text is plain's up to ties"
            )
        if self.caveat:
            warnings.warn(self.caveat, stacklevel=3)

    def _attend_by_itself(self, own_attention: str, reason: ModelError) -> None:
        self.caveat = f"{self._name} attends by itself here, and its text is plain's up to ties: {reason}"
        self.attention, self._attends_itself = "sdpa", True
        set_attention(self._model, own_attention)

    def _layout_for(
        self, shapes: tuple[tuple[int, int, int], ...], device: torch.device, dtype: torch.dtype
    ) -> KVLayout:  # fmt: skip
        if self._attends_itself:
            return KVLayout(shapes, dtype, device, fixed=self._graph is not None)
        return KVLayout(shapes, torch.float32, device, blocked=True)

    def _graph_for(
        self, attention: str | None, quantization: str | None, facts: Facts, shapes: tuple[tuple[int, int, int], ...]
    ) -> Graph | None:  # fmt: skip
        """The forward as a graph, in which the model attends by itself: where it is to be compiled, and by default on a
        GPU; None, and a warning, where there can't be."""
        device, dtype = self._model.device, self._model.dtype
        if not self._compiles and runs_more(self._model):
            return None  # a recording plays kernels alone
        if not self._compiles and (device.type != "cuda" or attention is not None):
            return None
        if self._compiles and (attention == "tree" or quantization):
            other = "attention='tree'" if attention == "tree" else f"quantization={quantization!r}"
            raise ModelError(f"compile=True and {other} don't go together for {facts.name}")
        from tokentree.engines.gpu.graph import Graph  # few need what it imports

        graph = Graph(self._model, facts.windows, self._noted, self._compiles)
        if not graph.works(KVLayout(shapes, dtype, device, fixed=True)):
            return None
        self.attention, self._attends_itself = "sdpa", True
        return graph

    def _state(self, program: Program, facts: Facts) -> dict[str, Any] | None:
        """What `ready.ReadyEngine` is made of the next time."""
        llama = program.llama.state()
        return llama and {"facts": asdict(facts), "settings": settings_of(self.config), "llama": llama}


def _shapes(found: dict[str, torch.Tensor]) -> tuple[tuple[int, int, int], ...]:
    return tuple((heads, keys, values) for heads, keys, values in found["shapes"].tolist())


def _packing(model: PreTrainedModel, quantization: str | None, file: Path | None, kept: Place | None) -> Packing:
    kind = QuantizedLinear if quantization else PackedLinear

    def make() -> Packing:
        return GgufPacking(model, file) if quantization == "gguf" and file else Packing(kind)

    return make() if kept is None else KeptPacking(kind, make, model, kept)
