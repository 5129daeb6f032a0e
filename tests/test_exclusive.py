"""Nothing around it changes a text: other threads, forks, torch's global state, a model's owner."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel

from tests import forked
from tests.tiny_models import kv_engine, request, some_tokens, some_tree, tiny
from tokentree import LLM, ModelError, OptionError, SamplingParams, exclusive, generator
from tokentree.drafters.medusa import Medusa
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.kv import KVLayout
from tokentree.engines.program import ProgramEngine
from tokentree.engines.segment import Segment
from tokentree.engines.torch import TorchEngine
from tokentree.exclusive import Exclusive
from tokentree.heads.medusa import MedusaHeads
from tokentree.kernels import threads
from tokentree.tree import TokenTree


def one_call(family: str = "llama") -> PreTrainedModel:
    """A model whose forward is one compiled call."""
    return tiny(family, torch.bfloat16, hidden_size=64, intermediate_size=96)


# -- threads -----------------------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "one call": one_call,
    "modules, bfloat16": lambda: tiny("gemma2", torch.bfloat16),
    "modules, float32": lambda: tiny("qwen3"),
}


@pytest.fixture
def eager() -> Iterator[None]:
    """Python threads that change places all the time, and compiled loops in three threads each."""
    before = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(3)
    yield
    sys.setswitchinterval(before[0])
    torch.set_num_threads(before[1])


@pytest.mark.parametrize("kind", MODELS)
def test_threads_get_the_texts_that_are_written_alone(kind: str, eager: None) -> None:
    llm = LLM(MODELS[kind](), draft_model=MODELS[kind](), shape="dynamic:nodes=6,depth=3")
    ways = [llm, llm.plain(), llm.using(["suffix", "ngram"], "2x2"), llm.using("recycling", "2x1x1")]
    options = [SamplingParams(max_tokens=10), SamplingParams(max_tokens=10, temperature=0.9, seed=3)]
    prompts = [some_tokens(5 + 3 * i, seed=i) for i in range(3)]
    jobs = [*itertools.product(ways, options, prompts)]
    plain = llm.plain()
    alone = [plain.generate([prompt], params)[0].token_ids for _, params, prompt in jobs]
    searched = llm.generate([prompts[0]], SamplingParams(max_tokens=8, num_beams=3))[0].token_ids

    def write(number: int) -> list[int]:
        way, params, prompt = jobs[number]
        if number % 5 == 4:
            stream = way.stream(prompt, params)
            for _ in stream:
                pass
            return stream.result.token_ids
        if number % 5 == 3:
            return way.using("suffix", "2x2").generate([prompt, prompts[0]], params)[0].token_ids
        return way.generate([prompt], params)[0].token_ids

    def search(_: int) -> list[int]:
        return llm.generate([prompts[0]], SamplingParams(max_tokens=8, num_beams=3))[0].token_ids

    with ThreadPoolExecutor(8) as pool:
        beams = pool.map(search, range(3))
        assert list(pool.map(write, range(len(jobs)))) == alone
        assert list(beams) == [searched] * 3
    assert not kv_engine(llm)._kv


def test_threads_with_models_of_their_own_are_no_trouble_to_each_other(eager: None) -> None:
    llms = [LLM(one_call(), "suffix"), LLM(one_call("qwen2"), "suffix"), LLM(tiny("gemma2", torch.bfloat16), "suffix")]
    prompt, params = some_tokens(9), SamplingParams(max_tokens=20)
    alone = [llm.plain().generate([prompt], params)[0].token_ids for llm in llms]
    with ThreadPoolExecutor(6) as pool:
        got = pool.map(lambda i: llms[i % 3].generate([prompt], params)[0].token_ids, range(18))
        assert list(got) == alone * 6


def test_a_stream_that_is_left_open_holds_up_nobody() -> None:
    llm = LLM(one_call(), "suffix")
    stream = iter(llm.stream(some_tokens(5), SamplingParams(max_tokens=30)))
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(llm.generate, [some_tokens(5)], SamplingParams(max_tokens=30)).result(timeout=60)[0]
    assert got.token_ids == llm.plain().generate([some_tokens(5)], SamplingParams(max_tokens=30))[0].token_ids


def test_who_leaves_the_lock_comes_behind_those_that_wait() -> None:
    lock, order = Exclusive(), list[str]()

    def take(name: str, times: int) -> None:
        for _ in range(times):
            with lock, lock:  # its owner may take it again
                order.append(name)
                time.sleep(0.001)

    workers = [threading.Thread(target=take, args=(name, 20)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert sorted(order) == [*"a" * 20, *"b" * 20]
    turns = sum(one != other for one, other in itertools.pairwise(order))
    assert turns >= 20  # without that, one would be through before the other begins


def test_the_lock_is_free_again_after_an_error_and_after_an_interrupted_start(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Exclusive()
    with pytest.raises(RuntimeError, match="in between"), lock:
        raise RuntimeError("in between")
    monkeypatch.setattr(Exclusive, "_begin", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.__enter__()
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_take, lock).result(timeout=10)


def _interrupted(lock: Exclusive) -> None:
    raise KeyboardInterrupt


def test_a_start_that_is_interrupted_in_the_midst_leaves_no_state_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Exclusive()

    @contextmanager
    def interrupted() -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(exclusive, "neutral", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.__enter__()
    assert not torch.is_inference_mode_enabled()
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_take, lock).result(timeout=10)
    with lock:
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()


def _take(lock: Exclusive) -> bool:
    with lock:
        return True


def test_what_is_left_to_do_waits_for_nobody_and_is_done_under_the_lock() -> None:
    """As a garbage collector calls it: anywhere, also where this thread or another one holds the lock."""
    lock, done = Exclusive(), list[bool]()

    def work() -> None:
        with lock:  # as what is released does
            pass
        done.append(lock._owner == threading.get_ident() and torch.is_inference_mode_enabled())

    lock.when_free(work)
    assert done == [True]
    with lock:
        lock.when_free(work)
        assert done == [True]
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lock.when_free, work).result(timeout=10)
        assert done == [True]
    assert done == [True] * 3
    assert not torch.is_inference_mode_enabled()


def test_a_stream_may_be_closed_by_another_thread() -> None:
    llm = LLM(one_call(), "suffix")
    stream = llm.stream(some_tokens(5), SamplingParams(max_tokens=200))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [piece.token_id for piece in stream])
        while not stream.result.token_ids:
            time.sleep(0.001)
        stream.close()
        got = reading.result(timeout=60)
    assert got == stream.result.token_ids[: len(got)]
    assert not kv_engine(llm)._kv


def test_threads_may_share_a_stream() -> None:
    llm = LLM(one_call(), "suffix")
    stream = llm.stream(some_tokens(5), SamplingParams(max_tokens=100))

    def read(_: int) -> int:
        return sum(1 for _ in stream)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(read, range(4))) == len(stream.result.token_ids) == 100


# -- forks and numbers of threads --------------------------------------------------------------------------------------

FORKS = """
import os, sys, torch
from tests.tiny_models import some_tokens, tiny
from tokentree import LLM, ForkError, SamplingParams
torch.set_num_threads(3)
model = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96)
llm = LLM(model, "suffix")
params = SamplingParams(max_tokens=4)
expected = llm.generate([some_tokens(5)], params)[0].token_ids
stream = llm.stream(some_tokens(5), params)
next(stream)
for use in (lambda: llm.generate([some_tokens(5)], params), lambda: LLM(model), lambda: next(stream), llm.plain):
    child = os.fork()
    if not child:
        try:
            use()
        except ForkError as error:
            os._exit(7 if "fork" in str(error) else 1)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, use
