"""Many settings below each other, with a few rates beside each: where each rate was before, and where it is after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.values import share

LINE = 24.0
LETTER = 6.6
MAX_NAMES = 168.0  # of the width, for names
GAP = 26.0  # between two columns
Pair = tuple[float | None, float | None]  # before and after


@dataclass(frozen=True)
class Line:
    """A setting: a pair for each column, None where it has no such rate. `strong` names stand out."""

    name: str
    rates: tuple[Pair | None, ...]
    strong: bool = False


def glance(key: str, title: str, columns: Sequence[str], lines: Sequence[Line]) -> Markup | None:
    """The figure with its legend, 0% to 100% across in each column; None without a known rate."""
    pairs = [pair for line in lines for pair in line.rates if pair is not None]
    if all(value is None for pair in pairs for value in pair):
        return None
    left = min(14 + LETTER * max(len(line.name) for line in lines), MAX_NAMES)
    wide = (svg.WIDTH - left - GAP * len(columns)) / len(columns)
    starts = [left + GAP / 2 + number * (wide + GAP) for number in range(len(columns))]
    scales = [svg.Scale(0.0, 1.0, start, start + wide) for start in starts]
    top, bottom = svg.TOP + 2, svg.TOP + 2 + LINE * len(lines)
    parts: list[Markup] = []
    for name, across in zip(columns, scales, strict=True):
        parts.append(svg.text((across.start + across.end) / 2, 14, name, "flagged"))
        for at in (0.0, 0.5, 1.0):
            parts.append(svg.tag("line", class_="grid", x1=across(at), x2=across(at), y1=top, y2=bottom))
            parts.append(svg.text(across(at), bottom + 15, f"{100 * at:.0f}%", "tick"))
    longest = int((left - 8) / LETTER)
    for number, line in enumerate(lines):
        y = top + LINE * (number + 0.5)
        name = line.name if len(line.name) <= longest else line.name[: longest - 1] + "…"
        full = svg.tag("title", line.name) + name
        parts.append(svg.text(4, y + 4, full, "flagged" if line.strong else "tick", "start"))
        for column, across, pair in zip(columns, scales, line.rates, strict=True):
            parts += _marks(f"{line.name}, {column}", pair, across, y)
    described = "; ".join(f"{line.name}: {_words(columns, line)}" for line in lines)
    drawing = svg.picture(key, title, f"{described}.", bottom + 22, parts)
    edited = any(after is not None for _, after in pairs)
    items = [("before", "ring", "c-before", None), ("after", "dot", "c-after", None)]
    return svg.panel(title, svg.legend(items if edited else items[:1]), drawing)


def _marks(of: str, pair: Pair | None, across: svg.Scale, y: float) -> list[Markup]:
    before, after = (None, None) if pair is None else pair
    parts = []
    if before is not None and after is not None:
        ends = [across(svg.clamped(value)) for value in (before, after)]
        parts.append(svg.tag("line", class_="line c-before", x1=ends[0], x2=ends[1], y1=y, y2=y))
    for value, when, shape in ((before, "before", "ring"), (after, "after", "dot")):
        if value is not None:
            tip = f"{of} {when}: {share(value)}"
            parts.append(svg.marker(shape, across(svg.clamped(value)), y, f"c-{when}", 4.4, tip))
    return parts


def _words(columns: Sequence[str], line: Line) -> str:
    told = []
    for column, pair in zip(columns, line.rates, strict=True):
        if pair is not None and pair != (None, None):
            after = "" if pair[1] is None else f", {share(pair[1])} after"
            told.append(f"{column} {share(pair[0])} before{after}")
    return ", ".join(told) or "not known"
