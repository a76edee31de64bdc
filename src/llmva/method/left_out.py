"""What v_b reads: how well it tells prompts of a source that it was not fitted on.

A vector that is right on validation prompts may read the style of the sources, since those prompts come from the same
ones. So each pair of a benign and a toxic source is left out of a fit in turn. AUC is the share of pairs of prompts,
one of each, that o.v_b orders rightly: .5 is chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmva.method.identify import Fit, Vectors, benign_vector
from llmva.method.observe import Observation
from llmva.prompts.types import Prompt

PER_SOURCE = 48  # prompts of each source, so that all fits take seconds
LOW = 0.7  # mean AUC below which the run warns


@dataclass(frozen=True)
class LeftOut:
    """Of each source that could be left out, by sublayer, float64 [S]: means over the sources left out beside it."""

    auc: dict[str, Tensor]  # of its prompts with those of the other source left out
    accuracy: dict[str, Tensor]  # share of its prompts on the right side

    def as_record(self) -> dict[str, Any]:
        """The field `left_out` of run.json."""
        return {
            source: {"auc": _rounded(self.auc[source]), "accuracy": _rounded(self.accuracy[source])}
            for source in self.auc
        }

    @property
    def mean_auc(self) -> float | None:
        """Over sources and the middle two thirds of the sublayers; None if no source could be left out."""
        if not self.auc:
            return None
        every = torch.stack(list(self.auc.values()))
        edge = every.shape[1] // 6
        return float(every[:, edge : every.shape[1] - edge].mean())

    def warning(self) -> list[str]:
        """A sentence, as a list of one, where the prompts teach v_b the style of their sources."""
        mean = self.mean_auc
        if mean is None or mean >= LOW:
            return []
        return [
            "These prompts teach v_b the style of their sources more than harm: on sources left out of its fit its "
            f"AUC is {mean:.2f}, where .5 is chance. Add sources of other styles (--toxic, --benign, --data)."
        ]


def leave_out(seen: Sequence[Observation], fit: Fit) -> LeftOut:
    """Leave each pair of a benign and a toxic source out in turn; empty where a side has one source alone.

    The fits are without the harmless metric, which would be most of their cost. Of `seen`, captures of the untouched
    model, only the prompts' sides are used.
    """
    prompts: list[Prompt] = []  # at most PER_SOURCE of each source
    kept: list[list[int]] = []  # their places in each observation
    by_source: dict[str, list[int]] = {}  # their places among `prompts`
    for one in seen:
        kept.append([])
        for place, prompt in enumerate(one.prompts):
            rows = by_source.setdefault(prompt.source, [])
            if len(rows) < PER_SOURCE:
                rows.append(len(prompts))
                prompts.append(prompt)
                kept[-1].append(place)
    sides: dict[bool, list[str]] = {True: [], False: []}
    for name, rows in by_source.items():
        sides[prompts[rows[0]].benign].append(name)
    if min(map(len, sides.values())) < 2:
        return LeftOut({}, {})
    measured: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in by_source}
    for s in range(len(seen[0].capture.outputs)):
        x = torch.cat([one.capture.outputs[s][places] for one, places in zip(seen, kept, strict=True)]).double()
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in by_source}
        for benign, toxic in itertools.product(sides[True], sides[False]):
            rest = [i for name, rows in by_source.items() if name not in (benign, toxic) for i in rows]
            v = benign_vector(x[rest], [prompts[i] for i in rest], None, fit)
            above, below = x[by_source[benign]] @ v, x[by_source[toxic]] @ v
            ordered = auc(above, below)
            pairs[benign].append((ordered, float((above > 0).double().mean())))
            pairs[toxic].append((ordered, float((below < 0).double().mean())))
        for name, values in pairs.items():
            measured[name].append(values)
    means = {name: torch.tensor(values, dtype=torch.float64).mean(1).unbind(1) for name, values in measured.items()}
    return LeftOut({name: both[0] for name, both in means.items()}, {name: both[1] for name, both in means.items()})


def readable(vectors: Vectors, seen: Sequence[Observation]) -> Tensor:
    """Mean AUC of each sublayer's o.v_b, float64 [S], over observations of prompts that were in no fit."""
    v_b, means = vectors.directions[:, 1], []
    for one in seen:
        benign = torch.tensor([prompt.benign for prompt in one.prompts])
        read = [x.double() @ v for x, v in zip(one.capture.outputs, v_b, strict=True)]
        means.append(torch.tensor([auc(o[benign], o[~benign]) for o in read], dtype=torch.float64))
    return torch.stack(means).mean(0)


def auc(above: Tensor, below: Tensor) -> float:
    """Share of pairs with the first one higher; a tie counts half. .5 without pairs."""
    if not above.numel() or not below.numel():
        return 0.5
    more = (above[:, None] > below[None]).double() + 0.5 * (above[:, None] == below[None]).double()
    return float(more.mean())


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
