"""EAGLE: what its trees are made of, and that they are lossless."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import by_night, decode, each_two, shown
from tests.drafters.sampled import assert_has_the_target_s_distribution
from tests.played import Played
from tests.tiny_models import CONTEXT, VOCAB, request, some_tokens, tiny
from tokentree import LLM, SamplingParams
from tokentree.draft import Draft
from tokentree.drafters.eagle import Eagle
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.engines.eagle import EagleEngine
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.segment import Segment
from tokentree.engines.torch import TorchEngine
from tokentree.errors import PairingError
from tokentree.heads.eagle import EagleHead, EagleSizes
from tokentree.heads.eagle_files import write_eagle
from tokentree.heads.peagle import PEagleHead, PEagleSizes
from tokentree.heads.saved import About
from tokentree.kernels.topk import top_logprobs
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes import shape
from tokentree.tree import TokenTree

SHAPES = ["cost", "3x2x1", "chain:4", "dynamic:nodes=12", "paths:[[0],[1],[0,0],[4],[1,2],[1,2,0]]"]
KINDS = [(1, None), (3, None), (3, 60), (3, 0)]  # version, draft vocabulary: 0 where the target's output layer serves
# norms of EAGLE-3.1
NORMS = [
    {"fc_norm": True, "norm_output": True},
    {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True, "own_output": False},
]
WIDE = {"hidden_size": 64, "intermediate_size": 96}


def some_head(version: int, known: int | None = None, hidden_size: int = 48, seed: int = 0, **sizes: Any) -> EagleHead:
    """A head with random weights, for the tiny models; with ``known`` 0, one without an output layer; with a
    ``mask_token``, a P-EAGLE head."""
    if known == 0:
        known, sizes = None, {"own_output": False} | sizes
    taps = (2,) if version == 1 else (0, 1, 2)
    given = {
        "version": version, "hidden_size": hidden_size, "intermediate_size": 80, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 16, "vocab_size": VOCAB, "draft_vocab_size": known, "taps": taps, "fc_bias": version == 1,
        "context": CONTEXT,
    } | sizes  # fmt: skip
    made = PEagleHead(PEagleSizes(**given)) if "mask_token" in given else EagleHead(EagleSizes(**given))
    generator = torch.Generator().manual_seed(seed)
    for weight in made.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=1.5 / weight.shape[1] ** 0.5, generator=generator)
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
    if known is not None:
        made.token_map = torch.randperm(made.sizes.vocab_size, generator=generator)[:known].sort().values
    return made.requires_grad_(False)


@torch.inference_mode()
def said_by(head: EagleHead, model: PreTrainedModel, tokens: list[int], path: list[int]) -> torch.Tensor:
    """float32[vocab]: the log-probabilities after ``tokens`` and ``path``, by the paper's formulas, all computed anew:
    the target has read ``tokens`` but the last; the head's own states stand for what comes behind."""
    states = model(input_ids=torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    known = head.fuse(torch.cat([states[tap][0] for tap in head.sizes.taps], -1))
    embed: Any = model.get_input_embeddings() if head.embed_tokens is None else head.embed_tokens
    text = [*tokens[1:], *path]
    for end in range(len(tokens) - 1, len(text) + 1):
        positions = torch.arange(end)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor = positions) -> torch.Tensor:
            q, k = head.rotate(q, at), head.rotate(k, at)
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1).flatten(1)

        given = head(embed(torch.tensor(text[:end])), known, attend)
        known = torch.cat([known, given[-1:]])
    logits = head.logits(given[-1], model.get_output_embeddings())
    if head.token_map is not None:
        logits = torch.full((VOCAB,), -torch.inf).index_copy(0, head.token_map, logits)
    return logits.log_softmax(-1)


class Kept(Eagle):
    """Remembers what it proposed."""

    def propose(self, seqs: list[Sequence], shape: Any, sampled: bool) -> list[Draft]:
        drafts = super().propose(seqs, shape, sampled)
        self.__dict__.setdefault("seen", []).extend((list(s.tokens), d) for s, d in zip(seqs, drafts, strict=True))
        return drafts


