"""An `LLM` beside torch's `DataLoader`, whose workers are other processes: what they can use of it, and what not."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from tests.conftest import by_night
from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree import LLM, AsyncLLM, ModelError, SamplingParams
from tokentree.errors import ForkError

FEW, COUNT = SamplingParams(max_tokens=3), 4
STARTS = ["fork", "spawn", "forkserver"]
TIMEOUT = 120  # seconds that a worker may take, which imports this module where it isn't forked


class Texts(Dataset[list[int]]):
    """Some texts' ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, place: int) -> list[int]:
        ids: list[int] = self.tokenizer(f"a tree {place}").input_ids
        return ids


class Written(Texts):
    """Texts that the model writes."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def __getitem__(self, place: int) -> list[int]:
        return self.llm.generate(f"a tree {place}", FEW)[0].token_ids


class Refused(Written):
    """What is said instead of texts. A worker whose error ends the loader is waited for five seconds by torch."""

    def __getitem__(self, place: int) -> Any:
        try:
            return super().__getitem__(place)
        except ForkError as error:
            return error


class Shown:
    """Batches of ids as texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, batch: list[list[int]]) -> list[str]:
        return [str(self.tokenizer.decode(ids)) for ids in batch]


class Asked:
    """Batches of ids as prompts, by the `LLM` itself."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def __call__(self, batch: list[list[int]]) -> list[int]:
        return self.llm.chat_prompt([{"role": "user", "content": f"{batch}"}])


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    folder: Path = tmp_path_factory.mktemp("model")
    model = tiny("llama", torch.bfloat16, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96)
    made = LLM(save_model(folder / "tiny", model, tokenizer))
    made.generate("a tree", FEW)  # so that this process has used it
    return made


def loaded(data: Texts, start: str, collate: Any = list) -> DataLoader[Any]:
    return DataLoader(
        data, batch_size=2, num_workers=1, multiprocessing_context=start, collate_fn=collate, timeout=TIMEOUT
    )


@pytest.mark.parametrize("start", by_night(STARTS, but=["fork", "forkserver"]))
def test_workers_use_the_tokenizer_while_the_parent_decodes(llm: LLM, start: str) -> None:
    tokenizer: Any = llm.tokenizer
    expected, rows = llm.generate("a tree", FEW)[0].token_ids, list[str]()
    for batch in loaded(Texts(tokenizer), start, Shown(tokenizer)):
        assert llm.generate("a tree", FEW)[0].token_ids == expected
        rows += batch
    assert rows == [f"a tree {place}" for place in range(COUNT)]


def test_a_forked_worker_may_ask_for_prompts_but_for_no_text(llm: LLM) -> None:
    tokenizer: Any = llm.tokenizer
    assert len(list(loaded(Texts(tokenizer), "fork", Asked(llm)))) == 2
    said = [error for batch in loaded(Refused(llm), "fork") for error in batch]
    assert len(said) == COUNT
    for error in said:
        with pytest.raises(ForkError, match="this process was forked from one that had used a model"):
            raise error


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
@pytest.mark.parametrize("what", ["data", "collate"])
def test_an_llm_is_not_sent_to_other_processes(llm: LLM, start: str, what: str) -> None:
    tokenizer: Any = llm.tokenizer
    data, collate = (Written(llm), list) if what == "data" else (Texts(tokenizer), Asked(llm))
    with pytest.raises(ModelError, match="can't be copied, nor sent to another process: make a new one there"):
        next(iter(loaded(data, start, collate)))


def test_nor_copied_in_any_other_way(llm: LLM) -> None:
    stream, beside = llm.stream("a tree", FEW), AsyncLLM(llm)
    for one in (llm, llm.engine, llm.plain(), llm.decoder, stream, beside, [llm.using("ngram")]):
        for way in (pickle.dumps, copy.deepcopy):
            with pytest.raises(ModelError, match="can't be copied"):
                way(one)
    stream.close()
    asyncio.run(beside.close())
    assert copy.copy(llm).generate("a tree", FEW)[0].token_ids == llm.generate("a tree", FEW)[0].token_ids


def test_what_an_llm_gives_can_be_sent(llm: LLM) -> None:
    results = llm.generate(["a tree", ""], [SamplingParams(max_tokens=3, logprobs=2, stop="x"), FEW])
    again = pickle.loads(pickle.dumps(results))
    assert [one.token_ids for one in again] == [one.token_ids for one in results]
    assert again[0] == results[0]
    assert str(again[1].error) == str(results[1].error) != "None"
    assert pickle.loads(pickle.dumps(SamplingParams(stop=["x"]))) == SamplingParams(stop=["x"])
