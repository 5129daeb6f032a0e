"""The torch engine: what it says of a tree is what plain decoding would say of each of its paths."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.activations import GELUTanh, SiLUActivation

from tests.conftest import all_pairs, by_night, each_two, shown
from tests.tiny_models import FAMILIES, VOCAB, full_logits, randomised, request, some_tokens, some_tree, tiny
from tokentree.engines import kv_engine
from tokentree.engines.cpu.prepare import SteadyActivation
from tokentree.engines.drafting import Rewinds
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.prefix import LEAST
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError
from tokentree.kernels.tile import BLOCK
from tokentree.sequence import Sequence as Request
from tokentree.tree import TokenTree

BOTH = [(family, attention) for attention in ("tree", "sdpa") for family in FAMILIES]
PREFIXES = [0, 1, 5, 30, 32, 62, 70, 130]  # before and behind a window of 7, and around multiples of BLOCK
WIDER = {"hidden_size": 64, "intermediate_size": 96}
WIDE = {
    "gpt2": {"n_embd": 64},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "falcon": {"hidden_size": 64, "ffn_hidden_size": 96},
    "falcon_old": {"hidden_size": 64, "ffn_hidden_size": 96},
}
Numbers = torch.dtype | str  # a dtype, or a quantization
NUMBERS: list[Numbers] = [torch.float32, torch.bfloat16, "int8"]

every_engine = pytest.mark.parametrize(("family", "attention"), BOTH)


@functools.cache
def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """In bfloat16 with sizes that packed layers take."""
    return tiny(family, dtype, **(WIDE.get(family, WIDER) if dtype is torch.bfloat16 else {}))


@functools.cache
def engine_of(family: str, attention: str, numbers: Numbers = torch.float32) -> KVEngine:
    if isinstance(numbers, str):
        return TorchEngine(model_of(family, torch.bfloat16), attention, quantization=numbers)
    return TorchEngine(model_of(family, numbers), attention)


def verified(engine: KVEngine, seq: Request, tree: TokenTree) -> torch.Tensor:
    """[nodes, vocab] of one tree, verified by itself after what ``seq`` holds."""
    engine.prefill(seq)
    out = engine.verify([seq], [tree])
    return out.rows(0, range(len(tree)))


def decoded_alone(
    engine: KVEngine, prefix: Sequence[int], tree: TokenTree, leaves: int | None = None
) -> tuple[list[int], torch.Tensor]:
    """Nodes and their [nodes, vocab]: paths of ``tree`` (``leaves`` of them, or all) as plain decoding would meet
    them, one row at a time, each row committed."""
    rows: dict[int, torch.Tensor] = {}
    for leaf in tree.leaves[:: -(-len(tree.leaves) // leaves) if leaves else 1].tolist():
        seq = request([*prefix, int(tree.tokens[0])])
        engine.prefill(seq)
        for node in tree.path(leaf):
            row = engine.verify([seq], [TokenTree.root(int(tree.tokens[node]))]).logits(0, 0)
            engine.commit([seq], [[0]])
            rows.setdefault(node, row)
        engine.release([seq])
    nodes = sorted(rows)
    return nodes, torch.stack([rows[node] for node in nodes])


def assert_bits_of_paths(engine: KVEngine) -> None:
    """The nodes of a tree have the bits of decoding their paths alone: whatever its size, in two calls, beside another
    text, and beside a prompt that is read."""
    assert (engine.attention, engine.caveat) == ("tree", "")
    tokens = some_tokens(41)
    tree = some_tree(tokens[-1], 33, seed=1)
    nodes, alone = decoded_alone(engine, tokens[:-1], tree, leaves=3)
    seq = request(tokens)
    engine.prefill(seq)
    for size in (1, 2, 3, 5, 8, 17, 33):
        known = [node for node in nodes if node < size]
        got = engine.verify([seq], [tree.take(np.arange(size))]).rows(0, known)
        assert torch.equal(got, alone[: len(known)]), f"{size} nodes"
    for first in (1, 7, 20):
        engine.verify([seq], [tree.take(np.arange(first))])
        late = [node for node in nodes if node >= first]
        got = engine.verify([seq], [tree], [first]).rows(0, late)
        assert torch.equal(got, alone[len(nodes) - len(late) :]), f"node {first} and on by themselves"
    trees, seqs = [tree, some_tree(tokens[9], 5)], [seq, request(tokens[:10])]
    engine.prefill(seqs[1])
    assert torch.equal(engine.verify(seqs, trees).rows(0, nodes), alone), "beside another text"
    reading = request(some_tokens(30, seed=2))
    engine.begin(reading)
    assert torch.equal(engine.verify([seq], [tree], reading=[(reading, 29)]).rows(0, nodes), alone), "beside a prompt"
    engine.release([*seqs, reading])


def of_transformers(model: PreTrainedModel, prefix: Sequence[int], tree: TokenTree) -> torch.Tensor:
    """[nodes, vocab]: the last rows of the model's own forward over each path."""
    rows: dict[int, torch.Tensor] = {}
    for leaf in tree.leaves.tolist():
        path = tree.path(leaf)
        logits = full_logits(model, [*prefix, *tree.tokens[path].tolist()])
        rows |= dict(zip(path, logits[len(prefix) :], strict=True))
    return torch.stack([rows[node] for node in range(len(tree))])


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    error, spread = float((got - expected).abs().max()), float(expected.std())
    assert error <= 1e-4 * spread, f"off by {error:.3g} where logits spread by {spread:.3g}"


