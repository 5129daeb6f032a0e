"""The page at /: its files are served and shipped, need nothing from elsewhere, and can be read. What it does is tested
in a browser: see `browser_page`."""

from __future__ import annotations

import itertools
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.serving import Served, serving
from tests.tiny_models import tiny_pair, tiny_tokenizer
from tokentree import LLM
from tokentree.serve.page import FILES, KINDS, WEB
from tokentree.serve.ways import Ways
from tokentree.shapes import shape

ROOT = Path(__file__).parents[2]
TEXTS = {file.name: file.read_text(encoding="utf-8") for file in sorted(WEB.iterdir())}
SVG = "http://www.w3.org/2000/svg"  # a name, which nothing is loaded from


def path_of(name: str) -> str:
    return "/" if name == "index.html" else f"/web/{name}"


@pytest.mark.parametrize("name", TEXTS)
def test_its_files_are_served_and_may_load_nothing_from_elsewhere(served: Served, name: str) -> None:
    answer = served.http.get(path_of(name))
    assert answer.status_code == 200
    assert answer.text == TEXTS[name]
    assert answer.headers["content-type"].startswith(KINDS[Path(name).suffix])
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'self'"
    assert set(policy.values()) == {"'none'"}
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/web/", "/web/page.py", "/web/../page.py", "/web/%2e%2e%2fpage.py", "/web/a/app.js"])
def test_nothing_else_is_served(served: Served, path: str) -> None:
    assert served.http.get(path).status_code == 404


def test_it_needs_no_key_and_no_model_but_all_else_does() -> None:
    with serving(None, keys=("secret",)) as loading, httpx.Client(base_url=loading.url) as stranger:
        for name in FILES:
            assert stranger.get(path_of(name)).status_code == 200
        for path in ("/speculation", "/v1/models", "/webs"):
            assert stranger.get(path).status_code == 401
        assert loading.http.get("/speculation").status_code == 503


@pytest.mark.parametrize("name", TEXTS)
def test_its_files_name_no_other_host_and_put_no_text_in_as_html(name: str) -> None:
    text = TEXTS[name].replace(SVG, "")
    assert not re.search(r"https?:|//[\w.]+\.\w+/|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(", text)
    assert not re.search(r"\son\w+=|\sstyle=|<script(?! type=\"module\" src=)", text)
    assert max(map(len, text.splitlines())) <= 120


def test_its_files_name_one_another_as_they_are() -> None:
    named = set(re.findall(r"web/([\w.]+)", TEXTS["index.html"]))
    for name, text in TEXTS.items():
        if name.endswith(".js"):
            named |= set(re.findall(r'from "\./([\w.]+)"', text))
    assert {"index.html", *named} == set(TEXTS) == FILES
    used = {one for text in TEXTS.values() for one in re.findall(r'\bat\("([\w-]+)"\)', text)}
    there = set(re.findall(r' id="([\w-]+)"', TEXTS["index.html"]))
    assert used <= there
    labelled = re.findall(r' (?:for|list|aria-labelledby)="([\w-]+)"', TEXTS["index.html"])
    assert {*labelled} <= there


def test_a_wheel_has_all_files_of_the_package() -> None:
    """`make wheel` looks into one. Here: that nothing is left out by a pattern."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build == {"targets": {"wheel": {"packages": ["src/tokentree"]}}}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not [one for one in ignored for name in TEXTS if fnmatch(name, one) or one.strip("/") in ("web", "serve")]


# -- what can be chosen --------------------------------------------------------------------------------------------


def test_it_is_told_what_can_be_chosen_and_all_of_it_can(served: Served) -> None:
    told = served.http.get("/speculation").json()
    ways = Ways.model_validate(told)
    assert ways.proposers == ["suffix", "ngram"]
    assert {"recycling", "suffix", "ngram"} <= set(ways.drafters)
    assert not {"eagle", "medusa", "draft_model", "none", "merged"} & set(ways.drafters)
    for example in ways.shapes:
        assert 0 <= shape(example).max_nodes <= ways.max_tree_nodes
    body = {"prompt": "a", "max_tokens": 2, "speculation": {"drafter": "+".join(ways.drafters)}}
    assert served.post("/v1/completions", body).status_code == 200


def test_draft_models_are_told_where_there_are_some() -> None:
    target, draft = tiny_pair(target_vocab=300, draft_vocab=300)
    llm = LLM(target, draft_model=draft, tokenizer=tiny_tokenizer(), shape="chain:2")
    assert llm.drafters[0] == "draft_model"


# -- colours -------------------------------------------------------------------------------------------------------


def palettes() -> dict[str, dict[str, Any]]:
    """Names and values of colours.css, light and dark."""
    light, dark = TEXTS["colours.css"].split("@media")
    return {
        "light": dict(re.findall(r"--([\w-]+): ([^;]+);", light)),
        "dark": dict(re.findall(r"--([\w-]+): ([^;]+);", dark)),
    }


def channels(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(one: list[float], other: list[float]) -> float:
    """The ratio of luminances, as WCAG 2 has it."""
    each = []
    for colour in (one, other):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        each.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(each) + 0.05) / (min(each) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_enough_contrast(scheme: str) -> None:
    """4.5 for text, and 3 for what else has a meaning (WCAG 2.2, 1.4.3 and 1.4.11)."""
    found = palettes()[scheme]
    colours = {name: channels(value) for name, value in found.items() if value.startswith("#")}
    tint = float(found["tint"].rstrip("%")) / 100
    drafters = [colour for name, colour in colours.items() if name.startswith("by-")]
    assert len(drafters) == int(re.findall(r"COUNT = (\d+)", TEXTS["colours.js"])[0])
    for ground in (colours["page"], colours["surface"]):
        for name in ("ink", "soft", "accent", "bad"):
            assert contrast(colours[name], ground) >= 4.5, name
        for colour in [*drafters, colours["control"]]:
            assert contrast(colour, ground) >= 3
        for colour, under_it in itertools.product(drafters, (ground, colours["mark"])):
            tinted = [tint * over + (1 - tint) * under for over, under in zip(colour, under_it, strict=True)]
            assert contrast(colours["ink"], tinted) >= 4.5
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    assert contrast(colours["ink"], colours["raised"]) >= 4.5
