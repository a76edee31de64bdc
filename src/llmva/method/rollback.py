"""After an iteration was measured: go on from it or undo it, how far to step next, or stop. No model is needed.

The paper has none of this: it makes all its iterations and keeps the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmva.method.context import Context
from llmva.metrics.objective import Objective
from llmva.settings import Settings

MIN_AGREEMENT = 0.9  # share of validation labels that the first token must predict, for a run to go by predictions
SETBACK = 0.05  # an iteration whose value is so far below the best is undone and tried again with half the step
MAX_SETBACKS = 3
SHALLOW = 0.1  # an iteration whose value is so far below the predicted one changed how answers begin, not what they say


@dataclass(frozen=True)
class Plan:
    """What follows an iteration."""

    iterations: list[dict[str, Any]]  # as run.json holds them, with what is undone marked
    best: int  # the iteration that would be kept now
    restore_to: int | None  # the iteration to go back to; None undoes nothing
    relearn: bool  # whether what answers taught the classifier is forgotten with what is undone
    step: float
    use_gradients: bool  # whether to write along gradients, or along v_a as in the paper
    use_classifier: bool  # whether labels may be predicted
    missing_class: str | None  # why no answer vector can be fitted
    stop: str | None


def decide(context: Context, iterations: Sequence[Mapping[str, Any]], missing_class: str | None) -> Plan:
    """The plan after the last of `iterations`, the entries of run.json.

    An iteration is undone if its answers begin as predicted and then say something else ("shallow"): the run begins
    anew and writes along v_a. Or if it is much worse than the best, or leaves a class empty ("setback"): the run goes
    on from the best with half the step.

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
        missing_class = None  # where it goes back to both classes were there, or the run had ended there
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
    """Why no further iteration is worth its cost, or None."""
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
    """Whether the last iteration's answers begin as they were predicted to, and then say something else."""
    predicted = iterations[-2].get("foreseen") if len(iterations) > 1 else None
    return predicted is not None and predicted - objective.value(iterations[-1]) > SHALLOW
