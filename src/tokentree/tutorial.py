"""The functions by which tree speculation is taught, on plain transformers models.

A tree is a list of ``(token, parent)`` pairs in level order. ``parent`` is the index of a pair, or -1 for a child of
the last token of the context, of which there may be several::

    tree = [(A, -1), (B, 0), (C, 0), (D, 1), (E, 2)]

A `TokenTree` will do as well; it has one node more, because its node 0 is the last token of the context. Functions that
read a tree speak of its nodes by index: of pairs the index in the list, of a `TokenTree` that of the node.

Each call prepares its models anew; to decode often, make an `LLM`, or a `generator` for transformers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from transformers import PreTrainedModel

from tokentree.acceptance import acceptance
from tokentree.decoder import Decoder
from tokentree.drafters.draft_model import DraftModel
from tokentree.engines.torch import TorchEngine
from tokentree.engines.transformers_engine import TransformersEngine
from tokentree.errors import ModelError, OptionError, PromptError, TreeError
from tokentree.inputs import read_prompt
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Sequence
from tokentree.shapes import Static
from tokentree.tree import TokenTree

Pairs = SequenceOf[tuple[int, int]]
Context = SequenceOf[int] | torch.Tensor


def build_tree(context: Context, model: PreTrainedModel, depth: int, branching: int) -> list[tuple[int, int]]:
    """A draft tree. Each node has as children the ``branching`` most probable tokens after it, ``depth`` levels deep.

    Each level takes one forward. This is SpecInfer's expansion (Miao et al. 2023, arXiv:2305.09781).

    Args:
        context: token ids, a list or a LongTensor [n] or [1, n].
        model: the draft model.
        depth, branching: at least 1.

    Returns:
        ``branching + branching**2 + ... + branching**depth`` pairs in level order, the most probable sibling first.

    Raises:
        OptionError: if depth or branching is below 1.
        PromptError: if the context is empty, or the model has no room for it and the tree.
    """
    shape, ids = _static(depth, branching), _token_ids(context)
    engine = _engine(model, "model")
    seq = _sequence(ids, engine, depth + 1)
    if seq.room <= depth:
        raise PromptError(f"the model holds {engine.context} tokens: no room for a tree of depth {depth}")
    drafter = DraftModel(engine, engine.vocab_size)
    drafter.prefill([seq])
    draft = drafter.propose([seq], shape, sampled=False)[0]
    return [(token, parent - 1) for token, parent in zip(draft.tokens[1:], draft.parents[1:], strict=True)]


def create_tree_mask(tree: Pairs | TokenTree) -> torch.Tensor:
    """The tree attention mask int64[n, n]: 1 where the column's node is the row's node or one of its ancestors.

    Raises:
        TreeError: if the pairs are not a tree.
    """
    first = _first(tree)
    return torch.from_numpy(_as_tree(tree).mask[first:, first:].astype("int64"))


def extract_all_paths(tree: Pairs | TokenTree) -> list[list[int]]:
    """The nodes of every root-to-leaf path, ordered by leaf. The tokens of a path are ``[tree[i][0] for i in path]``.

    Raises:
        TreeError: if the pairs are not a tree.
    """
    whole, first = _as_tree(tree), _first(tree)
    paths = [[node - first for node in whole.path(leaf)[first:]] for leaf in whole.leaves.tolist()]
    return [path for path in paths if path]


def path_probability(path: SequenceOf[int], probs: SequenceOf[float] | torch.Tensor) -> float:
    """The product of ``probs[i]``, the conditional probability of node i after its parent, along the ``path``.

    Raises:
        TreeError: if the path names a node that has no probability.
    """
    try:
        given = [float(prob) for prob in probs]
        nodes = [operator.index(node) for node in path]
    except (TypeError, ValueError, RuntimeError):
        raise TreeError("a path is a list of nodes, and probabilities are a list of numbers, one for each") from None
    if any(not 0 <= node < len(given) for node in nodes):
        raise TreeError(f"the path {list(path)} names a node without a probability: there are {len(given)}")
    return math.prod(given[node] for node in nodes)


def find_best_path(tree: Pairs | TokenTree, probs: SequenceOf[float] | torch.Tensor) -> list[int]:
    """The root-to-leaf path with the highest `path_probability`. Of equally probable paths it is the first.

    Raises:
        TreeError: if there is no path, or a node has no probability.
    """
    paths = extract_all_paths(tree)
    if not paths:
        raise TreeError("the tree is empty: it has no path")
    return max(paths, key=lambda path: path_probability(path, probs))


def tree_speculative_decode(
    context: Context,
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    depth: int = 3,
    branching: int = 2,
    max_tokens: int = 100,
    accept: str = "match",
) -> list[int]:
    """Greedy decoding with a static tree: the draft model grows it, the target verifies it in one forward.

    Args:
        context: token ids, a list or a LongTensor [n] or [1, n].
        depth, branching: of the tree, at least 1.
        max_tokens: the length of the text **in total**, context included. It ends earlier at an end-of-sequence token
            of the target, or at the target's context limit.
        accept: ``match`` is lossless: the ids are those of the target's own greedy decoding. ``best_path`` is the rule
            as it is often taught: it accepts the most probable path of the tree. It rejects nothing, so it is
            **lossy**: the draft model writes the text. ``rejection`` equals ``match`` here, since nothing is drawn.

    Returns:
        The ids, context included. A context of ``max_tokens`` or more is returned as it is.

    Raises:
        OptionError: if depth or branching is below 1, or there is no such rule.
        PromptError: if the context is empty or the target has no room for it.
        ModelError: if a model can't be decoded with a tree.
        RequestError: if the target's logits aren't numbers.
    """
    shape, rule = _static(depth, branching), acceptance(accept)
    ids = _token_ids(context)
    if not isinstance(max_tokens, int | np.integer) or isinstance(max_tokens, bool):
        raise OptionError(f"max_tokens={max_tokens!r} is not a whole number")
    if len(ids) >= max_tokens:
        return ids
    target, draft = _engine(target_model, "target model"), _engine(draft_model, "draft model")
    seq = _sequence(ids, target, max_tokens - len(ids), frozenset(target.ends))
    for _ in Decoder(target, DraftModel(draft, target.vocab_size), shape, rule).run([seq]):
        pass
    if seq.error is not None:
        raise seq.error
    return seq.tokens


def _static(depth: int, branching: int) -> Static:
    numbers = isinstance(depth, int) and isinstance(branching, int) and not isinstance(depth, bool)
    if not numbers or depth < 1 or branching < 1:
        raise OptionError(f"depth={depth!r} and branching={branching!r} must both be at least 1")
    return Static([branching] * depth)


def _engine(model: PreTrainedModel, what: str) -> TransformersEngine:
    """An engine for a loaded model."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"the {what} must be a loaded transformers model, and not of the type {type(model).__name__}")
    return TorchEngine(model)


