"""Drafters that look things up: what they propose, what they remember, and how several make one tree."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file

from tests.conftest import decode, make_sequence, random_table
from tests.strategies import token_trees
from tokentree.acceptance import Match
from tokentree.decoder import Decoder
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.lookup.recycling import HOLDS_ALONE, HOLDS_IN_PAIR, LEAST_PROB, Recycling, _row
from tokentree.drafters.lookup.storage import write_arrays
from tokentree.drafters.lookup.suffix import END, Suffix
from tokentree.drafters.merged import Merged
from tokentree.engines.output import TargetOutput
from tokentree.engines.table import TableEngine
from tokentree.errors import OptionError
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes import Shape, shape
from tokentree.tree import TokenTree

CHAIN = shape("chain:4")
VOCAB = 24
TARGET, SURE = random_table(VOCAB, 2, seed=1, sharpness=2.0), random_table(VOCAB, 1, seed=1, sharpness=10.0)


def request(prompt: list[int], references: list[list[int]] | None = None, **params: Any) -> Sequence:
    seq = make_sequence(prompt, **params)
    seq.references = references or []
    return seq


def propose(drafter: Drafter, seq: Sequence, form: Shape = CHAIN) -> Draft:
    return drafter.propose([seq], form, sampled=False)[0]


def longest(drafter: Drafter, prompt: list[int], **options: Any) -> list[int]:
    """The longest path that a new request is offered."""
    return max(propose(drafter, request(prompt, **options)).tree.paths(), key=len)


# -- n-grams --------------------------------------------------------------------------------------------------------

small_text = st.lists(st.integers(0, 2), max_size=12)


def naive_lookup(
    tokens: list[int], references: list[list[int]], sizes: range, max_branches: int, depth: int
) -> TokenTree:
    """Longest match first, then the latest place; the text itself counts as later than its references."""
    texts, places = [tokens, *reversed(references)], list[tuple[int, int]]()
    for n in reversed(sizes):
        for which, text in enumerate(texts):
            for end in range(len(text) - 1, n - 1, -1):
                if text[end - n : end] == tokens[-n:] and (which, end) not in places:
                    places.append((which, end))
    branches = [texts[which][end : end + depth] for which, end in places[:max_branches]]
    return TokenTree.from_paths(tokens[-1], branches)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=5),
    st.lists(small_text, max_size=3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 4), st.integers(1, 5),
)  # fmt: skip
def test_ngrams_find_what_followed_the_longest_matches(
    pieces: list[list[int]], references: list[list[int]], min_n: int, more: int, max_branches: int, depth: int
) -> None:
    drafter, seq = NGram(min_n + more, min_n, max_branches), request(pieces[0], references)
    for piece in [[], *pieces[1:]]:
        seq.tokens += piece
        tree = propose(drafter, seq, shape(f"chain:{depth}")).tree
        naive = naive_lookup(seq.tokens, references, range(min_n, min_n + more + 1), max_branches, depth)
        assert (tree.tokens.tolist(), tree.parents.tolist()) == (naive.tokens.tolist(), naive.parents.tolist())


def test_the_longest_match_comes_first_with_the_highest_probability() -> None:
    draft = propose(NGram(max_n=3, min_n=1), request([1, 2, 3, 4, 5, 0, 2, 3, 6, 0, 3, 7, 0, 1, 2, 3]))
    assert [path[0] for path in draft.tree.paths()] == [4, 6, 7]
    first = [draft.tree.child(0, token) or 0 for token in (4, 6, 7)]
    # a match of three tokens, of two at the second place, of one at the third
    assert [draft.log_probs[node] for node in first] == pytest.approx(np.log([3 / 4, 2 / 3 / 2, 1 / 2 / 4]))
    assert [draft.ranks[node] for node in first] == [0, 1, 2]
    assert draft.log_probs[2] == pytest.approx(math.log(0.9))


def test_no_match_crosses_from_a_reference_into_another_text() -> None:
    references = [[1, 2], [3, 4], [5, 6, 9]]
    assert longest(NGram(min_n=1), [2], references=references) == []  # 3 stands behind it, in the next text
    assert longest(NGram(min_n=1), [7, 1], references=references) == [2]
    assert longest(NGram(min_n=2), [5], references=references) == []  # both are first tokens, which is no match of two
    assert longest(NGram(min_n=2), [5, 6], references=references) == [9]


def test_places_where_nothing_follows_are_no_branches() -> None:
    assert longest(NGram(max_branches=1), [1, 2], references=[[1, 2, 3], [1, 2]]) == [3]


@pytest.mark.parametrize("options", [{"min_n": 0}, {"max_n": 1, "min_n": 2}, {"max_branches": 0}])
def test_ngrams_refuse_numbers_that_match_nothing(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="ngram needs"):
        NGram(**options)


# -- all lookups ----------------------------------------------------------------------------------------------------


def trained_recycling(table: torch.Tensor = TARGET) -> Recycling:
    """It has seen what ``table`` says after each token (and token 0 before it)."""
    drafter, vocab = Recycling(table.shape[-1]), table.shape[-1]
    draft = Draft(0)
    for token in range(1, vocab):
        draft.add(0, token, -1.0, token - 1)
    logits = table.reshape(-1, vocab, vocab)[0]
    drafter.observe([request([0])], [draft], TargetOutput(logits, [0], [0], 0.0), [Accepted([0], [1])])
    return drafter


LOOKUPS: dict[str, Callable[[], Drafter]] = {
    "ngram": NGram,
    "suffix": Suffix,
    "recycling": lambda: trained_recycling(SURE),
    "merged": lambda: Merged([trained_recycling(SURE), Suffix(), NGram()]),
}


@pytest.mark.parametrize("kind", LOOKUPS)
@pytest.mark.parametrize(("form", "max_tokens", "deepest"), [("chain:4", 9, 4), ("chain:9", 4, 3), ("2x2", 1, 0)])
def test_no_lookup_goes_deeper_than_the_shape_or_the_room_for_text(
    kind: str, form: str, max_tokens: int, deepest: int
) -> None:
    draft = propose(LOOKUPS[kind](), request([1, 2, 3] * 8, max_tokens=max_tokens), shape(form))
    assert max(draft.depths) == deepest
    assert draft.sampled is None


@pytest.mark.parametrize("kind", LOOKUPS)
def test_a_released_request_leaves_nothing_of_its_own_behind(kind: str) -> None:
    drafter = LOOKUPS[kind]()
    seqs = [make_sequence([1, 2, 3], max_tokens=12, seed=seed, temperature=1.0) for seed in range(3)]
    decode(TableEngine(TARGET), seqs, drafter)
    for inner in drafter._drafters if isinstance(drafter, Merged) else [drafter]:
        kept = {"ngram": "_indexes", "suffix": "_requests"}.get(inner.name)
        assert kept is None or getattr(inner, kept) == {}


# -- suffixes -------------------------------------------------------------------------------------------------------


def answer(drafter: Drafter, output: list[int], prompt: int = 999) -> None:
    """A request comes, is answered with ``output``, and goes."""
    seq = request([prompt])
    propose(drafter, seq)
    seq.tokens += output
    drafter.release([seq])


def test_a_suffix_is_found_in_the_request_itself_and_in_its_references() -> None:
    assert longest(Suffix(), [1, 2, 3, 4, 5, 1, 2]) == [3, 4, 5, 1]
    assert longest(Suffix(), [7, 1, 2], references=[[1, 2], [1, 2, 6, 8]]) == [6, 8]
    assert longest(Suffix(), [7, 8, 9]) == []


def test_answers_of_earlier_requests_are_found_and_their_prompts_are_not() -> None:
    drafter = Suffix()
    answer(drafter, [1, 2, 3, 4], prompt=50)
    answer(drafter, [2, 3, 5, 6])
    assert propose(drafter, request([9, 1, 2, 3])).tokens == [3, 4, 5, 6]  # 4 where three tokens match, 5 where two do
    assert longest(drafter, [9, 2, 3, 5]) == [6]
    assert longest(drafter, [50]) == longest(drafter, [9, 4]) == []  # the next answer is another text


def test_the_request_itself_and_the_store_are_asked_and_the_surer_one_answers() -> None:
    drafter = Suffix()
    answer(drafter, [1, 2, 3, 4, 5, 6])
    assert longest(drafter, [3, 8, 9, 1, 2, 3]) == [4, 5, 6]  # three tokens match in the store, and one here
    assert longest(drafter, [1, 2, 3, 7, 1, 2, 3]) == [7, 1, 2, 3]  # as many, and more to copy
    assert longest(Suffix(), [3, 8, 9, 1, 2, 3]) == [8, 9, 1, 2]


def test_a_request_stays_matched_while_others_come_and_go() -> None:
    drafter, seq = Suffix(), request([50, 3, 4, 5])
    assert propose(drafter, seq).tree.paths() == [[]]
    answer(drafter, [*range(20)])
    seq.tokens += [6]  # 6 alone is matched: what stood before was read when nothing was there
    assert propose(drafter, seq).tree.paths() == [[7, 8, 9, 10]]
    answer(drafter, [5, 6, 30, 31])
    seq.tokens += [7]
    assert propose(drafter, seq).tree.paths() == [[8, 9, 10, 11]]


def test_a_rebuilt_store_is_matched_again() -> None:
    drafter, seq = Suffix(max_store=40), request([50, 3, 4, 5])
    answer(drafter, [*range(20)])
    assert propose(drafter, seq).tree.paths() == [[6, 7, 8, 9]]
    answer(drafter, [*range(100, 130)])  # no room for both
    assert propose(drafter, seq).tree.paths() == [[]]
    seq.tokens += [112, 113]
    assert propose(drafter, seq).tree.paths() == [[114, 115, 116, 117]]
    answer(drafter, [*range(200, 220), 5, 112, 113, 60, 61, 62, 63, 64])
    assert propose(drafter, seq).tree.paths() == [[60, 61, 62, 63]]


@pytest.mark.parametrize("lookup_bytes", [0, 3_000, 100_000, 1_000_000])
def test_the_store_takes_no_more_memory_than_it_may(lookup_bytes: int) -> None:
    number = np.random.default_rng(1)
    drafter = Suffix.make(Parts(cast(Any, SimpleNamespace(vocab_size=1000)), lookup_bytes=lookup_bytes))
    least = Suffix().nbytes  # of the arrays that it begins with
    for _ in range(60):
        seq = request([1, 2, *number.integers(0, 1000, 300).tolist()])
        drafter.prefill([seq])
        seq.tokens += number.integers(0, 1000, 200).tolist()
        drafter.release([seq])
        assert drafter.nbytes <= max(least + 1000, lookup_bytes)
    assert drafter.nbytes > lookup_bytes / 8


@given(st.integers(0, 30), st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_the_store_is_bounded_and_keeps_what_came_last(max_store: int, lengths: list[int]) -> None:
    drafter, seen = Suffix(max_store=max_store), set[int]()
    for number, length in enumerate(lengths):
        output = [*range(1000 * number, 1000 * number + length)]
        seen.update(output)
        answer(drafter, output)
        stored = drafter._store.tokens
        assert len(stored) <= max_store
        kept = output[max(0, length - max_store // 2) :]
        assert not kept or stored[-len(kept) - 1 :].tolist() == [*kept, END]
        text = list[int]()
        for token in stored:  # the automaton holds just these texts
            if token == END:
                assert drafter._store.automaton.match(0, 0, text)[1] == len(text)
                text = []
            else:
                text.append(token)
        assert not any(drafter._store.automaton.match(0, 0, [token])[1] for token in seen - set(stored))


def test_what_the_store_forgets_is_its_older_half() -> None:
    drafter = Suffix(max_store=20)
    for text in ([1, 2], [11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34, 35, 36], [41, 42, 43, 44]):
        answer(drafter, text)
    first = [token for token in (1, 11, 21, 31, 41) if longest(drafter, [token])]
    assert first == [31, 41]  # the middle of the store lies in the third text, and half a text is none


def test_an_interrupted_request_is_remembered_as_far_as_it_came() -> None:
    drafter = Suffix()
    decoder = Decoder(TableEngine(TARGET), drafter, CHAIN, Match())
    seqs = [make_sequence([3, 4], max_tokens=50), make_sequence([5], max_tokens=50)]
    steps = decoder.run(seqs)
    for _ in range(4):  # in the first step one prompt is read
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert drafter._store.tokens.tolist() == [*seqs[0].output_ids, END, *seqs[1].output_ids, END]
    assert all(len(seq.output_ids) >= 3 and not seq.finished for seq in seqs)
    drafter.release(seqs)  # twice is as good as once
    drafter.release([make_sequence([1])])
    assert drafter._store.tokens.count(END) == 2


def test_suffix_refuses_a_negative_store() -> None:
    with pytest.raises(OptionError, match="suffix needs"):
        Suffix(max_store=-1)


# -- recycling ------------------------------------------------------------------------------------------------------


class Watched(Recycling):
    """Compares its matrix with the target's logits after every step."""

    checked = 0

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        super().observe(seqs, drafts, out, accepted)
        engine, last = TableEngine(TARGET), dict[int, torch.Tensor]()
        for seq, draft, step in zip(seqs, drafts, accepted, strict=True):
            for node in [*range(len(draft)), *step.path]:
                text = [0, *seq.tokens, *draft.path_tokens(node)]
                logits = engine.logits_after(text)
                last[text[-1]] = logits
                row = _row(self._pairs, VOCAB, text[-2], text[-1])
                assert row >= VOCAB  # the pair is known, and this target looks no further back
                self.assert_row(row, logits)
        for token, logits in last.items():
            self.assert_row(token, logits)
        self.checked += len(last)

    def assert_row(self, row: int, logits: torch.Tensor) -> None:
        best = logits.topk(8)
        assert self._successors[row].tolist() == best.indices.tolist()
        assert self._probs[row] == pytest.approx(best.values.softmax(-1).numpy())


