"""Draft models whose tokenizer isn't the target's: lossless, and right about the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import by_night, decode, each_two, make_sequence, random_table, shown
from tests.test_lossless import PROMPT, TARGET, Law, decoder_maker, distance, target_law, text_law
from tests.tiny_models import save_model, sentence_pieces, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams, generator
from tokentree.acceptance import Match, Rejection
from tokentree.bench.methods import make_method
from tokentree.bench.peers import Peers
from tokentree.decoder import Decoder
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.drafters.other_tokenizer import DraftTexts, SameText, SharedTokens
from tokentree.engines.output import TargetOutput
from tokentree.engines.table import TableEngine
from tokentree.errors import OptionError, PairingError
from tokentree.sampling import to_probs
from tokentree.sequence import Sequence
from tokentree.shapes import shape
from tokentree.vocabularies import DraftText, Spelling, Vocabularies

WAYS = ["tli", "slem"]
SHAPES = ["2x2x1", "chain:4", "paths:[[0],[0,0],[1],[1,0,0]]", "dynamic:nodes=10,depth=4,top_k=3", "cost"]


def letters(names: str, merges: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer of these tokens, of which ``merges`` are made of two letters."""
    vocab = {name: place for place, name in enumerate(names.split())}
    made = [(merge[0], merge[1]) for merge in merges.split()]
    tokenizer = Tokenizer(models.BPE(vocab, made))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# The target's tokens are a, b, c and d, those of the proofs. The draft model has them in another order, without d, and
# with two that the target lacks: "ab" takes the place of a and b wherever they meet.
SMALL = Vocabularies(Spelling(letters("a b c d"), 4), Spelling(letters("c x ab a b", "ab"), 5))
SMALLER = random_table(5, 2, seed=2)


def by_tokens(table: torch.Tensor = SMALLER) -> SharedTokens:
    return SharedTokens(DraftTexts(TableEngine(table), SMALL), 4)


def by_text(table: torch.Tensor = SMALLER) -> SameText:
    return SameText(DraftTexts(TableEngine(table), SMALL))


# -- the proofs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "params"),
    [
        ("2x2", {"max_tokens": 3}),
        ("3x1", {"max_tokens": 3, "temperature": 0.7}),
        ("4", {"max_tokens": 2}),
        ("chain:3", {"max_tokens": 4, "top_k": 3}),
        ("2x1", {"max_tokens": 3, "top_p": 0.8}),
        ("2x1", {"max_tokens": 3, "repetition_penalty": 1.5, "frequency_penalty": 0.4, "top_k": 3}),
    ],
)
def test_rejection_writes_the_target_s_distribution(form: str, params: dict[str, Any]) -> None:
    params = {"temperature": 1.0} | params
    law = text_law(decoder_maker(form, Rejection(), by_tokens), **params)
    assert sum(law.values()) == pytest.approx(1, abs=1e-9)
    assert distance(law, target_law(**params)) < 1e-9


@pytest.mark.parametrize("make", [by_tokens, by_text])
@pytest.mark.parametrize("form", ["2x2", "chain:3"])
def test_match_writes_the_target_s_distribution(make: Any, form: str) -> None:
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 1.0}
    law = text_law(decoder_maker(form, Match(), make), **params)
    assert distance(law, target_law(**params)) < 1e-9


class Unrestricted(SharedTokens):
    """Draws from the shared tokens, and tells the probabilities that these have among all tokens."""

    def _draw(self, seq: Sequence, draft: Draft, node: int, count: int, logits: torch.Tensor) -> list[int]:
        drawn = super()._draw(seq, draft, node, count, logits)
        assert draft.sampled is not None
        draft.sampled[node] = 0.7 * draft.sampled[node]
        return drawn


@pytest.mark.parametrize("form", ["1", "2x1"])
def test_probabilities_of_all_the_draft_model_s_tokens_are_not_lossless(form: str) -> None:
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 1.0}

    def wrong() -> SharedTokens:
        return Unrestricted(DraftTexts(TableEngine(SMALLER), SMALL), 4)

    law = text_law(decoder_maker(form, Rejection(), wrong), **params)
    assert distance(law, target_law(**params)) > 1e-3


def p_value(law: Law, counts: Counter[tuple[int, ...]], runs: int) -> float:
    """Of a chi-square test; rare texts are counted as one."""
    expected = {text: runs * prob for text, prob in law.items()}
    rare = [text for text in expected if expected[text] < 8]
    cells = [([text], expected[text]) for text in expected if text not in rare]
    cells.append((rare, sum(expected[text] for text in rare)))
    statistic = sum((sum(counts[t] for t in texts) - mean) ** 2 / mean for texts, mean in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))


