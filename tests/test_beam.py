"""Beam search: the texts and scores of transformers' own, in fewer forwards."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel
from typer.testing import CliRunner

from tests.conftest import all_pairs, by_night, each_two, make_sequence
from tests.drafters import test_block
from tests.drafters.test_eagle import Kept, said_by, some_head
from tests.drafters.test_medusa import random_heads
from tests.heads.block_heads import some_block
from tests.tiny_models import CONTEXT, kv_engine, save_model, some_tokens, tiny, tiny_pair, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.beam import BeamDecoder, BeamSearch
from tokentree.cli.main import app
from tokentree.drafters.base import Drafter
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.lookup.suffix import Suffix
from tokentree.drafters.medusa import Medusa
from tokentree.drafters.merged import Merged
from tokentree.engines.modules import ModulesEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import OptionError
from tokentree.shapes import shape

PROMPT = some_tokens(9)
NEW = 14


@functools.cache
def model_of(family: str, eos: bool = True) -> PreTrainedModel:
    """A model that ends texts now and then: with some of the tokens that its beams would have."""
    model = tiny(family)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if eos:
        beams = [tokens for tokens, _ in expected(model, PROMPT, num_beams=8)]
        ends = {2, beams[0][8], beams[1][11], beams[3][5], beams[5][6], beams[7][4]}
        model.generation_config.eos_token_id = sorted(ends)
    return model


def expected(model: PreTrainedModel, prompt: list[int], **options: Any) -> list[tuple[list[int], float]]:
    """What transformers finds: outputs without padding, and scores."""
    out = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_scores=True,
        num_return_sequences=options["num_beams"], **options,
    )  # fmt: skip
    ends = model.generation_config.eos_token_id
    found, eos = [], [ends] if isinstance(ends, int) else list(ends)
    for row, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        found.append((row[:end], score))
    return found


def ours(llm: LLM, prompt: list[int], **options: Any) -> list[tuple[list[int], float]]:
    params = SamplingParams(max_tokens=NEW, num_return_sequences=options["num_beams"], **options)
    return [(result.token_ids, float(result.score or 0.0)) for result in llm.generate([prompt], params)]


def assert_same(got: list[tuple[list[int], float]], wanted: list[tuple[list[int], float]]) -> None:
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in wanted]
    assert [score for _, score in got] == pytest.approx([score for _, score in wanted], rel=1e-5)


BEAMS = each_two(["llama", "gemma3", "gpt2"], [2, 4, 8], [False, True, "never"])


@pytest.mark.parametrize(("family", "num_beams", "early_stopping"), by_night(BEAMS, but=BEAMS[::2]))
def test_texts_and_scores_are_those_of_transformers(family: str, num_beams: int, early_stopping: Any) -> None:
    model = model_of(family)
    llm = LLM(model, shape="2x2")
    llms = [llm.plain(), llm, llm.using(shape="dynamic:nodes=8,min_prob=0,min_reach=0")]
    prompts = [PROMPT, some_tokens(1, seed=4)] * 2
    for prompt, length_penalty in zip(prompts, (1.0, 0.0, 2.0, -1.0), strict=True):
        options = {"num_beams": num_beams, "early_stopping": early_stopping, "length_penalty": length_penalty}
        wanted = expected(model, prompt, **options)
        for llm in llms:
            assert_same(ours(llm, prompt, **options), wanted)


def test_texts_do_end_early_in_these_tests() -> None:
    for family in ("llama", "gemma3", "gpt2"):
        found = expected(model_of(family), PROMPT, num_beams=4, early_stopping=True)
        assert len({len(tokens) for tokens, _ in found}) > 1


@pytest.mark.parametrize("shape", ["cost", "3x2x1", "chain:4", "dynamic:nodes=12"])
def test_a_draft_model_saves_forwards(shape: str) -> None:
    target, draft = tiny_pair()
    target.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    wanted = expected(target, PROMPT, num_beams=3)
    for drafts in (draft, target):
        llm = LLM(target, draft_model=drafts, shape=shape)
        params = SamplingParams(max_tokens=NEW, num_beams=3, num_return_sequences=3)
        results = llm.generate([PROMPT], params)
        assert_same([(r.token_ids, float(r.score or 0)) for r in results], wanted)
        metrics = results[0].metrics
        assert metrics.new_tokens == NEW
        assert sum(step[1] for step in metrics.steps) == NEW
        if drafts is target and shape != "cost":
            assert metrics.target_forwards < NEW
    assert not kv_engine(llm)._kv


def test_rules_on_logits_are_those_of_transformers() -> None:
    model = model_of("llama")
    for options, own in (
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"min_new_tokens": 6}, {"min_tokens": 6}),
        ({"sequence_bias": {(5,): 3.0}}, {"logit_bias": {5: 3.0}}),
    ):
        wanted = expected(model, PROMPT, num_beams=4, **options)
        assert_same(ours(LLM(model, shape="2x2"), PROMPT, num_beams=4, **own), wanted)


def test_several_prompts_and_their_results_in_a_row() -> None:
    model, prompts = model_of("llama"), [PROMPT, some_tokens(4, seed=2)]
    results = LLM(model).generate(prompts, SamplingParams(max_tokens=NEW, num_beams=4, num_return_sequences=2))
    assert [result.prompt_token_ids for result in results] == [prompts[0]] * 2 + [prompts[1]] * 2
    for place, prompt in enumerate(prompts):
        wanted = expected(model, prompt, num_beams=4)[:2]
        assert [result.token_ids for result in results[2 * place : 2 * place + 2]] == [tokens for tokens, _ in wanted]
    assert {result.finish_reason for result in results} <= {"stop", "length"}


def test_the_shared_part_is_stored_once() -> None:
    model = model_of("llama", eos=False)
    rows: list[int] = []

    class Watching(ModulesEngine):
        def verify(self, seqs: Any, trees: Any, firsts: Any = None, reading: Any = ()) -> Any:
            out = super().verify(seqs, trees, firsts, reading)
            rows.append(len(out.all_logits))
            assert len(seqs) == 1
            return out

    llm = LLM(model, "none")
    llm.engine.__class__ = Watching
    llm.generate([PROMPT], SamplingParams(max_tokens=6, num_beams=3))
    assert rows == [1, 3, 3, 3, 3, 3]  # a row for each beam, and none twice


def test_a_search_by_itself() -> None:
    search = BeamSearch(2, 3, frozenset({0}))
    log_probs = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.6, 0.3]]).log()
    assert search.live == [0]
    assert [(m.parent, m.token) for m in search.advance(log_probs)] == [(0, 1), (0, 2)]
    assert search.live == [0, 1]
    log_probs = torch.tensor([[0.98, 0.01, 0.01], [0.1, 0.2, 0.7]]).log()
    search.advance(log_probs)
    assert search.running == [[2, 2], [2, 1]]
    assert search.best(1)[0].tokens == [1, 0]
    assert search.best(1)[0].score == pytest.approx(float(torch.tensor(0.6 * 0.98).log()) / 2)
    assert not search.done
    search.advance(log_probs)
    assert search.done  # at its limit


def test_what_does_not_go_with_beams_is_refused() -> None:
    for options in (
        {"temperature": 1.0}, {"n": 2}, {"stop": "x"}, {"logprobs": 1}, {"num_return_sequences": 5},
    ):  # fmt: skip
        with pytest.raises(OptionError, match="num_beams"):
            SamplingParams(num_beams=4, **options)
    with pytest.raises(OptionError, match="num_return_sequences"):
        SamplingParams(num_return_sequences=2)
    with pytest.raises(OptionError, match="certain only at its end"):
        LLM(model_of("llama")).stream(PROMPT, SamplingParams(num_beams=2))


@pytest.mark.parametrize("form", ["3x2x1", "cost"])
@pytest.mark.parametrize(
    ("kind", "family"), all_pairs(["medusa", "eagle-1", "eagle-3", "block", "all"], ["llama", "gemma3"])
)
def test_heads_draft_for_each_beam_from_its_own_hidden_states(kind: str, family: str, form: str) -> None:
    """The texts are transformers'; and what an EAGLE head proposes is what computing it anew gives."""
    model, engine = model_of(family), TorchEngine(model_of(family))
    head = some_head(1) if kind == "eagle-1" else some_head(3, 60)
    eagle = Kept(head, engine)
    drafter: Drafter = Medusa(random_heads(48), engine) if kind == "medusa" else eagle
    head_of_blocks = some_block()
    blocks = test_block.Kept(head_of_blocks, engine)
    if kind == "block":
        drafter = blocks
    if kind == "all":
        drafter = Merged([eagle, Medusa(random_heads(48), engine), NGram()])
    seq = make_sequence(PROMPT, context=CONTEXT, eos_ids=frozenset(engine.facts.ends), max_tokens=NEW, num_beams=4)
    search = BeamDecoder(engine, drafter, shape(form)).run(seq)
    assert_same([(found.tokens, found.score) for found in search.best(4)], expected(model, PROMPT, num_beams=4))
    assert seq.metrics.drafted_tokens > 0 or form == "cost"
    assert not engine._branches
    seen = eagle.__dict__.get("seen", [])
    assert len(seen) >= 20 or kind in ("medusa", "block")
    guessed = blocks.__dict__.get("seen", [])
    assert len(guessed) >= 20 or kind != "block"
    for tokens, draft in guessed[::6]:
        rows = test_block.said_by(head_of_blocks, model, tokens)[1].log_softmax(-1)
        for node in range(1, len(draft)):
            anew = float(rows[draft.depths[node] - 1, draft.tokens[node]])
            assert draft.log_probs[node] == pytest.approx(anew, abs=2e-3)
    for tokens, draft in seen[::6]:
        for node in range(1, len(draft)):
            said = said_by(head, model, tokens, draft.path_tokens(draft.parents[node]))
            # EAGLE-1 has no norms: from level to level a random head's states grow, and float32's rounding with them
            size = -float(said[said.isfinite()].min())
            assert draft.log_probs[node] == pytest.approx(float(said[draft.tokens[node]]), abs=5e-4 * size)


