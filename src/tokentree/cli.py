"""The command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentree.cli_options import (
    AcceptOption,
    BranchingOption,
    CompileOption,
    DepthOption,
    DeviceOption,
    DrafterOption,
    DraftOption,
    DtypeOption,
    HeadsOption,
    MemoryOption,
    ModelOption,
    QuantizationOption,
    ShapeOption,
    ThreadsOption,
    consoles,
    encode,
    load,
    params_of,
    working,
)
from tokentree.cli_plot import plot
from tokentree.cli_report import report
from tokentree.cli_theory import simulate, theory
from tokentree.cli_train import train
from tokentree.errors import OptionError, PromptError, TokenTreeError

if TYPE_CHECKING:
    from rich.console import Console

    from tokentree.llm import LLM, Result
    from tokentree.sampling import SamplingParams

app = typer.Typer(
    help="Decode several tokens per forward pass of a language model, with the text that plain decoding gives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(train, name="train")
app.add_typer(plot, name="plot")
app.command()(theory)
app.command()(simulate)
app.command()(report)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    model: ModelOption,
    draft_model: DraftOption = None,
    heads: HeadsOption = None,
    drafter: DrafterOption = None,
    shape: ShapeOption = None,
    depth: DepthOption = None,
    branching: BranchingOption = None,
    accept: AcceptOption = "match",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    max_tokens: int = 256,
    num_beams: Annotated[int, typer.Option(help="Above 1: beam search.")] = 1,
    num_return_sequences: Annotated[int, typer.Option(help="How many of the beams to print.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beam search: above 0, longer texts gain.")] = 1.0,
    early_stopping: Annotated[str, typer.Option(help="Of beam search: false, true or never.")] = "false",
    stop: Annotated[list[str] | None, typer.Option(help="End the text at this string; may be repeated.")] = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="A text file that the answer may copy from; may be repeated.")
    ] = None,
    memory: MemoryOption = None,
    chat: Annotated[bool | None, typer.Option(help="Use the chat template; default: if the model has one.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Decode plainly too, and compare token ids.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print what it cost.")] = False,
    show_tree: Annotated[bool, typer.Option("--show-tree", help="Print the tree of each step.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Continue a prompt, or answer it."""
    form = _shape(shape, depth, branching)
    params = params_of(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        seed=seed, max_tokens=max_tokens, stop=tuple(stop or ()), num_beams=num_beams,
        num_return_sequences=num_return_sequences, length_penalty=length_penalty, early_stopping=early_stopping,
    )  # fmt: skip
    _check_beams(params, show_tree)
    text = _prompt_text(prompt)
    references = [_file_text(file) for file in reference or ()]
    console, errors = consoles()
    llm = load(
        errors, model, drafter, threads, draft_model=draft_model, heads=heads, shape=form, accept=accept, dtype=dtype,
        quantization=quantization, compile=compile, device=device, memory=memory,
    )  # fmt: skip
    ids = encode(llm, text, chat)

    from tokentree.show import comparison, figures, print_stream, tree_printer

    if num_beams > 1:
        ways = {"tree": llm} | ({"plain": llm.plain()} if compare else {})
        found = {name: _found(errors, way, ids, params, references) for name, way in ways.items()}
        _show_beams(console, found, stats or compare, as_json)
        return
    if show_tree:
        llm.decoder.watch = tree_printer(errors if as_json else console, llm)
    stream = llm.stream(ids, params, reference=references)
    if as_json or show_tree:
        _drain(stream)
    else:
        print_stream(console, stream)
    result = stream.result
    if show_tree and not as_json:
        console.print(result.text, markup=False, highlight=False)
    if memory is not None:
        llm.save_memory(memory)
    results = {"tree": result}
    if compare:
        llm.decoder.watch = None
        with working(errors, "decoding plainly"):
            results["plain"] = llm.plain().generate([ids], params)[0]
    if as_json:
        print(json.dumps(_as_json(results), ensure_ascii=False))
        return
    if stats or compare:
        console.print(figures(results))
    if compare:
        console.print(comparison(results["tree"], results["plain"]), highlight=False, soft_wrap=True)
    if result.metrics.lossy:
        console.print(f"accept={accept!r} is lossy: this is not what plain decoding writes", highlight=False)
    if result.finish_reason == "interrupted":
        console.print("interrupted", style="yellow")


