"""What follows an iteration, decided without a model: go on, undo and halve the step, begin anew, or stop."""

from __future__ import annotations

from typing import Any

import pytest

from llmva.method.context import Context
from llmva.method.rollback import MAX_SETBACKS, MIN_AGREEMENT, SETBACK, SHALLOW, Plan, decide
from llmva.metrics.objective import Objective
from llmva.settings import make_settings

EMPTY = "every training prompt was answered, so there is no refusal to learn from"


def plan(
    f1: list[float], missing: str | None = None, marks: dict[int, dict[str, Any]] | None = None, **how: Any
) -> Plan:
    """The plan after iterations with these validation F1; `marks` are further fields of their entries."""
    settings = make_settings(**{"iterations": 9, **how})
    context = Context(None, None, None, settings, Objective.of(settings, 50, 50), 4, 0, None)  # type: ignore[arg-type]
    entries = [
        {"iteration": t, "f1": value, "asr": 0.5, "orr": 0.5, "kept": 1.0, "kl": 0.0, "foretold": 1.0}
        | (marks or {}).get(t, {})
        for t, value in enumerate(f1)
    ]
    return decide(context, entries, missing)


def marked(found: Plan, mark: str) -> list[int]:
    return [entry["iteration"] for entry in found.iterations if entry.get(mark)]


def test_it_goes_on_from_an_iteration_that_helped() -> None:
    found = plan([0.5, 0.7])
    assert (found.best, found.restore_to, found.stop, found.step) == (1, None, None, 1.0)
    assert found.use_gradients
    assert found.use_classifier


@pytest.mark.parametrize(("worse", "undone"), [(SETBACK + 0.01, True), (SETBACK - 0.01, False)])
def test_an_iteration_much_worse_than_the_best_is_undone_and_the_step_halved(worse: float, undone: bool) -> None:
    found = plan([0.5, 0.7, 0.7 - worse])
    assert found.best == 1
    assert found.restore_to == (1 if undone else None)
    assert found.step == (0.5 if undone else 1.0)
    assert marked(found, "undone") == marked(found, "setback") == ([2] if undone else [])


def test_all_that_lies_between_is_undone_too() -> None:
    found = plan([0.5, 0.48, 0.3])
    assert found.restore_to == 0
    assert marked(found, "undone") == [1, 2]
    assert marked(found, "setback") == [2]


def test_each_setback_halves_the_step_again() -> None:
    found = plan([0.5, 0.3, 0.7, 0.4], marks={1: {"setback": True, "undone": True}})
    assert (found.restore_to, found.step) == (2, 0.25)


def test_a_missing_class_is_a_setback_where_there_is_something_to_go_back_to() -> None:
    found = plan([0.5, 0.49], EMPTY)
    assert (found.restore_to, found.missing_class, found.stop) == (0, None, None)


def test_a_missing_class_stops_where_there_is_nothing() -> None:
    for found in (plan([0.5], EMPTY), plan([0.5, 0.6], EMPTY)):
        assert (found.restore_to, found.stop) == (None, EMPTY)


@pytest.mark.parametrize("how", [{"passes": 1}])
def test_the_papers_loop_undoes_nothing(how: Any) -> None:
    found = plan([0.7, 0.3], **how)
    assert (found.restore_to, found.step, found.use_classifier) == (None, 1.0, False)
    assert marked(found, "undone") == []


@pytest.mark.parametrize(("short", "shallow"), [(SHALLOW + 0.01, True), (SHALLOW - 0.01, False)])
def test_answers_that_only_begin_as_predicted_begin_the_run_anew(short: float, shallow: bool) -> None:
    found = plan([0.5, 0.9 - short], marks={0: {"foreseen": 0.9}})
    assert (found.restore_to, found.best) == ((0, 0) if shallow else (None, 1))
    assert found.relearn == shallow
    assert found.use_gradients == (not shallow)
    assert marked(found, "shallow") == marked(found, "undone") == ([1] if shallow else [])


def test_a_run_begins_anew_once_and_not_at_its_end() -> None:
    again = plan([0.5, 0.6, 0.6], marks={1: {"shallow": True, "undone": True}, 0: {"foreseen": 0.9}})
    assert not again.use_gradients
    assert marked(again, "shallow") == [1]
    assert plan([0.5, 0.6], marks={0: {"foreseen": 0.9}}, iterations=1).restore_to is None


@pytest.mark.parametrize(("agrees", "used"), [(MIN_AGREEMENT, True), (MIN_AGREEMENT - 0.01, False)])
def test_predictions_that_do_not_agree_with_the_judge_are_not_used(agrees: float, used: bool) -> None:
    assert plan([0.5], marks={0: {"foretold": agrees}}).use_classifier == used


def test_it_stops() -> None:
    assert plan([0.5, 1.0]).stop == "validation F1 is 1"
    assert "not improved for 2" in str(plan([0.7, 0.69, 0.69], patience=2).stop)
    assert plan([0.5, 0.6], iterations=1).stop == "all 1 iterations are done"
    f1 = [0.5, *[0.3] * (MAX_SETBACKS + 1)]
    marks = {t: {"setback": True, "undone": True} for t in range(1, MAX_SETBACKS + 1)}
    assert plan(f1, marks=marks, patience=9).stop == f"it went too far {MAX_SETBACKS + 1} times"


def test_the_entries_given_are_left_as_they_are() -> None:
    entries = [{"iteration": t, "f1": f, "asr": 0.5, "orr": 0.5, "foretold": 1.0} for t, f in enumerate((0.7, 0.3))]
    settings = make_settings()
    context = Context(None, None, None, settings, Objective.of(settings, 50, 50), 4, 0, None)  # type: ignore[arg-type]
    assert decide(context, entries, None).restore_to == 0
    assert not any("undone" in entry for entry in entries)
