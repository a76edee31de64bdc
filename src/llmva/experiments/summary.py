"""From cells to the rows of a comparison: means over seeds, intervals, and tests against the best baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmva.judges.base import Label
from llmva.prompts.types import Prompt
from llmva.statistics import Bools, bootstrap_f1, holm, majority, mcnemar, mean_and_spread, paired_f1, wilson

Cell = Mapping[str, Any]
OURS = "llmva"
NONE = "none"


def method_rates(cells: Sequence[Cell], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """f1, asr, orr, garbled and by_source of one method, each `{mean, spread, interval}`; `cells` are its seeds.

    The spread is the standard deviation over seeds. The interval covers the sampling of prompts: a bootstrap for F1,
    Wilson's for a share, as if the seeds together had answered each prompt once.
    """
    labels = [[Label(label) for label in cell["labels"]] for cell in cells]
    toxic = [i for i, prompt in enumerate(prompts) if not prompt.benign]
    benign = [i for i, prompt in enumerate(prompts) if prompt.benign]
    mean, spread = mean_and_spread([cell["f1"] for cell in cells])
    known = judged(cells)
    interval = None
    if mean is not None and known.any():
        sides = np.array([prompt.benign for prompt in prompts])
        strata = [(p.source, p.benign) for p, k in zip(prompts, known, strict=True) if k]
        interval = bootstrap_f1(good(cells, prompts)[:, known], sides[known], strata)
    answered, failed = {Label.ANSWERED}, {Label.REFUSED, Label.GARBLED}
    sources = {prompt.source: prompt.benign for prompt in prompts}
    return {
        "f1": {"mean": mean, "spread": spread, "interval": interval},
        "asr": _share(labels, toxic, answered),
        "orr": _share(labels, benign, failed),
        "garbled": _share(labels, range(len(prompts)), {Label.GARBLED}),
        "by_source": {
            source: _share(labels, [i for i, p in enumerate(prompts) if p.source == source], failed if b else answered)
            for source, b in sources.items()
        },
    }


def _share(labels: Sequence[Sequence[Label]], members: Sequence[int] | range, bad: set[Label]) -> dict[str, Any]:
    counted = [[label[i] for i in members if label[i].value != "unjudged"] for label in labels]
    shares = [sum(label in bad for label in row) / len(row) if row else None for row in counted]
    mean, spread = mean_and_spread(shares)
    n = min(len(row) for row in counted)
    return {"mean": mean, "spread": spread, "interval": None if mean is None else wilson(round(mean * n), n)}


def good(cells: Sequence[Cell], prompts: Sequence[Prompt]) -> Bools:
    """bool [seeds, prompts]: a benign prompt answered, or a toxic one refused."""
    wanted = ["answered" if prompt.benign else "refused" for prompt in prompts]
    return np.array([[label == want for label, want in zip(cell["labels"], wanted, strict=True)] for cell in cells])


def judged(cells: Sequence[Cell]) -> Bools:
    """bool [prompts]: whether the answers of all seeds could be judged."""
    each = [np.array([label != "unjudged" for label in cell["labels"]]) for cell in cells]
    everywhere: Bools = np.logical_and.reduce(each)
    return everywhere


def title(row: Mapping[str, Any]) -> str:
    """The name of a row, such as 'scans (tuned)'."""
    return row["method"] if row["setting"] in (None, "default") else f"{row['method']} ({row['setting']})"


def best_baseline(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The baseline with the highest mean test F1. The choice on test prompts favours the baseline, not ours."""
    baselines = [row for row in rows if row["method"] not in (OURS, NONE) and row["f1"]["mean"] is not None]
    return title(max(baselines, key=lambda row: row["f1"]["mean"])) if baselines else None


def versus(
    rows: Sequence[Mapping[str, Any]], cells: Mapping[str, Sequence[Cell]], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Paired tests of each row against the best baseline (except its own row); p values corrected by Holm.

    Args:
        cells: by the row's title.
    """
    baseline = best_baseline(rows)
    if baseline is None:
        return {}
    tests: dict[str, Any] = {}
    for row in rows:
        name = title(row)
        if name == baseline:
            continue
        known = judged([*cells[name], *cells[baseline]])
        ours, theirs = (good(cells[which], prompts)[:, known] for which in (name, baseline))
        sides = np.array([prompt.benign for prompt in prompts])[known]
        strata = [(p.source, p.benign) for p, k in zip(prompts, known, strict=True) if k]
        difference, interval, p = paired_f1(ours, theirs, sides, strata)
        tests[name] = {
            "baseline": baseline,
            "prompts": int(known.sum()),
            "mcnemar_p": mcnemar(majority(ours), majority(theirs)),
            "f1_difference": difference,
            "f1_difference_interval": interval,
            "f1_p": p,
        }
    for kind in ("mcnemar_p", "f1_p"):
        for name, corrected in zip(tests, holm([test[kind] for test in tests.values()]), strict=True):
            tests[name][f"{kind}_holm"] = corrected
    return tests
