"""What an answer tells beside its text: log-probabilities, trees, usage, what speculation gained."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.serving import NAME, Served, events_of, serving, tiny_llm
from tests.tiny_models import some_tokens
from tokentree import SamplingParams
from tokentree.draft import Draft
from tokentree.sequence import Accepted, Sequence, TokenLogprobs
from tokentree.serve.tokens import TokenTexts

LOOP: dict[str, Any] = {"prompt": "one two three " * 6, "temperature": 0, "max_tokens": 60, "ignore_eos": True}
LOOP |= {"logit_bias": {str(token): 100 for token in (81, 270, 259)}}  # few tokens are left, so drafts come true
COPIED = {"drafter": "suffix+ngram", "shape": "2x2x1"}


def known_logprobs(served: Served, **options: Any) -> list[TokenLogprobs]:
    found = served.llm.generate("one two", SamplingParams(max_tokens=20, temperature=1.0, seed=3, **options))[
        0
    ].logprobs
    assert found is not None
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [None, 0, 3])
def test_logprobs_of_chats(served: Served, count: int | None, stream: bool) -> None:
    messages = [{"role": "user", "content": "one two"}]
    ids = served.llm.chat_prompt(messages)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, logprobs=count or 0)
    expected = served.llm.generate([ids], params)[0]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 20, "seed": 3, "logprobs": True, "stream": stream}
    answer = served.post("/v1/chat/completions", body | ({} if count is None else {"top_logprobs": count}))
    if stream:
        told = [one["choices"][0]["logprobs"] for one in events_of(answer) if one is not None]
        content = [part for one in told if one for part in one["content"]]
    else:
        content = answer.json()["choices"][0]["logprobs"]["content"]
    assert expected.logprobs is not None
    texts = TokenTexts(served.service.tokenizer)
    assert [one["token"] for one in content] == [texts.text(token) for token in expected.token_ids]
    assert [one["logprob"] for one in content] == [one.logprob for one in expected.logprobs]
    tops = [{bytes(part["bytes"]): part["logprob"] for part in one["top_logprobs"]} for one in content]
    assert tops == [{bytes(texts.bytes(token)): value for token, value in one.top.items()} for one in expected.logprobs]
    whole = b"".join(bytes(one["bytes"]) for one in content)
    assert whole.decode(errors="replace") == served.service.tokenizer.decode(expected.token_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(served: Served, stream: bool) -> None:
    expected = known_logprobs(served, logprobs=2)
    body: dict[str, Any] = {"prompt": "one two", "max_tokens": 20, "seed": 3, "logprobs": 2, "stream": stream}
    answer = served.post("/v1/completions", body)
    parts = [one for one in events_of(answer) if one] if stream else [answer.json()]
    text, told = "", dict[str, list[Any]]()
    for part in parts:
        text += part["choices"][0]["text"]
        for name, values in part["choices"][0]["logprobs"].items():
            told.setdefault(name, []).extend(values)
    assert told["token_logprobs"] == [one.logprob for one in expected]
    assert [len(one) for one in told["top_logprobs"]] == [len({one.token, *one.top}) for one in expected]
    for name, logprob, top, one in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], expected, strict=True
    ):
        assert top[name] == logprob
        assert sorted(top.values()) == sorted({one.token: one.logprob, **one.top}.values())
    places = told["text_offset"]
    assert places == sorted(places)
    plain = [(name, place) for name, place in zip(told["tokens"], places, strict=True) if not name.startswith("bytes:")]
    assert len(plain) > 3
    assert all(text[place:].startswith(name) for name, place in plain)


@pytest.mark.parametrize("stream", [False, True])
def test_trees_are_those_of_this_request_s_steps(served: Served, stream: bool) -> None:
    """Beside another request, whose trees nobody asked for."""
    seen = list[tuple[Draft, Accepted]]()
    twin = served.llm.using(
        ["suffix", "ngram"], "2x2x1", watch=lambda _, draft, accepted: seen.append((draft, accepted))
    )
    params = SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, logit_bias=dict.fromkeys((81, 270, 259), 100.0)
    )
    expected = twin.generate(LOOP["prompt"], params)[0]
    body = LOOP | {"speculation": {"drafter": "suffix+ngram", "shape": "2x2x1"}, "return_tree": True, "stream": stream}
    # a twin of its own, so that both know the same of earlier texts
    with serving(served.llm) as other, other.http.stream("POST", "/v1/completions", json=LOOP | {"stream": True}):
        answer = other.post("/v1/completions", body)
        parts = [one for one in events_of(answer) if one] if stream else [answer.json()]
    assert "".join(part["choices"][0]["text"] for part in parts) == expected.text
    trees = [tree for part in parts for tree in part["choices"][0]["trees"]]
    assert len(trees) == len(seen) == expected.metrics.target_forwards
    names = ["suffix", "ngram"]
    for tree, (draft, accepted) in zip(trees, seen, strict=True):
        nodes = tree["nodes"]
        assert [node["token"] for node in nodes] == draft.tokens
        assert [node["parent"] for node in nodes] == draft.parents
        assert [number for number, node in enumerate(nodes) if node["accepted"]] == sorted(accepted.path)
        proposed = [[name for bit, name in enumerate(names) if sources >> bit & 1] for sources in draft.sources[1:]]
        assert [node["drafters"] for node in nodes[1:]] == proposed
        assert tree["bonus"]["token"] == accepted.tokens[-1]
    assert max(len(accepted.path) for _, accepted in seen) > 1  # something was accepted
    if stream:
        assert sum(bool(part["choices"][0]["trees"]) for part in parts) > 1  # how many go together is a matter of time


def test_usage_and_metrics_say_what_speculation_gained(served: Served) -> None:
    options = LOOP | {"prompt": some_tokens(30, seed=8) * 2, "speculation": COPIED}
    whole = served.post("/v1/completions", options).json()
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    events = [
        *events_of(
            served.post("/v1/completions", options | {"stream": True, "stream_options": {"include_usage": True}})
        )
    ]
    assert events[-1] is None
    last = events[-2]
    assert last["choices"] == []
    assert all(one["usage"] is None and "metrics" not in one for one in events[:-2])
    # all but the last token of the prompt is known from the first time
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 59
    assert last["usage"]["completion_tokens"] == 60
    told = whole["metrics"]["speculative_decoding"]
    histogram = {int(count): times for count, times in told["acceptance_histogram"].items()}
    assert told["num_spec_steps"] == sum(histogram.values()) > 0
    assert told["num_accepted_draft_tokens"] == sum(count * times for count, times in histogram.items()) > 0
    assert told["mean_acceptance_length"] == 1 + told["num_accepted_draft_tokens"] / told["num_spec_steps"]
    assert told["draft_acceptance_rate"] == told["num_accepted_draft_tokens"] / told["num_draft_tokens"]
    assert sum(told["accepted_by_drafter"].values()) >= told["num_accepted_draft_tokens"]
    assert set(last["metrics"]["speculative_decoding"]) == set(told)


def test_a_stream_without_options_tells_no_usage(served: Served) -> None:
    events = [*events_of(served.post("/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 3}))]
    assert all("usage" not in one for one in events[:-1])
    assert events[-1] is None


def test_speculation_is_chosen_by_each_request(served: Served) -> None:
    def written(speculation: Any) -> tuple[str, dict[str, Any]]:
        answer = served.post("/v1/completions", LOOP | {"speculation": speculation}).json()
        return answer["choices"][0]["text"], answer["metrics"]["speculative_decoding"]

    text, told = written("off")
    assert told["num_spec_steps"] == 0
    for speculation, drafters in ((COPIED, {"suffix", "ngram"}), ({"drafter": "ngram", "shape": "chain:2"}, {"ngram"})):
        again, told = written(speculation)
        assert again == text
        assert told["num_accepted_draft_tokens"] > 0
        assert set(told["accepted_by_drafter"]) <= drafters
    assert written(None)[0] == written({})[0] == written({"shape": "2x2"})[0] == text


def test_ways_of_speculation_are_bounded_and_the_oldest_makes_room() -> None:
    with serving(tiny_llm(), twins=2, tree_nodes=20) as served:
        for length in (1, 2, 3, 4):
            body = {"prompt": "a", "max_tokens": 2, "speculation": {"drafter": "ngram", "shape": f"chain:{length}"}}
            assert served.post("/v1/completions", body).status_code == 200
        assert [key[1] for key in served.service.backends._twins] == ["chain:3", "chain:4"]
        for twin in served.service.backends._twins.values():
            twin.users += 1
        error = served.refused("/v1/completions", body | {"speculation": "off"}, 429)
        assert error["param"] == "speculation"
        error = served.refused("/v1/completions", body | {"speculation": {"shape": "4x4x4"}})
        assert (error["param"], error["code"]) == ("speculation", "too_many")
        for twin in served.service.backends._twins.values():
            twin.users -= 1
        served.wait_idle()


def test_tokens_and_texts(served: Served) -> None:
    text = "one Köln 東"
    told = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == served.service.tokenizer(text).input_ids
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == served.llm.engine.info.context
    assert served.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "one"}]
    told = served.post("/tokenize", {"messages": messages, "model": NAME}).json()
    assert told["tokens"] == served.llm.chat_prompt(messages)
    assert served.post("/detokenize", {"tokens": told["tokens"]}).json()["prompt"] == "<|user|>one<|end|><|assistant|>"


def test_the_model_and_the_server(served: Served) -> None:
    (model,) = served.client.models.list().data
    assert model.id == NAME
    assert served.client.models.retrieve(NAME) == model
    assert served.http.get("/version").json()["version"]
    for path in ("/health", "/ready"):
        assert served.http.get(path).status_code == 200


def test_the_interface_is_shown_without_other_pages(served: Served) -> None:
    spec = served.http.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/metrics", "/tokenize"} <= set(spec["paths"])
    page = served.http.get("/docs").text
    assert "http" not in page.replace("HTTP", "").replace("httpx", "")
    assert "<script" not in page
    for name in ("speculation", "return_tree", "top_logprobs", "/v1/models/{name}"):
        assert f"<code>{name}</code>" in page or name in page


def test_a_watcher_of_a_request_sees_its_steps_alone(served: Served) -> None:
    seen = list[Sequence]()
    one, two = (served.llm.sequence(some_tokens(4, seed=i), SamplingParams(max_tokens=5)) for i in range(2))
    one.watch = lambda seq, _, __: seen.append(seq)
    for _ in served.llm.run([one, two]):
        pass
    assert len(seen) == one.metrics.target_forwards
    assert set(map(id, seen)) == {id(one)}
