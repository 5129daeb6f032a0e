"""Figures of all replicas in one text for Prometheus, and those of what stands before them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

NAMES = ("tokentree:replicas", "tokentree:requests_tried_again_total", "tokentree:requests_lost_total")


def merged(texts: Mapping[str, str]) -> bytes:
    """One text out of those of all replicas. Each figure has the label ``replica``.

    Args:
        texts: by the replica's name.
    """
    registry = CollectorRegistry()
    registry.register(_Families(texts))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        found = dict[str, Metric]()
        for replica, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text):
                one = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    one.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        yield from found.values()


class FrontFigures:
    """What a front counts.

    Attributes:
        replicas: how many answered the last time.
        tried_again: requests that were given to another replica.
        lost: requests that ended with their replica.
    """

    def __init__(self, model_name: str, front: str) -> None:
        self._registry, labels = CollectorRegistry(), ("model_name", "front")
        first, again, last = NAMES
        self.replicas = Gauge(first, "Replicas that answer.", labels, registry=self._registry).labels(model_name, front)
        self.tried_again = Counter(
            again, "Requests that were tried again on another replica.", labels, registry=self._registry
        ).labels(model_name, front)
        self.lost = Counter(last, "Requests that ended with their replica.", labels, registry=self._registry).labels(
            model_name, front
        )

    def scrape(self) -> bytes:
        """All of them, in the text format of Prometheus."""
        return generate_latest(self._registry)
