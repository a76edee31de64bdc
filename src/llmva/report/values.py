"""Read fields of a record safely, and write values as text: the same way on pages, in terminals and on the card.

Records (`run.json`, `compare.json`, ...) are read as plain dicts. Any field may be missing, null, NaN or of another
type; it then counts as not known and is written as a dash.
"""

from __future__ import annotations

import math
import re
from typing import Any

DASH = "–"
MINUS = "\N{MINUS SIGN}"
Interval = tuple[float, float]
# Controls but tab and newline, overrides of writing direction, halves of surrogate pairs, and non-characters.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


# --- Reading ------------------------------------------------------------------------------------------------------


def finite(value: object) -> float | None:
    """`value` as a float; None where it is missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def part(record: object, *keys: str) -> dict[str, Any]:
    """The dict that `keys` lead to, one inside the other; empty where any of them is missing."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def interval(value: object) -> Interval | None:
    """A pair (low, high), or None unless both ends are finite."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def dicts(value: object) -> list[dict[str, Any]]:
    """The dicts in a list; nothing of anything else."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def strings(value: object) -> list[str]:
    """The strings in a list; nothing of anything else."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


# --- Writing ------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with every character that could steer a terminal or break a file replaced by a visible mark."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def share(value: float | None) -> str:
    """0.4803 -> '48.0%'."""
    return DASH if value is None else f"{100 * value:.1f}%"


def share_bracket(ends: Interval | None) -> str:
    """The interval of a share in percent, '[38.2, 57.6]'; '' where there is none."""
    return "" if ends is None else f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def score(value: float | None) -> str:
    """0.9541 -> '0.954'."""
    return DASH if value is None else f"{value:.3f}"


def score_bracket(ends: Interval | None) -> str:
    """The interval of a score, '[0.382, 0.576]'; '' where there is none."""
    return "" if ends is None else f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def signed(change: str) -> str:
    """'+0.043' as it is, '-0.043' with a minus sign, and '0.000' without a sign."""
    return change.lstrip("+-") if float(change) == 0 else change.replace("-", MINUS)


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
    while abs(number) >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {units[power]}".strip()


def size(value: object) -> str:
    """Bytes, in powers of 1000: '2.1 GB'."""
    return scaled(value, ("B", "kB", "MB", "GB", "TB"))


def strength_text(value: float) -> str:
    """The strength of an edit: 0.3333333 -> '0.333', 1.0 -> '1'."""
    return f"{value:.3g}"


def counted(n: int, noun: str) -> str:
    """'1 iteration', '3 iterations'."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def count(value: object) -> str:
    """An integer with its thousands apart: '48,120'."""
    number = finite(value)
    return DASH if number is None else f"{number:,.0f}"
