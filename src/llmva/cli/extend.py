"""`llmva extend`: continue from an earlier edit with new prompts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llmva.cli.options import (
    Base,
    Batches,
    EngineName,
    Loading,
    Restart,
    RunOutput,
    SettingOptions,
    Sides,
    Skills,
)
from llmva.cli.terminal.interrupt import interruptible, of_run
from llmva.errors import UsageError
from llmva.settings import SEEDS


def extend(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the earlier run.")],
    *,
    sides: Sides,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="EVALUATION", help="Learn from the prompts that failed in this file of evaluate --out."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR2", help="Write the new run to this folder.", show_default="DIR-extended"),
    ] = None,
    base: Base = None,
    skills: Skills = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="Label the answers with this judge.", show_default="the earlier run's"),
    ] = None,
    settings: Annotated[dict[str, Any], SettingOptions(otherwise="the earlier run's", without=("system",))],
    restart: Restart = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=SEEDS - 1,
            help="Seed all random draws with this number.",
            show_default="the earlier run's",
        ),
    ] = None,
    loading: Loading,
    batches: Batches,
    engine: EngineName = "transformers",
    output: RunOutput,
) -> None:
    """Continue from the edit in DIR with new prompts.

    --toxic brings new attacks, --benign new false refusals, --from what failed in an evaluation, in the form in which
    it was asked. DIR stays unchanged.

    Settings and the judge stay as in the earlier run unless they are given, and its system prompt does in any case. The
    earlier run's prompts guard against regressions.
    """
    if source is None and not sides.toxic and not sides.benign:
        raise UsageError("There is nothing new: add --toxic or --benign with a file or a data set, or --from.")
    if source is not None and (sides.toxic or sides.benign):
        raise UsageError("--from brings prompts of both sides: leave --toxic and --benign out, or extend twice.")
    out = out or directory.with_name(f"{directory.resolve().name}-extended")
    with interruptible() as kept:
        kept.say = of_run(out, restart)
        from llmva.cli import inputs

        inputs.quiet_libraries(*sides.toxic, *sides.benign)
        from llmva.alignment import RunOptions
        from llmva.cli.align import show_run
        from llmva.cli.terminal.console import Display
        from llmva.cli.terminal.trackers import check_tracker, tracked
        from llmva.extension import earlier_judge, prepare
        from llmva.extension import extend as run
        from llmva.judges import make_judge
        from llmva.models.engines.choose import check_engine
        from llmva.models.load import load_model
        from llmva.prompts.failures import read_failures
        from llmva.prompts.load import read_prompts
        from llmva.runs.record import read_run
        from llmva.settings import make_settings

        check_engine(engine)
        check_tracker(output.log)
        make_settings(**settings)
        given_judge = None if judge is None else make_judge(judge)
        if source is None:
            reading = read_prompts(sides.toxic, sides.benign)
        else:
            reading = read_failures(source, read_run(directory), directory)
        _, everything, record = prepare(directory, reading, out, seed)
        chosen_judge = given_judge or make_judge(earlier_judge(record, directory))
        title = str(record["base"]["model"])
        place = inputs.base_place(title, base)
        probes = inputs.choose_probes(place, skills)
        with Display(output.quiet) as display:
            for sentence in (*reading.notes, *everything.warnings):
                display.note(sentence)
            if chosen_judge.name != record["judge"]:
                display.note(f"the judge of the earlier run was {record['judge']}; this run uses {chosen_judge.name}")
            display.note(f"loading {title}")
            loaded, tokenizer = load_model(place, **asdict(loading), note=display.note)
            inputs.note_engine(engine, display)
            with tracked(display, output.log, out, title) as progress:
                result = run(
                    loaded,
                    tokenizer,
                    directory,
                    reading,
                    judge=chosen_judge,
                    seed=seed,
                    out=out,
                    restart=restart,
                    skills=probes,
                    options=RunOptions(name=title, command=inputs.typed_command()),
                    batch_tokens=batches.of(loaded),
                    engine=engine,
                    progress=progress,
                    **settings,
                )
                progress.result(result.record)
        show_run(place, result.record, out, display, output)
