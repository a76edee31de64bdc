"""`llmva inspect`: what a run or an edit holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmva.cli.options import Output, RunDir
from llmva.errors import UsageError


def inspect(directory: RunDir, *, output: Output) -> None:
    """Show what a run or an edit holds.

    Its base model, the sublayers that it edits, iterations and metrics.
    """
    from llmva.cli.terminal.console import emit, show
    from llmva.edit_file import edit_file, read_edit
    from llmva.report import before_after_table
    from llmva.runs.record import read_run

    if not directory.exists():
        raise UsageError(f"There is no '{directory}': give the folder that llmva align wrote.")
    edit = read_edit(directory)
    columns = {name: iteration for name, (_, _, iteration) in edit.factors.items()}
    used = {name: int((of if edit.best is None else of[of <= edit.best]).size) for name, of in columns.items()}
    summary: dict[str, Any] = {
        "edit": str(edit_file(directory)),
        "base": {k: v for k, v in edit.base.items() if k != "hashes"},
        "best_iteration": edit.best,
        "iterations": max((int(of[-1]) for of in columns.values()), default=0),
        "sublayers": {name: rank for name, rank in used.items() if rank},
        "bytes": edit_file(directory).stat().st_size,
    }
    record = read_run(directory) if (directory / "run.json").is_file() else None
    if record is not None:
        keys = ("settings", "seed", "prompts", "judge", "iterations", "stopped", "test", "utility", "cost", "limits")
        summary["run"] = {key: record.get(key) for key in keys}
    show(output, *_lines(summary, record))
    if record is not None:
        show(output, before_after_table(record))
    if output.json:
        emit(summary)


def _lines(summary: Mapping[str, Any], record: Mapping[str, Any] | None) -> list[str]:
    from llmva.cli.terminal.console import iteration_words
    from llmva.report.values import counted, size

    base, best = summary["base"], summary["best_iteration"]
    lines = [
        f"edit of {base.get('model')} "
        f"({base.get('model_type')}, {base.get('blocks')} blocks, d {base.get('hidden_size')})",
        f"base sha256 {base.get('sha256')}",
        f"{counted(summary['iterations'], 'iteration')}, "
        f"{'unfinished' if best is None else f'iteration {best} chosen'}, "
        f"{counted(len(summary['sublayers']), 'sublayer')} edited, {size(summary['bytes'])}",
    ]
    if record is None:
        return lines
    lines.append(f"stopped: {record['stopped'] or 'not yet'}")
    for entry in record["iterations"]:
        lines.append(f"  iteration {entry['iteration']}: {', '.join(iteration_words(entry))}")
    return lines
