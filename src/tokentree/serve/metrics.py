"""What a server counts, for Prometheus. Names are vLLM's, where it counts the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tokentree.scheduler import Event
from tokentree.sequence import Sequence as Request

FIRST = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # seconds
BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
REASONS = {"stop": "stop", "length": "length", "timeout": "timeout", "interrupted": "abort", "error": "error"}


class Metrics:
    """The figures of a server, in a registry of their own. Each has the label ``model_name``."""

    def __init__(self, model_name: str) -> None:
        self._registry, self._model = CollectorRegistry(), model_name
        counter, histogram = self._counter, self._histogram
        self.drafts = counter("vllm:spec_decode_num_drafts", "Steps that verified a draft.")
        self.draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Candidates in all trees.")
        self.accepted_tokens = counter("vllm:spec_decode_num_accepted_tokens", "Candidates that were accepted.")
        self._per_pos = self._labelled(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted candidates by their depth, from 0.", "position"
        )
        self._by_drafter = self._labelled("tokentree:accepted_tokens", "Accepted candidates by drafter.", "drafter")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("vllm:generation_tokens", "New tokens.")
        self.prefix_queries = counter("vllm:prefix_cache_queries", "Tokens of prompts that were looked up.")
        self.prefix_hits = counter("vllm:prefix_cache_hits", "Tokens of prompts whose KV was there already.")
        self._finished = self._labelled("vllm:request_success", "Texts by how they ended.", "finished_reason")
        self.first_token = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST)
        self.between = histogram("vllm:inter_token_latency_seconds", "A step's time by its tokens.", BETWEEN)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self.queued = histogram("vllm:request_queue_time_seconds", "From arrival to the first reading.", FIRST)
        for reason in REASONS.values():
            self.finished(reason, 0)

    def _counter(self, name: str, told: str) -> Counter:
        return Counter(name, told, ["model_name"], registry=self._registry).labels(self._model)

    def _labelled(self, name: str, told: str, label: str) -> Counter:
        return Counter(name, told, ["model_name", label], registry=self._registry)

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, told, ["model_name"], registry=self._registry, buckets=buckets)
        return made.labels(self._model)

    def gauge(self, name: str, told: str, value: Callable[[], float]) -> None:
        """Tells ``value()`` under this name."""
        Gauge(name, told, ["model_name"], registry=self._registry).labels(self._model).set_function(value)

    def memory(self, told: str, parts: Mapping[str, Callable[[], float]]) -> None:
        """Tells how much memory each part takes, in bytes."""
        made = Gauge("tokentree:memory_bytes", told, ["model_name", "part"], registry=self._registry)
        for part, value in parts.items():
            made.labels(self._model, part).set_function(value)

    def accepted_at(self, position: int, count: int = 1) -> None:
        """Counts accepted candidates at this depth, from 0."""
        self._per_pos.labels(self._model, str(position)).inc(count)

    def accepted_by(self, drafter: str, count: int) -> None:
        """Counts accepted candidates of this drafter."""
        self._by_drafter.labels(self._model, drafter).inc(count)

    def finished(self, reason: str, count: int = 1) -> None:
        """Counts texts that ended so."""
        self._finished.labels(self._model, reason).inc(count)

    def scrape(self) -> bytes:
        """All figures, in the text format of Prometheus."""
        return generate_latest(self._registry)


class Meter:
    """Counts what one request does, as it does it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._came = metrics, time.monotonic()
        self._last: dict[int, float] = {}  # of each text, when its last tokens came
        self._steps: dict[int, int] = {}  # and how many of its steps are counted
        self._sources: dict[int, dict[str, int]] = {}
        self._ended = set[int]()

    @contextmanager
    def counting(self, seqs: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Counts those of ``seqs`` as aborted that haven't ended when the block does."""
        try:
            yield seqs
        finally:
            self._metrics.finished(REASONS["interrupted"], sum(seq.id not in self._ended for seq in seqs))

    def count(self, seq: Request, event: Event) -> None:
        """Counts what ``event`` tells of ``seq``."""
        metrics, now = self._metrics, time.monotonic()
        last = self._last.get(seq.id)
        if last is None and (event.tokens or event.finish_reason == "length"):
            self._begun(seq)
        if event.tokens:
            if last is None:
                metrics.first_token.observe(now - self._came)
            else:
                for _ in event.tokens:
                    metrics.between.observe((now - last) / len(event.tokens))
            self._last[seq.id] = now
            metrics.generation_tokens.inc(len(event.tokens))
        self._speculated(seq)
        if event.finish_reason is not None:
            self._ended.add(seq.id)
            metrics.finished(REASONS[event.finish_reason])
            metrics.whole.observe(now - self._came)

    def _begun(self, seq: Request) -> None:
        metrics = self._metrics
        metrics.queued.observe(seq.metrics.queue_seconds)
        metrics.prompt_tokens.inc(len(seq.prompt_ids))
        metrics.prefix_queries.inc(len(seq.prompt_ids))
        metrics.prefix_hits.inc(min(seq.metrics.reused_tokens, len(seq.prompt_ids)))

    def _speculated(self, seq: Request) -> None:
        metrics, counted = self._metrics, self._steps.get(seq.id, 0)
        new = seq.metrics.steps[counted:]
        self._steps[seq.id] = counted + len(new)
        for rows, tokens, _ in new:
            metrics.drafts.inc(rows > 1)
            metrics.draft_tokens.inc(rows - 1)
            metrics.accepted_tokens.inc(max(0, tokens - 1))
            for position in range(tokens - 1):
                metrics.accepted_at(position)
        known = self._sources.setdefault(seq.id, {})
        for name, count in list(seq.metrics.accepted_by_source.items()):
            if count > known.get(name, 0):
                metrics.accepted_by(name, count - known.get(name, 0))
                known[name] = count
