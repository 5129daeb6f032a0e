"""How near an engine must come to its model, when it is made."""

from typing import Any

import pytest
import torch

from tests.tiny_models import tiny
from tokentree.engines.self_check import compare
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError

NOISE = torch.randn(3, 6, 400, generator=torch.Generator().manual_seed(0))
EXACT = NOISE[0]  # its spread is 1


def accepted(rounding: float, from_own: float, from_exact: float, few_bits: bool = False) -> bool:
    """Of a model whose logits are ``rounding`` off the exact ones; the engine's are so far off on the way from these to
    the exact ones, and so far beside that."""
    own = EXACT + rounding * NOISE[1]
    got = EXACT + (rounding - from_own) * NOISE[1] + from_exact * NOISE[2]
    error, allowed, spread = compare({"logits": own, "exact": EXACT}, got, few_bits)
    assert spread == pytest.approx((1 + rounding**2) ** 0.5, rel=0.05)
    return error <= allowed


def test_an_engine_may_be_off_by_twice_the_model_s_own_rounding() -> None:
    assert accepted(0.03, 0.0, 0.0)
    assert accepted(0.03, 0.03, 0.05)
    assert not accepted(0.03, 0.03, 0.07)


def test_but_by_no_more_than_a_tenth_of_the_spread_from_either() -> None:
    assert accepted(0.09, 0.09, 0.09)  # of the exact ones
    assert not accepted(0.09, 0.09, 0.15)
    assert accepted(0.3, 0.0, 0.05)  # of the model's own, which are further off than that
    assert not accepted(0.3, 0.2, 0.2)
    assert not accepted(0.3, 0.0, 0.8)


def test_without_the_exact_ones_the_model_s_own_decide() -> None:
    for dtype, off, right in ((torch.float32, 5e-4, True), (torch.float32, 5e-3, False), (torch.bfloat16, 0.05, True)):
        error, allowed, _ = compare({"logits": EXACT.to(dtype)}, EXACT + off * NOISE[1], few_bits=False)
        assert (error <= allowed) is right


def test_what_all_logits_of_a_row_have_in_common_counts_for_nothing() -> None:
    own, shift = {"logits": EXACT + 0.03 * NOISE[1], "exact": EXACT}, torch.arange(6.0)[:, None] - 2
    for got, right in ((EXACT + shift, True), (EXACT + shift * (torch.arange(400) < 200), False)):
        error, allowed, _ = compare(own, got, few_bits=False)
        assert (error <= allowed) is right
    shifted = {"logits": own["logits"] + 100 * shift, "exact": EXACT + 100 * shift}
    assert compare(shifted, EXACT, False) == pytest.approx(compare(own, EXACT, False), rel=1e-3, abs=1e-4)


def test_a_model_that_fails_by_itself_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("llama")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("expected two matrices\n of one type")

    monkeypatch.setattr(type(model.model.norm), "forward", fail)
    with pytest.raises(ModelError, match="LlamaForCausalLM can't read a text alone: expected two matrices of one type"):
        TorchEngine(model)
