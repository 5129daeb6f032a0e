"""Which versions of transformers are taken."""

import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import tiny
from tokentree import LLM, ModelError, generator
from tokentree.versions import FIRST, LAST, check_transformers


def test_the_installed_version_is_taken_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers()


@pytest.mark.parametrize("old", ["4.57.3", "5.22.2"])
def test_an_older_version_is_refused_in_one_sentence(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", old)
    model = tiny("llama")
    uses: list[Callable[[], object]] = [lambda: LLM(model), generator]
    for use in uses:
        with pytest.raises(ModelError, match=rf"works with transformers 5\.23 to 5\.24, and {old} is installed: pip"):
            use()


@pytest.mark.parametrize("new", ["5.25.0", "5.30.0.dev0", "6.0.0rc1"])
def test_a_newer_version_is_warned_of(new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", new)
    with pytest.warns(UserWarning, match=rf"works with transformers 5\.23 to 5\.24, and {new} is installed, with"):
        LLM(tiny("llama"))


def test_pip_installs_no_other_version() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    (wanted,) = [each for each in project["project"]["dependencies"] if each.startswith("transformers")]
    assert wanted == f"transformers>={FIRST[0]}.{FIRST[1]},<{LAST[0]}.{LAST[1] + 1}"
