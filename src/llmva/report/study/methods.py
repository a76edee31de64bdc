"""The methods of a comparison and their measures as cells of tables: what terminal, page and LaTeX all show.

F1, ASR, ORR and garbled answers have their best among all rows, the untouched model too.
Utility and cost are about what a method did, so there the untouched model, which did nothing, does not compete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmva.report.estimates import SCORE, SHARE, Estimate, Unit, estimate, number
from llmva.report.values import (
    DASH,
    MINUS,
    Interval,
    count,
    dicts,
    duration,
    finite,
    interval,
    part,
    score_bracket,
    share,
    signed,
)

ALIKE = "about 1×"  # a time that rounds of the same model differ by too
LEVEL = 0.05  # of the tests, after Holm's correction


@dataclass(frozen=True)
class Versus:
    """A method against the best baseline on the same prompts: its F1 less the baseline's, and p values."""

    baseline: str
    difference: float | None
    interval: Interval | None
    p: float | None
    p_holm: float | None
    mcnemar: float | None
    mcnemar_holm: float | None

    @property
    def significant(self) -> bool:
        """Does F1 differ, at 5% after Holm's correction? False too where it was not tested."""
        return self.p_holm is not None and self.p_holm < LEVEL

    @property
    def difference_text(self) -> str:
        """'+0.043', signed unless it rounds to nothing."""
        return DASH if self.difference is None else signed(f"{self.difference:+.3f}")

    @property
    def bracket(self) -> str:
        return score_bracket(self.interval).replace("-", MINUS)


@dataclass(frozen=True)
class Strength:
    """A method with its magnitude scaled by `strength`, on validation prompts."""

    strength: float
    f1: float | None
    asr: float | None
    orr: float | None


@dataclass(frozen=True)
class Method:
    """One row of a comparison. `name` is what people see: 'scans (tuned)', 'llmva', 'untouched model'."""

    name: str
    method: str
    setting: str | None
    measures: dict[str, Estimate] = field(default_factory=dict)  # f1, asr, orr, garbled
    sources: dict[str, Estimate] = field(default_factory=dict)
    kept: float | None = None
    kl: float | None = None  # nats
    perplexity: float | None = None  # edited model's over the original's
    skills: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)  # before, after
    fit_seconds: float | None = None
    fit_answers: float | None = None
    latency: float | None = None  # time per token over the original's
    latency_range: Interval | None = None  # of the rounds in which it was measured
    curve: tuple[Strength, ...] = ()  # by strength
    versus: Versus | None = None
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    runs: tuple[dict[str, Any], ...] = ()

    @property
    def untouched(self) -> bool:
        return self.method == "none"

    @property
    def measurable(self) -> bool:
        """Whether the time per token differs from the original's by more than rounds differ from each other."""
        if self.latency is None or self.latency_range is None:
            return False
        low, high = self.latency_range
        return low > 1 or high < 1

    def __getitem__(self, key: str) -> Estimate:
        return self.measures.get(key, Estimate())


def methods(record: dict[str, Any]) -> list[Method]:
    """The rows of a comparison, in its order."""
    return [_method(row) for row in dicts(record.get("rows"))]


def _method(row: dict[str, Any]) -> Method:
    method = str(row.get("method") or "unnamed")
    setting = row.get("setting")
    setting = setting if isinstance(setting, str) and setting and setting != "default" else None
    utility, cost = part(row, "utility"), part(row, "cost")
    skills = {
        str(name): (finite(part(skill).get("before")), finite(part(skill).get("after")))
        for name, skill in part(row, "skills").items()
    }
    curve = [
        Strength(strength, *(estimate(point.get(key)).mean for key in ("f1", "asr", "orr")))
        for point in dicts(row.get("curve"))
        if (strength := finite(point.get("strength"))) is not None
    ]
    note = row.get("note")
    return Method(
        name=_name(method, setting),
        method=method,
        setting=setting,
        measures={key: estimate(row.get(key)) for key in ("f1", "asr", "orr", "garbled")},
        sources={str(name): estimate(value) for name, value in part(row, "by_source").items()},
        kept=number(utility.get("kept")),
        kl=number(utility.get("kl")),
        perplexity=number(utility.get("perplexity")),
        skills=skills,
        fit_seconds=number(cost.get("fit_seconds")),
        fit_answers=number(cost.get("fit_answers")),
        latency=number(cost.get("latency")),
        latency_range=interval(cost.get("latency_range")),
        curve=tuple(sorted(curve, key=lambda point: point.strength)),
        versus=_versus(row.get("versus")),
        note=note.strip() if isinstance(note, str) else "",
        options=part(row, "options"),
        runs=tuple(dicts(row.get("runs"))),
    )


