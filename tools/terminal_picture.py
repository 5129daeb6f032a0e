"""Draws what a command prints on a terminal, colours included: `terminal_picture.py OUT.svg COMMAND…`.

The command really runs. Progress lines that it erases again are left out."""

import os
import pty
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

WIDTH = 84  # columns
ERASED = "\x1b[2K"  # stands behind all that a progress line left
INK = (230, 237, 243)
DARK = TerminalTheme(
    (13, 17, 23),
    INK,
    [
        (72, 79, 88),
        (255, 123, 114),
        (63, 185, 80),
        (210, 153, 34),
        (88, 166, 255),
        (188, 140, 255),
        (57, 197, 207),
        INK,
    ],
)
# Text is placed by `textLength`, so any fixed-width font does, and none is fetched.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: {char_height}px;
  line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<rect width="{width}" height="{height}" rx="10" fill="#0d1117" stroke="#484f58"/>
<g transform="translate({terminal_x}, 12)" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


def printed(command: list[str]) -> str:
    """What ``command`` prints on a terminal of `WIDTH` columns."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe(command[0], command, os.environ | {"TERM": "xterm-256color", "COLUMNS": str(WIDTH)})
    read = bytearray()
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how a terminal says that nobody writes to it any more
            break
        read += part
    _, status = os.waitpid(process, 0)
    if status:
        sys.exit(f"the command failed with exit status {os.waitstatus_to_exitcode(status)}:\n{read.decode()}")
    return read.decode().rpartition(ERASED)[2].replace("\r\n", "\n")


def main() -> None:
    out, *command = sys.argv[1:]
    words = [f'"{word}"' if " " in word else word for word in command]
    lines = textwrap.wrap(" ".join(words), WIDTH - 8, break_on_hyphens=False, break_long_words=False)
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ " + " \\\n    ".join(lines), style="bold"))
    console.print(Text.from_ansi(printed(command).rstrip()))
    Path(out).write_text(console.export_svg(title="", theme=DARK, code_format=SVG, unique_id="t"), encoding="utf-8")


if __name__ == "__main__":
    main()
