"""Steps 2 to 4: identify both vectors of every sublayer, score the sublayers, select the best."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmva.errors import UsageError
from llmva.method.observe import Observation
from llmva.method.svm import Cost, HarmlessMetric, angles, fit_sklearn, fit_svms, spread, unit

PAPERS_SHARE = 42 / 64  # of the 2N sublayers: the paper's choice for Llama-3.1-8B


@dataclass(frozen=True)
class Vectors:
    """The fitted vectors of S sublayers, and what follows from them; index 0 is "answer", 1 is "benign"."""

    directions: Tensor  # v_a and v_b, unit, float64 [S, 2, d]
    spread: Tensor  # sigma_a and sigma_b, [S, 2]
    accuracy: Tensor  # on validation prompts, [S, 2]
    scores: Tensor  # [S]
    angles: Tensor  # between v_a and v_b, degrees, [S]

    @property
    def ratio(self) -> Tensor:
        """r = sigma_a / sigma_b, [S]; 0 if the benign vector is zero."""
        a, b = self.spread.unbind(-1)
        return torch.where(b > 0, a / b.clamp_min(1e-30), torch.zeros_like(a))

    def scale_ratio(self, times: float) -> Vectors:
        """The same vectors with the ratio r multiplied by `times`."""
        return replace(self, spread=self.spread * torch.tensor([times, 1.0]).to(self.spread))


def identify(
    train: Observation,
    validation: Observation,
    *,
    harmless: Tensor | None = None,
    harmless_weight: float = 1.0,
    svm: str = "exact",
    C: float = 1.0,
    lean: float = 1.0,
    seed: int = 0,
) -> Vectors:
    """Fit both SVMs in every sublayer and in the final residual stream, and score the sublayers.

    Args:
        train: the SVMs are fitted on it.
        validation: the accuracies are measured on it.
        harmless: outputs [S, q, d] at positions of harmless text, for the harmless metric; None fits as in the paper.
        harmless_weight: the `strength` of `svm.HarmlessMetric.of`; 0 fits as in the paper.
        svm: "exact" or "sklearn" (which has no harmless metric).
        C: cost of a margin violation.
        lean: of the benign vector: above 1, a toxic prompt on the wrong side costs lean times C; below 1, a benign
            prompt costs C / lean. 1 treats both alike, as the paper does.
        seed: of scikit-learn's solver.
    """
    labels = train.signs
    costs = _costs(labels, C, lean)
    parts = []
    for s, features in enumerate(train.capture.outputs):  # one at a time: float64 copies of all would fill the memory
        metric = None if harmless is None or harmless_weight == 0 else [HarmlessMetric.of(harmless[s], harmless_weight)]
        x = features[None].double()
        w = fit_svms(x, labels, costs, metric=metric) if svm == "exact" else fit_sklearn(x, labels, costs, seed=seed)
        v = unit(w)
        if _constant(features, spread(x, v)):
            v = torch.zeros_like(v)
        parts.append((v, spread(x, v), accuracy(validation.capture.outputs[s : s + 1], v, validation.signs)))
    directions, sigma, right = (torch.cat(column) for column in zip(*parts, strict=True))
    x = train.capture.final[None].double()
    final = unit(fit_svms(x, labels, costs) if svm == "exact" else fit_sklearn(x, labels, costs, seed=seed))[0]
    return Vectors(directions, sigma, right, score(directions, final, right), angles(*directions.unbind(1)))


def _costs(labels: Tensor, C: float, lean: float) -> Cost:
    """C, or a cost for each labelling and sample [2, n] if the benign vector leans to a side."""
    if lean == 1.0:
        return C
    costs = torch.full(labels.shape, C, dtype=torch.float64)
    costs[1, labels[1] == (-1 if lean > 1 else 1)] *= max(lean, 1.0 / lean)
    return costs


def _constant(features: Tensor, sigma: Tensor) -> bool:
    """Whether a sublayer's projections o.v vary by no more than rounding in the dtype of `features` [n, d].

    With parallel residuals, the first MLP reads only the last token, which the chat template makes the same for every
    prompt. sigma_a / sigma_b would be noise there, and an edit would do harm.
    """
    typical = features.double().pow(2).mean().sqrt()
    return bool((sigma <= 4.0 * torch.finfo(features.dtype).eps * typical).any())


def accuracy(features: Tensor, vectors: Tensor, labels: Tensor) -> Tensor:
    """Share of prompts on the right side of each vector: [S, m] from [S, n, d], [S, m, d] and labels [m, n]."""
    side = torch.einsum("snd,smd->smn", features.to(vectors.dtype), vectors).sign()
    return (side == labels.to(vectors)).to(torch.float64).mean(-1)


def score(vectors: Tensor, final: Tensor, accuracies: Tensor) -> Tensor:
    """score = C_a acc_a + C_b acc_b, with C = v(final residual) . v(sublayer) (paper, contribution score).

    Args:
        vectors: unit vectors of the sublayers, [S, 2, d], v_a first.
        final: unit vectors of the final residual stream, [2, d].
        accuracies: on validation prompts, [S, 2].

    Returns:
        [S]
    """
    return (torch.einsum("smd,md->sm", vectors, final) * accuracies).sum(-1)


def select(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` best sublayers, in the model's order; ties go to the earlier one."""
    if not 1 <= count <= len(scores):
        raise UsageError(f"{count} sublayers cannot be selected out of {len(scores)}: choose 1 to {len(scores)}.")
    best = torch.argsort(scores, descending=True, stable=True)[:count]
    return sorted(best.tolist())


def papers_count(sublayers: int) -> int:
    """How many of a model's sublayers the paper's alignment edits by default."""
    return max(1, round(PAPERS_SHARE * sublayers))
