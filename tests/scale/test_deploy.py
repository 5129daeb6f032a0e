"""What is deployed: files that parse, name what there is and agree with one another. No cluster looks at them here."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokentree.scale
from tokentree.scale.arguments import Arguments

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    return found


def configs() -> dict[str, dict[str, Any]]:
    """The configs of Serve, by the file in which they are."""
    return {
        "serve.yaml": yaml.safe_load((DEPLOY / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(service()["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("file", ["serve.yaml", "rayservice.yaml"])
def test_an_application_names_what_there_is(file: str) -> None:
    (application,) = configs()[file]["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(import_module(module), name) is tokentree.scale.app
    known = Arguments.model_validate(application["args"])
    assert known.max_batch >= 1
    source = (ROOT / "src/tokentree/scale/application.py").read_text()
    for deployment in application["deployments"]:
        assert f'name="{deployment["name"]}"' in source
    front, replica = application["deployments"]
    assert (front["name"], replica["name"]) == ("Front", "Replica")
    scaling = replica["autoscaling_config"]
    assert scaling["min_replicas"] <= scaling["max_replicas"]
    assert scaling["target_ongoing_requests"] <= known.max_batch


def test_both_configs_are_the_same_but_for_who_may_come_in() -> None:
    one, other = configs().values()
    assert other["http_options"].pop("host") == "0.0.0.0"
    assert one["http_options"].pop("host") == "127.0.0.1"
    assert other["applications"][0]["args"].pop("api_key_file")
    assert one == other


def test_the_service_agrees_with_its_config_and_the_image() -> None:
    spec = service()["spec"]["rayClusterConfig"]
    config = configs()["rayservice.yaml"]
    (application,), (group,) = config["applications"], spec["workerGroupSpecs"]
    replica, arguments = application["deployments"][1], application["args"]
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    assert int(group["rayStartParams"]["num-cpus"]) == replica["ray_actor_options"]["num_cpus"]
    scaling = replica["autoscaling_config"]
    assert (group["minReplicas"], group["maxReplicas"]) == (scaling["min_replicas"], scaling["max_replicas"])
    built = re.search(r"-t (\S+) \.$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for part in (spec["headGroupSpec"], group):
        pod = part["template"]["spec"]
        (container,) = pod["containers"]
        assert built
        assert container["image"] == built[1] == f"tokentree:{PROJECT['version']}"
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        for name, folder in (("model", "models"), ("memory", "memories"), ("api_key_file", "keys")):
            assert arguments[name].startswith(mounted[folder]), name
    ports = {
        port["name"]: port["containerPort"]
        for port in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert ports["serve"] == config["http_options"]["port"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > arguments["drain_timeout"]


def test_the_image_is_made_of_what_there_is() -> None:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= {
        "ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "CMD",
    }  # fmt: skip
    arguments = dict(line.removeprefix("ARG ").split("=") for line in lines if line.startswith("ARG "))
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(arguments)  # each is used, and none is made up
    given = re.findall(r"--build-arg (\w+)=", text)
    assert given
    assert set(given) <= set(arguments)
    assert set(arguments["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    assert PROJECT["requires-python"] == f">={arguments['PYTHON']}"
    for line in lines:
        if line.startswith("COPY "):
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources), line
    assert PROJECT["readme"] in text
    assert all(name in text for name in PROJECT["license-files"])
    (config,) = {tuple(config["http_options"].items())[1] for config in configs().values()}
    assert f"EXPOSE {config[1]}" in lines


def test_what_ray_is_told_on_one_machine_is_told_in_the_image_too() -> None:
    source, image = (ROOT / "src/tokentree/scale/local.py").read_text(), (DEPLOY / "Dockerfile").read_text()
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")):
        assert f'{name}="{value}"' in source
        assert f"{name}={value}" in image


def test_the_manual_names_every_argument() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    assert [name for name in Arguments.model_fields if f"`{name}`" not in page] == []


def test_the_application_takes_one_dictionary() -> None:
    """As Serve calls it."""
    assert list(inspect.signature(tokentree.scale.app).parameters) == ["arguments"]


def test_make_scale_installs_what_is_pinned() -> None:
    lines = [line for line in (ROOT / "tests/scale/packages.txt").read_text().splitlines() if line[0] != "#"]
    installed = dict(line.split("==") for line in lines)
    assert installed.items() <= PINS.items()
    assert "ray" in installed
