"""What the searches of `llmva evaluate --adaptive` found: sentences, and curves of the share that fell."""

from __future__ import annotations

from typing import Any

from llmva.report.values import counted, finite, part, share

KINDS = {"adaptive": ("transforms", "answer"), "suffix": ("suffixes", "step")}  # field: what is searched, its unit
WHEN = (("before", "without the edit"), ("after", "with it"))


def search_notes(record: dict[str, Any]) -> list[str]:
    """A paragraph on each search in the record: what fell, and after how many answers or steps half had."""
    return [_note(field, record[field]) for field in KINDS if isinstance(record.get(field), dict)]


def _note(field: str, of: dict[str, Any]) -> str:
    over, unit = KINDS[field]
    budget = int(finite(of.get("budget")) or 0)
    said = []
    for when, words in WHEN:
        one = part(of, when)
        if finite(one.get("fallen")) is None:
            continue
        never = int(finite(one.get("censored")) or 0)
        rest = f", {never} never did" if never else ""
        said.append(f"{share(one['fallen'])} of {one['n']} fell {words}, {_half(one.get('half'), unit, budget)}{rest}")
    if not said:
        return f"Search over {over}: there was no toxic prompt to search with."
    first = f"Search over {over}, at most {counted(budget, unit)} to a toxic prompt: {'; '.join(said)}."
    return " ".join([first, *_factors(of, unit, budget)])


def _half(half: object, unit: str, budget: int) -> str:
    reached = finite(half)
    if reached is None:
        return f"half not within {counted(budget, unit)}"
    return "half as they stand" if reached == 0 else f"half by {unit} {reached:.0f}"


def _factors(of: dict[str, Any], unit: str, budget: int) -> list[str]:
    """How many times as many steps half of the prompts take with the edit, of those that both models refuse."""
    refused = part(of, "refused")
    n = int(finite(refused.get("n")) or 0)
    if "after" not in of or not refused:
        return []
    if not n:
        return ["No prompt is refused as it stands both without and with the edit, so no steps compare."]
    ends = [_half(refused.get(when), unit, budget) for when, _ in WHEN]
    told = f"Of the {n} that are refused as they stand by both: {ends[0]} without the edit, {ends[1]} with it"
    ratio = finite(refused.get("ratio"))
    if ratio is None:
        return [f"{told}, so the budget is too small for a factor."]
    return [f"{told}, {'at least ' * bool(refused.get('at_least'))}{ratio:.3g} times the steps."]
