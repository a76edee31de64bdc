"""The end of a run: measure the untouched and the chosen model on the test split, which nothing has used before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmva.edit import Edit
from llmva.evaluation.skills import Probe, measure_skills
from llmva.evaluation.utility import measure_utility
from llmva.method.context import Context
from llmva.method.first_token import FirstTokenClassifier
from llmva.method.observe import same_answer
from llmva.method.rollback import MIN_AGREEMENT
from llmva.metrics.objective import Objective
from llmva.metrics.pareto import RATES, find_front
from llmva.metrics.rates import point_rates, summarise
from llmva.metrics.truth import summarise_truth
from llmva.prompts.types import Prompt
from llmva.report.values import strength_text
from llmva.runs.limits import Tally, thinking_limits
from llmva.runs.run import Run
from llmva.runs.warm_start import apart, check_regression, fell_behind

HARMLESS_TEXTS = 64  # maximum number of texts, for the harmless metric and for the choice of the iteration
TEST_TEXTS = 256
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of the chosen edit, on validation prompts


def finish(context: Context, run: Run, probes: Sequence[Probe]) -> None:
    """Measure strengths on validation prompts, choose one, then measure test prompts, skills and utility."""
    if run.record.get("test", {}).get("after"):
        return
    record = run.record
    if "best_strength" not in record:  # else an interrupted end goes on with its choice
        best, strength = _choose_point(context, run)
        rows = [row for row in record.pop("strengths", []) if row["iteration"] == best]
        record |= {"best_iteration": best, "best_strength": strength, **({"strengths": rows} if best else {})}
    best, strength = record["best_iteration"], record["best_strength"]
    validation = context.prompts.validation
    benign = sum(prompt.benign for prompt in validation)
    record["validation"] = {"n_benign": benign, "n_toxic": len(validation) - benign}
    record["front"] = find_front(record)
    edit = run.edit.at(best).scaled(strength)

    if "test" not in record:
        with run.edit.at(0).apply(context.chat.model, check=False):  # usually empty: the untouched model
            record["test"] = {"before": _test_rates(context, run, 0)}
            skills = _measure_skills(context, probes, "before")
        record["utility"] = {"skills": {k: {"before": v["right"], "n": v["n"]} for k, v in skills.items()}}
        run.commit()
    with edit.apply(context.chat.model, check=False):
        after = _test_rates(context, run, best) if best else record["test"]["before"]
        skills_after = _measure_skills(context, probes, "after") if best else {}
    _add_utility(context, run, edit)
    for name, row in record["utility"]["skills"].items():
        row["after"] = skills_after[name]["right"] if best else row["before"]
    record["test"]["after"] = after
    if best == 0:
        first = "earlier edit" if record.get("extends") else "untouched model"
        record["limits"].append(f"No iteration was better on validation prompts than the {first}, which was kept.")
    record["limits"] += thinking_limits(context.thinking, Tally.of_rows(run.answers))
    record["limits"] += _limits(record, context.objective)
    record["projections"] = {
        "before": record["iterations"][0].get("projection"),
        "after": record["iterations"][best].get("projection"),
    }
    for entry in record["iterations"]:
        entry.pop("projection", None)
    run.commit(replace(run.edit, best=best, strength=strength))


def _test_rates(context: Context, run: Run, iteration: int) -> dict[str, Any]:
    label = "before" if iteration == 0 else f"after iteration {iteration}"
    prompts = context.prompts.test
    seen = context.observe(prompts, f"test prompts, {label}", captures=False, whole=any(p.gold for p in prompts))
    run.log(iteration, "test", seen)
    run.record["cost"]["generated_tokens"] += seen.capture.tokens
    alike = same_answer(seen.prompts, seen.labels, seen.capture.answers)
    run.record["limits"] += [sentence for sentence in alike if sentence not in run.record["limits"]]
    rates = summarise(seen.prompts, seen.labels, seed=context.seed)
    truth = summarise_truth(prompts, seen.labels, seen.capture.answers, _first_answers(run, prompts))
    return rates | truth | apart(run.record, seen.prompts, seen.labels, context.seed)


def _first_answers(run: Run, prompts: Sequence[Prompt]) -> tuple[list[str], list[str]] | None:
    """Labels and answers of the test prompts before the edit; None while these are the ones that are measured."""
    if "test" not in run.record:
        return None
    rows = {row["id"]: row for row in run.answers if row["iteration"] == 0 and row["split"] == "test"}
    return [rows[prompt.id]["label"] for prompt in prompts], [rows[prompt.id]["answer"] for prompt in prompts]


def _measure_skills(context: Context, probes: Sequence[Probe], label: str) -> dict[str, dict[str, float]]:
    on_progress = context.progress.stage(f"skills, {label}", len(probes))
    return measure_skills(context.chat, probes, on_progress, thinking=context.thinking.off)


def _add_utility(context: Context, run: Run, edit: Edit) -> None:
    """Measure the edit's harm to harmless text of the test split."""
    texts = run.harmless_texts(context.prompts, "test", TEST_TEXTS)
    if not texts:
        run.record["limits"].append("The untouched model answered no benign test prompt, so utility kept is not known.")
        return
    tokens_each = context.settings.endings_tokens
    utility, tokens = measure_utility(
        context.chat,
        edit,
        texts,
        endings_tokens=tokens_each,
        seed=context.seed,
        progress=context.progress,
        thinking=context.thinking.off,
    )
    run.record["utility"] |= utility
    run.record["cost"]["generated_tokens"] += tokens


