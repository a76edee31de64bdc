"""The tables of a study over many models: built once from study.json, shown in every form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmva.report.estimates import estimate
from llmva.report.study.methods import p_text
from llmva.report.values import DASH, dicts, finite, part, score, share, strings

Text = Callable[[float | None], str]


@dataclass(frozen=True)
class Grid:
    """A table of texts. The first `names` columns are words, the others numbers; `best` are cells (row, column)."""

    key: str
    title: str
    about: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    best: frozenset[tuple[int, int]] = frozenset()


def panel_name(record: dict[str, Any], panel: dict[str, Any]) -> str:
    """The model, with its data and judge where the study has several of them."""
    names = [str(panel.get("model") or "unnamed")]
    for key in ("data", "judge"):
        if len({str(one.get(key)) for one in dicts(record.get("panels"))}) > 1:
            names.append(str(panel.get(key)))
    return ", ".join(names)


def rank_text(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def whole(value: float | None) -> str:
    return DASH if value is None else f"{value:.0f}"


def _with_spread(value: object, text: Text) -> str:
    known = estimate(value)
    spread = "" if known.spread is None else f" ±{text(known.spread).rstrip('%')}"
    return f"{text(known.mean)}{spread}"


def summary_grid(record: dict[str, Any]) -> Grid | None:
    """A row for each method: means over models."""
    rows = dicts(record.get("methods"))
    columns: list[tuple[str, str, Text, int]] = [  # head, key, text, 1 if higher is better
        ("F1", "f1", score, 1),
        ("ASR", "asr", share, -1),
        ("ORR", "orr", share, -1),
        ("Kept", "kept", share, 0),
        ("Tasks kept", "tasks_kept", share, 0),
    ]
    columns = [column for column in columns if any(estimate(row.get(column[1])).mean is not None for row in rows)]
    if not columns:
        return None
    tail: list[tuple[str, str, Text, int]] = [("Wins", "wins", whole, 1), ("Mean rank", "mean_rank", rank_text, -1)]
    lines = tuple(
        (
            str(row.get("title")),
            whole(finite(row.get("panels"))),
            *(_with_spread(row.get(key), text) for _, key, text, _ in columns),
            *(text(finite(row.get(key))) for _, key, text, _ in tail),
        )
        for row in rows
    )
    values = [[estimate(row.get(key)).mean for row in rows] for _, key, _, _ in columns]
    values += [[finite(row.get(key)) for row in rows] for _, key, _, _ in tail]
    ways = [way for *_, way in (*columns, *tail)]
    heads = ("Method", "Models", *(head for head, *_ in (*columns, *tail)))
    return Grid(
        "summary",
        "Over all models",
        "Means over models, ± standard deviation over them. A win is the highest F1 on a model; rank 1 is the highest "
        "F1. Kept: harmless next tokens that stay the same. Tasks kept: score in benchmarks, of the untouched model's.",
        heads,
        lines,
        best=_best(values, ways, first=2),
    )


def _best(values: Sequence[Sequence[float | None]], ways: Sequence[int], first: int) -> frozenset[tuple[int, int]]:
    """The best cells of columns; `ways` are 1 where higher is better, -1 where lower is, 0 where nothing is best."""
    cells = set()
    for column, (numbers, way) in enumerate(zip(values, ways, strict=True), start=first):
        known = [way * number for number in numbers if number is not None]
        for row, number in enumerate(numbers):
            if way and len(known) > 1 and number is not None and way * number == max(known):
                cells.add((row, column))
    return frozenset(cells)


def models_grid(record: dict[str, Any]) -> Grid | None:
    """The layout of the paper's Table 2: the rates of every set and F1, a row for each model and method."""
    panels = [panel for panel in dicts(record.get("panels")) if dicts(panel.get("rows"))]
    if not panels:
        return None
    sources: list[str] = []
    for kind in ("toxic", "benign"):
        sources += [str(n) for panel in panels for n, side in part(panel, "sources").items() if side == kind]
    sources = list(dict.fromkeys(sources))
    published = any(part(row, "published") for panel in panels for row in dicts(panel.get("rows")))
    lines: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    for panel in panels:
        rows = dicts(panel.get("rows"))
        scores = [estimate(row.get("f1")).mean for row in rows]
        top = max((value for value in scores if value is not None), default=None)
        for row, value in zip(rows, scores, strict=True):
            if top is not None and value == top:
                best.add((len(lines), 4 + len(sources)))
            rates = [estimate(row.get(key)).mean for key in ("asr", "orr")]
            by_source = [estimate(part(row, "by_source").get(name)).mean for name in sources]
            told = [score(finite(part(row, "published").get("f1")))] if published else []
            lines.append(
                (
                    panel_name(record, panel),
                    str(row.get("title")),
                    *map(share, (*rates, *by_source)),
                    _with_spread(row.get("f1"), score),
                    *told,
                )
            )
    heads = ("Model", "Method", "ASR", "ORR", *sources, "F1", *(["F1 published"] if published else []))
    about = (
        "Harmful sets by the share answered, benign ones by the share refused; means over seeds. The best F1 of each "
        "model is marked."
    )
    return Grid("models", "Every model", about, heads, tuple(lines), 2, frozenset(best))


