"""What a GGUF file says of its tokenizer, and where a text ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.gguf_files import write_gguf
from tests.tiny_models import some_tokens, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.errors import ModelError, TokenTreeError
from tokentree.loading import find_tokenizer, load_tokenizer

TEXTS = ["A tree gives  12 3456 apples", "don't\n\n\tx=1;  ", "été 日本 🙂", " ", "<|end|>a<|user|>b", "a  1   22"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def file(folder: Path, tokenizer: PreTrainedTokenizerFast, **entries: Any) -> Path:
    """A file whose tokenizer has these entries beside or instead of its own; dots are written as two underscores."""
    path = folder / "tiny.gguf"
    own = {f"tokenizer.{key.replace('__', '.')}": value for key, value in entries.items()}
    write_gguf(path, tiny("llama", vocab_size=len(tokenizer)), tokenizer, entries=own)
    return path


def test_it_cuts_texts_as_the_original_at_the_first_load_and_later(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = file(tmp_path, tokenizer)
    for _ in range(2):
        got = load_tokenizer(path)
        assert got.get_vocab() == tokenizer.get_vocab()
        for text in TEXTS:
            assert got.encode(text) == tokenizer.encode(text)
            ids = got.encode(text)
            for skip in (True, False):
                assert got.decode(ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_what_it_puts_around_a_text_is_what_the_file_says(
    begins: bool, ends: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    more = {"ggml__bos_token_id": 1, "ggml__add_bos_token": begins, "ggml__add_eos_token": ends}
    path = file(tmp_path, tokenizer, **more)
    for _ in range(2):
        expected = [1] * begins + tokenizer.encode("A tree") + [2] * ends
        assert load_tokenizer(path).encode("A tree") == expected


@pytest.mark.parametrize(("pre", "begins"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)])
def test_where_it_says_nothing_its_kind_decides_whether_a_text_has_a_begin(
    pre: str, begins: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = file(tmp_path, tokenizer, ggml__pre=pre, ggml__bos_token_id=1)
    assert (load_tokenizer(path).encode("A tree")[0] == 1) is begins


def test_digits_are_words_of_their_own_where_the_file_says_so(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    got = load_tokenizer(file(tmp_path, tokenizer, ggml__pre="smollm"))
    words = [word for word, _ in got.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12 b")]
    assert words == ["a", "ĠĠ", "1", "2", "Ġb"]


def test_a_word_that_is_a_token_stays_whole_where_the_file_says_so(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Llama 3 has tokens that its merges don't lead to."""
    tokens = list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    tokens[-1] = "zqzqz"
    for pre, count in (("llama-bpe", 1), ("qwen2", 5)):
        merges = [one for one in written_merges(tokenizer) if one.replace(" ", "") in tokens]
        path = file(tmp_path, tokenizer, ggml__pre=pre, ggml__tokens=tokens, ggml__merges=merges)
        assert len(load_tokenizer(path).encode("zqzqz")) == count


def written_merges(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    from tests.gguf_files import tokenizer_of

    return list(tokenizer_of(tokenizer, 2)["tokenizer.ggml.merges"])


def test_tokens_of_users_stay_whole_and_control_tokens_with_other_letters_too(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    types = [3 if token in tokenizer.all_special_tokens else 1 for token in tokens]
    end, think, count = "<\uff5cend\u2581of\u2581sentence\uff5c>", "<think>", len(tokens)
    path = tmp_path / "tiny.gguf"
    own = {"tokens": [*tokens, end, think], "token_type": [*types, 3, 4], "eos_token_id": count}
    entries = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    write_gguf(path, tiny("llama", vocab_size=count + 2), tokenizer, entries=entries)
    for _ in range(2):
        got = load_tokenizer(path)
        assert got.encode(f"{think}{end}") == [count + 1, count]
        assert got.eos_token_id == count
        assert len(got) == count + 2
        assert got.decode([count + 1, count], skip_special_tokens=True) == think
    assert LLM(path).eos_ids == {count, tokenizer.eos_token_id}


def test_several_chat_templates_are_kept_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = file(tmp_path, tokenizer, chat_template="A", chat_template__tool_use="B", chat_templates=["tool_use"])
    for _ in range(2):
        got: Any = load_tokenizer(path)
        assert got.get_chat_template() == "A"
        assert got.get_chat_template(chat_template="tool_use") == "B"
    assert load_tokenizer(file(tmp_path, tokenizer, chat_template="C")).chat_template == "C"


@pytest.mark.parametrize("prefix", [True, False, None])
def test_pieces_of_text_begin_with_a_space_where_the_file_says_so(prefix: bool | None, tmp_path: Path) -> None:
    letters = "abcde"
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *letters,
        "▁a",
        "ab",
        "▁ab",
        "▁▁",
    ]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]
    scores = [0.0] * 259 + [-float(place) for place in range(len(pieces) - 259)]
    entries: dict[str, Any] = {
        "model": "llama", "tokens": pieces, "token_type": types, "scores": scores, "bos_token_id": 1,
        "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": prefix,
    }  # fmt: skip
    path = tmp_path / "tiny.gguf"
    write_gguf(
        path, tiny("llama", vocab_size=len(pieces)), entries={f"tokenizer.ggml.{k}": v for k, v in entries.items()}
    )  # fmt: skip
    for _ in range(2):
        got = load_tokenizer(path)
        begin = ["<s>", "▁ab"] if prefix is not False else ["<s>", "ab"]
        assert got.convert_ids_to_tokens(got.encode("ab c")) == [*begin, "▁", "c"]
        assert got.decode(got.encode("ab c"), skip_special_tokens=True) == "ab c"
        assert got.convert_ids_to_tokens(got.encode("z")[-1:]) == ["<0x7A>"]


