"""A model of this process answers."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tokentree.aio import AsyncLLM
from tokentree.chat import Message
from tokentree.chatting.answers import KEPT, Figures, Part
from tokentree.cli.show import token_text
from tokentree.cli.trees import Step, step_of
from tokentree.draft import Draft
from tokentree.llm import LLM
from tokentree.metrics import Metrics
from tokentree.sampling import SamplingParams
from tokentree.sequence import Accepted
from tokentree.sequence import Sequence as Request


class Local:
    """Answers with an `LLM`. Its prefix cache holds the conversation, so that a turn reads only what is new.

    Args:
        llm: the model.
        name: what it is called.
        params: how answers are decoded.

    Raises:
        PromptError: if the model has no chat template.
    """

    def __init__(self, llm: LLM, name: str, params: SamplingParams) -> None:
        llm.chat_prompt([{"role": "user", "content": "?"}])
        self.name, self._params = name, params
        self._drafting, self._plainly = AsyncLLM(llm), AsyncLLM(llm.plain())
        self._way, self._text_of = self._drafting, token_text(llm)
        self.figures, self._seen = Figures(), deque[tuple[Draft, Accepted]](maxlen=KEPT)

    @property
    def steps(self) -> Sequence[Step]:
        names = self._way.llm.decoder.names
        return [step_of(draft, accepted, names, self._text_of) for draft, accepted in self._seen.copy()]

    @property
    def drafters(self) -> Sequence[str]:
        return self._way.llm.decoder.drafter.names

    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[Part]:
        llm = self._way.llm
        self.figures = Figures()
        seq = llm.streamed(llm.chat_prompt(messages), self._params, None)
        seen = self._seen = deque(maxlen=KEPT)

        def watch(seq: Request, draft: Draft, accepted: Accepted) -> None:
            seen.append((draft, accepted))

        seq.watch, pieces = watch, llm.pieces(seq)
        try:
            async with aclosing(self._way.events([seq])) as events:
                async for event in events:
                    for piece in pieces.of(event):
                        yield Part(piece.text, piece.drafted)
                    if event.error is not None:
                        raise event.error
        finally:
            self.figures = figures_of(seq.metrics, cut=seq.finish_reason == "length")

    def speculate(self, on: bool) -> None:
        self._way = self._drafting if on else self._plainly
        self._seen = deque(maxlen=KEPT)  # the other way's bits stand for other drafters

    def check_trees(self) -> None:
        """They are."""

    async def close(self) -> None:
        await self._drafting.close()
        await self._plainly.close()


def figures_of(metrics: Metrics, cut: bool) -> Figures:
    """What a request cost."""
    return Figures(
        metrics.new_tokens,
        metrics.decode_seconds,
        metrics.target_forwards,
        dict(metrics.accepted_by_source),
        metrics.prompt_tokens,
        metrics.reused_tokens,
        cut,
    )
