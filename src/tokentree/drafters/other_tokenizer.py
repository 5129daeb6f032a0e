"""Draft models whose tokenizer isn't the target's (Timor et al. 2025, arXiv:2502.05202).

Two ways:

- `SharedTokens` (token-level intersection, TLI) proposes the tokens that both vocabularies have. It can draw them.
- `SameText` (string-level exact match, SLEM) proposes text, cut into the target's tokens. It picks the most probable.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from enum import Enum

import numpy as np
import torch

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.draft_model import DraftModel, caught_up
from tokentree.drafters.merged import Merged
from tokentree.drafters.pard import SLOTS, Pard
from tokentree.engines.base import Engine
from tokentree.engines.drafting import Rewinds
from tokentree.engines.output import TargetOutput
from tokentree.errors import OptionError, PairingError
from tokentree.growing import LOG_SCORE, PARENT, TOKEN
from tokentree.sampling import SamplingParams
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import TokenTree
from tokentree.vocabularies import Continuation, DraftText, Vocabularies

ENOUGH = 0.9  # of the larger vocabulary is shared: then what the other tokens would bring isn't worth cutting texts
LONGER = 4  # times as many tokens as the target's a text may get in a draft model's


class Way(Enum):
    """How a draft model with another tokenizer drafts."""

    AUTO = "auto"
    TLI = "tli"
    SLEM = "slem"


class DraftModels(Merged):
    """All draft models, merged into one tree."""

    @classmethod
    def make(cls, parts: Parts, vocabulary: Way = Way.AUTO, slots: int = SLOTS) -> Drafter:
        """The drafter of the draft models that there are.

        Args:
            vocabulary: how those draft whose tokenizer isn't the target's. By default by the tokens that both have if
                these are nearly all, or if children must be drawn; otherwise by text.
            slots: how many tokens those guess at once that can.
        """
        if not parts.draft_engines:
            raise PairingError("drafter='draft_model' needs draft_model=..., a smaller model")
        if vocabulary is not Way.AUTO and not parts.vocabularies:
            raise PairingError(
                f"vocabulary={vocabulary.value} is for a draft model with another tokenizer, and none of those here is "
                "known to have one: name it, or load it from where its tokenizer is"
            )
        if slots < 1:
            raise OptionError(f"slots={slots} is no number of tokens to guess: it is at least 1")
        if slots != SLOTS and not parts.masks:
            raise PairingError(
                f"slots={slots} is for a draft model that guesses several tokens at once (PARD): none does"
            )
        drafters = [_drafter(name, engine, parts, vocabulary, slots) for name, engine in parts.draft_engines]
        return drafters[0] if len(drafters) == 1 else cls(drafters)


def _drafter(name: str, engine: Engine, parts: Parts, way: Way, slots: int) -> Drafter:
    vocab_size, vocabularies = parts.engine.vocab_size, parts.vocabularies.get(name)
    if name in parts.masks:
        return Pard(engine, vocab_size, parts.masks[name], slots, name)
    if vocabularies is None:
        return DraftModel(engine, vocab_size, name)
    if not isinstance(engine, Rewinds):
        raise PairingError(f"the draft model {name!r} has another tokenizer, and its engine can't rewind a text")
    by_tokens = way is Way.TLI or (way is Way.AUTO and (parts.draws_children or vocabularies.overlap >= ENOUGH))
    if by_tokens and not len(vocabularies.shared[0]):
        raise PairingError(f"the draft model {name!r} has no token in common with the target: use vocabulary=slem")
    texts = DraftTexts(engine, vocabularies)
    return SharedTokens(texts, vocab_size, name) if by_tokens else SameText(texts, name)


class DraftTexts:
    """The texts of all requests in a draft model's tokens, with their KV.

    Each has a sequence of its own, which the draft model's engine knows. Its tokens are always those of the committed
    rows, and behind them what has no KV yet.

    Args:
        engine: holds the draft model.
        vocabularies: of both models.
    """

    def __init__(self, engine: Rewinds, vocabularies: Vocabularies) -> None:
        self.engine, self.vocabularies = engine, vocabularies
        self._texts: dict[int, DraftText] = {}
        self._seqs: dict[int, Sequence] = {}

    def followed(self, seq: Sequence) -> Sequence | None:
        """The sequence for the text of ``seq``, with at least one token that has no KV. None where it has no tokens,
        where it ends with bytes that are no tokens there, or where the draft model's context doesn't hold it."""
        text = self._texts.setdefault(seq.id, DraftText(self.vocabularies))
        text.follow(seq.tokens)
        if not text.ids:
            return None
        if seq.id not in self._seqs:
            params = SamplingParams(
                temperature=seq.params.temperature, max_tokens=min(LONGER * seq.params.max_tokens, 1 << 40)
            )
            self._seqs[seq.id] = Sequence(list(text.ids), params, seq.noise, 1 << 60)
        own = self._seqs[seq.id]
        same = _same(own.tokens, text.ids)
        if self.engine.committed(own) > min(same, len(text.ids) - 1):
            self.engine.rewind(own, min(same, len(text.ids) - 1))
        own.tokens = list(text.ids)
        return own if text.whole and len(own.tokens) <= self.engine.context else None

    def read(self, seq: Sequence, upto: int | None) -> None:
        """Computes the KV of a new text, as large a part of it as ``upto`` is of the target's tokens."""
        own = self.followed(seq)
        if own is not None:
            last = len(own.tokens) - 1
            share = last if upto is None else last * upto // max(1, len(seq.tokens) - 1)
            self.engine.prefill(own, min(last, share))

    def unread(self, seq: Sequence) -> list[int]:
        """The tokens of a followed text that have no KV."""
        own = self._seqs[seq.id]
        return own.tokens[self.engine.committed(own) :]

    def of(self, seqs: SequenceOf[Sequence]) -> list[Sequence]:
        """The sequences of followed texts."""
        return [self._seqs[seq.id] for seq in seqs]

    def accept(self, seq: Sequence, tokens: list[int], ids: list[int]) -> None:
        """Goes on with the target's ``tokens``. Their text begins with that of ``ids``, whose KV was committed."""
        own = self._seqs[seq.id]
        own.tokens = [*own.tokens, *ids]
        special = next((i for i, token in enumerate(ids) if self.vocabularies.draft.name(token) is not None), len(ids))
        self._texts[seq.id].accept(tokens, ids[:special])

    def forgotten(self, seqs: SequenceOf[Sequence]) -> list[Sequence]:
        """Forgets the texts of ``seqs``. Returns their sequences, which the engine still knows."""
        for seq in seqs:
            self._texts.pop(seq.id, None)
        return [self._seqs.pop(seq.id) for seq in seqs if seq.id in self._seqs]


