"""Replicas of a server, by Ray Serve. It needs the extra `scale`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def app(arguments: dict[str, Any]) -> Application:
    """The application for ``serve run`` and ``serve deploy``: ``import_path: tokentree.scale:app``.

    Args:
        arguments: the fields of `arguments.Arguments`.

    Raises:
        OptionError: if one of them is wrong, or Ray isn't there.
        ModelError, PairingError: as `LLM`, as far as that is known before anything is loaded.
    """
    from tokentree.errors import OptionError
    from tokentree.scale.arguments import arguments_of

    checked = arguments_of(arguments)
    try:
        from tokentree.scale.application import application
    except ModuleNotFoundError as error:
        raise OptionError(f"replicas need {error.name}: pip install 'tokentree[scale]'") from None
    return application(checked)
