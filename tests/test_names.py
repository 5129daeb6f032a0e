"""What may be named as a model, and what is said of anything else: one sentence, at once."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants

from tests.gguf_files import write_gguf
from tests.tiny_models import _GROUPED, randomised, save_model, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.errors import ModelError, TokenTreeError
from tokentree.names import find

PARAMS = SamplingParams(max_tokens=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model, in a folder that is called model-1b."""
    tokenizer = tiny_tokenizer()
    return save_model(tmp_path / "model-1b", tiny("llama", vocab_size=len(tokenizer)), tokenizer)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that refuses connections: nobody listens at that port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def told(name: Any, **options: Any) -> str:
    """The one sentence by which a name is refused, within two seconds."""
    started = time.perf_counter()
    with pytest.raises(ModelError) as raised:
        LLM(name, **options)
    assert time.perf_counter() - started < 10
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.usefixtures("no_network")
def test_a_name_that_is_nothing_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, says in (
        (
            "Qwen2.5-Coder-1.5B",
            "there is no folder 'Qwen2.5-Coder-1.5B', and names on the hub have the form owner/name",
        ),
        ("gpt22", "names on the hub have the form owner/name"),
        ("Qwen/Qwen2.5-Coder-1.5B", "there is no folder 'Qwen/Qwen2.5-Coder-1.5B', and the hub can't be reached"),
        ("./a", "there is no folder './a'"),
        ("a/", "there is no folder 'a/'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
        ("~/nothing", "there is no folder '~/nothing'"),
        ("/nothing", "there is no folder '/nothing'"),
        ("C:\\models\\a", "there is no folder"),
        ("a.gguf", "there is no file 'a.gguf'"),
        ("a/b.GGUF", "there is no file 'a/b.GGUF'"),
        ("", "the name of the model is empty|names no model"),
        (" ", "the name of the model is empty|names no model"),
        ("a b/c", "no name on the hub can be spelled so"),
        ("ü/ö", "no name on the hub can be spelled so"),
        ("a\0b", "can't be looked up: embedded null byte|no name on the hub can be spelled so"),
        ("x" * 5000, "can't be looked up: File name too long"),
        ("a//b", "no name on the hub can be spelled so"),
        ("~nobody-of-that-name/a", "can't be looked up|there is no folder"),
    ):
        assert any(part in told(name) for part in says.split("|")), name


@pytest.mark.usefixtures("no_network")
def test_one_that_looks_alike_is_proposed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(folder.parent)
    for name, meant in (
        ("model-1B", "model-1b"), ("modle-1b", "model-1b"), ("./model1b", "model-1b"),
        (str(folder.parent / "model-2b"), str(folder)), ("smal.gguf", "small.gguf"), ("small", "small.gguf"),
    ):  # fmt: skip
        assert f"did you mean '{meant}'?" in told(name), name
    assert "did you mean" not in told("elephant")


@pytest.mark.usefixtures("no_network")
def test_what_is_on_this_machine_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's own cache has it."""
    cache = tmp_path / "hub"
    place = cache / "models--owner--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    started = time.perf_counter()
    assert find("owner/name").local_only
    assert LLM("owner/name", dtype="float32").generate("A tree", PARAMS)
    assert time.perf_counter() - started < 20


def test_without_leave_to_ask_the_hub_it_isn_t_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub can't be reached" in told("owner/name")


def test_files_and_folders_that_are_no_model_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dir.gguf").mkdir()
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "one.GGUF").write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "blob").write_bytes(b"GGUF" + bytes(100))
    for path, says in (
        (tmp_path / "empty", "has no config.json, so it is not a model"),
        (tmp_path / "dir.gguf", "the folder '.*' has no config.json"),
        (tmp_path / "ggufs", "GGUF files: name one of them, such as '.*one.GGUF'"),
        (tmp_path / "notes.txt", "is a file, where a model is a folder"),
        (tmp_path / "blob", "is read as one if its name ends in .gguf"),
        (folder / "model.safetensors", "is a file, .*: name its folder, '.*model-1b'"),
        (folder / "config.json", "name its folder"),
    ):
        assert re.search(says, told(path)), path
        assert re.search(says, told(str(path))), path


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(change(said)))

    return spoil


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return spoil


def cut(name: str, length: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:length])

    return spoil


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def a_shard_is_missing(folder: Path) -> None:
    tiny("llama", vocab_size=300).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    next(folder.glob("model-00002*")).unlink()


def a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"noise" * 100)