ENDS: dict[str, tuple[dict[str, Any], list[str], set[int]]] = {
    "the end of a text alone": ({}, [], {2}),
    "of a turn and of a message": ({"eot_token_id": 40, "eom_token_id": 41}, [], {2, 40, 41}),
    "what stands between files": ({"fim_pad_token_id": 50, "fim_rep_token_id": 51, "fim_sep_token_id": 52}, [],
                                  {2, 50, 51, 52}),
    "what begins or asks": ({"fim_pre_token_id": 50, "bos_token_id": 1, "mask_token_id": 3}, [], {2}),
    "one that is called so": ({}, ["<|im_end|>"], {2, 300}),
    "several that are called so": ({}, ["<end_of_turn>", "<|eot_id|>", "<|im_start|>"], {2, 300, 301}),
    "ends of messages of a text": ({}, ["<|return|>", "<|call|>"], {2, 300, 301}),
    "none": ({"eos_token_id": None}, [], set()),
    "no token": ({"eos_token_id": 4294967295}, [], set()),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_a_text_ends_at_all_that_the_file_names(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    entries, more, ends = ENDS[case]
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    messages = "<|return|>" in more  # whose <|end|> ends a message, not the text
    ours = set(tokenizer.all_special_tokens) - ({"<|end|>"} if not messages else set())
    types = [3 if token in ours else 1 for token in tokens]
    assert len(tokens) == 300
    own = {"tokens": [*tokens, *more], "token_type": [*types, *[3] * len(more)], **entries}
    path = tmp_path / "tiny.gguf"
    write_gguf(
        path, tiny("llama", vocab_size=300 + len(more)), tokenizer,
        entries={f"tokenizer.ggml.{key}": value for key, value in own.items()},
    )  # fmt: skip
    for _ in range(2):
        assert LLM(path).eos_ids == ends


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"ggml__model": "bert"}, "of the kind 'bert'"),
    "unknown words": ({"ggml__pre": "abacus"}, r"tokenizer\.ggml\.pre = 'abacus'"),
    "an entry that nobody knows": ({"ggml__add_bso_token": True}, r"tokenizer\.ggml\.add_bso_token = True"),
    "a separator": ({"ggml__add_sep_token": True}, r"tokenizer\.ggml\.add_sep_token = True"),
    "a space before a text of bytes": ({"ggml__add_space_prefix": True}, r"tokenizer\.ggml\.add_space_prefix = True"),
    "fewer spaces": ({"ggml__remove_extra_whitespaces": True}, r"remove_extra_whitespaces = True"),
    "characters exchanged": ({"ggml__precompiled_charsmap": [1, 2]}, r"precompiled_charsmap"),
    "no merges": ({"ggml__merges": None}, r"has no tokenizer\.ggml\.merges"),
    "merges of other tokens": ({"ggml__merges": ["qq zz"]}, "don't have what 'qq zz' merges"),
    "too few types": ({"ggml__token_type": [1, 3]}, r"tokens and tokenizer\.ggml\.token_type disagree"),
    "types of another kind": ({"ggml__token_type": "all"}, r"tokenizer\.ggml\.token_type is 'all'"),
    "a token twice": ({"ggml__tokens": ["a"] * 300}, "its token 'a' is there twice"),
    "no tokens": ({"ggml__tokens": None, "ggml__token_type": None}, "it has no tokenizer"),
    "an end outside": ({"ggml__bos_token_id": 300}, r"tokenizer\.ggml\.bos_token_id is 300"),
    "a truth value of another type": ({"ggml__add_bos_token": 1}, r"tokenizer\.ggml\.add_bos_token is 1"),
    "a begin that there isn't": ({"ggml__add_bos_token": True, "ggml__bos_token_id": None}, "and has no bos_token_id"),
    "an end that there isn't": ({"ggml__add_eos_token": True, "ggml__eos_token_id": None}, "and has no eos_token_id"),
    "a template of another type": ({"chat_template": 7}, "chat template is no text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_honoured_is_refused_by_name(
    case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    entries, says = REFUSED[case]
    path = file(tmp_path, tokenizer, **entries)
    with pytest.raises(ModelError, match=f"can't load the tokenizer of '.*tiny.gguf': .*{says}") as raised:
        load_tokenizer(path)
    assert "\n" not in str(raised.value)
    with pytest.raises(TokenTreeError):
        LLM(path)


def test_a_file_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny("llama"))
    assert find_tokenizer(path) is None
    assert len(LLM(path).generate(some_tokens(9), SamplingParams(max_tokens=3))[0].token_ids) == 3
