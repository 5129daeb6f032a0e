"""How a private copy of a model comes to use `tree_attention`, and whether it can.

Most families go through transformers' interface. A few don't, and are adapted here: where an engine's forward runs, it
attends for them; elsewhere they do as they did.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tokentree.engines.cpu import alibi, projected
from tokentree.engines.cpu.attention import (
    TREE,
    Attending,
    Biases,
    ByDistance,
    Rule,
    Sees,
    attending,
    one,
    running,
    same_place,
)
from tokentree.engines.cpu.choosing import all_of
from tokentree.engines.cpu.counted import tell_positions
from tokentree.engines.cpu.indexed import by_index
from tokentree.engines.cpu.prepare import set_attention
from tokentree.engines.cpu.states.exchange import before_packing, exchanged
from tokentree.engines.recurrent import Recurrence
from tokentree.engines.self_check import PROBE, probe
from tokentree.engines.support import layer_windows
from tokentree.errors import ModelError
from tokentree.kernels.recurrence import StateRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def attended(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What attention is given in a forward of ``model`` (a `private_copy`), which uses `tree_attention` from now on:
    ``shapes`` int64[calls, 3] each time, KV heads, key width, value width (0 for an index, which has keys alone);
    ``heads`` int64[calls], of queries; ``reads`` int64[calls], which time the same keys and values came first; and
    ``beyond`` int64[calls], 1 for an index, and where a row sees its chunk or scores have biases. If it has any,
    ``recurrences`` int64[recurrences, 3], what a `Recurrence` says of each.

    Raises:
        ModelError: if not all of it comes to `tree_attention`, or a row is to see something else than the rows before
            it, or the last of these.
    """
    given = _Given()
    set_attention(model, TREE)
    try:
        with attending(given), exchanged(model):
            model(input_ids=torch.tensor([probe(model)], device=model.device), use_cache=False, return_dict=True)
    except ModelError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # it takes masks for what they are elsewhere
        raise ModelError(f"{type(model).__name__} can't do without its own masks: {error}") from None
    config = model.config.get_text_config()
    if sum(width > 0 for _, _, width in given.shapes) < config.num_hidden_layers and not given.recurrences:
        raise ModelError(f"{type(model).__name__} attends by itself in some of its layers")
    if given.untold and given.untold != set(layer_windows(config).values()):
        raise ModelError(f"{type(model).__name__} does not tell its attention of its sliding window")
    shapes = torch.tensor(given.shapes, dtype=torch.int64).reshape(-1, 3)
    lists = {"heads": given.heads, "reads": given.reads, "beyond": given.beyond}
    found = {"shapes": shapes} | {name: torch.tensor(each, dtype=torch.int64) for name, each in lists.items()}
    return found | ({"recurrences": torch.tensor(given.recurrences)} if given.recurrences else {})


