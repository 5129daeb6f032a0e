"""Engines made of what was kept, without a transformers model."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from tests.conftest import all_pairs, by_night, shown
from tests.drafters.test_eagle import some_head
from tests.engines.cpu.test_kept import logits_of, rewrite
from tests.gguf_files import write_gguf
from tests.hybrids import HYBRIDS, tiny_hybrid
from tests.tiny_models import request, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.engines.base import EngineOptions
from tokentree.engines.from_cache import READY, ReadyEngine
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.modules import ModulesEngine
from tokentree.engines.program import ProgramEngine
from tokentree.errors import ModelError
from tokentree.heads.eagle_files import write_eagle
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.saved import About
from tokentree.loading import load_engine
from tokentree.rotary import Rotary, Rotation

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 96}
SCALED = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 80},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 80,
    },
}  # fmt: skip


SIZES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "heads": lambda ready: ready["stack"]["layers"][1]["attention"].update(heads=400),
    "no kv heads": lambda ready: ready["stack"]["layers"][1]["attention"].update(kv_heads=0),
    "width": lambda ready: ready["stack"]["layers"][0]["attention"].update(width=1 << 20),
    "scale": lambda ready: ready["stack"]["layers"][0]["attention"].update(scale=float("nan")),
    "window": lambda ready: ready["stack"]["layers"][0]["attention"].update(window=-3),
    "norm": lambda ready: ready["stack"]["norm"].update(weight=torch.ones(8)),
    "a scale of positions that torch can't multiply by": lambda ready: ready["stack"]["rotaries"][0].update(
        scale=-(1 << 70)
    ),
    "epsilon": lambda ready: ready["stack"]["norm"].update(eps=1 << 2000),
    "flat embedding": lambda ready: ready["stack"]["embedding"].update(
        weight=ready["stack"]["embedding"]["weight"].flatten()
    ),
    "embedding in another type": lambda ready: ready["stack"]["embedding"].update(
        weight=ready["stack"]["embedding"]["weight"].float()
    ),
    "an embedding that isn't packed": lambda ready: ready["stack"]["embedding"].update(packed=True),
    "embedding": lambda ready: ready["stack"]["embedding"].update(count=10**6),
    "frequencies": lambda ready: ready["stack"]["rotaries"][0].update(frequencies=torch.ones(1)),
    "product": lambda ready: ready["stack"]["layers"][0]["attention"].update(
        o_proj=ready["stack"]["layers"][0]["attention"]["qkv"]
    ),
    "more of an attention": lambda ready: ready["stack"]["layers"][0]["attention"].update(forward=1),
    "table of positions": lambda ready: ready["stack"]["layers"][1].update(table=1),
    "norms": lambda ready: ready["stack"]["layers"][1]["norms"].pop(),
    "family": lambda ready: ready.update(family="gemma3"),
    "no family": lambda ready: ready.update(family="gemma33"),
    "no layers": lambda ready: ready["stack"].update(layers=[]),
    "context": lambda ready: ready["facts"].update(context="long"),
    "a context below nothing": lambda ready: ready["facts"].update(context=-(1 << 70)),
    "number of layers": lambda ready: ready["facts"].update(num_layers=7),
}


# of Gemma 3, which has more
OF_GEMMA: dict[str, Callable[[dict[str, Any]], Any]] = {
    "scale of the embedding": lambda ready: ready["stack"]["embedding"].update(scale=float("inf")),
    "no scale": lambda ready: ready["stack"]["embedding"].update(scale=None),
    "table of positions": lambda ready: ready["stack"]["layers"][1].update(table=2),
    "the other table": lambda ready: ready["stack"]["layers"][0].update(table=0),
    "one table": lambda ready: ready["stack"]["rotaries"].pop(),
    "frequencies": lambda ready: ready["stack"]["rotaries"][1].update(frequencies=torch.ones(1)),
    "no norms of heads": lambda ready: ready["stack"]["layers"][0]["attention"].pop("norms"),
    "norms of fewer heads": lambda ready: ready["stack"]["layers"][0]["attention"]["norms"].update(
        weights=torch.ones(3, 16)
    ),
    "epsilon of heads": lambda ready: ready["stack"]["layers"][0]["attention"]["norms"].update(eps=float("nan")),
    "rounding of heads": lambda ready: ready["stack"]["layers"][0]["attention"]["norms"].update(once=2),
    "gates": lambda ready: ready["stack"]["layers"][0]["mlp"].update(
        gate_up=ready["stack"]["layers"][0]["attention"]["o_proj"]
    ),
    "norms": lambda ready: ready["stack"]["layers"][1]["norms"].pop(),
    "order of norms": lambda ready: ready["stack"]["layers"][1]["norms"].reverse(),
}  # fmt: skip


def of_conv(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda ready: change(ready["stack"]["layers"][0]["convolution"])


OF_LFM2: dict[str, Callable[[dict[str, Any]], Any]] = {
    "taps": of_conv(lambda conv: conv.update(weight=torch.ones(1, 64))),
    "no taps": of_conv(lambda conv: conv.update(weight=torch.ones(0, 64))),
    "channels": of_conv(lambda conv: conv.update(weight=torch.ones(3, 32), bias=torch.ones(32))),
    "weights in another type": of_conv(lambda conv: conv.update(weight=conv["weight"].bfloat16())),
    "weights that lie otherwise": of_conv(lambda conv: conv.update(weight=torch.ones(64, 3).t())),
    "bias": of_conv(lambda conv: conv.update(bias=torch.ones(63))),
    "product": of_conv(lambda conv: conv.update(in_proj=conv["out_proj"])),
    "more of a convolution": of_conv(lambda conv: conv.update(forward=1)),
    "no mixer": lambda ready: ready["stack"]["layers"][0].pop("convolution"),
    "two mixers": lambda ready: ready["stack"]["layers"][0].update(
        attention=ready["stack"]["layers"][1]["attention"]
    ),
    "no attention": lambda ready: ready["stack"]["layers"].pop(1),
    "family": lambda ready: ready.update(family="qwen3"),
}  # fmt: skip
SPOILT = {"llama": SIZES, "gemma3": OF_GEMMA, "lfm2": OF_LFM2}


def made(family: str, **options: Any) -> PreTrainedModel:
    """A model in bfloat16, with sizes that packed layers take."""
    if family in HYBRIDS:
        return tiny_hybrid(family, torch.bfloat16, **options)
    return tiny(family, torch.bfloat16, **options, **WIDE)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / "cache"))


def saved(folder: Path, model: PreTrainedModel) -> Path:
    """``model``, with a tokenizer and two tokens that end a text."""
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=[2, 7])
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def twice(model: Path, quantization: str | None = None) -> tuple[KVEngine, KVEngine]:
    """The engine that packs, and the one that finds what is kept."""
    first, second = (load_engine(model, EngineOptions(device=CPU, quantization=quantization)) for _ in range(2))
    assert type(first) is ProgramEngine
    assert isinstance(second, ReadyEngine)
    return first, second


@pytest.mark.parametrize(
    ("family", "kind"),
    all_pairs(
        ["llama", "mistral", "qwen2", "qwen3", "gemma3", "lfm2"],
        [*itertools.product([None, "int8"], [False, True])],
        by_day=2,
    ),
    ids=shown,
)
def test_the_second_engine_says_the_same_bit_for_bit(
    family: str, kind: tuple[str | None, bool], tmp_path: Path
) -> None:  # fmt: skip
    quantization, tied = kind
    model = made(family, tie_word_embeddings=tied)
    first, second = twice(saved(tmp_path / "model", model), quantization)
    assert torch.equal(logits_of(first), logits_of(second))
    assert first.facts == second.facts
    assert first.signature == second.signature
    assert first.bytes_per_token == second.bytes_per_token
    assert first.info.state_bytes == second.info.state_bytes
    assert Fingerprint.of(first.config, None) == Fingerprint.of(second.config, None)
    assert second.facts.ends == [2, 7]


def test_a_gguf_file_too(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny("llama", hidden_size=64, intermediate_size=96), kind_of=lambda _: "Q4_0")
    first, second = twice(file, "gguf")
    assert torch.equal(logits_of(first), logits_of(second))


@pytest.mark.parametrize("kind", SCALED)
def test_rotary_positions_are_the_model_s_own(kind: str, tmp_path: Path) -> None:
    scaling = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    model = tiny("llama", torch.bfloat16, rope_parameters=scaling, **WIDE)
    own, positions = model.model.rotary_emb, torch.tensor([[0, 1, 5, 79, 80, 81, 300, 65_537]])
    again = Rotary(Rotation.of(own))
    for dtype in (torch.float32, torch.bfloat16):
        for got, expected in zip(*(turn(torch.empty(0, dtype=dtype), positions) for turn in (again, own)), strict=True):
            assert torch.equal(got, expected)
    first, second = twice(saved(tmp_path / "model", model))
    assert torch.equal(logits_of(first), logits_of(second))


def test_positions_that_depend_on_a_text_s_length_need_the_model(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = saved(tmp_path / "model", tiny("llama", torch.bfloat16, rope_parameters=scaling, **WIDE))
    engines = [load_engine(folder, EngineOptions(device=CPU)) for _ in range(2)]
    assert all(type(engine) is ProgramEngine for engine in engines)
    assert torch.equal(*map(logits_of, engines))


def test_hidden_states_are_the_same(tmp_path: Path) -> None:
    states = []
    for engine in twice(saved(tmp_path / "model", tiny("llama", torch.bfloat16, **WIDE))):
        features, seq = engine.capture([0, 1, 2]), request(some_tokens(20))
        engine.prefill(seq)
        rows = torch.cat([engine.hidden(seq, place) for place in range(3)])
        states.append((rows, features.output_layer(rows), features.embedding(torch.arange(20))))
    for first, second in zip(*states, strict=True):
        assert torch.equal(first, second)


def test_texts_are_the_same_with_draft_models_too(tmp_path: Path) -> None:
    target = saved(tmp_path / "target", tiny("llama", torch.bfloat16, vocab_size=300, **WIDE))
    draft = saved(tmp_path / "draft", tiny("llama", torch.bfloat16, seed=1, vocab_size=300, **WIDE))
    params, texts = SamplingParams(max_tokens=30), []
    for _ in range(2):
        llm = LLM(target, draft_model=draft, shape="2x2")
        texts.append([result.text for result in llm.generate(["hello there", "a tree"], params)])
        assert llm.eos_ids >= {2, 7}
    assert texts[0] == texts[1]
    engines = [llm.engine, *(engine for _, engine in llm._parts.draft_engines)]
    assert all(isinstance(engine, ReadyEngine) for engine in engines)


@pytest.mark.parametrize("headed", by_night([False, True], but=[True]))
def test_nothing_else_is_read_and_no_model_class_imported(headed: bool, tmp_path: Path) -> None:
    model, heads = tiny("llama", torch.bfloat16, vocab_size=300, **WIDE), str(tmp_path / "heads") if headed else None
    folder = saved(tmp_path / "model", model)
    if heads is not None:
        head = some_head(3, vocab_size=300, **WIDE)
        write_eagle(head, heads, "tiny", about=About(taps=[0, 1, 2]))
    first = LLM(folder, heads=heads).generate(["a tree"], SamplingParams(max_tokens=5, seed=0))[0].token_ids
    program = (
        "import sys; from tokentree import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, heads={heads!r})\n"
        "print(llm.generate(['a tree'], SamplingParams(max_tokens=5, seed=0))[0].token_ids)\n"
        "print('transformers.modeling_utils' in sys.modules)\n"
        "print('eagle' in llm.decoder.names)"
    )
    second = subprocess.run(
        [sys.executable, "-c", program], env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert second.stdout.splitlines() == [str(first), "False", str(headed)]


def test_with_options_that_need_the_model_it_is_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny("llama", torch.bfloat16, vocab_size=300, **WIDE))
    twice(folder)
    assert isinstance(load_engine(folder, EngineOptions("float32", CPU)), ModulesEngine)
    itself = load_engine(folder, EngineOptions(device=CPU, attention="sdpa"))
    assert isinstance(itself, KVEngine)
    assert itself.model is not None
    program = load_engine(folder, EngineOptions(device=CPU))
    assert isinstance(program, KVEngine)
    with pytest.raises(ModelError, match="attention='sdpa'"):
        _ = program.model


def test_a_folder_that_changed_is_read_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny("llama", torch.bfloat16, vocab_size=300, **WIDE))
    twice(folder)
    GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=[2, 7, 9]).save_pretrained(folder)
    first, second = twice(folder)
    assert first.facts.ends == second.facts.ends == [2, 7, 9]
    shutil.rmtree(folder)
    saved(folder, tiny("llama", torch.bfloat16, seed=3, **WIDE))
    twice(folder)


class Kept(NamedTuple):
    """A folder with a model, what is kept of it, and what its engines say."""

    folder: Path
    file: Path
    content: bytes
    logits: torch.Tensor


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kept]:
    @functools.cache
    def of(family: str) -> Kept:
        home = tmp_path_factory.mktemp(family)
        folder = saved(home / "model", made(family, vocab_size=300))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TOKENTREE_CACHE", str(home / "cache"))
            logits = logits_of(twice(folder)[1])
        (file,) = home.glob("cache/models/*/packed-bfloat16.pt")
        return Kept(folder, file, file.read_bytes(), logits)

    return of


@pytest.mark.parametrize(
    ("family", "spoilt"),
    [
        *(("llama", part) for part in ["stack", "family of it", "settings", "facts", "weight", *SIZES]),
        *by_night((("gemma3", part) for part in OF_GEMMA), but=[("gemma3", "frequencies")]),
        *by_night((("lfm2", part) for part in OF_LFM2), but=[("lfm2", "taps")]),
    ],
)
def test_what_is_spoilt_is_made_again(
    family: str, spoilt: str, kept: Callable[[str], Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file, whole, expected = kept(family)
    monkeypatch.setenv("TOKENTREE_CACHE", str(folder.parent / "cache"))
    file.unlink()  # and not written over: an earlier engine may have mapped it
    file.write_bytes(whole)
    content = torch.load(file, weights_only=True)
    ready = content["layers"][READY]
    if spoilt == "weight":
        ready["stack"]["layers"][0]["norms"][0]["weight"] *= 3
    elif spoilt in (changes := SPOILT[family]):
        changes[spoilt](ready)
    else:
        del ready[spoilt.removesuffix(" of it")]
    rewrite(file, content)
    with pytest.warns(UserWarning, match="is damaged: it is made again"):
        engines = twice(folder)
    for engine in engines:
        assert torch.equal(logits_of(engine), expected)
