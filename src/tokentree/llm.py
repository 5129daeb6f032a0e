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
from tokentree.engines.base import Branches, Engine, EngineOptions, TransformersEngine
from tokentree.engines.support import check_quantization
from tokentree.errors import DeadEnd, ModelError, OptionError, PromptError, RequestError
from tokentree.exclusive import neutral
from tokentree.gguf.header import is_gguf
from tokentree.inputs import Prompt, Read, read_prompts
from tokentree.kernels.threads import check_fork, set_threads
from tokentree.loading import pick_device
from tokentree.making import draft_engines_of, end_ids, fingerprint_of, kv_bytes_of, prefill_rows_of, tokenizer_of
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
    params_in,
    shape_in,
    shape_of,
    tokenizer_in,
    whole_number,
)
from tokentree.pieces import Piece, Pieces
from tokentree.progress import token_bar
from tokentree.registry import Named, check_engine, check_names, make_drafter, make_engine
from tokentree.result import Result
from tokentree.sampling import SamplingParams, check_vocabulary, seeded_noise
from tokentree.scheduler import Scheduler
from tokentree.sequence import Accepted, Sequence, TokenLogprobs
from tokentree.shapes import Cost, CostCurve, Shape
from tokentree.sharing import Events, Shared
from tokentree.stream import Stream
from tokentree.text import Detokenizer
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

    Any number of threads may use one at once, with its twins (`using`, `plain`) and streams. What they ask of one `LLM`
    shares forwards, and the steps of twins take turns; each text is the one that is written alone. A process that is
    forked after a model was used can't use any.

    Args:
        model: a hub name, a folder of safetensors, a GGUF file, or a loaded transformers model (which stays as it is,
            also in peft's wrapping). What was put into a loaded one is run: adapters, hooks, replaced forwards. If it
            changes later, the next request is refused: make a new `LLM` of it. Left out where ``engine`` needs none.
        drafter: a name from the registry, a list of names to be merged, or a `Drafter`. Without one, ``draft_model`` if
            draft models are given and no heads; otherwise all that is given and all lookups, merged.
        draft_model: one draft model or several (merged into one tree).
        engine: an engine that is made already (`tokentree.engines.base.Engine`), or the name of one, such as an
            installed package adds, which is made of ``model`` and the options below. By default ``torch``: see
            `TorchEngine`.
        heads: a folder with Medusa or EAGLE heads for this model.
        shape: how trees grow: see `tokentree.shapes.shape`; or ``choices``, the static tree that is kept beside heads.
        accept: ``match`` or ``rejection`` (both lossless), ``best_path`` or ``typical`` (both lossy).
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default the checkpoint's, and bfloat16 on CPUs that compute
            in it.
        device: by default the first GPU, if there is one.
        attention, quantization, compile: see `TorchEngine`; they hold for draft models too.
        tokenizer: by default the one that comes with the model. A name will do, and a processor that has one.
        max_batch: most sequences of one call that are decoded together.
        prefill_rows: tokens of prompts that are read in one step beside texts that are decoded: what these wait for. By
            default 64 on CPUs, and 512 elsewhere. Where no text is decoded, a step reads four times as many.
        kv_mb: megabytes for the KV of texts that are decoded. When they are full, the youngest text waits, and is read
            again later. By default half of the machine's memory, or nine tenths of what a GPU has left.
        threads: CPU threads; the same as ``torch.set_num_threads``, which sets them for all that torch computes. No
            text depends on how many there are.
        prefix_mb: megabytes of KV of finished texts that each engine keeps, so that a text that begins alike (the next
            turn of a chat, the same instructions) need not be read again.
        memory: a folder with what drafters learnt earlier, see `save_memory`; one that isn't there is no mistake.
        speculative_model, speculative_config: another spelling of ``draft_model`` and ``shape``:
            ``{"mode": "tree", "depth": 3, "branching_factor": 2}`` or ``{"num_speculative_tokens": 4}``.
        watch: called after each step, see `Decoder`.

    Raises:
        OptionError, ModelError, PairingError: all `ValueError`, each with one sentence that says what is wrong.
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
        memory: str | Path | None = None,
        speculative_model: Model | None = None,
        speculative_config: dict[str, Any] | None = None,
        watch: Watcher | None = None,
    ) -> None:
        if speculative_model is not None:
            if draft_model is not None:
                raise OptionError("speculative_model is another word for draft_model: give one of them")
            draft_model = speculative_model
        if speculative_config is not None:
            if shape is not None:
                raise OptionError("speculative_config says what shape says: give one of them")
            shape = shape_in(speculative_config)
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
        self.engine, self.max_batch = make_engine(engine, model, options), batch
        self.tokenizer = tokenizer_of(model) if own_tokenizer is None and model is not None else own_tokenizer
        self.eos_ids = end_ids(self.engine, self.tokenizer)
        draft_engines = draft_engines_of(drafts, self.tokenizer, options)
        self._parts = Parts(self.engine, draft_engines, heads, fingerprint_of(self.engine, self.tokenizer, heads))
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
            ModelError: if its engine has none: it runs no transformers model.
        """
        config: PreTrainedConfig | None = getattr(self.engine, "config", None)
        if config is None:
            raise ModelError(f"{self.engine.info.name} has no configuration of transformers")
        return config

    @property
    def engines(self) -> list[TransformersEngine]:
        """Those of the target and of the draft models."""
        parts = [self.engine, *(engine for _, engine in self._parts.draft_engines)]
        return [engine for engine in parts if isinstance(engine, TransformersEngine)]

    # -- other ways to decode with the same model -----------------------------------------------------------------

    def using(
        self,
        drafter: Named = None,
        shape: str | Shape | None = None,
        accept: str | None = None,
        watch: Watcher | None = None,
        heads: str | Path | None = None,
    ) -> LLM:
        """The same target and draft models with another drafter, shape or rule, other heads or another watcher; what
        isn't named stays as it is. Nothing learnt is shared, except by a `Drafter` that was given as such.

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
        """The same model without speculation: one token per forward, by the rule ``match``, and nobody watches."""
        return self._twin(_Way("none"), self._parts)

    def _twin(self, way: _Way, parts: Parts) -> LLM:
        twin = object.__new__(LLM)
        twin.__dict__.update(self.__dict__)
        twin._way, twin._parts = way, parts
        with self.engine.lock:  # hidden states are asked for, or costs measured, while nobody decodes
            twin._make_decoder()
        return twin

    def _make_decoder(self) -> None:
        """The loop, as it was asked for, and who shares its steps."""
        way, parts = self._way, self._parts
        rule, form = acceptance(way.accept), shape_of(way.shape, way.drafter, parts.heads)
        self.decoder = Decoder(self.engine, make_drafter(way.drafter, parts), self._priced(form), rule, way.watch)
        self._shared = Shared(self.scheduler())

    def scheduler(self, max_batch: int | None = None) -> Scheduler:
        """A new scheduler of this loop's steps, for who steps by itself; see `Scheduler`."""
        return Scheduler(self.decoder, max_batch=max_batch, **self._limits)

    def save_memory(self, folder: str | Path) -> None:
        """Writes what the drafters learnt from all requests so far into ``folder``, for ``LLM(..., memory=folder)``.

        Raises:
            OptionError: if it can't be written.
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
            prompts: one or several. A prompt is a text, a list or an array of token ids, a list of messages, or what a
                tokenizer returned; see `inputs.read_prompts`.
            params: how all are decoded, or one for each prompt.
            reference: texts that outputs may copy from, such as retrieved documents or a file that is edited. They
                are searched by lookups and never shown to the model.
            progress: show a progress bar.

        Returns:
            The results in the order of the prompts; with ``params.n`` samples or ``params.num_return_sequences`` beams
            each, so many results per prompt in a row. What is wrong with one request ends that one alone: its result
            has the finish reason "error" and an `error`, and the others go on. Before anything is decoded that is a
            prompt that is empty or leaves no room in the context, or options that this model can't honour; later, rules
            that fail, or a step.

        Raises:
            PromptError, OptionError: before anything is decoded, if these are no prompts or no options.
            PromptError, OptionError, RequestError, ModelError, StepError: if every request failed (which one does that
                is alone), the first one's error.
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
        """The requests that `generate` makes of the same, one for each prompt and sample; where something is wrong with
        one, its results."""
        texts, given = self._references(reference), read_prompts(prompts)
        return [
            request
            for prompt, one in zip(given, params_in(params, len(given)), strict=True)
            for request in self._requests(prompt, one, texts)
        ]

    def run(self, seqs: Iterable[Sequence], max_batch: int | None = None) -> Generator[Events]:
        """Decodes ``seqs``, at most `max_batch` of them at a time, in the same steps as what other threads ask of this
        `LLM`; yields what each step did for them."""
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
        except RequestError as error:
            seq.finish_reason, seq.error = "error", error
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
        """Decodes one prompt and gives out each token as it comes: iterate over it, then read its `result`. If the
        request's rules fail, iterating raises the `RequestError` behind the last token.

        Raises:
            OptionError: with beam search, whose text is certain only at its end, or several samples.
            PromptError: as `generate`.
        """
        return Stream(self, self.streamed(prompt, params, reference))

    def streamed(self, prompt: Prompt, params: SamplingParams | None, reference: Any) -> Sequence:
        """The request that `stream` makes of the same."""
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

    def chat_prompt(self, messages: SequenceOf[Mapping[str, Any]]) -> list[int]:
        """The token ids of ``messages`` in the tokenizer's chat template, open for the model's answer. Contents are
        texts, or lists of parts that are texts.

        Raises:
            PromptError: if these are no messages, or the chat template is missing or refuses them.
        """
        return chat_ids(self.tokenizer, read_messages(messages))

    def sequence(
        self, prompt: Prompt | Read, params: SamplingParams, sample: int = 0,
        references: SequenceOf[list[int]] = (),
    ) -> Sequence:  # fmt: skip
        """A request ready for the decoder: all that can be wrong with one is told here.

        Raises:
            PromptError, OptionError: as `generate`.
        """
        ids = self._vocabulary.ids(prompt, "prompt")
        if params.stop and self.tokenizer is None:
            raise PromptError("stop strings need a tokenizer: pass tokenizer=, or use stop_token_ids")
        if params.num_beams > 1 and not isinstance(self.engine, Branches):
            raise OptionError(f"{self.engine.info.name} keeps no branches of a text, which num_beams needs")
        check_vocabulary(params, self.engine.vocab_size)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        detokenizer = self.detokenizer() if params.stop else None
        noise = seeded_noise(seed, sample)
        context = self.engine.context
        return Sequence(ids, params, noise, context, self.eos_ids, detokenizer, references=references)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.engine.vocab_size)

    def _references(self, reference: Any) -> list[list[int]]:
        texts = [] if reference is None else read_prompts(reference, "reference")
        return [self._vocabulary.ids(text, "reference") for text in texts]

    def detokenizer(self, exact: bool = False) -> Detokenizer:
        """What makes text of tokens as they come.

        Args:
            exact: give nothing out that later tokens may change, see `Detokenizer`. Stop strings don't wait for that.

        Raises:
            PromptError: without a tokenizer.
        """
        return self._vocabulary.detokenizer(exact)

    def pieces(self, seq: Sequence) -> Pieces:
        """What makes pieces of the events of ``seq``."""
        return Pieces(seq, None if self.tokenizer is None else self.detokenizer(exact=True))

    def result(self, seq: Sequence) -> Result:
        """What ``seq`` came to so far. Another thread may be decoding it."""
        text, reason, ids = "", seq.finish_reason or "interrupted", seq.output_ids
        if seq.text_end is not None and seq.detokenizer is not None:
            whole = seq.detokenizer.copy()
            whole.finish()
            text = whole.text[: seq.text_end]
        elif self.tokenizer is not None:
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        logprobs = seq.logprobs[: len(ids)] if seq.params.logprobs is not None else None
        return Result(text, ids, reason, logprobs, seq.metrics, seq.prompt_ids, error=seq.error)