def _limits(record: dict[str, Any], objective: Objective) -> list[str]:
    """Sentences about limits that could not be kept, on validation or on test prompts."""
    chosen = next(row for row in record["front"] if row["chosen"])
    at = "" if chosen["strength"] == 1.0 else f" at strength {strength_text(chosen['strength'])}"
    name = f"point {chosen['point']} (iteration {chosen['iteration']}{at})"
    sentences = []
    if record.get("extends"):
        sentences.append(
            "This run extends an earlier edit: “before” is the model with that edit. What harmless text lost is "
            "counted from the untouched model on."
        )
        if behind := fell_behind(record["test"]):
            sentences.append(f"On the earlier run's test prompts it fell behind the earlier edit: {'; '.join(behind)}.")
    if at:
        sentences.append(f"As fitted, iteration {chosen['iteration']} breaks a limit: it is used{at}, which keeps all.")
    used = record["iterations"][chosen["iteration"]]
    if not at and (violations := objective.violations(used)):
        sentences.append(
            f"The limits could not be kept on validation prompts: {name}, which is used, has {'; '.join(violations)}."
        )
        near = min(record["front"], key=lambda row: (objective.violation(row), -objective.value(row)))
        if objective.violation(near) < objective.violation(used):
            sentences.append(
                f"Point {near['point']}, at strength {strength_text(near['strength'])}, is nearer to them: "
                f"{'; '.join(objective.violations(near))}. llmva export --point {near['point']} ships it."
            )
    harm = record["utility"] if chosen["iteration"] else {}
    if missed := objective.missed(record["test"]["after"], harm):
        sentences.append(f"On test prompts a limit is broken, by more than chance explains: {'; '.join(missed)}.")
    return sentences


def _choose_point(context: Context, run: Run) -> tuple[int, float]:
    """Iteration and strength to use: a better iteration that breaks a limit may keep it when it is weaker."""
    record, objective, best = run.record, context.objective, int(run.record["best_iteration"])
    entries = record["iterations"]
    tempting = objective.most_valuable(entries)
    if objective.value(entries[tempting]) > objective.value(entries[best]):
        strength = _choose_strength(context, run, tempting)
        row = next(r for r in record["strengths"] if (r["iteration"], r["strength"]) == (tempting, strength))
        if not objective.violation(row) and objective.value(row) > objective.value(entries[best]):
            return tempting, strength
    return (best, _choose_strength(context, run, best)) if best else (0, 1.0)


def _choose_strength(context: Context, run: Run, best: int) -> float:
    """Look at the edit of iteration `best` at other strengths; 1, unless limits demand another.

    Validation prompts decide, because a choice on test prompts would make the test results worthless. Where first
    tokens predict the labels of this run, they do so here, and no answers are generated; a strength that would be
    chosen by them is measured before.
    """
    record = run.record
    kept: list[dict[str, Any]] = record.setdefault("strengths", [])  # also of another iteration, if that was tried

    def own() -> list[dict[str, Any]]:
        return [row for row in kept if row["iteration"] == best]

    predicts = context.predicts_labels and record["iterations"][-1]["foretold"] >= MIN_AGREEMENT
    # measured already; in a run that extends another, strength 0 is not iteration 0
    known = (1.0,) if run.edit.at(0).factors else (0.0, 1.0)
    for strength in STRENGTHS:
        if any(row["strength"] == strength for row in own()):
            continue
        if strength in known:
            entry = record["iterations"][best if strength else 0]
            kept.append({"iteration": best, "strength": strength, **{name: entry.get(name) for name in RATES}})
        else:
            kept.append(_rates_at(context, run, best, strength, predicts))
            run.commit()  # an interruption loses at most one
    while True:
        chosen = context.objective.choose_strength(record["iterations"][best], own())
        guess = next((row for row in own() if row["strength"] == chosen and row.get("predicted")), None)
        if guess is None:
            return chosen
        kept[kept.index(guess)] = _rates_at(context, run, best, chosen, predict=False)
        run.commit()


def _rates_at(context: Context, run: Run, iteration: int, strength: float, predict: bool) -> dict[str, Any]:
    """Rates of an iteration's edit at a strength: of predicted labels, or of answers."""
    edit, prompts = run.edit.at(iteration).scaled(strength), context.prompts.validation
    if predict:
        context.progress.stage(f"strength {strength}")
        classifier = FirstTokenClassifier.from_record(run.record["first_tokens"])
        seen = context.predict_labels(edit, prompts, classifier)
    else:
        with edit.apply(context.chat.model, check=False):
            seen = context.observe(prompts, f"strength {strength}", captures=False)
        run.record["cost"]["generated_tokens"] += seen.capture.tokens
    texts = run.harmless_texts(context.prompts, "validation", HARMLESS_TEXTS)
    harm: Mapping[str, Any] = context.harm(edit, texts).as_record()
    rates = point_rates(seen.prompts, seen.labels)
    row = {
        "iteration": iteration,
        "strength": strength,
        **rates,
        **harm,
        **check_regression(run.record, seen.prompts, seen.labels),
    }
    return {**row, "predicted": True} if predict else row
