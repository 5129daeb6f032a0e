"""The engine for transformers' decoder-only models, through their own forward."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from tokentree.engines.attention import ForwardKV, Segment, Upto, dense_mask, tree_attention
from tokentree.engines.base import KEPT, DraftEngine, Features, TargetOutput
from tokentree.engines.kept import KeptPacking, Place
from tokentree.engines.kv import KVLayout, SequenceKV, Storages
from tokentree.engines.linear import PackedLinear, weights_of
from tokentree.engines.packing import GgufPacking, Packing
from tokentree.engines.prefix import PrefixCache
from tokentree.engines.prepare import pack, private_copy, steady_activations
from tokentree.engines.program import Program
from tokentree.engines.proof import in_trees, own_forward
from tokentree.engines.quantized import QuantizedLinear, draft_linear
from tokentree.engines.support import (
    check_quantization,
    check_supported,
    context_length,
    decoder_layers,
    has_softcap,
    layer_windows,
)
from tokentree.errors import ModelError, PairingError
from tokentree.sequence import Sequence
from tokentree.top import top_logits
from tokentree.tree import Ints, TokenTree

if TYPE_CHECKING:
    from tokentree.engines.graph import Graph
    from tokentree.heads.eagle import EagleHead

AttentionInterface.register("tokentree", tree_attention)

PREFILL_ROWS = 256


class TorchEngine:
    """Verifies trees on a transformers model, on CPU or CUDA.

    The rows of all sequences go through the model as one batch row, without padding; only attention tells them apart.

    Args:
        model: a decoder-only model; it is not changed.
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

    def __init__(
        self, model: PreTrainedModel, attention: str | None = None, owns_model: bool = False,
        quantization: str | None = None, prefix_bytes: int = 0, file: Path | None = None, kept: Place | None = None,
        compile: bool = False,
    ) -> None:  # fmt: skip
        check_supported(model)
        check_quantization(quantization, model, file)
        self.device, self.dtype, self.quantization = model.device, model.dtype, quantization
        config = model.config.get_text_config()
        self.context = context_length(config)
        self.attention = attention or self._best_attention(model)
        self._attends_itself = self.attention == "sdpa"
        fits = self._best_attention(model) == "tree"
        if self.attention not in ("tree", "sdpa") or (self.attention == "tree" and not fits):
            raise ModelError(f"attention={attention!r} can't be used with {type(model).__name__}: use attention='sdpa'")

        own_attention = "sdpa" if getattr(type(model), "_supports_sdpa", False) and not has_softcap(config) else "eager"
        self._model = private_copy(model, own_attention)
        self._windows = layer_windows(config)
        self._keeps_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        packing = self._packing(file, kept) if self.device.type == "cpu" else None
        reference = self._reference(packing)
        expected, shapes = reference["logits"], tuple(tuple(shape) for shape in reference["shapes"].tolist())
        whole = packing is not None and not self._attends_itself and Program.fits(self._model, packing)
        self._noted: dict[int, torch.Tensor] = {}  # of the last forward of `_model`, [rows, hidden size]
        self._compiles = compile and not whole
        self._graph = None if whole else self._graph_for(attention, shapes)
        self._storages = Storages(self._layout_for(shapes))
        self._program: Program | None = None
        if packing is not None and self._graph is None:
            self._program = pack(self._model, packing, owns_model, whole)
            packing.keep()
        # On a CPU a product of fewer than four rows takes other code paths, whose bits differ, and is no faster.
        self._min_rows = 4 if self.device.type == "cpu" and self._program is None else 1
        if not self._attends_itself:
            self._model.config._attn_implementation = "tokentree"
            if self.device.type == "cpu":
                steady_activations(self._model)
        self._places: list[int] = []  # of the hidden states that are kept
        self._kv: dict[int, tuple[Sequence, SequenceKV]] = {}
        self._branches: dict[int, tuple[Sequence, list[int]]] = {}
        self._prefixes = PrefixCache(prefix_bytes)
        self._hidden_size, self._num_layers = int(config.hidden_size), int(config.num_hidden_layers)
        sizes = (config.num_hidden_layers, config.hidden_size, config.vocab_size)
        self._model_size = f"{type(model).__name__} {'x'.join(map(str, sizes))}"
        self.vocab_size = expected.shape[1]
        for rows in (1, 2):  # compiled before any request waits for it
            top_logits(expected[:rows], min(KEPT, self.vocab_size))
        try:
            self._check_tree(expected)
        except ModelError:
            if attention is not None or self._attends_itself or self._program:
                raise
            # nobody asked for our attention: let the model attend by itself
            self.attention, self._attends_itself = "sdpa", True
            self._model.config._attn_implementation = own_attention
            self._storages = Storages(self._layout_for(shapes))
            self._check_tree(expected)

    @property
    def signature(self) -> str:
        """What the cost of a forward depends on: model, engine, dtype, device and threads."""
        on_cpu = self.device.type == "cpu"
        device = f"cpu {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name(self.device)
        numbers = self.quantization or str(self.dtype).removeprefix("torch.")
        graph = "one graph" if self._compiles else "one recording"
        form = "one call" if self._program else graph if self._graph else f"{self.attention} attention"
        return f"{self._model_size}, {form}, {numbers}, {device}"

    # -- the protocol ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self, seq: Sequence) -> int:
        reused = 0
        kv = self._kv_of(seq)
        if not kv.length:
            live = [(_ids(other, known), known) for other, known in self._kv.values() if known is not kv]
            reused = self._prefixes.fill(kv, np.array(seq.tokens[:-1]), live)
        self._read(kv, seq.tokens[kv.length : -1])
        return reused

    @torch.inference_mode()
    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None
    ) -> TargetOutput:
        started = time.perf_counter()
        firsts = [0] * len(seqs) if firsts is None else list(firsts)
        segments, starts, start = [], [], 0
        for seq, tree, first in zip(seqs, trees, firsts, strict=True):
            kv = self._kv_of(seq)
            kv.reserve(kv.length + len(tree))
            starts.append(start)
            if first < len(tree):
                segments.append(Segment(kv, tree, first, start))
            start += len(tree) - first
        logits = self._forward(segments, "logits")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        best = None if self._program is None else self._program.best
        return TargetOutput(logits, starts, firsts, time.perf_counter() - started, best)

    @torch.inference_mode()
    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        for seq, path in zip(seqs, paths, strict=True):
            self._kv_of(seq).commit(path)

    @torch.inference_mode()
    def keep(self, seq: Sequence, nodes: SequenceOf[int], committed: int) -> None:
        self._kv_of(seq).keep(nodes, committed)

    def committed(self, seq: Sequence) -> int:
        if seq.id in self._branches:
            of, nodes = self._branches[seq.id]
            return self._kv_of(of).length + len(nodes)
        return self._kv_of(seq).length

    def branch(self, seq: Sequence, of: Sequence, nodes: SequenceOf[int]) -> None:
        self._branches[seq.id] = of, list(nodes)

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        for seq in seqs:
            self._branches.pop(seq.id, None)
            if seq.id in self._kv:
                _, kv = self._kv.pop(seq.id)
                self._storages.give(self._prefixes.keep(_ids(seq, kv), kv))

    def capture(self, places: SequenceOf[int] | None = None) -> Features:
        head = self._model.get_output_embeddings()
        if head is None:
            raise PairingError(f"{type(self._model).__name__} has no output layer, whose inputs heads read")
        size, num_layers = self._hidden_size, self._num_layers
        asked = [num_layers] if places is None else list(places)
        if not all(0 <= place <= num_layers for place in asked):
            raise PairingError(f"{type(self._model).__name__} has hidden states 0 to {num_layers}, not {asked}")
        if new := sorted({*asked} - {*self._places}):
            self._capture(new)

        def weights(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return weights_of(head, ids, size, self.dtype)

        embedding = self._model.get_input_embeddings()
        recorded = self._graph is not None and self.device.type == "cuda"
        return Features(size, num_layers, embedding, head, weights, draft_linear, self.dtype, self.device, recorded)

    def hidden(self, seq: Sequence, place: int | None = None) -> torch.Tensor:
        number = self._places.index(self._num_layers if place is None else place)
        of, nodes = self._branches.get(seq.id, (seq, []))
        kv = self._kv_of(of)
        states = kv.states[number, : kv.length]
        return torch.cat([states, kv.states[number, [kv.length + node for node in nodes]]]) if nodes else states

    def head_engine(self, head: EagleHead) -> DraftEngine:
        from tokentree.engines.eagle import EagleEngine  # few need what it imports

        return EagleEngine(head, self)

    @torch.inference_mode()
    def hidden_states(self, ids: SequenceOf[int], places: SequenceOf[int] | None = None) -> torch.Tensor:
        """[len(ids), places x hidden size]: the hidden states of a text, beside one another, once `capture` was called
        for them."""
        kv = self._storages.layout.make(len(ids))
        self._read(kv, ids)
        picked = [self._places.index(place) for place in ([self._num_layers] if places is None else places)]
        return kv.states[picked, : kv.length].transpose(0, 1).flatten(1)

    @torch.inference_mode()
    def hidden_states_of(
        self, texts: SequenceOf[SequenceOf[int]], places: SequenceOf[int] | None = None
    ) -> list[torch.Tensor]:
        """`hidden_states` of several texts; elsewhere than on a CPU they are read together, by the model's own
        forward."""
        if self.device.type == "cpu":
            return [self.hidden_states(ids, places) for ids in texts]
        picked = [self._num_layers] if places is None else places
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

    @property
    def model(self) -> PreTrainedModel:
        """What it runs, where that is a transformers model that attends by itself.

        Raises:
            ModelError: where it isn't: by default on CPUs.
        """
        if not self._attends_itself:
            raise ModelError("here the model doesn't attend by itself: use attention='sdpa'")
        return self._model

    @property
    def bytes_per_token(self) -> int:
        """Of the KV, with all layers."""
        sizes = [heads * (key_width + value_width) for heads, key_width, value_width in self._storages.layout.shapes]
        return sum(sizes) * self._storages.layout.dtype.itemsize

    # -- one forward -----------------------------------------------------------------------------------------------

    def _kv_of(self, seq: Sequence) -> SequenceKV:
        if seq.id not in self._kv:
            rows = min(len(seq.prompt_ids) + seq.params.max_tokens, self.context)
            self._kv[seq.id] = seq, self._storages.take(rows + 64)
        return self._kv[seq.id][1]

    def _read(self, kv: SequenceKV, ids: SequenceOf[int]) -> None:
        """Commits rows for ``ids``."""
        for begin in range(0, len(ids), PREFILL_ROWS):
            chunk = ids[begin : begin + PREFILL_ROWS]
            kv.reserve(kv.length + len(chunk))
            last = self._num_layers in self._places
            self._forward([Segment(kv, TokenTree.chain(chunk[0], chunk[1:]), 0, 0)], "hidden" if last else "kv")
            kv.commit(range(len(chunk)))

    @torch.inference_mode()
    def _forward(self, segments: SequenceOf[Segment], upto: Upto) -> torch.Tensor:
        """Logits [rows, vocab], of the last row or none if they aren't asked for. Writes KV and hidden states."""
        rows = sum(segment.count for segment in segments)
        padding = max(0, self._min_rows - rows)
        ids = np.concatenate([*(s.tree.tokens[s.first :] for s in segments), np.zeros(padding, np.int64)])
        positions = np.concatenate([*(s.positions for s in segments), np.zeros(padding, np.int64)])
        if self._program is not None:
            logits = self._program.forward(ids, positions, segments, upto)
            self._keep(segments, self._program.states)
            return logits
        if self._graph is not None and upto != "kv" and self._graph.fits(segments):
            logits, states = self._graph.forward(segments)
            self._keep(segments, states if self._places else [])
            return logits
        cache = ForwardKV(segments, self._attends_itself)
        options: dict[str, Any] = {"logits_to_keep": int(upto == "kv")} if self._keeps_logits else {}
        mask: Any = None
        if self._attends_itself:
            by_kind = {
                kind: dense_mask(segments, rows + padding, window, self.dtype, self.device)
                for kind, window in self._windows.items()
            }
            mask = by_kind if len(by_kind) > 1 else next(iter(by_kind.values()))
        else:
            options["forward_kv"] = cache
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
            self._noted[self._num_layers] = self._graph.head_input()
        self._keep(segments, [self._noted[place] for place in self._places])
        said: torch.Tensor = out.logits[0]
        return said if upto == "kv" else said[:rows]

    def _keep(self, segments: SequenceOf[Segment], states: torch.Tensor | SequenceOf[torch.Tensor]) -> None:
        """Puts hidden states [rows, hidden size] of each place beside the KV of their rows."""
        for segment in segments if len(states) else ():
            first = segment.prefix + segment.first
            for kept, rows in zip(segment.kv.states, states, strict=True):
                kept[first : first + segment.count] = rows[segment.start : segment.start + segment.count]

    def _capture(self, places: list[int]) -> None:
        """Keeps the hidden states ``places``, from now on."""
        if self._kv:
            raise PairingError("hidden states can't be asked for while texts are being decoded")
        if self._graph is not None and self._compiles and places != [self._num_layers]:
            raise PairingError("with compile=True, only the last hidden state is there: leave it out")
        self._prefixes.clear()
        self._places = sorted([*self._places, *places])
        if self._program is not None:
            self._program.capture(self._places)
        for place in places if self._program is None and (self._graph is None or not self._compiles) else ():
            last = place == self._num_layers
            module = self._model.get_output_embeddings() if last else decoder_layers(self._model)[place]
            module.register_forward_pre_hook(functools.partial(self._note, place), with_kwargs=True)
        if self._graph is not None:
            self._graph.recordings.forget()
        layout = replace(
            self._storages.layout, states=len(self._places), width=self._hidden_size, state_dtype=self.dtype
        )
        self._storages = Storages(layout)

    def _note(self, place: int, module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keeps what a module is given."""
        self._noted[place] = (inputs[0] if inputs else named["hidden_states"])[0]

    # -- at construction -------------------------------------------------------------------------------------------

    def _reference(self, packing: Packing | None) -> dict[str, torch.Tensor]:
        """What the model says by itself; where packed weights are kept, what it said when they were packed."""
        if packing is None:
            return own_forward(self._model)
        return packing.recall("own forward", lambda: own_forward(self._model))

    def _packing(self, file: Path | None, kept: Place | None) -> Packing:
        kind = QuantizedLinear if self.quantization else PackedLinear

        def make() -> Packing:
            return GgufPacking(self._model, file) if self.quantization == "gguf" and file else Packing(kind)

        return make() if kept is None else KeptPacking(kind, make, self._model, kept)

    @staticmethod
    def _best_attention(model: PreTrainedModel) -> str:
        return "tree" if model.device.type == "cpu" and _uses_interface(model) else "sdpa"

    def _layout_for(self, shapes: tuple[tuple[int, int, int], ...]) -> KVLayout:
        if self._attends_itself:
            return KVLayout(shapes, self.dtype, self.device, fixed=self._graph is not None)
        return KVLayout(shapes, torch.float32, self.device, blocked=True)

    def _graph_for(self, attention: str | None, shapes: tuple[tuple[int, int, int], ...]) -> Graph | None:
        """The forward as a graph, in which the model attends by itself: where it is to be compiled, and by default on a
        GPU; None, and a warning, where there can't be."""
        if not self._compiles and (self.device.type != "cuda" or attention is not None):
            return None
        if self._compiles and (attention == "tree" or self.quantization):
            other = "attention='tree'" if attention == "tree" else f"quantization={self.quantization!r}"
            raise ModelError(f"compile=True and {other} don't go together for {type(self._model).__name__}")
        from tokentree.engines.graph import Graph  # few need what it imports

        graph = Graph(self._model, self._windows, self._noted, self._compiles)
        if not graph.works(KVLayout(shapes, self.dtype, self.device, fixed=True)):
            return None
        self.attention, self._attends_itself = "sdpa", True
        return graph

    @torch.inference_mode()
    def _check_tree(self, expected: torch.Tensor) -> None:
        """Raises `ModelError` unless trees give ``expected``, what the model says by itself."""
        got, windows = in_trees(
            self._model, lambda segment: self._forward([segment], "logits"), self._storages.layout.make(64)
        )
        error, spread = float((got - expected).square().mean().sqrt()), float(expected.float().std())
        few_bits = 0.3 if self.quantization else 0.1
        if not error <= (0.001 if self.dtype in (torch.float32, torch.float64) else few_bits) * spread:
            way_out = "trees can't be verified with it" if self._attends_itself else "use attention='sdpa'"
            raise ModelError(
                f"{type(self._model).__name__} does not give the same logits under a tree attention mask "
                f"(off by {error:.3g} where logits spread by {spread:.3g}): {way_out}"
            )
        if not self._attends_itself and windows != set(self._windows.values()):
            raise ModelError(
                f"{type(self._model).__name__} does not tell its attention of the sliding window that its "
                "configuration has: use attention='sdpa'"
            )


def _ids(seq: Sequence, kv: SequenceKV) -> Ints:
    """The tokens of the committed rows."""
    return np.array(seq.tokens[: kv.length], np.int64)


def _uses_interface(model: PreTrainedModel) -> bool:
    return bool(getattr(type(model), "_supports_attention_backend", False))
