"""A server that the tests share, and what tests of the command have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.test_cli import folder, run  # noqa: F401  fixtures
from tests.serve.serving import Served, serving, tiny_llm


@pytest.fixture(scope="package")
def running() -> Iterator[Served]:
    with serving(tiny_llm()) as served:
        yield served


@pytest.fixture
def served(running: Served) -> Iterator[Served]:
    """The server; nothing may be left of a test's requests."""
    yield running
    running.wait_idle()
