"""The largest logits, against a full search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokentree.kernels.topk import greedy, top_logits, top_logprobs


@pytest.mark.parametrize("vocab", [8, 9, 31, 32, 50, 64, 100, 448, 577, 640, 1000, 4096, 10_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [1, 8])
def test_the_top_logits_are_those_of_a_full_search(vocab: int, dtype: torch.dtype, k: int) -> None:
    logits = torch.randn([20, vocab], generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[5, : vocab // 2] = -math.inf
    logits[6] -= 100
    logits[7] = logits[7].round()  # ties, between 0 and -0 too
    logits[8] = 0
    values, ids = top_logits(logits, k)
    best = logits.sort(dim=-1, descending=True, stable=True)
    assert (values == best.values[:, :k].float().numpy()).all()
    assert (ids == best.indices[:, :k].numpy()).all()
    assert [greedy(row) for row in logits] == logits.argmax(-1).tolist()


def test_the_top_logits_may_all_lie_in_one_column_or_in_one_row_of_them() -> None:
    logits = torch.zeros(3, 645)
    logits[0, 3:640:20] = torch.arange(32.0) + 1  # twenty columns of 32: all in the fourth
    logits[1, 100:110] = torch.arange(10.0) + 1
    logits[2, 636:645] = torch.arange(9.0) + 1  # the last five lie in no column
    assert top_logits(logits, 8)[1].tolist() == [
        [623 - 20 * i for i in range(8)], [109 - i for i in range(8)], [644 - i for i in range(8)],
    ]  # fmt: skip


def test_of_equal_logits_the_lowest_ids_come_first_wherever_their_columns_lie() -> None:
    logits = torch.zeros(1, 640)
    logits[0, [5, 13, 204, 631]] = 2.0  # columns 5, 13, 4 and 11
    assert top_logits(logits, 3)[1].tolist() == [[5, 13, 204]]
    assert greedy(logits[0]) == 5


def test_rows_that_are_not_contiguous_are_read_as_they_are() -> None:
    logits = torch.randn([300, 7], generator=torch.Generator().manual_seed(0)).t()
    assert (top_logits(logits, 4)[1] == logits.topk(4, dim=-1).indices.numpy()).all()


@pytest.mark.parametrize("vocab", [8, 50, 1000, 1024, 4096, 10_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_a_softmax(vocab: int, dtype: torch.dtype) -> None:
    logits = (5 * torch.randn([7, vocab], generator=torch.Generator().manual_seed(vocab)) + 40).to(dtype)
    logits[3, 1:] = -math.inf
    for divisors in (1.0, 0.7, np.linspace(0.5, 2, 7, dtype=np.float32)):
        columns = torch.as_tensor(divisors, dtype=torch.float32).expand(7)[:, None]
        expected = (logits.float() / columns).log_softmax(-1)
        logprobs, ids = top_logprobs(logits, 5, divisors)
        assert (ids == top_logits(logits, 5)[1]).all()
        assert np.allclose(logprobs, expected.gather(1, torch.from_numpy(ids)).numpy(), atol=2e-5)
