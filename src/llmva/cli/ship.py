"""What `llmva front`, `export`, `verify` and `push` do, apart from parsing their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmva.cli import inputs
from llmva.cli.console import Display, emit
from llmva.errors import UsageError

if TYPE_CHECKING:
    from llmva.export.plan import Plan

KINDS = ("lora", "merged", "diff")
SHIPPED = ("edit", "lora", "merged")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM knows beyond 1


def plan_of(
    directory: Path, iteration: int | None, strength: float | None, base: str | None, point: int | None = None
) -> Plan:
    from llmva.export.plan import make_plan

    if not directory.exists():
        raise UsageError(f"There is no '{directory}': give the folder that llmva align wrote.")
    plan = make_plan(
        directory,
        iteration=iteration,
        strength=inputs.check_strength(strength),
        point=point,
        base=base,
        known={inputs.DEMO_NAME: inputs.demo_model()},
    )
    inputs.quiet_libraries(plan.base)
    return plan


def run_front(directory: Path, *, json: bool, quiet: bool) -> None:
    from llmva.report import front_table, write_front
    from llmva.runs.record import read_run

    record = read_run(directory)
    if not record.get("front"):
        raise UsageError(f"'{directory}' has no points: finish it by the same llmva align, or --restart an older run.")
    picture = write_front(directory, record)
    if not quiet:
        display = Display()
        display.console.print(front_table(record))
        display.line(f"Wrote {picture}. llmva export {directory} --as lora --point K --out FOLDER ships a point.")
    if json:
        emit({"front": record["front"], "picture": str(picture)})


def run_export(
    directory: Path,
    *,
    kind: str,
    out: Path | None,
    iteration: int | None,
    strength: float | None,
    point: int | None = None,
    rank: int | None,
    base: str | None,
    json: bool,
    quiet: bool,
) -> None:
    if kind not in KINDS:
        raise UsageError(f"--as {kind} is unknown: use {', '.join(KINDS)}.")
    if rank is not None and kind != "lora":
        raise UsageError(f"--rank is of adapters alone: leave it out with --as {kind}.")
    if rank is not None and rank not in RANKS:
        raise UsageError(f"--rank {rank} is none that servers take: use {', '.join(map(str, RANKS))}.")
    if kind != "diff" and out is None:
        raise UsageError(f"--as {kind} writes a folder: say which with --out.")
    if kind == "diff" and out is not None:
        raise UsageError("--as diff writes nothing: leave --out out.")
    plan = plan_of(directory, iteration, strength, base, point)
    found: dict[str, Any] = {
        "as": kind,
        "base": plan.title,
        "iteration": plan.iteration,
        "strength": plan.strength,
    }
    with Display(quiet) as display:
        if kind == "diff":
            from llmva.export.diff import diff

            found["tensors"] = diff(plan)
        else:
            assert out is not None
            found |= _write(plan, kind, out, rank, display)
    if not quiet:
        if kind == "diff":
            display.console.print(_table(found["tensors"]))
        else:
            for warning in found.get("warnings", []):
                display.line(warning)
            display.line(f"Wrote {out}: {found['bytes'] / 1e6:.1f} MB.")
    if json:
        emit(found)


def _write(plan: Plan, kind: str, out: Path, rank: int | None, display: Display) -> dict[str, Any]:
    if kind == "lora":
        from llmva.export.lora import export_lora

        return export_lora(plan, out, rank=rank, progress=display)
    from llmva.export.merged import export_merged

    return export_merged(plan, out, progress=display)


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Tensors with the size of their change, largest first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tensor", "shape", "dtype", "change", "of its norm", "rank"):
        table.add_column(name, justify="left" if name == "tensor" else "right", no_wrap=name != "tensor")
    for row in sorted(rows, key=lambda r: -float(r["norm"])):
        share = float(row["norm"]) / float(row["base_norm"]) if row["base_norm"] else 0.0
        shape = "x".join(str(n) for n in row["shape"])
        cells = (row["tensor"], shape, row["dtype"], f"{row['norm']:.4g}", f"{share:.2%}", str(row["rank"]))
        table.add_row(*(Text(str(cell)) for cell in cells))
    return table


def run_push(
    directory: Path,
    *,
    repo: str,
    kind: str,
    private: bool,
    dry_run: bool,
    iteration: int | None,
    strength: float | None,
    point: int | None = None,
    rank: int | None,
    base: str | None,
    json: bool,
    quiet: bool,
) -> None:
    if kind not in SHIPPED:
        raise UsageError(f"--as {kind} cannot be pushed: use {', '.join(SHIPPED)}.")
    if rank is not None and (kind != "lora" or rank not in RANKS):
        raise UsageError(f"--rank is of adapters alone and one of {', '.join(map(str, RANKS))}: mend or leave it out.")
    plan = plan_of(directory, iteration, strength, base, point)
    from llmva.export.push import push

    with Display(quiet) as display:
        found = push(plan, repo, kind=kind, private=private, dry_run=dry_run, rank=rank, progress=display)
    if not quiet:
        if dry_run:
            display.line(f"Would upload to {repo} ({'private' if private else 'public'}):")
            for file in found["files"]:
                display.line(f"  {file['path']}  {file['bytes'] / 1e6:.2f} MB")
            display.line("")
            display.line(found["card"])
        else:
            display.line(f"Pushed {len(found['files'])} files to {repo}.")
    if json:
        emit(found)


def run_verify(
    base: str,
    artefacts: Sequence[Path],
    *,
    loading: Mapping[str, Any],
    json: bool,
    quiet: bool,
) -> int:
    """Exit code 0 where all artefacts are the same edit of that base, 1 where not."""
    inputs.quiet_libraries(base)
    from llmva.export.verify import verify

    with Display(quiet) as display:
        found = verify(base, artefacts, loading=loading, progress=display)
    if not quiet:
        for row in found["artefacts"]:
            display.line(
                f"{row['path']} ({row['kind']}): {'Same edit' if row['same'] else 'NOT the same edit'} (largest logit "
                f"difference {row['max']:.2g}; the edit itself moves logits by {row['effect']:.2g})."
            )
            for problem in row["problems"]:
                display.line(f"  {problem}")
    if json:
        emit(found)
    return 0 if found["same"] else 1
