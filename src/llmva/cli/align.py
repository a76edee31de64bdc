"""`llmva align | demo`: run the method on a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
    output: Output,
) -> None:
    """Align MODEL and write the edit, its metrics and a report to DIR.

    No option is needed. If interrupted, run the same command to resume.
    """
    with interruptible() as kept:
        from llmva.cli import inputs
        from llmva.models.engines.choose import check_engine
        from llmva.settings import make_settings

        directory = out or inputs.default_out(model)
        kept.say = of_run(directory, restart)
        check_engine(engine)
        make_settings(**settings)  # a mistake in them costs no loading
        probes = inputs.choose_probes(model, skills)
        with inputs.load(model, sources, judge, seed, loading, output.quiet) as (loaded, tokenizer, prompts, display):
            from llmva.alignment import RunOptions
            from llmva.alignment import align as run

            inputs.note_engine(engine, display)
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
                progress=display,
                options=RunOptions(name=inputs.model_title(model), command=inputs.typed_command()),
                **settings,
            )
        show_run(result.record, directory, display, output)


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Write the run to this folder.")] = Path(
        "llmva-demo"
    ),
    restart: Restart = False,
    seed: Seed = 42,
    output: Output,
) -> None:
    """Align the small bundled model: no downloads, no options, about a minute."""
    from llmva.cli import inputs

    model = str(inputs.demo_model())
    align(
        model,
        out=out,
        sources=Sources(),
        settings={},
        restart=restart,
        seed=seed,
        loading=Loading(),
        batches=Batches(),
        output=output,
    )


def show_run(record: Mapping[str, Any], directory: Path, display: Display, output: Output) -> None:
    """Draw the report of a finished run, and print its table, its outcome and its limits."""
    from llmva.cli.terminal.console import emit
    from llmva.report import before_after_table, write_report
    from llmva.report.run.outcome import outcome
    from llmva.report.run.truth import truth_note

    report = write_report(directory)
    if not output.quiet:
        display.console.print(before_after_table(dict(record)))
        display.line(outcome(dict(record)).sentence)
        if note := truth_note(dict(record)):
            display.line(note)
        for limit in record["limits"]:
            display.line(limit)
        display.line(f"Wrote {directory / 'edit.safetensors'} and {report}.")
    if output.json:
        emit(record)