def assert_same(got: torch.Tensor, expected: torch.Tensor, family: str, attention: str) -> None:
    """The same bits with tree attention, nearly the same where the model attends by itself."""
    if attention == "tree":
        assert torch.equal(got, expected), f"off by {float((got - expected).abs().max()):.3g}"
    else:
        assert_near(got, expected)


# -- a tree says what its paths say ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_these_models_depend_on_far_tokens_and_on_positions(family: str) -> None:
    """Otherwise the tests below would say little."""
    model, tokens = model_of(family), some_tokens(24)
    near = full_logits(model, tokens)[-1]
    far = full_logits(model, [*tokens[:14], (tokens[14] + 1 - 3) % (VOCAB - 3) + 3, *tokens[15:]])[-1]
    moved = full_logits(model, tokens[1:12] + tokens[:1] + tokens[12:])[-1]
    full = model.config.get_text_config()
    window = getattr(full, "sliding_window", None)
    if not window or "full_attention" in (getattr(full, "layer_types", None) or ()):
        assert float((near - far).abs().max()) > 1e-2
        assert float((near - moved).abs().max()) > 1e-2


@pytest.mark.parametrize(("engine", "prefix"), all_pairs(BOTH, PREFIXES, by_day=3), ids=shown)
def test_a_tree_has_the_logits_that_transformers_gives_each_path(engine: tuple[str, str], prefix: int) -> None:
    family, attention = engine
    tokens = some_tokens(prefix + 1, seed=prefix)
    tree = some_tree(tokens[-1], 14, seed=prefix)
    seq = request(tokens)
    got = verified(engine_of(family, attention), seq, tree)
    engine_of(family, attention).release([seq])
    assert_near(got, of_transformers(model_of(family), tokens[:-1], tree))


@pytest.mark.parametrize(("family", "prefix"), all_pairs(FAMILIES, [5, 62, 130]))
def test_a_tree_has_the_logits_of_decoding_each_path_alone_where_the_model_attends_by_itself(
    family: str, prefix: int
) -> None:
    engine, tokens = engine_of(family, "sdpa"), some_tokens(prefix + 1)
    tree = some_tree(tokens[-1], 14, seed=1)
    got = verified(engine, request(tokens), tree)
    nodes, alone = decoded_alone(engine, tokens[:-1], tree)
    assert nodes == list(range(14))
    assert_near(got, alone)


TREES = each_two(FAMILIES, NUMBERS, [5, 62, 127])


@pytest.mark.parametrize(("family", "numbers", "prefix"), by_night(TREES, but=[*TREES[::4], *TREES[1::4]]), ids=shown)
def test_a_node_has_the_bits_of_decoding_its_path_alone_in_a_tree_of_any_size(
    family: str, numbers: Numbers, prefix: int
) -> None:
    engine, tokens = engine_of(family, "tree", numbers), some_tokens(prefix + 1)
    tree = some_tree(tokens[-1], 64, seed=prefix)
    nodes, alone = decoded_alone(engine, tokens[:-1], tree, leaves=7)
    seq = request(tokens)
    engine.prefill(seq)
    for size in (1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 32, 33, 63, 64):
        known = [node for node in nodes if node < size]
        got = engine.verify([seq], [tree.take(np.arange(size))]).rows(0, known)
        error = float((got - alone[: len(known)]).abs().max())
        assert torch.equal(got, alone[: len(known)]), f"{size} nodes, off by {error:.3g}"


