# numba is typed in part:
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Numbers copied from one array into another, in compiled loops."""

from __future__ import annotations

import numba


@numba.njit
def copy_into(into, numbers):
    """``into[:] = numbers``, of arrays of one dimension and as many numbers. With that line numba would compile what it
    says of other shapes too: seconds of a first start."""
    for i in range(len(numbers)):
        into[i] = numbers[i]
