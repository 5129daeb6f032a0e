"""A forward in one compiled call. That it gives each node the logits of its path, to the bit, is in test_engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.engines.test_engine import assert_bits_of_paths
from tests.hybrids import HYBRIDS, tiny_hybrid
from tests.tiny_models import VOCAB, WINDOW, full_logits, parts_of, request, some_tokens, some_tree, tiny
from tokentree import LLM, SamplingParams
from tokentree.engines.base import Engine
from tokentree.engines.cpu.families.gemma3 import Gemma3
from tokentree.engines.cpu.families.names import FAMILIES as STACKS
from tokentree.engines.cpu.families.names import family_of
from tokentree.engines.cpu.fused import FusedNorm, GemmaNorm
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.step_loops import ATTEND, BEST, CONVOLVE, MULTIPLY, NORM, NORM_ONCE
from tokentree.engines.modules import ModulesEngine
from tokentree.engines.output import KEPT
from tokentree.engines.program import ProgramEngine
from tokentree.engines.segment import Segment
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError
from tokentree.kernels import threads
from tokentree.kernels.topk import top_logits
from tokentree.tree import TokenTree

AS_IT_IS = Packing(PackedLinear)
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "lfm2": "lfm2",
}
SOME = ["llama", "gemma3", "lfm2"]


def wide(family: str = "llama") -> PreTrainedModel:
    if family in HYBRIDS:
        return tiny_hybrid(family, torch.bfloat16)
    return tiny(family, torch.bfloat16, hidden_size=64, intermediate_size=96)


def logits_of(engine: Engine, length: int = 40) -> torch.Tensor:
    seq, tree = request(some_tokens(length)), some_tree(0, 9)
    engine.prefill(seq)
    return engine.verify([seq], [tree]).all_logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_it_says_what_the_modules_say(
    family: str, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    program = TorchEngine(wide(family), quantization=quantization)
    monkeypatch.setattr("tokentree.engines.prepared.family_of", lambda *_: None)
    modules = TorchEngine(wide(family), quantization=quantization)
    assert isinstance(program, ProgramEngine)
    assert isinstance(modules, ModulesEngine)
    assert {type(norm) for norm in parts_of(modules) if "norm" in type(norm).__name__.lower()} <= {FusedNorm, GemmaNorm}
    assert torch.equal(logits_of(program), logits_of(modules))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_plain_s_and_those_that_transformers_tells(family: str) -> None:
    model, prompts, params = wide(family), [some_tokens(20), some_tokens(3, 1)], SamplingParams(max_tokens=30)
    llm = LLM(model, "recycling", shape="3x2x1")
    texts = [result.token_ids for result in llm.generate(prompts, params)]
    assert isinstance(llm.engine, ProgramEngine)
    assert texts == [result.token_ids for result in llm.plain().generate(prompts, params)]
    for prompt, ids in zip(prompts, texts, strict=True):
        said = full_logits(model, [*prompt, *ids])[len(prompt) - 1 : -1]
        behind = said.amax(-1) - said[torch.arange(len(ids)), torch.tensor(ids)]
        assert float(behind.max()) <= 0.05 * float(said.std())  # a tie, in bfloat16
        assert int((behind == 0).sum()) >= 0.9 * len(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_of_one_family(family: str) -> None:
    fitting = [name for name, stack in STACKS.items() if stack.fits(wide(family), AS_IT_IS)]
    assert fitting == [FAMILIES[family]]


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_no_bit(count: int, family: str) -> None:
    engine, before = TorchEngine(wide(family)), torch.get_num_threads()
    expected = logits_of(engine)
    torch.set_num_threads(count)
    got = logits_of(engine)
    torch.set_num_threads(before)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("missing", ["_pool", "_openmp"])
def test_without_torch_s_pool_one_thread_does_it_all(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(wide())
    expected = logits_of(engine)
    monkeypatch.setattr(threads, missing, lambda: None)
    threads._pool.cache_clear() if missing == "_openmp" else None
    assert torch.equal(logits_of(engine), expected)
    monkeypatch.undo()
    threads._pool.cache_clear()


def test_the_most_probable_tokens_are_found_in_the_call() -> None:
    engine, seq = TorchEngine(wide()), request(some_tokens(3))
    engine.prefill(seq)
    out = engine.verify([seq], [some_tree(1, 9)])
    assert out.best_known is not None
    values, ids = top_logits(out.all_logits, KEPT)
    assert out.best_known[0].tolist() == values.tolist()
    assert out.best_known[1].tolist() == ids.tolist()


@pytest.mark.parametrize("family", SOME)
def test_room_grows_for_more_rows_than_there_were_without_a_change(family: str) -> None:
    engine = TorchEngine(wide(family))
    expected = logits_of(engine)
    seq, many = request(some_tokens(3)), TokenTree.chain(1, some_tokens(150))
    engine.prefill(seq)
    engine.verify([seq], [many])
    assert isinstance(engine, ProgramEngine)
    program = engine._program
    assert program._capacity >= 151
    assert torch.equal(logits_of(engine), expected)


@pytest.mark.parametrize("family", ["llama", "lfm2"])
@pytest.mark.parametrize("token", [-1, VOCAB, 10**12])
def test_a_token_that_there_isn_t_is_refused_before_memory_is_read(token: int, family: str) -> None:
    engine = TorchEngine(wide(family))
    assert isinstance(engine, ProgramEngine)
    seq, chain = request(some_tokens(3)), TokenTree.chain(1, [VOCAB - 1])
    engine.prefill(seq)
    expected = engine.verify([seq], [chain]).all_logits
    with pytest.raises(IndexError, match="outside the embedding"):
        engine.verify([seq], [TokenTree.chain(1, [token])])
    assert torch.equal(engine.verify([seq], [chain]).all_logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_ends_at_the_last_layer_s_kv_or_state(family: str) -> None:
    engine = TorchEngine(wide(family))
    assert isinstance(engine, ProgramEngine)
    program = engine._program
    before, behind = (part.tolist() for part in np.split(program._steps[:, 0], [program._up_to_kv]))
    last = CONVOLVE if family == "lfm2" else ATTEND
    assert (before + behind)[program._up_to_kv - (last == CONVOLVE)] == last
    assert behind.count(ATTEND) == (last == ATTEND)
    assert behind.count(CONVOLVE) == 0
    assert behind[-3:] == [NORM_ONCE if family == "gemma3" else NORM, MULTIPLY, BEST]


CHANGED = [
    *(("llama", part) for part in ("model.layers.1.mlp", "model.norm", "lm_head")),
    ("qwen3", "model.layers.1.self_attn.k_norm"),
    *(("gemma3", f"model.{part}") for part in ("layers.1.self_attn.q_norm", "layers.0.pre_feedforward_layernorm")),
    ("gemma3", "model.embed_tokens"),
    *(("lfm2", f"model.layers.{part}") for part in ("0.conv", "0.conv.conv", "1.self_attn.k_layernorm", "2.ffn_norm")),
    *(("lfm2", part) for part in ("model.layers.3.feed_forward.w1", "model.embedding_norm")),
]


@pytest.mark.parametrize(("family", "part"), CHANGED)
def test_a_model_that_someone_listens_to_or_changed_is_left_to_transformers(family: str, part: str) -> None:
    model = wide(family)
    assert family_of(model, AS_IT_IS) is not None
    handle = model.get_submodule(part).register_forward_hook(lambda *_: None)
    assert family_of(model, AS_IT_IS) is None
    handle.remove()
    parent, _, name = part.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    assert family_of(model, AS_IT_IS) is None


def test_a_model_of_another_family_is_left_to_transformers() -> None:
    assert family_of(wide("gemma2"), AS_IT_IS) is None
    assert family_of(tiny("llama"), AS_IT_IS) is None


@pytest.mark.parametrize(
    "options",
    [
        {"final_logit_softcapping": 30.0},
        {"hidden_activation": "gelu_new"},
        {"hidden_activation": "gelu_python_tanh"},
        {"use_bidirectional_attention": True},
        {"rope_parameters": {kind: {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0} for kind in LAYERS}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_gemma_3_has_no_steps_for_is_left_to_transformers(options: dict[str, Any]) -> None:
    own = tiny("gemma3", torch.bfloat16, hidden_size=64, intermediate_size=96, **options)
    assert family_of(own, AS_IT_IS) is None


def test_positions_turn_as_gemma_3_s_own_do_in_each_kind_of_layer() -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    }
    own: Any = tiny("gemma3", torch.bfloat16, hidden_size=64, intermediate_size=96, rope_parameters=rope)
    rotaries, tables = Gemma3.turns(own)
    at, like = torch.arange(50)[None], torch.empty(0, dtype=torch.bfloat16)
    for kind, table in zip(own.config.layer_types, tables, strict=True):
        for got, expected in zip(rotaries[table](like, at), own.model.rotary_emb(like, at, kind), strict=True):
            assert torch.equal(got, expected)
    assert tables == [1, 0]
    engine = TorchEngine(own)
    assert isinstance(engine, ProgramEngine)
    windows = [layer.attention.window for layer in engine._program.stack.layers]
    assert windows == [WINDOW, None]


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 320, "conv_L_cache": 5, "conv_bias": True},  # channels that a thread takes in two strips
        {"conv_L_cache": 1, "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
        {"layer_types": ["full_attention", "full_attention"], "num_hidden_layers": 2},
    ],
    ids=["wide", "one tap", "attention alone"],
)
def test_convolutions_of_other_sizes(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiny_hybrid("lfm2", torch.bfloat16, **options)
    program = TorchEngine(own)
    assert isinstance(program, ProgramEngine)
    assert_bits_of_paths(program)
    monkeypatch.setattr("tokentree.engines.prepared.family_of", lambda *_: None)
    assert torch.equal(logits_of(program), logits_of(TorchEngine(own)))


def test_what_lfm2_has_no_steps_for_is_left_to_transformers() -> None:
    for change in ({"groups": 32}, {"padding": (1,)}, {"dilation": (2,)}, {"padding_mode": "circular"}):
        own: Any = wide("lfm2")
        for name, value in change.items():
            setattr(own.model.layers[0].conv.conv, name, value)
        assert family_of(own, AS_IT_IS) is None
    assert family_of(tiny_hybrid("lfm2", torch.bfloat16, layer_types=["conv"] * 4), AS_IT_IS) is None
    assert family_of(wide("lfm2_moe"), AS_IT_IS) is None
    assert family_of(wide("lfm3"), AS_IT_IS) is None


def test_states_of_other_sizes_are_refused_before_memory_is_read() -> None:
    engine = TorchEngine(wide("lfm2"))
    assert isinstance(engine, ProgramEngine)
    program, layout, chain = engine._program, engine._storages.layout, TokenTree.chain(1, [2, 3])
    one = layout.recurrences[0]
    ids, places = np.array([1, 2, 3]), np.arange(3)
    narrow, short = dataclasses.replace(one, row=32), dataclasses.replace(one, back=1)
    for kept in ((), (one,) * 2, (one,) * 4, (narrow,) * 3, (short,) * 3):
        kv = dataclasses.replace(layout, recurrences=kept).make(32)
        with pytest.raises(ModelError, match="the states of a text have other sizes than the model's layers"):
            program.forward(ids, places, [Segment(kv, chain, 0, 0)], "logits")
    assert len(program.forward(ids, places, [Segment(layout.make(32), chain, 0, 0)], "logits")()) == 3
