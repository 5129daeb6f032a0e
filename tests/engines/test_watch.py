"""What is called is what decodes: whatever was put into a model is run, and what changes in it later is noticed."""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from tests.conftest import all_pairs, by_night, shown
from tests.tiny_models import full_logits, kv_engine, parts_of, request, some_tokens, tiny
from tokentree import LLM, SamplingParams
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.foreign import is_own, same_forward
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.torch import TorchEngine
from tokentree.engines.watch import Shared, Watch
from tokentree.errors import ModelError
from tokentree.hf import TreeGenerator, generator
from tokentree.tree import TokenTree

NEW, PROMPT = 14, some_tokens(11)
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # of which a forward is one compiled call, in bfloat16


def fresh(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny(family, dtype, **(WIDE | options) if family == "llama" else options)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def own_text(model: Any) -> list[int]:
    """What transformers' own loop gives."""
    ids = model.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False)
    return [int(token) for token in ids[0, len(PROMPT) :]]


def text(model: Any, made: TreeGenerator) -> list[int]:
    ids = model.generate(
        input_ids=torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, custom_generate=made
    )  # fmt: skip
    return [int(token) for token in ids[0, len(PROMPT) :]]


def drafting() -> TreeGenerator:
    """With drafts that come true now and then, so that trees are verified."""
    return generator(draft(), shape="2x2")


@functools.cache
def draft() -> PreTrainedModel:
    made: PreTrainedModel = fresh()
    return made


# -- what may be in the way --------------------------------------------------------------------------------------------


def block(model: Any) -> Any:
    return model.model.layers[1]


