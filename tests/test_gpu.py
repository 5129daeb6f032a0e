"""On a GPU: trees, drafters, recordings and training. `pytest -m gpu`, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from tests.conftest import decode
from tests.drafters.test_eagle import some_head
from tests.drafters.test_medusa import random_heads
from tests.drafters.test_peagle import some_peagle
from tests.engines.test_engine import of_transformers, verified
from tests.tiny_models import FAMILIES, request, save_model, some_tokens, some_tree, tiny, tiny_pair, tiny_tokenizer
from tests.train.test_writing import PROMPTS, greedily
from tokentree import LLM, SamplingParams
from tokentree.cli.main import app
from tokentree.drafters.base import Drafter
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.eagle import Eagle, peagle
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.drafters.lookup.suffix import Suffix
from tokentree.drafters.medusa import Medusa
from tokentree.drafters.merged import Merged
from tokentree.drafters.pard import Pard
from tokentree.engines.gpu.recorded import CompiledEngine, RecordedEngine
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.torch import TorchEngine
from tokentree.train import writing
from tokentree.train.features import keep_features
from tokentree.train.loop import Recipe
from tokentree.train.run import train_medusa
from tokentree.train.run_eagle import train_eagle
from tokentree.train.writing import Writer
from tokentree.tree import TokenTree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = 5

UNRECORDED = {"falcon", "falcon_old", "mixtral"}  # whose modules copy from the CPU's memory in the midst of a forward

pytestmark = pytest.mark.gpu


def on_gpu(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    moved: PreTrainedModel = tiny(family, dtype, **options).to(DEVICE)  # type: ignore[arg-type]
    return moved


def told_that_it_is_not_recorded(family: str) -> AbstractContextManager[object]:
    expected = DEVICE.type == "cuda" and family in UNRECORDED
    return pytest.warns(UserWarning, match="can't be recorded") if expected else nullcontext()


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    error, spread = float((got.cpu() - expected).abs().max()), float(expected.std())
    assert error <= 1e-3 * spread, f"off by {error:.3g} where logits spread by {spread:.3g}"


@pytest.mark.parametrize("attention", [None, "sdpa"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_tree_has_the_logits_that_transformers_gives_each_path(family: str, attention: str | None) -> None:
    with told_that_it_is_not_recorded(family if attention is None else ""):
        engine = TorchEngine(on_gpu(family), attention)
    for prefix, nodes in ((0, 1), (5, 9), (62, 30), (3, 70)):
        before, tree = some_tokens(prefix), some_tree(ROOT, nodes)
        got = verified(engine, request([*before, ROOT]), tree)
        assert_near(got, of_transformers(tiny(family), before, tree))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="recordings are a GPU's")
def test_storage_is_used_again_and_nothing_recorded_twice() -> None:
    engine = TorchEngine(on_gpu("llama"))
    assert isinstance(engine, RecordedEngine)
    expected = decode(TorchEngine(tiny("llama")), [request(some_tokens(9, seed=i), max_tokens=40) for i in range(4)])
    counts = list[int]()
    for i in range(4):
        texts = [request(some_tokens(9, seed=i), max_tokens=40)]
        assert decode(engine, texts, Recycling(engine.vocab_size)) == [expected[i]]
        counts.append(len(engine._graph.recordings))
    assert counts[0] == counts[-1]


def drafters() -> dict[str, Callable[[KVEngine], Drafter]]:
    def small(engine: KVEngine) -> KVEngine:
        return TorchEngine(tiny_pair()[1].to(DEVICE))  # type: ignore[arg-type]

    return {
        "lookups": lambda e: Merged([NGram(), Suffix(), Recycling(e.vocab_size)]),
        "draft_model": lambda e: DraftModel(small(e), e.vocab_size),
        "medusa": lambda e: Medusa(random_heads(48), e),
        "eagle-1": lambda e: Eagle(some_head(1), e),
        "eagle-3": lambda e: Eagle(some_head(3, 60), e),
        "p-eagle": lambda e: peagle(some_peagle(), e),
        "pard": lambda e: Pard(small(e), e.vocab_size, 7),
        "all": lambda e: Merged(
            [Eagle(some_head(3, 60), e), Recycling(e.vocab_size), DraftModel(small(e), e.vocab_size)]
        ),
    }


@pytest.mark.parametrize("form", ["cost", "3x2x1", "chain:4", "dynamic:nodes=12"])
@pytest.mark.parametrize("name", list(drafters()))
def test_greedy_ids_and_sampled_ids_are_plain_s(name: str, form: str) -> None:
    engine = TorchEngine(tiny_pair()[0].to(DEVICE))  # type: ignore[arg-type]
    drafter = drafters()[name](engine)
    for options in ({}, {"temperature": 0.9, "seed": 5, "top_k": 40}):
        prompts = [some_tokens(9, seed=i) for i in range(3)]
        for max_batch in (1, 2):
            expected = decode(engine, [request(ids, max_tokens=30, **options) for ids in prompts], max_batch=max_batch)
            seqs = [request(ids, max_tokens=30, **options) for ids in prompts]
            assert decode(engine, seqs, drafter, form, max_batch=max_batch) == expected
            assert form == "cost" or any(seq.metrics.drafted_tokens > 0 for seq in seqs)


def test_rejection_gives_what_the_target_would() -> None:
    """The first two tokens, against the target's own probabilities: chi-square over the most probable pairs."""
    target, draft = tiny_pair()
    prompt, runs = some_tokens(6), 1500
    llm = LLM(target.to(DEVICE), draft_model=draft.to(DEVICE), shape="3x2", accept="rejection")  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.5, max_tokens=2, seed=3, n=runs)
    counts: dict[tuple[int, ...], int] = {}
    for result in llm.generate([prompt], params):
        pair = tuple(result.token_ids)
        counts[pair] = counts.get(pair, 0) + 1
    with torch.inference_mode():
        first = target(torch.tensor([prompt], device=DEVICE)).logits[0, -1].float() / 0.5
        probs = first.softmax(-1)
        best = probs.topk(4).indices.tolist()
        found, expected = list[int](), list[float]()
        for token in best:
            after = target(torch.tensor([[*prompt, token]], device=DEVICE)).logits[0, -1].float() / 0.5
            chances = after.softmax(-1)
            for other in chances.topk(4).indices.tolist():
                expected.append(runs * float(probs[token] * chances[other]))
                found.append(counts.get((token, other), 0))
    rest = runs - sum(expected)
    statistic = sum((f - e) ** 2 / e for f, e in zip([*found, runs - sum(found)], [*expected, rest], strict=True))
    assert statistic < 45  # 16 degrees of freedom: 39.3 at 0.1 per cent


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_hidden_states_of_texts_are_transformers_own(family: str, tmp_path: Path) -> None:
    engine, texts = TorchEngine(on_gpu(family)), [some_tokens(9 + i % 5, seed=i) for i in range(20)]
    engine.capture([1, 2])
    found = keep_features(engine, texts, tmp_path, [1, 2])
    start = 0
    for ids in texts:
        states = tiny(family)(torch.tensor([ids]), output_hidden_states=True).hidden_states
        part = found.hidden[start : start + len(ids)].cpu()
        assert found.ids[start : start + len(ids)].tolist() == ids
        assert_near(part, torch.cat([states[1][0], states[2][0]], -1).detach())
        assert_near(engine.hidden_states(ids, [1, 2]).cpu(), part)
        start += len(ids)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt2", "gemma2"])
