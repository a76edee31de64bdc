"""Plan what follows a measured iteration: continue or undo it, the length of the next step, or stop. Needs no model.

This is ours. The paper makes all its iterations and keeps the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmva.method.context import Context
from llmva.metrics.objective import Objective
from llmva.settings import Settings

MIN_AGREEMENT = 0.9  # minimum share of validation labels that the first token predicts; below it, no predictions
SETBACK = 0.05  # an iteration that is worse than the best by more than this is undone, and the step halved
MAX_SETBACKS = 3
SHALLOW = 0.1  # if the value is below the predicted one by more than this, only the first tokens changed


@dataclass(frozen=True)
class Plan:
    """What follows an iteration."""

    iterations: list[dict[str, Any]]  # the entries of run.json, with undone ones marked
    best: int  # the best iteration so far
    restore_to: int | None  # the iteration to which the run goes back; None undoes nothing
    relearn: bool  # whether the classifier is trained again, on the restored iteration alone
    step: float
    use_gradients: bool  # gradient writers, or v_a as in the paper
    use_classifier: bool  # whether the iteration predicts labels
    missing_class: str | None  # why no answer vector can be fitted
    stop: str | None


def decide(context: Context, iterations: Sequence[Mapping[str, Any]], missing_class: str | None) -> Plan:
    """The plan after the last of `iterations`, the entries of run.json.

    An iteration is undone in two cases. "shallow": answers begin as predicted and then say something else; the run goes
    back to iteration 0 and writes along v_a. "setback": the iteration is much worse than the best, or leaves a class
    empty; the run goes back to the best with half the step.

    Args:
        missing_class: why no answer vector can be fitted on the last iteration's training prompts, or None.
    """
    settings, objective = context.settings, context.objective
    entries = [dict(entry) for entry in iterations]
    t, last = len(entries) - 1, entries[-1]
    best, restore_to = objective.choose(entries), None
    use_gradients = not any(entry.get("shallow") for entry in entries)
    relearn = use_gradients and t < settings.iterations and _is_shallow(entries, objective)
    too_far = missing_class is not None or objective.value(entries[best]) - objective.value(last) > SETBACK
    if relearn:
        last["shallow"], use_gradients, best, restore_to = True, False, 0, 0
    elif best < t and too_far and context.predicts_labels:
        last["setback"], restore_to = True, best
    if restore_to is not None:
        for undone in entries[restore_to + 1 :]:
            undone["undone"] = True
        missing_class = None  # the restored iteration had both classes, or the run would have ended there
    setbacks = sum(bool(entry.get("setback")) for entry in entries)
    return Plan(
        iterations=entries,
        best=best,
        restore_to=restore_to,
        relearn=relearn,
        step=settings.step / 2**setbacks,
        use_gradients=use_gradients,
        use_classifier=context.predicts_labels and (last["foretold"] >= MIN_AGREEMENT or relearn),
        missing_class=missing_class,
        stop=stop_reason(entries, settings, objective) or missing_class,
    )


def stop_reason(iterations: Sequence[Mapping[str, Any]], settings: Settings, objective: Objective) -> str | None:
    """Why the run stops, or None."""
    t, best = len(iterations) - 1, objective.choose(iterations)
    if settings.patience and iterations[best]["f1"] == 1.0 and not objective.violation(iterations[best]):
        return "validation F1 is 1"
    if settings.patience and t - best >= settings.patience:
        return f"validation F1 has not improved for {settings.patience} iterations"
    if t >= settings.iterations:
        return f"all {settings.iterations} iterations are done"
    if sum(bool(entry.get("setback")) for entry in iterations) > MAX_SETBACKS:
        return f"it went too far {MAX_SETBACKS + 1} times"
    return None


def _is_shallow(iterations: Sequence[Mapping[str, Any]], objective: Objective) -> bool:
    """Whether the last iteration's answers begin as predicted and then say something else."""
    predicted = iterations[-2].get("foreseen") if len(iterations) > 1 else None
    return predicted is not None and predicted - objective.value(iterations[-1]) > SHALLOW