def _name(method: str, setting: str | None) -> str:
    if method == "none":
        return "untouched model"
    return method if setting is None else f"{method} ({setting})"


def _versus(value: object) -> Versus | None:
    tested = part(value)
    if not tested:
        return None
    return Versus(
        str(tested.get("baseline") or ""),
        finite(tested.get("f1_difference")),
        interval(tested.get("f1_difference_interval")),
        finite(tested.get("f1_p")),
        finite(tested.get("f1_p_holm")),
        finite(tested.get("mcnemar_p")),
        finite(tested.get("mcnemar_p_holm")),
    )


def baseline(record: dict[str, Any], rows: Sequence[Method]) -> str:
    """The name of the best baseline; '' where there is none."""
    named = record.get("best_baseline")
    if isinstance(named, str) and named:
        return named
    return next((row.versus.baseline for row in rows if row.versus is not None and row.versus.baseline), "")


def sources(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(data set, 'toxic' or 'benign') in the record's order; the CSV has those of no known kind too."""
    kinds = part(record, "sources")
    return [(str(name), str(kind)) for kind in ("toxic", "benign") for name, one in kinds.items() if one == kind]


# --- Cells --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One value in a table: '4.5%', '±1.2', '[2.1, 7.0]'. `best`: no other row of its column shows a better one."""

    text: str
    spread: str = ""
    bracket: str = ""
    best: bool = False
    significant: bool = False


@dataclass(frozen=True)
class Column:
    """`group` is the heading that neighbouring columns share ('' for none), `better` is 'high', 'low' or ''."""

    group: str
    title: str
    cells: tuple[Cell, ...]
    better: str = ""


@dataclass(frozen=True)
class Block:
    """One table: its columns have a cell for each of `names`. `key` is 'overall', 'tests', 'sources' or 'cost'."""

    key: str
    title: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]


def blocks(record: dict[str, Any]) -> list[Block]:
    """The tables of a comparison. A column without a known value is left out."""
    rows = methods(record)
    names = tuple(row.name for row in rows)
    overall = [
        _marked(_estimates(rows, "", "F1", lambda row: row["f1"], SCORE, "high"), rows),
        _estimates(rows, "", "ASR", lambda row: row["asr"], SHARE, "low"),
        _estimates(rows, "", "ORR", lambda row: row["orr"], SHARE, "low"),
        _estimates(rows, "", "Garbled", lambda row: row["garbled"], SHARE, "low"),
    ]
    by_source = [
        _estimates(rows, {"toxic": "ASR", "benign": "ORR"}[kind], name, _source(name), SHARE, "low")
        for name, kind in sources(record)
    ]
    every_skill = dict.fromkeys(name for row in rows for name in row.skills)
    spent = [
        _values(rows, "Utility", "kept", lambda row: row.kept, share, "high"),
        _values(rows, "Utility", "KL", lambda row: row.kl, nats, "low"),
        _values(rows, "Utility", "perplexity", lambda row: row.perplexity, ratio, "low"),
        *(_values(rows, "Skill", name, _skill(name), share, "high") for name in every_skill),
        _values(rows, "Cost", "fit time", lambda row: row.fit_seconds, duration, "low"),
        _values(rows, "Cost", "answers", lambda row: row.fit_answers, count, "low"),
        _latencies(rows),
    ]
    candidates = [
        ("overall", "Both failures at once", overall),
        ("tests", f"Against {baseline(record, rows) or 'the best baseline'}", _tests(record, rows)),
        ("sources", "By data set", by_source),
        ("cost", "What it costs", spent),
    ]
    shown = []
    for key, heading, columns in candidates:
        known = tuple(one for one in columns if any(cell.text != DASH for cell in one.cells))
        if known:
            shown.append(Block(key, heading, names, known))
    return shown


