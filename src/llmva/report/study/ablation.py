"""An ablation as files for people: F1, ASR and ORR against what was varied, as a page, a table and a CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.drawing.forest import Entry, forest
from llmva.report.estimates import MEASURES, Estimate, Unit, estimate
from llmva.report.fitting import Fitting
from llmva.report.pages import Outcome, judged_by, page, title, write_text
from llmva.report.study.methods import Cell
from llmva.report.study.plane import SHAPES
from llmva.report.study.records import STYLES, csv_cells, csv_text, facts, read_record
from llmva.report.values import DASH, dicts, finite, part, printable, strings

if TYPE_CHECKING:
    from rich.table import Table

MEANINGS = {
    "f1": "F1: both at once, higher is better",
    "asr": "ASR: harmful answered, lower is better",
    "orr": "ORR: benign refused, lower is better",
}
WHAT = {"vectors": "the vectors", "iterations": "the number of iterations", "layers": "the layers"}
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2")


@dataclass(frozen=True)
class Spot:
    """One setting of one series: where it stands, what it is called, its measures, and those of its single runs."""

    x: float | None
    label: str
    measures: dict[str, Estimate]
    runs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Line:
    """One series, by x where that is known."""

    name: str
    spots: tuple[Spot, ...]


def write_ablation(directory: Path) -> list[Path]:
    """Write ablate.html and ablate.csv from ablate.json in `directory`; return their paths.

    Each file appears whole or not at all. Nothing is written if the record cannot be read.

    Raises:
        UsageError: no ablate.json there, or one that this version cannot read.
        LlmvaError: a file cannot be written.
    """
    directory = Path(directory)
    record = read_record(directory, "ablate", "ablation")
    made = (("html", ablation_page(record)), ("csv", ablation_csv(record)))
    return [write_text(directory / f"ablate.{ending}", text) for ending, text in made]


def lines(record: dict[str, Any]) -> list[Line]:
    """The series of an ablation, each by x; in the record's order where an x is not known."""
    drawn = []
    for number, series in enumerate(dicts(record.get("series")), start=1):
        spots = [_spot(point) for point in dicts(series.get("points"))]
        if all(spot.x is not None for spot in spots):
            spots.sort(key=lambda spot: spot.x or 0.0)
        drawn.append(Line(str(series.get("name") or f"series {number}"), tuple(spots)))
    return drawn


def _spot(point: dict[str, Any]) -> Spot:
    x = finite(point.get("x"))
    label = point.get("label")
    words = label if isinstance(label, str) and label else DASH if x is None else svg.plain(x)
    return Spot(x, words, {key: estimate(point.get(key)) for key, _, _ in MEASURES}, tuple(dicts(point.get("runs"))))


def _untouched(record: dict[str, Any], key: str) -> float | None:
    return estimate(part(record, "untouched").get(key)).mean


# --- Page ---------------------------------------------------------------------------------------------------------


def ablation_page(record: dict[str, Any]) -> str:
    """The contents of ablate.json as one HTML page that needs no network, no script and no other file."""
    series = lines(record)
    return page(
        "ablation.html",
        STYLES,
        kind="ablation",
        title=title(record),
        outcome=_outcome(record, series),
        panels=_panels(record, series),
        rows=_rows(record, series),
        command=record.get("command"),
        facts=facts(record),
        limits=[
            *strings(record.get("limits")),
            judged_by(record),
            "The figures hold for this model and prompts like these.",
        ],
    )


def ablation_panels(record: dict[str, Any]) -> list[Markup]:
    """The charts of the page, in its order."""
    return [panel for group in _panels(record, lines(record)) for panel in group]


def _outcome(record: dict[str, Any], series: Sequence[Line]) -> Outcome:
    """The range of F1, which is what an ablation is looked at for."""
    what = _what(record)
    known = [(f1, line, spot) for line in series for spot in line.spots if (f1 := spot.measures["f1"].mean) is not None]
    verdict = f"Ablation of {what}"
    if not known:
        return Outcome(verdict, "open", "No setting of this ablation has test figures yet.")
    base = _untouched(record, "f1")
    against = "" if base is None else f"; the untouched model has {base:.3f}"
    (best, at_best), (worst, at_worst) = (_extreme(record, known, choose) for choose in (max, min))
    if best == worst:
        return Outcome(verdict, "open", f"F1 is {best} for {at_best}{against}.")
    return Outcome(
        verdict, "open", f"F1 is highest, {best}, for {at_best}, and lowest, {worst}, for {at_worst}{against}."
    )


