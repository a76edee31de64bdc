"""Linear SVMs without intercept for every sublayer and label at once, solved exactly.

    min_w  1/2 w^T M w + C sum_i max(0, 1 - y_i w.o_i)^2          (paper: M = I; here M = I + lambda S)

There are far fewer prompts than dimensions, so all computations use the n x n Gram matrix K = X M^-1 X^T, which both
labels of a sublayer share. Given a guess A of the samples inside the margin, the optimum is linear,

    beta_A = (K_AA + I / 2C)^-1 y_A,   w = M^-1 X^T beta,

and A is corrected until it stops changing: Newton's method on a piecewise quadratic (Chapelle, "Training a support
vector machine in the primal", 2007). Each step ends where the objective is least along it, so A cannot cycle. If a
sample has a cost C_i of its own, the diagonal is 1 / 2C_i, and the rest is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmva.errors import LlmvaError, UsageError

Cost = float | Tensor  # one for all samples, or one each
MAX_ROUNDS = 1000  # about 10 are usual; rounding could keep the loop from ending


@dataclass(frozen=True)
class HarmlessMetric:
    """The metric M = I + H^T H of one sublayer, H = sqrt(lambda / q) times `q` harmless outputs; S is never formed.

    Of two vectors with the same margin, a fit in M prefers the one along which ordinary text varies less
    (docs/method.md, "Harmless metric"). lambda is `strength` divided by the mean eigenvalue of S, so `strength` has no
    unit and suits every sublayer. `and_of` adds rows of another kind, with a strength of their own.
    """

    rows: Tensor  # H, float64 [q, d]
    factor: Tensor  # Cholesky factor of I + H H^T [q, q], or of M itself [d, d] if that is smaller

    @classmethod
    def of(cls, harmless: Tensor, strength: float = 1.0) -> HarmlessMetric:
        """`harmless` [q, d]: the sublayer's outputs at positions of harmless text."""
        return cls._of_rows(_scaled(harmless, strength))

    def and_of(self, outputs: Tensor, strength: float) -> HarmlessMetric:
        """The metric with `outputs` [q', d] added, as `of` takes them."""
        return self._of_rows(torch.cat([self.rows, _scaled(outputs, strength)]))

    @classmethod
    def _of_rows(cls, rows: Tensor) -> HarmlessMetric:
        q, d = rows.shape
        gram = rows @ rows.T if q < d else rows.T @ rows
        return cls(rows, torch.linalg.cholesky(gram + torch.eye(min(q, d), dtype=torch.float64, device=rows.device)))

    def solve(self, x: Tensor) -> Tensor:
        """M^-1 applied to each row of `x` [n, d]; by Woodbury's identity if q < d."""
        q, d = self.rows.shape
        if q < d:
            return x - torch.cholesky_solve(self.rows @ x.T, self.factor).T @ self.rows
        return torch.cholesky_solve(x.T, self.factor).T


def _scaled(outputs: Tensor, strength: float) -> Tensor:
    """float64 rows H with mean eigenvalue `strength` of H^T H."""
    rows = outputs.to(torch.float64)
    mean_eigenvalue = rows.pow(2).sum() / (rows.shape[0] * rows.shape[1])
    return rows * (strength / mean_eigenvalue.clamp_min(1e-30) / rows.shape[0]).sqrt()


def fit_svms(features: Tensor, labels: Tensor, C: Cost = 1.0, *, metric: list[HarmlessMetric] | None = None) -> Tensor:
    """Exact weights of the squared-hinge SVMs above.

    Args:
        features: `o` of S sublayers for n prompts, [S, n, d], any float dtype.
        labels: m labellings in {-1, +1}, [m, n] shared by all sublayers or [S, m, n].
        C: cost of a margin violation, or [m, n] with one for each sample and labelling; must be positive.
        metric: one per sublayer; None is the paper's (M = I).

    Returns:
        float64 [S, m, d] on the device of `features`; the zero vector if all features are zero.

    Raises:
        UsageError: shapes that do not fit, labels other than +-1 or of one class only, C <= 0.
        LlmvaError: non-finite features.
    """
    labels = _checked(features, labels, C)
    out = []
    for s, x in enumerate(features):
        x = x.to(torch.float64)
        mapped = x if metric is None else metric[s].solve(x)
        beta = solve_dual(x @ mapped.T, labels[s].to(torch.float64), C)
        out.append(beta @ mapped)
    return torch.stack(out)


