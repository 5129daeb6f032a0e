"""Plans that can't be carried out, and what is made instead; recordings, without a GPU."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engines.test_engine import assert_near, of_transformers, verified
from tests.played import Played
from tests.tiny_models import request, some_tokens, some_tree, tiny
from tokentree import ModelError
from tokentree.engines import torch as making
from tokentree.engines.base import EngineOptions
from tokentree.engines.gpu.graph import Graph
from tokentree.engines.gpu.recorded import RecordedEngine
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.modules import ModulesEngine
from tokentree.engines.plan import EnginePlan, Traits, plan
from tokentree.engines.self_attending import SelfAttendingEngine
from tokentree.engines.torch import TorchEngine

ROOT = 5


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on this CPU are planned for as if they were on a GPU, and recordings run again."""

    def planned(traits: Traits, options: EngineOptions) -> EnginePlan:
        return plan(replace(traits, device="cuda"), options)

    monkeypatch.setattr(making, "plan", planned)
    monkeypatch.setattr("tokentree.engines.gpu.recording.Recording", Played)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_recording_gives_what_transformers_gives(family: str, as_on_a_gpu: None) -> None:
    engine, model = TorchEngine(tiny(family)), tiny(family)
    assert type(engine) is RecordedEngine
    assert (engine.info.attention, engine.info.execution) == ("sdpa", "one recording")
    engine._graph._on_cpu = False
    before, tree = some_tokens(9), some_tree(ROOT, 20)
    first = request([*before, ROOT])
    verified(engine, first, tree)
    engine.release([first])
    assert len(engine._graph.recordings)
    engine.capture([1])
    assert not len(engine._graph.recordings)  # which know nothing of hidden states
    seq = request([*before, ROOT])
    assert_near(verified(engine, seq, tree), of_transformers(tiny(family), before, tree))
    assert len(engine._graph.recordings)
    path = tree.path(len(tree) - 1)
    engine.commit([seq], [path])
    ids = torch.tensor([[*before, *tree.tokens[path].tolist()]])
    with torch.inference_mode():
        expected = model(ids, output_hidden_states=True).hidden_states[1][0]
    assert_near(engine.hidden(seq, 1), expected)


def refuse(*_: Any) -> None:
    raise ModelError("no room for it")


def fail(*_: Any) -> None:
    raise RuntimeError("no room for it\nand much more")  # as torch says it


def test_what_can_t_be_recorded_attends_by_itself(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "forward", fail)
    with pytest.warns(UserWarning, match="recorded as a graph, and is slower without: no room for it$") as warned:
        engine = TorchEngine(tiny("llama"))
    assert type(engine) is SelfAttendingEngine
    assert len(warned) == 1
    assert not engine.caveat  # on a GPU that is no less than was promised


def test_all_plans_are_tried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    checked, check = list[type[KVEngine]](), KVEngine._check_trees

    def refuse_ours(self: KVEngine, own: dict[str, torch.Tensor]) -> None:
        checked.append(type(self))
        if self.attention == "tree":
            raise ModelError("it does not fit")
        check(self, own)

    monkeypatch.setattr(KVEngine, "_check_trees", refuse_ours)
    monkeypatch.setattr(Graph, "forward", fail)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine = TorchEngine(tiny("qwen3"), compile=True)
    assert [str(one.message) for one in told if one.category is UserWarning] == [
        "compile=True does nothing here, the forward can't be compiled: no room for it",
        "Qwen3ForCausalLM attends by itself here, and its text is plain's up to ties: it does not fit",
    ]
    assert engine.caveat == str(told[-1].message)
    assert checked == [ModulesEngine, SelfAttendingEngine]
    before, tree = some_tokens(9), some_tree(ROOT, 20)
    got = verified(engine, request([*before, ROOT]), tree)
    assert_near(got, of_transformers(tiny("qwen3"), before, tree))


def test_the_last_one_s_reason_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVEngine, "_check_trees", refuse)
    for attention, told in ((None, "^no room for it$"), ("tree", "^no room for it: use attention='sdpa'$")):
        with pytest.raises(ModelError, match=told):
            TorchEngine(tiny("qwen3"), attention)
    model = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96)
    with pytest.raises(ModelError, match=r"^no room for it: use attention='sdpa'$"):  # a program has no other
        TorchEngine(model)
