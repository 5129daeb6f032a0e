"""Everything this library raises for a mistake of its user, all of them `ValueError`; and `InvariantError`."""


class TokenTreeError(ValueError):
    """Base of the errors below: one sentence that says what is wrong and what would be right."""


class TreeError(TokenTreeError):
    """Arrays that are not a token tree."""


class OptionError(TokenTreeError):
    """An option that is unknown, out of range or in conflict with another."""


class PromptError(TokenTreeError):
    """A prompt that can't be decoded: empty, too long, unreadable."""


class RequestError(TokenTreeError):
    """A request that can't go on: what its processors give can't be chosen from, or they raise. It ends that request
    alone."""


class DeadEnd(RequestError):
    """The rules of a request leave no token to choose."""


class StepError(TokenTreeError):
    """A step in which this request was alone failed for a reason that is none of the others here: its `__cause__`."""


class ModelError(TokenTreeError):
    """A model that can't be loaded, or that this library can't decode with a tree."""


class PairingError(TokenTreeError):
    """Parts that don't fit each other: two tokenizers, a rule and a shape, a drafter and an engine."""


class ForkError(TokenTreeError):
    """A process that was forked from one that had used a model."""


class InvariantError(AssertionError):
    """What this library keeps is damaged: a fault of the library, not of its user."""


def told(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, as they stand in the sentence of another one."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001  it can't even say that
        said = ""
    lines = said.strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
