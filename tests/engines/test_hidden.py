"""Hidden states that drafters read: kept beside the KV, for all rows that are committed."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import random_table
from tests.drafters.test_eagle import some_head
from tests.drafters.test_medusa import random_heads
from tests.hybrids import HYBRIDS, tiny_hybrid
from tests.tiny_models import FAMILIES, request, some_tokens, some_tree, tiny, tiny_vision
from tokentree.drafters.eagle import Eagle
from tokentree.drafters.medusa import Medusa
from tokentree.engines.cpu.linear import weights_of
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.program import ProgramEngine
from tokentree.engines.table import TableEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import PairingError
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

WIDE = {"hidden_size": 64, "intermediate_size": 96}
FINAL = [family for family in FAMILIES if family != "gemma2"]  # where logits are what the output layer gives


def read(engine: KVEngine, seq: Sequence) -> list[int]:
    """Reads a text, and two steps of a tree behind it, along paths that leave nodes out; returns what is committed."""
    engine.prefill(seq)
    tokens = seq.tokens[:-1]
    for root in (seq.tokens[-1], 3):
        tree = some_tree(root, 9)
        engine.verify([seq], [tree])
        path = tree.path(len(tree) - 1)
        engine.commit([seq], [path])
        tokens += tree.tokens[path].tolist()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_that_transformers_tells(family: str) -> None:
    model = tiny(family)
    engine = TorchEngine(model)
    last = engine.capture([0, 1]).num_layers
    engine.capture()
    seq = request(some_tokens(20))
    tokens = read(engine, seq)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
    assert len(expected) == last + 1
    for place in (0, 1, last):
        got = engine.hidden(seq, place)
        assert got.shape == expected[place][0].shape
        assert float((got - expected[place][0]).abs().max()) < 1e-3 * float(expected[place].std())
    assert torch.equal(engine.hidden(seq), engine.hidden(seq, last))


@pytest.mark.parametrize("attention", ["tree", "sdpa"])
def test_they_are_the_language_model_s_where_the_vision_model_has_as_many_layers(attention: str) -> None:
    model = tiny_vision(layers=2)
    engine, seq = TorchEngine(model, attention), request(some_tokens(20))
    engine.capture([0, 1])
    tokens = read(engine, seq)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
    for place in (0, 1):
        assert float((engine.hidden(seq, place) - expected[place][0]).abs().max()) < 1e-3 * float(expected[place].std())


@pytest.mark.parametrize("family", FINAL)
def test_the_last_ones_are_what_the_output_layer_reads(family: str) -> None:
    engine = TorchEngine(tiny(family))
    features, tokens = engine.capture(), some_tokens(20)
    seqs = [request(tokens), request(tokens[:7])]
    for seq in seqs:
        engine.prefill(seq)
    out = engine.verify(seqs, [TokenTree.chain(tokens[-1], [5, 9, 2]), TokenTree.chain(tokens[6], [3])])
    engine.commit(seqs, [[0, 1, 2, 3], [0, 1]])
    again = features.output_layer(torch.cat([engine.hidden(seqs[0])[-4:], engine.hidden(seqs[1])[-2:]]))
    assert float((again - out.all_logits).abs().max()) < 1e-4 * float(out.all_logits.std())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3", "lfm2"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_program_has_them_too(quantization: str | None, family: str) -> None:
    model = tiny_hybrid(family, torch.bfloat16) if family in HYBRIDS else tiny(family, torch.bfloat16, **WIDE)
    engine = TorchEngine(model, quantization=quantization)
    assert isinstance(engine, ProgramEngine)
    features, seq = engine.capture(), request(some_tokens(20))
    engine.capture([0, 1])
    tokens = read(engine, seq)
    out = engine.verify([seq], [TokenTree.chain(7, [1, 2])])
    engine.commit([seq], [[0, 1, 2]])
    assert torch.equal(features.output_layer(engine.hidden(seq)[-3:]), out.all_logits)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([[*tokens, 7, 1, 2]]), output_hidden_states=True).hidden_states
    for place in (0, 1):
        error = (engine.hidden(seq, place) - expected[place][0]).float().std()
        assert float(error) < (0.1 if quantization else 0.02) * float(expected[place].float().std())


@pytest.mark.parametrize("attention", ["tree", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_those_of_a_text_are_those_of_reading_it_step_by_step(
    attention: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("tokentree.engines.kv_engine.PREFILL_ROWS", 16)
    engine = TorchEngine(tiny("llama", dtype, **WIDE), attention)
    last = engine.capture([1]).num_layers
    engine.capture()
    ids = some_tokens(45)
    seq = request(ids[:1])
    for token in ids:
        engine.verify([seq], [TokenTree.root(token)])
        engine.commit([seq], [[0]])
    whole = engine.hidden_states(ids, [last, 1])
    steps = torch.cat([engine.hidden(seq, last), engine.hidden(seq, 1)], dim=1)
    assert whole.dtype is dtype
    if attention == "tree":
        assert torch.equal(whole, steps)
    else:
        assert torch.allclose(whole.float(), steps.float(), rtol=0.05, atol=0.05)
    assert torch.equal(engine.hidden_states(ids), whole[:, : whole.shape[1] // 2])


def test_a_text_that_begins_alike_takes_them_over() -> None:
    engine = TorchEngine(tiny("llama"), prefix_bytes=10_000_000)
    first, second = request(some_tokens(40)), request([*some_tokens(40)[:30], 1, 2, 3])
    engine.prefill(first)
    engine.release([first])
    engine.capture([1])
    assert engine.prefill(second) == 0  # what was kept before has none
    engine.release([second])
    third, fresh = request(second.tokens), TorchEngine(tiny("llama"))
    assert engine.prefill(third) == 32
    fresh.capture([1])
    assert torch.equal(engine.hidden(third, 1), fresh.hidden_states(second.tokens[:-1], [1]))


def test_nobody_pays_for_those_that_nobody_asked_for() -> None:
    engine, seq = TorchEngine(tiny("qwen3")), request(some_tokens(5))
    engine.prefill(seq)
    assert engine._kv_of(seq).states.numel() == 0


def test_what_is_not_there_is_refused() -> None:
    engine, seq = TorchEngine(tiny("llama")), request(some_tokens(5))
    with pytest.raises(PairingError, match=r"hidden states 0 to 2, not \[3\]"):
        engine.capture([3])
    engine.capture()
    engine.prefill(seq)
    engine.capture()
    with pytest.raises(PairingError, match="while texts are being decoded"):
        engine.capture([0])


def test_heads_are_not_for_an_engine_without_hidden_states() -> None:
    table = TableEngine(random_table(4))
    with pytest.raises(PairingError, match=r"^a table has no hidden states, which Medusa heads read$"):
        Medusa(random_heads(48), table)
    with pytest.raises(PairingError, match=r"^a table has no hidden states, on which an EAGLE head drafts$"):
        Eagle(some_head(3), table)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_layer_of_some_tokens_gives_their_logits(family: str, dtype: torch.dtype) -> None:
    engine = TorchEngine(tiny(family, dtype, **({"n_embd": 64} if family == "gpt2" else WIDE)))
    features, ids = engine.capture(), torch.tensor([7, 3, 119, 50, 51])
    hidden = torch.randn(4, features.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = features.output_layer(hidden)[:, ids].float()
    weight, bias = features.output_weights(ids)
    least = 1e-2 if dtype is torch.float32 else 5e-2  # in 8 bits
    assert torch.allclose(features.linear(weight, bias)(hidden).float(), expected, rtol=1e-2, atol=least)
    assert bias is None
    assert torch.allclose(hidden.float() @ weight.float().t(), expected, rtol=1e-2, atol=1e-2)


def test_the_weights_of_a_layer_with_a_bias_come_without_it() -> None:
    layer = torch.nn.Linear(70, 9).requires_grad_(False)
    weight, bias = weights_of(layer, torch.tensor([8, 0, 3]), 70, torch.float32)
    assert torch.allclose(weight, layer.weight[[8, 0, 3]], atol=1e-6)
    assert bias is not None
    assert torch.equal(bias, layer.bias[[8, 0, 3]])
