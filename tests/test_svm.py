"""The solver against scikit-learn, against a general minimiser, and against the conditions of an optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn.svm import LinearSVC
from torch import Tensor

from llmva.errors import LlmvaError, UsageError
from llmva.method.svm import HarmlessMetric, angles, fit_sklearn, fit_svms, spread, unit
from llmva.settings import make_settings


def problem(n: int, d: int, seed: int = 0, positive: float = 0.5) -> tuple[Tensor, Tensor]:
    """Overlapping classes: features float64 [n, d] and labels [n] with about a share `positive` of +1."""
    g = torch.Generator().manual_seed(seed)
    y = torch.where(torch.rand(n, generator=g) < positive, 1, -1)
    y[0], y[1] = 1, -1
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x + 0.3 * y[:, None], y


def gradient(w: Tensor, x: Tensor, y: Tensor, C: float, metric: Tensor | None = None) -> Tensor:
    """Of the primal objective, which is convex and smooth: zero at the optimum and only there."""
    slack = (1.0 - y * (x @ w)).clamp_min(0.0)
    return (w if metric is None else metric @ w) - 2.0 * C * x.T @ (y * slack)


def objective(w: Tensor, x: Tensor, y: Tensor, C: float, metric: Tensor | None = None) -> float:
    own = w if metric is None else metric @ w
    return float(0.5 * w @ own + C * (1.0 - y * (x @ w)).clamp_min(0.0).pow(2).sum())


def edge_cases() -> dict[str, tuple[Tensor, Tensor]]:
    x, y = problem(40, 12, seed=1)
    one_zero = x.clone()
    one_zero[:, 3] = 0.0
    constant = x.clone()
    constant[:, 5] = 2.5
    equal_rows = x.clone()
    equal_rows[20:] = equal_rows[:20]  # with labels that partly disagree
    separable = x + 4.0 * y[:, None]
    return {
        "wide": problem(30, 90, seed=2),
        "tall": problem(200, 7, seed=3),
        "square": problem(25, 25, seed=4),
        "one column": problem(50, 1, seed=5),
        "imbalanced": problem(120, 20, seed=6, positive=0.03),
        "duplicates": (torch.cat([x, x]), torch.cat([y, y])),
        "contradicting duplicates": (equal_rows, y),
        "a zero feature": (one_zero, y),
        "a constant feature": (constant, y),
        "separable": (separable, y),
        "one of each": (x[:2], torch.tensor([1, -1])),
    }


@pytest.mark.parametrize("C", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", edge_cases())
def test_equals_scikit_learn_and_has_no_gradient(name: str, C: float) -> None:
    x, y = edge_cases()[name]
    w = fit_svms(x[None], y[None], C)[0, 0]
    assert w.dtype == torch.float64
    assert float(gradient(w, x, y, C).norm()) < 1e-8
    dual = bool(len(x) < 60)  # liblinear's two solvers; each where it converges fast
    svm = LinearSVC(C=C, fit_intercept=False, tol=1e-10, max_iter=1_000_000, dual=dual).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(w, torch.from_numpy(svm.coef_[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dual", [True, False])
def test_equals_both_solvers_of_scikit_learn(dual: bool) -> None:
    x, y = problem(60, 20, seed=7)
    svm = LinearSVC(C=0.5, fit_intercept=False, tol=1e-10, max_iter=1_000_000, dual=dual).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(
        fit_svms(x[None], y[None], 0.5)[0, 0], torch.from_numpy(svm.coef_[0]), rtol=1e-6, atol=1e-7
    )


def ill_conditioned(seed: int) -> tuple[Tensor, Tensor]:
    """Like real activations: a shared offset, a few dominant directions, most information in the small ones."""
    g = torch.Generator().manual_seed(seed)
    x, y = problem(150, 200, seed)
    scale = torch.logspace(2.5, -2, 200, dtype=torch.float64)
    return x * scale + 30.0 * torch.randn(200, generator=g, dtype=torch.float64) * (scale > 50), y


@pytest.mark.parametrize("seed", range(3))
def test_objective_is_never_above_scikit_learns_on_ill_conditioned_data(seed: int) -> None:
    x, y = ill_conditioned(seed)
    ours = fit_svms(x[None], y[None])[0, 0]
    theirs = fit_sklearn(x[None], y[None], max_iter=2000)[0, 0]
    assert objective(ours, x, y, 1.0) <= objective(theirs, x, y, 1.0)
    # and it is the optimum: the gradient is nothing beside the terms that cancel in it
    terms = 2.0 * (x * (1.0 - y * (x @ ours)).clamp_min(0.0)[:, None]).norm(dim=-1).sum()
    assert float(gradient(ours, x, y, 1.0).norm() / terms) < 1e-8


def test_scikit_learn_is_not_converged_there() -> None:
    """Else the test above would compare two optima."""
    x, y = ill_conditioned(0)
    ours, theirs = (fit(x[None], y[None])[0, 0] for fit in (fit_svms, fit_sklearn))
    assert objective(theirs, x, y, 1.0) > 1.00001 * objective(ours, x, y, 1.0)


coarse = st.integers(-40, 40).map(lambda v: v / 8)  # equal values, equal rows and exact margins come up often


@st.composite
def problems(draw: Any) -> tuple[Tensor, Tensor, float]:
    n, d = draw(st.integers(2, 14)), draw(st.integers(1, 9))
    x = draw(npst.arrays(np.float64, (n, d), elements=coarse))
    y = draw(npst.arrays(np.int64, n, elements=st.sampled_from([-1, 1])).filter(lambda a: len(set(a)) == 2))
    return torch.from_numpy(x), torch.from_numpy(y), draw(st.sampled_from([1e-3, 0.1, 1.0, 7.0, 1e3]))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_any_small_problem_meets_the_conditions_of_an_optimum(given_problem: tuple[Tensor, Tensor, float]) -> None:
    x, y, C = given_problem
    w = fit_svms(x[None], y[None], C)[0, 0]
    scale = 1.0 + 2.0 * C * float(x.norm(dim=-1).sum())
    assert float(gradient(w, x, y, C).norm()) < 1e-9 * scale


def test_shapes_shared_and_separate_labels() -> None:
    sets = [problem(20, 8, seed=s) for s in range(3)]
    x = torch.stack([x for x, _ in sets])
    y = torch.stack([torch.stack([y, -y, y.roll(3)]) for _, y in sets])
    w = fit_svms(x, y)
    assert w.shape == (3, 3, 8)
    for s in range(3):
        for m in range(3):
            torch.testing.assert_close(w[s, m], fit_svms(x[s : s + 1], y[s, m][None])[0, 0])
    torch.testing.assert_close(w[:, 0], -w[:, 1])
    torch.testing.assert_close(fit_svms(x, y[0]), fit_svms(x, y[:1].expand(3, -1, -1)))
    assert not torch.allclose(fit_svms(x, y[0])[1], w[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_features_are_fitted_in_float64(dtype: torch.dtype) -> None:
    x, y = problem(30, 50)
    narrow = x.to(dtype)
    w = fit_svms(narrow[None], y[None].to(torch.int8))[0, 0]
    assert w.dtype == torch.float64
    assert float(gradient(w, narrow.double(), y, 1.0).norm()) < 1e-8


def test_zero_features_give_zero_vectors() -> None:
    _, y = problem(20, 8)
    w = fit_svms(torch.zeros(1, 20, 8), y[None])
    assert torch.equal(w, torch.zeros(1, 1, 8, dtype=torch.float64))
    assert torch.equal(unit(w), w)


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_scale_of_the_features(scale: float) -> None:
    x, y = problem(30, 12)
    x = x * scale
    w = fit_svms(x[None], y[None])[0, 0]
    terms = 2.0 * float((x * (1.0 - y * (x @ w)).clamp_min(0.0)[:, None]).norm(dim=-1).sum()) + float(w.norm())
    assert float(gradient(w, x, y, 1.0).norm()) < 1e-8 * terms


BAD: dict[str, tuple[Tensor, Tensor, float, str]] = {
    "one class": (torch.ones(1, 4, 3), torch.ones(1, 4), 1.0, "one class"),
    "one class in one of two": (torch.ones(1, 2, 3), torch.tensor([[1, -1], [-1, -1]]), 1.0, "one class"),
    "zero label": (torch.ones(1, 2, 3), torch.tensor([[1, 0]]), 1.0, r"\+1 or -1"),
    "other label": (torch.ones(1, 2, 3), torch.tensor([[2, -1]]), 1.0, r"\+1 or -1"),
    "C zero": (torch.ones(1, 2, 3), torch.tensor([[1, -1]]), 0.0, "positive"),
    "C negative": (torch.ones(1, 2, 3), torch.tensor([[1, -1]]), -1.0, "positive"),
    "C NaN": (torch.ones(1, 2, 3), torch.tensor([[1, -1]]), float("nan"), "positive"),
    "C infinite": (torch.ones(1, 2, 3), torch.tensor([[1, -1]]), float("inf"), "positive"),
    "flat features": (torch.ones(2, 3), torch.tensor([[1, -1]]), 1.0, "features must be"),
    "flat labels": (torch.ones(1, 2, 3), torch.tensor([1, -1]), 1.0, "do not fit"),
    "other count": (torch.ones(1, 3, 3), torch.tensor([[1, -1]]), 1.0, "do not fit"),
    "other sublayers": (torch.ones(2, 2, 3), torch.tensor([[[1, -1]]]), 1.0, "do not fit"),
}


@pytest.mark.parametrize("fit", [fit_svms, fit_sklearn])
@pytest.mark.parametrize("name", BAD)
def test_unusable_problems_are_refused(name: str, fit: Any) -> None:
    x, y, C, words = BAD[name]
    with pytest.raises(UsageError, match=words):
        fit(x, y, C)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_settings_refuse_the_same_costs(value: float) -> None:
    with pytest.raises(UsageError, match="C="):
        make_settings(C=value)
    if value != 0.0:
        with pytest.raises(UsageError, match="harmless_weight="):
            make_settings(harmless_weight=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    x = torch.ones(1, 2, 3)
    x[0, 1, 2] = value
    with pytest.raises(LlmvaError, match="not finite"):
        fit_svms(x, torch.tensor([[1, -1]]))


# -- quiet readers ---------------------------------------------------------------------------------------------------


def quiet_metric(harmless: Tensor, strength: float) -> Tensor:
    """M formed as method.md writes it: I + lambda S, lambda = strength / mean eigenvalue of S."""
    second_moment = harmless.T @ harmless / len(harmless)
    return (
        torch.eye(harmless.shape[1], dtype=torch.float64)
        + strength * second_moment / torch.linalg.eigvalsh(second_moment).mean()
    )


@pytest.mark.parametrize("q", [5, 24, 80], ids=["q<d", "q=d", "q>d"])
def test_quiet_solves_with_its_metric(q: int) -> None:
    g = torch.Generator().manual_seed(q)
    harmless = torch.randn(q, 24, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, 24, dtype=torch.float64)
    x, _ = problem(30, 24)
    direct = torch.linalg.solve(quiet_metric(harmless, 3.0), x.T).T
    torch.testing.assert_close(HarmlessMetric.of(harmless, 3.0).solve(x), direct, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("q", [3, 30], ids=["q<d", "q>d"])
def test_quiet_weights_equal_a_general_minimisers(q: int) -> None:
    from scipy.optimize import minimize

    g = torch.Generator().manual_seed(q)
    harmless = torch.randn(q, 6, generator=g, dtype=torch.float64) * 3.0
    x, y = problem(25, 6)
    metric = quiet_metric(harmless, 2.0)
    w = fit_svms(x[None], y[None], 0.7, metric=[HarmlessMetric.of(harmless, 2.0)])[0, 0]
    assert float(gradient(w, x, y, 0.7, metric).norm()) < 1e-8

    def both(v: Any) -> tuple[float, Any]:
        t = torch.from_numpy(v)
        return objective(t, x, y, 0.7, metric), gradient(t, x, y, 0.7, metric).numpy()

    found = minimize(both, np.zeros(6), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    torch.testing.assert_close(w, torch.from_numpy(found.x), rtol=1e-5, atol=1e-6)


def test_harmless_projections_shrink_with_strength() -> None:
    g = torch.Generator().manual_seed(0)
    harmless = torch.randn(40, 64, generator=g, dtype=torch.float64) * 2.0
    x, y = problem(50, 64)
    raw, along = [], []
    for strength in (1e-6, 0.1, 1.0, 10.0, 100.0):
        w = fit_svms(x[None], y[None], metric=[HarmlessMetric.of(harmless, strength)])[0, 0]
        raw.append(float((harmless @ w).pow(2).sum()))
        along.append(float((harmless @ unit(w)).pow(2).sum()))
    assert raw == sorted(raw, reverse=True)
    assert along == sorted(along, reverse=True)
    assert along[-1] < 0.1 * along[0]
    plain = fit_svms(x[None], y[None])[0, 0]
    still = fit_svms(x[None], y[None], metric=[HarmlessMetric.of(harmless, 0.0)])[0, 0]
    torch.testing.assert_close(still, plain)


def test_strength_has_no_unit() -> None:
    g = torch.Generator().manual_seed(0)
    harmless = torch.randn(10, 16, generator=g, dtype=torch.float64)
    x, _ = problem(5, 16)
    torch.testing.assert_close(
        HarmlessMetric.of(harmless, 1.5).solve(x), HarmlessMetric.of(1000.0 * harmless, 1.5).solve(x)
    )


def test_silent_harmless_text_changes_nothing() -> None:
    x, _ = problem(5, 16)
    torch.testing.assert_close(HarmlessMetric.of(torch.zeros(4, 16)).solve(x), x)


# -- small functions -------------------------------------------------------------------------------------------------


def test_unit_spread_angles_by_hand() -> None:
    v = unit(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=torch.float64))
    torch.testing.assert_close(v, torch.tensor([[[0.6, 0.8], [0.0, 0.0]]], dtype=torch.float64))
    features = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]])
    torch.testing.assert_close(  # projections .6, 1.8, 3: deviation sqrt(2.88 / 3)
        spread(features, v), torch.tensor([[0.96**0.5, 0.0]], dtype=torch.float64)
    )
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.75**0.5])
    assert float(angles(a, b)) == pytest.approx(60.0)
    assert float(angles(a, -a)) == pytest.approx(180.0)
    assert bool(torch.isnan(angles(a, torch.zeros(2))))
