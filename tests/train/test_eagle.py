"""Training EAGLE heads: what is lost, the training-time test, and the whole job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import smooth_l1_loss
from typer.testing import CliRunner

from tests.conftest import by_night
from tests.drafters.test_eagle import KINDS, NORMS, said_by, some_head
from tests.tiny_models import VOCAB, save_model, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.cli.main import app
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import OptionError
from tokentree.heads.eagle import EagleHead
from tokentree.heads.eagle_files import read_eagle
from tokentree.train import talks, written
from tokentree.train.eagle import DECAY, NOISE, TOKEN_WEIGHT, Batch, EagleTask, EagleWithLoss, Step, batch_of
from tokentree.train.features import HiddenTexts
from tokentree.train.kinds import Chat
from tokentree.train.loop import Recipe
from tokentree.train.run import Trained, train_medusa
from tokentree.train.run_eagle import train_eagle

LENGTHS = (9, 14, 6)


def few_requests(number: int, seed: int) -> list[Chat]:
    """Requests that come again and again: what is held back was trained on."""
    return [Chat("chat", (("a tree", "one two three", "an owl")[number % 3],))]


@pytest.fixture(autouse=True)
def even_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talks, "TEMPERATURES", (0.0,))
    monkeypatch.setattr(talks, "SAID", {"temperature": 0.3})
    monkeypatch.setattr(talks, "plan", few_requests)


def some_texts(head: EagleHead) -> HiddenTexts:
    """Texts, and what a tiny model knows of them."""
    engine = TorchEngine(tiny("llama"))
    places = sorted({*head.sizes.taps, 2})
    engine.capture(places)
    all_ids = [some_tokens(length, seed=length) for length in LENGTHS]
    read = [*head.sizes.taps, *([2] if head.sizes.version == 3 else [])]
    hidden = torch.cat([engine.hidden_states(ids, read) for ids in all_ids])
    ends = torch.tensor(LENGTHS).cumsum(0).repeat_interleave(torch.tensor(LENGTHS))
    return HiddenTexts(hidden.clone(), torch.tensor([token for ids in all_ids for token in ids]), ends)


def with_loss(head: EagleHead, unroll: int = 3, noise: float = 0.0) -> EagleWithLoss:
    model: Any = tiny("llama")
    weight = model.lm_head.weight.detach()
    if head.token_map is not None:
        weight = weight[head.token_map]
    embedding = model.get_input_embeddings().weight.detach()
    return EagleWithLoss(head.requires_grad_(True), embedding, (weight, None), unroll, noise)


def whole_batch(texts: HiddenTexts) -> Batch:
    return batch_of(texts, texts.spans(), torch.device("cpu"))


# -- what is lost ------------------------------------------------------------------------------------------------------


def asked_of(step: Step, row: int) -> list[int]:
    """Where in a row's text the target has said anything."""
    rows = step.logits.shape[1]
    return [place - row * rows for place in step.asked.tolist() if place // rows == row]


@pytest.mark.parametrize(
    ("version", "known", "norms"), [*((*kind, {}) for kind in KINDS), *((3, 60, norms) for norms in NORMS[:1])]
)
def test_it_says_in_training_what_it_says_when_it_drafts(
    version: int, known: int | None, norms: dict[str, bool]
) -> None:
    """At each step and row, the training's logits are those of drafting along the text from there."""
    head, model = some_head(version, known, **norms), tiny("llama")
    texts = some_texts(head)
    steps = with_loss(head).steps(whole_batch(texts), 3)
    for row, (start, end) in enumerate(texts.spans()):
        ids = texts.ids[start:end].tolist()
        for number, step in enumerate(steps):
            for i in range(len(ids) - 1 - number):
                expected = said_by(head, model, ids[: i + 2], ids[i + 2 : i + 2 + number])
                if head.token_map is not None:
                    expected = expected[head.token_map]
                got = step.logits[row, i].detach().log_softmax(-1)
                assert torch.allclose(got, expected, rtol=1e-4, atol=2e-3)
                said = model(input_ids=torch.tensor([ids])).logits[0, i + 1 + number].detach()
                wanted = said if head.token_map is None else said[head.token_map]
                assert torch.allclose(step.target[row, i], wanted, atol=1e-3)
            assert asked_of(step, row) == list(range(len(ids) - 1 - number))


@torch.no_grad()
def test_the_loss_of_eagle_3_is_that_of_the_paper() -> None:
    head = some_head(3, 60)
    model, batch = with_loss(head, unroll=3), whole_batch(some_texts(head))
    losses = []
    for step in model.steps(batch, 3):
        each = []
        for row in range(len(LENGTHS)):
            for i in asked_of(step, row):
                probs, said = step.target[row, i].softmax(-1), step.logits[row, i].log_softmax(-1)
                each.append(float(-(probs * said).sum()))
        losses.append(sum(each) / len(each))
    expected = sum(DECAY**n * loss for n, loss in enumerate(losses)) / sum(DECAY**n for n in range(3))
    assert model(batch).item() == pytest.approx(expected, rel=1e-5)
    model.unroll = 1
    assert model(batch).item() == pytest.approx(losses[0], rel=1e-5)


@torch.no_grad()
def test_the_loss_of_eagle_1_is_that_of_the_paper() -> None:
    head = some_head(1)
    model, texts = with_loss(head), some_texts(head)
    batch = whole_batch(texts)
    (step,) = model.steps(batch, 1)
    states, tokens = [], []
    for row, length in enumerate(LENGTHS):
        for i in range(length - 1):
            states.append(float(smooth_l1_loss(step.given[row, i], batch.states[row, i + 1])))
            probs = model._output(batch.states[row, i + 1]).softmax(-1)
            tokens.append(float(-(probs * model._output(step.given[row, i]).log_softmax(-1)).sum()))
    expected = sum(states) / len(states) + TOKEN_WEIGHT * sum(tokens) / len(tokens)
    assert model(batch).item() == pytest.approx(expected, rel=1e-5)
    model.noise = NOISE
    assert model(batch).item() == pytest.approx(expected, rel=1e-5)  # it is added in training alone
    noisy = [model(batch, seed).item() for seed in (1, 1, 2)]
    assert noisy[0] == noisy[1] != noisy[2]
    assert noisy[0] != pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_the_loss_and_figures_are_those_of_answers() -> None:
    """Of a row, the target's word for the next token counts if the model wrote that token."""
    head = some_head(3, 60)
    model, texts = with_loss(head), some_texts(head)
    answers = torch.zeros(len(texts), dtype=torch.bool)
    answers[3:6] = answers[13:20] = True  # of the first text of 9 tokens, and the second of 14
    texts = replace(texts, answers=answers, kinds=("maths", "code", "code"))
    steps = model.steps(whole_batch(texts), 3)
    losses, right, places = list[float](), [0] * 3, [0] * 3
    for number, step in enumerate(steps):
        each = list[float]()
        for row, (start, end) in enumerate(texts.spans()):
            for i in range(end - start - 2 - number):
                if answers[start + i + 2 + number]:
                    probs, said = step.target[row, i].softmax(-1), step.logits[row, i].log_softmax(-1)
                    each.append(float(-(probs * said).sum()))
        losses.append(sum(each) / len(each))
    for row, (start, end) in enumerate(texts.spans()):
        for i in range(end - start - 2):
            if answers[start + i + 2]:
                places[row] += 1
                for number, step in enumerate(steps):
                    at = start + i + 2 + number
                    assert head.token_map is not None
                    guess = head.token_map[step.logits[row, i].argmax()]
                    if at >= end or not answers[at] or guess != texts.ids[at]:
                        break
                    right[row] += 1
    weights = [DECAY**n for n in range(3)]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert model(whole_batch(texts)).item() == pytest.approx(expected, rel=1e-5)
    _, figures = EagleTask(texts, texts, depth=3).evaluate(model)
    assert places[2] == 0
    assert figures["maths: tokens a step"] == pytest.approx(1 + right[0] / places[0])
    assert figures["code: tokens a step"] == pytest.approx(1 + right[1] / places[1])
    assert figures["tokens a step"] == pytest.approx(1 + sum(right) / sum(places))


def test_a_text_without_answers_loses_nothing() -> None:
    model = with_loss(some_head(3, 60))
    texts = replace(some_texts(model.head), answers=torch.zeros(sum(LENGTHS), dtype=torch.bool))
    assert model(whole_batch(texts)).item() == 0.0


@torch.no_grad()
def test_texts_beside_others_lose_what_they_lose_alone() -> None:
    head = some_head(3, 60)
    model, texts = with_loss(head), some_texts(head)
    together = model.steps(whole_batch(texts), 3)
    for row, span in enumerate(texts.spans()):
        for one, other in zip(model.steps(batch_of(texts, [span], torch.device("cpu")), 3), together, strict=True):
            rows = len(one.asked)
            assert torch.allclose(one.logits[0, :rows], other.logits[row, :rows], atol=1e-5)


def test_gradients_reach_all_of_the_head_and_nothing_else() -> None:
    heads = [some_head(*kind) for kind in KINDS] + [some_head(3, **norms) for norms in NORMS]
    for model in map(with_loss, heads):
        model(whole_batch(some_texts(model.head)), 0).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert bool(weight.grad.abs().sum() > 0), name
            assert name.startswith("head.")


@torch.no_grad()
def test_figures_are_hits_of_the_first_choice() -> None:
    head = some_head(3, 60)
    model, texts = with_loss(head), some_texts(head)
    loss, figures = EagleTask(texts, texts, depth=3).evaluate(model)
    for number, step in enumerate(model.steps(whole_batch(texts), 3)):
        hits = (step.logits.argmax(-1) == step.target.argmax(-1)).flatten()[step.asked]
        assert figures[f"depth {number + 1} top-1"] == pytest.approx(float(hits.float().mean()))
    assert loss == pytest.approx(model(whole_batch(texts)).item(), rel=0.2)


# -- all of it ---------------------------------------------------------------------------------------------------------


def llm(**options: Any) -> LLM:
    model = tiny("llama", vocab_size=300, eos_token_id=[0, 2])  # its texts are short
    return LLM(model, tokenizer=tiny_tokenizer(), max_batch=4, **options)


def trained(
    folder: Path, epochs: int, stop_after: int | None = None, precision: Any = "float32", tokens: int = 2050,
    **changes: Any,
) -> Trained:  # fmt: skip
    steps: dict[str, Any] = {"batch_size": 1, "warmup_steps": 2, "evaluate_every": 40, "patience": 99}
    recipe = Recipe(epochs=epochs, learning_rate=3e-3, precision=precision, **steps)
    options: dict[str, Any] = {"known_tokens": 200, "unroll": 3, "taps": [0, 1, 2]} | changes
    return train_eagle(llm(), "tiny", "self", folder, recipe, tokens=tokens, stop_after=stop_after, **options)


@pytest.mark.parametrize("version", by_night([1, 3], but=[3]))
def test_a_trained_head_proposes_what_the_model_writes(tmp_path: Path, version: int) -> None:
    done = trained(tmp_path, 18, version=version)
    saved = read_eagle(done.folder, 2)
    assert saved.head.sizes.version == version
    assert saved.head.sizes.taps == ((2,) if version == 1 else (0, 1, 2))
    assert done.figures["depth 1 top-1"] > 0.1  # of 200 tokens
    card = (done.folder / "README.md").read_text()
    assert f"# An EAGLE-{version} head for tiny" in card
    assert f"- depth 1 top-1: {done.figures['depth 1 top-1']:.1%}" in card
    assert 0 < saved.about.recipe["coverage"] <= 1
    with_head = llm(heads=done.folder, drafter="eagle", shape="2x2x1")
    prompts = [text.ids[: (text.answers or ())[0][0] + 2] for text in done.texts.texts[:4]]
    params = SamplingParams(max_tokens=60)
    results = with_head.generate(prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in with_head.plain().generate(prompts, params)]
    assert sum(r.metrics.accepted_tokens for r in results) > 10


@pytest.mark.nightly  # as for block heads
def test_an_interrupted_run_goes_on_to_the_same_head(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 3)
    trained(tmp_path / "parts", 3, stop_after=12)
    again = trained(tmp_path / "parts", 3)
    assert again.figures == whole.figures
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_heads_share_what_the_model_wrote_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    trained(tmp_path / "third", 1, work=work, tokens=1050)
    read = list[tuple[int, ...]]()
    hidden_states_of = KVEngine.hidden_states_of

    def noted(self: KVEngine, texts: Any, places: Any) -> list[torch.Tensor]:
        read.append(tuple(places))
        return hidden_states_of(self, texts, places)

    monkeypatch.setattr(KVEngine, "hidden_states_of", noted)
    monkeypatch.setattr(written, "_Requests", None)
    shared = trained(tmp_path / "first", 1, work=work, version=1, tokens=1050)
    assert not read
    trained(tmp_path / "other", 1, work=work, taps=[0, 0, 1], tokens=1050)
    assert not read
    medusa = train_medusa(llm(), "tiny", "self", tmp_path / "medusa", num_heads=2, tokens=1050, work=work)
    assert not read
    assert medusa.texts.ids == shared.texts.ids
    assert (tmp_path / "first" / "work" / "checkpoint.pt").is_file()


@pytest.mark.nightly
def test_products_may_be_rounded(tmp_path: Path) -> None:
    exact, rounded = trained(tmp_path / "exact", 3), trained(tmp_path / "rounded", 3, precision="bfloat16")
    one, other = (load_file(done.folder / "model.safetensors") for done in (exact, rounded))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert rounded.figures["depth 1 top-1"] == pytest.approx(exact.figures["depth 1 top-1"], abs=0.1)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"version": 2}, "EAGLE versions 1"),
        ({"unroll": 0}, "at least 1"),
        ({"held_back": 1.0}, "share of the texts"),
        ({"norms": ["fc"]}, "no norm 'fc'"),
        ({"norms": ["norm_output"], "version": 1}, "none of EAGLE-3.1's norms"),
        ({"norms": ["fc_norm", "norm_before_fc"]}, "choose one"),
    ):
        with pytest.raises(OptionError, match=message):
            trained(tmp_path, 1, **options)


