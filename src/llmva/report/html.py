"""The report: one HTML file that needs no network, no script and no other file, and says honestly what came of a run.

Model answers are hostile text. Three walls: Jinja escapes every value, a content security policy forbids scripts and
all requests, and control characters (and halves of surrogate pairs) are replaced before the file is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmva.errors import LlmvaError, UsageError

from . import charts, figures
from .changes import SHOWN, Changes, changes
from .outcome import outcome
from .points import front_panel
from .svg import legend, whiskers

FORMAT, VERSION = "llmva-run", 1
HERE = Path(__file__).parent
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
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(duration=figures.duration, count=figures.count, kind=_kind)
    best = charts.best(run)
    changed = changes(answers, dict(prompts), best)
    page = environment.get_template("template.html").render(
        run=run,
        css=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        title=_title(run),
        outcome=outcome(run),
        tiles=_tiles(run),
        rows=figures.comparison(run),
        utility=figures.utility(run),
        kl=figures.finite(figures.part(run, "utility").get("kl")),
        perplexity=figures.perplexity(run),
        endings=figures.endings(run),
        broken=_broken(run),
        skills=figures.skills(run),
        cost=figures.cost(run),
        whiskers=lambda row: whiskers(row.before, row.after, (row.before_interval, row.after_interval)),
        progress=charts.progress(run),
        strengths=charts.strengths(run),
        front=front_panel(run),
        history=_history(run),
        best=best,
        edits=_edits(run),
        angles=charts.angles(run),
        scores=charts.scores(run),
        score_range=[f"{end:.2f}".replace("-", figures.MINUS) for end in charts.score_range(run) or ()],
        projections=charts.projections(run),
        changed=changed,
        table=_kinds(changed),
        most=SHOWN,
        facts=_facts(run),
        legend=legend,
        **{name: figures.part(run, name) for name in ("base", "settings", "versions")},
        sources=_sources(run),
        limits=_limits(run),
    )
    return figures.printable(page)


def write_report(directory: Path) -> Path:
    """Write `directory/report.html` from run.json, answers.jsonl and prompts.jsonl there; return its path.

    The file appears whole or not at all. Missing answers or prompts, and lines of them that cannot be read (a run that
    was killed may leave half a line), are named among the report's limits.

    Raises:
        UsageError: no run.json there, or one that is not of a run this version can read.
        LlmvaError: the report cannot be written.
    """
    directory = Path(directory)
    run = _read_run(directory)
    notes: list[str] = []
    answers = _read_lines(directory / "answers.jsonl", notes)
    prompts = {str(line.get("id")): line for line in _read_lines(directory / "prompts.jsonl", notes)}
    listed = run.get("limits")
    run = {**run, "limits": [*(listed if isinstance(listed, list) else []), *notes]}
    path = directory / "report.html"
    temporary = directory / "report.html.part"  # the same name each time, so that a kill leaves one at most
    try:
        temporary.write_text(render(run, answers, prompts), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LlmvaError(f"Cannot write {path} ({error.strerror}): make the folder writable and free space.") from error
    return path


def _read_run(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {path}: give the folder that 'llmva align' wrote.") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: run 'llmva align' again to rebuild it.") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise UsageError(f"{path} is not the record of an llmva run: give the folder that 'llmva align' wrote.")
    version = figures.finite(run.get("version"))
    if version is None or version > VERSION:
        raise UsageError(f"{path} has format version {run.get('version')}, newer than this llmva reads: update llmva.")
    return run


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        raw = path.read_bytes()
    except OSError:
        notes.append(f"{path.name} could not be read, so this report shows no answers from it.")
        return []
    found, broken = [], 0
    for line in raw.splitlines():
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            broken += 1
    if broken:
        notes.append(f"{broken} line{'s' * (broken > 1)} of {path.name} could not be read and are not in this report.")
    return found


def _title(run: dict[str, Any]) -> str:
    """A hub id as it is, a folder by its last name: its whole path is under "To reproduce"."""
    name = str(figures.part(run, "base").get("model") or "Unnamed model")
    return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def _tiles(run: dict[str, Any]) -> list[tuple[figures.Row, str, str]]:
    """The four figures at the top, each with its name and one line for a newcomer."""
    rows = {row.name: row for row in [*figures.comparison(run), *figures.utility(run)] if row.level == 0}
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
    return [(rows[key], title, hint) for key, title, hint in words if key in rows]


def _history(run: dict[str, Any]) -> list[dict[str, str]]:
    """The table behind the curves: one line per iteration."""
    lines = []
    for position, entry in enumerate(charts.iterations(run)):
        value = {key: figures.finite(entry.get(key)) for key in HISTORY}
        angle = value["mean_angle"]
        lines.append(
            {
                "number": str(charts.number_of(entry, position)),
                "f1": figures.score(value["f1"]),
                **{key: figures.share(value[key]) for key in ("asr", "orr", "garbled", "kept")},
                "perplexity": figures.score(value["perplexity"]),
                "angle": figures.DASH if angle is None else f"{angle:.1f}°",
                "edited": str(len(entry.get("selected") or [])),
                "seconds": figures.duration(entry.get("seconds")),
            }
        )
    return lines


def _broken(run: dict[str, Any]) -> list[dict[str, str]]:
    """Examples of long answers that only the edited model breaks."""
    listed = figures.part(run, "utility", "endings").get("examples")
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    texts = [{name: str(row.get(name) or "") for name in ("prompt", "before", "after")} for row in rows]
    faults = [FAULTS.get(str(row.get("fault")), "broken") for row in rows]
    return [{**text, "fault": fault} for text, fault in zip(texts, faults, strict=True)]


def _edits(run: dict[str, Any]) -> tuple[int, int, int]:
    """(edits that are in the result, sublayers they touched, sublayers of the model)."""
    chosen = charts.best(run) or 0
    numbered = [(charts.number_of(entry, i), entry) for i, entry in enumerate(charts.iterations(run))]
    picked = [index for number, entry in numbered if number < chosen for index in entry.get("selected") or []]
    return len(picked), len(set(picked)), len(run.get("sublayers") or [])


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
    base = figures.part(run, "base")
    pairs = [
        ("Model", base.get("model")),
        ("Weights, SHA-256", base.get("sha256")),
        ("Architecture", base.get("model_type")),
        ("Blocks × width", _times(base.get("blocks"), base.get("hidden_size"))),
        ("Parameters", figures.scaled(base.get("parameters"), ("", "thousand", "million", "billion", "trillion"))),
        ("Stored as", base.get("dtype")),
        ("Judge", run.get("judge")),
        ("Seed", run.get("seed")),
        ("llmva", run.get("llmva")),
        *figures.part(run, "versions").items(),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "", figures.DASH)]


def _times(blocks: object, width: object) -> str | None:
    return None if blocks is None or width is None else f"{blocks} × {width}"


def _sources(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Data sets with their prompts per split and the hash of their contents."""
    hashes = figures.part(run, "prompts", "hashes")
    by_split = {name: figures.part(run, "prompts", "counts", name) for name in ("train", "validation", "test")}
    names = dict.fromkeys([*(name for found in by_split.values() for name in found), *hashes])
    return [
        {"name": name, "sha": hashes.get(name, figures.DASH), **{k: v.get(name, 0) for k, v in by_split.items()}}
        for name in names
    ]


def _limits(run: dict[str, Any]) -> list[str]:
    """What the run itself noted, then what holds for every report."""
    listed = run.get("limits")
    notes = [str(note) for note in listed] if isinstance(listed, list) else []
    judge = run.get("judge")
    named = f" ({judge})" if judge else ""
    return [
        *notes,
        f"A program{named} judged the answers, not a person. It sees whether a model refuses, "
        "not whether an answer is right or useful.",
        "The figures hold for prompts like these test prompts; they say nothing about other languages, "
        "other attacks or conversations of several turns.",
        "The intervals say how far the figures may move with other test prompts of the same kind, "
        "not with another seed or other training prompts.",
        "A lower ASR is not safety: someone who has the weights can undo an edit of them.",
    ]


def _kind(benign: bool) -> str:
    return "benign" if benign else "harmful"
