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

from tokentree.engines.cpu.attention import TREE, Attending, Rule, Sees, attending, running
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
    ``shapes`` int64[layers, 3] of it, KV heads, key width, value width; and ``heads`` int64[layers], of queries. If it
    has any, ``recurrences`` int64[recurrences, 3], what a `Recurrence` says of each.

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
    if len(given.shapes) < config.num_hidden_layers and not given.recurrences:
        raise ModelError(f"{type(model).__name__} attends by itself in some of its layers")
    if given.untold and given.untold != set(layer_windows(config).values()):
        raise ModelError(f"{type(model).__name__} does not tell its attention of its sliding window")
    shapes = torch.tensor(given.shapes, dtype=torch.int64).reshape(-1, 3)
    found = {"shapes": shapes, "heads": torch.tensor(given.heads, dtype=torch.int64)}
    return found | ({"recurrences": torch.tensor(given.recurrences)} if given.recurrences else {})


class _Given:
    """Notes what attention is given.

    Attributes:
        shapes, heads: of each layer.
        recurrences: what each keeps.
        untold: the windows of layers that no mask tells.
    """

    def __init__(self) -> None:
        self.shapes, self.heads = list[tuple[int, int, int]](), list[int]()
        self.recurrences = list[tuple[int, int, int]]()
        self.untold = set[int | None]()

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
        self.shapes.append((len(key), key.shape[2], value.shape[2]))
        self.heads.append(len(query))
        if not rule.masked:
            self.untold.add(rule.window)
        return torch.zeros(query.shape[1], len(query), value.shape[2], dtype=torch.float32, device=query.device)

    def recur(self, sizes: Recurrence, rows: torch.Tensor, loop: Callable[[list[StateRows]], None]) -> None:
        self.recurrences.append((sizes.row, sizes.back, sizes.state))

    def knows(self, window: int | None, sees: Sees) -> bool:
        if window is not None and window < 1:
            return False
        places = torch.arange(len(PROBE))
        rows = [*places.tolist(), *([window, 3 * window // 2] if window else [])]
        for row in rows:
            columns = places if row < len(PROBE) else torch.tensor([0, row - window, row - window + 1, row, row + 1])
            try:
                told = sees(torch.tensor(row), columns).expand(columns.shape)
            except IndexError:  # who sees whom depends on something that this text is too short for
                return False
            if not torch.equal(told, (columns <= row) & (columns > row - (window or row + 1))):
                return False
        return True


def adapt(model: nn.Module) -> None:
    """Has all modules of ``model`` (a `private_copy`) that are known here attend through `attention.running`, and
    readies those that carry states."""
    before_packing(model)
    for module in model.modules():
        if type(module).__name__ in SCORES and type(module).__module__.startswith("transformers."):
            _scored(module, SCORES[type(module).__name__](module))
        elif type(module).__name__ == "FalconAttention":
            _called(module)


def _local(module: Any) -> Rule:
    """GPT-Neo's scores are not scaled, and every other layer sees a window."""
    return Rule(1.0, module.config.window_size if module.attention_type == "local" else None)


def _scaled(name: str) -> Callable[[Any], Rule]:
    """A rule that divides by a module's attribute."""
    return lambda module: Rule(1 / float(getattr(module, name)))


# Those that have a method `_attn` of queries, keys, values and a mask.
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
        return _one(forward, query, key, value, rule), None

    module._attn = attend


def _called(module: Any) -> None:
    """Falcon calls torch's attention."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        attends = running()
        if attends is None:
            return own(*args, **kwargs)
        with _Instead(attends):
            return own(*args, **kwargs)

    module.config, module.forward = SimpleNamespace(_attn_implementation="sdpa"), forward


class _Instead(TorchFunctionMode):
    """In here torch's attention is that of ``forward``."""

    def __init__(self, forward: Attending) -> None:
        super().__init__()
        self._forward = forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        return _one(self._forward, query, key, value, Rule(query.shape[3] ** -0.5))


def _one(
    forward: Attending, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
) -> torch.Tensor:  # fmt: skip
    """[1, heads, rows, value width], as torch's attention gives it."""
    return forward.attend(query[0], key[0], value[0], rule).transpose(0, 1)[None].to(value.dtype)
