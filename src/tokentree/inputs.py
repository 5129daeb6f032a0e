"""What people hand over as a prompt, and what it means: text, token ids or messages."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from io import IOBase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.chat import Message, is_message, read_messages, whole
from tokentree.errors import PromptError

# a text; token ids; what a tokenizer or a request to another library holds; messages
Prompt = str | Sequence[int] | NDArray[Any] | torch.Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]]

KINDS = "text, token ids or messages"
NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, Set, IOBase, os.PathLike)  # though they can be iterated
# what a tokenizer gives beside ids, and decoding doesn't need
BESIDE = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping"}
NAMES = ("input_ids", "prompt_token_ids", "prompt", "messages")  # under which a mapping holds a prompt


@dataclass(frozen=True)
class Chat:
    """A prompt that is a conversation."""

    messages: list[Message]


Read = str | list[int] | Chat


def read_prompts(given: Any, what: str = "prompt") -> list[Read]:
    """All prompts of ``given``: one, or a list, an array [prompts, tokens], or an iterator of several; what a tokenizer
    returned, without what its attention mask hides on the left or right of a text.

    Args:
        what: how a message calls them.

    Raises:
        PromptError: if it is something else, with a sentence that says what.
    """
    if isinstance(given, str):
        return [whole(given, what)]
    if isinstance(given, tuple) and hasattr(given, "_asdict"):  # a named one is no list
        given = given._asdict()
    if isinstance(given, Mapping):
        return _of_mapping(given, what)
    if is_message(given):
        return [Chat(read_messages(given))]
    rank, items = _items(given, what)
    if rank == 1 or (items and any(map(_is_number, items))):
        return [token_ids(items, what)]
    if items and all(map(is_message, items)):
        return [Chat(read_messages(items))]
    number = f"{what} {{}}" if len(items) > 1 else what
    return [read_prompt(item, number.format(i)) for i, item in enumerate(items, start=1)]


def read_prompt(given: Any, what: str = "prompt") -> Read:
    """The one prompt that ``given`` is; see `read_prompts`.

    Raises:
        PromptError: if it is something else, or several.
    """
    if isinstance(given, str | Mapping) or hasattr(given, "_asdict") or is_message(given):
        found = read_prompts(given, what)
    else:
        rank, items = _items(given, what)
        if rank == 2 or (len(items) == 1 and isinstance(items[0], list | tuple | np.ndarray | torch.Tensor)):
            found = [token_ids(_items(item, what)[1], what) for item in items]
        elif items and all(map(is_message, items)):
            return Chat(read_messages(items))
        else:
            return token_ids(items, what)
    if len(found) != 1:
        raise PromptError(f"the {what} must be one, and these are {len(found)}")
    return found[0]


def token_ids(given: Any, what: str = "prompt") -> list[int]:
    """The token ids of one text, from a list or an array.

    Raises:
        PromptError: if they are no whole numbers.
    """
    ids = []
    for item in _items(given, what)[1]:
        single = not isinstance(item, bool | np.bool_) and getattr(item, "ndim", 0) == 0
        try:
            if not single or (isinstance(item, torch.Tensor) and item.dtype == torch.bool):
                raise TypeError
            ids.append(operator.index(item))
        except TypeError:
            raise PromptError(f"the {what} must be {KINDS}, and {_shown(item)} is no token id") from None
    return ids


def _of_mapping(given: Mapping[str, Any], what: str) -> list[Read]:
    """The prompts in what a tokenizer returned, or in a request as other libraries write it; a message is one too."""
    if is_message(given):
        return [Chat(read_messages(given))]
    name = next((name for name in NAMES if given.get(name) is not None), None)
    if name is None:
        keys = ", ".join(map(str, given)) or "nothing"
        raise PromptError(f"the {what} must be {KINDS}, and this {type(given).__name__} has {keys}")
    known = {*NAMES, "attention_mask", *BESIDE}
    if odd := [str(key) for key, value in given.items() if key not in known and value is not None]:
        raise PromptError(f"the {what} comes with {odd[0]}: this library reads text alone")
    if name == "messages":
        return [Chat(read_messages(given))]
    if name == "prompt":
        return [read_prompt(given["prompt"], what)]
    rows, mask = _rows(given[name], what), given.get("attention_mask")
    if mask is not None:
        masks = _rows(_counted(mask, what), f"attention_mask of the {what}")
        if [len(row) for row in rows] != [len(row) for row in masks]:
            raise PromptError(f"the attention_mask of the {what} has not the form of its {name}")
        rows = [_seen(ids, seen, what) for ids, seen in zip(rows, masks, strict=True)]
    return [*rows]


def _rows(given: Any, what: str) -> list[list[int]]:
    """One list of numbers, or several."""
    rank, items = _items(given, what)
    single = rank == 1 or not items or any(map(_is_number, items))
    return [token_ids(items, what)] if single else [token_ids(row, what) for row in items]


def _counted(mask: Any, what: str) -> Any:
    """A mask as 0 and 1, whatever its type: what isn't 0 is seen, as in transformers.

    Raises:
        PromptError: if something in it is no number.
    """
    if isinstance(mask, torch.Tensor):
        return mask if _no_values(mask) else (mask != 0).long()
    if isinstance(mask, np.ndarray):
        return (mask != 0).astype(np.int64)
    if isinstance(mask, list | tuple):
        return [_counted(one, what) for one in mask]
    if not isinstance(mask, bool | int | float | np.number | np.bool_):
        raise PromptError(f"the attention_mask of the {what} must have 0 or 1 for each token, and not {_shown(mask)}")
    return int(bool(mask))


def _no_values(given: Any) -> bool:
    """Whether this is a tensor whose values don't lie beside one another."""
    return isinstance(given, torch.Tensor) and (
        given.layout is not torch.strided or given.is_meta or given.is_nested or given.is_quantized
    )