def _same(ids: list[int], others: list[int]) -> int:
    """How many of ``ids`` both begin with."""
    if others[: len(ids)] == ids:
        return len(ids)
    return next(i for i, (one, other) in enumerate(zip([*ids, -1], [*others, -2])) if one != other)


# -- tokens that both have --------------------------------------------------------------------------------------------


class SharedTokens(DraftModel):
    """Proposes the tokens that both vocabularies have (TLI).

    The draft model's distribution is restricted to them and normalised. Children are drawn from it, so `rejection` is
    lossless with it.

    Args:
        texts: of the draft model.
        vocab_size: the target's.
        name: shown beside the tokens it earned.
    """

    def __init__(self, texts: DraftTexts, vocab_size: int, name: str = "draft_model") -> None:
        engine = SharedVocabulary(texts, vocab_size)
        super().__init__(engine, vocab_size, name, texts.vocabularies.shared[0])
        self._texts = texts
        self._followed: dict[int, Sequence] = {}  # in this step

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        self._followed = {seq.id: own for seq in seqs if (own := self._texts.followed(seq)) is not None}
        return super().propose(seqs, shape, sampled)

    def _has_read(self, seq: Sequence, texts: int) -> bool:
        most = None if texts == 1 else self._part
        return caught_up(self._texts.engine, self._followed[seq.id], most, seq)

    def _may_grow(self, seq: Sequence, depth: int, shape: Shape) -> bool:
        own = self._followed.get(seq.id)
        fits = own is not None and len(own.tokens) + depth <= self._texts.engine.context
        return fits and super()._may_grow(seq, depth, shape)


