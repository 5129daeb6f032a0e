"""For those who already call transformers: ``model.generate(**inputs, custom_generate=tokentree.generator(...))``.

transformers prepares the inputs, the logits processors and the stopping criteria; what is here turns them into
sequences, lets the `Decoder` run, and answers in transformers' own form.
"""

from __future__ import annotations

import inspect
import math
import secrets
import threading
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation import logits_process as known
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tokentree.acceptance import acceptance
from tokentree.engines.support import check_supported
from tokentree.errors import OptionError, PromptError, RequestError
from tokentree.hf_options import OWN_DRAFTS, beside_tokens, check_config, check_prepares
from tokentree.llm import LLM, Model, shape_of
from tokentree.metrics import Metrics
from tokentree.options import heads_in, models_in
from tokentree.pictures import read_by_the_model
from tokentree.registry import Named, check_names
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Sequence
from tokentree.shapes import Shape
from tokentree.versions import check_transformers

# The last processors of a list, in transformers' order, that SamplingParams says as well.
WARPERS = (
    (known.TemperatureLogitsWarper, "temperature"),
    (known.TopKLogitsWarper, "top_k"),
    (known.TopPLogitsWarper, "top_p"),
    (known.MinPLogitsWarper, "min_p"),
)
UNFIT = {
    known.UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale keeps the KV of a second text",
    known.ClassifierFreeGuidanceLogitsProcessor: "guidance needs a batch of pairs",
    known.SynthIDTextWatermarkLogitsProcessor: "the SynthID watermark remembers earlier calls",
    known.EncoderRepetitionPenaltyLogitsProcessor: "encoder_repetition_penalty reads the batch of an encoder",
    known.EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size reads the batch of an encoder",
}