def test_texts_of_many_seeds_follow_the_target() -> None:
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 3}
    runs, law = 600, target_law(**params)

    def found(drafter: Drafter, accept: str) -> float:
        seqs = [make_sequence(PROMPT, seed=seed, **params) for seed in range(runs)]
        texts = decode(TableEngine(TARGET), seqs, drafter, "2x1", accept, max_batch=64)
        return p_value(law, Counter(map(tuple, texts)), runs)

    assert found(by_tokens(), "rejection") > 1e-4
    assert found(by_tokens(), "match") > 1e-4
    assert found(by_text(), "match") > 1e-4
    assert found(Unrestricted(DraftTexts(TableEngine(SMALLER), SMALL), 4), "rejection") < 1e-6


# -- what is proposed -------------------------------------------------------------------------------------------------


class Seen:
    """The text before each step, and its draft."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], Draft]] = []

    def __call__(self, seq: Sequence, draft: Draft, accepted: Any) -> None:
        self.steps.append((seq.tokens[: -len(accepted.tokens)], draft))


def draft_ids(tokens: list[int]) -> list[int]:
    text = DraftText(SMALL)
    text.follow(tokens)
    return text.ids


@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_that_both_have_are_drawn_in_proportion(seed: int) -> None:
    """Behind every node: the draft model's distribution after the same text in its own tokens. Those of a draft's own
    path are as they were drafted, "a" and "b", and what the target has read is cut anew, "ab"."""
    seen, engine = Seen(), TableEngine(SMALLER)
    seq = make_sequence([0, 1, 2], temperature=0.8, max_tokens=40, seed=seed)
    decoder = Decoder(TableEngine(TARGET), SharedTokens(DraftTexts(engine, SMALL), 4), shape("2x2"), Rejection(), seen)
    for _ in decoder.run([seq]):
        pass
    own = torch.tensor([3, 4, 0])  # a, b and c there
    assert any(2 in draft_ids(before) for before, _ in seen.steps)
    for before, draft in seen.steps:
        for node, probs in (draft.sampled or {}).items():
            path = [int(own[token]) for token in draft.path_tokens(node)]
            logits = engine.logits_after([*draft_ids(before), *path])[own]
            expected = to_probs(logits, seq.params)
            torch.testing.assert_close(probs, torch.cat([expected, torch.zeros(1, dtype=torch.float64)]))


def test_no_token_is_proposed_that_the_draft_model_lacks() -> None:
    seen, seq = Seen(), make_sequence(PROMPT, max_tokens=60, temperature=1.0, seed=1)
    for _ in Decoder(TableEngine(TARGET), by_tokens(), shape("3x2"), Match(), seen).run([seq]):
        pass
    assert 3 in seq.output_ids
    assert {token for _, draft in seen.steps for token in draft.tokens[1:]} == {0, 1, 2}


WORDS = "The quick brown fox jumps over the lazy dog. Grüße aus Köln: 東京の木 🙂 and one two three. " * 3


@cache
def known_tokenizer(name: str) -> PreTrainedTokenizerFast:
    made: dict[str, Any] = {"bytes": tiny_tokenizer, "pieces": sentence_pieces}
    return made[name]() if name in made else tiny_tokenizer(["der lazy Baum and the fox 東京"] * 3, 320)


class Reciter(TableEngine):
    """A language model that knows one text by heart: the most probable token is the next one of its own tokens. Where
    it lost the place, it knows nothing."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        size = len(tokenizer.get_vocab())
        super().__init__(torch.zeros(size, size))
        self.spelling, self.ids = Spelling(tokenizer, size), tokenizer(WORDS).input_ids
        self.rewound = 0
        self.unread: list[int] = []  # rows that a draft begins with

    def logits_after(self, tokens: Any) -> torch.Tensor:
        logits, text = torch.zeros(self.vocab_size), b"".join(map(self.spelling.piece, tokens))
        whole = b"".join(map(self.spelling.piece, self.ids))
        if list(tokens) == self.ids[: len(tokens)] and len(tokens) < len(self.ids):
            logits[self.ids[len(tokens)]] = 9.0
        elif whole.startswith(text) and len(text) < len(whole):
            pieces = {piece: token for piece, token in self.spelling.ids.items() if whole.startswith(piece, len(text))}
            logits[pieces[max(pieces, key=len)]] = 9.0
        return logits

    def verify(self, seqs: Any, trees: Any, firsts: Any = None, reading: Any = ()) -> TargetOutput:
        for seq in seqs:  # the rows that are there belong to the text as it is now
            assert self._committed.get(seq.id, []) == seq.tokens[: self.committed(seq)]
        self.unread += [len(tree) for tree, first in zip(trees, firsts or [], strict=bool(firsts)) if not first]
        return super().verify(seqs, trees, firsts, reading)

    def rewind(self, seq: Sequence, rows: int) -> None:
        self.rewound += self.committed(seq) > rows
        super().rewind(seq, rows)


