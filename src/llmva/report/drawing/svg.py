"""Small charts as inline SVG: lines, points, cells. Nothing here knows what it shows.

Colours are CSS classes (`style.css` defines them for light, dark and print), so one drawing serves all three. Every
text goes through `escape`. Charts are drawn 460 units wide, which keeps 12-unit text readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 460
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 22, 44  # margins around the plotting area
PALEST = 0.06  # opacity of the lowest value of a heat map

Point = tuple[float, "float | None"]


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """One SVG or HTML element. `class_` and `font_size` become `class` and `font-size`; None is left out."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    inner = "".join(str(escape(child)) for child in children)
    return Markup("".join(parts) + f">{inner}</{name}>")


def join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end] linearly; the middle where low equals high."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, maximum: int = 6, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], at most `maximum` of them."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / maximum))
    steps = [power * factor for factor in (1, 2, 5, 10, 20, 50) if not whole or (power * factor) % 1 == 0]
    if not steps:
        steps = [1.0]
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= maximum:
            break
    return [index * step for index in range(first, last + 1)]


def clamped(value: float) -> float:
    """The value, or the nearer end of [0, 1] if it is outside."""
    return min(1.0, max(0.0, value))


def path(spots: Sequence[tuple[float, float]]) -> str:
    """The points of a polyline."""
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in spots)


def plain(value: float) -> str:
    """A tick label without noise: 0.30000000000000004 -> '0.3', -1.0 -> '−1'."""
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def marker(shape: str, x: float, y: float, class_: str, radius: float = 4.0, tip: str | None = None) -> Markup:
    """A mark: 'dot', 'ring', 'square', 'triangle', 'inverted', 'diamond', 'star', 'cross'; the pointer shows `tip`."""
    children = (tag("title", tip),) if tip else ()
    r = radius
    if shape in ("dot", "ring"):
        return tag("circle", *children, class_=f"mark {shape} {class_}", cx=x, cy=y, r=r)
    points = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1.15), (1.05, 0.8), (-1.05, 0.8)],
        "inverted": [(0, 1.15), (1.05, -0.8), (-1.05, -0.8)],
        "star": [
            (far * math.sin(i * math.pi / 5), -far * math.cos(i * math.pi / 5))
            for i, far in enumerate([1.45, 0.65] * 5)
        ],
        "diamond": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    }
    if shape == "cross":
        outline = "".join(f"M{x - s * r:.2f} {y - r:.2f}L{x + s * r:.2f} {y + r:.2f}" for s in (0.9, -0.9))
    else:
        outline = "M" + "L".join(f"{x + r * dx:.2f} {y + r * dy:.2f}" for dx, dy in points[shape]) + "Z"
    return tag("path", *children, class_=f"mark {shape} {class_}", d=outline)


def picture(name: str, title: str, description: str, height: float, parts: Sequence[Markup]) -> Markup:
    """The <svg> around a drawing. `name` must be unique in the document; screen readers get title and description."""
    head = (tag("title", title, id=f"{name}-t"), tag("desc", description, id=f"{name}-d"))
    return tag(
        "svg",
        *head,
        *parts,
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        role="img",
        aria_labelledby=f"{name}-t {name}-d",
        class_="chart",
    )


def text(x: float, y: float, words: str | Markup, class_: str = "", anchor: str = "middle", **more: object) -> Markup:
    return tag("text", words, x=x, y=y, class_=class_ or None, text_anchor=anchor, **more)