def test_after_a_step_the_matrix_holds_what_the_target_said_of_every_verified_token() -> None:
    drafter = Watched(VOCAB)
    seqs = [make_sequence([seed], seed=seed, temperature=1.0, max_tokens=20) for seed in range(4)]
    decode(TableEngine(TARGET), seqs, drafter, "3x2x1", max_batch=3)
    assert drafter.checked > 4 * 20


def test_of_a_token_s_rows_the_deepest_on_the_accepted_path_stays() -> None:
    #     0 - 5 - 6 - 5    accepted as far as the second 5
    #      \- 7 - 5        and a third one, which comes last
    draft = Draft(0)
    for parent, token in ((0, 5), (0, 7), (1, 6), (3, 5), (2, 5)):
        draft.add(parent, token, -1.0, 0)
    logits = torch.randn([6, 10], generator=torch.Generator().manual_seed(0))
    out = TargetOutput(torch.cat([torch.zeros(2, 10), logits]), [2], [0], 0.0)  # behind another sequence's rows
    for path, row in (([0, 1, 3, 4], 4), ([0, 1], 1), ([0], 5)):
        drafter = Recycling(10, k=4)
        drafter.observe([request([0])], [draft], out, [Accepted(path, [1] * len(path))])
        assert drafter._successors[5].tolist() == logits[row].topk(4).indices.tolist()
        assert drafter._successors[7].tolist() == logits[2].topk(4).indices.tolist()
        assert (drafter._successors[[1, 2, 3, 4, 8, 9]] == -1).all()


