"""Arrays in files: what drafters learnt, in safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from tokentree.cache import replacing
from tokentree.errors import OptionError

Array = NDArray[np.generic]


def write_arrays(file: Path, arrays: Mapping[str, Array]) -> None:
    """Writes ``arrays`` into ``file``, whole or not at all.

    Raises:
        OSError: if it can't be written.
    """
    with replacing(file) as part:
        part.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def read_arrays(file: Path, dtypes: Mapping[str, np.dtype[np.generic]]) -> dict[str, Array] | None:
    """The arrays of ``file``, or None if there is no such file.

    Raises:
        OptionError: if it isn't a file with arrays of those names and types.
    """
    if not file.is_file():
        return None
    try:
        arrays: dict[str, Array] = load_file(file)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:  # types that numpy doesn't have
        raise OptionError(f"can't read {str(file)!r}: {error}") from None
    if {name: array.dtype for name, array in arrays.items()} != dict(dtypes):
        raise OptionError(f"{str(file)!r} doesn't hold {', '.join(dtypes)}: it was not written by this drafter")
    return arrays
