"""Files that are damaged, cut, or something else."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.gguf_files import write_gguf
from tests.tiny_models import some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.errors import ModelError, TokenTreeError
from tokentree.gguf.header import GgufError, read_header
from tokentree.loading import load_model, load_tokenizer

PROMPT = some_tokens(12)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file: one layer, a tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = tiny_tokenizer(size=280)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
    }
    write_gguf(path, tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=1, **sizes), tokenizer)
    return path.read_bytes()


def test_everything_in_a_header_is_read(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert list(header.entries) == [key for key in reader.fields if not key.startswith("GGUF.")]
    for key, value in header.entries.items():
        assert value == reader.fields[key].contents()
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        own = header.tensors[tensor.name]
        assert own.begin == tensor.data_offset
        assert own.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(header.values(own), tensor.data)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "BF16", "F16"])
def test_numbers_of_any_type_are_unpacked(kind: str, tmp_path: Path) -> None:
    path, of = tmp_path / "one.gguf", gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(3, 4, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    blocks = gguf.quants.quantize(values, of) if kind != "Q6_K" else np.zeros((3, 4, 210), np.uint8)
    writer.add_tensor("a", blocks, raw_dtype=of)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    header = read_header(path)
    got = header.values(header.tensors["a"])
    assert got.shape == (3, 4, 256)
    np.testing.assert_array_equal(got, gguf.quants.dequantize(blocks, of).reshape(3, 4, 256).astype(np.float32))


def header(version: int = 3, tensors: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


KEY = struct.pack("<Q", 1) + b"a"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it has 0 bytes"),
    "one byte": (b"G", "it has 1 bytes"),
    "another file": (b"PK\x03\x04" + bytes(400), "doesn't begin with GGUF"),
    "an old version": (header(1), "it is of version 1"),
    "a coming version": (header(4), "it is of version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "no tensors": (header(), "it has no weights"),
    "more entries than there can be": (header(entries=1 << 60), "ends within its header"),
    "more tensors than there can be": (header(tensors=1 << 60), "ends within its header"),
    "a key longer than the file": (header(entries=1, rest=struct.pack("<Q", 1 << 62)), "ends within its header"),
    "a list longer than the file": (
        header(entries=1, rest=KEY + struct.pack("<IIQ", 9, 0, 1 << 62)), "ends within its header"),
    "a list of so many texts": (header(entries=1, rest=KEY + struct.pack("<IIQ", 9, 8, 1 << 40)), "doesn't fit"),
    "a list of lists": (header(entries=1, rest=KEY + struct.pack("<IIQ", 9, 9, 1)), "lists can't hold"),
    "an unknown type": (header(entries=1, rest=KEY + struct.pack("<I", 99)), "of type 99"),
    "a key of no characters": (header(entries=1, rest=struct.pack("<Q", 1) + b"\xff" + bytes(8)), "not UTF-8"),
    "a truth value of 7": (header(entries=1, rest=KEY + struct.pack("<IB", 7, 7)), "a truth value is 7"),
    "an entry twice": (header(entries=2, rest=2 * (KEY + struct.pack("<IB", 0, 7))), "it says a twice"),
    "nine dimensions": (header(tensors=1, rest=KEY + struct.pack("<I", 9) + bytes(80)), "has 9 dimensions"),
    "a huge tensor": (header(tensors=1, rest=KEY + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)), "doesn't fit"),
    "a size of zero": (header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 0, 0, 0)), "doesn't fit"),
    "a type that nothing unpacks": (
        header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 8, 26, 0) + bytes(64)), "of ggml's type 26"),
    "an offset far away": (
        header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 8, 0, 1 << 40) + bytes(64)), "doesn't lie behind"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    data, says = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(GgufError, match=says):
        read_header(path)
    with pytest.raises(ModelError, match=f"can't load the model '.*bad.gguf': .*{says}") as raised:
        LLM(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("length", [40, 200, 0.3, 0.9, -1])
def test_a_file_that_was_cut_is_told(length: float, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(length * len(whole)) if 0 < length < 1 else int(length) - 32 * (length < 0)])
    with pytest.raises(ModelError, match=r"ends within its header|is cut short|doesn't fit into it"):
        LLM(path)


def test_a_file_that_is_longer_than_it_says_is_told(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    path.write_bytes(whole + bytes(100))
    with pytest.raises(ModelError, match="bytes at its end that belong to no tensor"):
        LLM(path)


def test_the_suffix_may_be_in_any_case(whole: bytes, tmp_path: Path) -> None:
    texts = []
    for name in ("a.gguf", "b.GGUF", "c.GgUf"):
        (tmp_path / name).write_bytes(whole)
        llm = LLM(tmp_path / name, quantization="gguf")
        texts.append(llm.generate(PROMPT, SamplingParams(max_tokens=5))[0].token_ids)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("small_first", [False, True])
def test_parts_of_a_split_file_are_named(small_first: bool, tmp_path: Path) -> None:
    """As gguf's own writer makes them: the first part alone says what model it is, and may have no weights."""
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", split_max_tensors=2, small_first_shard=small_first)
    writer.add_context_length(16)
    for number in range(5):
        writer.add_tensor(f"blk.{number}.attn_q.weight", np.zeros((8, 8), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    count = 4 if small_first else 3
    parts = [tmp_path / f"big-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]
    assert sorted(tmp_path.iterdir()) == parts
    says = rf"it is one of {count} parts: join them first, with `llama-gguf-split --merge {parts[0].name} big\.gguf`"
    for part in parts:
        for way in (LLM, load_model_here, load_tokenizer):
            with pytest.raises(ModelError, match=rf"^can't load the .*{part.name}': {says}$"):
                way(part)
    other = tmp_path / "big-00001-of-00009.gguf"
    shutil.copy(parts[0], other)
    with pytest.raises(ModelError, match=f"it is one of {count} parts: .* --merge FIRST_PART WHOLE_FILE`$"):
        LLM(other)
    other.unlink()
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        with pytest.raises(ModelError, match=f"{says}; {parts[1].name} isn't here$"):
            LLM(part)
    with pytest.raises(ModelError, match=f"^there is no file .*{parts[1].name}'; did you mean"):
        LLM(parts[1])
    with pytest.raises(ModelError, match=rf"^the folder .* has no config\.json, .* such as .*{parts[0].name}'$"):
        LLM(tmp_path)


def load_model_here(path: Path) -> Any:
    return load_model(path, None, torch.device("cpu"))


def test_parts_under_other_names_are_told_too(tmp_path: Path) -> None:
    write_gguf(tmp_path / "one.gguf", tiny("llama"), entries={"split.count": 2, "split.no": 1})
    with pytest.raises(ModelError, match=r"--merge FIRST_PART WHOLE_FILE`$"):
        LLM(tmp_path / "one.gguf")


def test_damage_is_refused_or_leaves_a_file_that_loads(whole: bytes, tmp_path: Path) -> None:
    """Of a header, any byte; no error that isn't ours, and nothing that hangs or allocates by what a file says."""
    end = whole.index(b"token_embd.weight") + 600
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.gguf"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        place = int(rng.integers(0, end))
        for offset in range(int(rng.choice([1, 1, 1, 4, 8]))):
            data[place + offset] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, data[place] ^ 1 << int(rng.integers(8))]))
        path.write_bytes(data)
        try:
            read_header(path)
        except GgufError:
            refused += 1
    assert refused > 50


def test_a_damaged_file_decodes_or_is_refused(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / "cache"))
    end = whole.index(b"token_embd.weight") + 600
    begin = whole.index(b"tokenizer.ggml.tokens")
    rng, path = np.random.default_rng(1), tmp_path / "bad.gguf"
    decoded = refused = 0
    for count in range(60):
        data = bytearray(whole)
        place = int(rng.integers(0, begin if count % 2 else end))  # most of it is the vocabulary
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            LLM(path).generate(PROMPT, SamplingParams(max_tokens=2))
            decoded += 1
        except TokenTreeError:
            refused += 1
    assert decoded
    assert refused
