"""Training block heads: what is lost, and the whole job."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.conftest import by_night
from tests.drafters.test_block import said_by
from tests.heads.block_heads import FORMS, said_after, some_block
from tests.tiny_models import save_model, some_tokens, tiny, tiny_tokenizer
from tests.train.test_eagle import even_texts, llm  # noqa: F401  a fixture
from tokentree import SamplingParams
from tokentree.cli.main import app
from tokentree.engines.torch import TorchEngine
from tokentree.errors import OptionError
from tokentree.heads.block import BlockHead
from tokentree.heads.block_files import read_block
from tokentree.heads.convolution import Convolution
from tokentree.heads.markov import Selector
from tokentree.train.block import BlockTask, BlockWithLoss, paced
from tokentree.train.features import HiddenTexts
from tokentree.train.loop import Recipe
from tokentree.train.run import Trained
from tokentree.train.run_block import KINDS, _fresh, _sizes, train_block
from tokentree.train.target import engine_of

LENGTHS = (9, 14, 6)


def some_texts(head: BlockHead) -> HiddenTexts:
    """Texts, and what a tiny model knows of them."""
    engine = TorchEngine(tiny("llama"))
    engine.capture(sorted({*head.sizes.taps, 2}))
    all_ids = [some_tokens(length, seed=length) for length in LENGTHS]
    hidden = torch.cat([engine.hidden_states(ids, [*head.sizes.taps, 2]) for ids in all_ids])
    ends = torch.tensor(LENGTHS).cumsum(0).repeat_interleave(torch.tensor(LENGTHS))
    return HiddenTexts(hidden.clone(), torch.tensor([token for ids in all_ids for token in ids]), ends)


def with_loss(head: BlockHead, **options: Any) -> BlockWithLoss:
    model: Any = tiny("llama")
    weight = model.lm_head.weight.detach()
    if head.token_map is not None:
        weight = weight[head.token_map]
    return BlockWithLoss(
        head.requires_grad_(True), model.get_input_embeddings().weight.detach(), (weight, None), **options
    )


def pairs(texts: HiddenTexts) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(texts.ids[start:end], texts.hidden[start:end]) for start, end in texts.spans()]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_it_says_in_training_what_it_says_when_it_drafts(form: str) -> None:
    """Behind each anchor, the training's logits are those of drafting there; a block sees no other, nor its anchor's
    own hidden states."""
    head, model = some_block(form), tiny("llama")
    trained = with_loss(head)
    for ids, states in pairs(some_texts(head)):
        found = trained.guesses([(ids, states)], seed=1)
        tokens, at = ids.tolist(), 0
        anchors = 1 + torch.randperm(len(ids) - 2, generator=torch.Generator().manual_seed(1))
        for anchor in anchors.tolist():
            rows, logits = said_by(head, model, tokens[: anchor + 1])
            for place in range(min(head.sizes.num_guesses, len(tokens) - 1 - anchor)):
                before = tokens[anchor + place]
                expected = said_after(head, rows, logits, tokens[anchor : anchor + place + 1])
                if isinstance(head.markov, Selector):
                    after = head.markov.after(found.logits, found.told)[at]
                    assert torch.allclose(after, expected, rtol=1e-4, atol=2e-3)
                    expected = logits[place]
                assert torch.allclose(found.logits[at], expected, rtol=1e-4, atol=2e-3)
                said = model(input_ids=ids[None]).logits[0, anchor + place]
                wanted = said if head.token_map is None else said[head.token_map]
                assert torch.allclose(found.target[at], wanted, atol=1e-3)
                assert int(found.labels[at]) == tokens[anchor + place + 1]
                assert (int(found.before[at]), int(found.places[at])) == (before, place)
                at += 1
        assert at == len(found.logits)


@torch.no_grad()
def test_the_loss_is_what_it_says() -> None:
    head = some_block("shared output")
    model = with_loss(head, anchors=3, fade=3.0, distil=0.7)
    texts = pairs(some_texts(head))
    found = model.guesses(texts, 5)
    assert head.token_map is not None
    known = head.token_map.tolist()
    loss, weights = 0.0, 0.0
    for logits, target, label, place in zip(found.logits, found.target, found.labels, found.places, strict=True):
        weight = float(torch.exp(torch.tensor(-int(place) / 3.0)))
        said = logits.log_softmax(-1)
        entropy = -float(said[known.index(int(label))]) if int(label) in known else 0.0
        away = float((said.exp() - target.softmax(-1)).abs().sum())
        loss += weight * (0.3 * entropy + 0.7 * away)
        weights += weight
    assert model(texts, 5).item() == pytest.approx(loss / weights, rel=1e-5)
    assert model(texts, 6).item() != pytest.approx(loss / weights, rel=1e-6)  # other anchors


@torch.no_grad()
def test_guesses_count_by_how_far_blocks_come() -> None:
    """Weights by D-PACE: s = pace + (1 - pace) * probability, and of each guess the sum of products from it on."""
    head = some_block("dspark")
    model, texts = with_loss(head, anchors=3, distil=0.0, pace=0.25), pairs(some_texts(head))
    found = model.guesses(texts, 5)
    loss, weights = 0.0, 0.0
    places = found.places.tolist()
    starts = [at for at, place in enumerate(places) if place == 0]
    for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
        said = [float(found.logits[at].log_softmax(-1)[found.labels[at]]) for at in range(start, end)]
        taken = [math.prod(0.25 + 0.75 * math.exp(x) for x in said[: n + 1]) for n in range(len(said))]
        for n, x in enumerate(said):
            loss -= sum(taken[n:]) * x
            weights += sum(taken[n:])
    assert model(texts, 5).item() == pytest.approx(loss / weights, rel=1e-4)
    got = paced(torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0, 1, 0]), 4, 0.0)
    assert got.tolist() == [1.0, 0.5, 0.0]


@torch.no_grad()
def test_a_selector_loses_the_text_s_tokens_among_those_that_it_takes_from() -> None:
    head = some_block("dflash2", candidates=60, draft_vocab_size=100)
    model, texts = with_loss(head, anchors=3, fade=3.0, distil=1.0), pairs(some_texts(head))
    found = model.guesses(texts, 5)
    assert head.token_map is not None
    known, loss, inside, places = head.token_map.tolist(), 0.0, 0, found.places.tolist()
    for at, (row, label) in enumerate(zip(found.logits, found.labels.tolist(), strict=True)):
        anchor = at - places[at]
        path = found.before[anchor : at + 1].tolist()
        said = said_after(head, found.states[anchor:], found.logits[anchor:], path)
        if label in known and known.index(label) in row.topk(60).indices.tolist():
            loss -= math.exp(-places[at] / 3.0) * float(said.log_softmax(-1)[known.index(label)])
            inside += 1
        elif label in known:  # what the row loses by itself
            loss -= math.exp(-places[at] / 3.0) * float(row.log_softmax(-1)[known.index(label)])
        assert int(model.first(found)[at]) == known[int(said.argmax())]
    assert 0 < inside < len(places)
    count = torch.exp(-found.places / 3.0)
    away = (found.logits.softmax(-1) - found.target.softmax(-1)).abs().sum(-1)
    rest = float((away * count).sum() / count.sum())
    assert model(texts, 5).item() == pytest.approx(rest + loss / float(count.sum()), rel=1e-5)


@torch.no_grad()
def test_blocks_are_laid_where_the_model_wrote() -> None:
    head = some_block("shared output")
    model, (ids, states) = with_loss(head, fade=3.0, distil=1.0), pairs(some_texts(head))[1]
    answers = torch.zeros(len(ids), dtype=torch.bool)
    answers[5:8] = True
    found = model.guesses([(ids, states, answers)], 5)
    assert int((found.places == 0).sum()) == 3
    assert [bool(answers[at]) for at in range(len(ids))].count(True) == 3
    weights = torch.exp(-found.places / 3.0) * found.asked
    away = (found.logits.softmax(-1) - found.target.softmax(-1)).abs().sum(-1)
    assert int(found.asked.sum()) == 3 + 2 + 1
    assert model([(ids, states, answers)], 5).item() == pytest.approx(float((away * weights).sum() / weights.sum()))


def test_gradients_reach_all_of_the_head_and_nothing_else() -> None:
    for form in FORMS:
        model = with_loss(some_block(form))
        model(pairs(some_texts(model.head)), 0).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert bool(weight.grad.abs().sum() > 0), name
            assert name.startswith("head.")


@torch.no_grad()
def test_figures_count_runs_of_right_guesses() -> None:
    head = some_block("dspark")
    model, texts = with_loss(head), some_texts(head)
    _, figures = BlockTask(texts, texts).evaluate(model)
    right, blocks = 0, 0
    asked, hit = [0] * 4, [0] * 4
    for number, text in enumerate(pairs(texts)):
        found = model.guesses([text], number)
        hits = (found.logits.argmax(-1) == found.labels).tolist()
        places = found.places.tolist()
        for start in [i for i, place in enumerate(places) if place == 0]:
            blocks += 1
            for i in range(start, len(places)):
                if i > start and places[i] == 0:
                    break
                asked[places[i]] += 1
                hit[places[i]] += hits[i]
                right += hits[i]
                if not hits[i]:
                    break
    assert figures["tokens a step"] == pytest.approx(1 + right / blocks)
    assert figures["depth 1 top-1"] == pytest.approx(hit[0] / asked[0])


# -- all of it ---------------------------------------------------------------------------------------------------------


def trained(folder: Path, epochs: int, stop_after: int | None = None, tokens: int = 2050, **changes: Any) -> Trained:
    steps: dict[str, Any] = {"batch_size": 1, "warmup_steps": 2, "evaluate_every": 40, "patience": 99}
    recipe = Recipe(epochs=epochs, learning_rate=3e-3, **steps)
    options: dict[str, Any] = {"known_tokens": 200, "block_size": 4, "markov_rank": 8, "num_layers": 1} | changes
    return train_block(llm(), "tiny", "self", folder, recipe, tokens=tokens, stop_after=stop_after, **options)


@pytest.mark.parametrize("kind", by_night(KINDS, but=["dspark"]))
def test_a_trained_head_proposes_what_the_model_writes(kind: str, tmp_path: Path) -> None:
    done = trained(tmp_path, 14, kind=kind)
    saved = read_block(done.folder, 2)
    sizes = saved.head.sizes
    assert (sizes.taps, sizes.num_guesses, sizes.markov_rank, sizes.mask_token) == ((0, 1), 4, 8, None)
    assert (sizes.markov, sizes.conv_taps) == (KINDS[kind].get("markov", "vanilla"), 2 * (kind == "dflash2"))
    assert (sizes.draft_vocab_size, sizes.own_output, sizes.own_embedding) == (200, False, False)
    assert done.figures["depth 1 top-1"] > 0.1  # of 200 tokens
    card = (done.folder / "README.md").read_text()
    assert "# A block head for tiny" in card
    assert f"- tokens a step: {done.figures['tokens a step']:.2f}" in card
    assert 0 < saved.about.recipe["coverage"] <= 1
    with_head = llm(heads=done.folder, drafter="block", shape="2x2x1")
    prompts = [text.ids[: (text.answers or ())[0][0] + 2] for text in done.texts.texts[:4]]
    params = SamplingParams(max_tokens=60)
    results = with_head.generate(prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in with_head.plain().generate(prompts, params)]
    assert sum(r.metrics.accepted_tokens for r in results) > 10


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_fresh_head_says_what_its_rows_say(kind: str) -> None:
    model = llm()
    features = engine_of(model).capture([0, 1])
    sizes = _sizes(model, features, (0, 1), 200, 1, 4, 8, kind)
    head = _fresh(model, features, sizes, torch.arange(0, 300, 3)[:200], 0)
    assert (sizes.num_guesses, sizes.markov_rank) == (4, 8)
    states, logits = torch.randn(2, 5, 48), torch.randn(2, 5, 200)
    assert head.markov is not None
    said = head.markov.after(logits, head.markov.told_along(torch.randint(300, (2, 5)), states))
    assert torch.equal(said.argmax(-1), logits.argmax(-1))
    assert torch.equal(said.masked_fill(said.isinf(), 0), logits.masked_fill(said.isinf(), 0))
    for layer in head._layers:
        assert torch.equal(layer.around_attention(states, torch.tanh), torch.tanh(states))
        assert isinstance(layer.around_mlp, Convolution) is (kind == "dflash2")


def test_an_interrupted_run_goes_on_to_the_same_head(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 4, tokens=1050)
    trained(tmp_path / "parts", 4, stop_after=11, tokens=1050)
    again = trained(tmp_path / "parts", 4, tokens=1050)
    assert again.figures == whole.figures
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"block_size": 0}, "at least 1"),
        ({"markov_rank": -1}, "markov_rank must be at least 0"),
        ({"kind": "domino"}, "unknown kind 'domino': choose one of dspark, "),
        ({"kind": "dflash2", "markov_rank": 0}, "at least 1 for a head of the kind 'dflash2'"),
        ({"distil": 1.5}, "distil and pace shares"),
        ({"pace": 1.5}, "distil and pace shares"),
        ({"held_back": 1.0}, "share of the texts"),
    ):
        with pytest.raises(OptionError, match=message):
            trained(tmp_path, 1, **options)


@pytest.mark.parametrize(("kind", "rank"), by_night([("dspark", "0"), ("dflash2", "8")], but=[("dflash2", "8")]))
def test_the_command_trains_and_generate_uses_the_head(kind: str, rank: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny("llama", vocab_size=300, num_hidden_layers=6), tiny_tokenizer())
    data, out = tmp_path / "data.jsonl", tmp_path / "head"
    data.write_text("".join(json.dumps({"text": f"count {i} and {i} again, word by word"}) + "\n" for i in range(40)))
    args = ["train", "block", "--model", str(base), "--data", str(data), "--out", str(out), "--epochs", "2"]
    args += ["--layers", "1", "--known-tokens", "250", "--evaluate-every", "10", "--kind", kind]
    args += ["--markov-rank", rank]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert f"--heads {out}" in done.output
    sizes = read_block(out, 6).head.sizes
    assert (sizes.taps, sizes.num_guesses, sizes.markov_rank) == ((2, 3, 4), 7, int(rank))
    assert (sizes.candidates, sizes.conv_taps) == ((16, 2) if kind == "dflash2" else (None, 0))
    said = CliRunner().invoke(
        app, ["generate", "-m", str(base), "--heads", str(out), "--drafter", "block", "--max-tokens", "5", "word"]
    )
    assert said.exit_code == 0, said.output
