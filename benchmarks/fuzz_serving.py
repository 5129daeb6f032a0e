"""Sends a server of a tiny model requests that are wrong in every way that a random number can think of.

    python -m benchmarks.fuzz_serving [--requests 10000] [--seed 0] [--clients 8] [--out FILE]

From the root of the repository, as the tiny model comes from its tests. A good request is changed in its values, its
JSON, its bytes, its headers, its route, or in how it is sent: cut, nested, compressed, in pieces, in another encoding.
No answer may have a status 5xx, and each one below 500 that is an error must be OpenAI's: one sentence in JSON. An
answer must come within `PATIENCE` seconds. Behind every 500 requests a good one is asked for: its ids must be those
that were written first, nothing may be left of the others, and memory is written down. Memory grows if its mean in the
last quarter is more than 5% above that in the second one; it takes 4,000 requests to tell.
Exit status 1 if anything went wrong; a request is made again by its seed and number.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.progress import Progress

PATIENCE = 30.0  # seconds for an answer
LOOK = 500  # requests between two looks at memory
LEVEL = 1.05
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "one"}]}]
SCHEMA: dict[str, Any] = {
    "$defs": {"leaf": {"type": "object", "properties": {"v": {"type": "integer"}}, "additionalProperties": False}},
    "type": "object", "required": ["a"], "additionalProperties": False,
    "properties": {"a": {"enum": ["x", "ü"]}, "b": {"type": "string", "pattern": "^[a-c]{1,3}$"},
                   "c": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}},
}  # fmt: skip
TOOL = {"name": "weather", "description": "The weather.", "parameters": SCHEMA, "strict": True}
SAMPLED: dict[str, Any] = {
    "model": "tiny", "max_tokens": 3, "min_tokens": 0, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"5": 1.5}, "n": 1,
    "seed": 4, "stop": ["zz"], "stop_token_ids": [7], "ignore_eos": False, "stream": False, "user": "u",
    "speculation": {"drafter": "suffix", "shape": "chain:2"}, "return_tree": True, "return_token_ids": True,
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", SAMPLED | {"prompt": "one two", "logprobs": 2, "structured_outputs": {"json": SCHEMA}}),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "echo": True, "max_tokens": 2}),
    ("/v1/completions", {"prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "[a-f]{2,4}|(x|y)*z"}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"grammar": 'start: "a" B*\nB: /[bc]/'}}),
    ("/v1/chat/completions", SAMPLED | {
        "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "response_format": FORMAT, "metadata": {"a": "b"},
        "prediction": {"type": "content", "content": "one two"}, "store": False, "service_tier": "auto"}),
    ("/v1/chat/completions", {
        "messages": [*MESSAGES, {"role": "assistant", "tool_calls": [CALL]},
                     {"role": "tool", "tool_call_id": "c", "content": "sun"}],
        "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required", "parallel_tool_calls": False}),
    ("/v1/chat/completions", {"messages": MESSAGES, "stream": True, "speculation": "off", "max_completion_tokens": 4}),
    ("/v1/responses", {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "one"}]},
                  {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "sun"}],
        "instructions": "be brief", "max_output_tokens": 3, "tools": [{"type": "function", **TOOL}],
        "tool_choice": {"type": "function", "name": "weather"}, "metadata": {"a": "b"}, "include": []}),
    ("/v1/responses", {"input": "one", "stream": True, "text": {"format": {"type": "json_object"}}, "seed": 1}),
    ("/tokenize", {"prompt": "one two", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]  # fmt: skip
BIG = "9" * 5000
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 299, 300, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**30, 0.0, -0.0, 0.5,
    1e-308,
    1e308, float("nan"), float("inf"), float("-inf"), "", " ", "\0", "a\0b", "\ud800", "\udfff", "\ufeff", "\u202e",
    "e\u0301", "\U0001f9d1\u200d\U0001f680", "\uffff", "%s{0}", "../..", "a" * 300, "ü" * 5000, "1", "true",
    "null", "auto",
    "off", "<|end|>", "<|user|>", "<tool_call>", [], {}, [[]], [{}], [None], {"": ""}, {"a": {}}, [1, "a"], [5, 6],
    ["a"],
    [5.5], [-1], [2**64], {"type": "text"}, {"type": "json_object"}, {"type": "function"}, {"$ref": "#"},
    {"$ref": "#/x"}, {"$ref": "http://127.0.0.1:9/x"}, {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"anyOf": [{"$ref": "#"}]}, {"allOf": [{"$ref": "#"}, {"type": "object"}]}, {"not": {}}, {"pattern": "(a*)*b"},
    {"type": "string", "pattern": "(a{1,1000}){1,1000}"}, {"type": "array", "minItems": 10**9}, {"maxLength": 2**70},
    {"type": "string", "format": "date"}, {"type": "integer", "minimum": 5, "maximum": 4}, {"enum": []},
    {"const": None},
    "(a{1,1000}){1,1000}", "(?=a)", "[", "(a|a)*$", "a{99999}", "\\p{L}{1,100}", "start: start", "start: A\nA: /a*/ A",
    "start: %json {}", "cost", "chain:0", "chain:999999", "2x2x2", "9x9x9x9", "dynamic:nodes=-1", "suffix+suffix",
    "eagle", "none", "merged", "medusa", "dynamic:nodes=1e9", "chain:\u0663", "a+" * 100,
]  # fmt: skip
KEYS = [
    "", "a", "model", "__proto__", "__class__", "n", "stream", "type", "\0", "\ud800", "ü", "a\nb", "a" * 3000, "extra",
    "$ref",
]  # fmt: skip
TYPES = [
    None, "", "text/plain", "application/xml", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded",
    "application/json; charset=utf-16", "application/json; charset=nothing", "APPLICATION/JSON", "json", "\xff",
    "a/b/c",
]  # fmt: skip
ROUTES = [
    "/", "//", "/v1", "/v1/", "/v1/chat/completions/", "/v1//completions", "/v1/models/", "/v1/models/%00",
    "/v1/models/%ff",
    "/v1/models/tiny", "/v1/models/..%2f..%2fetc%2fpasswd", "/web/../serve.py", "/web/%2e%2e/app.py", "/web/nothing",
    "/docs", "/openapi.json", "/metrics?a=b", "/health?" + "x" * 9000, "/speculation", "/v1/embeddings",
    "/%F0%9F%98%80",
    "/web/" + "a/" * 300, "/v1/completions?stream=true", "/tokenize#x",
]  # fmt: skip
METHODS = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT", "PROPFIND", "post", "X" * 50]
HEADERS = [
    ("Authorization", "Bearer \xff\xfe"), ("Authorization", "Basic " + "a" * 4000), ("Accept", "text/html"),
    ("Content-Encoding", "gzip"), ("Content-Encoding", "br"), ("Expect", "100-continue"), ("X-Long", "a" * 30000),
    ("Cookie", "a=" + "b" * 5000), ("Range", "bytes=0-1"), ("If-None-Match", "*"), ("Origin", "http://evil"),
    ("Upgrade", "websocket"), ("Connection", "close"), ("Accept-Encoding", "gzip, br"), ("X-Forwarded-For", "\xe9"),
    ("Content-Length", "5"), ("Content-Length", "-1"), ("Content-Length", "99999999999999999999"),
    ("Content-Length", "9" * 4000), ("Transfer-Encoding", "gzip"), ("Host", ""), ("Forwarded", "for=" + "x" * 100),
]  # fmt: skip


@dataclass
class Sent:
    """A request as it goes out.

    Args:
        pieces: of the body, sent one by one; several are chunks of the transfer encoding "chunked".
        whole: whether all that was told is sent. Otherwise the connection is closed for writing in its midst.
    """

    route: str
    pieces: list[bytes]
    method: str = "POST"
    content_type: str | None = "application/json"
    headers: list[tuple[str, str]] = field(default_factory=list)
    whole: bool = True

    @property
    def bytes(self) -> bytes:
        """As they go over the wire."""
        size, body = sum(map(len, self.pieces)), b"".join(self.pieces)
        told = [("Host", "x"), *([] if self.content_type is None else [("Content-Type", self.content_type)])]
        names = {name.lower() for name, _ in self.headers}
        if len(self.pieces) > 1:
            told.append(("Transfer-Encoding", "chunked"))
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in self.pieces if piece) + b"0\r\n\r\n"
        elif not names & {"content-length", "transfer-encoding"}:
            told.append(("Content-Length", str(size)))
        lines = [f"{self.method} {self.route} HTTP/1.1", *(f"{name}: {value}" for name, value in told + self.headers)]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
        return head + (body if self.whole else body[: len(body) // 2])


# -- what is done to requests ------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values below ``value``."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, one in inner for found in [(*path, key), *places(one, (*path, key))]]


def mutated(body: Any, dice: random.Random) -> Any:
    """``body`` with one value changed."""
    body, where = deepcopy(body), places(body)
    if not where:
        return dice.choice(VALUES)
    path = dice.choice(where)
    holder, key = body, path[-1]
    for step in path[:-1]:
        holder = holder[step]
    kind = dice.randrange(8)
    if kind < 4:
        holder[key] = deepcopy(dice.choice(VALUES))
    elif kind == 4:
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):
        holder[dice.choice(KEYS)] = deepcopy(dice.choice(VALUES))
    elif kind == 6:
        holder[key] = nested(holder[key], dice)
    else:
        other = dice.choice(GOOD)[1]
        holder[key] = deepcopy(other[dice.choice([*other])])
    return body


def nested(value: Any, dice: random.Random) -> Any:
    """``value`` in many objects or lists."""
    for _ in range(dice.choice((1, 2, 40, 150))):
        value = [value] if dice.random() < 0.5 else {dice.choice(("a", "items", "properties", "anyOf")): value}
    return value


def spoilt_json(text: str, dice: random.Random) -> bytes:
    """The bytes of a body that is nearly the JSON ``text``."""
    content = text.encode("utf-8", "surrogatepass")
    place = dice.randrange(len(content) + 1)
    ways: list[Callable[[], bytes]] = [
        lambda: content[:place], lambda: content + b"}", lambda: b"\xef\xbb\xbf" + content, lambda: content + content,
        lambda: text.encode("utf-16", "surrogatepass"), lambda: text.encode("utf-32-be", "surrogatepass"),
        lambda: content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :],
        lambda: content[:place] + dice.choice((b"\xff", b"\x00", b"\xc0\x80", b"\xed\xa0\x80", b"//",
        b"'")) + content[place:],
        lambda: text[:-1].encode("utf-8", "surrogatepass") + b"," + text[1:].encode("utf-8", "surrogatepass"),
        lambda: b"[" * dice.choice((10, 1000, 200_000)), lambda: b'{"a":' * 50_000, lambda: b"[" * 2000 + b"]" * 2000,
        lambda: b'{"prompt": ' + BIG.encode() + b"}", lambda: b'{"prompt": "a", "seed": ' + BIG.encode() + b"}",
        lambda: b'{"prompt": "a", "temperature": 1e' + BIG.encode()[:400] + b"}", lambda: b"NaN", lambda: b"",
        lambda: b"null",
        lambda: b'{"prompt": "\\ud800\\ud800", "max_tokens": 1}', lambda: b'"' + b"a" * 100_000 + b'"',
        lambda: b'{"messages": [' + b",".join([b'{"role": "user", "content": "a"}'] * 3000) + b"]}",
        lambda: dice.randbytes(dice.randrange(1, 300)), lambda: b"a=1&b=2",
    ]  # fmt: skip
    return dice.choice(ways)()


def request(seed: int, number: int) -> Sent:
    """The request of this number."""
    dice = random.Random(f"{seed} {number}")
    route, body = dice.choice(GOOD)
    for _ in range(dice.choice((0, 1, 1, 1, 2, 5))):
        body = mutated(body, dice)
    text = json.dumps(body, ensure_ascii=dice.random() < 0.7)
    sent = Sent(route, [text.encode("utf-8", "surrogatepass")])
    kind = dice.randrange(20)
    if kind < 4:
        sent.pieces = [spoilt_json(text, dice)]
    elif kind == 4:
        sent.content_type = dice.choice(TYPES)
    elif kind == 5:
        sent.headers = dice.sample(HEADERS, dice.choice((1, 2)))
    elif kind == 6:
        sent.route = dice.choice(ROUTES)
        sent.method = dice.choice(("GET", "POST", *METHODS))
    elif kind == 7:
        sent.method = dice.choice(METHODS)
    elif kind == 8:
        sent.pieces = [gzip.compress(sent.pieces[0])]
        sent.headers = [("Content-Encoding", "gzip")]
    elif kind == 9:
        cuts = sorted(dice.randrange(len(sent.pieces[0]) + 1) for _ in range(dice.choice((1, 3, 50))))
        sent.pieces = [sent.pieces[0][begin:end] for begin, end in zip([0, *cuts], [*cuts, None], strict=True)]
    elif kind == 10:
        sent.whole = False
    elif kind == 11:
        sent.route = dice.choice(GOOD)[0]
    return sent


# -- how they are answered ---------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What came back: a status of 0 stands for a connection that was closed without a word."""

    status: int
    headers: dict[str, str]
    body: bytes