def _token_ids(context: Context) -> list[int]:
    if isinstance(context, torch.Tensor | np.ndarray) and (context.ndim, len(context)) != (2, 1) and context.ndim != 1:
        raise PromptError(f"the context is one text, [n] or [1, n], and not {list(context.shape)}")
    ids = read_prompt(context, "context")
    if not isinstance(ids, list):
        raise PromptError("the context must be token ids: let a tokenizer make them of a text")
    if not ids:
        raise PromptError("the context is empty: give at least one token")
    return ids


def _sequence(
    ids: list[int], engine: TransformersEngine, max_tokens: int, eos_ids: frozenset[int] = frozenset()
) -> Sequence:
    if any(not 0 <= token < engine.vocab_size for token in ids):
        raise PromptError(f"a token id of the context is outside the vocabulary of {engine.vocab_size}")
    params = SamplingParams(max_tokens=max_tokens)  # greedy: the random stream is never asked
    return Sequence(ids, params, seeded_noise(0, 0), engine.context, eos_ids)


def _first(tree: Pairs | TokenTree) -> int:
    """The node of `_as_tree` that has index 0 for the caller."""
    return 0 if isinstance(tree, TokenTree) else 1


def _as_tree(tree: Pairs | TokenTree) -> TokenTree:
    """Pairs as a `TokenTree`, under a root that stands for the context."""
    if isinstance(tree, TokenTree):
        return tree
    if not isinstance(tree, SequenceOf) or isinstance(tree, str | bytes):
        raise TreeError(f"a tree is a list of pairs or a TokenTree, and not of the type {type(tree).__name__}")
    for i, pair in enumerate(tree):
        whole = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int | np.integer) for n in pair)
        if not whole or not -1 <= pair[1] < i:
            raise TreeError(f"{pair!r} at index {i} is not a token with an earlier pair, or -1, as its parent")
    tokens, parents = [token for token, _ in tree], [parent + 1 for _, parent in tree]
    return TokenTree([-1, *tokens], [-1, *parents])  # type: ignore[arg-type]
