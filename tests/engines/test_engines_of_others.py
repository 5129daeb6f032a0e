"""Engines that `LLM` is given: made already, or by their names in installed packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import package, random_table
from tests.drafters.test_medusa import random_heads
from tests.tiny_models import save_model, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, ModelError, OptionError, PairingError, SamplingParams
from tokentree.engines.base import Branches, EngineInfo
from tokentree.engines.drafting import HasHiddenStates, HeadEngines
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.names import ENGINES
from tokentree.engines.table import TableEngine
from tokentree.heads.saved import About, write_heads
from tokentree.registry import engine_maker

EXAMPLE = Path(__file__).parents[2] / "examples" / "echo_engine"
PROMPT, NEW = [1, 2, 3, 1, 2], SamplingParams(max_tokens=40)
TABLE = random_table(6, 2, seed=1)


def by_the_table(prompt: list[int], count: int) -> list[int]:
    """The most probable tokens, one after another."""
    engine, tokens = TableEngine(TABLE), [*prompt]
    for _ in range(count):
        tokens.append(int(engine.logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


# -- made already ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"drafter": "ngram", "shape": "2x2"}, {"drafter": "none"}])
def test_a_table_is_decoded(options: dict[str, Any]) -> None:
    llm = LLM(engine=TableEngine(TABLE, context=64), **options)
    found = llm.generate([PROMPT, [4]], NEW)
    assert [result.token_ids for result in found] == [by_the_table(PROMPT, 40), by_the_table([4], 40)]
    assert [piece.token_id for piece in llm.stream(PROMPT, SamplingParams(max_tokens=5))] == by_the_table(PROMPT, 5)
    assert llm.plain().generate([PROMPT], NEW)[0].token_ids == found[0].token_ids
    assert llm.generate([PROMPT], SamplingParams(max_tokens=99))[0].finish_reason == "length"  # at the context's end


def test_drafts_of_a_table_are_accepted_and_change_no_sample() -> None:
    llm, params = (
        LLM(engine=TableEngine(TABLE), drafter="recycling", shape="2x2"),
        SamplingParams(max_tokens=60, temperature=1.0, seed=3),
    )
    (result,) = llm.generate([PROMPT], params)
    assert result.metrics.accepted_tokens > 0
    assert result.token_ids == llm.plain().generate([PROMPT], params)[0].token_ids


def test_beams_of_a_table_are_those_of_plain_beam_search() -> None:
    llm, params = (
        LLM(engine=TableEngine(TABLE), drafter="recycling", shape="2x2"),
        SamplingParams(max_tokens=12, num_beams=3, num_return_sequences=3),
    )
    found, plain = llm.generate([PROMPT], params), llm.plain().generate([PROMPT], params)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]
    assert found[0].score is not None


def test_it_ends_where_the_engine_says_so() -> None:
    class Ending(TableEngine):
        @property
        def info(self) -> EngineInfo:
            return replace(super().info, ends=(text[3],))

    text = by_the_table(PROMPT, 40)
    (result,) = LLM(engine=Ending(TABLE)).generate([PROMPT], NEW)
    assert result.finish_reason == "stop"
    assert result.token_ids == text[: text.index(text[3]) + 1]


class Bare:
    """Only what the protocol asks for, of a table."""

    def __init__(self) -> None:
        own = TableEngine(TABLE)
        self.vocab_size, self.context, self.lock, self.info = own.vocab_size, own.context, own.lock, own.info
        for name in ("begin", "prefill", "verify", "commit", "committed", "nbytes", "release"):
            setattr(self, name, getattr(own, name))


def test_the_protocol_is_all_that_decoding_needs(tmp_path: Path) -> None:
    bare: Any = Bare()
    assert not isinstance(bare, Branches | HasHiddenStates | HeadEngines)
    assert isinstance(TableEngine(TABLE), Branches)
    llm = LLM(engine=bare, tokenizer=tiny_tokenizer())
    assert llm.generate([PROMPT], NEW)[0].token_ids == by_the_table(PROMPT, 40)
    with pytest.raises(OptionError, match=r"^a table keeps no branches of a text, which num_beams needs$"):
        llm.generate([PROMPT], SamplingParams(num_beams=2))
    with pytest.raises(ModelError, match=r"^a table has no configuration of transformers$"):
        _ = llm.config
    write_heads(tmp_path, random_heads(48), "tiny", 6, About())
    for drafter in (None, "medusa"):
        with pytest.raises(PairingError, match=r"^a table has no hidden states, which Medusa heads read$"):
            LLM(engine=bare, drafter=drafter, heads=tmp_path)
    with pytest.raises(PairingError, match=r"^a table has no hidden states, which Medusa heads read$"):
        llm.using(heads=tmp_path)


@pytest.mark.parametrize("name", ["lock", "info", "verify", "nbytes"])
def test_what_lacks_something_is_no_engine(name: str) -> None:
    bare: Any = Bare()
    delattr(bare, name)
    with pytest.raises(OptionError, match=f"^engine=Bare is no engine, it has no {name}: see tokentree"):
        LLM(engine=bare)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"model": "no/such"}, "model"),
        ({"dtype": "float32", "attention": "tree"}, "dtype, attention"),
        ({"quantization": "int8"}, "quantization"),
        ({"compile": True}, "compile"),
        ({"device": "cpu"}, "device"),
    ],
)
def test_an_engine_that_is_made_is_not_made_again(options: dict[str, Any], names: str) -> None:
    with pytest.raises(OptionError, match=f"^an engine that is made already takes no {names}: leave that out$"):
        LLM(engine=TableEngine(TABLE), **options)


def test_beside_a_draft_model_they_are_that_ones() -> None:
    table = random_table(120, seed=2)
    llm = LLM(engine=TableEngine(table), draft_model=tiny("llama"), attention="sdpa", shape="2x1")
    assert [engine.info.attention for engine in llm.engines] == ["sdpa"]
    (result,) = llm.generate([PROMPT], NEW)
    assert result.metrics.drafted_tokens > 0
    assert result.token_ids == llm.plain().generate([PROMPT], NEW)[0].token_ids


def test_without_a_model_there_must_be_an_engine() -> None:
    with pytest.raises(ModelError, match=r"^there is no model: give one, or an engine$"):
        LLM()


# -- by name -----------------------------------------------------------------------------------------------------------


def test_the_example_is_installed_and_decodes(site: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(EXAMPLE, tmp_path / "example")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
         "--no-build-isolation", "--no-deps", "--target", str(site), str(copy)],
        check=True,
    )  # fmt: skip
    assert ENGINES.installed()["echo"] == "tokentree-echo-engine"
    llm = LLM(engine="echo")
    (result,) = llm.generate([[7, 8, 9, 7]], SamplingParams(max_tokens=30))
    assert result.token_ids == [8, 9, 7] * 10
    assert result.metrics.accepted_tokens > 0
    assert llm.plain().generate([[7, 8, 9, 7]], SamplingParams(max_tokens=30))[0].token_ids == result.token_ids
    several = [[*range(i, 40), i] for i in range(12)]  # more than are decoded at once, read in parts
    few = SamplingParams(max_tokens=9)
    found = LLM(engine="echo", drafter="ngram", shape="2x2", prefill_rows=5).generate(several, few)
    assert [one.token_ids for one in found] == [[*range(i + 1, i + 10)] for i in range(12)]


def test_ours_has_a_name_too() -> None:
    model, prompt = tiny("llama"), some_tokens(9)
    llm = LLM(model, engine="torch", shape="2x2")
    assert type(llm.engine) is type(LLM(model).engine)
    assert llm.generate([prompt], NEW)[0].token_ids == LLM(model, "none").generate([prompt], NEW)[0].token_ids


def test_a_maker_is_given_the_model_and_the_options(site: Path, tmp_path: Path) -> None:
    source = """
