"""What the commands share: options, prompts, loading."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentree.cli.terminal import consoles, working
from tokentree.drafters.names import ASSISTANTS, BLOCK_HEADS, DRAFT_MODELS, DRAFTERS, EAGLE_HEADS, LOOKUPS, MEDUSA_HEADS
from tokentree.engines.names import ENGINES
from tokentree.errors import OptionError, PromptError
from tokentree.prompts import checked_text, read_text, text_of

if TYPE_CHECKING:
    from rich.console import Console

    from tokentree.llm import LLM
    from tokentree.sampling import SamplingParams

__all__ = ["consoles", "encode", "load", "params_of", "prompt_text", "shape_in", "working"]

MODEL, DRAFTING = "Model", "Drafting"  # headings of the help
SINGLE = [name for name in DRAFTERS if name not in ("none", "merged")]

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A GGUF file, a folder of safetensors, or a name on the hub, as org/name.",
        rich_help_panel=MODEL,
    ),
]
DraftOption = Annotated[
    list[str] | None,
    typer.Option(
        "--draft-model",
        "-d",
        help="A smaller model, named likewise; may be repeated. Its tokenizer may be another one.",
        rich_help_panel=DRAFTING,
    ),
]
HeadsOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with Medusa, EAGLE or block heads, or a Gemma 4 assistant, for this model.",
        rich_help_panel=DRAFTING,
    ),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(SINGLE)}, one of an installed package, several joined by '+', merged (all that can be), or "
        f"none; default: draft_model where one is given, else heads that are given (or layers of the model's own: mtp) "
        f"and lookups ({', '.join(LOOKUPS)}), merged. draft_model:vocabulary=tli or slem says how a draft model with "
        "another tokenizer drafts.",
        rich_help_panel=DRAFTING,
    ),
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        help="cost (default: sized by measured cost), 2x2x2, chain:4, paths:[[0],[0,0],[1]], "
        "dynamic:nodes=16,depth=6,top_k=8, adaptive:mass=0.8,width=4, optimal:nodes=16,depth=6, or choices (kept "
        "beside heads).",
        rich_help_panel=DRAFTING,
    ),
]
MemoryOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder: what lookups learnt is read from there, and written there in the end.", rich_help_panel=DRAFTING
    ),
]
DepthOption = Annotated[
    int | None,
    typer.Option(help="Depth of a static tree; 3 where only --branching is given.", rich_help_panel=DRAFTING),
]
BranchingOption = Annotated[
    int | None,
    typer.Option(help="Children per node of a static tree; 2 where only --depth is given.", rich_help_panel=DRAFTING),
]
AcceptOption = Annotated[
    str,
    typer.Option(
        help="match, rejection, block (of a chain) or traversal: lossless; best_path or typical: lossy.",
        rich_help_panel=DRAFTING,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; default: bfloat16 on CPUs, elsewhere the checkpoint's.",
        rich_help_panel=MODEL,
    ),
]
QuantizationOption = Annotated[
    str | None,
    typer.Option(
        help="Linear layers in 8 bits (int8), or on CPUs in the GGUF file's (gguf). Both lossy against bfloat16.",
        rich_help_panel=MODEL,
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the forward where it isn't one compiled call anyway (GPUs).",
        rich_help_panel=MODEL,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: the first GPU, if any.", rich_help_panel=MODEL)
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(ENGINES.ours)} (default), or one of an installed package.",
        rich_help_panel=MODEL,
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads.", rich_help_panel=MODEL)]
MaxTokensOption = Annotated[int, typer.Option(help="The most tokens to write for a prompt.")]
PerCategoryOption = Annotated[int | None, typer.Option(min=1, help="At most so many prompts of each category.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def params_of(**options: Any) -> SamplingParams:
    from tokentree.sampling import SamplingParams

    return SamplingParams(**options)


def check_folder(folder: Path) -> None:
    """Tells before anything is loaded what can't become a folder that is written to in the end. None is left behind.

    Raises:
        OptionError: if there can be none.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{str(folder)!r} is a file: name a folder")
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for one in new:
            one.rmdir()
    except OSError as error:
        raise OptionError(f"can't write to the folder {str(folder)!r}: {error.strerror}") from None


