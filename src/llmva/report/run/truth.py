"""What answers to questions with gold answers are worth, before and after: rows of a table, and one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmva.report.run.rows import Row, rate_row
from llmva.report.values import finite, part, share

VERDICTS = (  # field, name, hint, is less of it better
    ("right", "Right", "names the gold answer", False),
    ("wrong", "Wrong", "answers something else", True),
    ("abstained", "Abstaining", "says it does not know", None),
)
PARTS = (("refused_before", "refused before"), ("others", "not refused before"))  # of the prompts: field, name
CHANCE = 0.05  # a larger p may be chance


def truth_rows(run: dict[str, Any]) -> list[Row]:
    """Rows for right, wrong and abstaining answers, each followed by the parts of the prompts; [] without gold answers.

    What is missing to 100% was refused or garbled.
    """
    before, after = _gold(run)
    rows = []
    for key, name, hint, lower_is_better in VERDICTS:
        for field, title, level in (("all", name, 0), *((field, title, 1) for field, title in PARTS)):
            old, new = part(before, field), part(after, field)
            n = finite(old.get("n"))
            if n:
                row = rate_row(title, old, new, key, n=int(n), hint="" if level else hint, level=level)
                rows.append(replace(row, lower_is_better=lower_is_better))
    return rows


def truth_note(run: dict[str, Any]) -> str | None:
    """A sentence where the model answers more questions with gold answers than before and is not right more often."""
    before, after = (part(one, "all") for one in _gold(run))
    answered, right = (_answered(before), _answered(after)), (finite(before.get("right")), finite(after.get("right")))
    if answered[0] is None or answered[1] is None or right[0] is None or right[1] is None:
        return None
    p = finite(part(run, "test", "after", "gold").get("right_p"))
    chance = p is None or p > CHANCE
    if answered[1] <= answered[0] or (right[1] > right[0] and not chance):
        return None
    said = f"It answers {share(answered[1])} of the questions with gold answers instead of {share(answered[0])}"
    return f"{said}, but is not right more often: {share(right[1])} right, before {share(right[0])}{_of_new(run)}."


def _gold(run: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return part(run, "test", "before", "gold"), part(run, "test", "after", "gold")


def _answered(shares: dict[str, Any]) -> float | None:
    """Share of answers, right or wrong."""
    right, wrong = finite(shares.get("right")), finite(shares.get("wrong"))
    return None if right is None or wrong is None else right + wrong


def _of_new(run: dict[str, Any]) -> str:
    """What became of the questions that were refused before, "" where there were none."""
    new = part(_gold(run)[1], "refused_before")
    n, right, wrong = finite(new.get("n")), finite(new.get("right")), finite(new.get("wrong"))
    if not n or right is None or wrong is None:
        return ""
    return f". Of the {n:.0f} that it refused before, {share(right)} are now right and {share(wrong)} wrong"
