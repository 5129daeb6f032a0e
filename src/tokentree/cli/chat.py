"""The command that chats."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentree.cli.generate import SAMPLING
from tokentree.cli.options import (
    MODEL,
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
    MemoryOption,
    QuantizationOption,
    ShapeOption,
    ThreadsOption,
    check_folder,
    load,
    name_of,
    params_of,
    shape_in,
)
from tokentree.cli.terminal import consoles, say
from tokentree.errors import OptionError
from tokentree.prompts import checked_text, read_text

if TYPE_CHECKING:
    from tokentree.chatting.session import Session

SERVER = "A server instead of a model"  # a heading of the help
MAX_TOKENS, PREFIX_MB = 1024, 256  # of an answer, and of what is kept of the conversation, for a model of our own


def chat(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A GGUF file, a folder of safetensors, or a name on the hub, as org/name; with --url what the server "
            "calls it, by default its first one.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A server with OpenAI's interface, as http://localhost:8000.", rich_help_panel=SERVER),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that it asks for.", rich_help_panel=SERVER)
    ] = None,
    system: Annotated[str, typer.Option(help="The message that stands before all others.")] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"The most tokens of an answer; default: {MAX_TOKENS}, or what the server says."),
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="Keep what you type for the next chat, in a file of yours alone.")
    ] = False,
    draft_model: DraftOption = None,
    heads: HeadsOption = None,
    drafter: DrafterOption = None,
    shape: ShapeOption = None,
    depth: DepthOption = None,
    branching: BranchingOption = None,
    accept: AcceptOption = "match",
    memory: MemoryOption = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy; default: 0, or what the server says.", rich_help_panel=SAMPLING),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the most probable tokens whose mass reaches this.", rich_help_panel=SAMPLING),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answers.", rich_help_panel=SAMPLING)
    ] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Chat with a model, or with a server's."""
    try:
        import httpx  # noqa: F401
        import prompt_toolkit  # noqa: F401
    except ModuleNotFoundError as error:
        raise OptionError(f"chatting needs {error.name}: pip install 'tokentree[chat]'") from None
    asked = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    sampling = {name: value for name, value in asked.items() if value is not None}
    params = params_of(**{"max_tokens": MAX_TOKENS} | sampling)
    checked_text(system, "--system")
    options: dict[str, Any] = {
        "draft_model": draft_model, "heads": heads, "dtype": dtype, "quantization": quantization, "compile": compile,
        "device": device, "engine": engine, "memory": memory,
    }  # fmt: skip
    if url is not None:
        others = {"drafter": drafter, "shape": shape, "depth": depth, "branching": branching, "threads": threads}
        _check_alone(options | others | {"accept": accept != "match"})
        key = "" if api_key_file is None else _key(api_key_file)
        asyncio.run(_far(url, key, model, sampling, system, history))
        return
    if api_key_file is not None:
        raise OptionError("--api-key-file goes with --url")
    if model is None:
        raise OptionError("there is nobody to chat with: name a model by --model, or a server by --url")
    form = shape_in(shape, depth, branching)
    if memory is not None:
        check_folder(memory)
    llm = load(consoles()[1], model, drafter, threads, shape=form, accept=accept, prefix_mb=PREFIX_MB, **options)
    asyncio.run(_here(llm, name_of(model), params, system, history))
    if memory is not None:
        llm.save_memory(memory)
    if accept in ("best_path", "typical"):
        say(f"accept={accept!r} is lossy: this is not what plain decoding writes")


async def _here(llm: Any, name: str, params: Any, system: str, history: bool) -> None:
    from tokentree.chatting.local import Local
    from tokentree.chatting.session import Session

    answerer = Local(llm, name, params)
    try:
        await _talk(Session(answerer, system), history)
    finally:
        await answerer.close()


async def _far(url: str, key: str, model: str | None, options: dict[str, Any], system: str, history: bool) -> None:
    from tokentree.chatting.remote import Remote
    from tokentree.chatting.session import Session

    answerer = Remote(url, key, model, options)
    try:
        await answerer.start()
        await _talk(Session(answerer, system), history)
    finally:
        await answerer.close()


async def _talk(session: Session, history: bool) -> None:
    """In a terminal, if both streams are one; else line by line."""
    from tokentree.cache import cache_folder
    from tokentree.chatting.terminal import converse, pipe

    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        await converse(session, cache_folder() / "chat" / "history" if history else None)
    else:
        await pipe(session)


def _check_alone(options: dict[str, Any]) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise OptionError(f"with --url the server decodes, and {', '.join(given)} is for a model here: leave it out")


def _key(file: Path) -> str:
    """The first line of a file that is no comment.

    Raises:
        OptionError: if there is no key that can be sent.
    """
    lines = [line.strip() for line in read_text(file, "the file of the key").splitlines()]
    key = next((line for line in lines if line and not line.startswith("#")), "")
    if not key or not key.isascii() or not key.isprintable():
        raise OptionError(f"there is no key in {str(file)!r}")
    return key