import torch
from tokentree.engines.table import TableEngine
given = []
def make(model, options):
    given.append((model, options))
    return TableEngine(torch.zeros(300, 300))
"""
    package(site, "maker", "mine = maker:make", source, group="tokentree.engines")
    folder = save_model(tmp_path / "model", tiny("llama", vocab_size=300), tiny_tokenizer())
    llm = LLM(folder, engine="mine", attention="sdpa", prefix_mb=2, dtype="float16", device="cpu")
    ((model, options),) = sys.modules["maker"].given
    assert model == folder
    assert (options.attention, options.dtype, options.compile) == ("sdpa", "float16", False)
    assert (options.device, options.prefix_bytes) == (torch.device("cpu"), 2_000_000)
    assert llm.tokenizer is not None
    assert llm.generate("one two", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids == [0, 0, 0]


@pytest.mark.parametrize(
    ("points", "source", "told"),
    [
        ("other = missing_module:make", "", "'other' of strange can't be imported: No module named"),
        ("other = strange:value", "value = 3", "'other' is nothing that makes engines: 3"),
        (
            "other = strange:make",
            "make = lambda *_: 3",
            "what engine='other' makes is no engine, it has no vocab_size",
        ),
        ("another = strange:make", "make = 3", "^unknown engine 'other': choose one of another, torch$"),
    ],
)
def test_one_that_can_t_be_used_is_told_in_a_sentence(
    site: Path,
    points: str,
    source: str,
    told: str,
) -> None:
    package(site, "strange", points, source, group="tokentree.engines")
    with pytest.raises(OptionError, match=told) as raised:
        LLM(tiny("llama"), engine="other")
    assert "\n" not in str(raised.value)


def test_two_packages_can_t_share_a_name_nor_take_ours(site: Path) -> None:
    for name in ("first", "second"):
        package(site, name, f"other = {name}:A\ntorch = {name}:A", group="tokentree.engines")
    with pytest.raises(OptionError, match="the engine 'other' is in several packages: first, second"):
        LLM(tiny("llama"), engine="other")
    assert engine_maker("torch").__module__ == "tokentree.loading"


# -- what an engine is -------------------------------------------------------------------------------------------------


def test_what_an_engine_says_of_itself() -> None:
    engine = LLM(tiny("llama", eos_token_id=5)).engine
    assert isinstance(engine, KVEngine)
    info = engine.info
    assert (info.name, info.vocab_size, info.context) == ("LlamaForCausalLM", engine.vocab_size, engine.context)
    assert (info.ends, info.device.type, info.dtype) == ((5,), "cpu", torch.float32)
    assert (info.attention, info.execution, info.caveat) == ("tree", "tree attention", "")
    assert info.signature == engine.signature
    assert isinstance(engine, Branches)
    assert isinstance(engine, HeadEngines)
