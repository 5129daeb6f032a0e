"""Own attention for families whose attention differs: latents, sinks, masks and windows of their own, experts, language
models behind vision models, and those that don't go through transformers' interface. And what is said where a model
attends by itself."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import DogeConfig, DogeForCausalLM, LlamaForCausalLM, PreTrainedModel

from tests.conftest import by_night, shown
from tests.engines.test_engine import assert_bits_of_paths, assert_near, of_transformers, verified
from tests.tiny_models import (
    CONTEXT,
    INDEXED,
    OTHERS,
    full_logits,
    randomised,
    request,
    some_tokens,
    some_tree,
    tiny,
    tiny_other,
    tiny_vision,
)
from tokentree import LLM, SamplingParams
from tokentree.engines.cpu.alibi import bloom_biases, falcon_biases, mpt_biases
from tokentree.engines.cpu.attention import ForwardKV, Rule, attend_rows
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.prepare import private_copy, set_attention
from tokentree.engines.cpu.steady import SteadyWeight, steady_weights
from tokentree.engines.kv import KVLayout
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.model_engine import ModelEngine
from tokentree.engines.segment import Segment
from tokentree.engines.support import cache_names, counting
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError
from tokentree.hf import generator
from tokentree.tree import TokenTree

NAMES = [*OTHERS, "vision"]
ALIBI = ["bloom", "falcon", "mpt"]
COUNTING = ["bart", "mvp", "roberta", "roformer", "whisper"]  # positions by themselves
NEW = [
    *ALIBI, *INDEXED, *COUNTING, "bert", "dbrx", "gemma3n_text", "gemma4_text", "granitemoehybrid", "llama4_text",
    "longcat_flash", "megatron-bert", "openai-gpt", "xglm",
]  # fmt: skip
GREEDY = [name for name in NEW if name != "roberta"]
BOTH = [torch.float32, torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", BOTH, ids=["float32", "bfloat16"])
ROUTERS = ["ernie4_5_moe", "gpt_oss", "mixtral", "phimoe", "qwen2_moe"]


@functools.cache
def model_of(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return tiny_vision(dtype) if name == "vision" else tiny_other(name, dtype)


@functools.cache
def engine_of(name: str, dtype: torch.dtype) -> KVEngine:
    return TorchEngine(model_of(name, dtype))  # a warning would be an error


@pytest.mark.parametrize("prefix", by_night([5, 40, 62], but=[62]))
@pytest.mark.parametrize("name", NAMES)
def test_a_tree_has_the_logits_that_transformers_gives_each_path(name: str, prefix: int) -> None:
    engine, tokens = engine_of(name, torch.float32), some_tokens(prefix + 1, seed=prefix)
    assert engine.attention == "tree"
    tree = some_tree(tokens[-1], 14, seed=prefix)
    got = verified(engine, request(tokens), tree)
    assert_near(got, of_transformers(model_of(name, torch.float32), tokens[:-1], tree))


IN_TURNS = [(name, BOTH[place % 2]) for place, name in enumerate(NAMES)]  # by day, one engine in bfloat16 serves all


@pytest.mark.parametrize(
    ("name", "dtype"),
    by_night(
        itertools.product(NAMES, BOTH),
        # of the others, which attend as transformers' interfaces have it, every third
        but=[*(one for one in IN_TURNS if one[0] in NEW), *[one for one in IN_TURNS if one[0] not in NEW][::3]],
    ),
    ids=shown,
)
def test_a_node_has_the_bits_of_decoding_its_path_alone(name: str, dtype: torch.dtype) -> None:
    assert_bits_of_paths(engine_of(name, dtype))


@pytest.mark.parametrize("name", by_night(GREEDY, but=GREEDY[::2]))
def test_greedy_ids_are_those_of_transformers(name: str) -> None:
    model = model_of(name, torch.float32)
    inputs = {"input_ids": torch.tensor([some_tokens(40, seed=3)]), "attention_mask": torch.ones(1, 40)}
    options: dict[str, Any] = {**inputs, "do_sample": False, "max_new_tokens": 24, "eos_token_id": None}
    generate: Any = model.generate
    expected = generate(**options)
    assert len(set(expected[0, 40:].tolist())) > 3
    got = generate(**options, custom_generate=generator(model, shape="2x2x2"))
    assert got.tolist() == expected.tolist()


def test_positions_begin_where_a_models_forward_begins_them() -> None:
    """``generate`` counts RoBERTa's from 0, and its forward from behind padding."""
    model, prompt = model_of("roberta", torch.float32), some_tokens(40, seed=3)
    llm = LLM(model, shape="2x2x2")
    assert llm.engine.context == CONTEXT  # of one table entry more
    ids = llm.generate([prompt], SamplingParams(max_tokens=24, ignore_eos=True))[0].token_ids
    assert full_logits(model, [*prompt, *ids[:-1]]).argmax(-1)[39:].tolist() == ids


