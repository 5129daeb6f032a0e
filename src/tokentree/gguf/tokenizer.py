"""The tokenizer in a GGUF file: each entry honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS
from transformers.tokenization_utils_base import generate_merges

from tokentree.gguf.header import GgufError, Header, read_header

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of tokens; 2 is unknown, 5 unused, 6 a byte
SPACE = "\u2581"
# ways to cut a text into words, by the names that llama.cpp's converter gives them
GPT2 = {"", "default", "gpt-2", "phi-2", "olmo", "jais", "mpt", "jina-es", "jina-de", "roberta-bpe", "mellum"}
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}  # each a word
ALSO = {"stablelm2": "qwen2", "hunyuan": "qwen2", "chatglm-bpe": "llama-bpe", "glm4": "llama-bpe"}
# take a word that is a token as it is, and begin a text with a token of their own where the file says nothing of it
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# ids that no text is made with: `end_ids` has those that end one
OTHER_IDS = (
    "eot", "eom", "seperator", "mask", "cls", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep",
    "prefix", "suffix", "middle",
)  # fmt: skip
INFORMATIVE = ("tokenizer.ggml.token_type_count", "tokenizer.huggingface.json")


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in ``file``.

    Raises:
        GgufError: if there is none, or something about it can't be honoured.
    """
    header = read_header(file)
    return _Reading(header).tokenizer()


