"""Gemma 4's assistants: what their trees are made of, that they are lossless, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import by_night, decode, random_table
from tests.heads.assistants import Assisted, save_assisted, tiny_assistant, tiny_target
from tests.tiny_models import VOCAB, request, save_model, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM
from tokentree.draft import Draft
from tokentree.drafters.assistant import Assistant
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.engines.base import EngineOptions
from tokentree.engines.table import TableEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import ModelError, PairingError
from tokentree.heads.assistant_files import read_assistant
from tokentree.heads.fingerprint import Fingerprint
from tokentree.loading import load_engine
from tokentree.sampling import SamplingParams
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

FILE = "model.safetensors"

PROMPTS = [some_tokens(20), some_tokens(4, seed=1), some_tokens(1, seed=2)]  # longer than a window, and shorter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Assisted]:
    """Targets in float32 with an assistant, which no test changes."""
    kinds: dict[str, dict[str, Any]] = {
        "plain": {}, "ordered": {"ordered": True, "shared": 0}, "unified": {"family": "gemma4_unified"}
    }  # fmt: skip
    return {kind: save_assisted(tmp_path_factory.mktemp(kind), **options) for kind, options in kinds.items()}


class Kept(Assistant):
    """Remembers what it proposed."""

    def propose(self, seqs: list[Sequence], shape: Any, sampled: bool) -> list[Draft]:
        drafts = super().propose(seqs, shape, sampled)
        self.__dict__.setdefault("seen", []).extend((list(s.tokens), d) for s, d in zip(seqs, drafts, strict=True))
        return drafts


def compare(made: Assisted, drafter: Kept) -> int:
    """Compares each node with what transformers' assistant says; returns how many there were."""
    grown = 0
    for tokens, draft in drafter.__dict__["seen"]:
        for node in range(1, len(draft)):
            expected = made.said(tokens, draft.path_tokens(draft.parents[node]))
            assert draft.log_probs[node] == pytest.approx(float(expected[draft.tokens[node]]), abs=2e-3)
            grown += 1
        for node, probs in (draft.sampled or {}).items():
            expected = made.said(tokens, draft.path_tokens(node)).exp()
            assert torch.allclose(probs.float(), expected, atol=1e-4)
    return grown


# -- what it drafts ----------------------------------------------------------------------------------------------------


KINDS = [("plain", None), ("plain", "sdpa"), ("ordered", None), ("unified", None)]


@pytest.mark.parametrize(("kind", "attention"), by_night(KINDS, but=KINDS[:3]))
def test_each_node_has_the_probability_that_transformers_gives_it(
    saved: dict[str, Assisted], kind: str, attention: str | None
) -> None:
    made = saved[kind]
    engine = TorchEngine(made.target, attention)
    drafter = Kept(read_assistant(made.heads, torch.float32), engine)
    plain = decode(engine, [request(prompt, max_tokens=7) for prompt in PROMPTS])
    seqs = [request(prompt, max_tokens=7) for prompt in PROMPTS]
    for seq, text in zip(seqs, plain, strict=True):
        seq.references = [[*seq.tokens, *text]]  # so that the lookup knows what comes, and paths are accepted
    assert decode(engine, seqs, Merged([drafter, NGram()]), "2x2x1") == plain
    assert compare(made, drafter) > 10
    assert max(step[1] for seq in seqs for step in seq.metrics.steps) > 1  # paths longer than the root were accepted
    assert not drafter._engine._given  # type: ignore[attr-defined]


def test_beams_have_the_drafts_of_their_own_texts(saved: dict[str, Assisted]) -> None:
    made = saved["plain"]
    for attention in (None, "sdpa"):
        engine = TorchEngine(made.target, attention)
        drafter = Kept(read_assistant(made.heads, torch.float32), engine)
        llm, params = LLM(engine=engine, drafter=drafter, shape="2x2"), SamplingParams(num_beams=2, max_tokens=5)
        texts = [one.generate(PROMPTS[:1], params)[0].token_ids for one in (llm, llm.plain())]
        assert texts[0] == texts[1]
        assert compare(made, drafter) > 10


@pytest.mark.parametrize("kind", ["plain", "ordered"])
def test_in_8_bits_it_says_nearly_the_same(saved: dict[str, Assisted], kind: str) -> None:
    made, found = saved[kind], list[torch.Tensor]()
    for dtype in (torch.float32, torch.bfloat16):
        target: Any = copy.deepcopy(made.target)
        engine = TorchEngine(target.to(dtype))
        drafter = Assistant(read_assistant(made.heads, dtype), engine)
        own: Any = drafter._engine
        assert ("QuantizedLinear" in {type(one).__name__ for one in own._head.model.modules()}) == (dtype.itemsize < 4)
        seq = request(some_tokens(20))
        engine.prefill(seq)
        found.append(own.verify([seq], [TokenTree.root(seq.tokens[-1])]).all_logits.float())
    assert float((found[0] - found[1]).std() / found[0].std()) < 0.1


# -- losslessness ------------------------------------------------------------------------------------------------------


def test_greedy_ids_and_sampled_ids_are_plain_s(saved: dict[str, Assisted]) -> None:
    llm = LLM(saved["ordered"].folder, "assistant", heads=saved["ordered"].heads, shape="dynamic:nodes=8")
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        params = SamplingParams(max_tokens=9, **options)
        results = llm.generate(PROMPTS, params)
        assert [one.token_ids for one in results] == [one.token_ids for one in llm.plain().generate(PROMPTS, params)]
        assert sum(one.metrics.drafted_tokens for one in results) > 0
        assert [piece.token_id for piece in llm.stream(PROMPTS[0], params)] == results[0].token_ids