@pytest.mark.parametrize(("family", "numbers"), all_pairs(FAMILIES, [*NUMBERS[1:], NUMBERS[0]]), ids=shown)
def test_a_chain_of_any_length_has_the_bits_of_decoding_alone(family: str, numbers: Numbers) -> None:
    engine, tokens = engine_of(family, "tree", numbers), some_tokens(50 + 18)
    chain = TokenTree.chain(tokens[50], tokens[51:])
    _, alone = decoded_alone(engine, tokens[:50], chain)
    seq = request(tokens[:51])
    engine.prefill(seq)
    for size in (1, 2, 3, 4, 5, 8, 13, 14, 15, 16, 18):
        got = engine.verify([seq], [chain.take(np.arange(size))]).all_logits
        assert torch.equal(got, alone[:size]), f"{size} nodes"


@pytest.mark.parametrize(("family", "numbers"), all_pairs(FAMILIES, [NUMBERS[2], *NUMBERS[:2]]), ids=shown)
def test_prefilled_rows_and_committed_rows_have_the_same_bits(family: str, numbers: Numbers) -> None:
    engine, tokens = engine_of(family, "tree", numbers), some_tokens(70)
    prefilled, decoded = request(tokens), request(tokens[:40])
    for seq in (prefilled, decoded):
        engine.prefill(seq)
    for token in tokens[39:-1]:
        engine.verify([decoded], [TokenTree.root(token)])
        engine.commit([decoded], [[0]])
    tree = some_tree(tokens[-1], 9)
    assert torch.equal(verified(engine, prefilled, tree), engine.verify([decoded], [tree]).all_logits)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_bits_do_not_depend_on_how_rows_are_shared_out_among_threads(
    family: str, threads: Callable[[int], None]
) -> None:
    """Rows so wide that torch splits them, at places that are no multiple of a vector."""
    width: dict[str, Any] = {"n_inner": 2080} if family == "gpt2" else {"intermediate_size": 2080}
    engine, tokens = TorchEngine(tiny(family, **width), "tree"), some_tokens(20)
    tree = some_tree(tokens[-1], 33)
    for count in (3, 1, 2):
        threads(count)
        nodes, alone = decoded_alone(engine, tokens[:-1], tree, leaves=2)
        seq = request(tokens)
        engine.prefill(seq)
        for size in (2, 9, 16, 17, 33):
            known = [node for node in nodes if node < size]
            got = engine.verify([seq], [tree.take(np.arange(size))]).rows(0, known)
            assert torch.equal(got, alone[: len(known)]), f"{count} threads, {size} nodes"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [SiLUActivation, GELUTanh])