SPOILT: dict[str, Callable[[Path], None]] = {
    "config: no JSON": write("config.json", b"{"),
    "config: empty": write("config.json", b""),
    "config: binary": write("config.json", bytes(range(256))),
    "config: a list": write("config.json", b"[]"),
    "config: a number": write("config.json", b"7"),
    "config: nothing in it": write("config.json", b"{}"),
    "config: unknown type": config(lambda said: said | {"model_type": "abacus"}),
    "config: a type that is a number": config(lambda said: said | {"model_type": 7}),
    "config: a type of another kind": config(lambda said: said | {"model_type": "clip"}),
    "config: no heads": config(lambda said: said | {"num_attention_heads": 0, "head_dim": None}),
    "config: a text for a number": config(lambda said: said | {"hidden_size": "big"}),
    "config: a negative size": config(lambda said: said | {"hidden_size": -48}),
    "config: another size": config(lambda said: said | {"hidden_size": 52}),
    "config: more layers": config(lambda said: said | {"num_hidden_layers": 3}),
    "config: unknown positions": config(lambda said: said | {"rope_parameters": {"rope_type": "spiral"}}),
    "config: positions of another kind": config(lambda said: said | {"rope_parameters": "none"}),
    "config: an unknown activation": config(lambda said: said | {"hidden_act": "wink"}),
    "config: bitsandbytes": config(
        lambda said: said | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    ),
    "config: gptq": config(lambda said: said | {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "config: awq": config(lambda said: said | {"quantization_config": {"quant_method": "awq", "bits": 4}}),
    "config: unknown quantization": config(lambda said: said | {"quantization_config": {"quant_method": "abacus"}}),
    "config: a quantization of nothing": config(lambda said: said | {"quantization_config": {}}),
    "config: a quantization that is a text": config(lambda said: said | {"quantization_config": "4 bits"}),
    "weights: cut": cut("model.safetensors", 1000),
    "weights: cut in the header": cut("model.safetensors", 20),
    "weights: empty": write("model.safetensors", b""),
    "weights: noise": write("model.safetensors", b"noise" * 1000),
    "weights: gone": gone("model.safetensors"),
    "weights: a shard gone": a_shard_is_missing,
    "weights: a broken pickle": a_pickle,
    "tokenizer: no JSON": write("tokenizer.json", b"{"),
    "tokenizer: empty": write("tokenizer.json", b""),
    "tokenizer: another form": write("tokenizer.json", b"{}"),
    "tokenizer: a broken part": write("tokenizer.json", b'{"version": "1.0", "model": {"type": "abacus"}}'),
    "tokenizer: binary": write("tokenizer.json", bytes(range(256))),
    "tokenizer: a list": write("tokenizer_config.json", b"[]"),
    "tokenizer: settings cut": cut("tokenizer_config.json", 30),
    "generation: no JSON": write("generation_config.json", b"{"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_folder_that_is_spoilt_is_one_sentence(case: str, folder: Path) -> None:
    SPOILT[case](folder)
    assert "model-1b" in told(folder, dtype="float32")


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_for(
    part: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal transformers would ask, and whoever says yes runs it."""
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    if part == "model":
        classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        config(lambda said: said | {"model_type": "own", "auto_map": classes})(folder)
    else:
        file = folder / "tokenizer_config.json"
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
    asked = list[str]()

    def agree(said: str = "") -> str:
        asked.append(said)
        return "y"

    monkeypatch.setattr("builtins.input", agree)
    assert f"can't load the {part}" in told(folder, dtype="float32")
    assert not asked
    assert not (folder / "ran").exists()


def test_a_folder_without_a_tokenizer_takes_token_ids(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    llm = LLM(folder)
    assert llm.tokenizer is None
    assert llm.generate(some_tokens(5), PARAMS)[0].token_ids
    with pytest.raises(TokenTreeError, match="came without a tokenizer"):
        llm.generate("A tree")


def test_names_with_odd_characters_are_names(folder: Path) -> None:
    own = LLM(folder, dtype="float32").generate("A tree", PARAMS)[0].token_ids
    for name in ("with space", "ünï", "[a]*?", "a'b\"c", "50%", "-m", "a.gguf.d", "🙂"):
        other = folder.rename(folder.parent / name)
        assert LLM(other, dtype="float32").generate("A tree", PARAMS)[0].token_ids == own
        other.rename(folder)
    path = folder.parent / "ä b [c].GGUF"
    write_gguf(path, tiny("llama"))
    assert LLM(path).generate(some_tokens(5), PARAMS)


# -- models that see or hear -----------------------------------------------------------------------------------------

_TEXT = dict(_GROUPED)
_EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14}  # fmt: skip
_QWEN_EYE = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}}
_QWEN_IDS = {"image_token_id": 119, "video_token_id": 118, "vision_start_token_id": 117, "vision_end_token_id": 116}
SEEING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Config", {
        "text_config": _TEXT | {"model_type": "gemma3_text", "head_dim": 16}, "image_token_index": 119,
        "vision_config": _EYE | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": _TEXT | {"model_type": "llama"}, "image_token_index": 119,
        "vision_config": _EYE | {"model_type": "clip_vision_model"}}),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {
        "text_config": _TEXT | _MROPE | {"model_type": "qwen2_5_vl_text"}, "vision_config": _QWEN_EYE, **_QWEN_IDS}),
    "mistral3": ("Mistral3ForConditionalGeneration", "Mistral3Config", {
        "text_config": _TEXT | {"model_type": "mistral", "head_dim": 12}, "image_token_index": 119,
        "vision_config": _EYE | {"model_type": "pixtral", "head_dim": 16}}),
    "idefics3": ("Idefics3ForConditionalGeneration", "Idefics3Config", {
        "text_config": _TEXT | {"model_type": "llama"}, "vision_config": _EYE, "image_token_id": 119,
        "scale_factor": 2}),
    "qwen2-audio": ("Qwen2AudioForConditionalGeneration", "Qwen2AudioConfig", {
        "text_config": _TEXT | {"model_type": "qwen2"}, "audio_token_index": 119, "audio_config": {
            "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
            "num_mel_bins": 16, "max_source_positions": 20}}),
}  # fmt: skip


@pytest.mark.parametrize("case", SEEING)
def test_a_folder_of_a_model_that_sees_decodes_as_the_loaded_model(case: str, tmp_path: Path) -> None:
    kind, settings, options = SEEING[case]
    model = randomised(getattr(transformers, kind)(getattr(transformers, settings)(**options)))
    model.save_pretrained(tmp_path / "model")
    prompt = some_tokens(20, vocab=110)
    llm = LLM(tmp_path / "model", dtype="float32", device=torch.device("cpu"))
    assert llm.engine.info.name == kind
    assert llm.generate(prompt, PARAMS)[0].token_ids == LLM(model).generate(prompt, PARAMS)[0].token_ids
