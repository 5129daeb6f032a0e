"""The engine on kernels of our own: its bits, its pages, and the loop on it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from triton.errors import TritonError

from tests.conftest import by_night, decode
from tests.engines.gpu.triton_here import DEVICE, FAMILIES, small
from tests.engines.test_engine import of_transformers
from tests.tiny_models import request, some_tokens, some_tree
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.engines.base import Branches
from tokentree.engines.drafting import HeadEngines, Rewinds
from tokentree.engines.gpu.attending import CHUNK
from tokentree.engines.gpu.engine import TritonEngine
from tokentree.engines.gpu.quantized import Int8
from tokentree.engines.prepared import Prepared
from tokentree.engines.self_check import own_forward
from tokentree.engines.transformers_engine import TransformersEngine
from tokentree.errors import InvariantError, ModelError
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

ROOT = 5
ONE: dict[str, Any] = {"num_hidden_layers": 1}  # where layers are all alike: each takes the interpreter as long
ALIKE = ("qwen2", "qwen3", "phi3")


class Interpreted(TritonEngine):
    """Every row costs Triton's interpreter as much as the one before: prompts aren't padded far."""

    sizes = (1, 2, 4, 8, 16, 32, 64, 128)


def prepared(family: str = "llama", owned: bool = False, quantization: str | None = None, **options: Any) -> Prepared:
    made = Prepared(small(family, **options), owned, quantization, None, None)
    made.ask("eager" if family.startswith("gemma2") else "sdpa")
    return made


def engine_of(family: str = "llama", prefix_bytes: int = 0, tokens: int = 2000, **options: Any) -> TritonEngine:
    return Interpreted(prepared(family, **options), prefix_bytes, tokens)


@pytest.mark.parametrize("owned", [False, True])
def test_a_text_ends_where_generate_ends_it_now(owned: bool) -> None:
    model = small(eos_token_id=5)
    ready = Prepared(model, owned, None, None, None)
    ready.ask("sdpa")
    engine = TritonEngine(ready, tokens=2000)
    assert engine.ends == [5]
    model.generation_config.eos_token_id = [7, 3]
    assert engine.ends == list(engine.info.ends) == ([5] if owned else [3, 7])
    with pytest.raises(ModelError, match="can't be copied"):
        copy.deepcopy(engine)


@functools.cache
def llama() -> TritonEngine:
    return engine_of(prefix_bytes=1 << 30, **ONE)


def verified(engine: TritonEngine, seq: Sequence, tree: TokenTree, first: int = 0) -> torch.Tensor:
    engine.prefill(seq)
    out = engine.verify([seq], [tree], [first])
    return out.all_logits.clone()


def path_to(tree: TokenTree, node: int) -> list[int]:
    return [] if node < 0 else [*path_to(tree, int(tree.parents[node])), node]


def alone(engine: TritonEngine, before: list[int], tree: TokenTree, path: list[int]) -> torch.Tensor:
    """The logits after each node of a path, when it was decoded token by token."""
    seq, said = request([*before, ROOT]), list[torch.Tensor]()
    engine.prefill(seq)
    for place in path:
        said.append(engine.verify([seq], [TokenTree.chain(int(tree.tokens[place]), [])]).all_logits[0].clone())
        engine.commit([seq], [[0]])
    engine.release([seq])
    return torch.stack(said)


@pytest.mark.parametrize("family", by_night(FAMILIES, but=["qwen3", "gemma3"]))
def test_a_tree_has_transformers_logits_and_the_bits_of_each_path_alone(family: str) -> None:
    options = ONE if family in ALIKE else {}
    model = prepared(family, **options)
    engine, before = Interpreted(model, 0, 2000), some_tokens(9)
    tree = TokenTree(np.array([ROOT, 7, 8, 9, 10, 11]), np.array([-1, 0, 0, 2, 1, 3]))
    engine._check_trees(model.own)
    seq = request([*before, ROOT])
    got = verified(engine, seq, tree)
    expected = of_transformers(small(family, **options).float().cpu(), before, tree)
    error = float((got.cpu().float() - expected).square().mean().sqrt())
    assert error < 0.05 * float(expected.std())
    if family in ("qwen2", "phi3", "gemma3"):
        return  # what they are made of, others are too
    path = path_to(tree, 5)  # its rows don't lie behind one another
    assert torch.equal(alone(engine, before, tree, path), got[path])


def test_a_protocol_s_parts_are_there() -> None:
    for kind in (TransformersEngine, HeadEngines, Branches, Rewinds):
        assert isinstance(llama(), kind)
    assert llama().info.attention == "tree"
    assert llama().info.kv_bytes == 16 * llama().pages.page_nbytes


def test_a_ragged_batch_has_the_bits_of_each_text_alone_and_prompts_beside_it_too() -> None:
    engine = engine_of(**ONE)
    texts = [[*some_tokens(n, seed=n), ROOT] for n in (3, 126, 20)]
    trees = [some_tree(ROOT, n) for n in (4, 9, 1)]
    expected = [verified(engine, request(ids), tree) for ids, tree in zip(texts, trees, strict=True)]
    seqs = [request(ids) for ids in texts]
    for seq in seqs:
        engine.prefill(seq)
    reading = request(some_tokens(60, seed=4))
    engine.begin(reading)
    out = engine.verify(seqs, trees, reading=[(reading, 55)])
    assert torch.equal(out.all_logits, torch.cat(expected))
    assert engine.committed(reading) == 55
    tree = some_tree(int(reading.tokens[-1]), 3)
    apart = verified(engine, request(reading.tokens), tree)
    assert torch.equal(verified(engine, reading, tree), apart)


def test_after_commits_over_pages_a_text_is_like_one_prefilled_with_the_same_tokens() -> None:
    engine, before = engine_of(**ONE), some_tokens(CHUNK - 3)
    seq, tokens = request([*before, ROOT], max_tokens=90), [*before, ROOT]
    engine.prefill(seq)
    for last, size in ((6, 7), (0, 1), (4, 6), (8, 9)):
        tree = some_tree(tokens[-1], size)
        engine.verify([seq], [tree])
        path = path_to(tree, last)
        engine.commit([seq], [path])
        tokens += [*tree.tokens[path[1:]].tolist(), 7]
    assert engine.committed(seq) == len(tokens) - 1
    tree = some_tree(7, 5)
    got = engine.verify([seq], [tree]).all_logits.clone()
    assert torch.equal(verified(engine, request(tokens), tree), got)
    engine.check()


def test_more_rows_than_a_forward_takes_go_through_several(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(**ONE)
    texts = [[*some_tokens(n, seed=n), ROOT] for n in (3, 9, 20)]
    trees = [some_tree(ROOT, n) for n in (5, 8, 4)]
    expected = [verified(engine, request(ids), tree) for ids, tree in zip(texts, trees, strict=True)]
    monkeypatch.setattr(Interpreted, "sizes", (1, 2, 4, 8))
    seqs, prompts = [request(ids) for ids in texts], [request(some_tokens(30, seed=4)), request(some_tokens(6, seed=5))]
    for seq in seqs:
        engine.prefill(seq)
    out = engine.verify(seqs, trees, reading=[(prompts[0], 25), (prompts[1], 3)])
    assert torch.equal(out.all_logits, torch.cat(expected))
    assert out.starts == [0, 5, 13]
    assert np.array_equal(out.top(1)[1][:, 0], out.all_logits.float().argmax(1).cpu().numpy())
    assert [engine.committed(seq) for seq in prompts] == [25, 3]
    for seq in prompts:
        tree = some_tree(int(seq.tokens[-1]), 3)
        assert torch.equal(verified(engine, seq, tree), verified(engine, request(seq.tokens), tree))
    with pytest.raises(ModelError, match="9 rows in one forward"):
        engine.verify(seqs[:1], [some_tree(ROOT, 9)])


def test_a_tree_grown_over_several_calls_equals_one_call() -> None:
    engine, before, tree = engine_of(**ONE), some_tokens(20), some_tree(ROOT, 9)
    whole = verified(engine, request([*before, ROOT]), tree)
    seq = request([*before, ROOT])
    engine.prefill(seq)
    parts = []
    for end, first in ((3, 0), (4, 3), (9, 4)):
        part = TokenTree(tree.tokens[:end], tree.parents[:end])
        parts.append(engine.verify([seq], [part], [first]).all_logits.clone())
    assert torch.equal(torch.cat(parts), whole)


def test_the_most_probable_tokens_are_those_of_the_logits() -> None:
    engine, tree = llama(), some_tree(ROOT, 4)
    seq = request([*some_tokens(5), ROOT])
    engine.prefill(seq)
    out = engine.verify([seq], [tree])
    values, ids = out.top(8)
    logits = out.all_logits.float().cpu()
    assert np.array_equal(values, logits.topk(8).values.numpy())
    assert np.array_equal(ids[:, 0], logits.argmax(1).numpy())
    assert out.log_sums is not None
    assert np.allclose(out.log_sums, logits.logsumexp(1).numpy(), atol=1e-4)
    engine.release([seq])


class PlayedTwice:
    """What a recording does: it runs once before it is recorded, and again whenever it plays."""

    pool = None

    def __init__(self, run: Callable[[], None], pool: object) -> None:
        run()
        self.play = run


def test_rows_that_move_are_moved_once_when_a_forward_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentree.engines.gpu.engine.Recording", PlayedTwice)
    engine, plain, before = engine_of(), engine_of(), some_tokens(20)
    engine._records = True
    seq, tree = request([*before, ROOT]), TokenTree(np.arange(ROOT, ROOT + 7), np.array([-1, 0, 0, 2, 2, 4, 4]))
    engine.prefill(seq)
    engine.verify([seq], [tree])
    engine.commit([seq], [[0, 2, 4, 6]])  # 2 goes to 1, and 4 to where 2 was
    last = some_tree(7, 3)
    got = engine.verify([seq], [last]).all_logits.clone()  # the first forward over so many rows
    tokens = [*before, *tree.tokens[[0, 2, 4, 6]].tolist(), 7]
    assert torch.equal(verified(plain, request(tokens), last), got)


# -- pages -------------------------------------------------------------------------------------------------------------


def test_texts_that_begin_alike_share_pages_and_keep_their_bits() -> None:
    engine, common = engine_of(prefix_bytes=1 << 30, **ONE), some_tokens(2 * CHUNK + 20)
    first, tree = request([*common, ROOT]), some_tree(ROOT, 4)
    expected = verified(engine, first, tree)
    live = request([*common, ROOT])
    assert engine.begin(live) == 2 * CHUNK
    assert torch.equal(verified(engine, live, tree), expected)
    used = engine.pages.free
    engine.check()
    engine.release([first, live])
    again, other = request([*common, ROOT]), request([*common[: CHUNK + 5], 3, 4, ROOT])
    assert engine.begin(again) == 2 * CHUNK
    assert engine.begin(other) == CHUNK
    assert torch.equal(verified(engine, again, tree), expected)
    assert torch.equal(verified(engine, other, tree), verified(engine_of(**ONE), request(other.tokens), tree))
    engine.check()
    engine.release([again, other])
    engine.check()
    assert engine.pages.free >= used


def test_what_is_kept_gives_way_to_texts_and_a_full_engine_says_so() -> None:
    engine = engine_of(prefix_bytes=1 << 30, tokens=3 * CHUNK, **ONE)
    for seed in range(2):
        seq = request([*some_tokens(CHUNK + 9, seed=seed), ROOT])
        engine.prefill(seq)
        engine.release([seq])
        engine.check()
    seq = request([*some_tokens(2 * CHUNK + 5, seed=9), ROOT])
    engine.prefill(seq)
    more = request([*some_tokens(5, seed=9), ROOT])
    with pytest.raises(ModelError, match="no memory is left"):
        engine.prefill(more)
    engine.release([seq, more])
    engine.prefill(more)
    engine.check()


def test_what_is_kept_gives_way_though_live_texts_have_the_oldest_of_it_too() -> None:
    engine = engine_of(prefix_bytes=1 << 30, tokens=4 * CHUNK, **ONE)
    first, second = ([*some_tokens(CHUNK + 2, seed=seed), ROOT] for seed in (1, 2))
    for ids in (first, second):
        seq = request(ids)
        engine.prefill(seq)
        engine.release([seq])
    live = request(first)
    assert engine.begin(live) == CHUNK  # so forgetting that page frees none
    again = request(second)
    engine.begin(again)  # used later than the first
    engine.release([again])
    more = request([*some_tokens(2 * CHUNK + 2, seed=3), ROOT])
    engine.prefill(more)
    engine.check()


def test_a_tree_may_reach_beyond_the_context_s_rows() -> None:
    engine, ids = engine_of(max_position_embeddings=CHUNK // 2, **ONE), some_tokens(CHUNK // 2 - 3)
    tree = TokenTree(np.arange(70), np.array([-1, *([0] * 35), *range(1, 35)]))
    got = verified(engine, request([*ids, 0]), tree)  # its rows need a page more than the context has
    assert torch.equal(alone(engine, ids, tree, path_to(tree, 69)), got[path_to(tree, 69)])
    with pytest.raises(ModelError, match=f"behind the last of the model's {CHUNK // 2} positions"):
        verified(engine, request([*ids, 0]), TokenTree.chain(0, [1, 2, 3]))


def test_damaged_counts_are_found() -> None:
    engine = engine_of()
    engine.check()
    page = engine.pages._free.popleft()
    with pytest.raises(InvariantError):
        engine.check()
    engine.pages._free.appendleft(page)
    engine.pages._references[page] += 1
    with pytest.raises(InvariantError):
        engine.check()


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_texts_are_plain_s_whatever_is_drafted_alone_and_in_a_batch() -> None:
    def texts() -> list[Sequence]:
        prompts = ([5, 6, 7, 8] * 8, 0.0), (some_tokens(30), 1.0), ([9, 9, 9, 9, 9], 1.0)
        return [request(ids, max_tokens=6, temperature=temperature, seed=3) for ids, temperature in prompts]

    expected = [decode(llama(), [seq])[0] for seq in texts()]
    for drafter in (NGram(), Recycling(llama().vocab_size)):
        assert decode(llama(), texts(), drafter) == expected
    llama().check()


def test_hidden_states_are_transformers_and_those_of_accepted_nodes_lie_in_order() -> None:
    engine = engine_of()
    places = [0, 1, 2]
    engine.capture(places)
    seq, tree = request([*some_tokens(7), ROOT]), some_tree(ROOT, 6)
    engine.prefill(seq)
    engine.verify([seq], [tree])
    path = path_to(tree, 5)
    engine.commit([seq], [path])
    ids = torch.tensor([*some_tokens(7), *tree.tokens[path].tolist()])
    model = small()
    with torch.inference_mode():
        expected = model(input_ids=ids[None].to(DEVICE), output_hidden_states=True).hidden_states
    for place in places:
        got, wanted = engine.hidden(seq, place).float(), expected[place][0].float()
        assert float((got - wanted).square().mean().sqrt()) < 0.03 * float(wanted.std())
    whole = engine.hidden_states(ids.tolist(), places)
    assert torch.equal(whole, torch.cat([engine.hidden(seq, place) for place in places], 1))


def test_a_gpu_on_which_kernels_fail_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Prepared(small("llama"), False, None, None, None)
    prepared.ask("sdpa")
    engine = TritonEngine(prepared, tokens=500)

    def fail(*given: object) -> None:
        raise TritonError("out of resource: shared memory\nand more")

    monkeypatch.setattr(engine._forward, "run", fail)
    with pytest.raises(ModelError, match=r"can't be run here: out of resource: shared memory$"):
        engine._check_trees(prepared.own)
    engine.check()


def test_a_model_with_no_kernels_is_refused_with_the_reason() -> None:
    model = Prepared(small("llama").float(), False, None, None, None)
    model.own = own_forward(model.copy)
    with pytest.raises(ModelError, match="float32, not bfloat16"):
        TritonEngine(model)


# -- 8 bits ------------------------------------------------------------------------------------------------------------

GROUPS: dict[str, Any] = {"intermediate_size": 128}  # inputs that come in groups of 64


def rounded(family: str, **options: Any) -> PreTrainedModel:
    """The model whose layers' weights are those that 8 bits have, in float32; its embedding is as it was."""
    model = small(family, **GROUPS, **options, tie_word_embeddings=False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = Int8.of(module.weight.data)[:]
    exact: PreTrainedModel = model.float().cpu()
    return exact


@pytest.mark.parametrize("family", by_night(["llama", "qwen3", "gemma2"], but=["llama"]))
def test_in_8_bits_a_tree_has_the_logits_of_the_rounded_model_and_the_bits_of_each_path_alone(family: str) -> None:
    options = {} if family == "gemma2" else ONE
    model = prepared(family, True, "int8", **GROUPS, **options, tie_word_embeddings=False)
    engine = Interpreted(model, 0, 2000)
    engine._check_trees(model.own)
    before, tree = some_tokens(9), some_tree(ROOT, 6)
    got = verified(engine, request([*before, ROOT]), tree)
    expected = of_transformers(rounded(family, **options), before, tree)
    error = float((got.cpu().float() - expected).square().mean().sqrt())
    assert error < 0.05 * float(expected.std())
    for path in (path_to(tree, 3), path_to(tree, 5)):
        assert torch.equal(alone(engine, before, tree, path), got[path])
    assert "int8" in engine.info.signature


def test_in_8_bits_texts_are_plain_s_and_prompts_may_be_cut_anywhere() -> None:
    engine = engine_of(quantization="int8", **GROUPS, **ONE)
    prompts = [[5, 6, 7, 8] * 6, [9, 9, 9, 9]]
    expected = [decode(engine, [request(ids, max_tokens=4)])[0] for ids in prompts]
    assert decode(engine, [request(ids, max_tokens=4) for ids in prompts], NGram()) == expected
    seq, cut = request(prompts[0]), request(prompts[0])
    engine.prefill(cut, 7)
    tree = some_tree(8, 4)
    assert torch.equal(verified(engine, cut, tree), verified(engine, seq, tree))


def test_in_8_bits_the_embedding_stays_and_heads_get_the_output_layer_s_values() -> None:
    engine = engine_of(quantization="int8", **GROUPS)
    assert isinstance(engine.weights.head, Int8)
    assert torch.equal(engine.weights.embedding.cpu(), small(**GROUPS).model.embed_tokens.weight.cpu())
    assert engine.weights.nbytes < 0.6 * engine_of(**GROUPS).weights.nbytes
    features = engine.capture()
    weight, _ = features.output_weights(torch.tensor([3, 7], device=DEVICE))
    assert torch.equal(weight, engine.weights.head[:][[3, 7]])
    seq, tree = request([*some_tokens(5), ROOT]), some_tree(ROOT, 3)
    got = verified(engine, seq, tree)
    engine.commit([seq], [[0]])
    expected = features.output_layer(engine.hidden(seq)[-1]).float()
    assert float((got[0].float() - expected).abs().max()) < 0.02 * float(expected.std())


def test_in_8_bits_an_engine_may_be_further_off_from_the_model_by_itself_and_not_much_further() -> None:
    own = {name: told for name, told in own_forward(small(**GROUPS, **ONE)).items() if name != "exact"}
    noise = torch.randn(own["logits"].shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits, spread = own["logits"].float(), float(own["logits"].float().std())
    few, many = engine_of(quantization="int8", **GROUPS, **ONE), engine_of(**GROUPS, **ONE)
    few._check_trees({**own, "logits": logits + 0.2 * spread * noise})
    with pytest.raises(ModelError, match="other logits"):
        many._check_trees({**own, "logits": logits.bfloat16() + 0.2 * spread * noise.bfloat16()})
    with pytest.raises(ModelError, match="other logits"):
        few._check_trees({**own, "logits": logits + 0.5 * spread * noise})


def test_a_model_whose_inputs_come_in_no_groups_is_refused_in_8_bits() -> None:
    model = Prepared(small(), False, "int8", None, None)
    with pytest.raises(ModelError, match=r"it has sizes that there is no kernel for in 8 bits$"):
        TritonEngine(model)


@pytest.mark.parametrize("rows", by_night([CHUNK + 20, CHUNK - 3, 0], but=[CHUNK + 20]))
def test_a_text_that_is_rewound_goes_on_and_those_that_share_its_pages_stay_as_they_are(rows: int) -> None:
    engine = engine_of(prefix_bytes=1 << 30, **ONE)
    beginning = some_tokens(CHUNK + 30)
    seq, other = request([*beginning, ROOT]), request([*beginning, 9, ROOT])
    engine.prefill(seq)
    assert engine.prefill(other) == CHUNK
    tree = some_tree(ROOT, 4)
    theirs = engine.verify([other], [tree]).all_logits.clone()
    engine.rewind(seq, 2 * CHUNK)
    assert engine.committed(seq) == len(beginning)
    engine.rewind(seq, rows)
    kept = rows if rows > CHUNK else 0  # of a page that another text reads nothing is written again
    assert engine.committed(seq) == kept
    engine.check()
    seq.tokens = [*beginning[:rows], *some_tokens(12, seed=3), ROOT]
    got = verified(engine, seq, tree)
    fresh = engine_of(**ONE)
    assert torch.equal(got, verified(fresh, request(seq.tokens), tree))
    assert torch.equal(engine.verify([other], [tree]).all_logits, theirs)
    engine.release([seq, other])
    engine.check()
