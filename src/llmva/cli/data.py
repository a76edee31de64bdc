"""`llmva data list`, and what `--data` does: licences told before use, figures by data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmva.cli.options import Json, QuietFlag
from llmva.errors import UsageError

if TYPE_CHECKING:
    from llmva.cli.console import Display
    from llmva.prompts.public.wanted import Wanted


def add_to(app: typer.Typer) -> None:
    """Make the commands of this module known to the program."""
    data = typer.Typer(help="Which public data sets are known by name?", no_args_is_help=True)
    data.callback()(_only)
    data.command("list")(data_list)
    app.add_typer(data, name="data")


def _only() -> None:
    """Public data sets that --data knows by name."""  # the callback keeps `list` a command of its own


def data_list(json_: Json = False, quiet: QuietFlag = False) -> None:
    """The data sets that --data knows: sides, number of prompts, licence, whether a login is needed, home."""
    from llmva.cli.console import emit, say
    from llmva.prompts.public.registry import list_data

    found = list_data()
    if json_:
        emit({"data": found})
    elif not quiet:
        say(_table(found))


def _table(found: Sequence[Mapping[str, Any]]) -> str:
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
        for one in found
    ]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(w) if i == 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, (heads, *rows)))


def parse_and_tell(data: Sequence[str], display: Display) -> list[Wanted]:
    """The sets that were named, their licences told before the first use, with --quiet too: terms must be seen once.

    Raises UsageError as `parse_data`.
    """
    from llmva.prompts.public.registry import first_use_notice
    from llmva.prompts.public.wanted import parse_data

    wanted = parse_data(data)
    for one in wanted:
        notice = first_use_notice(one.entry.name)
        if notice:
            display.line(notice)
    return wanted


def run_transfer(
    model: str,
    *,
    edit: Path | None,
    data: Sequence[str],
    toxic: Sequence[str],
    benign: Sequence[str],
    per_set: int | None,
    keep_duplicates: bool,
    markdown: Path | None,
    iteration: int | None,
    strength: float | None,
    point: int | None = None,
    judge: str,
    max_new_tokens: int,
    seed: int,
    loading: Mapping[str, Any],
    batch_tokens: int | None,
    json: bool,
    quiet: bool,
) -> None:
    """`llmva evaluate --data`: prompts, judge and edit are read before the model is loaded."""
    from llmva.cli import inputs
    from llmva.cli.console import Display, emit

    inputs.quiet_libraries(model, *toxic, *benign, *inputs.places(data))
    from llmva.evaluation.evaluate import EvaluationSettings
    from llmva.evaluation.transfer import transfer
    from llmva.files import write_text
    from llmva.judges import make_judge
    from llmva.models.chat_model import ChatModel
    from llmva.models.load import load_model
    from llmva.prompts.testsets import PER_SET, read_test_sets
    from llmva.report import transfer_markdown, transfer_table

    judge_ = make_judge(judge)
    loaded_edit = inputs.load_edit(edit, iteration, strength, point)
    if markdown is not None and not markdown.parent.is_dir():
        raise UsageError(f"There is no folder '{markdown.parent}': make it, or choose another for --markdown.")
    with Display(quiet) as display:
        wanted = parse_and_tell(data, display)
        sets = read_test_sets(
            wanted,
            toxic,
            benign,
            fit=inputs.fit_prompts(edit),
            per_set=per_set or PER_SET,
            seed=seed,
            keep_duplicates=keep_duplicates,
        )
        display.note(f"loading {model}")
        loaded, tokenizer = load_model(model, **loading)
        found = transfer(
            ChatModel.of(loaded, tokenizer, batch_tokens),
            sets,
            judge_,
            settings=EvaluationSettings(seed=seed, max_new_tokens=max_new_tokens),
            edit=loaded_edit,
            progress=display,
        )
    if edit is not None and sets[0].about["contamination"] is None:
        found["limits"].append(
            f"The prompts of the run are not beside '{edit}', so whether the fit has seen test prompts is not known."
        )
    counts = {one.name: len(one.prompts) for one in sets}
    head = {"model": model, "edit": None if edit is None else str(edit), "prompts": counts, "judge": judge_.name}
    found = {**head, "seed": seed, **found}
    if markdown is not None:
        write_text(markdown, transfer_markdown(found))
    if not quiet:
        display.console.print(transfer_table(found))
        for limit in found["limits"]:
            display.line(limit)
    if json:
        emit(found)
