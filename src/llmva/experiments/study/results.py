"""From finished cells to study.json: every model's figures, and tests over all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmva.experiments.comparison import Row
from llmva.experiments.study.definition import Study
from llmva.experiments.study.plan import Cell, Panel, panels, plan
from llmva.experiments.study.worker import finished
from llmva.experiments.summary import NONE, OURS, title
from llmva.files import write_json
from llmva.runs.environment import versions
from llmva.statistics import (
    critical_difference,
    f1_of_shares,
    friedman,
    holm,
    mean_and_spread,
    mean_ranks,
    nemenyi,
    ranks_against,
)

RATES = ("f1", "asr", "orr", "garbled")
SIZES = ("n_toxic", "n_benign")


def collect(study: Study, out: Path) -> dict[str, Any]:
    """Read what is finished, write study.json, and return its content."""
    cells = plan(study)
    done = finished(out, cells)
    rows = [_panel(study, panel, cells, done, out) for panel in panels(study)]
    version = versions()
    record = {
        "format": 1,
        "kind": "study",
        "title": study.title,
        "llmva": version.pop("llmva"),
        "versions": version,
        "seeds": list(study.seeds),
        "cells": len(cells),
        "missing": [cell.title for cell in cells if cell.title not in done],
        "panels": rows,
        **over_models([panel for panel in rows if panel["rows"]]),
    }
    write_json(out / "study.json", record, shared=True)
    return record


def _panel(study: Study, panel: Panel, cells: Sequence[Cell], done: set[str], out: Path) -> dict[str, Any]:
    about = {
        "model": panel.model.name,
        "path": panel.model.path,
        "revision": panel.model.revision,
        "data": panel.data.name,
        "judge": panel.judge.name,
        "folder": panel.folder,
    }
    path = out / panel.folder / "compare.json"
    if f"{panel.folder}/table" not in done or not path.is_file():
        return {**about, "rows": [], "sources": {}, "limits": []}
    compared = json.loads(path.read_text(encoding="utf-8"))
    extras = _extras(panel, cells, done, out)
    published = study.published.get(panel.model.name, {})
    rows = [
        {
            "title": title(row),
            "method": row["method"],
            "setting": row["setting"],
            **{key: row[key] for key in RATES},
            "by_source": row["by_source"],
            "utility": row["utility"],
            "versus": row["versus"],
            "options": row["options"],
            **extras.get(title(row), {}),
            "published": published.get(row["method"]),
        }
        for row in compared["rows"]
    ]
    _add_kept(rows)
    for row in rows:
        measured = row.get("transfer", {})
        whole = len(measured) == len(study.transfer)  # else the rows would not be of the same prompts
        row["transfer_f1"] = _f1_of_all(list(measured.values())) if whole else None
    return {
        **about,
        "base": compared["base"],
        "sources": compared["sources"],
        "rows": rows,
        "limits": compared["limits"],
    }


def _extras(panel: Panel, cells: Sequence[Cell], done: set[str], out: Path) -> dict[str, dict[str, Any]]:
    """attacks, transfer and tasks by the row's title: means over seeds."""
    kept: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell.panel == panel and cell.kind in ("attack", "transfer", "utility") and cell.title in done:
            content = json.loads(cell.path(out).read_text(encoding="utf-8"))
            name = _title(cell.row)
            if cell.kind != "utility":
                kept.setdefault((name, cell.kind, content["what"]), []).append(content)
            for task in content.get("tasks", ()):
                kept.setdefault((name, "tasks", task["name"]), []).append({"score": task["score"]})
    extras: dict[str, dict[str, Any]] = {}
    for (name, kind, what), contents in kept.items():
        keys = ("score",) if kind == "tasks" else (*RATES, *SIZES)
        means = {key: mean_and_spread([content[key] for content in contents])[0] for key in keys}
        extras.setdefault(name, {}).setdefault(kind, {})[what] = means
    return extras


