"""Models of tokentree for the command `llm` (https://llm.datasette.io).

``tokentree.json`` in llm's folder (``llm logs path`` shows it), or the file that ``$LLM_TOKENTREE`` names, says which:

    {"smollm2": {"model": "~/models/smollm2-135m.gguf", "heads": "~/heads/smollm2-135m/eagle"}}

Then there is ``llm -m tokentree/smollm2``. Each entry has the arguments of `tokentree.LLM`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm
from llm.parts import ReasoningPart, TextPart
from pydantic import Field

if TYPE_CHECKING:
    from tokentree import LLM

PATHS = ("model", "draft_model", "heads", "memory")  # arguments in which ~ is the home


class TokentreeModel(llm.Model):
    """A model that this process runs. It is loaded at its first prompt, and kept.

    Args:
        name: what it is called behind ``tokentree/``.
        options: the arguments of `tokentree.LLM`.
    """

    can_stream = True

    class Options(llm.Options):
        """What a prompt may be given by ``-o``."""

        temperature: float = Field(0.0, description="0 is greedy.")
        top_p: float = Field(1.0, description="Draw from the most probable tokens whose mass reaches this.")
        max_tokens: int = Field(1024, description="The most tokens to write.")
        seed: int | None = Field(None, description="The same seed gives the same text.")

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.model_id = f"tokentree/{name}"
        self._options = options
        self._llm: LLM | None = None

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None = None
    ) -> Iterator[str]:
        """The answer to a prompt, and to what was said before in its conversation.

        Raises:
            ValueError: one sentence, if the model can't be loaded, or can't answer.
        """
        from tokentree import SamplingParams

        params = SamplingParams(**prompt.options.model_dump())
        model = self._loaded()
        pieces = model.stream([message_of(message) for message in prompt.messages], params)
        try:
            if stream:
                yield from (piece.text for piece in pieces if piece.text)
            else:
                yield "".join(piece.text for piece in pieces)
        finally:
            pieces.close()
            metrics = pieces.result.metrics
            speculation = {
                "tokens_per_forward": round(metrics.mean_accepted_length, 3),
                "accepted_by_drafter": metrics.accepted_by_source,
            }
            response.set_usage(
                input=metrics.prompt_tokens,
                output=metrics.new_tokens,
                details={"cached_tokens": metrics.reused_tokens, "speculation": speculation},
            )

    def _loaded(self) -> LLM:
        if self._llm is None:
            from tokentree import LLM

            try:
                self._llm = LLM(**self._options)
            except TypeError as error:
                raise ValueError(f"{self.model_id}: {error}") from None
        return self._llm


def message_of(message: llm.Message) -> dict[str, str]:
    """A message as chat templates take it.

    Raises:
        ValueError: if it has more than text.
    """
    texts = list[str]()
    for part in message.parts:
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif not isinstance(part, ReasoningPart):  # what another model thought is no part of what it said
            raise ValueError(f"tokentree reads text alone, and a message has a {type(part).__name__}")
    return {"role": message.role, "content": "".join(texts)}


def configured(file: Path) -> dict[str, dict[str, Any]]:
    """The models that ``file`` names, with their arguments; none if there is no file.

    Raises:
        ValueError: if it can't be read, or says something else.
    """
    if not file.exists():
        return {}
    try:
        models = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"can't read {str(file)!r}: {error}") from None
    if not isinstance(models, dict) or not all(isinstance(options, dict) for options in models.values()):
        raise ValueError(f'{str(file)!r} holds no models: write {{"NAME": {{"model": "…"}}}}')
    return {name: {key: _path(key, value) for key, value in options.items()} for name, options in models.items()}


def _path(key: str, value: Any) -> Any:
    return os.path.expanduser(value) if key in PATHS and isinstance(value, str) else value


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Tells llm the models. What is wrong with their file is a line on standard error: other models still work."""
    own = os.environ.get("LLM_TOKENTREE")
    try:
        models = configured(Path(own) if own else llm.user_dir() / "tokentree.json")
    except ValueError as error:
        print(f"llm-tokentree: {error}", file=sys.stderr)
        return
    for name, options in models.items():
        register(TokentreeModel(name, options))
