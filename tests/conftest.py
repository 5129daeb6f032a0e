"""What several tests need: tables as models, sequences, and the loop run to its end."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import settings

from tests import forked
from tokentree.acceptance import acceptance
from tokentree.decoder import Decoder
from tokentree.drafters.base import Drafter
from tokentree.drafters.none import NoDrafter
from tokentree.engines.base import Engine
from tokentree.grammars.guide import Guide
from tokentree.jit import compiled_folder
from tokentree.sampling import Noise, SamplingParams, seeded_noise
from tokentree.sequence import Sequence
from tokentree.shapes import Shape, shape
from tokentree.text import Detokenizer

gc.disable()  # up to the first test, see `pytest_collection`

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without one
# what a forward costs is measured once for all tests, and the user's own measurements stay as they are; compiled code
# alone is the user's own, as it belongs to its sources
os.environ["TOKENTREE_COMPILED"] = str(compiled_folder())
os.environ["TOKENTREE_CACHE"] = tempfile.mkdtemp(prefix="tokentree-")
settings.register_profile("tokentree", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tokentree")


def slow_tests() -> set[str]:
    """The tests that tests/slow.txt names, each as file::function."""
    lines = (Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines()
    return {line.split()[-1] for line in lines if not line.startswith("#")}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports are no garbage: neither while there are more and more of them, nor in what tests collect later. With a
    million objects, looking for some among them takes a second each time."""
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """Marks as slow all cases of those, and sorts what is left without those that aren't asked for."""
    slow = slow_tests()
    for item in items:
        if item.nodeid.partition("[")[0].removeprefix("tests/") in slow:
            item.add_marker(pytest.mark.slow)
    yield
    items[:] = ordered(items)


def ordered(items: list[pytest.Item]) -> list[pytest.Item]:
    """The drafters' tests first, which compile most of the loops that others need too. Two processes begin with the
    first test and the one in the middle. That one runs Triton's compiler and its interpreter, and finds loops compiled
    when it is through. Those of its tests that need loops themselves come last of all.
    """

    def those_of(*places: str) -> list[pytest.Item]:
        return [item for item in items if item.nodeid.startswith(places)]

    gpu = "tests/engines/gpu/"
    compiling, late = those_of("tests/drafters/"), those_of(f"{gpu}test_graph.py", f"{gpu}test_eagle.py")
    alone = [item for item in those_of(gpu) if item not in {*late}]
    alone.sort(key=lambda item: "/test_compiled.py" not in item.nodeid)
    known = {*compiling, *alone, *late}
    others = [*compiling, *(item for item in items if item not in known)]
    return [*others[: len(items) // 2], *alone, *others[len(items) // 2 :], *late]


def pytest_unconfigure() -> None:
    forked.end()


def random_table(vocab: int, order: int = 2, seed: int = 0, sharpness: float = 1.0) -> torch.Tensor:
    """Random logits after each history of ``order`` tokens, for `TableEngine`."""
    generator = torch.Generator().manual_seed(seed)
    return sharpness * torch.randn([vocab] * (order + 1), generator=generator)


def each_two(first: Iterable[A], second: Iterable[B], third: Iterable[C]) -> list[tuple[A, B, C]]:
    """Cases in which any two values of two of these lists meet: as many as the first two have pairs, where all
    combinations are as many times more as the third is long. The third is the shortest."""
    firsts, seconds, thirds = list(first), list(second), list(third)
    assert len(thirds) <= min(len(firsts), len(seconds))
    return [(a, b, thirds[(i + j) % len(thirds)]) for i, a in enumerate(firsts) for j, b in enumerate(seconds)]


def by_night(cases: Iterable[A], but: Collection[A]) -> list[A | ParameterSet]:
    """All of these cases for `make nightly`, but some for `make test`: the others try the same on more of its kind."""
    cases = list(cases)
    assert all(case in cases for case in but)
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        case if case in but else pytest.param(*value, marks=pytest.mark.nightly)
        for case, value in zip(cases, values, strict=True)
    ]


def all_pairs(first: Iterable[A], second: Iterable[B], by_day: int = 1) -> list[tuple[A, B] | ParameterSet]:
    """All combinations for `make nightly`; for `make test` each of the first with so many of the second, in turns."""
    firsts, seconds = list(first), list(second)
    in_turns = [(one, seconds[(i + j) % len(seconds)]) for i, one in enumerate(firsts) for j in range(by_day)]
    return by_night([(a, b) for a in firsts for b in seconds], but=in_turns)


def shown(value: object, width: int = 40) -> str:
    """What a case with this value is called: without addresses, since every process must give it the same name."""
    return re.sub(r" at 0x[0-9a-f]+", "", ascii(value))[:width]


def make_sequence(
    prompt: list[int],
    *,
    sample: int = 0,
    noise: Callable[[int, int], Noise] | None = None,
    context: int = 1 << 20,
    eos_ids: frozenset[int] = frozenset(),
    detokenizer: Detokenizer | None = None,
    stop_rules: tuple[Callable[[list[int]], bool], ...] = (),
    guide: Guide | None = None,
    **params: Any,
) -> Sequence:
    """A request with the sampling options ``params``; without ``noise``, its stream is that of the seed and sample."""
    options = SamplingParams(**params)
    noise = noise or seeded_noise(options.seed or 0, sample)
    return Sequence(prompt, options, noise, context, eos_ids, detokenizer, stop_rules, guide=guide)


def decode(
    engine: Engine,
    seqs: list[Sequence],
    drafter: Drafter | None = None,
    form: str | Shape = "2x2",
    accept: str = "match",
    max_batch: int = 8,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[int]]:
    """Runs the loop to its end; returns the new ids of each sequence. Without a drafter it is plain decoding."""
    decoder = Decoder(engine, drafter or NoDrafter(), shape(form), acceptance(accept), clock=clock)
    for _ in decoder.run(seqs, max_batch):
        pass
    return [seq.output_ids for seq in seqs]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages are imported from."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def package(site: Path, name: str, points: str, source: str = "", group: str = "tokentree.drafters") -> None:
    """Puts a package there, as an installer would."""
    about = site / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
    (site / f"{name}.py").write_text(source)
    sys.modules.pop(name, None)  # of another test
