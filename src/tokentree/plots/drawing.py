"""What all pictures share: ink that can be read on its page, texts that the fonts have, files that are whole.
They need matplotlib: the extra `plot`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from tokentree.cache import replacing
from tokentree.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = 6.75  # inches: the width of a text across two columns of a paper
SMALL, TEXT, HEAD = 8.0, 9.0, 9.5  # points
BLUE, GREEN, GREY, SLATE = "#0072B2", "#00805D", "#8A929A", "#57606A"  # two of Okabe and Ito's, for white text
# The ink by what a file can be. A PDF is printed. An SVG asks its page. A PNG can't: its ink has four times the
# luminance of GitHub's dark pages (#0d1117), and a quarter of white's.
INKS = {".pdf": "#1f2328", ".svg": "#1f2328", ".png": "#7f7f7f"}
ON_DARK = "#e6edf3"
DPI, MOST_PIXELS = 200, 60_000
STYLE = {
    "figure.facecolor": "none", "savefig.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "text.parse_math": False, "pdf.fonttype": 42, "svg.hashsalt": "tokentree",
    "font.size": SMALL, "axes.titlesize": TEXT, "axes.labelsize": SMALL, "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
FONTS = (  # the first is matplotlib's own; of the others, those that a machine has
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Nirmala UI", "Noto Sans Devanagari", "Noto Sans Thai",
    "Segoe UI Symbol", "Noto Emoji", "Arial Unicode MS",
)  # fmt: skip


def check_plot(file: Path) -> None:
    """Raises `OptionError` where a picture could not be drawn into ``file``."""
    if file.suffix.lower() not in INKS:
        raise OptionError(f"{str(file)!r} is no picture's name: end it in {', '.join(sorted(INKS))}")
    if not file.parent.is_dir():
        raise OptionError(f"there is no folder {str(file.parent)!r}")
    if file.is_dir():
        raise OptionError(f"{str(file)!r} is a folder: name a file in it")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise _unwritable(file, error) from None
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError("drawing needs matplotlib: pip install 'tokentree[plot]'") from None


def draw(file: Path, make: Callable[[str], Figure]) -> None:
    """Writes the figure that ``make`` gives for an ink (a colour) into ``file``, whole or not at all: transparent, and
    the same bytes for the same figure. Texts are taken as they are, not as mathematics.

    Raises:
        OptionError: if it can't be written.
    """
    from matplotlib import style

    kind = file.suffix.lower()
    ink = INKS[kind]
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": None}[kind]
    with style.context(["default", STYLE | {"font.family": _fonts()} | dict.fromkeys(INKED, ink)]):
        figure = make(ink)
        dpi = min(DPI, MOST_PIXELS / max(figure.get_size_inches()))
        try:
            with replacing(file) as part:
                figure.savefig(part, dpi=dpi, format=kind[1:], metadata=metadata)
                if kind == ".svg":
                    _follow_the_page(part, ink)
        except OSError as error:
            raise _unwritable(file, error) from None


def readable(text: str, most: int = 60) -> str:
    """``text`` on one line, as a picture can show it: what no font here has is escaped, as Python would, and of more
    than ``most`` characters those in the middle are left out."""
    units = [c if _drawable(c) else c.encode("unicode_escape").decode() for c in text]
    if sum(map(len, units)) <= most:
        return "".join(units)
    first, last = (_first(side, (most - 1) // 2) for side in (units, units[::-1]))
    return "".join([*first, "…", *last[::-1]])


def _first(units: list[str], most: int) -> list[str]:
    """Of ``units`` those that fit into ``most`` characters together."""
    return [unit for unit, end in zip(units, accumulate(map(len, units)), strict=True) if end <= most]


def width(text: str, size: float = SMALL) -> float:
    """Inches of the longest line of ``text`` at ``size`` points."""
    return max(sum(map(_advance, line)) for line in text.split("\n")) * size / 72


def wrapped(text: str, inches: float, size: float = SMALL, most: int = 3) -> str:
    """``text`` on up to ``most`` lines that fit into ``inches``, broken behind spaces and marks where possible; what is
    too much is left out in the middle."""
    lines, length = _lines(text, inches, size), len(text)
    while len(lines) > most and length > 1:
        length = int(0.9 * length)
        lines = _lines(text[: length // 2] + "…" + text[len(text) - length // 2 :], inches, size)
    return "\n".join(lines)


def _lines(text: str, inches: float, size: float) -> list[str]:
    lines = list[str]()
    while text and width(text, size) > inches:
        fits = next((n for n in range(len(text) - 1, 0, -1) if width(text[:n], size) <= inches), 1)
        place = max((n for n in range(1, fits + 1) if text[n - 1] in " :,+/-_"), default=fits)
        lines.append(text[:place].rstrip())
        text = text[place:]
    return [*lines, text]


@lru_cache
def _fonts() -> list[str]:
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in FONTS if name in there]


@lru_cache(4096)
def _font_of(char: str) -> str | None:
    """The file of the first font that has ``char``."""
    from matplotlib import font_manager

    files = map(font_manager.findfont, _fonts())
    return next((file for file in files if font_manager.get_font(file).get_char_index(ord(char))), None)


def _drawable(char: str) -> bool:
    return char.isprintable() and _font_of(char) is not None


@lru_cache(4096)
def _advance(char: str) -> float:
    """How wide ``char`` is, in sizes of its font."""
    from matplotlib import font_manager, ft2font

    file = _font_of(char)
    if file is None:
        return 0.6
    font = font_manager.get_font(file)
    font.set_size(1000, 72)
    advance = font.load_char(ord(char), flags=ft2font.LoadFlags.NO_HINTING).linearHoriAdvance
    return float(advance) / 65536 / 1000


def _follow_the_page(file: Path, ink: str) -> None:
    """Makes the ink of an SVG light where the page that shows it is dark."""
    rules = "".join(f'[style*="{what}: {ink}"] {{ {what}: {ON_DARK} !important }} ' for what in ("fill", "stroke"))
    before, tag, after = file.read_text(encoding="utf-8").partition("<defs>")
    rule = f'<style type="text/css">@media (prefers-color-scheme: dark) {{ {rules}}}</style>\n '
    file.write_text(before + rule + tag + after, encoding="utf-8")


def _unwritable(file: Path, error: OSError) -> OptionError:
    return OptionError(f"can't write the picture {str(file)!r}: {error.strerror or error}")
