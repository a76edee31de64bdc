"""`llmva align | demo`: run the method on a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmva.cli.options import (
    Batches,
    EngineName,
    JudgeName,
    Loading,
    ModelArg,
    Output,
    Restart,
    RunOutput,
    Seed,
    SettingOptions,
    Skills,
    Sources,
)
from llmva.cli.terminal.interrupt import interruptible, of_run

if TYPE_CHECKING:
    from llmva.cli.terminal.console import Display


def align(
    model: ModelArg,
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write the run to this folder.", show_default="llmva-MODEL"),
    ] = None,
    sources: Sources,
    skills: Skills = None,
    judge: JudgeName = "phrases",
    settings: Annotated[dict[str, Any], SettingOptions()],
    restart: Restart = False,
    seed: Seed = 42,
    loading: Loading,
    batches: Batches,
    engine: EngineName = "transformers",
    output: RunOutput,
) -> None:
    """Align MODEL: write an edit, metrics and a report to DIR.

    No option is needed. If interrupted, run the same command to resume.
    """
    with interruptible() as kept:
        from llmva.cli import inputs
        from llmva.cli.terminal.trackers import check_tracker, tracked
        from llmva.models.engines.choose import check_engine
        from llmva.settings import make_settings

        place = inputs.model_place(model)
        directory = out or inputs.default_out(model)
        kept.say = of_run(directory, restart)
        check_engine(engine)
        check_tracker(output.log)
        make_settings(**settings)  # a mistake in them costs no loading
        probes = inputs.choose_probes(place, skills)
        with inputs.load(place, sources, judge, seed, loading, output.quiet) as (loaded, tokenizer, prompts, display):
            from llmva.alignment import RunOptions
            from llmva.alignment import align as run

            inputs.note_engine(engine, display)
            with tracked(display, output.log, directory, inputs.model_title(place)) as progress:
                result = run(
                    loaded,
                    tokenizer,
                    prompts,
                    judge=judge,
                    seed=seed,
                    out=directory,
                    restart=restart,
                    skills=probes,
                    batch_tokens=batches.of(loaded),
                    engine=engine,
                    progress=progress,
                    options=RunOptions(name=inputs.model_title(place), command=inputs.typed_command()),
                    **settings,
                )
                progress.result(result.record)
        show_run(place, result.record, directory, display, output)


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Write the run to this folder.")] = Path(
        "llmva-demo"
    ),
    restart: Restart = False,
    seed: Seed = 42,
    output: RunOutput,
) -> None:
    """Align the small bundled model, which takes seconds.

    No download and no option is needed.
    """
    from llmva.cli import inputs

    align(
        str(inputs.demo_model()),  # not by its name, which a folder here may have
        out=out,
        sources=Sources(),
        settings={},
        restart=restart,
        seed=seed,
        loading=Loading(),
        batches=Batches(),
        output=output,
    )


def _next(place: str, record: Mapping[str, Any], directory: Path) -> list[str]:
    """What the user may do now: look, try, ship."""
    from llmva.cli.inputs import typed_model

    lines = [f"Report: {directory / 'report.html'}"]
    if record["best_iteration"]:
        where = quote(str(directory))
        lines.append(f"Try it: llmva chat {quote(typed_model(place))} --edit {where} --compare")
        lines.append(f"Ship it: llmva export {where} --as lora --out {quote(f'{directory}-lora')}")
    return lines


def show_run(place: str, record: Mapping[str, Any], directory: Path, display: Display, output: Output) -> None:
    """Print the table of a finished run, its outcome and its limits, and say how to go on."""
    from llmva.cli.terminal.console import emit, show
    from llmva.report import before_after_table
    from llmva.report.run.outcome import outcome
    from llmva.report.run.truth import truth_note

    facts = dict(record)
    note = truth_note(facts)
    show(output, before_after_table(facts), outcome(facts).sentence, *([note] if note else []), *record["limits"])
    for sentence in _next(place, record, directory):
        display.note(sentence)
    if output.json:
        emit(record)
