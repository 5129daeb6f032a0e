"""How an engine proves itself when it is made: a few tokens go through the model's own forward, and through the
engine's in trees.

What an engine may be off is told by the model itself: by its own rounding, which a forward in float32 shows. Routers
that choose experts turn the least rounding into another expert, so all forwards choose as the one in float32 did
wherever scores are as good as equal, and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from tokentree.engines.cpu.checked import is_tensor
from tokentree.engines.kv import SequenceKV
from tokentree.engines.segment import Segment
from tokentree.engines.support import ALONE, KEPT, cache_names
from tokentree.errors import ModelError
from tokentree.tree import Ints, TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN = "own forward and its rounding"  # the name by which what a model says by itself is kept
ATTENDED = "attention"  # the name by which the sizes of what attention is given are kept
PROBE = (0.11, 0.37, 0.23, 0.71, 0.53, 0.31, 0.83)  # any tokens, as parts of the vocabulary
TIE = 0.1  # of the range of a router's scores: less is as good as equal
MOST = 0.1  # of the spread of logits: how far an engine in bfloat16 may be off
CHOICE = "choice "  # begins the names of routers' choices in what `own_forward` gives


@torch.inference_mode()
def own_forward(
    model: PreTrainedModel, exact: Callable[[], PreTrainedModel] | None = None, recurrent: bool = False
) -> dict[str, torch.Tensor]:
    """What ``model`` says of a few ``tokens`` by itself (causal attention, its own cache): ``logits`` [tokens, vocab],
    and ``shapes`` int64[layers, 3] of its KV: heads, key width, value width. Beside them what its routers chose, and
    ``exact`` float32[tokens, vocab], the logits without its rounding, where these are known.

    Args:
        exact: gives the same model in float32.
        recurrent: whether it may keep recurrent states beside its KV.

    Raises:
        ModelError: if it can't read text alone, or keeps more than KV.
    """
    from transformers.cache_utils import DummyLayer, DynamicCache  # older versions, which are refused, have no such

    tokens = torch.tensor(probe(model))
    known: dict[str, torch.Tensor] = {}
    if exact is not None:
        known = _without_rounding(exact, tokens)
    routes = Routes(known, np.arange(len(tokens)))
    with routes:
        out = _read(model, tokens)
    said = dict(out)  # by the names that they have in this version of transformers
    cache = next((said[name] for name in KEPT if name in said), None)
    cache = getattr(cache, "self_attention_cache", cache)  # beside that of an encoder that isn't there
    if cache is None and not recurrent and getattr(model.config.get_text_config(), "is_decoder", None) is False:
        raise ModelError(
            f"{type(model).__name__} is an encoder here, whose tokens see those behind them too: load it with "
            "is_decoder=True"
        )
    if cache is None and not recurrent and (names := cache_names(model)):
        cache = DynamicCache(config=model.config.get_text_config())  # some give none out
        _read(model, tokens, **dict.fromkeys(names, cache))
    layers = list(getattr(cache, "layers", []))
    while layers and isinstance(layers[-1], DummyLayer):  # it reads another one's
        layers.pop()
    attending = [layer for layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    if not recurrent and model.config.model_type not in ALONE and (not layers or len(attending) < len(layers)):
        raise ModelError(f"{type(model).__name__} keeps more than keys and values, which a tree can't roll back")
    shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in attending]
    kept = torch.tensor(shapes, dtype=torch.int64).reshape(-1, 3)
    made = {"tokens": tokens, "logits": out.logits[0].contiguous(), "shapes": kept}
    return made | routes.choices | known


def _without_rounding(exact: Callable[[], PreTrainedModel], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    routes = Routes({}, np.arange(len(tokens)))
    try:
        with routes:
            out = _read(exact(), tokens)
    except ModelError:  # it computes in its own type wherever that is
        return {}
    return {"exact": out.logits[0].float().contiguous()} | routes.choices


def _read(model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> Any:
    try:
        return model(input_ids=tokens[None].to(model.device), use_cache=True, return_dict=True, **options)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{type(model).__name__} can't read a text alone: {' '.join(str(error).split())}") from None


class Routes(TorchFunctionMode):
    """In here `torch.topk` and `torch.max`, by which routers choose experts, choose what was chosen before wherever
    that is as good.

    Args:
        known: what was chosen before, by `CHOICE`, how many there are to choose from, and the number of the call:
            int64[rows, ..., k].
        rows: int64, which row of those a row of this forward is, -1 if none.

    Attributes:
        choices: what is chosen.
    """

    def __init__(self, known: Mapping[str, torch.Tensor], rows: Ints) -> None:
        super().__init__()
        self.choices: dict[str, torch.Tensor] = {}
        self._known, self._rows = known, rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk, torch.max, torch.Tensor.max) or isinstance(made, torch.Tensor):
            return made
        scores, rows, (values, chosen) = args[0], len(self._rows), made
        lead = scores.shape[:2] if scores.shape[0] == 1 and scores.ndim > 2 else scores.shape[:1]
        if (
            scores.ndim < 2
            or not scores.numel()
            or lead.numel() < rows
            or (scores.ndim > chosen.ndim and chosen.shape != scores.shape[:-1])
        ):
            return made
        name = f"{_kind(scores)}{sum(known.startswith(_kind(scores)) for known in self.choices)}"
        scores = scores.reshape(lead.numel(), *scores.shape[len(lead) :])
        chosen = chosen.reshape(*scores.shape[:-1], -1).clone()
        before = self._known.get(name)
        if before is not None and before.shape[1:] == chosen.shape[1:]:
            for row, source in enumerate(self._rows.tolist()):
                if source >= 0:
                    chosen[row] = _as_good(scores[row], chosen[row], before[source])
        self.choices[name] = chosen[:rows].clone()
        values = scores.gather(-1, chosen).reshape(values.shape)
        return type(made)((values, chosen.reshape(made.indices.shape)))


def _kind(scores: torch.Tensor) -> str:
    return f"{CHOICE}{scores.shape[-1]} "


def _as_good(scores: torch.Tensor, chosen: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """``before``, int64[..., k], where its scores are as good as those of ``chosen``."""
    finite = torch.where(scores.isinf(), torch.nan, scores.float())
    span = torch.nan_to_num(finite, nan=-torch.inf).amax(-1) - torch.nan_to_num(finite, nan=torch.inf).amin(-1)
    least, other = (scores.float().gather(-1, places).amin(-1) for places in (chosen, before))
    return torch.where((other >= least - TIE * span)[..., None], before, chosen)


def said_before(found: object) -> bool:
    """Whether ``found`` is what `own_forward` gives of some model."""
    if not isinstance(found, dict) or not {"tokens", "logits", "shapes"} <= set(found):
        return False
    tokens, logits = found["tokens"], found["logits"]
    if not is_tensor(tokens, torch.int64, len(PROBE)) or not sizes_of_kv(found["shapes"]):
        return False
    if not isinstance(logits, torch.Tensor) or not is_tensor(logits, logits.dtype, len(PROBE), None):
        return False
    vocab = logits.shape[1]
    known = logits.is_floating_point() and 0 <= int(tokens.min()) <= int(tokens.max()) < vocab
    rest = {name: value for name, value in found.items() if name not in ("tokens", "logits", "shapes")}
    return known and all(
        is_tensor(value, torch.float32, len(PROBE), vocab) if name == "exact" else _chosen_before(name, value)
        for name, value in rest.items()
    )


def attended_before(found: object) -> bool:
    """Whether ``found`` may be what `attending.attended` gives of some model."""
    if not isinstance(found, dict) or not sizes_of_kv(found.get("shapes")):
        return False
    reads, calls, recurrences = found.get("reads"), len(found["shapes"]), found.get("recurrences")
    if recurrences is not None and not (
        isinstance(recurrences, torch.Tensor)
        and is_tensor(recurrences, torch.int64, None, 3)
        and (not len(recurrences) or 0 <= int(recurrences.min()) <= int(recurrences.max()) < 1 << 40)
    ):
        return False
    if reads is None:
        return True
    if not isinstance(reads, torch.Tensor) or not is_tensor(reads, torch.int64, calls):
        return False
    known = reads.tolist()
    return all(0 <= call <= place and known[call] == call for place, call in enumerate(known))


def sizes_of_kv(found: object) -> bool:
    """Whether ``found`` may be the sizes of the KV of each layer, int64[layers, 3]."""
    if not isinstance(found, torch.Tensor) or not is_tensor(found, torch.int64, None, 3):
        return False
    least = torch.tensor([1, 1, 0])  # an index has no values
    return bool((found >= least).all()) and (not len(found) or int(found.max()) < 1 << 20)


def _chosen_before(name: object, found: object) -> bool:
    """Whether ``found`` is a router's choice of that name."""
    if not isinstance(name, str) or not isinstance(found, torch.Tensor) or not name.startswith(CHOICE):
        return False
    count, _, number = name.removeprefix(CHOICE).partition(" ")
    if found.dtype is not torch.int64 or found.shape[:1] != (len(PROBE),) or not found.numel():
        return False
    return count.isdecimal() and number.isdecimal() and 0 <= int(found.min()) <= int(found.max()) < int(count)


