"""The command: how a server starts, what it refuses before, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.kill import files

from tests.cli.test_cli import Command
from tests.forked import Forked
from tests.serve.serving import error_of, events_of, serving, slowed, tiny_llm, until
from tokentree import LLM, ModelError
from tokentree.serve.defaults import defaults_of
from tokentree.serve.params import params_of
from tokentree.serve.protocol import CompletionRequest
from tokentree.serve.run import listen, serve
from tokentree.serve.settings import Settings

BODY: dict[str, Any] = {"prompt": [5, 6, 7] * 20, "n": 12, "max_tokens": 250, "ignore_eos": True, "seed": 1}


@contextmanager
def started(*words: object, code: str | None = None) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, list[str]]]:
    """A server in a process of its own; what it says is gathered."""
    begin = [sys.executable, "-W", "ignore", *(["-c", code] if code else ["-m", "tokentree"])]
    options = ["serve", "--port", "0", "--threads", "1", *map(str, words)]
    process = Forked([*begin, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said = list[str]()
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    reader.start()
    try:
        until(lambda: any("listening on" in line for line in said) or process.poll() is not None)
        found = re.search(r"listening on (\S+)", "".join(said))
        with httpx.Client(base_url=found[1] if found else "", timeout=60) as http:
            yield process, http, said
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def test_a_signal_lets_requests_end_and_keeps_what_was_learnt(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    with started("-m", folder, "--memory", memory, "--max-batch", 1) as (process, http, said):
        assert http.get("/health").status_code == 200
        until(lambda: http.get("/ready").status_code == 200)
        alone = http.post("/v1/completions", json=BODY | {"n": 1}).json()["choices"][0]["text"]
        with http.stream("POST", "/v1/completions", json=BODY | {"n": 5, "stream": True}) as answer:
            events = events_of(answer)
            choices = [next(events)["choices"][0]]
            process.terminate()
            until(lambda: http.get("/ready").status_code == 503)
            refused = http.post("/v1/completions", json=BODY)
            assert refused.status_code == 503
            assert error_of(refused)["code"] == "shutting_down"
            assert http.get("/health").status_code == 200
            assert http.get("/metrics").status_code == 200
            rest = [*events]
        assert rest.pop() is None
        choices += [event["choices"][0] for event in rest]
        assert sum(one["finish_reason"] == "length" for one in choices) == 5
        assert "".join(one["text"] for one in choices if one["index"] == 0) == alone
        assert process.wait(60) == 0
    assert any(memory.iterdir())
    assert "Traceback" not in "".join(said)


def test_a_second_signal_interrupts_requests(folder: Path) -> None:
    with started("-m", folder, "--max-batch", 1, "--drain-timeout", 600) as (process, http, said):
        until(lambda: http.get("/ready").status_code == 200)
        with http.stream("POST", "/v1/completions", json=BODY | {"n": 16, "stream": True}) as answer:
            events = events_of(answer)
            next(events)
            process.send_signal(signal.SIGINT)
            until(lambda: http.get("/ready").status_code == 503)
            process.send_signal(signal.SIGINT)
            rest = [*events]
        assert rest.pop() is None
        assert rest[-1]["error"]["code"] == "shutting_down"
        assert process.wait(60) == 0
    assert "interrupted" in "".join(said)
    assert "Traceback" not in "".join(said)


def test_a_server_that_is_killed_under_load_leaves_all_files_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, memory = tmp_path / "cache", tmp_path / "memory"
    monkeypatch.setenv("TOKENTREE_CACHE", str(cache))
    words, one = ("-m", folder, "--memory", memory), BODY | {"n": 1, "max_tokens": 20}
    with started(*words) as (process, http, _):
        until(lambda: http.get("/ready").status_code == 200)
        alone = http.post("/v1/completions", json=one).json()["choices"]
        process.terminate()
        assert process.wait(60) == 0
    kept = files(cache, memory)
    assert any(memory.iterdir())
    with started(*words) as (process, http, _), ThreadPoolExecutor(4) as pool:
        until(lambda: http.get("/ready").status_code == 200)
        asked = [pool.submit(http.post, "/v1/completions", json=BODY) for _ in range(4)]
        until(lambda: "vllm:num_requests_running" in http.get("/metrics").text)
        process.kill()
        process.wait(60)
        assert all(isinstance(one.exception(60), httpx.HTTPError) for one in asked)
    assert {path: digest for path, digest in files(cache, memory).items() if path in kept} == kept
    with started(*words) as (process, http, said):
        until(lambda: http.get("/ready").status_code == 200)
        assert http.post("/v1/completions", json=one).json()["choices"] == alone
    assert "made again" not in "".join(said)


SLOW = """
import time, tokentree.cli.serve as command
from tokentree.__main__ import start
command.made = lambda *words, **options: time.sleep(600)
start()
"""


def test_a_server_that_still_loads_answers_and_can_be_ended(folder: Path) -> None:
    with started("-m", folder, "--api-key", "k", code=SLOW) as (process, http, said):
        assert http.get("/health").status_code == 200
        for path, headers, status in (
            ("/ready", {}, 503),
            ("/v1/models", {}, 401),
            ("/v1/models", {"Authorization": "Bearer k"}, 503),
        ):
            answer = http.get(path, headers=headers)
            assert answer.status_code == status
            error_of(answer)
            assert status != 503 or answer.headers["retry-after"] == "5"
        process.terminate()
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(said)


def test_a_model_that_can_t_be_loaded_ends_the_server(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    with started("-m", broken) as (process, _, said):
        assert process.wait(60) == 2
    assert said[-1].startswith("tokentree: can't load the model")
    assert "Traceback" not in "".join(said)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-m", "./none"], "there is no folder"),
        (["-m", "FOLDER", "-d", "./none"], "there is no folder"),
        (["-m", "FOLDER", "--heads", "./none"], "there is no folder 'none' with heads"),
        (["-m", "FOLDER", "--drafter", "foo"], "unknown drafter 'foo'"),
        (["-m", "FOLDER", "--drafter", "eagle"], "name them by --heads"),
        (["-m", "FOLDER", "--drafter", "ngram+draft_model"], "name them by --draft-model"),
        (["-m", "FOLDER", "--shape", "zz"], "is not a shape"),
        (["-m", "FOLDER", "--quantization", "int3"], "unknown quantization"),
        (["-m", "FOLDER", "--quantization", "gguf"], "a GGUF file"),
        (["-m", "FOLDER", "--dtype", "int3"], "unknown dtype"),
        (["-m", "FOLDER", "--device", "moon"], "can't be used"),
        (["-m", "FOLDER", "--engine", "steam"], "steam"),
        (["-m", "FOLDER", "--memory", "FOLDER/config.json"], "is a file"),
        (["-m", "FOLDER", "--port", "70000"], "--port"),
        (["-m", "FOLDER", "--host", "256.0.0.1"], "can't listen on 256.0.0.1"),
        (["-m", "FOLDER", "--api-key", ""], "--api-key is empty"),
        (["-m", "FOLDER", "--api-key-file", "./none"], "can't read the file of keys"),
        (["-m", "FOLDER", "--max-batch", "0"], "max-batch"),
        (["-m", "FOLDER", "--log-level", "loud"], "--log-level"),
        (["-m", "FOLDER", "--generation-config", "some"], "--generation-config"),
        (["-m", "FOLDER", "--tool-parser", "some"], "--tool-parser"),
        (["-m", "FOLDER", "--request-timeout", "-1"], "request-timeout"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    run: Command,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    says: str,
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("it loads")

    monkeypatch.setattr("tokentree.cli.serve.made", loads)
    code, out, err = run("serve", *[word.replace("FOLDER", str(folder)) for word in words])
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("tokentree: ")
    assert err.count("\n") == 1


def test_a_port_that_is_taken_is_told(run: Command, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run("serve", "-m", folder, "--port", taken.getsockname()[1])
    assert code == 2
    assert "in use" in err


def test_a_file_of_keys_has_one_on_a_line(
    run: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none").write_text("# nothing\n\n")
    assert "there is no key" in run("serve", "-m", folder, "--api-key-file", tmp_path / "none")[2]
    (tmp_path / "keys").write_text("# two\nfirst\n\n second \n")
    asked = list[Settings]()

    def keeps(settings: Settings, _: Any, sock: socket.socket, __: float) -> LLM:
        sock.close()
        asked.append(settings)
        return tiny_llm()

    monkeypatch.setattr("tokentree.serve.run.serve", keeps)
    words = [
        "--api-key",
        "third",
        "--api-key-file",
        tmp_path / "keys",
        "--request-timeout",
        0,
        "--served-model-name",
        "it",
    ]
    assert run("serve", "-m", folder, "--port", 0, *words)[0] == 0
    assert asked[0].keys == ("third", "first", "second")
    assert asked[0].request_timeout is None
    assert asked[0].model_name == "it"


# -- without a process of its own --------------------------------------------------------------------------------


def in_time(load: Callable[[], LLM], meanwhile: Callable[[str], None], **settings: Any) -> LLM | None:
    """Serves until ``meanwhile`` is over, as the main thread does."""
    sock = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"

    def ends() -> None:
        try:
            until(lambda: signal.getsignal(signal.SIGTERM) is not before)
            meanwhile(url)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ends)
    thread.start()
    found = serve(Settings("tiny", **settings), load, sock, 10)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    return found


def test_what_is_answered_goes_out_at_once() -> None:
    with listen("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()):
        connection, _ = sock.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_server_gives_back_the_model_that_it_served() -> None:
    llm = tiny_llm()
    texts = list[str]()

    def meanwhile(url: str) -> None:
        until(lambda: httpx.get(f"{url}/ready").status_code == 200)
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "one two", "seed": 1})
        texts.append(answer.json()["choices"][0]["text"])

    assert in_time(lambda: llm, meanwhile) is llm
    assert len(texts) == 1


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a system that waits longer")
def test_a_client_that_doesn_t_read_a_whole_answer_is_left() -> None:
    ended = list[bool]()

    def meanwhile(url: str) -> None:
        until(lambda: httpx.get(f"{url}/ready").status_code == 200)
        place = httpx.URL(url)
        with socket.socket() as idle:
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            idle.settimeout(30)
            idle.connect((place.host, place.port or 0))
            asked = {"prompt": "one two three " * 50_000, "return_token_strs": True}
            body = json.dumps(asked).encode()
            head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            idle.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            select.select([idle], [], [])  # the answer begins
            time.sleep(1.5)
            try:
                said = b"".join(iter(lambda: idle.recv(1 << 20), b""))
                ended.append(len(said) < 1_000_000)
            except ConnectionResetError:
                ended.append(True)

    in_time(tiny_llm, meanwhile, stall_timeout=0.3)
    assert ended == [True]


def test_requests_that_don_t_end_in_time_are_interrupted() -> None:
    llm = tiny_llm()
    slowed(llm, 0.02)
    with serving(llm) as served, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.refused, "/v1/completions", BODY | {"n": 1}, 503)
        until(lambda: served.service._sum("running"))
        assert not asyncio.run(served.service.drain(0.1))
        asyncio.run(served.service.close())
        assert asked.result()["code"] == "shutting_down"
        served.wait_idle()
        assert asyncio.run(served.service.drain(0.1))


def test_a_server_without_a_tokenizer_is_none() -> None:
    llm = tiny_llm()
    llm.tokenizer = None
    sock = listen("127.0.0.1", 0)
    with pytest.raises(ModelError, match="needs one"):
        serve(Settings("tiny"), lambda: llm, sock, 10)


def test_requests_wait_for_the_model() -> None:
    with serving(None) as served:
        assert served.http.get("/health").status_code == 200
        for path in ("/ready", "/v1/models", "/metrics", "/docs"):
            answer = served.http.get(path)
            assert answer.status_code == 503
            assert error_of(answer)["code"] == "loading"
            assert answer.headers["retry-after"] == "5"
        served.service.start(tiny_llm())
        for path in ("/ready", "/v1/models", "/metrics", "/docs"):
            assert served.http.get(path).status_code == 200


def test_defaults_are_those_of_the_model_s_file(folder: Path, tmp_path: Path) -> None:
    assert defaults_of(str(folder)) == {}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.3, "top_p": 0.9, "do_sample": true, "top_k": 50}'
    )
    found = defaults_of(str(tmp_path))
    assert found == {"temperature": 0.3, "top_p": 0.9, "top_k": 50}
    settings = Settings("tiny", defaults=found)
    params = params_of(CompletionRequest(prompt="a", top_p=0.5), settings, {}, 5, None)
    assert (params.temperature, params.top_p, params.top_k) == (0.3, 0.5, 50)
    params = params_of(CompletionRequest(prompt="a"), Settings("tiny"), {}, 5, None)
    assert (params.temperature, params.top_p, params.top_k, params.timeout) == (1.0, 1.0, 0, 600.0)
