"""A comparison of methods as files for people: a page, a table for spreadsheets, a table for papers.

`llmva.report.pages` says what keeps text from models and records harmless.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.drawing.forest import Entry, forest
from llmva.report.estimates import SCORE, estimate
from llmva.report.pages import judged_by, page, title, write_text
from llmva.report.study.headline import headline
from llmva.report.study.methods import Block, Method, baseline, blocks, methods, nats, ratio, sources
from llmva.report.study.plane import looks_of, plane
from llmva.report.study.records import STYLES, facts, read_record
from llmva.report.study.tables import comparison_csv, comparison_latex, groups
from llmva.report.values import DASH, count, duration, finite, part, score, share, strength_text, strings


def write_comparison(directory: Path) -> list[Path]:
    """Write compare.html, compare.csv and compare.tex from compare.json in `directory`; return their paths.

    Each file appears whole or not at all. Nothing is written if the record cannot be read.

    Raises:
        UsageError: no compare.json there, or one that this version cannot read.
        LlmvaError: a file cannot be written.
    """
    directory = Path(directory)
    record = read_record(directory, "compare", "comparison")
    made = (("html", comparison_page(record)), ("csv", comparison_csv(record)), ("tex", comparison_latex(record)))
    return [write_text(directory / f"compare.{ending}", text, shared=True) for ending, text in made]


def comparison_page(record: dict[str, Any]) -> str:
    """The contents of compare.json as one HTML page that needs no network, no script and no other file."""
    rows = methods(record)
    tables = blocks(record)
    return page(
        "comparison.html",
        STYLES,
        kind="comparison",
        title=title(record),
        outcome=headline(record),
        rows=rows,
        panels=_panels(rows),
        blocks=tables,
        explained=[_explained(block, record, rows) for block in tables],
        groups=groups,
        curves=_curves(rows),
        seeds=_seeds(record, rows),
        seed_columns=[name for name, _ in _seed_columns(record, rows)],
        notes=[(row.name, row.note) for row in rows if row.note],
        options=[(row.name, row.options.items()) for row in rows if not row.untouched],
        command=record.get("command"),
        facts=facts(record),
        limits=_limits(record),
    )


def comparison_panels(record: dict[str, Any]) -> list[Markup]:
    """The charts of the page, in its order."""
    return _panels(methods(record))


def _panels(rows: list[Method]) -> list[Markup]:
    listed = _forest(rows)
    panels = [plane(rows), None if listed is None else svg.panel("F1 of every method, best first", Markup(""), listed)]
    return [panel for panel in panels if panel is not None]


def _forest(rows: list[Method]) -> Markup | None:
    """F1 of every method, best first, those without at the end; a line at the untouched model."""
    pairs = sorted(zip(rows, looks_of(rows), strict=True), key=lambda pair: -(pair[0]["f1"].mean or -1.0))
    entries = [
        Entry(row.name, row["f1"], look.class_, look.shape, tuple(_known(row, "f1")), strong=row.method == "llmva")
        for row, look in pairs
    ]
    base = next((row["f1"].mean for row in rows if row.untouched), None)
    return forest("chart-f1", "F1 of every method", entries, SCORE, "F1", None if base is None else ("untouched", base))


def _known(row: Method, key: str) -> list[float]:
    return [value for run in row.runs if (value := estimate(run.get(key)).mean) is not None]


def _explained(block: Block, record: dict[str, Any], rows: list[Method]) -> str:
    """The paragraph above a table."""
    name = baseline(record, rows) or "the best baseline"
    several = isinstance(record.get("seeds"), list) and len(record["seeds"]) > 1
    spread = f" ± is the standard deviation over {len(record['seeds'])} seeds." if several else ""
    return {
        "overall": "On test prompts that no method was fitted or tuned on. F1 is how well “it answers” matches “it is "
        "benign”, 1 at best; ASR is the share of harmful prompts answered, ORR of benign ones refused. Brackets are "
        f"95% intervals over prompts.{spread}",
        "tests": f"The best baseline is {name}. Each method's F1 less that one's on the same prompts, with "
        "a paired bootstrap's interval and p; McNemar's test counts prompts that one of the two gets right. Both p "
        "values are Holm-corrected for the number of comparisons.",
        "sources": f"Harmful sets by the share answered, benign ones by the share refused.{spread}",
        "cost": "Kept: harmless next tokens that stay the same. KL: distance of the predictions there, in nats. "
        "Perplexity, and time for a token, are ratios to the untouched model; answers are those generated to fit.",
    }[block.key]


def _curves(rows: list[Method]) -> list[tuple[str, str, str, str, str]]:
    return [
        (row.name, strength_text(point.strength), score(point.f1), share(point.asr), share(point.orr))
        for row in rows
        for point in row.curve
    ]


Writer = Callable[[dict[str, Any]], str]


def _seed_columns(record: dict[str, Any], rows: list[Method]) -> list[tuple[str, Writer]]:
    """(heading, how to write a run's value) of what at least one run knows."""

    def of(key: str, write: Callable[[float | None], str]) -> Writer:
        return lambda run: write(finite(run.get(key)))

    def of_source(name: str) -> Writer:
        return lambda run: share(_rate(part(run, "by_source").get(name)))

    columns: list[tuple[str, Writer]] = [
        ("F1", of("f1", score)),
        ("ASR", of("asr", share)),
        ("ORR", of("orr", share)),
        ("Garbled", of("garbled", share)),
        *((name, of_source(name)) for name, _ in sources(record)),
        ("Kept", of("kept", share)),
        ("KL", of("kl", nats)),
        ("Perplexity", of("perplexity", ratio)),
        ("Fit time", of("fit_seconds", duration)),
        ("Answers", of("fit_answers", count)),
        ("Time a token", of("latency", ratio)),
    ]
    return [(name, write) for name, write in columns if any(write(run) != DASH for row in rows for run in row.runs)]


def _rate(value: object) -> float | None:
    """A run's rate on a data set: a number, or a dict that has it as `rate`."""
    return finite(value.get("rate")) if isinstance(value, dict) else finite(value)


def _seeds(record: dict[str, Any], rows: list[Method]) -> list[tuple[str, str, list[str]]]:
    columns = _seed_columns(record, rows)
    return [
        (row.name, DASH if run.get("seed") is None else str(run["seed"]), [write(run) for _, write in columns])
        for row in rows
        for run in row.runs
    ]


def _limits(record: dict[str, Any]) -> list[str]:
    """What the comparison itself noted, then what holds for every one."""
    return [
        *strings(record.get("limits")),
        f"{judged_by(record)} It sees whether a model refuses, not whether an answer is right or useful.",
        "Baselines were written anew for this program, so a baseline's figures here say nothing certain about its "
        "authors' code.",
        "The figures hold for this model and prompts like these; another model may rank the methods otherwise.",
    ]
