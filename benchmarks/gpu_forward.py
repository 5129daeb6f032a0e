"""A forward by kernels of our own on a GPU: whether bits depend on the rows beside one, how long it takes, and which
tiles are fastest. Random weights of the shapes of real models.

    python -m benchmarks.gpu_forward --out FILE [--sizes smollm2 1.5b 8b] [--bits 16|8] [--sweep] [--warm I/N]

Times are medians in ms of a recording that plays, with 512 tokens before. A floor is the bytes of weights over the
speed of a copy on the device. "prompt" is 2,048 tokens read, beside cuBLAS's products of the same sizes. With --bits 8
weights have 8 bits; 70b, which has them only so, takes a GPU of 96 GB or more. With --sweep, tiles of each product are
tried, with the weights of as many layers as don't fit into a cache; --warm I/N only compiles every Nth of them, which
several processes do at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokentree.engines.gpu import forward as forward_module
from tokentree.engines.gpu import tiles
from tokentree.engines.gpu.forward import Forward
from tokentree.engines.gpu.inputs import Inputs, Piece
from tokentree.engines.gpu.pages import Pages, Text
from tokentree.engines.gpu.quantized import GROUP, Int8, Matrix
from tokentree.engines.gpu.recording import Recording
from tokentree.engines.gpu.tiles import Tile
from tokentree.engines.gpu.weights import Layer, Weights
from tokentree.tree import TokenTree

# hidden size, MLP, layers, heads, KV heads, vocabulary, head size, bias
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 512, 32, False),
    "smollm2": (576, 1536, 30, 9, 3, 49152, 64, False),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, 128, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, 128, False),
    "70b": (8192, 28672, 80, 64, 8, 128256, 128, False),
}
BEFORE = 512  # tokens
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def weights(name: str, device: torch.device, small: bool = False, bits: int = 16) -> Weights:
    """Random ones; ``small`` has two layers and few tokens."""
    width, inner, layers, heads, kv_heads, vocab, head, biased = SIZES[name]
    layers, vocab = (2, 512) if small else (layers, vocab)
    random = torch.Generator(device).manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        scale = shape[-1] ** -0.5
        return (torch.randn(*shape, generator=random, device=device) * scale).bfloat16()

    def matrix(outputs: int, inputs: int) -> Matrix:
        if bits == 16:
            return make(outputs, inputs)
        codes = torch.empty(outputs, inputs, dtype=torch.int8, device=device)
        codes.random_(-127, 128, generator=random)
        scales = 0.5 + torch.rand(inputs // GROUP, outputs, generator=random, device=device)
        return Int8(codes, (scales * inputs**-0.5 / 73).bfloat16().float())  # codes spread by 73

    def gain() -> torch.Tensor:
        return 1.0 + 0.1 * torch.randn(width, generator=random, device=device)

    columns = (heads + 2 * kv_heads) * head
    made = [
        Layer(
            gain(), matrix(columns, width), make(1, columns)[0] if biased else None, None, None,
            matrix(width, heads * head), None, gain(), matrix(2 * inner, width), matrix(width, inner), None, None, 0, 0,
            head**-0.5, 0.0,
        )
        for _ in range(layers)
    ]  # fmt: skip
    turns = torch.arange(4096, device=device)[:, None] * 10000.0 ** (
        -torch.arange(0, head, 2, device=device).float() / head
    )
    embedding = torch.randn(vocab, width, generator=random, device=device).bfloat16()
    tied = name in ("smollm2", "1.5b")
    output = embedding if tied and bits == 16 else matrix(vocab, width)
    return Weights(
        embedding, 1.0, made, gain(), output, None, 0.0, [(turns.cos(), turns.sin())], heads, kv_heads, head, 1e-5,
        False,
    )  # fmt: skip


class Model:
    """A forward with pages and inputs of all sizes."""

    def __init__(self, w: Weights) -> None:
        self.weights, self.device = w, w.embedding.device
        pages = 1 + 24 * 16 if self.device.type == "cuda" else 64
        self.pages = Pages(len(w.layers), w.kv_heads, w.head_size, pages, 96, 32, self.device)
        self.forward = Forward(w, self.pages, ROWS[-1])
        self.inputs = {rows: Inputs(rows, self.device) for rows in ROWS}

    def text(self) -> Text:
        return self.pages.open()

    def prepare(self, pieces: list[Piece], moves: Any = None) -> tuple[Inputs, int, bool]:
        rows = sum(piece.count for piece in pieces)
        for piece in pieces:
            self.pages.reserve(piece.text, piece.text.length + len(piece.tree))
        fits = next(size for size in ROWS if size >= rows)
        inputs = self.inputs[fits]
        itemized = inputs.fill(pieces, np.zeros((0, 2), np.int64) if moves is None else moves, self.weights.group)
        return inputs, fits, fits > 64 or not itemized

    def run(self, pieces: list[Piece], long: bool | None = None) -> torch.Tensor:
        """Logits of all rows."""
        inputs, rows, own = self.prepare(pieces)
        self.forward.run(inputs, rows, rows, own if long is None else long)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.forward.logits[: sum(piece.count for piece in pieces)].clone()

    def read(self, text: Text, ids: list[int], chunk: int) -> torch.Tensor:
        """Commits ``ids``, so many at a time; logits of all."""
        said = []
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            said.append(self.run([Piece(text, TokenTree.chain(part[0], part[1:]))]))
            text.length += len(part)
        return torch.cat(said)


def random_tree(nodes: int, vocab: int, seed: int) -> TokenTree:
    number = np.random.default_rng(seed)
    parents = [-1, *(int(number.integers(max(0, node - 6), node)) for node in range(1, nodes))]
    return TokenTree(number.integers(0, vocab, nodes), np.array(parents))


def path_to(tree: TokenTree, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = int(tree.parents[node])
    return path[::-1]


def equal_bits(model: Model, before: int, nodes: int, chain: int) -> dict[str, Any]:
    """How many rows have the bits of one-row decoding, of how many, in several company."""
    vocab, found = model.weights.vocab_size, dict[str, Any]()
    ids = np.random.default_rng(1).integers(0, vocab, before + chain).tolist()
    one, many = model.text(), model.text()
    by_ones = model.read(one, ids[:chain], 1)
    by_many = model.read(many, ids[:chain], 64)
    found["prompt of 64 rows"] = [int((by_ones == by_many).all(1).sum()), chain]
    wide = model.text()
    by_all = model.read(wide, ids[:before], 512)
    found["prompt of 512 rows"] = [int((by_ones == by_all[:chain]).all(1).sum()), chain]
    apart = (by_ones.float() - by_all[:chain].float()).abs().max()
    found["prompt of 512 rows, greatest difference"] = float(apart)
    narrow = model.text()
    model.read(narrow, ids[:before], 64)
    tree = random_tree(nodes, vocab, 3)
    in_tree = model.run([Piece(narrow, tree)])
    found["tree, all chunks of a tile in one program"] = [
        int((model.run([Piece(narrow, tree)], long=True) == in_tree).all(1).sum()), nodes,
    ]  # fmt: skip
    alone = []
    for node in range(nodes):
        path = path_to(tree, node)
        ids_of_path = tree.tokens[path].tolist()
        for place in range(len(path)):
            narrow.length = before + place
            said = model.run([Piece(narrow, TokenTree.chain(ids_of_path[place], []))])
        narrow.length = before
        alone.append(said[0])
    found["tree"] = [int((torch.stack(alone) == in_tree).all(1).sum()), nodes]
    texts = [model.text() for _ in range(8)]
    for number, text in enumerate(texts):
        model.read(text, ids[number : number + 40 + 17 * number], 64)
    trees = [random_tree(1 + number, vocab, number) for number in range(8)]
    together = model.run([Piece(text, tree) for text, tree in zip(texts, trees, strict=True)])
    apart_rows = torch.cat([model.run([Piece(text, tree)]) for text, tree in zip(texts, trees, strict=True)])
    found["batch of 8 texts"] = [int((together == apart_rows).all(1).sum()), len(together)]
    for text in (one, many, wide, narrow, *texts):
        model.pages.close(text)
    return found


def timed(play: Callable[[], Any], count: int = 25) -> float:
    """Median in ms."""
    seconds = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        play()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def copy_speed(device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.randn(1 << 29, device=device).bfloat16()
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source)) * 1e3


def times(model: Model, rows: tuple[int, ...], texts: int) -> dict[str, float]:
    """Of recordings: trees of so many rows in one text, and a row each of so many texts."""
    found, vocab = dict[str, float](), model.weights.vocab_size
    text, pool = model.text(), None
    model.read(text, [5] * BEFORE, 512)

    def record(pieces: list[Piece]) -> float:
        nonlocal pool
        inputs, size, long = model.prepare(pieces)
        made = Recording(lambda: model.forward.run(inputs, size, size if size <= 64 else 0, long), pool)
        pool = made.pool
        return timed(made.play)

    for count in rows:
        tree = random_tree(count, vocab, 1) if count <= 64 else TokenTree.chain(5, [5] * (count - 1))
        found[str(count)] = record([Piece(text, tree)])
    several = [model.text() for _ in range(texts)]
    for one in several:
        model.read(one, [5] * BEFORE, 512)
    found[f"{texts} texts"] = record([Piece(one, TokenTree.chain(5, [])) for one in several])
    for one in (text, *several):
        model.pages.close(one)
    return found


def prompt(model: Model, tokens: int = 2048) -> dict[str, float]:
    """Milliseconds: reading a prompt, `ROWS` at a time, and cuBLAS's products of the same sizes, all rows at once."""
    w, text, chunk, took = model.weights, model.text(), ROWS[-1], 0.0
    for start in range(0, tokens, chunk):
        text.length = start
        inputs, size, long = model.prepare([Piece(text, TokenTree.chain(5, [5] * (chunk - 1)))])
        took += timed(Recording(lambda: model.forward.run(inputs, size, 0, long)).play, 5)  # noqa: B023
    layer = w.layers[0]
    weights = [part for part in (layer.qkv, layer.o, layer.gate_up, layer.down) if isinstance(part, torch.Tensor)]
    rows = [torch.randn(tokens, part.shape[1], device=model.device).bfloat16() for part in weights]

    def multiply() -> None:
        for x, part in zip(rows, weights, strict=True):
            torch.matmul(x, part.T)

    model.pages.close(text)
    return {"prompt": took, "cuBLAS's products": timed(multiply) * len(w.layers)}


