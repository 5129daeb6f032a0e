"""A sweep of wrong calls: each gives one of this library's own errors, in one sentence, or a TypeError where the
signature itself is wrong; never what some line inside stumbled over."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

import tokentree
from tests.conftest import shown
from tests.tiny_models import kv_engine, save_model, tiny, tiny_tokenizer
from tokentree import LLM, Draft, SamplingParams, TokenTree, TokenTreeError
from tokentree.acceptance import acceptance
from tokentree.decoder import Decoder
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.none import NoDrafter
from tokentree.sequence import Sequence
from tokentree.shapes import Static

IDS = [5, 9, 7, 5, 9]
NAN, INF = math.nan, math.inf


class World:
    """What calls are made with."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny("llama")
        self.llm = LLM(self.model, "ngram", shape="2x1")
        self.tokenizer = tiny_tokenizer()
        self.path = str(save_model(folder / "model", tiny("llama", vocab_size=len(self.tokenizer)), self.tokenizer))
        self.file = str(folder / "file")
        Path(self.file).write_text("nothing")
        self.empty = str(folder / "empty")
        Path(self.empty).mkdir()
        (folder / "broken").mkdir()
        (folder / "broken" / "config.json").write_text("{")
        self.broken = str(folder / "broken")
        self.nowhere = str(folder / "nowhere")
        small: dict[str, Any] = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4, "vocab_size": 20}
        self.encoder: PreTrainedModel = T5ForConditionalGeneration(T5Config(**small))
        self.medusa = tokentree.MedusaModel(self.llm, folder)

    def seq(self) -> Sequence:
        return self.llm.sequence(IDS, SamplingParams(max_tokens=3))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("wrong"))


def run(decoder: Decoder, seqs: Any, *more: Any) -> None:
    for _ in decoder.run(seqs, *more):
        pass


def built(world: World, *parts: Any) -> Decoder:
    return Decoder(world.llm.engine, *parts)


def each(name: str, values: list[Any], call: Callable[[World, Any], Any]) -> list[Any]:
    return [pytest.param(call, value, id=f"{name} {shown(value)}") for value in values]


def options(name: str, values: list[Any]) -> list[Any]:
    return each(f"LLM({name}=)", values, lambda world, value: LLM(world.model, **{name: value}))


def sampling(name: str, values: list[Any]) -> list[Any]:
    return each(f"SamplingParams({name}=)", values, lambda world, value: SamplingParams(**{name: value}))


def places(*names: str) -> list[Callable[[World], Any]]:
    return [lambda world, name=name: getattr(world, name) for name in names]  # type: ignore[misc]


def made(value: Any, world: World) -> Any:
    """``value``, or what a function of the world gives for it."""
    return value(world) if callable(value) and getattr(value, "__name__", "") == "<lambda>" else value


MODELS = [None, 3, 1.5, True, b"model", [], {}, "", " ", ".", nn.Linear(2, 2), LLM, object(), np.zeros(3), len]
NUMBERS: list[Any] = ["3", "", None, [1], {}, NAN, INF, -INF, -1, True, 1j, b"1", object()]

