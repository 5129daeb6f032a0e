"""What the commands share: options, consoles, loading."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentree.errors import PromptError

if TYPE_CHECKING:
    from rich.console import Console

    from tokentree.llm import LLM
    from tokentree.sampling import SamplingParams

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub name, folder of safetensors, or GGUF file.")]
DraftOption = Annotated[
    list[str] | None, typer.Option("--draft-model", "-d", help="A smaller model of the same family; may be repeated.")
]
HeadsOption = Annotated[Path | None, typer.Option(help="Folder with Medusa or EAGLE heads for this model.")]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        help="recycling, suffix, ngram, medusa, draft_model, several joined by '+', merged or none; default: "
        "draft_model where one is given, else heads that are given and the first three, merged."
    ),
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        help="cost (default: sized by measured cost), 2x2x2, chain:4, paths:[[0],[0,0],[1]], "
        "dynamic:nodes=16,depth=6,top_k=8, adaptive:mass=0.8,width=4, optimal:nodes=16,depth=6, or choices (kept "
        "beside heads)."
    ),
]
MemoryOption = Annotated[
    Path | None, typer.Option(help="Folder: what lookups learnt is read from there, and written there in the end.")
]
DepthOption = Annotated[int | None, typer.Option(help="Depth of a static tree, with --branching.")]
BranchingOption = Annotated[int | None, typer.Option(help="Children per node of a static tree, with --depth.")]
AcceptOption = Annotated[str, typer.Option(help="match or rejection (both lossless), best_path or typical (lossy).")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: what the machine is good at.")
]
QuantizationOption = Annotated[
    str | None,
    typer.Option(
        help="CPUs: linear layers in 8 bits (int8), or in those of the GGUF file (gguf). Both lossy against bfloat16."
    ),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the forward where it isn't one compiled call anyway (GPUs).")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: the first GPU, if any.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]


def params_of(**options: Any) -> SamplingParams:
    from tokentree.sampling import SamplingParams

    return SamplingParams(**options)


def encode(llm: LLM, text: str, chat: bool | None) -> list[int]:
    """The ids of a prompt, through the chat template if asked to or, by default, if there is one."""
    if not text.strip():
        raise PromptError("the prompt is empty: give at least one token")
    has_template = llm.tokenizer is not None and bool(llm.tokenizer.chat_template)
    if chat or (chat is None and has_template):
        return llm.chat_prompt([{"role": "user", "content": text}])
    from tokentree.sampling import SamplingParams

    return llm.sequence(text, SamplingParams()).prompt_ids


def consoles() -> tuple[Console, Console]:
    from rich.console import Console

    # a file or a pipe has no width; tables need some
    return Console(width=None if sys.stdout.isatty() else 160), Console(stderr=True)


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    if not console.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(what, total=None)
        yield


def load(
    console: Console, model: str, drafter: str | None, threads: int | None, *, compile: bool = False,
    draft_model: list[str] | None = None, **options: Any,
) -> LLM:  # fmt: skip
    """An `LLM` with these ``options``."""
    # a forward that is compiled shows its own progress
    with nullcontext() if compile else working(console, f"loading {Path(model).name}"):
        import transformers

        from tokentree.llm import LLM

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        names = drafter.split("+") if drafter and "+" in drafter else drafter
        # no prefixes are kept, as what is compared reads the same prompts
        return LLM(model, names, list(draft_model or []), compile=compile, threads=threads, prefix_mb=0, **options)
