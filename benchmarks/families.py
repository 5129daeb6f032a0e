"""Which families of transformers have this library's own attention on a CPU, which attend by themselves, which are
refused, and why: a tiny model of each, with random weights, in float32 and bfloat16.

    python benchmarks/families.py --out families.json
    python benchmarks/families.py --only gpt_oss,falcon
    TRITON_INTERPRET=1 python benchmarks/families.py --kernels --out kernels.json

For each that can be decoded it says how many of some texts, decoded with trees, differ from plain decoding's, how far
logits are off transformers', and whether greedy ids are those of ``generate``. With ``--kernels`` it says which have
the kernels of GPUs in their modules, in Triton's interpreter and bfloat16. `benchmarks/families_page.py` makes a page
of the manual of what a run found.

A run takes half an hour on one core. ``--part 1/2`` and ``--part 2/2`` share it between two. One family (Inkling) takes
scipy to be made.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

KERNELS = "--kernels"
TIMEOUT = 300  # seconds for one family
TREE, ROUNDS = 8, 9  # nodes and forwards of each kind whose time is taken
CACHES = ("past_key_values", "cache_params", "state")  # what forwards keep is in, and is given back as
MOST = 150_000_000  # parameters of a model that is still tiny
VOCAB, CONTEXT, SEED = 160, 512, 0
SEEN = 0.1  # of the spread of logits: more isn't the leak of a mask
FAR = 1e-3  # of the spread of logits: more is another model

# what a tiny configuration has, by the names that families have for it
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
FEW, MORE = 2, 10  # layers; more where kinds of layers follow a longer pattern
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_hidden_size"), 64),
    **dict.fromkeys(LAYERS, FEW),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "global_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), CONTEXT),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 7),
    **dict.fromkeys(("image_size", "patch_size"), 14),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "adapter_in_dim"), 64),  # what comes to the language model
    "vocab_size_per_layer_input": VOCAB,
    "index_topk": 16,  # less than texts here have
}
# what families need, and have none of by themselves
WANTED: dict[str, Any] = {
    **{name: SIZES[name] for name in ("n_routed_experts", "num_experts_per_tok", "num_experts", "top_k_experts")},
    **{name: SIZES[name] for name in ("moe_intermediate_size", "sliding_window", "head_dim")},
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_compress_ratio": 4},
    **{"n_shared_experts": 1, "deepstack_layer_map": [], "downsample_rate": "1/2", "vocabulary_map": {"<image>": 3}},
    "clip_qkv": 8.0,
    "indexer_budget": 2 * CONTEXT,
    "mlp_layer_types": ["dense", "sparse"],
}
# what they have, and isn't a size
OTHERWISE: dict[str, Any] = {"axial_pos_embds_dim": [32, 32], "num_kv_shared_layers": 5, "qk_dim_factor": 1.0}
BY_KIND = ("cohere_compass_text",)  # whose rotary positions are told by kinds of layers
MISSING = {"rope_theta": 10_000.0}  # what models read of a configuration that has none
INPUTS = ("pixel_values", "flattened_patches", "image_embeds", "Bbox")  # in errors of models that take more than text
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id")


# families that no rule of `no_decoder` finds, and what they do
NO_DECODERS = {
    "diffusion_gemma": "denoises blocks of tokens",
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts from another model's keys and values"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "writes codes of sounds"),
    "xlm": "writes each token in the place of a mask",
    "xlnet": "writes each token in a place that others see",
}

# settings that some families need beside these
MROPE = {
    **dict.fromkeys(("glm_ocr", "glm4v", "glm46v", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker"), (2, 3, 3)),
    **dict.fromkeys(("hunyuan_vl", "qwen2_5_vl", "qwen2_vl"), (2, 3, 3)),
    "ernie4_5_vl_moe": (3, 3, 2),
    "glm4v_moe": (1, 1, 2),
}


@dataclass(frozen=True)
class Found:
    """What became of a family in one type.

    Args:
        family, model, dtype: whose model it is, its class, its type.
        kind: ``own``, ``by itself``, ``refused``, ``FAULT``; ``no decoder``: it doesn't write text from text alone,
            left to right; or ``not built``: no tiny model could be made here.
        reason: why, in one sentence.
        differing: of the texts decoded with trees, those that differ from plain decoding's.
        texts: decoded.
        form: of the forward, in words.
        error: how far logits are off transformers', where they spread by 1, in float32.
        ids: "same" if greedy ids are those of ``generate``, "forward's" if only a forward over the whole text tells
            them, or "other"; "" if it wasn't asked.
        row, tree, theirs: milliseconds of a row, of a tree of `TREE` nodes, and of a row in transformers' own forward
            with its own cache; 0 if it wasn't measured.
    """

    family: str
    model: str
    dtype: str
    kind: str
    reason: str = ""
    differing: int = 0
    texts: int = 0
    form: str = ""
    error: float = 0.0
    ids: str = ""
    row: float = 0.0
    tree: float = 0.0
    theirs: float = 0.0

    @property
    def right(self) -> bool:
        """Whether it was decoded, and as transformers does."""
        exact = self.kind == "by itself" or not self.differing or bool(self.reason)
        return self.kind in ("own", "by itself") and exact and self.error < FAR and self.ids != "other"


def families() -> dict[str, str]:
    """Model classes by the name of their configuration: all that write text, without pictures or with them."""
    from transformers.models.auto import modeling_auto as auto

    return dict(
        sorted((auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).items())
    )


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration's settings with tiny sizes, at any depth."""
    layers = SIZES["num_hidden_layers"]
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "per_layer_config":
            continue  # made of the other settings
        if isinstance(value, dict) and name.endswith("config"):
            small[name] = shrunk(value)
        elif name in TOKENS:
            small[name] = value if value is None else TOKENS.index(name) % 3
        elif name.endswith("_token_id") or name.endswith("_token_index"):
            small[name] = value if value is None else 3
        elif name == "mrope_section" and isinstance(value, list):
            small[name] = [2, 3, 3]
        elif name == "rope_parameters" and isinstance(value, dict):
            small[name] = shrunk(value)
        elif type(value) is not int or name not in SIZES:
            small[name] = SIZES["head_dim"] if name == "head_dim" and value is None else value
        else:
            small[name] = SIZES[name]
        many = settings.get("num_hidden_layers") or settings.get("n_layer") or settings.get("num_layers")
        if isinstance(value, list) and many and len(value) == many:
            kinds = list(dict.fromkeys(map(json.dumps, value)))
            small[name] = [json.loads(kinds[min(at, len(kinds) - 1)]) for at in range(layers)]
    if "qk_rope_head_dim" in small:  # latents are expanded to as many heads as there are
        small |= {name: small["qk_rope_head_dim"] for name in ("head_dim",) if small.get(name)}
        small |= {name: 4 for name in ("num_key_value_heads",) if small.get(name)}
    return small


