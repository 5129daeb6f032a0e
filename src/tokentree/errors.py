"""The errors that this library raises for mistakes of its users. All are `ValueError`, except `InvariantError`."""


class TokenTreeError(ValueError):
    """The base class. Each message is one sentence that says what is wrong and what to do."""


class TreeError(TokenTreeError):
    """Arrays don't describe a token tree."""


class OptionError(TokenTreeError):
    """An option is unknown, out of range, or in conflict with another.

    Attributes:
        option: the name of the sampling option that is wrong; None where it is another one, or several.
    """

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class PromptError(TokenTreeError):
    """A prompt can't be decoded: it is empty, too long or unreadable."""


class RequestError(TokenTreeError):
    """A request can't go on: a logits processor raised an error, or its logits leave nothing to choose from. Other
    requests aren't affected."""


class DeadEnd(RequestError):
    """The rules of a request leave no token to choose from."""


class StepError(TokenTreeError):
    """A step of this request alone raised an error of another kind, which is the `__cause__`."""


class ModelError(TokenTreeError):
    """A model can't be loaded, or can't be decoded with a tree."""


class PairingError(TokenTreeError):
    """Two parts don't fit each other: two tokenizers, a rule and a shape, a drafter and an engine."""


class ForkError(TokenTreeError):
    """A model is used in a process that was forked after another use of a model."""


class InvariantError(AssertionError):
    """An internal structure is damaged. This is a bug of the library."""


def told(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, as they stand in the sentence of another one."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001  it can't even say that
        said = ""
    lines = said.strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