def _f1_of_all(sets: Sequence[Mapping[str, Any]]) -> float | None:
    """F1 over the prompts of all sets together, by the mean rates of each; None without prompts of both sides."""
    n_toxic, n_benign = (sum(one[size] or 0 for one in sets) for size in SIZES)
    if not n_toxic or not n_benign:
        return None
    answered = sum((1 - one["orr"]) * one["n_benign"] for one in sets if one["n_benign"]) / n_benign
    unsafe = sum((one["asr"] + one["garbled"]) * one["n_toxic"] for one in sets if one["n_toxic"]) / n_toxic
    return float(f1_of_shares(answered, unsafe, n_benign, n_toxic))


def _title(row: Row | None) -> str:
    return "" if row is None else row.title


def _add_kept(rows: Sequence[dict[str, Any]]) -> None:
    """The share of the untouched model's score that a method keeps in each task, and their mean."""
    untouched = next((row for row in rows if row["method"] == NONE), {}).get("tasks", {})
    for row in rows:
        shares = []
        for name, task in row.get("tasks", {}).items():
            before = untouched.get(name, {}).get("score")
            task["kept"] = task["score"] / before if before and task["score"] is not None else None
            shares.append(task["kept"])
        row["tasks_kept"] = mean_and_spread(shares)[0]


def over_models(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`methods`: mean and spread over panels of what each method reached; `tests`: do their ranks differ?

    Wins and ranks are of F1, over the panels and methods that have figures in all of them.
    """
    names = list(dict.fromkeys(row["title"] for panel in rows for row in panel["rows"]))
    by_name = {name: [row for panel in rows for row in panel["rows"] if row["title"] == name] for name in names}
    common = [
        name
        for name in names
        if len(by_name[name]) == len(rows) and all(row["f1"]["mean"] is not None for row in by_name[name])
    ]
    scores = np.array([[row["f1"]["mean"] for row in by_name[name]] for name in common]).T
    tests = _tests(common, scores) if len(common) > 1 and len(rows) > 1 else None
    best = scores.max(1, keepdims=True) == scores if len(common) else scores
    methods = []
    for name in names:
        shared = common.index(name) if name in common else None
        methods.append(
            {
                "title": name,
                "method": by_name[name][0]["method"],
                "panels": len(by_name[name]),
                **{key: _spread([row[key]["mean"] for row in by_name[name]]) for key in RATES},
                "kept": _spread([row["utility"]["kept"] for row in by_name[name]]),
                "tasks_kept": _spread([row["tasks_kept"] for row in by_name[name]]),
                "wins": None if shared is None else int(best[:, shared].sum()),
                "mean_rank": None if shared is None or tests is None else tests["mean_ranks"][name],
            }
        )
    return {"methods": methods, "tests": tests}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    mean, spread = mean_and_spread(values)
    return {"mean": mean, "spread": spread}


def _tests(names: Sequence[str], scores: Any) -> dict[str, Any]:
    """Friedman's test, Nemenyi's for all pairs, and Holm's correction against our own method or the best one."""
    blocks = len(scores)
    ranks = mean_ranks(scores)
    overall = friedman(scores)
    pairs = nemenyi(ranks, blocks)
    control = names.index(OURS) if OURS in names else int(ranks.argmin())
    others = [i for i in range(len(names)) if i != control]
    raw = ranks_against(ranks, control, blocks)
    corrected = holm([raw[i] for i in others])
    return {
        "blocks": blocks,
        "mean_ranks": {name: float(rank) for name, rank in zip(names, ranks, strict=True)},
        "friedman": None if overall is None else {"statistic": overall[0], "p": overall[1]},
        "critical_difference": critical_difference(len(names), blocks),
        "nemenyi": [
            {"first": names[i], "second": names[j], "p": float(pairs[i, j])}
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ],
        "control": names[control],
        "holm": [{"method": names[i], "p": raw[i], "p_holm": p} for i, p in zip(others, corrected, strict=True)],
    }
