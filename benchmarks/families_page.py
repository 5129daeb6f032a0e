"""The page of models: what `benchmarks/families.py` found, as a page of the manual.

python -m benchmarks.families_page docs/models.md families.json
python -m benchmarks.families_page docs/models.md part-1.json part-2.json
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from benchmarks.families import FAR, TREE, Found

COSTS = ["a row, ms", "of transformers'", f"{TREE} nodes, of a row"]


def page(found: list[Found], version: str) -> str:
    """A page of the manual: what becomes of each family."""
    by_family: dict[str, list[Found]] = {}
    for one in found:
        by_family.setdefault(one.family, []).append(one)
    rows: dict[str, list[str]] = {"exact": [], "ties": [], "wrong": []}
    reasons: dict[str, dict[str, list[str]]] = {"refused": {}, "not built": {}, "no decoder": {}}
    for family, types in by_family.items():
        first = types[0]
        if all(one.kind in reasons for one in types):
            reason = " ".join(first.reason.replace(f"{first.model} ", "").split())
            reasons[first.kind].setdefault(reason, []).append(f"`{first.model}` ({family})")
            continue
        forms = [f"{one.form or one.kind} ({one.dtype})" for one in types]
        same = len({one.form for one in types}) == 1
        form = first.form if same else ", ".join(forms)
        entry = f"| {family} | `{first.model}` | {form} | {' | '.join(_costs(types[-1]))} |"
        if not all(one.right for one in types):
            rows["wrong"].append(f"{entry} {'; '.join(filter(None, (_wrong(one) for one in types)))} |")
        elif any(one.reason for one in types):
            rows["ties"].append(f"{entry} {next(one.reason for one in types if one.reason)} |")
        else:
            rows["exact"].append(entry)
    others, missing = (sum(map(len, reasons[kind].values())) for kind in ("no decoder", "not built"))
    refused = sum(map(len, reasons["refused"].values()))
    right = len(rows["exact"]) + len(rows["ties"])
    said = f"{right} decode with trees and are right ({len(rows['ties'])} of them up to ties)"
    head = ["family", "class", "forward", *COSTS]
    return "\n".join(
        [
            "# Models", "", "<!-- Written by benchmarks/families_page.py. -->", "",
            f"What becomes of each family of transformers {version} on a CPU: a tiny model with random weights, text",
            f"alone, in float32 and bfloat16. transformers maps {len(by_family)} families to models that write text.",
            f"{others} of them don't do so from text alone, left to right. Of the other {len(by_family) - others},",
            f"{said}, {refused} are refused,",
            f"{len(rows['wrong'])} are wrong or fail, and no tiny model could be made of {missing}.", "",
            "Times are of these tiny models in bfloat16 on one thread, 40 tokens before a row; medians of a",
            "few forwards. There is hardly anything to compute in them, so they show what the host does for",
            "each form: more than in transformers' own forward where its modules run, less in one compiled",
            "call. *Of transformers'* is beside its own forward of a token with its own cache, in turns.",
            "",
            "## Exact", "",
            "Trees give each node the bits of decoding its path alone. In float32, logits are those of",
            "transformers' own forward over the whole text, and greedy ids those that it tells. They are those",
            "of `generate` too, where that takes text alone and doesn't differ from it. Layers are of the kinds",
            "that a family has by default: MiniMax M3 with sparse ones (`minimax_m3_sparse`) is refused.", "",
            *_table(head, rows["exact"]), "",
            "## Up to ties", "", *_table([*head, "why"], rows["ties"]), "",
            *(["## Wrong", "", *_table([*head, "what"], rows["wrong"]), ""] if rows["wrong"] else []),
            "## Refused", "", *_reasons(reasons["refused"]), "",
            "## Not tried", "", "No tiny model with random weights could be made.", "",
            *_reasons(reasons["not built"]), "",
            "## No decoders of text", "",
            "They are mapped, but don't write text from text alone, left to right.", "",
            *_reasons(reasons["no decoder"]),
        ]
    )  # fmt: skip


def _costs(one: Found) -> list[str]:
    """The cells of `COSTS`."""
    if not one.row:
        return [""] * len(COSTS)
    return [f"{one.row:.2g}", f"{one.row / one.theirs:.2f}" if one.theirs else "", f"{one.tree / one.row:.2f}"]


def _wrong(one: Found) -> str:
    """What is wrong in one type, "" if nothing is."""
    if one.right:
        return ""
    off = f"off by {one.error:.1g}" if one.error >= FAR else ""
    ids = "other ids" if one.ids == "other" else ""
    bits = f"{one.differing} of {one.texts} paths differ" if one.differing else ""
    return f"{one.dtype}: {', '.join(filter(None, (off, ids, bits))) or one.reason}"


def _table(columns: list[str], rows: list[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]


def _reasons(found: dict[str, list[str]]) -> list[str]:
    """A table of reasons and the classes that each is true of, the most frequent one first."""
    ordered = sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    cells = [(reason.replace("|", "\\|"), ", ".join(names)) for reason, names in ordered]
    return _table(["reason", "classes (families)"], [f"| {reason} | {names} |" for reason, names in cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the page to write")
    parser.add_argument("found", type=Path, nargs="+", help="the JSON files of a run, or of its parts")
    asked = parser.parse_args()
    results = [Found(**one) for part in asked.found for one in json.loads(part.read_text())]
    results.sort(key=lambda one: one.family)
    asked.page.write_text(page(results, version("transformers")) + "\n")


if __name__ == "__main__":
    main()
