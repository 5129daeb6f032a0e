"""Weights in the bits of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.engines.test_engine import decoded_alone, verified
from tests.gguf_files import write_gguf
from tests.tiny_models import request, some_tokens, some_tree, tiny
from tokentree.engines.cpu.packing import IN_GGUF, _read
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.program import ProgramEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError
from tokentree.loading import load_model

CPU = torch.device("cpu")
KINDS = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_0", "Q5_1", "Q6_K", "Q5_K", "BF16", "F16", "F32"]
EXACT = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8, "Q4_K": 4}  # bits


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_is_what_gguf_says_it_is(kind: str, tmp_path: Path) -> None:
    """Of blocks of random bits, whose scales are made small."""
    of, rng = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    values, size = gguf.GGML_QUANT_SIZES[of]
    blocks = rng.integers(0, 256, (5 * 512 // values, size), dtype=np.uint8)
    if kind in ("F32", "F16", "BF16"):
        blocks = gguf.quants.quantize(rng.normal(size=(5, 512)).astype(np.float32), of).view(np.uint8)
    else:
        halves = {"Q6_K": [size - 2], "Q4_0": [0], "Q8_0": [0], "Q5_0": [0]}.get(kind, [0, 2])
        for at in halves:
            blocks[:, at : at + 2] = rng.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", np.ascontiguousarray(blocks.reshape(5, -1)), raw_dtype=of)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    (tensor,) = gguf.GGUFReader(path).tensors
    exact = torch.from_numpy(gguf.quants.dequantize(tensor.data, of).astype(np.float32))
    got = _read(tensor)
    assert got.numbers.shape == (5, 512 // IN_GGUF, IN_GGUF)
    assert got.bits == EXACT.get(kind, 8)
    assert int(got.numbers.max()) < 1 << got.bits
    groups = exact.unflatten(1, (-1, IN_GGUF))
    spread = (groups.amax(-1) - groups.amin(-1))[..., None]
    size_of_rounding = groups.abs().amax(-1)[..., None] * 2**-10
    allowed = size_of_rounding if kind in EXACT else size_of_rounding + spread / 500
    assert ((got.values().view_as(groups) - groups).abs() <= allowed).all()


def kind_of(name: str) -> str:
    return "Q8_0" if "v_proj" in name or "embed" in name else "Q6_K" if "norm" in name else "Q4_1"


@pytest.mark.parametrize("kinds", ["Q4_0", "Q8_0", "F32", "mixed"])
def test_layers_have_the_weights_of_the_file(kinds: str, tmp_path: Path) -> None:
    """Inputs that are 1 in one place and 0 elsewhere are exact in 8 bits, and give the weights themselves."""
    path = tmp_path / "tiny.gguf"
    own = tiny("llama", hidden_size=64, intermediate_size=96)
    write_gguf(path, own, kind_of=kind_of if kinds == "mixed" else lambda _: kinds)
    exact: Any = load_model(path, "float32", CPU)
    engine = TorchEngine(load_model(path, "bfloat16", CPU), owns_model=True, quantization="gguf", file=path)
    assert isinstance(engine, ProgramEngine)
    llama = engine._program.stack
    layer, packed = exact.model.layers[1], llama.layers[1]
    attention = layer.self_attn
    qkv = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
    bits = {"Q4_0": 4, "Q8_0": 8, "F32": 8, "mixed": 8}[kinds]
    for got, weight in [
        (packed.attention.qkv, qkv),
        (packed.attention.o_proj, attention.o_proj.weight),
        (packed.mlp.down_proj, layer.mlp.down_proj.weight),
        (llama.head, exact.lm_head.weight),
    ]:
        assert isinstance(got, QuantizedLinear)
        assert got.group == IN_GGUF
        ones = torch.eye(weight.shape[1], dtype=torch.bfloat16)
        off = (got(ones).float().t() - weight.detach()).abs().max() / weight.detach().abs().max()
        assert float(off) < 2**-9 + 1 / 255  # bfloat16's rounding, and half a step in 8 bits
    assert packed.attention.qkv.bits == bits
    assert packed.mlp.down_proj.bits == (4 if kinds == "mixed" else bits)


def test_a_node_has_the_bits_of_decoding_its_path_alone(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny("llama", hidden_size=64, intermediate_size=96), kind_of=kind_of)
    engine = TorchEngine(load_model(path, "bfloat16", CPU), quantization="gguf", file=path)
    assert isinstance(engine, ProgramEngine)
    assert "gguf" in engine.signature
    prefix, tree = some_tokens(21), some_tree(5, 17)
    nodes, alone = decoded_alone(engine, prefix, tree)
    assert torch.equal(verified(engine, request([*prefix, 5]), tree)[nodes], alone)
    with pytest.raises(ModelError, match="with dtype='bfloat16'"):
        TorchEngine(load_model(path, "float32", CPU), quantization="gguf", file=path)


def test_a_file_that_is_no_gguf_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"noise" * 100)
    with pytest.raises(ModelError, match="can't read the GGUF file"):
        TorchEngine(tiny("llama", torch.bfloat16), quantization="gguf", file=path)