def _seen(ids: list[int], mask: list[int], what: str) -> list[int]:
    """What the mask shows, which must be one piece."""
    places = [place for place, seen in enumerate(mask) if seen]
    if places and places[-1] - places[0] >= len(places):
        raise PromptError(f"the attention_mask of the {what} hides tokens in its midst: they can't be left out")
    return [ids[place] for place in places]


def _items(given: Any, what: str) -> tuple[int, list[Any]]:
    """The items of a list, an array or an iterator; and of an array its rank, otherwise 0."""
    if _no_values(given):
        raise PromptError(f"the {what} must be {KINDS}, and the values of this tensor can't be read: give a dense one")
    if isinstance(given, np.ndarray | torch.Tensor):
        kind = str(given.dtype).removeprefix("torch.")
        if given.ndim not in (1, 2):
            raise PromptError(f"the {what} must be {KINDS}, and not an array of shape {list(given.shape)}")
        if kind.startswith(("float", "bfloat", "complex", "bool")) and 0 not in given.shape:
            raise PromptError(f"the {what} must be {KINDS}, and {kind} is no type of token ids")
        texts = isinstance(given, np.ndarray) and given.dtype.kind in "OU"
        return 0 if texts else given.ndim, given.tolist()
    listed = isinstance(given, Sequence | Iterator) or hasattr(given, "tolist")
    if given is None or isinstance(given, NO_LISTS) or _is_number(given) or not listed:
        hint = ": a set has no order" if isinstance(given, Set) else ": decode it" if isinstance(given, bytes) else ""
        told = "None" if given is None else f"of the type {type(given).__name__}{hint}"
        raise PromptError(f"the {what} must be {KINDS}, and this is {told}")
    return 0, given.tolist() if hasattr(given, "tolist") else list(given)


def _is_number(item: Any) -> bool:
    if isinstance(item, np.ndarray | torch.Tensor):
        return item.ndim == 0
    return isinstance(item, bool | int | float | complex | np.generic) and not isinstance(item, str | bytes)


def _shown(item: Any) -> str:
    text = ascii(item)
    return text if len(text) <= 40 else f"{text[:37]}..."
