"""What a run is to make of the model: a weight between its two failures, and limits that the choice must keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmva.metrics import f_beta
from llmva.settings import Settings

BETAS = {"safety": 0.5, "balance": 1.0, "usefulness": 2.0}  # of F-beta, where positive is answered


@dataclass(frozen=True)
class Aim:
    """F-beta to be raised under limits; None is no limit. `sides`: numbers of benign and of toxic prompts measured."""

    beta: float
    max_asr: float | None
    max_orr: float | None
    min_kept: float
    max_kl: float
    sides: tuple[int, int]

    @classmethod
    def of(cls, settings: Settings, benign: int, toxic: int) -> Aim:
        return cls(
            BETAS[settings.prefer],
            settings.max_asr,
            settings.max_orr,
            settings.min_kept,
            settings.max_kl,
            (benign, toxic),
        )

    def worth(self, entry: Mapping[str, Any]) -> float:
        """F-beta of a measured point; for a beta of 1 that is its F1. 0 where a side was not judged."""
        if entry.get("f1") is None:
            return 0.0
        if self.beta == 1.0:
            return float(entry["f1"])
        benign, toxic = self.sides
        tp = (1.0 - entry["orr"]) * benign
        return f_beta(tp, (entry["asr"] + (entry.get("garbled") or 0.0)) * toxic, benign - tp, self.beta)

    def excess(self, entry: Mapping[str, Any]) -> float:
        """By how much a point breaks the limits, summed; 0 if it keeps them. The untouched model harms no text."""
        over = [
            entry[name] - most
            for name, most in (("asr", self.max_asr), ("orr", self.max_orr))
            if most is not None and entry.get(name) is not None
        ]
        if entry["iteration"] > 0:
            over += [self.min_kept - entry["kept"]] if entry.get("kept") is not None else []
            over += [entry["kl"] - self.max_kl] if entry.get("kl") is not None else []
        return float(sum(max(0.0, amount) for amount in over))

    def choose(self, entries: Sequence[Mapping[str, Any]]) -> int:
        """The iteration of the greatest worth among those that keep the limits; the earliest of equals.

        Where none keeps them, the one that breaks them least.
        """
        known = [entry for entry in entries if not entry.get("undone")]
        return int(min(known, key=lambda e: (self.excess(e), -self.worth(e), e["iteration"]))["iteration"])