def send(address: tuple[str, int], sent: Sent) -> Answer:
    """Sends a request on a connection of its own, and reads until that is closed.

    Raises:
        TimeoutError: if nothing comes for so long.
    """
    deadline, parts = time.monotonic() + PATIENCE, list[bytes]()
    sent = replace(sent, headers=[*sent.headers, ("Connection", "close")])
    with socket.create_connection(address, timeout=PATIENCE) as wire:
        try:
            wire.sendall(sent.bytes)
            if not sent.whole or any(name == "Content-Length" for name, _ in sent.headers):
                wire.shutdown(socket.SHUT_WR)
            while part := wire.recv(1 << 16):
                parts.append(part)
                wire.settimeout(max(0.01, deadline - time.monotonic()))
        except (ConnectionResetError, BrokenPipeError):  # what it refuses it doesn't read
            pass
    return parsed(b"".join(parts))


def parsed(raw: bytes) -> Answer:
    """The last answer in ``raw``, behind "100 Continue"."""
    while raw.startswith(b"HTTP/1.1 1"):
        raw = raw.partition(b"\r\n\r\n")[2]
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        whole, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            whole, rest = whole + rest[: int(size or b"0", 16)], rest[int(size or b"0", 16) + 2 :]
        body = whole
    return Answer(int(first.split()[1]) if first else 0, headers, body)


