"""Steps 3 and 6 of an iteration: the two vectors of every sublayer, and the edit that aligns one with the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.method.observe import Observation
from llmva.method.selection import accuracy, score
from llmva.method.svm import Cost, HarmlessMetric, angles, fit_sklearn, fit_svms, spread, unit
from llmva.models.sublayers import Sublayer


@dataclass(frozen=True)
class Vectors:
    """What an iteration reads off the model; index 0 is "answer", 1 is "benign"."""

    directions: Tensor  # v_a and v_b, unit, float64 [S, 2, d]
    spread: Tensor  # sigma_a and sigma_b, [S, 2]
    accuracy: Tensor  # on validation prompts, [S, 2]
    scores: Tensor  # [S]
    angles: Tensor  # between v_a and v_b, degrees, [S]

    @property
    def ratio(self) -> Tensor:
        """r = sigma_a / sigma_b, [S]; 0 where the benign vector is zero."""
        a, b = self.spread.unbind(-1)
        return torch.where(b > 0, a / b.clamp_min(1e-30), torch.zeros_like(a))

    def scale_ratio(self, times: float) -> Vectors:
        """The same with `times` the ratio: what asks for more of "benign" than the spread of "answer" does."""
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
        train: prompts that the SVMs are fitted on.
        validation: prompts that the accuracies are measured on.
        harmless: outputs [S, q, d] at positions of harmless text, for quiet readers; None fits as in the paper.
        harmless_weight: of those positions (see `vectors.HarmlessMetric.of`).
        lean: of the benign vector: above 1 a toxic prompt on the wrong side costs so many times C, below 1 a benign
            one costs C / lean. 1 treats them alike, as the paper does.
        svm: "exact" or "sklearn" (which knows no quiet readers).
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
    """C for all, or a cost for each sample and labelling [2, n] where the benign vector leans to a side."""
    if lean == 1.0:
        return C
    costs = torch.full(labels.shape, C, dtype=torch.float64)
    costs[1, labels[1] == (-1 if lean > 1 else 1)] *= max(lean, 1.0 / lean)
    return costs


def _constant(features: Tensor, sigma: Tensor) -> bool:
    """Whether a sublayer's projections vary by no more than rounding in the dtype of `features` [n, d].

    With parallel residuals the first MLP reads the last token alone, which the chat template makes the same for every
    prompt. sigma_a / sigma_b would be noise there, and an edit by it harm.
    """
    typical = features.double().pow(2).mean().sqrt()
    return bool((sigma <= 4.0 * torch.finfo(features.dtype).eps * typical).any())


def align_sublayers(
    edit: Edit,
    sublayers: Iterable[Sublayer],
    vectors: Vectors,
    chosen: list[int],
    iteration: int,
    step: float = 1.0,
    writers: Tensor | None = None,
) -> Edit:
    """Follow `edit` by a rank-one map in every chosen sublayer.

    Without `writers` by the least map that makes o'.v_a = r o.v_b (method.md, step 6), else by what writes the same
    r o.v_b - o.v_a along `writers` [S, d] (`gradient_writers`). `step` is the share of the way that is gone.
    """
    all_sublayers = list(sublayers)
    for s in chosen:
        v_a, v_b = vectors.directions[s]
        if not v_a.any():
            continue  # a sublayer that puts out nothing, or always the same, decides nothing
        gain = all_sublayers[s].gain
        writer, reader = align_one(v_a, v_b, float(vectors.ratio[s]), gain)
        if writers is not None:
            writer = _before(writers[s], gain)
        edit = edit.then(all_sublayers[s].name, step * writer, reader, iteration)
    return edit


def _before(x: Tensor, gain: Tensor | None) -> Tensor:
    """The least output of a projection that moves the residual stream by |x| along `x` [d], up to the post-norm's c."""
    if gain is None:
        return x
    y = gain.to(x) * x
    return y * (x.dot(x) / y.dot(y).clamp_min(1e-30))


def align_one(v_a: Tensor, v_b: Tensor, r: float, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(v, u)` of the least map o' = (I + v u^T) o with o'.v_a = r o.v_b, both [d].

    Behind a post-norm the residual stream gets c * gain * o, c a scalar per token. The vectors live there, so on the
    projection's own output the covectors are gain * v (method.md, "What architectures add").
    """
    if gain is not None:
        v_a, v_b = gain.to(v_a) * v_a, gain.to(v_b) * v_b
    return v_a / v_a.dot(v_a), r * v_b - v_a
