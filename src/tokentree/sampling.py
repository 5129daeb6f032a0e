"""From logits to a distribution, once per visited node; and the random numbers a sequence may use.

The order is that of transformers: penalties and bias, the user's processors, temperature, top-k, top-p, min-p. What a
grammar forbids is banned behind the processors, so that no rule brings it back.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokentree.errors import DeadEnd, OptionError, RequestError, told
from tokentree.grammars.options import StructuredOutputs

LogitsProcessor = Callable[[list[int], torch.Tensor], torch.Tensor]
LARGEST = 1e9  # penalty, and
LARGEST_BIAS = 1e30  # so that float32 holds what comes of them
MOST_LOGIT = torch.finfo(torch.float32).max
HOTTEST = 1e38  # temperature that float32 holds: by infinity, what is banned would be divided into NaN
END = 2**63  # of whole numbers
NUCLEI, ROUNDED = (512, 4096), 1e-9  # tokens among which those of top_p are looked for; more than sums are off
MOST = 65_536  # samples of one prompt
MOST_BEAMS = 1024
MOST_RANKED = 1 << 26  # numbers that a step of beam search ranks: for each beam, the whole vocabulary
NOT_NUMBERS = (
    "the model's logits are not finite numbers: it overflows (where it computes in float16, another type may help), or "
    "its weights are damaged"
)


def _is_empty(value: Any) -> bool:
    """Whether it is a tensor without data."""
    return isinstance(value, torch.Tensor) and value.is_meta


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's own; texts and truth values are no numbers."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0):
        value = None if _is_empty(value) else value.item()
    if isinstance(value, bool | str | bytes):
        raise ValueError("input should be a number")
    return value


def _one_or_several(value: Any) -> Any:
    """A tuple of what may come as None, alone, or in any kind of list."""
    if value is None:
        return ()
    if isinstance(value, np.ndarray | torch.Tensor) and not _is_empty(value):
        value = value.tolist()
    if isinstance(value, str) or (callable(value) and not isinstance(value, list)):
        return (value,)
    if not isinstance(value, list | tuple | set | frozenset | range):
        raise ValueError("input should be a list")
    return tuple(value)


def _truth(value: Any) -> Any:
    """True and False, numpy's too, and nothing that merely counts as one of them."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError("input should be True or False")
    return bool(value)


def _structured(value: Any) -> Any:
    return None if value is None else StructuredOutputs.of(value)


def _truth_or_never(value: Any) -> Any:
    return {"true": True, "false": False, "never": "never"}.get(value) if isinstance(value, str) else _truth(value)


Float = Annotated[float, BeforeValidator(_plain)]
Int = Annotated[int, BeforeValidator(_plain)]