PAIRS = [("bytes", "pieces"), ("pieces", "bytes"), ("bytes", "other"), ("other", "pieces")]
FORMS = ["chain:6", "2x1x1x1x1"]


@pytest.mark.parametrize(
    ("pair", "way", "form"), by_night(product(PAIRS, WAYS, FORMS), but=each_two(PAIRS, WAYS, FORMS)), ids=shown
)
def test_a_draft_model_that_knows_the_text_is_believed(pair: tuple[str, str], way: str, form: str) -> None:
    """So its place in the text is right at every step: behind characters in parts, and where its tokens change."""
    ours, theirs = pair
    target, draft = Reciter(known_tokenizer(ours)), Reciter(known_tokenizer(theirs))
    texts = DraftTexts(draft, Vocabularies(target.spelling, draft.spelling))
    drafter = SharedTokens(texts, target.vocab_size) if way == "tli" else SameText(texts)
    seq = make_sequence(target.ids[:9], max_tokens=len(target.ids) - 9)
    got = decode(target, [seq], drafter, form)[0]
    assert got == target.ids[9:]
    assert seq.metrics.new_tokens / seq.metrics.target_forwards > (3.5 if way == "slem" else 1.7)
    assert draft.rewound or way == "slem"
    assert np.mean(draft.unread[1:]) < 3.9  # behind the prompt, what came true is not computed again
    assert not texts._texts
    assert not texts._seqs
    assert not draft._committed


def test_a_path_of_text_has_the_probabilities_of_its_parts() -> None:
    """Each token's is that of the draft model's path up to where the token ends; the best path comes first."""
    drafter, seq = by_text(), make_sequence([0, 2, 2], max_tokens=9)
    drafter.prefill([seq])
    draft = drafter.propose([seq], shape("2x2"), False)[0]
    drafted = drafter._drafted[seq.id]
    names = ["c", "x", "ab", "a", "b"]
    spelled = {
        "".join(names[token] for token in drafted.path_tokens(node)): drafted.log_scores[node]
        for node in range(1, len(drafted))
    }
    assert len(draft) > 2
    for node in range(1, len(draft)):
        text = "".join("abcd"[token] for token in draft.path_tokens(node))
        longer = [score for path, score in spelled.items() if path.startswith(text)]
        assert draft.log_scores[node] == pytest.approx(max(longer), abs=1e-6)
        assert draft.log_probs[node] <= 0


def test_a_draft_that_would_change_the_tokens_that_are_there_is_left_out() -> None:
    """Behind "a" the text "b" is no continuation where "ab" is a token of the target."""
    vocabularies = Vocabularies(SMALL.draft, SMALL.target)
    table = torch.zeros(4, 4)
    table[:, 1], table[:, 2] = 9, 8  # "b", or else "c", whatever comes before
    drafter = SameText(DraftTexts(TableEngine(table), vocabularies))
    for last, expected in ((3, {0}), (0, {4, 0})):  # after "a", and after "c"
        seq = make_sequence([1, last], max_tokens=5)
        assert {*drafter.propose([seq], shape("2"), False)[0].tokens[1:]} == expected


def test_rejection_needs_shared_tokens() -> None:
    with pytest.raises(PairingError, match="use accept='match'"):
        Decoder(TableEngine(TARGET), by_text(), shape("2"), Rejection())


@pytest.mark.parametrize("make", [by_tokens, by_text])
def test_a_text_without_a_token_of_the_draft_model_is_not_drafted_for(make: Any) -> None:
    seq = make_sequence([3, 3], max_tokens=6, temperature=1.0)  # "dd"
    drafter = make()
    assert len(drafter.propose([seq], shape("2"), False)[0]) == 1
    assert decode(TableEngine(TARGET), [seq], drafter) == decode(
        TableEngine(TARGET), [make_sequence([3, 3], max_tokens=6, temperature=1.0)]
    )


