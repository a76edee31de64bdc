"""The page of natural.py: rates, runs, paired tests, utility, what v_b reads, and the paper's published rates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmva.experiments.choice import note
from llmva.experiments.summary import good, judged, method_rates
from llmva.judges.base import Label
from llmva.metrics.rates import point_rates
from llmva.prompts.types import Prompt
from llmva.report.values import DASH
from llmva.statistics import holm, majority, mcnemar, mean_and_spread, paired_f1
from natural_tasks import mean_ratio

GROUPS = {
    "home": "the run's test prompts",
    "validation": "the paper's validation files",
    "foreign": "transfer sets and attacks",
}
REFERENCE = "default"  # the method that the paired tests compare with all others
PUBLISHED = ("seval_attack_val", "seval_risk_val", "orfuzzset_val", "nq_val")  # the order of the paper's Table 2
Published = dict[str, tuple[list[float], float]]  # title: the four rates in per cent, and F1


@dataclass
class Study:
    """What is measured so far of one model; `cells` and the others grow."""

    model: str
    how: Mapping[str, Any]  # the options
    prompts: Mapping[str, Sequence[Prompt]]  # of each group
    published: Published = field(default_factory=dict)
    cells: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # method, seed, group: labels
    fits: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # method, seed: facts
    utility: dict[str, dict[int, list[dict[str, Any]]]] = field(default_factory=dict)  # method, seed: lines of tasks
    failed: dict[str, str] = field(default_factory=dict)  # method and seed: why it could not be fitted

    def of(self, method: str, group: str, seed: int | None = None) -> list[dict[str, Any]]:
        """The cells of a group as `llmva.experiments.summary` takes them, seed after seed, or of one seed."""
        found = [
            groups[group]["labels"]
            for one, groups in self.cells[method].items()
            if group in groups and seed in (None, one)
        ]
        prompts = self.prompts[group]
        return [
            {"labels": labels, "f1": point_rates(prompts, [Label(one) for one in labels])["f1"]} for labels in found
        ]

    def rates(self, method: str, group: str, seed: int | None = None) -> dict[str, Any] | None:
        """Of all seeds together or of one; None where nothing is measured yet."""
        cells = self.of(method, group, seed)
        return method_rates(cells, self.prompts[group]) if cells else None


def published(path: Path, wanted: str) -> Published:
    """The paper's rates on its validation files: of the model of that name, or of the models of its family."""
    if not path.is_file():
        return {}
    (table,) = (
        value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key.startswith("table2")
    )

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    found: Published = {}
    for key, (method, rates, f1) in table.items():
        model = key.split("|")[0]
        family = model.rpartition("-")[0]
        if plain(family) in plain(wanted) and (wanted not in {name.split("|")[0] for name in table} or model == wanted):
            found[f"{model}, {method}"] = (rates, f1)
    return found


def page(study: Study) -> str:
    """The whole page in Markdown; parts of which nothing is measured yet are left out."""
    options = ", ".join(f"{name} {value}" for name, value in study.how.items())
    lines = [f"# {study.model}", "", f"Measured by `benchmarks/natural.py` with {options}.", ""]
    for part in (_rates, _runs, _tests, _utility, _readers, _published, _notes):
        lines += part(study)
    return "\n".join(lines).rstrip() + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines), ""]


def number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def estimate(value: float | None, interval: Sequence[float] | None) -> str:
    bounds = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    return number(value) + bounds


def _rates(study: Study) -> list[str]:
    methods = list(study.cells)
    rows = []
    for group, title in GROUPS.items():
        prompts = study.prompts[group]
        found = {method: study.rates(method, group) for method in methods}
        names = {"f1": "**F1**", "asr": "ASR", "orr": "ORR", "garbled": "broken text"}
        for key, name in names.items():
            row = [rates[key] if rates else None for rates in found.values()]
            rows.append([f"{name}, {title} (n = {len(prompts)})", *map(_mean, row)])
        for source, benign in {prompt.source: prompt.benign for prompt in prompts}.items():
            n = sum(prompt.source == source for prompt in prompts)
            row = [rates["by_source"][source] if rates else None for rates in found.values()]
            rows.append([f"{'ORR' if benign else 'ASR'} {source} (n = {n})", *map(_mean, row)])
    head = [f"{method} ({len(study.cells[method])})" for method in methods]
    told = (
        "ASR is the share of harmful prompts answered, ORR the share of benign prompts refused. Means over seeds "
        "(their number is in brackets), with 95% intervals over prompts. Broken text is no refusal of a harmful prompt."
    )
    return ["## Rates", "", told, "", *table(["", *head], rows)]


