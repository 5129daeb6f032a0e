"""Training heads: texts, hidden states, the loop, and the command."""

from __future__ import annotations

import json
import math
import os
import signal
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from tests.conftest import by_night
from tests.tiny_models import request, save_model, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams, train_medusa_heads
from tokentree.cli.main import app
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import OptionError, PromptError
from tokentree.heads.medusa import MedusaHeads
from tokentree.heads.saved import read_heads
from tokentree.train import batches, loop, talks, written
from tokentree.train.batches import Batches
from tokentree.train.features import HiddenTexts, keep_features
from tokentree.train.kinds import Chat, plan
from tokentree.train.loop import CHECKPOINT, Recipe, _batches, train
from tokentree.train.medusa import HeadsWithLoss, MedusaTask, frequent_tokens
from tokentree.train.medusa2 import ModelWithHeads, TextTask
from tokentree.train.run import Trained, train_medusa, train_medusa2
from tokentree.train.talks import new_talk
from tokentree.train.texts import Texts, read_texts
from tokentree.train.written import Kept, write_texts

SMALL = {"batch_size": 32, "warmup_steps": 2, "evaluate_every": 5, "learning_rate": 3e-3}


def llm(**options: Any) -> LLM:
    model = tiny("llama", vocab_size=300, eos_token_id=[0, 2])  # its texts are short
    return LLM(model, tokenizer=tiny_tokenizer(), max_batch=4, **options)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_texts_come_in_four_forms_and_bad_lines_are_named(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "data.jsonl", tiny_tokenizer()
    text = "The quick brown fox jumps over the lazy dog."
    lines = [
        json.dumps({"text": text}),
        json.dumps({"prompt": "The quick brown fox", "completion": " jumps over the lazy dog."}),
        json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "one two"}]}),
        json.dumps({"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "one two"}]}),
        "",
        "{",
        "[1]",
        json.dumps({"text": "one"}),
        json.dumps({"messages": [{"role": "poet", "content": text}]}),
        json.dumps({"question": text}),
    ]
    file.write_text("\n".join(lines))
    found = read_texts(file, tokenizer)
    assert found.ids[0] == found.ids[1] == tokenizer(text).input_ids
    assert found.ids[2] == found.ids[3]
    assert tokenizer.decode(found.ids[2]) == f"<|user|>{text}<|end|><|assistant|>one two<|end|>"
    assert found.bad == [
        "line 6 is not JSON",
        "line 7 is not an object",
        "line 8 has fewer than 8 tokens",
        "line 9 has a message without a known role, or without a text",
        'line 10 has neither "text", "prompt" and "completion", "messages" nor "conversations"',
    ]
    assert read_texts(file, tokenizer, max_tokens=10).ids[0] == found.ids[0][:10]


def test_data_without_a_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    with pytest.raises(PromptError, match="can't read"):
        read_texts(file, tiny_tokenizer())
    file.write_text("nonsense\n")
    with pytest.raises(PromptError, match="has no text: line 1 is not JSON"):
        read_texts(file, tiny_tokenizer())


def writer_of(count: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Batches:
    """Writes so many texts at once, as on an accelerator."""
    monkeypatch.setattr(batches, "rows_for", lambda device, each: count)
    model = tiny("llama", vocab_size=300, max_position_embeddings=800)
    return Batches(LLM(model, tokenizer=tiny_tokenizer(), attention="sdpa"), 10**6, **options)


def test_many_texts_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talks, "ANSWER_TOKENS", 9)
    monkeypatch.setattr(talks, "PROMPT_TOKENS", 12)
    writer = writer_of(6, monkeypatch)
    assert writer.size == 6
    found = writer.write(range(6))
    assert list(found) == list(range(6))
    for number, texts in found.items():
        assert [text.kind for text in texts] == [chat.kind for chat in plan(number, 0)]
    assert writer.write(range(6)) == found
    assert len({text.kind for texts in found.values() for text in texts}) > 3


def test_greedy_texts_are_the_same_one_by_one_and_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talks, "TEMPERATURES", (0.0,))
    monkeypatch.setattr(talks, "ANSWER_TOKENS", 20)
    numbers = [n for n in range(40) if None not in chain(*(chat.turns for chat in plan(n, 0)))][:4]
    found = writer_of(4, monkeypatch).write(numbers)
    model = LLM(tiny("llama", vocab_size=300, max_position_embeddings=800), tokenizer=tiny_tokenizer()).plain()
    for number in numbers:
        talk = new_talk(model, number, 0)
        while talk.ask is not None:
            params = SamplingParams(max_tokens=talk.ask.params.max_tokens)
            talk.take(model.generate([talk.ask.prompt], params)[0].token_ids)
        assert talk.texts == found[number]