class _Reading:
    """Takes what a header says of its tokenizer, once each."""

    def __init__(self, header: Header) -> None:
        begin = "tokenizer."
        self._architecture = header.entries.get("general.architecture")
        self._left = {key: value for key, value in header.entries.items() if key.startswith(begin)}
        self.tokens = list(self._take("tokens", list, []))
        if not self.tokens or not all(isinstance(token, str) for token in self.tokens):
            self._refuse("it has no tokenizer")
        self.tokens = [token or f"[EMPTY_{place}]" for place, token in enumerate(self.tokens)]
        if len(set(self.tokens)) < len(self.tokens):
            twice = next(token for place, token in enumerate(self.tokens) if token in self.tokens[:place])
            self._refuse(f"its token {twice!r} is there twice")
        self.types = self._take("token_type", list, [NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens) or not set(self.types) <= {1, 2, 3, 4, 5, 6}:
            self._refuse("its tokens and tokenizer.ggml.token_type disagree")

    def _refuse(self, why: str) -> NoReturn:
        raise GgufError(why)

    def _take(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._left.pop(f"tokenizer.ggml.{key}", default)
        if type(value) is not kind and value is not default:
            self._refuse(f"tokenizer.ggml.{key} is {value!r}")
        return value

    def tokenizer(self) -> PreTrainedTokenizerFast:
        kind, words = self._take("model", str), self._take("pre", str, "")
        if kind == "gpt2":
            backend = self._byte_level(words)
        elif kind == "llama":
            backend = self._sentencepiece()
        else:
            self._refuse(f"its tokenizer is of the kind {kind!r}, and only 'gpt2' and 'llama' can be read")
        backend.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in self._of(CONTROL)]
        )  # fmt: skip
        known = backend.get_vocab()
        users = [token for token in self._of(USER_DEFINED) if token in known]
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in users])
        if backend.get_vocab_size() != len(self.tokens):
            self._refuse("two of its tokens have one name")
        said = [part for part in ("bos", "eos") if self._left.get(f"tokenizer.ggml.add_{part}_token") is True]
        begins = self._take("add_bos_token", bool, kind == "llama" or words in WHOLE_WORDS)
        named = {name: self._token(f"{part}_token_id") for name, part in SPECIAL.items()}
        for part in said:
            if named[f"{part}_token"] is None:
                self._refuse(f"it says tokenizer.ggml.add_{part}_token, and has no {part}_token_id")
        options = {
            "add_bos_token": begins, "add_eos_token": self._take("add_eos_token", bool, False),
            "chat_template": self._templates(), "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }  # fmt: skip
        for part in OTHER_IDS:
            self._token(f"{part}_token_id")
        for key, value in self._left.items():
            if key not in INFORMATIVE and value not in (False, []):
                self._refuse(f"it says {key} = {repr(value)[:60]}, which can't be honoured here")
        return PreTrainedTokenizerFast(tokenizer_object=backend, **named, **options)

    def _of(self, kind: int) -> list[str]:
        return [token for token, own in zip(self.tokens, self.types) if own == kind]

    def _token(self, key: str) -> str | None:
        token = self._take(key, int)
        if token is None or token == (1 << 32) - 1:
            return None
        if not 0 <= token < len(self.tokens):
            self._refuse(f"tokenizer.ggml.{key} is {token}, and it has {len(self.tokens)} tokens")
        return str(self.tokens[token])

    def _templates(self) -> str | dict[str, str] | None:
        """The chat template, or all by name where there are several."""
        first, begin = self._left.pop("tokenizer.chat_template", None), "tokenizer.chat_template."
        self._left.pop("tokenizer.chat_templates", None)
        others = [key for key in self._left if key.startswith(begin)]
        named = {key.removeprefix(begin): self._left.pop(key) for key in others}
        if not all(isinstance(text, str) for text in (first or "", *named.values())):
            self._refuse("its chat template is no text")
        return {**({"default": first} if first else {}), **named} if named else first

    def _merges(self, vocab: dict[str, int], scores: dict[str, float] | None) -> list[tuple[str, str]]:
        given = self._take("merges", list)
        if given is None:
            if scores is None:
                self._refuse("it has no tokenizer.ggml.merges")
            made: list[tuple[str, str]] = generate_merges(vocab, scores)
            return made
        merges = [tuple(str(merge).split(" ")) for merge in given]
        for merge in merges:
            if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
                self._refuse(f"its tokens don't have what {' '.join(merge)!r} merges")
        return [(merge[0], merge[1]) for merge in merges]

    def _byte_level(self, words: str) -> Tokenizer:
        """Words of bytes, spelled in letters, as GPT-2 has it."""
        letters = bytes_to_unicode()
        alphabet = set(letters.values())

        def spelled(token: str, kind: int) -> str:
            if kind != NORMAL or set(token) <= alphabet:
                return token
            return "".join(letters[byte] for byte in token.encode())

        self.tokens = [spelled(token, kind) for token, kind in zip(self.tokens, self.types)]
        vocab = {token: place for place, token in enumerate(self.tokens)}
        self._take("scores", list)
        whole = words in WHOLE_WORDS
        backend = Tokenizer(models.BPE(vocab, self._merges(vocab, None), ignore_merges=whole))
        words = ALSO.get(words, words)
        if words in SPLITS:
            cut: Any = pre_tokenizers.Split(Regex(SPLITS[words]), behavior="isolated")
            parts = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        elif words in DIGITS:
            parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        elif words in GPT2:
            parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        else:
            self._refuse(f"it says tokenizer.ggml.pre = {words!r}, a way to cut words that isn't known here")
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
        backend.decoder = decoders.ByteLevel()
        return backend

    def _sentencepiece(self) -> Tokenizer:
        """Pieces of text, merged by their scores, as SentencePiece has it."""
        gemma = str(self._architecture).startswith("gemma")
        prefix = self._take("add_space_prefix", bool, not gemma)
        scores = self._take("scores", list, [])
        if len(scores) != len(self.tokens):
            self._refuse("its tokens and tokenizer.ggml.scores disagree")
        if gemma:  # runs of spaces are written as such, and merges come in the order of the tokens
            self.tokens = [SPACE * len(one) if one and not one.strip(" ") else one for one in self.tokens]
            scores = [-place for place in range(len(self.tokens))]
        vocab = {token: place for place, token in enumerate(self.tokens)}
        merges = self._merges(vocab, dict(zip(self.tokens, scores)))
        unknown = next((token for token, kind in zip(self.tokens, self.types) if kind == 2), None)
        backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        own = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if gemma:
            backend.normalizer = normalizers.Replace(" ", SPACE)
        elif self._architecture == "phi3":
            begin = [normalizers.Prepend(SPACE)] if prefix else []
            backend.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
        else:
            scheme = "first" if prefix else "never"
            backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
        if gemma and prefix:
            self._refuse("it says tokenizer.ggml.add_space_prefix, which no Gemma has")
        backend.decoder = decoders.Sequence([*own, decoders.Strip(" ", 1, 0)] if prefix else own)
        return backend
