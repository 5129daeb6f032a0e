"""The commands that train heads."""

from __future__ import annotations

import importlib.util
import math
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentree.cli.help import Command
from tokentree.cli.interruption import Interruptible
from tokentree.cli.options import DeviceOption, DtypeOption, ModelOption, ThreadsOption, consoles, load, name_of
from tokentree.cli.terminal import say, spelled, write
from tokentree.errors import OptionError

if TYPE_CHECKING:
    from tokentree.train.loop import Recipe
    from tokentree.train.run import Trained

TOKENS = 100_000
EPOCHS, STEPS = 4, 60  # by default: passes over the texts, and steps at least
FEW = 100_000  # tokens below which heads are said to guess little


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class BlockKind(StrEnum):
    dspark = "dspark"
    gated = "dspark-gated"
    recurrent = "dspark-rnn"
    dflash2 = "dflash2"


train = typer.Typer(help="Train heads for a model.", no_args_is_help=True, rich_markup_mode=None)


@train.callback()
def _train() -> None:
    """Train heads for a model."""


DataOption = Annotated[str, typer.Option(help="JSON lines with texts, or 'self': the model writes its own.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the heads; an interrupted training there is gone on with.")]
TokensOption = Annotated[int, typer.Option(min=1, help="With --data self: about how many tokens it writes.")]
KnownOption = Annotated[int, typer.Option(min=1, help="The most frequent tokens, which the heads can propose.")]
EpochsOption = Annotated[
    int | None, typer.Option(min=1, help="Passes over the texts; default: 4, and more over few texts.")
]
RateOption = Annotated[float, typer.Option()]
WarmupOption = Annotated[int, typer.Option(min=0, help="At most a tenth of all steps.")]
EvaluateOption = Annotated[
    int, typer.Option(min=1, help="Steps between looks at texts held back; at most a fifth of all.")
]
PatienceOption = Annotated[int, typer.Option(min=1, help="Looks without progress before it ends.")]
TogetherOption = Annotated[int, typer.Option("--batch", min=1, help="Texts that the model writes together, at most.")]
SeedOption = Annotated[int, typer.Option(min=0)]
WorkOption = Annotated[
    Path | None,
    typer.Option(help="Folder for texts and hidden states, which trainings can share. By default OUT/work."),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Where OUT has heads, or a training with other settings: begin anew.")
]
StartOption = Annotated[Path | None, typer.Option(help="Folder of heads of the same making, to train further.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Of the products of training.")]


