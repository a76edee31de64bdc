"""SVMs whose samples have costs of their own, and benign vectors that lean to a side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.svm import LinearSVC
from torch import Tensor

from llmva.errors import UsageError
from llmva.method.context import Context
from llmva.method.identify import Fit, identify
from llmva.method.svm import HarmlessMetric, fit_sklearn, fit_svms
from llmva.prompts.prompt_set import PromptSet
from llmva.settings import make_settings
from test_identify import HELD_OUT, TRAIN, observed


def problem(n: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, d], two labellings [2, n], costs [2, n] between 0.1 and 10."""
    g = torch.Generator().manual_seed(seed)
    y = torch.where(torch.rand(2, n, generator=g) < 0.5, 1, -1)
    y[:, 0], y[:, 1] = 1, -1
    x = torch.randn(n, d, generator=g, dtype=torch.float64) + 0.3 * y[0, :, None]
    return x, y, 10 ** (2 * torch.rand(2, n, generator=g, dtype=torch.float64) - 1)


@pytest.mark.parametrize(("n", "d"), [(30, 90), (120, 7), (25, 25), (60, 1)])
def test_costs_of_samples_are_those_of_scikit_learn(n: int, d: int) -> None:
    for seed in range(4):
        x, y, costs = problem(n, d, seed)
        found = fit_svms(x[None], y, costs)[0]
        for m in range(2):
            svm = LinearSVC(C=1.0, fit_intercept=False, tol=1e-10, max_iter=2_000_000, random_state=0)
            expected = torch.from_numpy(svm.fit(x.numpy(), y[m].numpy(), sample_weight=costs[m].numpy()).coef_[0])
            assert (found[m] - expected).norm() <= 1e-6 * expected.norm()
        again = fit_sklearn(x[None], y, costs, max_iter=2_000_000)[0]
        assert torch.allclose(again, found, atol=1e-3)


@pytest.mark.parametrize("quiet", [False, True])
def test_the_optimum_has_no_gradient(quiet: bool) -> None:
    for seed in range(10):
        x, y, costs = problem(50, 40, seed)
        metric = HarmlessMetric.of(torch.randn(20, 40, generator=torch.Generator().manual_seed(seed)))
        w = fit_svms(x[None], y, costs, metric=[metric] if quiet else None)[0]
        M = torch.eye(40, dtype=torch.float64) + (metric.rows.T @ metric.rows if quiet else 0.0)
        for m in range(2):
            slack = (1.0 - y[m] * (x @ w[m])).clamp_min(0.0)
            assert (M @ w[m] - 2.0 * x.T @ (costs[m] * y[m] * slack)).norm() < 1e-8 * w[m].norm()


def test_equal_costs_are_one_cost() -> None:
    x, y, _ = problem(40, 60, 0)
    for C in (1.0, 0.3):
        same = torch.full((2, 40), C, dtype=torch.float64)
        assert torch.allclose(fit_svms(x[None], y, same), fit_svms(x[None], y, C), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "costs", [torch.ones(40), torch.zeros(2, 40), torch.full((2, 40), torch.inf), -torch.ones(2, 40)]
)
def test_bad_costs_are_refused(costs: Tensor) -> None:
    x, y, _ = problem(40, 60, 0)
    with pytest.raises(UsageError, match="C must be positive"):
        fit_svms(x[None], y, costs)


@pytest.fixture
def seen(model: Any) -> tuple[Any, Any]:
    from llmva.models.sublayers import find_decoder

    decoder = find_decoder(model)
    return observed(decoder, TRAIN, 0), observed(decoder, HELD_OUT, 1)


def test_a_lean_changes_benign_vectors_alone(seen: tuple[Any, Any]) -> None:
    plain = identify(*seen)
    assert torch.equal(plain.directions, identify(*seen, fit=Fit(lean=1.0)).directions)
    for lean in (4.0, 0.25):
        leaning = identify(*seen, fit=Fit(lean=lean))
        assert torch.allclose(leaning.directions[:, 0], plain.directions[:, 0], atol=1e-10)
        assert not torch.allclose(leaning.directions[:, 1], plain.directions[:, 1], atol=1e-3)


def test_a_lean_to_safety_puts_more_toxic_prompts_on_their_side() -> None:
    """In a problem whose classes overlap, which no vector separates."""
    from llmva.method.identify import _costs

    x, y, _ = problem(200, 5, 3)
    labels = y[:1]
    right = {}
    for lean in (4.0, 1.0, 0.25):
        w = fit_svms(torch.cat([x, torch.ones(200, 1)], 1)[None], labels, _costs(labels, 1.0, lean))[0, 0]
        said = torch.cat([x, torch.ones(200, 1)], 1) @ w > 0
        right[lean] = (float((~said[labels[0] == -1]).double().mean()), float(said[labels[0] == 1].double().mean()))
    assert right[4.0][0] > right[1.0][0] > right[0.25][0]
    assert right[4.0][1] < right[1.0][1] < right[0.25][1]


@pytest.mark.parametrize(("prefer", "lean"), [("safety", 4.0), ("balance", 1.0), ("usefulness", 0.25)])
def test_what_is_preferred_decides_the_lean(prefer: str, lean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmva.method import context

    given: dict[str, Any] = {}
    monkeypatch.setattr(context, "identify", lambda *seen, **options: given.update(options))
    made = [None] * 8
    made[3] = make_settings(prefer=prefer, harmless_weight=0.0)  # type: ignore[call-overload]
    made[1] = PromptSet((), (), ())  # type: ignore[call-overload]
    Context(*made).fit(None, None, None, 1)  # type: ignore[arg-type]
    assert given["fit"].lean == lean
