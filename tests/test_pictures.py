"""Vision models inside transformers' own `generate`: texts alone, and texts behind pictures that the model has read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.conftest import all_pairs
from tests.conftest import shown as named
from tests.test_hf import NEW, batch, run
from tests.tiny_models import CONTEXT, VOCAB, randomised, some_tokens
from tokentree import LLM, pictures
from tokentree.errors import ModelError, OptionError
from tokentree.hf import TreeGenerator, generator
from tokentree.prompt_kv import PromptKV
from tokentree.sampling import SamplingParams

TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
}  # fmt: skip
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PICTURE = VOCAB - 10  # the token that stands for a part of one; four make one
IDS: dict[str, Any] = {"image_token_id": PICTURE, "video_token_id": PICTURE + 1}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]}
QWEN_EYES = {"hidden_size": 16, "out_hidden_size": 48, "depth": 1, "num_heads": 2, "intermediate_size": 16}


def _gemma3() -> PreTrainedModel:
    text = {**TEXT, "head_dim": 16, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
    ids = {"image_token_index": PICTURE, "boi_token_index": PICTURE + 1, "eoi_token_index": PICTURE + 2}
    eyes = {**EYES, "num_hidden_layers": 1}
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4, **ids)  # type: ignore[arg-type]
    config.tie_word_embeddings = False  # or each token repeats itself, whatever the picture
    return Gemma3ForConditionalGeneration(config)


def _qwen2_5() -> PreTrainedModel:
    eyes = {**QWEN_EYES, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=eyes, **IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3() -> PreTrainedModel:
    eyes = {**QWEN_EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 14}
    text = {**TEXT, "head_dim": 12, "rope_parameters": ROPE}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=eyes, **IDS))


def _llava() -> PreTrainedModel:
    eyes = CLIPVisionConfig(**{**EYES, "num_hidden_layers": 1})  # type: ignore[arg-type]
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=eyes, image_token_index=PICTURE)
    return LlavaForConditionalGeneration(config)


Make = Callable[[], PreTrainedModel]
MODELS: list[Make] = [_gemma3, _qwen2_5, _qwen3, _llava]
KINDS = {_gemma3: "token_type_ids", _qwen2_5: "mm_token_type_ids", _qwen3: "mm_token_type_ids"}


@functools.cache
def model_of(make: Make) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        model = randomised(make())
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def shown(make: Make, prompts: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """These prompts with a picture each behind the third token."""
    dice = torch.Generator().manual_seed(seed)
    inputs = batch(*[[*prompt[:3], *[PICTURE] * 4, *prompt[3:]] for prompt in prompts])
    if make in KINDS:
        inputs[KINDS[make]] = (inputs["input_ids"] == PICTURE).long()
    if make in (_gemma3, _llava):
        return inputs | {"pixel_values": torch.randn(len(prompts), 3, 28, 28, generator=dice)}
    grid = torch.tensor([[1, 4, 4]] * len(prompts))
    return inputs | {
        "pixel_values": torch.randn(16 * len(prompts), 1176, generator=dice),
        "image_grid_thw": grid,
    }


@pytest.fixture
def made() -> TreeGenerator:
    return generator(shape="2x2")


@pytest.mark.parametrize("make", MODELS)
def test_vision_models_without_pictures(make: Make, made: TreeGenerator) -> None:
    model, prompts = model_of(make), [some_tokens(9 - i, vocab=100, seed=i) for i in range(3)]
    for inputs in (batch(prompts[0]), batch(*prompts)):
        expected = run(model, inputs).tolist()
        assert run(model, inputs, custom_generate=made).tolist() == expected
        if make in KINDS:  # processors tell which tokens are pictures: none
            kinds = {KINDS[make]: torch.zeros_like(inputs["input_ids"])}
            assert run(model, {**inputs, **kinds}, custom_generate=made).tolist() == expected
    found = LLM(model).generate([prompts[0]], SamplingParams(max_tokens=NEW))[0].token_ids
    assert [*prompts[0], *found] == run(model, batch(prompts[0]))[0].tolist()


@pytest.mark.parametrize("make", MODELS)
def test_behind_pictures_texts_are_transformers_own(make: Make, made: TreeGenerator) -> None:
    model, texts = model_of(make), set[str]()
    prompts = [some_tokens(count, vocab=100, seed=count) for count in (21, 6, 9)]
    for seed in range(3):  # the same tokens each time, which nobody may go on from
        for chosen in ([prompts[1]], prompts):
            inputs = shown(make, chosen, seed)
            expected = run(model, inputs)
            assert run(model, inputs, custom_generate=made).tolist() == expected.tolist()
        texts.add(str(expected[1:, -NEW:].tolist()))
    assert len(texts) > 1  # pictures make a difference
    assert all(metrics.reused_tokens == 0 for metrics in made.metrics)
    alone = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}  # without what the tokens stand for
    assert run(model, alone, custom_generate=made).tolist() == run(model, alone).tolist()
    assert run(model, alone, custom_generate=made).tolist() == run(model, alone).tolist()
    assert made.metrics[0].reused_tokens > 16


@pytest.mark.parametrize(
    ("make", "options"), all_pairs(MODELS, [{}, {"num_return_sequences": 3}, {"repetition_penalty": 1.3}]), ids=named
)
def test_behind_pictures_a_seed_s_text_is_the_plain_one(make: Make, options: dict[str, Any]) -> None:
    model, prompts = model_of(make), [some_tokens(12, vocab=100)]
    inputs, other = shown(make, prompts), shown(make, prompts, seed=1)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 40} | options
    plain, trees = (generator(drafter=name, shape="3x2", seed=5) for name in ("none", None))
    expected = run(model, inputs, custom_generate=plain, **options).tolist()
    assert run(model, inputs, custom_generate=trees, **options).tolist() == expected
    assert run(model, other, custom_generate=trees, **options).tolist() != expected


def test_who_was_set_back_goes_on_behind_the_same_picture(made: TreeGenerator) -> None:
    model, prompt = model_of(_qwen2_5), some_tokens(9, vocab=100)
    inputs = shown(_qwen2_5, [prompt])
    expected, llm = run(model, inputs)[0].tolist(), made._llm(model)
    [read] = pictures.read_by_the_model(model, inputs["input_ids"], _prepared(model, inputs), [0])
    assert read.shift == -2  # a picture of 2 x 2 takes two positions
    seq = llm.sequence(inputs["input_ids"][0].tolist(), SamplingParams(max_tokens=NEW))
    seq.prompt_kv = read
    for _ in range(4):
        llm.decoder.prefill(seq)
        for _ in range(2):
            llm.decoder.step([seq])
        llm.decoder.release([seq])
    assert seq.tokens == expected[: len(seq.tokens)]
    assert len(seq.output_ids) >= 8


def _prepared(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What ``generate`` hands over beside tokens."""
    found = dict[str, Any]()

    def keep(_: Any, input_ids: torch.Tensor, *rest: Any, **model_kwargs: Any) -> torch.Tensor:
        found.update(model_kwargs)
        return input_ids

    run(model, inputs, custom_generate=keep)
    return found


