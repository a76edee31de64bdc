"""`llmva data list | show | tasks`: the public data sets that `--data` knows by name."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from llmva.cli.options import Output

HEADS = ("name", "sides", "prompts", "licence", "login", "home")


def data_list(*, output: Output) -> None:
    """List the data sets that --data knows.

    With sides, number of prompts, licence, login and home page.
    """
    from llmva.cli.terminal.console import emit, say
    from llmva.prompts.public.registry import list_data

    data_sets = list_data()
    if output.json:
        emit({"data": data_sets})
    elif not output.quiet:
        say(_table(data_sets, _width()))


def data_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that llmva data list shows.")], *, output: Output
) -> None:
    """Show what is known of one data set that --data knows."""
    from llmva.cli.terminal.console import emit, show
    from llmva.prompts.public.registry import find, list_data

    entry = next(one for one in list_data() if one["name"] == find(name).name)
    if output.json:
        emit(entry)
    else:
        show(
            output, *(f"{key.replace('_', ' ')}: {_words(value)}" for key, value in entry.items() if value is not None)
        )


def data_tasks(*, output: Output) -> None:
    """Print the folder of task files for lm-evaluation-harness.

    Give it to lm_eval --include_path; each task is ASR or ORR on one data set.
    """
    from llmva.cli.terminal.console import emit, say

    # by the package itself, since importing llmva.utility takes seconds
    folder = Path(str(resources.files("llmva") / "utility" / "harness"))
    if output.json:
        files = (path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))
        emit({"folder": str(folder), "tasks": sorted(f"llmva_{stem}" for stem in files)})
    else:
        say(str(folder))


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "-"
    return "-" if value is None else str(value)


def _width() -> int | None:
    """The columns of the terminal; None where stdout is none, and lines may be of any length."""
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def _table(data_sets: Sequence[Mapping[str, Any]], width: int | None) -> str:
    """As text for stdout, which a person may pipe to grep: one line for each set, unless a terminal is too narrow."""
    rows = [
        (
            one["name"],
            ", ".join(one["sides"]),
            "unknown" if one["rows"] is None else f"{one['rows']:,}",
            one["licence"],
            "yes" if one["gated"] else "no",
            one["home"] or "this package",
        )
        for one in data_sets
    ]
    widths = [max(len(row[i]) for row in (HEADS, *rows)) for i in range(len(HEADS))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(w) if i == 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    lines = [line(row) for row in (HEADS, *rows)]
    if width is None or max(map(len, lines)) <= width:
        return "\n".join(lines)
    return _narrow(rows, width)


def _narrow(rows: Sequence[Sequence[str]], width: int) -> str:
    """As much as fits into `width`, licences on several lines."""
    from rich.console import Console

    from llmva.report.fitting import Fitting

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    left_out = "home (--json has it)", "login and home (--json has them)"
    console.print(Fitting((lambda: _columns(rows, 5), lambda: _columns(rows, 4)), left_out, folds=True))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))


def _columns(rows: Sequence[Sequence[str]], count: int) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in HEADS[:count]:
        table.add_column(name, justify="right" if name == "prompts" else "left", no_wrap=name != "licence")
    for row in rows:
        table.add_row(*row[:count])
    return table
