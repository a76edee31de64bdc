"""Steps 2 to 4: identify both vectors of every sublayer, score the sublayers, select the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmva.errors import UsageError
from llmva.method.observe import Observation
from llmva.method.svm import Cost, HarmlessMetric, angles, fit_sklearn, fit_svms, spread, unit
from llmva.models.batching import trim
from llmva.prompts.types import Prompt

PAPERS_SHARE = 42 / 64  # of the 2N sublayers: the paper's choice for Llama-3.1-8B


@dataclass(frozen=True)
class Fit:
    """How the SVMs are fitted.

    `harmless_weight` is the `strength` of `svm.HarmlessMetric.of`, and `source_weight` that of the differences between
    sources of a side, for v_b. `scaled` divides C by the features' mean squared deviation: outputs of late sublayers
    are ten times as long as those of early ones, and one C would be tight here and loose there. `lean` is that of the
    benign vector: above 1, a toxic prompt on the wrong side costs lean times C; below 1, a benign prompt costs C /
    lean. `svm` is "exact" or "sklearn" (which has no metric), `seed` that of scikit-learn's solver.
    """

    svm: str = "exact"
    C: float = 1.0
    scaled: bool = False
    harmless_weight: float = 1.0
    source_weight: float = 0.0
    lean: float = 1.0
    seed: int = 0

    def metric(self, harmless: Tensor | None) -> HarmlessMetric | None:
        """The metric of a sublayer from its harmless outputs [q, d]; None is M = I."""
        if harmless is None or self.harmless_weight == 0:
            return None
        return HarmlessMetric.of(harmless, self.harmless_weight)

    def vectors(self, x: Tensor, labels: Tensor, metric: HarmlessMetric | None, lean: float = 1.0) -> Tensor:
        """The unit normals [m, d], from features [n, d] and m labellings [m, n]; `lean` is that of the last one."""
        deviation = float(x.var(0, correction=0).sum()) if self.scaled else 1.0
        costs = _costs(labels, self.C / max(deviation, 1e-30), lean)
        if self.svm == "exact":
            return unit(fit_svms(x[None], labels, costs, metric=[metric] if metric else None))[0]
        return unit(fit_sklearn(x[None], labels, costs, seed=self.seed))[0]


PAPERS = Fit()


@dataclass(frozen=True)
class Vectors:
    """The fitted vectors of S sublayers, and what follows from them; index 0 is "answer", 1 is "benign"."""

    directions: Tensor  # v_a and v_b, unit, float64 [S, 2, d]
    spread: Tensor  # sigma_a and sigma_b, [S, 2]
    accuracy: Tensor  # on validation prompts, [S, 2]
    scores: Tensor  # [S]
    angles: Tensor  # between v_a and v_b, degrees, [S]
    final: Tensor  # v_a and v_b of the final residual stream, [2, d]

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
    read: Observation | None = None,
    harmless: Tensor | None = None,
    fit: Fit = PAPERS,
    benign: Vectors | None = None,
) -> Vectors:
    """Fit both SVMs in every sublayer and in the final residual stream, and score the sublayers.

    Args:
        train: the SVMs are fitted on it.
        validation: the accuracies are measured on it.
        read: captures of further prompts, on which benign vectors are fitted too; they have no answers.
        harmless: outputs [S, q, d] at positions of harmless text, for the harmless metric; None fits as in the paper.
        fit: how the SVMs are fitted.
        benign: vectors whose v_b is kept; then only v_a is fitted, and `read` is not used.
    """
    labels, prompts = train.signs, [*train.prompts, *(read.prompts if read else ())]

    def vectors_of(x: Tensor, more: Tensor | None, harmless: Tensor | None, known: Tensor | None) -> Tensor:
        """v_a and v_b, [1, 2, d], from [n, d], the features of `read`, and perhaps a `known` pair."""
        metric = fit.metric(harmless)
        if known is not None:
            return torch.stack([fit.vectors(x, labels[:1], metric)[0], known[1]])[None]
        if more is None and fit.source_weight == 0:  # one Gram matrix serves both
            return fit.vectors(x, labels, metric, fit.lean)[None]
        every = x if more is None else torch.cat([x, more.double()])
        v_a = fit.vectors(x, labels[:1], metric)[0]
        return torch.stack([v_a, benign_vector(every, prompts, metric, fit)])[None]

    parts = []
    for s, features in enumerate(train.capture.outputs):  # one at a time: float64 copies of all would fill the memory
        x = features[None].double()
        more = None if read is None else read.capture.outputs[s]
        known = None if benign is None else benign.directions[s]
        v = vectors_of(x[0], more, None if harmless is None else harmless[s], known)
        if _constant(features, spread(x, v)):
            v = torch.zeros_like(v)
        parts.append((v, spread(x, v), accuracy(validation.capture.outputs[s : s + 1], v, validation.signs)))
        trim()  # matrices of ever other sizes leave holes that add up to hundreds of MB
    directions, sigma, right = (torch.cat(column) for column in zip(*parts, strict=True))
    more = None if read is None else read.capture.final
    known = None if benign is None else benign.final
    final = vectors_of(train.capture.final.double(), more, None, known)[0]
    scores = score(directions, final, right)
    return Vectors(directions, sigma, right, scores, angles(*directions.unbind(1)), final)


def benign_vector(features: Tensor, prompts: Sequence[Prompt], metric: HarmlessMetric | None, fit: Fit) -> Tensor:
    """v_b of one sublayer, [d], from float64 features [n, d]; a `metric` of None is M = I.

    Sources of one side differ in style. The metric makes v_b quiet on these differences, as on harmless text.
    """
    if fit.source_weight:
        apart = source_differences(features, prompts)
        metric = metric.and_of(apart, fit.source_weight) if metric else HarmlessMetric.of(apart, fit.source_weight)
    labels = torch.tensor([[1 if prompt.benign else -1 for prompt in prompts]], dtype=torch.int8)
    return fit.vectors(features, labels, metric, fit.lean)[0]


def source_differences(features: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """How the mean of each source of prompts differs from those of its side, [sources, d] from features [n, d]."""
    rows = []
    for benign in (True, False):
        own: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            if prompt.benign == benign:
                own.setdefault(prompt.source, []).append(i)
        means = torch.stack([features[places].mean(0) for places in own.values()])
        rows.append(means - means.mean(0))
    return torch.cat(rows)


def _costs(labels: Tensor, C: float, lean: float) -> Cost:
    """C, or a cost for each labelling and sample [m, n] if the last labelling leans to a side."""
    if lean == 1.0:
        return C
    costs = torch.full(labels.shape, C, dtype=torch.float64)
    costs[-1, labels[-1] == (-1 if lean > 1 else 1)] *= max(lean, 1.0 / lean)
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
