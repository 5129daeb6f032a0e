"""The command that writes a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentree.cli.options import (
    DRAFTING,
    AcceptOption,
    BranchingOption,
    CompileOption,
    DepthOption,
    DeviceOption,
    DrafterOption,
    DraftOption,
    DtypeOption,
    EngineOption,
    HeadsOption,
    MaxTokensOption,
    MemoryOption,
    ModelOption,
    QuantizationOption,
    ShapeOption,
    ThreadsOption,
    check_folder,
    encode,
    load,
    params_of,
    prompt_text,
    shape_in,
)
from tokentree.cli.terminal import consoles, say, show, working, write, write_json
from tokentree.errors import OptionError
from tokentree.prompts import checked_text, read_text

if TYPE_CHECKING:
    from tokentree.llm import LLM, Result, Stream
    from tokentree.sampling import SamplingParams

SAMPLING, BEAMS, GRAMMAR = "Sampling", "Beam search", "Structured outputs"  # headings of the help


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    model: ModelOption,
    chat: Annotated[bool | None, typer.Option(help="Use the chat template; default: if the model has one.")] = None,
    max_tokens: MaxTokensOption = 256,
    stop: Annotated[list[str] | None, typer.Option(help="End the text at this string; may be repeated.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Decode plainly too, and compare token ids.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print what it cost, to standard error.")] = False,
    show_tree: Annotated[
        bool, typer.Option("--show-tree", help="Print the tree of each step, to standard error.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    draft_model: DraftOption = None,
    heads: HeadsOption = None,
    drafter: DrafterOption = None,
    shape: ShapeOption = None,
    depth: DepthOption = None,
    branching: BranchingOption = None,
    accept: AcceptOption = "match",
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="A text file that the answer may copy from; may be repeated.", rich_help_panel=DRAFTING),
    ] = None,
    memory: MemoryOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the most probable tokens whose mass reaches this.", rich_help_panel=SAMPLING),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from the k most probable tokens; 0: from all.", rich_help_panel=SAMPLING)
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(
            help="Draw from tokens at least this times as probable as the most probable.", rich_help_panel=SAMPLING
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what was said before becomes less probable.", rich_help_panel=SAMPLING)
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text.", rich_help_panel=SAMPLING)
    ] = None,
    num_beams: Annotated[int, typer.Option(help="Above 1: beam search.", rich_help_panel=BEAMS)] = 1,
    num_return_sequences: Annotated[
        int, typer.Option(help="How many of the beams to print.", rich_help_panel=BEAMS)
    ] = 1,
    length_penalty: Annotated[float, typer.Option(help="Above 0, longer texts gain.", rich_help_panel=BEAMS)] = 1.0,
    early_stopping: Annotated[str, typer.Option(help="false, true or never.", rich_help_panel=BEAMS)] = "false",
    json_schema: Annotated[
        Path | None,
        typer.Option(help="A JSON schema that the text has to fit, in a file.", rich_help_panel=GRAMMAR),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="A regular expression that the text has to match.", rich_help_panel=GRAMMAR)
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(help="The text is this one or another choice; may be repeated.", rich_help_panel=GRAMMAR),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(help="A grammar of the text, in Lark's syntax, in a file.", rich_help_panel=GRAMMAR),
    ] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Continue a prompt, or answer it."""
    text, form = prompt_text(prompt), shape_in(shape, depth, branching)
    params = params_of(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        seed=seed, max_tokens=max_tokens, stop=tuple(checked_text(text, "--stop") for text in stop or ()),
        num_beams=num_beams, num_return_sequences=num_return_sequences, length_penalty=length_penalty,
        early_stopping=early_stopping, structured_outputs=_structured(json_schema, regex, choice, grammar),
    )  # fmt: skip
    if params.num_beams > 1 and show_tree:
        raise OptionError("--show-tree prints one text's trees: leave it out with --num-beams")
    references = [read_text(file, "the reference") for file in reference or ()]
    if memory is not None:
        check_folder(memory)
    _, errors = consoles()
    llm = load(
        errors, model, drafter, threads, draft_model=draft_model, heads=heads, shape=form, accept=accept, dtype=dtype,
        quantization=quantization, compile=compile, device=device, engine=engine, memory=memory,
    )  # fmt: skip
    ids = encode(llm, text, chat)
    if chat is None and llm.tokenizer is not None and not llm.tokenizer.chat_template:
        say("this model has no chat template: it continues the prompt and may not answer it (--no-chat: as meant)")

    write_text = _search if num_beams > 1 else _decode
    results = write_text(llm, ids, params, references, compare, show_tree, as_json)
    if memory is not None:
        llm.save_memory(memory)
    _tell(results, stats and not as_json, compare and not as_json)
    if results["tree"].metrics.lossy:
        say(f"accept={accept!r} is lossy: this is not what plain decoding writes")