# -- what it drafts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "family", "lengths"),
    each_two(KINDS, ["llama", "gemma3", "gpt2"], [(1,), (11,), (11, 2, 1)]),
    ids=shown,
)
def test_each_node_has_the_probability_that_computing_it_anew_gives(
    kind: tuple[int, int | None], family: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("tokentree.engines.head_engine.PREFILL_ROWS", 4)
    model, head = tiny(family), some_head(*kind)
    check_what_it_drafts(TorchEngine(model), model, head, lengths)


@pytest.mark.parametrize("norms", NORMS)
@torch.inference_mode()
def test_norms_stand_where_eagle_3_1_has_them(norms: dict[str, bool]) -> None:
    """Beside a head with the same weights and none of these norms."""
    head = some_head(3, **norms)
    plain = some_head(3, own_output=head.sizes.own_output, norm_before_residual=head.sizes.norm_before_residual)
    plain.load_state_dict({name: head.state_dict()[name] for name in plain.state_dict()})

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + head.sizes.eps).sqrt() * weight

    generator = torch.Generator().manual_seed(1)
    states, embedded, known, attended = (torch.randn(5, n, generator=generator) for n in (3 * 48, 48, 48, 64))
    if head.sizes.fc_norm:
        each = zip(states.split(48, -1), head.fc_norm, strict=True)
        expected = torch.cat([normed(tap, norm.weight) for tap, norm in each], -1)  # type: ignore[arg-type]
    else:
        assert head.input_norm is not None
        expected = normed(states, head.input_norm.weight)
    assert torch.allclose(head.fuse(states), plain.fc(expected), atol=1e-5)
    given = head(embedded, known, lambda *_: attended)
    assert torch.allclose(given, normed(plain(embedded, known, lambda *_: attended), head.norm.weight), atol=1e-5)
    output = torch.nn.Linear(48, VOCAB)
    assert torch.equal(head.logits(given, output), (head.lm_head or output)(given))


@pytest.mark.parametrize("norms", NORMS)
def test_a_head_with_more_norms_drafts_so_too(norms: dict[str, bool]) -> None:
    model = tiny("llama")
    check_what_it_drafts(TorchEngine(model), model, some_head(3, **norms), (11, 2, 1))