class SamplingParams(BaseModel):
    """How one request is decoded.

    Args:
        temperature: 0 is greedy, and so is what is below 1e-5, where float32 would overflow; equal logits take the
            lowest id.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches this.
        min_p: keep tokens at least this times as probable as the most probable one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, for tokens seen in the output.
        logit_bias: token id -> number added to its logit; -inf bans the token.
        logits_processors: functions ``(path_ids, logits)`` called at every visited node. ``path_ids`` are prompt,
            output and the node's own path; ``logits`` is float32[vocab], and so must be what is returned.
        seed: the same seed gives the same text; None draws a new one per request.
        n: how many samples to draw for each prompt.
        max_tokens, min_tokens: bounds on the number of new tokens. ``max_tokens`` may be 0 with
            ``prompt_logprobs``: the prompt is scored, and nothing is written.
        ignore_eos: go on after an end-of-sequence token.
        stop: strings that end the text (they are cut off); stop_token_ids: tokens that end it (they are kept).
        num_beams: above 1, beam search keeps so many texts, as transformers does: see `beam.BeamSearch`, also for
            ``length_penalty`` and ``early_stopping`` (True, False or "never"). At most 1024, and so many that a step
            ranks no more than 67 million tokens: 441 with a vocabulary of 152,064.
        num_return_sequences: how many of them are returned, the best one first.
        timeout: None, or seconds after which the text ends as it is, with the finish reason "timeout". They count from
            when the request is made.
        logprobs: None, or how many top tokens to report beside each emitted one, as raw log-probabilities (before
            temperature, penalties and truncation).
        prompt_logprobs: the same for the tokens of the prompt, see `Result`. The whole prompt is read then: no KV of
            other texts is reused for it.
        structured_outputs: None, or what the text has to be: `StructuredOutputs`, or a dict such as
            ``{"json": schema}``. It goes neither with beam search nor with ``ignore_eos``.

    Raises:
        OptionError: on an unknown name or a value out of range. Numbers of numpy and torch are numbers; texts and truth
            values are not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    temperature: Float = Field(0.0, ge=0, allow_inf_nan=False)
    top_k: Int = Field(0, ge=0, lt=END)
    top_p: Float = Field(1.0, gt=0, le=1)
    min_p: Float = Field(0.0, ge=0, le=1)
    repetition_penalty: Float = Field(1.0, gt=1 / LARGEST, le=LARGEST)
    presence_penalty: Float = Field(0.0, ge=-LARGEST, le=LARGEST)
    frequency_penalty: Float = Field(0.0, ge=-LARGEST, le=LARGEST)
    logit_bias: dict[Int, Float] = Field(default_factory=dict)
    logits_processors: Annotated[tuple[LogitsProcessor, ...], BeforeValidator(_one_or_several)] = ()
    seed: Int | None = Field(None, ge=0, lt=END)
    n: Int = Field(1, ge=1, le=MOST)
    max_tokens: Int = Field(256, ge=0, lt=END)
    min_tokens: Int = Field(0, ge=0, lt=END)
    ignore_eos: Annotated[bool, BeforeValidator(_truth)] = False
    stop: Annotated[tuple[str, ...], BeforeValidator(_one_or_several)] = ()
    stop_token_ids: Annotated[tuple[Int, ...], BeforeValidator(_one_or_several)] = ()
    num_beams: Int = Field(1, ge=1, le=MOST_BEAMS)
    length_penalty: Float = Field(1.0, ge=-16, le=16, allow_inf_nan=False)
    early_stopping: Annotated[bool | Literal["never"], BeforeValidator(_truth_or_never)] = False
    num_return_sequences: Int = Field(1, ge=1, lt=END)
    timeout: Float | None = Field(None, ge=0, allow_inf_nan=False)
    logprobs: Int | None = Field(None, ge=0, lt=END)
    prompt_logprobs: Int | None = Field(None, ge=0, lt=END)
    structured_outputs: Annotated[StructuredOutputs | None, BeforeValidator(_structured)] = None

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            said = first["msg"].removeprefix("Value error, ")
            said = said[:1].lower() + said[1:]
            name = ".".join(map(str, first["loc"]))
            if near := difflib.get_close_matches(name, type(self).model_fields, 1) if name in options else []:
                said += f"; did you mean {near[0]}?" if near[0] != name else ""
            shown = _shown(first["input"])
            option = str(first["loc"][0]) if name else None
            raise OptionError(f"sampling option {name}={shown}: {said}" if name else said, option) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> SamplingParams:
        """The same options but for those of ``update``.

        Raises:
            OptionError: as for new ones.
        """
        mine = super().model_copy(deep=deep)
        return type(self)(**{**vars(mine), **update}) if update else mine

    def __setattr__(self, name: str, value: Any) -> None:
        raise OptionError(f"sampling options are frozen: make new ones with another {name}")

    @field_validator("stop")
    @classmethod
    def _stop_strings_can_be_found(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("a stop string can't be empty")
        if any("\ud800" <= char <= "\udfff" for text in stop for char in text):
            raise ValueError("a stop string can't hold half of a character")
        return stop

    @field_validator("stop_token_ids")
    @classmethod
    def _tokens_count_from_0(cls, ids: tuple[int, ...]) -> tuple[int, ...]:
        if any(token < 0 for token in ids):
            raise ValueError("token ids count from 0")
        return ids

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _no_bias(cls, logit_bias: Any) -> Any:
        return {} if logit_bias is None else logit_bias

    @model_validator(mode="after")
    def _bounds_in_order(self) -> SamplingParams:
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_tokens=0 is less than 1, which goes with prompt_logprobs alone")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.num_return_sequences > self.num_beams:
            raise ValueError("num_return_sequences is at most num_beams; n says how many samples to draw")
        told = self.logprobs is not None or self.prompt_logprobs is not None
        if self.num_beams > 1 and (told or self.stop or self.n > 1 or not self.is_greedy):
            raise ValueError("num_beams goes with temperature=0, n=1, and neither stop strings nor logprobs")
        if self.num_beams > 1 and self.timeout is not None:
            raise ValueError("num_beams goes without a timeout: its text is certain only at its end")
        if self.structured_outputs is not None and (self.num_beams > 1 or self.ignore_eos):
            raise ValueError("structured_outputs goes neither with num_beams nor with ignore_eos")
        return self

    @field_validator("logit_bias")
    @classmethod
    def _bias_is_a_number_or_a_ban(cls, logit_bias: dict[int, float]) -> dict[int, float]:
        if any(math.isnan(bias) or bias == math.inf for bias in logit_bias.values()):
            raise ValueError("a bias must be a number, or -inf")
        if any(bias > LARGEST_BIAS for bias in logit_bias.values()):
            raise ValueError(f"a bias is at most {LARGEST_BIAS:g}")
        if any(token < 0 for token in logit_bias):
            raise ValueError("token ids count from 0")
        return logit_bias

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature and truncation touches the logits."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.logits_processors
        )


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raises `OptionError` if ``params`` names a token that a vocabulary of so many doesn't have, or asks for more
    beams than can be ranked over it."""
    if params.num_beams > 1 and params.num_beams * vocab_size > MOST_RANKED:
        most = MOST_RANKED // vocab_size
        raise OptionError(
            f"num_beams={params.num_beams} is too many: each step ranks the whole vocabulary for each beam, and with "
            f"{vocab_size} tokens {most} is the most"
        )
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token in ids:
            if not 0 <= token < vocab_size:
                said = f"{name} names token {_shown(token)}, but the vocabulary has {vocab_size}"
                raise OptionError(said, name)