def complaint(sent: Sent, answer: Answer) -> str | None:
    """What is wrong with an answer."""
    if answer.status == 0:
        return None if not sent.whole else "closed without an answer"
    if answer.status >= 500:
        return f"status {answer.status}: {answer.body[:300]!r}"
    if answer.status == 200 and b'"server_error"' in answer.body:
        return f"an error of the server in a stream: {answer.body[-300:]!r}"
    if answer.status < 400 or sent.method == "HEAD":
        return None
    if answer.body == b"Invalid HTTP request received.":  # it isn't HTTP
        return None
    try:
        error = json.loads(answer.body)["error"]
        said = error["message"]
        right = set(error) == {"message", "type", "param", "code"} and error["type"].endswith("_error")
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"status {answer.status}, and no error in OpenAI's form: {answer.body[:300]!r}"
    if not right or not said or "\n" in said or len(said) > 600 or "Traceback" in said or "<class" in said:
        return f"no good sentence: {str(error)[:700]}"
    return None


@dataclass
class Fuzzed:
    """What came of all requests.

    Attributes:
        counts: of answers, by status.
        wrong: the number of a request, and what was wrong with its answer.
        slowest: seconds, and the number of that request.
    """

    counts: Counter[int] = field(default_factory=Counter)
    wrong: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)


