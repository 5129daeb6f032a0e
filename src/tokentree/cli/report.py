"""The command that makes a page of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from tokentree.cli.terminal import consoles, say, working, write
from tokentree.errors import OptionError


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, with results.json in it.")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and pictures; default: the same.")] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            help="Put the main table into this Markdown file too, between <!-- NAME --> and <!-- /NAME -->, "
            "where NAME is the folder's name."
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="Of the pictures: png, or svg, which follows the page's theme.")
    ] = "png",
) -> None:
    """Make a page with tables and pictures of a run of 'bench'."""
    if form not in ("png", "svg"):
        raise OptionError(f"--format is png or svg, not {form!r}")
    from tokentree.bench.page import insert, main_table, page
    from tokentree.bench.results import Run
    from tokentree.cache import replacing

    run, out = Run.load(folder), out or folder
    if not run.samples:
        raise OptionError(f"the run in {str(folder)!r} has no samples yet")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"can't write to the folder {str(out)!r}: {error.strerror}") from None
    pictures = list[Path]()
    if importlib.util.find_spec("matplotlib") is None:
        say("no pictures: they need matplotlib, pip install 'tokentree[plot]'")
    else:
        from tokentree.bench.pictures import draw_acceptance, draw_speed

        with working(consoles()[1], "drawing"):
            if len({sample.method for sample in run.samples}) > 1:
                pictures.append(out / f"speed.{form}")
                draw_speed(run, pictures[-1])
            if draw_acceptance(run, out / f"acceptance.{form}"):
                pictures.append(out / f"acceptance.{form}")
    try:
        with replacing(out / "report.md") as part:
            part.write_text(page(run, pictures), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"can't write {str(out / 'report.md')!r}: {error.strerror or error}") from None
    write(f"the report is in {out / 'report.md'}\n")
    if into is not None:
        insert(main_table(run), folder.resolve().name, into)
