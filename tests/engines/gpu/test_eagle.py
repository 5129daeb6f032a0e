"""An EAGLE head on kernels of our own: its candidates, what goes on, and texts that stay plain's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import decode
from tests.drafters.test_eagle import said_by, some_head
from tests.engines.gpu.test_engine import engine_of
from tests.engines.gpu.triton_here import small
from tests.tiny_models import request, some_tokens
from tokentree.drafters.eagle import Eagle
from tokentree.engines.drafting import GrowsDrafts
from tokentree.engines.gpu.attending import CHUNK
from tokentree.engines.gpu.eagle import WIDTH, TritonEagle
from tokentree.heads.eagle import EagleHead
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "head_dim": 16}
ONE: dict[str, Any] = {"num_hidden_layers": 1}  # of the target: each takes the interpreter as long


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row costs Triton's interpreter as much as the one before: prompts aren't padded to 512."""
    monkeypatch.setattr("tokentree.engines.gpu.eagle.PROMPT", 128)


def head_of(known: int | None = 40, taps: tuple[int, ...] = (0, 1), **options: Any) -> EagleHead:
    return some_head(3, known, **{**SIZES, "taps": taps, **options})


def begun(engine: object, ids: list[int], most: int = 40) -> Sequence:
    seq = request(ids, max_tokens=most)
    engine.prefill(seq)  # type: ignore[attr-defined]
    return seq


@pytest.mark.parametrize(
    "options", [{}, {"known": None}, {"known": 0}, {"norm_before_residual": True, "qkv_bias": True, "fc_bias": True}]
)
def test_candidates_have_the_probabilities_of_the_formulas_and_the_best_go_on(options: dict[str, Any]) -> None:
    sizes, taps = (ONE, (0, 1)) if options else ({}, (0, 1, 2))
    head, engine, model = head_of(taps=taps, **options), engine_of(**sizes), small(**sizes).float().cpu()
    own = engine.head_engine(head)
    assert isinstance(own, TritonEagle)
    texts = [some_tokens(11), some_tokens(4, seed=1)]
    seqs = [begun(engine, ids) for ids in texts]
    depth = 2 if options else 3
    both = own.grow(seqs, depth)
    assert both is not None
    for ids, levels in zip(texts, both, strict=True):
        assert levels.tokens.shape == (depth, WIDTH, WIDTH)
        paths, joint = [list[int]()], np.zeros(1)
        for level, (tokens, log_probs) in enumerate(zip(levels.tokens, levels.log_probs, strict=True)):
            chosen = levels.chosen[level]
            for place in (0, len(paths) - 1):
                expected = said_by(head, model, ids, paths[place])
                got = torch.tensor(log_probs[place])
                assert float((got - expected[tokens[place]]).abs().max()) < 0.12
                assert got.tolist() == sorted(got.tolist(), reverse=True)
                assert float(got[0]) > float(expected.max()) - 0.12
            scores = (joint[:, None] + log_probs[: len(paths)]).flatten()
            best = np.sort(scores)[::-1][:WIDTH]
            if level == depth - 1:
                break
            assert np.allclose(scores[chosen], best, atol=1e-5)
            paths = [[*paths[c // WIDTH], int(tokens.flatten()[c])] for c in chosen]
            joint = scores[chosen]


def test_a_draft_is_the_same_in_a_batch_and_behind_any_history() -> None:
    engine, head = engine_of(**ONE), head_of()
    own = engine.head_engine(head)
    assert isinstance(own, GrowsDrafts)
    ids = some_tokens(45)
    alone = own.grow([begun(engine, ids)], 3)
    other, again = begun(engine, some_tokens(7, seed=2)), begun(engine, ids[:-6])
    for count in (1, 3, 2):  # the text grows, and its head's rows with it
        own.grow([again], 2)
        tree = TokenTree.chain(again.tokens[-1], ids[len(again.tokens) : len(again.tokens) + count - 1])
        engine.verify([again], [tree])
        engine.commit([again], [list(range(count))])
        again.tokens.extend(ids[len(again.tokens) : len(again.tokens) + count])
    assert again.tokens == ids
    batch = own.grow([other, again], 3)
    assert alone is not None
    assert batch is not None
    for name in ("tokens", "log_probs"):
        assert np.array_equal(getattr(alone[0], name), getattr(batch[1], name))
    assert np.array_equal(alone[0].chosen[:-1], batch[1].chosen[:-1])


@pytest.mark.nightly
def test_a_draft_is_the_same_where_a_program_has_all_chunks_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, head = engine_of(**ONE), head_of()
    engines = []
    for items in (512, 9):  # more than that are needed for the levels of one text
        monkeypatch.setattr("tokentree.engines.gpu.eagle.ITEMS", items)
        engines.append(engine.head_engine(head))
    seq, drafts = begun(engine, some_tokens(140)), []
    for own in engines:
        assert isinstance(own, GrowsDrafts)
        drafts.append(own.grow([seq], 3))
    one, other = drafts
    assert one is not None
    assert other is not None
    assert np.array_equal(one[0].tokens, other[0].tokens)
    assert np.array_equal(one[0].log_probs, other[0].log_probs)


@pytest.mark.nightly
def test_where_pages_are_short_nothing_is_drafted_and_texts_go_on_up_to_the_context() -> None:
    engine = engine_of(max_position_embeddings=CHUNK + 9, **ONE)  # a text goes on from a page to the next
    drafter = Eagle(head_of(), engine)
    own = drafter._engine
    assert isinstance(own, TritonEagle)
    seq = begun(engine, some_tokens(20))
    free, own._pages._free = own._pages._free, type(own._pages._free)()
    assert own.grow([seq], 3) is None
    own._pages._free = free
    assert own.grow([seq], 3) is not None
    ids = some_tokens(engine.context - 6)
    expected = decode(engine, [request(ids, context=engine.context)])[0]
    assert len(expected) == 6
    again = request(ids, context=engine.context)
    assert decode(engine, [again], drafter, "dynamic:nodes=30,depth=9,top_k=8")[0] == expected


def test_texts_are_plain_s_alone_and_in_a_batch() -> None:
    engine = engine_of(**ONE)
    drafter = Eagle(head_of(), engine)

    def texts() -> list[Sequence]:
        return [request(ids, max_tokens=3) for ids in ([5, 6, 7, 8] * 3, some_tokens(20))]

    expected = [decode(engine, [seq])[0] for seq in texts()]
    assert decode(engine, texts(), drafter) == expected
    assert decode(engine, texts()[:1], drafter) == expected[:1]
    engine.check()


def test_rejection_draws_level_by_level_in_torch() -> None:
    engine = engine_of(**ONE)
    seq = request(some_tokens(9), max_tokens=4, temperature=1.0, seed=1)
    assert len(decode(engine, [seq], Eagle(head_of(), engine), accept="rejection")[0]) == 4
    engine.check()


def test_heads_without_kernels_draft_in_torch() -> None:
    engine = engine_of()
    assert type(engine.head_engine(some_head(1, None, 64))) is not TritonEagle
    assert type(engine.head_engine(head_of(fc_norm=True))) is not TritonEagle
    assert type(engine.head_engine(head_of(norm_output=True))) is not TritonEagle