def keys_of(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The keys of both options.

    Raises:
        OptionError: if one is empty, or a file has none.
    """
    keys = list(given or ())
    if any(not key.strip() for key in keys):
        raise OptionError("--api-key is empty: give a key, or leave it out")
    if file is not None:
        lines = [line.strip() for line in read_text(file, "the file of keys").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise OptionError(f"there is no key in {str(file)!r}")
        keys += found
    return tuple(keys)


def prompt_text(prompt: str) -> str:
    """The prompt that an argument is, or with '-' what stands on standard input, without the newline at its end: `echo`
    gives what the argument does.

    Raises:
        PromptError: if there is no text.
    """
    if prompt != "-":
        return _filled(checked_text(prompt, "the prompt"))
    if sys.stdin is None:
        raise PromptError("can't read standard input: it is closed")
    if sys.stdin.isatty():
        raise PromptError(
            "'-' reads a pipe or a file, and standard input is a terminal: give the prompt as an argument"
        )
    return _filled(text_of(sys.stdin.buffer, "standard input").removesuffix("\n").removesuffix("\r"))


def _filled(text: str) -> str:
    if not text.strip():
        raise PromptError("the prompt is empty: give at least one token")
    return text


def encode(llm: LLM, text: str, chat: bool | None) -> list[int]:
    """The ids of a prompt, through the chat template if asked to or, by default, if there is one."""
    text = _filled(checked_text(text, "the prompt"))
    has_template = llm.tokenizer is not None and bool(llm.tokenizer.chat_template)
    if chat or (chat is None and has_template):
        return llm.chat_prompt([{"role": "user", "content": text}])
    from tokentree.sampling import SamplingParams

    return llm.sequence(text, SamplingParams()).prompt_ids


def shape_in(shape: str | None, depth: int | None, branching: int | None) -> str | None:
    """The shape that these options name.

    Raises:
        OptionError: if they don't go together, or make no tree.
    """
    if depth is None and branching is None:
        return shape
    from tokentree.shapes.base import check_size

    if shape is not None:
        raise OptionError("--shape says what --depth and --branching say: give one of them")
    depth, branching = 3 if depth is None else depth, 2 if branching is None else branching
    if depth < 1 or branching < 1:
        raise OptionError("--depth and --branching must be at least 1")
    check_size(depth, branching)
    return "x".join([str(branching)] * depth)


def name_of(model: str) -> str:
    """The last part of a model's name; of a folder that is named from where the command runs, its own."""
    return Path(model).name if Path(model).name not in ("", "..") else Path(model).resolve().name


def load(
    console: Console, model: str, drafter: str | None, threads: int | None, *, compile: bool = False,
    prefix_mb: int = 0, **options: Any,
) -> LLM:  # fmt: skip
    """An `LLM` with these ``options``. By default it keeps no prefixes, as what is compared reads the same prompts."""
    # a forward that is compiled shows its own progress
    with nullcontext() if compile else working(console, f"loading {name_of(model)}"):
        return made(model, drafter, threads, compile=compile, prefix_mb=prefix_mb, **options)


def made(
    model: str, drafter: str | None, threads: int | None, *, draft_model: list[str] | None = None, **options: Any
) -> LLM:
    """The same, without a word while it is loaded."""
    import transformers

    from tokentree.llm import LLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return LLM(model, drafters(drafter), list(draft_model or []), threads=threads, **options)


def drafters(drafter: str | None) -> str | list[str] | None:
    """What ``--drafter`` names."""
    return drafter.split("+") if drafter and "+" in drafter else drafter


def check_loading(
    model: str, drafter: str | None, *, draft_model: list[str] | None, heads: Path | None, shape: str | None,
    dtype: str | None, quantization: str | None, device: str | None, engine: str | None, **_: Any,
) -> None:  # fmt: skip
    """Tells before anything is loaded what an `LLM` would refuse.

    Raises:
        OptionError, ModelError, PairingError: as `LLM`.
    """
    from tokentree.engines.support import check_quantization
    from tokentree.gguf.header import is_gguf
    from tokentree.loading import pick_device, pick_dtype
    from tokentree.names import find
    from tokentree.options import heads_in, shape_of
    from tokentree.registry import check_engine, check_names

    for name in (model, *(draft_model or [])):
        find(name)
        check_quantization(quantization, is_gguf(name))
    check_names(drafters(drafter))
    for one in (named.partition(":")[0] for named in (drafter or "").split("+")):
        needs = DRAFTERS[one].drafts_from if one in DRAFTERS else ""
        read = EAGLE_HEADS, BLOCK_HEADS, MEDUSA_HEADS, ASSISTANTS
        given = {DRAFT_MODELS: draft_model, **dict.fromkeys(read, heads)}
        if needs in given and not given[needs]:
            option = "--draft-model" if needs == DRAFT_MODELS else "--heads"
            raise OptionError(f"the drafter {one!r} needs {needs}: name them by {option}")
    shape_of(shape, drafters(drafter), heads_in(heads))
    check_engine(engine, {})
    pick_dtype(dtype, pick_device(device))