def fuzz(address: tuple[str, int], seed: int, numbers: range, clients: int) -> Fuzzed:
    """Sends the requests of these numbers."""
    found = Fuzzed()

    def one(number: int) -> tuple[int, Answer | None, float, Sent]:
        sent, began = request(seed, number), time.perf_counter()
        try:
            answer = send(address, sent)
        except TimeoutError:
            answer = None
        return number, answer, time.perf_counter() - began, sent

    with ThreadPoolExecutor(clients) as pool:
        for number, answer, seconds, sent in pool.map(one, numbers):
            found.slowest = max(found.slowest, (seconds, number))
            said = f"no answer within {PATIENCE:.0f} s" if answer is None else complaint(sent, answer)
            if answer is not None:
                found.counts[answer.status] += 1
            if said is not None:
                found.wrong.append((number, said))
    return found


def growth(memory: list[int]) -> float:
    """The mean of the last quarter of ``memory`` by that of the second one; 1 where there are less than two in each."""
    quarter = len(memory) // 4
    return statistics.mean(memory[-quarter:]) / statistics.mean(memory[quarter : 2 * quarter]) if quarter > 1 else 1.0


# -- a server ----------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"max_tokens": 8, "max_queue": 1000, "tool_parser": "hermes"}


def fuzzed_llm() -> Any:
    """A tiny model whose chat template has tools."""
    from tests.serve.test_tools import llm_of

    return llm_of("hermes")


