"""What is counted, by hand and through the loop."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import decode, make_sequence, random_table
from tokentree.acceptance import Match
from tokentree.decoder import Decoder
from tokentree.draft import Draft
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.engines.table import TableEngine
from tokentree.metrics import Metrics
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes import Static, shape
from tokentree.shapes.base import Shape


def test_steps_add_up() -> None:
    metrics = Metrics()
    metrics.count_step(depth=2, nodes=6, accepted=2, refused=False)  # to a leaf: 3 new tokens
    metrics.count_step(depth=3, nodes=5, accepted=1, refused=True)  # 2
    metrics.count_step(depth=1, nodes=2, accepted=0, refused=True)  # 1
    metrics.count_step(depth=0, nodes=0, accepted=0, refused=False)  # no draft: 1
    metrics.new_tokens = 7
    metrics.decode_seconds = 2.0
    assert (metrics.target_forwards, metrics.drafted_tokens, metrics.accepted_tokens) == (4, 13, 3)
    assert metrics.refused_steps == 2
    assert metrics.offered_by_depth == [3, 2, 1]
    assert metrics.accepted_by_depth == [2, 1, 0]
    assert metrics.mean_accepted_length == 7 / 4
    assert metrics.acceptance_rate == 3 / 5
    assert metrics.tokens_per_second == 3.5


def test_nothing_done_divides_by_nothing() -> None:
    metrics = Metrics()
    assert (metrics.mean_accepted_length, metrics.acceptance_rate, metrics.tokens_per_second) == (0, 0, 0)


def test_to_dict_holds_the_counts_and_what_follows_from_them() -> None:
    metrics = Metrics(prompt_tokens=3, new_tokens=4, target_forwards=2, accepted_tokens=2, refused_steps=2)
    known = metrics.to_dict()
    assert json.loads(json.dumps(known)) == known
    assert (known["prompt_tokens"], known["mean_accepted_length"], known["acceptance_rate"]) == (3, 2.0, 0.5)
    known["offered_by_depth"].append(1)
    assert metrics.offered_by_depth == []


def test_plain_decoding_has_a_mean_accepted_length_of_one() -> None:
    seq = make_sequence([0, 1], max_tokens=9)
    decode(TableEngine(random_table(6)), [seq])
    metrics = seq.metrics
    assert (metrics.prompt_tokens, metrics.new_tokens, metrics.target_forwards) == (2, 9, 9)
    assert (metrics.mean_accepted_length, metrics.drafted_tokens, metrics.acceptance_rate) == (1, 0, 0)


def test_a_perfect_drafter_gains_the_depth_of_its_tree() -> None:
    table = random_table(6)
    seq = make_sequence([0, 1], max_tokens=12)
    decode(TableEngine(table), [seq], DraftModel(TableEngine(table), 6), "chain:3")
    metrics = seq.metrics
    assert (metrics.new_tokens, metrics.target_forwards, metrics.mean_accepted_length) == (12, 3, 4)
    assert (metrics.accepted_tokens, metrics.refused_steps, metrics.acceptance_rate) == (9, 0, 1)
    assert metrics.offered_by_depth == metrics.accepted_by_depth == [3, 3, 3]
    assert metrics.accepted_by_source == {"draft_model": 9}


@pytest.mark.parametrize("form", ["2x2", "chain:4", "dynamic:nodes=7,depth=3,top_k=2"])
def test_what_the_loop_counts_is_what_happened(form: str) -> None:
    steps: list[tuple[Draft, Accepted]] = []
    table = random_table(6, seed=3, sharpness=2.0)
    drafter = DraftModel(TableEngine(table + random_table(6, seed=4)), 6)
    decoder = Decoder(
        TableEngine(table), drafter, shape(form), Match(), lambda _, draft, step: steps.append((draft, step))
    )
    seq = make_sequence([0, 1], max_tokens=40, temperature=1.0)
    for _ in decoder.run([seq]):
        pass
    metrics = seq.metrics
    assert metrics.target_forwards == len(steps) == decoder.engine.forwards  # type: ignore[attr-defined]
    assert metrics.new_tokens == sum(len(step.tokens) for _, step in steps) == 40
    assert metrics.accepted_tokens == metrics.new_tokens - metrics.target_forwards
    assert metrics.drafted_tokens == sum(len(draft) - 1 for draft, _ in steps)
    assert metrics.refused_steps == sum(len(draft.tree.children[step.path[-1]]) > 0 for draft, step in steps)
    deepest = max(max(draft.depths) for draft, _ in steps)
    assert metrics.accepted_by_depth == [sum(len(s.path) > d for _, s in steps) for d in range(1, deepest + 1)]
    assert metrics.offered_by_depth == [sum(max(t.depths) >= d for t, _ in steps) for d in range(1, deepest + 1)]


def _cycle(vocab: int, but: dict[int, int] | None = None) -> torch.Tensor:
    """A model that counts upwards and starts again, but for the successors given."""
    successors = [(token + 1) % vocab for token in range(vocab)]
    for token, successor in (but or {}).items():
        successors[token] = successor
    return torch.eye(vocab)[successors]


class _Uncut(Static):
    """A chain for each drafter, all of them kept."""

    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        return draft


def test_accepted_tokens_are_counted_for_every_drafter_that_proposed_them() -> None:
    # The draft model takes 2 for the successor of 0; the text itself holds one round, so lookup knows all of it.
    model = DraftModel(TableEngine(_cycle(4, {0: 2})), 4, "wrong after 0")
    drafter = Merged([model, NGram(min_n=1)])
    seq = make_sequence([0, 1, 2, 3, 0], max_tokens=12)
    assert decode(TableEngine(_cycle(4)), [seq], drafter, _Uncut([1])) == [[1, 2, 3, 0] * 3]
    # every step emits an accepted token and a bonus token: the accepted ones are 1 (after 0) and 3 (after 2), in turn
    assert seq.metrics.accepted_by_source == {"ngram": 6, "wrong after 0": 3}
    assert seq.metrics.accepted_tokens == 6
    assert seq.metrics.drafted_tokens == 3 * 2 + 3 * 1  # after 0 the two disagree, after 2 they share a node


def test_tokens_cut_off_are_not_counted() -> None:
    table = _cycle(4)
    seq = make_sequence([0], eos_ids=frozenset({2}), max_tokens=12)
    assert decode(TableEngine(table), [seq], DraftModel(TableEngine(table), 4), "chain:3") == [[1, 2]]
    # 1 is an accepted token; 2 was one, too, but is the last of the text and takes the place of the bonus token
    assert (seq.metrics.accepted_tokens, seq.metrics.new_tokens, seq.metrics.refused_steps) == (1, 2, 0)


def test_seconds_of_the_parts_make_up_the_step() -> None:
    seqs: list[Sequence] = [make_sequence([0, 1], max_tokens=5) for _ in range(2)]
    decode(TableEngine(random_table(6)), seqs, NGram(min_n=1))
    for seq in seqs:
        parts = seq.metrics.draft_seconds + seq.metrics.verify_seconds + seq.metrics.accept_seconds
        assert 0 < parts == pytest.approx(seq.metrics.decode_seconds)
        assert seq.metrics.tokens_per_second == 5 / seq.metrics.decode_seconds


class Reads(NGram):
    """Says that reading a prompt took it 100 seconds."""

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        for seq in seqs if not seqs[0].output_ids else ():
            seq.metrics.prefill_seconds += 100
        return super().propose(seqs, shape, sampled)


def test_a_prompt_that_a_drafter_reads_is_no_part_of_the_step() -> None:
    seq = make_sequence([0, 1], max_tokens=5)
    decode(TableEngine(random_table(6)), [seq], Reads(min_n=1))
    assert seq.metrics.prefill_seconds > 100
    assert -100 < seq.metrics.decode_seconds < -90  # it took no time here, so they are missing from the step
    assert seq.metrics.draft_seconds < -90