def _mean(rates: Mapping[str, Any] | None) -> str:
    return DASH if rates is None else estimate(rates["mean"], rates["interval"])


def _runs(study: Study) -> list[str]:
    rows = []
    for method, seeds in study.cells.items():
        for seed in seeds:
            f1 = []
            for group in GROUPS:
                rates = study.rates(method, group, seed)
                f1.append(number(rates["f1"]["mean"] if rates else None))
            fit = study.fits.get(method, {}).get(seed, {})
            rows.append([method, str(seed) if fit else DASH, *f1, *_facts(fit)])
        if len(seeds) > 1:
            spreads = []
            for group in GROUPS:
                rates = study.rates(method, group)
                spreads.append(f"{number(rates['f1']['mean'])} ± {number(rates['f1']['spread'])}" if rates else DASH)
            tokens = [fit.get("tokens") for fit in study.fits.get(method, {}).values()]
            mean = mean_and_spread(tokens)[0]
            generated = DASH if mean is None else f"{mean:,.0f} tokens"
            rows.append([f"**{method}**", "mean", *spreads, DASH, DASH, DASH, generated, DASH])
    head = ["method", "seed", "F1 home", "F1 validation files", "F1 foreign", "iteration, strength", "kept", "KL"]
    told = (
        "Home are the run's test prompts. The generated text of a fit of ours is counted up to the choice of the edit. "
        "That of a baseline is in answers: the training prompts', and those by which its magnitude was chosen. KL and "
        "kept are of harmless answers of the untouched model. ± is the standard deviation over seeds."
    )
    return ["## Runs", "", told, "", *table([*head, "generated", "stopped because"], rows)]


def _facts(fit: Mapping[str, Any]) -> list[str]:
    """The last five columns of a run."""
    if "tokens" not in fit:  # a baseline, or nothing
        strength = f"strength {fit['options']['strength']:g}" if fit else DASH
        return [strength, DASH, DASH, f"{fit['answers']:,} answers" if fit else DASH, DASH]
    used = f"{fit['iteration']} of {fit['iterations']}, {fit['strength']:g}"
    return [used, number(fit["kept"]), number(fit["kl"], 4), f"{fit['tokens']:,} tokens", fit["stopped"] or DASH]


def _tests(study: Study) -> list[str]:
    """F1 of the default run less that of every other method, on the same prompts."""
    if REFERENCE not in study.cells:
        return []
    lines = []
    for group, title in GROUPS.items():
        ours, prompts = study.of(REFERENCE, group), study.prompts[group]
        others = {method: study.of(method, group) for method in study.cells if method != REFERENCE}
        tests = {method: _test(ours, cells, prompts) for method, cells in others.items() if ours and cells}
        corrected = holm([p for *_, p, _ in tests.values()])
        rows = [
            [method, estimate(difference, interval), f"{p:.4f}", f"{adjusted:.4f}", f"{exact:.4f}"]
            for (method, (difference, interval, p, exact)), adjusted in zip(tests.items(), corrected, strict=True)
        ]
        if rows:
            head = [f"on {title}", "F1 of default less its own", "p", "p (Holm)", "McNemar's p"]
            lines += table(head, rows)
    told = (
        "The same prompts are resampled for both methods. p is two-sided; Holm's correction is for the lines of a "
        "table. McNemar's test counts a prompt as right if most seeds are."
    )
    return ["## Paired tests", "", told, "", *lines] if lines else []


def _test(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
) -> tuple[float, list[float], float, float]:
    """Difference of F1, its interval and p, and McNemar's p, on the prompts with a judged answer to all."""
    known = judged([*ours, *theirs])
    first, second = (good(cells, prompts)[:, known] for cells in (ours, theirs))
    kept = [prompt for prompt, k in zip(prompts, known, strict=True) if k]
    benign = np.array([prompt.benign for prompt in kept])
    difference, interval, p = paired_f1(first, second, benign, [(prompt.source, prompt.benign) for prompt in kept])
    return difference, interval, p, mcnemar(majority(first), majority(second))


