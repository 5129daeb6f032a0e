# numba is typed in part:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Named fields for what compiled loops are told: a `NamedTuple` is both the Python side and the layout in memory."""

from __future__ import annotations

from typing import Any, get_type_hints

import numba
import numpy as np

from tokentree.kernels.threads import arrays_at

NUMBERS = {int: np.int64, float: np.float64}


def record(kind: type[tuple[Any, ...]]) -> np.dtype[np.void]:
    """The structured dtype with the fields of the `NamedTuple` ``kind``, one behind another, 8 bytes each.

    A field is an int, a float or another such `NamedTuple`.
    """
    return np.dtype([(name, _field(of)) for name, of in get_type_hints(kind).items()], align=True)


def _field(of: Any) -> Any:
    return NUMBERS[of] if of in NUMBERS else record(of)


def records_at(kind: type[tuple[Any, ...]]) -> Any:
    """A compiled function that gives the array of so many such records at an address."""
    return arrays_at(numba.from_dtype(record(kind)))


def record_at(kind: type[tuple[Any, ...]]) -> Any:
    """A compiled function that gives the record at an address."""
    records = records_at(kind)

    @numba.njit
    def one(address):
        return records(address, 1)[0]

    return one