def _decode(
    llm: LLM, ids: list[int], params: SamplingParams, references: list[str], compare: bool, show_tree: bool,
    as_json: bool,
) -> dict[str, Result]:  # fmt: skip
    """Prints a text as it comes. Returns what it cost, by the way it was decoded."""
    from tokentree.cli.show import print_stream, tree_printer

    if show_tree:
        llm.decoder.watch = tree_printer(llm)
    stream = llm.stream(ids, params, reference=references)
    if as_json or show_tree:
        _drain(stream)
    else:
        print_stream(stream)
    results = {"tree": stream.result}
    if show_tree and not as_json:
        write(stream.result.text + "\n")
    if compare and stream.result.finish_reason != "interrupted":
        llm.decoder.watch = None
        with working(consoles()[1], "decoding plainly"):
            results["plain"] = llm.plain().generate([ids], params)[0]
    if as_json:
        write_json(_as_json(results))
    return results


def _search(
    llm: LLM, ids: list[int], params: SamplingParams, references: list[str], compare: bool, show_tree: bool,
    as_json: bool,
) -> dict[str, Result]:  # fmt: skip
    """As `_decode`, of what beam search finds; with ``compare`` says whether one step per forward finds the same."""
    found: dict[str, list[Result]] = {}
    for name, way in {"tree": llm, **({"plain": llm.plain()} if compare else {})}.items():
        with working(consoles()[1], f"searching with {params.num_beams} beams"):
            found[name] = way.generate([ids], params, reference=references)
    same = len({str([result.token_ids for result in results]) for results in found.values()}) == 1
    if as_json:
        shown: dict[str, Any] = {
            name: {
                "beams": [{"text": r.text, "token_ids": r.token_ids, "score": r.score} for r in results],
                "metrics": results[0].metrics.to_dict(),
            }
            for name, results in found.items()
        }
        write_json(shown | ({"identical": same} if compare else {}))
        return {name: results[0] for name, results in found.items()}
    for result in found["tree"]:
        write(f"{result.score:.4f}  {result.text}\n" if len(found["tree"]) > 1 else f"{result.text}\n")
    if compare:
        say("the same texts as one step at a time" if same else "other texts than one step at a time")
    return {name: results[0] for name, results in found.items()}


def _tell(results: dict[str, Result], stats: bool, compare: bool) -> None:
    """Says what it cost, and how it ended, on standard error."""
    from tokentree.cli.show import comparison, figures

    tree = results["tree"]
    if stats or compare:
        show(consoles()[1], figures(results))
    if compare and tree.score is None and "plain" in results:
        say(comparison(tree, results["plain"]))
    if tree.finish_reason == "interrupted":
        say("interrupted")


def _drain(stream: Stream) -> None:
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt:
        stream.close()


def _as_json(results: dict[str, Result]) -> dict[str, Any]:
    tree = results["tree"]
    shown: dict[str, Any] = {
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


def _structured(
    json_schema: Path | None, regex: str | None, choice: list[str] | None, grammar: Path | None
) -> dict[str, Any] | None:  # fmt: skip
    """The option of the same name, of those that were given."""
    given = {
        "json": None if json_schema is None else read_text(json_schema, "the JSON schema"),
        "regex": None if regex is None else checked_text(regex, "--regex"),
        "choice": tuple(checked_text(text, "--choice") for text in choice or ()) or None,
        "grammar": None if grammar is None else read_text(grammar, "the grammar"),
    }
    known = {name: value for name, value in given.items() if value is not None}
    return known or None
