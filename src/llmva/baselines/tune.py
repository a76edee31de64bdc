"""Choose a baseline's magnitude, and then its other options, by trying them on validation prompts.

No paper has one magnitude for all models; each tries several and keeps the best. The notebooks of representation
engineering add 4.0, 2.0 or 1.5 times their vectors, depending on model and concept. SCANS's authors write that they
tuned for each model (3.5 for Llama-2, 4 for Vicuna). CAST's tutorial says to "play with" blocks and strength.
AlphaSteer's answer files have nine values of lambda from 0 to 0.5. So a baseline with its paper's settings has a
swept magnitude (`Baseline.sweep`) and otherwise the values of its paper. For a tuned baseline, other options are tried
too (`Baseline.grid`).

The best setting has the highest F1 among those that keep harmless text as our own method must (`min_kept`) and refuse
at least as many harmful prompts as the untouched model; broken text is not a refusal. F1 alone does not suffice: a
model that answers everything, even with nonsense, has 0.667, more than one that fails in both ways. On the 135M test
model F1 alone chose vectors so long that 18% of the next tokens were kept, at an ASR of 0.96.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from llmva.baselines import make_baseline
from llmva.baselines.base import STRENGTH, Steering
from llmva.errors import LlmvaError, UsageError
from llmva.judges.base import Label
from llmva.method.observe import Observation
from llmva.metrics.rates import point_rates
from llmva.models.chat_model import ChatModel
from llmva.prompts.types import Prompt

Applied = Callable[[], AbstractContextManager[Any]]
RATES = ("f1", "asr", "orr", "garbled")


class Trials:
    """Variants of one baseline, each tried on the same validation prompts.

    If only the strength differs, the fit is reused. Each fit starts with the present state of `generator`, so it equals
    `make_baseline(name, **options).fit` with a generator in that state.

    Args:
        fit: prompts to fit on, and the untouched model's labels of them.
        observe: answers of the current model to prompts; the text names the stage for the progress bar.
        kept: share of harmless next tokens that stay the same while hooks are applied; None if it is not measured.
        rows: earlier trials, in the form of `rows` below; they are not repeated.

    Raises:
        UsageError: a side without validation prompts.
    """

    def __init__(
        self,
        name: str,
        chat: ChatModel,
        fit: tuple[Sequence[Prompt], Sequence[Label]],
        validation: Sequence[Prompt],
        observe: Callable[[Sequence[Prompt], str], Observation],
        generator: torch.Generator,
        kept: Callable[[Applied], float | None] = lambda applied: None,
        rows: Sequence[dict[str, Any]] = (),
    ) -> None:
        if len({prompt.benign for prompt in validation}) < 2:
            raise UsageError("Tuning needs benign and toxic validation prompts: add those that are missing.")
        self.name, self.chat, self.fit, self.validation, self.observe = name, chat, fit, validation, observe
        self.kept = kept
        self.rows = list(rows)
        """`options`, `f1`, `asr`, `orr`, `garbled` and `kept` of each trial, in order. If a variant could not be
        fitted, the rates are None and `error` says why."""
        self._generator, self._start = generator, generator.get_state()
        self._fits: dict[str, tuple[float, Steering | LlmvaError]] = {}  # by options except the strength

    def run(self, grid: Sequence[dict[str, Any]], budget: int | None = None) -> int:
        """Try the options of `grid` with at most `budget` answers (None: no maximum); returns the answers used."""
        spent = 0
        for options in grid:
            if budget is not None and spent + len(self.validation) > budget:
                break
            if any(row["options"] == options for row in self.rows):
                continue
            strength, steering = self._fitted(options)
            if isinstance(steering, LlmvaError):
                self.rows.append({"options": options, **dict.fromkeys(RATES), "kept": None, "error": str(steering)})
                continue
            scaled = steering.scaled(options[STRENGTH] / strength)
            with scaled.applied(self.chat.decoder):
                seen = self.observe(self.validation, f"{self.name}: choosing, try {len(self.rows) + 1}")
            rates = point_rates(seen.prompts, seen.labels)
            kept = self.kept(lambda scaled=scaled: scaled.applied(self.chat.decoder))  # type: ignore[misc]
            self.rows.append({"options": options, **{name: rates[name] for name in RATES}, "kept": kept})
            spent += len(self.validation)
        return spent

    def _fitted(self, options: dict[str, Any]) -> tuple[float, Steering | LlmvaError]:
        key = repr({option: value for option, value in options.items() if option != STRENGTH})
        if key not in self._fits:
            same = torch.Generator(self._generator.device)
            same.set_state(self._start)
            baseline = make_baseline(self.name, **options)
            steering: Steering | LlmvaError
            try:
                steering = baseline.fit(self.chat, *self.fit, same)
            except LlmvaError as error:  # such as a model without refusals, for a variant that is fitted on refusals
                steering = error
            self._fits[key] = (options[STRENGTH], steering)
        return self._fits[key]


def best(rows: Sequence[Mapping[str, Any]], untouched: Mapping[str, Any], min_kept: float) -> dict[str, Any]:
    """The options with the highest F1 among those that keep harmless text and refusals of harmful prompts; see above.

    Ties go to the lower ASR, then to the earlier trial. If none keeps enough harmless text, only those that keep the
    most remain. If all of these refuse fewer harmful prompts than the untouched model, only those that refuse the most
    remain.

    Args:
        rows: of `Trials`.
        untouched: the untouched model's rates on the same prompts.
        min_kept: minimum share of harmless next tokens kept; rows without that share pass.

    Raises:
        LlmvaError: no variant could be fitted, or no answer could be judged.
    """
    measured = [row for row in rows if row["asr"] is not None]
    if not measured:
        raise LlmvaError(rows[0].get("error") or "The judge could say nothing of any answer: try another.")
    limit = min(min_kept, max(_kept(row) for row in measured))
    intact = [row for row in measured if _kept(row) >= limit]
    limit = max(_not_refused(untouched), min(_not_refused(row) for row in intact))
    safe = [row for row in intact if _not_refused(row) <= limit]
    return dict(max(safe, key=lambda row: (-1.0 if row["f1"] is None else row["f1"], -row["asr"]))["options"])


def _kept(row: Mapping[str, Any]) -> float:
    return 1.0 if row["kept"] is None else float(row["kept"])


def _not_refused(rates: Mapping[str, Any]) -> float:
    """Share of harmful prompts with an answer or broken text."""
    return round((rates["asr"] or 0.0) + (rates["garbled"] or 0.0), 9)
