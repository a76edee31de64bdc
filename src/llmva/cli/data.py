"""`llmva data list`: the public data sets that `--data` knows by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmva.cli.options import Output


def data_list(*, output: Output) -> None:
    """List the data sets that --data knows: sides, number of prompts, licence, login, home page."""
    from llmva.cli.console import emit, say
    from llmva.prompts.public.registry import list_data

    data_sets = list_data()
    if output.json:
        emit({"data": data_sets})
    elif not output.quiet:
        say(_table(data_sets))


def _table(data_sets: Sequence[Mapping[str, Any]]) -> str:
    """As text for stdout, which a person may pipe to grep: one line for each set, whatever the width."""
    heads = ("name", "sides", "prompts", "licence", "login", "home")
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
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(w) if i == 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, (heads, *rows)))
