"""A forward in one compiled call. That it gives each node the logits of its path, to the bit, is in test_engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.tiny_models import VOCAB, request, some_tokens, some_tree, tiny
from tokentree.engines.base import KEPT, Engine
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.llama import Llama
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.step_loops import ATTEND, BEST, MULTIPLY, NORM
from tokentree.engines.modules import ModulesEngine
from tokentree.engines.program import ProgramEngine
from tokentree.engines.torch import TorchEngine
from tokentree.kernels import threads
from tokentree.kernels.topk import top_logits
from tokentree.tree import TokenTree

AS_IT_IS = Packing(PackedLinear)
FAMILIES = ["llama", "mistral", "qwen2"]


def wide(family: str = "llama") -> PreTrainedModel:
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
    monkeypatch.setattr(Llama, "fits", staticmethod(lambda *_: False))
    modules = TorchEngine(wide(family), quantization=quantization)
    assert isinstance(program, ProgramEngine)
    assert isinstance(modules, ModulesEngine)
    got, expected = logits_of(program).float(), logits_of(modules).float()
    assert got.shape == expected.shape
    assert float((got - expected).square().mean().sqrt()) < 0.02 * float(expected.std())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_no_bit(count: int) -> None:
    engine, before = TorchEngine(wide()), torch.get_num_threads()
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


def test_room_grows_for_more_rows_than_there_were_without_a_change() -> None:
    engine = TorchEngine(wide())
    expected = logits_of(engine)
    seq, many = request(some_tokens(3)), TokenTree.chain(1, some_tokens(150))
    engine.prefill(seq)
    engine.verify([seq], [many])
    assert isinstance(engine, ProgramEngine)
    program = engine._program
    assert program._capacity >= 151
    assert torch.equal(logits_of(engine), expected)


@pytest.mark.parametrize("token", [-1, VOCAB, 10**12])
def test_a_token_that_there_isn_t_is_refused_before_memory_is_read(token: int) -> None:
    engine = TorchEngine(wide())
    assert isinstance(engine, ProgramEngine)
    seq = request(some_tokens(3))
    engine.prefill(seq)
    with pytest.raises(IndexError, match="outside the embedding"):
        engine.verify([seq], [TokenTree.chain(1, [token])])
    assert len(engine.verify([seq], [TokenTree.chain(1, [VOCAB - 1])]).all_logits) == 2


def test_a_prefill_ends_at_the_last_layer_s_kv() -> None:
    engine = TorchEngine(wide())
    assert isinstance(engine, ProgramEngine)
    program = engine._program
    behind = program._steps[program._up_to_kv :, 0].tolist()
    assert behind[0] == ATTEND
    assert behind.count(ATTEND) == 1
    assert behind[-3:] == [NORM, MULTIPLY, BEST]


@pytest.mark.parametrize("part", ["model.layers.1.mlp", "model.norm", "lm_head"])
def test_a_model_that_someone_listens_to_or_changed_is_left_to_transformers(part: str) -> None:
    model = wide()
    assert Llama.fits(model, AS_IT_IS)
    handle = model.get_submodule(part).register_forward_hook(lambda *_: None)
    assert not Llama.fits(model, AS_IT_IS)
    handle.remove()
    parent, _, name = part.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    assert not Llama.fits(model, AS_IT_IS)


def test_a_model_of_another_family_is_left_to_transformers() -> None:
    assert not Llama.fits(wide("gemma2"), AS_IT_IS)
    assert not Llama.fits(tiny("llama"), AS_IT_IS)
