"""`llmva study | runs`: many models by any number of processes, and an index of what lies in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmva.cli.options import Batches, Output
from llmva.cli.terminal.interrupt import interruptible
from llmva.errors import LlmvaError, UsageError

if TYPE_CHECKING:
    from llmva.experiments.study.definition import Study
    from llmva.experiments.study.plan import Cell

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="TOML or JSON file that defines the study.")]


def study_run(
    study: StudyFile,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Share this folder with all workers.", show_default="llmva-study-TITLE"
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Run this many processes here, one for each device in turn.")
    ] = 1,
    executor: Annotated[
        str,
        typer.Option(
            "--executor",
            metavar="local|ray|slurm",
            help="Start the workers here, on a Ray cluster, or as jobs of Slurm.",
        ),
    ] = "local",
    resources: Annotated[
        str,
        typer.Option(
            "--resources",
            metavar="NAME=VALUE,...",
            help="Give each worker these: num_gpus=1 for Ray; partition=long, gpus_per_node=1 for Slurm.",
            show_default=False,
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and measure nothing.")] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops", min=0.001, help="Estimate hours for a device of this speed, in 10^12 operations a second."
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Run on this device: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    number: Annotated[
        int, typer.Option("--worker", min=0, help="Begin with another model than workers of other numbers.")
    ] = 0,
    batches: Batches,
    output: Output,
) -> None:
    """Measure every cell of the study in STUDY that is not finished yet.

    Run the same command again to resume, or at the same time on another machine that shares the folder: each cell is
    measured by one process. At the end it writes study.json, an HTML page, Markdown, CSV and LaTeX to DIR.
    """
    with interruptible() as kept:
        from llmva.experiments.study.definition import read_study
        from llmva.experiments.study.plan import plan
        from llmva.experiments.study.worker import study_folder

        defined = read_study(study)
        directory, cells = out or study_folder(defined), plan(defined)
        if dry_run:
            _show_plan(defined, cells, directory, tflops, output)
            return
        kept.say = lambda: (
            f"Interrupted with {_done(directory, cells)} of {len(cells)} cells finished: run the same command again "
            "to resume."
        )
        if workers > 1 or executor != "local":
            commands = _commands(study, directory, workers, device, executor, batches)
            failed = _together(commands, directory, cells, executor, resources, output)
        else:
            failed = _alone(defined, directory, number, device, batches, output)
        _show_results(defined, directory, output)
        if failed:
            raise LlmvaError(f"{failed} What is finished is kept: mend this, and run the same command again.")


def study_init(
    *,
    paper: Annotated[
        bool, typer.Option("--paper", help="Write the study of the paper, with its published figures.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Write to this file.")] = Path("study.toml"),
    data_dir: Annotated[
        str | None,
        typer.Option("--data-dir", metavar="DIR", help="Read the paper's data sets from copies in this folder."),
    ] = None,
) -> None:
    """Write a study file to begin with."""
    from llmva.cli.terminal.console import say
    from llmva.experiments.study.paper import paper_study, small_study
    from llmva.files import write_new

    text = paper_study(data_dir) if paper else small_study()
    if not write_new(out, text.encode()):
        raise UsageError(f"'{out}' is there already: choose another --out.")
    say(f"Wrote {out}. See what it takes: llmva study {out} --dry-run")


def study_schema() -> None:
    """Print the JSON schema of a study file."""
    from llmva.cli.terminal.console import emit
    from llmva.experiments.study.definition import schema

    emit(schema())


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder below which runs and studies lie.")],
    *,
    output: Output,
) -> None:
    """List the runs and studies below FOLDER, and what stands still.

    Writes FOLDER/index.html with figures and links.
    """
    from dataclasses import asdict

    from llmva.cli.terminal.console import emit, show
    from llmva.experiments.claims import at_work
    from llmva.report.index import entries, index_table, write_index

    if not folder.is_dir():
        raise UsageError(f"There is no folder '{folder}': give one that holds runs, comparisons or studies.")
    shown = entries(folder, at_work)
    page = write_index(folder, shown)
    show(output, index_table(shown), f"Wrote {page}.")
    if output.json:
        emit({"index": str(page), "entries": [asdict(one) for one in shown]})


def _done(directory: Path, cells: Sequence[Cell]) -> int:
    from llmva.experiments.study.worker import finished

    titles = {cell.title for cell in cells}
    return len(titles & finished(directory, cells))


def _alone(study: Study, directory: Path, number: int, device: str, batches: Batches, output: Output) -> str:
    """Work here until nothing is left; a sentence on what failed, or ''."""
    from llmva.cli.inputs import demo_model, quiet_libraries
    from llmva.cli.terminal.console import Display

    quiet_libraries(*(model.path for model in study.models))
    from llmva.experiments.study.worker import Worker

    with Display(output.quiet) as display:
        worker = Worker(
            study,
            directory,
            demo=str(demo_model()),
            number=number,
            device=device,
            batch_tokens=batches.batch_tokens,
            progress=display,
        )
        failed = worker.run().failed
    first = next(iter(failed.items()), None)
    return "" if first is None else f"{len(failed)} cells failed, the first of them {first[0]}: {first[1]}"


def _commands(
    study: Path, directory: Path, workers: int, device: str, executor: str, batches: Batches
) -> list[list[str]]:
    """The words of each worker; another machine may have another current folder."""
    from llmva.experiments.study.local import devices

    more = [] if batches.batch_tokens is None else ["--batch-tokens", str(batches.batch_tokens)]
    each = devices(device, workers) if executor == "local" else [device] * workers
    shared = ["study", "run", str(study.resolve()), "--out", str(directory.resolve()), "--quiet", *more]
    return [[*shared, "--worker", str(i), "--device", one] for i, one in enumerate(each)]


def _together(
    commands: Sequence[Sequence[str]],
    directory: Path,
    cells: Sequence[Cell],
    executor: str,
    resources: str,
    output: Output,
) -> str:
    """Run worker processes; a sentence on those that failed, or ''."""
    from llmva.cli.terminal.console import Display
    from llmva.experiments.study.executors import parse_resources, run_with

    given, workers = parse_resources(resources), len(commands)
    with Display(output.quiet) as display:
        shown = _done(directory, cells)
        on_progress = display.stage(f"{workers} workers", len(cells) - shown, "cells")

        def look() -> None:
            nonlocal shown
            now = _done(directory, cells)
            if now > shown:
                on_progress(now - shown)
                shown = now

        codes = run_with(executor, commands, look, directory / "slurm", given)
    bad = sum(code != 0 for code in codes)
    return f"{bad} of {workers} workers failed, as their output says." if bad else ""


def _show_results(study: Study, directory: Path, output: Output) -> None:
    from llmva.cli.terminal.console import emit, show
    from llmva.experiments.study.results import collect
    from llmva.report import study_tables, write_study

    record = collect(study, directory)
    pages = write_study(directory)
    show(output, *study_tables(record), f"Wrote {', '.join(str(page) for page in pages)}.")
    if output.json:
        emit(record)


def _show_plan(study: Study, cells: Sequence[Cell], directory: Path, tflops: float | None, output: Output) -> None:
    from llmva.cli.inputs import demo_model
    from llmva.cli.terminal.console import emit, show
    from llmva.experiments.study.estimate import estimates, totals
    from llmva.report.study.plan import plan_table

    rows, notes = estimates(study, cells, str(demo_model()), tflops)
    plan: dict[str, Any] = {
        "title": study.title,
        "folder": str(directory),
        "finished": _done(directory, cells),
        "totals": totals(rows),
        "cells": rows,
        "notes": notes,
    }
    show(output, *plan_table(plan), *notes)
    if output.json:
        emit(plan)
