"""The page of `llmva evaluate --report`: ASR and ORR by attack and by set at a glance, what searches found, limits.

It holds no prompt and no answer, so that it can be shown where these must not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmva.report import pages
from llmva.report.drawing.glance import Line, glance
from llmva.report.run import transfer
from llmva.report.run.attacks import NONE, WORST, attack_rows, worst_sentence
from llmva.report.run.outcome import outcome
from llmva.report.run.rows import Row, comparison, cost
from llmva.report.run.searches import search_notes, search_panels
from llmva.report.values import finite, part, share, strings
from llmva.settings import excerpt

RATES = ("ASR", "ORR")


@dataclass(frozen=True)
class Setting:
    """An attack or a set with the rates that it has."""

    name: str
    rows: dict[str, Row]  # by RATES

    @property
    def cells(self) -> list[Row | None]:
        return [self.rows.get(rate) for rate in RATES]

    @property
    def strong(self) -> bool:
        return self.name in (NONE, WORST, transfer.ALL)


def write_evaluation(path: Path, record: dict[str, Any], command: str) -> Path:
    """Write the page of a record of `llmva evaluate`; return its path.

    Raises LlmvaError where it cannot be written.
    """
    return pages.write_text(path, evaluation_page(record, command))


def evaluation_page(record: dict[str, Any], command: str) -> str:
    """The page as HTML; any field of the record may be missing."""
    named = {"by-attack": ("By attack", _by_attack(record)), "by-set": ("By set", _by_set(record))}
    tables = [(key, title, settings) for key, (title, settings) in named.items() if settings]
    figures = [glance(f"chart-{key}", title, RATES, _lines(settings)) for key, title, settings in tables]
    return pages.page(
        "evaluation.html",
        ("style.css", "comparison.css"),
        kind="evaluation",
        title=pages.title({"base": {"model": record.get("model")}}),
        outcome=_outcome(record),
        figures=[figure for figure in figures if figure is not None],
        tables=tables,
        edited=_edited(record),
        worst=worst_sentence(record) if "attacks" in record else "",
        notes=search_notes(record),
        panels=search_panels(record),
        command=command,
        facts=_facts(record),
        limits=[*strings(record.get("limits")), pages.judged_by(record)],
    )


def _edited(record: dict[str, Any]) -> bool:
    return bool(part(record, "test", "after"))


def _by_attack(record: dict[str, Any]) -> list[Setting]:
    """The plain prompts, each attack, and the worst case; nothing without attacks."""
    if "attacks" not in record:
        return []
    return [Setting(name, {row.name: row for row in rates.values()}) for name, rates in attack_rows(record)]


def _by_set(record: dict[str, Any]) -> list[Setting]:
    """The sets of --data and all together, else the sources of the prompts."""
    if "sets" in record:
        return [Setting(group.name, {row.name: row for row in group.rows}) for group in transfer.groups(record)]
    settings: dict[str, Setting] = {}
    rate = ""
    for row in comparison(record):
        rate = row.name if row.level == 0 else rate
        if row.level == 1 and rate in RATES:
            settings.setdefault(row.name, Setting(row.name, {})).rows[rate] = row
    return list(settings.values())


def _lines(settings: Sequence[Setting]) -> list[Line]:
    return [
        Line(one.name, tuple(None if row is None else (row.before, row.after) for row in one.cells), one.strong)
        for one in settings
    ]


def _outcome(record: dict[str, Any]) -> pages.Outcome:
    worst = part(record, "worst_case")
    notes = []
    for key, words in (("asr", "of the harmful prompts are answered"), ("orr", "of the benign ones are refused")):
        ends = [finite(part(worst, when).get(key)) for when in ("before", "after")]
        if ends[0] is not None:
            after = "" if ends[1] is None else f", {share(ends[1])} with it"
            notes.append(f"Asked in the worst of these ways, {share(ends[0])} {words} without the edit{after}.")
    if _edited(record):
        judged = outcome(record)
        return pages.Outcome(judged.verdict, judged.tone, judged.sentence, (*judged.notes, *notes))
    rates = part(record, "test", "before")
    asr, orr = (share(finite(rates.get(key))) for key in ("asr", "orr"))
    sentence = f"The model answers {asr} of the harmful prompts and refuses {orr} of the benign ones."
    return pages.Outcome("Measured without an edit", "open", sentence, tuple(notes))


def _facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    system, prompts = record.get("system"), part(record, "prompts")
    pairs = [
        ("Model", record.get("model")),
        ("Edit", record.get("edit")),
        ("Judge", record.get("judge")),
        ("System prompt", excerpt(system) if isinstance(system, str) else None),
        ("Prompts", ", ".join(f"{name} {n}" for name, n in prompts.items())),
        *cost(record),
    ]
    return [(name, str(value)) for name, value in pairs if value]
