"""Text in, text out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch

from tokentree.acceptance import acceptance
from tokentree.beam import BeamDecoder
from tokentree.costs import cost_curve
from tokentree.decoder import Decoder, Watcher
from tokentree.drafters.base import Parts
from tokentree.engines.facts import ends_of
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.support import check_quantization
from tokentree.errors import ModelError, OptionError, PromptError
from tokentree.heads.saved import Fingerprint, saved_choices
from tokentree.loading import find_tokenizer, load_engine, load_tokenizer, pick_device
from tokentree.metrics import Metrics
from tokentree.pairing import check_same_tokenizer
from tokentree.registry import Named, check_names, make_drafter
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Accepted, FinishReason, Sequence, TokenLogprobs
from tokentree.shapes import Cost, CostCurve, Shape, Static
from tokentree.shapes import shape as parse_shape
from tokentree.text import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | SequenceOf[int]
Model = Union[str, Path, "PreTrainedModel"]
DEFAULT_SHAPE = "cost"


@dataclass(frozen=True)
class Result:
    """One decoded text.

    Args:
        text: the output, without special tokens and without what a stop string cut off.
        token_ids: the output's tokens, all of them.
        finish_reason: "stop" (a stop rule), "length" (a limit) or "interrupted" (the caller stopped).
        logprobs: per token, if they were asked for.
        metrics: what it cost.
        prompt_token_ids: the prompt.
        score: with beam search, the text's log-probability, divided by its length to the power of the length penalty.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    metrics: Metrics
    prompt_token_ids: list[int]
    score: float | None = None


@dataclass(frozen=True)
class Piece:
    """What a stream gives out: one token and the text that it made certain (may be empty). ``drafted`` tells an
    accepted draft token from a bonus token."""

    text: str
    token_id: int | None
    drafted: bool