@torch.inference_mode()
def in_trees(
    own: Mapping[str, torch.Tensor], forward: Callable[[Segment], torch.Tensor], kv: SequenceKV, routed: bool
) -> tuple[torch.Tensor, set[int | None], bool]:
    """What ``forward``, which gives the logits of a segment's nodes, says of the tokens of `own_forward`: in a tree,
    alone behind it, and in another tree behind that.

    Args:
        routed: whether routers are to choose as before, see `Routes`.

    Returns:
        logits float32[tokens, vocab]; the sliding windows that layers asked for; and whether a token had the same bits
        alone and as the root of a tree of ten.
    """
    a, b, c, d, e, f, g = own["tokens"].tolist()
    other, got, windows, read = d - 1 if d else 1, list[torch.Tensor](), set[int | None](), 0

    def said(nodes: list[int], parents: list[int], path: list[int]) -> torch.Tensor:
        segment = Segment(kv, TokenTree(np.array(nodes), np.array(parents)), 0, 0)
        rows = np.full(len(nodes), -1)
        rows[path] = read + np.arange(len(path))
        with Routes(own, rows) if routed else nullcontext():
            logits = forward(segment)[path]
        windows.update(segment.windows)
        return logits

    def keep(logits: torch.Tensor, path: list[int]) -> int:
        got.append(logits.float())
        kv.commit(path)
        return read + len(path)

    read = keep(said([a, b, other, c, d, c, d], [-1, 0, 0, 1, 2, 2, 3], [0, 1, 3, 6]), [0, 1, 3, 6])
    others = range(min(9, own["logits"].shape[1]))
    crowd = said([e, *others], [-1, *(0 for _ in others)], [0])
    alone = said([e], [-1], [0])
    read = keep(alone, [0])
    read = keep(said([f, other, g, g], [-1, 0, 1, 0], [0, 3]), [0, 3])
    return torch.cat(got), windows, torch.equal(crowd, alone)


