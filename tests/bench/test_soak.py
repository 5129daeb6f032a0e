"""Whether memory is level, as `benchmarks.soak` tells it."""

from __future__ import annotations

import random

import pytest
from benchmarks.soak import LEVEL, growth


def pauses(mebibytes: list[float]) -> list[dict[str, float]]:
    """Samples of a server with nothing to do, a minute apart, of which so much isn't counted by itself."""
    dice, found = random.Random(0), list[dict[str, float]]()
    for minute, rest in enumerate(mebibytes):
        prefixes, lookups = dice.uniform(0, 250), 10.0 + minute
        whole = rest + prefixes + lookups
        found.append(
            {"seconds": 60.0 * minute, "mebibytes": whole, "kv": 0.0, "prefixes": prefixes, "lookups": lookups}
        )
    return found


@pytest.mark.parametrize("an_hour", [0.0, 60.0, -60.0, 600.0])
def test_a_trend_is_found_among_samples_that_are_off(an_hour: float) -> None:
    memory = [1000 + an_hour * minute / 60 for minute in range(20)]
    memory[7] += 400
    memory[12] -= 300
    memory[0] -= 500  # before it has settled
    told = growth(pauses(memory), 60)
    assert told["an_hour"] == pytest.approx(an_hour, abs=0.2)
    assert told["samples"] == 19
    assert told["ratio"] == pytest.approx(memory[-1] / memory[1], abs=0.001)
    assert (told["ratio"] > LEVEL) is (an_hour == 600)


def test_without_two_samples_there_is_no_trend() -> None:
    assert growth(pauses([1000.0, 1000.0]), 60) == {}