@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 6), st.floats(0, 6))
def test_recycling_grows_the_most_probable_paths_of_its_matrix(
    seed: int, nodes: int, depth: int, sharpness: float
) -> None:
    drafter = trained_recycling(random_table(12, 1, seed, sharpness))
    form = shape(f"adaptive:nodes={nodes + 1},depth={depth}")
    draft = propose(drafter, request([seed % 12]), form)
    assert len(draft) <= nodes + 1
    assert max(draft.depths) <= depth
    assert draft.log_scores[1:] == sorted(draft.log_scores[1:], reverse=True)
    left_out = list[float]()
    for node, children in enumerate(draft.tree.children):
        token, before = draft.tokens[node], draft.tokens[draft.parents[node]] if node else 0
        holds = HOLDS_ALONE if before else HOLDS_IN_PAIR  # each token was seen after token 0
        chances = dict(zip(drafter._successors[token].tolist(), holds * drafter._probs[token], strict=True))
        for child in children:
            assert draft.log_probs[child] == pytest.approx(math.log(chances.pop(draft.tokens[child])))
        if draft.depths[node] < depth:
            left_out += [math.exp(draft.log_scores[node]) * float(chance) for chance in chances.values()]
    worst = math.exp(min(draft.log_scores))
    assert worst >= LEAST_PROB - 1e-9
    assert max(left_out, default=0.0) <= (worst if len(draft) == nodes + 1 else LEAST_PROB) + 1e-9