def solve_dual(gram: Tensor, y: Tensor, C: Cost = 1.0) -> Tensor:
    """beta [m, n] for one Gram matrix K [n, n] and m labellings y [m, n], all float64; C a number or [m, n].

    The first rounds run in float32, which halves their cost. Float64 rounds then start from their result and continue
    until A is stable, so the result does not depend on the first phase.
    """
    costs: list[Cost] = [C] * len(y) if isinstance(C, float | int) else list(C.to(gram))
    rough, zero = gram.float(), torch.zeros(len(gram), dtype=torch.float32, device=gram.device)
    guesses = [
        _newton(rough, row.float(), zero, cost if isinstance(cost, float | int) else cost.float(), len(gram) // 32)
        for row, cost in zip(y, costs, strict=True)
    ]
    del rough  # two matrices of this size are enough at a time
    return torch.stack(
        [_newton(gram, row, guess.to(gram), cost, 0) for row, guess, cost in zip(y, guesses, costs, strict=True)]
    )


def _newton(gram: Tensor, y: Tensor, beta: Tensor, C: Cost, slack: int) -> Tensor:
    """Newton's method from `beta` [n], until a full step would move at most `slack` samples across the margin."""
    decision = gram @ beta
    value = _objective(beta, decision, y, C)
    for _ in range(MAX_ROUNDS):
        active = y * decision < 1.0
        target = _solve_active(gram, y, active, C)
        reached = gram @ target
        if not torch.isfinite(reached).all():  # float32 only: K is too ill-conditioned; float64 continues from here
            return beta
        if int(((y * reached < 1.0) != active).sum()) <= slack:
            return target  # if no sample crosses, A was right, and this is the optimum
        length = _line_search(target - beta, decision, reached - decision, y, C)
        nearer, there = beta + length * (target - beta), decision + length * (reached - decision)
        lower = _objective(nearer, there, y, C)
        if not lower < value:
            return beta  # no step lowers the objective: the optimum up to rounding
        beta, decision, value = nearer, there, lower
    return beta


def _line_search(step: Tensor, decision: Tensor, moved: Tensor, y: Tensor, C: Cost) -> float:
    """The length t at which the objective along beta + t step is least; `moved` is K step.

    The slope in t increases and is linear between the points where a sample crosses the margin. The function takes
    these points in order and finds the first interval at whose end the slope is no longer negative (Keerthi and
    DeCoste, "A modified finite Newton method for fast solution of large scale linear SVMs", 2005). Halving the step
    instead can take hundreds of rounds.
    """
    room, speed = 1.0 - y * decision, y * moved  # a sample's slack at t is max(0, room - t speed)
    crossing = torch.where(room * speed > 0, room / speed, torch.inf)
    first = (room > 0) | ((room == 0) & (speed < 0))
    order = crossing.argsort()
    enters = torch.where(room > 0, -1.0, 1.0)[order]  # the sample leaves the margin, or enters it
    constant = 2.0 * _total(C, torch.where(first, room * speed, 0.0)) - step.dot(decision)
    rise = 2.0 * _total(C, torch.where(first, speed * speed, 0.0)) + step.dot(moved)
    at, r, v = crossing[order], room[order], speed[order]
    if not isinstance(C, float | int):
        enters, C = enters * C[order], 1.0
    constants = torch.cat([constant[None], constant + 2.0 * C * (enters * r * v).cumsum(0)])
    rises = torch.cat([rise[None], rise + 2.0 * C * (enters * v * v).cumsum(0)])
    # the slope is rise t - constant; rounding in a flat interval must not lead out of it
    stretch = int(((rises[:-1] * at < constants[:-1]) & at.isfinite()).sum())
    start, end = float(at[stretch - 1]) if stretch else 0.0, float(at[stretch]) if stretch < len(at) else torch.inf
    flat = not rises[stretch] > 0
    return start if flat else min(max(float(constants[stretch] / rises[stretch]), start), end)


def _solve_active(gram: Tensor, y: Tensor, active: Tensor, C: Cost) -> Tensor:
    """The optimum if exactly the `active` samples lie inside the margin; NaN if K_AA + I / 2C is not definite."""
    index = active.nonzero().flatten()
    beta = torch.zeros_like(y)
    if len(index):
        system = gram[index[:, None], index]
        system.diagonal().add_(0.5 / (C if isinstance(C, float | int) else C[index]))
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(system, out=(system, failed))  # in place: these are a fit's largest matrices
        solved = torch.cholesky_solve(y[index, None], system).flatten()
        beta[index] = solved if not failed else torch.nan
    return beta


def _objective(beta: Tensor, decision: Tensor, y: Tensor, C: Cost) -> Tensor:
    """Value of the SVM's objective."""
    return 0.5 * (beta * decision).sum(-1) + _total(C, (1.0 - y * decision).clamp_min(0.0).pow(2))


def _total(C: Cost, values: Tensor) -> Tensor:
    """sum C_i values_i; a single C is multiplied once, which rounds least."""
    return C * values.sum() if isinstance(C, float | int) else (C * values).sum()


def fit_sklearn(features: Tensor, labels: Tensor, C: Cost = 1.0, *, max_iter: int = 2000, seed: int = 0) -> Tensor:
    """The paper's solver, for comparison (`--svm sklearn`): scikit-learn's LinearSVC, one problem at a time.

    Shapes are those of `fit_svms`. It stops after `max_iter` rounds, converged or not.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    labels = _checked(features, labels, C)
    weights = torch.zeros(*labels.shape[:2], features.shape[-1], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for s, x in enumerate(features):
            rows = x.detach().to("cpu", torch.float64).numpy()
            for m, y in enumerate(labels[s].cpu().numpy()):
                each = None if isinstance(C, float | int) else C[m].cpu().numpy()
                svm = LinearSVC(
                    C=C if isinstance(C, float | int) else 1.0,
                    fit_intercept=False,
                    max_iter=max_iter,
                    random_state=seed,
                ).fit(rows, y, sample_weight=each)
                weights[s, m] = torch.from_numpy(svm.coef_[0])
    return weights.to(features.device)


def unit(weights: Tensor) -> Tensor:
    """v = w / |w| along the last axis; the zero vector stays zero."""
    length: Tensor = weights.norm(dim=-1, keepdim=True)
    return weights / length.clamp_min(1e-30)


def spread(features: Tensor, vectors: Tensor) -> Tensor:
    """sigma: standard deviation of the projections o.v, [S, m] from features [S, n, d] and unit vectors [S, m, d]."""
    return torch.einsum("snd,smd->smn", features.to(vectors.dtype), vectors).std(-1, correction=0)


def angles(first: Tensor, second: Tensor) -> Tensor:
    """Degrees between unit vectors along the last axis; NaN if one is zero."""
    cosine = (first * second).sum(-1)
    known = (first.norm(dim=-1) > 0.5) & (second.norm(dim=-1) > 0.5)
    degrees: Tensor = torch.where(known, torch.rad2deg(torch.arccos(cosine.clamp(-1.0, 1.0))), torch.nan)
    return degrees


def _checked(features: Tensor, labels: Tensor, C: Cost) -> Tensor:
    if features.ndim != 3:
        raise UsageError(f"features must be [sublayers, prompts, width], not {list(features.shape)}.")
    if labels.ndim == 2:
        labels = labels.expand(features.shape[0], *labels.shape)
    if labels.ndim != 3 or labels.shape[0] != features.shape[0] or labels.shape[2] != features.shape[1]:
        raise UsageError(f"labels {list(labels.shape)} do not fit features {list(features.shape)}.")
    if isinstance(C, float | int):
        if not 0 < C < float("inf"):
            raise UsageError(f"C must be positive and finite, not {C}.")
    elif C.shape != labels.shape[1:] or not bool((torch.isfinite(C) & (C > 0)).all()):
        raise UsageError(f"C must be positive and finite, one for each sample and labelling: {list(labels.shape[1:])}.")
    labels = labels.to(features.device)
    if not ((labels == 1) | (labels == -1)).all():
        raise UsageError("labels must be +1 or -1.")
    if (labels == labels[..., :1]).all(-1).any():
        raise UsageError("labels hold one class only: an SVM needs both.")
    if not torch.isfinite(features).all():
        raise LlmvaError("features are not finite: the model's activations overflow; load it in float32.")
    return labels
