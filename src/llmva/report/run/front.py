"""The points of a run (run.json's `front`): table for terminals, picture for the report and for a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from llmva.report.drawing import svg
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
STYLE = (  # of a picture that stands alone, where the report's style sheet does not reach
    "svg{background:#fff;font:12px sans-serif}text{fill:#59636f}.grid,.axis{stroke:#d8dde3}"
    ".line{fill:none;stroke:#0069a8}.c-after{fill:#0069a8;stroke:#0069a8}.c-before{fill:none;stroke:#6b7480}"
    ".c-f1{fill:none;stroke:#007a5a;stroke-width:2}.named{fill:#1a1f26;font-weight:600}"
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
    keys = [
        ("on the front", "dot", "c-after", None),
        ("another is better in all", "ring", "c-before", None),
        ("chosen", "star", "c-f1", None),
    ]
    head = svg.tag("figcaption", svg.tag("strong", "Points of the run"))
    return [svg.tag("figure", head, svg.legend(keys), drawing)]


def _drawing(run: dict[str, Any]) -> Markup | None:
    """ASR across, ORR up, zoomed to the points; the line joins the front, by number of the point."""
    rows = points(run)
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
    front = sorted((float(r["asr"]), float(r["orr"])) for r in rows if r.get("on_front") is True)
    if len(front) > 1:
        spots = svg.path([(on.x(x), on.y(y)) for x, y in front])
        parts.append(svg.tag("polyline", class_="line c-after", points=spots, style="fill:none"))
    taken: list[tuple[float, float]] = []
    for row in rows:
        x, y = on.x(float(row["asr"])), on.y(float(row["orr"]))
        words = (
            f"point {row['point']:.0f}: iteration {finite(row.get('iteration')) or 0:.0f}, strength "
            f"{strength_text(row['strength'])}, ASR {share(row['asr'])}, ORR {share(row['orr'])}"
        )
        shape, class_ = ("dot", "c-after") if row.get("on_front") is True else ("ring", "c-before")
        parts.append(svg.marker(shape, x, y, class_, 4.2, words))
        if row.get("chosen") is True:
            parts.append(svg.marker("star", x, y, "c-f1", 7.5, f"{words} (chosen)"))
        if row.get("chosen") is True or all(abs(x - a) > 16 or abs(y - b) > 12 for a, b in taken):
            taken.append((x, y))
            parts.append(svg.text(x + 8, y - 6, f"{row['point']:.0f}", "named", "start"))
    described = "; ".join(f"point {row['point']:.0f} ASR {share(row['asr'])} ORR {share(row['orr'])}" for row in rows)
    return svg.picture("chart-front", "Points of the run", f"{described}.", HEIGHT, parts)


def _percent(value: float) -> str:
    return f"{100 * value:g}%"


def write_front(directory: Path, run: dict[str, Any]) -> Path:
    """Write `directory/front.svg`, a picture for browsers that needs no other file."""
    drawing = _drawing(run) or svg.picture("chart-front", "Points of the run", "None.", HEIGHT, [])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * svg.WIDTH}" '
    text = str(drawing).replace("<svg ", head, 1).replace(">", f"><style>{STYLE}</style>", 1)
    return write_text(directory / "front.svg", text + "\n")