def build(family: str, name: str) -> Any:
    """A tiny model of a family, made in the first of these ways that gives one that reads text: with its own settings,
    sizes apart; as tests have it; with sizes alone, and what its configuration makes of them, of a few layers and of
    more."""
    from tests.hybrids import HYBRIDS, tiny_hybrid
    from tests.tiny_models import OTHERS, tiny_other

    ways: list[Callable[[], Any]] = [partial(_model, family, name, _shrunk)]
    ways += [partial(tests, family) for tests, has in ((tiny_other, OTHERS), (tiny_hybrid, HYBRIDS)) if family in has]
    ways += [partial(_model, family, name, partial(_sized, layers=layers)) for layers in (FEW, MORE)]
    failed: Exception | None = None
    for way in ways:
        try:
            return way()
        except Exception as error:  # noqa: BLE001 - other people's constructors raise anything
            failed = failed or error
    assert failed is not None
    raise failed


def _shrunk(config: Any) -> dict[str, Any]:
    return shrunk(config.to_dict())


def _sized(config: Any, layers: int) -> dict[str, Any]:
    """The sizes that a configuration takes, tiny ones; and those of the configurations in it."""
    from transformers import PreTrainedConfig

    small: dict[str, Any] = {}
    config.allow_global_per_layer_attribute_access = True
    for name in type(config).__dataclass_fields__:
        value = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            small[name] = {"model_type": value.model_type, **_sized(value, layers)}
        elif name in TOKENS and value is not None:
            small[name] = TOKENS.index(name) % 3
        elif type(value) is int and name in SIZES:
            small[name] = min(value, layers if name in LAYERS else SIZES[name])
        elif value is None and name in WANTED:
            small[name] = WANTED[name]
        elif name in OTHERWISE:
            small[name] = OTHERWISE[name]
        elif name.endswith("feature_layer") and isinstance(value, list | tuple):
            small[name] = [max(0, layers - 1 - place) for place, _ in enumerate(value)]
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and heads == shared:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _model(family: str, name: str, settings: Callable[[Any], dict[str, Any]]) -> Any:
    import torch
    import transformers
    from tests.tiny_models import randomised
    from transformers import CONFIG_MAPPING

    kind = getattr(transformers, name)
    made = CONFIG_MAPPING[family]()
    inner = made.get_text_config(decoder=True)
    if kind.config_class is type(inner):  # the class is that of the language model in it
        made = inner
    config = type(made)(**{key: value for key, value in settings(made).items() if key != "model_type"})
    for part in _parts(config):
        part.use_cache = True
        if getattr(part, "is_decoder", None) is False:
            part.is_decoder = True  # or it would be an encoder
        for missing in set(MISSING) - set(vars(part)):
            setattr(part, missing, MISSING[missing])
        _without_timm(part)
        _with_ropes(part)
        rope = getattr(part, "rope_parameters", None) or {}
        if rope and family in MROPE:
            rope["mrope_section"] = list(MROPE[family])
        for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
            if each.get("rope_type") in ("yarn", "longrope", "llama3", "linear", "dynamic", "proportional"):
                each.update(rope_type="default")
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind(config).parameters())
    if size > MOST:
        raise MemoryError(f"{size:,} parameters are too many")
    torch.manual_seed(SEED)
    model: Any = randomised(kind(config), SEED)
    if hasattr(model, "set_default_language"):
        model.set_default_language(model.config.languages[0])
    model(input_ids=torch.arange(20, 30)[None])
    return model