def _extreme(
    record: dict[str, Any], known: Sequence[tuple[float, Line, Spot]], choose: Callable[..., Any]
) -> tuple[str, str]:
    """The highest or lowest F1 as written, and for what: its name, or the number of those with the same digits."""
    text = f"{choose(one[0] for one in known):.3f}"
    tied = [one for one in known if f"{one[0]:.3f}" == text]
    if len(tied) == 1:
        return text, _place(record, tied[0])
    return text, f"all {len(known)} settings" if len(tied) == len(known) else f"{len(tied)} of {len(known)} settings"


def _what(record: dict[str, Any]) -> str:
    what = record.get("what")
    return WHAT.get(what, what) if isinstance(what, str) else "a model"


def _place(record: dict[str, Any], one: tuple[float, Line, Spot]) -> str:
    unit = record.get("x_label")
    label = one[2].label
    bare = one[2].x is not None and label == svg.plain(one[2].x)
    return f"“{one[1].name}”, {label}{f' {unit}' if bare and isinstance(unit, str) and unit else ''}"


def _panels(record: dict[str, Any], series: Sequence[Line]) -> list[list[Markup]]:
    """Panels for F1, ASR and ORR: against x the series that have one at every point, the others as lists."""
    drawn = [(number, line) for number, line in enumerate(series) if line.spots]
    numeric = [(number, line) for number, line in drawn if all(spot.x is not None for spot in line.spots)]
    listed = [pair for pair in drawn if pair not in numeric]
    groups = []
    for make, pairs in ((_curves, numeric), (_list, listed)):
        panels = []
        for measure in MEASURES:
            known = [pair for pair in pairs if any(s.measures[measure[0]].mean is not None for s in pair[1].spots)]
            if known:
                panels.append(make(record, known, *measure))
        groups.append(panels)
    return [panels for panels in groups if panels]