@dataclass(frozen=True)
class Axes:
    """A plotting area with its two scales; `frame` draws grid, ticks and labels."""

    x: Scale
    y: Scale
    height: float

    def frame(
        self,
        x_label: str | Markup,
        y_label: str | Markup,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        y_format: Callable[[float], str] = plain,
        x_format: Callable[[float], str] = plain,
    ) -> list[Markup]:
        bottom = self.height - BOTTOM
        parts = []
        for value in y_ticks:
            y = self.y(value)
            parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
            parts.append(text(LEFT - 7, y + 4, y_format(value), "tick", "end"))
        for value in x_ticks:
            x = self.x(value)
            parts.append(tag("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
            parts.append(text(x, bottom + 17, x_format(value), "tick"))
        parts.append(tag("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
        parts.append(text((LEFT + WIDTH - RIGHT) / 2, self.height - 8, x_label, "label"))
        parts.append(text(4, 12, y_label, "label", "start"))
        return parts


def axes(x: tuple[float, float], y: tuple[float, float], height: float = 270, inset: float = 10) -> Axes:
    """Scales for data in [x] by [y]; `inset` keeps marks off the frame's left and right edges."""
    across = Scale(*x, LEFT + inset, WIDTH - RIGHT - inset)
    return Axes(across, Scale(*y, height - BOTTOM, TOP), height)


@dataclass(frozen=True)
class Series:
    """One line of a line chart: points in order of x, None where y is not known (the line breaks there).

    `dashes` is an SVG dash pattern; `shapes` gives a mark per point where it differs from `shape`.
    """

    name: str
    points: Sequence[Point]
    class_: str
    shape: str = "dot"
    dashes: str | None = None
    shapes: Sequence[str] | None = None


def polyline(series: Series, on: Axes, say: Callable[[float, float], str], radius: float = 3.6) -> list[Markup]:
    """The line of a series and its marks; `say` turns one point into the words shown under the pointer."""
    runs: list[list[tuple[float, float]]] = [[]]
    marks = []
    for index, (x, y) in enumerate(series.points):
        if y is None:
            runs.append([])
            continue
        spot = (on.x(x), on.y(y))
        runs[-1].append(spot)
        shape = series.shapes[index] if series.shapes else series.shape
        marks.append(marker(shape, *spot, series.class_, radius, f"{series.name}, {say(x, y)}"))
    lines = [
        tag(
            "polyline",
            class_=f"line {series.class_}",
            points=path(run),
            stroke_dasharray=series.dashes,
        )
        for run in runs
        if len(run) > 1
    ]
    return lines + marks


def flag(on: Axes, x: float, words: str) -> list[Markup]:
    """A vertical line at x with a word on top of it, kept inside the picture."""
    spot = on.x(x)
    anchor = "start" if spot < WIDTH * 0.25 else "end" if spot > WIDTH * 0.75 else "middle"
    return [
        tag("line", class_="flag", x1=spot, x2=spot, y1=TOP - 4, y2=on.height - BOTTOM),
        text(spot, TOP - 9, words, "flagged", anchor),
    ]


def cells(
    values: Sequence[Sequence[float | None]],
    marked: Sequence[frozenset[int]],
    limits: tuple[float, float],
    say: Callable[[int, int], str],
    x0: float,
    y0: float,
    width: float,
    height: float,
) -> list[Markup]:
    """A heat map: one row per entry of `values`, shade by value within `limits`, a ring on the marked columns.

    A value that is not known is a hatched cell. Shade is opacity, so that it fades into the page, light or dark.
    """
    shade = Scale(*limits, PALEST, 1.0)
    ring = min(3.4, 0.25 * min(width, height))
    parts = []
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            x, y = x0 + column * width, y0 + row * height
            box = {"x": x, "y": y, "width": max(width - 0.8, 0.5), "height": height - 0.8}
            tip = tag("title", say(row, column))
            if value is None:
                parts.append(tag("rect", tip, class_="cell unknown", **box))
            else:
                parts.append(tag("rect", tip, class_="cell", fill_opacity=shade(value), **box))
            if column in marked[row]:
                parts.append(tag("circle", class_="chosen", cx=x + width / 2 - 0.4, cy=y + height / 2 - 0.4, r=ring))
    return parts


def whiskers(before: float | None, after: float | None, ends: Sequence[tuple[float, float] | None]) -> Markup:
    """A table cell's drawing of two values in [0, 1] with their intervals: ring above is before, dot below is after."""
    width, height = 150.0, 26.0
    scale = Scale(0.0, 1.0, 6.0, width - 6)
    parts = [tag("line", class_="grid", x1=scale(at), x2=scale(at), y1=1, y2=height - 1) for at in (0.0, 0.5, 1.0)]
    pairs = ((before, ends[0], 8.0, "ring", "c-before"), (after, ends[1], 18.0, "dot", "c-after"))
    for value, pair, y, shape, class_ in pairs:
        if pair is not None:
            x1, x2 = (scale(clamped(end)) for end in pair)
            parts.append(tag("line", class_=f"line {class_}", x1=x1, x2=x2, y1=y, y2=y))
        if value is not None:
            parts.append(marker(shape, scale(clamped(value)), y, class_, 3.8))
    return tag("svg", *parts, viewBox=f"0 0 {width:.0f} {height:.0f}", class_="whiskers", aria_hidden="true")


def legend(items: Sequence[tuple[str, str, str, str | None]]) -> Markup:
    """A list of (words, mark, class, dashes) beside the chart, as HTML so that it wraps. An empty mark draws none."""
    entries = []
    for words, shape, class_, dashes in items:
        parts = []
        if dashes is not None:
            line = tag("line", class_=f"line {class_}", x1=1, x2=27, y1=7, y2=7, stroke_dasharray=dashes or None)
            parts.append(line)
        if shape:
            parts.append(marker(shape, 14, 7, class_))
        box = "0 0 28 14" if dashes is not None else "7 0 14 14"
        icon = tag("svg", *parts, viewBox=box, class_="key", aria_hidden="true") if parts else ""
        entries.append(tag("li", icon, " ", words))
    return tag("ul", *entries, class_="legend")


def legend_of(series: Sequence[Series]) -> Markup:
    """The legend of a line chart."""
    return legend([(line.name, line.shape, line.class_, line.dashes) for line in series])


def panel(title: str, legend: Markup, drawing: Markup, note: str = "") -> Markup:
    """An HTML figure: heading, legend, drawing. `note` stands as code beside the heading."""
    small = tag("code", note) if note else Markup("")
    return tag("figure", tag("figcaption", tag("strong", title), " ", small), legend, drawing)
