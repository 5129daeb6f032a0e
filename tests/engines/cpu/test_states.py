"""Recurrent states: whatever a tree tries and drops, a text goes on as if it had been decoded alone."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from tests.conftest import by_night, decode, shown
from tests.engines.test_engine import assert_bits_of_paths, of_transformers
from tests.hybrids import HYBRIDS, tiny_hybrid
from tests.tiny_models import VOCAB, request, some_tokens, some_tree, tiny
from tokentree import LLM, SamplingParams
from tokentree.acceptance import acceptance
from tokentree.decoder import Decoder
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.drafters.lookup.suffix import Suffix
from tokentree.drafters.merged import Merged
from tokentree.engines.base import EngineOptions
from tokentree.engines.cpu.packed_file import Place
from tokentree.engines.cpu.prepare import in_float32
from tokentree.engines.cpu.states.exchange import FUNCTIONS, METHODS
from tokentree.engines.cpu.steady import in_whole_vectors
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.plan import Traits, plan
from tokentree.engines.program import ProgramEngine
from tokentree.engines.segment import steps_of, windows_of
from tokentree.engines.self_check import compare, own_forward
from tokentree.engines.support import CLASSES, RECURRENCES
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError, OptionError
from tokentree.hf import generator
from tokentree.scheduler import Scheduler
from tokentree.shapes import shape
from tokentree.tree import TokenTree

BOTH = [torch.float32, torch.bfloat16]
# of each kind of state one, by itself or beside attention, experts and latents
KINDS = [
    "falcon_h1", "jamba", "kimi_linear", "lfm2", "minimax", "qwen3_5_text", "recurrent_gemma", "rwkv", "xlstm",
    "zamba2",
]  # fmt: skip
ONE_CALL = "lfm2 in one call"  # in bfloat16, where transformers' texts may be others
WITH_IT = ["falcon_h1", "jamba", "lfm2", "mamba", "qwen3_5_text", ONE_CALL]
SOME = pytest.mark.parametrize("name", by_night(WITH_IT, but=["jamba", "qwen3_5_text", ONE_CALL]))
EXACT = pytest.mark.parametrize("name", by_night(WITH_IT[:-1], but=["jamba", "qwen3_5_text"]))


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_hybrid("lfm2", torch.bfloat16) if name == ONE_CALL else tiny_hybrid(name, dtype)


@functools.cache
def engine_of(name: str, dtype: torch.dtype = torch.float32) -> KVEngine:
    engine = TorchEngine(model_of(name, dtype))  # a warning would be an error
    assert isinstance(engine, ProgramEngine) == (name == ONE_CALL or (name, dtype) == ("lfm2", torch.bfloat16))
    return engine


# -- a tree says what its paths say ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", by_night([1, 5, 62], but=[62]))
@pytest.mark.parametrize("name", by_night(HYBRIDS, but=KINDS[::2]))
def test_a_tree_has_the_logits_that_transformers_gives_each_path(name: str, prefix: int) -> None:
    engine, tokens = engine_of(name), some_tokens(prefix + 1, seed=prefix)
    tree, seq = some_tree(tokens[-1], 14, seed=prefix), request(tokens)
    engine.prefill(seq)
    got = engine.verify([seq], [tree]).all_logits
    expected = of_transformers(model_of(name), tokens[:-1], tree)
    assert float((got - expected).abs().max()) <= 1e-3 * float(expected.std())
    engine.release([seq])


@pytest.mark.parametrize(
    ("name", "dtype"), by_night(itertools.product(HYBRIDS, BOTH), but=[*zip(KINDS, itertools.cycle(BOTH))]), ids=shown
)
def test_a_node_has_the_bits_of_decoding_its_path_alone(name: str, dtype: torch.dtype) -> None:
    assert_bits_of_paths(engine_of(name, dtype))


@pytest.mark.parametrize("name", by_night([*HYBRIDS, ONE_CALL], but=[*KINDS, ONE_CALL]))
def test_a_path_is_kept_and_the_rest_of_a_tree_leaves_no_trace(name: str) -> None:
    engine, tokens = engine_of(name), some_tokens(30)
    seq, text = request(tokens), list(tokens)
    engine.prefill(seq)
    for turn in range(6):
        tree = some_tree(text[-1], 20, seed=turn)
        path = tree.path(int(tree.leaves[turn % len(tree.leaves)]))[: 1 + turn]
        got = engine.verify([seq], [tree]).rows(0, path)
        fresh = request(text)
        engine.prefill(fresh)
        alone = [engine.verify([fresh], [tree.take(np.array(path))]).rows(0, range(len(path)))]
        assert torch.equal(got, torch.cat(alone)), turn
        engine.commit([seq], [path])
        engine.release([fresh])
        text += [*tree.tokens[path[1:]].tolist(), 3 + turn]
        seq.tokens[:] = text
        assert engine.committed(seq) == len(text) - 1
    engine.release([seq])


@SOME
def test_a_prompt_may_be_cut_anywhere(name: str) -> None:
    engine, tokens = engine_of(name), some_tokens(50)
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


@pytest.mark.parametrize("name", by_night(["jamba", "lfm2", "mamba", "qwen3_5", "zamba2"], but=["jamba", "lfm2"]))
def test_weights_that_are_packed_and_dropped_and_kept_give_the_same_bits(name: str, tmp_path: Path) -> None:
    tokens, kept = some_tokens(30), Place(tmp_path / "packed", "this model")
    tree = some_tree(tokens[-1], 20)

    def logits(**options: Any) -> torch.Tensor:
        engine, seq = TorchEngine(tiny_hybrid(name, torch.bfloat16), **options), request(tokens)
        engine.prefill(seq)
        return engine.verify([seq], [tree]).all_logits

    expected = logits()
    assert torch.equal(logits(owns_model=True), expected)
    for _ in range(2):  # the second finds them
        assert torch.equal(logits(owns_model=True, kept=kept), expected)


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_night(HYBRIDS, but=KINDS[1::2]))  # by day the kinds whose logits aren't compared
def test_texts_are_those_of_transformers_and_of_plain_decoding(name: str) -> None:
    model, prompts = model_of(name), [some_tokens(9, seed=1), some_tokens(25, seed=2)]
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    llm = LLM(model, shape="3x2x1")
    drafted, plain = ([result.token_ids for result in one.generate(prompts, params)] for one in (llm, llm.plain()))
    assert drafted == plain
    for prompt, ids in zip(prompts, plain, strict=True):
        own = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)  # type: ignore[operator]
        assert own[0, len(prompt) :].tolist() == ids


@SOME
def test_seeds_batches_and_streams(name: str) -> None:
    llm = LLM(model_of(name), shape="3x2x1")
    plain = llm.plain()
    prompts = [some_tokens(9 + seed, seed=seed) for seed in range(3)]
    params = SamplingParams(max_tokens=10, temperature=0.9, seed=5, n=2, ignore_eos=True)
    together = [result.token_ids for result in llm.generate(prompts, params)]
    assert together == [result.token_ids for result in plain.generate(prompts, params)]
    assert together == [result.token_ids for prompt in prompts for result in llm.generate([prompt], params)]
    one = SamplingParams(max_tokens=10, ignore_eos=True)
    stream = llm.stream(prompts[0], one)
    list(stream)
    assert stream.result.token_ids == plain.generate([prompts[0]], one)[0].token_ids


@EXACT
def test_inside_of_transformers_generate(name: str) -> None:
    model, prompt = model_of(name), torch.tensor([some_tokens(12)])
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **options)  # type: ignore[operator]
    assert torch.equal(model.generate(prompt, custom_generate=generator(shape="2x2"), **options), expected)  # type: ignore[operator]


def test_a_first_row_may_have_a_tiny_weight() -> None:
    """There is nothing before it that could outweigh it."""
    model: Any = tiny_hybrid("rwkv")
    for block in model.rwkv.blocks:
        block.attention.time_first.data -= 200
    engine, tokens = TorchEngine(model), some_tokens(2)
    tree, seq = some_tree(tokens[-1], 9), request(tokens)
    engine.prefill(seq)
    expected = of_transformers(model, tokens[:-1], tree)
    got = engine.verify([seq], [tree]).all_logits
    assert float((got - expected).abs().max()) <= 1e-3 * float(expected.std())


def test_weights_that_a_first_forward_divides_are_not_divided_behind_ones_back() -> None:
    model = tiny_hybrid("rwkv")
    fresh = type(model)(model.config).eval()
    with pytest.raises(ModelError, match="divides its weights in its first forward"):
        TorchEngine(fresh)
    tokens = some_tokens(20)
    owned = copy.deepcopy(fresh)
    fresh(input_ids=torch.tensor([tokens]))
    expected = decode(TorchEngine(fresh), [request(tokens, max_tokens=9)])
    assert decode(TorchEngine(owned, owns_model=True), [request(tokens, max_tokens=9)]) == expected


def test_a_cache_of_the_user_is_refused() -> None:
    model, prompt = model_of("mamba"), torch.tensor([some_tokens(12)])
    with pytest.raises(OptionError, match=r"can't honour cache(_params)?: it keeps KV in storage of its own"):
        model.generate(
            prompt, custom_generate=generator(), cache_params=DynamicCache(config=model.config), max_new_tokens=3
        )  # type: ignore[operator]


@pytest.mark.parametrize("name", by_night(WITH_IT, but=["qwen3_5_text", ONE_CALL]))
def test_a_model_with_states_drafts_for_others_and_with_others(name: str) -> None:
    draft = TorchEngine(tiny_hybrid("lfm2", torch.bfloat16, 3) if name == ONE_CALL else tiny_hybrid(name, seed=3))
    target = engine_of(name)
    alone, merged = DraftModel(draft, VOCAB), Merged([DraftModel(draft, VOCAB), Suffix(), Recycling(VOCAB)])
    for engine, drafters in ((target, [alone, merged]), (TorchEngine(tiny("llama")), [alone])):
        expected = decode(engine, [request(some_tokens(20), max_tokens=14)])
        for drafter in drafters:
            assert decode(engine, [request(some_tokens(20), max_tokens=14)], drafter, "2x2x1") == expected


@EXACT
def test_beams(name: str) -> None:
    model, prompt = model_of(name), some_tokens(9)
    own = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=7, do_sample=False, num_beams=3, num_return_sequences=3,
        eos_token_id=None,
    )  # fmt: skip
    params = SamplingParams(max_tokens=7, num_beams=3, num_return_sequences=3, ignore_eos=True)
    found = LLM(model).generate([prompt], params)
    assert [result.token_ids for result in found] == own[:, len(prompt) :].tolist()


# -- beginnings ------------------------------------------------------------------------------------------------------


@SOME
def test_beginnings_are_reused_up_to_a_checkpoint_bit_by_bit(name: str) -> None:
    engine, fresh = (TorchEngine(model_of(name), prefix_bytes=size) for size in (10**9, 0))
    text = some_tokens(120)

    def compare(tokens: list[int]) -> int:
        seq, known, tree = request(tokens), request(tokens), some_tree(tokens[-1], 12)
        reused = engine.prefill(seq)
        assert fresh.prefill(known) == 0
        assert torch.equal(engine.verify([seq], [tree]).all_logits, fresh.verify([known], [tree]).all_logits)
        engine.release([seq])
        fresh.release([known])
        engine._prefixes.check()
        return reused

    assert compare(text[:60]) == 0
    assert compare(text[:60]) == 59
    assert compare([*text[:90]]) == 59  # the end of an earlier prompt
    assert compare([*text[:40], *some_tokens(30, seed=1)]) == 0  # they part before any checkpoint
    assert compare([*text[:40], *some_tokens(30, seed=2)]) == 40  # and from now on there is one
    assert compare([*text[:75], *some_tokens(30, seed=3)]) == 59
    assert compare(text) == 89
    live = request([*text[:50], 7])
    assert engine.prefill(live) == 40
    assert compare([*text[:50], 7, *some_tokens(9, seed=4)]) == 50  # of one that is not finished
    engine.release([live])


@SOME
def test_the_next_turn_reads_only_what_is_new(name: str) -> None:
    llm, params = LLM(model_of(name), "ngram"), SamplingParams(max_tokens=20, ignore_eos=True)
    prompt = some_tokens(40)
    first = llm.generate([prompt], params)[0]
    turn = [*prompt, *first.token_ids, *some_tokens(7, seed=3)]
    second = llm.generate([turn], params)[0]
    assert second.metrics.reused_tokens >= 45
    alone = LLM(model_of(name), "ngram", prefix_mb=0).generate([turn], params)[0]
    assert alone.token_ids == second.token_ids


def test_nothing_is_reused_but_where_a_state_is_known() -> None:
    """Rows without a state would be another text."""
    engine = TorchEngine(model_of("qwen3_5_text"), prefix_bytes=10**9)
    text = some_tokens(60)
    seq = request(text)
    engine.prefill(seq)
    engine.release([seq])
    assert engine.prefill(request(text[:50])) == 0


# -- memory, and what goes wrong -------------------------------------------------------------------------------------


@SOME
def test_states_count_as_memory_and_texts_are_set_back_and_read_again(name: str) -> None:
    engine, prompts = engine_of(name), [some_tokens(9 + seed, seed=seed) for seed in range(4)]
    expected = [decode(engine, [request(prompt, max_tokens=12)])[0] for prompt in prompts]
    one = engine.nbytes(request(prompts[0]), 44)
    assert one >= engine._storages.layout.text_nbytes > 0
    decoder = Decoder(engine, Suffix(), shape("2x2"), acceptance("match"))
    scheduler = Scheduler(decoder, kv_bytes=int(2.2 * one))
    seqs = [request(prompt, max_tokens=12) for prompt in prompts]
    for seq in seqs:
        scheduler.add(seq)
    most = 0
    while not scheduler.idle:
        scheduler.step()
        most = max(most, scheduler.running)
    assert [seq.output_ids for seq in seqs] == expected
    assert 1 < most < 4
    assert not engine._kv


@pytest.mark.parametrize(
    ("name", "keeps"),
    [
        ("mamba", ("states",)), ("jamba", ("rows", "states")), (ONE_CALL, ("rows", "states")), ("llama", ("rows",)),
    ],
)  # fmt: skip
def test_an_engine_says_what_it_keeps_of_a_text(name: str, keeps: tuple[str, ...]) -> None:
    engine = TorchEngine(tiny("llama"), "tree") if name == "llama" else engine_of(name)
    seq = request(some_tokens(40))
    assert engine.info.keeps == keeps
    engine.prefill(seq)
    rows = engine._kv_of(seq).capacity * engine._storages.layout.row_nbytes
    assert (rows > 0) == ("rows" in keeps)
    assert engine.info.state_bytes == engine.nbytes(seq, 40) - rows
    assert (engine.info.state_bytes > 0) == ("states" in keeps)
    engine.release([seq])


@SOME
def test_what_is_cancelled_leaves_the_others_as_they_are(name: str) -> None:
    engine, prompts = engine_of(name), [some_tokens(9 + seed, seed=seed) for seed in range(3)]
    expected = [decode(engine, [request(prompt, max_tokens=16)])[0] for prompt in prompts]
    scheduler = Scheduler(Decoder(engine, Suffix(), shape("2x2"), acceptance("match")))
    seqs = [request(prompt, max_tokens=16) for prompt in prompts]
    for seq in seqs:
        scheduler.add(seq)
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(seqs[1].id)
    while not scheduler.idle:
        scheduler.step()
    assert [seqs[0].output_ids, seqs[2].output_ids] == [expected[0], expected[2]]
    assert not engine._kv


@pytest.mark.parametrize("reads", [True, False], ids=["prompt", "tree"])
@pytest.mark.parametrize("name", ["qwen3_5_text"])
def test_a_forward_that_fails_in_its_midst_is_no_text_s_state(
    name: str, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(model_of(name), prefix_bytes=10**9)
    tokens, tree = some_tokens(40), some_tree(5, 12)
    known, seq = request(tokens), request(tokens)
    engine.prefill(known)
    expected = engine.verify([known], [tree]).all_logits
    engine.release([known])
    engine._prefixes.clear()
    engine.begin(seq)
    engine.verify([], [], reading=[(seq, 20)])

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more")

    layer = engine._model.model.layers[2]  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", fail)
        with pytest.raises(RuntimeError, match="no more"):
            engine.verify([] if reads else [seq], [] if reads else [tree], reading=[(seq, 19)] if reads else [])
    if reads:
        with pytest.raises(ModelError, match="left this text's states in disorder"):
            engine.verify([], [], reading=[(seq, 19)])
        engine.release([seq])
        seq = request(tokens)
        assert engine.prefill(seq) == 0
    else:
        engine.verify([], [], reading=[(seq, 19)])
    assert torch.equal(engine.verify([seq], [tree]).all_logits, expected)


def test_a_model_that_blows_its_own_rounding_up_is_accepted_for_what_it_says_itself() -> None:
    """A norm behind a recurrence may be given next to nothing."""
    model = tiny_hybrid("qwen3_next", torch.bfloat16, seed=7)
    own = own_forward(model, lambda: in_float32(model, "sdpa"), recurrent=True)
    error, allowed, _ = compare({**own, "logits": own["exact"]}, own["logits"].float(), False)
    assert error > 3 * allowed, "its rounding alone is more than any engine is allowed"
    assert not TorchEngine(model).caveat


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        ("cuda", {}, "Some has recurrent states, which this library rolls back on CPUs alone"),
        ("cuda", {"attention": "sdpa"}, "Some has recurrent states, which this library rolls back on CPUs alone"),
        ("cpu", {"attention": "sdpa"}, "Some has recurrent states, which can't be rolled back with attention='sdpa'"),
        ("cpu", {"compile": True}, "Some has recurrent states, which can't be rolled back with compile=True"),
    ],
)
def test_engines_that_can_t_roll_states_back_are_refused(device: str, options: dict[str, Any], reason: str) -> None:
    traits = Traits("Some", "some", device, torch.float32, recurrent=True)
    with pytest.raises(ModelError, match=f"^{reason}$"):
        plan(traits, EngineOptions(**options))


def test_what_is_planned_for_is_what_can_be_computed() -> None:
    assert set(FUNCTIONS) == RECURRENCES
    assert set(METHODS) == CLASSES


def test_one_engine_is_planned_and_no_other() -> None:
    planned = plan(Traits("Some", "some", "cpu", torch.float32, recurrent=True), EngineOptions())
    assert (planned.engine, planned.attention, planned.otherwise, planned.hint) == ("modules", "tree", None, "")


def test_a_recurrence_with_code_of_another_s_is_refused() -> None:
    model = tiny_hybrid("qwen3_5_text")
    mixer = model.model.layers[0].linear_attn
    own = mixer.forward
    mixer.forward = functools.partial(own)
    with pytest.raises(ModelError, match="does not give the same logits"):
        TorchEngine(model)


# -- the order of nodes ----------------------------------------------------------------------------------------------


def test_a_chain_needs_one_state_and_a_tree_one_for_each_branch_that_is_open() -> None:
    chain = TokenTree.chain(1, [2, 3, 4])
    for read, last in ((False, -1), (True, 0)):
        steps, slots = steps_of(chain.parents, 0, read)
        assert steps.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, last]]
        assert slots == 1
    steps, slots = steps_of(np.array([-1, 0, 0, 1, 2, 2]), 0, False)
    assert steps.tolist() == [[0, 0, 0], [1, 0, 1], [2, 0, 0], [3, 1, -1], [4, 0, -1], [5, 0, -1]]
    assert slots == 2
    steps, _ = steps_of(np.array([-1, 0, 0, 1, 2, 2]), 4, False)
    assert steps[:, 0].tolist() == [0, 2, 4, 5], "of earlier nodes, those that later ones go on from"


@pytest.mark.parametrize("first", [0, 3, 11])
@pytest.mark.parametrize("seed", range(5))
def test_states_are_there_when_children_go_on_from_them(seed: int, first: int) -> None:
    tree = some_tree(3, 40, seed)
    steps, slots = steps_of(tree.parents, first, False)
    held = {0: -1}
    for node, source, target in steps.tolist():
        assert held.get(source) == tree.parents[node]
        assert -1 <= target < slots
        if target >= 0:
            held[target] = node
    assert {*range(first, 40)} <= {*steps[:, 0].tolist()}
    for row, node in enumerate(range(first, 40)):
        above = [*range(-3, 0), *tree.path(node)[:-1]][-3:]
        assert windows_of(tree.parents, first, 3)[row].tolist() == above


@pytest.mark.parametrize("function", [torch.sigmoid, torch.exp, nn.functional.silu, nn.functional.softplus])
def test_numbers_have_the_same_bits_beside_any_others(function: Any) -> None:
    x = torch.randn(3000, 33, generator=torch.Generator().manual_seed(0))
    steady = in_whole_vectors(function)
    whole = steady(x)
    torch.testing.assert_close(whole, function(x))
    for rows in (1, 2, 3, 700):
        assert torch.equal(steady(x[:rows]), whole[:rows])
