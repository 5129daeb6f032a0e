"""Figures of several replicas in one text."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tokentree.scale.figures import NAMES, FrontFigures, merged
from tokentree.serve.metrics import Metrics


def samples(text: bytes) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def figures(tokens: int) -> str:
    made = Metrics("model")
    made.generation_tokens.inc(tokens)
    made.accepted_by("suffix", tokens)
    made.first_token.observe(tokens)
    return made.scrape().decode()


def test_each_figure_has_its_replica_and_nothing_is_lost() -> None:
    texts = {"one": figures(3), "two": figures(4)}
    found = samples(merged(texts))
    name = "vllm:generation_tokens_total"
    assert found[name] == {
        (("model_name", "model"), ("replica", one)): value for one, value in (("one", 3), ("two", 4))
    }
    alone = samples(texts["one"].encode())
    assert {name: len(values) for name, values in found.items()} == {
        name: 2 * len(values) for name, values in alone.items()
    }
    for name, values in alone.items():
        for labels, value in values.items():
            assert found[name][tuple(sorted([*labels, ("replica", "one")]))] == value


def test_a_family_is_told_once() -> None:
    text = merged({"one": figures(3), "two": figures(4)}).decode()
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads)) > 10
    assert "# TYPE vllm:generation_tokens_total counter" in heads
    assert "# TYPE vllm:time_to_first_token_seconds histogram" in heads


def test_no_replicas_have_no_figures() -> None:
    assert merged({}) == b""


def test_the_front_has_figures_of_its_own() -> None:
    made = FrontFigures("model", "front")
    made.replicas.set(2)
    made.tried_again.inc()
    labels = (("front", "front"), ("model_name", "model"))
    found = samples(made.scrape())
    assert [found[name][labels] for name in NAMES] == [2, 1, 0]
