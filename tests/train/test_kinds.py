"""What a model is asked for when it writes its own texts, of each kind; and what is held back and told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.tiny_models import tiny, tiny_tokenizer
from tokentree import LLM
from tokentree.engines.torch import TorchEngine
from tokentree.train import talks
from tokentree.train.features import HiddenTexts, read_parts
from tokentree.train.kinds import ORDER, TEXT, Chat, plan
from tokentree.train.looks import KindLook, by_kind, joined, listed, looked_at, told
from tokentree.train.progress import Phases
from tokentree.train.talks import LEAST_ROOM, Talk, new_talk
from tokentree.train.texts import Text, Texts, read_texts

KINDS = {
    "chat", "question", "writing", "summary", "retrieval", "extraction", "translation", "completion", "code", "maths",
    "reasoning", "roleplay", "list", "continuation",
}  # fmt: skip


# -- requests ----------------------------------------------------------------------------------------------------------


def test_requests_follow_from_the_seed_and_the_number() -> None:
    assert [plan(n, 0) for n in range(60)] == [plan(n, 0) for n in range(60)]
    assert [plan(n, 0) for n in range(60)] != [plan(n, 1) for n in range(60)]


def test_each_kind_comes_and_none_is_most_of_them() -> None:
    counts = Counter(chat.kind for n in range(20 * len(ORDER)) for chat in plan(n, 0))
    assert counts.keys() == KINDS
    assert max(counts.values()) < 0.2 * counts.total()
    assert min(counts.values()) > 0.01 * counts.total()


def test_requests_are_filled_in_and_seldom_the_same() -> None:
    chats = [plan(n, 0) for n in range(2000)]
    for some in chats:
        assert TEXT not in str(some[0].turns)
        for chat in some:
            for turn in chat.turns:
                assert turn != ""
                assert chat.kind == "completion" or "{" not in str(turn).replace(TEXT, "")
            assert not chat.bare or len(chat.turns) == 1
    said = Counter(chat.turns for some in chats for chat in some[:1] if chat.turns[0] is not None)
    assert max(said.values()) < 12
    assert len(said) > 0.8 * said.total()


# -- talks -------------------------------------------------------------------------------------------------------------


def model(context: int = 800) -> LLM:
    return LLM(tiny("llama", vocab_size=300, max_position_embeddings=context), tokenizer=tiny_tokenizer(), max_batch=4)


def talk_of(chats: Sequence[Chat], monkeypatch: pytest.MonkeyPatch, context: int = 800) -> Talk:
    monkeypatch.setattr(talks, "plan", lambda number, seed: [*chats])
    return new_talk(model(context), 0, 0)


def ids_of(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text).input_ids
    return ids


END = ids_of("<|end|>")


def test_a_chat_is_about_what_the_model_wrote_in_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [
        Chat("writing", ("Write.",), 20), Chat("summary", ("Sum up: {text}", "Shorter.")), Chat("list", ("{text}!",)),
    ]  # fmt: skip
    talk = talk_of(chats, monkeypatch)
    asked = list[tuple[str, int]]()
    for answer in ("a tree", "one", "two", "three"):
        assert talk.ask is not None
        assert talk.ask.answer
        asked.append((str(tiny_tokenizer().decode(talk.ask.prompt)), talk.ask.params.max_tokens))
        talk.take([*ids_of(answer), *END])
    assert talk.ask is None
    assert asked == [
        ("<|user|>Write.<|end|><|assistant|>", 20),
        ("<|user|>Sum up: a tree<|end|><|assistant|>", talks.ANSWER_TOKENS),
        (
            "<|user|>Sum up: a tree<|end|><|assistant|>one<|end|><|user|>Shorter.<|end|><|assistant|>",
            talks.ANSWER_TOKENS,
        ),
        ("<|user|>a tree!<|end|><|assistant|>", talks.ANSWER_TOKENS),
    ]
    assert [text.kind for text in talk.texts] == ["writing", "summary", "list"]
    answers = [
        [str(tiny_tokenizer().decode(text.ids[start:end])) for start, end in text.answers or ()] for text in talk.texts
    ]
    assert answers == [["a tree<|end|>"], ["one<|end|>", "two<|end|>"], ["three<|end|>"]]
    assert talk.tokens == sum(len(text.ids) for text in talk.texts)


def test_answers_that_a_template_changes_do_not_count_as_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_of([Chat("chat", ("Go.", "On."))], monkeypatch)
    talk.take([*ids_of("  spaces  "), *END])  # which the next turn has without them
    talk.take([*ids_of("two"), *END])
    (text,) = talk.texts
    assert [tiny_tokenizer().decode(text.ids[start:end]) for start, end in text.answers or ()] == ["two<|end|>"]


def test_a_user_says_what_the_model_thinks(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_of([Chat("chat", (None, None))], monkeypatch)
    for said in ("hello", "yes", "what", "no"):
        assert talk.ask is not None
        assert talk.ask.answer == (said in ("yes", "no"))
        assert talk.ask.params.top_k == (0 if talk.ask.answer else talks.SAID["top_k"])
        talk.take([*ids_of(said), *END])
    assert tiny_tokenizer().decode(talk.texts[0].ids) == (
        "<|user|>hello<|end|><|assistant|>yes<|end|><|user|>what<|end|><|assistant|>no<|end|>"
    )


def test_a_bare_text_goes_on_without_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_of([Chat("completion", ("def f():",), bare=True)], monkeypatch)
    assert talk.ask is not None
    assert talk.ask.prompt == ids_of("def f():")
    talk.take(ids_of(" pass"))
    assert talk.texts == [Text(ids_of("def f():") + ids_of(" pass"), "completion", ((7, 12),))]


def test_what_has_no_room_gives_way_to_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "word " * 60
    talk = talk_of([Chat("summary", (long,)), Chat("list", (long,), bare=True)], monkeypatch, context=60)
    assert talk.ask is not None
    assert not talk.ask.answer
    talk.take(ids_of("hi"))
    assert talk.ask.answer
    assert talk.ask.params.max_tokens >= LEAST_ROOM
    talk.take(END)
    assert talk.ask is None
    assert [text.kind for text in talk.texts] == ["chat"]


def test_a_talk_goes_on_from_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [Chat("writing", ("Write.", None)), Chat("summary", ("Sum up: {text}",))]
    parts, whole = [[9, 8, 7], [5, 6], [11, 12, 13], [4]], talk_of(chats, monkeypatch)
    asks = list[object]()
    for part in parts:
        asks.append(whole.ask)
        whole.take(part)
    for at in range(len(parts)):
        again = talk_of(chats, monkeypatch)
        for part in parts[:at]:
            again.take(part)
        assert again.ask == asks[at]
        for part in parts[at:]:
            again.take(part)
        assert again.texts == whole.texts


# -- what is held back -------------------------------------------------------------------------------------------------


def some(kinds: str, groups: Sequence[int | None] | None = None) -> Texts:
    """Texts of kinds with names of one letter."""
    return Texts([
        Text([n + 1] * 10, kind, group=None if groups is None else groups[n]) for n, kind in enumerate(kinds)
    ])  # fmt: skip


def test_of_each_kind_a_share_is_held_back() -> None:
    texts = some("ab" * 40 + "c" * 3 + "d")
    held = texts.held_back(0.1)
    assert Counter(texts.texts[n].kind for n in held) == {"a": 4, "b": 4, "c": 1}
    assert held == sorted(held)
    assert some("ab" * 60).held_back(0.1)[:8] == some("ab" * 40).held_back(0.1)  # they stay what they are
    assert some("aa").held_back(0.05) == some("ab").held_back(0.05) == [1]
    assert len(some("a" * 10).held_back(0.9)) == 9


def test_texts_about_one_another_are_held_back_together() -> None:
    kinds, groups = "wswtws" * 10, [n // 2 for n in range(60)]
    texts = some(kinds, groups)
    held = texts.held_back(0.25)
    assert Counter(texts.texts[n].kind for n in held) == {"w": 7, "s": 5, "t": 2}
    assert {n // 2 for n in held} == {n // 2 for n in held if n % 2} == {n // 2 for n in held if not n % 2}


def test_hidden_states_are_parted_by_what_is_held_back(tmp_path: Path) -> None:
    engine = TorchEngine(tiny("llama"))
    engine.capture([1, 2])
    texts = Texts([
        Text([3 + n, *range(20, 29 + n % 3)], "ab"[n % 2], ((3, 5 + n % 3), (7, 9)) if n else None) for n in range(40)
    ])  # fmt: skip
    phases = Phases(Console(), shown=False)
    first, rest = read_parts(engine, texts, tmp_path, [1, 2], 0.1, phases)
    held = texts.held_back(0.1)
    numbers = [n for n in range(40) if n not in held]
    for part, chosen in ((first, numbers), (rest, held)):
        assert part.kinds == tuple(texts.texts[n].kind for n in chosen)
        assert part.answers is not None
        for (start, end), n in zip(part.spans(), chosen, strict=True):
            ids = texts.ids[n]
            assert part.ids[start:end].tolist() == ids
            assert torch.equal(part.hidden[start:end], engine.hidden_states(ids, [1, 2]))
            wrote = range(len(ids)) if n == 0 else [*range(3, 5 + n % 3), 7, 8]
            assert part.answers[start:end].nonzero()[:, 0].tolist() == [*wrote]
            labels = part.labels(torch.arange(start, end), 1)[0]
            assert (labels >= 0).nonzero()[:, 0].tolist() == [place - 2 for place in wrote if place >= 2]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    again, _ = read_parts(engine, texts, tmp_path, [1, 2], 0.3, phases)  # the files don't depend on it
    assert len(again) < len(first)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == before


def test_lines_of_a_file_may_tell_their_kind(tmp_path: Path) -> None:
    line = '{"text": "The quick brown fox jumps over the lazy dog."'
    (tmp_path / "data").write_text(f'{line}, "kind": "fox"}}\n{line}, "kind": 3}}\n{line}}}\n')
    assert [text.kind for text in read_texts(tmp_path / "data", tiny_tokenizer()).texts] == ["fox", "other", "other"]


# -- what is told ------------------------------------------------------------------------------------------------------


def test_looks_are_at_each_kind() -> None:
    ends = torch.arange(10, 310, 10).repeat_interleave(10)
    texts = HiddenTexts(torch.zeros(300, 2), torch.zeros(300, dtype=torch.int64), ends, kinds=(*"ab" * 4, *"a" * 22))
    found = looked_at(texts, texts.spans(), look=10)
    assert {kind: len(spans) for kind, spans in found.items()} == {"a": 6, "b": 4}
    assert looked_at(texts, texts.spans()[:2]) == {"a": [(0, 10)], "b": [(10, 20)]}


def test_figures_are_told_by_kind() -> None:
    one, other, none = KindLook("maths"), KindLook("code"), KindLook("list")
    one.note(2.0, 4, 30, 20)
    other.note(1.0, 2, 10, 20)
    other.note(4.0, 1, 20, 20)
    loss, figures = joined([one, other, none])
    assert loss == pytest.approx((8 + 2 + 4) / 7)
    assert figures["tokens a step"] == pytest.approx(2.0)
    assert by_kind(figures) == [("maths", 2.5, 2.0), ("code", 1.75, 2.0)]
    assert told({"depth 1 top-1": 0.5} | figures) == [
        "depth 1 top-1 0.500, tokens a step 2.000",
        "tokens a step by kind: maths 2.50 (loss 2.00), code 1.75 (loss 2.00)",
    ]
    assert listed({"depth 1 top-1": 0.5} | figures).splitlines() == [
        "- depth 1 top-1: 50.0%", "- tokens a step: 2.00", "", "| kind of texts | tokens a step | loss |",
        "|---|---|---|", "| maths | 2.50 | 2.000 |", "| code | 1.75 | 2.000 |",
    ]  # fmt: skip
    assert by_kind(joined([one])[1]) == []
    assert joined([none]) == (0.0, {"tokens a step": 1.0})