@pytest.mark.parametrize("version", ["1", "3"])
def test_the_command_trains_and_generate_uses_the_head(tmp_path: Path, version: str) -> None:
    base = save_model(tmp_path / "base", tiny("llama", vocab_size=300, num_hidden_layers=6), tiny_tokenizer())
    data, out = tmp_path / "data.jsonl", tmp_path / "head"
    data.write_text("".join(json.dumps({"text": f"count {i} and {i} again, word by word"}) + "\n" for i in range(40)))
    args = ["train", "eagle", "--model", str(base), "--data", str(data), "--out", str(out), "--epochs", "2"]
    args += ["--version", version, "--known-tokens", "250", "--unroll", "2", "--evaluate-every", "10"]
    args += ["--norm", "fc_norm", "--norm", "norm_output"] if version == "3" else []
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert f"--heads {out}" in done.output
    sizes = read_eagle(out, 6).head.sizes
    assert sizes.taps == ((6,) if version == "1" else (2, 3, 3))
    assert sizes.fc_norm == sizes.norm_output == (version == "3")
    generate = [
        "generate",
        "--model",
        str(base),
        "--heads",
        str(out),
        "--drafter",
        "eagle",
        "--max-tokens",
        "5",
        "word",
    ]
    said = CliRunner().invoke(app, generate)
    assert said.exit_code == 0, said.output
    wrong = CliRunner().invoke(app, [*args, "--version", "2"])
    assert wrong.exit_code != 0


def test_batches_are_filled_up_with_nothing() -> None:
    texts = some_texts(some_head(1))
    batch = whole_batch(texts)
    assert batch.ids.shape == (3, 14)
    assert batch.lengths.tolist() == list(LENGTHS)
    assert not batch.states[2, 6:].any()
    assert int(batch.ids.max()) < VOCAB
