"""Chats with servers: ours, and such as say anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.serve.serving import Served, serving, slowed, tiny_llm
from tokentree import OptionError, SamplingParams
from tokentree.chatting.commands import typed
from tokentree.chatting.remote import Remote, RemoteError, base_of, step_in
from tokentree.chatting.session import Session

OPTIONS = {"max_tokens": 30, "temperature": 0.0}


async def _answers(remote: Remote, *lines: str) -> tuple[Session, list[str]]:
    session, texts = Session(remote), list[str]()
    try:
        await remote.start()
        for line in lines:
            done = typed(session, line)
            texts.append("".join([part.text async for part in session.answer()]) if done.asks else done.told)
    finally:
        await remote.close()
    return session, texts


def answers(remote: Remote, *lines: str) -> tuple[Session, list[str]]:
    """What comes of ``lines``: answers, or what commands tell."""
    return asyncio.run(_answers(remote, *lines))


# -- ours -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(tiny_llm(), keys=("secret",)) as server:
        yield server
        server.wait_idle()


def test_a_server_of_ours_answers_as_its_model_does(served: Served) -> None:
    lines = ("one two three four five six seven", "/tree 2", "/stats", "/plain", "/retry", "/tree", "four")
    session, told = answers(Remote(served.url, "secret", None, OPTIONS | {"ignore_eos": True}), *lines)
    messages, params = session.messages, SamplingParams(max_tokens=30, ignore_eos=True)
    assert session.answerer.name == f"tiny at {served.url}/v1"
    for place, text in ((1, told[4]), (3, told[6])):
        assert messages[place] == {"role": "assistant", "content": text}
        assert text == served.llm.chat(messages[:place], params).text
    assert told[0] == told[4]
    assert told[1].count("  bonus") == 2
    assert "30 tokens; " in told[2]
    assert "tokens/s, prompt included; " in told[2]
    assert "tokens a forward" in told[2]
    assert told[5].count("  bonus") == 3
    assert "accepted" not in told[5]
    assert [figures.forwards for figures in session.figures[1:]] == [30, 30]  # plainly
    assert session.figures[2].reused_tokens
    assert session.figures[0].cut


def test_an_answer_of_ours_that_is_stopped_ends_the_request() -> None:
    llm = tiny_llm()
    with serving(llm) as server:
        slowed(llm, 0.02)
        remote = Remote(server.url)

        async def stopped() -> Session:
            session, written = Session(remote), asyncio.Event()
            await remote.start()
            session.ask("one two three")

            async def read() -> None:
                async for part in session.answer():
                    if part.text:
                        written.set()

            task = asyncio.create_task(read())
            await written.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await remote.close()
            return session

        session = asyncio.run(stopped())
        assert session.messages[-1]["role"] == "assistant"
        server.wait_idle()


@pytest.mark.parametrize(
    ("key", "model", "says"),
    [
        ("", None, r"the server refuses \(status 401\): .+"),
        ("wrong", "tiny", r"the server refuses \(status 401\): .+"),
        ("secret", "other", r"the server refuses \(status 404\): there is no model 'other' here: see /v1/models"),
    ],
)
def test_what_a_server_of_ours_refuses_is_a_sentence(served: Served, key: str, model: str | None, says: str) -> None:
    with pytest.raises(RemoteError, match=f"^{says}$"):
        answers(Remote(served.url, key, model), "one")


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(RemoteError, match=r"^can't reach the server at http://127.0.0.1:9/v1: [^\n]+$"):
        answers(Remote("http://127.0.0.1:9"))


# -- others -----------------------------------------------------------------------------------------------------------

MODELS = {"data": [{"id": "theirs", "owned_by": "them"}, {"id": "another"}]}
Handler = Callable[[httpx.Request], httpx.Response]


class Stream(httpx.AsyncByteStream):
    """An answer that comes in these parts; an error among them is raised where it stands."""

    def __init__(self, *parts: bytes | Exception) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part


def event(content: Any = None, reason: str | None = None, **more: Any) -> bytes:
    body = {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason} | more]}
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def talking(handler: Handler, models: Any = MODELS, model: str | None = None) -> Remote:
    """Somebody's server."""

    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=models) if request.url.path.endswith("/models") else handler(request)

    client = httpx.AsyncClient(transport=httpx.MockTransport(respond))
    return Remote("http://theirs", model=model, options={"seed": 3}, client=client)


