"""Texts of models and files as they are, in Markdown: nothing in them is a mark, a tag, mathematics or a line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokentree.cli.terminal import spelled

MARKS = re.compile(r"[\\`*{}\[\]<>|$~]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|^\s*[#+\-](?=\s)")
SHORTCODE = re.compile(r":(?=[\w+-]+:)")  # what GitHub makes an emoji of
PLAIN = re.compile(r"[^`|\\&<>$\s]+( [^`|\\&<>$\s]+)*")


def plain(text: str) -> str:
    """``text`` on one line, for a sentence, a title or a cell."""
    line = MARKS.sub(lambda found: "".join(f"&#{ord(char)};" for char in found[0]), _on_a_line(text))
    return SHORTCODE.sub("<span>:</span>", line)


def code(text: str) -> str:
    """``text`` on one line as code, for a sentence or a cell."""
    line = _on_a_line(text)
    if PLAIN.fullmatch(line):
        return f"`{line}`"
    return "<code>" + re.sub(r"[^\w ]|_", lambda found: f"&#{ord(found[0])};", line) + "</code>"


def block(text: str) -> str:
    """``text`` as a block of code, in a fence that it doesn't hold itself."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{spelled(text, kept=chr(10))}\n{fence}"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column stands to the left."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def _on_a_line(text: str) -> str:
    return spelled(text) if text.strip() else spelled(text).replace(" ", "\N{OPEN BOX}")