def process_logits(
    logits: torch.Tensor, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int],
    banned: Sequence[int] = (), allowed: NDArray[np.uint8] | None = None,
) -> torch.Tensor:  # fmt: skip
    """float32[vocab]: ``logits`` after penalties, bias, the user's processors and bans.

    Args:
        logits: [vocab], raw, of any float type.
        prompt_ids, output_ids: what precedes the token to be drawn; the output includes the node's own path.
        banned: ids that may not be drawn here (end-of-sequence tokens before ``min_tokens``).
        allowed: None, or uint8[n], a bit for each id, the lowest of a byte first: those that a grammar allows. Ids
            behind them are not allowed.

    Raises:
        DeadEnd: if no token is left.
        RequestError: if a processor raises, or what it gives can't be chosen from.
        OptionError: if a token is named that is not there.
    """
    logits = logits.float()
    if not params.changes_logits and not banned and allowed is None:
        return logits
    check_vocabulary(params, logits.numel())
    logits = logits.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt_ids, *output_ids}), device=logits.device)
        score = logits[seen]
        penalised = torch.where(score < 0, score * params.repetition_penalty, score / params.repetition_penalty)
        logits[seen] = penalised
    if (params.presence_penalty or params.frequency_penalty) and output_ids:
        counts = Counter(output_ids)
        seen = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * times
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for processor in params.logits_processors:
        logits = _changed(processor, [*prompt_ids, *output_ids], logits)
    if allowed is not None:
        may = torch.from_numpy(np.unpackbits(allowed, count=logits.numel(), bitorder="little").view(np.bool_))
        logits.masked_fill_(~may.to(logits.device), -math.inf)
    if there := [token for token in banned if 0 <= token < logits.numel()]:
        logits[there] = -math.inf
    best = float(logits.max())  # NaN if there is one
    if best == -math.inf:
        raise DeadEnd(f"after {len(output_ids)} new tokens the request's rules leave no token to choose")
    if not math.isfinite(best) or (not params.is_greedy and best / params.temperature > MOST_LOGIT):
        raise RequestError(
            f"after {len(output_ids)} new tokens the logits that the request's rules give hold {best:g}: they must be "
            "finite, also behind the temperature, or -inf for what is banned"
        )
    return logits


