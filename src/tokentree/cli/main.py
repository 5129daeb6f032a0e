"""The command."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tokentree.cli.chat import chat
from tokentree.cli.generate import generate
from tokentree.cli.help import Command, Group
from tokentree.cli.interruption import Interruptible
from tokentree.cli.options import (
    AcceptOption,
    CompileOption,
    DeviceOption,
    DrafterOption,
    DraftOption,
    DtypeOption,
    EngineOption,
    HeadsOption,
    JsonOption,
    MaxTokensOption,
    ModelOption,
    PerCategoryOption,
    QuantizationOption,
    ShapeOption,
    ThreadsOption,
    check_folder,
    encode,
    load,
    params_of,
)
from tokentree.cli.plan import plan
from tokentree.cli.plot import plot
from tokentree.cli.report import report
from tokentree.cli.serve import serve
from tokentree.cli.serving import (
    PREFIX_MB,
    ServingBatchOption,
    ServingOption,
    ServingSecondsOption,
    requests_of,
    with_serving,
)
from tokentree.cli.terminal import (
    close_streams,
    consoles,
    open_streams,
    say,
    show,
    spelled,
    working,
    write,
    write_json,
)
from tokentree.cli.theory import simulate, theory
from tokentree.cli.train import train
from tokentree.errors import OptionError, TokenTreeError

BROKEN_PIPE, INTERRUPTED, MISTAKE = 141, 130, 2  # exit statuses; the first two are what shells show for the signals

app = typer.Typer(
    cls=Group,
    help="Decode several tokens per forward pass of a language model, with the text that plain decoding gives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(train, name="train", cls=Group)
app.add_typer(plot, name="plot", cls=Group)
for command in (generate, chat, serve, report, theory, simulate, plan):
    app.command(cls=Command)(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        write(f"tokentree {version('tokentree')}\n")
        raise typer.Exit


@app.callback()
def _tokentree(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Decode several tokens per forward pass of a language model, with the text that plain decoding gives."""