def _without_timm(config: Any) -> None:
    """Exchanges vision models of another library, which text doesn't touch, for one of transformers."""
    from transformers import CLIPVisionConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for name, value in list(vars(config).items()):
        if MODEL_MAPPING_NAMES.get(getattr(value, "model_type", "")) == "TimmWrapperModel":
            other = CLIPVisionConfig(**shrunk(CLIPVisionConfig().to_dict()))
            for key in set(vars(value)) - set(vars(other)):
                setattr(other, key, getattr(value, key))
            other.model_args = {"embed_dim": other.hidden_size}
            vars(config)[name] = other


def _with_ropes(config: Any) -> None:
    """Rotary positions for each kind of layer, where a model looks for them there and its configuration has one."""
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10_000.0}
    if config.model_type in BY_KIND and "rope_theta" in rope:
        config.rope_parameters = {kind: dict(rope) for kind in set(config.layer_types)}


def _parts(config: Any) -> Iterator[Any]:
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def no_decoder(family: str, name: str) -> str:
    """Why a family doesn't write text from text alone, left to right; "" if it may."""
    import transformers
    from transformers import CONFIG_MAPPING

    if family in NO_DECODERS:
        return NO_DECODERS[family]
    taken = inspect.signature(getattr(transformers, name).forward).parameters.values()
    needed = [one.name for one in taken if one.default is one.empty and one.name != "self" and one.kind in POSITIONAL]
    if needed:
        return "takes more than text"
    encodes = getattr(CONFIG_MAPPING[family](), "is_encoder_decoder", False)
    return "reads with an encoder what a decoder writes of" if encodes and not name.endswith("ForCausalLM") else ""


def sees_behind(model: Any) -> bool:
    """Whether tokens of a model see those behind them."""
    import torch

    texts = torch.tensor([[*range(20, 24), *rest] for rest in (range(24, 30), range(40, 46))])
    with torch.inference_mode():
        one, other = (model.float()(input_ids=text[None], use_cache=False).logits[0, :4] for text in texts)
    return float((one - other).abs().max()) > SEEN * float(one.std())


