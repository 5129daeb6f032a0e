"""How commands read what is typed, and how their help is laid out: commands in a user's order and with whole sentences,
options by what they are about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

ORDER = (
    "generate", "chat", "serve", "check", "bench", "report", "plot", "calibrate", "train", "theory", "simulate", "plan",
)  # fmt: skip


class Group(TyperGroup):
    """A command of commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, (one.help or "").partition("\n\n")[0]) for name, one in found if one and not one.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class Command(TyperCommand):
    """A command whose options stand under the headings that they name as their panels, and whose paths aren't empty:
    that would be the folder in which it runs, and comes of a shell's variable that isn't set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = self.make_parser(ctx).parse_args(args=list(args))[0]
        rest = super().parse_args(ctx, args)
        params: list[Any] = self.get_params(ctx)
        for param in params:
            words, values = (
                found if isinstance(found, list) else [found]
                for found in (typed.get(param.name), ctx.params.get(param.name))
            )
            if any(word == "" and isinstance(value, Path) for word, value in zip(words, values)):
                raise typer.BadParameter("it is empty: name a file or a folder", ctx=ctx, param=param)
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            kind = "Arguments" if param.param_type_name == "argument" else "Options"
            if (record := param.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(param, "rich_help_panel", None) or kind, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)
