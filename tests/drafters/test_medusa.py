"""Medusa: hidden states, the drafter, typical acceptance, and the functions by which it is taught."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import decode, make_sequence, random_table
from tests.tiny_models import FAMILIES, VOCAB, request, save_model, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, MedusaModel, build_tree_from_heads, medusa_decode
from tokentree.acceptance import Typical, acceptance
from tokentree.draft import Draft
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.drafters.medusa import TOP, FastHeads, Medusa
from tokentree.drafters.merged import Merged
from tokentree.drafters.slots import LEAST_PROB, _grow
from tokentree.engines.drafting import Slots
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.table import TableEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError, OptionError, PairingError, TreeError
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.medusa import MedusaHeads
from tokentree.heads.saved import About, read_heads, write_heads
from tokentree.sampling import SamplingParams, to_probs
from tokentree.shapes import find_choices, shape
from tokentree.tree import TokenTree

WIDE = {"hidden_size": 64, "intermediate_size": 96}
FINAL = [family for family in FAMILIES if family != "gemma2"]  # where logits are what the output layer gives


def random_heads(hidden_size: int, num_heads: int = 3, seed: int = 0, scale: float = 0.3) -> MedusaHeads:
    heads = MedusaHeads(num_heads, 1, hidden_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        heads.weight.copy_(scale * torch.randn(heads.weight.shape, generator=generator))
    return heads


def some_hidden(rows: int) -> torch.Tensor:
    return torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows))


def medusa_for(engine: KVEngine, heads: MedusaHeads | None = None) -> Medusa:
    return Medusa(heads or random_heads(engine.capture().hidden_size), engine)


# -- the drafter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cost", "3x2x1", "chain:3", "dynamic:nodes=12", "paths:[[0],[1],[0,0],[4],[1,2,0]]"])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("gemma3", torch.float32)])
def test_greedy_ids_and_sampled_ids_are_plain_s(family: str, dtype: torch.dtype, form: str) -> None:
    engine = TorchEngine(tiny(family, dtype, **WIDE))
    for options in ({}, {"temperature": 0.9, "seed": 5}):
        prompts = [some_tokens(9, seed=i) for i in range(3)]
        expected = decode(engine, [request(ids, max_tokens=16, **options) for ids in prompts])
        seqs = [request(ids, max_tokens=16, **options) for ids in prompts]
        assert decode(engine, seqs, medusa_for(engine), form, max_batch=2) == expected
        assert form == "cost" or all(seq.metrics.drafted_tokens > 0 for seq in seqs)


def test_merged_with_lookups_it_stays_plain_s_and_says_who_earned_what() -> None:
    engine = TorchEngine(tiny("llama"))
    expected = decode(engine, [request(some_tokens(9), max_tokens=60)])
    seq = request(some_tokens(9), max_tokens=60)
    drafter = Merged([medusa_for(engine), Recycling(engine.vocab_size), NGram()])
    assert decode(engine, [seq], drafter, "dynamic:nodes=16") == expected
    assert set(seq.metrics.accepted_by_source) <= {"medusa", "recycling", "ngram"}


class Kept(Medusa):
    """Keeps what it proposed for the first sequence, and after which text."""

    def propose(self, seqs: Any, shape: Any, sampled: bool) -> list[Draft]:
        drafts = super().propose(seqs, shape, sampled)
        self.__dict__.setdefault("seen", []).append((list(seqs[0].tokens), drafts[0]))
        return drafts


def test_it_reads_the_state_before_the_root_and_each_head_has_a_level() -> None:
    model = tiny("llama")
    engine = TorchEngine(model)
    heads = random_heads(engine.capture().hidden_size)
    drafter, seq = Kept(heads, engine), request(some_tokens(11), max_tokens=60)
    decode(engine, [seq], Merged([drafter, Recycling(engine.vocab_size)]), "2x2x1")
    seen = drafter.__dict__["seen"]
    assert len(seen[0][1]) > 1  # the prompt was read
    assert max(step[1] for step in seq.metrics.steps) > 2  # some paths are longer than the root
    for tokens, draft in seen:
        with torch.inference_mode():
            states = model.model(input_ids=torch.tensor([tokens[:-1]])).last_hidden_state[0, -1:]
            guesses = heads.logits(states, model.lm_head)[:, 0].topk(2).indices.tolist()
        assert draft.tokens[0] == tokens[-1]
        for depth in range(1, max(draft.depths) + 1):
            level = [draft.tokens[node] for node in range(1, len(draft)) if draft.depths[node] == depth]
            width = (2, 2, 1)[depth - 1]
            assert level == guesses[depth - 1][:width] * (len(level) // width)


def test_the_tree_is_the_most_probable_one() -> None:
    rng = np.random.default_rng(0)
    for heads, k in ((1, 4), (3, 4), (4, 2)):
        chances = np.sort(rng.dirichlet(np.ones(k + 2), heads)[:, :k])[:, ::-1].copy()
        tokens = rng.integers(0, 1000, (heads, k))
        every = sorted(
            (
                math.prod(chances[level, rank] for level, rank in enumerate(path))
                for depth in range(1, heads + 1)
                for path in itertools.product(range(k), repeat=depth)
            ),
            reverse=True,
        )
        taken, parents, probs = _grow(*Slots.independent(tokens, chances), 13, heads)
        joint, depths, paths = [1.0], [0], [()]
        for token, parent, prob in zip(taken.tolist(), parents.tolist(), probs.tolist(), strict=True):
            joint.append(joint[parent] * prob)
            depths.append(depths[parent] + 1)
            paths.append((*paths[parent], token))
            assert token in tokens[depths[-1] - 1]
        best = [value for value in every if value >= LEAST_PROB][:13]
        assert np.allclose(joint[1:], best)
        assert len(set(paths)) == len(paths)
        assert max(_depths(_grow(*Slots.independent(tokens, chances), 13, 1)[1])) == 1


def _depths(parents: Any) -> list[int]:
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    return depths


def test_a_static_shape_gets_the_nodes_that_it_names() -> None:
    engine = TorchEngine(tiny("llama"))
    drafter = medusa_for(engine)
    form = shape("paths:[[0],[2],[7],[0,0],[0,3],[2,1],[0,3,5]]")
    seq = request(some_tokens(5), max_tokens=40)
    engine.prefill(seq)
    draft = drafter.propose([seq], form, sampled=False)[0]
    assert [draft.rank_path(node) for node in range(1, len(draft))] == list(form.paths)
    short = request(some_tokens(5), max_tokens=2)
    engine.prefill(short)
    assert max(drafter.propose([short], form, sampled=False)[0].depths) == 1


def test_probabilities_are_divided_by_temperatures_and_sum_to_one_over_all_tokens() -> None:
    engine = TorchEngine(tiny("llama"))
    features, heads, hidden = engine.capture(), random_heads(48), some_hidden(2)
    plain = Medusa(heads, engine)._guess(hidden)
    cold = Medusa(heads, engine, [0.5, 1.0, 2.0])._guess(hidden)
    logits = heads.logits(hidden, features.output_layer).detach()
    for head, divisor in enumerate((0.5, 1.0, 2.0)):
        expected = (logits[head] / divisor).softmax(-1).topk(TOP)
        assert np.allclose(cold[1][head], expected.values.numpy(), atol=1e-5)
        assert cold[0][head].tolist() == expected.indices.tolist() == plain[0][head].tolist()


def test_heads_that_know_some_tokens_propose_these_alone() -> None:
    engine = TorchEngine(tiny("llama"))
    features, heads, hidden = engine.capture(), random_heads(48), some_hidden(2)
    known = torch.tensor([3, 9, 11, 40, 41, 42, 77, 80, 90, 101, 119])
    logits = heads.logits(hidden, features.output_layer).detach()[..., known]
    heads.token_map = known
    ids, probs = Medusa(heads, engine)._guess(hidden)
    expected = logits.softmax(-1).topk(TOP)
    assert ids.tolist() == known[expected.indices].tolist()
    assert np.allclose(probs, expected.values.numpy(), atol=1e-5)
    heads.token_map = known + 1
    with pytest.raises(PairingError, match="tokens that the target doesn't have"):
        Medusa(heads, engine)


@pytest.mark.parametrize("projection", ["shared", "some tokens", "own"])
@pytest.mark.parametrize(("heads", "layers", "bias"), [(3, 1, True), (3, 2, False), (1, 2, True), (2, 0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_draft_with_the_logits_that_they_are_trained_on(
    projection: str, heads: int, layers: int, bias: bool, dtype: torch.dtype
) -> None:
    features = TorchEngine(tiny("qwen2", dtype, **WIDE)).capture()
    generator = torch.Generator().manual_seed(0)
    made = MedusaHeads(heads, layers, 64, VOCAB if projection == "own" else None, bias)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    layer: Any = features.output_layer
    if projection == "some tokens":
        made.token_map = torch.tensor([5, 2, 77, 100, 101])
        layer = lambda x: features.output_layer(x)[..., made.token_map]  # noqa: E731
    hidden = torch.randn(4, 64, generator=generator).to(dtype)
    expected = made.to(dtype).logits(hidden, layer).detach().float()
    got = FastHeads(made, features).logits(hidden).float()
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < (1e-4 if dtype is torch.float32 else 0.05) * float(expected.std())


def test_heads_with_projections_of_their_own_need_no_output_layer() -> None:
    engine = TorchEngine(tiny("llama"))
    heads = MedusaHeads(2, 1, 48, VOCAB)
    with torch.no_grad():
        assert heads.projection is not None
        heads.projection.copy_(torch.randn(heads.projection.shape, generator=torch.Generator().manual_seed(0)))
    expected = decode(engine, [request(some_tokens(5), max_tokens=20)])
    assert decode(engine, [request(some_tokens(5), max_tokens=20)], medusa_for(engine, heads), "3x3") == expected


def test_what_does_not_fit_is_refused() -> None:
    engine = TorchEngine(tiny("llama"))
    with pytest.raises(PairingError, match="hidden states of 32 numbers, and the target has 48"):
        Medusa(MedusaHeads(2, 1, 32), engine)
    for wrong in ([1.0], [1.0, 0.0, 1.0]):
        with pytest.raises(PairingError, match="as many temperatures"):
            Medusa(random_heads(48), engine, wrong)
    with pytest.raises(PairingError, match="medusa' needs heads="):
        LLM(tiny("llama"), "medusa")
    with pytest.raises(PairingError, match="children"):
        LLM(tiny("llama"), medusa_for(engine), accept="rejection")


# -- choices -----------------------------------------------------------------------------------------------------------


def test_choices_are_the_best_static_tree() -> None:
    accuracies = [[0.5, 0.2, 0.1], [0.4, 0.15, 0.0]]
    every = [path for depth in (1, 2) for path in itertools.product(range(3), repeat=depth)]

    def worth(paths: Any) -> float:
        return float(sum(math.prod(accuracies[level][rank] for level, rank in enumerate(path)) for path in paths))

    def is_tree(paths: Any) -> bool:
        return all(path[:-1] in paths for path in paths if len(path) > 1)

    for nodes in range(2, 7):
        best = max(worth(paths) for paths in itertools.combinations(every, nodes - 1) if is_tree(paths))
        found = find_choices(accuracies, nodes)
        assert len(found) == nodes - 1
        assert is_tree(found)
        assert math.isclose(worth(found), best)
    assert len(find_choices(accuracies, 100)) == 9  # those that are never right are left out
    with pytest.raises(OptionError, match="at least 2"):
        find_choices(accuracies, 1)
    with pytest.raises(OptionError, match="probabilities"):
        find_choices([[0.5], []], 4)


# -- folders -----------------------------------------------------------------------------------------------------------


def some_folder(folder: Path, model: Any, tokenizer: Any, **about: Any) -> Path:
    fingerprint = Fingerprint.of(model.config, tokenizer)
    heads = random_heads(model.config.hidden_size)
    write_heads(folder, heads, "tiny", model.config.vocab_size, About(fingerprint=fingerprint, **about))
    return folder


def test_a_folder_keeps_heads_and_what_is_known_of_them(tmp_path: Path) -> None:
    heads, model = random_heads(48), tiny("llama")
    heads.token_map = torch.tensor([1, 5, 9])
    about = About(
        fingerprint=Fingerprint.of(model.config, None), temperatures=[1.0, 0.9, 1.2], accuracies=[[0.5], [0.2], [0.1]],
        choices=[[0], [0, 0]], recipe={"epochs": 2},
    )  # fmt: skip
    write_heads(tmp_path, heads, "tiny", VOCAB, about)
    saved = read_heads(tmp_path, Fingerprint.of(model.config, tiny_tokenizer()))
    assert saved.about == about
    assert torch.equal(saved.heads.weight, heads.weight)
    assert saved.heads.token_map is not None
    assert saved.heads.token_map.tolist() == [1, 5, 9]


def test_the_choices_beside_heads_are_a_shape(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama", vocab_size=300), tiny_tokenizer()
    folder = some_folder(tmp_path / "with", model, tokenizer, choices=[[0], [1], [0, 2]])
    llm = LLM(model, "medusa", shape="choices", heads=folder, tokenizer=tokenizer)
    assert llm.decoder.shape.paths == ((0,), (1,), (0, 2))
    assert llm.plain().using("medusa", "choices").decoder.shape.paths == ((0,), (1,), (0, 2))
    without = some_folder(tmp_path / "without", model, tokenizer)
    with pytest.raises(OptionError, match="no choices are kept beside the heads"):
        LLM(model, "medusa", shape="choices", heads=without, tokenizer=tokenizer)
    with pytest.raises(OptionError, match="give heads="):
        LLM(model, shape="choices")


def test_heads_made_for_another_model_are_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama", vocab_size=300), tiny_tokenizer()
    folder = some_folder(tmp_path / "heads", model, tokenizer)
    LLM(model, heads=folder, tokenizer=tokenizer)
    with pytest.raises(PairingError, match="made for tiny, whose configuration is not this model's"):
        LLM(tiny("llama", vocab_size=300, num_hidden_layers=1), heads=folder, tokenizer=tokenizer)
    with pytest.raises(PairingError, match="whose tokenizer is not this model's"):
        LLM(model, heads=folder, tokenizer=tiny_tokenizer(["other texts make another vocabulary"], 270))


def test_a_field_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    folder = some_folder(tmp_path, tiny("llama"), None)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"temperatures": null', '"temperatures": "warm"'))
    with pytest.raises(ModelError, match=r"tokentree\.temperatures makes no sense"):
        read_heads(folder)


def test_a_model_with_heads_drafts_with_them_and_the_lookups(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama", vocab_size=300), tiny_tokenizer()
    folder = some_folder(tmp_path, model, tokenizer)
    llm = LLM(model, heads=folder, tokenizer=tokenizer)
    assert llm.decoder.drafter.names == ["medusa", "recycling", "suffix", "ngram"]
    assert LLM(model, "medusa", heads=folder, tokenizer=tokenizer).decoder.drafter.names == ["medusa"]
    prompt, params = some_tokens(12), SamplingParams(max_tokens=40)
    assert llm.generate([prompt], params)[0].token_ids == llm.plain().generate([prompt], params)[0].token_ids


# -- typical acceptance ------------------------------------------------------------------------------------------------


def typical_step(tokens: Any, parents: Any, table: torch.Tensor, rule: Typical, **params: Any) -> tuple[Any, Any]:
    """What ``rule`` accepts of a tree, after the text [1, 2], of a model that is a table; and the draft."""
    engine, seq = TableEngine(table), make_sequence([1, 2], **params)
    engine.prefill(seq)
    draft = Draft(2)
    for token, parent in zip(tokens, parents, strict=True):
        draft.add(parent, token, 0.0, 0)
    out = engine.verify([seq], [draft.tree])
    return rule(seq, draft, out.after(0)), draft


@pytest.mark.parametrize("seed", range(8))
def test_typical_takes_the_longest_path_of_tokens_that_are_good_enough(seed: int) -> None:
    table = random_table(5, 2, seed=seed, sharpness=1.5)
    tokens, parents = [0, 1, 3, 0, 4, 2, 2, 1, 3], [0, 0, 0, 1, 1, 2, 3, 6, 5]
    rule = Typical(epsilon=0.15, delta=0.6)
    step, draft = typical_step(tokens, parents, table, rule, temperature=0.8, seed=seed, max_tokens=20)
    seq, good = make_sequence([1, 2], temperature=0.8), {0}
    for node in range(1, len(draft)):
        before = [1, 2, *draft.path_tokens(draft.parents[node])]
        probs = to_probs(TableEngine(table).logits_after(before), seq.params)
        entropy = -sum(float(p) * math.log(float(p)) for p in probs if p > 0)
        if draft.parents[node] in good and float(probs[draft.tokens[node]]) > min(0.15, 0.6 * math.exp(-entropy)):
            good.add(node)
    longest = max(draft.depths[node] for node in good)
    assert len(step.path) - 1 == longest
    assert set(step.path) <= good
    assert step.tokens[:-1] == [draft.tokens[node] for node in step.path[1:]]


def test_of_equally_long_paths_typical_takes_the_most_probable_one() -> None:
    rows = torch.full((5, 5), 0.02)
    rows[2, 0], rows[2, 1], rows[0, 3], rows[1, 4] = 0.6, 0.3, 0.3, 0.5  # 2 -> 0 -> 3 has 0.18, 2 -> 1 -> 4 has 0.15
    rows[:, 2] += 1 - rows.sum(1)
    step, _ = typical_step([1, 0, 4, 3], [0, 0, 1, 2], rows.log(), Typical(0.09, 0.3), temperature=1.0, seed=0)
    assert step.tokens[:2] == [0, 3]


def test_typical_is_match_for_greedy_requests_and_lossy_for_others() -> None:
    table = random_table(6, 2, seed=3)
    engine = TableEngine(table)

    def texts(*rules: str, **options: Any) -> list[list[list[int]]]:
        return [
            decode(engine, [make_sequence([1, 2], max_tokens=60, **options)], Recycling(6, k=4), "3x3", rule)
            for rule in rules
        ]

    same = texts("match", "typical")
    assert same[0] == same[1]
    warm = texts("match", "typical:epsilon=0.01,delta=0.01", temperature=1.0, seed=1)
    assert warm[0] != warm[1]
    assert Typical.lossy
    seq = make_sequence([1, 2], max_tokens=9, temperature=1.0)
    decode(engine, [seq], Recycling(6, k=4), "2x2", "typical")
    assert seq.metrics.lossy


def test_the_options_of_typical_are_read_and_checked() -> None:
    rule = acceptance("typical:epsilon=0.2,delta=0.5")
    assert isinstance(rule, Typical)
    assert (rule._epsilon, rule._delta) == (0.2, 0.5)
    for wrong in ("typical:epsilon=0", "typical:delta=-1", "typical:depth=3", "typical:epsilon", "match:epsilon=0.1"):
        with pytest.raises(OptionError):
            acceptance(wrong)


# -- as it is taught ---------------------------------------------------------------------------------------------------


def taught(tmp_path: Path) -> MedusaModel:
    model, tokenizer = tiny("llama", vocab_size=300), tiny_tokenizer()
    base = save_model(tmp_path / "base", model, tokenizer)
    heads = some_folder(tmp_path / "heads", model, tokenizer)
    return MedusaModel.from_pretrained(base, heads, dtype="float32")


def test_the_taught_functions_are_llm_underneath(tmp_path: Path) -> None:
    model = taught(tmp_path)
    assert model.llm.decoder.drafter.names == ["medusa"]
    text = "The quick brown fox"
    plain = model.llm.plain().generate(text, SamplingParams(max_tokens=30))[0]
    assert model.generate(text, max_tokens=30) == plain.text
    ids = model.llm.tokenizer(text).input_ids  # type: ignore[misc]
    assert medusa_decode(ids, model, max_tokens=20) == [*ids, *plain.token_ids[:20]]


def test_a_model_with_heads_gives_their_logits(tmp_path: Path) -> None:
    model, ids = taught(tmp_path), some_tokens(7)
    out = model(ids)
    assert sorted(out) == ["base_logits", "head_1_logits", "head_2_logits", "head_3_logits"]
    assert all(logits.shape == (7, 300) for logits in out.values())
    base = tiny("llama", vocab_size=300)
    with torch.inference_mode():
        states = base.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        expected, own = random_heads(48).logits(states, base.lm_head), base.lm_head(states)
    assert torch.allclose(out["head_2_logits"], expected[1], atol=1e-3)
    assert torch.allclose(out["base_logits"], own, atol=1e-3)


def test_verify_gives_the_tokens_of_one_greedy_step(tmp_path: Path) -> None:
    model, ids = taught(tmp_path), some_tokens(7)
    coming = model.llm.plain().generate([ids])[0].token_ids
    other = (coming[0] + 1) % 300
    assert model.verify(ids, [(other, -1), (coming[0], -1), (coming[1], 1), (other, 1), (coming[2], 2)]) == coming[:4]
    assert model.verify(ids, [(other, -1)]) == coming[:1]
    assert model.verify(ids, TokenTree.chain(ids[-1], coming[:2])) == coming[:3]
    with pytest.raises(TreeError, match="not the last token"):
        model.verify(ids, TokenTree.chain((ids[-1] + 1) % 300, coming[:2]))


def test_a_tree_from_heads_is_cartesian() -> None:
    logits = [torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.tensor([5.0, 0.0, 4.0, 1.0])]
    assert build_tree_from_heads(logits, 2) == [(1, -1), (3, -1), (0, 0), (2, 0), (0, 1), (2, 1)]
    assert build_tree_from_heads(logits[:1], 9) == [(1, -1), (3, -1), (2, -1), (0, -1)]
    for wrong in (([], 2), (logits, 0)):
        with pytest.raises(OptionError):
            build_tree_from_heads(*wrong)
