"""The page of models: what it says of a few families is what becomes of them here."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from benchmarks.families import Found, apart, families, tried
from benchmarks.families_page import page

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FEW = {
    "bart": "Exact",
    "florence2": "No decoders of text",
    "zaya": "Refused",
    "bloom": "Exact",
    "doge": "Up to ties",
    "granitemoehybrid": "Exact",
    "llama4_text": "Exact",
}


def section_of(text: str, family: str) -> str:
    """The section in which a family is named."""
    parts = {part.splitlines()[0]: part for part in text.split("\n## ")[1:]}
    (name,) = (name for name, part in parts.items() if f"| {family} | `" in part or f"` ({family})" in part)
    return name


@pytest.mark.parametrize("family", FEW)
def test_the_page_says_of_a_family_what_becomes_of_it(family: str) -> None:
    model, text = families()[family], PAGE.read_text()
    found = next(tried(family, model))
    assert section_of(page([found], version("transformers")), family) == FEW[family]
    assert section_of(text, family) == FEW[family]
    assert bool(found.row and found.tree) == (FEW[family] in ("Exact", "Up to ties"))


@pytest.mark.nightly
@pytest.mark.parametrize("family", families())
def test_the_page_says_of_each_family_what_becomes_of_it_in_each_type(family: str) -> None:
    found = apart(family, families()[family])
    assert section_of(page(found, version("transformers")), family) == section_of(PAGE.read_text(), family)


def test_what_is_wrong_is_called_wrong() -> None:
    kinds: dict[str, dict[str, Any]] = {
        "Exact": {"ids": "same"}, "Wrong": {"ids": "other"}, "Up to ties": {"differing": 3, "reason": "up to ties"},
        "Refused": {"kind": "refused", "reason": "One can't"}, "Not tried": {"kind": "not built"},
        "No decoders of text": {"kind": "no decoder"},
    }  # fmt: skip
    for section, told in kinds.items():
        one = Found("one", "One", "float32", told.pop("kind", "own"), **told)
        assert section_of(page([one], "5"), "one") == section
    off = Found("one", "One", "float32", "own", error=0.1, texts=3)
    bits = Found("one", "One", "bfloat16", "own", differing=1, texts=3)
    for one in (off, bits):
        assert section_of(page([one], "5"), "one") == "Wrong"
    assert "1 are wrong or fail" in page([off], "5")
    fault = Found("one", "One", "float32", "FAULT", "took more than 300 s")
    assert section_of(page([fault], "5"), "one") == "Wrong"
