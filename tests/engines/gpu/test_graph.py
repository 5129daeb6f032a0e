"""`compile=True`: one graph for every tree, which says what the model says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import by_night, decode
from tests.engines.test_engine import assert_near, decoded_alone, of_transformers, verified
from tests.played import Played
from tests.tiny_models import request, some_tokens, some_tree, tiny
from tokentree import LLM, SamplingParams
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.engines import kv
from tokentree.engines.gpu import graph, recording
from tokentree.engines.gpu.recorded import CompiledEngine
from tokentree.engines.modules import ModulesEngine
from tokentree.engines.program import ProgramEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError
from tokentree.tree import TokenTree

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "falcon", "mixtral"]

Graphs = list[torch.fx.GraphModule]
ROOT = 5


def record_only(monkeypatch: pytest.MonkeyPatch, *rows: int) -> None:
    """Graphs for these numbers of rows alone: each takes seconds."""
    for module in (graph, recording):
        monkeypatch.setattr(module, "ROWS", rows)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """What was captured; it runs as it is, which takes no compiler."""
    record_only(monkeypatch, 2, 16, 64)
    found = Graphs()

    def keep(captured: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(captured)
        return captured.forward

    monkeypatch.setattr(graph, "BACKEND", keep)
    return found


def compiled(family: str) -> CompiledEngine:
    engine = TorchEngine(tiny(family), compile=True)
    assert isinstance(engine, CompiledEngine)
    return engine


@pytest.mark.parametrize("family", by_night(FAMILIES, but=["gemma2"]))
def test_a_tree_has_the_logits_that_transformers_gives_each_path(
    family: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family != "llama":
        record_only(monkeypatch, 16, 64)
    engine = compiled(family)
    for prefix, nodes in ((0, 1), (5, 9), (62, 30)):
        before, tree = some_tokens(prefix), some_tree(ROOT, nodes)
        got = verified(engine, request([*before, ROOT]), tree)
        assert_near(got, of_transformers(tiny(family), before, tree))


def test_no_tree_is_captured_again(graphs: Graphs) -> None:
    engine = compiled("llama")
    captured = len(graphs)
    assert captured
    for prefix, nodes in ((3, 1), (17, 5), (40, 33), (90, 64), (7, 2)):
        verified(engine, request([*some_tokens(prefix), ROOT]), some_tree(ROOT, nodes))
    assert len(graphs) == captured


def test_storage_that_grows_keeps_its_rows(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    record_only(monkeypatch, 16, 64)
    monkeypatch.setattr(kv, "LEAST_FIXED", 16)
    engine, before, tree = compiled("gemma3"), some_tokens(6), some_tree(ROOT, 40)
    nodes, expected = decoded_alone(TorchEngine(tiny("gemma3"), "sdpa"), before, tree, leaves=3)
    got = verified(engine, request([*before, ROOT]), tree)
    assert_near(got[nodes], expected)
    texts = [request(some_tokens(11), max_tokens=90) for _ in range(2)]
    expected_ids = decode(TorchEngine(tiny("gemma3")), texts[:1])
    assert decode(engine, texts[1:], Recycling(engine.vocab_size)) == expected_ids


def test_a_tree_grown_over_two_calls_equals_one_call(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    record_only(monkeypatch, 16)
    engine, tree = compiled("llama"), some_tree(ROOT, 12)
    seq = request([*some_tokens(9), ROOT])
    whole = verified(engine, seq, tree)
    part = TokenTree(tree.tokens[:5], tree.parents[:5])
    engine.verify([seq], [part])
    rest = engine.verify([seq], [tree], [5])
    assert_near(rest.rows(0, range(5, 12)), whole[5:])


def test_what_no_graph_fits_goes_through_the_model(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    record_only(monkeypatch, 16)
    engine = compiled("qwen3")
    seqs = [request([*some_tokens(4), ROOT]), request([*some_tokens(8), ROOT])]
    for seq in seqs:
        engine.prefill(seq)
    captured, trees = len(graphs), [some_tree(ROOT, 4), some_tree(ROOT, 7)]
    together = engine.verify(seqs, trees)
    for i, tree in enumerate(trees):
        alone = engine.verify([seqs[i]], [tree])
        assert_near(together.rows(i, range(len(tree))), alone.rows(0, range(len(tree))))
    wide = TokenTree.chain(1, [2] * 69)
    assert len(engine.verify([seqs[0]], [wide]).all_logits) == 70
    assert len(graphs) == captured


def test_what_cannot_be_compiled_runs_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(captured: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        raise RuntimeError("no compiler at hand")

    monkeypatch.setattr(graph, "BACKEND", refuse)
    with pytest.warns(UserWarning, match="can't be compiled: .*no compiler at hand"):
        engine = TorchEngine(tiny("qwen3"), compile=True)
    assert isinstance(engine, ModulesEngine)
    tree, seq = some_tree(ROOT, 9), request([*some_tokens(5), ROOT])
    assert torch.equal(verified(engine, seq, tree), verified(TorchEngine(tiny("qwen3")), seq, tree))


@pytest.mark.parametrize("options", [{"attention": "tree"}, {"quantization": "int8"}])
def test_what_does_not_go_with_a_graph_is_said(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"compile=True and {next(iter(options))}='.*' don't go together"):
        TorchEngine(tiny("phi3", torch.bfloat16), compile=True, **options)


def test_a_forward_that_is_one_call_is_left_as_it_is() -> None:
    model = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96)
    engine = TorchEngine(model, compile=True)
    assert isinstance(engine, ProgramEngine)
    assert engine.signature == TorchEngine(model).signature


@pytest.mark.nightly  # a compiler of C++ runs for long
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning:torch")  # inductor's own
def test_inductor_compiles_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    record_only(monkeypatch, 32)
    model = tiny("qwen3", num_hidden_layers=1)
    llm = LLM(model, compile=True)
    assert "one graph" in llm.engine.info.signature
    assert list((tmp_path / "compiled").rglob("*.cpp"))
    prompt, params = some_tokens(20), SamplingParams(max_tokens=30)
    plain = LLM(model).plain().generate([prompt], params)[0].token_ids
    assert llm.generate([prompt], params)[0].token_ids == plain


def test_recordings_of_several_sequences_play_one_after_another(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokentree.engines.gpu.recording.Recording", Played)
    engine = compiled("gemma3")
    engine.capture()
    engine._graph._on_cpu = False
    seqs = [request([*some_tokens(length), ROOT]) for length in (4, 70, 9)]
    for seq in seqs:
        engine.prefill(seq)
    trees = [some_tree(ROOT, nodes) for nodes in (4, 30, 1)]
    together = engine.verify(seqs, trees)
    assert len(engine._graph.recordings) >= 3
    engine.commit(seqs, [[0]] * 3)
    kept = [engine.hidden(seq).clone() for seq in seqs]
    other = TorchEngine(tiny("gemma3"))
    other.capture()
    for place, (seq, tree) in enumerate(zip(seqs, trees, strict=True)):
        assert_near(together.rows(place, range(len(tree))), verified(other, seq, tree))
        other.commit([seq], [[0]])
        assert_near(kept[place], other.hidden(seq))