def _check_beams(params: SamplingParams, show_tree: bool) -> None:
    if params.num_beams > 1 and show_tree:
        raise OptionError("--show-tree prints one text's trees: leave it out with --num-beams")


def _found(errors: Console, llm: LLM, ids: list[int], params: SamplingParams, references: list[str]) -> list[Result]:
    with working(errors, f"searching with {params.num_beams} beams"):
        return llm.generate([ids], params, reference=references)


def _show_beams(console: Console, found: dict[str, list[Result]], stats: bool, as_json: bool) -> None:
    """Prints what beam search found, and with ``plain`` among it, whether one step per forward finds the same."""
    from tokentree.show import figures

    texts = {name: [result.token_ids for result in results] for name, results in found.items()}
    same = len({json.dumps(ids) for ids in texts.values()}) == 1
    if as_json:
        shown = {
            name: {
                "beams": [{"text": r.text, "token_ids": r.token_ids, "score": r.score} for r in results],
                "metrics": results[0].metrics.to_dict(),
            }
            for name, results in found.items()
        }
        print(json.dumps(shown | ({"identical": same} if "plain" in found else {}), ensure_ascii=False))
        return
    for result in found["tree"]:
        score = f"{result.score:.4f}  " if len(found["tree"]) > 1 else ""
        console.print(score + result.text, markup=False, highlight=False)
    if stats:
        console.print(figures({name: results[0] for name, results in found.items()}))
    if "plain" in found:
        console.print("the same texts" if same else "other texts than one step at a time", highlight=False)


@app.command()
def check(
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="JSON lines with 'prompt' or 'turns'.")],
    draft_model: DraftOption = None,
    heads: HeadsOption = None,
    drafter: DrafterOption = None,
    shape: ShapeOption = None,
    accept: AcceptOption = "match",
    max_tokens: int = 128,
    per_category: Annotated[int | None, typer.Option(min=1, help="At most so many prompts of each category.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Compare plain decoding with a tree on your own model and prompts; exit status 1 if an output is WRONG."""
    from tokentree.prompts import read_prompts

    entries = read_prompts(prompts, per_category)
    console, errors = consoles()
    llm = load(
        errors, model, drafter, threads, draft_model=draft_model, heads=heads, shape=shape, accept=accept, dtype=dtype,
        quantization=quantization, compile=compile, device=device,
    )  # fmt: skip
    from dataclasses import asdict

    from rich.progress import Progress

    from tokentree.check import check as run_check

    texts = [encode(llm, entry.turns[0], None if entry.chat else False) for entry in entries]
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("checking", total=len(texts))
        verdicts = run_check(llm, texts, max_tokens, lambda: bar.advance(task))
    counts = {status: sum(v.status == status for v in verdicts) for status in ("identical", "tie", "WRONG")}
    if as_json:
        cases = [{"prompt": e.name, "category": e.category} | asdict(v) for e, v in zip(entries, verdicts, strict=True)]
        print(json.dumps(counts | {"prompts": cases}))
    else:
        for entry, verdict in zip(entries, verdicts, strict=True):
            if verdict.status != "identical":
                gaps = ", ".join(f"{gap:.3g}" for gap in verdict.gaps) or "none"
                console.print(
                    f"{verdict.status}: prompt {entry.name} from token {verdict.first_difference} on; "
                    f"gaps {gaps}; noise {verdict.noise:.3g}",
                    highlight=False,
                )
        console.print(
            f"{counts['identical']} identical, {counts['tie']} ties, {counts['WRONG']} WRONG", highlight=False
        )
    if counts["WRONG"]:
        raise typer.Exit(1)


@app.command()
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
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | None = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Always decode --max-tokens tokens.")] = False,
    per_category: Annotated[int | None, typer.Option(min=1, help="At most so many prompts of each category.")] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="At most so many turns of each prompt.")] = None,
    warm: Annotated[
        list[Path] | None, typer.Option(help="Prompts that methods may learn from before; they are not measured.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Decode so many first turns together.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; drafters start without their memories again.")
    ] = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure methods on the same prompts, interleaved; the first method is what the others are compared with."""
    from tokentree.bench.results import Run, new_run
    from tokentree.prompts import read_prompts

    entries = [entry for file in prompts for entry in read_prompts(file, per_category, turns)]
    earlier = [entry for file in warm or () for entry in read_prompts(file, None, 1)]
    before = Run.load(out) if resume else None
    if batch > 1 and (resume or earlier or any(spec.startswith("transformers") for spec in method)):
        raise OptionError("--batch measures this library's methods, without --warm and --resume")
    if len(entries) < batch:
        raise OptionError(f"there are {len(entries)} prompts: they fill no batch of {batch}")
    params = params_of(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos)
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
            "dtype": str(llm.engine.dtype),
            "quantization": quantization,
            "heads": [str(folder) for folder in heads or ()],
            "compile": compile,
            "device": str(llm.engine.device),
            "attention": llm.engine.attention,
        }
        | {"sampling": params.model_dump(exclude={"logits_processors"})}
    )
    if before is not None:
        if before.settings != json.loads(json.dumps(run.settings)):
            raise OptionError(f"the run in {str(out)!r} was made with other settings: resume it with its own")
        run = before
    total = (len(entries) // batch if batch > 1 else sum(len(entry.turns) for entry in entries)) * len(methods)
    with watched(errors, run, total) as progress:
        if batch > 1:
            ours = [method for method in methods if isinstance(method, TreeMethod)]
            run = run_batches(llm, ours, entries, params, run, out, batch, progress)
        else:
            run = run_bench(llm, methods, entries, params, run, out, progress, earlier)
    for category in dict.fromkeys(sample.category for sample in run.samples):
        console.print(table(run, category))
    console.print(table(run))
    if batch == 1:
        console.print(table(run, cut_loops=True))
    console.print(f"every sample is in {out / 'results.json'}", highlight=False)


@app.command()
def calibrate(
    model: ModelOption,
    draft_model: DraftOption = None,
    heads: HeadsOption = None,
    drafter: DrafterOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines with 'prompt' or 'turns'; default: a few.")] = None,
    max_tokens: int = 64,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file (.png, .svg or .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure what a forward costs here and what drafts are worth, and show the trees that pay."""
    from tokentree.prompts import read_prompts

    entries = read_prompts(prompts) if prompts is not None else None
    if plot is not None:
        from tokentree.drawing import check_plot

        check_plot(plot)
    console, errors = consoles()
    llm = load(
        errors, model, drafter, threads, draft_model=draft_model, heads=heads, dtype=dtype, quantization=quantization,
        compile=compile, device=device,
    )  # fmt: skip

    from rich.progress import Progress

    from tokentree.calibrate import PROMPTS, calibrate, tables

    texts = [encode(llm, entry.turns[0], None if entry.chat else False) for entry in entries or ()]
    texts = texts or [encode(llm, text, None) for text in PROMPTS]
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("calibrating", total=len(texts) + 1)
        found = calibrate(llm, texts, max_tokens, lambda: bar.advance(task))
    if as_json:
        print(found.model_dump_json())
    else:
        for shown in tables(found):
            console.print(shown)
    if plot is not None:
        from tokentree.plots import plot_calibration

        plot_calibration(found, plot)
        errors.print(f"drawn into {plot}", highlight=False)


