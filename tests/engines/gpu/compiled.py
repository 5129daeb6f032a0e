"""Compiles the kernels of a forward for GPUs that needn't be there, as a program of its own: Triton's interpreter must
be off, which the tests have on.

    python tests/engines/gpu/compiled.py all|heaviest COMPUTE_CAPABILITY...

Prints what each kernel needs, one JSON object a line: compute capability, name, options, registers of a thread, bytes
of these that were spilled to memory, bytes of shared memory, and how many there may be. Of the heaviest launches there
is one of each kernel for weights of 16 bits, and one for 8: where a GPU has much shared memory, that with most sums in
a thread's registers, and where it has little, that with most bytes of loads ahead.

What is known already is not computed again. Triton writes the same PTX for 89 as for 80, its target aside. And a kernel
that leaves half of the registers free on 89 can't spill on 120, which has as many: of these, one launch of each kernel
is compiled for 120. Both hold where the capability of which it is known is named before.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from tokentree.engines.gpu import forward, kv_forward, modules, steady
from tokentree.engines.gpu.forward import Forward
from tokentree.engines.gpu.inputs import Inputs
from tokentree.engines.gpu.kv_forward import KVForward, Rules
from tokentree.engines.gpu.pages import Pages
from tokentree.engines.gpu.quantized import GROUP, Int8, Matrix
from tokentree.engines.gpu.weights import Layer, Weights

META = torch.device("meta")
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # of a program, by compute capability
ROWS = (1, 17, 64, 512)
# hidden size, MLP, heads, KV heads, head size, vocabulary, and whether it has all that some family has
SIZES = {
    "smollm2": (576, 1536, 9, 3, 64, 49152, False),
    "8b": (4096, 14336, 32, 8, 128, 128256, False),
    "70b": (8192, 28672, 64, 8, 128, 128256, False),
    "odd": (1024, 4096, 8, 4, 128, 32000, True),
}
SOME = ("16:8b", "16:odd", "8:8b")  # bits and size
MODELS = {90: (*SOME, "16:smollm2", "16:70b", "8:smollm2", "8:70b")}  # what is tuned for that one; SOME elsewhere
TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8"
}  # fmt: skip
SAME_PTX = {89: 80}  # capabilities for which Triton writes the same code, its target aside
LIKE = {120: 89}  # capabilities with as many registers, and as much shared memory
TIGHT = 100 * 1024  # of shared memory: less holds fewer stages of loads ahead than kernels would take
HALF = 128  # of the registers that a thread may have
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

Launch = tuple[Any, dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any], dict[str, int]]


class Recorder:
    """Stands for a kernel: keeps what it is launched with, each kind of launch once."""

    def __init__(self, kernel: Any, launches: dict[str, Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *given: Any, **options: Any) -> None:
        sizes: dict[str, int] = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
        arguments = dict(zip(self._kernel.arg_names, given)) | options
        signature, constants, attributes = dict[str, str](), dict[tuple[int], Any](), dict[tuple[int], Any]()
        for place, parameter in enumerate(self._kernel.params):
            value = arguments.get(parameter.name, parameter.default)
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                aligned = value.data_ptr() % 16 == 0
            elif parameter.is_constexpr or value is None or _is_one(value, parameter):
                signature[parameter.name], constants[place,] = "constexpr", value
                continue
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                aligned = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            if aligned:
                attributes[place,] = [["tt.divisibility", 16]]
        launch = self._kernel, signature, constants, attributes, sizes
        self._launches.setdefault(str((self._kernel.__name__, *launch[1:])), launch)


def _is_one(value: Any, parameter: Any) -> bool:
    """Whether Triton takes ``value`` as a constant."""
    return type(value) is int and value == 1 and not parameter.do_not_specialize


def weights(name: str, bits: int) -> Weights:
    """Of two layers, without numbers."""
    width, inner, heads, kv_heads, head, vocab, odd = SIZES[name]

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    def matrix(outputs: int, inputs: int) -> Matrix:
        if bits == 16:
            return made(outputs, inputs)
        return Int8(
            made(outputs, inputs, dtype=torch.int8), made(inputs // GROUP, outputs, dtype=torch.float32)
        )  # fmt: skip

    def gain(size: int = width) -> torch.Tensor:
        return made(size, dtype=torch.float32)

    columns = (heads + 2 * kv_heads) * head
    layers = [
        Layer(
            gain(), matrix(columns, width), made(columns) if odd else None, gain(head) if last and odd else None,
            gain(head) if last and odd else None, matrix(width, heads * head), made(width) if odd else None, gain(),
            matrix(2 * inner, width), matrix(width, inner), gain() if last and odd else None,
            gain() if last and odd else None, 0, 256 if odd else 0, 0.125, 50.0 if odd else 0.0,
        )
        for last in (False, True)
    ]  # fmt: skip
    tables = made(4096, head // 2, dtype=torch.float32), made(4096, head // 2, dtype=torch.float32)
    return Weights(
        made(vocab, width), 1.0, layers, gain(), matrix(vocab, width), made(vocab) if odd else None,
        30.0 if odd else 0.0, [tables], heads, kv_heads, head, 1e-5, odd,
    )  # fmt: skip


def launches(name: str, bits: int, capability: int) -> dict[str, Launch]:
    """What a forward over several numbers of rows launches, each kind once; with 8 bits, the products alone."""
    found, w = dict[str, Launch](), weights(name, bits)
    for home in (forward, kv_forward, modules, steady):
        for kernel in [one for one in vars(home) if one.endswith("_kernel")]:
            given = getattr(home, kernel)
            setattr(home, kernel, Recorder(given._kernel if isinstance(given, Recorder) else given, found))
    pages = Pages(len(w.layers), w.kv_heads, w.head_size, 8, 4, 32, META)
    pages.keep_states(2, w.width)
    whole = Forward(w, pages, ROWS[-1], (0, len(w.layers)))
    whole._shared = SHARED[capability]
    for rows in ROWS:
        whole.run(Inputs(rows, torch.device("cpu")), rows, rows, rows > 64)
    if name == "odd" and bits == 16:
        of_modules(w, pages, SHARED[capability])
    return {what: one for what, one in found.items() if bits == 16 or "scales" in one[1]}


def of_modules(w: Weights, pages: Pages, memory: int) -> None:
    """Launches what only modules of transformers need."""

    def made(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    attends = modules.ModulesForward.__new__(modules.ModulesForward)
    KVForward.__init__(attends, w.sizes, pages, ROWS[-1])
    attends._last = len(w.layers)
    rules = Rules(0.125, sinks=torch.empty(w.heads, device=META))
    for rows in ROWS:
        q, kv = made(w.heads, rows, w.head_size), made(w.kv_heads, rows, w.head_size)
        attends.attend(0, q, kv, kv, rules, Inputs(rows, torch.device("cpu")), rows > 64)
        steady.product(made(rows, w.width), made(w.width, w.width), made(w.width), memory)
        steady.row_sums(made(rows, w.width), True, True)
        ids = torch.empty(2 * rows, dtype=torch.int32, device=META)
        for turned in (False, True):
            weights = made(8, w.width, 2048) if turned else made(8, 2048, w.width)
            steady.expert_product(made(rows, w.width), weights, made(8, 2048), ids, 2, turned)


def heaviest(found: dict[str, Launch], capability: int) -> dict[str, Launch]:
    """One launch of each kernel for each kind of weights, see above."""

    def weight(what: str) -> tuple[float, ...]:
        kernel, _, constants, _, sizes = found[what]
        named = {kernel.arg_names[place]: value for (place,), value in constants.items()}
        rows, columns, inputs = (named.get(name, 1) for name in ("TILE", "COLUMNS", "INPUTS"))
        sums = rows * columns * named.get("PARTS", 1) / sizes.get("num_warps", 4)
        ahead = sizes.get("num_stages", 1) * inputs * (rows + columns)
        measures = (ahead, sums) if SHARED[capability] < TIGHT else (sums, ahead)
        return *measures, sum(value is not None and value > 0 for value in named.values())

    chosen = dict[tuple[str, bool], str]()
    for what, launch in found.items():
        kind = launch[0].__name__, launch[1].get("scales", "constexpr") != "constexpr"
        if kind not in chosen or weight(what) > weight(chosen[kind]):
            chosen[kind] = what
    return {what: found[what] for what in chosen.values()}


class Compiler:
    """Compiles launches for GPUs, and knows what it compiled before."""

    def __init__(self) -> None:
        self._ptx: dict[tuple[int, str], tuple[str, int]] = {}
        self._registers: dict[tuple[int, str], int] = {}
        self._kernels = set[tuple[int, str]]()

    def spares(self, what: str, launch: Launch, capability: int) -> bool:
        """Whether another capability has shown that the launch ``what`` can't spill on this one."""
        few = self._registers.get((LIKE.get(capability, 0), what), HALF) < HALF
        return few and (capability, launch[0].__name__) in self._kernels

    def needs(self, what: str, launch: Launch, capability: int) -> dict[str, Any]:
        """What one kernel needs."""
        kernel, signature, constants, attributes, sizes = launch
        writer, target = SAME_PTX.get(capability, capability), GPUTarget("cuda", capability, 32)
        if (writer, what) in self._ptx:
            ptx, shared = self._ptx[writer, what]
            backend = make_backend(target)
            renamed = ptx.replace(f".target sm_{writer}", f".target sm_{capability}")
            cubin = backend.make_cubin(renamed, {}, backend.parse_options(sizes), capability)
        else:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
            made = triton.compile(source, target=target, options=sizes)
            cubin, shared = made.asm["cubin"], made.metadata.shared
            self._ptx[capability, what] = made.asm["ptx"], shared
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            told = subprocess.run(
                [BINARIES / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
        assert found is not None, told
        self._registers[capability, what] = int(found[1])
        self._kernels.add((capability, kernel.__name__))
        named = {kernel.arg_names[place]: value for (place,), value in constants.items()}
        return {
            "capability": capability, "kernel": kernel.__name__, "options": str(named | sizes),
            "registers": int(found[1]), "spilled": int(found[2]) + int(found[3]), "shared": shared,
            "most": SHARED[capability],
        }  # fmt: skip


def main(capability: int, compiler: Compiler, every: bool) -> None:
    found = dict[str, Launch]()
    for model in MODELS.get(capability, SOME):
        bits, name = model.split(":")
        found |= launches(name, int(bits), capability)
    for what, launch in (found if every else heaviest(found, capability)).items():
        if not compiler.spares(what, launch, capability):
            print(json.dumps(compiler.needs(what, launch, capability)), flush=True)


if __name__ == "__main__":
    gc.freeze()  # what is imported is no garbage
    compiler = Compiler()
    for number in sys.argv[2:]:
        main(int(number), compiler, sys.argv[1] == "all")
