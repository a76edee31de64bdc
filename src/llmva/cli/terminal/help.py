"""Help in plain text: options in groups, and the help of a group of commands that is called without one."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

FLAGS = {"help_option_names": ["-h", "--help"]}


class Grouped(TyperCommand):
    """A command whose help lists options under the titles of their groups, those without a group first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                title = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class WithDefault(TyperGroup):
    """A group whose command `run` need not be named: `llmva study FILE` is `llmva study run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in FLAGS["help_option_names"]:
            args = ["run", *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest


def show_help(context: typer.Context) -> None:
    """The callback of a group of commands: called without a command, it prints the group's help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
