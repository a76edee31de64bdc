"""Figures of an iteration and of the finished run, in the form that run.json holds and the report draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.evaluation.endings import PROMPTS, compare_endings
from llmva.evaluation.skills import Probe, measure_skills
from llmva.judges.base import Judge
from llmva.method.identify import Vectors
from llmva.method.observe import Observation, observe
from llmva.metrics.objective import Objective
from llmva.metrics.pareto import FIGURES, find_front
from llmva.metrics.rates import point_rates, summarise
from llmva.models.batching import Batching
from llmva.models.harmless import Agreement, agreement
from llmva.models.sublayers import Decoder
from llmva.models.thinking import Thinking
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.runs.run import Run, harmless_texts
from llmva.runs.warm_start import apart, check_regression, fell_behind
from llmva.settings import Settings

HARMLESS_TEXTS = 64  # per use: for the quiet readers, and for the choice of the iteration
TEST_TEXTS = 256
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of the chosen edit, on validation prompts


def of_vectors(vectors: Vectors, chosen: list[int]) -> dict[str, Any]:
    degrees = _plain(vectors.angles)
    known = [d for d in degrees if d is not None]
    return {
        "selected": chosen,
        "scores": _plain(vectors.scores),
        "accuracy_answer": _plain(vectors.accuracy[:, 0]),
        "accuracy_benign": _plain(vectors.accuracy[:, 1]),
        "angles": degrees,
        "mean_angle": sum(known) / len(known) if known else None,
        "ratio": _plain(vectors.ratio),
    }


def projection(vectors: Vectors, seen: Observation, decoder: Decoder) -> dict[str, Any]:
    """o.v_a and o.v_b of each prompt in the best-scored sublayer (the paper's Figure 2)."""
    s = int(vectors.scores.argmax())
    points = (seen.capture.outputs[s].double() @ vectors.directions[s].T).tolist()
    rows = [
        [round(a, 5), round(b, 5), prompt.benign, label.value]
        for (a, b), prompt, label in zip(points, seen.prompts, seen.labels, strict=True)
    ]
    return {"sublayer": decoder.sublayers[s].name, "points": rows}


def finish(
    run: Run,
    decoder: Decoder,
    tokenizer: Any,
    prompts: PromptSet,
    judge: Judge,
    probes: Sequence[Probe],
    batching: Batching,
    progress: Progress,
    seed: int,
    settings: Settings,
    objective: Objective,
    thinking: Thinking | None,
) -> None:
    """Measure the untouched and the chosen model on the test split, which nothing has looked at before."""
    if run.record.get("test", {}).get("after"):
        return
    record, best = run.record, run.record["best_iteration"]
    if best:
        _measure_strengths(run, decoder, tokenizer, prompts, judge, batching, progress, settings, thinking)
    strength = objective.choose_strength(record["iterations"][best], record.get("strengths", []))
    record["best_strength"] = strength
    benign = sum(prompt.benign for prompt in prompts.validation)
    record["validation"] = {"n_benign": benign, "n_toxic": len(prompts.validation) - benign}
    record["front"] = find_front(record)
    edit = run.edit.at(best).scaled(strength)

    def summary(iteration: int) -> dict[str, Any]:
        label = "before" if iteration == 0 else f"after iteration {iteration}"
        on_progress = progress.stage(f"test prompts, {label}", len(prompts.test))
        seen = observe(
            decoder,
            tokenizer,
            prompts.test,
            judge,
            max_new_tokens=settings.max_new_tokens,
            thinking=thinking,
            batching=batching,
            on_progress=on_progress,
        )
        run.log(iteration, "test", seen)
        record["cost"]["generated_tokens"] += seen.capture.tokens
        found = summarise(seen.prompts, seen.labels, seed=seed)
        return found | apart(record, seen.prompts, seen.labels, seed)

    def skills(label: str) -> dict[str, dict[str, float]]:
        return measure_skills(decoder, tokenizer, probes, batching, progress.stage(f"skills, {label}", len(probes)))

    if "test" not in record:
        with run.edit.at(0).apply(decoder.model, check=False):  # mostly nothing: the untouched model
            record["test"] = {"before": summary(0)}
            right = skills("before")
        record["utility"] = {"skills": {k: {"before": v["right"], "n": v["n"]} for k, v in right.items()}}
        run.commit()
    with edit.apply(decoder.model, check=False):
        after = summary(best) if best else record["test"]["before"]
        right_after = skills("after") if best else {}
    texts = harmless_texts(run.answers, prompts, "test", TEST_TEXTS)
    if texts:
        on_progress = progress.stage("comparing harmless text", len(texts))
        found = agreement(
            decoder, tokenizer, texts, lambda: edit.apply(decoder.model, check=False), batching, on_progress
        )
        record["utility"] |= utility(found, seed)
        if settings.endings_tokens:
            record["utility"]["endings"], tokens = endings(
                decoder, tokenizer, texts, edit, settings.endings_tokens, batching, progress
            )
            record["cost"]["generated_tokens"] += tokens
    else:
        record["limits"].append("The untouched model answered no benign test prompt, so utility kept is not known.")
    for name, row in record["utility"]["skills"].items():
        row["after"] = right_after[name]["right"] if best else row["before"]
    record["test"]["after"] = after
    if best == 0:
        first = "earlier edit" if record.get("extends") else "untouched model"
        record["limits"].append(f"No iteration was better on validation prompts than the {first}, which was kept.")
    record["limits"] += _limits(record, objective)
    record["projections"] = {
        "before": record["iterations"][0].get("projection"),
        "after": record["iterations"][best].get("projection"),
    }
    for entry in record["iterations"]:
        entry.pop("projection", None)
    run.commit(replace(run.edit, best=best, strength=strength))


def _limits(record: dict[str, Any], objective: Objective) -> list[str]:
    """Sentences about limits of the choice that could not be kept, on validation or on test prompts."""
    chosen = next(row for row in record["front"] if row["chosen"])
    at = "" if chosen["strength"] == 1.0 else f" at strength {chosen['strength']:g}"
    name = f"point {chosen['point']} (iteration {chosen['iteration']}{at})"
    found = []
    if record.get("extends"):
        found.append(
            "This run extends an earlier edit: “before” is the model with that edit. What harmless text lost is "
            "counted from the untouched model on."
        )
        if behind := fell_behind(record["test"]):
            found.append(f"On the earlier run's test prompts it fell behind the earlier edit: {'; '.join(behind)}.")
    if at:
        found.append(f"As fitted, iteration {chosen['iteration']} breaks a limit: it is used{at}, which keeps all.")
    used = record["iterations"][chosen["iteration"]]
    if not at and (broken := objective.violations(used)):
        found.append(
            f"The limits could not be kept on validation prompts: {name}, which is used, has {'; '.join(broken)}."
        )
        near = min(record["front"], key=lambda row: (objective.violation(row), -objective.value(row)))
        if objective.violation(near) < objective.violation(used):
            found.append(
                f"Point {near['point']}, at strength {near['strength']:g}, is nearer to them: "
                f"{'; '.join(objective.violations(near))}. llmva export --point {near['point']} ships it."
            )
    harm = record["utility"] if chosen["iteration"] else {}
    if missed := objective.missed(record["test"]["after"], harm):
        found.append(f"On test prompts a limit is broken, by more than chance explains: {'; '.join(missed)}.")
    return found


def _measure_strengths(
    run: Run,
    decoder: Decoder,
    tokenizer: Any,
    prompts: PromptSet,
    judge: Judge,
    batching: Batching,
    progress: Progress,
    settings: Settings,
    thinking: Thinking | None,
) -> None:
    """Figures of the chosen edit made weaker and stronger, for whoever ships it at another strength than 1.

    On validation prompts, since a choice made on test prompts would make the test's figures worthless. Each strength
    is committed, so that a kill costs one of them at most.
    """
    record, best = run.record, run.record["best_iteration"]
    rows = record.setdefault("strengths", [])
    # what is measured already; of an extended edit, strength 0 is not what the run began with
    same = (1.0,) if run.edit.at(0).factors else (0.0, 1.0)
    for strength in STRENGTHS:
        if any(row["strength"] == strength for row in rows):
            continue
        if strength in same:
            known = record["iterations"][best if strength else 0]
            found: dict[str, Any] = {name: known.get(name) for name in FIGURES}
        else:
            on_progress = progress.stage(f"strength {strength}", len(prompts.validation))
            scaled = run.edit.at(best).scaled(strength)
            with scaled.apply(decoder.model, check=False):
                seen = observe(
                    decoder,
                    tokenizer,
                    prompts.validation,
                    judge,
                    max_new_tokens=settings.max_new_tokens,
                    thinking=thinking,
                    batching=batching,
                    on_progress=on_progress,
                )
            record["cost"]["generated_tokens"] += seen.capture.tokens
            found = point_rates(seen.prompts, seen.labels) | _harm(run, scaled, decoder, tokenizer, prompts, batching)
            found |= check_regression(record, seen.prompts, seen.labels)
        rows.append({"strength": strength, **found})
        if strength not in same:
            run.commit()


def _harm(
    run: Run, edit: Edit, decoder: Decoder, tokenizer: Any, prompts: PromptSet, batching: Batching
) -> dict[str, float | None]:
    """What an edit costs on harmless text of the validation split, as in the loop."""
    texts = harmless_texts(run.answers, prompts, "validation", HARMLESS_TEXTS)
    if not texts:
        return {"kept": None, "kl": None, "perplexity": None}
    found = agreement(decoder, tokenizer, texts, lambda: edit.apply(decoder.model, check=False), batching)
    return {"kept": found.mean_kept, "kl": found.mean_kl, "perplexity": found.perplexity_ratio}


def utility(found: Agreement, seed: int) -> dict[str, Any]:
    """What an edit costs on harmless text: `kept`, `kl` in nats, both with intervals, and the ratio of `perplexity`."""
    return {
        "kept": found.mean_kept,
        "kept_interval": _mean_interval(found.kept, seed),
        "kl": found.mean_kl,
        "kl_interval": _mean_interval(found.kl, seed),
        "perplexity": found.perplexity_ratio,
    }


def endings(
    decoder: Decoder,
    tokenizer: Any,
    texts: Sequence[tuple[str, str]],
    edit: Edit,
    most: int,
    batching: Batching,
    progress: Progress,
) -> tuple[dict[str, Any], int]:
    """How long answers to the first of some harmless texts' prompts end, and the tokens that finding out took."""
    prompts = [prompt for prompt, _ in texts[:PROMPTS]]
    on_progress = progress.stage("long answers, before and after", 2 * len(prompts))
    model = decoder.model
    return compare_endings(
        decoder, tokenizer, prompts, lambda: edit.apply(model, check=False), most, batching, on_progress
    )


def _mean_interval(values: list[float], seed: int, resamples: int = 2000) -> list[float]:
    """95% bootstrap interval of the mean over texts."""
    x = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    means = x[picks].mean(1)
    return [float(means.quantile(0.025)), float(means.quantile(0.975))]


def _plain(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 6) for v in values.tolist()]
