"""The heads in `heads/`: read as they are, as small as promised, with the command that made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokentree.heads.eagle_files import read_eagle
from tokentree.heads.saved import kind_of, read_heads

HEADS = Path(__file__).parents[2] / "heads"
FOLDERS = sorted(file.parent for file in HEADS.glob("*/*/config.json"))
LIMITS = {"eagle": 16e6, "medusa": 8e6}  # bytes


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_they_are_read_and_small(folder: Path) -> None:
    assert kind_of(folder) == folder.name
    if folder.name == "eagle":
        eagle = read_eagle(folder, 30)
        assert eagle.head.sizes.taps == (2, 15, 27)
        assert eagle.head.token_map is not None
        assert len(eagle.head.token_map) == 4096
        assert eagle.head.lm_head is not None
        weight, about = eagle.head.lm_head.weight, eagle.about
    else:
        saved = read_heads(folder)
        assert saved.heads.num_heads == 4
        assert saved.about.choices
        weight, about = saved.heads.weight, saved.about
    assert bool(torch.isfinite(weight).all())
    assert about.fingerprint is not None
    assert about.recipe["tokens"] > 400_000
    assert (folder / "model.safetensors").stat().st_size <= LIMITS[folder.name]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_their_cards_say_how_they_were_made(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"tokentree train {folder.name} --model .models/smollm2-135m.gguf --data self" in card
    assert "/tmp" not in card


def test_both_kinds_are_there() -> None:
    assert {folder.name for folder in FOLDERS} == {"eagle", "medusa"}
