"""A study over many models as files for people: a page, and its tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

from llmva.report.drawing import svg
from llmva.report.estimates import estimate
from llmva.report.fitting import Fitting
from llmva.report.pages import Outcome, page, write_text
from llmva.report.study.grids import Grid, limits, models_grid, panel_name, summary_grid, tasks_grid, tests_grid
from llmva.report.study.plane import HEIGHT, Look, looks, rates_axes
from llmva.report.study.records import STYLES, csv_text, facts, read_record
from llmva.report.study.tables import latex
from llmva.report.study.transfer import attack_grid, transfer_grid
from llmva.report.values import dicts, finite, part, printable, score, share

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def write_study(directory: Path) -> list[Path]:
    """Write study.html, .md, .csv and .tex from study.json in `directory`; return their paths.

    Raises:
        UsageError: no study.json there, or one that this version cannot read.
        LlmvaError: a file cannot be written.
    """
    directory = Path(directory)
    record = read_record(directory, "study", "study")
    made = (
        ("html", study_page(record)),
        ("md", study_markdown(record)),
        ("csv", study_csv(record)),
        ("tex", study_latex(record)),
    )
    return [write_text(directory / f"study.{ending}", text, shared=True) for ending, text in made]


GRIDS = (summary_grid, models_grid, tests_grid, attack_grid, transfer_grid, tasks_grid)  # in the order of the page


def grids(record: dict[str, Any]) -> list[Grid]:
    """The tables of which at least one number is known."""
    return [grid for make in GRIDS if (grid := make(record)) is not None]


def study_tables(record: dict[str, Any]) -> list[RenderableType]:
    """The tables for a terminal, each below its title."""
    return [Fitting([lambda grid=grid: _rich(grid)], [""]) for grid in grids(record)]  # type: ignore[misc]


def _rich(grid: Grid) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=printable(grid.title), title_justify="left")
    for number, head in enumerate(grid.heads):
        numeric = number >= grid.names
        table.add_column(printable(head), justify="right" if numeric else "left", no_wrap=numeric)
    for row, texts in enumerate(grid.rows):
        marked = [f"{text}*" if (row, column) in grid.best else text for column, text in enumerate(texts)]
        table.add_row(*(Text(printable(text)) for text in marked))
    return table


def study_markdown(record: dict[str, Any]) -> str:
    """The tables in Markdown; the best of a column in bold."""
    lines = [f"# {_plain(record.get('title') or 'Study')}"]
    for grid in grids(record):
        lines += ["", f"## {_plain(grid.title)}", "", _plain(grid.about), ""]
        lines.append("| " + " | ".join(map(_plain, grid.heads)) + " |")
        lines.append("| " + " | ".join("---" if i < grid.names else "---:" for i in range(len(grid.heads))) + " |")
        for row, texts in enumerate(grid.rows):
            cells = (f"**{_plain(t)}**" if (row, i) in grid.best else _plain(t) for i, t in enumerate(texts))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {_plain(limit)}" for limit in limits(record))]) + "\n"


def _plain(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in printable(str(text)))
    return " ".join(escaped.split())


def study_csv(record: dict[str, Any]) -> str:
    """A line for each model and method, with every digit recorded and the published figures."""
    lines = []
    for panel in dicts(record.get("panels")):
        for row in dicts(panel.get("rows")):
            line: dict[str, object] = {key: panel.get(key) for key in ("model", "data", "judge")}
            line |= {"method": row.get("title")}
            for key in ("f1", "asr", "orr", "garbled"):
                known = estimate(row.get(key))
                line |= {f"{key}_mean": known.mean, f"{key}_spread": known.spread}
                line |= {f"{key}_published": finite(part(row, "published").get(key))}
            line |= {f"source_{n}": estimate(value).mean for n, value in part(row, "by_source").items()}
            line |= {key: finite(part(row, "utility").get(key)) for key in ("kept", "kl", "perplexity")}
            for kind in ("attack", "transfer"):
                for name, rates in part(row, kind).items():
                    line |= {f"{kind}_{name}_{key}": finite(part(rates).get(key)) for key in ("f1", "asr", "orr")}
            line["transfer_f1"] = finite(row.get("transfer_f1"))
            for name, rates in part(row, "published", "transfer").items():
                line |= {f"transfer_{name}_{key}_published": finite(part(rates).get(key)) for key in ("asr", "orr")}
            line["transfer_f1_published"] = finite(part(row, "published").get("transfer_f1"))
            line |= {f"task_{name}_kept": finite(part(one).get("kept")) for name, one in part(row, "tasks").items()}
            lines.append(line)
    return csv_text(lines)


def study_latex(record: dict[str, Any]) -> str:
    """The tables with booktabs rules; best values in bold. To be \\input into a document."""
    lines = ["% Needs \\usepackage{booktabs} and \\usepackage{graphicx}."]
    for grid in grids(record):
        lines += [
            "",
            r"\begin{table*}[t]",
            r"\centering",
            rf"\caption{{{latex(grid.title)}. {latex(grid.about)}}}",
            rf"\label{{tab:llmva-study-{grid.key}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * grid.names}{'r' * (len(grid.heads) - grid.names)}}}",
            r"\toprule",
            " & ".join(map(latex, grid.heads)) + r" \\",
            r"\midrule",
        ]
        for row, texts in enumerate(grid.rows):
            if row and grid.names > 1 and texts[0] != grid.rows[row - 1][0]:
                lines.append(r"\midrule")
            cells = (rf"\textbf{{{latex(t)}}}" if (row, i) in grid.best else latex(t) for i, t in enumerate(texts))
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]
    return "\n".join(lines) + "\n"


def study_page(record: dict[str, Any]) -> str:
    """The contents of study.json as one HTML page, with links to the page of each model."""
    return page(
        "study.html",
        STYLES,
        kind="study",
        title=str(record.get("title") or "Study"),
        outcome=_outcome(record),
        grids=grids(record),
        plane=models_plane(record),
        links=_links(record),
        command=None,
        facts=facts(record),
        limits=limits(record),
    )


def _links(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(what the link says, page) of every model with figures."""
    panels = [panel for panel in dicts(record.get("panels")) if dicts(panel.get("rows"))]
    return [
        (panel_name(record, panel), quote(f"{panel.get('folder')}/compare.html", errors="replace")) for panel in panels
    ]


