"""`llmva replay`: run again what a folder says was run, and tell whether the same bytes come out."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from llmva.cli.options import Base, Batches, EngineName, Loading, Output, Restart, Skills
from llmva.cli.terminal.interrupt import interruptible, of_run


def replay(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR2", help="Write the second run to this folder.", show_default="DIR-replay"),
    ] = None,
    base: Base = None,
    skills: Skills = None,
    restart: Restart = False,
    loading: Loading,
    batches: Batches,
    engine: EngineName = "transformers",
    output: Output,
) -> None:
    """Do the run in DIR again, and compare both.

    Says whether the same bytes come out, and if not, where the runs part. Prompts, settings, seed, judge, dtype and the
    size of the batches are those of DIR. Exits with 1 if the runs are not equal.
    """
    out = out or directory.with_name(f"{directory.resolve().name}-replay")
    with interruptible() as kept:
        kept.say = of_run(out, restart)
        from llmva.cli import inputs

        inputs.quiet_libraries()
        from llmva.alignment import RunOptions
        from llmva.cli.terminal.console import Display, emit, show
        from llmva.experiments.replay import replay as run
        from llmva.experiments.replay import replayable
        from llmva.models.engines.choose import check_engine
        from llmva.models.load import load_model
        from llmva.report.run.replayed import replayed_sentences
        from llmva.runs.identity import notes_on_edit, other_versions
        from llmva.runs.record import read_run

        check_engine(engine)
        record = replayable(directory, out)
        title = str(record["base"]["model"])
        place = inputs.base_place(title, base)
        probes = inputs.choose_probes(place, skills)
        dtype = str(record["base"]["dtype"]) if loading.dtype == "auto" else loading.dtype
        with Display(output.quiet) as display:
            display.note(f"loading {title}")
            loaded, tokenizer = load_model(place, **asdict(replace(loading, dtype=dtype)), note=display.note)
            for sentence in notes_on_edit(record, loaded, tokenizer):
                display.note(sentence)
            inputs.note_engine(engine, display)
            alike = run(
                loaded,
                tokenizer,
                directory,
                out=out,
                skills=probes,
                restart=restart,
                engine=engine,
                progress=display,
                batch_tokens=batches.of(loaded) or record.get("batch_tokens"),
                options=RunOptions(name=title, command=inputs.typed_command()),
            )
        versions = other_versions(record, read_run(out))
        show(output, *replayed_sentences(alike.as_record(), versions))
        if output.json:
            emit({**alike.as_record(), "versions": versions, "out": str(out)})
    raise typer.Exit(0 if alike.equal else 1)
