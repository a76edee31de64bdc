"""The objective of a run: a weight between the two failures, and limits that the chosen point must keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmva.metrics.rates import f_beta
from llmva.settings import Settings

LEANS = {"safety": 4.0, "balance": 1.0, "usefulness": 0.25}  # of the benign vectors (`identify.identify`)
BETAS = {"safety": 0.5, "balance": 1.0, "usefulness": 2.0}  # of F-beta, with answered as positive


@dataclass(frozen=True)
class Objective:
    """F-beta under limits; None is no limit. `sides`: numbers of measured benign and toxic prompts."""

    beta: float
    max_asr: float | None
    max_orr: float | None
    min_kept: float
    max_kl: float
    sides: tuple[int, int]

    @classmethod
    def of(cls, settings: Settings, benign: int, toxic: int) -> Objective:
        return cls(
            BETAS[settings.prefer],
            settings.max_asr,
            settings.max_orr,
            settings.min_kept,
            settings.max_kl,
            (benign, toxic),
        )

    def value(self, entry: Mapping[str, Any]) -> float:
        """F-beta of a measured point; with beta 1, its F1. 0 if a side was not judged."""
        if entry.get("f1") is None:
            return 0.0
        if self.beta == 1.0:
            return float(entry["f1"])
        benign, toxic = self.sides
        tp = (1.0 - entry["orr"]) * benign
        return f_beta(tp, (entry["asr"] + (entry.get("garbled") or 0.0)) * toxic, benign - tp, self.beta)

    def violation(self, entry: Mapping[str, Any]) -> float:
        """The sum of the amounts by which a point breaks the limits; 0 if it keeps them.

        Iteration 0 counts as harmless to other text. In a run that extends another, regressions on the earlier prompts
        break a limit too: `old.beyond` (`warm_start.check_regression`).
        """
        return float(sum(amount for amount, _ in self._violated(entry)))

    def choose(self, entries: Sequence[Mapping[str, Any]]) -> int:
        """The iteration with the greatest value among those that keep the limits; ties go to the earlier one.

        If none keeps them, the one that breaks them least.
        """
        known = [entry for entry in entries if not entry.get("undone")]
        return int(min(known, key=lambda e: (self.violation(e), -self.value(e), e["iteration"]))["iteration"])

    def most_valuable(self, entries: Sequence[Mapping[str, Any]]) -> int:
        """The iteration with the greatest value, whatever limits it breaks; ties go to the earlier one."""
        known = [entry for entry in entries if not entry.get("undone")]
        return int(min(known, key=lambda e: (-self.value(e), e["iteration"]))["iteration"])

    def choose_strength(self, entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
        """The strength for the chosen iteration: 1, unless that breaks a limit and another strength keeps all limits.

        A strength that only breaks limits less is not chosen. `rows` are the measured strengths of that iteration. 0 is
        excluded, because `choose` has already rejected the start of the run.
        """
        if not self.violation(entry):
            return 1.0
        rows = [{**row, "iteration": entry["iteration"]} for row in rows if row["strength"] > 0]
        keeping = [row for row in rows if not self.violation(row)]
        return float(min(keeping, key=lambda r: (-self.value(r), r["strength"]))["strength"]) if keeping else 1.0

    def violations(self, entry: Mapping[str, Any]) -> list[str]:
        """The limits that a point breaks on validation prompts, one phrase each."""
        return [words for _, words in self._violated(entry)]

    def _violated(self, entry: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
        """Each limit that a point breaks: the amount, and a phrase."""
        for name, option, limit in (("asr", "--max-asr", self.max_asr), ("orr", "--max-orr", self.max_orr)):
            rate = entry.get(name)
            if limit is not None and rate is not None and rate > limit:
                yield rate - limit, f"{name.upper()} {rate:.1%}, where {option} asks for at most {limit:.1%}"
        kept, kl = (entry.get(name) if entry["iteration"] > 0 else None for name in ("kept", "kl"))
        if kept is not None and kept < self.min_kept:
            words = f"{kept:.1%} of harmless next tokens kept, where --min-kept asks for {self.min_kept:.1%}"
            yield self.min_kept - kept, words
        if kl is not None and kl > self.max_kl:
            words = f"a divergence of {kl:.3g} nats on harmless text, where --max-kl allows {self.max_kl:g}"
            yield kl - self.max_kl, words
        if entry.get("old") and entry["old"]["beyond"] > 0:
            words = "ASR or ORR on the earlier run's prompts above the interval that the earlier edit had"
            yield entry["old"]["beyond"], words

    def missed(self, test: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
        """The limits that test results break by more than their 95% intervals allow, one phrase each.

        Args:
            test: `test.after` of a run.
            kept: `utility` of the run; empty if it was not measured.
        """
        sentences = []
        for name, option, limit in (("asr", "--max-asr", self.max_asr), ("orr", "--max-orr", self.max_orr)):
            ends = test.get(f"{name}_interval")
            if limit is not None and ends is not None and ends[0] > limit:
                sentences.append(
                    f"{name.upper()} is {test[name]:.1%} [{ends[0]:.1%}, {ends[1]:.1%}], above {option} {limit:.1%}"
                )
        ends = kept.get("kept_interval")
        if ends is not None and ends[1] < self.min_kept:
            sentences.append(
                f"{kept['kept']:.1%} [{ends[0]:.1%}, {ends[1]:.1%}] of harmless next tokens are kept, below --min-kept "
                f"{self.min_kept:.1%}"
            )
        ends = kept.get("kl_interval")
        if ends is not None and ends[0] > self.max_kl:
            sentences.append(
                f"the divergence on harmless text is {kept['kl']:.3g} nats [{ends[0]:.3g}, {ends[1]:.3g}], above "
                f"--max-kl {self.max_kl:g}"
            )
        return sentences
