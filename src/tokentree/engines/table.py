"""A language model that is a table: exact, tiny, and strict about how it is called. For tests and for theory."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from tokentree.engines.base import EngineInfo
from tokentree.engines.output import TargetOutput
from tokentree.errors import OptionError
from tokentree.exclusive import Exclusive
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree


class TableEngine:
    """Logits looked up by the last few tokens.

    Its "KV" is the list of committed tokens, so a drafter or decoder that commits the wrong rows gets logits that are
    visibly wrong. A node beyond the context raises `IndexError`.

    Args:
        table: float[vocab, ..., vocab]; the leading axes are the last tokens, oldest first. Missing history counts as
            token 0.

    Raises:
        OptionError: if the axes differ in length.
    """

    def __init__(self, table: torch.Tensor, context: int = 1 << 20) -> None:
        if table.ndim < 2 or len(set(table.shape)) != 1:
            raise OptionError("a table needs at least two axes, all as long as the vocabulary")
        self.table, self.context, self.vocab_size = table, context, table.shape[-1]
        self.lock, self.forwards = Exclusive(), 0
        self._order = table.ndim - 1
        self._committed: dict[int, list[int]] = {}
        self._trees: dict[int, TokenTree] = {}
        self._branches: dict[int, tuple[Sequence, int]] = {}
        self._kept: dict[int, list[int]] = {}  # tokens of the nodes that the next tree must begin with

    @property
    def info(self) -> EngineInfo:
        size = "x".join(map(str, self.table.shape))
        return EngineInfo(
            "a table", self.vocab_size, self.context, dtype=self.table.dtype, execution="look-ups",
            signature=f"table {size}", scores_prompts=True,
        )  # fmt: skip

    def logits_after(self, tokens: SequenceOf[int]) -> torch.Tensor:
        """[vocab], the logits after ``tokens``."""
        return self.table[tuple(([0] * self._order + list(tokens))[-self._order :])]

    def begin(self, seq: Sequence) -> int:
        self._committed[seq.id] = []
        return 0

    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        self._committed[seq.id] = seq.tokens[: -1 if upto is None else upto]
        return 0

    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None,
        reading: SequenceOf[tuple[Sequence, int]] = (),
    ) -> TargetOutput:  # fmt: skip
        firsts = [0] * len(seqs) if firsts is None else list(firsts)
        rows: list[torch.Tensor] = []
        starts: list[int] = []
        for seq, tree, first in zip(seqs, trees, firsts, strict=True):
            starts.append(len(rows))
            kept = self._kept.pop(seq.id, [])
            if tree.tokens[: len(kept)].tolist() != kept or (kept and first != len(kept)):
                raise IndexError("the tree does not begin with the nodes that were kept")
            self._trees[seq.id] = tree
            before = self._committed.setdefault(seq.id, [])
            if len(before) + int(tree.depths.max()) >= self.context:
                raise IndexError(f"a node lies beyond the context of {self.context}")
            rows += [
                self.logits_after([*before, *tree.tokens[tree.path(node)].tolist()]) for node in range(first, len(tree))
            ]
        read = dict[int, range]()
        for seq, count in reading:
            first = len(self._committed[seq.id]) + 1
            self._committed[seq.id] = seq.tokens[: first + count - 1]
            if seq.scores_prompt:
                read[seq.id] = range(len(rows), len(rows) + count)
                rows += [self.logits_after(seq.tokens[:end]) for end in range(first, first + count)]
        self.forwards += bool(seqs)
        logits = torch.stack(rows) if rows else self.table.new_zeros(0, self.vocab_size)
        return TargetOutput(logits, starts, firsts, 0.0, read=read)

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        for seq, path in zip(seqs, paths, strict=True):
            self._committed[seq.id] = self._committed[seq.id] + self._trees[seq.id].tokens[path].tolist()

    def keep(self, seq: Sequence, nodes: SequenceOf[int], committed: int) -> None:
        tree = self._trees[seq.id]
        self._committed[seq.id] = self._committed[seq.id] + tree.tokens[list(nodes[:committed])].tolist()
        self._kept[seq.id] = tree.tokens[list(nodes[committed:])].tolist()

    def rewind(self, seq: Sequence, rows: int) -> None:
        self._committed[seq.id] = self._committed.get(seq.id, [])[:rows]

    def committed(self, seq: Sequence) -> int:
        of, nodes = self._branches.get(seq.id, (seq, 0))
        return len(self._committed.get(of.id, ())) + nodes

    def branch(self, seq: Sequence, of: Sequence, nodes: SequenceOf[int]) -> None:
        self._branches[seq.id] = of, len(nodes)

    def nbytes(self, seq: Sequence, rows: int) -> int:
        return rows

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        for seq in seqs:
            self._branches.pop(seq.id, None)
            self._committed.pop(seq.id, None)
            self._trees.pop(seq.id, None)
            self._kept.pop(seq.id, None)
