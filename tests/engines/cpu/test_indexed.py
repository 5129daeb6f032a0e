"""Attention over what an index chooses: each row's own path decides, whatever tree, batch or prompt it goes with."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from tests.conftest import all_pairs, by_night, decode, shown
from tests.drafters.test_eagle import some_head
from tests.drafters.test_medusa import random_heads
from tests.heads.block_heads import some_block
from tests.heads.mtp_layers import save_with_layer
from tests.tiny_models import INDEXED, VOCAB, request, some_tokens, some_tree, tiny_other
from tokentree import LLM, SamplingParams
from tokentree.drafters.base import Drafter
from tokentree.drafters.block import Block
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.eagle import Eagle
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.drafters.lookup.suffix import Suffix
from tokentree.drafters.medusa import Medusa
from tokentree.drafters.merged import Merged
from tokentree.drafters.mtp import Mtp
from tokentree.engines.cpu.attention import ForwardKV
from tokentree.engines.cpu.choosing import ALL
from tokentree.engines.kv import KVLayout
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.segment import Segment
from tokentree.engines.support import cache_names
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError
from tokentree.heads.mtp_files import read_mtp
from tokentree.hf import generator
from tokentree.tree import TokenTree

BOTH = [torch.float32, torch.bfloat16]
KINDS = ["deepseek_v32", "glm_moe_dsa"]  # an index in each layer, one that the next layer shares
EACH = pytest.mark.parametrize("name", by_night(INDEXED, but=KINDS))
PAIRS = pytest.mark.parametrize(("name", "dtype"), all_pairs(KINDS, BOTH), ids=shown)
PROMPTS = [some_tokens(9, seed=1), some_tokens(25, seed=2), some_tokens(3, seed=3)]


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_other(name, dtype)


@functools.cache
def engine_of(name: str, dtype: torch.dtype = torch.float32) -> KVEngine:
    return TorchEngine(model_of(name, dtype))  # a warning would be an error


# -- what is chosen --------------------------------------------------------------------------------------------------


def chosen(prefix: int, tree: TokenTree, most: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What is chosen for the nodes of a tree, and the scores on the path of each by the formula."""
    heads, width, rows = 29, 12, prefix + len(tree)  # more than go into two tiles
    source = torch.Generator().manual_seed(seed)
    queries, keys, weights = (
        torch.randn(rows, *sizes, generator=source) for sizes in ((heads, width), (width,), (heads,))
    )
    kv = KVLayout(((1, width, 0),), torch.float32, torch.device("cpu"), blocked=True).make(rows)
    if prefix:
        read = Segment(kv, TokenTree.chain(1, [1] * (prefix - 1)), 0, 0)
        ForwardKV([read], False).choose(queries[:prefix], keys[:prefix], weights[:prefix], most)
        kv.commit(range(prefix))
    made = ForwardKV([Segment(kv, tree, 0, 0)], False).choose(queries[prefix:], keys[prefix:], weights[prefix:], most)
    scores = list[torch.Tensor]()
    for node in range(len(tree)):
        own = keys[[*range(prefix), *(prefix + step for step in tree.path(node))]]
        products = (queries[prefix + node].double() @ own.double().T).relu()
        scores.append(weights[prefix + node].double() @ products)
    return made, scores


@pytest.mark.parametrize("prefix", [0, 3, 20, 64, 700])
def test_the_highest_scores_on_a_row_s_own_path_are_chosen(prefix: int) -> None:
    most, tree = 8, some_tree(5, 40, seed=prefix)
    made, scores = chosen(prefix, tree, most)
    assert made.dtype is torch.int32
    for row, own in zip(made, scores, strict=True):
        if len(own) <= most:
            assert row[0] == ALL
        else:
            assert row.tolist() == sorted(own.topk(most).indices.tolist())


def test_rows_of_a_short_text_see_all() -> None:
    tree = some_tree(5, 12, depth=3)
    assert chosen(5, tree, 9)[0].tolist() == [[ALL]] * 12
    assert chosen(6, tree, 9)[0].shape == (12, 9)  # the deepest rows have ten positions


def test_storage_of_other_sizes_is_refused() -> None:
    kv = KVLayout(((1, 12, 0),), torch.float32, torch.device("cpu"), blocked=True).make(8)
    forward = ForwardKV([Segment(kv, TokenTree.root(1), 0, 0)], False)
    with pytest.raises(ModelError, match="is stored"):
        forward.choose(torch.zeros(1, 2, 16), torch.zeros(1, 16), torch.zeros(1, 2), 4)