@pytest.mark.parametrize("make", MODELS)
def test_what_goes_on_otherwise_than_the_model_is_refused(
    make: Make, made: TreeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, read = model_of(make), shown(make, [some_tokens(12, vocab=100)]), pictures.read_by_the_model

    def spoilt(*args: Any) -> list[PromptKV]:
        return [PromptKV(kv.rows, kv.layers, kv.shift + 9, kv.logits) for kv in read(*args)]

    monkeypatch.setattr("tokentree.hf.read_by_the_model", spoilt)
    with pytest.raises(ModelError, match=r"goes on otherwise behind such a prompt than by itself \(off by"):
        run(model, inputs, custom_generate=made)
    monkeypatch.undo()
    assert run(model, inputs, custom_generate=made).tolist() == run(model, inputs).tolist()


def test_what_cannot_be_read_so_is_refused(made: TreeGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of(_llava), shown(_llava, [some_tokens(12, vocab=100)])
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, 3:7]  # a picture alone
    monkeypatch.setattr("tokentree.hf.read_by_the_model", lambda *args: [PromptKV(3, (), 0, torch.zeros(VOCAB))])
    with pytest.raises(ModelError, match="can't go on behind a prompt that it read by itself"):
        run(model, inputs, custom_generate=made)
    monkeypatch.undo()
    with pytest.raises(OptionError, match="ends within a picture"):
        run(model, inputs, custom_generate=made)