def tried(family: str, name: str) -> Iterator[Found]:  # noqa: PLR0915 - one after another
    """What becomes of a family, in each type."""
    import torch
    from tests.tiny_models import full_logits, request, some_tokens, some_tree

    from tokentree.engines.torch import TorchEngine
    from tokentree.errors import ModelError
    from tokentree.tree import TokenTree

    torch.set_num_threads(1)
    reason = no_decoder(family, name)
    for dtype in (torch.float32, torch.bfloat16):
        about = (family, name, str(dtype).removeprefix("torch."))
        if reason:
            yield Found(*about, "no decoder", reason)
            continue
        try:
            model = build(family, name).to(dtype).eval()
        except Exception as error:  # noqa: BLE001 - other people's constructors raise anything
            asks = any(word in str(error) for word in INPUTS)
            yield Found(*about, *(("no decoder", "takes more than text") if asks else ("not built", _line(error))))
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine = TorchEngine(model)
        except ModelError as error:
            if sees_behind(model):
                yield Found(*about, "no decoder", "tokens see those behind them")
            else:
                yield Found(*about, "refused", _line(error))
            continue
        except Exception as error:  # noqa: BLE001 - what isn't a ModelError is a fault of ours, and listed
            yield Found(*about, "FAULT", _line(error))
            continue
        differing, texts, off = 0, 0, 0.0
        for seed in range(3):
            tokens = some_tokens(40, seed)
            tree = some_tree(tokens[-1], 24, seed)
            whole, alone = request(tokens), request(tokens)
            engine.prefill(whole)
            engine.prefill(alone)
            out = engine.verify([whole], [tree])
            path = tree.path(int(tree.leaves[-1]))
            same = True
            for node in path:
                row = engine.verify([alone], [TokenTree.root(int(tree.tokens[node]))]).logits(0, 0)
                engine.commit([alone], [[0]])
                same &= torch.equal(row, out.logits(0, node))
            if dtype is torch.float32:
                own = full_logits(model, [*tokens[:-1], *tree.tokens[path].tolist()])[len(tokens) - 1 :]
                off = max(off, float((out.rows(0, path) - own).abs().max() / own.std()))
            engine.release([whole, alone])
            texts, differing = texts + 1, differing + (not same)
        kind = "own" if engine.attention == "tree" else "by itself"
        ids = _ids(model) if dtype is torch.float32 else ""
        form = FORMS[type(engine).__name__]
        yield Found(*about, kind, engine.caveat, differing, texts, form, off, ids, *_costs(engine, model))


FORMS = {
    "ProgramEngine": "one compiled call",
    "ModulesEngine": "own attention",
    "SelfAttendingEngine": "the model's attention",
}


def _ids(model: Any) -> str:
    """See `Found.ids`."""
    import torch
    from tests.tiny_models import full_logits, some_tokens

    from tokentree.hf import generator

    prompt = torch.tensor([some_tokens(24, SEED)])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0, "encoder_no_repeat_ngram_size": None}
    try:
        expected = model.generate(prompt, **options)
    except Exception:  # noqa: BLE001 - other people's models raise anything
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model.generate(prompt, **options, custom_generate=generator())
    if got.tolist() == expected.tolist():
        return "same"
    text = got[0].tolist()
    return "forward's" if full_logits(model, text[:-1]).argmax(-1)[23:].tolist() == text[24:] else "other"


def _costs(engine: Any, model: Any) -> tuple[float, float, float]:
    """See `Found.row`: the medians of `ROUNDS` forwards each, in turns, behind 40 tokens."""
    from tests.tiny_models import request, some_tokens, some_tree

    from tokentree.tree import TokenTree

    tokens = some_tokens(40, SEED)
    seq, one, tree = request(tokens), TokenTree.root(tokens[-1]), some_tree(tokens[-1], TREE, SEED)
    engine.prefill(seq)
    forwards: list[Callable[[], object]] = [lambda: engine.verify([seq], [one]), lambda: engine.verify([seq], [tree])]
    if step := _their_step(model, tokens):
        forwards.append(step)
    times: list[list[float]] = [[] for _ in forwards]
    for _ in range(ROUNDS):
        for forward, spent in zip(forwards, times, strict=True):
            started = time.perf_counter()
            forward()
            spent.append(1e3 * (time.perf_counter() - started))
    engine.release([seq])
    row, bush, *theirs = map(statistics.median, times)
    return row, bush, theirs[0] if theirs else 0.0


def _their_step(model: Any, tokens: list[int]) -> Callable[[], object] | None:
    """transformers' own forward of one more token behind ``tokens``; None where it keeps nothing between forwards."""
    import torch

    @torch.inference_mode()
    def step(ids: list[int], **kept: Any) -> Any:
        return model(input_ids=torch.tensor([ids]), use_cache=True, **kept)

    try:
        out = step(tokens[:-1])
        kept = {name: out[name] for name in CACHES if out.get(name) is not None}
        if not kept:
            return None
        step(tokens[-1:], **kept)
    except Exception:  # noqa: BLE001 - other people's models raise anything
        return None
    return partial(step, tokens[-1:], **kept)