class Other(torch.nn.Module):
    """An indexer that is unknown here."""

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = self.own(*args, **kwargs)
        return made.flip(-1)


def test_positions_that_no_known_index_has_chosen_are_refused() -> None:
    model: Any = tiny_other("deepseek_v32")
    for layer in model.model.layers:
        layer.self_attn.indexer = Other(layer.self_attn.indexer)
    with pytest.raises(ModelError, match="DeepseekV32Attention gives its attention indices, which is unknown here"):
        TorchEngine(model)


# -- a tree says what its paths say ----------------------------------------------------------------------------------


@PAIRS
def test_a_path_is_kept_and_the_rest_of_a_tree_leaves_no_trace(name: str, dtype: torch.dtype) -> None:
    engine, tokens = engine_of(name, dtype), some_tokens(30)
    seq, text = request(tokens), list(tokens)
    engine.prefill(seq)
    for turn in range(6):
        tree = some_tree(text[-1], 20, seed=turn)
        path = tree.path(int(tree.leaves[turn % len(tree.leaves)]))[: 1 + turn]
        got = engine.verify([seq], [tree]).rows(0, path)
        fresh = request(text)
        engine.prefill(fresh)
        assert torch.equal(got, engine.verify([fresh], [tree.take(np.array(path))]).all_logits), turn
        engine.commit([seq], [path])
        engine.release([fresh])
        text += [*tree.tokens[path[1:]].tolist(), 3 + turn]
        seq.tokens[:] = text
    engine.release([seq])


@PAIRS
def test_a_prompt_may_be_cut_anywhere(name: str, dtype: torch.dtype) -> None:
    engine, tokens = engine_of(name, dtype), some_tokens(50)
    tree, whole = some_tree(tokens[-1], 9), request(tokens)
    engine.prefill(whole)
    expected = engine.verify([whole], [tree]).all_logits
    for sizes in ([1, 48], [1] * 49, [2, 1, 3, 31, 12]):
        seq = request(tokens)
        engine.begin(seq)
        for size in sizes:
            engine.verify([], [], reading=[(seq, size)])
        assert torch.equal(engine.verify([seq], [tree]).all_logits, expected), sizes
        engine.release([seq])
    engine.release([whole])


@PAIRS
def test_a_beginning_that_is_reused_has_the_keys_of_its_index(name: str, dtype: torch.dtype) -> None:
    engine, text = TorchEngine(model_of(name, dtype), prefix_bytes=1 << 22), some_tokens(120)
    for tokens, most in (
        (text[:60], 0), (text[:90], 59), ([*text[:45], *some_tokens(9, seed=4)], 45), (text, 89), (text[:70], 69),
    ):  # fmt: skip
        seq, fresh, tree = request(tokens), request(tokens), some_tree(tokens[-1], 17)
        assert engine.prefill(seq) == most
        got = engine.verify([seq], [tree]).all_logits
        alone = engine_of(name, dtype)
        alone.prefill(fresh)
        assert torch.equal(got, alone.verify([fresh], [tree]).all_logits)
        alone.release([fresh])
        engine.release([seq])
        engine._prefixes.check()


@pytest.mark.parametrize("name", KINDS)
def test_keys_of_an_index_count_as_memory(name: str) -> None:
    layout = engine_of(name)._storages.layout
    own = [shape for shape in layout.shapes if not shape[2]]
    assert own == [(1, 16, 0)] * (2 if name == "deepseek_v32" else 1)
    assert layout.make(64).nbytes == 64 * layout.row_nbytes


# -- texts -----------------------------------------------------------------------------------------------------------


def generated(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """What transformers writes, greedily."""
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, **options)
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


@EACH
def test_texts_are_those_of_transformers_and_of_plain_decoding(name: str) -> None:
    model, params = model_of(name), SamplingParams(max_tokens=36, ignore_eos=True)
    llm = LLM(model, shape="3x2x1")
    drafted, plain = ([result.token_ids for result in one.generate(PROMPTS, params)] for one in (llm, llm.plain()))
    assert drafted == plain == [generated(model, prompt, 36) for prompt in PROMPTS]
    assert generated(model, PROMPTS[0], 36, custom_generate=generator(shape="2x2")) == plain[0]
    seen = tiny_other(name, index_topk=300)  # all
    assert generated(seen, PROMPTS[1], 36) != plain[1]


