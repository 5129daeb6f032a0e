"""One training loop: batches of numbered places, checkpoints, early stop, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from torch import nn

from tokentree.errors import OptionError
from tokentree.train.keeping import keep_state, kept_state, whole
from tokentree.train.progress import Phases

CHECKPOINT = "checkpoint.pt"
PAUSE = 60.0  # seconds between two checkpoints, at least
SHARE = 0.05  # of the time that writing checkpoints may take

Figures = dict[str, float]


class Recipe(BaseModel):
    """How heads are trained.

    Args:
        epochs: passes over the data.
        least_steps: over few texts, more passes are made, for so many steps.
        batch_size: places in a step, over all processes.
        learning_rate: at its highest, after ``warmup_steps``, but at most a tenth of all steps; it then falls to a
            tenth along a cosine.
        weight_decay: of AdamW.
        max_norm: gradients are cut to it.
        seed: of the order of the data.
        evaluate_every: steps between two looks at the texts that were held back, but at most a fifth of all steps.
        patience: looks without a better loss after which training stops.
        precision: of the products; weights, their gradients and losses are in float32 in either case. CPUs with
            AVX512-BF16 or AMX, and GPUs, are faster in bfloat16.

    Raises:
        OptionError: on an unknown name or a value out of range.
    """

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(1, ge=1, le=100_000)
    least_steps: int = Field(0, ge=0, le=1_000_000)
    batch_size: int = Field(512, ge=1, le=2**31)
    learning_rate: float = Field(1e-3, gt=0, le=100, allow_inf_nan=False)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**32)
    evaluate_every: int = Field(200, ge=1)
    patience: int = Field(5, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise OptionError(f"{name}={first['input']!r} of a training: {first['msg'].lower()}") from None


class Task(Protocol):
    """What is trained.

    Attributes:
        size: places that there are.
    """

    size: int

    def loss(self, model: nn.Module, places: torch.Tensor) -> torch.Tensor:
        """The loss over these places, a scalar."""
        ...

    def evaluate(self, model: nn.Module) -> tuple[float, Figures]:
        """Loss and further figures on what was held back."""
        ...


Watch = Callable[[int, int, float, Figures], None]  # step, steps in all, loss, figures (empty between looks)


def train(
    model: nn.Module, groups: list[dict[str, Any]], task: Task, recipe: Recipe, folder: Path, watch: Watch,
    about: dict[str, Any] | None = None, stop_after: int | None = None, phases: Phases | None = None,
    trained: bool = False,
) -> Figures:  # fmt: skip
    """Trains ``model`` in place, to its best state on what was held back; returns the figures of that state.

    A checkpoint in ``folder``, written at each look, each minute, and at an interruption, is gone on with: the order of
    the data, the learning rate and the optimizer's state are those of a run that was never interrupted.

    Args:
        groups: of parameters, as optimizers take them; ``scale`` in one multiplies the learning rate.
        about: what else tells this run from others; a checkpoint of another one is refused.
        stop_after: end at this step as a run that is killed would, for tests.
        trained: whether ``model`` has been trained before: it is looked at before the first step too, and stays what it
            is if it doesn't get better.

    Raises:
        OptionError: if the checkpoint was made by another run, is damaged or can't be written, or there is nothing to
            train on.
    """
    accelerator = Accelerator()
    low = recipe.precision == "bfloat16"
    rounded = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=low)
    if task.size < 1:
        raise OptionError("there is nothing to train on: no token has another one far enough behind it")
    scales = [group.pop("scale", 1.0) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    steps = max(recipe.epochs * max(1, task.size // recipe.batch_size), recipe.least_steps)
    warmup, every = min(recipe.warmup_steps, steps // 10), min(recipe.evaluate_every, max(1, steps // 5))
    state = _State(folder / CHECKPOINT, {"recipe": recipe.model_dump(), "steps": steps} | (about or {}))
    state.load(bare, optimizer)
    told = _first_look(bare, task, rounded, state) if trained and state.best is None else []
    lead = accelerator.is_main_process

    def save() -> None:
        if lead:
            state.save(bare, optimizer)

    def tell() -> None:
        for number, loss, figures in told if lead else ():
            watch(number, steps, float(loss), figures)
            show(number, f"loss {float(loss):.3f}")
        told.clear()

    shown = (phases or Phases(Console(), shown=False)).phase("training", steps, "steps", state.step)
    with shown as show, _kept(save):
        for step, places in _batches(task.size, recipe, state.step):
            if step >= steps or state.waited >= recipe.patience:
                break
            with whole(), state.step_to(step + 1):
                for group, scale in zip(optimizer.param_groups, scales, strict=True):
                    group["lr"] = scale * recipe.learning_rate * _pace(step, steps, warmup)
                mine = places[accelerator.process_index :: accelerator.num_processes]
                with rounded():
                    loss = task.loss(model, mine)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), recipe.max_norm)
                optimizer.step()
                optimizer.zero_grad()
                tell()  # of the step before: a loss is waited for once the next step is on its way
                figures = Figures()
                if (step + 1) % every == 0 or step + 1 == steps:
                    with rounded():
                        value, figures = task.evaluate(bare)
                    state.look(value, figures, bare)
            if figures or state.is_due:
                save()
            told.append((step + 1, loss.detach(), figures))
            if stop_after is not None and step + 1 >= stop_after:
                tell()
                return state.figures
        tell()
    if state.best is not None:
        _put(bare, state.best)
    return state.figures


@contextmanager
def _kept(save: Callable[[], None]) -> Iterator[None]:
    """An interruption of the block saves what there is."""
    try:
        yield
    except KeyboardInterrupt:
        save()
        raise


def _first_look(
    model: nn.Module, task: Task, rounded: Callable[[], AbstractContextManager[Any]], state: _State
) -> list[tuple[int, torch.Tensor, Figures]]:  # fmt: skip
    """A look before the first step; returns what is told of it."""
    with rounded():
        loss, figures = task.evaluate(model)
    state.look(loss, figures, model)
    return [(0, torch.tensor(loss), figures)]


def _batches(size: int, recipe: Recipe, first: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Numbered batches of places without end, from number ``first`` on; each epoch has an order of its own that follows
    from the seed. What is left over at its end is left out."""
    each = max(1, size // recipe.batch_size)
    for epoch in count(first // each):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        parts = torch.randperm(size, generator=generator).split(recipe.batch_size)[:each]
        for step, part in enumerate(parts, epoch * each):
            if step >= first:
                yield step, part


def _pace(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


class _State:
    """How far a run has come, and its best state so far."""

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        self._file, self._about = file, about
        self.step, self.waited, self.least = 0, 0, math.inf
        self.best: dict[str, torch.Tensor] | None = None
        self.figures: Figures = {}
        self._saved = 0  # the step
        self._due, self._between = time.monotonic() + PAUSE, True

    @contextmanager
    def step_to(self, step: int) -> Iterator[None]:
        """A step is done in the block. One that doesn't come to its end leaves nothing that could be saved."""
        self._between = False
        yield
        self.step, self._between = step, True

    def look(self, loss: float, figures: Figures, model: nn.Module) -> None:
        self.waited += 1
        if loss < self.least:
            self.least, self.waited, self.figures = loss, 0, figures
            self.best = {name: value.clone() for name, value in _trained(model).items()}

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def save(self, model: nn.Module, optimizer: Any) -> None:
        if not self._between or self._saved == self.step:
            return
        content = self._about | {
            "step": self.step, "waited": self.waited, "least": self.least, "figures": self.figures, "best": self.best,
            "model": _trained(model), "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        begun = time.monotonic()
        keep_state(self._file, content)
        self._saved, now = self.step, time.monotonic()
        self._due = now + max(PAUSE, (now - begun) / SHARE)

    def load(self, model: nn.Module, optimizer: Any) -> None:
        if not self._file.is_file():
            return
        content = kept_state(self._file)
        if content is None:
            raise OptionError(
                f"the checkpoint {str(self._file)!r} is damaged: remove it, and training begins anew with the texts "
                "and hidden states that are there"
            )
        if {name: content.get(name) for name in self._about} != self._about:
            raise OptionError(
                f"{str(self._file)!r} was made with another recipe or other data: remove it to start anew"
            )
        _put(model, content["model"])
        optimizer.load_state_dict(content["optimizer"])
        self.step, self.waited, self.least = content["step"], content["waited"], content["least"]
        self.figures, self.best, self._saved = content["figures"], content["best"], content["step"]


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes of ``model``."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def _put(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(model.state_dict() | values)
