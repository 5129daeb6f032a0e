"""What `calibrate` measures of a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokentree.errors import OptionError

if TYPE_CHECKING:
    from rich.progress import Progress

    from tokentree.calibrate import Calibration
    from tokentree.llm import LLM

PREFIX_MB = 256  # for the KV of finished texts, as `tokentree serve` has it
PANEL = "Serving"  # heading of the help

ServingOption = Annotated[
    Path | None,
    typer.Option(
        help="Also serve the model to clients on this machine, and measure what steps take then, for 'plan'. Clients "
        "ask what this file has: bodies for /v1/chat/completions, one a line.",
        rich_help_panel=PANEL,
    ),
]
ServingSecondsOption = Annotated[
    float,
    typer.Option(
        min=1,
        max=3600,
        help="For how long each number of clients asks; there are three, plainly and with drafts.",
        rich_help_panel=PANEL,
    ),
]
ServingBatchOption = Annotated[
    int, typer.Option(min=1, max=512, help="Texts that the server decodes together.", rich_help_panel=PANEL)
]


def requests_of(path: Path) -> list[str]:
    """The requests of a file.

    Raises:
        OptionError, PromptError: if it can't be read, or a line is no request; or if a package is missing.
    """
    try:
        import httpx  # noqa: F401

        from tokentree.planning.served import read_requests
    except ModuleNotFoundError as error:
        raise OptionError(f"measuring a server needs {error.name}: pip install 'tokentree[serve,chat]'") from None
    return read_requests(path)


def with_serving(
    found: Calibration, llm: LLM, model: str, bodies: list[str], max_batch: int, seconds: float, bar: Progress
) -> Calibration:
    """``found``, and what a server does with this model, which is called ``model``.

    Raises:
        OptionError: if the server refuses a request, or made too few steps.
    """
    from tokentree.planning.fitted import clients_of, serving
    from tokentree.serve.allocator import keep_memory_level
    from tokentree.serve.defaults import defaults_of
    from tokentree.serve.settings import Settings

    keep_memory_level()
    settings = Settings("model", max_batch=max_batch, defaults=defaults_of(model))
    task = bar.add_task("serving", total=2 * (1 + len(clients_of(max_batch))))
    measured = serving(llm, found, bodies, settings, seconds, PREFIX_MB << 20, lambda: bar.advance(task))
    return found.model_copy(update={"serving": measured})
