"""Medusa as it is taught: train heads, load a model with them, decode. All of it is `LLM` underneath."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import torch

from tokentree.acceptance import acceptance
from tokentree.draft import Draft
from tokentree.drafters.medusa import FastHeads
from tokentree.engines.drafting import HasHiddenStates
from tokentree.errors import OptionError, PromptError, TreeError
from tokentree.heads.saved import read_heads
from tokentree.llm import LLM, Model
from tokentree.sampling import SamplingParams
from tokentree.tree import TokenTree
from tokentree.tutorial import Context, Pairs, _as_tree, _token_ids


def train_medusa_heads(
    base_model: str, num_heads: int = 3, training_data: str = "self", epochs: int = 1, out: str | Path = "medusa-heads",
    tokens: int = 100_000, force: bool = False,
) -> MedusaModel:  # fmt: skip
    """Trains ``num_heads`` Medusa heads for ``base_model``, and returns the model with its heads.

    Progress is saved. After an interruption, the same call continues. `tokentree.train` has more options.

    Args:
        base_model: a hub name, a folder or a GGUF file. It isn't changed.
        training_data: a JSON-lines file of texts, or ``self``: the model writes the texts.
        out: the folder that the heads are written into.
        tokens: the number of tokens that the model writes.
        force: whether to begin again, and replace what is there, if ``out`` has a training with other settings.

    Raises:
        OptionError, PromptError, ModelError: see `train.run.train_medusa`.
    """
    from tokentree.train.job import check_folder
    from tokentree.train.loop import Recipe
    from tokentree.train.run import train_medusa
    from tokentree.train.texts import check_data

    recipe = Recipe(epochs=epochs)
    check_folder(Path(out), force)
    if training_data != "self":
        check_data(training_data)
    train_medusa(
        LLM(base_model, max_batch=16), base_model, training_data, out, recipe, num_heads=num_heads, tokens=tokens,
        force=force,
    )  # fmt: skip
    return MedusaModel.from_pretrained(base_model, out)


@dataclass(frozen=True, eq=False)
class MedusaModel:
    """A target model and its Medusa heads.

    Args:
        llm: drafts with the heads alone.
        heads: the folder of the heads.
    """

    llm: LLM
    heads: Path

    @classmethod
    def from_pretrained(cls, base_model: Model, heads: str | Path, **options: object) -> MedusaModel:
        """Loads a model and heads that were made for it.

        Args:
            options: as for `LLM`.

        Raises:
            OptionError, ModelError, PairingError: as for `LLM`.
        """
        llm = LLM(base_model, **({"drafter": "medusa", "heads": heads} | options))  # type: ignore[arg-type]
        return cls(llm, Path(heads))

    def generate(self, prompt: str | SequenceOf[int], max_tokens: int = 100) -> str:
        """The text that the model writes greedily after ``prompt``. It is empty if there is no tokenizer."""
        return self.llm.generate(prompt, SamplingParams(max_tokens=max_tokens))[0].text

    def __call__(self, tokens: Context) -> dict[str, torch.Tensor]:
        """``base_logits`` [n, vocab], what the model says after each of ``tokens``, and ``head_1_logits``,
        ``head_2_logits``, … [n, vocab], what each head says of the token that comes one, two, … places later; -inf for
        tokens that the heads don't know."""
        engine, ids = self.llm.engine, _token_ids(tokens)
        _check_tokens(ids, engine.vocab_size)
        assert isinstance(engine, HasHiddenStates)  # as its drafter has seen
        features = engine.capture()
        seq = self.llm.sequence(ids[:1], SamplingParams(max_tokens=len(ids)))
        out = engine.verify([seq], [TokenTree.chain(ids[0], ids[1:])])
        engine.commit([seq], [list(range(len(ids)))])
        hidden = engine.hidden(seq).clone()
        engine.release([seq])
        heads = read_heads(self.heads).heads
        with torch.inference_mode():
            logits = FastHeads(heads, features).logits(hidden)
            if heads.token_map is not None:
                known = heads.token_map.to(features.device)
                whole = logits.new_full((*logits.shape[:2], engine.vocab_size), -torch.inf)
                logits = whole.index_copy(2, known, logits)
        named = {f"head_{head}_logits": rows for head, rows in enumerate(logits, start=1)}
        return {"base_logits": out.all_logits} | named

    def verify(self, tokens: Context, tree: Pairs | TokenTree) -> list[int]:
        """The new tokens of a greedy step after ``tokens``, in one forward: those of the accepted path of ``tree``, and
        a bonus token.

        Args:
            tree: a list of pairs, see `tutorial`, or a `TokenTree` whose root is the last of ``tokens``.

        Raises:
            TreeError: if it isn't a tree, or its root is another token.
        """
        ids, whole = _token_ids(tokens), _as_tree(tree)
        if isinstance(tree, TokenTree) and int(tree.tokens[0]) != ids[-1]:
            raise TreeError("the root of the tree is not the last token of the context")
        _check_tokens(whole.tokens[1:].tolist(), self.llm.engine.vocab_size)
        draft = Draft(ids[-1])
        for token, parent in zip(whole.tokens[1:].tolist(), whole.parents[1:].tolist(), strict=True):
            draft.add(parent, token, 0.0, 0)
        engine, seq = self.llm.engine, self.llm.sequence(ids, SamplingParams(max_tokens=len(whole) + 1))
        engine.prefill(seq)
        out = engine.verify([seq], [draft.tree])
        accepted = acceptance("match")(seq, draft, out.after(0))
        engine.release([seq])
        if accepted.error is not None:
            raise accepted.error
        return accepted.tokens


def build_tree_from_heads(logits_list: SequenceOf[torch.Tensor], branching: int = 2) -> list[tuple[int, int]]:
    """Medusa's Cartesian tree. Level d + 1 has, below each node, the ``branching`` most probable tokens of head d.

    Args:
        logits_list: the logits [vocab] of each head.

    Returns:
        Pairs in level order, see `tutorial`.

    Raises:
        OptionError: if branching is below 1, or there are no logits.
    """
    known = isinstance(branching, int) and isinstance(logits_list, list | tuple | torch.Tensor)
    if not known or branching < 1 or not len(logits_list):
        raise OptionError("a tree from heads needs branching of at least 1, and the logits of at least one head")
    pairs, level = list[tuple[int, int]](), [-1]
    for logits in logits_list:
        if not isinstance(logits, torch.Tensor) or logits.ndim != 1 or not logits.numel():
            raise OptionError("the logits of a head are a tensor [vocab]")
        best = logits.topk(min(branching, logits.numel())).indices.tolist()
        pairs += [(token, parent) for parent in level for token in best]
        level = list(range(len(pairs) - len(level) * len(best), len(pairs)))
    return pairs


def medusa_decode(context: Context, medusa_model: MedusaModel, max_tokens: int = 100) -> list[int]:
    """Greedy decoding with the heads. Returns the ids of the context and at most ``max_tokens`` new ones."""
    ids = _token_ids(context)
    if not isinstance(medusa_model, MedusaModel):
        raise OptionError(f"medusa_model must be a MedusaModel, and not of the type {type(medusa_model).__name__}")
    return [*ids, *medusa_model.llm.generate(ids, SamplingParams(max_tokens=max_tokens))[0].token_ids]


def _check_tokens(ids: SequenceOf[int], vocab_size: int) -> None:
    if any(not 0 <= token < vocab_size for token in ids):
        raise PromptError(f"a token id is outside the vocabulary of {vocab_size}")