class SharedVocabulary:
    """A draft model as a `DraftEngine` whose tokens are the target's.

    Its logits are those of the shared tokens, in the order of the target's ids. A tree begins with the last token of
    the text, which stands for all that the draft model hasn't read.

    Args:
        texts: of the draft model.
        vocab_size: the target's.
    """

    context = 1 << 60  # `SharedTokens` sees to the draft model's own

    def __init__(self, texts: DraftTexts, vocab_size: int) -> None:
        self.vocab_size, self._texts = vocab_size, texts
        ids, columns = texts.vocabularies.shared
        self._draft_ids = np.zeros(vocab_size, np.int64)  # of the target's tokens
        self._draft_ids[ids] = columns
        self._columns = torch.from_numpy(columns)
        self._trees: dict[int, tuple[TokenTree, int]] = {}  # the last ones, and how many rows come before their roots

    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        self._texts.read(seq, upto)
        return 0

    def committed(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None
    ) -> TargetOutput:
        firsts = [0] * len(seqs) if firsts is None else list(firsts)
        grown, done, starts = list[TokenTree](), list[int](), list[int]()
        for seq, tree, first in zip(seqs, trees, firsts, strict=True):
            unread = self._texts.unread(seq)
            more = len(unread) - 1
            self._trees[seq.id] = tree, more
            tokens = np.concatenate([unread, self._draft_ids[tree.tokens[1:]]])
            parents = np.concatenate([np.arange(-1, more), tree.parents[1:] + more])
            grown.append(TokenTree(tokens, parents))
            done.append(first + more if first else 0)
            starts.append(first + more - done[-1])  # rows before that of the first node
        out = self._texts.engine.verify(self._texts.of(seqs), grown, done)
        starts = [start + more for start, more in zip(out.starts, starts, strict=True)]
        return TargetOutput(lambda: self._shared(out.all_logits), starts, firsts, out.seconds)

    def _shared(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, shared tokens], of logits over the draft model's vocabulary."""
        self._columns = self._columns.to(logits.device)
        return logits.index_select(1, self._columns)

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        for seq, path, own in zip(seqs, paths, self._texts.of(seqs), strict=True):
            tree, more = self._trees.pop(seq.id)
            self._texts.engine.commit([own], [[*range(more), *(more + node for node in path)]])
            tokens = tree.tokens[path[1:]]
            self._texts.accept(seq, tokens.tolist(), self._draft_ids[tokens].tolist())

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        self._texts.engine.release(self._texts.forgotten(seqs))
        for seq in seqs:
            self._trees.pop(seq.id, None)


# -- text -------------------------------------------------------------------------------------------------------------


