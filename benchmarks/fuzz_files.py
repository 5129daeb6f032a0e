"""Reads files that were damaged, or made by something else, in every way that a random number can think of.

    python -m benchmarks.fuzz_files [--files 1000] [--seed 0] [--kinds recycling medusa …]

From the root of the repository, as tiny models come from its tests. For each kind of file that compiled code reads, a
good one is made, changed, and used, so many times: cut, flipped, overwritten, exchanged for noise, and with values that
no program would write. A file must be refused in one sentence or made again, or the text be plain decoding's. All
happens in processes of their own, so that one that crashes is seen; another goes on behind the file.
Exit status 1 if anything went wrong; a file is made again by its kind, seed and number.

A new kind is one more entry of `KINDS`: what makes good files, and what uses them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Use = Callable[[], object]
EXTREMES: list[Any] = [-1, 0, 1 << 40, -(1 << 70), 1e30, float("nan"), float("inf"), None, "x", True, [], {}]


@dataclass(frozen=True)
class Files:
    """What one kind is tried with.

    Args:
        folder: whose files are changed, one at a time.
        use: reads them, and returns what must be ``expected``; or raises `TokenTreeError`.
        change: changes what a file says, not its bytes; None where bytes alone are changed.
    """

    folder: Path
    use: Use
    expected: object
    change: Callable[[np.random.Generator], None] | None = None


# -- what is done to files ---------------------------------------------------------------------------------------------


def spoil(files: Files, number: np.random.Generator) -> None:
    """Changes one of them."""
    if files.change is not None and number.random() < 0.4:
        files.change(number)
        return
    found = sorted(path for path in files.folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    file = found[number.integers(len(found))]
    content = bytearray(file.read_bytes())
    if file.suffix == ".json" and number.random() < 0.7:
        content = bytearray(_other_values(content.decode(), number).encode())
    else:
        _other_bytes(content, number)
    file.write_bytes(content)


def _other_bytes(content: bytearray, number: np.random.Generator) -> None:
    size = len(content)
    start = int(number.integers(max(1, size)))
    stretch = slice(start, start + int(number.integers(1, 64)))
    way = number.integers(8)
    if way == 0:
        del content[start:]
    elif way == 1:
        for at in number.integers(0, max(1, size), number.integers(1, 9)).tolist():
            content[at : at + 1] = bytes([content[at] ^ 1 << number.integers(8)]) if at < size else b""
    elif way == 2:
        content[stretch] = bytes(len(content[stretch]))
    elif way == 3:
        content[stretch] = number.bytes(len(content[stretch]))
    elif way == 4:
        del content[stretch]
    elif way == 5:
        content[stretch] = content[stretch] * int(number.integers(2, 9))
    elif way == 6:  # numbers that no program writes, where numbers are likely to lie
        value = number.choice([-1, -(1 << 31), (1 << 31) - 1, 0x7FC00000, 0x7F800000, 1 << 20])
        start = start // 4 * 4
        content[start : start + 4] = int(value).to_bytes(4, "little", signed=value < 0)
    else:
        content[:] = number.bytes(int(number.integers(0, 4096)))


def _other_values(text: str, number: np.random.Generator) -> str:
    """JSON with another value somewhere."""
    places = list(re.finditer(r'(?<=: )(-?[\d.]+|"[^"]*"|true|false|null)', text))
    if not places:
        return text[: len(text) // 2]
    place = places[number.integers(len(places))]
    value = EXTREMES[number.integers(len(EXTREMES))]
    return text[: place.start()] + json.dumps(value) + text[place.end() :]


def _other_entry(content: Any, number: np.random.Generator, leave: set[str]) -> bool:
    """Exchanges something, anywhere in ``content``, for what makes no sense, but not under the names to ``leave``."""
    import torch

    names = [name for name in (content if isinstance(content, dict) else range(len(content))) if name not in leave]
    if not names:
        return False
    name = names[number.integers(len(names))]
    value = content[name]
    if isinstance(value, dict | list) and number.random() < 0.9:
        return _other_entry(value, number, leave)
    if isinstance(value, torch.Tensor) and number.random() < 0.7:
        cut = value[: int(number.integers(max(1, len(value)))) or 0] if value.ndim else value
        turned = value.T if value.ndim == 2 else value.flatten()[::2]
        others = (cut, value.flatten(), value.double(), value[None], turned)
        content[name] = others[number.integers(len(others))]
    elif isinstance(value, torch.Tensor):
        del content[name]
    else:
        content[name] = EXTREMES[number.integers(len(EXTREMES))]
    return True


# -- kinds of files ----------------------------------------------------------------------------------------------------

PROMPT, NEW = "a tree of one two three one two", 10


def _texts(**options: Any) -> list[list[int]]:
    from tokentree import LLM, SamplingParams

    llm = LLM(**{"shape": "2x2", **options})
    ways = SamplingParams(max_tokens=NEW), SamplingParams(max_tokens=NEW, temperature=0.8, seed=1)
    return [llm.generate(PROMPT, params)[0].token_ids for params in ways]


def _model(dtype: str = "float32", family: str = "llama") -> Any:
    import torch
    from tests.tiny_models import tiny

    return tiny(family, getattr(torch, dtype), vocab_size=300, hidden_size=64, intermediate_size=96)


def _both(folder: Path) -> dict[str, Any]:
    from tests.tiny_models import tiny_tokenizer

    return {"model": _model(), "tokenizer": tiny_tokenizer()}


def _memory(drafter: str) -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        from tokentree import LLM

        options = {**_both(folder), "drafter": drafter}
        llm = LLM(**options, shape="2x2")
        llm.generate([PROMPT, PROMPT + " " + PROMPT])
        llm.save_memory(folder)
        return Files(folder, lambda: _texts(**options, memory=folder), _texts(**{**options, "drafter": "none"}))

    return make


def _medusa(layout: str) -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        import torch

        from tokentree.heads.checkpoints import write_medusa
        from tokentree.heads.medusa import MedusaHeads

        heads = MedusaHeads(2, 1, 64, 40 if layout == "vllm" else 300)
        for part in heads.parameters():
            torch.nn.init.normal_(part, std=0.2, generator=torch.Generator().manual_seed(0))
        if layout == "vllm":
            heads.token_map = torch.arange(40) * 7
        write_medusa(heads, folder, "tiny", 300, layout)
        options = {**_both(folder), "drafter": "medusa"}
        plain = _texts(**{**options, "drafter": "none"})
        return Files(folder, lambda: _texts(**options, heads=folder), plain)

    return make


def _eagle(version: int, layout: str = "safeailab") -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        from tests.drafters.test_eagle import some_head

        from tokentree.heads.eagle_files import write_eagle
        from tokentree.heads.saved import About

        options = {**_both(folder), "drafter": "eagle"}
        head = some_head(version, 40 if version == 3 else None, hidden_size=64, vocab_size=300)
        embedding = options["model"].get_input_embeddings().weight if layout == "speculators" else None
        about = About(taps=list(head.sizes.taps))
        write_eagle(head, folder, "tiny", layout=layout, about=about, embedding=embedding)
        plain = _texts(**{**options, "drafter": "none"})
        return Files(folder, lambda: _texts(**options, heads=folder), plain)

    return make


def _block(form: str, layout: str) -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        from tests.heads.block_heads import some_block

        from tokentree.heads.block_files import write_block

        options = {**_both(folder), "drafter": "block"}
        head = some_block(form, hidden_size=64, vocab_size=300)
        rows = options["model"].get_input_embeddings().weight, options["model"].get_output_embeddings().weight
        embedding, output = rows if layout == "speculators" else (None, None)
        write_block(head, folder, "tiny", layout, embedding=embedding, output=output, num_layers=2)
        plain = _texts(**{**options, "drafter": "none"})
        return Files(folder, lambda: _texts(**options, heads=folder), plain)

    return make


def _packed(quantization: str | None, family: str = "llama") -> Callable[[Path], Files]:
    """Packed weights: of a folder, or, where ``quantization`` is that of GGUF files, of such a file."""

    def make(folder: Path) -> Files:
        import torch
        from tests.gguf_files import write_gguf
        from tests.tiny_models import tiny_tokenizer

        from tokentree.cache import cache_folder, seal

        source, model = folder.with_name("source"), _model("bfloat16", family)
        if quantization == "gguf":
            source = source.with_suffix(".gguf")
            write_gguf(source, model, tiny_tokenizer(), lambda _: "Q8_0", family)
        else:
            model.save_pretrained(source)
            tiny_tokenizer().save_pretrained(source)
        options = {"model": source, "drafter": "none", "quantization": quantization}
        expected = _texts(**options)
        (file,) = cache_folder().glob("models/*/packed-*")

        def change(number: np.random.Generator) -> None:
            whole = torch.load(file, weights_only=True)
            content = copy.deepcopy(whole)
            # what ends a text, and the numbers of weights, may be other ones without a contradiction
            if _other_entry(content["layers"], number, {"ends", "settings", "name"}):
                torch.save(content, file)
                seal(file)

        return Files(file.parent, lambda: _texts(**options), expected, change)

    return make


def _gguf(kind: str, family: str = "llama") -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        from tests.gguf_files import write_gguf
        from tests.tiny_models import tiny_tokenizer

        file, model = folder / "tiny.gguf", _model(family=family)
        write_gguf(file, model, tiny_tokenizer(), lambda _: kind, family)
        whole = file.read_bytes()
        header = len(whole) - sum(weight.nbytes for weight in model.parameters()) // (4 if kind == "Q8_0" else 1)

        def use() -> bool:  # other weights are another model: what drafts must be lossless for it
            return _texts(model=file, drafter="ngram") == _texts(model=file, drafter="none")

        def change(number: np.random.Generator) -> None:
            said = bytearray(whole[:header])
            _other_bytes(said, number)
            file.write_bytes(said + whole[header:])

        return Files(folder, use, True, change)

    return make


def _costs(folder: Path) -> Files:
    from tokentree.cache import cache_folder

    options = {**_both(folder), "drafter": "ngram", "shape": "cost"}
    expected = _texts(**options)
    shutil.copy(cache_folder() / "costs.json", folder)
    os.environ["TOKENTREE_CACHE"] = str(folder)
    return Files(folder, lambda: _texts(**options), expected)


def _compiled(folder: Path) -> Files:
    from tokentree.jit import njit

    os.environ["TOKENTREE_COMPILED"] = str(folder)

    def total(values: Any) -> int:
        found = 0
        for value in values:
            found += 3 * value
        return found

    def use() -> int:
        return int(njit(cache=True)(total)(np.arange(100)))

    use()
    return Files(folder, use, 3 * 4950)


KINDS: dict[str, Callable[[Path], Files]] = {
    "recycling": _memory("recycling"),
    "suffix": _memory("suffix"),
    "merged lookups": _memory("merged"),
    "medusa, vLLM's layout": _medusa("vllm"),
    "medusa, FasterDecoding's": _medusa("fasterdecoding"),
    "EAGLE-1": _eagle(1),
    "EAGLE-3": _eagle(3),
    "EAGLE-3, speculators'": _eagle(3, "speculators"),
    "block, z-lab's layout": _block("dflash2", "zlab"),
    "block, DeepSpec's": _block("gated", "deepspec"),
    "block, speculators'": _block("few tokens", "speculators"),
    "packed weights": _packed(None),
    "packed in 8 bits": _packed("int8"),
    "packed GGUF": _packed("gguf"),
    "packed Gemma 3": _packed(None, "gemma3"),
    "packed Qwen3": _packed(None, "qwen3"),
    "costs": _costs,
    "GGUF": _gguf("F32"),
    "GGUF, quantized": _gguf("Q8_0"),
    "GGUF, Gemma 3": _gguf("Q8_0", "gemma3"),
    "GGUF, Qwen3": _gguf("F32", "qwen3"),
    "compiled code": _compiled,
}


# -- the processes -----------------------------------------------------------------------------------------------------

# what all kinds need, imported once; each process is forked from there
IMPORTED = ["torch", "transformers", "tokentree.llm", "tokentree.loading", "tests.tiny_models", "tests.gguf_files"]


def child(told: Connection, kind: str, seed: int, first: int, count: int) -> None:
    """Sends a file's number before it is used, and behind it what became of it."""
    import torch
    import transformers

    from tokentree.errors import TokenTreeError
    from tokentree.jit import compiled_folder

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as room:
        os.environ["TOKENTREE_COMPILED"] = str(compiled_folder())  # the user's own
        os.environ["TOKENTREE_CACHE"] = str(Path(room) / "cache")
        good, folder = Path(room) / "good", Path(room) / "files"
        folder.mkdir()
        warnings.simplefilter("ignore")
        files = KINDS[kind](folder)
        shutil.copytree(files.folder, good)
        for index in range(first, first + count):
            told.send((index, "begins"))
            shutil.rmtree(files.folder)
            shutil.copytree(good, files.folder)
            spoil(files, np.random.default_rng([seed, index, len(kind)]))
            said = "as plain"
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    got = files.use()
                    if got != files.expected:
                        said = f"CHANGED {files.expected} to {got}"
                except TokenTreeError as error:
                    said = "refused"
                    if "\n" in str(error).strip():
                        said = f"UNCLEAR {error!r}"
                except Exception as error:  # noqa: BLE001
                    said = f"UNTYPED {error!r}"
            if said == "as plain" and any("is made again" in str(warning.message) for warning in warned):
                said = "made again"
            told.send((index, " ".join(said.split())))


