"""A list of estimates with their intervals, one below the other: names left, values right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.estimates import Estimate, Unit

LINE = 25.0
LETTER = 6.5
MIN_WIDTH = 190.0  # of the part with the marks


@dataclass(frozen=True)
class Entry:
    """One line: a name, an estimate, its values in single seeds (drawn as dots), and the mark's look."""

    name: str
    value: Estimate
    class_: str
    shape: str = "dot"
    seeds: tuple[float, ...] = ()
    heading: bool = False  # a name above a group, without an estimate
    strong: bool = False  # the name stands out


def forest(
    key: str, title: str, entries: Sequence[Entry], unit: Unit, x_label: str, reference: tuple[str, float] | None = None
) -> Markup | None:
    """The chart, 0 to 1 across; None without a known value. `reference` is a name and a value, drawn as a line down."""
    if all(entry.value.mean is None for entry in entries):
        return None
    left = min(24 + LETTER * max(len(entry.name) for entry in entries), svg.WIDTH - 56 - MIN_WIDTH)
    right = svg.WIDTH - 56.0
    top = svg.TOP + (4 if reference else -14)
    bottom = top + LINE * len(entries)
    across = svg.Scale(0.0, 1.0, left + 6, right - 6)
    parts = []
    for at in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(svg.tag("line", class_="grid", x1=across(at), x2=across(at), y1=top, y2=bottom))
        words = f"{100 * at:.0f}%" if unit.text(0.5).endswith("%") else f"{at:g}"
        parts.append(svg.text(across(at), bottom + 15, words, "tick"))
    parts.append(svg.text((left + right) / 2, bottom + 33, x_label, "label"))
    if reference is not None:
        spot = across(svg.clamped(reference[1]))
        parts.append(svg.tag("line", class_="boundary", x1=spot, x2=spot, y1=top - 4, y2=bottom))
        parts.append(svg.text(spot, top - 9, f"{reference[0]}: {unit.text(reference[1])}", "tick"))
    longest = int((left - 20) / LETTER)
    for number, entry in enumerate(entries):
        y = top + LINE * (number + 0.5)
        parts += _line(entry, y, across, unit, longest)
    described = "; ".join(f"{entry.name} {unit.words(entry.value)}" for entry in entries if not entry.heading)
    return svg.picture(key, title, f"{described}.", bottom + 42, parts)


def _line(entry: Entry, y: float, across: svg.Scale, unit: Unit, longest: int) -> list[Markup]:
    name = entry.name if len(entry.name) <= longest else entry.name[: max(1, longest - 1)] + "…"
    if entry.heading:
        return [svg.text(4, y + 4, name, "flagged", "start")]
    parts = [svg.marker(entry.shape, 9, y, entry.class_, 4.4)]
    parts.append(
        svg.text(19, y + 4, svg.tag("title", entry.name) + name, "flagged" if entry.strong else "tick", "start")
    )
    for value in entry.seeds if len(entry.seeds) > 1 else ():
        parts.append(svg.tag("circle", class_=f"seed {entry.class_}", cx=across(svg.clamped(value)), cy=y + 7, r=1.8))
    if entry.value.interval is not None:
        x1, x2 = (across(svg.clamped(end)) for end in entry.value.interval)
        parts.append(svg.tag("line", class_=f"bar {entry.class_}", x1=x1, x2=x2, y1=y, y2=y))
    if entry.value.mean is not None:
        tip = f"{entry.name}: {unit.words(entry.value)}"
        parts.append(svg.marker(entry.shape, across(svg.clamped(entry.value.mean)), y, entry.class_, 4.4, tip))
    parts.append(svg.text(svg.WIDTH - 4, y + 4, unit.text(entry.value.mean), "flagged", "end"))
    return parts
