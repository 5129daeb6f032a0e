"""Beam search, several steps per forward: each beam grows a tree, and one forward verifies them all.

Which texts are kept is transformers' own choice (5.x, `GenerationMixin._beam_search`); `BeamSearch` makes it, one step
after another. `BeamDecoder` gives it log-probabilities, as many steps' worth as a forward has: it goes on while all
texts that are kept end at a node of the trees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.engines.base import Branches
from tokentree.engines.output import TargetOutput
from tokentree.errors import DeadEnd
from tokentree.exclusive import Exclusive, stepping
from tokentree.sampling import process_logits
from tokentree.scheduler import PREFILL_ROWS
from tokentree.sequence import Accepted, FinishReason, Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import TokenTree

WORST = -1e9  # the score of what is not there


@dataclass(frozen=True)
class Hypothesis:
    """A text that beam search keeps.

    Args:
        tokens: the output's.
        score: its log-probability, divided by its length to the power of the length penalty once it is finished.
    """

    tokens: list[int]
    score: float


@dataclass(frozen=True)
class Move:
    """How a running text came about in a step: that of beam ``parent``, and ``token``."""

    parent: int
    token: int


class BeamSearch:
    """Keeps the most probable texts.

    Args:
        num_beams: texts that run at a time, and are kept when finished.
        limit: tokens after which a text is finished.
        eos_ids: tokens that finish a text.
        length_penalty: a finished text's score is divided by its length to this power.
        early_stopping: True ends as soon as `num_beams` texts are finished; False, when the best running one, at its
            present length, would not displace one of them; "never", when it could not at any length.

    Attributes:
        running: the outputs that go on, the best one first.
        scores: float32[num_beams], their log-probabilities.
        done: whether the search is over.
    """

    def __init__(
        self, num_beams: int, limit: int, eos_ids: frozenset[int], length_penalty: float = 1.0,
        early_stopping: bool | str = False,
    ) -> None:  # fmt: skip
        self.num_beams, self._limit, self._eos_ids = num_beams, limit, sorted(eos_ids)
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self.running: list[list[int]] = [[] for _ in range(num_beams)]
        self.scores = torch.full((num_beams,), WORST, dtype=torch.float32)
        self.scores[0] = 0.0  # all begin alike, and one is enough
        self._finished: list[list[int]] = [[] for _ in range(num_beams)]
        self._finished_scores = torch.full((num_beams,), WORST, dtype=torch.float32)
        self._is_finished = torch.zeros(num_beams, dtype=torch.bool)
        self._can_improve, self.done = True, False

    @property
    def live(self) -> list[int]:
        """The beams that stand for a text."""
        return [beam for beam, score in enumerate(self.scores.tolist()) if score > WORST / 2]

    def advance(self, log_probs: torch.Tensor) -> list[Move]:
        """One step.

        Args:
            log_probs: float32[num_beams, vocab], of the token that comes after each running text.

        Returns:
            Where the texts that run now came from.
        """
        vocab, length = log_probs.shape[1], len(self.running[0]) + 1
        kept = max(2, 1 + len(self._eos_ids)) * self.num_beams
        scores = (log_probs + self.scores.to(log_probs.device)[:, None]).flatten()
        best, places = (found.cpu() for found in torch.topk(scores, k=min(kept, log_probs.numel())))
        moves = [Move(place // vocab, place % vocab) for place in places.tolist()]
        texts = [[*self.running[move.parent], move.token] for move in moves]
        ends = torch.tensor([length >= self._limit or move.token in self._eos_ids for move in moves])

        going = best + ends.float() * WORST
        order = torch.topk(going, k=self.num_beams).indices
        self._finish(texts, best, ends, length)
        self.running, self.scores = [texts[i] for i in order.tolist()], going[order]

        reach = self._limit if self._early_stopping == "never" and self._length_penalty > 0 else length
        worst = torch.where(self._is_finished, self._finished_scores.min(), WORST)
        self._can_improve &= bool((self.scores[:1] / reach**self._length_penalty > worst).any())
        full = bool(self._is_finished.all()) and self._early_stopping is True
        self.done = not self._can_improve or full or bool(ends.all())
        return [moves[i] for i in order.tolist()]

    def best(self, count: int) -> list[Hypothesis]:
        """The best finished texts, the best one first; fewer, if rules left so few."""
        return [
            Hypothesis(tokens, score)
            for tokens, score in zip(self._finished[:count], self._finished_scores.tolist()[:count], strict=True)
            if score > WORST / 2
        ]

    def reason(self, tokens: list[int]) -> FinishReason:
        """Why a text that is finished ended."""
        return "stop" if tokens[-1] in self._eos_ids else "length"

    def _finish(self, texts: list[list[int]], best: torch.Tensor, ends: torch.Tensor, length: int) -> None:
        """Takes in texts that end, if they are among the first `num_beams`, and drops the worst."""
        first = torch.arange(len(texts)) < self.num_beams
        new = best / length**self._length_penalty
        if bool(self._is_finished.all()) and self._early_stopping is True:
            new = new + WORST
        if not self._can_improve:
            new = new + WORST
        new = new + (~(ends & first)).float() * WORST
        scores, finished = torch.cat([self._finished_scores, new]), torch.cat([self._is_finished, ends & first])
        order = torch.topk(scores, k=self.num_beams).indices
        every = [*self._finished, *texts]
        self._finished = [every[i] for i in order.tolist()]
        self._finished_scores, self._is_finished = scores[order], finished[order]


@dataclass
class _Beam:
    """A running text.

    Args:
        seq: what drafters know of it.
        parent: the node that its last token goes below, -1 where that is the root.
    """

    seq: Sequence
    parent: int = -1


@dataclass(frozen=True)
class _Path:
    """What a running text gained in a forward.

    Args:
        place: the beam that it comes from, by its number among those that were drafted for.
        nodes: from that beam's last token down; after the last of them comes ``token``.
    """

    place: int
    nodes: list[int]
    token: int = -1

    def with_token(self, token: int) -> _Path:
        return replace(self, token=token)

    def with_node(self, node: int) -> _Path:
        return replace(self, nodes=[*self.nodes, node])

    def accepted(self, tree: TokenTree, leaf: int) -> Accepted:
        """The same as a drafter is told it: nodes of the draft whose root was ``leaf``, and tokens."""
        tokens = [*tree.tokens[self.nodes[1:]].tolist(), self.token]
        return Accepted([node - leaf for node in self.nodes], tokens, refused=True)


class BeamDecoder:
    """Beam search on one text at a time.

    All running texts are branches of one forest. What they have in common is committed; the rest of them stays in the
    KV as provisional rows from one forward to the next, and each text's last token goes in anew, with a draft below it.

    Args:
        engine: the target model.
        drafter: who proposes the trees, one for each running text.
        shape: how they grow and are cut.
    """

    def __init__(self, engine: Branches, drafter: Drafter, shape: Shape) -> None:
        self._engine, self._drafter, self._shape = engine, drafter, shape
        self._known: set[int] = set()  # texts that the drafter was told of

    @property
    def lock(self) -> Exclusive:
        """The engine's, held for a step at a time."""
        return self._engine.lock

    def run(self, seq: Sequence, advance: Callable[[], None] = lambda: None) -> BeamSearch:
        """Searches to the end; ``advance`` is called after each forward.

        Raises:
            RequestError: if the request's rules fail, or leave no text a token to go on with.
        """
        params = seq.params
        ends = frozenset() if params.ignore_eos else seq.eos_ids | {*params.stop_token_ids}
        with self.lock.step():
            search = BeamSearch(params.num_beams, seq.room, ends, params.length_penalty, params.early_stopping)
        beams, self._prompt = list[_Beam](), seq  # drafters know the prompt as a text of its own
        tokens, parents = list[int](), list[int]()  # of the nodes that are in the KV, the root first
        try:
            self._read(seq)
            beams = self._begin(seq)
            while not search.done:
                tokens, parents, beams = self._step(seq, search, tokens, parents, beams)
                advance()
        finally:
            with self.lock:
                self._engine.release([seq])
                self._release([self._prompt, *(beam.seq for beam in beams)])
        if not search.best(1):
            raise DeadEnd("the request's rules leave no beam a token to choose")
        return search

    def _read(self, seq: Sequence) -> None:
        """Reads the prompt, a part at a time."""
        started, last = time.perf_counter(), len(seq.tokens) - 1
        for upto in (*range(PREFILL_ROWS, last, PREFILL_ROWS), last):
            seq.metrics.reused_tokens += self._engine.prefill(seq, upto)
        seq.metrics.prefill_seconds += time.perf_counter() - started

    @stepping
    def _begin(self, seq: Sequence) -> list[_Beam]:
        """The first beam."""
        started = time.perf_counter()
        # the drafter knows the prompt as long as the search goes on, whichever beams come and go
        self._prompt = self._twin(seq, [], [])
        beams = [_Beam(self._twin(seq, [], []))]
        seq.metrics.prefill_seconds += time.perf_counter() - started
        return beams

    @stepping
    def _step(
        self, seq: Sequence, search: BeamSearch, tokens: list[int], parents: list[int], beams: list[_Beam]
    ) -> tuple[list[int], list[int], list[_Beam]]:
        """One forward, and as many steps as it serves; returns the nodes that stay in the KV, and the beams."""
        clock = [time.perf_counter()]
        seqs, done = [beam.seq for beam in beams], len(tokens)
        drafts = [Draft(one.tokens[-1]) for one in seqs]
        if self._shape.rests(seqs):
            self._forget(seqs)  # keeping up with beams that come and go takes time too
        else:
            self._drafter.prefill([one for one in [self._prompt, *seqs] if one.id not in self._known])
            self._known |= {self._prompt.id, *(one.id for one in seqs)}
            drafts = self._shape.cut(seqs, self._drafter.propose(seqs, self._shape, False))
        drafts = [draft.cut(one.room - 1) for one, draft in zip(seqs, drafts, strict=True)]
        leaves = list[int]()
        for beam, draft in zip(beams, drafts, strict=True):
            leaves.append(len(tokens))
            tokens = [*tokens, *draft.tokens]
            parents = [*parents, beam.parent, *(leaves[-1] + parent for parent in draft.parents[1:])]
        tree = TokenTree(np.array(tokens), np.array(parents))
        clock.append(time.perf_counter())
        out = self._engine.verify([seq], [tree], [done])
        clock.append(time.perf_counter())

        length = len(search.running[0])
        paths = self._advance(seq, search, tree, out, leaves)
        if not search.done:
            tokens, parents, beams = self._go_on(seq, beams, drafts, tree, out, leaves, paths, clock)
        self._record(seq, drafts, len(search.running[0]) - length, clock)
        return tokens, parents, beams

    def _advance(
        self, seq: Sequence, search: BeamSearch, tree: TokenTree, out: TargetOutput, leaves: list[int]
    ) -> list[_Path]:
        """Steps as long as all running texts end at a node of the tree; at least one."""
        at = {beam: _Path(place, [leaf]) for place, (beam, leaf) in enumerate(zip(search.live, leaves, strict=True))}
        while True:
            rows = {beam: self._log_probs(seq, search.running[beam], out.logits(0, at[beam].nodes[-1])) for beam in at}
            filler = next(iter(rows.values()))
            moves = search.advance(torch.stack([rows.get(beam, filler) for beam in range(search.num_beams)]))
            new = {beam: at[moves[beam].parent].with_token(moves[beam].token) for beam in search.live}
            children = {beam: tree.child(path.nodes[-1], path.token) for beam, path in new.items()}
            if search.done or None in children.values():
                return list(new.values())
            at = {beam: new[beam].with_node(child) for beam, child in children.items() if child is not None}

    @staticmethod
    def _log_probs(seq: Sequence, output: list[int], logits: torch.Tensor) -> torch.Tensor:
        """float32[vocab]: raw log-probabilities, to which rules are applied as transformers' beam search does."""
        log_probs, params = logits.float().log_softmax(-1), seq.params
        banned = sorted(seq.eos_ids | {*params.stop_token_ids}) if len(output) < params.min_tokens else []
        try:
            return process_logits(log_probs, params, seq.prompt_ids, output, banned)
        except DeadEnd:  # this beam ends here, and others may go on
            return torch.full_like(log_probs, -math.inf)

    def _go_on(
        self, seq: Sequence, beams: list[_Beam], drafts: list[Draft], tree: TokenTree, out: TargetOutput,
        leaves: list[int], paths: list[_Path], clock: list[float],
    ) -> tuple[list[int], list[int], list[_Beam]]:  # fmt: skip
        """Keeps the KV of what runs on, and tells drafters and shape what came of their trees."""
        routes = [tree.path(path.nodes[-1]) for path in paths]
        shared = next((i for i, nodes in enumerate(zip(*routes)) if len({*nodes}) > 1), min(map(len, routes)))
        kept, committed = sorted({node for route in routes for node in route}), shared - 1  # what all share but its end
        self._engine.keep(seq, kept, committed)
        where = {node: place for place, node in enumerate(kept[committed:])}
        tokens = tree.tokens[kept[committed:]].tolist()
        parents = [-1, *(where[int(tree.parents[node])] for node in kept[committed + 1 :])]

        steps = [Accepted([0], []) for _ in beams]
        heirs = dict[int, int]()  # of the beams that were drafted for: which path goes on with the same sequence
        for number, path in enumerate(paths):
            if path.place not in heirs:
                heirs[path.place] = number
                steps[path.place] = path.accepted(tree, leaves[path.place])
        going = sorted(heirs)
        view = TargetOutput(out.all_logits, [out.row(0, leaves[k]) for k in going], [0] * len(going), out.seconds)
        seqs = [beam.seq for beam in beams]
        if seqs[0].id in self._known:  # else this step went without drafts
            self._drafter.observe([seqs[k] for k in going], [drafts[k] for k in going], view, [steps[k] for k in going])
        self._shape.observe(seqs, drafts, steps, clock[1] - clock[0], out.seconds)

        made = list[_Beam]()
        for number, path in enumerate(paths):
            new, one = path.accepted(tree, leaves[path.place]).tokens, seqs[path.place]
            above = [where[node] for node in routes[number] if node in where]
            if heirs[path.place] == number:
                self._engine.branch(one, seq, above)
            else:
                one = self._twin(seq, [*one.output_ids, *new], above, one)
            made.append(_Beam(one, where[path.nodes[-1]]))
        for k in going:
            seqs[k].extend(steps[k])
        self._release([beam.seq for k, beam in enumerate(beams) if k not in heirs])
        return tokens, parents, made

    @staticmethod
    def _record(seq: Sequence, drafts: list[Draft], gained: int, clock: list[float]) -> None:
        """Counts a forward that was worth so many steps."""
        metrics, now = seq.metrics, time.perf_counter()
        drafted = sum(len(draft) - 1 for draft in drafts)
        metrics.count_step(max(draft.depth for draft in drafts), drafted, gained - 1, refused=True)
        metrics.draft_seconds += clock[1] - clock[0]
        metrics.verify_seconds += clock[2] - clock[1]
        metrics.accept_seconds += now - clock[2]
        metrics.decode_seconds += now - clock[0]
        metrics.new_tokens += gained
        metrics.steps.append((drafted + len(drafts), gained, now - clock[0]))

    def _twin(self, seq: Sequence, output: list[int], nodes: list[int], parent: Sequence | None = None) -> Sequence:
        """A sequence that drafters will know as a text of its own, whose KV ends with these nodes of what is kept; it
        goes on from ``parent``."""
        twin = Sequence(seq.prompt_ids, seq.params, seq.noise, seq.context, seq.eos_ids, references=seq.references)
        twin.tokens += output
        self._engine.branch(twin, seq, nodes)
        if parent is not None:
            self._shape.branch(twin, parent)
        return twin

    def _forget(self, seqs: list[Sequence]) -> None:
        """Lets the drafter forget those of ``seqs`` that it was told of."""
        known = [one for one in seqs if one.id in self._known]
        self._drafter.release(known)
        self._known -= {one.id for one in known}

    def _release(self, seqs: list[Sequence]) -> None:
        self._forget(seqs)
        self._shape.release(seqs)
        self._engine.release(seqs)
