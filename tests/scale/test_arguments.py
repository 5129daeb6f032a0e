"""What an application is told, and what is refused before anything is loaded."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import Command, folder, run  # noqa: F401  fixtures
from tokentree import OptionError
from tokentree.cli.serve import ROUTINGS, serve
from tokentree.scale import app
from tokentree.scale.arguments import Arguments, arguments_of

SCALE = {"cpus": "replica_cpus", "gpus": "replica_gpus"}  # other names on the command line
OWN = {"fronts"}  # of the application alone


def test_arguments_become_settings_and_a_model(folder: Path) -> None:  # noqa: F811
    known = arguments_of({"model": str(folder), "max_batch": 3, "api_key": ["a", "b"], "request_timeout": 0})
    settings = known.settings()
    assert (settings.model_name, settings.max_batch, settings.keys) == (folder.name, 3, ("a", "b"))
    assert settings.request_timeout is None
    assert known.load().max_batch == 3


def test_those_of_the_command_are_those_of_the_application() -> None:
    options = inspect.signature(serve).parameters
    for name, field in Arguments.model_fields.items():
        if name in OWN or name == "replicas":
            continue
        option = options[SCALE.get(name, name)].default
        if option is not inspect.Parameter.empty and option is not None:
            assert field.default == option, name
    assert Arguments.model_fields["routing"].annotation.__args__ == ROUTINGS  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"replica": 2}, "no argument 'replica': it takes model, "),
        ({"replicas": 0}, "'replicas' of the application: input should be greater"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas=2 is below replicas=3"),
        ({"target_requests": 2.0}, "target_requests needs max_replicas"),
        ({"routing": "some"}, "should be 'beginning' or 'balanced'"),
        ({"cpus": -1}, "'cpus'"),
        ({"drafter": "foo"}, "unknown drafter 'foo'"),
        ({"model": 3}, "'model'"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(folder: Path, given: dict[str, Any], says: str) -> None:  # noqa: F811
    with pytest.raises(OptionError, match=re.escape(says)) as caught:
        arguments_of({"model": str(folder)} | given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--replicas", "2", "--max-replicas", "1"], "max_replicas=1 is below replicas=2"),
        (["--max-replicas", "2"], "give --replicas too"),
        (["--replicas", "2", "--routing", "some"], "--routing 'some'"),
        (["--replicas", "0"], "--replicas"),
        (["--replicas", "2", "--memory", "FOLDER/config.json"], "is a file"),
        (["--replicas", "2", "--drafter", "foo"], "unknown drafter"),
    ],
)
def test_the_command_tells_mistakes_before_ray_starts(
    run: Command, folder: Path, words: list[str], says: str  # noqa: F811
) -> None:  # fmt: skip
    code, out, err = run("serve", "-m", folder, *[word.replace("FOLDER", str(folder)) for word in words])
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_without_ray_the_extra_is_named(run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [name for name in sys.modules if name.startswith("tokentree.scale.")]:
        monkeypatch.delitem(sys.modules, name)
    told = "tokentree: replicas need ray: pip install 'tokentree[scale]'\n"
    assert run("serve", "-m", folder, "--replicas", "2") == (2, "", told)
    with pytest.raises(OptionError, match="replicas need ray"):
        app({"model": str(folder)})
