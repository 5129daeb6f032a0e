"""Figures for Prometheus, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.serving import NAME, Served, serving, slowed, tiny_llm, until
from tests.tiny_models import kv_engine, some_tokens
from tokentree.scale.figures import NAMES

BODY: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
BODY |= {"logit_bias": {str(token): 100 for token in (81, 270, 259)}, "speculation": {"shape": "2x2x1"}}


def scrape(served: Served) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """All samples by name and labels other than the model's."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(served.http.get("/metrics").text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == NAME
            found.setdefault(sample.name, {})[tuple(labels.items())] = sample.value
    return found


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    llm = tiny_llm(kv_mb=4)
    with serving(llm, max_batch=2) as served:
        yield served


def test_figures_are_those_of_the_answers(served: Served) -> None:
    answers = [served.post("/v1/completions", BODY | {"prompt": some_tokens(40, seed=i // 2)}).json() for i in range(4)]
    streamed = served.post(
        "/v1/completions", BODY | {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    )
    answers.append(json.loads(streamed.text.strip().splitlines()[-3].removeprefix("data: ")))
    usage = [answer["usage"] for answer in answers]
    told = [answer["metrics"]["speculative_decoding"] for answer in answers]
    found = {name: sum(samples.values()) for name, samples in scrape(served).items()}

    def total(name: str) -> int:
        return int(sum(one[name] for one in told))

    assert found["vllm:spec_decode_num_drafts_total"] == total("num_spec_steps") > 0
    assert found["vllm:spec_decode_num_draft_tokens_total"] == total("num_draft_tokens")
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == total("num_accepted_draft_tokens") > 0
    assert found["vllm:spec_decode_num_accepted_tokens_per_pos_total"] == total("num_accepted_draft_tokens")
    assert found["vllm:prompt_tokens_total"] == sum(one["prompt_tokens"] for one in usage)
    assert found["vllm:prefix_cache_queries_total"] == sum(one["prompt_tokens"] for one in usage)
    cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usage)
    assert found["vllm:prefix_cache_hits_total"] == cached > 0
    assert found["vllm:generation_tokens_total"] == 5 * 60
    assert found["vllm:request_success_total"] == 5
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"vllm:{name}_seconds_count"] == 5
        assert found[f"vllm:{name}_seconds_sum"] > 0
    assert 200 < found["vllm:inter_token_latency_seconds_count"] < 5 * 60
    by_drafter = scrape(served)["tokentree:accepted_tokens_total"]
    expected = dict[tuple[tuple[str, str], ...], float]()
    for one in told:
        for drafter, count in one["accepted_by_drafter"].items():
            expected[("drafter", drafter),] = expected.get((("drafter", drafter),), 0) + count
    assert by_drafter == expected
    positions = scrape(served)["vllm:spec_decode_num_accepted_tokens_per_pos_total"]
    in_order = [positions[("position", str(place)),] for place in range(len(positions))]
    assert in_order == sorted(in_order, reverse=True)


def test_reasons_are_counted(served: Served) -> None:
    before = scrape(served)["vllm:request_success_total"]
    assert served.post("/v1/completions", BODY | {"prompt": "a", "stop_token_ids": [81, 270, 259]}).status_code == 200
    after = scrape(served)["vllm:request_success_total"]
    assert after[("finished_reason", "stop"),] == before[("finished_reason", "stop"),] + 1
    assert {reason for ((_, reason),) in after} == {"stop", "length", "timeout", "abort", "error"}


def test_gauges_tell_what_is_under_way() -> None:
    llm = tiny_llm(kv_mb=4)
    slowed(llm, 0.02)
    with serving(llm, max_batch=2) as served:
        body = {"prompt": "a", "n": 3, "max_tokens": 300, "ignore_eos": True, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body):
            until(lambda: served.service._sum("running") == 2)
            until(lambda: scrape(served)["vllm:kv_cache_usage_perc"][()] > 0)
            found = scrape(served)
            assert found["vllm:num_requests_running"][()] == 2
            assert found["vllm:num_requests_waiting"][()] == 1
            assert 0 < found["vllm:kv_cache_usage_perc"][()] < 1
        served.wait_idle()
        found = scrape(served)
        assert {name: found[f"vllm:{name}"][()] for name in ("num_requests_running", "kv_cache_usage_perc")} == {
            "num_requests_running": 0,
            "kv_cache_usage_perc": 0,
        }
        assert found["vllm:request_success_total"][("finished_reason", "abort"),] == 3


def test_every_query_of_the_dashboard_names_figures_that_there_are(served: Served) -> None:
    assert served.post("/v1/completions", BODY | {"prompt": some_tokens(40)}).status_code == 200
    board = json.loads((files("tokentree.serve") / "dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) > 12
    there = {**scrape(served), **dict.fromkeys(NAMES)}  # those of replicas too
    named = set[str]()
    for query in queries:
        names = re.findall(r"\b(?:vllm|tokentree):\w+", query)
        assert names, query
        assert [name for name in names if name not in there] == []
        named.update(names)
    counted = {name for name in there if not name.endswith(("_created", "_bucket", "_count", "_sum"))}
    assert sorted(counted - named) == []  # and it shows all that there is
    own = [query for query in queries if not any(name in query for name in NAMES)]
    assert all(query.count("{") - query.count("{{") == query.count('replica=~"$replica"') for query in own)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_memory_is_told_by_its_parts() -> None:
    with serving(tiny_llm(prefix_mb=1, lookup_mb=1)) as served:
        before = scrape(served)["tokentree:memory_bytes"]
        assert (before[("part", "kv"),], before[("part", "prefixes"),]) == (0, 0)
        body = BODY | {"prompt": some_tokens(40), "speculation": None}
        assert served.post("/v1/completions", body).status_code == 200
        served.wait_idle()
        after = scrape(served)["tokentree:memory_bytes"]
        assert after[("part", "kv"),] == 0
        assert after[("part", "prefixes"),] == kv_engine(served.llm).prefix_nbytes > 0
        assert after[("part", "lookups"),] == served.llm.decoder.drafter.nbytes > 0
