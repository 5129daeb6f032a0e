"""Python's garbage collector rests while a model is loaded, and never longer."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from tokentree.uncollected import Uncollected


@pytest.fixture
def collecting() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was_on else gc.disable)()


@pytest.mark.usefixtures("collecting")
def test_it_rests_inside() -> None:
    rest = Uncollected()
    with rest:
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.usefixtures("collecting")
def test_it_is_on_again_after_a_failure() -> None:
    rest = Uncollected()

    @rest
    def fails() -> None:
        assert not gc.isenabled()
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        fails()
    assert gc.isenabled()


@pytest.mark.usefixtures("collecting")
def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    with Uncollected():
        pass
    assert not gc.isenabled()


@pytest.mark.usefixtures("collecting")
def test_the_last_of_several_threads_turns_it_on() -> None:
    rest, inside, leave = Uncollected(), threading.Event(), threading.Event()

    def other() -> None:
        with rest:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    with rest, rest:
        pass
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
