"""Linear layers on packed weights, against plain products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from tests.conftest import each_two
from tokentree.engines.cpu.linear import OddLinear, OneDNNLinear, PackedLinear, packed_linear
from tokentree.engines.cpu.quantized import GROUP, Groups, QuantizedLinear
from tokentree.kernels.tile import BLOCK

Layer = PackedLinear | QuantizedLinear
Kind = Callable[[torch.Tensor, torch.Tensor | None], Layer]


def in_4_bits(weight: torch.Tensor) -> Groups:
    """From the least value of each 32 to the largest."""
    parts = nn.functional.pad(weight.float(), (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
    least = parts.amin(-1).half()
    scales = ((parts.amax(-1) - least.float()).clamp(min=1e-3) / 15).half()
    numbers = ((parts - least.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 15)
    return Groups(numbers.to(torch.uint8), scales, least, 4)


def of_4_bits(weight: torch.Tensor, bias: torch.Tensor | None) -> QuantizedLinear:
    return QuantizedLinear(in_4_bits(weight), bias, num_inputs=weight.shape[1])


def of_8_bits(weight: torch.Tensor, bias: torch.Tensor | None) -> QuantizedLinear:
    return QuantizedLinear(weight, bias)


KINDS = [PackedLinear, of_8_bits, of_4_bits]
SIZES = [(1, 8), (32, 4), (32, 64), (64, 68), (96, 128), (1000, 36), (1056, 36), (2048, 576)]  # outputs, inputs


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def in_groups(rows: torch.Tensor, group: int) -> torch.Tensor:
    """float32[rows, groups, group], zeros at the end."""
    padded = nn.functional.pad(rows.float(), (0, -rows.shape[1] % group))
    return padded.view(len(rows), -1, group)


def inputs_of(rows: torch.Tensor, group: int) -> torch.Tensor:
    """float64: what 8 bits make of ``rows``: steps of the largest absolute value of a group / 127; what lies between
    two steps goes up."""
    parts = in_groups(rows, group)
    top = parts.abs().amax(-1, keepdim=True)
    steps = torch.where(top > 0, parts * (127 / top) + 128.5, 128.0).floor() - 128
    return (steps.double() * (top / 127).double()).flatten(1)[:, : rows.shape[1]]


@pytest.mark.parametrize(
    ("sizes", "rows", "threads"), each_two(SIZES, [1, 2, 11, 12, 13, 40], [1, 2, 3]), indirect=["threads"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_it_stands_for(kind: Kind, sizes: tuple[int, int], rows: int, threads: int) -> None:
    outputs, inputs = sizes
    weight, x, bias = numbers(outputs, inputs), numbers(rows, inputs, seed=1), numbers(outputs, seed=2)
    layer, small, large = kind(weight, bias), x.double(), weight.double()
    if isinstance(layer, QuantizedLinear):
        groups = in_4_bits(weight) if layer.bits == 4 else Groups.of(weight)
        small, large = inputs_of(x, layer.group), groups.values().double()[:, :inputs]
    exact = small @ large.t() + bias.double()
    got = layer(x[None])
    assert got.shape == (1, rows, outputs)
    assert got.dtype is torch.bfloat16
    # half a unit in the last of bfloat16's 8 bits, and what float32 lost on the way
    assert ((got[0].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5 * inputs**0.5).all()


@pytest.mark.parametrize("inputs", [68, 1536])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind: Kind, inputs: int, threads: int) -> None:
    layer, x = kind(numbers(256, inputs), numbers(256, seed=3)), numbers(64, inputs, seed=1)
    together = layer(x)
    for first, last in [(0, 1), (3, 5), (0, 12), (5, 18), (7, 32), (1, 64)]:
        assert torch.equal(layer(x[first:last]), together[first:last])
    assert torch.equal(layer(x.flip(0)), together.flip(0))


@pytest.mark.parametrize("inputs", [1, 37, 373])
def test_an_odd_number_of_inputs_is_packed_on_any_cpu(inputs: int) -> None:
    weight, bias, x = numbers(96, inputs), numbers(96, seed=3), numbers(40, inputs, seed=1)
    layer = packed_linear(weight, bias)
    assert isinstance(layer, OddLinear)
    together, exact = layer(x), x.double() @ weight.double().t() + bias.double()
    assert ((together.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5 * inputs**0.5).all()
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), together)
    assert isinstance(packed_linear(numbers(96, 36), None), PackedLinear)


@pytest.mark.parametrize("kind", [PackedLinear, QuantizedLinear])
def test_a_gated_row_has_the_same_bits_in_any_company(kind: type[Layer]) -> None:
    gates, factors, rows = numbers(64, 96), numbers(64, 96, seed=1), numbers(40, 96, seed=2)
    blocks = torch.stack([part.view(-1, BLOCK, 96) for part in (gates, factors)], 1).flatten(0, 2)
    layer = kind(blocks, None, gated=True)
    together = layer(rows)
    assert torch.equal(torch.cat([layer(row[None]) for row in rows]), together)
    for count in (7, 16, 17):  # `GATED_ROWS`, and others
        assert torch.equal(layer(rows[:count]), together[:count])
    own, other = kind(gates, None)(rows), kind(factors, None)(rows)
    assert torch.allclose(together.float(), (nn.functional.silu(own) * other).float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_does_not_change_the_bits(kind: Kind) -> None:
    layer, x, before = kind(numbers(2048, 512), None), numbers(5, 512, seed=1), torch.get_num_threads()
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(layer(x))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", KINDS)
def test_without_torch_s_pool_one_thread_does_it_all(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = kind(numbers(2048, 512), None), numbers(5, 512, seed=1)
    expected = layer(x)
    monkeypatch.setattr("tokentree.kernels.threads._pool", lambda: None)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_contiguous_are_read_as_they_are(kind: Kind) -> None:
    layer, x = kind(numbers(64, 32), None), numbers(32, 9, seed=1).t()
    assert torch.equal(layer(x), layer(x.clone()))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_outputs_of_nothing_but_zeros_give_the_bias(kind: Kind) -> None:
    weight, bias = numbers(64, 32), numbers(64, seed=3)
    weight[5] = 0
    assert torch.equal(kind(weight, bias)(torch.zeros(2, 32, dtype=torch.bfloat16))[1], bias)
    assert float(kind(weight, bias)(numbers(1, 32))[0, 5]) == float(bias[5])


def test_weights_that_cannot_be_packed_are_told_apart() -> None:
    assert PackedLinear.fits(numbers(65, 4))
    assert not PackedLinear.fits(numbers(64, 3))
    assert QuantizedLinear.fits(numbers(64, 3))
    for kind in (PackedLinear, QuantizedLinear):
        assert not kind.fits(numbers(64, 4).float())
    assert OneDNNLinear.fits(numbers(65, 3).float())
    assert not OneDNNLinear.fits(numbers(65, 3).double())


def test_8_bits_are_as_near_as_256_steps_can_be() -> None:
    weight = numbers(96, 3 * GROUP + 8)
    weight[1], weight[2, :GROUP] = 0, 7.25
    groups = Groups.of(weight)
    assert groups.numbers.shape == (96, 4, GROUP)
    off = (groups.values()[:, : weight.shape[1]] - weight.float()).abs()
    steps = groups.scales.float().repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    assert (off <= 0.5001 * steps).all()
    spread = weight.float().unflatten(1, (-1, 8)).amax(-1).amax() - weight.float().amin()
    assert groups.scales.float().max() <= float(spread) / 254


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_width_or_type_are_refused(kind: Kind) -> None:
    layer = kind(numbers(64, 32), None)
    for x in (numbers(3, 36), numbers(3, 32).float()):
        with pytest.raises(ValueError, match="bfloat16 rows of 32 inputs"):
            layer(x)


def test_a_large_weight_is_quantised_in_parts_like_a_small_one() -> None:
    weight, x = numbers(8192 + 64, 32), numbers(3, 32, seed=1)
    parts = torch.cat([of_8_bits(part, None)(x) for part in (weight[:4096], weight[4096:])], 1)
    assert torch.equal(of_8_bits(weight, None)(x), parts)
