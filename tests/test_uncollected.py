"""Python's garbage collector rests while a model is loaded, and never longer."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

import tokentree
from tests.tiny_models import tiny, tiny_tokenizer
from tokentree.registry import make_drafter
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


@pytest.mark.usefixtures("collecting")
def test_it_rests_while_names_are_imported_and_a_decoder_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    on = list[bool]()

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            on.append(gc.isenabled())
            return function(*args, **options)

        return wrapped

    monkeypatch.setattr("tokentree.import_module", seen(import_module))
    monkeypatch.setattr("tokentree.llm.make_drafter", seen(make_drafter))
    made: Any = tokentree.__getattr__("LLM")
    made(tiny("llama"), tokenizer=tiny_tokenizer())
    assert on == [False, False]
    assert gc.isenabled()
