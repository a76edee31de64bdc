"""The plane of the two failures: harmful prompts answered (ASR) across, benign prompts refused (ORR) up.

The corner at the bottom left is perfect, and lines of equal F1 fan out from it. Methods differ in mark and colour. A
legend names them, since names beside crowded points hide what they name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.drawing.placing import Box, overlap
from llmva.report.estimates import Estimate
from llmva.report.study.methods import Method
from llmva.report.values import finite, score, share, strength_text

HEIGHT = 452.0
EQUAL_F1 = (0.5, 0.6, 0.7, 0.8, 0.9)
SHAPES = ("triangle", "square", "diamond", "inverted", "star")


@dataclass(frozen=True)
class Look:
    """How a method is drawn everywhere: colour class and shape. A paper's own setting is hollow."""

    class_: str
    shape: str


def looks(names: Sequence[tuple[str, str | None]]) -> list[Look]:
    """For each (method, setting): the same colour and shape for one method, filled unless the setting is 'paper'."""
    baselines = list(dict.fromkeys(method for method, _ in names if method not in ("none", "llmva")))
    chosen = []
    for method, setting in names:
        if method in ("none", "llmva"):
            class_, shape = ("c-before", "cross") if method == "none" else ("c-after", "dot")
        else:
            at = baselines.index(method)
            class_, shape = f"m-{at % 5}", SHAPES[(at + at // 5) % 5]
        chosen.append(Look(f"{class_} hollow" if setting == "paper" else class_, shape))
    return chosen


def looks_of(rows: Sequence[Method]) -> list[Look]:
    return looks([(row.method, row.setting) for row in rows])


def rates_axes() -> tuple[svg.Axes, list[Markup]]:
    """Axes with ASR across and ORR up, and their frame."""
    on = svg.Axes(
        svg.Scale(0.0, 1.0, svg.LEFT + 10, svg.WIDTH - svg.RIGHT - 10),
        svg.Scale(0.0, 1.0, HEIGHT - svg.BOTTOM - 8, svg.TOP + 8),
        HEIGHT,
    )
    fifths = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    percent = "{:.0%}".format
    parts = on.frame("ASR: harmful prompts answered", "ORR: benign prompts refused", fifths, fifths, percent, percent)
    return on, parts


def plane(rows: Sequence[Method]) -> Markup | None:
    """The chart; None if no row has both ASR and ORR."""
    shown = [
        (row, look, x, y)
        for row, look in zip(rows, looks_of(rows), strict=True)
        if (x := row["asr"].mean) is not None and (y := row["orr"].mean) is not None
    ]
    if not shown:
        return None
    on, parts = rates_axes()
    below, taken = _equal_f1(on, _toxic_per_benign([row for row, *_ in shown]))
    parts += below
    parts += [svg.marker("star", on.x(0), on.y(0), "c-kept", 5, "ideal: answers no harmful, refuses no benign prompt")]
    parts.append(svg.text(on.x(0) + 9, on.y(0) + 5, "ideal", "corner", "start"))
    taken.append((on.x(0) - 7, on.y(0) - 7, on.x(0) + 40, on.y(0) + 8))
    for row, look, x, y in shown:
        parts += _curve(on, row, look)
        parts += _cross(on, row, look, x, y)
    taken += [(on.x(x) - 6, on.y(y) - 6, on.x(x) + 6, on.y(y) + 6) for *_, x, y in shown]
    for row, look, x, y in shown:
        tip = f"{row.name}: ASR {share(x)}, ORR {share(y)}, F1 {score(row['f1'].mean)}"
        parts.append(svg.marker(look.shape, on.x(x), on.y(y), look.class_, 5.5 if row.method == "llmva" else 4.6, tip))
    bounds = (svg.LEFT + 1, svg.TOP - 4, svg.WIDTH - 2, HEIGHT - svg.BOTTOM - 1)
    parts += _strengths(on, [row for row, *_ in shown], taken, bounds)
    described = "; ".join(f"{row.name} ASR {share(x)} ORR {share(y)}" for row, _, x, y in shown)
    drawing = svg.picture("chart-plane", "ASR and ORR of every method", f"{described}.", HEIGHT, parts)
    keys = svg.legend([(row.name, look.shape, look.class_, None) for row, look, *_ in shown])
    return svg.panel("The two failures", keys, drawing)


def _toxic_per_benign(rows: Sequence[Method]) -> float:
    """Harmful test prompts per benign one, from the rates of single seeds: F1 = 2(1 - ORR) / (2 - ORR + k ASR)."""
    ratios = []
    for run in (run for row in rows for run in row.runs):
        f1, asr, orr = (finite(run.get(key)) for key in ("f1", "asr", "orr"))
        if f1 and asr is not None and orr is not None and asr > 0.05:
            ratios.append((2 * (1 - orr) / f1 - 2 + orr) / asr)
    ratio = median(ratios) if ratios else 1.0
    return ratio if ratio > 0.01 else 1.0


def _equal_f1(on: svg.Axes, k: float) -> tuple[list[Markup], list[Box]]:
    """Straight lines ASR = (2c (1 - ORR) - ORR) / k, where c = 1 / F1 - 1, and the boxes of their names."""
    parts, boxes = [], []
    for f1 in EQUAL_F1:
        c = 1 / f1 - 1
        top = 2 * c / (1 + 2 * c)  # ORR where no harmful prompt is answered
        across = min(1.0, 2 * c / k)
        low = max(0.0, (2 * c - k) / (1 + 2 * c))  # ORR at that end
        x, y = on.x(across), on.y(low)
        tip = svg.tag("title", f"F1 = {f1:g}")
        parts.append(svg.tag("line", tip, class_="equal", x1=on.x(0), y1=on.y(top), x2=x, y2=y))
        words = f"F1 {f1:g}" if f1 == EQUAL_F1[-1] or across == 1 else f"{f1:g}"
        if across == 1:
            parts.append(svg.text(x + 8, y - 5, words, "corner", "end"))
            boxes.append((x - 28, y - 16, x + 8, y - 2))
        else:
            parts.append(svg.text(x + 4, y - 4, words, "corner", "start"))
            boxes.append((x + 2, y - 15, x + 8 + 6 * len(words), y))
    return parts, boxes


def _cross(on: svg.Axes, row: Method, look: Look, x: float, y: float) -> list[Markup]:
    """The 95% intervals of ASR and ORR through a point."""
    parts = []
    for value, across in ((row["asr"], True), (row["orr"], False)):
        ends = _clipped(value)
        if ends is not None:
            low, high = ends
            line = (on.x(low), on.y(y), on.x(high), on.y(y)) if across else (on.x(x), on.y(low), on.x(x), on.y(high))
            x1, y1, x2, y2 = line
            parts.append(svg.tag("line", class_=f"bar {look.class_}", x1=x1, y1=y1, x2=x2, y2=y2))
    return parts


def _clipped(value: Estimate) -> tuple[float, float] | None:
    if value.interval is None:
        return None
    return svg.clamped(value.interval[0]), svg.clamped(value.interval[1])


def _spots(on: svg.Axes, row: Method) -> list[tuple[float, float, float]]:
    """(strength, x, y) of the points of a method's curve."""
    return [(p.strength, on.x(p.asr), on.y(p.orr)) for p in row.curve if p.asr is not None and p.orr is not None]


def _curve(on: svg.Axes, row: Method, look: Look) -> list[Markup]:
    """The line along a method's strengths, on validation prompts."""
    spots = _spots(on, row)
    if len(spots) < 2:
        return []
    line = svg.path([(x, y) for _, x, y in spots])
    parts = [svg.tag("polyline", class_=f"curve {look.class_}", points=line)]
    known = [p for p in row.curve if p.asr is not None and p.orr is not None]
    for point, (_, x, y) in zip(known, spots, strict=True):
        at = f"{row.name} at strength {strength_text(point.strength)}"
        tip = f"{at}: ASR {share(point.asr)}, ORR {share(point.orr)} (validation)"
        parts.append(svg.marker("dot", x, y, look.class_, 2.2, tip))
    return parts


def _strengths(on: svg.Axes, rows: Sequence[Method], taken: list[Box], bounds: Box) -> list[Markup]:
    """The strengths along the curves, each where it covers nothing; the others are in the table."""
    parts = []
    for row in rows:
        spots = _spots(on, row) if len(row.curve) > 1 else []
        ends = [spots[0], spots[-1], *spots[1:-1]] if len(spots) > 1 else []
        for strength, x, y in ends:
            words = strength_text(strength)
            width = 5.4 * len(words) + 2
            for dx, dy in (
                (5 + width / 2, -6),
                (-5 - width / 2, -6),
                (5 + width / 2, 7),
                (-5 - width / 2, 7),
                (0, -10),
            ):
                box = (x + dx - width / 2, y + dy - 5, x + dx + width / 2, y + dy + 5)
                inside = bounds[0] < box[0] and box[2] < bounds[2] and bounds[1] < box[1] and box[3] < bounds[3]
                if inside and not any(overlap(box, other) for other in taken):
                    parts.append(svg.text(x + dx, y + dy + 3.5, words, "strength"))
                    taken.append(box)
                    break
    return parts
