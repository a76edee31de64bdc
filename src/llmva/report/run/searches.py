"""What the searches of `llmva evaluate --adaptive` found: sentences, and curves of the share that fell."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.values import counted, finite, part, share

KINDS = {"adaptive": ("transforms", "answer"), "suffix": ("suffixes", "step")}  # field: what is searched, its unit
WHEN = (("before", "without the edit"), ("after", "with it"))


def search_notes(record: dict[str, Any]) -> list[str]:
    """A paragraph on each search in the record: what fell, and after how many answers or steps half had."""
    return [_note(field, record[field]) for field in KINDS if isinstance(record.get(field), dict)]


def _note(field: str, of: dict[str, Any]) -> str:
    over, unit = KINDS[field]
    budget = int(finite(of.get("budget")) or 0)
    said = []
    for when, words in WHEN:
        one = part(of, when)
        if finite(one.get("fallen")) is None:
            continue
        never = int(finite(one.get("censored")) or 0)
        rest = f", {never} never did" if never else ""
        said.append(f"{share(one['fallen'])} of {one['n']} fell {words}, {_half(one.get('half'), unit, budget)}{rest}")
    if not said:
        return f"Search over {over}: there was no toxic prompt to search with."
    first = f"Search over {over}, at most {counted(budget, unit)} to a toxic prompt: {'; '.join(said)}."
    return " ".join([first, *_by_chance(of), *_factors(of, unit, budget)])


def _by_chance(of: dict[str, Any]) -> list[str]:
    """What words do that were drawn and not searched."""
    shares = [(finite(part(of, when, "drawn").get("fallen")), words) for when, words in WHEN]
    said = [f"{share(fallen)} {words}" for fallen, words in shares if fallen is not None]
    told = "Of those that are refused as they stand, the drawn suffix alone, before any step, makes it answer"
    return [f"{told} {', '.join(said)}."] if said else []


def _half(half: object, unit: str, budget: int) -> str:
    reached = finite(half)
    if reached is None:
        return f"half not within {counted(budget, unit)}"
    return "half as they stand" if reached == 0 else f"half by {unit} {reached:.0f}"


def _factors(of: dict[str, Any], unit: str, budget: int) -> list[str]:
    """How many times as many steps half of the prompts take with the edit, of those that both models refuse."""
    refused = part(of, "refused")
    n = int(finite(refused.get("n")) or 0)
    if "after" not in of or not refused:
        return []
    if not n:
        return ["No prompt is refused as it stands both without and with the edit, so no steps compare."]
    ends = [_half(refused.get(when), unit, budget) for when, _ in WHEN]
    told = f"Of the {n} that are refused as they stand by both: {ends[0]} without the edit, {ends[1]} with it"
    ratio = finite(refused.get("ratio"))
    if ratio is None:
        return [f"{told}, so the budget is too small for a factor."]
    return [f"{told}, {'at least ' * bool(refused.get('at_least'))}{ratio:.3g} times the steps."]


def search_panels(record: dict[str, Any]) -> list[Markup]:
    """A figure for each search: the share of toxic prompts that fell, by the number of answers or steps."""
    drawn = [_panel(field, record[field]) for field in KINDS if isinstance(record.get(field), dict)]
    return [panel for panel in drawn if panel is not None]


def _panel(field: str, of: dict[str, Any]) -> Markup | None:
    over, unit = KINDS[field]
    first = 0 if field == "suffix" else 1
    looks = {"before": ("ring", "6 3"), "after": ("dot", "")}
    series = []
    for when, words in WHEN:
        shares = part(of, when).get("by_step" if field == "suffix" else "by_try")
        if isinstance(shares, list) and shares:
            points = [(float(x), finite(y)) for x, y in enumerate(shares, first)]
            series.append(svg.Series(words, points, f"c-{when}", *looks[when]))
    if not series:
        return None
    last = max(x for line in series for x, _ in line.points)
    on = svg.axes((float(first), last), (0.0, 1.0), 230)
    marks = svg.ticks(first, last, 8, whole=True)
    parts = on.frame(f"{unit}s", "", marks, (0.0, 0.5, 1.0), lambda y: f"{100 * y:.0f}%")
    for line in series:
        parts += svg.polyline(line, on, lambda x, y: f"{unit} {x:.0f}: {share(y)}")
    title = f"Harmful prompts that fell, search over {over}"
    drawing = svg.picture(f"chart-search-{field}", title, _note(field, of), on.height, parts)
    return svg.panel(title, svg.legend_of(series), drawing)
