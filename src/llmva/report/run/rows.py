"""The rows of a before/after table, and the cost of a run: report, terminal and model card show them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmva.report.values import (
    DASH,
    MINUS,
    Interval,
    count,
    duration,
    finite,
    interval,
    part,
    score,
    score_bracket,
    share,
    share_bracket,
    signed,
    size,
)


@dataclass(frozen=True)
class Row:
    """One line of the before/after table. `level` 1 is a part (a data set) of the level-0 row above it."""

    name: str
    hint: str = ""
    level: int = 0
    n: int | None = None
    before: float | None = None
    after: float | None = None
    before_interval: Interval | None = None
    after_interval: Interval | None = None
    scale: str = "share"  # or "score" (0 to 1, not a percentage)
    lower_is_better: bool | None = True  # None: neither is

    def text(self, value: float | None) -> str:
        return score(value) if self.scale == "score" else share(value)

    def bracket(self, ends: Interval | None) -> str:
        """'[38.2, 57.6]': the interval in the row's own unit, or '' where there is none."""
        return score_bracket(ends) if self.scale == "score" else share_bracket(ends)

    @property
    def before_text(self) -> str:
        return self.text(self.before)

    @property
    def after_text(self) -> str:
        return self.text(self.after)

    @property
    def before_bracket(self) -> str:
        return self.bracket(self.before_interval)

    @property
    def after_bracket(self) -> str:
        return self.bracket(self.after_interval)

    @property
    def before_cell(self) -> str:
        """'48.0% [38.2, 57.6]'."""
        return f"{self.before_text} {self.before_bracket}".strip()

    @property
    def after_cell(self) -> str:
        return f"{self.after_text} {self.after_bracket}".strip()

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def change_text(self) -> str:
        """Signed: points of a percentage, or the difference of a score; without a sign where it rounds to nothing."""
        if self.change is None:
            return DASH
        return signed(f"{self.change:+.3f}" if self.scale == "score" else f"{100 * self.change:+.1f}")

    @property
    def direction(self) -> str:
        """'better', 'worse' or '' (no change that the table's digits can show)."""
        if self.change is None or self.lower_is_better is None or self.change_text[0] not in "+" + MINUS:
            return ""
        return "better" if (self.change < 0) == self.lower_is_better else "worse"


def comparison(run: dict[str, Any]) -> list[Row]:
    """Rows of the test: F1, then ASR, ORR and garbled answers, each followed by its data sets. Empty without a test."""
    before, after = part(run, "test", "before"), part(run, "test", "after")
    if not before and not after:
        return []
    n_toxic, n_benign = (_n(before, after, key) for key in ("n_toxic", "n_benign"))
    total = None if n_toxic is None or n_benign is None else n_toxic + n_benign
    rows = [rate_row("F1", before, after, "f1", n=total, hint="both at once", scale="score", lower_is_better=False)]
    rows.append(rate_row("ASR", before, after, "asr", n=n_toxic, hint="harmful answered"))
    rows += _source_rows(before, after, "toxic", "rate")
    rows.append(rate_row("ORR", before, after, "orr", n=n_benign, hint="benign refused"))
    rows += _source_rows(before, after, "benign", "rate")
    rows.append(rate_row("Garbled", before, after, "garbled", n=total, hint="broken or empty"))
    for kind in ("toxic", "benign"):
        rows += [row for row in _source_rows(before, after, kind, "garbled") if row.before or row.after]
    return rows


def utility(run: dict[str, Any]) -> list[Row]:
    """One row for the next tokens kept on harmless text, if measured. The untouched model agrees with itself: 100%."""
    kept = finite(part(run, "utility").get("kept"))
    if kept is None:
        return []
    ends = interval(part(run, "utility").get("kept_interval"))
    hint = "same next token"
    return [Row("Utility kept", hint, before=1.0, after=kept, after_interval=ends, lower_is_better=False)]


def perplexity(run: dict[str, Any]) -> list[Row]:
    """One row for the perplexity of harmless text over the original model's, if measured."""
    ratio = finite(part(run, "utility").get("perplexity"))
    if ratio is None:
        return []
    return [Row("Perplexity, harmless", "over the original's", before=1.0, after=ratio, scale="score")]


def endings(run: dict[str, Any]) -> list[Row]:
    """One row for the share of long harmless answers that loop or break off, if measured."""
    measured = part(run, "utility", "endings")
    n = finite(measured.get("n"))
    if not n:
        return []
    sides = [part(measured, name) for name in ("before", "after")]
    before, after = (None if (k := finite(side.get("faulty"))) is None else k / n for side in sides)
    old, new = (interval(side.get("faulty_interval")) for side in sides)
    return [Row("Long answers broken", "loops, no proper end", 0, int(n), before, after, old, new)]


def skills(run: dict[str, Any]) -> list[Row]:
    """One row for each skill that was measured (share correct)."""
    rows = []
    for name, value in part(run, "utility", "skills").items():
        skill = part(value)
        before, after = finite(skill.get("before")), finite(skill.get("after"))
        rows.append(Row(f"Skill: {name}", "", 0, _n(skill, {}, "n"), before, after, lower_is_better=False))
    return rows


def cost(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run took, as (name, value) pairs; only what was measured."""
    spent = part(run, "cost")
    pairs = [
        ("Time", duration(spent.get("seconds"))),
        ("Peak memory", size(spent.get("peak_bytes"))),
        ("Tokens generated", count(spent.get("generated_tokens"))),
    ]
    return [(name, value) for name, value in pairs if value != DASH]


def rate_row(name: str, before: dict[str, Any], after: dict[str, Any], key: str, **how: Any) -> Row:
    """The row of one rate in two summaries: `key` is the rate's field, `key`_interval that of its interval."""
    ends = f"{key}_interval"
    return Row(
        name,
        before=finite(before.get(key)),
        after=finite(after.get(key)),
        before_interval=interval(before.get(ends)),
        after_interval=interval(after.get(ends)),
        **how,
    )


def _n(before: dict[str, Any], after: dict[str, Any], key: str) -> int | None:
    """A number of prompts, from the first summary that knows it."""
    for summary in (before, after):
        value = finite(summary.get(key))
        if value is not None:
            return int(value)
    return None


def _source_rows(before: dict[str, Any], after: dict[str, Any], kind: str, key: str) -> Iterator[Row]:
    """One row for each data set of one kind that either summary knows, in the order of the files given."""
    old, new = part(before, "by_source"), part(after, "by_source")
    ends = "interval" if key == "rate" else "garbled_interval"
    for name in dict.fromkeys([*old, *new]):
        first, second = part(old, name), part(new, name)
        if (first.get("kind") or second.get("kind")) != kind:
            continue
        yield Row(
            str(name),
            "",
            1,
            _n(first, second, "n"),
            finite(first.get(key)),
            finite(second.get(key)),
            interval(first.get(ends)),
            interval(second.get(ends)),
        )
