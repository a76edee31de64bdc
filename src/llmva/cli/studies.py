"""`llmva compare | ablate | judge check`: what settles claims about the method, and about what it is measured by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from llmva.cli.options import (
    BatchTokens,
    Benign,
    Data,
    Device,
    DeviceMap,
    Dtype,
    Json,
    JudgeName,
    ModelArg,
    PerSet,
    Quantize,
    QuietFlag,
    Seed,
    Toxic,
    Trust,
    loading_options,
)
from llmva.errors import UsageError

Seeds = Annotated[int, typer.Option("--seeds", min=1, help="how many draws of the fit prompts")]
PerSource = Annotated[int, typer.Option("--per-source", help="fit prompts drawn from each data set")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", help="most tokens of an answer")]
Iterations = Annotated[int, typer.Option("--iterations", help="most iterations of a run of ours")]
Restart = Annotated[bool, typer.Option("--restart", help="discard what was measured in DIR")]


def add_to(app: typer.Typer) -> None:
    """Make the commands of this module known to the program."""
    app.command()(compare)
    app.command()(ablate)
    judge = typer.Typer(help="How good is a judge?", no_args_is_help=True)
    judge.command("check")(judge_check)
    app.add_typer(judge, name="judge")


def compare(
    model: ModelArg,
    methods: Annotated[
        str, typer.Option("--methods", help="of none, vectorsteer, alphasteer, alphasteer+, scans, cast, llmva; or all")
    ] = "all",
    seeds: Seeds = 3,
    out: Annotated[
        Optional[Path],  # noqa: UP045 (typer reads it at run time)
        typer.Option("--out", metavar="DIR", help="folder of the comparison [default: llmva-compare-MODEL]"),
    ] = None,
    toxic: Toxic = None,
    benign: Benign = None,
    data: Data = None,
    per_set: PerSet = None,
    judge: JudgeName = "phrases",
    tuned: Annotated[
        bool, typer.Option("--tuned/--no-tuned", help="a second row for each baseline, tuned on validation prompts")
    ] = True,
    curves: Annotated[
        bool, typer.Option("--curves/--no-curves", help="ASR and ORR along the strength of each method")
    ] = True,
    skills: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--skills", metavar="FILE", help="JSONL of probes with known answers"),
    ] = None,
    iterations: Iterations = 30,
    per_source: PerSource = 128,
    max_new_tokens: Tokens = 128,
    restart: Restart = False,
    seed: Seed = 42,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantize: Quantize = "none",
    batch_tokens: BatchTokens = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """LLM-VA beside other steering methods on MODEL: the same prompts, judge and seeds, in one run.

    Writes compare.json, a page, CSV and LaTeX to DIR. Killed, it goes on when the same command is run again.
    """
    from llmva.baselines import BASELINES
    from llmva.cli import inputs

    everything = ("none", *BASELINES, "llmva")
    chosen = everything if methods == "all" else tuple(name.strip() for name in methods.split(",") if name.strip())
    unknown = [name for name in chosen if name not in everything]
    if unknown:
        raise UsageError(f"There is no method '{unknown[0]}': choose among {', '.join(everything)}.")
    directory = out or Path(f"llmva-compare-{inputs.model_stem(model)}")

    def work(loaded: Any, tokenizer: Any, prompts: Any, display: Any) -> Mapping[str, Any]:
        from llmva.experiments.compare import compare as run

        return run(
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
            skills=inputs.choose_probes(inputs.model_place(model), skills),
            name=inputs.model_title(model),
            command=inputs.typed_command(),
            batch_tokens=batch_tokens,
            progress=display,
            iterations=iterations,
            per_source=per_source,
            max_new_tokens=max_new_tokens,
        )

    loading = loading_options(device, dtype, device_map, quantize, trust_remote_code)
    named = {"toxic": toxic or [], "benign": benign or [], "data": data or [], "per_set": per_set}
    _study(model, named, judge, seed, loading, directory, "comparison", work, json_, quiet)


def ablate(
    model: ModelArg,
    what: Annotated[str, typer.Option("--what", metavar="vectors|iterations|layers", help="which step is changed")],
    seeds: Seeds = 3,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", metavar="DIR", help="folder of the ablation [default: llmva-ablate-WHAT-MODEL]"),
    ] = None,
    toxic: Toxic = None,
    benign: Benign = None,
    data: Data = None,
    per_set: PerSet = None,
    judge: JudgeName = "phrases",
    iterations: Iterations = 30,
    per_source: PerSource = 128,
    max_new_tokens: Tokens = 128,
    restart: Restart = False,
    seed: Seed = 42,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantize: Quantize = "none",
    batch_tokens: BatchTokens = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """What carries the method on MODEL: its vectors, its iterations, or its choice of sublayers (the paper's RQ3).

    Writes ablate.json, a page and CSV to DIR. Killed, it goes on when the same command is run again.
    """
    from llmva.cli import inputs

    directory = out or Path(f"llmva-ablate-{what}-{inputs.model_stem(model)}")

    def work(loaded: Any, tokenizer: Any, prompts: Any, display: Any) -> Mapping[str, Any]:
        from llmva.experiments.ablate import ablate as run

        return run(
            loaded,
            tokenizer,
            prompts,
            what=what,
            judge=judge,
            seeds=range(seed, seed + seeds),
            out=directory,
            restart=restart,
            name=inputs.model_title(model),
            command=inputs.typed_command(),
            batch_tokens=batch_tokens,
            progress=display,
            iterations=iterations,
            per_source=per_source,
            max_new_tokens=max_new_tokens,
        )

    loading = loading_options(device, dtype, device_map, quantize, trust_remote_code)
    named = {"toxic": toxic or [], "benign": benign or [], "data": data or [], "per_set": per_set}
    _study(model, named, judge, seed, loading, directory, "ablation", work, json_, quiet)


def _study(
    model: str,
    named: Mapping[str, Any],
    judge: str,
    seed: int,
    loading: Mapping[str, Any],
    directory: Path,
    kind: str,
    work: Any,
    json: bool,
    quiet: bool,
) -> None:
    """Load, measure, write the pages, print the table. `named` are prompts, as `choose_prompts` takes them."""
    from llmva.cli import inputs
    from llmva.cli.console import Display, emit
    from llmva.cli.data import parse_and_tell

    place = inputs.model_place(model)
    inputs.quiet_libraries(place, *named["toxic"], *named["benign"], *inputs.places(named["data"]))
    from llmva import report
    from llmva.judges import make_judge
    from llmva.models.load import load_model

    make_judge(judge)  # a mistake in its name costs no loading
    parse_and_tell(named["data"], Display(quiet))
    prompts = inputs.choose_prompts(place, seed=seed, **named)
    with Display(quiet) as display:
        for warning in prompts.warnings:
            display.note(warning)
        display.note(f"loading {inputs.model_title(model)}")
        loaded, tokenizer = load_model(place, **loading)
        record = work(loaded, tokenizer, prompts, display)
    write, table = {
        "comparison": (report.write_comparison, report.comparison_table),
        "ablation": (report.write_ablation, report.ablation_table),
    }[kind]
    pages = write(directory)
    if not quiet:
        display.console.print(table(record))
        display.line(f"Wrote {', '.join(str(page) for page in pages)}.")
    if json:
        emit(record)


def judge_check(
    labels: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--labels", metavar="FILE", help="JSONL of labelled answers [default: the bundled ones]"),
    ] = None,
    judge: JudgeName = "phrases",
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """How often a judge agrees with labels given by hand: accuracy, Cohen's kappa, confusion, and where it is wrong."""
    from llmva.cli.console import Display, emit
    from llmva.judges import make_judge
    from llmva.judges.check import check_judge, lines

    found = check_judge(make_judge(judge), labels)
    if not quiet:
        display = Display()
        for line in lines(found):
            display.line(line)
    if json_:
        emit({"judge": judge, **found})