@train.command(cls=Command)
def medusa(
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    heads: Annotated[int, typer.Option(min=1, help="How many tokens ahead, beside the next one.")] = 3,
    layers: Annotated[int, typer.Option(min=0, help="Residual blocks in each head.")] = 1,
    tokens: TokensOption = TOKENS,
    known_tokens: KnownOption = 16384,
    epochs: EpochsOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens in a step.")] = 512,
    learning_rate: RateOption = 1e-3,
    warmup_steps: WarmupOption = 50,
    evaluate_every: EvaluateOption = 200,
    patience: PatienceOption = 5,
    batch: TogetherOption = 64,
    way: Annotated[
        str | None,
        typer.Option(
            help="Train the model too (Medusa-2): lora or full. It is changed then, and written into OUT/model."
        ),
    ] = None,
    start: StartOption = None,
    seed: SeedOption = 0,
    precision: PrecisionOption = Precision.float32,
    work: WorkOption = None,
    force: ForceOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train Medusa heads; the model stays as it is, unless --way is given."""
    if work is not None and way is not None:
        raise OptionError("--work goes without --way")
    _check(learning_rate, data, out, force, *(("peft",) if way == "lora" else ()))
    _, errors = consoles()
    with _going_on(out):
        llm = load(errors, model, None, threads, dtype=dtype, device=device, max_batch=batch) if way is None else None
        from tokentree.train.run import train_medusa, train_medusa2

        recipe = _recipe(
            epochs, batch_size=batch_size, learning_rate=learning_rate, warmup_steps=warmup_steps, seed=seed,
            evaluate_every=evaluate_every, patience=patience, precision=precision.value,
        )  # fmt: skip
        options: dict[str, Any] = {
            "num_heads": heads, "num_layers": layers, "known_tokens": known_tokens, "tokens": tokens,
            "console": errors, "command": _command(), "force": force,
        }  # fmt: skip
        if llm is not None:
            done = train_medusa(llm, name_of(model), data, out, recipe, work=work, start=start, **options)
        else:
            options |= {"way": way, "start": start, "batch": batch, "dtype": dtype, "device": device}
            done = train_medusa2(model, data, out, recipe, **options)
    made = (model, str(out)) if way is None else (str(out / "model"), str(out / "heads"))
    _tell(done, *made)


@train.command(cls=Command)
def eagle(
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    version: Annotated[int, typer.Option(help="1 (which EAGLE-2 drafts with too) or 3.")] = 3,
    tokens: TokensOption = TOKENS,
    known_tokens: KnownOption = 4096,
    unroll: Annotated[int, typer.Option(min=1, help="Steps of EAGLE-3's training-time test.")] = 5,
    norm: Annotated[
        list[str] | None,
        typer.Option(help="EAGLE-3.1: fc_norm or norm_before_fc, and norm_output. May be repeated."),
    ] = None,
    start: StartOption = None,
    epochs: EpochsOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a step.")] = 4,
    learning_rate: RateOption = 1e-3,
    warmup_steps: WarmupOption = 50,
    evaluate_every: EvaluateOption = 100,
    patience: PatienceOption = 5,
    batch: TogetherOption = 64,
    seed: SeedOption = 0,
    precision: PrecisionOption = Precision.float32,
    work: WorkOption = None,
    force: ForceOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train an EAGLE head; the model stays as it is."""
    if version not in (1, 3):
        raise OptionError("--version is 1 (which EAGLE-2 drafts with too) or 3")
    _check(learning_rate, data, out, force)
    _, errors = consoles()
    with _going_on(out):
        llm = load(errors, model, None, threads, dtype=dtype, device=device, max_batch=batch)
        from tokentree.train.run_eagle import train_eagle

        recipe = _recipe(
            epochs, batch_size=batch_size, learning_rate=learning_rate, warmup_steps=warmup_steps, seed=seed,
            evaluate_every=evaluate_every, patience=patience, precision=precision.value,
        )  # fmt: skip
        done = train_eagle(
            llm, name_of(model), data, out, recipe, version=version, known_tokens=known_tokens, unroll=unroll,
            norms=norm or (), start=start, tokens=tokens, work=work, console=errors, command=_command(), force=force,
        )  # fmt: skip
    _tell(done, model, str(out))


@train.command(cls=Command)
def block(
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    kind: Annotated[BlockKind, typer.Option(help="What makes a token depend on those before it.")] = BlockKind.dspark,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the head.")] = 2,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens that it guesses in one pass.")] = 7,
    markov_rank: Annotated[
        int, typer.Option(min=0, help="Numbers by which a token tells of its successor; 0: none.")
    ] = 64,
    anchors: Annotated[int, typer.Option(min=1, help="Blocks that are laid into a text, at most.")] = 64,
    distil: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the loss that is the distance to what the model says.")
    ] = 0.9,
    pace: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Guesses count by how far blocks come (D-PACE); probabilities raised by this."),
    ] = None,
    start: StartOption = None,
    tokens: TokensOption = TOKENS,
    known_tokens: KnownOption = 16384,
    epochs: EpochsOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a step.")] = 4,
    learning_rate: RateOption = 6e-4,
    warmup_steps: WarmupOption = 50,
    evaluate_every: EvaluateOption = 100,
    patience: PatienceOption = 5,
    batch: TogetherOption = 64,
    seed: SeedOption = 0,
    precision: PrecisionOption = Precision.float32,
    work: WorkOption = None,
    force: ForceOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train a block head; the model stays as it is."""
    _check(learning_rate, data, out, force)
    _, errors = consoles()
    with _going_on(out):
        llm = load(errors, model, None, threads, dtype=dtype, device=device, max_batch=batch)
        from tokentree.train.run_block import train_block

        recipe = _recipe(
            epochs, batch_size=batch_size, learning_rate=learning_rate, warmup_steps=warmup_steps, seed=seed,
            evaluate_every=evaluate_every, patience=patience, precision=precision.value,
        )  # fmt: skip
        done = train_block(
            llm, name_of(model), data, out, recipe, kind=kind.value, num_layers=layers, block_size=block_size,
            markov_rank=markov_rank, anchors=anchors, distil=distil, pace=pace, start=start,
            known_tokens=known_tokens, tokens=tokens, work=work, console=errors,
            command=_command(), force=force,
        )  # fmt: skip
    _tell(done, model, str(out))


def _check(learning_rate: float, data: str, out: Path, force: bool, *packages: str) -> None:
    """What can be told before a model is loaded."""
    if not 0 < learning_rate < math.inf:
        raise OptionError("--learning-rate must be a number above 0")
    for package in ("accelerate", *packages):
        if importlib.util.find_spec(package) is None:
            raise OptionError(f"this training needs {package}: pip install 'tokentree[train]'")
    from tokentree.train.job import check_folder
    from tokentree.train.texts import check_data

    if data != "self":
        check_data(data)
    check_folder(out, force)


def _recipe(epochs: int | None, **options: Any) -> Recipe:
    from tokentree.train.loop import Recipe

    return Recipe(epochs=epochs or EPOCHS, least_steps=0 if epochs else STEPS, **options)


def _going_on(out: Path) -> Interruptible:
    """Says once, however many processes train, how to go on after an interruption."""
    said = f"what is done is kept in {str(out / 'work')!r}; the same command goes on from there"
    return Interruptible(said if os.environ.get("RANK", "0") == "0" else "")


def _command() -> str:
    return shlex.join(["tokentree", *sys.argv[1:]])


def _tell(done: Trained, model: str, heads: str) -> None:
    """Says where the heads are, once, however many processes trained them."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if bad := done.texts.bad:
        shown = "; ".join(bad[:3]) + ("; …" if len(bad) > 3 else "")
        say(spelled(f"{len(bad)} lines left out: {shown}"))
    if done.texts.tokens < FEW:
        said = f"These heads saw {done.texts.tokens:,} tokens: they show how it goes, and guess little. "
        say(said + "Heads that pay take some hundred thousand.")
    words = shlex.join(["tokentree", "generate", "--model", model, "--heads", heads])
    write(f"heads are in {heads}: {words} …\n")
