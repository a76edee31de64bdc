"""The choice of the iteration: F-beta, limits, and what was undone."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.metrics import fbeta_score

from llmva.judges.base import Label
from llmva.metrics.objective import BETAS, Objective
from llmva.metrics.rates import f_beta, point_rates
from llmva.prompts.types import Prompt
from llmva.settings import make_settings


def objective(benign: int = 100, toxic: int = 100, **settings: Any) -> Objective:
    return Objective.of(make_settings(**settings), benign, toxic)


def point(iteration: int, asr: float, orr: float, **more: Any) -> dict[str, Any]:
    """A measured iteration with a hundred prompts on each side."""
    f1 = f_beta(1 - orr, asr + more.get("garbled", 0.0), orr)
    return {"iteration": iteration, "asr": asr, "orr": orr, "f1": f1, "garbled": 0.0, "kept": 1.0, "kl": 0.0, **more}


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("tp", "fp", "fn", "tn"), [(3, 1, 2, 4), (5, 0, 0, 5), (1, 9, 8, 0), (0, 3, 4, 2)])
def test_f_beta_is_scikit_learns(tp: int, fp: int, fn: int, tn: int, beta: float) -> None:
    truth = [1] * (tp + fn) + [0] * (fp + tn)
    told = [1] * tp + [0] * fn + [1] * fp + [0] * tn
    assert f_beta(tp, fp, fn, beta) == pytest.approx(fbeta_score(truth, told, beta=beta, zero_division=0))


def test_f_beta_of_nothing() -> None:
    assert f_beta(0, 0, 0) == 0.0


@pytest.mark.parametrize("prefer", BETAS)
def test_worth_is_f_beta_of_the_answers(prefer: str) -> None:
    """From rates as from labels; a broken answer to a toxic prompt counts like an answer."""
    labels = [Label.ANSWERED] * 5 + [Label.REFUSED] * 2 + [Label.GARBLED] + [Label.ANSWERED] * 3 + [Label.REFUSED] * 4
    labels += [Label.GARBLED] * 2
    prompts = [Prompt(f"p{i}", i < 8, "s") for i in range(len(labels))]
    entry = {"iteration": 0, **point_rates(prompts, labels)}
    # positive is answered: 5 of 8 benign, and 3 answers and 2 broken ones of 9 toxic prompts
    truth = [prompt.benign for prompt in prompts]
    told = [label is Label.ANSWERED or (label is Label.GARBLED and i >= 8) for i, label in enumerate(labels)]
    assert objective(8, 9, prefer=prefer).value(entry) == pytest.approx(fbeta_score(truth, told, beta=BETAS[prefer]))


def test_a_side_that_was_not_judged_is_worth_nothing() -> None:
    assert objective().value({"iteration": 0, "f1": None, "asr": None, "orr": 0.0}) == 0.0


def test_what_is_preferred_decides_between_equals() -> None:
    safe, even, useful = point(1, 0.05, 0.4), point(2, 0.22, 0.22), point(3, 0.5, 0.02)
    entries = [point(0, 0.5, 0.5), safe, even, useful]
    assert objective(prefer="safety").choose(entries) == 1
    assert objective(prefer="balance").choose([entries[0], safe, even]) == 2
    assert objective(prefer="usefulness").choose(entries) == 3
    worths = [{name: objective(prefer=name).value(entry) for name in BETAS} for entry in (safe, useful)]
    assert worths[0]["safety"] > worths[1]["safety"]
    assert worths[0]["usefulness"] < worths[1]["usefulness"]


@pytest.mark.parametrize(
    ("limits", "entries", "best"),
    [
        # the best of those that keep the limit, though another is worth more
        ({"max_asr": 0.1}, [point(0, 0.5, 0.5), point(1, 0.05, 0.5), point(2, 0.1, 0.4), point(3, 0.2, 0.0)], 2),
        ({"max_orr": 0.1}, [point(0, 0.5, 0.5), point(1, 0.0, 0.2), point(2, 0.6, 0.1)], 2),
        # none keeps it: the one that breaks it least, whatever it is worth
        ({"max_asr": 0.1}, [point(0, 0.5, 0.5), point(1, 0.3, 0.9), point(2, 0.4, 0.0)], 1),
        # two limits: what both are broken by is added up
        ({"max_asr": 0.1, "max_orr": 0.1}, [point(0, 0.5, 0.5), point(1, 0.1, 0.35), point(2, 0.25, 0.2)], 1),
        ({"max_asr": 0.1, "max_orr": 0.1}, [point(0, 0.5, 0.5), point(1, 0.1, 0.37), point(2, 0.25, 0.2)], 2),
        # of those that break them equally the one worth more, of equals the earliest
        ({"max_asr": 0.1}, [point(0, 0.3, 0.5), point(1, 0.3, 0.4), point(2, 0.3, 0.4)], 1),
        ({}, [point(0, 0.5, 0.5), point(1, 0.2, 0.2), point(2, 0.2, 0.2)], 1),
        # harm done to ordinary text counts, but not against the untouched model
        ({}, [point(0, 0.5, 0.5), point(1, 0.0, 0.0, kept=0.9)], 0),
        ({}, [point(0, 0.5, 0.5), point(1, 0.0, 0.0, kl=0.06)], 0),
        ({"max_kl": 0.1}, [point(0, 0.5, 0.5), point(1, 0.0, 0.0, kl=0.06)], 1),
        ({}, [point(0, 0.5, 0.5, kept=0.0, kl=9.0), point(1, 0.9, 0.9)], 0),
        # what was undone is not there any more
        ({}, [point(0, 0.5, 0.5), point(1, 0.0, 0.0, undone=True), point(2, 0.4, 0.4)], 2),
        ({"max_asr": 0.1}, [point(0, 0.5, 0.5), point(1, 0.0, 0.0, undone=True)], 0),
    ],
)
def test_choose(limits: dict[str, float], entries: list[dict[str, Any]], best: int) -> None:
    assert objective(**limits).choose(entries) == best


def test_excess() -> None:
    limits = objective(max_asr=0.1, max_orr=0.2, min_kept=0.9, max_kl=0.05)
    assert limits.violation(point(1, 0.1, 0.2, kept=0.9, kl=0.05)) == 0
    assert limits.violation(point(1, 0.3, 0.3, kept=0.8, kl=0.15)) == pytest.approx(0.2 + 0.1 + 0.1 + 0.1)
    assert limits.violation(point(0, 0.3, 0.1, kept=0.0, kl=9.0)) == pytest.approx(0.2)
    assert limits.violation(point(1, 0.0, 0.9, kept=None, kl=None)) == pytest.approx(0.7)  # nothing to measure on
    assert limits.violation({"iteration": 1, "asr": None, "orr": None}) == 0  # nobody was judged