class Streamer(Protocol):
    """What is used of transformers' `BaseStreamer`."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


def generator(
    draft_model: Model | SequenceOf[Model] | None = None,
    *,
    drafter: Named = None,
    shape: str | Shape | None = None,
    accept: str = "match",
    heads: str | Path | None = None,
    streamer: Streamer | None = None,
    seed: int | None = None,
) -> TreeGenerator:
    """A callable for ``model.generate(**inputs, custom_generate=...)`` that decodes with token trees (SpecInfer, Miao
    et al. 2023, arXiv:2305.09781).

    It gives the tokens that ``generate`` gives without it, with several tokens per forward. Two tokens may be tied up
    to rounding, as happens in bfloat16. There the engine may round the other way than transformers' own loop. For a
    comparison, ``drafter="none"`` decodes plainly with the same engine.

    Keep it, and pass it to every call, from any thread. It stores the weights of each model in the engine's layout. The
    first call makes them. A later call makes them again if the model has changed: its weights, modules, adapters, hooks
    or settings, see `engines.watch`. Hooks and replaced forwards are run. They see the rows of trees: several
    continuations of several texts in one batch row, in any order. So they must treat each row as if it were alone.

    With a callable, transformers (5.24, `GenerationMixin._extract_generation_mode_kwargs`) drops the arguments of
    generation modes: ``tokenizer``, ``streamer``, ``assistant_model`` and ``synced_gpus``. They are read before that
    (see `_Signature`). The first two work as usual, and the others are refused with a reason.

    Args:
        draft_model: a smaller model, loaded or by name; or several. See `LLM` for other tokenizers.
        drafter, shape, accept, heads: as in `LLM`.
        streamer: its ``put(prompt ids [1, n])``, ``put(token [1])`` for each token, and ``end()`` are called. It may be
            given to ``generate`` instead.
        seed: the same seed gives the same text at every call. None draws a new seed for each call. torch's global
            random state is neither read nor changed.

    A prompt with pictures or sounds in it is read by the model itself, and trees begin behind it.

    These options of ``generate`` are honoured: do_sample, temperature, top_k, top_p, min_p, penalties, biases, bans and
    length bounds, ``stop_strings`` (with ``tokenizer=``), the user's ``logits_processor``,
    ``prefix_allowed_tokens_fn``, eos_token_id, pad_token_id, max_time, ``stopping_criteria``, num_return_sequences,
    left-padded batches, return_dict_in_generate. use_cache and prefill_chunk_size change nothing, since they don't
    affect the text. Every other option is refused by name.

    A logits processor is called with ``input_ids`` [1, n] and ``scores`` [1, vocab]. ``input_ids`` are a row of the
    batch, padding included as in transformers, and the path of one node. The processor must be a function of these two,
    because several continuations are looked at. A stopping criterion is called once after each new token of each row,
    with ``input_ids`` [1, n] and scores None. A row that it ends is padded from there on.

    Raises:
        OptionError: at once, if the drafter, shape or rule is unknown; in ``generate``, if an option can't be honoured.
        ModelError, PairingError, PromptError: in ``generate``, if the model, draft model or prompt can't be used.
    """
    return TreeGenerator(draft_model, drafter, shape, accept, heads, streamer, seed)


class _Signature:
    """The signature of a `TreeGenerator`, which transformers asks for in the midst of
    `GenerationMixin._extract_generation_mode_kwargs`: when it has taken ``tokenizer`` out of the call's keywords and
    before it throws that away. There it is put back, and what else would be lost beside it, as ``given``. In a version
    that does otherwise nothing is found, and nothing is given.
    """

    def __get__(self, made: TreeGenerator | None, owner: type[TreeGenerator]) -> inspect.Signature | None:
        if made is None:
            return None
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_name != "_extract_generation_mode_kwargs":
            frame = frame.f_back
        values = {} if frame is None else frame.f_locals
        kept, given = values.get("kwargs"), values.get("generation_mode_kwargs")
        if isinstance(kept, dict) and isinstance(given, dict):
            kept |= {"given": {**given, "synced_gpus": values.get("synced_gpus")}}
            if "tokenizer" in given:
                kept["tokenizer"] = given["tokenizer"]
        return inspect.signature(made.__call__)


class TreeGenerator:
    """The callable that `generator` returns.

    Attributes:
        metrics: the metrics of the last call, for each row of the batch. It is the last call of this thread, or of any
            thread if this one made none.
    """

    __signature__ = _Signature()

    def __init__(
        self,
        draft_model: Model | SequenceOf[Model] | None,
        drafter: Named,
        shape: str | Shape | None,
        accept: str,
        heads: str | Path | None,
        streamer: Streamer | None,
        seed: int | None,
    ) -> None:
        check_transformers()
        acceptance(accept)  # unknown names are told now
        check_names(drafter)
        models_in(draft_model)
        seed = SamplingParams(seed=seed).seed
        shape_of(shape, drafter, heads_in(heads))  # a mistake is told here; each model gets a shape of its own
        self._options: dict[str, Any] = {
            "draft_model": draft_model, "drafter": drafter, "shape": shape, "accept": accept, "heads": heads,
        }  # fmt: skip
        self._streamer, self._seed = streamer, seed
        self._llms: WeakKeyDictionary[PreTrainedModel, LLM] = WeakKeyDictionary()
        self._making = threading.Lock()
        self._last: list[Metrics] = []
        self._of_thread = threading.local()

    def __reduce__(self) -> tuple[type[TreeGenerator], tuple[Any, ...]]:
        return type(self), (*self._options.values(), self._streamer, self._seed)  # a copy makes engines of its own

    @property
    def metrics(self) -> list[Metrics]:
        last: list[Metrics] = getattr(self._of_thread, "last", self._last)
        return last

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: SequenceOf[StoppingCriteria],
        generation_config: GenerationConfig,
        *,
        tokenizer: Any = None,
        given: dict[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """What `GenerationMixin._sample` does: [rows, n] prompts to [rows, n + longest output] texts.

        Args:
            tokenizer: transformers makes criteria of it and of ``stop_strings``.
            given: what ``generate`` was given for a generation mode, by name.
        """
        check_supported(model)
        check_prepares(model)
        check_config(generation_config)
        beside = beside_tokens(model, model_kwargs)
        streamer = self._streamer_of(given or {})
        rows = len(input_ids)
        if streamer is not None and rows > 1:
            raise OptionError(f"a streamer takes one sequence, and this batch has {rows}")
        positions = None if beside else model_kwargs.get("position_ids")  # those of pictures are the model's own
        paddings = _paddings(input_ids, model_kwargs.get("attention_mask"), positions)
        limits = _Limits(stopping_criteria, generation_config, input_ids)
        llm = self._llm(model)
        if beside and self._options["heads"] is not None:
            raise OptionError(f"heads read the hidden states of a prompt, and those of {beside[0]} aren't kept")
        read = read_by_the_model(model, input_ids, model_kwargs, paddings) if beside else [None] * rows
        seed = secrets.randbits(63) if self._seed is None else self._seed
        seqs, processors = list[Sequence](), list[_PathProcessor]()
        for row, padding in enumerate(paddings):
            options, rest = _sampling_options(logits_processor, bool(generation_config.do_sample), row, padding)
            left, prompt = input_ids[row, :padding].tolist(), input_ids[row, padding:].tolist()
            if rest:
                processors.append(_PathProcessor(rest, left, llm.engine.vocab_size))
                options["logits_processors"] = (processors[-1],)
            _check_prompt(prompt, limits.max_tokens, llm)
            params = SamplingParams(max_tokens=limits.max_tokens, **options)
            noise = seeded_noise(seed, row)
            rules = limits.rules(left)
            seqs.append(
                Sequence(prompt, params, noise, llm.engine.context, limits.eos_ids, None, rules, prompt_kv=read[row])
            )
        if streamer is not None and streamer is self._streamer:
            streamer.put(input_ids.cpu())  # transformers gives it to one of its own
        self._run(llm, seqs, processors, streamer)
        sequences = _joined(input_ids, [seq.output_ids for seq in seqs], limits.pad_id)
        return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences  # type: ignore[arg-type]

    def _run(self, llm: LLM, seqs: list[Sequence], processors: list[_PathProcessor], streamer: Streamer | None) -> None:
        self._last = self._of_thread.last = [seq.metrics for seq in seqs]
        for events in llm.run(seqs, len(seqs)):
            for seq in seqs:
                if seq.error is not None:
                    raise seq.error
            with llm.engine.lock:  # where they were called before
                for processor in processors:
                    processor.check()
            if streamer is not None:
                for token in [token for seq, event in events if seq is seqs[0] for token in event.tokens]:
                    streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()

    def _streamer_of(self, given: dict[str, Any]) -> Streamer | None:
        """The one that gets the tokens, of what ``generate`` was given.

        Raises:
            OptionError: if there are two, or something was given that can't be honoured.
        """
        for name in ("assistant_model", "assistant_tokenizer"):
            if given.get(name) is not None:
                raise OptionError(f"tokentree can't honour {name}: {OWN_DRAFTS}")
        if given.get("synced_gpus"):
            raise OptionError("tokentree can't honour synced_gpus: it decodes in one process")
        streamer: Streamer | None = given.get("streamer")
        if streamer is not None and self._streamer is not None:
            raise OptionError("generator() and generate() were each given a streamer: give one of them")
        return self._streamer if streamer is None else streamer

    def _llm(self, model: PreTrainedModel) -> LLM:
        """The engine and decoder of ``model``, made anew if it, or a draft model, is no longer what they were made
        of."""
        with self._making:
            llm = self._llms.get(model)
            if llm is None or any(engine.changed() for engine in llm.engines):
                self._llms[model] = llm = LLM(model, **self._options)
            return llm


class _Limits:
    """Stopping criteria, as a `Sequence` knows them."""

    def __init__(
        self, criteria: SequenceOf[StoppingCriteria], config: GenerationConfig, input_ids: torch.Tensor
    ) -> None:
        lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        # transformers looks at the criteria after a token: one is always decoded
        self.max_tokens = max(1, min(lengths or [int(config.max_length or 0)]) - input_ids.shape[1])
        eos = [int(token) for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id]
        self.eos_ids = frozenset(eos)
        self._rest = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self._device = input_ids.device
        pad = config.pad_token_id
        self.pad_id = int(pad) if pad is not None else eos[0] if eos else None
        if self.pad_id is None and self._rest and len(input_ids) > 1:
            raise OptionError("rows may end at different lengths: pass pad_token_id")

    def rules(self, left: list[int]) -> list[Callable[[list[int]], bool]]:
        """The other criteria for a row whose padding is ``left``."""
        return [self._rule(criterion, left) for criterion in self._rest]

    def _rule(self, criterion: StoppingCriteria, left: list[int]) -> Callable[[list[int]], bool]:
        def ends(ids: list[int]) -> bool:
            row = torch.tensor([[*left, *ids]], device=self._device)
            return bool(torch.as_tensor(criterion(row, None)).any())

        return ends


class _PathProcessor:
    """transformers' processors of one row as a function ``(path_ids, logits)``.

    Args:
        processors: called in this order.
        left: the row's padding, which the processors count as transformers lets them.
        vocab_size: the target's. A draft model's logits may be fewer: it gets -inf for what it doesn't know.
    """

    def __init__(self, processors: list[LogitsProcessor], left: list[int], vocab_size: int) -> None:
        self._processors = [(_name_of(processor), LogitsProcessorList([processor])) for processor in processors]
        self._left, self._vocab_size = left, vocab_size
        self.__qualname__ = ""  # of whom an error is about
        self._first: tuple[list[int], torch.Tensor, torch.Tensor] | None = None

    def __call__(self, ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        row = torch.tensor([[*self._left, *ids]], device=logits.device)
        scores = logits.new_full((1, self._vocab_size), -math.inf)
        scores[0, : logits.numel()] = logits
        for name, processor in self._processors:
            self.__qualname__ = name
            scores = processor(row, scores)  # type: ignore[arg-type]
            _check_scores(name, scores, self._vocab_size)
        scores = scores[0, : logits.numel()]
        self._first = self._first or (ids, logits.clone(), scores.clone())
        return scores

    def check(self) -> None:
        """Raises `OptionError` if the first call would come out differently now: then calls depend on each other."""
        if self._first is not None:
            ids, logits, scores = self._first
            if not torch.equal(self(ids, logits), scores):
                names = ", ".join(name for name, _ in self._processors)
                raise OptionError(
                    f"a logits processor among {names} keeps state from call to call: a token tree looks at several "
                    "continuations, so it must depend on input_ids and scores alone"
                )


def _name_of(processor: LogitsProcessor) -> str:
    return getattr(processor, "__qualname__", type(processor).__qualname__)


def _check_scores(name: str, scores: Any, vocab_size: int) -> None:
    """Raises `RequestError` if these aren't one row of scores."""
    if not isinstance(scores, torch.Tensor):
        raise RequestError(f"the logits processor {name} returned {type(scores).__name__}: it must return a tensor")
    if tuple(scores.shape) != (1, vocab_size):
        given = list(scores.shape)
        raise RequestError(f"the logits processor {name} returned {given}: it must return [1, {vocab_size}]")


