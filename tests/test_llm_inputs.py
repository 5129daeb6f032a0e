"""What `LLM` takes as a prompt and as a model, beyond text and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.drafters.test_medusa import random_heads
from tests.tiny_models import kv_engine, parts_of, tiny, tiny_pair, tiny_tokenizer
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError, OptionError, PairingError, PromptError
from tokentree.heads.saved import About, write_heads
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


def test_in_8_bits_a_tree_is_lossless_to_the_quantised_model_and_drafts_are_quantised_too() -> None:
    wide = {"hidden_size": 64, "intermediate_size": 96}
    target, draft = (tiny("llama", torch.bfloat16, seed=seed, **wide) for seed in (0, 1))
    llm = LLM(target, draft_model=draft, shape="2x2", quantization="int8")
    engines = [llm.engine, *(engine for _, engine in llm._parts.draft_engines)]
    for engine in engines:
        assert isinstance(engine, KVEngine)
        assert any(isinstance(m, QuantizedLinear) for m in parts_of(engine))
    long = SamplingParams(max_tokens=60)
    (tree,), (plain,) = llm.generate([IDS], long), llm.plain().generate([IDS], long)
    assert tree.token_ids == plain.token_ids
    assert "int8" in llm.engine.info.signature
    (whole,) = LLM(target, "none").generate([IDS], long)
    assert whole.token_ids[0] == plain.token_ids[0]  # it is still that model


def test_a_quantization_that_is_unknown_or_not_for_this_model_is_one_sentence() -> None:
    with pytest.raises(OptionError, match="unknown quantization 'int3': there are 'int8', 'gguf'"):
        LLM("no/such/model", quantization="int3")  # told before anything is loaded
    with pytest.raises(OptionError, match=r"name a model by its \.gguf file"):
        LLM("no/such/model", quantization="gguf")
    with pytest.raises(ModelError, match="is for models on a CPU with dtype='bfloat16'"):
        LLM(tiny("llama"), quantization="int8")


@pytest.mark.parametrize("form", [None, "2x2x1"])
def test_heads_and_a_draft_model_draft_together(form: str | None, tmp_path: Path) -> None:
    write_heads(tmp_path, random_heads(48), "tiny", 120, About())
    target, draft = tiny_pair(target_vocab=120, draft_vocab=120)
    llm = LLM(target, draft_model=draft, heads=tmp_path, shape=form)
    names = llm.decoder.drafter.names
    assert {"medusa", "ngram", "suffix", "recycling"} < {*names}
    assert len(names) == 5  # and the draft model, by its own name
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    (got,), (expected,) = llm.generate(IDS, params), llm.plain().generate(IDS, params)
    assert got.token_ids == expected.token_ids
    if form is not None:
        assert got.metrics.accepted_tokens > 0
    assert llm.using("draft_model").decoder.drafter.draws_children
    with pytest.raises(PairingError, match="accept='rejection' needs"):
        LLM(target, draft_model=draft, heads=tmp_path, accept="rejection")
    alone = LLM(target, draft_model=draft, shape=form)
    assert len(alone.decoder.drafter.names) == 1
    assert alone.using(heads=tmp_path).decoder.drafter.names == names


def test_a_folder_that_can_not_be_written_is_told_of(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    learnt = LLM(tiny("llama"), "recycling", shape="2x1")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/tokentree")):
        with pytest.raises(OptionError, match=r"can't write to the folder|is a file|can't be looked at"):
            learnt.save_memory(folder)
    learnt.save_memory(tmp_path / "new" / "deep")
    with pytest.raises(OptionError, match="was written with another model"):
        LLM(tiny("llama", vocab_size=90), "recycling", shape="2x1", memory=tmp_path / "new" / "deep")


def test_a_dropped_stream_drops_its_kv_at_once(llm: LLM) -> None:
    stream = llm.stream(IDS, FEW)
    next(iter(stream))
    assert kv_engine(llm)._kv
    del stream
    assert not kv_engine(llm)._kv


def test_a_model_that_our_attention_does_not_fit_attends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, check = [], KVEngine._check_trees

    def refuse_ours(self: KVEngine, own: dict[str, torch.Tensor]) -> None:
        checks.append(self.attention)
        if self.attention == "tree":
            raise ModelError("it does not fit")
        check(self, own)

    monkeypatch.setattr(KVEngine, "_check_trees", refuse_ours)
    model = tiny("llama")
    with pytest.warns(UserWarning, match="attends by itself here, and its text is plain's up to ties: it does not fit"):
        assert TorchEngine(model).attention == "sdpa"
    assert checks == ["tree", "sdpa"]
    with pytest.raises(ModelError, match="does not fit"):
        TorchEngine(model, attention="tree")