def test_few_tokens_are_written_in_small_batches() -> None:
    model = LLM(tiny("llama", vocab_size=300), tokenizer=tiny_tokenizer(), attention="sdpa")
    assert Batches(model, 300).size <= 4
    assert Batches(model, 10**6).size == 16


def write(model: LLM, file: Path, tokens: int, **options: Any) -> Texts:
    return write_texts(model, Kept(file, 0, 300), tokens, **options)


def test_what_a_model_writes_follows_from_the_seed_and_is_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    shown = list[int]()
    whole = write(llm(), tmp_path / "whole.jsonl", 700, progress=shown.append)
    longest = max(map(len, whole.ids))
    assert 700 <= whole.tokens < 700 + longest
    assert shown[0] < 50  # it moves from the first token on
    assert shown == sorted(shown)
    assert 700 <= shown[-1] < 700 + 4 * longest
    assert write(llm(), tmp_path / "parts.jsonl", 200).tokens < 200 + 2 * longest
    assert write(llm(), tmp_path / "parts.jsonl", 700).ids == whole.ids
    monkeypatch.setattr(written, "_Requests", None)
    assert write(llm(), tmp_path / "whole.jsonl", 700).ids == whole.ids
    few = write(llm(), tmp_path / "whole.jsonl", 300)
    assert few.ids == whole.ids[: len(few.ids)]
    assert 300 <= few.tokens < 300 + longest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Texts]:
    """A file of 500 tokens that a model wrote without an interruption, and its texts."""
    file = tmp_path_factory.mktemp("whole") / "texts.jsonl"
    return file, write(llm(), file, 500)


@pytest.mark.parametrize("at", by_night([3, 40, 80, 110], but=[40, 110]))
def test_texts_that_an_interruption_cut_are_gone_on_with(
    at: int, whole: tuple[Path, Texts], tmp_path: Path
) -> None:  # fmt: skip
    calls = list[int]()

    def interrupt(tokens: int) -> None:
        calls.append(tokens)
        if len(calls) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(llm(), tmp_path / "parts.jsonl", 500, progress=interrupt)
    again = list[int]()
    assert write(llm(), tmp_path / "parts.jsonl", 500, progress=again.append).ids == whole[1].ids
    assert calls[-1] <= again[0] <= calls[-1] + 50  # of what was written, nothing is written again


@pytest.mark.nightly
def test_what_is_torn_or_spoilt_is_written_again(whole: tuple[Path, Texts], tmp_path: Path) -> None:
    file, content, ids = tmp_path / "texts.jsonl", whole[0].read_text(), whole[1].ids
    header, *lines = content.splitlines(keepends=True)
    for spoilt, missing in (
        (content[:-20], 1),  # cut in the last line
        (content[:-1], 0),  # cut before its end
        (header + lines[0].replace("[", "[1", 1) + "".join(lines[1:]), 1),  # another number
        (header + lines[0].replace(", ", ", 1", 2) + "".join(lines[1:]), 1),  # other tokens
        (header + lines[0] + "\0nonsense\n[[[\n" + "".join(lines[1:]), 2),
        (header, 0),
    ):
        file.write_text(spoilt)
        assert Kept(file, 0, 300).spoilt == missing
        assert Kept(file, 0, 300).spoilt == 0  # it is left out
        assert write(llm(), file, 500).ids == ids
        assert Kept(file, 0, 300).spoilt == 0
    half = file.with_name("texts-begun.jsonl")
    file.write_text(header)
    half.write_text("nonsense\n[1, [[400]], [], 0]\n")
    assert write(llm(), file, 500).ids == ids