def test_a_steady_activation_gives_a_row_the_same_bits_beside_any_rows_and_is_the_activation(
    kind: type[nn.Module], dtype: torch.dtype, count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    own = kind()
    steady = SteadyActivation(own)
    generator = torch.Generator().manual_seed(0)
    for width in (1, 12, 32, 96, 100, 128, 160, 2112):
        x = (3 * torch.randn(40, width, generator=generator)).to(dtype)
        alone = torch.cat([steady(row[None]) for row in x])
        assert all(torch.equal(steady(x[:rows]), alone[:rows]) for rows in range(1, 41, 3)), width
        wide = torch.cat([x, x], 1)[:, :width]  # as a model passes it that computes two halves in one product
        assert torch.equal(steady(wide), alone)
        torch.testing.assert_close(alone, own(x))


# -- several sequences, several calls --------------------------------------------------------------------------------


@every_engine
def test_a_ragged_batch_gives_each_sequence_what_it_gets_alone(family: str, attention: str) -> None:
    kinds: list[Numbers] = [torch.float32]
    if attention == "tree":
        kinds += [torch.bfloat16, "int8"]
    for numbers in kinds:
        engine = engine_of(family, attention, numbers)
        seqs = [request(some_tokens(length, seed=length)) for length in (66, 1, 12)]
        trees = [some_tree(seq.tokens[-1], nodes, seed=nodes) for seq, nodes in zip(seqs, (7, 13, 1), strict=True)]
        alone = [verified(engine, seq, tree) for seq, tree in zip(seqs, trees, strict=True)]
        out = engine.verify(seqs, trees)
        assert out.all_logits.shape == (21, VOCAB)
        for i, expected in enumerate(alone):
            assert_same(out.rows(i, range(len(trees[i]))), expected, family, attention)
        engine.release(seqs)


@every_engine
def test_a_tree_grown_over_several_calls_equals_one_call(family: str, attention: str) -> None:
    engine = engine_of(family, attention)
    seqs = [request(some_tokens(length, seed=length)) for length in (60, 9)]
    trees = [some_tree(seq.tokens[-1], 15, seed=i) for i, seq in enumerate(seqs)]
    whole = [verified(engine, seq, tree) for seq, tree in zip(seqs, trees, strict=True)]
    ends = [[0, 1, 2, 7, 12, 15], [0, 4, 4, 5, 15, 15]]  # nodes known after each call; some calls add none to one tree
    for call in range(1, 6):
        grown = [tree.take(np.arange(end[call])) for tree, end in zip(trees, ends, strict=True)]
        out = engine.verify(seqs, grown, [end[call - 1] for end in ends])
        for i, end in enumerate(ends):
            if end[call - 1] < end[call]:
                nodes = range(end[call - 1], end[call])
                assert_same(out.rows(i, nodes), whole[i][end[call - 1] : end[call]], family, attention)
    with pytest.raises(IndexError, match="earlier forward"):
        out.logits(0, 3)


@every_engine
def test_after_commits_a_sequence_is_like_one_prefilled_with_the_same_tokens(family: str, attention: str) -> None:
    engine, tokens = engine_of(family, attention), some_tokens(55)
    seq = request(tokens)
    engine.prefill(seq)
    assert engine.committed(seq) == 54
    moved = 0
    for step, nodes in enumerate((12, 1, 20, 9, 16)):  # crosses position 64
        tree = some_tree(tokens[-1], nodes, seed=step)
        engine.verify([seq], [tree])
        deepest = int(np.flatnonzero(tree.depths == tree.depths.max())[-1])
        path = tree.path(deepest) if step != 3 else [0]
        moved += path != list(range(len(path)))
        engine.commit([seq], [path])
        tokens += [*tree.tokens[path[1:]].tolist(), some_tokens(1, seed=100 + step)[0]]  # the last one: a bonus token
        assert engine.committed(seq) == len(tokens) - 1
    assert moved == 3
    assert len(tokens) > 70
    tree = some_tree(tokens[-1], 14, seed=9)
    fresh = verified(engine, request(tokens), tree)
    assert_same(engine.verify([seq], [tree]).all_logits, fresh, family, attention)


@every_engine
def test_commits_of_a_batch_keep_the_sequences_apart(family: str, attention: str) -> None:
    engine = engine_of(family, attention)
    seqs = [request(some_tokens(length, seed=length)) for length in (20, 4)]
    texts = [list(seq.tokens) for seq in seqs]
    for seq in seqs:
        engine.prefill(seq)
    for step in range(2):
        trees = [some_tree(text[-1], 10, seed=10 * step + i) for i, text in enumerate(texts)]
        engine.verify(seqs, trees)
        paths = [tree.path(len(tree) - 1 - step) for tree in trees]
        engine.commit(seqs, paths)
        for text, tree, path in zip(texts, trees, paths, strict=True):
            text += [*tree.tokens[path[1:]].tolist(), 7]
    trees = [some_tree(text[-1], 5, seed=3) for text in texts]
    out = engine.verify(seqs, trees)
    for i, (text, tree) in enumerate(zip(texts, trees, strict=True)):
        assert_same(out.rows(i, range(5)), verified(engine, request(text), tree), family, attention)


@every_engine
def test_a_verify_without_commit_leaves_no_trace(family: str, attention: str) -> None:
    engine, tokens = engine_of(family, attention), some_tokens(63)
    seq = request(tokens)
    tree = some_tree(tokens[-1], 8, seed=1)
    first = verified(engine, seq, tree)
    engine.verify([seq], [some_tree(tokens[-1], 40, seed=2)])
    assert engine.committed(seq) == 62
    assert torch.equal(engine.verify([seq], [tree]).all_logits, first)


@every_engine
def test_prefill_in_chunks_equals_prefill_at_once(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, whole = engine_of(family, attention), kv_engine.PREFILL_ROWS
    for count, chunks in ((80, (7, 64)), (12, (1,))):
        tokens, said = some_tokens(count), list[torch.Tensor]()
        tree = some_tree(tokens[-1], 6)
        for rows in (whole, *chunks):
            monkeypatch.setattr(kv_engine, "PREFILL_ROWS", rows)
            said.append(verified(engine, request(tokens), tree))
        for logits in said[1:]:
            assert_same(logits, said[0], family, attention)


def test_prefill_goes_on_where_it_stopped() -> None:
    engine, tokens = engine_of("llama", "tree"), some_tokens(30)
    seq = request(tokens[:12])
    engine.prefill(seq)
    seq.tokens += tokens[12:]
    engine.prefill(seq)
    assert engine.committed(seq) == 29
    tree = some_tree(tokens[-1], 6)
    assert torch.equal(engine.verify([seq], [tree]).all_logits, verified(engine, request(tokens), tree))


@every_engine
def test_kv_grows_past_its_first_reservation_without_a_change(family: str, attention: str) -> None:
    engine, tokens = engine_of(family, attention), some_tokens(4)
    small, large = request(tokens, max_tokens=1), request(tokens, max_tokens=250)
    for seq in (small, large):
        engine.prefill(seq)
    capacity = engine._kv[small.id][1].layer(0)[1].shape[1]
    tree = some_tree(tokens[-1], 30)
    text = [*tokens]
    for step in range(4):
        chain = TokenTree.chain(text[-1], some_tokens(45, seed=step))
        outs = [engine.verify([seq], [chain]).all_logits for seq in (small, large)]
        assert_same(outs[0], outs[1], family, attention)
        for seq in (small, large):
            engine.commit([seq], [list(range(46))])
        text += [*chain.tokens[1:].tolist(), 9]
    grown = engine._kv[small.id][1].layer(0)[1].shape[1]
    assert grown > capacity
    assert grown % BLOCK == 0
    tree = some_tree(text[-1], 30)
    assert_same(engine.verify([small], [tree]).all_logits, engine.verify([large], [tree]).all_logits, family, attention)


@pytest.mark.parametrize("attention", ["tree", "sdpa"])
def test_kv_grows_between_the_calls_that_grow_a_tree(attention: str) -> None:
    engine, tokens = engine_of("llama", attention), some_tokens(3)
    tree = some_tree(tokens[-1], 200, depth=20)
    whole = verified(engine, request(tokens, max_tokens=250), tree)
    seq = request(tokens, max_tokens=1)
    engine.prefill(seq)
    parts, known = [], 0
    for end in (40, 100, 101, 200):
        parts.append(engine.verify([seq], [tree.take(np.arange(end))], [known]).all_logits)
        known = end
    assert_same(torch.cat(parts), whole, "llama", attention)


def test_a_limit_on_tokens_beyond_the_context_reserves_no_memory_for_them() -> None:
    engine, seq = engine_of("llama", "tree"), request(some_tokens(3), max_tokens=10**12)
    engine.prefill(seq)
    assert engine._kv[seq.id][1].layer(0)[1].shape[1] <= engine.context + 64  # of room for trees


def test_release_forgets_a_sequence_and_only_that() -> None:
    engine = TorchEngine(model_of("llama"), "tree")
    gone, kept = request(some_tokens(9)), request(some_tokens(9, seed=1))
    for seq in (gone, kept):
        engine.prefill(seq)
    engine.release([gone])
    assert list(engine._kv) == [kept.id]
    assert engine.committed(gone) == 0
    assert engine.committed(kept) == 8


# -- the model that was given ----------------------------------------------------------------------------------------


@every_engine
def test_the_model_that_was_given_stays_as_it_was(family: str, attention: str) -> None:
    model, tokens = tiny(family), some_tokens(20)
    for module in model.modules():
        for name in ("p", "dropout"):  # with these, a model in training mode is refused
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.train()
    config, bits = copy.deepcopy(model.config), {k: v.clone() for k, v in model.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    own_attention, attributes = model.config._attn_implementation, set(vars(model))
    model.eval()
    before = full_logits(model, tokens)
    model.train()

    engine = TorchEngine(model, attention)
    verified(engine, request(tokens), some_tree(tokens[-1], 5))

    assert model.config._attn_implementation == own_attention
    assert model.config.to_dict() == config.to_dict()
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    assert set(vars(model)) == attributes
    assert model.state_dict().keys() == bits.keys()
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    model.eval()
    assert torch.equal(full_logits(model, tokens), before)


def test_an_engine_that_owns_its_model_lets_go_of_the_linear_weights_and_says_the_same() -> None:
    tokens = some_tokens(20)
    tree = some_tree(tokens[-1], 5)
    expected = verified(engine_of("llama", "tree"), request(tokens), tree)
    owned, tied = tiny("llama"), tiny("llama", tie_word_embeddings=True)
    assert torch.equal(verified(TorchEngine(owned, "tree", owns_model=True), request(tokens), tree), expected)
    linear = [module for module in owned.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 2 * 7 + 1
    assert all(module.weight.untyped_storage().nbytes() == 0 for module in linear)
    TorchEngine(tied, "tree", owns_model=True)
    assert tied.get_input_embeddings().weight.shape == (VOCAB, 48)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_an_embedding_that_is_the_output_layer_too_is_kept_once(quantization: str | None, family: str) -> None:
    tokens = some_tokens(20)
    tree = some_tree(tokens[-1], 9)
    texts = []
    for owned in (False, True):
        model = tiny(family, torch.bfloat16, tie_word_embeddings=True, vocab_size=128, **WIDER)
        engine = TorchEngine(model, "tree", owned, quantization)
        texts.append(verified(engine, request(tokens), tree))
        kept = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
        assert kept == (0 if owned and quantization is None else 128 * 64)
        assert engine._outer_layers()[0].num_embeddings == 128
    assert torch.equal(*texts)


def test_an_embedding_that_does_more_than_look_up_keeps_its_weight() -> None:
    tokens, options = some_tokens(20), {"vocab_size": 128, "tie_word_embeddings": True, **WIDER}
    tree = some_tree(tokens[-1], 9)
    shared, owned = (tiny("gemma2", torch.bfloat16, **options) for _ in range(2))
    expected = verified(TorchEngine(shared, "tree"), request(tokens), tree)
    assert torch.equal(verified(TorchEngine(owned, "tree", owns_model=True), request(tokens), tree), expected)
    assert owned.get_input_embeddings().weight.shape == (128, 64)


# -- refusals --------------------------------------------------------------------------------------------------------


def _small(config: Any, model: Any, **options: Any) -> PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16}
    with torch.random.fork_rng(devices=[]):
        made: PreTrainedModel = model(config(**{**sizes, **options})).eval()
    return made


def _kinds(*kinds: str) -> PreTrainedModel:
    """A model whose configuration says that its layers are of these kinds."""
    made = tiny("llama")
    made.config.layer_types = list(kinds)
    return made


def _blank(model: Any, whole: bool = False) -> Any:
    (model if whole else model.model.layers[1].mlp).to("meta")
    return model


HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _small(RwkvConfig, RwkvForCausalLM, num_hidden_layers=2), "RwkvForCausalLM divides its weights"),
        (
            lambda: _small(
                T5Config, T5ForConditionalGeneration, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                decoder_start_token_id=0,
            ),
            "T5ForConditionalGeneration is not a decoder-only language model",
        ),
        (lambda: _blank(tiny("llama"), whole=True), "has weights without values, on the device 'meta'"),
        (lambda: _blank(tiny("llama")), "has weights without values, on the device 'meta'"),
        (lambda: tiny("llama").base_model, "LlamaModel is not .* with an output layer"),
        (lambda: _kinds("indexed_attention"), "has layers of the kind indexed_attention without index_topk: no index"),
        (lambda: _kinds("linear_attention", "dense"), "has linear_attention: a state that can't be rolled back"),
        (
            lambda: _small(BertConfig, BertLMHeadModel, num_hidden_layers=1, num_attention_heads=2),
            "BertLMHeadModel is an encoder here, .*: load it with is_decoder=True",
        ),
    ],
    ids=["rwkv", "t5", "meta", "partly meta", "no_output_layer", "another kind", "state", "encoder"],
)  # fmt: skip
def test_a_model_that_no_tree_can_be_verified_with_is_refused_with_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        TorchEngine(make())
    assert "\n" not in str(error.value)


