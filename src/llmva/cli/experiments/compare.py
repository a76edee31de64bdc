"""`llmva compare | ablate | judge check`: measure other methods, each step of this one, and a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmva.cli.options import (
    Batches,
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
from llmva.cli.terminal.interrupt import interruptible, of_study

if TYPE_CHECKING:
    from llmva.cli.terminal.console import Display

Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Repeat with this many seeds, beginning with --seed.")]
StudySettings = Annotated[dict[str, Any], SettingOptions("iterations", "per_source", "max_new_tokens", "system")]


def compare(
    model: ModelArg,
    *,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAMES",
            help="Compare these: all, or some of none, vectorsteer, alphasteer, alphasteer+, scans, cast, surgical, "
            "adasteer, llmva; and adapter:PATH_OR_ID or model:PATH_OR_ID, which others have published for MODEL.",
        ),
    ] = "all",
    seeds: Seeds = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Write the comparison to this folder.", show_default="llmva-compare-MODEL"
        ),
    ] = None,
    sources: Sources,
    judge: JudgeName = "phrases",
    tuned: Annotated[
        bool,
        typer.Option(
            "--tuned/--no-tuned", help="Add a row for each baseline with options tuned on validation prompts."
        ),
    ] = True,
    curves: Annotated[
        bool, typer.Option("--curves/--no-curves", help="Measure ASR and ORR along the strength of each method.")
    ] = True,
    skills: Skills = None,
    settings: StudySettings,
    restart: Restart = False,
    seed: Seed = 42,
    loading: Loading,
    batches: Batches,
    output: Output,
) -> None:
    """Compare LLM-VA with other steering methods on MODEL.

    All have the same prompts, judge and seeds. Writes compare.json, an HTML page, CSV and LaTeX to DIR. If interrupted,
    run the same command to resume.
    """
    with interruptible() as kept:
        from llmva.cli import inputs
        from llmva.experiments.compare import check_methods
        from llmva.experiments.comparison import METHODS

        chosen = METHODS if methods == "all" else tuple(name.strip() for name in methods.split(",") if name.strip())
        check_methods(chosen)
        place = inputs.model_place(model)
        directory = out or Path(f"llmva-compare-{inputs.model_stem(model)}")
        kept.say = of_study(directory, restart)
        probes = inputs.choose_probes(place, skills)
        with inputs.load(place, sources, judge, seed, loading, output.quiet) as (loaded, tokenizer, prompts, display):
            from llmva.experiments.compare import compare as run

            record = run(
                loaded,
                tokenizer,
                prompts,
                methods=chosen,
                judge=judge,
                seeds=range(seed, seed + seeds),
                out=directory,
                restart=restart,
                tuned=tuned,
                curves=curves,
                skills=probes,
                name=inputs.model_title(place),
                command=inputs.typed_command(),
                batch_tokens=batches.of(loaded),
                progress=display,
                **settings,
            )
        from llmva.report import comparison_table, write_comparison

        _show(record, write_comparison(directory), comparison_table(record), display, output)


def ablate(
    model: ModelArg,
    *,
    what: Annotated[
        str, typer.Option("--what", metavar="vectors|iterations|layers", help="Change this step of the method.")
    ],
    seeds: Seeds = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Write the ablation to this folder.", show_default="llmva-ablate-WHAT-MODEL"
        ),
    ] = None,
    sources: Sources,
    judge: JudgeName = "phrases",
    settings: StudySettings,
    restart: Restart = False,
    seed: Seed = 42,
    loading: Loading,
    batches: Batches,
    output: Output,
) -> None:
    """Change one step of the method and measure what is lost.

    Writes ablate.json, an HTML page and CSV to DIR. If interrupted, run the same command to resume.
    """
    with interruptible() as kept:
        from llmva.cli import inputs

        place = inputs.model_place(model)
        directory = out or Path(f"llmva-ablate-{what}-{inputs.model_stem(model)}")
        kept.say = of_study(directory, restart)
        with inputs.load(place, sources, judge, seed, loading, output.quiet) as (loaded, tokenizer, prompts, display):
            from llmva.experiments.ablate import ablate as run

            record = run(
                loaded,
                tokenizer,
                prompts,
                what=what,
                judge=judge,
                seeds=range(seed, seed + seeds),
                out=directory,
                restart=restart,
                name=inputs.model_title(place),
                command=inputs.typed_command(),
                batch_tokens=batches.of(loaded),
                progress=display,
                **settings,
            )
        from llmva.report import ablation_table, write_ablation

        _show(record, write_ablation(directory), ablation_table(record), display, output)


def _show(record: Mapping[str, Any], pages: Sequence[Path], table: Any, display: Display, output: Output) -> None:
    from llmva.cli.terminal.console import emit, show

    show(output, table, *record["limits"])
    display.note(f"Wrote {', '.join(str(page) for page in pages)}.")
    if output.json:
        emit(record)


def judge_check(
    *,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="Read labelled answers from this JSONL file.",
            show_default="the bundled ones",
        ),
    ] = None,
    judge: JudgeName = "phrases",
    output: Output,
) -> None:
    """Measure how often a judge agrees with hand labels.

    Accuracy, Cohen's kappa, confusion, and its mistakes. A line of --labels is a JSON object with part (a name),
    prompt, answer and label (answered, refused or garbled), and if you like benign (true or false) and note.
    """
    from llmva.cli.terminal.console import emit, show
    from llmva.judges import make_judge
    from llmva.judges.check import check_judge, lines

    agreement = check_judge(make_judge(judge), labels)
    show(output, *lines(agreement))
    if output.json:
        emit({"judge": judge, **agreement})
