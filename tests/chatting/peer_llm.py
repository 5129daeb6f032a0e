"""The plug-in of `examples/llm_tokentree`, in the command that it is for; run by `make peers`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import llm
import pytest

from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams

EXAMPLE = Path(__file__).parents[2] / "examples" / "llm_tokentree"
PARAMS = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tiny("llama", vocab_size=300), tiny_tokenizer())


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Any:
    """The example is installed as a package, and names two models."""
    home, site = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("site")
    copy = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("copy") / "example")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
         "--no-build-isolation", "--no-deps", "--target", str(site), str(copy)],
        check=True,
    )  # fmt: skip
    models = {
        "tiny": {"model": str(folder), "drafter": ["suffix", "ngram"], "shape": "2x1"},
        "odd": {"model": str(folder), "colour": "red"},
    }
    (home / "tokentree.json").write_text(json.dumps(models))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_USER_PATH", str(home))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ["PYTHONPATH"]]))
        patch.syspath_prepend(str(site))
        yield


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def test_a_conversation_is_streamed_and_counted(folder: Path) -> None:
    plain = LLM(folder, "none")
    talk = llm.get_model("tokentree/tiny").conversation()
    first = talk.prompt("one two three four five", max_tokens=40)
    parts = list(first)
    told = plain.chat(messages("one two three four five"), PARAMS)
    assert first.text() == told.text
    assert len(parts) > 1
    assert (first.input_tokens, first.output_tokens) == (len(told.prompt_token_ids), len(told.token_ids))
    second = talk.prompt("six", max_tokens=40)
    said = messages("one two three four five", first.text(), "six")
    assert second.text() == plain.chat(said, PARAMS).text
    details = second.token_details
    assert details is not None
    assert details["cached_tokens"] > 15
    assert details["speculation"]["tokens_per_forward"] >= 1


def test_options_are_those_of_sampling(folder: Path) -> None:
    model, plain = llm.get_model("tokentree/tiny"), LLM(folder, "none")
    drawn = {"temperature": 1.5, "top_p": 0.9, "seed": 3, "max_tokens": 20}
    told = plain.chat([{"role": "system", "content": "hm"}, *messages("one")], SamplingParams(**drawn)).text
    assert model.prompt("one", system="hm", **drawn).text() == told
    assert model.prompt("one", system="hm", stream=False, **drawn).text() == told
    for option in ({"temperature": -1.0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            model.prompt("one", **option).text()
    with pytest.raises(ValueError, match="colour"):
        model.prompt("one", colour="red").text()


def test_arguments_that_there_are_not_are_told() -> None:
    with pytest.raises(ValueError, match=r"^tokentree/odd: .*colour"):
        llm.get_model("tokentree/odd").prompt("one").text()


def _llm(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "llm", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_the_command_finds_it_and_logs_what_it_cost(folder: Path, tmp_path: Path) -> None:
    done = _llm("-m", "tokentree/tiny", "one two", "-o", "max_tokens", "20")
    told = LLM(folder, "none").chat(messages("one two"), SamplingParams(max_tokens=20))
    assert (done.returncode, done.stdout) == (0, told.text + "\n"), done.stderr
    (logged,) = json.loads(_llm("logs", "--json", "-n", "1").stdout)
    assert logged["response"] == told.text
    assert (logged["input_tokens"], logged["output_tokens"]) == (len(told.prompt_token_ids), len(told.token_ids))
    (tmp_path / "odd.json").write_text("[1]")
    done = _llm("models", LLM_TOKENTREE=str(tmp_path / "odd.json"))
    assert done.returncode == 0
    assert done.stderr.startswith("llm-tokentree: ")
    assert "tokentree/tiny" not in done.stdout
    assert "tokentree/tiny" not in _llm("models", LLM_TOKENTREE=str(tmp_path / "none.json")).stdout
    assert "tokentree/tiny" in _llm("models").stdout
