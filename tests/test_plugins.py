"""Drafters of other packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import package
from tests.tiny_models import some_tokens, tiny
from tokentree import LLM, OptionError, SamplingParams
from tokentree.drafters.base import Drafter
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.drafters.names import DRAFTERS, REGISTRY, fitting
from tokentree.registry import drafter_class

EXAMPLE = Path(__file__).parent.parent / "examples" / "echo_drafter"


def test_the_example_is_installed_and_drafts(site: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(EXAMPLE, tmp_path / "example")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
         "--no-build-isolation", "--no-deps", "--target", str(site), str(copy)],
        check=True,
    )  # fmt: skip
    assert REGISTRY.installed()["echo"] == "tokentree-echo"
    llm, params = LLM(tiny("llama"), drafter="echo", shape="chain:2"), SamplingParams(max_tokens=24)
    prompt = some_tokens(9)
    (result,) = llm.generate([prompt], params)
    assert result.token_ids == llm.plain().generate([prompt], params)[0].token_ids
    assert result.metrics.drafted_tokens > 0
    assert llm.using(["echo", "ngram"], "2x2").generate([prompt], params)[0].token_ids == result.token_ids


def test_ours_keep_their_names(site: Path) -> None:
    package(site, "usurper", "ngram = usurper:Mine", "raise ImportError('never imported')")
    assert drafter_class("ngram") is NGram


@pytest.mark.parametrize(
    ("points", "source", "told"),
    [
        ("other = missing_module:Drafter", "", "'other' of strange can't be imported: No module named"),
        ("other = strange:Missing", "", "'other' of strange can't be imported: .*has no attribute 'Missing'"),
        ("other = strange:value", "value = 3", "'other' is no class of drafters: 3"),
        ("another = strange:value", "value = 3", "unknown drafter 'other': choose one of another, assistant, .*"),
    ],
)
def test_one_that_can_t_be_used_is_told_in_a_sentence(site: Path, points: str, source: str, told: str) -> None:
    package(site, "strange", points, source)
    with pytest.raises(OptionError, match=told) as raised:
        LLM(tiny("llama"), drafter="other")
    assert "\n" not in str(raised.value)


def test_two_packages_can_t_share_a_name(site: Path) -> None:
    package(site, "first", "other = first:A")
    package(site, "second", "other = second:B")
    with pytest.raises(OptionError, match="'other' is in several packages: first, second"):
        LLM(tiny("llama"), drafter="other")


def test_the_registry_says_what_is_merged() -> None:
    lookups = ["recycling", "suffix", "ngram"]
    assert fitting(set()) == lookups
    assert fitting({"EAGLE heads", "draft models"}) == ["draft_model", "eagle", *lookups]
    assert fitting({"the target's own layers"}) == ["mtp", *lookups]
    for name, entry in DRAFTERS.items():
        module, _, attribute = entry.where.partition(":")
        found = getattr(__import__(module, fromlist=[attribute]), attribute)
        assert issubclass(found, Drafter), name


def test_more_are_merged_than_a_node_s_sources_have_bits_for() -> None:
    assert len(Merged([NGram() for _ in range(62)]).drafters) == 62
    with pytest.raises(OptionError, match="at most 62 drafters, and these are 63"):
        Merged([Merged([NGram() for _ in range(62)]), NGram()])