def test_children_are_drawn_from_what_it_says(saved: dict[str, Assisted]) -> None:
    made = saved["ordered"]
    engine = TorchEngine(made.target)
    drafter = Kept(read_assistant(made.heads, torch.float32), engine)
    seqs = [request(prompt, max_tokens=6, temperature=1.0, seed=number) for number, prompt in enumerate(PROMPTS)]
    decode(engine, seqs, drafter, "2x2", "rejection")
    assert compare(made, drafter) > 10


# -- where it is taken -------------------------------------------------------------------------------------------------


def test_it_is_merged_where_it_is_given(saved: dict[str, Assisted]) -> None:
    made = saved["plain"]
    llm = LLM(made.target, heads=made.heads, shape="2x1")
    assert llm.decoder.drafter.names == ["assistant", "recycling", "suffix", "ngram"] == llm.drafters
    with pytest.raises(PairingError, match="drafter='assistant' needs heads"):
        LLM(engine=llm.engine, drafter="assistant")


def test_it_is_no_model_by_itself(saved: dict[str, Assisted]) -> None:
    for model in (saved["plain"].heads, saved["plain"].assistant):
        with pytest.raises(ModelError, match=r"another model's keys and values: give its folder as heads="):
            load_engine(model, EngineOptions(device=torch.device("cpu")))


@pytest.mark.parametrize(
    ("target", "assistant", "message"),
    [
        (lambda: tiny("llama"), {}, "drafts for Gemma 4, and LlamaForCausalLM is no such model"),
        (
            lambda: tiny_target(layer_types=["full_attention"] * 4), {},
            "a layer of the kind sliding_attention, and Gemma4ForCausalLM has none",
        ),
        (tiny_target, {"target_size": 48}, "hidden states of 48 numbers, and .* has 64"),
        (tiny_target, {"vocab_size": 96}, "knows 96 tokens, and Gemma4ForCausalLM has 120"),
        (tiny_target, {"head_dim": 8}, "keys of 2 heads x 8 .* have 2 x 16"),
    ],
)  # fmt: skip
def test_other_targets_are_refused(tmp_path: Path, target: Any, assistant: Any, message: str) -> None:
    save_model(tmp_path, tiny_assistant(**assistant))
    with pytest.raises(PairingError, match=message) as raised:
        LLM(target(), "assistant", heads=tmp_path)
    assert "\n" not in str(raised.value)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    made = save_assisted(tmp_path)
    for place, size in ((made.folder, 290), (made.heads, 280)):
        tiny_tokenizer(size=size).save_pretrained(place)
    with pytest.raises(PairingError, match="has another tokenizer than this model"):
        LLM(made.folder, heads=made.heads)
    tiny_tokenizer(size=290).save_pretrained(made.heads)
    read_assistant(made.heads, torch.float32, Fingerprint.of_sizes("", tiny_tokenizer(size=290)))


def test_an_engine_whose_keys_can_t_be_read_is_refused(saved: dict[str, Assisted]) -> None:
    with pytest.raises(PairingError, match="an engine whose keys and values an assistant can't read"):
        LLM(engine=TableEngine(random_table(5)), drafter="assistant", heads=saved["plain"].heads)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.embed_tokens.weight": None}, "lacks the tensor lm_head.weight"),
        ({"pre_projection.weight": torch.zeros(32, 64)}, r"pre_projection.weight is \[32, 64\], not \[32, 128\]"),
        ({"model.layers.1.self_attn.q_proj.weight": None}, "lacks the tensor model.layers.1.self_attn.q_proj.weight"),
        (
            {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 32)},
            r"model.layers.1.mlp.up_proj.weight is \[3, 32\], not \[64, 32\]",
        ),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, "model.norm.weight holds what is no finite number"),
        ({"model.extra": torch.zeros(1)}, "doesn't have: model.extra"),
        ({"extra": torch.zeros(1)}, "doesn't have: extra"),
        ({"masked_embedding.token_ordering": torch.zeros(VOCAB, dtype=torch.int64)}, "doesn't have each token once"),
    ],
)
def test_wrong_tensors_are_named(
    saved: dict[str, Assisted], tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    found = load_file(saved["ordered"].heads / FILE) | tensors
    shutil.copy(saved["ordered"].heads / "config.json", tmp_path)
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(ModelError, match=message) as raised:
        read_assistant(tmp_path, torch.float32)
    assert "\n" not in str(raised.value)


def test_wrong_configurations_are_told(saved: dict[str, Assisted], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no Gemma 4 assistant"):
        read_assistant(saved["plain"].folder, torch.float32)
    config = json.loads((saved["ordered"].heads / "config.json").read_text())
    for field, value, message in (
        ("num_centroids", 7, "3 of 7 clusters share 120 tokens"),
        ("centroid_intermediate_top_k", 13, "13 of 12 clusters"),
    ):
        shutil.copy(saved["ordered"].heads / FILE, tmp_path)
        tensors = load_file(tmp_path / FILE)
        tensors["masked_embedding.centroids.weight"] = torch.zeros(7 if field == "num_centroids" else 12, 32)
        save_file(tensors, tmp_path / FILE, {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(ModelError, match=message):
            read_assistant(tmp_path, torch.float32)