def test_an_encoder_that_is_made_a_decoder_is_decoded() -> None:
    model = _small(BertConfig, BertLMHeadModel, num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
    assert TorchEngine(model).attention == "tree"


class IgnoresMask(LlamaForCausalLM):
    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        return super().forward(input_ids, None, position_ids, past_key_values, **options)


class IgnoresPositions(LlamaForCausalLM):
    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        return super().forward(input_ids, attention_mask, None, past_key_values, **options)


@pytest.mark.parametrize(
    ("kind", "attention"), [(IgnoresMask, "sdpa"), (IgnoresPositions, "sdpa"), (IgnoresPositions, "tree")]
)
def test_the_engine_finds_out_by_itself_that_a_model_ignores_what_it_is_told(
    kind: type[LlamaForCausalLM], attention: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        model = randomised(kind(tiny("llama").config))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=f"{kind.__name__} does not give the same logits under a tree attention mask"):
        TorchEngine(model, attention)


def test_the_engine_finds_out_that_a_model_masks_by_the_order_of_rows() -> None:
    """GPT-Neo cuts its own mask to the last rows of the KV, which goes wrong in its one-row forwards only."""
    model = _small(
        GPTNeoConfig, GPTNeoForCausalLM, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(ModelError, match="GPTNeoForCausalLM does not give the same logits"):
        TorchEngine(randomised(model), "sdpa")


@pytest.mark.parametrize("attention", ["flash", "eager"])
def test_an_attention_that_is_not_there_is_refused(attention: str) -> None:
    with pytest.raises(ModelError, match=f"attention='{attention}' can't be used with .* use attention='sdpa'"):
        TorchEngine(model_of("llama"), attention)


def test_the_context_ends_where_longrope_would_turn_all_rows_of_a_forward_otherwise() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
    }  # fmt: skip
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    engine, tokens = TorchEngine(model), some_tokens(61)
    assert engine.context == 64
    tree = some_tree(tokens[-1], 8, depth=3)
    assert_near(verified(engine, request(tokens), tree), of_transformers(model, tokens[:-1], tree))


@pytest.mark.parametrize(("family", "attention"), [("llama", "tree"), ("gpt2", "tree"), ("gemma2", "sdpa")])
@pytest.mark.parametrize("rows", [0, 9, 31, 40, 90])
def test_a_text_that_is_rewound_goes_on_as_one_that_was_never_longer(family: str, attention: str, rows: int) -> None:
    engine = TorchEngine(model_of(family), attention, prefix_bytes=1 << 20)
    assert isinstance(engine, Rewinds)
    long, other = request(some_tokens(41)), request([*some_tokens(rows)[:40], *some_tokens(8, seed=3)])
    engine.prefill(long)
    engine.verify([long], [some_tree(long.tokens[-1], 5)])  # provisional rows go too
    engine.rewind(long, rows)
    assert engine.committed(long) == min(rows, 40)
    long.tokens = list(other.tokens)
    fresh = TorchEngine(model_of(family), attention)
    tree = some_tree(other.tokens[-1], 6)
    for one, seq in ((engine, long), (fresh, other)):
        one.prefill(seq)
    expected = fresh.verify([other], [tree]).all_logits
    off = 0.0 if attention == "tree" else 1e-4
    torch.testing.assert_close(engine.verify([long], [tree]).all_logits, expected, rtol=0.0, atol=off)
    engine.release([long])
    again = request(other.tokens)
    known = len(other.tokens) - 1
    assert engine.begin(again) == (known if known >= LEAST else 0)  # what is kept of it belongs to these tokens
    engine.prefill(again)
    torch.testing.assert_close(engine.verify([again], [tree]).all_logits, expected, rtol=0.0, atol=off)