def _look(number: int) -> tuple[str, str, str]:
    """Colour class, shape and dashes of a series; all three repeat only after a while."""
    shapes = ("dot", *SHAPES[:4])
    class_ = "c-after" if number % 6 == 0 else f"m-{number % 6 - 1}"
    return class_, shapes[(number + number // 6) % 5], DASHES[number % 5]


Numbered = Sequence[tuple[int, Line]]


def _curves(record: dict[str, Any], pairs: Numbered, key: str, name: str, unit: Unit) -> Markup:
    """One panel against x, which every point has; `pairs` numbers the series, so that looks stay theirs."""
    every = sorted({spot.x for _, line in pairs for spot in line.spots if spot.x is not None})
    on = svg.axes((every[0], every[-1]), (0.0, 1.0))
    labels = {spot.x: spot.label for _, line in pairs for spot in line.spots}
    x_label = record.get("x_label")
    marks = every if sum(6.5 * len(labels[x]) + 14 for x in every) < 380 else svg.ticks(every[0], every[-1], 8)
    parts = on.frame(
        str(x_label) if x_label else "",
        "",
        marks,
        [0.0, 0.25, 0.5, 0.75, 1.0],
        (lambda value: f"{value:g}") if key == "f1" else (lambda value: f"{100 * value:.0f}%"),
        lambda x: labels.get(x, svg.plain(x)),
    )
    keys, described = [], []
    base = _untouched(record, key)
    if base is not None:
        y = on.y(base)
        parts.append(svg.tag("line", class_="boundary", x1=svg.LEFT, x2=svg.WIDTH - svg.RIGHT, y1=y, y2=y))
        keys.append((f"untouched model: {unit.text(base)}", "", "c-untouched", "4 3"))
    apart = 3.0 if len(pairs) > 1 else 0.0  # units between two series, so that no interval hides another
    for place, (number, line) in enumerate(pairs):
        class_, shape, dashes = _look(number)
        shift = apart * (place - (len(pairs) - 1) / 2)
        moved = svg.Axes(svg.Scale(on.x.low, on.x.high, on.x.start + shift, on.x.end + shift), on.y, on.height)
        points = [(spot.x or 0.0, spot.measures[key].mean) for spot in line.spots]
        for spot in line.spots:
            ends = spot.measures[key].interval
            if ends is not None and spot.measures[key].mean is not None:
                x = moved.x(spot.x or 0.0)
                y1, y2 = (on.y(svg.clamped(end)) for end in ends)
                parts.append(svg.tag("line", class_=f"bar {class_}", x1=x, x2=x, y1=y1, y2=y2))
        known = {spot.x: unit.words(spot.measures[key]) for spot in line.spots}
        series = svg.Series(line.name, points, class_, shape, dashes)
        parts += svg.polyline(series, moved, partial(_tip, labels, known))
        keys.append((line.name, shape, class_, dashes))
        described.append(f"{line.name}: " + ", ".join(f"{spot.label} {known[spot.x]}" for spot in line.spots))
    drawing = svg.picture(f"chart-{key}", MEANINGS[key], f"{'; '.join(described)}.", on.height, parts)
    return svg.panel(MEANINGS[key], svg.legend(keys), drawing)


def _tip(labels: dict[float | None, str], known: dict[float | None, str], x: float, _: float) -> str:
    return f"{labels[x]}: {known[x]}"


def _list(record: dict[str, Any], pairs: Numbered, key: str, name: str, unit: Unit) -> Markup:
    """One panel with a line for each point, for settings that are not numbers."""
    entries = []
    for number, line in pairs:
        class_, shape, _ = _look(number)
        entries.append(Entry(line.name, Estimate(), class_, heading=True))
        for spot in line.spots:
            seeds = tuple(value for run in spot.runs if (value := estimate(run.get(key)).mean) is not None)
            entries.append(Entry(spot.label, spot.measures[key], class_, shape, seeds))
    base = _untouched(record, key)
    drawing = forest(
        f"chart-{key}-list", MEANINGS[key], entries, unit, name, None if base is None else ("untouched", base)
    )
    return svg.panel(MEANINGS[key], Markup(""), drawing or Markup(""))


# --- Tables -------------------------------------------------------------------------------------------------------


def _rows(record: dict[str, Any], series: Sequence[Line]) -> list[tuple[str, str, list[Cell]]]:
    """(series, label, cells of F1, ASR and ORR), the untouched model first."""

    def cells(of: dict[str, Estimate]) -> list[Cell]:
        return [Cell(unit.text(of[k].mean), unit.spread(of[k]), unit.bracket(of[k])) for k, _, unit in MEASURES]

    rows = []
    if part(record, "untouched"):
        rows.append(("untouched model", "", cells({key: Estimate(_untouched(record, key)) for key, _, _ in MEASURES})))
    rows += [(line.name, spot.label, cells(spot.measures)) for line in series for spot in line.spots]
    return rows


def ablation_table(record: dict[str, Any]) -> Fitting:
    """The contents of ablate.json: a line for each setting, F1 with its 95% interval, ± over seeds.

    A narrow terminal gets no intervals, a very narrow one no ± either.
    """
    return Fitting(
        (
            lambda: _table(record, intervals=True, spread=True),
            lambda: _table(record, intervals=False, spread=True),
            lambda: _table(record, intervals=False, spread=False),
        ),
        ("", "intervals", "intervals and ± over seeds"),
    )


def _table(record: dict[str, Any], *, intervals: bool, spread: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    what = _what(record)
    heading = Text(printable(f"Ablation of {what} on {title(record)}{' [95% intervals]' * intervals}"))
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=heading,
        title_style="bold",
        title_justify="left",
        show_edge=False,
    )
    x_label = record.get("x_label")
    table.add_column("series")
    table.add_column(Text(printable(str(x_label) if x_label else "setting")))
    for _, name, _ in MEASURES:
        table.add_column(name, no_wrap=True)
    last = ""
    for name, label, (f1, *shares) in _rows(record, lines(record)):
        brackets = (f1.bracket if intervals else "", *("" for _ in shares))  # all intervals would need 130 columns
        values = [
            " ".join(filter(None, (one.text, bracket, one.spread if spread else "")))
            for one, bracket in zip((f1, *shares), brackets, strict=True)
        ]
        # Text, not str: rich would read a series named '[red]' as markup.
        table.add_row(*(Text(printable(one)) for one in ("" if name == last else name, label, *values)))
        last = name
    if not table.rows:
        table.add_row("no test figures yet", *[DASH] * 4)
    return table


def ablation_csv(record: dict[str, Any]) -> str:
    """One line for each setting of each series, the untouched model first, with every digit that was recorded."""
    rows: list[dict[str, object]] = []
    if part(record, "untouched"):
        row: dict[str, object] = {"series": "untouched", "x": None, "label": "", "seeds": None}
        for key, _, _ in MEASURES:
            row |= csv_cells(key, estimate(part(record, "untouched").get(key)))
        rows.append(row)
    for line in lines(record):
        for spot in line.spots:
            row = {"series": line.name, "x": spot.x, "label": spot.label, "seeds": len(spot.runs)}
            for key, value in spot.measures.items():
                row |= csv_cells(key, value)
            rows.append(row)
    return csv_text(rows)
