"""A text ends where transformers' `generate` of the same model ends it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.gguf_files import write_gguf
from tests.tiny_models import some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.errors import ModelError
from tokentree.loading import load_model

NEW, PROMPT, UNUSED = 20, some_tokens(9), 2
PARAMS = SamplingParams(max_tokens=NEW)


def own(model: Any) -> list[int]:
    """What transformers' own loop gives."""
    row = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False)[0]
    return [int(token) for token in row[len(PROMPT) :]]


def ours(llm: LLM) -> list[int]:
    return llm.generate(PROMPT, PARAMS)[0].token_ids


@pytest.fixture(scope="module")
def end() -> int:
    """The tenth token of the text that is written without an end."""
    free = own(tiny("llama", eos_token_id=None))
    assert free.index(free[9]) == 9
    return free[9]


def built(end: int | list[int] | None) -> Any:
    """A model whose configuration names ``end``."""
    return tiny("llama", eos_token_id=end)


def other(model: Any, **options: Any) -> Any:
    model.generation_config = GenerationConfig(**options)
    return model


def said(model: Any, end: int) -> Any:
    model.config.eos_token_id = end
    return model


LOADED: dict[str, tuple[Callable[[int], Any], int]] = {
    "of the configuration": (built, 10),
    "several": (lambda end: built([UNUSED, end]), 10),
    "nowhere": (lambda end: built(None), NEW),
    "none of the generation configuration": (lambda end: other(built(end)), NEW),
    "another of the generation configuration": (lambda end: other(built(end), eos_token_id=UNUSED), NEW),
    "of the generation configuration alone": (lambda end: other(built(None), eos_token_id=[end]), 10),
    "of a configuration that was changed": (lambda end: said(built(None), end), NEW),
    "none in the vocabulary": (lambda end: other(built(None), eos_token_id=[-1, 10**6]), NEW),
}


@pytest.mark.parametrize("case", LOADED)
def test_a_loaded_model_ends_its_texts_as_generate_does(case: str, end: int) -> None:
    make, count = LOADED[case]
    model = make(end)
    expected = own(model)
    assert len(expected) == count
    assert ours(LLM(model)) == expected


def named(folder: Path, said: dict[str, Any] | None) -> None:
    """Lets the folder's generation configuration say that; None takes it away."""
    file = folder / "generation_config.json"
    if said is None:
        file.unlink()
    else:
        file.write_text(json.dumps(said))


SAVED: dict[str, tuple[Callable[[int], dict[str, Any] | None], int]] = {
    "none": (lambda end: None, 10),
    "says nothing": (lambda end: {}, NEW),
    "says null": (lambda end: {"eos_token_id": None}, NEW),
    "says another": (lambda end: {"eos_token_id": UNUSED}, NEW),
    "says several": (lambda end: {"eos_token_id": [UNUSED, end]}, 10),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_folder_too(case: str, end: int, tmp_path: Path) -> None:
    says, count = SAVED[case]
    built(end).save_pretrained(tmp_path)
    named(tmp_path, says(end))
    expected = own(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert len(expected) == count
    assert ours(LLM(tmp_path, dtype="float32")) == expected


def test_what_is_kept_of_a_folder_ends_there_too(tmp_path: Path) -> None:
    tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96, eos_token_id=7).save_pretrained(tmp_path)
    for says, ends in ({"eos_token_id": [UNUSED, 5]}, {UNUSED, 5}), ({}, set()), (None, {7}):
        named(tmp_path, says)
        assert [LLM(tmp_path).eos_ids for _ in range(2)] == [ends, ends]


def test_a_tokenizer_s_end_is_none_where_the_model_names_none(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.eos_token_id is not None
    tiny("llama", vocab_size=len(tokenizer), eos_token_id=None).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    llm = LLM(tmp_path, dtype="float32")
    assert llm.tokenizer is not None
    assert llm.eos_ids == frozenset()


def test_a_gguf_file_ends_where_the_model_that_is_made_of_it_does(end: int, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, built(end), tiny_tokenizer(), entries={"tokenizer.ggml.eos_token_id": end})
    expected = own(load_model(file, "float32", torch.device("cpu")))
    assert len(expected) < NEW
    assert ours(LLM(file, dtype="float32")) == expected


# -- changes -----------------------------------------------------------------------------------------------------------


def test_what_a_loaded_model_is_changed_to_holds_for_later_texts(end: int) -> None:
    model = built(None)
    llm = LLM(model)
    twin = llm.using("none")
    changes: list[tuple[Callable[[], Any], int]] = [
        (lambda: None, NEW),
        (lambda: setattr(model.generation_config, "eos_token_id", end), 10),
        (lambda: setattr(model.config, "eos_token_id", UNUSED), 10),  # which `generate` doesn't look at
        (lambda: setattr(model.generation_config, "eos_token_id", np.array([end])), 10),
        (lambda: setattr(model.generation_config, "eos_token_id", None), NEW),
        (lambda: other(model, eos_token_id=torch.tensor([UNUSED, end])), 10),
    ]
    for change, count in changes:
        change()
        assert len(own(model)) == count
        assert ours(llm) == ours(twin) == own(model)
        assert llm.stream(PROMPT, PARAMS)._seq.eos_ids == llm.eos_ids


def test_a_model_that_is_gone_ends_where_it_did_last(end: int) -> None:
    model = built(None)
    llm = LLM(model)
    model.generation_config = GenerationConfig(eos_token_id=end)
    assert len(ours(llm)) == 10
    del model
    gc.collect()
    assert llm.engine._guard._watch.model is None  # type: ignore[attr-defined]
    assert len(ours(llm)) == 10


@pytest.mark.parametrize("wrong", ["</s>", True, 2.0, [2, None], torch.tensor([True]), {"id": 2}])
def test_what_is_no_token_is_refused(wrong: Any, end: int) -> None:
    model = built(None)
    llm = LLM(model)
    model.generation_config.eos_token_id = wrong
    for refused in (lambda: LLM(model), lambda: ours(llm)):
        with pytest.raises(ModelError, match=r"^generation_config\.eos_token_id=.* is no token, nor several$"):
            refused()
    model.generation_config.eos_token_id = end
    assert len(ours(llm)) == 10