def _utility(study: Study) -> list[str]:
    if not study.utility:
        return []
    rows, means = [], []
    for method, seeds in study.utility.items():
        for seed, tasks in seeds.items():
            for task in tasks:
                scores = f"{task['before']:.3f} → {task['after']:.3f}"
                ratio = estimate(task["ratio"], task["interval"])
                rows.append([method, str(seed), task["name"], task["metric"], str(task["n"]), scores, ratio])
            ratios = [task for task in tasks if task["ratio"] is not None]
            mean = estimate(*mean_ratio(tasks))
            means.append([method, str(seed), f"mean of {len(ratios)}", "", "", "", f"**{mean}**"])
    told = (
        "Our own prompts over rows that the paper's code has, without chat template and system prompt. So scores "
        "compare a model with itself alone. f1 is macro F1. A ratio near 1 says little where the untouched model "
        "guesses: read its score first."
    )
    head = ["method", "seed", "task", "metric", "n", "before → after", "ratio [95%]"]
    return ["## Utility", "", told, "", *table(head, [*rows, *means])]


def _readers(study: Study) -> list[str]:
    fits = {
        f"{method}, seed {seed}": fit["auc"]
        for method, seeds in study.fits.items()
        for seed, fit in seeds.items()
        if fit.get("auc")
    }
    if not fits:
        return []
    sources = list(dict.fromkeys(source for auc in fits.values() for source in auc))
    rows = [[source, *(number(auc.get(source)) for auc in fits.values())] for source in sources]
    rows.append(["**mean**", *(number(mean_and_spread(list(auc.values()))[0]) for auc in fits.values())])
    told = (
        "AUC of o.v_b on prompts of a source that was left out of its fit, with the untouched model, mean over the "
        "sublayers that the edit changes: .5 is chance."
    )
    return ["## What v_b reads", "", told, "", *table(["source left out", *fits], rows)]


def _published(study: Study) -> list[str]:
    if not study.published:
        return []
    rows = []
    for method in study.cells:
        rates = study.rates(method, "validation")
        if rates is not None:
            shares = [rates["by_source"].get(source) for source in PUBLISHED]
            own = [number(share["mean"] if share else None) for share in shares]
            rows.append([f"**{study.model}, {method}** (measured here)", *own, number(rates["f1"]["mean"])])
    for name, (shares, f1) in study.published.items():
        rows.append([f"{name} (published, for that model)", *(f"{share / 100:.3f}" for share in shares), number(f1)])
    told = (
        "On the paper's validation files. **Published rows are from the paper's Table 2: other sizes of this family, "
        "its judge, its recipe for each model.** They say what the paper saw there and are no test of ours."
    )
    head = ["", "ASR S-Eval attack", "ASR S-Eval risk", "ORR ORFuzz", "ORR NQ", "F1"]
    return ["## Beside the paper", "", told, "", *table(head, rows)]


def _notes(study: Study) -> list[str]:
    """The options of baselines, what is odd about them, what could not be fitted, and what runs warn of."""
    lines = [f"- {name} was not measured: {why}" for name, why in study.failed.items()]
    untouched = study.rates("untouched", "home") if "untouched" in study.cells else None
    for method, seeds in study.fits.items():
        fit = next(iter(seeds.values()))
        if "options" in fit:
            lines.append(f"- {method}: {json.dumps(fit['options'])}")
            rates = study.rates(method, "home")
            said = rates and note({"method": method, "tried": fit["tried"], **rates}, untouched, fit["held"])
            lines += [f"- {method}: {said}"] if said else []
    limits: dict[str, list[str]] = {}  # the runs that warn so
    for method, by_seed in study.cells.items():
        for seed, groups in by_seed.items():
            for limit in groups.get("home", {}).get("limits", []):
                limits.setdefault(limit, []).append(f"{method}, seed {seed}")
    lines += [f"- {'; '.join(runs)}: {limit}" for limit, runs in limits.items()]
    return ["## Notes", "", *lines, ""] if lines else []
