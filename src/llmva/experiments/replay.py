"""Replay: run again what a folder says was run, and tell whether the same bytes come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmva.alignment import RunOptions, align
from llmva.edit import Edit
from llmva.errors import UsageError
from llmva.extension import earlier_judge
from llmva.prompts.prompt_set import PromptSet
from llmva.runs.parting import Alike, compare_runs
from llmva.runs.record import read_answers, read_run
from llmva.runs.run import UNTOUCHED
from llmva.runs.warm_start import WarmStart
from llmva.settings import Settings


def replay(
    model: Any,
    tokenizer: Any,
    directory: str | Path,
    *,
    out: str | Path,
    options: RunOptions | None = None,
    **how: Any,
) -> Alike:
    """Run again what the run in `directory` did, into `out`, and compare both.

    Prompts, seed, settings, judge and size of the batches are the run's own. An interrupted replay goes on.

    Args:
        model, tokenizer: the untouched model that the run was made on, as `load_model` gives it.
        directory: folder of the run; it is only read.
        how: further arguments of `align`: skills, engine, restart, progress, and batch_tokens in place of the run's.

    Raises:
        UsageError, LlmvaError: as `replayable`, where the model has other weights than the run's, and as `align`.
    """
    directory, out = Path(directory), Path(out)
    record = replayable(directory, out)
    prompts = PromptSet.from_jsonl(directory / "prompts.jsonl")
    edit = Edit.load(directory)
    if edit.chosen.factors:
        edit.apply(model).remove()  # raises for another model before anything is computed
    given = options or RunOptions()
    how = {"batch_tokens": record.get("batch_tokens")} | how
    how |= {name: value for name, value in record["settings"].items() if name in Settings.model_fields}
    align(
        model,
        tokenizer,
        replace(prompts, warnings=()),
        judge=earlier_judge(record, directory),
        seed=record["seed"],
        out=out,
        options=replace(
            given,
            name=given.name or record["base"]["model"],
            warm_start=_start(directory, record, edit),
            measure_test=bool((record.get("test") or {}).get("after")),
            hardened=True,
        ),
        **how,
    )
    return compare_runs(directory, out)


def replayable(directory: Path, out: Path) -> dict[str, Any]:
    """The record of a run that can be replayed into `out`.

    Raises UsageError if there is no run, if it is unfinished, if its prompts are missing, or if `out` is its folder.
    """
    record = read_run(directory)
    if record["stopped"] is None:
        raise UsageError(f"The run in '{directory}' is not finished: end it by the same command, then replay it.")
    if out.resolve() == directory.resolve():
        raise UsageError(f"'{directory}' is the run to be replayed: choose another folder with --out.")
    if not (directory / "prompts.jsonl").is_file():
        raise UsageError(f"'{directory / 'prompts.jsonl'}' is missing, and without it nothing can be asked again.")
    return record


def _start(directory: Path, record: Mapping[str, Any], edit: Edit) -> WarmStart | None:
    """The start of a run that extends another, as its folder holds it; None for a run of its own."""
    extends = record.get("extends")
    if not extends:
        return None
    said = [row for row in read_answers(directory, record) if row["iteration"] == UNTOUCHED]
    return WarmStart(
        edit.at(0), tuple(extends["old"]), tuple(extends["new"]), extends["iteration"], extends["strength"], said
    )