@pytest.mark.parametrize("make", [by_tokens, by_text])
@pytest.mark.parametrize("context", [2, 5, 9, 20])
def test_no_draft_reaches_beyond_the_draft_model_s_context(make: Any, context: int) -> None:
    """A `TableEngine` raises where a node does."""
    vocabularies = SMALL
    engine = TableEngine(SMALLER, context)
    texts = DraftTexts(engine, vocabularies)
    drafter = SharedTokens(texts, 4) if make is by_tokens else SameText(texts)
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 20, "seed": 4}
    plain = decode(TableEngine(TARGET), [make_sequence(PROMPT, **options)])
    assert decode(TableEngine(TARGET), [make_sequence(PROMPT, **options)], drafter, "2x2x1") == plain


WIDE = random_table(4, 2, seed=7, sharpness=2.0)


@pytest.mark.parametrize("kind", ["tli", "slem", "merged"])
@pytest.mark.parametrize("seed", by_night(range(3), but=[0]))
def test_match_gives_plain_s_ids_under_any_tree_and_batch(kind: str, seed: int) -> None:
    params: dict[str, Any] = [{}, {"top_p": 0.9}, {"presence_penalty": 1.0, "repetition_penalty": 1.2}][seed]

    def requests() -> list[Sequence]:
        random = np.random.default_rng(seed)
        seqs = []
        for number in range(5):
            prompt = random.integers(0, 4, int(random.integers(1, 12))).tolist()
            options = {"temperature": float(number < 4), "seed": seed + number, "max_tokens": 25} | params
            seqs.append(make_sequence(prompt, **options))
        return seqs

    made: dict[str, Callable[[], Drafter]] = {
        "tli": by_tokens,
        "slem": by_text,
        "merged": lambda: Merged([by_tokens(), by_text(random_table(5, 2, seed=3)), NGram()]),
    }
    plain = [decode(TableEngine(WIDE), [seq])[0] for seq in requests()]
    for place, form in enumerate(SHAPES):
        seqs = requests()
        assert decode(TableEngine(WIDE), seqs, made[kind](), form, "match", 1 + 2 * ((place + seed) % 2)) == plain
    assert sum(seq.metrics.accepted_tokens for seq in seqs) > 0


# -- with models ------------------------------------------------------------------------------------------------------


class World:
    """Folders of two models with different tokenizers."""

    def __init__(self, folder: Path) -> None:
        one, other = tiny_tokenizer(), sentence_pieces()
        self.one = save_model(folder / "one", tiny("llama", vocab_size=304), one)
        self.other = save_model(folder / "other", tiny("qwen2", vocab_size=410, num_hidden_layers=1, seed=4), other)
        self.llms = {
            (a.name, b.name): LLM(a, draft_model=b, shape="2x2x1", dtype="float32")
            for a, b in ((self.one, self.other), (self.other, self.one))
        }

    @cache  # noqa: B019
    def plain(self, names: tuple[str, str], way: int) -> list[list[int]]:
        """Plain decoding's ids for `PROMPTS` in one of `WAYS_TO_DRAW`."""
        return [one.token_ids for one in self.llms[names].plain().generate(PROMPTS, WAYS_TO_DRAW[way])]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("other-tokenizers"))


PROMPTS: list[Any] = ["The quick brown", "Grüße aus Köln: 東京の", some_tokens(7, vocab=300), "A 🙂"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 30, "min_p": 0.02, "seed": 4},
    {"repetition_penalty": 1.4, "presence_penalty": 0.3, "logit_bias": {5: 2.0, 7: float("-inf")}},
]
WAYS_TO_DRAW = [SamplingParams(max_tokens=20, ignore_eos=True, **options) for options in OPTIONS]


@pytest.mark.parametrize(
    ("names", "way", "form"), each_two([("one", "other"), ("other", "one")], WAYS, ["2x2x1", "cost"])
)
def test_models_give_plain_s_ids(world: World, names: tuple[str, str], way: str, form: str) -> None:
    """These models write bytes that are no characters, and special tokens."""
    llm = world.llms[names]
    tree = llm.using(f"draft_model:vocabulary={way}", form)
    for number, params in enumerate(WAYS_TO_DRAW):
        got = tree.generate(PROMPTS, params)
        assert [one.token_ids for one in got] == world.plain(names, number), OPTIONS[number]
        assert form == "cost" or sum(one.metrics.drafted_tokens for one in got) > 0
    assert all(not engine._kv for engine in llm.engines)  # type: ignore[attr-defined]


