"""Which two tokenizers are one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import TEXTS, save_model, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.pairing import difference

Json = dict[str, Any]


@pytest.fixture(scope="module")
def target() -> PreTrainedTokenizerFast:
    return tiny_tokenizer([*TEXTS, *["22 333 4444  55555 3.14159"] * 9])


def changed(tokenizer: PreTrainedTokenizerFast, change: Callable[[Json], None]) -> PreTrainedTokenizerFast:
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    change(said)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(said)), eos_token="<|end|>")


def padded(tokenizer: PreTrainedTokenizerFast, *names: str) -> PreTrainedTokenizerFast:
    more = copy.deepcopy(tokenizer)
    more.add_tokens(list(names))
    return more


PADDED = [f"[PAD{token}]" for token in range(300, 320)]


@pytest.mark.parametrize(
    "names",
    [
        PADDED, ["<unused12>", "<unused13>"], ["<|reserved_special_token_7|>"], ["[unused3]"], ["<extra_id_0>"],
        ["<|dummy_3|>"], ["<reserved_9>"], ["<|extra_0|>"], ["[PAD]"], ["<pad3>"],
    ],
)  # fmt: skip
def test_names_that_only_pad_are_no_difference(names: list[str], target: PreTrainedTokenizerFast) -> None:
    assert difference(target, padded(target, *names)) is None
    assert difference(padded(target, *names), target) is None
    assert difference(padded(target, *names), padded(target, *["[PAD300]"] * len(names))) is None


@pytest.mark.parametrize("names", [["<think>"], ["[PAD300]", "tool"], ["PAD"], ["<unused>"]])
def test_other_tokens_beyond_are(names: list[str], target: PreTrainedTokenizerFast) -> None:
    for pair in ((target, padded(target, *names)), (padded(target, *names), target)):
        assert difference(*pair) == names[-1]


def swap_tokens(said: Json) -> None:
    vocab = said["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def other_merges(said: Json) -> None:
    said["model"]["merges"].reverse()


def fewer_merges(said: Json) -> None:
    del said["model"]["merges"][:3]


def lower_case(said: Json) -> None:
    said["normalizer"] = {"type": "Lowercase"}


def other_widths(said: Json) -> None:
    said["normalizer"] = {"type": "NFKC"}


def a_space_before(said: Json) -> None:
    said["pre_tokenizer"]["add_prefix_space"] = True


def digits(said: Json) -> None:
    own = said["pre_tokenizer"]
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, own]}


def no_special_tokens(said: Json) -> None:
    del said["added_tokens"][1:]


@pytest.mark.parametrize(
    "change",
    [swap_tokens, other_merges, fewer_merges, lower_case, other_widths, a_space_before, digits, no_special_tokens],
)
def test_an_equal_vocabulary_isn_t_enough(change: Callable[[Json], None], target: PreTrainedTokenizerFast) -> None:
    other = changed(target, change)
    assert set(other.get_vocab()) == set(target.get_vocab())
    for pair in ((target, other), (other, target)):
        assert difference(*pair) is not None


def test_two_merges_in_another_order_are_told() -> None:
    tokens = ["a", "b", "c", "ab", "bc"]

    def made(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, list(merges)))
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    first, second = ("a", "b"), ("b", "c")
    assert difference(made(first, second), made(first, second)) is None
    assert difference(made(first, second), made(second, first)) is not None


def composed(said: Json) -> None:
    said["normalizer"] = {"type": "NFC"}


def no_trivia(said: Json) -> None:
    said["post_processor"], said["pre_tokenizer"]["trim_offsets"] = None, False
    for token in said["added_tokens"]:
        token["special"] = token["rstrip"] = False


@pytest.mark.parametrize("change", [composed, no_trivia])
def test_how_the_same_family_is_written_elsewhere_is_no_difference(
    change: Callable[[Json], None], target: PreTrainedTokenizerFast
) -> None:
    assert difference(target, changed(target, change)) is None


@pytest.mark.parametrize("sizes", [(300, 320), (320, 300)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pair_of_padded_vocabularies_decodes_as_the_target_alone(
    sizes: tuple[int, int], temperature: float, target: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    """No id beyond the target's own is ever proposed."""
    folders = [
        save_model(
            tmp_path / f"{size}-{seed}",
            tiny("llama", vocab_size=size, seed=seed),
            padded(target, *PADDED[: size - 300]),
        )
        for size, seed in zip(sizes, (0, 1))
    ]
    llm = LLM(folders[0], draft_model=folders[1], shape="3x2x2", dtype="float32")
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=3)
    got = llm.generate("A tree", params)[0]
    assert got.token_ids == llm.plain().generate("A tree", params)[0].token_ids