def _serve(pipe: Connection) -> None:
    """Serves until told to stop; each word is answered with what is left of requests."""
    from tests.serve.serving import serving

    with serving(fuzzed_llm(), **SETTINGS) as served:
        pipe.send(served.url)
        while pipe.recv():
            try:
                served.wait_idle()
                pipe.send("")
            except AssertionError as error:
                pipe.send(f"something is left: {error!r}")


@dataclass(frozen=True)
class Alone:
    """A server in a process of its own.

    Args:
        url: where it answers.
        process: its id.
        left: what is left of requests; empty if nothing is.
    """

    url: str
    process: int
    left: Callable[[], str]

    @property
    def mebibytes(self) -> int:
        lines = Path(f"/proc/{self.process}/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


@contextmanager
def serving_alone() -> Iterator[Alone]:
    """The server of a tiny model, until the end of the block."""
    fresh = multiprocessing.get_context("spawn")
    here, there = fresh.Pipe()
    process = fresh.Process(target=_serve, args=(there,))
    process.start()

    def left() -> str:
        here.send(True)
        return str(here.recv())

    try:
        yield Alone(here.recv(), process.pid or 0, left)
    finally:
        here.send(False)
        process.join(60)


def fuzzed(served: Alone, options: argparse.Namespace) -> dict[str, Any]:
    """All requests, and what is to be told of them."""
    url = urlsplit(served.url)
    address = url.hostname or "", url.port or 0
    good = Sent("/v1/completions", [json.dumps({"prompt": "one two", "max_tokens": 8, "temperature": 0}).encode()])

    def text() -> str:
        return str(json.loads(send(address, good).body)["choices"][0]["text"])

    first, found, memory, began = text(), Fuzzed(), [served.mebibytes], time.perf_counter()
    with Progress(disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task("requests", total=options.requests)
        for begin in range(0, options.requests, LOOK):
            numbers = range(begin, min(begin + LOOK, options.requests))
            part = fuzz(address, options.seed, numbers, options.clients)
            found.counts += part.counts
            found.wrong += part.wrong
            found.slowest = max(found.slowest, part.slowest)
            if left := served.left():
                found.wrong.append((begin, left))
            if text() != first:
                found.wrong.append((begin, "a good request gets another text than before"))
            memory.append(served.mebibytes)
            bar.advance(line, len(numbers))
    if growth(memory) > LEVEL:
        found.wrong.append((options.requests, f"memory grew to {growth(memory):.2f} of what it was"))
    return {
        "requests": options.requests, "seed": options.seed, "seconds": round(time.perf_counter() - began, 1),
        "statuses": dict(sorted(found.counts.items())), "slowest": found.slowest, "mebibytes": memory,
        "growth": round(growth(memory), 3), "num_wrong": len(found.wrong), "wrong": found.wrong[:50],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with serving_alone() as served:
        told = fuzzed(served, options)
    print(json.dumps(told, indent=1))
    if options.out:
        options.out.write_text(json.dumps(told, indent=1))
    sys.exit(bool(told["num_wrong"]))


if __name__ == "__main__":
    main()
