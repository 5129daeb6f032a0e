"""From logits to a distribution, once per visited node; and the random numbers a sequence may use.

The order is that of transformers: penalties and bias, the user's processors, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokentree.errors import OptionError

LogitsProcessor = Callable[[list[int], torch.Tensor], torch.Tensor]


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
        max_tokens, min_tokens: bounds on the number of new tokens.
        ignore_eos: go on after an end-of-sequence token.
        stop: strings that end the text (they are cut off); stop_token_ids: tokens that end it (they are kept).
        num_beams: above 1, beam search keeps so many texts, as transformers does: see `beam.BeamSearch`, also for
            ``length_penalty`` and ``early_stopping`` (True, False or "never").
        num_return_sequences: how many of them are returned, the best one first.
        logprobs: None, or how many top tokens to report beside each emitted one, as raw log-probabilities (before
            temperature, penalties and truncation).

    Raises:
        OptionError: on an unknown name or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, allow_inf_nan=False)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    logits_processors: tuple[LogitsProcessor, ...] = ()
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int = Field(1, ge=1)
    max_tokens: int = Field(256, ge=1)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    num_beams: int = Field(1, ge=1)
    length_penalty: float = Field(1.0, allow_inf_nan=False)
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = Field(1, ge=1)
    logprobs: int | None = Field(None, ge=0)

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            said = first["msg"].removeprefix("Value error, ").lower()
            name = ".".join(map(str, first["loc"]))
            raise OptionError(f"sampling option {name}={first['input']!r}: {said}" if name else said) from None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _no_empty_stop_string(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("a stop string can't be empty")
        return stop

    @model_validator(mode="after")
    def _bounds_in_order(self) -> SamplingParams:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.num_return_sequences > self.num_beams:
            raise ValueError("num_return_sequences is at most num_beams; n says how many samples to draw")
        if self.num_beams > 1 and not (self.is_greedy and self.n == 1 and not self.stop and self.logprobs is None):
            raise ValueError("num_beams goes with temperature=0, n=1, and neither stop strings nor logprobs")
        return self

    @field_validator("logit_bias")
    @classmethod
    def _bias_is_a_number_or_a_ban(cls, logit_bias: dict[int, float]) -> dict[int, float]:
        if any(math.isnan(bias) or bias == math.inf for bias in logit_bias.values()):
            raise ValueError("a bias must be a number, or -inf")
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


def process_logits(
    logits: torch.Tensor, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int],
    banned: Sequence[int] = (),
) -> torch.Tensor:  # fmt: skip
    """float32[vocab]: ``logits`` after penalties, bias and the user's processors.

    Args:
        logits: [vocab], raw, of any float type.
        prompt_ids, output_ids: what precedes the token to be drawn; the output includes the node's own path.
        banned: ids that may not be drawn here (end-of-sequence tokens before ``min_tokens``).
    """
    logits = logits.float()
    if not params.changes_logits and not banned:
        return logits
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
        if not 0 <= token < logits.numel():
            raise OptionError(f"logit_bias names token {token}, but the vocabulary has {logits.numel()}")
        logits[token] += bias
    for processor in params.logits_processors:
        logits = processor([*prompt_ids, *output_ids], logits)
    if banned:
        logits[list(banned)] = -math.inf
    return logits


def to_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """float64[vocab]: the distribution that a token is drawn from. Greedy decoding puts everything on one token."""
    logits = logits.float()
    if params.is_greedy:
        return torch.nn.functional.one_hot(logits.argmax(), logits.numel()).double()
    logits = logits / params.temperature
    if 0 < params.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -math.inf)
    probs = logits.double().softmax(-1)
    if params.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probs = probs.index_fill(0, order[before >= params.top_p], 0.0)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
    return probs / probs.sum()


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