class LLM:
    """A target model, a drafter and the loop.

    Args:
        model: a hub name, a folder of safetensors, a GGUF file, or a loaded transformers model (which stays as it is).
        drafter: a name from the registry, a list of names to be merged, or a `Drafter`. Without one, ``draft_model`` if
            draft models are given, and if not, heads that are given and all lookups, merged.
        draft_model: one draft model or several (merged into one tree).
        heads: a folder with Medusa heads for this model.
        shape: how trees grow: see `tokentree.shapes.shape`; or ``choices``, the static tree that is kept beside heads.
        accept: ``match`` or ``rejection`` (both lossless), ``best_path`` or ``typical`` (both lossy).
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default the checkpoint's, and bfloat16 on CPUs that compute
            in it.
        device: by default the first GPU, if there is one.
        attention, quantization, compile: see `TorchEngine`; they hold for draft models too.
        tokenizer: by default the one that comes with the model.
        max_batch: most sequences decoded together.
        prefix_mb: megabytes of KV of finished texts that each engine keeps, so that a text that begins alike (the next
            turn of a chat, the same instructions) need not be read again.
        memory: a folder with what drafters learnt earlier, see `save_memory`; one that isn't there is no mistake.
        speculative_model, speculative_config: another spelling of ``draft_model`` and ``shape``:
            ``{"mode": "tree", "depth": 3, "branching_factor": 2}`` or ``{"num_speculative_tokens": 4}``.
        watch: called after each step, see `Decoder`.

    Raises:
        OptionError, ModelError, PairingError: all `ValueError`, each with one sentence that says what is wrong.
    """

    def __init__(
        self,
        model: Model,
        drafter: Named = None,
        draft_model: Model | SequenceOf[Model] | None = None,
        shape: str | Shape | None = None,
        accept: str = "match",
        *,
        heads: str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        attention: str | None = None,
        quantization: str | None = None,
        compile: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_batch: int = 8,
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
            shape = _configured(speculative_config)
        if not isinstance(model, str | Path) and not (dtype is None and device is None):
            raise OptionError("a loaded model keeps its dtype and device: leave dtype and device out")
        if memory is not None and Path(memory).exists() and not Path(memory).is_dir():
            raise OptionError(f"memory={str(memory)!r} is a file: name a folder")
        if max_batch < 1:
            raise OptionError("max_batch must be at least 1")
        if prefix_mb < 0:
            raise OptionError("prefix_mb must be at least 0")
        # what is cheap to tell is told before anything is loaded
        rule, form = acceptance(accept), shape_of(shape, drafter, heads)
        drafts: list[Model] = [] if draft_model is None else _as_list(draft_model)
        for named in (model, *drafts):
            check_quantization(quantization, file=named if isinstance(named, str | Path) else None)
        check_names(drafter)
        place = pick_device(device) if isinstance(model, str | Path) else model.device
        options: dict[str, Any] = {"attention": attention, "quantization": quantization, "compile": compile}
        options["prefix_bytes"] = prefix_mb * 1_000_000
        self.engine, self.max_batch = load_engine(model, dtype, place, **options), max_batch
        self.tokenizer = tokenizer or _tokenizer_of(model)
        self.eos_ids = frozenset({*self.engine.facts.ends, *ends_of(self.tokenizer)})
        draft_engines = list[tuple[str, KVEngine]]()
        for draft in drafts:
            name = str(draft) if isinstance(draft, str | Path) else draft.config._name_or_path
            if self.tokenizer is not None:
                check_same_tokenizer(self.tokenizer, _tokenizer_of(draft), name)
            engine = load_engine(draft, dtype, place, **options)
            draft_engines.append((_short(name, [known for known, _ in draft_engines]), engine))
        fingerprint = None if heads is None else Fingerprint.of(self.config, self.tokenizer)
        self._parts = Parts(self.engine, tuple(draft_engines), None if heads is None else Path(heads), fingerprint)
        self._curve: CostCurve | None = None
        self.decoder = Decoder(self.engine, make_drafter(drafter, self._parts), self._priced(form), rule, watch)
        if memory is not None and Path(memory).is_dir():
            self.decoder.drafter.load(Path(memory))

    @property
    def config(self) -> PreTrainedConfig:
        """The target's configuration."""
        return self.engine.config

    # -- other ways to decode with the same model -----------------------------------------------------------------

    def using(
        self,
        drafter: Named = None,
        shape: str | Shape | None = None,
        accept: str = "match",
        watch: Watcher | None = None,
        heads: str | Path | None = None,
    ) -> LLM:
        """The same target and draft models with another drafter, shape or rule, or other heads; nothing learnt is
        shared.

        Raises:
            OptionError, PairingError, ModelError: as for the constructor.
        """
        twin = object.__new__(LLM)
        twin.__dict__.update(self.__dict__)
        if heads is not None:
            fingerprint = Fingerprint.of(self.config, self.tokenizer)
            twin._parts = replace(self._parts, heads=Path(heads), fingerprint=fingerprint)
        form = self._priced(shape_of(shape, drafter, twin._parts.heads))
        twin.decoder = Decoder(self.engine, make_drafter(drafter, twin._parts), form, acceptance(accept), watch)
        return twin

    def plain(self) -> LLM:
        """The same model without speculation: one token per forward."""
        return self.using("none")

    def save_memory(self, folder: str | Path) -> None:
        """Writes what the drafters learnt from all requests so far into ``folder``, for ``LLM(..., memory=folder)``.

        Raises:
            OptionError: if it can't be written.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.decoder.drafter.save(Path(folder))
        except OSError as error:
            raise OptionError(f"can't write to the folder {str(folder)!r}: {error.strerror}") from None

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
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams | None = None,
        *,
        reference: Prompt | SequenceOf[Prompt] = (),
        progress: bool = False,
    ) -> list[Result]:
        """Decodes every prompt (a text or a list of token ids), `max_batch` at a time.

        Args:
            reference: texts that outputs may copy from, such as retrieved documents or a file that is edited. They
                are searched by lookups and never shown to the model.
            progress: show a progress bar.

        Returns:
            The results in the order of the prompts; with ``params.n`` samples or ``params.num_return_sequences`` beams
            each, so many results per prompt in a row.

        Raises:
            PromptError: if a prompt is empty or leaves no room in the context.
        """
        params = params or SamplingParams()
        texts = self._references(reference)
        seqs = [
            self.sequence(prompt, params, sample, texts)
            for prompt in _as_prompts(prompts)
            for sample in range(params.n)
        ]
        with _progress(seqs, progress) as advance:
            if params.num_beams > 1:
                return [result for seq in seqs for result in self._search(seq, advance)]
            for _ in self.decoder.run(seqs, self.max_batch):
                advance()
        return [self.result(seq) for seq in seqs]

    def _search(self, seq: Sequence, advance: Callable[[], None]) -> list[Result]:
        """The texts that beam search finds."""
        search = BeamDecoder(self.engine, self.decoder.drafter, self.decoder.shape).run(seq, advance)
        results = []
        for found in search.best(seq.params.num_return_sequences):
            text = None if seq.detokenizer is None else self.detokenizer()
            one = replace(seq, detokenizer=text, metrics=Metrics())
            one.extend(Accepted([], found.tokens, finish_reason=search.reason(found.tokens)))
            results.append(replace(self.result(one), score=found.score, metrics=seq.metrics))
        return results

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, reference: Prompt | SequenceOf[Prompt] = ()
    ) -> Stream:
        """Decodes one prompt and gives out each token as it comes: iterate over it, then read its `result`.

        Raises:
            OptionError: with beam search, whose text is certain only at its end.
        """
        if params is not None and params.num_beams > 1:
            raise OptionError("with num_beams the text is certain only at its end: use generate")
        return Stream(self, self.sequence(prompt, params or SamplingParams(), 0, self._references(reference)))

    def chat(
        self,
        messages: SequenceOf[dict[str, str]],
        params: SamplingParams | None = None,
        *,
        reference: Prompt | SequenceOf[Prompt] = (),
    ) -> Result:
        """The model's answer to ``[{"role": "user", "content": "…"}, …]``."""
        return self.generate([self.chat_prompt(messages)], params, reference=reference)[0]

    def chat_prompt(self, messages: SequenceOf[dict[str, str]]) -> list[int]:
        """The token ids of ``messages`` in the tokenizer's chat template, open for the model's answer.

        Raises:
            PromptError: if the tokenizer has no chat template.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise PromptError("this model's tokenizer has no chat template: give a plain prompt instead")
        ids = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [int(token) for token in ids]  # type: ignore[arg-type]

    def sequence(
        self, prompt: Prompt, params: SamplingParams, sample: int = 0, references: SequenceOf[list[int]] = ()
    ) -> Sequence:
        """A request ready for the decoder."""
        ids = self._ids(prompt, "prompt")
        if params.stop and self.tokenizer is None:
            raise PromptError("stop strings need a tokenizer: pass tokenizer=, or use stop_token_ids")
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        detokenizer = self.detokenizer() if params.stop else None
        noise = seeded_noise(seed, sample)
        context = self.engine.context
        return Sequence(ids, params, noise, context, self.eos_ids, detokenizer, references=references)

    def _ids(self, text: Prompt, what: str) -> list[int]:
        if isinstance(text, str):
            if not text:
                raise PromptError(f"the {what} is empty: give at least one token")
            if self.tokenizer is None:
                raise PromptError("this model came without a tokenizer: give token ids, or pass tokenizer=")
            ids: list[int] = self.tokenizer(text).input_ids
        else:
            ids = [int(token) for token in text]
        if any(not 0 <= token < self.engine.vocab_size for token in ids):
            raise PromptError(f"a token id of the {what} is outside the vocabulary of {self.engine.vocab_size}")
        return ids

    def _references(self, reference: Prompt | SequenceOf[Prompt]) -> list[list[int]]:
        return [self._ids(text, "reference") for text in _as_prompts(reference)]

    def detokenizer(self) -> Detokenizer:
        tokenizer = self.tokenizer
        assert tokenizer is not None
        return Detokenizer(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))

    def result(self, seq: Sequence) -> Result:
        """What ``seq`` came to so far."""
        text = ""
        if self.tokenizer is not None:
            if seq.detokenizer is None:  # no stop string made it read along
                whole = self.detokenizer()
                whole.push(seq.output_ids)
            else:
                whole = seq.detokenizer.copy()
            whole.finish()
            text = whole.text[: seq.text_end]
        logprobs = seq.logprobs if seq.params.logprobs is not None else None
        return Result(text, seq.output_ids, seq.finish_reason or "interrupted", logprobs, seq.metrics, seq.prompt_ids)


class Stream:
    """The tokens of one request as they come. `result` is what there is so far, also after an interruption."""

    def __init__(self, llm: LLM, seq: Sequence) -> None:
        self._llm, self._seq = llm, seq
        self._pieces = _pieces(llm, seq)

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def close(self) -> None:
        """Stops decoding and forgets the request's KV."""
        self._pieces.close()

    @property
    def result(self) -> Result:
        return self._llm.result(self._seq)


def _pieces(llm: LLM, seq: Sequence) -> Generator[Piece]:
    """Decodes ``seq`` step by step. No method of `Stream`, so that a dropped stream drops its KV at once."""
    held = list[Piece]()
    detokenizer = llm.detokenizer() if llm.tokenizer is not None else None
    hold = max((len(stop) - 1 for stop in seq.params.stop), default=0)  # may be the start of a stop string
    shown = known = 0
    for _ in llm.decoder.run([seq], 1):
        new = seq.output_ids[known:]
        known += len(new)
        for place, token in enumerate(new):
            text = detokenizer.push([token]) if detokenizer is not None else ""
            held.append(Piece(text, token, drafted=place < len(new) - 1))
        if seq.finished and detokenizer is not None:
            held.append(Piece(detokenizer.finish(), None, drafted=False))
        length = len(detokenizer.text) if detokenizer is not None else 0
        limit = length - hold if not seq.finished else length if seq.text_end is None else seq.text_end
        while held and (shown + len(held[0].text) <= limit or seq.finished):
            piece = held.pop(0)
            text = piece.text[: max(0, limit - shown)]
            shown += len(piece.text)
            yield Piece(text, piece.token_id, piece.drafted)


def _tokenizer_of(model: Model) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a named model, if it has one; of a loaded one, if the place it was loaded from still has it."""
    if isinstance(model, str | Path):
        return find_tokenizer(model)
    try:
        return load_tokenizer(model.config._name_or_path, local_only=True) if model.config._name_or_path else None
    except ModelError:  # weights alone, or a place that is gone
        return None


def _short(name: str, taken: SequenceOf[str]) -> str:
    """What a draft model is called in figures: the end of its name, numbered where another one is called so too."""
    short = Path(name).name.removesuffix(".gguf") or "draft_model"
    alike = sum(known.split(" #")[0] == short for known in taken)
    return f"{short} #{alike + 1}" if alike else short


def shape_of(shape: str | Shape | None, drafter: Named, heads: str | Path | None) -> Shape:
    """The shape of that name; without one the default, for plain decoding one that sizes nothing."""
    if shape == "choices":
        return Static(paths=saved_choices(heads))
    return parse_shape(shape or ("chain:1" if drafter == "none" else DEFAULT_SHAPE))


def _as_list(models: Model | SequenceOf[Model]) -> list[Model]:
    return list(models) if isinstance(models, list | tuple) else [models]  # type: ignore[list-item]


def _is_token(item: Any) -> bool:
    return isinstance(item, int | np.integer) or (isinstance(item, torch.Tensor) and item.ndim == 0)


def _as_prompts(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and _is_token(prompts[0])):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _configured(config: dict[str, Any]) -> str:
    """The shape that a ``speculative_config`` asks for."""
    known = {"mode", "depth", "branching_factor", "num_speculative_tokens"}
    if unknown := sorted(set(config) - known):
        raise OptionError(f"unknown speculative_config key {unknown[0]!r}: it takes {', '.join(sorted(known))}")
    mode = config.get("mode", "tree" if "depth" in config else "chain")
    depth = config.get("depth", config.get("num_speculative_tokens", 3))
    width = config.get("branching_factor", 2 if mode == "tree" else 1)
    if mode not in ("tree", "chain") or (mode == "chain" and width != 1):
        raise OptionError('speculative_config takes mode "tree", or mode "chain" with one branch')
    if not all(type(number) is int and number >= 1 for number in (depth, width)):
        raise OptionError("depth and branching_factor of speculative_config are whole numbers of at least 1")
    return "x".join([str(width)] * depth)


@contextmanager
def _progress(seqs: SequenceOf[Sequence], shown: bool) -> Iterator[Callable[[], None]]:
    """A bar over the tokens of ``seqs``, if it is to be shown, and what to call after each step."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("decoding", total=sum(seq.params.max_tokens for seq in seqs))

        def advance() -> None:
            done = sum(seq.params.max_tokens if seq.finished else seq.metrics.new_tokens for seq in seqs)
            bar.update(task, completed=done)

        yield advance
