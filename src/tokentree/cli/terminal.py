"""What the command prints, and where: what was asked for on standard output, all that is told about it on standard
error. Text of a model, a file or a user goes out as it is: no markup, no wrapping, nothing stripped."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TextIO

from tokentree.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DUMB = ("dumb", "unknown")  # names of terminals
GREEN, CYAN, BOLD, DIM = "32", "36", "1", "2"
MOST_FOLDED = 12  # characters of a line of a cell that may be folded
ESCAPES = re.compile(r"[\x1b\x80-\x9f]")  # may begin what a terminal obeys: colours inside would change it
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def open_streams() -> None:
    """Makes the standard streams fit for any text: what their encoding lacks is written as an escape.

    Raises:
        OptionError: if standard output is closed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open as long as the process
    if sys.stdout is None:
        raise OptionError("standard output is closed: there is nowhere to print to")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", newline="\n")


def close_streams() -> None:
    """Writes out what is left, and lets nothing more fail when the process ends. Nothing is done where standard output
    was closed from the start.

    Raises:
        OSError: if it can't be written.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):  # of a stream that is closed
        _to_nowhere(sys.stdout)
        raise
    finally:
        try:
            sys.stderr.flush()
        except (OSError, ValueError):
            _to_nowhere(sys.stderr)


def _to_nowhere(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def write(text: str) -> None:
    """Writes ``text`` to standard output, as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def spelled(text: str, kept: str = "") -> str:
    """``text`` without what a terminal obeys: what can't be printed, ends of lines among it, as Python writes it."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def harmless(text: str) -> str:
    """``text`` as it is, but for what a terminal obeys, or what changes the order of letters: that is spelled. Ends of
    lines and tabs stay."""
    return OBEYED.sub(lambda found: spelled(found[0]), text)


def say(text: str) -> None:
    """Writes a line to standard error. What can't be told there is not told."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def write_json(value: Any) -> None:
    """Writes one line of JSON to standard output, in ASCII where its encoding lacks a character. What is no number is
    null."""
    finite = _finite(value)
    line = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(finite, allow_nan=False)
    write(line + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def coloured(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal on which colours are wanted (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in DUMB


def paint(text: str, colour: str, stream: TextIO) -> str:
    """``text`` in a colour, where ``stream`` takes one."""
    return f"\x1b[{colour}m{text}\x1b[0m" if text and coloured(stream) else text


def branches(stream: TextIO) -> tuple[str, str, str]:
    """What a tree is drawn with: before a child, before the last child, and below a child that isn't the last."""
    wide = (stream.encoding or "utf-8").lower().replace("-", "").startswith("utf")
    return ("├── ", "└── ", "│   ") if wide else ("|-- ", "`-- ", "|   ")


def consoles() -> tuple[Console, Console]:
    """For tables and progress, on standard output and standard error. Text is taken as it stands, and a line is as long
    as it is; only tables are fitted to a terminal's width."""
    return _console(sys.stdout, stderr=False), _console(sys.stderr, stderr=True)


def _console(stream: TextIO, stderr: bool) -> Console:
    """A file is none, whatever variables say: it gets no bars, and its lines have no end. Of a dumb terminal rich would
    take 80 columns."""
    from rich.console import Console

    terminal, options = stream.isatty(), dict[str, Any]()
    if not terminal or os.environ.get("TERM") in DUMB:
        options = {"width": shutil.get_terminal_size().columns if terminal else 100_000, "height": 25}
    options |= {"force_terminal": terminal, "no_color": not coloured(stream)}
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True, **options)


def shown(table: Table) -> Table:
    """``table``, with what can't be printed spelled."""
    from rich.table import Table

    title, caption = (None if part is None else spelled(str(part)) for part in (table.title, table.caption))
    copied = Table(title=title, caption=caption, caption_justify=table.caption_justify)
    for column in table.columns:
        copied.add_column(spelled(str(column.header)), justify=column.justify, overflow=column.overflow)
    for row in zip(*(column.cells for column in table.columns), strict=True):
        copied.add_row(*(spelled(str(cell)) for cell in row))
    return copied


def show(console: Console, table: Table) -> None:
    """Prints a table between its title and its caption, fitted to the width of a terminal: nothing is cut, and where it
    is too narrow for the longest words of the cells, each row becomes a list. What standard error doesn't take is not
    told."""
    with suppress(OSError) if console.stderr else nullcontext():
        _show(console, shown(table))


def _show(console: Console, table: Table) -> None:
    from rich.cells import cell_len

    title, caption, table.title, table.caption = table.title, table.caption, None, None
    if title is not None:
        console.print(title)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    longest = [max((cell_len(word) for cell in column for word in cell.split()), default=1) for column in cells]
    folded = [column.overflow == "fold" for column in table.columns]
    widths = [min(width, MOST_FOLDED) if fold else width for width, fold in zip(longest, folded, strict=True)]
    if sum(widths) + 3 * len(widths) < console.width:
        for column in table.columns:
            column.overflow = "fold"
        console.print(table, soft_wrap=False)
    else:
        names = [str(column.header) for column in table.columns]
        for first, *rest in zip(*cells, strict=True):
            console.print(first)
            for name, cell in zip(names[1:], rest, strict=True):
                console.print(f"  {name}: {cell}")
    if caption is not None:
        console.print(caption)


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Shows ``what`` is being done, on a terminal. What the library tells meanwhile (`tokentree.progress`) is shown
    instead of it, from then on."""
    if not console.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from tokentree.progress import told

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(spelled(what), total=None)
        with told(lambda phase: bar.update(task, description=spelled(phase))):
            yield