def test_recycling_proposes_nothing_after_a_token_that_the_target_never_scored() -> None:
    drafter = Recycling(VOCAB)
    seq = make_sequence([1, 2], max_tokens=8)
    assert len(propose(drafter, seq)) == 1
    decode(TableEngine(TARGET), [seq], drafter)
    unseen = set(np.flatnonzero(drafter._successors[:VOCAB, 0] < 0).tolist())
    assert unseen
    assert all(len(propose(drafter, request([token]))) == 1 for token in unseen)
    assert len(propose(drafter, request([2]))) > 1


@pytest.mark.parametrize("k", [0, 25])
def test_recycling_refuses_a_width_that_makes_no_matrix(k: int) -> None:
    with pytest.raises(OptionError, match="recycling needs k"):
        Recycling(VOCAB, k)


# -- memory ---------------------------------------------------------------------------------------------------------

WITH_MEMORY: dict[str, Callable[[], Drafter]] = {
    "suffix": Suffix,
    "recycling": lambda: Recycling(VOCAB),
    "merged": lambda: Merged([NGram(), Recycling(VOCAB), Suffix()]),
}
PROMPTS = [[1, 2], [3], [4, 5, 6]]


def forwards(drafter: Drafter) -> int:
    """What it takes to answer `PROMPTS`."""
    seqs = [make_sequence(prompt, max_tokens=16) for prompt in PROMPTS]
    decode(TableEngine(TARGET), seqs, drafter, "dynamic:nodes=12", max_batch=1)
    return sum(seq.metrics.target_forwards for seq in seqs)


