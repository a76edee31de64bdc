"""What the commands do, apart from parsing their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmva.cli import inputs
from llmva.cli.console import Display, emit
from llmva.errors import UsageError


def run_align(
    model: str,
    *,
    out: Path | None,
    seed: int,
    restart: bool,
    json: bool,
    quiet: bool,
    name: str | None = None,
    toxic: Sequence[str] = (),
    benign: Sequence[str] = (),
    data: Sequence[str] = (),
    per_set: int | None = None,
    skills: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    judge: str = "phrases",
    loading: Mapping[str, Any] | None = None,
    batch_tokens: int | None = None,
) -> None:
    """Prompts and judge are read before the model, so that a mistake in them costs no loading."""
    inputs.quiet_libraries(model, *toxic, *benign, *inputs.places(data))
    from llmva.alignment import RunOptions, align
    from llmva.cli.data import parse_and_tell
    from llmva.judges import make_judge
    from llmva.models.load import load_model
    from llmva.settings import make_settings

    out = out or inputs.default_out(model)
    make_settings(**(settings or {}))
    judge_ = make_judge(judge)
    parse_and_tell(data, Display(quiet))
    prompts = inputs.choose_prompts(model, toxic, benign, seed, data, per_set)
    probes = inputs.choose_probes(model, skills)
    with Display(quiet) as display:
        for warning in prompts.warnings:
            display.note(warning)
        display.note(f"loading {name or model}")
        loaded, tokenizer = load_model(model, **(loading or {}))
        result = align(
            loaded,
            tokenizer,
            prompts,
            judge=judge_,
            seed=seed,
            out=out,
            restart=restart,
            skills=probes,
            batch_tokens=batch_tokens,
            progress=display,
            options=RunOptions(name=name or model, command=inputs.typed_command()),
            **(settings or {}),
        )
    show_run(result.record, out, display, json, quiet)


def show_run(record: Mapping[str, Any], out: Path, display: Display, json: bool, quiet: bool) -> None:
    """Draw the report of a finished run, and print its table, its outcome and its limits."""
    from llmva.report import before_after_table, write_report
    from llmva.report.run.outcome import outcome

    report = write_report(out)
    if not quiet:
        display.console.print(before_after_table(dict(record)))
        display.line(outcome(dict(record)).sentence)
        for limit in record["limits"]:
            display.line(limit)
        display.line(f"Wrote {out / 'edit.safetensors'} and {report}.")
    if json:
        emit(record)


def run_evaluate(
    model: str,
    *,
    edit: Path | None,
    toxic: Sequence[str],
    benign: Sequence[str],
    data: Sequence[str],
    sets: Mapping[str, Any],
    iteration: int | None,
    strength: float | None,
    point: int | None = None,
    judge: str,
    max_new_tokens: int,
    thinking: str | None,
    thinking_tokens: int | None,
    seed: int,
    loading: Mapping[str, Any],
    batch_tokens: int | None,
    utility: Mapping[str, Any] | None = None,
    json: bool,
    quiet: bool,
) -> None:
    """With `data` on sets one by one, by `sets` (options of `run_transfer`); else on one list of prompts."""
    if data and thinking not in (None, "off"):
        raise UsageError("Sets of --data are measured with thinking off: leave out --thinking.")
    if data and utility is not None:
        raise UsageError("--utility measures the model once and --data set by set: give them to two commands.")
    if data:
        from llmva.cli.data import run_transfer

        run_transfer(
            model,
            edit=edit,
            data=data,
            toxic=toxic,
            benign=benign,
            **sets,
            iteration=iteration,
            strength=strength,
            point=point,
            judge=judge,
            max_new_tokens=max_new_tokens,
            seed=seed,
            loading=loading,
            batch_tokens=batch_tokens,
            json=json,
            quiet=quiet,
        )
        return
    if any(sets.values()):
        raise UsageError("--per-set, --keep-duplicates and --markdown are about sets of --data: add --data.")
    of_the_hub = [] if utility is None else ["data of benchmarks"]
    inputs.quiet_libraries(model, *toxic, *benign, *of_the_hub)
    from llmva.evaluation.evaluate import EvaluationSettings, evaluate
    from llmva.judges import make_judge
    from llmva.models.chat_model import ChatModel
    from llmva.models.load import load_model
    from llmva.report import before_after_table, tasks_table
    from llmva.utility import measure_tasks

    judge_ = make_judge(judge)
    loaded_edit = inputs.load_edit(edit, iteration, strength, point)
    thoughts = inputs.thinking_mode(edit, thinking, thinking_tokens)
    prompts = inputs.test_prompts(model, edit, toxic, benign, seed)
    with Display(quiet) as display:
        benchmarks = inputs.choose_tasks(utility, seed, display)
        display.note(f"loading {model}")
        loaded, tokenizer = load_model(model, **loading)
        found = evaluate(
            ChatModel.of(loaded, tokenizer, batch_tokens),
            prompts,
            judge_,
            EvaluationSettings(seed=seed, max_new_tokens=max_new_tokens, **thoughts),
            edit=loaded_edit,
            progress=display,
        )
        if utility is not None:
            found |= measure_tasks(
                loaded,
                tokenizer,
                benchmarks,
                edit=loaded_edit,
                chat=utility["chat"],
                seed=seed,
                batch_tokens=batch_tokens,
                progress=display,
            )
    sources = {prompt.source for prompt in prompts}
    counts = {source: sum(prompt.source == source for prompt in prompts) for source in sorted(sources)}
    found = {
        "model": model,
        "edit": None if edit is None else str(edit),
        "prompts": counts,
        "judge": judge_.name,
        **found,
        **inputs.seen_in_fit(prompts, edit, named=bool(toxic or benign)),
    }
    if not quiet:
        display.console.print(before_after_table(found))
        for limit in found.get("limits", []):
            display.line(limit)
        if utility is not None:
            display.console.print(tasks_table(found))
    if json:
        emit(found)


def run_inspect(directory: Path, *, json: bool, quiet: bool) -> None:
    from llmva.edit import Edit
    from llmva.edit_file import edit_file
    from llmva.report import before_after_table
    from llmva.runs.record import read_run

    if not directory.exists():
        raise UsageError(f"There is no '{directory}': give the folder that llmva align wrote.")
    edit = Edit.load(directory)
    ranks = {name: f.V.shape[1] for name, f in edit.factors.items()}
    found: dict[str, Any] = {
        "edit": str(edit_file(directory)),
        "base": {k: v for k, v in edit.base.items() if k != "hashes"},
        "best_iteration": edit.best,
        "iterations": edit.iterations,
        "sublayers": ranks,
        "bytes": edit_file(directory).stat().st_size,
    }
    record = read_run(directory) if (directory / "run.json").is_file() else None
    if record is not None:
        keys = ("settings", "seed", "prompts", "judge", "iterations", "stopped", "test", "utility", "cost", "limits")
        found["run"] = {key: record.get(key) for key in keys}
    if not quiet:
        _show(found, record)
        if record is not None:
            Display().console.print(before_after_table(record))
    if json:
        emit(found)


def _show(found: Mapping[str, Any], record: Mapping[str, Any] | None) -> None:
    display = Display()
    base = found["base"]
    best = found["best_iteration"]
    lines = [
        f"edit of {base.get('model')} "
        f"({base.get('model_type')}, {base.get('blocks')} blocks, d {base.get('hidden_size')})",
        f"base sha256 {base.get('sha256')}",
        f"{found['iterations']} iterations, {'unfinished' if best is None else f'iteration {best} chosen'}, "
        f"{len(found['sublayers'])} sublayers edited, {found['bytes'] / 1e6:.1f} MB",
    ]
    if record is not None:
        lines.append(f"stopped: {record['stopped'] or 'not yet'}")
        for entry in record["iterations"]:
            kept = "-" if entry.get("kept") is None else f"{entry['kept']:.3f}"
            angle = "-" if entry.get("mean_angle") is None else f"{entry['mean_angle']:.0f}°"
            figures = " ".join(f"{k.upper()} {entry[k]:.3f}" for k in ("f1", "asr", "orr") if entry.get(k) is not None)
            lines.append(f"  iteration {entry['iteration']}: {figures} kept {kept} angle {angle}")
    for line in lines:
        display.line(line)
