"""Texts that a model on an accelerator writes itself, as many at once as its memory takes."""

from __future__ import annotations

from collections.abc import Sequence

from tokentree.engines.kv_engine import KVEngine
from tokentree.errors import ModelError
from tokentree.llm import LLM
from tokentree.train.talks import TEXT_TOKENS, Ask, Talk, new_talk
from tokentree.train.target import engine_of
from tokentree.train.texts import Text
from tokentree.train.writing import Writer, rows_for

SCORES = 32  # bytes that drawing a token takes for each one of the vocabulary
EACH = 256  # tokens that the texts of a number have at least, most often


class Batches:
    """Writes batches of texts: what all of them ask for first, then what they ask for next, and so on.

    What comes in a batch follows from ``seed`` and the numbers of its texts.

    Args:
        tokens: that are wanted in all; few of them make small batches.

    Attributes:
        size: numbers of texts in a batch, at most.
    """

    def __init__(self, llm: LLM, tokens: int, seed: int = 0) -> None:
        self._llm, self._seed = llm, seed
        engine = engine_of(llm)
        longest = min(TEXT_TOKENS, engine.context)
        bytes_each = longest * engine.bytes_per_token + SCORES * engine.vocab_size
        self.size = min(rows_for(engine.device, bytes_each), 1 << max(1, (tokens // EACH).bit_length()))
        if not isinstance(engine, KVEngine):
            raise ModelError("texts are written by a model that attends by itself: use attention='sdpa'")
        self._writer = Writer(engine.model, self.size, longest)

    def write(self, numbers: Sequence[int]) -> dict[int, list[Text]]:
        """The texts with these numbers, at most `size`; none of those of which nothing came."""
        talks = [new_talk(self._llm, number, self._seed) for number in numbers]
        while going := [(talk, talk.ask) for talk in talks if talk.ask is not None]:
            for answer in (False, True):
                self._go_on([(talk, ask) for talk, ask in going if ask.answer == answer])
        return {talk.number: talk.texts for talk in talks}

    def _go_on(self, asked: list[tuple[Talk, Ask]]) -> None:
        """Writes what is asked for, all of it drawn with the seed of the first, and each cut to its length."""
        if not asked:
            return
        params = [ask.params for _, ask in asked]
        assert params[0].seed is not None
        most = max(one.max_tokens for one in params)
        written = self._writer.write(
            [ask.prompt for _, ask in asked], most, [one.temperature for one in params], self._llm.eos_ids,
            params[0].seed, params[0].top_k or None,
        )  # fmt: skip
        for (talk, ask), ids in zip(asked, written, strict=True):
            talk.take(ids[: ask.params.max_tokens])
