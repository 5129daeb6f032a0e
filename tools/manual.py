"""What the manual's pages get when they are made, as a hook of mkdocs (see mkdocs.yml): the page on the command has
the help of every command, and reports, whose tables are wide, have the page to themselves."""

from collections.abc import Iterator
from typing import Any

import typer

from tokentree.cli.main import app

PAGE, PLACE = "reference/command.md", "<!-- commands -->"
REPORTS = "results/"
WIDTH = 80  # characters: what a code block of the page shows


def commands(context: Any) -> Iterator[Any]:
    """The context of every command that does something, under ``context``, in the order of the help."""
    if not hasattr(context.command, "commands"):
        yield context
        return
    for name in context.command.list_commands(context):
        command = context.command.get_command(context, name)
        yield from commands(command.make_context(name, [], parent=context, resilient_parsing=True))


def text() -> str:
    command = typer.main.get_command(app)
    width = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    top = command.make_context("tokentree", [], resilient_parsing=True, **width, **command.context_settings)
    helps = [(one.command_path, one.command.get_help(one)) for one in commands(top)]
    return "\n".join(f"## {path}\n\n```text\n{told}\n```\n" for path, told in helps)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith(REPORTS):
        page.meta["hide"] = ["navigation", "toc"]
    return markdown.replace(PLACE, text()) if page.file.src_uri == PAGE else markdown
