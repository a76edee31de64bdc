"""The figures of a run as rows of text: what the report and the terminal both show, formatted once.

Everything here reads `run.json` as a plain dict and takes any field to be missing, null or NaN: an unfinished run
still has a report, with a dash where a figure is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DASH = "–"
MINUS = "\N{MINUS SIGN}"
Interval = tuple[float, float]
# Controls but tab and newline, overrides of writing direction, halves of surrogate pairs, and non-characters.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """The text with every character that could steer a terminal or break a file replaced by a visible mark."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def finite(value: object) -> float | None:
    """`value` as a float; None where it is missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def part(run: object, *keys: str) -> dict[str, Any]:
    """The dict found by following `keys`; empty where any of them is missing."""
    for key in keys:
        run = run.get(key) if isinstance(run, dict) else None
    return run if isinstance(run, dict) else {}


def interval(value: object) -> Interval | None:
    """A pair (low, high), or None unless both ends are finite."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def share(value: float | None) -> str:
    """0.4803 -> '48.0%'."""
    return DASH if value is None else f"{100 * value:.1f}%"


def score(value: float | None) -> str:
    """0.9541 -> '0.954'."""
    return DASH if value is None else f"{value:.3f}"


def duration(value: object) -> str:
    """Seconds in the unit a person would use: '48 s', '3 min 07 s', '1 h 12 min'."""
    seconds = finite(value)
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def scaled(value: object, units: tuple[str, ...]) -> str:
    """A count with the largest fitting unit out of steps of 1000: (2.1e9, ('B', 'kB', 'MB', 'GB')) -> '2.1 GB'."""
    number = finite(value)
    if number is None:
        return DASH
    power = 0
    while abs(number) >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {units[power]}".strip()


def size(value: object) -> str:
    """Bytes, in powers of 1000: '2.1 GB'."""
    return scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: object) -> str:
    """An integer with its thousands apart: '48,120'."""
    number = finite(value)
    return DASH if number is None else f"{number:,.0f}"


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
    lower_is_better: bool = True

    def text(self, value: float | None) -> str:
        return score(value) if self.scale == "score" else share(value)

    def bracket(self, ends: Interval | None) -> str:
        """'[38.2, 57.6]': the interval in the row's own unit, or '' where there is none."""
        if ends is None:
            return ""
        low, high = ends
        return f"[{low:.3f}, {high:.3f}]" if self.scale == "score" else f"[{100 * low:.1f}, {100 * high:.1f}]"

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
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def change_text(self) -> str:
        """Signed: points of a percentage, or the difference of a score; without a sign where it rounds to nothing."""
        if self.change is None:
            return DASH
        text = f"{self.change:+.3f}" if self.scale == "score" else f"{100 * self.change:+.1f}"
        return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)

    @property
    def direction(self) -> str:
        """'better', 'worse' or '' (no change that the table's digits can show)."""
        if self.change is None or self.change_text[0] not in "+" + MINUS:
            return ""
        return "better" if (self.change < 0) == self.lower_is_better else "worse"


def comparison(run: dict[str, Any]) -> list[Row]:
    """Rows of the test: F1, then ASR, ORR and garbled answers, each followed by its data sets. Empty without a test."""
    before, after = part(run, "test", "before"), part(run, "test", "after")
    if not before and not after:
        return []
    n_toxic, n_benign = (_n(before, after, key) for key in ("n_toxic", "n_benign"))
    total = None if n_toxic is None or n_benign is None else n_toxic + n_benign
    rows = [_row("F1", before, after, "f1", "both at once", total, scale="score", lower_is_better=False)]
    rows.append(_row("ASR", before, after, "asr", "harmful answered", n_toxic))
    rows += _sources(before, after, "toxic", "rate")
    rows.append(_row("ORR", before, after, "orr", "benign refused", n_benign))
    rows += _sources(before, after, "benign", "rate")
    rows.append(_row("Garbled", before, after, "garbled", "broken or empty", total))
    for kind in ("toxic", "benign"):
        rows += [row for row in _sources(before, after, kind, "garbled") if row.before or row.after]
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
    found = finite(part(run, "utility").get("perplexity"))
    return (
        []
        if found is None
        else [Row("Perplexity, harmless", "over the original's", 0, None, 1.0, found, scale="score")]
    )


def endings(run: dict[str, Any]) -> list[Row]:
    """One row for the share of long harmless answers that loop or break off, if measured."""
    found = part(run, "utility", "endings")
    n = finite(found.get("n"))
    if not n:
        return []
    sides = [part(found, name) for name in ("before", "after")]
    before, after = (None if (k := finite(side.get("faulty"))) is None else k / n for side in sides)
    old, new = (interval(side.get("faulty_interval")) for side in sides)
    return [Row("Long answers broken", "loops, no proper end", 0, int(n), before, after, old, new)]


def skills(run: dict[str, Any]) -> list[Row]:
    """One row for each skill that was measured beside safety (share correct)."""
    found = part(run, "utility", "skills")
    rows = []
    for name, figures in found.items():
        before, after = finite(part(figures).get("before")), finite(part(figures).get("after"))
        n = _n(part(figures), {}, "n")
        rows.append(Row(f"Skill: {name}", "", 0, n, before, after, lower_is_better=False))
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


def _n(before: dict[str, Any], after: dict[str, Any], key: str) -> int | None:
    for figures in (before, after):
        value = finite(figures.get(key))
        if value is not None:
            return int(value)
    return None


def _row(
    name: str, before: dict[str, Any], after: dict[str, Any], key: str, hint: str, n: int | None, **how: Any
) -> Row:
    ends = f"{key}_interval"
    return Row(
        name,
        hint,
        n=n,
        before=finite(before.get(key)),
        after=finite(after.get(key)),
        before_interval=interval(before.get(ends)),
        after_interval=interval(after.get(ends)),
        **how,
    )


def _sources(before: dict[str, Any], after: dict[str, Any], kind: str, key: str) -> Iterator[Row]:
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