class _Given:
    """Notes what attention is given.

    Attributes:
        shapes, heads, reads, beyond: each time, see `attended`.
        recurrences: what each keeps.
        untold: the windows of layers that no mask tells.
    """

    def __init__(self) -> None:
        self.shapes, self.heads = list[tuple[int, int, int]](), list[int]()
        self.recurrences = list[tuple[int, int, int]]()
        self.reads, self.beyond = list[int](), list[int]()
        self._rows = list[tuple[torch.Tensor, torch.Tensor]]()  # kept, so that no others come to lie there
        self.untold = set[int | None]()
        self._chosen: torch.Tensor | None = None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
        self.shapes.append((len(key), key.shape[2], value.shape[2]))
        self.heads.append(len(query))
        self._rows.append((key, value))
        self.reads.append(next(call for call, rows in enumerate(self._rows) if all(map(_same, rows, (key, value)))))
        self.beyond.append(int(any(each is not None for each in (rule.chunk, rule.biases, rule.relative))))
        if not rule.masked:
            self.untold.add(rule.window)
        return torch.zeros(query.shape[1], len(query), value.shape[2], dtype=torch.float32, device=query.device)

    def choose(self, queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, most: int) -> torch.Tensor:
        self.reads.append(len(self.shapes))
        self.shapes.append((1, keys.shape[1], 0))
        self.heads.append(queries.shape[1])
        self._rows.append((keys, keys))
        self.beyond.append(1)
        self._chosen = all_of(len(queries))
        return self._chosen

    def chose(self, indices: torch.Tensor) -> bool:
        return same_place(self._chosen, indices)

    def recur(self, sizes: Recurrence, rows: torch.Tensor, loop: Callable[[list[StateRows]], None]) -> None:
        self.recurrences.append((sizes.row, sizes.back, sizes.state))

    def knows(self, window: int | None, chunk: int | None, sees: Sees) -> bool:
        size = window or chunk or 0
        if window is not None and window < 1:
            return False
        places = torch.arange(len(PROBE))
        rows = [*places.tolist(), *([size - 1, size, 3 * size // 2, 2 * size] if size else [])]
        for row in rows:
            first = row // chunk * chunk if chunk else max(0, row - window + 1) if window else 0
            columns = places if row < len(PROBE) else torch.tensor([0, max(0, first - 1), first, row, row + 1])
            try:
                told = sees(torch.tensor(row), columns).expand(columns.shape)
            except IndexError:  # who sees whom depends on something that this text is too short for
                return False
            if not torch.equal(told, (columns <= row) & (columns >= first)):
                return False
        return True


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def adapt(model: nn.Module) -> None:
    """Has all modules of ``model`` (a `private_copy`) that are known here attend through `attention.running`, and
    readies those that carry states."""
    before_packing(model)
    tell_positions(model)
    for module in model.modules():
        name, known = type(module).__name__, type(module).__module__.startswith("transformers.")
        if name in SCORES and known and hasattr(module, "_attn"):
            _scored(module, SCORES[name](module))
        elif name == "FalconAttention" or (name in OTHERS and known):
            OTHERS[name](module)


def _local(module: Any) -> Rule:
    """GPT-Neo's scores are not scaled, and every other layer sees a window."""
    return Rule(1.0, module.config.window_size if module.attention_type == "local" else None)


def _scaled(name: str) -> Callable[[Any], Rule]:
    """A rule that divides by a module's attribute."""
    return lambda module: Rule(1 / float(getattr(module, name)))


# Those that have a method `_attn` of queries, keys, values and a mask: CodeGen and GPT-J up to transformers 5.23.
SCORES: dict[str, Callable[[Any], Rule]] = {
    "CodeGenAttention": _scaled("scale_attn"),
    "GPTJAttention": _scaled("scale_attn"),
    "GPTNeoSelfAttention": _local,
    "GPTNeoXJapaneseAttention": _scaled("norm_factor"),
}


def _scored(module: Any, rule: Rule) -> None:
    own = module._attn

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None) -> Any:
        forward = running()
        if forward is None:
            return own(query, key, value, mask)
        return one(forward, query, key, value, rule), None

    module._attn = attend


def _called(module: Any) -> None:
    """Falcon calls torch's attention."""
    own, biases = module.forward, None
    if module.config.alibi:
        biases = alibi.falcon_biases(module.num_heads, module.dense.weight.dtype, module.head_dim)

    def forward(*args: Any, **kwargs: Any) -> Any:
        attends = running()
        if attends is None:
            return own(*args, **kwargs)
        with _Instead(attends, biases):
            return own(*args, **kwargs)

    module.config, module.forward = SimpleNamespace(_attn_implementation="sdpa", alibi=module.config.alibi), forward


def _by_distance(module: Any) -> None:
    """Inkling's rows have biases for the keys before them."""
    module.rel_logits_proj = ByDistance(module.rel_logits_proj)


# Those that choose by products of one kind.
INDEXERS = (
    "AXK2Indexer", "DeepseekV32Indexer", "Dots3NoteTextIndexer", "GlmMoeDsaIndexer", "HYV4Indexer",
    "MistralLarge4TextIndexer",
)  # fmt: skip

OTHERS: dict[str, Callable[[Any], None]] = {
    "Attention": projected.gpt, "BigBirdSelfAttention": projected.bert, "BloomAttention": alibi.bloom,
    "FalconAttention": _called, "GitSelfAttention": projected.bert, "InklingAttention": _by_distance,
    "MegatronBertSelfAttention": projected.bert,
    "MptAttention": alibi.mpt, "MvpAttention": projected.bart, "RemBertSelfAttention": projected.bert,
    "RoFormerSelfAttention": projected.bert, "TrOCRAttention": projected.bart, "XGLMAttention": projected.bart,
    **dict.fromkeys(INDEXERS, by_index),
}  # fmt: skip


class _Instead(TorchFunctionMode):
    """In here torch's attention is that of ``forward``, with ``biases`` if there are some."""

    def __init__(self, forward: Attending, biases: Biases | None) -> None:
        super().__init__()
        self._forward, self._biases = forward, biases

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        return one(self._forward, query, key, value, Rule(query.shape[3] ** -0.5, biases=self._biases))
