"""Block heads: what their trees are made of, what is kept of texts, and that they are lossless."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import by_night, decode, each_two, shown
from tests.drafters.sampled import assert_has_the_target_s_distribution
from tests.heads.block_heads import FORMS, said_after, some_block
from tests.tiny_models import CONTEXT, VOCAB, request, some_tokens, tiny
from tokentree import LLM, SamplingParams
from tokentree.draft import Draft
from tokentree.drafters.block import Block
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.drafters.slots import grown
from tokentree.engines.block import TorchBlocks
from tokentree.engines.drafting import CANDIDATES, Slots
from tokentree.engines.table import TableEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import PairingError
from tokentree.heads.block import BlockHead
from tokentree.heads.block_files import write_block
from tokentree.heads.convolution import Bare
from tokentree.heads.saved import About
from tokentree.sampling import to_probs
from tokentree.sequence import Sequence
from tokentree.shapes import shape

SHAPES = ["cost", "3x2x1", "chain:4", "dynamic:nodes=12", "paths:[[0],[1],[0,0],[4],[1,2],[1,2,0]]"]
WIDE = {"hidden_size": 64, "intermediate_size": 96}


@torch.inference_mode()
def said_by(head: BlockHead, model: PreTrainedModel, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """States [guesses, hidden size] and logits [guesses, known tokens] behind ``tokens``, of each place by itself, by
    the papers' formulas: all is computed anew, one query at a time, of the states that the model itself gives for all
    tokens but the last."""
    sizes, start = head.sizes, len(tokens) - 1
    states = model(input_ids=torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    context = head.hidden_norm(head.fc(torch.cat([states[tap][0] for tap in sizes.taps], -1)))
    embed: Any = model.get_input_embeddings() if head.embed_tokens is None else head.embed_tokens
    rows = [embed(torch.tensor(tokens[-1])) * sizes.embedding_scale]
    mask: Any = head.mask_embedding
    mask = mask if sizes.mask_token is None else embed(torch.tensor(sizes.mask_token)) * sizes.embedding_scale
    x = torch.stack([*rows, *[mask] * (sizes.block_size - 1)])
    for layer in head._layers:
        normed, behind = mixed_by(layer.around_attention, layer.input_layernorm(x))
        queries = layer.q_norm(layer.q_proj(normed).unflatten(-1, (sizes.num_heads, -1)))
        keys, values = (torch.cat(parts) for parts in zip(*map(layer.keys_values, (context, normed)), strict=True))
        turns = head.rotary(x, torch.arange(start + sizes.block_size)[None])
        half, out = sizes.head_dim // 2, list[torch.Tensor]()

        def turned(one: torch.Tensor, at: int, turns: Any = turns, half: int = half) -> torch.Tensor:
            cos, sin = (part[0, at] for part in turns)
            result: torch.Tensor = one * cos + torch.cat([-one[..., half:], one[..., :half]], -1) * sin
            return result

        for row in range(sizes.block_size):
            reach = sizes.window or CONTEXT
            last = start + (row + 1 if sizes.causal else min(sizes.block_size, row + reach))
            seen = range(max(0, start + row + 1 - reach), last)
            heads = []
            for number in range(sizes.num_heads):
                group = number * sizes.num_kv_heads // sizes.num_heads
                query = turned(queries[row, number], start + row)
                scores = torch.stack([query @ turned(keys[at, group], at) for at in seen]) * sizes.head_dim**-0.5
                heads.append(scores.softmax(0) @ values[list(seen), group])
            out.append(torch.cat(heads))
        x = x + behind(layer.o_proj(torch.stack(out)))
        normed, behind = mixed_by(layer.around_mlp, layer.post_attention_layernorm(x))
        gate, up = layer.gate_up(normed).chunk(2, -1)
        x = x + behind(layer.down_proj(torch.nn.functional.silu(gate) * up))
    x = head.norm(x)[0 if sizes.anchor_first else 1 :]
    output: Any = model.get_output_embeddings() if head.lm_head is None else head.lm_head
    logits = output(x) * sizes.logit_scale
    logits = logits if sizes.softcap is None else (logits / sizes.softcap).tanh() * sizes.softcap
    return x, logits if head.token_map is None or head.lm_head is not None else logits[:, head.token_map]


def mixed_by(around: Any, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """What goes into a sublayer of rows ``x`` [rows, size], and what is made of what comes out: by DFlash 2's formula,
    one tap of a row at a time."""
    if isinstance(around, Bare):
        return x, lambda out: out
    _, taps, size = around.base.shape
    told = around.told(x).view(len(x), 2, taps, -1)
    group = size // told.shape[-1]

    def mixed(side: int, rows: torch.Tensor) -> torch.Tensor:
        made = torch.zeros_like(rows)
        for t, tap in product(range(len(rows)), range(taps)):
            if t >= tap:
                weights = around.base[side, tap] + told[t, side, tap].repeat_interleave(group)
                made[t] += weights * rows[t - tap]
        return made

    return mixed(0, x), lambda out: mixed(1, out)


class Kept(Block):
    """Remembers what it proposed."""

    def propose(self, seqs: list[Sequence], shape: Any, sampled: bool) -> list[Draft]:
        drafts = super().propose(seqs, shape, sampled)
        self.__dict__.setdefault("seen", []).extend((list(s.tokens), d) for s, d in zip(seqs, drafts, strict=True))
        return drafts


def decoded(
    head: BlockHead, model: PreTrainedModel, lengths: Any, form: str = "3x2x1"
) -> list[tuple[list[int], Draft]]:
    """What was drafted while texts were decoded beside a look-up that knows how they go on."""
    engine = TorchEngine(model)
    drafter = Kept(head, engine)
    prompts = [some_tokens(length, seed=length) for length in lengths]
    plain = decode(engine, [request(prompt, max_tokens=12) for prompt in prompts])
    seqs = [request(prompt, max_tokens=12) for prompt in prompts]
    for seq, text in zip(seqs, plain, strict=True):
        seq.references = [[*seq.tokens, *text]]
    assert decode(engine, seqs, Merged([drafter, NGram()]), form) == plain
    assert max(step[1] for seq in seqs for step in seq.metrics.steps) > 1  # paths longer than the root were accepted
    found: list[tuple[list[int], Draft]] = drafter.__dict__["seen"]
    return found


# -- what it drafts ----------------------------------------------------------------------------------------------------

PLAIN = [form for form in FORMS if "markov_rank" not in FORMS[form]]


@pytest.mark.parametrize(
    ("form", "family", "lengths"),
    each_two(PLAIN, ["llama", "gpt2", "qwen2"], [(11,), (1,), (11, 2, 1)]),
    ids=shown,
)
def test_each_node_has_the_probability_that_computing_it_anew_gives(
    form: str, family: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokentree.engines.block.ROWS", 4)
    model, head, seen = tiny(family), some_block(form), 0
    for tokens, draft in decoded(head, model, lengths):
        if len(tokens) == 1:
            assert len(draft) == 1  # the target has read nothing
            continue
        expected = said_by(head, model, tokens)[1].log_softmax(-1)
        known = [*range(VOCAB)] if head.token_map is None else head.token_map.tolist()
        for node in range(1, len(draft)):
            row, number = expected[draft.depths[node] - 1], known.index(draft.tokens[node])
            assert draft.log_probs[node] == pytest.approx(float(row[number]), abs=2e-3)
            assert abs(int((row > row[number]).sum()) - draft.ranks[node]) <= 1  # equal but for rounding
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("form", sorted({*FORMS} - {*PLAIN}))
def test_a_markov_part_conditions_on_what_comes_before(form: str) -> None:
    model, head, seen = tiny("llama"), some_block(form), 0
    known = torch.arange(VOCAB) if head.token_map is None else head.token_map
    most = head.sizes.candidates or CANDIDATES
    for tokens, draft in decoded(head, model, (11, 5)):
        if len(tokens) == 1:
            assert len(draft) == 1
            continue
        said = partial(said_after, head, *said_by(head, model, tokens))
        paths = [[tokens[-1]]]  # after which guesses are made: the most probable one first
        candidates, shares = list[list[int]](), list[float]()
        probable = [1.0]
        for _ in range(head.sizes.num_guesses):
            row = said(paths[0]).log_softmax(-1)
            best = row.topk(most)
            candidates.append(known[best.indices].tolist())
            shares.append(float(best.values.logsumexp(0)))
            onward = dict[tuple[int, ...], float]()
            for path, prob in zip(paths, probable, strict=True):
                among = (said(path)[best.indices].log_softmax(-1) + shares[-1]).exp()
                onward |= {(*path, t): prob * float(p) for t, p in zip(candidates[-1], among, strict=True)}
            ways = sorted(onward, key=lambda path: -onward[path]) if head.sizes.markov == "rnn" else [*onward]
            paths, probable = [list(way) for way in ways[:most]], [onward[way] for way in ways[:most]]
        for node in range(1, len(draft)):
            place, path = draft.depths[node] - 1, [tokens[-1], *draft.path_tokens(draft.parents[node])]
            at = candidates[place].index(draft.tokens[node])
            row = said(path)
            numbers = torch.searchsorted(known, torch.tensor(candidates[place]))
            among = row[numbers].log_softmax(-1) + shares[place]
            assert draft.log_probs[node] == pytest.approx(float(among[at]), abs=3e-3)
            if head.sizes.markov == "selector":  # all that it takes from, after any token
                assert float(row.log_softmax(-1)[numbers[at]]) == pytest.approx(float(among[at]), abs=3e-3)
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("cut", ["dynamic:nodes=20", "paths:[[0],[1],[0,0],[1,0],[1,1]]"])
def test_nothing_follows_a_path_that_is_not_gone_on_with(cut: str) -> None:
    tokens, probs, ranks = np.full((2, 2, 2), 7), np.full((2, 2, 2), 0.5), np.zeros((2, 2, 2), np.int64)
    tokens[0], tokens[1, 1], ranks[0] = [5, 6], 9, [0, -1]
    draft = grown(Slots(tokens, probs, ranks), 1, shape(cut), 2)
    paths = [draft.path_tokens(node) for node in range(1, len(draft))]
    assert paths[:3] == [[5], [6], [5, 7]]
    assert all(path[0] == 5 for path in paths[2:])


@pytest.mark.parametrize("form", FORMS)
def test_children_are_drawn_from_what_the_head_says_after_their_parent(form: str) -> None:
    model, head = tiny("llama"), some_block(form)
    engine = TorchEngine(model)
    seq, drafter = request(some_tokens(9), temperature=0.7, top_k=20, max_tokens=20), Block(head, engine)
    engine.prefill(seq)
    draft = drafter.propose([seq], shape("3x2x1"), sampled=True)[0]
    states, logits = said_by(head, model, seq.tokens)
    assert draft.sampled is not None
    assert len(draft.sampled) == 10  # of all nodes that have children
    for node, probs in draft.sampled.items():
        said = said_after(head, states, logits, [seq.tokens[-1], *draft.path_tokens(node)])
        if head.token_map is not None:
            said = torch.full((VOCAB,), -torch.inf).index_copy(0, head.token_map, said)
        assert torch.allclose(probs, to_probs(said, seq.params), atol=1e-3)


def test_one_pass_serves_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls, guess = TorchEngine(tiny("llama")), list[int](), TorchBlocks.guess
    drafter = Block(some_block("dspark", block_size=6), engine)

    def counted(self: TorchBlocks, seqs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(seqs))
        return guess(self, seqs)

    monkeypatch.setattr(TorchBlocks, "guess", counted)
    seqs = [request(some_tokens(9), max_tokens=30), request(some_tokens(5), max_tokens=30)]
    for seq in seqs:
        engine.prefill(seq)
    drafts = drafter.propose(seqs, shape("chain:8"), sampled=False)
    assert calls == [2]
    assert [draft.depth for draft in drafts] == [6, 6]
    assert drafts[0].levels == 0


# -- what is kept of a text --------------------------------------------------------------------------------


def test_a_row_is_kept_for_each_token_before_the_anchor() -> None:
    engine = TorchEngine(tiny("llama"))
    drafter = Block(some_block(), engine)
    blocks: Any = drafter._engine
    seq = request(some_tokens(9), max_tokens=20)
    rows = list[tuple[int, int]]()
    propose = drafter.propose

    def noted(seqs: list[Sequence], *args: Any) -> list[Draft]:
        drafts = propose(seqs, *args)
        if len(drafts[0]) > 1:  # else there is no room for a draft
            rows.append((blocks.committed(seq), len(seq.tokens) - 1))
        return drafts

    drafter.propose = noted  # type: ignore
    decode(engine, [seq], drafter, "2x2x1")
    assert rows
    assert all(kept == anchor for kept, anchor in rows)
    assert not blocks._kept


def test_what_the_target_takes_back_is_overwritten() -> None:
    engine = TorchEngine(tiny("llama"))
    text, other = some_tokens(12), some_tokens(12, seed=5)
    found = []
    for tokens in (text, [*text[:6], *other[6:]]):
        seq, blocks = request(tokens), engine.block_engine(some_block())
        engine.prefill(seq)
        found.append(blocks.guess([seq])[1])
    seq, blocks = request(text), engine.block_engine(some_block())
    engine.prefill(seq)
    assert torch.allclose(blocks.guess([seq])[1], found[0], atol=1e-4)
    engine.rewind(seq, 6)
    blocks.prefill(seq)
    seq.tokens[6:] = other[6:]
    engine.prefill(seq)
    assert torch.allclose(blocks.guess([seq])[1], found[1], atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=0.1)


def test_prompts_are_read_in_parts_once_drafts_of_their_texts_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentree.drafters.block.PART", 20)
    engine = TorchEngine(tiny("llama"))
    drafter, form = Block(some_block(), engine), shape("2x1")
    blocks: Any = drafter._engine
    one, other, twin = [request(some_tokens(61, seed=seed)) for seed in (1, 2, 1)]
    seqs = [one, other, twin, alone := request(some_tokens(191, seed=3))]
    for seq in seqs:
        engine.prefill(seq)
    drafter.observe_prompt(seqs, 60)
    assert [blocks.committed(seq) for seq in seqs] == [0] * 4
    read = list[list[int]]()
    for _ in range(7):
        drafts = drafter.propose([one, other, twin], form, False)
        read.append([blocks.committed(seq) for seq in (one, other, twin)])
        assert [len(draft) > 1 for draft in drafts] == [rows == 60 for rows in read[-1]]
    # of all texts together no more than a part in each step; what another text has read is copied
    assert read == [[20, 0, 0], [40, 0, 0], [60, 0, 0], [60, 20, 0], [60, 40, 0], [60, 60, 0], [60, 60, 60]]
    assert all(seq.metrics.prefill_seconds > 0 for seq in (one, other, twin))
    for rows in (80, 160, 190):  # four times as many where nobody else waits
        assert (len(drafter.propose([alone], form, False)[0]) > 1) == (rows == 190)
        assert blocks.committed(alone) == rows


@pytest.mark.parametrize("attention", ["tree", "sdpa"])
def test_rows_of_a_live_text_that_begins_alike_are_copied(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(tiny("llama"), attention)
    blocks, text, rows = TorchBlocks(some_block(), engine), some_tokens(40), list[int]()
    context = BlockHead.context

    def counted(self: BlockHead, states: torch.Tensor) -> torch.Tensor:
        rows.append(len(states))
        return context(self, states)

    monkeypatch.setattr(BlockHead, "context", counted)
    seqs = [request([*text, 7]), request([*text[:30], 9, 9, 9]), request([*text, 7]), request(some_tokens(20, 5))]
    said = list[torch.Tensor]()
    for seq in seqs:
        engine.prefill(seq)
        said.append(blocks.guess([seq])[1])
    assert rows == [40, 32 - 30, 19]
    assert torch.allclose(said[0], said[2], atol=1e-5)


def test_a_text_that_begins_alike_gives_the_same_drafts() -> None:
    engine = TorchEngine(tiny("llama"), prefix_bytes=10_000_000)
    drafter, text = Kept(some_block(), engine), some_tokens(40)
    results = [decode(engine, [request([*text, 7], max_tokens=8)], drafter, "2x2") for _ in range(2)]
    assert results[0] == results[1]
    seen = drafter.__dict__["seen"]
    for (tokens, one), (again, other) in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        assert tokens == again
        assert one.tokens == other.tokens
        assert np.allclose(one.log_probs, other.log_probs, atol=1e-4)


# -- losslessness ------------------------------------------------------------------------------------------------------


PAIRS = each_two(FORMS, SHAPES, [("llama", torch.bfloat16), ("gemma3", torch.float32)])


@pytest.mark.parametrize(
    ("form", "cut", "model"),
    by_night(PAIRS, but=PAIRS[::4]),
    ids=shown,
)
def test_greedy_ids_and_sampled_ids_are_plain_s(form: str, cut: str, model: tuple[str, torch.dtype]) -> None:
    family, dtype = model
    engine = TorchEngine(tiny(family, dtype, **WIDE))
    drafter = Block(some_block(form, **WIDE), engine)
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        prompts = [some_tokens(11), some_tokens(4, seed=1), some_tokens(1, seed=2)]
        plain = decode(engine, [request(p, max_tokens=12, **options) for p in prompts])
        seqs = [request(p, max_tokens=12, **options) for p in prompts]
        assert decode(engine, seqs, drafter, cut) == plain
        assert sum(seq.metrics.drafted_tokens for seq in seqs) > 0


@pytest.mark.parametrize(
    ("accept", "form", "cut"),
    [
        ("rejection", "dflash2", "3x2"),
        ("traversal", "rnn", "3x2"),
        ("block", "dspark", "chain:3"),
        pytest.param("traversal", "dspark", "3x2", marks=pytest.mark.nightly),
        pytest.param("traversal", "dflash", "2x2", marks=pytest.mark.nightly),
        pytest.param("rejection", "dspark", "3x2", marks=pytest.mark.nightly),
        pytest.param("traversal", "dflash2", "3x2", marks=pytest.mark.nightly),
        pytest.param("block", "dflash2", "chain:3", marks=pytest.mark.nightly),
        pytest.param("rejection", "rnn", "3x2", marks=pytest.mark.nightly),
        pytest.param("rejection", "few", "3x2", marks=pytest.mark.nightly),
        pytest.param("traversal", "picked", "3x2", marks=pytest.mark.nightly),
    ],
)
def test_sampling_has_the_target_s_distribution(accept: str, form: str, cut: str) -> None:
    """``picked``: beside a look-up, without draws."""
    model = tiny("llama", vocab_size=6)
    engine = TorchEngine(model)
    sizes = {"few": {"draft_vocab_size": 4}, "dflash2": {"candidates": 3}}.get(form, {})
    drafter = Block(some_block(form if form in FORMS else "dspark", 1, vocab_size=6, **sizes), engine)
    joined = Merged([drafter, NGram()]) if form == "picked" else drafter
    assert_has_the_target_s_distribution(model, engine, joined, cut, accept)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    engine = TorchEngine(tiny("llama"))
    for sizes, message in (
        ({"hidden_size": 32}, "hidden states of 32 numbers, and the target has 48"),
        ({"vocab_size": 99}, "with 99 tokens, and this one has 120"),
        ({"hidden_size": 32, "target_hidden_size": 48}, "no embedding or output layer"),
        ({"taps": (0, 1, 3)}, "hidden states 0 to 2"),
    ):
        with pytest.raises(PairingError, match=message):
            Block(some_block(**sizes), engine)
    Block(some_block("few tokens", hidden_size=32, target_hidden_size=48), engine)
    with pytest.raises(PairingError, match="block' needs heads="):
        LLM(tiny("llama"), "block")
    with pytest.raises(PairingError, match="no hidden states, on which a block head drafts"):
        Block(some_block(), TableEngine(torch.zeros(4, 4)))
    for form in ("shared output", "few tokens"):
        wrong = some_block(form)
        assert wrong.token_map is not None
        wrong.token_map[-1] = VOCAB
        with pytest.raises(PairingError, match="tokens that the target doesn't have"):
            Block(wrong, engine)


def test_no_draft_reaches_beyond_the_context() -> None:
    engine = TorchEngine(tiny("llama"))
    for context in (6, 12, CONTEXT):
        drafter = Block(some_block("dspark", context=context), engine)
        seqs = [request(some_tokens(n), max_tokens=99) for n in (3, 11, CONTEXT - 5)]
        plain = decode(engine, [request(some_tokens(n), max_tokens=99) for n in (3, 11, CONTEXT - 5)])
        assert decode(engine, seqs, drafter, "2x1x1x1") == plain


@pytest.mark.parametrize("form", ["dflash", "dspark", "dflash2"])
def test_a_folder_is_a_drafter(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout = "zlab" if form == "dflash2" else "deepspec"
    write_block(some_block(form), tmp_path, "tiny", layout, About(taps=[0, 1]))
    model = tiny("llama")
    with caplog.at_level("INFO", "tokentree"):
        params = SamplingParams(max_tokens=30)
        for options in ({"drafter": "block"}, {}):
            llm = LLM(model, heads=tmp_path, **options)  # type: ignore[arg-type]
            result = llm.generate([some_tokens(9)], params)[0]
            assert result.token_ids == llm.plain().generate([some_tokens(9)], params)[0].token_ids
            assert "block" in llm.decoder.drafter.names
    assert "hidden states [0, 1], as the head's configuration says; the anchor's row guesses" in caplog.text
    assert "block" in llm.using(accept="traversal", shape="2x2").decoder.drafter.names
