"""Products on packed weights, against plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tokentree.engines import kernels

pytestmark = pytest.mark.skipif(not kernels.supported(), reason="this CPU has no bfloat16 dot products")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(("outputs", "inputs"), [(32, 2), (32, 64), (64, 66), (96, 128), (1056, 34), (2048, 576)])
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 40])
def test_a_product_is_the_sum_that_it_stands_for(outputs: int, inputs: int, rows: int, threads: int) -> None:
    weight, x, bias = numbers(outputs, inputs), numbers(rows, inputs, seed=1), numbers(outputs, seed=2).float()
    exact = x.double() @ weight.double().t() + bias
    got = kernels.product(x, kernels.pack(weight), bias)
    assert got.shape == (rows, outputs)
    assert got.dtype is torch.bfloat16
    # half a unit in the last of bfloat16's 8 bits, and float32's error on the way
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5 * inputs**0.5).all()


@pytest.mark.parametrize("inputs", [66, 1536])
def test_a_row_has_the_same_bits_in_any_company(inputs: int, threads: int) -> None:
    packed, x, zeros = kernels.pack(numbers(256, inputs)), numbers(64, inputs, seed=1), torch.zeros(256)
    together = kernels.product(x, packed, zeros)
    for first, last in [(0, 1), (3, 5), (0, 12), (5, 18), (7, 32), (1, 64)]:
        assert torch.equal(kernels.product(x[first:last], packed, zeros), together[first:last])
    assert torch.equal(kernels.product(x.flip(0), packed, zeros), together.flip(0))


def test_the_number_of_threads_does_not_change_the_bits() -> None:
    packed, x, before = kernels.pack(numbers(2048, 512)), numbers(5, 512, seed=1), torch.get_num_threads()
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(kernels.product(x, packed, torch.zeros(2048)))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_that_are_not_contiguous_are_read_as_they_are() -> None:
    packed, x = kernels.pack(numbers(64, 32)), numbers(32, 9, seed=1).t()
    assert torch.equal(kernels.product(x, packed, torch.zeros(64)), kernels.product(x.clone(), packed, torch.zeros(64)))


def test_weights_that_cannot_be_packed_are_told_apart() -> None:
    assert kernels.fits(numbers(64, 2))
    for shape in ((65, 2), (64, 3)):
        assert not kernels.fits(numbers(*shape))
    assert not kernels.fits(numbers(64, 2).float())


def test_rows_of_another_width_or_type_are_refused() -> None:
    packed = kernels.pack(numbers(64, 32))
    for x in (numbers(3, 34), numbers(3, 32).float()):
        with pytest.raises(ValueError, match="32 inputs"):
            kernels.product(x, packed, torch.zeros(64))
