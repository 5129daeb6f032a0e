"""The commands that draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentree.cli.help import Command
from tokentree.cli.options import (
    DeviceOption,
    DrafterOption,
    DraftOption,
    DtypeOption,
    HeadsOption,
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
from tokentree.cli.terminal import write
from tokentree.errors import OptionError

if TYPE_CHECKING:
    from tokentree.bench.results import Run
    from tokentree.llm import LLM
    from tokentree.plots.trees import Recorder, Step
    from tokentree.sampling import SamplingParams

plot = typer.Typer(help="Draw trees, masks and runs.", no_args_is_help=True, rich_markup_mode=None)

FileOption = Annotated[
    Path, typer.Option("--out", help="The picture: .png and .svg for pages, light or dark; .pdf for papers.")
]
PromptArgument = Annotated[str, typer.Argument(help="The prompt whose decoding is drawn.")]
StepOption = Annotated[
    int | None, typer.Option(min=1, help="Which step; by default the one that accepted the most tokens.")
]
ChatOption = Annotated[bool | None, typer.Option(help="Use the chat template; default: if the model has one.")]
DraftsOption = Annotated[
    list[str] | None,
    typer.Option("--draft-model", "-d", help="A smaller model of the same family; may be repeated, each is drawn."),
]
HeadFoldersOption = Annotated[
    list[Path] | None,
    typer.Option("--heads", help="A folder with Medusa or EAGLE heads; may be repeated, each is drawn."),
]
LookupsOption = Annotated[
    list[str] | None,
    typer.Option("--drafter", help="ngram, suffix, recycling, or several joined by '+'; may be repeated."),
]
RunArgument = Annotated[Path, typer.Argument(help="The folder of a run of 'bench'.")]


TOLD = {
    "draft_model": "a draft model grows the tree (SpecInfer), level by level, with a forward for each",
    "medusa": "Medusa heads on the target's last hidden state guess all levels at once",
    "assistant": "an assistant on the target's keys and values grows the tree, level by level, from its own states",
    "eagle": "an EAGLE head on the target's hidden states grows the tree, level by level, from its own states",
    "ngram": "what followed the same tokens before",
    "suffix": "what followed the longest match before, with how often",
    "recycling": "the most probable tokens of the target's last scores",
    "none": "plain decoding",
}


def step(
    context: typer.Context, prompt: PromptArgument, model: ModelOption, out: FileOption,
    draft_model: DraftOption = None, heads: HeadsOption = None, drafter: DrafterOption = None,
    shape: ShapeOption = None, step: StepOption = None, max_tokens: int = 64, chat: ChatOption = None,
    dtype: DtypeOption = None, quantization: QuantizationOption = None, threads: ThreadsOption = None,
) -> None:  # fmt: skip
    from tokentree.plots.drawing import check_plot
    from tokentree.plots.trees import draw_mask, draw_tree

    check_plot(out)
    params = params_of(max_tokens=max_tokens)
    llm = _with_texts(
        model, drafter, threads, draft_model=draft_model, heads=heads, shape=shape, dtype=dtype,
        quantization=quantization,
    )  # fmt: skip
    recorder = _recorded(llm, encode(llm, prompt, chat), params)
    if not recorder.steps:
        raise OptionError("the text took no step that could be drawn")
    number = step or recorder.busiest()
    if number > len(recorder.steps):
        raise OptionError(f"there is no step {number}: the text took {len(recorder.steps)}")
    shown = recorder.steps[number - 1]
    accepted = len(shown.path) - 1
    title = f"step {number}: {len(shown.tree)} rows in one forward, {accepted} candidates accepted, and a bonus token"
    draw = draw_mask if context.info_name == "mask" else draw_tree
    draw(shown, *_texts(llm, shown), out, title)
    _tell(out)


def _with_texts(model: str, drafter: str | None, threads: int | None, **options: Any) -> LLM:
    """A model whose steps can be drawn."""
    llm = load(consoles()[1], model, drafter, threads, **options)
    if llm.tokenizer is None:
        raise OptionError("a picture shows texts: the model needs its tokenizer")
    return llm


def _recorded(llm: LLM, ids: list[int], params: SamplingParams) -> Recorder:
    """The steps of a text."""
    from tokentree.plots.trees import Recorder

    recorder = llm.decoder.watch = Recorder(llm.decoder.drafter.names)
    with working(consoles()[1], "decoding"):
        llm.generate([ids], params)
    return recorder


def _texts(llm: LLM, step: Step) -> tuple[list[str], str]:
    """Of the nodes of a step, and of its bonus token."""
    assert llm.tokenizer is not None
    ids = [*step.tree.tokens.tolist(), step.bonus]
    texts = [str(llm.tokenizer.decode([token])) or f"<{token}>" for token in ids]
    texts = [text if text.strip(" ") else text.replace(" ", "\N{OPEN BOX}") for text in texts]  # else an empty box
    return texts[:-1], texts[-1]


plot.command(
    "tree",
    cls=Command,
    help="Draw the tree of a real step: tokens, probabilities, who proposed what, what was accepted.",
)(step)
plot.command(
    "mask", cls=Command, help="Draw the tree of a real step beside the mask that one forward verified it under."
)(step)


@plot.command(cls=Command)
def methods(
    prompt: PromptArgument, model: ModelOption, out: FileOption, draft_model: DraftsOption = None,
    heads: HeadFoldersOption = None, drafter: LookupsOption = None,
    shape: str = "dynamic:nodes=10,depth=4,min_prob=0,min_reach=0", max_tokens: int = 64, chat: ChatOption = None,
    dtype: DtypeOption = None, quantization: QuantizationOption = None, threads: ThreadsOption = None,
) -> None:  # fmt: skip
    """Draw two drafters or more side by side: the trees that each proposes after the same text."""
    from tokentree.drafters.merged import Merged
    from tokentree.heads.saved import kind_of
    from tokentree.plots.drawing import check_plot
    from tokentree.plots.trees import Panel, common_step, draw_methods

    drafts, folders = draft_model or [], heads or []
    given = {"draft_model"} if drafts else set[str]()  # each draft model and folder is drawn by itself
    given |= {"medusa", "eagle", "block", "assistant"} if folders else set()
    lookups = [name for name in drafter or () if name not in given]
    if len(drafts) + len(folders) + len(lookups) < 2:
        raise OptionError(
            "there is nothing to compare: name two drafters or more, by --draft-model, --heads and --drafter, each of "
            "which may be repeated"
        )
    check_plot(out)
    params = params_of(max_tokens=max_tokens)
    for folder in folders:
        if not folder.is_dir():
            raise OptionError(f"there is no folder {str(folder)!r} with heads")
    kinds = [kind_of(folder) for folder in folders]
    llm = _with_texts(
        model, "draft_model" if drafts else "none", threads, draft_model=drafts, shape=shape, dtype=dtype,
        quantization=quantization,
    )  # fmt: skip
    own = llm.decoder.drafter
    ways = [
        (f"{Path(name).name}: {TOLD['draft_model']}", llm.using(each, shape))
        for name, each in zip(drafts, own.drafters if isinstance(own, Merged) else [own])
    ]
    ways += [
        (f"{'/'.join(folder.resolve().parts[-2:])}: {TOLD[kind]}", llm.using(kind, shape, heads=folder))
        for folder, kind in zip(folders, kinds, strict=True)
    ]
    ways += [
        (f"{name}: {TOLD.get(name, 'one tree of several drafters')}", llm.using(names if "+" in name else name, shape))
        for name in lookups
        for names in [name.split("+")]
    ]
    ids = encode(llm, prompt, chat)
    recorders = [_recorded(way, ids, params) for _, way in ways]
    if not all(recorder.steps for recorder in recorders):
        raise OptionError("the text took no step that could be drawn")
    steps = common_step(recorders)
    panels = [Panel(title, step, *_texts(llm, step)) for (title, _), step in zip(ways, steps, strict=True)]
    draw_methods(panels, out)
    _tell(out)


@plot.command(cls=Command)
def cost(
    model: ModelOption, out: FileOption, dtype: DtypeOption = None, quantization: QuantizationOption = None,
    device: DeviceOption = None, threads: ThreadsOption = None,
) -> None:  # fmt: skip
    """Draw what a forward of a model costs here by its rows; measured, if it wasn't before."""
    from tokentree.costs import cost_curve
    from tokentree.plots.cost import plot_cost
    from tokentree.plots.drawing import check_plot

    check_plot(out)
    _, errors = consoles()
    llm = load(errors, model, "none", threads, dtype=dtype, quantization=quantization, device=device)
    with working(errors, "measuring"):
        curve = cost_curve(llm.engine)
    plot_cost(curve, llm.engine.info.signature, out)
    _tell(out)


@plot.command(cls=Command)
def speedup(run: RunArgument, out: FileOption) -> None:
    """Draw how fast each method of a run was, overall and by task."""
    from tokentree.bench.pictures import draw_speed

    found = _run(run, out)
    if len({sample.method for sample in found.samples}) < 2:
        raise OptionError(f"the run in {str(run)!r} has one method, and nothing to compare it with")
    draw_speed(found, out)
    _tell(out)


@plot.command(cls=Command)
def acceptance(run: RunArgument, out: FileOption) -> None:
    """Draw how often each method's candidates were accepted, by depth."""
    from tokentree.bench.pictures import draw_acceptance

    if not draw_acceptance(_run(run, out), out):
        raise OptionError(f"the run in {str(run)!r} has too few steps with trees to draw")
    _tell(out)


def _run(folder: Path, out: Path) -> Run:
    from tokentree.bench.results import Run
    from tokentree.plots.drawing import check_plot

    check_plot(out)
    found = Run.load(folder)
    if not found.samples:
        raise OptionError(f"the run in {str(folder)!r} has no samples yet")
    return found


def _tell(out: Path) -> None:
    write(f"the picture is {out}\n")