def test_what_rests_now_and_then_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter is told of beams only where it drafts for them, and forgets all in the end."""
    model, engine = model_of("llama"), TorchEngine(model_of("llama"))
    eagle, suffix = Kept(some_head(3, 60), engine), Suffix()
    form, steps = shape("3x2"), iter(range(100))
    monkeypatch.setattr(form, "rests", lambda seqs: next(steps) % 3 == 1)
    seq = make_sequence(PROMPT, context=CONTEXT, eos_ids=frozenset(engine.facts.ends), max_tokens=NEW, num_beams=4)
    search = BeamDecoder(engine, Merged([eagle, suffix]), form).run(seq)
    assert_same([(found.tokens, found.score) for found in search.best(4)], expected(model, PROMPT, num_beams=4))
    assert seq.metrics.drafted_tokens > 0
    assert not eagle._engine._states  # type: ignore[attr-defined]


def test_the_command_prints_the_best_texts(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny("llama", vocab_size=300), tiny_tokenizer())
    args = ["generate", "--model", str(base), "--num-beams", "3", "--max-tokens", "8", "one two"]
    result = CliRunner().invoke(app, [*args, "--num-return-sequences", "2", "--compare", "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["identical"]
    assert len(shown["tree"]["beams"]) == 2
    assert shown["tree"]["beams"][0]["score"] >= shown["tree"]["beams"][1]["score"]
    result = CliRunner().invoke(app, [*args, "--early-stopping", "never", "--compare"])
    assert result.exit_code == 0, result.output
    assert "the same texts" in result.output
    for wrong in (["--temperature", "1"], ["--show-tree"], ["--early-stopping", "perhaps"], ["--num-beams", "0"]):
        result = CliRunner().invoke(app, [*args, *wrong])
        assert result.exit_code != 0
