"""`llmva evaluate`: metrics of a model on test prompts, with and without an edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from llmva.cli.attacking import Attacking
from llmva.cli.options import (
    Batches,
    Choice,
    EditDir,
    EngineName,
    JudgeName,
    Loading,
    ModelArg,
    Output,
    Seed,
    SettingOptions,
    Sources,
)
from llmva.errors import UsageError

if TYPE_CHECKING:
    from llmva.judges.base import Judge
    from llmva.models.chat_model import ChatModel
    from llmva.prompts.types import Prompt

Load = Callable[[], tuple[Any, Any]]  # loads model and tokenizer, once all else has been read


@dataclass(frozen=True)
class SetOptions:
    """How the sets of --data are measured."""

    TITLE: ClassVar = "Sets of --data"

    keep_duplicates: Annotated[
        bool,
        typer.Option("--keep-duplicates", help="With --data, keep test prompts that were seen in the fit of the edit."),
    ] = False
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="With --data, also write the table to this Markdown file."),
    ] = None


@dataclass(frozen=True)
class Benchmarks:
    """Which benchmarks are run, and how."""

    TITLE: ClassVar = "Benchmarks"

    utility: Annotated[bool, typer.Option("--utility", help="Also run benchmarks. Needs llmva[eval].")] = False
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Run these benchmarks, separated by commas.",
            show_default="the paper's, and mmlu",
        ),
    ] = None
    utility_limit: Annotated[
        int | None,
        typer.Option(
            "--utility-limit",
            min=1,
            help="Use at most this many documents per benchmark.",
            show_default="256, gsm8k 500",
        ),
    ] = None
    utility_chat: Annotated[
        bool, typer.Option("--utility-chat", help="Put the questions of benchmarks into the model's chat template.")
    ] = False
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", metavar="DIR", help="Find task files of your own for --tasks in this folder."),
    ] = None


def evaluate(
    model: ModelArg,
    *,
    edit: EditDir = None,
    sources: Sources,
    set_options: SetOptions,
    attacking: Attacking,
    choice: Choice,
    judge: JudgeName = "phrases",
    settings: Annotated[dict[str, Any], SettingOptions("max_new_tokens", title=None)],
    as_fitted: Annotated[
        dict[str, Any],
        SettingOptions("thinking", "thinking_tokens", "system", otherwise="as in the edit's run", title=None),
    ],
    benchmarks: Benchmarks,
    seed: Seed = 42,
    loading: Loading,
    batches: Batches,
    engine: EngineName = "transformers",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Write the result to this file, with the prompts that failed, for extend."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Also write an HTML page of the rates, without prompts, here."),
    ] = None,
    output: Output,
) -> None:
    """Measure ASR, ORR and F1 of MODEL, with and without an edit.

    The test prompts are those of --toxic and --benign; with --data those of public data sets, set by set; otherwise
    those of the edit's run. --utility adds scores of benchmarks. --attack also asks the prompts as attackers do.
    """
    from llmva.cli import inputs

    _check(sources, set_options, as_fitted, benchmarks)
    _check_folder(out, "--out")
    _check_folder(report, "--report")
    settings = settings | attacking.drawing
    hub = ["data of benchmarks"] if benchmarks.utility else []
    place = inputs.model_place(model)
    inputs.quiet_libraries(place, *sources.places, *hub)
    from llmva.attacks import parse_attacks
    from llmva.cli.terminal.console import Display, emit
    from llmva.evaluation.sampled import EvaluationSettings, check_sampling, check_search
    from llmva.files import write_json, write_text
    from llmva.judges import make_judge
    from llmva.models.engines.choose import check_engine
    from llmva.models.load import load_model
    from llmva.report import attacks_markdown, transfer_markdown, write_evaluation

    check_sampling(EvaluationSettings(**attacking.drawing), by_engine=engine != "transformers")
    check_search(EvaluationSettings(**attacking.drawing))
    # prompts, judge and edit are read before the model, so that a mistake in them costs no loading
    check_engine(engine)
    chosen_judge, attacks = make_judge(judge), parse_attacks(attacking.attack)
    about_edit: list[str] = []
    changes: list[str] = []
    loaded_edit = inputs.load_edit(edit, choice, about_edit.append)
    system, about_system, other_system = inputs.system_prompt(edit, as_fitted)
    about_edit += other_system
    with Display(output.quiet) as display:
        for sentence in (*about_edit, *about_system):
            display.note(sentence)

        def load() -> tuple[Any, Any]:
            display.note(f"loading {inputs.model_title(place)}")
            loaded = load_model(place, **asdict(loading), note=display.note)
            inputs.note_engine(engine, display)
            changes.extend(inputs.changes_since_fit(edit, *loaded))
            for sentence in changes:
                display.note(sentence)
            return loaded

        how: dict[str, Any] = {
            "edit": loaded_edit,
            "seed": seed,
            "batches": batches,
            "engine": engine,
            "progress": display,
        }
        how["system"], how["attacks"] = system, attacks
        if sources.data:
            metrics = _by_set(load, sources, set_options, edit, chosen_judge, how, settings)
        else:
            settings = settings | inputs.thinking_mode(edit, as_fitted)
            reading = inputs.test_prompts(place, edit, sources, seed)
            for sentence in (*reading.notes, *reading.warnings):
                display.note(sentence)
            metrics = _at_once(load, reading.prompts, benchmarks, chosen_judge, how, settings)
            if sources.toxic or sources.benign:
                overlap = inputs.overlap_with_fit(reading.prompts, edit)
                metrics |= {**overlap, "limits": [*metrics["limits"], *overlap.get("limits", [])]}
            metrics["limits"] = [*reading.warnings, *metrics["limits"]]
        names = [attack.name for attack in attacks] + ["suffix"] * ("suffix" in metrics)
        seen = inputs.fitted_under(edit, names)
        metrics["limits"] = [*about_edit, *metrics["limits"], *seen]
    record: dict[str, Any] = {"model": model, "edit": None if edit is None else str(edit), "judge": chosen_judge.name}
    record |= {"system": system, **metrics}
    if engine != "transformers":
        record["engine"] = engine
    if changes:
        record["limits"] = [*record.get("limits", []), *changes]
    if set_options.markdown is not None:
        under = f"\n{attacks_markdown(record)}" if attacks else ""
        write_text(set_options.markdown, f"{transfer_markdown(record)}{under}")
    failed = record.pop("failed")
    if out is not None:
        base = None if loaded_edit is None else loaded_edit.base.get("sha256")
        write_json(out, {**record, "base": base, "failed": failed})
    if report is not None:
        write_evaluation(report, record, inputs.typed_command())
    _show(record, output)
    if output.json:
        emit(record)


def _check(sources: Sources, set_options: SetOptions, as_fitted: Mapping[str, Any], benchmarks: Benchmarks) -> None:
    """Raises UsageError for options that do not go together."""
    given = {
        "--tasks": benchmarks.tasks,
        "--utility-limit": benchmarks.utility_limit,
        "--utility-chat": benchmarks.utility_chat,
        "--include-path": benchmarks.include_path,
    }
    first = next((name for name, value in given.items() if value), None)
    if first and not benchmarks.utility:
        raise UsageError(f"{first} applies to benchmarks: add --utility.")
    if sources.data and as_fitted.get("thinking", "off") != "off":
        raise UsageError("Sets of --data are measured with thinking off: leave out --thinking.")
    if sources.data and benchmarks.utility:
        raise UsageError("--utility measures the model once, --data set by set: run them as two commands.")
    if not sources.data and (sources.per_set or sources.data_dir or set_options != SetOptions()):
        raise UsageError("--data-dir, --per-set, --keep-duplicates and --markdown apply to sets of --data: add --data.")
    _check_folder(set_options.markdown, "--markdown")


def _check_folder(file: Path | None, option: str) -> None:
    """Raises UsageError if there is no folder for a file to be written, or a folder in its place."""
    if file is not None and not file.parent.is_dir():
        raise UsageError(f"There is no folder '{file.parent}': create it, or choose another for {option}.")
    if file is not None and file.is_dir():
        raise UsageError(f"'{file}' is a folder: name a file for {option}.")


def _by_set(
    load: Load,
    sources: Sources,
    set_options: SetOptions,
    edit: Path | None,
    judge: Judge,
    how: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Metrics of each set of --data, and of --toxic and --benign as further sets."""
    from llmva.cli import inputs
    from llmva.evaluation.sampled import EvaluationSettings
    from llmva.evaluation.transfer import transfer
    from llmva.prompts.testsets import PER_SET, read_test_sets

    test_sets = read_test_sets(
        inputs.show_licences(sources, how["progress"]),
        sources.toxic,
        sources.benign,
        fit=inputs.fit_prompts(edit),
        per_set=sources.per_set or PER_SET,
        seed=how["seed"],
        keep_duplicates=set_options.keep_duplicates,
    )
    for sentence in (note for one in test_sets for note in one.notes):
        how["progress"].note(sentence)
    counts = {one.name: len(one.prompts) for one in test_sets}
    model, tokenizer = load()
    with closing(_chat_model(model, tokenizer, how)) as chat:
        metrics = transfer(
            chat,
            test_sets,
            judge,
            settings=EvaluationSettings(seed=how["seed"], **settings),
            edit=how["edit"],
            attacks=how["attacks"],
            progress=how["progress"],
        )
    if edit is not None and test_sets[0].about["contamination"] is None:
        metrics["limits"].append(
            f"The prompts of the run are not beside '{edit}', so whether the fit has seen test prompts is not known."
        )
    return {"prompts": counts, "seed": how["seed"], **metrics}