def tried_on_kernels(family: str, name: str) -> Iterator[Found]:
    """What becomes of a family on the kernels of GPUs."""
    import torch
    from tests.tiny_models import request, some_tokens, some_tree

    from tokentree.engines.base import EngineOptions
    from tokentree.engines.gpu.modules import TritonModulesEngine
    from tokentree.engines.plan import plan
    from tokentree.engines.prepared import Prepared
    from tokentree.errors import ModelError
    from tokentree.tree import TokenTree

    class Interpreted(TritonModulesEngine):
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        crowds = (1, 9)

    torch.set_num_threads(1)
    about = (family, name, "bfloat16")
    try:
        model = build(family, name).to(torch.bfloat16).eval()
    except Exception as error:  # noqa: BLE001 - other people's constructors raise anything
        yield Found(*about, "not built", _line(error))
        return
    try:
        prepared = Prepared(model, False, None, None, None)
        prepared.ask(plan(prepared.traits, EngineOptions()).own_attention)
        engine = Interpreted(prepared, 0, 2000)
        engine._check_trees(prepared.own)
        tokens = some_tokens(12)
        tree, seq, differing = some_tree(tokens[-1], 8), request(tokens), False
        engine.prefill(seq)
        logits = engine.verify([seq], [tree]).all_logits.clone()
        for node in tree.path(int(tree.leaves[-1])):
            alone = engine.verify([seq], [TokenTree.root(int(tree.tokens[node]))]).all_logits[0]
            engine.commit([seq], [[0]])
            differing |= not torch.equal(alone, logits[node])
    except ModelError as error:
        yield Found(*about, "refused", _line(error))
    except Exception as error:  # noqa: BLE001 - what isn't a ModelError is a fault of ours, and listed
        yield Found(*about, "FAULT", _line(error))
    else:
        yield Found(*about, "own", "", int(differing), 1)


def apart(family: str, name: str) -> list[Found]:
    """`tried` in a process of its own: one that crashes or hangs is a finding."""
    fork = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[Found] = fork.SimpleQueue()
    process = fork.Process(target=_tell, args=(family, name, results))
    process.start()
    process.join(TIMEOUT)
    if hung := process.is_alive():
        process.kill()
        process.join()
    found = []
    while not results.empty():
        found.append(results.get())
    if len(found) < (1 if KERNELS in sys.argv else 2):
        status = f"took more than {TIMEOUT} s" if hung else f"ended with status {process.exitcode}"
        found.append(Found(family, name, "", "FAULT", status))
    return found


def _tell(family: str, name: str, results: multiprocessing.SimpleQueue[Found]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for found in (tried_on_kernels if KERNELS in sys.argv else tried)(family, name):
        results.put(found)


def _line(error: BaseException) -> str:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words.removeprefix("ModelError: ")[:220]


def table(found: list[Found]) -> str:
    """All of it as Markdown."""
    columns = ["family", "model", "type", "attention", "paths that differ from plain", "reason"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in found:
        paths = f"{one.differing} of {one.texts}" if one.texts else ""
        lines.append(f"| {one.family} | {one.model} | {one.dtype} | {one.kind} | {paths} | {one.reason} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="these families, with commas between them")
    parser.add_argument(KERNELS, action="store_true", help="only whether the kernels of GPUs run them")
    parser.add_argument("--out", type=Path, help="write what was found as JSON, and as Markdown beside it")
    parser.add_argument("--part", default="1/1", help="2/3: the second third of all families")
    asked = parser.parse_args()
    known = families()
    part, parts = map(int, asked.part.split("/"))
    names = (asked.only.split(",") if asked.only else list(known))[part - 1 :: parts]
    results = []
    import tokentree.engines.torch  # noqa: F401 - once for all processes

    for family in track(names, description="families"):
        results += apart(family, known[family])
        if asked.out:
            asked.out.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
            asked.out.with_suffix(".md").write_text(table(results) + "\n")
    Console().print(table(results), markup=False, soft_wrap=True)
    Console().print(dict(Counter((one.kind, one.dtype) for one in results)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
