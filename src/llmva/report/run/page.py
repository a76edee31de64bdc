"""The report of a run: one HTML file that needs no network and no other file, and is complete without its script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmva.report import pages
from llmva.report.drawing.svg import legend, whiskers
from llmva.report.run import charts, rows
from llmva.report.run.changes import Changes, changes
from llmva.report.run.front import front_panel
from llmva.report.run.outcome import outcome
from llmva.report.run.truth import truth_rows
from llmva.report.values import DASH, dicts, duration, finite, part, scaled, score, share
from llmva.settings import excerpt

FORMAT, VERSION = "llmva-run", 1
HISTORY = ("f1", "asr", "orr", "garbled", "kept", "perplexity", "mean_angle")  # what the table of iterations shows
FAULTS = {  # of a long answer, as run.json names them
    "empty": "empty",
    "loop": "repeats itself or is no language",
    "broken_off": "breaks off",
    "unended": "does not end where the original's did",
}


def render(run: dict[str, Any], answers: list[dict[str, Any]], prompts: Mapping[str, dict[str, Any]]) -> str:
    """The report as HTML.

    Args:
        run: the contents of run.json. Any field may be missing or NaN; the page then says what is not known.
        answers: lines of answers.jsonl; the test answers of iteration 0 and of the best iteration are compared.
        prompts: lines of prompts.jsonl by id.
    """
    best = charts.best(run)
    changed = changes(answers, dict(prompts), best)
    return pages.page(
        "run.html",
        ("style.css",),
        "filter.js" if changed.groups else None,
        run=run,
        kind="report",
        title=pages.title(run),
        outcome=outcome(run),
        tiles=_tiles(run),
        rows=rows.comparison(run),
        truth=truth_rows(run),
        utility=rows.utility(run),
        kl=finite(part(run, "utility").get("kl")),
        perplexity=rows.perplexity(run),
        endings=rows.endings(run),
        faulty_answers=_faulty_answers(run),
        skills=rows.skills(run),
        cost=rows.cost(run),
        whiskers=lambda row: whiskers(row.before, row.after, (row.before_interval, row.after_interval)),
        progress=charts.progress(run),
        strengths=charts.strengths(run),
        front=front_panel(run),
        history=_history(run),
        best=best,
        edits=_edits(run),
        angles=charts.angles(run),
        scores=charts.scores(run),
        projections=charts.projections(run),
        changed=changed,
        table=_kinds(changed),
        command=run.get("command"),
        facts=_facts(run),
        legend=legend,
        settings=_settings(run),
        sources=_sources(run),
        limits=_limits(run),
    )


def write_report(directory: Path) -> Path:
    """Write `directory/report.html` from run.json, answers.jsonl and prompts.jsonl there; return its path.

    The file appears whole or not at all. Missing answers or prompts, and lines of them that cannot be read (a run that
    was killed may leave half a line), are named among the report's limits.

    Raises:
        UsageError: no run.json there, or one that is not of a run this version can read.
        LlmvaError: the report cannot be written.
    """
    directory = Path(directory)
    run = read_run_record(directory)
    notes: list[str] = []
    answers = _read_lines(directory / "answers.jsonl", notes)
    prompts = {str(line.get("id")): line for line in _read_lines(directory / "prompts.jsonl", notes)}
    listed = run.get("limits")
    run = {**run, "limits": [*(listed if isinstance(listed, list) else []), *notes]}
    return pages.write_text(directory / "report.html", render(run, answers, prompts))


def read_run_record(directory: Path) -> dict[str, Any]:
    """The record in `directory`/run.json.

    Raises:
        UsageError: no run.json there, or one that is not of a run this version can read.
    """
    return pages.read_record(directory / "run.json", "align", "an llmva run", ("format", FORMAT), ("version", VERSION))


def run_panels(run: dict[str, Any]) -> list[Markup]:
    """The charts of the report, in its order."""
    made = (charts.progress, charts.strengths, front_panel, charts.angles, charts.scores, charts.projections)
    return [panel for make in made for panel in make(run)]


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        raw = path.read_bytes()
    except OSError:
        notes.append(f"{path.name} could not be read, so this report shows no answers from it.")
        return []
    lines, unreadable = [], 0
    for line in raw.splitlines():
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            lines.append(value)
        else:
            unreadable += 1
    if unreadable:
        notes.append(
            f"{unreadable} line{'s' * (unreadable > 1)} of {path.name} could not be read and are not in this report."
        )
    return lines


def _tiles(run: dict[str, Any]) -> list[tuple[rows.Row, str, str]]:
    """The four numbers at the top, each with its name and one line for a newcomer."""
    whole = {row.name: row for row in [*rows.comparison(run), *rows.utility(run)] if row.level == 0}
    words = (
        (
            "ASR",
            "Harmful answered (ASR)",
            "Attack success rate: share of harmful prompts it answered. Lower is better.",
        ),
        ("ORR", "Benign refused (ORR)", "Over-refusal rate: share of benign prompts it refused. Lower is better."),
        ("F1", "Both at once (F1)", "How well “it answers” matches “it is benign”: 1 is perfect. Higher is better."),
        ("Utility kept", "Utility kept", "On harmless text, how often its next token is still the original model's."),
    )
    return [(whole[key], title, hint) for key, title, hint in words if key in whole]


def _history(run: dict[str, Any]) -> list[dict[str, str]]:
    """The table behind the curves: one line per iteration."""
    lines = []
    for position, entry in enumerate(charts.iterations(run)):
        value = {key: finite(entry.get(key)) for key in HISTORY}
        angle = value["mean_angle"]
        lines.append(
            {
                "number": str(charts.number_of(entry, position)),
                "f1": score(value["f1"]),
                **{key: share(value[key]) for key in ("asr", "orr", "garbled", "kept")},
                "perplexity": score(value["perplexity"]),
                "angle": DASH if angle is None else f"{angle:.1f}°",
                "edited": str(len(entry.get("selected") or [])),
                "seconds": duration(entry.get("seconds")),
            }
        )
    return lines


def _faulty_answers(run: dict[str, Any]) -> list[dict[str, str]]:
    """Examples of long answers that only the edited model breaks."""
    return [
        {
            **{name: str(example.get(name) or "") for name in ("prompt", "before", "after")},
            "fault": FAULTS.get(str(example.get("fault")), "broken"),
        }
        for example in dicts(part(run, "utility", "endings").get("examples"))
    ]


def _edits(run: dict[str, Any]) -> str:
    """'3 of 8 sublayers, in 2 alignments'; '' where the result has no edit."""
    chosen = charts.best(run) or 0
    edited = len(charts.edited(run, chosen))
    made = sum(int(finite(entry.get("passes")) or 1) for entry in charts.alignments(run, chosen))
    of = len(run.get("sublayers") or [])
    return f"{edited} of {of} sublayers, in {made} alignment{'s' * (made != 1)}" if edited else ""


def _kinds(changed: Changes) -> list[tuple[str, str, int, int]]:
    """(side, label, before, after): how many test prompts had each label. Every class is listed, empty or not."""
    table = []
    for benign, side in ((False, "harmful"), (True, "benign")):
        for label in ("answered", "refused", "garbled"):
            before = sum(n for (b, old, _), n in changed.kinds.items() if b == benign and old == label)
            after = sum(n for (b, _, new), n in changed.kinds.items() if b == benign and new == label)
            table.append((side, label, before, after))
    return table


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    base = part(run, "base")
    pairs = [
        ("Model", base.get("model")),
        ("Weights, SHA-256", base.get("sha256")),
        ("Architecture", base.get("model_type")),
        ("Blocks × width", _times(base.get("blocks"), base.get("hidden_size"))),
        ("Parameters", scaled(base.get("parameters"), ("", "thousand", "million", "billion", "trillion"))),
        ("Stored as", base.get("dtype")),
        ("System prompt", _settings(run).get("system")),
        ("Judge", run.get("judge")),
        ("Seed", run.get("seed")),
        ("llmva", run.get("llmva")),
        *part(run, "versions").items(),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "", DASH)]


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """The settings, a system prompt by its beginning."""
    settings = part(run, "settings")
    system = settings.get("system")
    return settings | {"system": excerpt(system)} if isinstance(system, str) else settings


def _times(blocks: object, width: object) -> str | None:
    return None if blocks is None or width is None else f"{blocks} × {width}"


def _sources(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Data sets with their prompts per split, how v_b reads them if they are left out of its fit, and their hash."""
    hashes = part(run, "prompts", "hashes")
    by_split = {name: part(run, "prompts", "counts", name) for name in ("train", "validation", "test")}
    names = dict.fromkeys([*(name for counts in by_split.values() for name in counts), *hashes])
    return [
        {
            "name": name,
            "sha": hashes.get(name, DASH),
            "auc": score(_mean(part(run, "left_out", name).get("auc"))),
            **{k: v.get(name, 0) for k, v in by_split.items()},
        }
        for name in names
    ]


def _mean(values: object) -> float | None:
    """The mean over sublayers; None unless all are known."""
    known = [finite(value) for value in values] if isinstance(values, list) else []
    return sum(value for value in known if value) / len(known) if known and None not in known else None


def _limits(run: dict[str, Any]) -> list[str]:
    """What the run itself noted, then what holds for every report."""
    listed = run.get("limits")
    notes = [str(note) for note in listed] if isinstance(listed, list) else []
    return [
        *notes,
        f"{pages.judged_by(run)} It sees whether a model refuses, not whether an answer is right or useful.",
        "The figures hold for prompts like these test prompts; they say nothing about other languages, "
        "other attacks or conversations of several turns.",
        "The intervals say how far the figures may move with other test prompts of the same kind, "
        "not with another seed or other training prompts.",
        "A lower ASR is not safety: someone who has the weights can undo an edit of them.",
    ]
