"""One text being decoded: its tokens, its limits, its stop rules and its random stream."""

from __future__ import annotations

import itertools
import math
import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from tokentree.errors import OptionError, PromptError, RequestError, TokenTreeError, told
from tokentree.grammars.guide import Guide
from tokentree.kernels.topk import greedy
from tokentree.metrics import Metrics
from tokentree.sampling import Noise, SamplingParams, process_logits, to_probs
from tokentree.text import Detokenizer

if TYPE_CHECKING:
    from tokentree.draft import Draft
    from tokentree.prompt_kv import PromptKV

FinishReason = Literal["stop", "length", "timeout", "interrupted", "error"]

ACCEPT, DRAFT = 0, 1  # what the random numbers of a position are for; DRAFT + n: for the children of a draft's node n


class Accepted(NamedTuple):
    """What one verify step adds to a sequence.

    Args:
        path: the accepted nodes, from the root (0, included) down.
        tokens: the new tokens, one for each node of ``path``: those of ``path[1:]``, then the bonus token.
        refused: whether the walk ended at a node whose children were all refused, rather than at a leaf.
        finish_reason: set where the text ends with these tokens.
        text_end: set where a stop string ends it: how many characters of the output's text come before.
        error: why it can't go on behind these tokens. There may be none of them then, and no path.
    """

    path: list[int]
    tokens: list[int]
    refused: bool = False
    finish_reason: FinishReason | None = None
    text_end: int | None = None
    error: RequestError | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Raw log-probabilities at one position: of the token that is there, and of the most probable ones."""

    token: int
    logprob: float
    top: dict[int, float]


@dataclass(eq=False)
class Sequence:
    """The state of one text. Engines and drafters keep what they know of it themselves, under its `id`.

    Args:
        prompt_ids: the prompt, at least one token.
        params: how it is decoded.
        noise: its random stream, ``(position, purpose) -> Noise``.
        context: the most positions that prompt and output may fill together.
        eos_ids: tokens that end the text.
        detokenizer: needed for stop strings.
        references: texts that the output may copy from; lookups search them.
        stop_rules: further rules, called with all ids after each new token; any True ends the text.
        guide: what ``params.structured_outputs`` allows; without such an option there is none.
        prompt_kv: the KV of a prompt that the model read by itself.
        watch: called after each of its steps with itself, the draft, and what was accepted of it, see `Decoder`.
        made: when the request was made, on the clock of the `Decoder` that decodes it.

    Raises:
        PromptError: if the prompt is empty or leaves no room in the context.
        OptionError: if ``params.structured_outputs`` is there without a guide, or ``params.prompt_logprobs`` with a
            ``prompt_kv``.

    Attributes:
        changes_logits: whether anything but temperature, truncation and ``min_tokens`` touches the logits.
        takes_best: whether each token is simply the one with the largest raw logit.
        finish_reason: why it ended, None as long as it goes on.
        error: with the finish reason "error", what ended it.
        deadline: when ``params.timeout`` is over, on the same clock as `made`.
        prompt_logprobs: of the first tokens of the prompt, as far as they have been scored. That of the first is None.
    """

    prompt_ids: list[int]
    params: SamplingParams
    noise: Callable[[int, int], Noise]
    context: int
    eos_ids: frozenset[int] = frozenset()
    detokenizer: Detokenizer | None = None
    stop_rules: abc.Sequence[Callable[[list[int]], bool]] = ()
    references: abc.Sequence[list[int]] = ()
    guide: Guide | None = None
    id: int = field(default_factory=itertools.count().__next__)
    metrics: Metrics = field(default_factory=Metrics)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    text_end: int | None = None
    error: TokenTreeError | None = None
    watch: Callable[[Sequence, Draft, Accepted], None] | None = None
    prompt_kv: PromptKV | None = None
    made: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise PromptError("the prompt is empty: give at least one token")
        if len(self.prompt_ids) >= self.context:
            raise PromptError(
                f"the prompt has {len(self.prompt_ids)} tokens and the context holds {self.context}: "
                "no room for an answer"
            )
        if self.params.structured_outputs is not None and self.guide is None:
            raise OptionError("structured_outputs needs a guide: LLM.sequence makes such a request")
        if self.params.prompt_logprobs is not None and self.prompt_kv is not None:
            raise OptionError("there are no prompt_logprobs of a prompt that the model read by itself")
        # whether rules, and rules beside ``min_tokens``, touch the logits; both are asked for at every node
        self.changes_logits = self.params.changes_logits or self.guide is not None
        self._has_rules = self.changes_logits or bool(self.params.min_tokens)
        self.takes_best = self.params.is_greedy and not self._has_rules
        self.tokens = list(self.prompt_ids)
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self._most = min(len(self.prompt_ids) + self.params.max_tokens, self.context)  # tokens, with the prompt's
        self.metrics.prompt_tokens = len(self.prompt_ids)
        timeout = self.params.timeout
        self.deadline = math.inf if timeout is None else self.made + timeout

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.prompt_ids) :]

    @property
    def room(self) -> int:
        """How many tokens may still be added."""
        return self._most - len(self.tokens)

    @property
    def scores_prompt(self) -> bool:
        """Whether tokens of the prompt still have to be scored: the logits after those that are read are needed."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_ids)

    @property
    def reusable(self) -> int:
        """How many of its first tokens may have KV of another text: those after which no logits are needed."""
        return len(self.prompt_logprobs if self.scores_prompt else self.tokens) - 1

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    # -- what the target says at a node ---------------------------------------------------------------------------

    def processed(self, logits: torch.Tensor, path: abc.Sequence[int]) -> torch.Tensor:
        """float32[vocab]: ``logits`` at the node reached by the tokens ``path`` below the root, all rules applied.

        Raises:
            RequestError: if the rules fail, see `process_logits`.
        """
        if not self._has_rules:
            return logits.float()
        output = [*self.output_ids, *path]
        banned: tuple[int, ...] = ()
        if len(output) < self.params.min_tokens:
            banned = tuple({*self.eos_ids, *self.params.stop_token_ids})
        allowed = None if self.guide is None else self.followed(self.guide).allowed(path)
        return process_logits(logits, self.params, self.prompt_ids, output, banned, allowed)

    def followed(self, guide: Guide) -> Guide:
        """``guide``, behind all tokens of the output."""
        guide.follow(self.tokens, len(self.prompt_ids))
        return guide

    def draw(self, logits: torch.Tensor, path: abc.Sequence[int]) -> int:
        """The token that plain decoding emits after ``path``, given raw ``logits`` [vocab] there: drawn with the
        noise of that absolute position, so that it depends on nothing else.

        Raises:
            RequestError: if there is none to draw.
        """
        if self.params.is_greedy:
            return greedy(self.processed(logits, path) if self._has_rules else logits)
        scores = self.processed(logits, path)
        return self.noise_after(path, ACCEPT).choose(to_probs(scores, self.params))

    def noise_after(self, path: abc.Sequence[int], purpose: int) -> Noise:
        """The random numbers of the position that follows ``path``."""
        return self.noise(len(self.tokens) + len(path), purpose)

    def noise_below(self, node: int) -> Noise:
        """The random numbers that the children of ``node`` of the next draft are drawn with. No other node has them,
        and no later draft: rules that judge a draft as a whole rely on it."""
        return self.noise(len(self.tokens), DRAFT + node)

    # -- growing ---------------------------------------------------------------------------------------------------

    def truncate(self, accepted: Accepted) -> Accepted:
        """Cuts what a step adds where a limit or a stop rule ends the text. What failed behind that is of no account:
        plain decoding would not have come there."""
        detokenizer, room = self.detokenizer.copy() if self.detokenizer and self.params.stop else None, self.room
        for count in range(1, len(accepted.tokens) + 1):
            new = accepted.tokens[:count]
            try:
                stopped, text_end = self._stops(new, detokenizer)
            except RequestError as error:
                return Accepted(accepted.path[: count - 1], new[:-1], finish_reason="error", error=error)
            if stopped or count == room:
                refused = accepted.refused and count == len(accepted.tokens)
                return Accepted(accepted.path[:count], new, refused, "stop" if stopped else "length", text_end)
        return accepted if accepted.error is None else accepted._replace(finish_reason="error")

    def _stops(self, new: list[int], detokenizer: Detokenizer | None) -> tuple[bool, int | None]:
        """Whether the text ends with the last of the tokens ``new``, and where a stop string cuts it."""
        token, params, text_end = new[-1], self.params, None
        if detokenizer is not None:
            before = detokenizer.place
            detokenizer.push([token])
            text_end = detokenizer.first_stop(params.stop, before)
        if self.guide is not None and self.followed(self.guide).completes(new):
            return True, text_end
        if len(self.tokens) + len(new) - len(self.prompt_ids) < params.min_tokens:
            return False, None
        ends = (token in self.eos_ids and not params.ignore_eos) or token in params.stop_token_ids
        return ends or self._ends_by_rule(new) or text_end is not None, text_end

    def _ends_by_rule(self, new: list[int]) -> bool:
        """Whether one of `stop_rules` ends the text with the last of the tokens ``new``."""
        for rule in self.stop_rules:
            try:
                if rule([*self.tokens, *new]):
                    return True
            except Exception as error:
                raise RequestError(f"a rule that says where the text ends raised {told(error)}") from error
        return False

    def extend(self, accepted: Accepted) -> None:
        """Makes the tokens of a truncated step part of the text."""
        self.tokens += accepted.tokens
        self.metrics.new_tokens += len(accepted.tokens)
        self.finish_reason, self.text_end, self.error = accepted.finish_reason, accepted.text_end, accepted.error
        if self.detokenizer is not None:
            self.detokenizer.push(accepted.tokens)