child = os.fork()
if not child:
    stream.close()  # nothing of the parent's can be given back here
    os._exit(7 if len(llm.engine._kv) == 1 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert llm.generate([some_tokens(5)], params)[0].token_ids == expected
"""


def test_a_fork_behind_a_forward_is_refused_at_once_and_leaves_the_parent_alone() -> None:
    done = forked.run([sys.executable, "-W", "ignore", "-c", FORKS])
    assert done.returncode == 0, done.stderr


def test_a_fork_before_any_forward_is_no_trouble() -> None:
    code = "import os, tokentree.llm, tokentree.kernels.threads as t; os.fork(); t.check_fork(); os._exit(0)"
    assert forked.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0


@pytest.mark.parametrize("count", [0, -1, 4096 * 8, 100_000, 2.0, "2", True, np.True_, np.int64(0), np.float64(2)])
def test_numbers_of_threads_that_make_no_sense_are_refused_before_anything_is_loaded(count: int) -> None:
    with pytest.raises(OptionError, match="choose from 1 to"):
        LLM("no/such-model", threads=count)


def test_threads_are_those_of_torch_and_never_more_than_make_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    for count in (2, np.int64(2), np.uint8(2)):
        torch.set_num_threads(1)
        LLM(one_call(), threads=count)  # type: ignore[arg-type]
        assert threads.num_threads() == torch.get_num_threads() == 2
    torch.set_num_threads(before)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100_000)
    assert threads.num_threads() == threads.most_threads() == 8 * (os.cpu_count() or 1)


# -- torch's global state ----------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@contextmanager
def precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    yield
    torch.set_float32_matmul_precision("highest")


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "no inference mode": lambda: torch.inference_mode(False),
    "inference mode": torch.inference_mode,
    "products in bfloat16": lambda: precision("medium"),
    "3 threads": lambda: num_threads(3),
    "5 threads": lambda: num_threads(5),
}
FAMILIES = [
    ("llama", torch.bfloat16, True),
    ("gemma3", torch.bfloat16, True),
    ("llama", torch.float32, False),
    ("gemma2", torch.bfloat16, False),
    ("gemma3", torch.float32, False),
    ("gpt2", torch.bfloat16, False),
    ("mixtral", torch.bfloat16, False),
    ("qwen3", torch.bfloat16, False),
]


@pytest.mark.parametrize(("family", "dtype", "whole"), FAMILIES)
def test_torch_s_global_state_changes_no_text(family: str, dtype: torch.dtype, whole: bool) -> None:
    """Set after the engine was made; and before, each state with one family of those with the same kind of engine."""
    model = one_call(family) if whole else tiny(family, dtype)
    llm, prompt = LLM(model, "suffix", shape="2x2x1"), some_tokens(40)
    params = [SamplingParams(max_tokens=6), SamplingParams(max_tokens=6, temperature=0.8, top_p=0.9, seed=1)]

    def texts(llm: LLM) -> list[list[int]]:
        return [result.token_ids for result in llm.generate([prompt, prompt[:7]], params)]

    expected = texts(llm)
    assert texts(llm.plain()) == expected
    alike = [one for one in FAMILIES if one[1:] == (dtype, whole)]
    place = alike.index((family, dtype, whole))
    for number, (name, state) in enumerate(STATES.items()):
        with state():
            got = texts(llm)
            anew = texts(LLM(model, "recycling", shape="2x2")) if number % len(alike) == place else expected
        assert got == expected, name
        assert anew == expected, name
    assert torch.get_default_dtype() is torch.float32


def test_heads_are_shielded_too() -> None:
    model = one_call()
    llm = LLM(model, "none")
    generator = torch.Generator().manual_seed(0)
    heads = MedusaHeads(2, 1, 64)
    with torch.no_grad():
        heads.weight.copy_(torch.randn(heads.weight.shape, generator=generator))
    expected = llm.generate([some_tokens(12)], SamplingParams(max_tokens=8))[0].token_ids
    drafting = llm.using(Medusa(heads, llm.engine), shape="2x2")
    for name, state in STATES.items():
        with state():
            got = drafting.generate([some_tokens(12)], SamplingParams(max_tokens=8))[0].token_ids
        assert got == expected, name


def test_beam_search_is_shielded_too() -> None:
    llm = LLM(one_call(), "suffix", shape="2x2")
    params = SamplingParams(max_tokens=6, num_beams=3)

    def found() -> tuple[list[int], float | None]:
        result = llm.generate([some_tokens(12)], params)[0]
        return result.token_ids, result.score

    expected = found()
    for name, state in STATES.items():
        with state():
            got = found()
        assert got == expected, name


def test_the_default_type_which_is_one_for_all_threads_is_left_alone() -> None:
    seen = set[torch.dtype]()
    llm = LLM(one_call(), "suffix", shape="2x2", watch=lambda *_: seen.add(torch.get_default_dtype()))
    prompt, params = some_tokens(12), SamplingParams(max_tokens=8)
    expected = llm.generate([prompt], params)[0].token_ids
    seen.clear()

    def change(path: list[int], logits: torch.Tensor) -> torch.Tensor:
        torch.set_default_dtype(torch.float16)  # as another thread may at any time
        return logits

    with default_dtype(torch.float64):
        assert llm.generate([prompt], params)[0].token_ids == expected
        changed = llm.generate([prompt], SamplingParams(max_tokens=8, logits_processors=(change,)))[0]
        assert changed.token_ids == expected
        assert torch.get_default_dtype() is torch.float16
    assert seen == {torch.float64, torch.float16}


def test_a_model_that_is_looked_at_under_autocast_is_still_the_same() -> None:
    model = one_call()
    generate = generator(drafter="suffix", shape="2x2")
    ids = torch.tensor([some_tokens(9)])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "custom_generate": generate, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **options)  # type: ignore[operator]
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(model.generate(input_ids=ids, **options), expected)  # type: ignore[operator]
    assert len(generate._llms) == 1


def test_a_processor_is_tried_again_in_the_state_that_it_was_called_in() -> None:
    class Product(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores @ weight

    weight = torch.eye(120) + torch.randn(120, 120, generator=torch.Generator().manual_seed(0)) * 1e-3
    ids = torch.tensor([some_tokens(9)])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"custom_generate": generator(drafter="suffix"), "logits_processor": [Product()]}
    model: Any = one_call()
    expected = model.generate(input_ids=ids, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(input_ids=ids, **options), expected)


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_a_model_that_its_owner_converts_or_drops_is_decoded_as_it_was_or_refused() -> None:
    for change in ("convert", "drop", "meta"):
        model = one_call()
        engine = TorchEngine(model)
        seq, tree = request(some_tokens(9)), some_tree(0, 6)
        engine.prefill(seq)
        expected = engine.verify([seq], [tree]).all_logits.clone()
        if change == "convert":
            model.float()
        elif change == "meta":
            cast(Any, model).to("meta")
        else:
            del model
        rubbish = [torch.full((120, 64), 7.0, dtype=torch.bfloat16) for _ in range(64)]  # takes memory that is free
        assert torch.equal(engine.verify([seq], [tree]).all_logits, expected), change
        del rubbish


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 8),
        torch.zeros(4, 8, dtype=torch.bfloat16)[:, :4],
        torch.zeros(8, 4, dtype=torch.bfloat16).t(),
        torch.zeros(4, 7, dtype=torch.bfloat16),
        torch.zeros(4, 8, dtype=torch.bfloat16, device="meta"),
    ],
)
def test_an_address_is_given_of_nothing_but_what_is_asked_for(tensor: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="a compiled loop needs"):
        threads.address(tensor, torch.bfloat16, 4, 8)
    whole = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert threads.address(whole, torch.bfloat16, 4, 8) == whole.data_ptr()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("embedding", lambda llama: setattr(llama.embedding, "num_embeddings", 10**6)),
        ("norm", lambda llama: setattr(llama.norm, "weight", torch.zeros(63))),
        ("qkv", lambda llama: setattr(llama.layers[1].attention, "kv_heads", 4)),
        ("width", lambda llama: setattr(llama.layers[0].attention, "width", 64)),
        ("weight", lambda llama: setattr(llama.head, "weight", llama.head.weight[:-1])),
        ("start", lambda llama: setattr(llama.head, "start", llama.head.start[:-1])),
        ("down", lambda llama: setattr(llama.layers[0].mlp, "down_proj", llama.layers[0].attention.o_proj)),
        ("heads", lambda llama: setattr(llama.layers[0].attention, "heads", 3)),
    ],
)
def test_weights_that_don_t_fit_each_other_are_refused_before_a_loop_reads_them(
    part: str, change: Callable[[Any], None]
) -> None:
    engine = TorchEngine(one_call())
    assert isinstance(engine, ProgramEngine)
    program = engine._program
    change(program.stack)
    program._capacity = 0  # so that the steps are built again
    with pytest.raises(ModelError):
        engine.prefill(request(some_tokens(9)))


def test_kv_and_rows_that_don_t_fit_the_steps_are_refused_before_a_loop_reads_them() -> None:
    engine = TorchEngine(one_call())
    assert isinstance(engine, ProgramEngine)
    program = engine._program
    tree, cpu = TokenTree.chain(1, [2, 3]), torch.device("cpu")
    ids = tree.tokens
    good = engine._storages.layout
    others = {
        "layers": good.shapes[:1],
        "heads": ((1, *good.shapes[0][1:]),) * 2,
        "width": ((good.shapes[0][0], 8, 8),) * 2,
    }
    for shapes in others.values():
        kv = KVLayout(shapes, torch.float32, cpu, blocked=True).make(64)
        with pytest.raises(ModelError, match="its storage is for"):
            program.forward(ids, ids, [Segment(kv, tree, 0, 0)], "logits")
    plain = KVLayout(good.shapes, torch.float32, cpu).make(64)
    with pytest.raises(ModelError, match="its storage is for"):
        program.forward(ids, ids, [Segment(plain, tree, 0, 0)], "logits")
    kv = good.make(64)
    kv.length = kv.capacity - 1
    with pytest.raises(IndexError, match="a tree ends at row"):
        program.forward(ids, ids, [Segment(kv, tree, 0, 0)], "logits")
    kv.length = 0
    with pytest.raises(IndexError, match="a segment ends at row"):
        program.forward(ids, ids, [Segment(kv, tree, 0, 1)], "logits")
    with pytest.raises(IndexError, match="there is room for"):
        program.forward(ids, ids - 2, [Segment(kv, tree, 0, 0)], "logits")


def test_a_storage_takes_no_rows_that_it_has_no_room_for() -> None:
    kv = KVLayout(((2, 8, 8),), torch.float32, torch.device("cpu"), blocked=True).make(32)
    rows = torch.zeros(2, 4, 8)
    kv.write(0, kv.capacity - 4, rows, rows)
    for heads, width, row in ((2, 8, kv.capacity - 3), (4, 8, 0), (2, 16, 0)):
        wrong = torch.zeros(heads, 4, width)
        with pytest.raises(ModelError, match=r"and there is room for|and got"):
            kv.write(0, row, wrong, wrong)
    with pytest.raises(IndexError, match="can't be moved"):
        kv.commit([0, kv.capacity])


def test_a_packed_layer_refuses_weights_of_other_sizes() -> None:
    layer = PackedLinear(torch.zeros(32, 8, dtype=torch.bfloat16), None)
    layer.start = layer.start[:16]
    with pytest.raises(ModelError, match="a compiled loop needs"):
        layer(torch.zeros(1, 8, dtype=torch.bfloat16))
