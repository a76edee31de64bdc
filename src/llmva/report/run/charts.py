"""The report's charts, drawn from `run.json`. One without data is left out, and the page says what is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.values import MINUS, dicts, finite, part, share

KINDS = (("attention", "Attention"), ("mlp", "MLP"))
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
CLASSES = (  # benign, label -> words, mark, colour class
    (True, "answered", "benign, answered", "dot", "c-benign"),
    (True, "refused", "benign, refused", "ring", "c-benign"),
    (False, "answered", "harmful, answered", "triangle", "c-toxic"),
    (False, "refused", "harmful, refused", "cross", "c-toxic"),
    (None, "garbled", "garbled", "diamond", "c-muted"),
)


@dataclass(frozen=True)
class Sublayer:
    """Position in `run["sublayers"]`, block number and kind ('attention' or 'mlp')."""

    index: int
    name: str
    block: int
    kind: str


def sublayers(run: dict[str, Any]) -> list[Sublayer]:
    """The run's sublayers. A block is the first number in the module's name; without one, its place among its kind."""
    names, kinds = run.get("sublayers") or [], run.get("kinds") or []
    layers: list[Sublayer] = []
    for index, name in enumerate(names):
        kind = str(kinds[index]) if index < len(kinds) else KINDS[index % 2][0]
        number = re.search(r"\d+", str(name))
        block = int(number.group()) if number else sum(other.kind == kind for other in layers)
        layers.append(Sublayer(index, str(name), block, kind))
    return layers


def iterations(run: dict[str, Any]) -> list[dict[str, Any]]:
    return dicts(run.get("iterations"))


def number_of(entry: dict[str, Any], position: int) -> int:
    number = finite(entry.get("iteration"))
    return position if number is None else int(number)


def best(run: dict[str, Any]) -> int | None:
    number = finite(run.get("best_iteration"))
    return None if number is None else int(number)


def alignments(run: dict[str, Any], chosen: int) -> list[dict[str, Any]]:
    """The iterations whose columns are in the edit as of iteration `chosen`."""
    entries = [(number_of(entry, i), entry) for i, entry in enumerate(iterations(run))]
    return [entry for number, entry in entries if number < chosen and not entry.get("undone")]


def edited(run: dict[str, Any], chosen: int) -> set[int]:
    """Indices of the sublayers that the edit as of iteration `chosen` changes."""
    return {index for entry in alignments(run, chosen) for index in entry.get("selected") or []}


def at(values: object, index: int) -> float | None:
    """`values[index]` where that is a finite number."""
    return finite(values[index]) if isinstance(values, list) and 0 <= index < len(values) else None


# --- F1, ASR, ORR by iteration and by strength ------------------------------------------------------------------

Style = tuple[str, str, str, str, str]  # name, field of run.json, colour class, mark, dashes
FALLING: tuple[Style, ...] = (
    ("ASR, harmful answered", "asr", "c-toxic", "triangle", ""),
    ("ORR, benign refused", "orr", "c-orr", "ring", "6 3"),
    ("garbled", "garbled", "c-muted", "diamond", "2 3"),
)
F1: Style = ("F1", "f1", "c-f1", "dot", "")
KEPT: Style = ("next tokens kept", "kept", "c-kept", "square", "6 3")


def progress(run: dict[str, Any]) -> list[Markup]:
    """Two panels over iterations: what should rise (F1, next tokens kept) and what should fall (ASR, ORR, garbled)."""
    entries = [(float(number_of(entry, i)), entry) for i, entry in enumerate(iterations(run))]
    panels = []
    for name, title, styles in (("rise", "Should rise", (F1, KEPT)), ("fall", "Should fall", FALLING)):
        series = _series(entries, styles)
        if series:
            panels.append(_progress_panel(name, title, series, best(run)))
    return panels


def _progress_panel(name: str, title: str, series: list[svg.Series], chosen: int | None) -> Markup:
    last = max(x for line in series for x, _ in line.points)
    on = svg.axes((0.0, last), (0.0, 1.0))
    parts = on.frame("iteration (0 = untouched model)", "", svg.ticks(0, last, 8, whole=True), QUARTERS, _percent)
    if chosen is not None and chosen <= last:
        parts += svg.flag(on, chosen, f"chosen: {chosen}")
    for line in series:
        parts += svg.polyline(line, on, lambda x, y: f"iteration {x:.0f}: {share(y)}")
    words = f"Validation figures by iteration: {_ends(series)}."
    drawing = svg.picture(f"chart-{name}", title, words, on.height, parts)
    return svg.panel(title, svg.legend_of(series), drawing)


def strengths(run: dict[str, Any]) -> list[Markup]:
    """One panel: the chosen edit from none of it (0) over as fitted (1) to more, on validation prompts."""
    rows = dicts(run.get("strengths"))
    known = sorted(((x, row) for row in rows if (x := _strength(row)) is not None), key=lambda pair: pair[0])
    series = _series(known, (F1, *FALLING))
    if not series or len(known) < 2:
        return []
    low, high = known[0][0], known[-1][0]
    on = svg.axes((low, high), (0.0, 1.0))
    marks = [x for x, _ in known] if len(known) <= 8 else svg.ticks(low, high, 8)
    parts = on.frame("strength", "", marks, QUARTERS, _percent)
    if low <= 1 <= high:
        parts += svg.flag(on, 1.0, "as fitted: 1")
    for line in series:
        parts += svg.polyline(line, on, lambda x, y: f"strength {svg.plain(x)}: {share(y)}")
    words = f"Validation figures by strength: {_ends(series)}."
    drawing = svg.picture("chart-strength", "Strength", words, on.height, parts)
    return [svg.panel("Strength of the chosen edit", svg.legend_of(series), drawing)]


def _series(rows: Sequence[tuple[float, dict[str, Any]]], styles: Sequence[Style]) -> list[svg.Series]:
    """The lines of the fields that are known at some x; garbled answers only where there are any."""
    series = []
    for name, key, class_, shape, dashes in styles:
        points = [(x, finite(row.get(key))) for x, row in rows]
        if any(y is not None for _, y in points) and (key != "garbled" or any(y for _, y in points)):
            series.append(svg.Series(name, points, class_, shape, dashes))
    return series


def _ends(series: Sequence[svg.Series]) -> str:
    """'F1 from 57.1% to 96.7%; ...'."""
    return "; ".join(f"{line.name} {_from_to([y for _, y in line.points])}" for line in series)


def _from_to(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"from {share(known[0])} to {share(known[-1])}" if known else "not known"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _strength(row: dict[str, Any]) -> float | None:
    x = finite(row.get("strength"))
    return x if x is not None and x >= 0 else None


# --- The angle between v_a and v_b (the paper's Figure 1) --------------------------------------------------------


def angles(run: dict[str, Any]) -> list[Markup]:
    """A panel for attention, one for MLP: degrees between answer and benign vector by block, before and after."""
    entries = {number_of(entry, i): entry for i, entry in enumerate(iterations(run))}
    chosen, now = best(run), "after"
    if chosen is None and entries:  # not finished: show how far it got
        chosen, now = max(entries), "so far"
    before = entries.get(0, {}).get("angles")
    after = entries.get(chosen, {}).get("angles") if chosen else None
    within = edited(run, chosen or 0)
    every = [finite(a) for values in (before, after) if isinstance(values, list) for a in values]
    highest = max((a for a in every if a is not None), default=0.0)
    top = 180.0 if highest > 90 else 90.0
    panels = []
    for kind, title in KINDS:
        layers = [layer for layer in sublayers(run) if layer.kind == kind]
        series = []
        for name, values, class_, dashes in (("before", before, "c-before", "5 3"), (now, after, "c-after", "")):
            points = [(float(layer.block), at(values, layer.index)) for layer in layers]
            shapes = ["dot" if layer.index in within and name == now else "ring" for layer in layers]
            if any(y is not None for _, y in points):
                series.append(svg.Series(name, points, class_, "ring", dashes, shapes))
        if series:
            panels.append(_angle_panel(kind, title, series, top, bool(within)))
    return panels


def _angle_panel(kind: str, title: str, series: list[svg.Series], top: float, edited: bool) -> Markup:
    blocks = [x for line in series for x, _ in line.points]
    on = svg.axes((min(blocks), max(blocks)), (0.0, top), 250)
    marks = [0.0, 30.0, 60.0, 90.0] if top == 90 else [0.0, 45.0, 90.0, 135.0, 180.0]
    parts = on.frame("block", "", svg.ticks(min(blocks), max(blocks), 9, whole=True), marks, lambda v: f"{v:.0f}°")
    for line in series:
        parts += svg.polyline(line, on, lambda x, y: f"block {x:.0f}: {y:.1f}°")
    means = []
    for line in series:
        known = [y for _, y in line.points if y is not None]
        means.append(f"{line.name}, {sum(known) / len(known):.1f}° on average")
    words = f"Angle between answer and benign vector, {title} sublayers: {'; '.join(means)}."
    keys = [(means[i], "ring", line.class_, line.dashes) for i, line in enumerate(series)]
    if edited and len(series) > 1:
        keys.append(("edited sublayer", "dot", "c-after", None))
    drawing = svg.picture(f"chart-angle-{kind}", title, words, on.height, parts)
    return svg.panel(f"{title}: angle of answer and benign vector", svg.legend(keys), drawing)


# --- Scores and selection -----------------------------------------------------------------------------------------


def scores(run: dict[str, Any]) -> list[Markup]:
    """A heat map of sublayer scores for attention, one for MLP: a row per iteration, a ring on what was then edited."""
    entries = [(number_of(entry, i), entry) for i, entry in enumerate(iterations(run)) if entry.get("scores")]
    layers = sublayers(run)
    known = [v for _, entry in entries for layer in layers if (v := at(entry["scores"], layer.index)) is not None]
    if not known:
        return []
    limits = (min(known), max(known))
    return [
        _score_panel(title, kind_layers, entries, limits, best(run))
        for kind, title in KINDS
        if (kind_layers := [layer for layer in layers if layer.kind == kind])
    ]


def _score_panel(
    title: str,
    layers: list[Sublayer],
    entries: list[tuple[int, dict[str, Any]]],
    limits: tuple[float, float],
    chosen: int | None,
) -> Markup:
    width = min((svg.WIDTH - svg.LEFT - svg.RIGHT) / len(layers), 60.0)
    height = min(max(8.0, 300.0 / len(entries)), 20.0)
    bottom = svg.TOP + height * len(entries)
    values = [[at(entry["scores"], layer.index) for layer in layers] for _, entry in entries]
    chosen_sets = [set(entry.get("selected") or []) for _, entry in entries]
    marked = [frozenset(c for c, layer in enumerate(layers) if layer.index in one) for one in chosen_sets]

    def say(row: int, column: int) -> str:
        value = values[row][column]
        words = "not known" if value is None else f"{value:.3f}"
        picked = ", edited" if column in marked[row] else ""
        return f"iteration {entries[row][0]}, block {layers[column].block}: score {words}{picked}"

    parts = svg.cells(values, marked, limits, say, svg.LEFT, svg.TOP, width, height)
    every = 1 if height >= 12 else 5
    for row, (number, _) in enumerate(entries):
        if number % every == 0:
            parts.append(svg.text(svg.LEFT - 7, svg.TOP + (row + 0.5) * height + 4, str(number), "tick", "end"))
    right = svg.LEFT + width * len(layers)
    step = max(1, math.ceil(22 / width))
    step = next(nice for nice in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000) if nice >= step)
    for column, layer in enumerate(layers):
        if column % step == 0:
            parts.append(svg.text(svg.LEFT + (column + 0.5) * width, bottom + 15, str(layer.block), "tick"))
    parts.append(svg.text(4, 12, "iteration", "label", "start"))
    parts.append(svg.text((svg.LEFT + right) / 2, bottom + 34, "block", "label"))
    rows_in = sum(number < chosen for number, _ in entries) if chosen else 0
    if chosen is not None and rows_in < len(entries):
        y = svg.TOP + rows_in * height - 0.4
        parts.append(svg.tag("line", class_="flag", x1=svg.LEFT - 24, x2=right, y1=y, y2=y))
    words = f"{title} sublayers: score by iteration and block, from {limits[0]:.2f} (pale) to {limits[1]:.2f} (dark)."
    drawing = svg.picture(f"chart-scores-{layers[0].kind}", title, words, bottom + 42, parts)
    ends = [f"{end:.2f}".replace("-", MINUS) for end in limits]
    keys = [(f"score {ends[0]}", "square", "c-low", None), (f"score {ends[1]}", "square", "c-after", None)]
    return svg.panel(f"{title}: scores", svg.legend([*keys, ("edited", "ring", "c-ink", None)]), drawing)


# --- Projections (the paper's Figure 2) ---------------------------------------------------------------------------


def projections(run: dict[str, Any]) -> list[Markup]:
    """Two panels on one scale, before and after: each prompt at (o.v_a, o.v_b).

    The lines through 0 are the decision boundaries.
    """
    sides = []
    for key, title in (("before", "Before"), ("after", "After")):
        side = part(run, "projections", key)
        points = [point for raw in side.get("points") or [] if (point := _point(raw)) is not None]
        if points:
            sides.append((key, title, str(side.get("sublayer", "")), points))
    every = [point for *_, points in sides for point in points]
    if not every:
        return []
    across, up = _limits([point[0] for point in every]), _limits([point[1] for point in every])  # of both alike
    return [_projection_panel(*side, across, up) for side in sides]


Spot = tuple[float, float, bool, str]  # o·v_a, o·v_b, benign, label
Range = tuple[float, float]


def _projected(vector: str, meaning: str) -> Markup:
    """An axis label: o·v with the vector's letter below the line."""
    return (
        svg.tag("tspan", "o·v") + svg.tag("tspan", vector, dy=3, font_size=9) + svg.tag("tspan", f" ({meaning})", dy=-3)
    )


