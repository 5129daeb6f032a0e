"""Kernels in Triton against torch in float64, and their bits in any company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, silu

from tests.engines.gpu.triton_here import DEVICE
from tokentree.engines.gpu import products, rows
from tokentree.engines.gpu.attending import CHUNK, FIELDS, attention_kernel, long_attention_kernel
from tokentree.engines.gpu.inputs import MOST_ITEMS, Inputs, Piece
from tokentree.engines.gpu.pages import Pages, Text
from tokentree.engines.gpu.quantized import GROUP, Int8, linear
from tokentree.engines.gpu.steady import Steady, expert_product
from tokentree.engines.gpu.tiles import stage_nbytes, tile
from tokentree.tree import TokenTree

WIDTH, COLUMNS = 64, 48
WAYS: list[dict[str, Any]] = [
    {"SWAP": False, "TILE": 64, "COLUMNS": 16, "INPUTS": 32},
    {"SWAP": True, "TILE": 16, "COLUMNS": 64, "INPUTS": 16},
    {"SWAP": False, "TILE": 128, "COLUMNS": 32, "INPUTS": 32},
]


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)


def near(got: torch.Tensor, expected: torch.Tensor, bits: int = 7) -> None:
    """Within what rounding to bfloat16 makes of numbers of that size."""
    assert not got.isnan().any()
    error = float((got.double() - expected).abs().max())
    assert error <= 2.0**-bits * float(expected.abs().max())


def grid(count: int, columns: int, way: dict[str, Any]) -> tuple[int, int]:
    return -(-count // way["TILE"]), -(-columns // way["COLUMNS"])


def output(x: torch.Tensor, w: torch.Tensor, way: dict[str, Any], parts: int, **options: Any) -> torch.Tensor:
    out = torch.full((len(x), len(w)), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    given = {"BIAS": False, "CAP": False, "bias": w, "cap": 0.0, **options}
    bias, cap = given.pop("bias"), given.pop("cap")
    products.output_kernel[grid(len(x), len(w), way)](
        x, w, bias, out, len(x), len(w), x.shape[1], cap, PARTS=parts, **given, **way
    )
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_product_is_torch_s_and_its_rows_have_the_same_bits_in_any_number_and_tile(
    way: dict[str, Any], parts: int
) -> None:  # fmt: skip
    x, w, bias = some(70, WIDTH), some(COLUMNS, WIDTH, seed=1), some(COLUMNS, seed=2)
    count = min(70, 70 if not way["SWAP"] else 16)
    got = output(x[:count], w, way, parts, BIAS=True, bias=bias)
    near(got, x[:count].double() @ w.double().T + bias.double())
    for alone in (0, 5, count - 1):
        assert torch.equal(output(x[alone : alone + 1].clone(), w, WAYS[0], parts, BIAS=True, bias=bias)[0], got[alone])


def test_logits_are_capped() -> None:
    x, w = some(3, WIDTH), some(COLUMNS, WIDTH, seed=1)
    expected = 3 * torch.tanh(x.double() @ w.double().T / 3)
    near(output(x, w, WAYS[0], 1, CAP=True, cap=3.0), expected)


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("gelu_too", [False, True])
def test_gated_products_are_torch_s(way: dict[str, Any], gelu_too: bool) -> None:
    x, w = some(5, WIDTH), some(COLUMNS, WIDTH, seed=1)
    out = torch.full((5, COLUMNS // 2), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    products.gated_kernel[grid(5, COLUMNS, way)](x, w, out, 5, COLUMNS, WIDTH, GELU=gelu_too, **way)
    y = x.double() @ w.double().T
    act = gelu(y[:, ::2], approximate="tanh") if gelu_too else silu(y[:, ::2])
    near(out, act * y[:, 1::2], bits=6)


@pytest.mark.parametrize("way", WAYS)
def test_a_residual_has_the_bits_of_one_program_when_parts_have_their_own(way: dict[str, Any]) -> None:
    x, w, before, bias = some(9, WIDTH), some(COLUMNS, WIDTH, seed=1), some(9, COLUMNS, seed=2), some(COLUMNS, seed=3)
    partial = torch.full((2, 9, COLUMNS), float("nan"), device=DEVICE)
    counters = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    got = []
    for spread in (False, True, True):
        h = before.clone()
        products.residual_kernel[(*grid(9, COLUMNS, way), 2 if spread else 1)](
            x, w, bias, h, partial, counters, 9, COLUMNS, WIDTH, BIAS=True, PARTS=2, SPREAD=spread, **way
        )
        got.append(h)
    near(got[0], before.double() + x.double() @ w.double().T + bias.double())
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])
    assert not counters.any()


# -- weights of 8 bits -------------------------------------------------------------------------------------------------

WIDE = 2 * GROUP  # inputs
WAYS_IN_8_BITS: list[dict[str, Any]] = [
    {"SWAP": True, "TILE": 16, "COLUMNS": 64, "INPUTS": GROUP},
    {"SWAP": True, "TILE": 32, "COLUMNS": 128, "INPUTS": 2 * GROUP},
    {"SWAP": True, "TILE": 128, "COLUMNS": 64, "INPUTS": GROUP},
]


def test_codes_are_the_nearest_and_scales_fit_the_greatest_weight_of_each_group() -> None:
    w = some(COLUMNS, 3 * GROUP) * torch.logspace(-3, 3, COLUMNS).bfloat16().to(DEVICE)[:, None]
    w[3], w[4, :GROUP], w[5, 7] = 0.0, 1e-38, 3e38
    made = Int8.of(w)
    assert made.scales.shape == (3, COLUMNS)
    assert torch.equal(made.scales, made.scales.bfloat16().float())
    assert int(made.codes.min()) >= -127
    error = (made.codes.double().unflatten(1, (-1, GROUP)) * made.scales.double().T[..., None]).flatten(1) - w.double()
    assert bool((error.abs() <= made.scales.double().T.repeat_interleave(GROUP, 1) / 2).all())
    most = w.double().abs().unflatten(1, (-1, GROUP)).amax(2)[6:]
    assert bool((made.scales.double().T[6:] <= most / 127 * (1 + 2.0**-7)).all())
    assert not made[:][3].any()
    assert made[:].isfinite().all()
    assert torch.equal(made[torch.tensor([5, 0])], made[:][[5, 0]])
    w[0, 0] = float("nan")
    assert Int8.of(w)[:1].isnan().any()  # and so an engine refuses the model


def test_torch_s_products_with_8_bits_are_those_of_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentree.engines.gpu.quantized.AT_ONCE", 20)
    x, made, bias = some(3, WIDE), Int8.of(some(COLUMNS, WIDE, seed=1)), some(COLUMNS, seed=2)
    near(linear(x, made, bias), x.double() @ made[:].double().T + bias.double())


@pytest.mark.parametrize("way", WAYS_IN_8_BITS)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_product_in_8_bits_is_that_of_its_values_and_its_rows_have_the_same_bits_in_any_number_and_tile(
    way: dict[str, Any], parts: int
) -> None:  # fmt: skip
    way = {**way, "INPUTS": min(way["INPUTS"], WIDE // parts)}
    x, w, bias = some(40, WIDE), Int8.of(some(COLUMNS, WIDE, seed=1)), some(COLUMNS, seed=2)
    told: dict[str, Any] = {"BIAS": True, "bias": bias, "scales": w.scales}
    got = output(x, w.codes, way, parts, **told)
    near(got, x.double() @ w[:].double().T + bias.double())
    for alone in (0, 5, 39):
        assert torch.equal(
            output(x[alone : alone + 1].clone(), w.codes, WAYS_IN_8_BITS[0], parts, **told)[0], got[alone]
        )  # fmt: skip


@pytest.mark.parametrize("way", WAYS_IN_8_BITS[:2])
def test_gated_products_in_8_bits_are_those_of_their_values(way: dict[str, Any]) -> None:
    x, w = some(5, WIDE), Int8.of(some(COLUMNS, WIDE, seed=1))
    out = torch.full((5, COLUMNS // 2), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    products.gated_kernel[grid(5, COLUMNS, way)](
        x, w.codes, out, 5, COLUMNS, WIDE, GELU=False, scales=w.scales, **way
    )  # fmt: skip
    y = x.double() @ w[:].double().T
    near(out, silu(y[:, ::2]) * y[:, 1::2], bits=6)


def test_a_residual_in_8_bits_has_the_bits_of_one_program_when_parts_have_their_own() -> None:
    x, w, before = some(9, WIDE), Int8.of(some(COLUMNS, WIDE, seed=1)), some(9, COLUMNS, seed=2)
    partial = torch.full((2, 9, COLUMNS), float("nan"), device=DEVICE)
    counters, way, got = torch.zeros(16, dtype=torch.int32, device=DEVICE), WAYS_IN_8_BITS[0], []
    for spread in (False, True):
        h = before.clone()
        products.residual_kernel[(*grid(9, COLUMNS, way), 2 if spread else 1)](
            x, w.codes, w.codes, h, partial, counters, 9, COLUMNS, WIDE, BIAS=False, PARTS=2, SPREAD=spread,
            scales=w.scales, **way,
        )  # fmt: skip
        got.append(h)
    near(got[0], before.double() + x.double() @ w[:].double().T)
    assert torch.equal(got[0], got[1])


def test_norms_are_torch_s() -> None:
    h, x, gain = some(4, 60), some(4, 60, seed=1), torch.rand(60).to(DEVICE)

    def norm(y: torch.Tensor) -> torch.Tensor:
        return y.double() * (y.double().square().mean(1, keepdim=True) + 1e-5).rsqrt() * gain.double()

    out = torch.empty_like(h)
    rows.norm_kernel[(4,)](h, gain, out, 60, 1e-5, BLOCK=64)
    near(out, norm(h))
    expected = h.double() + norm(x)
    rows.add_norm_kernel[(4,)](h, x, gain, 60, 1e-5, BLOCK=64)
    near(h, expected)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the row that has one
@pytest.mark.parametrize("vocab", [50, 4096, 30_001])
def test_the_most_probable_tokens_are_found_lowest_ids_first(vocab: int) -> None:
    logits, blocks = some(3, vocab), -(-vocab // rows.BLOCK)
    logits[1, 7] = logits[1, 11] = 9.0
    logits[2, vocab - 1] = float("nan")
    sums = torch.empty(3, blocks, 2, device=DEVICE)
    found = torch.empty(3, rows.BEST, rows.BEST, dtype=torch.int64, device=DEVICE)
    out = torch.empty(3, 2 * rows.BEST + 1, dtype=torch.int32, device=DEVICE)
    sizes = {"BLOCKS": max(2, 1 << (blocks - 1).bit_length()), "BEST": rows.BEST}
    rows.block_sums_kernel[(3, blocks)](logits, sums, vocab, blocks, BLOCK=rows.BLOCK)
    rows.best_of_block_kernel[(3, rows.BEST)](logits, sums, found, vocab, blocks, BLOCK=rows.BLOCK, **sizes)
    rows.best_kernel[(3,)](logits, found, sums, out, vocab, blocks, **sizes)
    values = out[:, rows.BEST : 2 * rows.BEST].contiguous().view(torch.float32)
    assert torch.equal(values[:2], logits[:2].float().topk(rows.BEST).values)
    assert torch.equal(logits[:2].float().gather(1, out[:2, : rows.BEST].long()), values[:2])
    assert out[1, :2].tolist() == [7, 11]
    assert out[0, 0] == logits[0].argmax()
    assert out[2, 0] == vocab - 1
    assert values[2, 0].isnan()
    got = out[:2, -1:].contiguous().view(torch.float32)
    assert torch.allclose(got, logits[:2].float().logsumexp(1, keepdim=True), atol=1e-4)


# -- attention ---------------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD, PAGES = 4, 2, 16, 12


class Attention:
    """Queries, and pages of keys and values, of random numbers."""

    def __init__(self) -> None:
        self.pages = Pages(1, KV_HEADS, HEAD, PAGES, 4, 8, DEVICE)
        self.pages.keys.copy_(some(*self.pages.keys.shape, seed=1))
        self.pages.values.copy_(some(*self.pages.values.shape, seed=2))
        items = MOST_ITEMS * KV_HEADS * 16
        self.sums = torch.zeros(items, HEAD, device=DEVICE)
        self.bests, self.totals = torch.zeros(items, device=DEVICE), torch.zeros(items, device=DEVICE)
        self.counters = torch.zeros(256, dtype=torch.int32, device=DEVICE)

    def text(self, length: int) -> Text:
        text = self.pages.open()
        self.pages.reserve(text, length + 64)
        text.length = length
        return text

    def __call__(
        self, q: torch.Tensor, pieces: list[Piece], long: bool = False, window: int = 0, cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        inputs = Inputs(64, DEVICE)
        assert inputs.fill(pieces, np.zeros((0, 2), np.int64), HEADS // KV_HEADS)
        out, x = torch.full_like(q, float("nan")), inputs.device
        given = q, self.pages.keys[0], self.pages.values[0], self.pages.tables, x["tails"], x["firsts"], x["positions"]
        sizes = self.bests if sinks is None else sinks, HEADS, KV_HEADS, self.pages.tables.shape[1], HEAD**-0.5, cap
        options = {
            "DEPTH": inputs.depth, "GROUP": HEADS // KV_HEADS, "HEAD": HEAD, "CHUNK": CHUNK, "WINDOW": window,
            "CAP": cap > 0, "SINKS": sinks is not None,
        }  # fmt: skip
        if long:
            long_attention_kernel[(64, KV_HEADS)](*given, x["tiles"], x["num_tiles"], out, *sizes, **options)
        else:
            attention_kernel[(3, KV_HEADS)](
                *given, x["items"], x["num_items"], self.sums, self.bests, self.totals, self.counters, out, *sizes,
                FIELDS=FIELDS, **options,
            )  # fmt: skip
            assert not self.counters.any()
        return out

    def expected(
        self, q: torch.Tensor, text: Text, rows: list[int], window: int = 0, cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Of one query [heads, head size] whose positions lie in these rows of the text, in float64."""
        slots = torch.from_numpy(text.slots(np.array(rows)))
        keys, values = (
            stored[0].transpose(1, 2).reshape(-1, KV_HEADS, HEAD)[slots].double().repeat_interleave(2, 1)
            for stored in (self.pages.keys.cpu(), self.pages.values.cpu())
        )
        scores = torch.einsum("hd,phd->hp", q.cpu().double(), keys) * HEAD**-0.5
        if cap:
            scores = cap * torch.tanh(scores / cap)
        if window:
            scores[:, : max(0, len(rows) - window)] = float("-inf")
        if sinks is not None:
            scores = torch.cat([scores, sinks.cpu().double()[:, None]], 1)
        return torch.einsum("hp,phd->hd", scores.softmax(1)[:, : len(rows)], values)


