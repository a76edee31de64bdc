"""The points of a run (run.json's `front`): table for terminals, picture for the report and for a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.drawing.alone import alone, svg_text
from llmva.report.drawing.placing import Name, place
from llmva.report.fitting import Fitting
from llmva.report.pages import write_text
from llmva.report.values import (
    DASH,
    dicts,
    finite,
    interval,
    part,
    printable,
    score,
    share,
    share_bracket,
    strength_text,
)

if TYPE_CHECKING:
    from rich.table import Table

HEIGHT = 340.0
NEAR = 10.0  # between points that share one name
KEYS = (
    ("on the front", "dot", "c-after"),
    ("another is better in all", "ring", "c-before"),
    ("chosen", "star", "c-kept"),
)
PREDICTED = "~"  # after a strength whose labels were predicted
CAPTION = "~ labels predicted by the first tokens of answers, which were not generated"


def points(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the run's points that have ASR and ORR."""
    needed = ("point", "strength", "asr", "orr")
    return [row for row in dicts(run.get("front")) if all(finite(row.get(name)) is not None for name in needed)]


def front_table(run: dict[str, Any]) -> Fitting:
    """One line a point, with Wilson intervals by the numbers of validation prompts, for which there may be no room."""
    return Fitting(
        (lambda: _table(run, True, True), lambda: _table(run, False, True), lambda: _table(run, False, False)),
        ("", "intervals", "intervals, kept and KL"),
    )


def _table(run: dict[str, Any], intervals: bool, harm: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"Points of the run, on validation prompts{' [95% intervals]' * intervals}"
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title=Text(title),
        title_style="bold",
        title_justify="left",
        caption=Text(CAPTION) if any(row.get("predicted") is True for row in points(run)) else None,
        caption_justify="left",
    )
    for name in ("point", "iter.", "strength", "F1", "ASR", "ORR", *(("kept", "KL") if harm else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    benign, toxic = _sizes(run) if intervals else (0, 0)
    for row in points(run):
        marks = [word for key, word in (("chosen", "chosen"), ("on_front", "front")) if row.get(key) is True]
        kl = finite(row.get("kl"))
        cells = (
            f"{row['point']:.0f}",
            f"{finite(row.get('iteration')) or 0:.0f}",
            f"{strength_text(row['strength'])}{PREDICTED if row.get('predicted') is True else ''}",
            score(finite(row.get("f1"))),
            _with_interval(row["asr"], toxic),
            _with_interval(row["orr"], benign),
            *((share(finite(row.get("kept"))), DASH if kl is None else f"{kl:.4f}") if harm else ()),
            ", ".join(marks),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells), style="bold" if row.get("chosen") is True else "")
    return table


def _sizes(run: dict[str, Any]) -> tuple[int, int]:
    """Benign and toxic prompts that the points were measured on; 0 where a run does not say."""
    sides = part(run, "validation")
    benign, toxic = finite(sides.get("n_benign")), finite(sides.get("n_toxic"))
    return int(benign or 0), int(toxic or 0)


def _with_interval(value: float, n: int) -> str:
    from llmva.statistics import wilson  # here, since it imports numpy, which a report of no points needs not

    ends = interval(wilson(min(n, max(0, round(value * n))), n)) if n else None
    return f"{share(value)} {share_bracket(ends)}".rstrip()


def front_panel(run: dict[str, Any]) -> list[Markup]:
    """The picture as the report shows it; empty without points."""
    drawing = _drawing(run)
    if drawing is None:
        return []
    return [svg.panel("Points of the run, by number", svg.legend([(*key, None) for key in KEYS]), drawing)]


def _drawing(run: dict[str, Any]) -> Markup | None:
    """ASR across, ORR up, zoomed to the points; no line joins them, since nothing was measured between."""
    rows = sorted(points(run), key=lambda row: row.get("chosen") is True)  # nothing may cover the chosen one
    if not rows:
        return None
    highest = [max(0.05, *(min(1.0, float(row[key])) for row in rows)) for key in ("asr", "orr")]
    on = svg.Axes(
        svg.Scale(0.0, highest[0], svg.LEFT + 10, svg.WIDTH - svg.RIGHT - 14),
        svg.Scale(0.0, highest[1], HEIGHT - svg.BOTTOM - 8, svg.TOP + 8),
        HEIGHT,
    )
    parts = on.frame(
        "ASR: harmful prompts answered",
        "ORR: benign prompts refused",
        svg.ticks(0.0, highest[0]),
        svg.ticks(0.0, highest[1]),
        _percent,
        _percent,
    )
    spots: dict[tuple[float, float], list[int]] = {}  # the points of one place share a name
    for row in rows:
        x, y = on.x(float(row["asr"])), on.y(float(row["orr"]))
        words = (
            f"point {row['point']:.0f}: iteration {finite(row.get('iteration')) or 0:.0f}, strength "
            f"{strength_text(row['strength'])}, ASR {share(row['asr'])}, ORR {share(row['orr'])}"
        )
        shape, class_ = ("dot", "c-after") if row.get("on_front") is True else ("ring", "c-before")
        parts.append(svg.marker(shape, x, y, class_, 4.2, words))
        if row.get("chosen") is True:
            parts.append(svg.marker("star", x, y, "c-kept", 7.5, f"{words} (chosen)"))
        near = next((at for at in spots if abs(at[0] - x) < NEAR and abs(at[1] - y) < NEAR), (x, y))
        spots.setdefault(near, []).append(int(row["point"]))
    parts += _names(spots)
    described = "; ".join(
        f"point {row['point']:.0f} ASR {share(row['asr'])} ORR {share(row['orr'])}" for row in points(run)
    )
    return svg.picture("chart-front", "Points of the run", f"{described}.", HEIGHT, parts)


def _names(spots: dict[tuple[float, float], list[int]]) -> list[Markup]:
    """The numbers of the points, where they cover neither each other nor a mark."""
    words = [", ".join(map(str, sorted(numbers))) for numbers in spots.values()]
    names = [Name(x, y, 7.0 * len(text) + 2, 13.0) for (x, y), text in zip(spots, words, strict=True)]
    marks = [(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    bounds = (svg.LEFT + 1.0, 2.0, svg.WIDTH - 2.0, HEIGHT - svg.BOTTOM - 1)
    parts = []
    for text, placed in zip(words, place(names, bounds, marks), strict=True):
        if placed.leader is not None:
            x1, y1, x2, y2 = placed.leader
            parts.append(svg.tag("line", class_="axis", x1=x1, y1=y1, x2=x2, y2=y2))
        left, _, right, bottom = placed.box
        parts.append(svg.text((left + right) / 2, bottom - 3, text, "named"))
    return parts


def _percent(value: float) -> str:
    return f"{100 * value:g}%"


def write_front(directory: Path, run: dict[str, Any]) -> Path | None:
    """Write `directory/front.svg`, a picture that needs no other file; None if the run has no points to draw."""
    panels = front_panel(run)
    return write_text(directory / "front.svg", svg_text(alone(panels[0])[1])) if panels else None
