"""The commands that train heads."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tokentree.cli_options import DeviceOption, DtypeOption, ModelOption, ThreadsOption, consoles, load
from tokentree.errors import OptionError

train = typer.Typer(help="Train heads for a model.", no_args_is_help=True, rich_markup_mode=None)


@train.callback()
def _train() -> None:
    """Train heads for a model."""


@train.command()
def medusa(
    model: ModelOption,
    data: Annotated[str, typer.Option(help="JSON lines with texts, or 'self': the model writes its own.")],
    out: Annotated[Path, typer.Option(help="Folder for the heads; what is finished of an earlier run is used.")],
    heads: Annotated[int, typer.Option(min=1, help="How many tokens ahead, beside the next one.")] = 3,
    layers: Annotated[int, typer.Option(min=0, help="Residual blocks in each head.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="With --data self: how many tokens it writes.")] = 1_000_000,
    known_tokens: Annotated[
        int, typer.Option(min=1, help="The most frequent tokens, which the heads can propose.")
    ] = 16384,
    epochs: Annotated[int, typer.Option(min=1)] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens in a step.")] = 512,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    warmup_steps: Annotated[int, typer.Option(min=0)] = 50,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between looks at texts held back.")] = 200,
    patience: Annotated[int, typer.Option(min=1, help="Looks without progress before it ends.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Texts that the model writes together.")] = 64,
    way: Annotated[
        str | None,
        typer.Option(
            help="Train the model too (Medusa-2): lora or full. It is changed then, and written into OUT/model."
        ),
    ] = None,
    start: Annotated[Path | None, typer.Option(help="With --way: a folder of heads to start from.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train Medusa heads; the model stays as it is, unless --way is given."""
    if learning_rate <= 0:
        raise OptionError("--learning-rate must be above 0")
    if start is not None and way is None:
        raise OptionError("--start goes with --way")
    for package in ("accelerate", *(("peft",) if way == "lora" else ())):
        if importlib.util.find_spec(package) is None:
            raise OptionError(f"this training needs {package}: pip install 'tokentree[train]'")
    _, errors = consoles()
    llm = load(errors, model, None, threads, dtype=dtype, device=device, max_batch=batch) if way is None else None
    from tokentree.train.loop import Recipe
    from tokentree.train.run import train_medusa, train_medusa2

    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, warmup_steps=warmup_steps, seed=seed,
        evaluate_every=evaluate_every, patience=patience,
    )  # fmt: skip
    options: dict[str, Any] = {
        "num_heads": heads, "num_layers": layers, "known_tokens": known_tokens, "tokens": tokens, "console": errors,
        "command": shlex.join(["tokentree", *sys.argv[1:]]),
    }  # fmt: skip
    if llm is not None:
        done = train_medusa(llm, Path(model).name, data, out, recipe, **options)
    else:
        options |= {"way": way, "start": start, "batch": batch, "dtype": dtype, "device": device}
        done = train_medusa2(model, data, out, recipe, **options)
    if done.texts.bad:
        shown = "; ".join(done.texts.bad[:3]) + ("; …" if len(done.texts.bad) > 3 else "")
        errors.print(f"{len(done.texts.bad)} lines left out: {shown}", markup=False, highlight=False)
    made = (model, out) if way is None else (out / "model", out / "heads")
    print(f"heads are in {made[1]}: tokentree generate --model {made[0]} --heads {made[1]} …")