class SameText(Drafter):
    """Proposes what the draft model writes, cut into the target's tokens (SLEM).

    The draft model grows a tree in its own tokens. Each path is a text. The end of the text so far and this text are
    cut into the target's tokens together. Where one of these ends with the text so far, those behind it are a path of
    the draft. A text of which no token ends there is left out.

    Args:
        texts: of the draft model.
        name: shown beside the tokens it earned.
    """

    by_levels = True

    def __init__(self, texts: DraftTexts, name: str = "draft_model") -> None:
        self.name, self._texts = name, texts
        self._model = DraftModel(texts.engine, len(texts.vocabularies.draft.pieces), name)
        self._drafted: dict[int, Draft] = {}  # in the draft model's tokens

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        for seq in seqs:
            self._texts.read(seq, upto)

    def observe_prompt(self, seqs: list[Sequence], upto: int) -> None:
        """Nothing yet, as with a `DraftModel`."""

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        followed = [(seq, own) for seq in seqs if (own := self._texts.followed(seq)) is not None]
        seen = _ShapeOfTexts(shape, {own.id: seq for seq, own in followed})
        before = [own.metrics.prefill_seconds for _, own in followed]
        drafted = self._model.propose([own for _, own in followed], seen, sampled=False) if followed else []
        for (seq, own), seconds in zip(followed, before, strict=True):
            seq.metrics.prefill_seconds += own.metrics.prefill_seconds - seconds
        self._drafted |= {seq.id: draft for (seq, _), draft in zip(followed, drafted, strict=True)}
        return [self._translated(seq, self._drafted.get(seq.id), shape) for seq in seqs]

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        for seq, step in zip(seqs, accepted, strict=True):
            if (drafted := self._drafted.pop(seq.id, None)) is None:
                continue
            own = self._texts.of([seq])[0]
            ids = drafted.path_tokens(self._come_true(drafted, step.tokens))
            self._model.observe([own], [drafted], out, [Accepted([], [*ids, -1])])
            kept = ids[: max(0, self._texts.engine.committed(own) - len(own.tokens))]
            self._texts.accept(seq, step.tokens, kept)

    def release(self, seqs: list[Sequence]) -> None:
        self._model.release(self._texts.forgotten(seqs))
        for seq in seqs:
            self._drafted.pop(seq.id, None)

    def _come_true(self, drafted: Draft, tokens: list[int]) -> int:
        """The node whose path spells the longest part of what the target's ``tokens`` begin with."""
        target, draft = self._texts.vocabularies.target, self._texts.vocabularies.draft
        special = next((i for i, token in enumerate(tokens) if target.name(token) is not None), len(tokens))
        text = b"".join(target.piece(token) for token in tokens[:special])
        ends, best = {0: 0}, 0
        for node in range(1, len(drafted)):
            begin, piece = ends.get(int(drafted.ints[PARENT, node])), draft.piece(int(drafted.ints[TOKEN, node]))
            if begin is not None and piece and text.startswith(piece, begin):
                ends[node] = begin + len(piece)
                best = node if ends[node] > ends[best] else best
        return best

    def _translated(self, seq: Sequence, drafted: Draft | None, shape: Shape) -> Draft:
        """``drafted`` in the target's tokens."""
        if drafted is None:
            return Draft(seq.tokens[-1])
        draft = Draft(seq.tokens[-1], None, drafted.level_seconds, drafted.levels)
        behind, scores = Continuation(self._texts.vocabularies.target, seq.tokens), drafted.log_scores
        below: dict[int, dict[int, int]] = {}  # the children of each node, by their tokens
        for leaf in sorted(drafted.tree.leaves.tolist(), key=lambda leaf: -scores[leaf]):
            nodes, text = self._spelled(drafted, leaf)
            parent, ends = 0, [end for _, end in nodes]
            for token, end in behind.tokens(text)[: min(shape.max_depth, seq.room - 1)]:
                children = below.setdefault(parent, {})
                if token not in children:
                    score = scores[nodes[bisect_left(ends, end)][0]]
                    log_prob = min(0.0, score - float(draft.floats[LOG_SCORE, parent]))
                    children[token] = draft.add(parent, token, log_prob, len(children))
                parent = children[token]
        return draft

    def _spelled(self, drafted: Draft, leaf: int) -> tuple[list[tuple[int, int]], bytes]:
        """The text of the path to ``leaf``, up to the first special token; its nodes, and where each ends in it."""
        nodes, text = list[tuple[int, int]](), b""
        for node in drafted.tree.path(leaf)[1:]:
            piece = self._texts.vocabularies.draft.piece(int(drafted.ints[TOKEN, node]))
            if not piece:
                break
            text += piece
            nodes.append((node, len(text)))
        return nodes, text


class _ShapeOfTexts(Shape):
    """A shape that is told of texts in a draft model's tokens.

    Args:
        shape: knows the target's sequences.
        seqs: these, by the id of the draft model's.
    """

    def __init__(self, shape: Shape, seqs: dict[int, Sequence]) -> None:
        self._shape, self._seqs = shape, seqs
        self.max_depth, self.max_nodes, self.paths = shape.max_depth, shape.max_nodes, shape.paths

    def counts(self, seq: Sequence, draft: Draft, frontier: SequenceOf[int]) -> list[int]:
        return self._shape.counts(self._seqs[seq.id], draft, frontier)

    def select(self, seq: Sequence, draft: Draft, level: SequenceOf[int]) -> list[int]:
        return self._shape.select(self._seqs[seq.id], draft, level)

    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        return self._shape.prune(self._seqs[seq.id], draft)
