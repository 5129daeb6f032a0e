"""What all trainings of heads share: the folders that they work in, their texts, and what is shown meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from rich.console import Console

from tokentree.cli.terminal import consoles
from tokentree.errors import OptionError, PromptError
from tokentree.heads.fingerprint import Fingerprint
from tokentree.llm import LLM
from tokentree.train.keeping import keep_text, kept_json, whole, writing
from tokentree.train.looks import told
from tokentree.train.loop import CHECKPOINT, Figures, Recipe, Watch
from tokentree.train.progress import Phases
from tokentree.train.target import engine_of
from tokentree.train.texts import Texts, read_texts
from tokentree.train.written import Kept, write_texts

WEIGHTS = ("model.safetensors", "medusa_lm_head.safetensors", "medusa_lm_head.pt", "pytorch_model.bin")
MADE = ("config.json", "README.md", *WEIGHTS)  # what would be replaced in a folder that heads are written into
SETTINGS = "settings.json"
STATES = 4  # numbers that training keeps for each parameter: itself, its gradient, and the optimizer's two


def check(llm: LLM, held_back: float, **numbers: int) -> None:
    """Raises `OptionError` or `PromptError` unless ``numbers`` are at least 1, ``held_back`` is a share, and ``llm``
    has a tokenizer."""
    if not 0 < held_back < 1:
        raise OptionError("held_back is a share of the texts, above 0 and below 1")
    for name, number in numbers.items():
        if number < 1:
            raise OptionError(f"{name} must be at least 1")
    if llm.tokenizer is None:
        raise PromptError("training needs the model's tokenizer: pass tokenizer=")


def check_parameters(count: int) -> None:
    """Raises `OptionError` if training so many parameters takes more memory than this machine has."""
    needed, there = 4 * STATES * count, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise OptionError(
            f"heads of {count:,} parameters need {needed / 1e9:,.0f} GB to be trained, and this machine has "
            f"{there / 1e9:,.0f} GB: take fewer heads or layers"
        )


def claim(folder: Path, settings: dict[str, Any], force: bool) -> Path:
    """Makes ``folder`` that of a training with these ``settings``; returns its folder for work. What an earlier
    training with the same settings left there is gone on with.

    Args:
        force: begin anew where the settings are other ones, and replace in the end what is there.

    Raises:
        OptionError: if ``folder`` can't be one, belongs to a training with other settings, or holds what no training
            left there.
    """
    check_folder(folder, force)
    work, text = folder / "work", json.dumps(settings)
    file = work / SETTINGS
    before = kept_json(file)
    if before is not None and before != json.loads(text):
        finished = (work / CHECKPOINT).exists() or any((folder / name).exists() for name in WEIGHTS)
        if finished and not force:
            raise OptionError(
                f"{_difference(file, before, json.loads(text))}: name another folder, or begin anew with --force"
            )
        (work / CHECKPOINT).unlink(missing_ok=True)
    keep_text(file, text)
    return work


def check_folder(folder: Path, force: bool = False) -> None:
    """Raises `OptionError` if heads can't be written into ``folder``, or would replace what no training left there:
    what can be told before a model is loaded."""
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"{str(folder)!r} is a file: name a folder for the heads")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    there = [name for name in MADE if (folder / name).exists()]
    if there and not force and not (folder / "work" / SETTINGS).is_file():
        raise OptionError(
            f"{str(folder)!r} holds {there[0]} already: name another folder, or replace what is there with --force"
        )


def _difference(file: Path, before: dict[str, Any], settings: dict[str, Any]) -> str:
    if not before:
        return f"{str(file)!r} is damaged, and so doesn't say what training is there"
    names = (name for name in (*settings, *before) if before.get(name) != settings.get(name))
    name, folder = next(names, "settings"), str(file.parent.parent)
    return f"{folder!r} has a training with other settings: {name} {before.get(name)}, not {settings.get(name)}"


@contextmanager
def working_in(folder: Path, phases: Phases) -> Iterator[None]:
    """Holds ``folder`` against other trainings; waits, and says so, while one works there."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            phases.say(f"another training works in {str(folder)!r}: waiting until it is done")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def work_folder(work: Path, llm: LLM, data: str | Path, recipe: Recipe, force: bool = False) -> Path:
    """``work``, the folder for texts and hidden states, which belongs to one model, one source of texts and one seed.

    Args:
        force: remove the texts and hidden states of another.

    Raises:
        OptionError: if it belongs to others.
    """
    kind = str(llm.engine.info.dtype).removeprefix("torch.")
    owner = Fingerprint.of(llm.config, llm.tokenizer).model_dump() | {
        "data": str(data), "seed": recipe.seed, "dtype": kind
    }  # fmt: skip
    file, content = work / "about.json", json.dumps(owner)
    before = kept_json(file)
    if before is not None and before != owner:
        written = (work / "texts.jsonl").exists() or (work / "hidden").exists()
        if written and not force:
            raise OptionError(
                f"{str(work)!r} is the work of another run, with another model, dtype, data or seed: name another, or "
                "begin anew with --force" if before else
                f"{str(file)!r} is damaged, and so doesn't say whose texts are there: remove it if they are this "
                "model's, or begin anew with --force"
            )  # fmt: skip
        shutil.rmtree(work / "hidden", ignore_errors=True)
        for texts in work.glob("texts*.jsonl"):
            texts.unlink()
    keep_text(file, content)
    return work