def _point(raw: object) -> Spot | None:
    if not isinstance(raw, (list, tuple)) or len(raw) != 4:
        return None
    x, y = finite(raw[0]), finite(raw[1])
    return None if x is None or y is None else (x, y, bool(raw[2]), str(raw[3]))


def _limits(values: list[float]) -> Range:
    """Room for nearly all values and for 0. Far outliers (real models have them) are cut off rather than let everything
    else shrink to a dot: past three times the central 96%, the range stops there."""
    ordered = sorted(values)
    low, high = ordered[int(0.02 * (len(ordered) - 1))], ordered[math.ceil(0.98 * (len(ordered) - 1))]
    low, high = min(low, 0.0), max(high, 0.0)
    full = (min(ordered[0], 0.0), max(ordered[-1], 0.0))
    if full[1] - full[0] <= 3 * (high - low):
        low, high = full
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def _projection_panel(key: str, title: str, sublayer: str, points: list[Spot], across: Range, up: Range) -> Markup:
    on = svg.axes(across, up, 330, inset=0)
    parts = on.frame(
        _projected("a", "right: answers"),
        _projected("b", "up: benign"),
        svg.ticks(*across, 6),
        svg.ticks(*up, 6),
    )
    left, right, top, bottom = svg.LEFT, svg.WIDTH - svg.RIGHT, svg.TOP, on.height - svg.BOTTOM
    parts.append(svg.tag("line", class_="boundary", x1=on.x(0), x2=on.x(0), y1=top, y2=bottom))
    parts.append(svg.tag("line", class_="boundary", x1=left, x2=right, y1=on.y(0), y2=on.y(0)))
    parts.append(svg.text(left + 4, top + 12, "benign yet refused", "corner", "start"))
    parts.append(svg.text(right - 4, bottom - 8, "harmful yet answered", "corner", "end"))
    keys, counts, outside = [], [], 0
    for benign, label, words, shape, class_ in CLASSES:
        members = [p for p in points if p[3] == label and (benign is None or p[2] == benign)]
        for x, y, _, _ in members:
            held = min(max(x, across[0]), across[1]), min(max(y, up[0]), up[1])
            outside += held != (x, y)
            parts.append(svg.marker(shape, on.x(held[0]), on.y(held[1]), class_, 3.6))
        if members or benign is not None:
            keys.append((f"{words}: {len(members)}", shape, class_, None))
            counts.append(f"{words} {len(members)}")
    heading = f"{title}, {sublayer}" if sublayer else title
    words = f"Projections on the answer and benign vectors {title.lower()} the edit; {', '.join(counts)}."
    if outside:
        keys.append((f"{outside} far outside, drawn at the edge", "", "", None))
    drawing = svg.picture(f"chart-projection-{key}", heading, words, on.height, parts)
    return svg.panel(title, svg.legend(keys), drawing, sublayer)