def compare(
    own: Mapping[str, torch.Tensor], got: torch.Tensor, few_bits: bool
) -> tuple[float, float, float]:  # fmt: skip
    """How far off ``got`` is from what `own_forward` gave, how far it may be, and how far logits spread: root mean
    squares. What all logits of a row have in common counts for nothing: probabilities don't depend on it, and in some
    models most of what rounding does is that.

    Args:
        few_bits: whether the engine computes with weights in fewer bits than the model came with.
    """
    logits, got = _centred(own["logits"]), _centred(got)
    expected, spread = _centred(own.get("exact", own["logits"])), float(logits.std())
    error = _distance(got, expected)
    if few_bits:
        allowed = 0.3 * spread
    elif "exact" in own:  # twice what the model's own rounding is
        rounding = _distance(logits, expected)
        allowed = 2 * rounding + 0.001 * spread
        if _distance(got, logits) > MOST * spread:  # some weights blow the model's own rounding up further
            allowed = min(allowed, MOST * spread)
    else:
        allowed = (0.001 if own["logits"].dtype in (torch.float32, torch.float64) else MOST) * spread
    return error, allowed, spread


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """float32[rows, vocab] without their mean over each row."""
    return logits.float() - logits.float().mean(-1, keepdim=True)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The root mean square of the difference."""
    return float((one - other).square().mean().sqrt())


def probe(model: PreTrainedModel) -> list[int]:
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    return [int(part * size) for part in PROBE]