def _changed(processor: LogitsProcessor, path_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """What a user's ``processor`` makes of ``logits``, float32[vocab] again."""
    name = getattr(processor, "__qualname__", type(processor).__qualname__)
    wanted = tuple(logits.shape), logits.device, torch.strided
    try:
        changed = processor(path_ids, logits)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"the logits processor {name} raised {told(error)}") from error
    if not isinstance(changed, torch.Tensor):
        kind = type(changed).__name__
        raise RequestError(f"the logits processor {name} returned {kind}: it must return a tensor float32[vocab]")
    kind = str(changed.dtype).removeprefix("torch.")
    if (tuple(changed.shape), changed.device, changed.layout) != wanted or not changed.is_floating_point():
        form = "" if changed.layout is torch.strided else f"{str(changed.layout).removeprefix('torch.')} "
        raise RequestError(
            f"the logits processor {name} returned {form}{kind}{list(changed.shape)} on {changed.device}: it must "
            f"return float32{list(wanted[0])} on {wanted[1]}"
        )
    # what it returns may be its own, for every call, a part of something, or of a class of its own
    return changed.detach().as_subclass(torch.Tensor).to(torch.float32, copy=True)


def _shown(value: Any) -> str:
    """A value as it stands in a message: one line, not long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001  whatever it is; an integer of 5000 digits can't be written either
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """float64[vocab]: the distribution that a token is drawn from. Greedy decoding puts everything on one token.

    Raises:
        RequestError: if ``logits`` hold NaN or infinity, or nothing but -inf.
    """
    logits = logits.float()
    if params.is_greedy:
        return torch.nn.functional.one_hot(logits.argmax(), logits.numel()).double()
    logits = logits / min(params.temperature, HOTTEST)
    if 0 < params.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -math.inf)
    probs = logits.double().softmax(-1)
    if params.top_p < 1:
        probs = _nucleus(probs, params.top_p)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
    total = probs.sum()
    if not float(total) > 0:
        raise RequestError(NOT_NUMBERS)
    return probs / total


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """``probs`` float64[vocab] without the tokens that come, most probable first and of equal ones the lowest, when
    those before have ``top_p`` together.

    Mostly the others lie among a few of the most probable ones. Then only those are sorted, which changes no bit: sums
    begin with the same numbers.
    """
    for count in NUCLEI:
        if probs.numel() <= count:
            break
        among = (probs >= probs.topk(count).values[-1]).nonzero()[:, 0]  # of equal ones all; none if there is a NaN
        ordered, order = probs[among].sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        if before.numel() and float(before[-1]) > top_p + ROUNDED:
            kept = among[order[before < top_p]]
            return torch.zeros_like(probs).index_copy_(0, kept, probs[kept])
    ordered, order = probs.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return probs.index_fill(0, order[before >= top_p], 0.0)


class Noise(Protocol):
    """Where random decisions come from. Tests replace it by one that explores every outcome."""

    def choose(self, probs: torch.Tensor) -> int:
        """An index of ``probs`` (float64[k], need not be normalised), drawn in proportion."""
        ...

    def accepts(self, prob: float) -> bool:
        """True with probability ``prob``."""
        ...


class SeededNoise:
    """Numbers of one stream, by inversion of the cumulative distribution."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def choose(self, probs: torch.Tensor) -> int:
        cumulative = probs.cumsum(-1)
        draw = torch.tensor(self._generator.random(), dtype=cumulative.dtype, device=probs.device) * cumulative[-1]
        index = int(torch.searchsorted(cumulative, draw, right=True))
        return index if index < probs.numel() else int(probs.nonzero()[-1])

    def accepts(self, prob: float) -> bool:
        return bool(self._generator.random() < prob)


def seeded_noise(seed: int, sample: int) -> Callable[[int, int], Noise]:
    """The random stream of one sequence: ``(position, purpose) -> Noise``.

    Counter-based (Philox), keyed by seed and sample number, and counted by absolute position and purpose: what is
    drawn at a position depends neither on the batch nor on how often the stream was used before.
    """

    def noise(position: int, purpose: int) -> Noise:
        return SeededNoise(np.random.Generator(np.random.Philox(key=[seed, sample], counter=[0, 0, purpose, position])))

    return noise
