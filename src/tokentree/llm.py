"""Text in, text out."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tokentree.acceptance import acceptance
from tokentree.beam import BeamDecoder
from tokentree.chat import chat_ids, read_messages
from tokentree.costs import cost_curve
from tokentree.decoder import Decoder, Watcher
from tokentree.drafters.base import Parts
from tokentree.drafters.names import REGISTRY
from tokentree.engines.base import Branches, Engine, EngineOptions
from tokentree.engines.support import check_quantization
from tokentree.engines.transformers_engine import TransformersEngine
from tokentree.errors import DeadEnd, ModelError, OptionError, PromptError
from tokentree.exclusive import neutral
from tokentree.gguf.header import is_gguf
from tokentree.grammars.compiler import Grammars
from tokentree.inputs import Prompt, Read, read_prompts
from tokentree.kernels.threads import check_fork, set_threads
from tokentree.loading import pick_device
from tokentree.making import draft_engines_of, fingerprint_of, folder_of, kv_bytes_of, prefill_rows_of, tokenizer_of
from tokentree.metrics import Metrics
from tokentree.options import (
    Model,
    check_attention,
    check_callable,
    check_placed,
    folder_in,
    heads_in,
    megabytes,
    model_in,
    models_in,
    one_spelling,
    params_in,
    shape_of,
    tokenizer_in,
    whole_number,
)
from tokentree.pieces import Piece, Pieces
from tokentree.progress import token_bar
from tokentree.registry import Named, check_engine, check_names, make_drafter, make_engine, usable
from tokentree.result import Result
from tokentree.sampling import SamplingParams, check_vocabulary, seeded_noise
from tokentree.scheduler import Scheduler, fail
from tokentree.sequence import Accepted, Sequence, TokenLogprobs
from tokentree.shapes import Cost, CostCurve, Shape
from tokentree.sharing import Events, Shared
from tokentree.stream import Stream
from tokentree.text import Detokenizer
from tokentree.uncollected import uncollected
from tokentree.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

__all__ = ["LLM", "Model", "Piece", "Prompt", "Result", "Stream", "shape_of"]


@dataclass(frozen=True)
class _Way:
    """How an `LLM` was asked to decode; None is the default."""

    drafter: Named = None
    shape: str | Shape | None = None
    accept: str = "match"
    watch: Watcher | None = None


class LLM:
    """A target model, a drafter and the loop.

    Several threads may use an `LLM`, its twins (`using`, `plain`) and its streams at the same time. Their requests to
    one `LLM` share forwards. Steps of twins take turns. A text doesn't depend on other requests. In a process that was
    forked after a model was used, no model can be used.

    Args:
        model: a hub name, a folder of safetensors, a GGUF file, or a loaded transformers model, also one that peft
            wraps. A loaded model isn't changed. Its adapters, hooks and replaced forwards are run. If it changes later,
            the next request is refused: make a new `LLM` of it. Leave it out if ``engine`` needs no model.
        drafter: a name from the registry, a list of names to be merged, or a `Drafter`. Options may follow a name, as
            in ``draft_model:vocabulary=tli``. The default is ``draft_model`` if there are draft models and no heads.
            Otherwise it is all lookups, draft models and heads, merged; without these, the lookups and the model's own
            layers for multi-token prediction (``mtp``), if its folder has any.
        draft_model: one draft model or several. Several are merged into one tree. Its tokenizer may be another one
            (see `drafters.other_tokenizer`). A loaded model whose tokenizer isn't known is taken to have the target's.
            One whose configuration says so guesses several tokens at once (see `drafters.pard`).
        engine: an engine (`tokentree.engines.base.Engine`), or the name of one, which is made of ``model`` and the
            options below. Installed packages may add names. The default is ``torch``: see `TorchEngine`.
        heads: a folder with Medusa, EAGLE or block heads, or a Gemma 4 assistant, for this model.
        shape: how trees grow, see `tokentree.shapes.shape`. ``choices`` is the static tree that is stored beside heads.
        accept: ``match``, ``rejection``, ``block`` or ``traversal`` (all lossless), ``best_path`` or ``typical`` (both
            lossy).
        dtype: ``float32``, ``bfloat16`` or ``float16``. The default is bfloat16 on CPUs, and the checkpoint's type
            elsewhere.
        device: by default the first GPU, if there is one.
        attention, quantization, compile: see `TorchEngine`. They apply to draft models too.
        tokenizer: a tokenizer, its name, or a processor that has one. By default the one that comes with the model.
        max_batch: the largest number of sequences of one call that are decoded together.
        prefill_rows: the number of prompt tokens in a step that decodes texts too. These texts wait so much longer. By
            default 64 on CPUs, and 512 elsewhere. A step that decodes no text reads four times as many.
        kv_mb: memory for the KV of texts that are decoded, in megabytes. When it is full, the youngest text waits, and
            is read again later. By default half of the machine's memory, or nine tenths of a GPU's free memory. It
            counts the target's KV of this `LLM` alone: beams, draft models and twins need memory beside it.
        threads: CPU threads, as ``torch.set_num_threads`` sets them for the whole process. Texts don't depend on them.
        prefix_mb: the size of each engine's prefix cache in megabytes. It holds KV of finished texts. A text that
            begins alike (the next turn of a chat, the same instructions) reuses it.
        lookup_mb: memory for what look-ups learn from finished texts, in megabytes. When it is full, the older half is
            forgotten; for that moment it takes half as much again. Each twin has as much for itself.
        memory: a folder with what drafters learnt earlier, see `save_memory`. It need not exist.
        speculative_model, speculative_config: another spelling of ``draft_model`` and ``shape``:
            ``{"mode": "tree", "depth": 3, "branching_factor": 2}`` or ``{"num_speculative_tokens": 4}``.
        watch: called after each step, see `Decoder`.

    Raises:
        OptionError, ModelError, PairingError: each is a `ValueError` whose message is one sentence.
    """

    @neutral()
    def __init__(
        self,
        model: Model | None = None,
        drafter: Named = None,
        draft_model: Model | SequenceOf[Model] | None = None,
        shape: str | Shape | None = None,
        accept: str = "match",
        *,
        engine: Engine | str | None = None,
        heads: str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        attention: str | None = None,
        quantization: str | None = None,
        compile: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_batch: int = 8,
        prefill_rows: int | None = None,
        kv_mb: float | None = None,
        threads: int | None = None,
        prefix_mb: int = 256,
        lookup_mb: int = 512,
        memory: str | Path | None = None,
        speculative_model: Model | None = None,
        speculative_config: dict[str, Any] | None = None,
        watch: Watcher | None = None,
    ) -> None:
        draft_model, shape = one_spelling(draft_model, shape, speculative_model, speculative_config)
        check_fork()
        set_threads(threads)
        # what is cheap to tell is told before anything is loaded
        if model is not None:
            model = model_in(model)
        elif engine is None:
            raise ModelError("there is no model: give one, or an engine")
        drafts, batch, prefix_bytes = (
            models_in(draft_model), whole_number(max_batch, "max_batch", 1), megabytes(prefix_mb, "prefix_mb"),
        )  # fmt: skip
        lookup_bytes = megabytes(lookup_mb, "lookup_mb")
        rows = None if prefill_rows is None else whole_number(prefill_rows, "prefill_rows", 1)
        kv_bytes = None if kv_mb is None else megabytes(kv_mb, "kv_mb")
        check_placed("" if model is None else model, dtype, device)
        check_attention(attention)
        check_callable(watch, "watch")
        if not isinstance(compile, bool):
            raise OptionError(f"compile={compile!r} is neither True nor False")
        known, heads = folder_in(memory, "memory"), heads_in(heads)
        acceptance(accept)
        shape_of(shape, drafter, heads)
        check_names(drafter)
        for one in (model, *drafts):
            check_quantization(quantization, isinstance(one, str | Path) and is_gguf(one))
        asked: dict[str, Any] = {"dtype": dtype, "device": device, "attention": attention, "quantization": quantization}
        asked |= {"compile": compile or None}
        check_engine(engine, {"model": model} | ({} if drafts else asked))  # else they are for the draft models
        place = pick_device(device) if model is None or isinstance(model, str | Path) else model.device
        options = EngineOptions(dtype, place, attention, quantization, compile, prefix_bytes)
        own_tokenizer = tokenizer_in(tokenizer)
        # before the engine: while it is read it takes memory that weights take afterwards
        self.tokenizer = tokenizer_of(model) if own_tokenizer is None and model is not None else own_tokenizer
        self.engine, self.max_batch = make_engine(engine, model, options), batch
        self._grammars = Grammars(self.tokenizer)
        given = draft_engines_of(drafts, self.engine, self.tokenizer, options)
        made_for = fingerprint_of(self.engine, self.tokenizer, heads)
        self._parts = Parts(
            self.engine, given.engines, heads, made_for, lookup_bytes, vocabularies=given.vocabularies,
            masks=given.masks, folder=folder_of(model),
        )  # fmt: skip
        self._curve: CostCurve | None = None
        self._way = _Way(drafter, shape, accept, watch)
        self._limits: dict[str, Any] = {
            "prefill_rows": prefill_rows_of(self.engine, rows),
            "kv_bytes": kv_bytes_of(self.engine, kv_bytes),
        }
        self._make_decoder()
        if known is not None and known.is_dir():
            self.decoder.drafter.load(known)

    @property
    def config(self) -> PreTrainedConfig:
        """The target's configuration.

        Raises:
            ModelError: if the engine runs no transformers model.
        """
        config: PreTrainedConfig | None = getattr(self.engine, "config", None)
        if config is None:
            raise ModelError(f"{self.engine.info.name} has no configuration of transformers")
        return config

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text: those of the model's generation configuration, as in transformers' ``generate``.
        A change of a loaded model's configuration applies to later requests.

        Raises:
            ModelError: if the generation configuration names something that isn't a token.
        """
        ends, vocab_size = self.engine.info.ends, self.engine.vocab_size
        return frozenset(token for token in ends if 0 <= token < vocab_size)  # some write -1 for none

    @property
    def engines(self) -> list[TransformersEngine]:
        """The engines of the target and of the draft models."""
        parts = [self.engine, *(engine for _, engine in self._parts.draft_engines)]
        return [engine for engine in parts if isinstance(engine, TransformersEngine)]

    @property
    def drafters(self) -> list[str]:
        """The names of the drafters that this model can use: ours, and those of installed packages."""
        return [*usable(self._parts), *REGISTRY.installed()]

    # -- other ways to decode with the same model -----------------------------------------------------------------

    def using(
        self,
        drafter: Named = None,
        shape: str | Shape | None = None,
        accept: str | None = None,
        watch: Watcher | None = None,
        heads: str | Path | None = None,
    ) -> LLM:
        """An `LLM` with the same target and draft models, and another drafter, shape, rule, watcher or heads.

        An argument that is None keeps what this `LLM` has. The two don't share what drafters learn, except where
        ``drafter`` is a `Drafter`.

        Raises:
            OptionError, PairingError, ModelError: as for the constructor.
        """
        check_names(drafter)
        check_callable(watch, "watch")
        now = self._way
        with self.engine.lock:  # while nobody's steps change it
            kept = copy.deepcopy(now.shape) if shape is None else shape
        way = _Way(
            now.drafter if drafter is None else drafter, kept, now.accept if accept is None else accept,
            now.watch if watch is None else watch,
        )  # fmt: skip
        parts, folder = self._parts, heads_in(heads)
        if folder is not None:
            parts = replace(parts, heads=folder, fingerprint=fingerprint_of(self.engine, self.tokenizer, folder))
        return self._twin(way, parts)

    def plain(self) -> LLM:
        """An `LLM` with the same model that decodes plainly: one token per forward, rule ``match``, no watcher."""
        return self._twin(_Way("none"), self._parts)

    def _twin(self, way: _Way, parts: Parts) -> LLM:
        twin = object.__new__(LLM)
        twin.__dict__.update(self.__dict__)
        twin._way, twin._parts = way, parts
        with self.engine.lock:  # hidden states are asked for, or costs measured, while nobody decodes
            twin._make_decoder()
        return twin

    @uncollected
    def _make_decoder(self) -> None:
        """The loop, as it was asked for, and who shares its steps."""
        way, parts = self._way, self._parts
        rule, form = acceptance(way.accept), shape_of(way.shape, way.drafter, parts.heads)
        drafter = make_drafter(way.drafter, replace(parts, draws_children=rule.draws_children))
        self.decoder = Decoder(self.engine, drafter, self._priced(form), rule, way.watch)
        self._shared = Shared(self.scheduler())

    def scheduler(self, max_batch: int | None = None) -> Scheduler:
        """A new `Scheduler` for this model, for programs that make the steps themselves."""
        return Scheduler(self.decoder, max_batch=max_batch, **self._limits)

    def save_memory(self, folder: str | Path) -> None:
        """Writes what the drafters learnt from all requests into ``folder``, for ``LLM(..., memory=folder)``.

        Raises:
            OptionError: if the folder can't be written.
        """
        path = folder_in(folder, "folder")
        if path is None:
            raise OptionError("folder=None is not a folder: name one")
        try:
            path.mkdir(parents=True, exist_ok=True)
            with self.engine.lock:
                self.decoder.drafter.save(path)
        except (OSError, SafetensorError) as error:
            said = getattr(error, "strerror", None) or str(error)
            raise OptionError(f"can't write to the folder {str(folder)!r}: {said}") from None

    def merge_memory(self, folder: str | Path) -> None:
        """Adds what another `LLM` of the same model wrote by `save_memory`, as far as it isn't known here. Requests may
        be under way: they wait for a part of it at most.

        Raises:
            OptionError: if a file is damaged, or belongs to a model with another vocabulary.
        """
        path = folder_in(folder, "folder")
        if path is None:
            raise OptionError("folder=None is not a folder: name one")
        for part in self.decoder.drafter.merging(path):
            with self.engine.lock:
                part()

    def _priced(self, form: Shape) -> Shape:
        """A `Cost` shape is given what a forward costs here, measured when one needs it for the first time."""
        if isinstance(form, Cost) and not form.measured:
            if self._curve is None:
                self._curve = cost_curve(self.engine)
            form.use_curve(self._curve)
        return form

    # -- decoding --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        reference: Prompt | Iterable[Prompt] | None = None,
        progress: bool = False,
    ) -> list[Result]:
        """Decodes every prompt, `max_batch` at a time.

        Args:
            prompts: one prompt or several. A prompt is a text, a list or an array of token ids, a list of messages, or
                what a tokenizer returned; see `inputs.read_prompts`.
            params: options for all prompts, or a list with options for each.
            reference: texts that outputs may copy from, such as retrieved documents or a file that is edited. Lookups
                search them. The model doesn't see them.
            progress: whether to show a progress bar.

        Returns:
            The results in the order of the prompts. A prompt has ``params.n`` results (samples), or
            ``params.num_return_sequences`` (beams), in a row. A request that fails doesn't affect the others. Its
            result has the finish reason "error" and an `error`. It may fail at once (an empty or too long prompt,
            options that the model can't honour), or later (its rules, or a step).

        Raises:
            PromptError, OptionError: before decoding, if the arguments aren't prompts or options.
            PromptError, OptionError, RequestError, ModelError, StepError: the first request's error, if all requests
                failed.
        """
        requests = self.requests(prompts, params, reference)
        seqs = [request for request in requests if isinstance(request, Sequence)]
        with token_bar(seqs, progress) as advance:
            for _ in self.run(seq for seq in seqs if seq.params.num_beams == 1):
                advance()
            results = [one for request in requests for one in self._results(request, advance)]
        if results and all(one.error is not None for one in results):
            raise results[0].error  # type: ignore[misc]
        return results

    def requests(self, prompts: Any, params: Any = None, reference: Any = None) -> list[Sequence | Result]:
        """The requests that `generate` makes of the same arguments, one for each prompt and sample. Instead of a
        request that can't begin there are its results."""
        texts, given = self._references(reference), read_prompts(prompts)
        return [
            request
            for prompt, one in zip(given, params_in(params, len(given)), strict=True)
            for request in self._requests(prompt, one, texts)
        ]

    def run(self, seqs: Iterable[Sequence], max_batch: int | None = None) -> Generator[Events]:
        """Decodes ``seqs``, at most `max_batch` of them at a time. Yields their events after each step. Requests of
        other threads to this `LLM` take part in the same steps."""
        return self._shared.run(seqs, self.max_batch if max_batch is None else max_batch)

    def _requests(
        self, prompt: Read, params: SamplingParams, references: SequenceOf[list[int]]
    ) -> list[Sequence] | list[Result]:  # fmt: skip
        """The samples of one prompt, ready for the decoder; or its results, if something is wrong with it."""
        try:
            return [self.sequence(prompt, params, sample, references) for sample in range(params.n)]
        except (PromptError, OptionError) as error:
            ids = prompt if isinstance(prompt, list) else []
            none = None if params.logprobs is None else list[TokenLogprobs]()
            failed = Result("", [], "error", none, Metrics(), ids, error=error)
            return [failed] * (params.n * params.num_return_sequences)

    def _results(self, seq: Sequence | Result, advance: Callable[[], None]) -> list[Result]:
        """What ``seq`` came to; with beam search, the texts that are found now."""
        if isinstance(seq, Result):
            return [seq]
        if seq.params.num_beams == 1:
            return [self.result(seq)]
        count = seq.params.num_return_sequences
        try:
            assert isinstance(self.engine, Branches)  # as `sequence` has seen
            search = BeamDecoder(self.engine, self.decoder.drafter, self.decoder.shape).run(seq, advance)
        except Exception as error:  # noqa: BLE001  as in a step that it shares with nobody
            fail(seq, error)
            return [self.result(seq)] * count
        results = []
        for found in search.best(count):
            text = None if seq.detokenizer is None else self.detokenizer()
            one = replace(seq, detokenizer=text, metrics=Metrics())
            one.extend(Accepted([], found.tokens, finish_reason=search.reason(found.tokens)))
            results.append(replace(self.result(one), score=found.score, metrics=seq.metrics))
        if len(results) < count:
            none = DeadEnd(f"the request's rules leave {len(results)} texts, and {count} were asked for")
            seq.finish_reason, seq.error = "error", none
        return results + [self.result(seq)] * (count - len(results))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *,
        reference: Prompt | Iterable[Prompt] | None = None,
    ) -> Stream:  # fmt: skip
        """Decodes one prompt and yields its tokens as they come. Iterate over the stream, then read its `result`.

        If the request's rules fail, the iteration raises the `RequestError` behind the last token.

        Raises:
            OptionError: for beam search, whose text is known only at its end, and for several samples.
            PromptError: as `generate`.
        """
        return Stream(self, self.streamed(prompt, params, reference))

    def streamed(self, prompt: Prompt, params: SamplingParams | None, reference: Any) -> Sequence:
        """The request that `stream` makes of the same arguments."""
        one = params_in(params, 1)[0]
        if one.num_beams > 1:
            raise OptionError("with num_beams the text is certain only at its end: use generate")
        if one.n > 1:
            raise OptionError(f"a stream is one text, and n={one.n} asks for several: use generate")
        return self.sequence(prompt, one, 0, self._references(reference))

    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        reference: Prompt | Iterable[Prompt] | None = None,
    ) -> Result:
        """The model's answer to ``[{"role": "user", "content": "…"}, …]``.

        Raises:
            PromptError: if these are no messages, or the chat template is missing or refuses them.
            RequestError: as `generate`.
        """
        return self.generate([self.chat_prompt(messages)], params, reference=reference)[0]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, as `generate` has them.

        Raises:
            PromptError: as `generate`, but for its length.
        """
        return self._vocabulary.ids(prompt, "prompt")

    def chat_prompt(
        self, messages: SequenceOf[Mapping[str, Any]], tools: SequenceOf[Mapping[str, Any]] = ()
    ) -> list[int]:
        """The token ids of ``messages`` in the tokenizer's chat template, with the beginning of the model's answer.

        Args:
            tools: what the model may call, ``{"type": "function", "function": {"name", "description", "parameters"}}``
                each; the template tells it of them.

        Raises:
            PromptError: if ``messages`` aren't messages whose contents are texts, or lists of parts that are texts; or
                if there is no chat template, or it refuses them.
        """
        return chat_ids(self.tokenizer, read_messages(messages), tools)

    def sequence(
        self, prompt: Prompt | Read, params: SamplingParams, sample: int = 0,
        references: SequenceOf[list[int]] = (),
    ) -> Sequence:  # fmt: skip
        """A request for the decoder. All checks of a request are made here.

        Raises:
            PromptError, OptionError: as `generate`.
        """
        ids = self._vocabulary.ids(prompt, "prompt")
        if params.stop and self.tokenizer is None:
            raise PromptError("stop strings need a tokenizer: pass tokenizer=, or use stop_token_ids")
        if params.num_beams > 1 and not isinstance(self.engine, Branches):
            raise OptionError(f"{self.engine.info.name} keeps no branches of a text, which num_beams needs")
        if params.prompt_logprobs is not None and not self.engine.info.scores_prompts:
            said = f"{self.engine.info.name} gives no logits of prompts here, which prompt_logprobs needs"
            raise OptionError(said, "prompt_logprobs")
        check_vocabulary(params, self.engine.vocab_size)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        detokenizer = self.detokenizer() if params.stop else None
        noise = seeded_noise(seed, sample)
        guide = None
        if params.structured_outputs is not None:
            guide = self._grammars.guide(params.structured_outputs, self.eos_ids, params.stop_token_ids)
        context = self.engine.context
        return Sequence(ids, params, noise, context, self.eos_ids, detokenizer, references=references, guide=guide)

    def prepare_grammars(self) -> None:
        """Reads the tokenizer for `StructuredOutputs`, which the first of them waits for otherwise.

        Raises:
            OptionError: if there can be none with this model.
        """
        self._grammars.prepare()

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.engine.vocab_size)

    def _references(self, reference: Any) -> list[list[int]]:
        texts = [] if reference is None else read_prompts(reference, "reference")
        return [self._vocabulary.ids(text, "reference") for text in texts]

    def detokenizer(self, exact: bool = False) -> Detokenizer:
        """A new object that turns tokens into text as they come.

        Args:
            exact: whether to hold back text that later tokens may change, see `Detokenizer`. The search for stop
                strings doesn't need that.

        Raises:
            PromptError: without a tokenizer.
        """
        return self._vocabulary.detokenizer(exact)

    def pieces(self, seq: Sequence) -> Pieces:
        """A new object that turns the events of ``seq`` into pieces."""
        return Pieces(seq, None if self.tokenizer is None else self.detokenizer(exact=True))

    def result(self, seq: Sequence) -> Result:
        """The result of ``seq`` so far. Another thread may be decoding it."""
        text, reason, ids = "", seq.finish_reason or "interrupted", seq.output_ids
        if seq.text_end is not None and seq.detokenizer is not None:
            whole = seq.detokenizer.copy()
            whole.finish()
            text = whole.text[: seq.text_end]
        elif self.tokenizer is not None:
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        logprobs = seq.logprobs[: len(ids)] if seq.params.logprobs is not None else None
        scored = list(seq.prompt_logprobs) if seq.params.prompt_logprobs is not None else None
        return Result(
            text, ids, reason, logprobs, seq.metrics, seq.prompt_ids, error=seq.error, prompt_logprobs=scored
        )  # fmt: skip
