"""The program `llmva`: its commands, its version, and how it fails."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from llmva.cli.align import align, demo
from llmva.cli.cache import cache
from llmva.cli.chat import chat
from llmva.cli.data import data_list, data_show, data_tasks
from llmva.cli.evaluate import evaluate
from llmva.cli.experiments.compare import ablate, compare, judge_check
from llmva.cli.experiments.replay import replay
from llmva.cli.experiments.study import runs, study_init, study_run, study_schema
from llmva.cli.extend import extend
from llmva.cli.figures import figures
from llmva.cli.inspect import inspect
from llmva.cli.options import expand
from llmva.cli.ship import export, front, push, verify
from llmva.cli.terminal.help import FLAGS, Grouped, WithDefault, show_help
from llmva.cli.terminal.interrupt import EXIT_CODE, NOTHING_KEPT, Interrupted, remembered, was_interrupted
from llmva.cli.terminal.streams import PLAIN, safe_streams, unicode
from llmva.errors import LlmvaError, UsageError

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a chat model answer benign prompts and refuse harmful ones, by editing its weights in closed form.",
    epilog="Start with: llmva demo",
    context_settings=FLAGS,
)
for command in (
    align,
    demo,
    evaluate,
    chat,
    inspect,
    extend,
    front,
    figures,
    export,
    verify,
    push,
    compare,
    ablate,
    replay,
    runs,
    cache,
):
    app.command(cls=Grouped)(expand(command))
GROUPS: tuple[tuple[str, str, dict[str, Callable[..., Any]]], ...] = (
    ("judge", "Measure a judge.", {"check": judge_check}),
    (
        "study",
        "Measure many models, methods, seeds and data sets.",
        {"run": study_run, "init": study_init, "schema": study_schema},
    ),
    (
        "data",
        "Public data sets that --data knows by name.",
        {"list": data_list, "show": data_show, "tasks": data_tasks},
    ),
)
for group, about, members in GROUPS:
    kind = WithDefault if "run" in members else TyperGroup
    commands = typer.Typer(cls=kind, help=about, context_settings=FLAGS, invoke_without_command=True)
    commands.callback()(show_help)
    for name, member in members.items():
        commands.command(name, cls=Grouped)(expand(member))
    app.add_typer(commands, name=group)


def _version(value: bool) -> None:
    if value:
        from llmva import __version__

        typer.echo(f"llmva {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    show_help(context)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every foreseen failure is one sentence on stderr and exit code 2 (usage) or 1 (run)."""
    with safe_streams(), remembered():
        _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: list[str]) -> None:
    if not sys.stderr.isatty() or {"--quiet", "-q"} & set(arguments):
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of downloads and of unpacking; read when tqdm is imported
    try:
        for argument in arguments:
            _check_text(argument)
        code: Any = app(args=arguments, prog_name="llmva", standalone_mode=False)
        if code == EXIT_CODE:  # typer takes Ctrl-C for an exit
            raise Interrupted(NOTHING_KEPT)
        sys.exit(code if isinstance(code, int) else 0)
    except Interrupted as error:
        _end(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _end(NOTHING_KEPT, EXIT_CODE)
    except Exception as error:
        if was_interrupted(error):
            _end(NOTHING_KEPT, EXIT_CODE)
        if isinstance(error, LlmvaError):
            _end(f"error: {error}", error.exit_code)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # as of typer's own output
            _end(f"error: Nothing more can be written ({error.strerror}): free space, or send the output elsewhere.", 1)
        if not hasattr(error, "format_message"):  # typer's usage errors: their class has moved between its versions
            raise
        context = getattr(error, "ctx", None)
        command = "llmva" if context is None else context.command_path
        _end(f"error: {error.format_message().rstrip('.')}: see {command} --help.", UsageError.exit_code)


def _check_text(text: str) -> None:
    """Raises UsageError for bytes that are not UTF-8, which reach a program as halves of surrogate pairs.

    UTF-8 itself does so where the locale is another and Python was told to follow it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        with suppress(UnicodeError):
            shown = os.fsencode(text).decode("utf-8")
            raise UsageError(
                f"{shown[:60]!a} is UTF-8, and the locale names another encoding: set PYTHONUTF8=1, or LC_ALL=C.UTF-8."
            ) from error
        raise UsageError(f"{text[:60]!a} is not UTF-8: write it in UTF-8, or rename the file.") from error


def _end(sentence: str, code: int) -> NoReturn:
    line = " ".join(sentence.split())
    with suppress(OSError):  # nobody reads it
        print(line if unicode(sys.stderr) else line.translate(PLAIN), file=sys.stderr)
    sys.exit(code)
