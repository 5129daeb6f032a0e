"""What all trainings of heads share: the folder that they work in, their texts, and what is shown meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokentree.errors import OptionError, PromptError
from tokentree.heads.saved import Fingerprint
from tokentree.llm import LLM
from tokentree.train.loop import Figures, Recipe, Watch
from tokentree.train.texts import Texts, keep_texts, read_texts


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


def work_folder(work: Path, llm: LLM, data: str | Path, recipe: Recipe) -> Path:
    """``work``, the folder for texts and hidden states, which belongs to one model, one source of texts and one seed.

    Raises:
        OptionError: if it belongs to others.
    """
    kind = str(llm.engine.dtype).removeprefix("torch.")
    owner = Fingerprint.of(llm.config, llm.tokenizer).model_dump() | {
        "data": str(data), "seed": recipe.seed, "dtype": kind
    }  # fmt: skip
    file, content = work / "about.json", json.dumps(owner)
    if file.is_file() and file.read_text(encoding="utf-8") != content:
        raise OptionError(
            f"{str(work)!r} is the work of another run, with another model, dtype, data or seed: name another"
        )
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return work


def texts_for(llm: LLM, data: str | Path, work: Path, tokens: int, seed: int, bars: Progress) -> Texts:
    if str(data) != "self":
        assert llm.tokenizer is not None
        return read_texts(data, llm.tokenizer, min(1024, llm.engine.context))
    bar = bars.add_task("writing texts", total=tokens)
    return keep_texts(llm, work / "texts.jsonl", tokens, seed, lambda count: bars.advance(bar, count))


@contextmanager
def leading() -> Iterator[bool]:
    """Whether this process is the first of those that train together, which alone writes what came of it; the others
    wait."""
    state = PartialState()
    yield bool(state.is_main_process)
    state.wait_for_everyone()


def bars_on(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(
        *columns, console=console, transient=True, disable=not (console.is_terminal and PartialState().is_main_process)
    )


def watch_with(console: Console, bars: Progress, work: Path) -> Watch:
    """Shows how training goes, and writes its events."""
    if not PartialState().is_main_process:
        return lambda step, steps, loss, figures: None
    bar, events = bars.add_task("training", total=None), _events(work)

    def watch(step: int, steps: int, loss: float, figures: Figures) -> None:
        bars.update(bar, total=steps, completed=step, description=f"training, loss {loss:.3f}")
        events(step, {"loss": loss} | figures)
        if figures:
            told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            console.print(f"step {step}/{steps}: loss {loss:.3f}; {told}", highlight=False)

    return watch


def _events(folder: Path) -> Callable[[int, Figures], None]:
    """Writes TensorBoard events, where it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda step, figures: None
    writer: Any = SummaryWriter(str(folder / "events"))

    def write(step: int, figures: Figures) -> None:
        for name, value in figures.items():
            writer.add_scalar(name.replace(" ", "/"), value, step)

    return write