def hook(pick: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    """A hook on a module, which turns part of what it gives."""

    def after(module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        other = first * torch.linspace(-1, 1.5, first.shape[-1]).to(first.dtype)
        return (other, *output[1:]) if isinstance(output, tuple) else other

    def put(model: Any) -> None:
        pick(model).register_forward_hook(after)

    return put


def pre_hook(model: Any) -> None:
    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return (inputs[0].flip(-1), *inputs[1:]), named

    block(model).mlp.register_forward_pre_hook(before, with_kwargs=True)


def hook_that_knows_its_module(model: Any) -> None:
    names = {module: name for name, module in model.named_modules()}

    def after(module: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
        return -output if names.get(module) == "model.layers.1.mlp" else None

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(after)


def method(model: Any) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x)).flip(-1)  # type: ignore[no-any-return]

    block(model).mlp.forward = types.MethodType(forward, block(model).mlp)


def wrapper(model: Any) -> None:
    def wrapped(old: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: old(*args, **named).flip(-1)

    block(model).forward = wrapped(block(model).forward)


def partial(model: Any) -> None:
    def forward(old: Callable[..., Any], scale: float, *args: Any, **named: Any) -> Any:
        return old(*args, **named) * torch.linspace(-1, scale, WIDE["hidden_size"]).to(model.dtype)

    block(model).forward = functools.partial(forward, block(model).forward, 2.0)


old_forward: Any = None  # of a script


def _by_a_global(*args: Any, **named: Any) -> Any:
    return old_forward(*args, **named).flip(-1)


def by_a_global(model: Any) -> None:
    globals()["old_forward"] = block(model).forward
    block(model).forward = _by_a_global


class Turn(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output.flip(-1)


def by_accelerate(model: Any) -> None:
    add_hook_to_module(block(model), Turn())


def compiled(model: Any) -> None:
    wrapper(model)
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    model.model.layers[0].self_attn.compile(backend="eager")


class OtherMLP(nn.Module):
    """Has the parts of Llama's, and reads the weights of one itself."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            own.gate_proj,
            own.up_proj,
            own.down_proj,
            own.act_fn,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.linear(x, self.gate_proj.weight, self.gate_proj.bias)
        out: torch.Tensor = self.down_proj(self.act_fn(gate) * self.up_proj(x) * 0.5 + gate)
        return out


def other_class(model: Any) -> None:
    block(model).mlp = OtherMLP(block(model).mlp)


def parametrized(model: Any) -> None:
    class Flipped(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.flip(0)

    parametrize.register_parametrization(block(model).mlp.up_proj, "weight", Flipped())


def pruned(model: Any) -> None:
    prune.l1_unstructured(block(model).mlp.up_proj, "weight", 0.7)


def activation(model: Any) -> None:
    class Steep(nn.SiLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(3 * x)

    block(model).mlp.act_fn = Steep()


def more_layers(model: Any) -> None:
    """The model's forward uses as many as its configuration says."""
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


IN_THE_WAY: dict[str, Callable[[Any], None]] = {
    "a block's hook": hook(block),
    "an MLP's hook": hook(lambda model: block(model).mlp),
    "a projection's hook": hook(lambda model: block(model).self_attn.q_proj),
    "the output layer's hook": hook(lambda model: model.lm_head),
    "a norm's hook": hook(lambda model: block(model).input_layernorm),
    "the last norm's hook": hook(lambda model: model.model.norm),
    "the embedding's hook": hook(lambda model: model.model.embed_tokens),
    "an activation's hook": hook(lambda model: block(model).mlp.act_fn),
    "a hook before": pre_hook,
    "a hook that knows its module": hook_that_knows_its_module,
    "a method": method,
    "a wrapper": wrapper,
    "a partial": partial,
    "a global": by_a_global,
    "accelerate's hook": by_accelerate,
    "compiled parts": compiled,
    "another class": other_class,
    "a parametrization": parametrized,
    "pruning": pruned,
    "another activation": activation,
    "more layers than count": more_layers,
}


@pytest.mark.filterwarnings("ignore:.*linear layers of another kind")
@pytest.mark.parametrize("kind", by_night(IN_THE_WAY, but=[*IN_THE_WAY][::4]))
def test_what_was_put_into_a_model_is_run(kind: str) -> None:
    """Before the first call, and after it."""
    model, made = fresh(), drafting()
    unchanged = own_text(model)
    assert text(model, made) == unchanged
    IN_THE_WAY[kind](model)
    expected = own_text(model)
    if kind != "more layers than count":
        assert expected != unchanged
    assert text(model, made) == expected
    assert made._llms[model].engine.info.execution.startswith("tree attention")
    assert text(model, drafting()) == expected
    assert own_text(model) == expected  # the model is left as it was


@pytest.mark.parametrize("kind", by_night(IN_THE_WAY, but=[*IN_THE_WAY][1::3]))
def test_an_engine_refuses_a_model_that_has_changed(kind: str) -> None:
    model = fresh()
    llm = LLM(model, "none")
    before = llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids
    assert before == own_text(model)
    IN_THE_WAY[kind](model)
    with pytest.raises(ModelError, match="has changed since"):
        llm.generate([PROMPT], SamplingParams(max_tokens=NEW))


def said(engine: KVEngine, tokens: list[int]) -> torch.Tensor:
    """float32[7, vocab], after the last tokens of a text."""
    seq = request(tokens[:-6])
    engine.prefill(seq)
    out = engine.verify([seq], [TokenTree.chain(seq.tokens[-1], tokens[-6:])])
    engine.release([seq])
    return out.all_logits.float()


@pytest.mark.filterwarnings("ignore:.*linear layers of another kind")
@pytest.mark.parametrize("kind", by_night(IN_THE_WAY, but=[*IN_THE_WAY][2::3]))
def test_in_bfloat16_it_is_run_too(kind: str) -> None:
    """Where a forward is one compiled call as long as nothing is in the way."""
    model, tokens = fresh(dtype=torch.bfloat16), some_tokens(17)
    assert TorchEngine(model).execution == "one call"
    IN_THE_WAY[kind](model)
    engine = TorchEngine(model)
    assert engine.execution.startswith("tree attention")
    expected = full_logits(model, tokens)[-7:]
    assert float((said(engine, tokens) - expected).square().mean().sqrt()) < 0.04 * float(expected.std())


@pytest.mark.parametrize("pick", [block, lambda model: block(model).mlp.down_proj, lambda model: model.lm_head])
def test_a_small_effect_is_not_taken_for_rounding(pick: Callable[[Any], nn.Module]) -> None:
    """Of less than a tenth of the logits' spread, which is what an engine allows bfloat16 when it is made."""
    model, tokens = fresh(dtype=torch.bfloat16), some_tokens(17)
    plain = full_logits(model, tokens)[-7:]
    noise = float((said(TorchEngine(model), tokens) - plain).square().mean().sqrt())

    def after(module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        other = first * (1 + 0.12 * torch.linspace(-1, 1, first.shape[-1]).to(first.dtype))
        return (other, *output[1:]) if isinstance(output, tuple) else other

    pick(model).register_forward_hook(after)
    expected = full_logits(model, tokens)[-7:]
    effect = float((expected - plain).square().mean().sqrt())
    assert 2 * noise < effect < 0.1 * float(plain.std())
    assert float((said(TorchEngine(model), tokens) - expected).square().mean().sqrt()) < 1.5 * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_class_whose_forward_is_replaced(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, made = fresh(dtype=dtype), some_tokens(17), drafting()
    llm = LLM(model, "none")
    before = text(model, made)
    old = modeling_llama.LlamaMLP.forward

    @functools.wraps(old)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return old(self, x).flip(-1)  # type: ignore[no-any-return, no-untyped-call]

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    assert not is_own(modeling_llama.LlamaMLP)
    with pytest.raises(ModelError, match="has changed since"):
        llm.generate([PROMPT], SamplingParams(max_tokens=NEW))
    if dtype is torch.float32:
        assert text(model, made) == own_text(model) != before
    expected = full_logits(model, tokens)[-7:]
    assert float((said(TorchEngine(model), tokens) - expected).square().mean().sqrt()) < 0.04 * float(expected.std())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_function_that_a_class_calls_is_replaced(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = fresh(dtype=dtype), some_tokens(17)
    llm, old = LLM(model, "none"), modeling_llama.apply_rotary_pos_emb

    def turned(query: torch.Tensor, key: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return old(query.flip(-1), key, *rest, **named)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned)
    with pytest.raises(ModelError, match="has changed since"):
        llm.generate([PROMPT], SamplingParams(max_tokens=NEW))
    expected = full_logits(model, tokens)[-7:]
    assert float((said(TorchEngine(model), tokens) - expected).square().mean().sqrt()) < 0.04 * float(expected.std())


def test_transformers_own_classes_are_known_as_such() -> None:
    class Mine(modeling_llama.LlamaMLP):
        pass

    assert is_own(modeling_llama.LlamaMLP)
    assert is_own(nn.Linear)
    assert is_own(nn.ModuleList)
    assert not is_own(Mine)
    model = fresh()
    assert same_forward(block(fresh("qwen2")).mlp, modeling_llama.LlamaMLP)
    assert not same_forward(OtherMLP(block(model).mlp), modeling_llama.LlamaMLP)
    assert not same_forward(block(model).input_layernorm, modeling_llama.LlamaMLP)


def test_a_hook_for_all_modules_is_refused() -> None:
    model, made = fresh(), drafting()
    llm = LLM(model, "none")
    text(model, made)
    handle = register_module_forward_hook(lambda module, inputs, output: None)
    try:
        for call in (
            lambda: text(model, made),
            lambda: LLM(model),
            lambda: llm.generate([PROMPT], SamplingParams(max_tokens=NEW)),
        ):
            with pytest.raises(ModelError, match="hook for all modules"):
                call()
    finally:
        handle.remove()
    assert text(model, made) == llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids


def test_a_hook_that_is_removed_again() -> None:
    model, made = fresh(), drafting()
    llm, before = LLM(model, "none"), text(model, made)
    handle = block(model).register_forward_hook(lambda module, inputs, output: -output)
    assert text(model, made) == own_text(model) != before
    handle.remove()
    assert text(model, made) == before
    assert llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids == before


def test_hooks_that_only_look_on_may_leave_something_behind() -> None:
    """They change attributes of modules that no module's own code reads."""
    model, seen = fresh(), []

    def after(module: Any, inputs: Any, output: torch.Tensor) -> None:
        module.last, module.calls = output, getattr(module, "calls", 0) + 1
        seen.append(module)

    model.model.layers[0].mlp.register_forward_hook(after)
    llm, made = LLM(model), drafting()
    for _ in range(2):
        assert llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids == own_text(model)
        assert text(model, made) == own_text(model)
    assert {*seen} == {model.model.layers[0].mlp}
    model(input_ids=torch.tensor([PROMPT]), output_hidden_states=True)  # transformers leaves hooks of its own
    assert llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids == own_text(model)


def test_forwards_that_can_t_be_copied_are_refused() -> None:
    class Forward:
        def __init__(self, module: Any) -> None:
            self.module = module

        def __call__(self, x: torch.Tensor) -> Any:
            return self.module.down_proj(self.module.up_proj(x))

    model = fresh()
    block(model).mlp.forward = Forward(block(model).mlp)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.forward is a Forward that holds modules of the model"):
        LLM(model)


def test_a_forward_that_changes_the_weights_is_refused() -> None:
    model = fresh()

    def before(module: Any, inputs: Any) -> None:
        module.up_proj.weight.data.mul_(1.01)

    block(model).mlp.register_forward_pre_hook(before)
    with pytest.raises(ModelError, match="is changed by its own forward"):
        LLM(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_that_knows_rows_by_their_place_is_refused(dtype: torch.dtype) -> None:
    """Where its effect is larger than what an engine allows when it is made."""

    def last_alone(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :-1], -3 * output[:, -1:]], 1)

    model = fresh(dtype=dtype)
    block(model).register_forward_hook(last_alone)
    with pytest.raises(ModelError, match="see a tree's rows, which are in no order"):
        LLM(model)

    def one_text(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        raise IndexError("too many rows")

    model = fresh(dtype=dtype)
    block(model).register_forward_hook(one_text)
    with pytest.raises(ModelError, match="fail on the rows of a tree: IndexError: too many rows"):
        LLM(model)


def test_adapters_by_the_row_are_refused() -> None:
    with pytest.raises(ModelError, match="can't read a text alone: Length of `adapter_names`"):
        adapted().generate(
            input_ids=torch.tensor([PROMPT] * 2),
            max_new_tokens=3,
            adapter_names=["first", "second"],
            custom_generate=drafting(),
        )


def test_an_attention_of_one_s_own_is_refused() -> None:
    def mine(*args: Any, **named: Any) -> Any:
        return sdpa_attention_forward(*args, **named)

    AttentionInterface.register("mine", mine)
    model = fresh()
    llm = LLM(model, "none")
    model.set_attn_implementation("mine")
    with pytest.raises(ModelError, match="has changed since"):
        llm.generate([PROMPT], SamplingParams(max_tokens=NEW))
    with pytest.raises(ModelError, match="registered as 'mine'"):
        LLM(model)


def test_what_is_around_a_model_is_taken_off() -> None:
    model = fresh()
    expected = own_text(model)
    wrapped: list[Any] = [torch.compile(model, backend="eager"), peft.get_peft_model(fresh(), lora())]
    for around in wrapped:
        assert LLM(around).generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids == expected
    with pytest.raises(ModelError, match="a Linear is not a transformers model"):
        LLM(nn.Linear(2, 2))  # type: ignore[arg-type]


# -- adapters ----------------------------------------------------------------------------------------------------------


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"], task_type="CAUSAL_LM", **options)


def adapted(dtype: torch.dtype = torch.float32) -> Any:
    """A model with two adapters, the first of them active, that change much."""
    model = peft.get_peft_model(fresh(dtype=dtype), lora(), "first")
    model.add_adapter("second", lora())
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():  # all of it, as peft takes its numbers from torch's one generator
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=noise) * (0.3 if "lora_B" in name else 0.07))
    return model.eval()


def scaled(model: Any, scale: float) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("second", scale)


def test_adapters_are_followed() -> None:
    """Two, switched, disabled, scaled, merged, added to the weights, and taken out."""
    model, made, texts = adapted(), drafting(), []

    def check() -> None:
        texts.append(own_text(model))
        assert text(model, made) == texts[-1]

    check()
    llm, params = LLM(model, "none"), SamplingParams(max_tokens=NEW, ignore_eos=True)  # as transformers goes on here
    assert llm.generate([PROMPT], params)[0].token_ids == texts[-1]
    model.set_adapter("second")
    with pytest.raises(ModelError, match="has changed since"):
        llm.generate([PROMPT], SamplingParams(max_tokens=NEW))
    check()
    scaled(model, 3.0)
    check()
    with model.disable_adapter():
        check()
    check()
    model.set_adapter("first")
    check()
    model.merge_adapter()
    check()
    with model.disable_adapter(), pytest.raises(ModelError, match="merged and disabled at once"):
        LLM(model)
    model.unmerge_adapter()
    check()
    scaled(model, 1.0)
    model.add_weighted_adapter(["first", "second"], [1.0, -2.0], "both", combination_type="linear")
    model.set_adapter("both")
    check()
    inner = model.merge_and_unload()
    assert text(inner, made) == own_text(inner) == texts[-1]
    assert len({tuple(one) for one in texts}) >= 5


def test_an_adapter_added_after_the_first_call() -> None:
    inner, made = fresh(), drafting()
    before = text(inner, made)
    model = peft.get_peft_model(inner, lora(init_lora_weights=False))
    assert text(model, made) == own_text(model) != before


def test_an_adapter_in_bfloat16() -> None:
    model, tokens = adapted(torch.bfloat16), some_tokens(17)
    expected = full_logits(model, tokens)[-7:]
    engine = TorchEngine(model)
    assert float((said(engine, tokens) - expected).square().mean().sqrt()) < 0.04 * float(expected.std())
    packed = [module for module in parts_of(engine) if isinstance(module, PackedLinear)]
    assert len(packed) >= 10  # what has no adapter is as fast as ever


def test_prompts_that_peft_puts_in_front_are_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = peft.get_peft_model(fresh(), config).eval()
    with pytest.raises(ModelError, match="in front of a text"):
        LLM(model)
    with pytest.raises(ModelError, match="prepare_inputs_for_generation"):
        text(model, drafting())


# -- weights and modules -----------------------------------------------------------------------------------------------


def by_an_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(input_ids=torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    optimizer.step()


def turned(weight: torch.Tensor) -> torch.Tensor:
    return weight * torch.linspace(-1, 1.5, weight.shape[-1]).to(weight.dtype)


def in_place(model: Any) -> None:
    with torch.no_grad():
        block(model).mlp.up_proj.weight.mul_(-1)


def past_torch(model: Any) -> None:
    block(model).mlp.up_proj.weight.data.mul_(-1)


def one_value(model: Any) -> None:
    """Past what torch counts, and between the values that are looked at in each step."""
    model.lm_head.weight.data[7, 3] += 300


def two_rows_exchanged(model: Any) -> None:
    table = model.model.embed_tokens.weight.data
    table[[PROMPT[0], PROMPT[1]]] = table[[PROMPT[1], PROMPT[0]]]


def by_numpy(model: Any) -> None:
    bits = model.model.norm.weight.detach().view(torch.uint8).numpy()
    bits[model.dtype.itemsize - 1 :: model.dtype.itemsize] ^= 128  # the sign


def other_data(model: Any) -> None:
    weight = model.model.embed_tokens.weight
    weight.data = turned(weight.data)


def other_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(turned(model.lm_head.weight.detach()))


def loaded(model: Any) -> None:
    model.load_state_dict({name: turned(value) for name, value in model.state_dict().items()})


def other_module(model: Any) -> None:
    block(model).mlp = copy.deepcopy(model.model.layers[0].mlp)


def one_layer_less(model: Any) -> None:
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def layers_exchanged(model: Any) -> None:
    model.model.layers[0].mlp, model.model.layers[1].mlp = model.model.layers[1].mlp, model.model.layers[0].mlp


def more_tokens(model: Any) -> None:
    model.resize_token_embeddings(150, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[130] = 3 * model.lm_head.weight[:120].amax(0)


def buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(3)


def attribute(model: Any) -> None:
    block(model).self_attn.scaling *= 9


def epsilon(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 5.0


CHANGES: list[Callable[[Any], None]] = [
    by_an_optimizer, in_place, past_torch, by_numpy, other_data, other_parameter, loaded, other_module, one_layer_less,
    layers_exchanged, more_tokens, buffer, attribute, epsilon, one_value, two_rows_exchanged,
]  # fmt: skip


@pytest.mark.parametrize("change", by_night(CHANGES, but=CHANGES[::2]))
def test_a_generator_follows_a_model_that_changes(change: Callable[[Any], None]) -> None:
    model, made = fresh(), drafting()
    before = text(model, made)
    change(model)
    expected = own_text(model)
    assert expected != before
    assert text(model, made) == expected


def test_a_generator_follows_a_draft_model_that_changes() -> None:
    model, small = fresh(), fresh()
    made = generator(small, shape="2x2")
    expected = text(model, made)
    assert made.metrics[0].acceptance_rate == 1
    past_torch(small)
    assert text(model, made) == expected
    assert made.metrics[0].acceptance_rate < 1


BOTH = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("change", "dtype"), all_pairs([*CHANGES, "half", "float", "double", "freed", "meta"], BOTH), ids=shown
)
def test_llm_refuses_a_model_that_has_changed(change: Any, dtype: torch.dtype) -> None:
    model = fresh(dtype=dtype)
    llm = LLM(model, "none")
    expected = llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids
    if change == "freed":  # then nobody can have changed it
        del model
        gc.collect()
        rubbish = [torch.full((120, 64), 7.0).to(dtype) for _ in range(50)]
        assert llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids == expected
        del rubbish
        return
    if change == "meta":
        model.to("meta")
    elif isinstance(change, str):
        getattr(model, change)()
        if {"float": torch.float32}.get(change) is dtype:
            return
    else:
        change(model)
    with pytest.raises(ModelError, match=r"has changed since it was given \(.*\): make a new LLM of it"):
        llm.generate([PROMPT], SamplingParams(max_tokens=NEW))


def test_a_draft_model_that_has_changed_is_refused() -> None:
    small = fresh()
    llm = LLM(fresh(), draft_model=small)
    past_torch(small)
    with pytest.raises(ModelError, match="has changed since"):
        llm.generate([PROMPT], SamplingParams(max_tokens=NEW))


SHARED = [other_data, in_place, past_torch, by_numpy, loaded, by_an_optimizer, epsilon, one_layer_less]


@pytest.mark.parametrize(
    ("change", "kind"),
    all_pairs(
        [*SHARED, wrapper, IN_THE_WAY["a block's hook"], "half", "float", "meta"],
        [(torch.float32, "sdpa"), (torch.float32, None), (torch.bfloat16, None)],
    ),
    ids=shown,
)
def test_a_change_while_a_text_is_decoded(change: Any, kind: tuple[torch.dtype, str | None]) -> None:
    """The text of before, or a refusal."""
    dtype, attention = kind
    model = fresh(dtype=dtype)
    llm = LLM(model, "ngram", attention=attention)
    expected = llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=NEW))
    pieces = iter(stream)
    next(pieces)
    if change == "meta":
        model.to("meta")
    elif isinstance(change, str):
        getattr(model, change)()
    else:
        change(model)
    try:
        rest = list(pieces)
    except ModelError as error:
        assert "were changed while a text was decoded" in str(error)  # noqa: PT017
    else:
        assert rest
        assert stream.result.token_ids == expected


def test_a_text_that_begins_beside_others_sees_a_change_of_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """So nobody who leaves a stream open keeps a change from being noticed. Such looks have a part of the time."""
    model = fresh()
    llm = LLM(model, "ngram")
    monkeypatch.setattr("tokentree.engines.guard.PAUSE", 1e9)
    pieces = iter(llm.stream(PROMPT, SamplingParams(max_tokens=NEW)))
    next(pieces)
    model.lm_head.weight.data[7, 3] += 300
    llm.generate([PROMPT], SamplingParams(max_tokens=1))  # too soon behind the last look
    monkeypatch.setattr("tokentree.engines.guard.time.perf_counter", lambda: 1e12)
    with pytest.raises(ModelError, match="has changed since it was given"):
        llm.generate([PROMPT], SamplingParams(max_tokens=1))
    list(pieces)


def noted(calls: list[str], name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, **options: Any) -> Any:
        calls.append(name)
        return own(self, **options)

    return call


def test_a_model_is_looked_at_once_for_all_prompts_that_begin_together(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, looks = LLM(fresh(), "ngram"), list[str]()
    for kind, name in ((Watch, "change"), (Shared, "changed")):
        monkeypatch.setattr(kind, name, noted(looks, name, getattr(kind, name)))
    results = llm.generate([[5] * 290, [6] * 280, [7, 8]], SamplingParams(max_tokens=4))
    assert looks.count("change") == 1
    assert looks.count("changed") <= sum(len(one.token_ids) for one in results)  # one a step, none for a prompt
    llm.generate([[7, 8]], SamplingParams(max_tokens=2))
    assert looks.count("change") == 2


def test_running_the_model_itself_is_no_change() -> None:
    model = fresh()
    llm = LLM(model, "none")
    own_text(model)
    model.generation_config.max_length = 50
    model.train()
    model.gradient_checkpointing_enable()
    model(input_ids=torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    model.zero_grad()
    model.requires_grad_(False)
    model.set_attn_implementation("eager")
    assert kv_engine(llm).changed() is None
    model.eval().gradient_checkpointing_disable()
    assert llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids == own_text(model)


def a_module_that_drops(model: Any) -> None:
    block(model).mlp = nn.Sequential(block(model).mlp, nn.Dropout(0.5))


def attention_that_drops(model: Any) -> None:
    block(model).self_attn.attention_dropout = 0.5
    model.train()


@pytest.mark.parametrize("change", [a_module_that_drops, attention_that_drops])
def test_a_model_that_drops_values_at_random_is_refused(change: Callable[[Any], None]) -> None:
    model = fresh()
    change(model)
    with pytest.raises(ModelError, match=r"is in training mode, and its .* is 0\.5; call model\.eval"):
        LLM(model, "none")
    with pytest.raises(ModelError, match="is in training mode"):
        text(model, drafting())
    model.eval()
    llm = LLM(model, "none")
    assert llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids == own_text(model)
    model.train()
    with pytest.raises(ModelError, match=r"has changed since it was given \(.* is in training mode"):
        llm.generate([PROMPT], SamplingParams(max_tokens=NEW))


def test_what_an_engine_reads_stays_where_it_is() -> None:
    """Compiled calls keep addresses."""
    model = fresh(dtype=torch.bfloat16)
    engine = TorchEngine(model)
    tensors = [tensor for part in parts_of(engine) for tensor in (*part.parameters(), *part.buffers())]
    assert len(tensors) > 4
    before = [(tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors]
    model.float()
    model.to("meta")
    assert [(tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors] == before


def test_what_changed_is_named() -> None:
    def told(change: Callable[[Any], None]) -> str:
        model = fresh()
        watch = Watch(model)
        assert watch.change() is None
        change(model)
        return str(watch.change())

    assert told(attribute) == "model.layers.1.self_attn is not as it was"
    assert told(in_place) == "model.layers.1.mlp.up_proj is not as it was"
    assert told(past_torch) == "weights of LlamaForCausalLM have other values"
    assert told(lambda model: setattr(model.config, "hidden_act", "gelu")) == (
        "the configuration of LlamaForCausalLM is not as it was"
    )
    assert told(one_layer_less) == "it has fewer modules"


def test_neither_a_model_nor_its_weights_are_kept() -> None:
    model = fresh(dtype=torch.bfloat16)
    llm = LLM(model, "none")
    gone = [weakref.ref(model), weakref.ref(block(model).mlp.up_proj)]
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert len(llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids) == NEW