def _outcome(record: dict[str, Any]) -> Outcome:
    rows = [row for row in dicts(record.get("methods")) if estimate(row.get("f1")).mean is not None]
    if not rows:
        return Outcome("No figures yet", "open", "No model of this study is finished yet.")
    leader = max(rows, key=lambda row: estimate(row.get("f1")).mean or 0.0)
    wins = finite(leader.get("wins"))
    models = len([panel for panel in dicts(record.get("panels")) if dicts(panel.get("rows"))])
    said = f"; it is the best on {wins:.0f} of {models}" if wins is not None and models > 1 else ""
    sentence = f"{leader.get('title')} has the highest mean F1, {score(estimate(leader.get('f1')).mean)}{said}."
    p = finite(part(record, "tests", "friedman").get("p"))
    apart = p is not None and p < 0.05
    tone = "good" if apart and leader.get("method") == "llmva" else "mixed"
    notes = (limits(record)[0],) if record.get("missing") else ()
    verdict = f"{leader.get('title')} leads" + ("" if apart or p is None else ", maybe by chance")
    return Outcome(verdict, tone, sentence, notes)


def models_plane(record: dict[str, Any]) -> Markup | None:
    """ASR across and ORR up: a small mark for each model and method, a large one for each method's mean."""
    methods = [(str(row.get("title")), str(row.get("method"))) for row in dicts(record.get("methods"))]
    settings = [(method, "paper" if name.endswith("(paper)") else None) for name, method in methods]
    look = dict(zip([name for name, _ in methods], looks(settings), strict=True))
    spots = _spots(record)
    if not spots:
        return None
    on, parts = rates_axes()
    for model, name, x, y, size in spots:
        seen = look.get(name, Look("c-kept", "dot"))
        tip = f"{model}: {name}, ASR {share(x)}, ORR {share(y)}"
        parts.append(svg.marker(seen.shape, on.x(x), on.y(y), seen.class_, size, tip))
    for number, (name, _) in enumerate(methods):
        x, y = svg.WIDTH - 190.0, svg.TOP + 18.0 + 16.0 * number
        parts.append(svg.marker(look[name].shape, x, y, look[name].class_, 4.6, name))
        parts.append(svg.text(x + 11, y + 4.2, name, "named", "start"))
    described = "; ".join(f"{model} {name} ASR {share(x)} ORR {share(y)}" for model, name, x, y, _ in spots)
    drawing = svg.picture("chart-models", "ASR and ORR of every model and method", f"{described}.", HEIGHT, parts)
    return svg.tag("figure", svg.tag("figcaption", svg.tag("strong", "The two failures")), drawing, class_="plane")


def _spots(record: dict[str, Any]) -> Sequence[tuple[str, str, float, float, float]]:
    """(model, method, ASR, ORR, size of the mark)."""
    rows = [
        (panel_name(record, panel), row, 3.4)
        for panel in dicts(record.get("panels"))
        for row in dicts(panel.get("rows"))
    ]
    rows += [("mean", row, 6.5) for row in dicts(record.get("methods")) if (finite(row.get("panels")) or 0) > 1]
    spots = []
    for model, row, size in rows:
        x, y = estimate(row.get("asr")).mean, estimate(row.get("orr")).mean
        if x is not None and y is not None:
            spots.append((model, str(row.get("title")), x, y, size))
    return spots
