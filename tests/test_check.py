"""`check`: identical, tie or WRONG. The engine's logits are tampered with to see each verdict."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import pytest
import torch

from tests.tiny_models import tiny
from tokentree.check import check
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.output import TargetOutput
from tokentree.errors import OptionError
from tokentree.llm import LLM
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import TokenTree

PROMPTS = [[5, 9, 7, 5, 9], [11, 30, 11, 30]]
Tamper = Callable[[torch.Tensor, SequenceOf[TokenTree]], torch.Tensor]


class Forks(Drafter):
    """Two children under every root, whatever the text, so that each tree forks."""

    name = "branches"

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = []
        for seq in seqs:
            draft = Draft(seq.tokens[-1])
            if seq.room > 1:
                draft.add(0, 3, -0.5, 0)
                draft.add(0, 4, -0.6, 1)
            drafts.append(draft)
        return drafts


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny("llama"), drafter="ngram", shape="2x1x1")


def _tampered(monkeypatch: pytest.MonkeyPatch, tamper: Tamper) -> None:
    honest = KVEngine.verify

    def verify(
        self: KVEngine,
        seqs: SequenceOf[Sequence],
        trees: SequenceOf[TokenTree],
        firsts: SequenceOf[int] | None = None,
        reading: SequenceOf[tuple[Sequence, int]] = (),
    ) -> TargetOutput:
        out = honest(self, seqs, trees, firsts, reading)
        return TargetOutput(tamper(out.all_logits.clone(), trees), out.starts, out.firsts, out.seconds)

    monkeypatch.setattr(KVEngine, "verify", verify)


def test_an_untouched_engine_is_identical(llm: LLM) -> None:
    seen = []
    verdicts = check(llm, PROMPTS, 24, lambda: seen.append(1))
    assert [v.status for v in verdicts] == ["identical", "identical"]
    assert len(seen) == 2
    assert all(v.tokens > 2 and v.first_difference is None and not v.gaps for v in verdicts)


def test_wrong_logits_in_trees_alone_are_wrong(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree's logits are rolled by one token, plain's and those of chain blocks are not: no noise explains it."""

    def tamper(logits: torch.Tensor, trees: SequenceOf[TokenTree]) -> torch.Tensor:
        return logits.roll(1, -1) if not all(tree.is_chain for tree in trees) else logits

    forked = llm.using(Forks(), "2")
    _tampered(monkeypatch, tamper)
    verdict = check(forked, PROMPTS[:1], 12)[0]
    assert verdict.status == "WRONG"
    assert verdict.first_difference == 0
    assert verdict.noise == 0
    assert max(verdict.gaps) > 0


def test_a_difference_within_the_noise_of_plain_blocks_is_a_tie(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any forward of several rows, tree or not, lifts the runner-up of each row above the best token by a hair."""

    def tamper(logits: torch.Tensor, trees: SequenceOf[TokenTree]) -> torch.Tensor:
        if len(logits) > 1:
            best = logits.topk(2, -1)
            swap = best.values[:, :1] + 1e-4
            logits = logits.scatter(-1, best.indices[:, 1:], swap)
        return logits

    forked = llm.using(Forks(), "2")
    _tampered(monkeypatch, tamper)
    verdict = check(forked, PROMPTS[:1], 12)[0]
    assert verdict.status == "tie"
    assert verdict.noise is not None
    assert verdict.noise > 0
    assert verdict.gaps
    assert max(verdict.gaps) <= 2 * verdict.noise


def test_a_lossy_rule_is_not_checked(llm: LLM) -> None:
    with pytest.raises(OptionError, match="lossy"):
        check(llm.using("ngram", "2x1", accept="best_path"), PROMPTS)