def tree_of(parents: list[int]) -> TokenTree:
    return TokenTree(np.arange(len(parents)), np.array(parents))


PARENTS = [-1, 0, 0, 1, 2, 3, 3, 4, 0, 5]


def path_of(node: int) -> list[int]:
    return [] if node < 0 else [*path_of(PARENTS[node]), node]


SINKS = torch.tensor([-3.0, 0.5, 4.0, 30.0], device=DEVICE)


@pytest.mark.parametrize(
    "rules", [{}, {"window": 5}, {"cap": 0.7}, {"sinks": SINKS}], ids=["", "window", "cap", "sinks"]
)
@pytest.mark.parametrize("length", [3, 124, 300])
def test_a_node_attends_to_its_path_and_has_the_bits_of_decoding_it_alone(length: int, rules: dict[str, Any]) -> None:
    attention, q = Attention(), some(len(PARENTS), HEADS, HEAD, seed=4)
    text = attention.text(length)
    got = attention(q, [Piece(text, tree_of(PARENTS))], **rules)
    long = attention(q, [Piece(text, tree_of(PARENTS))], long=True, **rules)
    assert torch.equal(got, long)
    kept = attention.pages.keys.clone(), attention.pages.values.clone()
    for node in range(len(PARENTS)):
        rows = [*range(length), *(length + one for one in path_of(node))]
        near(got[node].cpu(), attention.expected(q[node], text, rows, **rules), bits=6)
        for place, row in enumerate(rows):  # as if it had been decoded alone
            source, target = text.slots(np.array([row, place]))
            for stored, before in zip((attention.pages.keys, attention.pages.values), kept, strict=True):
                stored[0, target // CHUNK, :, target % CHUNK] = before[0, source // CHUNK, :, source % CHUNK]
        text.length = len(rows) - 1
        alone = attention(q[node : node + 1].clone(), [Piece(text, tree_of([-1]))], **rules)
        assert torch.equal(alone[0], got[node])
        text.length = length
        attention.pages.keys.copy_(kept[0])
        attention.pages.values.copy_(kept[1])


def test_a_batch_of_trees_and_chains_has_the_bits_of_each_alone() -> None:
    attention, q = Attention(), some(26, HEADS, HEAD, seed=4)
    shapes = [PARENTS, [-1], [*range(-1, 12)], [-1, 0]]
    pieces = [Piece(attention.text(length), tree_of(parents)) for length, parents in zip((130, 7, 250, 0), shapes)]
    together, start = attention(q, pieces), 0
    for piece in pieces:
        alone = attention(q[start : start + piece.count].clone(), [piece])
        assert torch.equal(alone, together[start : start + piece.count])
        start += piece.count


def test_nodes_of_an_earlier_forward_are_seen_by_later_ones() -> None:
    attention, q = Attention(), some(len(PARENTS), HEADS, HEAD, seed=4)
    text = attention.text(126)
    whole = attention(q, [Piece(text, tree_of(PARENTS))])
    later = attention(q[6:].clone(), [Piece(text, tree_of(PARENTS), 6)])
    assert torch.equal(later, whole[6:])


# -- KV ----------------------------------------------------------------------------------------------------------------


def test_rows_are_moved_in_order() -> None:
    pages = Pages(2, KV_HEADS, HEAD, 4, 1, 3, DEVICE)
    pages.keys.copy_(some(*pages.keys.shape))
    pages.values.copy_(some(*pages.values.shape, seed=1))
    text = pages.open()
    pages.reserve(text, 300)
    text.length = 110
    expected = []
    kept = [0, *range(3, 60, 2)]
    for stored in (pages.keys, pages.values):
        by_row = stored.transpose(2, 3).reshape(2, -1, KV_HEADS, HEAD)
        expected.append(by_row[:, text.slots(110 + np.array(kept))].clone())
    text.keep(kept, len(kept))
    inputs = Inputs(1, DEVICE)
    inputs.fill([], text.moves, 2)
    rows.move_kernel[(2, KV_HEADS)](
        pages.keys, pages.values, inputs.device["moves"], inputs.device["num_moves"], pages.keys.stride(0), KV_HEADS,
        HEAD=HEAD, CHUNK=CHUNK, MOVES=256,
    )  # fmt: skip
    for stored, rows_before in zip((pages.keys, pages.values), expected, strict=True):
        by_row = stored.transpose(2, 3).reshape(2, -1, KV_HEADS, HEAD)
        assert torch.equal(by_row[:, text.slots(110 + np.arange(len(kept)))], rows_before)
    assert text.length == 110 + len(kept)


@pytest.mark.parametrize("columns", [576, 960, 3072, 4096, 28672, 49152])
@pytest.mark.parametrize("width", [64, 576, 1536, 4096, 14336])
@pytest.mark.parametrize("bits", [16, 8])
def test_the_parts_of_a_sum_depend_on_the_weight_alone_and_tiles_fit(columns: int, width: int, bits: int) -> None:
    for memory in (99 * 1024, 227 * 1024):
        ways = [tile(count, columns, width, 64, memory, bits) for count in (1, 2, 16, 17, 64, 65, 256, 512)]
        assert len({way.parts for way in ways}) == 1
        for way in ways:
            assert width // way.parts % way.inputs == 0
            assert way.stages * stage_nbytes(way, bits) <= memory
            assert bits == 16 or (way.swap and way.inputs % GROUP == 0)


# -- what modules of transformers compute ------------------------------------------------------------------------------


def alike(function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What ``function`` makes of rows, which must be what it makes of each alone, in bits."""
    whole = function(x)
    for row in range(len(x)):
        assert torch.equal(function(x[row : row + 1].clone())[0], whole[row])
    return whole


def test_products_and_sums_in_a_steady_mode_are_torch_s_and_steady() -> None:
    x, weight, bias = some(5, 48), some(40, 48, seed=1), some(40, seed=2)
    with Steady():
        linear = alike(lambda x: torch.nn.functional.linear(x, weight, bias=bias), x)
        assert torch.equal(linear, alike(lambda x: torch.addmm(bias, x, weight.t()), x))
        turned = weight.t().contiguous()
        assert torch.equal(alike(lambda x: x @ weight.t(), x), alike(lambda x: torch.matmul(x, turned), x))
        for axis in (-1, 1, (-1,)):
            near(
                alike(lambda x, axis=axis: x.float().mean(axis, keepdim=True), x),
                x.double().mean(1, keepdim=True),
                bits=20,
            )
        near(alike(lambda x: x.float().sum(-1), x), x.double().sum(1), bits=20)
        near(x.sum(0), x.double().sum(0), bits=6)  # as without it
        near(x.mean(dim=(0, 1)), x.double().mean(), bits=6)
        assert (x.float() @ weight.float().t()).dtype is torch.float32
    near(linear, x.double() @ weight.double().t() + bias.double(), bits=6)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_are_multiplied_row_by_row(turned: bool, biased: bool) -> None:
    x, weights, ids = some(3, 32), some(4, 70, 32, seed=1), torch.tensor([3, 0, 1, 3, 2, 2], dtype=torch.int32)
    bias = some(4, 70, seed=2) if biased else None
    given = weights.transpose(1, 2).contiguous() if turned else weights
    got = expert_product(x, given, bias, ids.to(DEVICE), 2, turned)
    for place, expert in enumerate(ids.tolist()):
        expected = weights[expert].double() @ x[place // 2].double()
        near(got[place], expected if bias is None else expected + bias[expert].double(), bits=6)