def _sampling_options(
    processors: SequenceOf[LogitsProcessor], do_sample: bool, row: int, padding: int
) -> tuple[dict[str, Any], list[LogitsProcessor]]:
    """What SamplingParams can say of ``processors``, at their beginning and at their end, and those between."""
    options: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    rest = [_of_row(processor, row) for processor in processors]
    if rest and type(rest[0]) is known.RepetitionPenaltyLogitsProcessor:
        ignored = rest[0].prompt_ignore_length
        if (0 if ignored is None else int(ignored)) == padding:
            options["repetition_penalty"] = rest.pop(0).penalty  # type: ignore[attr-defined]
    if not do_sample:
        return options, rest
    if rest and type(rest[-1]) is known.LogitNormalization:  # leaves the distribution as it is
        rest.pop()
    for kind, name in reversed(WARPERS):
        if rest and type(rest[-1]) is kind and _is_plain(rest[-1], getattr(rest[-1], name)):
            options[name] = getattr(rest.pop(), name)
    return options, rest


def _is_plain(warper: LogitsProcessor, value: float) -> bool:
    filtered, kept = getattr(warper, "filter_value", -math.inf), getattr(warper, "min_tokens_to_keep", 1)
    return value > 0 and filtered == -math.inf and kept == 1


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """``processor`` for a batch that consists of ``row`` alone."""
    for kind, why in UNFIT.items():
        if isinstance(processor, kind):
            raise OptionError(f"tokentree can't honour {kind.__name__}: {why}")
    if type(processor) is known.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, torch.Tensor):
            return known.RepetitionPenaltyLogitsProcessor(processor.penalty, ignored[row : row + 1])
    if type(processor) is known.PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return known.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    return processor