def tests_grid(record: dict[str, Any]) -> Grid | None:
    tests = part(record, "tests")
    if not tests:
        return None
    control = str(tests.get("control"))
    corrected = {str(row.get("method")): row for row in dicts(tests.get("holm"))}
    pairs = {
        frozenset((str(row.get("first")), str(row.get("second")))): finite(row.get("p"))
        for row in dicts(tests.get("nemenyi"))
    }
    rows = []
    for name, rank in part(tests, "mean_ranks").items():
        one = corrected.get(name, {})
        p = [finite(one.get("p")), finite(one.get("p_holm")), pairs.get(frozenset((name, control)))]
        rows.append((name, rank_text(finite(rank)), *(DASH if value is None else p_text(value) for value in p)))
    overall = part(tests, "friedman")
    statistic, p_value = finite(overall.get("statistic")), finite(overall.get("p"))
    said = (
        "Friedman's test needs three methods and two models."
        if statistic is None or p_value is None
        else f"Friedman's test that all methods rank alike: chi-squared {statistic:.2f}, {_p(p_value)}."
    )
    distance = rank_text(finite(tests.get("critical_difference")))
    blocks = whole(finite(tests.get("blocks")))
    about = (
        f"{said} Mean ranks of F1 over {blocks} models; by Nemenyi's test two that are more than {distance} apart "
        f"differ at 5%. p values are against {control}, Holm's corrected for the number of methods."
    )
    heads = ("Method", "Mean rank", "p", "p, Holm", "p, Nemenyi")
    return Grid("tests", "Ranks and tests", about, heads, tuple(rows))


def _p(value: float) -> str:
    text = p_text(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def tasks_grid(record: dict[str, Any]) -> Grid | None:
    """The layout of the paper's Figure 5: the share of each score that is kept."""
    panels = dicts(record.get("panels"))
    rows = [(panel_name(record, p), row) for p in panels for row in dicts(p.get("rows")) if part(row, "tasks")]
    names = list(dict.fromkeys(name for _, row in rows for name in part(row, "tasks")))
    if not rows:
        return None
    lines = tuple(
        (
            model,
            str(row.get("title")),
            *(share(finite(part(row, "tasks", name).get("kept"))) for name in names),
            share(finite(row.get("tasks_kept"))),
        )
        for model, row in rows
    )
    about = "Score in each benchmark as a share of the untouched model's."
    return Grid("tasks", "Benchmarks", about, ("Model", "Method", *names, "Mean"), lines, 2)


def limits(record: dict[str, Any]) -> list[str]:
    """What a reader of the study must know, each sentence once."""
    missing = strings(record.get("missing"))
    said = [f"{len(missing)} of {record.get('cells')} cells are not finished: run the study again."] if missing else []
    own = [one for panel in dicts(record.get("panels")) for one in strings(panel.get("limits"))]
    return list(dict.fromkeys([*said, *own]))