def test_the_way_is_chosen_by_what_is_shared_and_what_the_rule_needs(world: World) -> None:
    llm = world.llms["one", "other"]
    assert isinstance(llm.decoder.drafter, SameText)
    assert isinstance(llm.using(accept="rejection").decoder.drafter, SharedTokens)
    assert isinstance(llm.using("draft_model:vocabulary=tli").decoder.drafter, SharedTokens)
    assert isinstance(llm.using("draft_model:vocabulary=slem").decoder.drafter, SameText)
    assert llm.decoder.drafter.names == ["other"]
    near = tiny_tokenizer()
    near.add_tokens(["<think>"])
    folder = save_model(world.one.parent / "near", tiny("llama", vocab_size=304, num_hidden_layers=1), near)
    both = LLM(world.one, draft_model=[folder, world.other], shape="2x1", dtype="float32")
    assert isinstance(both.decoder.drafter, Merged)
    assert [type(one) for one in both.decoder.drafter.drafters] == [SharedTokens, SameText]
    params = SamplingParams(max_tokens=20)
    assert both.generate(PROMPTS, params)[0].token_ids == both.plain().generate(PROMPTS, params)[0].token_ids
    with pytest.raises(PairingError, match="the drafter 'other' picks them: use accept='match'"):
        llm.using("draft_model:vocabulary=slem", accept="rejection")


def test_rejection_with_models_is_reproducible_and_draws_shared_tokens(world: World) -> None:
    llm = world.llms["one", "other"].using(accept="rejection")
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=2)
    first, again = (llm.generate(PROMPTS, params) for _ in range(2))
    assert [one.token_ids for one in first] == [one.token_ids for one in again]
    assert sum(one.metrics.accepted_tokens for one in first) > 0


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_with_beams_other_drafters_and_bench(world: World, way: str) -> None:
    llm = world.llms["other", "one"]
    name = f"draft_model:vocabulary={way}"
    merged = llm.using([name, "ngram"], "2x2")
    params = SamplingParams(max_tokens=12)
    result = llm.plain().generate(PROMPTS[0], params)[0]
    plain, ids = result.token_ids, result.prompt_token_ids
    assert merged.generate(PROMPTS[0], params)[0].token_ids == plain
    beams = SamplingParams(max_tokens=10, num_beams=3, num_return_sequences=2)
    assert [one.token_ids for one in llm.using(name).generate(PROMPTS[0], beams)] == [
        one.token_ids for one in llm.plain().generate(PROMPTS[0], beams)
    ]
    method = make_method(f"ngram+{name}:chain:3", llm, Peers("", None, None, None, llm))
    assert method.run(ids, params).token_ids == plain
    peers = Peers(str(world.other), str(world.one), "float32", None, llm)
    assert make_method("transformers:assisted:3", llm, peers).run(ids, params).token_ids == plain


def test_generator_takes_such_a_draft_model(world: World) -> None:
    llm = world.llms["one", "other"]
    model: Any = AutoModelForCausalLM.from_pretrained(world.one, dtype=torch.float32)
    result = llm.plain().generate(PROMPTS[0], SamplingParams(max_tokens=12))[0]
    ids = torch.tensor([result.prompt_token_ids])
    drafts = AutoModelForCausalLM.from_pretrained(world.other, dtype=torch.float32)
    tree = generator(draft_model=drafts, shape="2x2")
    out = model.generate(ids, custom_generate=tree, max_new_tokens=12, do_sample=False)
    assert (
        out[0, ids.shape[1] :].tolist() == llm.plain().generate(PROMPTS[0], SamplingParams(max_tokens=12))[0].token_ids
    )
    assert tree.metrics[0].drafted_tokens


def test_what_can_not_be_is_told_in_a_sentence(world: World) -> None:
    llm = world.llms["one", "other"]
    for name in ("draft_model:vocabulary=both", "draft_model:words=tli", "draft_model:vocabulary"):
        with pytest.raises(OptionError, match=r"is not an option of this drafter: it takes vocabulary=auto\|tli\|slem"):
            llm.using(name)
    with pytest.raises(OptionError, match="is not an option of this drafter: it takes none"):
        llm.using("ngram:vocabulary=tli")
    with pytest.raises(OptionError, match="'draft_model' is named twice"):
        llm.using(["draft_model", "draft_model:vocabulary=tli"])
    same = LLM(world.one, draft_model=tiny("llama", vocab_size=304, num_hidden_layers=1), dtype="float32")
    with pytest.raises(PairingError, match="none of those here is known to have one: name it, or load it from where"):
        same.using("draft_model:vocabulary=tli")
    apart = Vocabularies(Spelling(letters("a b"), 2), Spelling(letters("c d"), 2))
    assert apart.overlap == 0
    assert apart.shared[0].dtype == np.int64