@pytest.mark.parametrize("kind", WITH_MEMORY)
def test_what_one_request_taught_helps_the_next(kind: str) -> None:
    drafter = WITH_MEMORY[kind]()
    assert forwards(drafter) > forwards(drafter)


@pytest.mark.parametrize("kind", WITH_MEMORY)
def test_what_was_learnt_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    learnt, loaded = WITH_MEMORY[kind](), WITH_MEMORY[kind]()
    first = forwards(learnt)
    learnt.save(tmp_path)
    loaded.load(tmp_path)
    files = {"suffix.safetensors", "recycling.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == (files if kind == "merged" else {f"{kind}.safetensors"})
    for prompt in [*PROMPTS, [1, 2, 3]]:
        ours, theirs = (propose(drafter, request(prompt)) for drafter in (learnt, loaded))
        assert (ours.tokens, ours.parents, ours.log_probs) == (theirs.tokens, theirs.parents, theirs.log_probs)
    assert forwards(loaded) == forwards(learnt) < first


@pytest.mark.parametrize("kind", WITH_MEMORY)
def test_an_empty_folder_is_an_empty_memory(kind: str, tmp_path: Path) -> None:
    drafter = WITH_MEMORY[kind]()
    drafter.load(tmp_path)
    assert len(propose(drafter, request([1]))) == 1
    drafter.save(tmp_path)
    drafter.load(tmp_path)
    assert len(propose(drafter, request([1]))) == 1


@pytest.mark.parametrize("kind", ["suffix", "recycling"])
def test_a_damaged_or_foreign_file_is_refused(kind: str, tmp_path: Path) -> None:
    drafter, file = WITH_MEMORY[kind](), tmp_path / f"{kind}.safetensors"
    forwards(drafter)
    drafter.save(tmp_path)
    for content in (b"", b"no such thing", file.read_bytes()[:-3]):
        file.write_bytes(content)
        with pytest.raises(OptionError, match="can't read"):
            drafter.load(tmp_path)
    write_arrays(file, {"tokens": np.zeros(3), "successors": np.zeros(3)})
    with pytest.raises(OptionError, match="was not written by this drafter"):
        drafter.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "value"),
    [
        ("successors", 3, VOCAB), ("successors", VOCAB + 7, 10**9), ("successors", 0, -2), ("successors", 0, -(2**31)),
        ("probs", 5, np.nan), ("probs", 5, np.inf), ("probs", 5, -0.5), ("probs", 5, 1e30), ("pairs", 9, -2),
        ("pairs", 9, -(2**63)),
    ],
)  # fmt: skip
def test_values_that_compiled_loops_would_stumble_over_are_refused(
    name: str, row: int, value: float, tmp_path: Path
) -> None:  # fmt: skip
    drafter, file = Recycling(VOCAB), tmp_path / "recycling.safetensors"
    forwards(drafter)
    drafter.save(tmp_path)
    arrays = load_file(file)
    arrays[name].reshape(len(arrays[name]), -1)[row, 0] = value
    write_arrays(file, arrays)
    fresh = Recycling(VOCAB)
    with pytest.raises(OptionError, match="doesn't hold successors"):
        fresh.load(tmp_path)
    assert len(propose(fresh, request([1]))) == 1  # nothing of it was taken over