@pytest.mark.parametrize(("version", "known"), KINDS)
@pytest.mark.parametrize(("family", "lengths"), [("llama", (11,)), ("gemma3", (1,)), ("gpt2", (31, 2))])
def test_so_it_does_where_forwards_are_recorded(
    version: int, known: int | None, family: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("tokentree.engines.gpu.recording.Recording", Played)
    monkeypatch.setattr("tokentree.engines.kv.LEAST_FIXED", 16)  # so that storage grows
    model, head, capture = tiny(family), some_head(version, known), KVEngine.capture
    monkeypatch.setattr(KVEngine, "capture", lambda *args: dataclasses.replace(capture(*args), recorded=True))
    drafter = check_what_it_drafts(TorchEngine(model, "sdpa"), model, head, lengths)
    assert len(drafter._engine._recordings) > 0


def check_what_it_drafts(engine: KVEngine, model: PreTrainedModel, head: EagleHead, lengths: Any) -> Any:
    drafter = Kept(head, engine)
    prompts = [some_tokens(length, seed=length) for length in lengths]
    plain = decode(engine, [request(prompt, max_tokens=12) for prompt in prompts])
    seqs = [request(prompt, max_tokens=12) for prompt in prompts]
    for seq, text in zip(seqs, plain, strict=True):
        seq.references = [[*seq.tokens, *text]]  # so that the lookup knows what comes, and paths are accepted
    assert decode(engine, seqs, Merged([drafter, NGram()]), "3x2x1") == plain
    grown = 0
    for tokens, draft in drafter.__dict__["seen"]:
        if len(tokens) == 1:
            assert len(draft) == 1  # the target has read nothing that a row could be made of
            continue
        for node in range(1, len(draft)):
            expected = said_by(head, model, tokens, draft.path_tokens(draft.parents[node]))
            assert draft.log_probs[node] == pytest.approx(float(expected[draft.tokens[node]]), abs=2e-3)
            rank = int((expected > expected[draft.tokens[node]]).sum())
            assert abs(rank - draft.ranks[node]) <= 1  # equal but for rounding
            grown += 1
    assert grown > 10
    assert max(step[1] for seq in seqs for step in seq.metrics.steps) > 1  # paths longer than the root were accepted
    return drafter


@pytest.mark.parametrize("lengths", [(21, 6), (21,)])
@pytest.mark.parametrize(
    ("version", "known", "norms"), [*((*kind, {}) for kind in KINDS), *((3, None, norms) for norms in NORMS)]
)
def test_one_compiled_call_gives_what_the_modules_give(
    version: int, known: int | None, norms: dict[str, bool], lengths: tuple[int, ...]
) -> None:  # fmt: skip
    head = some_head(version, known, 64, intermediate_size=96, **norms)
    engines = [EagleEngine(head, TorchEngine(tiny("llama", torch.bfloat16, **WIDE))) for _ in range(2)]
    assert engines[0]._program is not None
    engines[1]._program = None
    found = []
    for engine in engines:
        seqs = [request(some_tokens(length)) for length in lengths]
        for seq in seqs:
            engine._target.prefill(seq)
            engine.prefill(seq)
        levels = [[-1], [0] * 40, [1 + i % 40 for i in range(40)]]
        parents = np.array([parent for level in levels for parent in level])
        tokens = np.arange(81) % VOCAB
        logits = [engine.verify(seqs, [TokenTree(tokens[:1], parents[:1])] * len(seqs)).all_logits]
        for done, count in ((1, 41), (41, 81)):
            trees = [TokenTree(tokens[:count], parents[:count])] * len(seqs)
            logits.append(engine.verify(seqs, trees, [done] * len(seqs)).all_logits)
        found.append(torch.cat(logits).float())
    assert found[0].shape == (81 * len(lengths), known or VOCAB)
    error = (found[0] - found[1]).std() / found[1].std()
    assert float(error) < 0.03  # both round to bfloat16 at each step


@pytest.mark.parametrize("known", [None, 60])
def test_the_compiled_call_finds_the_best_tokens_too(known: int | None) -> None:
    head = some_head(3, known, 64, intermediate_size=96)
    engine = EagleEngine(head, TorchEngine(tiny("llama", torch.bfloat16, **WIDE)))
    seqs = [request(some_tokens(length)) for length in (21, 6)]
    tree = TokenTree(np.arange(9), np.array([-1, *[0] * 8]))
    for seq in seqs:
        engine._target.prefill(seq)
        engine.prefill(seq)
    engine.verify(seqs, [TokenTree.root(0)] * 2)
    out = engine.verify(seqs, [tree] * 2, [1, 1])
    for number in range(2):
        for nodes in ([3], [1, 2, 8]):
            found = out.best(number, nodes, 5)
            assert found is not None
            rows, logits, tokens, log_sums = found
            logprobs, ids = top_logprobs(out.rows(number, nodes), 5)
            assert (tokens[rows, :5] == ids).all()
            assert logits[rows, :5] - log_sums[rows, None] == pytest.approx(logprobs, abs=1e-5)
    assert out.best(0, [3], 9) is None  # it has looked for fewer


def test_it_keeps_rows_of_the_target_s_states_alone() -> None:
    engine = TorchEngine(tiny("llama"))
    drafter = Eagle(some_head(3), engine)
    seq = request(some_tokens(9), max_tokens=30)
    engine.prefill(seq)
    drafter.prefill([seq])
    assert drafter._engine.committed(seq) == 8  # of 9 tokens: the root goes with the first tree
    draft = drafter.propose([seq], shape("2x2x2"), sampled=False)[0]
    path = draft.tree.path(len(draft) - 1)
    step = Accepted(path, [*draft.path_tokens(path[-1]), 7])
    drafter.observe([seq], [draft], None, [step])  # type: ignore[arg-type]
    assert drafter._engine.committed(seq) == 9  # the root's row, and none of the drafted ones that were accepted


@pytest.mark.parametrize("attention", ["tree", "sdpa"])
def test_rows_of_a_live_text_that_begins_alike_are_copied(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(tiny("llama"), attention)
    eagle, text = EagleEngine(some_head(3), engine), some_tokens(40)
    seqs = [request([*text, 7]), request([*text[:30], 9, 9, 9]), request([*text, 7]), request(some_tokens(20, 5))]
    rows, store = list[int](), EagleEngine._store

    def counted(self: EagleEngine, known: Any, segment: Segment) -> None:
        rows.append(segment.count)
        store(self, known, segment)

    monkeypatch.setattr(EagleEngine, "_store", counted)
    kept = list[torch.Tensor]()
    for seq in seqs:
        engine.prefill(seq)
        eagle.prefill(seq)
        kept.append(eagle._state(seq).kv.layer(0)[1][:, :29])
    # a row for each token that has one before it and was read: all of the first text, then what is new
    assert rows == [39, 31 - 29, 18]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


@pytest.mark.parametrize(("attention", "norms"), [("tree", {}), ("sdpa", {}), ("tree", NORMS[0])])
def test_a_text_that_begins_alike_gives_the_same_drafts(attention: str, norms: dict[str, bool]) -> None:
    engine = TorchEngine(tiny("llama"), attention, prefix_bytes=10_000_000)
    drafter, text = Kept(some_head(3, **norms), engine), some_tokens(40)
    results = [decode(engine, [request([*text, 7], max_tokens=8)], drafter, "2x2") for _ in range(2)]
    assert results[0] == results[1]
    seen = drafter.__dict__["seen"]
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for (tokens, one), (again, other) in zip(first, second, strict=True):
        assert tokens == again
        assert one.tokens == other.tokens
        assert np.allclose(one.log_probs, other.log_probs, atol=1e-4)


# -- losslessness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "form", "model"),
    [
        *each_two(KINDS, SHAPES, [("llama", torch.bfloat16), ("gemma3", torch.float32)]),
        (NORMS[0], "3x2x1", ("llama", torch.bfloat16)),
        (NORMS[1], "dynamic:nodes=12", ("llama", torch.bfloat16)),
    ],
    ids=shown,
)
def test_greedy_ids_and_sampled_ids_are_plain_s(
    kind: tuple[int, int | None] | dict[str, bool], form: str, model: tuple[str, torch.dtype]
) -> None:  # fmt: skip
    family, dtype = model
    engine = TorchEngine(tiny(family, dtype, **WIDE))
    head = some_head(3, None, 64, **kind) if isinstance(kind, dict) else some_head(*kind, 64)
    drafter = Eagle(head, engine)
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        prompts = [some_tokens(11), some_tokens(4, seed=1), some_tokens(1, seed=2)]
        plain = decode(engine, [request(p, max_tokens=12, **options) for p in prompts])
        seqs = [request(p, max_tokens=12, **options) for p in prompts]
        assert decode(engine, seqs, drafter, form) == plain
        assert sum(seq.metrics.drafted_tokens for seq in seqs) > 0
    assert not drafter._engine._states  # type: ignore[attr-defined]


# under match a seed gives plain's ids, see above
RULES = [("rejection", None), ("rejection", 4), ("traversal", 4), ("match", 4)]


@pytest.mark.parametrize(("accept", "known"), by_night(RULES, but=[RULES[0], *RULES[2:]]))
def test_sampling_has_the_target_s_distribution(accept: str, known: int | None) -> None:
    model = tiny("llama", vocab_size=6)
    engine = TorchEngine(model)
    drafter = Eagle(some_head(3, known, seed=1, vocab_size=6), engine)
    assert_has_the_target_s_distribution(model, engine, drafter, "3x2", accept, least_taken=0.2)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    engine = TorchEngine(tiny("llama"))
    with pytest.raises(PairingError, match="hidden states of 32 numbers, and the target has 48"):
        Eagle(some_head(3, hidden_size=32), engine)
    with pytest.raises(PairingError, match="with 99 tokens, and this one has 120"):
        Eagle(some_head(3, vocab_size=99), engine)
    with pytest.raises(PairingError, match="no embedding"):
        Eagle(some_head(3, hidden_size=32, target_hidden_size=48), engine)
    Eagle(some_head(3, hidden_size=32, target_hidden_size=48, own_embedding=True), engine)
    with pytest.raises(PairingError, match="hidden states 0 to 2"):
        Eagle(some_head(3, taps=(0, 1, 3)), engine)
    with pytest.raises(PairingError, match="eagle' needs heads="):
        LLM(tiny("llama"), "eagle")
    wrong = some_head(3, 60)
    assert wrong.token_map is not None
    with pytest.raises(ValueError, match="as wide as the target"):
        some_head(3, 0, hidden_size=32, target_hidden_size=48, own_embedding=True)
    wrong.token_map[-1] = VOCAB
    with pytest.raises(PairingError, match="tokens that the target doesn't have"):
        Eagle(wrong, engine)


@pytest.mark.parametrize("field", [{"num_heads": 3}, {"taps": (0, 1)}, {"draft_vocab_size": 9}, {"head_dim": 7}])
def test_sizes_that_make_no_sense_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"num_kv_heads|EAGLE-1|multiple of 2"):
        some_head(1, **({"known": field["draft_vocab_size"]} if "draft_vocab_size" in field else field))


@pytest.mark.parametrize(
    ("version", "norms", "message"),
    [
        (1, {"norm_output": True}, "EAGLE-1 has no fc_norm"),
        (3, {"fc_norm": True, "norm_before_fc": True}, "exclude each other"),
    ],
)
def test_norms_that_make_no_sense_are_refused(version: int, norms: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        some_head(version, **norms)


def test_a_folder_is_a_drafter(tmp_path: Path) -> None:
    write_eagle(some_head(3, 60), tmp_path, "tiny", about=About(taps=[0, 1, 2]))
    model, params = tiny("llama"), SamplingParams(max_tokens=30)
    for options in ({"drafter": "eagle"}, {}):
        llm = LLM(model, heads=tmp_path, **options)  # type: ignore[arg-type]
        result = llm.generate([some_tokens(9)], params)[0]
        assert result.token_ids == llm.plain().generate([some_tokens(9)], params)[0].token_ids
        assert "eagle" in llm.decoder.drafter.names
