"""The versions of transformers that this library is made for."""

from __future__ import annotations

import warnings

from tokentree.errors import ModelError

FIRST, LAST = (5, 23), (5, 24)  # as in pyproject.toml
WORKS = f"tokentree works with transformers {'.'.join(map(str, FIRST))} to {'.'.join(map(str, LAST))}"
ASK = f'pip install "transformers>={FIRST[0]}.{FIRST[1]},<{LAST[0]}.{LAST[1] + 1}"'


def check_transformers() -> None:
    """Warns if transformers is newer than what this library was tried with.

    Raises:
        ModelError: if it is older.
    """
    import transformers  # takes a second

    major, minor, *_ = transformers.__version__.split(".")
    there = int(major), int(minor)
    if there < FIRST:
        raise ModelError(f"{WORKS}, and {transformers.__version__} is installed: {ASK}")
    if there > LAST:
        warnings.warn(
            f"{WORKS}, and {transformers.__version__} is installed, with which models may be refused: {ASK}",
            stacklevel=2,
        )