def test_texts_are_written_as_each_would_be_alone(family: str) -> None:
    writer = Writer(TorchEngine(on_gpu(family), "sdpa").model, 5, 60)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        expected = [greedily(family, prompt, 20, -1) for prompt in prompts]
        assert writer.write(prompts, 20, [0.0] * 3, [], seed=1) == expected
    first = writer.write(PROMPTS, 20, [1.0] * 3, [], seed=1, top_k=20)
    assert first == writer.write(PROMPTS, 20, [1.0] * 3, [], seed=1, top_k=20)
    assert first != writer.write(PROMPTS, 20, [1.0] * 3, [], seed=2, top_k=20)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["medusa", "eagle-1", "eagle-3"])
def test_heads_are_trained_and_draft(
    kind: str, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MOST_ROWS", 8)
    model = tiny("llama", vocab_size=300, max_position_embeddings=800).to(DEVICE)  # type: ignore[arg-type]
    llm = LLM(model, tokenizer=tiny_tokenizer(), max_batch=4)
    recipe = Recipe(batch_size=4, evaluate_every=5, warmup_steps=2, learning_rate=3e-3, precision=precision)
    if kind == "medusa":
        done = train_medusa(llm, "tiny", "self", tmp_path, recipe, num_heads=2, tokens=1500)
    else:
        done = train_eagle(
            llm, "tiny", "self", tmp_path, recipe, version=int(kind[-1]), tokens=1500, known_tokens=200, taps=[0, 1, 2]
        )
    assert all(value == value for value in done.figures.values())
    with_heads = LLM(model, kind.partition("-")[0], heads=done.folder, tokenizer=tiny_tokenizer(), shape="3x2x1")
    params = SamplingParams(max_tokens=40)
    assert (
        with_heads.generate(["one two"], params)[0].token_ids == llm.plain().generate(["one two"], params)[0].token_ids
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_forward_is_compiled(family: str) -> None:
    engine = TorchEngine(on_gpu(family), compile=True)
    assert isinstance(engine, CompiledEngine)
    tree = some_tree(ROOT, 20)
    got = verified(engine, request([*some_tokens(8), ROOT]), tree)
    assert_near(got, of_transformers(tiny(family), some_tokens(8), tree))


def test_beams_are_those_of_a_cpu() -> None:
    params = SamplingParams(num_beams=3, max_tokens=15, num_return_sequences=3)
    found = [
        [result.token_ids for result in LLM(model, "recycling", shape="3x2").generate([some_tokens(6)], params)]
        for model in (on_gpu("llama"), tiny("llama"))
    ]
    assert found[0] == found[1]


def test_the_commands_run(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", tiny("llama", vocab_size=300), tiny_tokenizer())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one two three one two three"}\n')
    for command in (
        ["generate", "--model", str(folder), "--max-tokens", "20", "--stats", "one two three"],
        ["check", "--model", str(folder), "--prompts", str(prompts), "--max-tokens", "20"],
        ["bench", "--model", str(folder), "--prompts", str(prompts), "--method", "plain", "--method", "default",
         "--method", "transformers", "--method", "transformers:lookup:4", "--out", str(tmp_path / "out"),
         "--max-tokens", "20"],
    ):  # fmt: skip
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output


def test_a_wide_tree_and_several_texts_go_through_the_model() -> None:
    engine = TorchEngine(on_gpu("llama"))
    seqs = [request([*some_tokens(n), ROOT]) for n in (4, 9)]
    for seq in seqs:
        engine.prefill(seq)
    trees = [some_tree(ROOT, 6), TokenTree.chain(ROOT, some_tokens(70, 3))]
    out = engine.verify(seqs, trees)
    for i, (n, tree) in enumerate(zip((4, 9), trees, strict=True)):
        assert_near(out.rows(i, range(len(tree))), of_transformers(tiny("llama"), some_tokens(n), tree))