def profile(model: Model, rows: int) -> dict[str, list[float]]:
    """Microseconds of each kernel, launched one by one, and how many launches it has."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    text = model.text()
    model.read(text, [5] * BEFORE, 512)
    pieces = [Piece(text, random_tree(rows, model.weights.vocab_size, 1))]
    inputs, size, long = model.prepare(pieces)
    model.forward.run(inputs, size, size, long)
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA]) as run:
        model.forward.run(inputs, size, size, long)
        torch.cuda.synchronize()
    model.pages.close(text)
    return {
        event.key: [round(event.device_time_total / event.count, 2), event.count]
        for event in sorted(run.key_averages(), key=lambda event: -event.device_time_total)
        if event.device_time_total
    }


# -- tiles -------------------------------------------------------------------------------------------------------------


def candidates(rows: int, weight: Matrix, most_columns: int, kind: str) -> list[Tile]:
    """Tiles for at most so many rows."""
    columns, width = weight.shape
    found = []
    all_parts = (1,) if kind != "residual" else (1, 2, 4)
    if isinstance(weight, Int8):
        height, spread = next(size for size in (16, 32, 64, 128) if size >= min(rows, 128)), rows <= 64
        ways = ((4, 3), (4, 4), (4, 8), (8, 3), (8, 4), (8, 6))
        for parts, wide, inputs, (warps, stages) in itertools.product(
            all_parts if spread else all_parts[:1], (64, 128), (GROUP, 2 * GROUP), ways
        ):
            tile = Tile(parts, True, height, wide, inputs, warps, stages, parts > 1 and spread)
            fits = width % (parts * inputs) == 0 and wide <= most_columns
            if fits and stages * tiles.stage_nbytes(tile, 8) < 200_000:
                found.append(tile)
        return found
    if rows <= 64:
        sizes = itertools.product(all_parts, (16, 32, 64), (64, 128), ((4, 4), (4, 6)))
    else:
        sizes = itertools.product(all_parts[:1], (64, 128, 256), (64,), ((8, 3), (8, 4), (4, 3)))
    for parts, wide, inputs, (warps, stages) in sizes:
        height = 64 if rows <= 64 else 128
        shared = 2 * stages * inputs * (height + wide)
        programs = parts * -(-columns // wide)
        fits = width % (parts * inputs) == 0 and wide <= most_columns and shared < 200_000
        if fits and (rows > 64 or (programs >= 24 and (programs <= 1200 or wide == 64))):
            found.append(Tile(parts, False, height, wide, inputs, warps, stages, parts > 1 and rows <= 64))
    return found


def sweep(model: Model, rows: tuple[int, ...], warm: tuple[int, int] | None) -> dict[str, Any]:
    """The fastest tiles of each product, in us a launch."""
    w, found, number, text = model.weights, dict[str, Any](), 0, model.text()
    if warm is None:
        model.read(text, [5] * BEFORE, 512)
    many = {count: model.prepare([Piece(text, TokenTree.chain(5, [5] * (count - 1)))])[0] for count in rows}
    first = w.layers[0]
    for given in (model.forward.hidden, model.forward._attended, model.forward._gated):
        given.normal_()
    works: dict[str, tuple[str, Matrix, int, Callable[[Any, int, int], None]]] = {
        "qkv": ("norm", first.qkv, min(128, w.head_size), lambda layer, i, n: model.forward._heads(
            layer, i, many[n].device, n, model.forward._normed)),
        "o": ("residual", first.o, 128, lambda layer, i, n: model.forward._add(
            model.forward._attended, layer.o, None, None, n)),
        "gate_up": ("norm", first.gate_up, 256, lambda layer, i, n: model.forward._gate(layer, n)),
        "down": ("residual", first.down, 128, lambda layer, i, n: model.forward._add(
            model.forward._gated, layer.down, None, None, n)),
    }  # fmt: skip
    for name, (kind, weight, most, work) in works.items():
        layers = w.layers[: max(2, min(len(w.layers), math.ceil(2e8 / weight.nbytes)))]
        for tile in candidates(rows[-1], weight, most, kind):
            number += 1
            if warm and number % warm[1] != warm[0]:
                continue
            forward_module.tile = lambda *given, tile=tile, **named: tile  # type: ignore[assignment]
            model.forward._partial = torch.empty(tile.parts, 64, w.width, device=model.device)

            def play(count: int, work: Any = work, layers: Any = layers) -> None:
                for i, layer in enumerate(layers):
                    work(layer, i, count)

            try:
                if warm:
                    work(layers[0], 0, rows[0])
                    continue
                took = []
                for count in rows:
                    made = Recording(lambda count=count: play(count))
                    took.append(round(1e3 * timed(made.play, 9) / len(layers), 2))
                found.setdefault(name, []).append((took, str(tile)))
            except Exception as error:  # noqa: BLE001  a tile that doesn't fit is no finding
                found.setdefault(name, []).append(([1e9], f"{tile}: {str(error)[:80]}"))
        forward_module.tile = tiles.tile
        if name in found:
            found[name].sort(key=lambda one: sum(one[0]))
            found[name] = {"bytes": weight.nbytes, "fastest": found[name][:6]}
    model.pages.close(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", nargs="*", default=["smollm2", "1.5b", "8b"], choices=list(SIZES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--bits", type=int, default=16, choices=(16, 8), help="of a weight")
    parser.add_argument(
        "--rows", nargs="*", type=int, default=[1, 64], help="numbers of rows that tiles are tried with"
    )
    parser.add_argument("--warm", default="", metavar="I/N")
    options = parser.parse_args()
    if "70b" in options.sizes and options.bits == 16:
        parser.error("70b takes --bits 8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    warm = tuple(map(int, options.warm.split("/"))) if options.warm else None

    def tell(name: str, what: str, said: Any) -> None:
        found.setdefault(name, {})[what] = said
        print(f"[{name}] {what}: {said}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))

    for name in options.sizes:
        w = weights(name, device, bool(warm), options.bits)
        if options.sweep:
            said = sweep(Model(w), tuple(options.rows), warm)  # type: ignore[arg-type]
            if not warm:
                for part, best in said.items():
                    tell(name, f"tiles of {part}", best)
            continue
        started = time.perf_counter()
        small = device.type == "cpu"
        tell(name, "equal bits", equal_bits(Model(w), *((140, 6, 3) if small else (BEFORE, 24, 64))))
        tell(name, "seconds to compile and compare", round(time.perf_counter() - started, 1))
        if small:
            continue
        speed = copy_speed(device)
        tell(name, "floor", round(1e3 * w.nbytes / speed, 3))
        tell(name, "copy TB/s", round(speed / 1e12, 2))
        tell(name, "ms", times(Model(w), ROWS, 32))
        if options.bits == 16:
            tell(name, "prompt", prompt(Model(w)))
        for count in (1, 64):
            tell(name, f"kernels at {count}", profile(Model(w), count))
        del w
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