class HandsOn(LlamaForCausalLM):
    """Takes what it doesn't name, as Evolla does."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class TakesNoMore(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_what_a_model_hands_on_it_takes() -> None:
    tokens = some_tokens(41)
    tree, model = some_tree(tokens[-1], 14), tiny("llama")
    expected = of_transformers(model, tokens[:-1], tree)
    model.__class__ = HandsOn
    assert_near(verified(TorchEngine(model, "tree"), request(tokens), tree), expected)
    model.__class__ = TakesNoMore
    with pytest.raises(ModelError, match="TakesNoMore takes no cache, position_ids"):
        TorchEngine(model)


class TakesACache(LlamaForCausalLM):
    """Calls it as forwards do since transformers 5.24."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, cache: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        return super().forward(input_ids, attention_mask, position_ids, cache, **kwargs)


class TakesPastKeyValues(LlamaForCausalLM):
    """Calls it as they did before."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


@pytest.mark.parametrize("attention", ["tree", "sdpa"])
@pytest.mark.parametrize(("kind", "name"), [(TakesACache, "cache"), (TakesPastKeyValues, "past_key_values")])
def test_a_cache_is_given_by_the_name_that_a_class_has_for_it(
    kind: type[LlamaForCausalLM], name: str, attention: Any
) -> None:
    tokens = some_tokens(41)
    tree, model = some_tree(tokens[-1], 14), tiny("llama")
    expected = of_transformers(model, tokens[:-1], tree)
    model.__class__ = kind
    assert cache_names(model) == (name,)
    assert_near(verified(TorchEngine(model, attention), request(tokens), tree), expected)


@pytest.mark.parametrize("name", COUNTING)
def test_who_counts_positions_is_known_and_told(name: str) -> None:
    model = model_of(name, torch.float32)
    assert any(counting(model))
    with pytest.raises(ModelError, match=r"counts positions by itself, as this library.*with attention='sdpa'"):
        TorchEngine(model, "sdpa")


def test_what_reads_in_both_directions_is_refused() -> None:
    model = tiny("gemma3", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="reads a text in both directions"):
        TorchEngine(model)


@pytest.mark.parametrize(
    ("name", "dtype"),
    by_night(itertools.product(NEW, BOTH), but=[one for one in IN_TURNS if one[0] in NEW]),
    ids=shown,
)
def test_kv_of_a_text_that_begins_alike_is_reused(name: str, dtype: torch.dtype) -> None:
    model, tokens = model_of(name, dtype), some_tokens(60)
    engine, first = TorchEngine(model, prefix_bytes=1 << 22), request(tokens)
    engine.prefill(first)
    engine.release([first])
    other = [*tokens[:45], *some_tokens(9, seed=4)]
    tree = some_tree(other[-1], 17)
    seq = request(other)
    assert engine.prefill(seq) >= 45
    got = engine.verify([seq], [tree]).all_logits
    assert torch.equal(got, verified(engine_of(name, dtype), request(other), tree))


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text", "granitemoehybrid", "llama4_text", "longcat_flash"])
def test_a_tree_has_these_logits_where_the_model_attends_by_itself(name: str) -> None:
    model = model_of(name, torch.float32)
    engine = TorchEngine(model, "sdpa")
    seqs = [request(some_tokens(count, seed=count)) for count in (41, 12)]
    trees = [some_tree(seq.tokens[-1], 14, seed=1) for seq in seqs]
    for seq in seqs:
        engine.prefill(seq)
    out = engine.verify(seqs, trees)
    for i, (seq, tree) in enumerate(zip(seqs, trees, strict=True)):
        assert_near(out.rows(i, range(14)), of_transformers(model, seq.tokens[:-1], tree))


# -- what a model attends with ---------------------------------------------------------------------------------------


def configs_of(model: PreTrainedModel) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def test_modules_of_a_copy_hold_copies_of_the_configurations_that_they_hold() -> None:
    model = tiny_vision()
    before = [config._attn_implementation for config in configs_of(model)]
    copied = private_copy(model)
    set_attention(copied, "tokentree")
    pairs = list(zip(configs_of(copied), configs_of(model), strict=True))
    assert len({id(own) for _, own in pairs}) == 3, "the whole, text and vision"
    assert len({id(new) for new, _ in pairs}) == 3
    assert all(new is not own and new._attn_implementation == "tokentree" for new, own in pairs)
    assert copied.config.text_config is copied.get_decoder().config
    assert [own._attn_implementation for _, own in pairs] == before


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_layers_that_read_keys_and_values_of_others_store_none(name: str) -> None:
    by_itself = TorchEngine(model_of(name, torch.float32), "sdpa")
    for engine in (engine_of(name, torch.float32), by_itself):
        assert len(engine._storages.layout.shapes) == 2, engine.attention
    assert engine_of(name, torch.float32)._storages.layout.reads == (0, 1, 0, 1)


@pytest.mark.parametrize("name", [*ALIBI, *INDEXED])
def test_biases_by_positions_and_an_index_take_attention_of_ours(name: str) -> None:
    for options in ({"attention": "sdpa"}, {"compile": True}):
        said = ", ".join(f"{key}={value!r}" for key, value in options.items())
        with pytest.raises(ModelError, match=f"(ALiBi|an index chooses).*, as this library.*with {said}"):
            TorchEngine(model_of(name, torch.float32), **options)


@pytest.mark.parametrize("name", ALIBI)
def test_biases_stay_the_same_as_there_come_to_be_more(name: str) -> None:
    heads = 6  # slopes that are no powers of two
    made = {
        "bloom": bloom_biases(heads, torch.float32), "falcon": falcon_biases(heads, torch.bfloat16, 24),
        "mpt": mpt_biases(heads),
    }[name]  # fmt: skip
    few = made.upto(1000).clone()
    many = made.upto(5000)
    assert many.shape[1] >= 5000
    assert torch.equal(many[:, :1000], few[:, :1000])


def storage(heads: int = 2, width: int = 8, value_width: int = 8, rows: int = 32) -> ForwardKV:
    kv = KVLayout(((heads, width, value_width),), torch.float32, torch.device("cpu"), blocked=True).make(rows)
    return ForwardKV([Segment(kv, TokenTree.chain(1, [2, 3]), 0, 0)], attends_itself=False)


@pytest.mark.parametrize(
    ("forward", "layer", "heads", "width", "value_width", "rows"),
    [
        (storage(), 0, 48, 8, 8, 3),  # 48 times as many heads as are stored
        (storage(), 0, 2, 384, 8, 3),
        (storage(), 0, 2, 8, 384, 3),
        (storage(), 1, 2, 8, 8, 3),
        (storage(), -1, 2, 8, 8, 3),
        (storage(), 0, 2, 8, 8, 2),  # fewer queries than the tree has nodes
    ],
)
def test_attention_reads_nothing_but_what_is_stored(
    forward: ForwardKV, layer: int, heads: int, width: int, value_width: int, rows: int
) -> None:
    query = torch.zeros(96, rows, width)
    with pytest.raises(ModelError, match=r"stored|room"):
        attend_rows(forward.segments, layer, query, heads, value_width, Rule(1.0))


def test_a_product_adds_the_bias_that_it_is_given_wherever_that_lies() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(32, 32, generator=generator) for _ in range(2))
    steady = SteadyWeight.of(weight)
    for value in range(4):  # freed each time, so that the next one may take its place
        bias = torch.full((32,), float(value))
        assert torch.allclose(linear(x, steady, bias), linear(x, weight, bias), atol=1e-4), value
        bias += 1
        assert torch.allclose(linear(x, steady, bias), linear(x, weight, bias), atol=1e-4), value
    own = nn.Parameter(torch.ones(32), requires_grad=False)
    assert torch.allclose(linear(x, steady, own), linear(x, weight, own), atol=1e-4)
    assert len(steady._layers) == 2


def test_attention_reads_no_rows_behind_the_storage() -> None:
    forward = storage()
    forward.segments[0].kv.length = forward.segments[0].kv.capacity - 2
    with pytest.raises(IndexError, match="room for 32"):
        attend_rows(forward.segments, 0, torch.zeros(2, 3, 8), 2, 8, Rule(1.0))


@pytest.mark.parametrize(
    ("row", "keys", "values"), [(0, (4, 3, 8), (4, 3, 8)), (0, (2, 3, 9), (2, 3, 8)), (0, (2, 3, 8), (2, 3, 9)),
                                (30, (2, 3, 8), (2, 3, 8)), (-1, (2, 3, 8), (2, 3, 8))],
)  # fmt: skip
def test_nothing_is_written_beside_the_storage(row: int, keys: Any, values: Any) -> None:
    kv = storage().segments[0].kv
    with pytest.raises(ModelError, match=r"stores|room"):
        kv.write(0, row, torch.ones(keys), torch.ones(values))
    assert not any(stored.any() for stored in kv.layer(0))


def test_a_model_whose_rows_see_what_comes_behind_them_is_refused() -> None:
    model = tiny("llama", is_causal=False)
    with pytest.raises(ModelError, match="LlamaAttention sees something else than the rows before it"):
        TorchEngine(model, "tree")
    with pytest.raises(ModelError, match="does not give the same logits"):
        TorchEngine(model)


# -- products --------------------------------------------------------------------------------------------------------


class Products(nn.Module):
    """The ways in which families multiply with weights that are no linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 32, generator=generator))
        self.experts = nn.Parameter(torch.randn(3, 64, 32, generator=generator))
        self.bias = nn.Parameter(torch.randn(10, generator=generator))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        at = torch.tensor(2)
        return [
            nn.functional.linear(x, self.weight), nn.functional.linear(x, self.weight, self.bias),
            nn.functional.linear(x.float(), self.weight.type(torch.float32)), x @ self.weight.t(), x @ self.weight.T,
            torch.matmul(x, self.experts[1].t()), nn.functional.linear(input=x, weight=self.experts[at]),
            x[..., :10] @ self.weight,
        ]  # fmt: skip


