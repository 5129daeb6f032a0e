"""Packed weights that are kept, and when they are packed again."""

from __future__ import annotations

import copy
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.gguf_files import write_gguf
from tests.tiny_models import parts_of, request, some_tokens, some_tree, tiny
from tokentree.cache import DIGEST, intact, seal
from tokentree.converted import packed_place
from tokentree.engines.base import Engine
from tokentree.engines.cpu import packed_file as kept
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.packed_file import Place
from tokentree.engines.cpu.packing import GgufPacking, Packing
from tokentree.engines.self_check import OWN
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError
from tokentree.loading import load_model


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "below" / "packed.pt", "these files")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was packed, and not read."""
    found, pack = list[str](), Packing.pack

    def noted(self: Packing, *layers: torch.nn.Linear, gated: bool = False) -> object:
        if type(self) is Packing:
            found.append("+".join(str(layer.out_features) for layer in layers))
        return pack(self, *layers, gated=gated)

    monkeypatch.setattr(Packing, "pack", noted)
    return found


def model(family: str = "qwen2") -> PreTrainedModel:
    return tiny(family, torch.bfloat16, hidden_size=64, intermediate_size=96)


def rewrite(file: Path, content: object) -> None:
    """Writes what another program might, with a digest that is right."""
    torch.save(content, file)
    seal(file)


def logits_of(engine: Engine) -> torch.Tensor:
    seq = request(some_tokens(20))
    engine.prefill(seq)
    return engine.verify([seq], [some_tree(0, 9)]).all_logits


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_the_second_engine_packs_nothing_and_says_the_same(
    family: str, quantization: str | None, place: Place, calls: list[str]
) -> None:  # fmt: skip
    own = tiny("gpt2", torch.bfloat16, n_embd=64) if family == "gpt2" else model(family)
    alone = logits_of(TorchEngine(own, quantization=quantization))
    calls.clear()
    first = TorchEngine(own, quantization=quantization, kept=place)
    assert calls
    assert place.file.is_file()
    assert [file.name for file in place.file.parent.iterdir()] == ["packed.pt"]
    calls.clear()
    second = TorchEngine(own, quantization=quantization, kept=place)
    assert len(calls) == (8 if family == "gpt2" else 0)  # those that transpose their weight have no name to be kept by
    for engine in (first, second):
        assert torch.equal(logits_of(engine), alone)


def test_the_second_engine_needs_no_forward_of_the_model_s_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits_of(TorchEngine(model(), kept=place))
    monkeypatch.setattr("tokentree.engines.prepared.own_forward", None)
    assert torch.equal(logits_of(TorchEngine(model(), kept=place)), expected)


def test_what_is_kept_of_a_model_is_not_taken_for_that_of_another_type(place: Place) -> None:
    TorchEngine(model(), kept=place)
    other = model().float()
    assert torch.equal(logits_of(TorchEngine(other, kept=place)), logits_of(TorchEngine(other)))


def test_kept_weights_that_say_something_else_are_refused(place: Place) -> None:
    TorchEngine(model(), kept=place)
    content = torch.load(place.file, weights_only=True)
    for name in ("logits", "exact"):
        content["layers"][OWN][name] += torch.randn(7, 120, generator=torch.Generator().manual_seed(0))
    rewrite(place.file, content)
    with pytest.raises(ModelError, match="does not give the same logits"):
        TorchEngine(model(), kept=place)


def test_kept_weights_are_mapped_where_vectors_can_be_loaded(place: Place) -> None:
    TorchEngine(model(), kept=place)
    engine = TorchEngine(model(), kept=place)
    layers = [layer for layer in parts_of(engine) if isinstance(layer, PackedLinear)]
    assert layers
    assert all(layer.weight.data_ptr() % 64 == 0 for layer in layers)


def test_another_source_another_version_or_a_spoilt_file_is_packed_again(
    place: Place, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def packs(where: Place) -> bool:
        calls.clear()
        TorchEngine(model(), kept=where)
        return bool(calls)

    assert [packs(place), packs(place)] == [True, False]
    assert packs(Place(place.file, "other files"))
    assert packs(place)
    monkeypatch.setattr(kept, "VERSION", kept.VERSION + 1)
    with pytest.warns(UserWarning, match="is of another version"):
        assert [packs(place), packs(place)] == [True, False]
    for content in (place.file.read_bytes()[:-900], b"noise", b""):
        place.file.write_bytes(content)
        with pytest.warns(UserWarning, match=r"^what is kept in .* is damaged: it is made again$"):
            assert packs(place)
        assert not packs(place)


def test_what_another_version_wrote_is_not_called_damaged(
    place: Place, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    told = r"^what is kept in .* is of another version: it is made again$"
    for before in ("unsealed", "sealed"):
        if before == "unsealed":
            place.file.parent.mkdir()
            torch.save({"about": [3, "these files"], "layers": {}}, place.file)
        else:
            monkeypatch.setattr(kept, "VERSION", kept.VERSION + 1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            TorchEngine(model(), kept=place)
        assert len(said) == 1, before
        assert re.match(told, str(said[0].message)), before
        assert calls
        calls.clear()
        TorchEngine(model(), kept=place)
        assert not calls


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_any_flipped_byte_is_noticed(quantization: str | None, place: Place) -> None:
    own = model()
    expected = logits_of(TorchEngine(own, quantization=quantization, kept=place))
    whole = place.file.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 40).tolist():
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        place.file.write_bytes(flipped)
        assert not _intact(place.file), at
    place.file.write_bytes(flipped[:-1])
    with pytest.warns(UserWarning, match="is damaged: it is made again"):
        engine = TorchEngine(own, quantization=quantization, kept=place)
    assert torch.equal(logits_of(engine), expected)
    assert _intact(place.file)


def _intact(file: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return intact(file)


def test_an_archive_with_a_digest_is_one_to_others_too(place: Place) -> None:
    TorchEngine(model(), kept=place)
    with zipfile.ZipFile(place.file) as archive:
        assert archive.testzip() is None
        assert len(archive.comment) == DIGEST


def test_it_belongs_to_this_user_alone(place: Place, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    TorchEngine(model(), kept=place)
    assert not place.file.parent.stat().st_mode & 0o77
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    calls.clear()
    with pytest.warns(UserWarning, match="packed weights aren't kept.*another user"):
        TorchEngine(model(), kept=place)
    assert calls


SPOILT: list[Callable[[dict[str, Any]], Any]] = [
    lambda layer: layer.update(num_outputs=1 << 30),
    lambda layer: layer.update(num_outputs=-1),
    lambda layer: layer.update(gated=7),
    lambda layer: layer.update(weight=layer["weight"][:, :-1].contiguous()),
    lambda layer: layer.update(weight=layer["weight"].float()),
    lambda layer: layer.update(weight=layer["weight"].transpose(0, 1)),
    lambda layer: layer.update(start=layer["start"][:-1]),
    lambda layer: layer.update(start=None),
    lambda layer: layer.update(more=1),
    lambda layer: layer.pop("start"),
    lambda layer: layer.update(groups=1 << 20) if "groups" in layer else layer.clear(),
    lambda layer: layer.update(group=3) if "group" in layer else layer.clear(),
    lambda layer: layer.update(bits=4) if "bits" in layer else layer.clear(),
    lambda layer: layer.update(num_inputs=1 << 20) if "num_inputs" in layer else layer.clear(),
]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_sizes_that_make_no_sense_are_not_computed_with(quantization: str | None, place: Place) -> None:
    own = model("gemma2")
    expected = logits_of(TorchEngine(own, quantization=quantization, kept=place))
    whole = torch.load(place.file, weights_only=True)
    for spoil in SPOILT:
        content = copy.deepcopy(whole)
        name = next(name for name, part in content["layers"].items() if "weight" in part)
        spoil(content["layers"][name])
        rewrite(place.file, content)
        with pytest.warns(UserWarning, match="is damaged: it is made again"):
            engine = TorchEngine(own, quantization=quantization, kept=place)
        assert torch.equal(logits_of(engine), expected)


def test_what_a_model_is_said_to_have_said_is_checked(place: Place) -> None:
    own = model()
    expected = logits_of(TorchEngine(own, kept=place))
    whole = torch.load(place.file, weights_only=True)
    for change in (
        {"tokens": torch.full((7,), 10**9)}, {"tokens": torch.zeros(6, dtype=torch.int64)}, {"shapes": torch.zeros(0)},
        {"shapes": torch.full((2, 3), -1)}, {"logits": 3},
    ):  # fmt: skip
        content = copy.deepcopy(whole)
        content["layers"][OWN].update(change)
        rewrite(place.file, content)
        with pytest.warns(UserWarning, match="is damaged: it is made again"):
            engine = TorchEngine(own, kept=place)
        assert torch.equal(logits_of(engine), expected)


def test_a_cache_that_can_t_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="packed weights aren't kept"):
        TorchEngine(model(), kept=Place(tmp_path / "file" / "packed.pt", ""))


def test_a_gguf_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny("llama", hidden_size=64, intermediate_size=96), kind_of=lambda _: "Q4_0")
    loaded, where = load_model(path, "bfloat16", torch.device("cpu")), packed_place(path, "gguf")
    expected = logits_of(TorchEngine(loaded, quantization="gguf", file=path, kept=where))
    monkeypatch.setattr(GgufPacking, "__init__", None)
    assert torch.equal(logits_of(TorchEngine(loaded, quantization="gguf", file=path, kept=where)), expected)


def unreadable(file: Path) -> bytes:
    raise PermissionError(str(file))


def test_places_follow_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / "cache"))
    assert packed_place("some/name", "bfloat16") is None
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    before = packed_place(folder, "bfloat16")
    assert before == packed_place(str(folder), "bfloat16")
    assert before is not None
    assert before.file != getattr(packed_place(folder, "int8"), "file", None)
    (folder / "model.safetensors").write_text("other weights")
    after = packed_place(folder, "bfloat16")
    assert after is not None
    assert after.file == before.file
    assert after.source != before.source
    (folder / "config.json").symlink_to("nowhere")
    assert packed_place(folder, "bfloat16") == after
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("new")
    monkeypatch.setattr("tokentree.converted.digest_of", unreadable)
    assert packed_place(folder, "bfloat16") is None
