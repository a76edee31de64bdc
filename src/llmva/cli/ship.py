"""`llmva front | export | verify | push`: choose a point of a run, and ship its edit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmva.cli.options import Base, Choice, Loading, Output, Rank, RunDir, TrustCode
from llmva.cli.terminal.interrupt import interruptible, of_export, of_upload
from llmva.errors import LlmvaError, UsageError

if TYPE_CHECKING:
    from llmva.export.plan import Plan

KINDS = ("lora", "gguf", "merged", "diff")
ADAPTERS = ("lora", "gguf")
MAX_SENTENCES = 5  # about one artefact
PUSHED = ("edit", "lora", "merged")
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the base model.")]
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts beyond 1


def front(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")],
    *,
    picks: Annotated[
        bool, typer.Option("--pick", help="Ask for a point, and try it in chat, export it or push it.")
    ] = False,
    output: Output,
) -> None:
    """Show every point that a run measured.

    As a table, and as a picture in DIR/front.svg. llmva export --point ships any of them.
    """
    if picks and (output.json or output.quiet or not sys.stdin.isatty()):
        raise UsageError("--pick asks questions on a terminal: give --point K to llmva chat, export or push instead.")
    from llmva.cli.terminal.console import Display, emit, show
    from llmva.report import front_table, write_front
    from llmva.runs.record import read_run

    record = read_run(directory)
    picture = write_front(directory, record)
    if picture is None:
        raise UsageError(
            f"'{directory}' has no points: finish it with the same llmva align, or add --restart if it is an older run."
        )
    show(output, front_table(record))
    ships = f"llmva export {quote(str(directory))} --as lora --point K --out FOLDER ships a point."
    Display(output.quiet).note(f"Wrote {picture}. {ships}")
    if output.json:
        emit({"front": record["front"], "picture": str(picture)})
    if picks:
        _pick(directory, record)


def _pick(directory: Path, record: Mapping[str, Any]) -> None:
    """Ask what to do with which point, and do it as the commands of these names do."""
    from llmva.cli.chat import chat
    from llmva.cli.terminal.ask import ask, pick

    untouched = "This point is the untouched model, of which there is nothing to ship: pick another."

    def try_it(point: int) -> None:
        chat(
            str(record["base"]["model"]),
            edit=directory,
            compare=True,
            choice=Choice(point=point),
            as_fitted={},
            loading=Loading(),
            output=Output(),
        )

    def export_it(point: int) -> None:
        kind = ask("Write a lora adapter or a merged model (lora): ") or "lora"
        name = f"{directory}-point-{point}-{kind}"
        out = Path(ask(f"Folder ({name}): ") or name)
        export(directory, kind=kind, out=out, choice=Choice(point=point), output=Output())

    def push_it(point: int) -> None:
        repo = ask("Repository (USER/NAME): ")
        private = ask("For everyone, or for you alone (alone): ") != "everyone"
        push(directory, repo=repo, private=private, choice=Choice(point=point), output=Output())

    points = {row["point"]: "" if row["iteration"] and row["strength"] else untouched for row in record["front"]}
    pick(points, {"chat": try_it, "export": export_it, "push": push_it})


def export(
    directory: RunDir,
    *,
    kind: Annotated[
        str,
        typer.Option("--as", metavar="|".join(KINDS), help="Write an adapter or a merged model, or list the changes."),
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Write to this folder.")] = None,
    choice: Choice,
    rank: Rank = None,
    base: Base = None,
    trust_remote_code: TrustCode = False,
    output: Output,
) -> None:
    """Write the edit in DIR as an adapter or a merged model.

    An adapter is one of PEFT (lora), or of llama.cpp and Ollama (gguf). --as diff lists what the edit changes, and
    writes nothing. A merged model is written shard by shard; memory for one tensor is enough.
    """
    _check(kind, KINDS, rank)
    if kind != "diff" and out is None:
        raise UsageError(f"--as {kind} writes a folder: name it with --out.")
    if kind == "diff" and out is not None:
        raise UsageError("--as diff writes nothing: leave --out out.")
    with interruptible() as kept:
        kept.say = of_export(out)
        plan = _plan(directory, choice, base, trust_remote_code)
        from llmva.cli.terminal.console import Display, emit, show
        from llmva.report.values import size

        record: dict[str, Any] = {
            "as": kind,
            "base": plan.title,
            "iteration": plan.iteration,
            "strength": plan.strength,
            "notes": list(plan.notes),
        }
        with Display(output.quiet) as display:
            for sentence in plan.notes:
                display.note(sentence)
            if out is None:
                from llmva.export.diff import diff

                record["tensors"] = diff(plan)
            elif kind == "lora":
                from llmva.export.adapters.peft import export_lora

                record |= export_lora(plan, out, rank=rank, progress=display)
            elif kind == "gguf":
                from llmva.export.adapters.gguf_writing import export_gguf

                record |= export_gguf(plan, out, rank=rank, progress=display)
            else:
                from llmva.export.merged import export_merged

                record |= export_merged(plan, out, progress=display)
        if out is None:
            show(output, _table(record["tensors"]))
        else:
            for sentence in (*record.get("warnings", []), f"Wrote {out}: {size(record['bytes'])}."):
                display.note(sentence)
        if output.json:
            emit(record)


def verify(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Hub id, local folder, or .gguf file.")],
    artefacts: Annotated[
        list[Path], typer.Argument(metavar="ARTEFACT...", help="Folders of runs, adapters or merged models.")
    ],
    *,
    server: Annotated[
        str | None, typer.Option("--server", metavar="URL", help="Ask this OpenAI-compatible server for answers.")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option("--served-name", metavar="NAME", help="Ask for this model of several on the server.")
    ] = None,
    loading: Loading,
    output: Output,
) -> None:
    """Check that each ARTEFACT or a server has the edit of BASE.

    By logits on probe prompts, and by the tensors of merged models. The first ARTEFACT that holds an edit is the
    reference for the others. Exit code 1 if one differs.

    With --server: do its answers begin as those of BASE with the edit in ARTEFACT, as those of BASE alone, or as
    neither? A key goes into LLMVA_SERVER_KEY. Exit code 1 unless it serves the edit.
    """
    if served_name is not None and server is None:
        raise UsageError("--served-name is of a server: give its URL with --server.")
    if server is not None:
        _verify_server(base, artefacts, server, served_name, loading, output)
        return
    from llmva.cli import inputs

    place = inputs.model_place(base)
    inputs.quiet_libraries(place)
    from llmva.cli.terminal.console import Display, emit, show
    from llmva.export.verify import verify as run

    with Display(output.quiet) as display:
        record = run(place, artefacts, loading=asdict(loading), progress=display)
    for row in record["artefacts"]:
        show(
            output,
            f"{row['path']} ({row['kind']}): {'Same edit' if row['same'] else 'NOT the same edit'} (largest logit "
            f"difference {row['max']:.2g}; the edit itself moves logits by {row['effect']:.2g}).",
            *(f"  {sentence}" for sentence in [*row["problems"][:MAX_SENTENCES], *row["notes"]]),
        )
        if len(row["problems"]) > MAX_SENTENCES:
            show(output, f"  And {len(row['problems']) - MAX_SENTENCES} more: --json has them all.")
    if output.json:
        emit(record)
    raise typer.Exit(0 if record["same"] else 1)


def _verify_server(
    base: str, artefacts: Sequence[Path], url: str, name: str | None, loading: Loading, output: Output
) -> None:
    """Show the verdict on a server with an answer that shows it. Raises LlmvaError unless it serves the edit."""
    from llmva.cli import inputs

    if len(artefacts) > 1:
        raise UsageError("--server compares with one edit: give one ARTEFACT.")
    place = inputs.model_place(base)
    inputs.quiet_libraries(place)
    from llmva.cli.terminal.console import Display, emit, show
    from llmva.export.served.asking import Server
    from llmva.export.served.verdict import verify_server

    server = Server(url)
    with Display(output.quiet) as display:
        record = verify_server(place, artefacts[0], server, name=name, loading=asdict(loading), progress=display)
    row = next((row for row in record["answers"] if row["agrees"] == record["verdict"]), record["answers"][0])
    show(
        output,
        f"{record['server']} as '{record['served_name']}': {record['verdict']}. Of {record['probes']} answers "
        f"{record['edited']} begin as the edited model's, {record['base']} as the base's, {record['neither']} as "
        f"neither's; {record['unanswered']} did not come.",
        "For example:",
        *(f"  {title:<7} {row[title]!r}" for title in ("prompt", "base", "edited", "server")),
    )
    if output.json:
        emit(record)
    if record["verdict"] != "edited":
        raise LlmvaError(record["sentence"])


def push(
    directory: RunDir,
    *,
    repo: Annotated[
        str, typer.Option("--repo", metavar="USER/NAME", help="Upload to this repository; it is created if missing.")
    ],
    kind: Annotated[
        str, typer.Option("--as", metavar="|".join(PUSHED), help="Upload the edit file, an adapter or a merged model.")
    ] = "edit",
    private: Annotated[
        bool, typer.Option("--private/--public", help="Upload for yourself alone, or for everyone.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show everything that would be uploaded, and upload nothing.")
    ] = False,
    choice: Choice,
    rank: Rank = None,
    base: Base = None,
    trust_remote_code: TrustCode = False,
    output: Output,
) -> None:
    """Upload the edit in DIR to the Hugging Face hub.

    A model card goes with it. Only the model's own files are uploaded: no answers, no prompts, no other file of a
    folder.
    """
    _check(kind, PUSHED, rank)
    with interruptible() as kept:
        plan = _plan(directory, choice, base, trust_remote_code)
        from llmva.cli.terminal.console import Display, emit, show
        from llmva.export.push import push as run
        from llmva.report.values import counted, size

        kept.say = of_upload(repo, dry_run)
        with Display(output.quiet) as display:
            for sentence in plan.notes:
                display.note(sentence)
            record = run(plan, repo, kind=kind, private=private, dry_run=dry_run, rank=rank, progress=display)
        if dry_run:
            files = [f"  {file['path']}  {size(file['bytes'])}  {file['why']}" for file in record["files"]]
            show(output, f"Would upload to {repo} ({'private' if private else 'public'}):", *files)
            show(output, *record["warnings"], "", record["card"])
        else:
            for warning in record["warnings"]:
                display.note(warning)
            display.note(f"Pushed {counted(len(record['files']), 'file')} to {repo}.")
        if output.json:
            emit(record)


def _check(kind: str, kinds: Sequence[str], rank: int | None) -> None:
    """Raises UsageError for a form that is not offered, or a rank that does not fit it."""
    if kind not in kinds:
        raise UsageError(f"--as {kind} is unknown here: use {', '.join(kinds)}.")
    if rank is not None and kind not in ADAPTERS:
        raise UsageError(f"--rank applies only to adapters: leave it out with --as {kind}.")
    if rank is not None and rank not in RANKS:
        raise UsageError(f"--rank {rank} is not a rank that servers accept: use {', '.join(map(str, RANKS))}.")


def _plan(directory: Path, choice: Choice, base: str | None, trust_remote_code: bool) -> Plan:
    from llmva.cli import inputs
    from llmva.export.plan import make_plan

    if not directory.exists():
        raise UsageError(f"There is no '{directory}': give the folder that llmva align wrote.")
    inputs.check_strength(choice.strength)
    plan = make_plan(
        directory,
        **asdict(choice),
        base=None if base is None else inputs.model_place(base),
        known={inputs.DEMO_NAME: inputs.demo_model()},
        trust_remote_code=trust_remote_code,
    )
    inputs.quiet_libraries(plan.base)
    return plan


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Tensors with the size of their change, largest first."""
    from llmva.report.fitting import Fitting

    columns = ("tensor", "shape", "dtype", "change", "of its norm", "rank")
    narrow = ("tensor", "change", "of its norm")
    return Fitting((lambda: _columns(rows, columns), lambda: _columns(rows, narrow)), ("", "shape, dtype and rank"))


def _columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "tensor" else "right", no_wrap=name != "tensor")
    for row in sorted(rows, key=lambda r: -float(r["norm"])):
        share = float(row["norm"]) / float(row["base_norm"]) if row["base_norm"] else 0.0
        cells = {
            "tensor": row["tensor"],
            "shape": "x".join(str(n) for n in row["shape"]),
            "dtype": row["dtype"],
            "change": f"{row['norm']:.4g}",
            "of its norm": f"{share:.2%}",
            "rank": str(row["rank"]),
        }
        table.add_row(*(Text(str(cells[name])) for name in columns))
    return table