@DTYPES
def test_products_with_steady_weights_are_the_same_beside_any_rows(dtype: torch.dtype) -> None:
    own = Products().to(dtype)
    steady = Products().to(dtype)
    steady_weights(steady)
    assert isinstance(steady.weight, SteadyWeight)
    x = torch.randn(70, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole, expected = steady(x), own(x)
    for got, other in zip(whole, expected, strict=True):
        torch.testing.assert_close(got, other, rtol=0.02, atol=0.02 if dtype is torch.bfloat16 else 1e-4)
        assert type(got) is torch.Tensor
    for rows in (1, 2, 3, 5, 8, 33):
        for got, other in zip(steady(x[:rows]), whole, strict=True):
            assert torch.equal(got, other[:rows]), rows


class Gate(nn.Module):
    """A gate for each of a few heads, fewer than a vector has numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid()


def test_a_gate_of_few_numbers_is_the_same_beside_any_rows() -> None:
    steady = Gate()
    steady_weights(steady)
    x = 3 * torch.randn(70, 5, generator=torch.Generator().manual_seed(1))
    whole = steady(x)
    torch.testing.assert_close(whole, x.sigmoid())
    for row in range(70):
        assert torch.equal(steady(x[row : row + 1])[0], whole[row]), row


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_experts_of_a_model_that_nobody_else_uses_are_there_once(name: str) -> None:
    def made() -> PreTrainedModel:
        wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
        return tiny(name, torch.bfloat16, **wide) if name == "mixtral" else tiny_other(name, torch.bfloat16)

    tokens, owned = some_tokens(40), made()
    tree = some_tree(tokens[-1], 30)
    expected = verified(TorchEngine(made()), request(tokens), tree)
    engine = TorchEngine(owned, owns_model=True)
    assert isinstance(engine, ModelEngine)
    assert torch.equal(verified(engine, request(tokens), tree), expected)
    assert not sum(weight.numel() for weight in owned.parameters() if weight.ndim == 3)
    experts = [weight for weight in engine._model.parameters() if isinstance(weight, SteadyWeight) and weight.ndim == 3]
    assert len(experts) == 4
    assert all(weight.untyped_storage().nbytes() == 2 for weight in experts)
    with pytest.raises(ModelError, match="released"):
        experts[0].sum()


# -- the proof -------------------------------------------------------------------------------------------------------


# seeds whose engine was refused, on one CPU, if its routers were to choose anew; of Ernie's none is known
FLIPPED = {"ernie4_5_moe": [0], "gpt_oss": [1], "mixtral": [9, 34], "phimoe": [15, 37], "qwen2_moe": [1, 7]}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("more", by_night([range(0), range(8)], but=[range(0)]), ids=["flipped", "more"])
def test_a_router_that_rounding_flips_is_no_difference(name: str, more: range) -> None:
    for seed in more or FLIPPED[name]:
        options: dict[str, Any] = {"seed": seed, "dtype": torch.bfloat16}
        wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
        model = tiny(name, **options, **wide) if name == "mixtral" else tiny_other(name, **options)
        assert TorchEngine(model).attention == "tree", seed


@pytest.mark.parametrize("name", ["gemma3", "llama", "mixtral"])
def test_products_that_are_off_by_a_few_per_cent_are_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: own(self, x) * 1.04)
    # the one call that has a whole forward knows no modules: odd sizes leave it to them
    model = tiny(name, torch.bfloat16, hidden_size=64, intermediate_size=96 if name == "mixtral" else 90)
    with pytest.raises(ModelError, match="does not give the same logits"):
        TorchEngine(model, "tree")


@pytest.mark.parametrize("change", [{"scale": 0.9}, {"window": 4}, {"chunk": 4}, {"softcap": 1.0}])
def test_attention_that_is_another_is_found_out(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = ForwardKV.attend

    def attend(self: ForwardKV, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> Any:
        other = {"scale": 0.9 * rule.scale} if "scale" in change else change
        return own(self, query, key, value, dataclasses.replace(rule, **other))

    monkeypatch.setattr(ForwardKV, "attend", attend)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match="does not give the same logits"):
            TorchEngine(tiny("phi3", dtype), "tree")


# -- what is said ----------------------------------------------------------------------------------------------------


def test_a_model_that_attends_by_itself_is_named() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    with torch.random.fork_rng(devices=[]):
        model = randomised(DogeForCausalLM(DogeConfig(vocab_size=120, **sizes)))
    said = "^DogeForCausalLM attends by itself here, and its text is plain's up to ties: .* makes a mask of its own$"
    with pytest.warns(UserWarning, match=said) as warned:
        engine = TorchEngine(model)
    assert (engine.attention, engine.caveat) == ("sdpa", str(warned[0].message))
    assert len(warned) == 1
    TorchEngine(model, "sdpa")  # who asks for it is told nothing
    with pytest.raises(ModelError, match="makes a mask of its own: use attention='sdpa'"):
        TorchEngine(model, "tree")


class Linear8bitLt(nn.Linear):
    """Stands for a linear layer of another library."""

    table: torch.Tensor
    scale: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.table.to(x.dtype) * self.scale)


def in_8_bits(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        own = layer.mlp.down_proj
        other = Linear8bitLt(own.in_features, own.out_features, bias=False, device="meta")
        del other.weight
        other.scale = float(own.weight.detach().abs().max()) / 127
        other.register_buffer("table", (own.weight.detach() / other.scale).round().to(torch.int8))
        layer.mlp.down_proj = other
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_linear_layers_of_another_library_are_named(name: str) -> None:
    model = in_8_bits(tiny(name))
    with pytest.warns(UserWarning, match=r"linear layers of another kind here \(Linear8bitLt\).*plain's up to ties"):
        engine = TorchEngine(model)
    assert engine.execution == "tree attention, Linear8bitLt"
    assert "Linear8bitLt" in engine.signature


class Int8Tensor(torch.Tensor):
    """Stands for a weight of torchao's."""


class Linear4bit(nn.Linear):
    """Stands for a layer of bitsandbytes' that readies its weight when that is first used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        if not hasattr(weight, "ready"):
            weight.ready = True
            weight.data = weight.data.clone()
        return super().forward(x)


def test_weights_and_layers_of_known_libraries_are_named_for_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int8Tensor, "__module__", "torchao.quantization")
    monkeypatch.setattr(Linear8bitLt, "__module__", "bitsandbytes.nn.modules")
    monkeypatch.setattr(Linear4bit, "__module__", "bitsandbytes.nn.modules")
    model = in_8_bits(tiny("llama"))
    for layer in model.model.layers:
        own = layer.mlp.up_proj
        own._parameters["weight"] = own.weight.detach().as_subclass(Int8Tensor)
    with pytest.warns(UserWarning, match=r"another kind here \(bitsandbytes' Linear8bitLt, torchao's Int8Tensor\)"):
        TorchEngine(model)
    model = tiny("llama")
    layer = model.model.layers[0].mlp.down_proj
    layer.__class__ = Linear4bit
    layer._parameters["weight"] = layer.weight.detach().as_subclass(Int8Tensor)
    with pytest.raises(ModelError, match=r"down_proj is not as it was.*; bitsandbytes' Linear4bit may ready"):
        TorchEngine(model)
    with pytest.warns(UserWarning, match=r"another kind here \(bitsandbytes' Linear4bit\)"):  # it has run
        TorchEngine(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_linear_layers_in_a_type_that_is_not_packed_are_named(dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=r"of another kind here \(Linear\)"):
        TorchEngine(tiny("llama", dtype))


def test_a_model_whose_bits_depend_on_other_rows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ForwardKV.attend

    def attend(self: ForwardKV, *given: Any) -> torch.Tensor:
        return own(self, *given) * (1 + 1e-6 * len(self.segments[0].tree))

    monkeypatch.setattr(ForwardKV, "attend", attend)
    with pytest.warns(UserWarning, match="the bits of Qwen3ForCausalLM's logits depend here on the rows beside one"):
        engine = TorchEngine(tiny("qwen3"))
    assert "up to ties" in engine.caveat


def test_nothing_is_said_of_models_whose_text_is_plains() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not TorchEngine(tiny("llama")).caveat