CALLS: list[Any] = [
    # -- LLM
    *each("LLM", [*MODELS, *places("encoder", "nowhere", "empty", "broken")], lambda w, v: LLM(made(v, w))),
    *each("draft_model", [3, b"", [3], [None], "", nn.Linear(2, 2), LLM, {}, ("",), [[]], *places("encoder", "empty")],
          lambda w, v: LLM(w.model, draft_model=made(v, w))),
    *options("drafter", ["", "oracle", [], ["none", "suffix"], ["ngram", "ngram"], [""], [3], 3, NGram, {"ngram"}, b"n",
                         {}, ["ngram", None], True, "medusa", "eagle", "draft_model", [["ngram"]]]),
    *options("shape", ["", " ", 7, 2.5, [], [2, 2], {}, "2x0", "0", "x", "2x", "-1", "chain:", "chain:0", "chain:x",
                       "paths:", "paths:[[-1]]", "paths:[1]", "paths:[[]]", "paths:{}", "dynamic:nodes=x",
                       "dynamic:nodes=", "dynamic:nodes=0", "adaptive:mass=2", "adaptive:mass=nan", "choices", "cost:1",
                       "x".join(["2"] * 40), "chain:100000000", "1000000x1000000", b"2x2", Static, True, "2x2x\ud83d",
                       "optimal:nodes=0", "optimal:depth=-1"]),
    *options("accept", ["", "x", 3, None, [], b"match", "match:x", "typical:x", "typical:epsilon=2",
                        "typical:epsilon=nan", "typical:gamma=1", "rejection", acceptance]),
    *options("heads", ["", 3, b"x", [], "\0", *places("nowhere", "file", "empty", "broken")]),
    *options("dtype", ["int8", 3, "float32", "", []]),
    *options("device", ["cpu", "tpu", 3, []]),
    *each("by name, dtype", ["int8", "float8", "", 3, [], {}, torch.int8, torch.complex64, torch.bool],
          lambda w, v: LLM(w.path, dtype=v)),
    *each("by name, device", ["tpu", "meta", "cuda:99", "cpu:x", "", [], {}, 1.5], lambda w, v: LLM(w.path, device=v)),
    *options("attention", [3, "", "flash", [], True]),
    *options("quantization", [3, "", "int3", "gguf", "int8", [], True]),
    *options("compile", ["yes", 1, None, "default"]),
    *options("tokenizer", [3, "", [], {}, b"x", object, nn.Linear(2, 2), lambda w: w.nowhere, lambda w: w.file]),
    *options("max_batch", [*NUMBERS, 0, 1.5, 2.0]),
    *options("prefix_mb", ["3", "", None, [1], {}, NAN, INF, -1, True, 1j]),
    *options("lookup_mb", ["3", "", None, [1], {}, NAN, INF, -1, True, 1j]),
    *options("prefill_rows", [0, -1, 1.5, "3", True, [1]]),
    *options("kv_mb", ["3", "", [1], {}, NAN, INF, -1, True, 1j]),
    *options("memory", [3, b"x", [], "", "\0", lambda w: w.file]),
    *options("watch", [3, "x", []]),
    *options("speculative_model", [3, "", [3]]),
    *options("speculative_config", [3, "tree", [], {"depth": "3"}, {"depth": True}, {"mode": []}, {"width": 2}, {3: 4},
                                    {"depth": -1}, {"mode": "chain", "branching_factor": 2}, {"depth": 10**9},
                                    {"num_speculative_tokens": NAN}, {"depth": None}]),
    *each("twice", [{"speculative_model": "a", "draft_model": "b"}, {"speculative_config": {}, "shape": "2"}],
          lambda w, v: LLM(w.model, **v)),
    # -- the rest of LLM
    *each("using", [{"drafter": "x"}, {"drafter": []}, {"shape": ""}, {"shape": 3}, {"accept": "x"}, {"accept": 3},
                    {"watch": 3}, {"heads": 3}, {"heads": ""}, {"accept": "rejection"}, {"drafter": "draft_model"},
                    {"drafter": "medusa"}, {"shape": "choices"}, {"heads": lambda w: w.nowhere}],
          lambda w, v: w.llm.using(**{key: made(one, w) for key, one in v.items()})),
    *each("save_memory", [None, 3, "", b"x", "\0", "/proc/x/y", lambda w: w.file, lambda w: w.file + "/below"],
          lambda w, v: w.llm.save_memory(made(v, w))),
    *each("generate", [None, 3, b"x", "text", [1.5], {}, {"a": 1}, [[]], [-1], [10**9], {1}, [None], "\ud83d",
                      [IDS, 3]],
          lambda w, v: w.llm.generate(v)),
    *each("too long", [[5] * 320, [5] * 10**6], lambda w, v: w.llm.generate([v])),
    *each("params", [3, {}, "greedy", [], [SamplingParams()] * 2, [None], {"temperature": 1}],
          lambda w, v: w.llm.generate([IDS], v)),
    *each("stop without a tokenizer", ["x"], lambda w, v: w.llm.generate([IDS], SamplingParams(stop=v))),
    *each("tokens", [{"logit_bias": {120: 1}}, {"stop_token_ids": [120]},
                    {"stop_token_ids": [10**20], "min_tokens": 2}],
          lambda w, v: w.llm.generate([IDS], SamplingParams(**v))),
    *each("stream", [None, 3, "text", [], [1.5], [IDS, IDS], {}], lambda w, v: w.llm.stream(v)),
    *each("stream params", [SamplingParams(n=2), SamplingParams(num_beams=2), 3, {}, [SamplingParams()] * 2],
          lambda w, v: w.llm.stream(IDS, v)),
    *each("reference", [3, "text", [1.5], [[]], {"a": 1}, b"x"], lambda w, v: w.llm.generate(IDS, reference=v)),
    *each("chat", [None, 3, "text", [], [{}], [{"role": "user"}], [{"role": "user", "content": "no template"}]],
          lambda w, v: w.llm.chat(v)),
    *each("detokenizer", [None], lambda w, v: w.llm.detokenizer()),
    # -- SamplingParams
    *sampling("temperature", [-1, "1", None, [], True, NAN, INF, {}, 1j]),
    *sampling("top_k", [-1, 1.5, "3", None, True, NAN]),
    *sampling("top_p", [0, 1.1, -1, "1", NAN, None, True]),
    *sampling("min_p", [-0.1, 1.1, NAN, "x"]),
    *sampling("repetition_penalty", [0, -1, NAN, INF, 1e-40, 1e40, "x"]),
    *sampling("presence_penalty", [NAN, INF, 1e40, "x", None]),
    *sampling("logit_bias", [{-1: 1.0}, {"a": 1}, {1: NAN}, {1: INF}, {1: "x"}, [1], 3, {1.5: 1}, {True: 1},
                             {1: 1e39}]),
    *sampling("logits_processors", [3, "x", [3], {"a": len}]),
    *sampling("seed", [-1, 2**63, 1.5, "3", True, []]),
    *sampling("n", [0, -1, 1.5, "3", True, None, 10**9]),
    *sampling("max_tokens", [0, -1, 1.5, "3", True, None, NAN, []]),
    *sampling("stop", ["", ["a", ""], [3], 3, b"x", {"a": 1}, "\ud83d", [None]]),
    *sampling("stop_token_ids", [[-1], ["x"], 3, [1.5], [True], {"a": 1}, "abc", [None]]),
    *sampling("num_beams", [0, 1.5, "2", 10**9, True]),
    *sampling("early_stopping", [1, "x", None, []]),
    *sampling("ignore_eos", ["yes", 1, None, []]),
    *sampling("logprobs", [-1, 1.5, "3", True]),
    *sampling("temprature", [1]),
    *each("together", [{"min_tokens": 5, "max_tokens": 4}, {"num_return_sequences": 2}, {"num_beams": 2, "n": 2},
                       {"num_beams": 2, "temperature": 1.0}, {"num_beams": 2, "stop": "x"},
                       {"num_beams": 2, "length_penalty": NAN}, {"num_beams": 2, "length_penalty": 1e9}],
          lambda w, v: SamplingParams(**v)),
    *each("frozen", [2], lambda w, v: setattr(SamplingParams(), "temperature", v)),
    # -- trees and the loop
    *each("TokenTree", [([], []), ([1], [0]), ([1, 2], [-1]), ([1, 2], [-1, 1]), ([1, 2, 2], [-1, 0, 0]), ([1.5], [-1]),
                        (["a"], [-1]), ([[1]], [[-1]]), (None, None), ([10**30], [-1]), ([1], [NAN]),
                        ([[1], [1, 2]], [-1]),
                        ([True], [-1]), ([1, 2], [-1, -1]), (3, 4)], lambda w, v: TokenTree(*v)),
    *each("Draft.add", [-1, 1, 99], lambda w, v: Draft(3).add(v, 5, 0.0, 0)),
    *each("Decoder", [("ngram", Static([2]), acceptance("match")), (NGram(), "2x2", acceptance("match")),
                      (NGram(), Static([2]), "match"), (None, None, None),
                      (NGram(), Static([2]), acceptance("rejection")),
                      (NGram, Static([2]), acceptance("match"))], lambda w, v: built(w, *v)),
    *each("Decoder.run", [0, -1, 1.5, "3", None, 1j],
          lambda w, v: run(built(w, NoDrafter(), Static([1]), acceptance("match")), [w.seq()], v)),
    *each("Decoder.run of", [[3], ["text"], [None]], lambda w, v: run(w.llm.decoder, v)),
    *each("Decoder.run twice", [2], lambda w, v: run(w.llm.decoder, [w.seq()] * v)),
    *each("Static", [[], [0], [-1], [1.5], ["2"], [2] * 64, [10**9] * 2, [None]], lambda w, v: Static(v)),
    *each("acceptance", ["x", 3, None, "typical:delta=-1"], lambda w, v: acceptance(v)),
    # -- what is taught
    *each("build_tree", [([], 2, 2), ("text", 2, 2), ([1.5], 2, 2), ([120], 2, 2), ([-1], 2, 2), (IDS, 0, 2),
                         (IDS, 2, 0),
                         (IDS, 1.5, 2), (IDS, "2", 2), (IDS, None, 2), (torch.ones(2, 3).long(), 2, 2), (None, 2, 2),
                         (torch.ones(3), 2, 2), ([5] * 320, 2, 2), (IDS, 40, 2), (IDS, True, True)],
          lambda w, v: tokentree.build_tree(v[0], w.model, *v[1:])),
    *each("build_tree model", [None, 3, "name", nn.Linear(2, 2), lambda w: w.encoder],
          lambda w, v: tokentree.build_tree(IDS, made(v, w), 2, 2)),
    *each("create_tree_mask", [None, 3, "ab", [(1,)], [(1, 0)], [(1, -2)], [1], [("a", -1)], [(1.5, -1)], [None], {}],
          lambda w, v: tokentree.create_tree_mask(v)),
    *each("extract_all_paths", [None, 3, [(1, 5)], [(1, -1), (1, -1)]], lambda w, v: tokentree.extract_all_paths(v)),
    *each("path_probability", [([5], [0.5]), ([-1], [0.5]), (["a"], [0.5]), ([0], ["a"]), (None, [0.5]), ([0], None),
                               ([0.5], [0.5]), (3, 4), ([0], torch.ones(2, 2))],
          lambda w, v: tokentree.path_probability(*v)),
    *each("find_best_path", [([], [0.5]), ([(1, -1)], []), ([(1, -1)], None), (None, [1.0])],
          lambda w, v: tokentree.find_best_path(*v)),
    *each("tree_speculative_decode", [{"context": []}, {"context": None}, {"context": [500]}, {"depth": 0},
                                      {"branching": -1}, {"depth": "2"}, {"max_tokens": "9"}, {"max_tokens": None},
                                      {"accept": "x"}, {"accept": None}, {"target_model": 3}, {"draft_model": None},
                                      {"draft_model": "name"}, {"context": [5] * 320, "max_tokens": 400}],
          lambda w, v: tokentree.tree_speculative_decode(
              **{"context": IDS, "target_model": w.model, "draft_model": w.model} | v)),
    *each("build_tree_from_heads", [([], 2), ([torch.ones(4)], 0), ([torch.ones(2, 2)], 2), ([3], 2), (None, 2), (3, 2),
                                    ([torch.ones(4)], 1.5), ([torch.ones(0)], 2), ([torch.ones(4)], None)],
          lambda w, v: tokentree.build_tree_from_heads(*v)),
    *each("MedusaModel", ["", 3, lambda w: w.nowhere, lambda w: w.empty, lambda w: w.file],
          lambda w, v: tokentree.MedusaModel.from_pretrained(w.model, made(v, w))),
    *each("MedusaModel()", [[], None, "text", [1.5], [500], [5, -1]], lambda w, v: w.medusa(v)),
    *each("MedusaModel.verify", [([5], [(500, -1)]), ([5], [(1, 3)]), ([], []), ([5], None), ([5], TokenTree.root(6)),
                                 (None, [])], lambda w, v: w.medusa.verify(*v)),
    *each("medusa_decode", [([], 3), (None, 3), ([5], 0), ([5], "3"), ([500], 3)],
          lambda w, v: tokentree.medusa_decode(v[0], w.medusa, v[1])),
    *each("medusa_decode with", [None, 3, "name"], lambda w, v: tokentree.medusa_decode(IDS, v)),
    *each("generator", [{"drafter": "x"}, {"drafter": []}, {"drafter": 3}, {"shape": "x"}, {"shape": 3}, {"shape": ""},
                        {"accept": "x"}, {"accept": None}, {"seed": -1}, {"seed": "3"}, {"seed": 1.5},
                        {"draft_model": 3}, {"draft_model": ""}, {"heads": 3}, {"heads": lambda w: w.nowhere}],
          lambda w, v: tokentree.generator(**{key: made(one, w) for key, one in v.items()})),
]  # fmt: skip


@pytest.mark.parametrize(("call", "value"), CALLS)
def test_a_wrong_call_gives_a_typed_error_of_one_sentence(
    world: World, call: Callable[[World, Any], Any], value: Any
) -> None:
    with pytest.raises(TokenTreeError) as error:
        call(world, made(value, world))
    said = str(error.value)
    assert said
    assert "\n" not in said
    assert len(said) < 600
    assert not kv_engine(world.llm)._kv


def test_the_sweep_is_wide() -> None:
    assert len(CALLS) > 400


def test_a_wrong_signature_is_a_type_error() -> None:
    calls: list[Callable[[], Any]] = [
        lambda: LLM("model", quantum=True),  # type: ignore[call-arg]
        lambda: SamplingParams(0.5),  # type: ignore[call-arg]
        lambda: tokentree.build_tree(IDS),  # type: ignore[call-arg]
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
