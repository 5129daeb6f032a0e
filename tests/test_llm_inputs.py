"""What `LLM` takes as a prompt and as a model, beyond text and names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_models import tiny, tiny_tokenizer
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError, OptionError, PromptError
from tokentree.llm import LLM
from tokentree.sampling import SamplingParams

IDS = [5, 9, 7, 5, 9]
FEW = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny("llama"), drafter="ngram", shape="2x1")


@pytest.mark.parametrize("prompt", [np.array(IDS), torch.tensor(IDS), list(np.array(IDS)), tuple(IDS)])
def test_arrays_of_ids_are_prompts(llm: LLM, prompt: Any) -> None:
    (expected,), (got,) = llm.generate([IDS], FEW), llm.generate(prompt, FEW)
    assert got.token_ids == expected.token_ids
    assert llm.generate([prompt, prompt], FEW)[1].token_ids == expected.token_ids


def test_a_text_with_tokens_the_model_lacks_is_refused() -> None:
    small = LLM(tiny("llama", vocab_size=40), drafter="none", tokenizer=tiny_tokenizer())
    with pytest.raises(PromptError, match="outside the vocabulary of 40"):
        small.generate("The quick brown fox", FEW)


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"device": "cpu"}])
def test_a_loaded_model_keeps_its_dtype_and_device(option: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="leave dtype and device out"):
        LLM(tiny("llama"), **option)  # type: ignore[arg-type]


def test_a_dropped_stream_drops_its_kv_at_once(llm: LLM) -> None:
    stream = llm.stream(IDS, FEW)
    next(iter(stream))
    assert llm.engine._kv
    del stream
    assert not llm.engine._kv


def test_a_model_that_our_attention_does_not_fit_attends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, check = [], TorchEngine._check_tree

    def refuse_ours(self: TorchEngine, expected: torch.Tensor) -> None:
        checks.append(self.attention)
        if self.attention == "tree":
            raise ModelError("it does not fit")
        check(self, expected)

    monkeypatch.setattr(TorchEngine, "_check_tree", refuse_ours)
    model = tiny("llama")
    assert TorchEngine(model).attention == "sdpa"
    assert checks == ["tree", "sdpa"]
    with pytest.raises(ModelError, match="does not fit"):
        TorchEngine(model, attention="tree")