def outcomes(kind: str, count: int, seed: int, first: int = 0) -> Iterator[tuple[int, str]]:
    """What became of each file: "refused", "made again", "as plain", or what went wrong."""
    done, processes = first, multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(IMPORTED)
    while done < first + count:
        told, tells = processes.Pipe(duplex=False)
        process = processes.Process(target=child, args=(tells, kind, seed, done, first + count - done))
        process.start()
        tells.close()
        began = -1
        with told, contextlib.suppress(EOFError):
            while True:
                index, said = told.recv()
                if said == "begins":
                    began = index
                else:
                    done = index + 1
                    yield index, said
        process.join()
        code = process.exitcode or 0
        if done < first + count:
            if began != done:
                raise RuntimeError(f"{kind}: no files could be made: exit status {code}")
            yield done, f"CRASHED {signal.Signals(-code).name if code < 0 else code}"
            done += 1


def failures(kind: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each thing happened, and what went wrong."""
    counts, wrong = Counter[str](), list[str]()
    for index, said in outcomes(kind, count, seed):
        counts[said.split()[0] if said[:1].isupper() else said] += 1
        if said[:1].isupper():
            wrong.append(f"{kind}, file {index}, seed {seed}: {said[:300]}")
    return counts, wrong


def main() -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to see one again")
    asked = parser.parse_args()
    console, wrong = Console(highlight=False), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for kind in asked.kinds:
        counts = Counter[str]()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(kind, total=asked.files)
            for index, said in outcomes(kind, asked.files, asked.seed, asked.first):
                counts[said.split()[0] if said[:1].isupper() else said] += 1
                if said[:1].isupper():
                    wrong += 1
                    progress.console.print(f"{kind}, file {index}: {said}", markup=False)
                progress.advance(task)
        told = ", ".join(f"{count} {said}" for said, count in sorted(counts.items()))
        console.print(f"{kind}: {sum(counts.values())} files: {told}", markup=False)
    console.print(f"seed {asked.seed}: {wrong} files went wrong" if wrong else f"seed {asked.seed}: nothing went wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
