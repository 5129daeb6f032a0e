"""Packed weights that are kept, and when they are packed again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.gguf_files import write_gguf
from tests.tiny_models import request, some_tokens, some_tree, tiny
from tokentree.converted import packed_place
from tokentree.engines import kept
from tokentree.engines.kept import Place
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.linear import PackedLinear
from tokentree.engines.packing import GgufPacking, Packing
from tokentree.engines.proof import OWN
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


def logits_of(engine: KVEngine) -> torch.Tensor:
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
    monkeypatch.setattr("tokentree.engines.torch.own_forward", None)
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
    torch.save(content, place.file)
    with pytest.raises(ModelError, match="does not give the same logits"):
        TorchEngine(model(), kept=place)


def test_kept_weights_are_mapped_where_vectors_can_be_loaded(place: Place) -> None:
    TorchEngine(model(), kept=place)
    engine = TorchEngine(model(), kept=place)
    layers = [layer for layer in engine._model.modules() if isinstance(layer, PackedLinear)]
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
    assert [packs(place), packs(place)] == [True, False]
    place.file.write_bytes(place.file.read_bytes()[:-900])
    assert [packs(place), packs(place)] == [True, False]
    place.file.write_bytes(b"noise")
    assert [packs(place), packs(place)] == [True, False]


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


def test_places_follow_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / "cache"))
    assert packed_place("some/name", None) is None
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    before = packed_place(folder, None)
    assert before == packed_place(str(folder), None)
    assert before is not None
    assert before.file != getattr(packed_place(folder, "int8"), "file", None)
    (folder / "model.safetensors").write_text("other weights")
    after = packed_place(folder, None)
    assert after is not None
    assert after.file == before.file
    assert after.source != before.source