def test_a_successor_that_stands_twice_is_refused(tmp_path: Path) -> None:
    drafter = Recycling(VOCAB)
    drafter._successors[4, 2:4] = 7
    drafter.save(tmp_path)
    with pytest.raises(OptionError, match="doesn't hold successors"):
        Recycling(VOCAB).load(tmp_path)


@pytest.mark.parametrize("tokens", [[1, -2, -1], [-(2**31)], [[1, 2]]])
def test_what_are_no_texts_is_refused(tokens: object, tmp_path: Path) -> None:
    write_arrays(tmp_path / "suffix.safetensors", {"tokens": np.array(tokens, np.int32)})
    with pytest.raises(OptionError, match="holds no texts"):
        Suffix(VOCAB).load(tmp_path)


def test_types_that_numpy_doesn_t_have_are_refused(tmp_path: Path) -> None:
    save_file({"tokens": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "suffix.safetensors")
    with pytest.raises(OptionError, match=r"suffix\.safetensors"):
        Suffix(VOCAB).load(tmp_path)


@pytest.mark.parametrize("kind", ["suffix", "recycling"])
def test_where_nothing_can_be_written_the_memory_of_before_stays(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    drafter, file = WITH_MEMORY[kind](), tmp_path / f"{kind}.safetensors"
    drafter.save(tmp_path)
    before = file.read_bytes()
    forwards(drafter)

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as part:
            part.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        drafter.save(tmp_path)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(("vocab", "k"), [(VOCAB + 1, 8), (VOCAB, 7)])
def test_another_model_s_matrix_is_refused(vocab: int, k: int, tmp_path: Path) -> None:
    Recycling(vocab, k).save(tmp_path)
    with pytest.raises(OptionError, match="was written with another model"):
        Recycling(VOCAB).load(tmp_path)


def test_a_smaller_store_takes_in_the_end_of_a_larger_one(tmp_path: Path) -> None:
    large = Suffix()
    for text in range(5):
        answer(large, [*range(10 * text, 10 * text + 10)])
    large.save(tmp_path)
    for max_store in (0, 1, 15, 40):
        small = Suffix(max_store=max_store)
        small.load(tmp_path)
        kept = [token for token in small._store.tokens if token != END]
        assert kept == [*range(50 - len(kept), 50)]
        assert max_store // 3 <= len(kept) <= max_store // 2 + 10


# -- merged ---------------------------------------------------------------------------------------------------------


class Fixed(Drafter):
    """Proposes one draft, whatever the text; writes down what it is told."""

    def __init__(self, draft: Draft | None = None, name: str = "fixed") -> None:
        self.draft, self.name, self.told = draft, name, list[str]()

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        self.told.append("prefill")

    def propose(self, seqs: list[Sequence], form: Shape, sampled: bool) -> list[Draft]:
        assert not sampled
        return [self.draft or Draft(seq.tokens[-1]) for seq in seqs]

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        self.told.append("observe")

    def release(self, seqs: list[Sequence]) -> None:
        self.told += ["release"] * len(seqs)


@st.composite
def rooted_drafts(draw: st.DrawFn) -> Draft:
    tree, draft, ranks = draw(token_trees(root=0)), Draft(0), [0] * 20
    for parent, token in zip(tree.parents[1:].tolist(), tree.tokens[1:].tolist(), strict=True):
        draft.add(parent, token, -draw(st.floats(0, 4)), ranks[parent])
        ranks[parent] += 1
    return draft


@given(st.lists(rooted_drafts(), min_size=1, max_size=4))
def test_equal_paths_are_joined(drafts: list[Draft]) -> None:
    merged = propose(Merged([Fixed(draft) for draft in drafts]), request([0]))
    nodes = [{tuple(draft.path_tokens(node)): node for node in range(len(draft))} for draft in [merged, *drafts]]
    assert len(nodes[0]) == len(merged)  # no path twice
    assert set(nodes[0]) == {path for known in nodes[1:] for path in known}
    for path, node in list(nodes[0].items())[1:]:
        who = [i for i, known in enumerate(nodes[1:]) if path in known]
        theirs = [(drafts[i], nodes[i + 1][path]) for i in who]
        assert merged.sources[node] == sum(1 << i for i in who)
        assert merged.ranks[node] == min(draft.ranks[their] for draft, their in theirs)
        assert merged.log_probs[node] == pytest.approx(max(draft.log_probs[their] for draft, their in theirs))
        above = merged.log_scores[merged.parents[node]]
        assert merged.log_scores[node] == pytest.approx(above + merged.log_probs[node])


def test_a_merged_drafter_among_drafters_is_taken_apart() -> None:
    drafts = [Draft(0) for _ in range(3)]
    for number, draft in enumerate(drafts):
        draft.add(0, number + 1, -1.0, 0)
    one, two, three = (Fixed(draft, name) for draft, name in zip(drafts, "abc", strict=True))
    merged = Merged([one, Merged([Merged([two]), three])])
    assert merged.names == ["a", "b", "c"]
    assert propose(merged, request([0])).sources == [0, 1, 2, 4]


def test_all_merged_drafters_are_told_what_happens() -> None:
    drafters = [Fixed(), Fixed()]
    decode(TableEngine(TARGET), [make_sequence([1], max_tokens=2)], Merged([*drafters]))
    assert [drafter.told for drafter in drafters] == [["prefill", "observe", "observe", "release"]] * 2


def test_what_levels_cost_adds_up() -> None:
    drafts = [Draft(0, None, 0.2, 3), Draft(0), Draft(0, None, 0.5, 1)]
    merged = propose(Merged([Fixed(draft) for draft in drafts]), request([0]))
    assert merged.levels == 3
    assert merged.levels * merged.level_seconds == pytest.approx(3 * 0.2 + 0.5)


@pytest.mark.parametrize("form", ["chain:3", "2x2x1", "dynamic:nodes=5", "adaptive:nodes=5,min_prob=0"])
def test_the_merged_tree_is_cut_to_one_budget(form: str) -> None:
    proposed, cut = list[int](), list[int]()

    class Counting(Merged):
        def propose(self, seqs: list[Sequence], form: Shape, sampled: bool) -> list[Draft]:
            drafts = super().propose(seqs, form, sampled)
            proposed.extend(map(len, drafts))
            return drafts

    drafter = Counting([trained_recycling(), Suffix(), NGram(min_n=1)])
    budget = shape(form).max_nodes
    decoder = Decoder(TableEngine(TARGET), drafter, shape(form), Match(), lambda _, draft, __: cut.append(len(draft)))
    for _ in decoder.run([make_sequence([1, 2], max_tokens=40)]):
        pass
    assert max(cut) <= budget < max(proposed)


class Says(Drafter):
    """Proposes one path: after each token what ``follow`` says."""

    def __init__(self, name: str, follow: dict[int, int]) -> None:
        self.name, self.follow = name, follow

    def propose(self, seqs: list[Sequence], form: Shape, sampled: bool) -> list[Draft]:
        return [self._path(Draft(seq.tokens[-1]), min(form.max_depth, seq.room - 1)) for seq in seqs]

    def _path(self, draft: Draft, depth: int) -> Draft:
        for node in range(depth):
            if draft.tokens[node] in self.follow:
                draft.add(node, self.follow[draft.tokens[node]], -0.5, 0)
            else:
                break
        return draft


def test_accepted_tokens_count_for_those_who_proposed_them() -> None:
    cycle = torch.eye(4).roll(1, dims=1)  # 0 1 2 3 0 ...
    drafter = Merged([Says("a", {0: 1, 1: 2}), Says("b", {1: 2, 2: 3}), Says("wrong", {0: 3})])
    seq = make_sequence([1], max_tokens=12)
    assert decode(TableEngine(cycle), [seq], drafter, "dynamic:nodes=8,depth=3") == [[2, 3, 0, 1] * 3]
    # 1 -> 2 (a, b) 3 (b) 0, 0 -> 1 2 (a) 3, 3 -> 0, 0 -> 1 2 (a) 3, 3 -> 0, 0 -> 1, where no draft fits any more
    assert seq.metrics.accepted_by_source == {"a": 5, "b": 2}
    assert [emitted for _, emitted, _ in seq.metrics.steps] == [3, 3, 1, 3, 1, 1]


def test_merged_refuses_to_merge_nothing() -> None:
    with pytest.raises(OptionError, match="merged needs at least one drafter"):
        Merged([])