@app.command(cls=Command)
def check(
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="JSON lines with 'prompt' or 'turns'.")],
    draft_model: DraftOption = None,
    heads: HeadsOption = None,
    drafter: DrafterOption = None,
    shape: ShapeOption = None,
    accept: AcceptOption = "match",
    max_tokens: MaxTokensOption = 128,
    per_category: PerCategoryOption = None,
    as_json: JsonOption = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Compare plain decoding with a tree on your own model and prompts; exit status 1 if an output is WRONG."""
    from tokentree.prompts import read_prompts

    entries = read_prompts(prompts, per_category)
    _, errors = consoles()
    llm = load(
        errors, model, drafter, threads, draft_model=draft_model, heads=heads, shape=shape, accept=accept, dtype=dtype,
        quantization=quantization, compile=compile, device=device, engine=engine,
    )  # fmt: skip
    from rich.progress import Progress

    from tokentree.check import check as run_check

    texts = [encode(llm, entry.turns[0], None if entry.chat else False) for entry in entries]
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("checking", total=len(texts))
        verdicts = run_check(llm, texts, max_tokens, lambda: bar.advance(task))
    counts = {status: sum(v.status == status for v in verdicts) for status in ("identical", "tie", "WRONG")}
    if as_json:
        cases = [{"prompt": e.name, "category": e.category} | asdict(v) for e, v in zip(entries, verdicts, strict=True)]
        write_json(counts | {"prompts": cases, "caveat": llm.engine.info.caveat})
    else:
        for entry, verdict in zip(entries, verdicts, strict=True):
            if verdict.status != "identical":
                gaps = ", ".join(f"{gap:.3g}" for gap in verdict.gaps) or "none"
                write(
                    f"{verdict.status}: prompt {spelled(entry.name)} from token {verdict.first_difference} on; "
                    f"gaps {gaps}; noise {verdict.noise:.3g}\n"
                )
        write(f"{counts['identical']} identical, {counts['tie']} ties, {counts['WRONG']} WRONG\n")
        if llm.engine.info.caveat:
            write(f"{llm.engine.info.caveat}\n")
    if counts["WRONG"]:
        raise typer.Exit(1)


@app.command(cls=Command)
def bench(
    model: ModelOption,
    prompts: Annotated[list[Path], typer.Option(help="JSON lines with 'prompt' or 'turns'; may be repeated.")],
    method: Annotated[
        list[str],
        typer.Option(
            help="plain, default, DRAFTER:SHAPE, transformers, transformers:assisted:N or transformers:lookup:N."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results.json.")],
    draft_model: DraftOption = None,
    heads: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with heads for this model; may be repeated, and 'default' takes the first."),
    ] = None,
    max_tokens: MaxTokensOption = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same texts.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Always decode --max-tokens tokens.")] = False,
    per_category: PerCategoryOption = None,
    turns: Annotated[int | None, typer.Option(min=1, help="At most so many turns of each prompt.")] = None,
    warm: Annotated[
        list[Path] | None, typer.Option(help="Prompts that methods may learn from before; they are not measured.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Decode so many first turns together.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; drafters start without their memories again.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin anew where --out has a run, which is lost.")] = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure methods on the same prompts, interleaved; the first method is what the others are compared with."""
    from tokentree.bench.results import RESULTS, Run, new_run
    from tokentree.prompts import distinct, read_prompts

    if resume and force:
        raise OptionError("--resume goes on with the run in --out, and --force begins anew: give one of them")
    if twice := [spec for spec in dict.fromkeys(method) if method.count(spec) > 1]:
        raise OptionError(f"--method {twice[0]} is given twice: a method is measured once")
    entries = distinct([entry for file in prompts for entry in read_prompts(file, per_category, turns)])
    earlier = [entry for file in warm or () for entry in read_prompts(file, None, 1)]
    if (out / RESULTS).exists() and not (resume or force):
        raise OptionError(
            f"there is a run in {str(out)!r}: go on with it (--resume), lose it (--force), or name another folder"
        )
    before = Run.load(out) if resume else None
    if batch > 1 and (resume or earlier or any(spec.startswith("transformers") for spec in method)):
        raise OptionError("--batch measures this library's methods, without --warm and --resume")
    if len(entries) < batch:
        raise OptionError(f"there are {len(entries)} prompts: they fill no batch of {batch}")
    params = params_of(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos)
    if missing := [str(folder) for folder in heads or () if not folder.is_dir()]:
        raise OptionError(f"there is no folder {missing[0]!r} with heads")
    check_folder(out)
    console, errors = consoles()
    llm = load(
        errors, model, "none", threads, draft_model=draft_model, heads=heads[0] if heads else None, dtype=dtype,
        quantization=quantization, compile=compile, device=device,
    )  # fmt: skip

    from tokentree.bench.live import watched
    from tokentree.bench.methods import TreeMethod, make_method
    from tokentree.bench.peers import Peers
    from tokentree.bench.report import table
    from tokentree.bench.runner import run_batches, run_bench

    peers = Peers(model, draft_model[0] if draft_model else None, dtype, device, llm)
    with working(errors, "loading what is measured"):
        methods = [make_method(spec, llm, peers, heads or ()) for spec in method]
    names = [str(file) for file in prompts]
    run = new_run(
        {"model": model, "draft_model": draft_model, "prompts": names, "per_category": per_category, "turns": turns}
        | {"warm": [str(file) for file in warm or ()], "batch": batch}
        | {
            "methods": method,
            "dtype": str(llm.engine.info.dtype),
            "quantization": quantization,
            "heads": [str(folder) for folder in heads or ()],
            "compile": compile,
            "device": str(llm.engine.info.device),
            "attention": llm.engine.info.attention,
        }
        | {"sampling": params.model_dump(exclude={"logits_processors"})}
    )
    if before is not None:
        if before.settings != json.loads(json.dumps(run.settings)):
            raise OptionError(f"the run in {str(out)!r} was made with other settings: resume it with its own")
        run = before
    total = (len(entries) // batch if batch > 1 else sum(len(entry.turns) for entry in entries)) * len(methods)
    said = f"what was measured is kept in {str(out / RESULTS)!r}" + (", and --resume goes on from there" * (batch == 1))
    with Interruptible(said), watched(errors, run, total) as progress:
        if batch > 1:
            ours = [method for method in methods if isinstance(method, TreeMethod)]
            run = run_batches(llm, ours, entries, params, run, out, batch, progress)
        else:
            run = run_bench(llm, methods, entries, params, run, out, progress, earlier)
    for category in dict.fromkeys(sample.category for sample in run.samples):
        show(console, table(run, category))
    show(console, table(run))
    if batch == 1:
        show(console, table(run, cut_loops=True))
    write(f"every sample is in {out / RESULTS}\n")


@app.command(cls=Command)
def calibrate(
    model: ModelOption,
    draft_model: DraftOption = None,
    heads: HeadsOption = None,
    drafter: DrafterOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines with 'prompt' or 'turns'; default: a few.")] = None,
    max_tokens: MaxTokensOption = 64,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file (.png, .svg or .pdf).")] = None,
    serving: ServingOption = None,
    serving_seconds: ServingSecondsOption = 15.0,
    max_batch: ServingBatchOption = 8,
    as_json: JsonOption = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure what a forward costs here and what drafts are worth, and show the trees that pay."""
    from tokentree.prompts import read_prompts

    entries = read_prompts(prompts) if prompts is not None else None
    bodies = requests_of(serving) if serving is not None else []
    if plot is not None:
        from tokentree.plots.drawing import check_plot

        check_plot(plot)
    console, errors = consoles()
    llm = load(
        errors, model, drafter, threads, draft_model=draft_model, heads=heads, dtype=dtype, quantization=quantization,
        compile=compile, device=device, engine=engine, prefix_mb=PREFIX_MB if bodies else 0,
    )  # fmt: skip

    from rich.progress import Progress

    from tokentree.calibrate import PROMPTS, calibrate, certainty, tables

    texts = [encode(llm, entry.turns[0], None if entry.chat else False) for entry in entries or ()]
    texts = texts or [encode(llm, text, None) for text in PROMPTS]
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("calibrating", total=len(texts) + 1)
        found = calibrate(llm, texts, max_tokens, lambda: bar.advance(task))
        if bodies:
            found = with_serving(found, llm, model, bodies, max_batch, serving_seconds, bar)
    if as_json:
        write_json(found.model_dump())
    else:
        for shown in tables(found):
            show(console, shown)
    say(certainty(found))
    if plot is not None:
        from tokentree.plots.cost import plot_calibration

        plot_calibration(found, plot)
        say(f"drawn into {plot}")


# -- what every command ends with ---------------------------------------------------------------------------------


def main() -> None:
    """The entry point. A user's mistake, and what a machine refuses (a file, a disk that is full), is one sentence on
    standard error and exit status 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # loading has one progress display, ours
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        status, told = _run()
    try:
        close_streams()
    except BrokenPipeError:
        status, told = BROKEN_PIPE, None
    except (OSError, ValueError) as error:
        status, told = MISTAKE, f"can't write to standard output: {_reason(error)}"
    if told is not None:
        say(f"tokentree: {_on_a_line(told)}")
    sys.exit(status)


def _run() -> tuple[int, str | None]:
    """The exit status, and what there is to say of it."""
    try:
        open_streams()
    except OptionError as error:
        return MISTAKE, str(error)
    streams = sys.stdout, sys.stderr
    try:
        with Interruptible() as interruption:
            status = app(prog_name="tokentree", standalone_mode=False) or 0
        return interruption.status or status, None
    except typer.Exit as end:
        return end.exit_code, None
    except typer.TyperException as error:  # a mistake in the words of the command
        context = getattr(error, "ctx", None)
        if context is None:
            return MISTAKE, _sentence(error)
        if error.message == context.get_help():  # no words at all
            say(error.message)
            return MISTAKE, None
        return MISTAKE, f"{_sentence(error)} ({context.command_path} -h)"
    except SystemExit as end:  # typer's, where a pipe is closed, and of shell completion
        closed = isinstance(end.__context__, BrokenPipeError)
        return BROKEN_PIPE if closed else MISTAKE if end.code else 0, None
    except typer.Abort:
        return INTERRUPTED, None
    except BrokenPipeError:
        return BROKEN_PIPE, None
    except (TokenTreeError, OSError, UnicodeError, MemoryError) as error:
        return MISTAKE, _mistake(error)
    finally:
        sys.stdout, sys.stderr = streams  # typer wraps those of a closed pipe


def _mistake(error: Exception) -> str:
    if isinstance(error, OSError):
        names = [repr(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return f"can't {'read or write ' + ' or '.join(names) if names else 'write'}: {_reason(error)}"
    if isinstance(error, UnicodeError):
        return f"what was given is not UTF-8 text: {error}"
    return "out of memory" if isinstance(error, MemoryError) else str(error)


def _sentence(error: typer.TyperException) -> str:
    said = error.format_message().rstrip(".").replace("Value error, ", "")
    return said[:1].lower() + said[1:]


def _on_a_line(text: str) -> str:
    return spelled(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line, and nothing of where it comes from."""
    say(f"tokentree: {_on_a_line(str(message))}")
