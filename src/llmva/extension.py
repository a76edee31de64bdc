"""Continue from an earlier edit when new attacks or new false refusals appear, without regressions on the old prompts.

Iteration 0 of the new run is the model with the earlier edit. The run is fitted on the earlier run's prompts, which
keep their splits, and on the new ones. An iteration can be chosen only if ASR and ORR of the earlier run's validation
prompts stay within the intervals that the earlier edit had there (`check_regression`). Harm to other text is measured
against the untouched model, along its answers in the first run, so harm cannot add up unseen over several extensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmva.alignment import Result, RunOptions, align
from llmva.edit import Edit
from llmva.errors import UsageError
from llmva.prompts.add import add_prompts
from llmva.prompts.failures import Failures, add_failures
from llmva.prompts.load import Reading
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt
from llmva.runs.identity import notes_on_edit
from llmva.runs.record import read_answers, read_run
from llmva.runs.run import UNTOUCHED
from llmva.runs.warm_start import WarmStart
from llmva.settings import Settings, make_settings


def extend(
    model: Any,
    tokenizer: Any,
    directory: str | Path,
    prompts: Sequence[Prompt] | Reading,
    *,
    seed: int | None = None,
    out: str | Path | None = None,
    options: RunOptions | None = None,
    **how: Any,
) -> Result:
    """Continue the edit of the finished run in `directory` with new prompts; a run of its own, as `align` makes.

    Args:
        model, tokenizer: the untouched model that the run was made on, as `load_model` gives it.
        directory: folder of the earlier run; it is only read.
        prompts: the new prompts, of one side or both; of a Reading the run keeps what reading them guessed.
            `read_failures` gives those that failed in an evaluation.
        seed: None takes the earlier run's.
        out: folder of the new run; None keeps everything in memory.
        how: further arguments of `align`, and fields of `llmva.settings.Settings`. The judge and the settings that
            are not given are the earlier run's.

    Raises:
        UsageError, LlmvaError: no finished run, another model, another system prompt, nothing new to learn from.
    """
    start, everything, record = prepare(directory, prompts, out, seed)
    start.edit.apply(model).remove()  # raises for an edit of another model before anything is written
    start = replace(start, notes=tuple(notes_on_edit(record, model, tokenizer)))
    given = options or RunOptions()
    earlier = {key: value for key, value in record["settings"].items() if key in Settings.model_fields}
    if make_settings(system=how.get("system", earlier.get("system"))).system != earlier.get("system"):
        raise UsageError(
            f"An extension keeps the system prompt of the run in '{directory}', whose answers it builds on: leave "
            "system out, or align anew."
        )
    if "judge" not in how:
        how["judge"] = earlier_judge(record, directory)
    return align(
        model,
        tokenizer,
        everything,
        seed=record["seed"] if seed is None else seed,
        out=out,
        options=replace(given, name=given.name or record["base"]["model"], warm_start=start),
        **(earlier | how),
    )


def earlier_judge(record: Mapping[str, Any], directory: str | Path) -> str:
    """The value of `--judge` of the earlier run. Raises UsageError if its judge was made otherwise."""
    spec = record.get("judge_spec")
    if not isinstance(spec, str):
        raise UsageError(
            f"The record of the run in '{directory}' does not say how its judge {record['judge']} is made: give a "
            "judge, with --judge or judge=."
        )
    return spec


def prepare(
    directory: str | Path, prompts: Sequence[Prompt] | Reading, out: str | Path | None = None, seed: int | None = None
) -> tuple[WarmStart, PromptSet, dict[str, Any]]:
    """The start of the new run, its prompts, and the earlier run's record; needs no model."""
    directory = Path(directory)
    record = read_run(directory)
    if not (record.get("test") or {}).get("after"):
        raise UsageError(f"The run in '{directory}' is not finished: end it by the same llmva align, then extend it.")
    if out is not None and Path(out).resolve() == directory.resolve():
        raise UsageError(f"'{directory}' is the run to be extended: choose another folder with --out.")
    whole = Edit.load(directory)
    if not whole.chosen.factors:
        raise UsageError(
            f"The run in '{directory}' left its model as it was, so there is no edit to extend: run llmva align on all "
            "prompts together."
        )
    known = directory / "prompts.jsonl"
    if not known.is_file():
        raise UsageError(f"'{known}' is missing, and without it nothing guards the earlier prompts: put it back.")
    old = PromptSet.from_jsonl(known)
    reading = prompts if isinstance(prompts, Reading) else Reading(tuple(prompts))
    add = add_failures if isinstance(reading, Failures) else add_prompts
    everything, new = add(old, reading.prompts, record["seed"] if seed is None else seed)
    everything = replace(everything, warnings=(*reading.warnings, *everything.warnings))
    sources = tuple(old.counts())
    answers = read_answers(directory, record)
    first = min((row["iteration"] for row in answers), default=0)  # the untouched model's, however often extended
    said = [{**row, "iteration": UNTOUCHED} for row in answers if row["iteration"] == first]
    chosen = record["best_iteration"], record.get("best_strength", 1.0)
    start = WarmStart(whole.as_start(), sources, new, *chosen, said)
    return start, everything, record