def _at_once(
    load: Load,
    prompts: Sequence[Prompt],
    benchmarks: Benchmarks,
    judge: Judge,
    how: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Metrics of all prompts together, and of the benchmarks that the user wants."""
    from llmva.evaluation.evaluate import evaluate
    from llmva.evaluation.sampled import EvaluationSettings
    from llmva.utility import measure_tasks
    from llmva.utility.tasks import PAPER, load_tasks

    tasks = []
    if benchmarks.utility:
        how["progress"].note("finding benchmarks")
        names = PAPER if benchmarks.tasks is None else benchmarks.tasks.split(",")
        tasks = load_tasks(
            names, include_path=benchmarks.include_path, limit=benchmarks.utility_limit, seed=how["seed"]
        )
    sources = sorted({prompt.source for prompt in prompts})
    counts = {source: sum(prompt.source == source for prompt in prompts) for source in sources}
    model, tokenizer = load()
    with closing(_chat_model(model, tokenizer, how)) as chat:
        metrics = evaluate(
            chat,
            prompts,
            judge,
            EvaluationSettings(seed=how["seed"], **settings),
            edit=how["edit"],
            attacks=how["attacks"],
            progress=how["progress"],
        )
    if benchmarks.utility:
        metrics |= measure_tasks(
            model,
            tokenizer,
            tasks,
            edit=how["edit"],
            chat=benchmarks.utility_chat,
            seed=how["seed"],
            batch_tokens=how["batches"].of(model),
            progress=how["progress"],
        )
        if how["system"] is not None:
            metrics["limits"].append("Benchmarks were asked as their authors ask them, without the system prompt.")
    return {"prompts": counts, **metrics}


def _chat_model(model: Any, tokenizer: Any, how: Mapping[str, Any]) -> ChatModel:
    from llmva.models.chat_model import ChatModel
    from llmva.models.engines.choose import make_engine

    batch_tokens, engine = how["batches"].of(model), make_engine(how["engine"], model)
    return ChatModel.of(model, tokenizer, batch_tokens, engine, how["system"])


def _show(record: dict[str, Any], output: Output) -> None:
    from llmva.cli.terminal.console import show
    from llmva.report import attacks_table, before_after_table, tasks_table, transfer_table
    from llmva.report.run.searches import search_notes
    from llmva.report.run.truth import truth_note

    table = transfer_table(record) if "sets" in record else before_after_table(record)
    under_attack: list[Any] = [attacks_table(record)] if "attacks" in record else []
    under_attack += search_notes(record)
    note = truth_note(record)
    show(output, table, *under_attack, *([note] if note else []), *record.get("limits", []))
    if "utility_tasks" in record:
        show(output, tasks_table(record))