def saying(*parts: bytes | Exception, models: Any = MODELS) -> Remote:
    return talking(lambda _: httpx.Response(200, stream=Stream(*parts)), models)


END = b"data: [DONE]\n\n"


def test_a_server_of_others_is_asked_in_its_own_words() -> None:
    asked = list[Any]()

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, stream=Stream(event("Hi"), event(reason="stop"), END))

    session, told = answers(talking(handler), "one")
    assert told == ["Hi"]
    assert asked == [
        (
            "/v1/chat/completions",
            {
                "model": "theirs",
                "messages": [{"role": "user", "content": "one"}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "seed": 3,
            },
        )
    ]
    assert session.figures[0].tokens is None
    for command in ("/plain", "/tree"):
        with pytest.raises(OptionError, match=r"^this server isn't `tokentree serve`, which alone "):
            typed(session, command)
    assert session.speculating


def test_a_name_is_taken_where_a_server_tells_no_models() -> None:
    tells: list[Any] = [[], {"data": None}, {"data": [{"id": 3}, 4]}, "no"]
    for models in tells:
        said = talking(lambda _: httpx.Response(200, stream=Stream(event("Hi", "stop"))), models, "named")
        assert answers(said, "one")[1] == ["Hi"]
        with pytest.raises(RemoteError, match=r"tells no models: name one by --model$"):
            answers(saying(models=models))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_texts_come_whole_whatever_cuts_the_stream(end: bytes) -> None:
    texts = ["line\u2028line\u2029\x85\x0b\x0c\x1c", "één 東京 🏃", "a\nb\r", "", "data: x"]
    whole = b": hello\n" + b"".join(map(event, texts)) + event(reason="length") + b"event: x\ndata:[DONE]\n\n"
    whole = whole.replace(b"\n", end)
    for size in (1, 3, 7, len(whole)):
        parts = [whole[start : start + size] for start in range(0, len(whole), size)]
        session, told = answers(saying(*parts), "one")
        assert told == ["".join(texts)]
        assert session.figures[0].cut


@pytest.mark.parametrize(
    ("parts", "kept", "says"),
    [
        ([event("Hi")], "Hi", "the server's answer broke off"),
        ([event("Hi"), END], "Hi", "the server's answer broke off"),
        ([event("Hi"), httpx.ReadError("reset\nby peer")], "Hi", r"can't reach the server at http://theirs/v1: reset"),
        ([httpx.ReadTimeout("")], "", "the server at http://theirs/v1 doesn't answer in time"),
        ([httpx.RemoteProtocolError("")], "", "can't reach the server at http://theirs/v1: RemoteProtocolError"),
        ([event("Hi"), b'data: {"error": {"message": "no\\nroom"}}\n\n', END], "Hi", "the server failed: no room"),
        ([b"data: {}\n\n"], "", "the server's answer broke off"),
        ([b"data: [1]\n\n"], "", "the server's answer is no stream of events in JSON"),
        ([b"data: " + b"[" * 10**5 + b"\n"], "", "the server's answer is no stream of events in JSON"),
        ([b"<html>\n", b"</html>"], "", "the server's answer broke off"),
        ([b"data: " + b"x" * (1 << 23)] * 3, "", "the server's answer has a line without an end"),
        ([event(3), event([]), event({}, reason="stop")], None, ""),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_a_sentence(parts: list[bytes | Exception], kept: str | None, says: str) -> None:
    remote = saying(*parts)
    if kept is None:
        assert answers(remote, "one")[1] == [""]
        return
    session = Session(remote)

    async def read() -> str:
        await remote.start()
        session.ask("one")
        with pytest.raises(RemoteError) as raised:
            async for _ in session.answer():
                pass
        return str(raised.value)

    assert asyncio.run(read()) == says
    assert session.messages[1:] == ([{"role": "assistant", "content": kept}] if kept else [])


@pytest.mark.parametrize(
    ("status", "content", "says"),
    [
        (429, b'{"error": {"message": "slow\\n down"}}', "the server refuses (status 429): slow down"),
        (400, b'{"error": "bad"}', "the server refuses (status 400): bad"),
        (422, b'{"detail": "worse"}', "the server refuses (status 422): worse"),
        (400, b'{"object": "error", "message": "vllm"}', "the server refuses (status 400): vllm"),
        (502, b"<html>", "the server refuses (status 502)"),
        (301, b"", "the server refuses (status 301)"),
        (500, b"[" * 10**5, "the server refuses (status 500)"),
        (500, b"x" * 10**6, "the server refuses (status 500)"),
    ],
)
def test_a_refusal_is_a_sentence(status: int, content: bytes, says: str) -> None:
    with pytest.raises(RemoteError) as raised:
        answers(talking(lambda _: httpx.Response(status, content=content)), "one")
    assert str(raised.value) == says


def test_figures_are_what_a_server_tells() -> None:
    usage = {"completion_tokens": 12, "prompt_tokens": 5, "prompt_tokens_details": None}
    last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    session, told = answers(saying(event("a"), event("b", "stop"), last, END), "one", "/stats")
    assert session.figures[0].forwards is None
    assert told[1].startswith("last answer: 12 tokens; ")
    assert told[1].endswith("; prompt 5 tokens")
    odd = {"completion_tokens": "many", "prompt_tokens": -1}
    last = b"data: " + json.dumps({"choices": None, "usage": odd, "metrics": []}).encode() + b"\n\n"
    assert answers(saying(event("b", "stop"), last, END), "one", "/stats")[1][1] == "last answer: no figures"


NODE = {"text": "a\x1b", "parent": -1, "log_prob": 0.0, "drafters": [], "accepted": True}


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {},
        {"nodes": [], "bonus": {"text": "x"}},
        {"nodes": [NODE], "bonus": "x"},
        {"nodes": [NODE | {"parent": 0}], "bonus": {"text": "x"}},
        {"nodes": [NODE, NODE], "bonus": {"text": "x"}},
        {"nodes": [NODE, NODE | {"parent": 1}], "bonus": {"text": "x"}},
        {"nodes": [NODE | {"log_prob": "?"}], "bonus": {"text": "x"}},
        {"nodes": [NODE | {"parent": float("inf")}], "bonus": {"text": "x"}},
        {"nodes": [NODE | {"drafters": None}], "bonus": {"text": "x"}},
    ],
)
def test_what_is_no_tree_is_left_out(tree: Any) -> None:
    assert step_in(tree) is None
    good = {"nodes": [NODE, NODE | {"parent": 0, "drafters": ["\x1b[2J"], "log_prob": 9.0}], "bonus": {"text": "\n"}}
    models = {"data": [{"id": "theirs", "owned_by": "tokentree"}]}
    told = answers(saying(event("a", trees=[tree, good]), event("b", "stop"), models=models), "one", "/tree")[1][1]
    assert told.splitlines()[1:] == ["last step: 'a\\x1b'", "└── 'a\\x1b'  1.00  accepted", "    └── '\\n'  bonus"]


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("https://api.theirs.com/v1/", "https://api.theirs.com/v1"),
        ("https://theirs.com/api/v1", "https://theirs.com/api/v1"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert base_of(url) == base


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://theirs", "http://", "http://a:b:c", "file:///etc", "http://x?y=1", "http://\x00"]
)  # fmt: skip
def test_what_is_no_address_is_a_sentence(url: str) -> None:
    with pytest.raises(OptionError, match=r"^--url .* is no address of a server: write it as http://localhost:8000$"):
        base_of(url)
