"""`llmva extend`: go on from an earlier edit with new prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from llmva.cli.options import (
    Base,
    BatchTokens,
    Benign,
    Device,
    DeviceMap,
    Dtype,
    Json,
    JudgeName,
    Quantize,
    QuietFlag,
    Toxic,
    Trust,
    loading_options,
)
from llmva.errors import UsageError


def add_to(app: typer.Typer) -> None:
    """Make the command of this module known to the program."""
    app.command()(extend)


def extend(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="folder of the earlier run")],
    toxic: Toxic = None,
    benign: Benign = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045 (typer reads it at run time)
        typer.Option("--out", metavar="DIR2", help="folder of the new run [default: DIR-extended]"),
    ] = None,
    base: Base = None,
    skills: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--skills", metavar="FILE", help="JSONL of probes with known answers"),
    ] = None,
    judge: JudgeName = "phrases",
    iterations: Annotated[Optional[int], typer.Option("--iterations", help="most iterations")] = None,  # noqa: UP045
    prefer: Annotated[Optional[str], typer.Option("--prefer", help="safety, balance or usefulness")] = None,  # noqa: UP045
    max_asr: Annotated[Optional[float], typer.Option("--max-asr", help="most harmful prompts answered")] = None,  # noqa: UP045
    max_orr: Annotated[Optional[float], typer.Option("--max-orr", help="most benign prompts refused")] = None,  # noqa: UP045
    min_kept: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--min-kept", "--min-utility", help="least share of harmless next tokens kept"),
    ] = None,
    max_kl: Annotated[Optional[float], typer.Option("--max-kl", help="most divergence on harmless text")] = None,  # noqa: UP045
    restart: Annotated[bool, typer.Option("--restart", help="discard an earlier run in DIR2")] = False,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--seed", min=0, max=2**32 - 1, help="seed of every random draw [default: the earlier run's]"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantize: Quantize = "none",
    batch_tokens: BatchTokens = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """Go on from the edit in DIR with new attacks (--toxic) or new false refusals (--benign); DIR stays as it is.

    Settings not given are the earlier run's, as is the seed. The earlier run's prompts guard against going backwards.
    """
    from llmva.cli import inputs

    if not toxic and not benign:
        raise UsageError("There is nothing new: add --toxic or --benign with a file or a data set.")
    inputs.quiet_libraries(*(toxic or []), *(benign or []))
    from llmva.alignment import RunOptions
    from llmva.cli.commands import show_run
    from llmva.cli.console import Display
    from llmva.extension import extend as run
    from llmva.extension import prepare
    from llmva.judges import make_judge
    from llmva.models.load import load_model
    from llmva.prompts.load import load_prompts
    from llmva.settings import make_settings

    given = {
        "iterations": iterations,
        "prefer": prefer,
        "max_asr": max_asr,
        "max_orr": max_orr,
        "min_kept": min_kept,
        "max_kl": max_kl,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    make_settings(**settings)
    judge_ = make_judge(judge)
    prompts = load_prompts(toxic or [], benign or [])
    folder = Path(directory)
    out = out or folder.with_name(f"{folder.resolve().name}-extended")
    _, everything, record = prepare(folder, prompts, out, seed)
    title = str(record["base"]["model"])
    place = base or (str(inputs.demo_model()) if title == inputs.DEMO_NAME else title)
    with Display(quiet) as display:
        for warning in everything.warnings:
            display.note(warning)
        if judge_.name != record["judge"]:
            display.note(f"the earlier run was judged by {record['judge']}, this one is by {judge_.name}")
        display.note(f"loading {title}")
        loaded, tokenizer = load_model(place, **loading_options(device, dtype, device_map, quantize, trust_remote_code))
        result = run(
            loaded,
            tokenizer,
            folder,
            prompts,
            judge=judge_,
            seed=seed,
            out=out,
            restart=restart,
            skills=inputs.choose_probes(place, skills),
            options=RunOptions(name=title, command=inputs.typed_command()),
            batch_tokens=batch_tokens,
            progress=display,
            **settings,
        )
    show_run(result.record, out, display, json_, quiet)