@torch.inference_mode()
def one_after_another(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers writes, greedily, where it has read the prompt too token by token."""
    kept, ids = dict.fromkeys(cache_names(model), DynamicCache(config=model.config)), list(prompt)
    for place in range(len(prompt) + count - 1):
        logits = model(input_ids=torch.tensor([ids[place : place + 1]]), **kept).logits[0, -1]
        if place >= len(prompt) - 1:
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@EACH
def test_equal_scores_are_chosen_among_as_where_transformers_reads_token_by_token(name: str) -> None:
    """Two heads often give 0, where no product is positive. A prompt that transformers reads at once is another matter:
    there what it chooses among equal scores depends on how long the prompt is."""
    model, params = tiny_other(name, index_n_heads=2), SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [some_tokens(20, seed=seed) for seed in range(4)]
    got = [result.token_ids for result in LLM(model, shape="2x2x1").generate(prompts, params)]
    assert got == [one_after_another(model, prompt, 40) for prompt in prompts]
    if name in KINDS:
        assert got != [generated(model, prompt, 40) for prompt in prompts]


@PAIRS
def test_seeds_batches_and_streams(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    llm = LLM(model, shape="3x2x1")
    plain = llm.plain()
    params = SamplingParams(max_tokens=12, temperature=0.9, seed=5, n=2, ignore_eos=True)
    together = [result.token_ids for result in llm.generate(PROMPTS, params)]
    assert together == [result.token_ids for result in plain.generate(PROMPTS, params)]
    assert together == [result.token_ids for prompt in PROMPTS for result in llm.generate([prompt], params)]
    one = SamplingParams(max_tokens=12, ignore_eos=True)
    stream = llm.stream(PROMPTS[0], one)
    list(stream)
    assert stream.result.token_ids == plain.generate([PROMPTS[0]], one)[0].token_ids


@pytest.mark.parametrize("name", by_night(KINDS, but=KINDS[:1]))
def test_beams(name: str) -> None:
    model, prompt = model_of(name), PROMPTS[0]
    own = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, num_beams=3, num_return_sequences=3,
        eos_token_id=None,
    )  # fmt: skip
    params = SamplingParams(max_tokens=12, num_beams=3, num_return_sequences=3, ignore_eos=True)
    found = LLM(model).generate([prompt], params)
    assert [result.token_ids for result in found] == own[:, len(prompt) :].tolist()


DRAFTERS = ["ngram", "suffix", "recycling", "draft_model", "medusa", "eagle", "mtp", "block", "merged"]
DRAFTED = [(kind, KINDS[place % 2], BOTH[place // 2 % 2]) for place, kind in enumerate(DRAFTERS)]


def drafter_of(kind: str, engine: KVEngine, name: str, folder: Any) -> Drafter:
    made: dict[str, Any] = {
        "ngram": NGram, "suffix": Suffix, "recycling": lambda: Recycling(VOCAB),
        "draft_model": lambda: DraftModel(TorchEngine(tiny_other(name, engine.dtype, seed=3)), VOCAB),
        "medusa": lambda: Medusa(random_heads(engine.capture().hidden_size), engine),
        "eagle": lambda: Eagle(some_head(3, None, 64), engine),
        "block": lambda: Block(some_block(hidden_size=64, intermediate_size=96), engine),
        "mtp": lambda: Mtp(read_mtp(save_with_layer(folder, name, engine.dtype).folder, engine.dtype), engine),
    }  # fmt: skip
    if kind == "merged":
        draft = DraftModel(TorchEngine(tiny_other(name, engine.dtype)), VOCAB)  # it knows what comes
        return Merged([draft, Suffix(), Recycling(VOCAB), NGram()])
    drafter: Drafter = made[kind]()
    return drafter


@pytest.mark.parametrize(("kind", "name", "dtype"), by_night(DRAFTED, but=DRAFTED[::2]), ids=shown)
def test_whatever_drafts_a_text_is_plain_s(kind: str, name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    engine = TorchEngine(model_of(name, dtype))
    drafter = drafter_of(kind, engine, name, tmp_path)
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        plain = decode(engine, [request(prompt, max_tokens=14, **options) for prompt in PROMPTS])
        seqs = [request(prompt, max_tokens=14, **options) for prompt in PROMPTS]
        for seq, text in zip(seqs, plain, strict=True):
            seq.references = [[*seq.tokens, *text]]
        assert decode(engine, seqs, drafter, "3x2x1") == plain
        assert sum(seq.metrics.drafted_tokens for seq in seqs) > 0
    if kind in ("ngram", "merged"):
        assert max(step[1] for seq in seqs for step in seq.metrics.steps) > 2
