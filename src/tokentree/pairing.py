"""Whether two tokenizers give the same ids, so that one model can draft for the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# names of rows that only make an embedding a round size: no text becomes one of them
PADDING = re.compile(
    r"\[PAD\d*\]|\[?<?\|?(unused|extra|extra_id|dummy|empty|placeholder|reserved|reserved_token|reserved_special_token|"
    r"special|pad)[_ -]?(token)?[_ -]?\d+\|?>?\]?",
    re.IGNORECASE,
)
# where ways to cut texts into tokens part: case, digits, spaces, lines, contractions, other scripts, width, signs
TEXTS = (
    "The quick Brown FOX jumps; don't, I'LL, we've.", " leading and  inner   spaces\t\ttabs ", "a\nb\n\n\nc\r\nd",
    "1 22 333 4444 55555 3.14159 1,000,000  7", "def f(x):\n    return [x**2 for _ in range(10)]  # ok",
    "été naïve Ünï \ufb01ne \uff21\uff22\uff23 ½ ²", "日本語と中文 한국어 русский العربية हिन्दी", "🙂👩\u200d👧 → ≠ ∑", "http://a.b/c?d=e&f=g#h",
)  # fmt: skip
MOST = 4000  # tokens whose own texts are compared


def difference(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> str | None:
    """A token or a text that the two give other ids; None if they are one tokenizer. Vocabulary sizes say nothing: they
    are padded."""
    ours, theirs = (_names(one.get_vocab()) for one in (target, draft))
    odd = next(_differences(ours, theirs), None)
    if odd is None and _form(target) != _form(draft):
        odd = _other_ids(target, draft, sorted(set(ours.values()) & set(theirs.values())))
    return odd


def _names(vocab: dict[str, int]) -> dict[int, str]:
    """Tokens by their ids, without those that only pad."""
    return {token: name for name, token in vocab.items() if not PADDING.fullmatch(name)}


def _differences(ours: dict[int, str], theirs: dict[int, str]) -> Iterator[str]:
    """Tokens that the two have with other ids, or that one of them lacks, in the order of their ids."""
    for token, name in sorted(set(ours.items()) ^ set(theirs.items())):
        yield ours.get(token, name)


def _form(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that decides what a text becomes, beside the vocabulary; unequal for tokenizers that can't tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return object()
    said = json.loads(backend.to_str())
    added = [(one["id"], one["content"]) for one in said["added_tokens"] if not PADDING.fullmatch(one["content"])]
    model = {key: value for key, value in said["model"].items() if key != "vocab"}
    return said["normalizer"], said["pre_tokenizer"], model, added


def _other_ids(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, shared: list[str]) -> str | None:
    """A text that becomes other ids, or None: of texts made for it, tokens' own, and what merges join that are in
    another place."""
    step = -(-len(shared) // MOST)
    texts = [*TEXTS, *(target.convert_tokens_to_string([token]) for token in shared[::step])]
    merges = [_merges(one) for one in (target, draft)]
    for (a, b), (c, d) in [pair for pair in zip(*merges) if pair[0] != pair[1]][:MOST]:
        joined = ((a, b), (c, d), (a, b, d), (c, d, b), (a, c, d), (c, a, b))
        texts += [target.convert_tokens_to_string(list(parts)) for parts in joined]
    known = set(shared)
    texts += [f"a{token} {token}b" for one in (target, draft) for token in one.get_added_vocab() if token in known]
    ids = [one(texts, add_special_tokens=False).input_ids for one in (target, draft)]
    return next((text for text, own, other in zip(texts, *ids) if own != other), None)


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = json.loads(backend.to_str())["model"].get("merges", []) if backend is not None else []
    return [(one[0], one[1]) for one in found]