def _paddings(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> list[int]:
    """How many tokens on the left of each row are padding."""
    rows, length = input_ids.shape
    column = torch.arange(length, device=input_ids.device)
    padding = torch.zeros(rows, 1, dtype=torch.long, device=input_ids.device)
    if attention_mask is not None:
        padding = (attention_mask == 0).sum(1, keepdim=True)
        if ((attention_mask != 0) != (column >= padding)).any():
            raise OptionError("attention_mask may hide tokens on the left of a row only: set padding_side='left'")
    if position_ids is not None and ((position_ids != column - padding) & (column >= padding)).any():
        raise OptionError("tokentree can't honour position_ids: positions count from each row's first token")
    return [int(count) for count in padding[:, 0]]


def _check_prompt(prompt: list[int], max_tokens: int, llm: LLM) -> None:
    context, vocab_size = llm.engine.context, llm.engine.vocab_size
    if any(not 0 <= token < vocab_size for token in prompt):
        raise PromptError(f"a token id of the prompt is outside the vocabulary of {vocab_size}")
    if len(prompt) + max_tokens > context:
        raise OptionError(
            f"{max_tokens} new tokens after a prompt of {len(prompt)} pass the model's context of {context}: lower "
            "max_new_tokens"
        )


def _joined(input_ids: torch.Tensor, outputs: list[list[int]], pad_id: int | None) -> torch.Tensor:
    """[rows, n + longest output]: prompts and outputs, padded on the right."""
    longest = max(map(len, outputs))
    new = [output + [pad_id or 0] * (longest - len(output)) for output in outputs]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
