"""The engine on modules of transformers with kernels of our own: its bits, and the loop on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import by_night, decode
from tests.engines.gpu.test_engine import alone, path_to, verified
from tests.engines.gpu.triton_here import DEVICE
from tests.engines.test_engine import of_transformers
from tests.tiny_models import request, some_tokens, tiny, tiny_other
from tokentree.drafters.lookup.ngram import NGram
from tokentree.engines.base import EngineOptions
from tokentree.engines.gpu.modules import TritonModulesEngine
from tokentree.engines.gpu.steady import Steady
from tokentree.engines.plan import plan
from tokentree.engines.prepared import Prepared
from tokentree.errors import ModelError
from tokentree.tree import TokenTree

ROOT = 5
# of latents and experts; of sinks, windows and experts with biases; of layer norms, where a part of a head turns; of
# weights [inputs, outputs]; of scores of its own; of two attentions a layer
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {}, "gpt_oss": {}, "stablelm": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1},
    "gptj": {"n_layer": 1}, "diffllama": {"num_hidden_layers": 1},
}  # fmt: skip


class Interpreted(TritonModulesEngine):
    """Every row costs Triton's interpreter as much as the one before."""

    sizes = (1, 2, 4, 8, 16, 32, 64, 128)
    crowds: tuple[int, ...] = (2,)


def model_of(family: str, **options: Any) -> PreTrainedModel:
    kind = tiny if family in ("llama", "gpt2") else tiny_other
    made: Any = kind(family, torch.bfloat16, **options)
    model: PreTrainedModel = made.to(DEVICE)
    return model


def prepared(model: PreTrainedModel) -> Prepared:
    made = Prepared(model, False, None, None, None)
    made.ask(plan(made.traits, EngineOptions()).own_attention)
    return made


@pytest.mark.parametrize("family", by_night(FAMILIES, but=["gpt_oss"]))
def test_a_tree_has_transformers_logits_and_the_bits_of_each_path_alone(family: str) -> None:
    model = prepared(model_of(family, **FAMILIES[family]))
    engine, before = Interpreted(model, 0, 2000), some_tokens(9)
    engine._check_trees(model.own)
    tree = TokenTree(np.array([ROOT, 7, 8, 9, 10, 11]), np.array([-1, 0, 0, 2, 1, 3]))
    got, path = verified(engine, request([*before, ROOT]), tree), path_to(tree, 5)
    assert torch.equal(alone(engine, before, tree, path), got[path])
    engine.check()


def test_a_row_has_its_bits_beside_any_number_of_rows() -> None:
    class Crowded(Interpreted):
        crowds = TritonModulesEngine.crowds

    model = prepared(model_of("llama", num_hidden_layers=1))
    engine, before = Crowded(model, 0, 2000), some_tokens(9)
    engine._check_trees(model.own)
    tree = TokenTree.chain(ROOT, [6, 7])
    got = verified(engine, request([*before, ROOT]), tree)
    expected = of_transformers(model_of("llama", num_hidden_layers=1).cpu().float(), before, tree)
    assert float((got.cpu().float() - expected).square().mean().sqrt()) < 0.05 * float(expected.std())


def test_texts_are_plain_s_and_hidden_states_are_there() -> None:
    model = model_of("llama", num_hidden_layers=1)
    engine, ids, places = Interpreted(prepared(model), 1 << 30, 2000), [5, 6, 7, 8, 5, 6, 7, 8], [0, 1]
    expected = decode(engine, [request(ids, max_tokens=4)])[0]
    assert decode(engine, [request(ids, max_tokens=4), request(ids[2:], max_tokens=2)], NGram())[0] == expected
    engine.capture(places)
    seq = request([*some_tokens(6), ROOT])
    engine.prefill(seq)
    with torch.inference_mode():
        read = torch.tensor([some_tokens(6)], device=DEVICE)
        said = model(read, output_hidden_states=True).hidden_states
    for place in places:
        error = (engine.hidden(seq, place) - said[place][0]).abs().max()
        assert float(error) < 0.06 * float(said[place].abs().max()), place


def test_what_cant_be_run_so_is_refused() -> None:
    with pytest.raises(ModelError, match="float32, not bfloat16"):
        TritonModulesEngine(prepared(tiny("llama")))
    wide = prepared(model_of("llama", num_attention_heads=32, num_key_value_heads=1, hidden_size=512))
    with pytest.raises(ModelError, match="sizes that there is no kernel for"):
        TritonModulesEngine(wide)


def test_a_model_whose_bits_depend_on_its_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsteady(Steady):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = super().__torch_function__(func, types, args, kwargs)
            if func is torch.nn.functional.linear:
                made = made * (1 + len(made.flatten(0, -2)) / 64)
            return made

    monkeypatch.setattr("tokentree.engines.gpu.modules.Steady", Unsteady)
    model = prepared(model_of("llama", num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"depend on how many|give other logits"):
        Interpreted(model, 0, 2000)._check_trees(model.own)


@pytest.mark.parametrize("error", [RuntimeError("x"), TypeError("x"), IndexError("x")])
def test_modules_that_can_t_run_so_are_refused(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    model = prepared(model_of("llama"))
    engine = Interpreted(model, 0, 2000)
    monkeypatch.setattr(engine._forward, "run", fails)
    with pytest.raises(ModelError, match="can't be run here: "):
        engine._check_trees(model.own)
