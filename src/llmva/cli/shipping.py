"""`llmva front | export | verify | push`: which point of a run is wanted, and how it leaves this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from llmva.cli.options import (
    Base,
    Device,
    DeviceMap,
    Dtype,
    Iteration,
    Json,
    Point,
    Quantize,
    QuietFlag,
    Rank,
    RunDir,
    Seed,
    Strength,
    Trust,
    loading_options,
)


def add_to(app: typer.Typer) -> None:
    """Make the commands of this module known to the program."""
    for command in (front, export, verify, push):
        app.command()(command)


def front(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run")],
    seed: Seed = 42,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """All points that the run in DIR measured, as a table and as DIR/front.svg; export --point ships any of them."""
    from llmva.cli.ship import run_front

    run_front(directory, json=json_, quiet=quiet)


def export(
    directory: RunDir,
    kind: Annotated[str, typer.Option("--as", metavar="lora|merged|diff", help="adapter, full model, or a list")],
    out: Annotated[Optional[Path], typer.Option("--out", metavar="FOLDER", help="folder to write")] = None,  # noqa: UP045
    iteration: Iteration = None,
    strength: Strength = None,
    point: Point = None,
    rank: Rank = None,
    base: Base = None,
    seed: Seed = 42,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """Write the edit in DIR as a PEFT LoRA adapter or as a merged model; or list what it changes.

    A merged model is written shard by shard: memory for one tensor is enough.
    """
    from llmva.cli.ship import run_export

    run_export(
        directory,
        kind=kind,
        out=out,
        iteration=iteration,
        strength=strength,
        point=point,
        rank=rank,
        base=base,
        json=json_,
        quiet=quiet,
    )


def verify(
    base: Annotated[str, typer.Argument(metavar="BASE", help="hub id, local folder, or .gguf file")],
    artefacts: Annotated[
        list[Path], typer.Argument(metavar="ARTEFACT...", help="folders of runs, adapters or merged models")
    ],
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantize: Quantize = "none",
    trust_remote_code: Trust = False,
    seed: Seed = 42,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """Tell whether each ARTEFACT is the same edit of BASE: logits on probe prompts, and tensors of merged models.

    The first ARTEFACT that holds an edit is what the others are compared with. Exit code 1 if one differs.
    """
    from llmva.cli.ship import run_verify

    code = run_verify(
        base,
        artefacts,
        loading=loading_options(device, dtype, device_map, quantize, trust_remote_code),
        json=json_,
        quiet=quiet,
    )
    raise typer.Exit(code)


def push(
    directory: RunDir,
    repo: Annotated[str, typer.Option("--repo", metavar="USER/NAME", help="repository on the hub, made if missing")],
    kind: Annotated[str, typer.Option("--as", metavar="edit|lora|merged", help="what to upload")] = "edit",
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show all that would be uploaded, upload nothing")] = False,
    iteration: Iteration = None,
    strength: Strength = None,
    point: Point = None,
    rank: Rank = None,
    base: Base = None,
    seed: Seed = 42,
    json_: Json = False,
    quiet: QuietFlag = False,
) -> None:
    """Upload the edit in DIR to the Hugging Face hub, with a model card. Answers to prompts never leave the machine."""
    from llmva.cli.ship import run_push

    run_push(
        directory,
        repo=repo,
        kind=kind,
        private=private,
        dry_run=dry_run,
        iteration=iteration,
        strength=strength,
        point=point,
        rank=rank,
        base=base,
        json=json_,
        quiet=quiet,
    )