@pytest.mark.parametrize("content", ["", "{}\nnothing", '[["texts that a model wrote", 1, 5]]', "\0\1"])
def test_what_no_model_wrote_is_left_alone(content: str, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(content)
    with pytest.raises(PromptError, match="doesn't hold what a model wrote with this seed"):
        Kept(file, 0, 300)
    assert file.read_text() == content


def test_texts_of_another_seed_are_left_alone(tmp_path: Path) -> None:
    write(llm(), tmp_path / "texts.jsonl", 100)
    with pytest.raises(PromptError, match="with this seed"):
        Kept(tmp_path / "texts.jsonl", 1, 300)


def test_a_model_that_writes_nothing_is_told(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.decode = lambda ids, **options: " "  # type: ignore[method-assign]
    # too short for any request
    silent = LLM(tiny("llama", vocab_size=300, max_position_embeddings=20), tokenizer=tokenizer, max_batch=8)
    with pytest.raises(PromptError, match="writes nothing"):
        write(silent, tmp_path / "texts.jsonl", 1000)


# -- hidden states -----------------------------------------------------------------------------------------------------


LAST = [tiny("llama").config.num_hidden_layers]


def engine_and_texts(count: int = 70) -> tuple[KVEngine, list[list[int]]]:
    engine = TorchEngine(tiny("llama"))
    engine.capture()
    return engine, [some_tokens(9 + i % 5, seed=i) for i in range(count)]


class Refuses:
    device = torch.device("cpu")

    def hidden_states_of(self, texts: Any, places: Any) -> list[torch.Tensor]:
        raise AssertionError


def test_hidden_states_are_kept_and_not_computed_twice(tmp_path: Path) -> None:
    engine, texts = engine_and_texts()
    found = keep_features(engine, texts, tmp_path, LAST)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    start = 0
    for ids in texts:
        assert found.ids[start : start + len(ids)].tolist() == ids
        assert torch.equal(found.hidden[start : start + len(ids)], engine.hidden_states(ids))
        assert set(found.ends[start : start + len(ids)].tolist()) == {start + len(ids)}
        start += len(ids)
    again = keep_features(Refuses(), texts, tmp_path, LAST)
    assert torch.equal(again.hidden, found.hidden)
    other = [*texts[:64], texts[0]]  # of another second shard, nothing is taken over
    assert torch.equal(keep_features(engine, other, tmp_path, LAST).hidden[-9:], engine.hidden_states(texts[0]))
    few = keep_features(Refuses(), other[:64], tmp_path, LAST)
    assert len(few) == sum(map(len, other[:64]))


def test_hidden_states_that_other_heads_read_too_are_computed_once(tmp_path: Path) -> None:
    engine, texts = engine_and_texts()
    last = keep_features(engine, texts, tmp_path, LAST).hidden
    engine.capture([1, *LAST])
    asked = list[list[int]]()

    class Counts(Refuses):
        def hidden_states_of(self, texts: Any, places: Any) -> list[torch.Tensor]:
            asked.append(list(places))
            return engine.hidden_states_of(texts, places)

    both = keep_features(Counts(), texts, tmp_path, [1, *LAST]).hidden
    assert asked == [[1]] * len(texts)
    assert torch.equal(both, torch.cat([engine.hidden_states(ids, [1, *LAST]) for ids in texts]))
    assert torch.equal(both[:, both.shape[1] // 2 :], last)
    assert torch.equal(keep_features(Refuses(), texts, tmp_path, [*LAST, 1]).hidden, both.roll(last.shape[1], 1))


def test_labels_are_the_tokens_so_far_on_within_a_text() -> None:
    texts = HiddenTexts(torch.zeros(9, 2), torch.arange(10, 19), torch.tensor([5] * 5 + [9] * 4))
    labels = texts.labels(torch.tensor([0, 2, 3, 5, 8]), 3)
    assert labels.tolist() == [[12, 14, -100, 17, -100], [13, -100, -100, 18, -100], [14, -100, -100, -100, -100]]
    first, last = texts.split(1)
    assert (first.ids.tolist(), last.ids.tolist()) == ([10, 11, 12, 13, 14], [15, 16, 17, 18])
    assert last.ends.tolist() == [4] * 4
    assert last.labels(torch.tensor([0]), 1).tolist() == [[17]]


def test_the_most_frequent_tokens_are_known() -> None:
    known = frequent_tokens([[9, 9, 4], [4, 9, 7]], 5, 12)
    assert known is not None
    assert known.tolist() == [0, 1, 4, 7, 9]
    assert frequent_tokens([[1]], 12, 12) is None


# -- the loop ----------------------------------------------------------------------------------------------------------


def some_task(num_heads: int = 2) -> tuple[HeadsWithLoss, MedusaTask]:
    """Heads that can learn: hidden states that say what comes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 16, generator=generator)
    ids = torch.tensor([(3 * i + i // 7) % 20 for i in range(700)])
    hidden = torch.stack([weight[ids.roll(-1)[i]] * 0.4 + weight[ids.roll(-2)[i]] * 0.2 for i in range(700)])
    hidden += 0.1 * torch.randn(hidden.shape, generator=generator)
    ends = torch.arange(700) // 35 * 35 + 35
    texts, rest = HiddenTexts(hidden, ids, ends).split(16)
    model = HeadsWithLoss(MedusaHeads(num_heads, 1, 16), weight)
    return model, MedusaTask(texts, rest, num_heads, 20, None)


def run(folder: Path, recipe: Recipe, **options: Any) -> tuple[HeadsWithLoss, list[float], dict[str, float]]:
    model, task = some_task()
    losses = list[float]()
    groups = [{"params": list(model.heads.parameters())}]
    figures = train(model, groups, task, recipe, folder, lambda step, steps, loss, _: losses.append(loss), **options)
    return model, losses, figures


def test_heads_learn(tmp_path: Path) -> None:
    model, task = some_task()
    before = task.evaluate(model)
    trained, losses, figures = run(tmp_path, Recipe(epochs=20, **SMALL | {"learning_rate": 1e-2}))
    after = task.evaluate(trained)
    assert after[0] < 0.7 * before[0]
    assert figures["head 1 top-1"] > before[1]["head 1 top-1"] + 0.2
    assert sum(losses[-5:]) < sum(losses[:5])
    rates = task.accuracies(trained)
    assert rates[0][0] == pytest.approx(figures["head 1 top-1"])
    assert sum(rates[1][:5]) == pytest.approx(figures["head 2 top-5"])


def test_each_epoch_has_all_places_in_an_order_of_its_own() -> None:
    recipe = Recipe(batch_size=4)
    batches = [part.tolist() for _, (_, part) in islice(enumerate(_batches(20, recipe, 0)), 10)]
    first, second = [*chain(*batches[:5])], [*chain(*batches[5:])]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert [part.tolist() for _, (_, part) in islice(enumerate(_batches(20, recipe, 7)), 3)] == batches[7:]


def test_temperatures_make_probabilities_true(tmp_path: Path) -> None:
    model, _, _ = run(tmp_path, Recipe(epochs=6, **SMALL))
    _, task = some_task()
    hidden, labels = task._batch(task._held_back, torch.arange(len(task._held_back)), model)
    logits = model.logits(hidden).detach()
    for head, found in enumerate(task.temperatures(model)):

        def loss(temperature: float, head: int = head) -> float:
            return nn.functional.cross_entropy(logits[head] / temperature, labels[head]).item()

        assert all(loss(found) <= loss(other) + 1e-6 for other in (0.6, 0.8, 1.0, 1.3, 1.7, 2.4))
        assert loss(found) < max(loss(0.6), loss(2.4)) - 1e-3


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, **SMALL)
    whole, losses, figures = run(tmp_path / "whole", recipe)
    _, first, _ = run(tmp_path / "parts", recipe, stop_after=13)  # past a look at step 10
    assert (tmp_path / "parts" / CHECKPOINT).is_file()
    resumed, rest, again = run(tmp_path / "parts", recipe)
    assert first[:10] + rest == losses
    assert again == figures
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    with pytest.raises(OptionError, match="another recipe"):
        run(tmp_path / "parts", Recipe(epochs=3, **SMALL | {"learning_rate": 1e-3}))


@pytest.mark.parametrize(("at", "signals"), [(1, 1), (7, 1), (10, 1), (12, 2)])
def test_an_interruption_saves_the_step_that_it_came_in(at: int, signals: int, tmp_path: Path) -> None:
    class Interrupted(MedusaTask):
        steps = 0

        def loss(self, model: nn.Module, places: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            for _ in range(signals if self.steps == at else 0):
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(model, places)

    recipe, told = Recipe(epochs=3, **SMALL), list[int]()
    whole, _, figures = run(tmp_path / "whole", recipe)
    model, task = some_task()
    task.__class__ = Interrupted
    groups = [{"params": list(model.heads.parameters())}]
    with pytest.raises(KeyboardInterrupt):
        train(model, groups, task, recipe, tmp_path / "parts", lambda step, *_: told.append(step))
    saved = torch.load(tmp_path / "parts" / CHECKPOINT, weights_only=True)
    assert saved["step"] == (at if signals == 1 else 10)  # of a step that a second one cut, nothing is kept
    resumed, _, again = run(tmp_path / "parts", recipe)
    assert again == figures
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_checkpoints_come_with_time_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PAUSE", 0.0)
    monkeypatch.setattr(loop, "SHARE", math.inf)
    run(tmp_path, Recipe(epochs=3, **SMALL), stop_after=13)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 13


def test_few_steps_are_warmed_up_and_looked_at_in_time(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, least_steps=40, batch_size=512, learning_rate=1e-2)
    _, losses, _ = run(tmp_path, recipe)
    assert len(losses) == 40  # of one step an epoch
    assert losses[-1] < losses[0] - 0.1


def test_it_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    class Worse(MedusaTask):
        """Says that it gets worse after the second look."""

        looks = 0

        def evaluate(self, model: nn.Module) -> tuple[float, dict[str, float]]:
            self.looks += 1
            self.states = [*getattr(self, "states", []), model.state_dict()["heads.weight"].clone()]
            return float(abs(self.looks - 2)), {"look": float(self.looks)}

    model, task = some_task()
    task.__class__ = Worse
    steps = list[int]()
    recipe = Recipe(epochs=20, patience=3, **SMALL)
    figures = train(
        model, [{"params": list(model.heads.parameters())}], task, recipe, tmp_path,
        lambda step, steps_, loss, _: steps.append(step),
    )  # fmt: skip
    assert steps[-1] == 25
    assert figures == {"look": 2.0}
    assert torch.equal(model.heads.weight, task.states[1])  # type: ignore[attr-defined]


def test_tokens_that_the_heads_do_not_know_are_not_learnt_but_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([1, 2, 3, 4] * 20)
    texts = HiddenTexts(torch.randn(80, 8, generator=generator), ids, torch.full((80,), 80))
    known = torch.tensor([1, 3])
    model = HeadsWithLoss(MedusaHeads(1, 1, 8), torch.randn(2, 8, generator=generator))
    task = MedusaTask(texts, texts, 1, 5, known)
    _, labels = task._batch(texts, torch.arange(4), model)
    assert labels.tolist() == [[1, -100, 0, -100]]
    rates = task.accuracies(model)
    assert sum(rates[0]) == pytest.approx(0.5, abs=0.02)  # half of what comes is unknown, and the rest is always named


def test_the_loss_is_the_weighted_cross_entropy_of_the_heads() -> None:
    model, _ = some_task(num_heads=3)
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([[1, 2, 3, 4, 5], [6, 7, -100, 8, 9], [-100, 1, 2, -100, 3]])
    logits = model.heads.logits(hidden, lambda x: x @ model.weight.t()).detach()  # type: ignore[union-attr]
    means = []
    for head in range(3):
        rows = labels[head] >= 0
        means.append(float(-logits[head][rows].log_softmax(-1)[range(int(rows.sum())), labels[head][rows]].mean()))
    weights = [1, 0.8, 0.64]
    expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    assert model(hidden, labels).item() == pytest.approx(expected, rel=1e-5)


RECIPE = Recipe(epochs=6, **SMALL)


# -- all of it ---------------------------------------------------------------------------------------------------------


def trained(tmp_path: Path, recipe: Recipe = RECIPE, tokens: int = 2050, **options: Any) -> Trained:
    return train_medusa(llm(), "tiny", "self", tmp_path, recipe, num_heads=2, tokens=tokens, **options)


def test_trained_heads_propose_what_the_model_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = ("a tree", "one two three", "an owl")  # that come again and again: what is held back was trained on
    monkeypatch.setattr(talks, "TEMPERATURES", (0.0,))
    monkeypatch.setattr(talks, "plan", lambda number, seed: [Chat("chat", (requests[number % 3],))])
    done = trained(tmp_path, Recipe(epochs=20, **SMALL | {"learning_rate": 1e-2}), known_tokens=200)
    saved = read_heads(done.folder)
    assert saved.about.recipe["tokens"] == done.texts.tokens >= 2050
    assert saved.about.accuracies is not None
    assert saved.about.choices
    assert saved.heads.weight.dtype is torch.bfloat16
    assert saved.heads.token_map is not None
    assert len(saved.heads.token_map) == 200
    card = (done.folder / "README.md").read_text()
    assert "# Medusa heads for tiny" in card
    assert f"| 1 | {saved.about.accuracies[0][0]:.1%} |" in card
    with_heads = llm(heads=done.folder, drafter="medusa", shape="dynamic:nodes=16")
    prompts = [text.ids[: (text.answers or ())[0][0] + 2] for text in done.texts.texts[:4]]
    params = SamplingParams(max_tokens=100)
    results = with_heads.generate(prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in with_heads.plain().generate(prompts, params)]
    fresh = MedusaHeads(2, 1, 48)
    assert not torch.equal(saved.heads.weight.float(), fresh.weight)
    assert sum(r.metrics.accepted_tokens for r in results) > 10


def test_training_again_trains_no_further_and_gives_the_same(tmp_path: Path) -> None:
    first = trained(tmp_path, tokens=700)
    before = read_heads(first.folder)
    again = trained(tmp_path, tokens=700)
    assert again.figures == first.figures
    assert torch.equal(read_heads(again.folder).heads.weight, before.heads.weight)


@pytest.mark.nightly
def test_the_work_of_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    first = trained(tmp_path)
    options: dict[str, Any] = {"num_heads": 2, "tokens": 2050}
    with pytest.raises(OptionError, match="a training with other settings: num_heads 2, not 3"):
        train_medusa(llm(), "tiny", "self", tmp_path, RECIPE, **options | {"num_heads": 3})
    with pytest.raises(OptionError, match=r"with other settings: learning_rate 0\.003, not 0\.1"):
        train_medusa(llm(), "tiny", "self", tmp_path, RECIPE.model_copy(update={"learning_rate": 0.1}), **options)
    work = tmp_path / "work"
    with pytest.raises(OptionError, match="the work of another run"):
        train_medusa(
            llm(), "tiny", "self", tmp_path / "two", RECIPE.model_copy(update={"seed": 1}), work=work, **options
        )
    other = LLM(tiny("llama", vocab_size=300, num_hidden_layers=1), tokenizer=tiny_tokenizer())
    with pytest.raises(OptionError, match="the work of another run"):
        train_medusa(other, "tiny", "self", tmp_path, RECIPE, **options)
    assert torch.equal(read_heads(tmp_path).heads.weight, read_heads(first.folder).heads.weight)
    short = RECIPE.model_copy(update={"epochs": 1})
    anew = train_medusa(llm(), "tiny", "self", tmp_path, short, force=True, **options | {"num_heads": 1})
    assert anew.texts.ids == first.texts.ids
    assert read_heads(tmp_path).heads.num_heads == 1
    seeded = short.model_copy(update={"seed": 1})
    assert train_medusa(llm(), "tiny", "self", tmp_path, seeded, force=True, **options).texts.ids != first.texts.ids


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for wrong in ({"held_back": 0.0}, {"known_tokens": 0}, {"tokens": 0}):
        with pytest.raises(OptionError):
            train_medusa(llm(), "tiny", "self", tmp_path, **wrong)
    with pytest.raises(PromptError, match="needs the model's tokenizer"):
        train_medusa(LLM(tiny("llama")), "tiny", "self", tmp_path)


def test_the_command_trains_and_generate_uses_the_heads(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny("llama", vocab_size=300), tiny_tokenizer())
    data, out = tmp_path / "data.jsonl", tmp_path / "heads"
    lines = [json.dumps({"text": f"one two three four five six seven eight nine ten {i}"}) for i in range(30)]
    data.write_text("\n".join([*lines, "nonsense"]))
    args = ["train", "medusa", "--model", str(base), "--data", str(data), "--out", str(out), "--epochs", "2"]
    result = CliRunner().invoke(app, [*args, "--batch-size", "32", "--heads", "2", "--evaluate-every", "5"])
    assert result.exit_code == 0, result.output
    assert "heads are in" in result.output
    assert "1 lines left out: line 31 is not JSON" in result.output
    asked = ["generate", "--model", str(base), "--heads", str(out), "--json", "--compare", "--max-tokens", "20", "one"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["identical"]


@pytest.mark.parametrize("way", by_night(["lora", "full"], but=["lora"]))
def test_a_model_and_its_heads_are_trained_together(way: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny("llama", vocab_size=300), tiny_tokenizer())
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    lines = [json.dumps({"text": f"one two three four five six seven eight nine ten {i}"}) for i in range(40)]
    data.write_text("\n".join(lines))
    recipe = Recipe(epochs=6, batch_size=4, warmup_steps=4, evaluate_every=20, learning_rate=2e-3)
    done = train_medusa2(str(base), data, out, recipe, way=way, num_heads=2)
    assert set(done.figures) == {"divergence", "heads"}
    fresh = ModelWithHeads(tiny("llama", vocab_size=300), MedusaHeads(2, 1, 48), way)
    before = TextTask(done.texts.ids, 0.05).evaluate(fresh)[1]
    assert before["divergence"] == pytest.approx(0, abs=1e-5)
    assert done.figures["heads"] < before["heads"] - 0.3
    old, new = tiny("llama", vocab_size=300).state_dict(), LlamaForCausalLM.from_pretrained(out / "model").state_dict()
    assert set(new) == set(old)
    assert any(not torch.equal(new[name], old[name]) for name in old)
    with_heads = LLM(out / "model", "medusa", heads=out / "heads")
    results = with_heads.generate(["one two three", "nine ten"])
    plain = with_heads.plain().generate(["one two three", "nine ten"])
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    with pytest.raises(OptionError, match="unknown way 'other'"):
        ModelWithHeads(tiny("llama"), MedusaHeads(2, 1, 48), "other")


def test_the_loss_of_both_is_the_divergence_and_that_of_the_heads() -> None:
    model = ModelWithHeads(tiny("llama"), MedusaHeads(1, 1, 48), "full")
    ids, mask = torch.tensor([some_tokens(12), some_tokens(12, seed=1)]), torch.ones(2, 12, dtype=torch.int64)
    with torch.no_grad():
        model.model.lm_head.weight.mul_(1.5)
        loss, parts = model(ids, mask)
        logits = model.model(input_ids=ids).logits  # fresh heads say what the model says
    assert parts["divergence"] > 0.01
    assert loss.item() == pytest.approx(parts["divergence"] + 0.2 * parts["heads"], rel=1e-5)
    expected = nn.functional.cross_entropy(logits[:, :-2].flatten(0, 1), ids[:, 2:].flatten()).item()
    assert parts["heads"] == pytest.approx(expected, rel=1e-4)


def test_heads_are_trained_in_one_call(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny("llama", vocab_size=300), tiny_tokenizer())
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"one two three four five six {i}"}) for i in range(40)))
    model = train_medusa_heads(str(base), num_heads=2, training_data=str(data), epochs=1, out=tmp_path / "heads")
    assert model.generate("one two", max_tokens=8)
    assert len(model(request([1, 2]).tokens)) == 3