# -- parts of them ------------------------------------------------------------------------------------------------


def _drain(stream: Any) -> None:
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt:
        stream.close()


def _as_json(results: dict[str, Any]) -> dict[str, Any]:
    tree = results["tree"]
    shown = {
        "text": tree.text,
        "token_ids": tree.token_ids,
        "finish_reason": tree.finish_reason,
        "metrics": tree.metrics.to_dict(),
    }
    if "plain" in results:
        plain = results["plain"]
        shown["plain"] = {"token_ids": plain.token_ids, "metrics": plain.metrics.to_dict()}
        shown["identical"] = plain.token_ids == tree.token_ids
    return shown


def _file_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PromptError(f"can't read the reference {str(file)!r}: {reason}") from None


def _prompt_text(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise PromptError("standard input is not UTF-8 text") from None


def _shape(shape: str | None, depth: int | None, branching: int | None) -> str | None:
    if depth is None and branching is None:
        return shape
    if shape is not None:
        raise OptionError("--shape says what --depth and --branching say: give one of them")
    depth, branching = 3 if depth is None else depth, 2 if branching is None else branching
    if depth < 1 or branching < 1:
        raise OptionError("--depth and --branching must be at least 1")
    return "x".join([str(branching)] * depth)


def main() -> None:
    """The entry point: a user's mistake is one sentence and exit status 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # loading has one progress display, ours
    try:
        app()
    except TokenTreeError as error:
        print(f"tokentree: {error}", file=sys.stderr)
        sys.exit(2)