def _source(name: str) -> Callable[[Method], Estimate]:
    return lambda row: row.sources.get(name, Estimate())


def _skill(name: str) -> Callable[[Method], float | None]:
    return lambda row: row.skills.get(name, (None, None))[1]


def _estimates(
    rows: Sequence[Method], group: str, title: str, take: Callable[[Method], Estimate], unit: Unit, better: str
) -> Column:
    estimates = [take(row) for row in rows]
    texts = [unit.text(one.mean) for one in estimates]
    best = _best([one.mean for one in estimates], texts, better)
    cells = zip(texts, estimates, best, strict=True)
    return Column(group, title, tuple(Cell(t, unit.spread(e), unit.bracket(e), b) for t, e, b in cells), better)


def _values(
    rows: Sequence[Method],
    group: str,
    title: str,
    take: Callable[[Method], float | None],
    write: Callable[[float | None], str],
    better: str,
) -> Column:
    values = [take(row) for row in rows]
    texts = [write(value) for value in values]
    best = _best([None if row.untouched else value for row, value in zip(rows, values, strict=True)], texts, better)
    return Column(group, title, tuple(Cell(text, best=b) for text, b in zip(texts, best, strict=True)), better)


def _latencies(rows: Sequence[Method]) -> Column:
    """Ratios of time, none of them marked as best: within the spread of the rounds they are noise."""
    texts = [ratio(row.latency) if row.measurable or row.untouched or row.latency is None else ALIKE for row in rows]
    return Column("Cost", "time a token", tuple(Cell(text) for text in texts))


def _best(values: Sequence[float | None], texts: Sequence[str], better: str) -> list[bool]:
    """Which cells show the best value: all with the same digits, or none if the whole column has them."""
    known = [(value, text) for value, text in zip(values, texts, strict=True) if value is not None]
    if len({text for _, text in known}) < 2:
        return [False] * len(values)
    top = (max if better == "high" else min)(known)[1]
    return [value is not None and text == top for value, text in zip(values, texts, strict=True)]


def _marked(column: Column, rows: Sequence[Method]) -> Column:
    """The same column, its cells marked where the row differs significantly from the best baseline."""
    differs = [row.versus is not None and row.versus.significant for row in rows]
    cells = tuple(replace(cell, significant=mark) for cell, mark in zip(column.cells, differs, strict=True))
    return replace(column, cells=cells)


def _tests(record: dict[str, Any], rows: Sequence[Method]) -> list[Column]:
    """Against the best baseline: difference of F1, and p of both tests after Holm's correction."""
    name = baseline(record, rows)
    differences, tests, counts = [], [], []
    for row in rows:
        one = row.versus
        differences.append(Cell("baseline" if row.name == name else DASH) if one is None else _difference(one))
        tests.append(Cell(p_text(one.p_holm if one else None), significant=one is not None and one.significant))
        counts.append(Cell(p_text(one.mcnemar_holm if one else None)))
    if all(row.versus is None for row in rows):
        return []
    named = (("F1 difference", differences), ("p of F1", tests), ("p of McNemar", counts))
    return [Column("", title, tuple(cells)) for title, cells in named]


def _difference(test: Versus) -> Cell:
    return Cell(test.difference_text, bracket=test.bracket)


def p_text(value: float | None) -> str:
    """'0.043', or '<0.001'."""
    return DASH if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def nats(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}×" if abs(value) < 1e4 else f"{value:.3g}×"