def texts_for(llm: LLM, data: str | Path, work: Path, tokens: int, seed: int, phases: Phases) -> Texts:
    """The texts of a file, or so many ``tokens`` that the model writes.

    Raises:
        PromptError, OptionError: see `read_texts` and `write_texts`.
    """
    vocab_size = llm.engine.vocab_size
    if str(data) != "self":
        assert llm.tokenizer is not None
        return read_texts(data, llm.tokenizer, min(1024, llm.engine.context), vocab_size)
    kept = Kept(work / "texts.jsonl", seed, vocab_size)
    if kept.spoilt:
        phases.say(f"{kept.spoilt} damaged lines of {str(work / 'texts.jsonl')!r} are left out, and written again")
    begun = min(tokens, kept.tokens + sum(one.tokens for one in kept.begun))
    with phases.phase("writing texts", tokens, begun=begun) as show:
        return write_texts(
            llm, kept, tokens, seed, lambda done: show(done, "" if done < tokens else "ending what is begun")
        )


@contextmanager
def claimed(
    llm: LLM, data: str | Path, folder: Path, settings: dict[str, Any], recipe: Recipe, work: str | Path | None,
    tokens: int, places: int, force: bool, phases: Phases,
) -> Iterator[tuple[Path, Path, Texts]]:  # fmt: skip
    """Makes ``folder`` that of a training with these ``settings`` and this ``recipe``. Yields its folder for work, the
    one for hidden states, which is ``work`` if that is given, and the texts; meanwhile no other training works there.
    Of several processes the first one is here before the others, which then find it all.

    Args:
        places: how many hidden states of each token are kept.

    Raises:
        OptionError, PromptError: see `claim`, `work_folder`, `check_space` and `texts_for`.
    """
    state = PartialState()
    with state.main_process_first():
        own = claim(folder, settings | recipe.model_dump(), force)
        shared = Path(work or own)
        # the first process may train by then, and hold the folder: the others only read in it
        with working_in(shared, phases) if state.is_main_process else nullcontext():
            work_folder(shared, llm, data, recipe, force)
            if str(data) == "self" and places:
                check_space(shared, llm, tokens, places)
            yield own, shared, texts_for(llm, data, shared, tokens, recipe.seed, phases)


def check_space(work: Path, llm: LLM, tokens: int, places: int) -> None:
    """Raises `OptionError` if the hidden states of so many ``tokens`` at so many ``places`` don't fit on the disk."""
    engine = engine_of(llm)
    if engine.device.type != "cpu":
        return
    needed = tokens * places * engine.facts.hidden_size * engine.dtype.itemsize
    there = sum(file.stat().st_size for file in work.rglob("*.safetensors"))
    free = shutil.disk_usage(work).free
    if needed - there > free:
        raise OptionError(
            f"the hidden states of {tokens:,} tokens take {needed / 1e9:,.1f} GB, and the disk of {str(work)!r} has "
            f"{free / 1e9:,.1f} GB free: ask for fewer tokens, or work on another disk"
        )


@contextmanager
def leading() -> Iterator[bool]:
    """Whether this process is the first of those that train together, which alone writes what came of it; the others
    wait."""
    state = PartialState()
    yield bool(state.is_main_process)
    state.wait_for_everyone()


@contextmanager
def training_in(folder: Path, phases: Phases) -> Iterator[None]:
    """Holds ``folder`` for the processes that train together, as `working_in` does."""
    with working_in(folder, phases) if PartialState().is_main_process else nullcontext():
        yield


def phases_on(console: Console | None) -> Phases:
    """What is shown on ``console``, by default on standard error, by the first of those that train together."""
    return Phases(console or consoles()[1], PartialState().is_main_process)


def watch_with(phases: Phases, work: Path) -> Watch:
    """Tells the figures of each look, and writes events of training."""
    if not PartialState().is_main_process:
        return lambda step, steps, loss, figures: None
    events = _events(work)

    def watch(step: int, steps: int, loss: float, figures: Figures) -> None:
        events(step, {"loss": loss} | figures)
        if figures:
            general, *kinds = told(figures)
            phases.say(f"step {step}/{steps}: loss {loss:.3f}; {general}")
            for line in kinds:
                phases.say(line)

    return watch


def _events(folder: Path) -> Callable[[int, Figures], None]:
    """Writes TensorBoard events, where it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda step, figures: None
    with writing(folder / "events"):
        writer: Any = SummaryWriter(str(folder / "events"))

    def write(step: int, figures: Figures) -> None:
        with writing(folder / "events"):
            for name, value in figures.items():
                writer.add_scalar(name.replace(": ", "/").replace(" ", "/"), value, step)

    return write


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Puts the files that ``write`` writes into a folder into ``folder``. Weights come last, and former ones go before:
    heads that can be read are whole.

    Raises:
        OptionError: if they can't be written.
    """
    with whole(), writing(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".heads.") as room:
        write(Path(room))
        files = sorted(Path(room).iterdir(), key=lambda file: file.name in WEIGHTS)
        if folders := [folder / name for name in MADE if (folder / name).is_dir()]:
            raise OptionError(f"can't write {str(folders[0])!r}: it is a folder")
        for name in WEIGHTS:
            (folder / name).unlink(missing_ok=True)
        for file in files:
            file.replace(folder / file.name)
