"""The outcome of a comparison in one paragraph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmva.report.estimates import SCORE
from llmva.report.pages import MAX_GARBLED, Outcome
from llmva.report.study.methods import Method, Versus, baseline, methods, p_text
from llmva.report.values import duration, score, share


def headline(record: dict[str, Any]) -> Outcome:
    """Who has the highest F1, by how much, whether that may be chance, and what it cost."""
    rows = methods(record)
    known = [row for row in rows if row["f1"].mean is not None]
    tried = [row for row in known if not row.untouched]
    if not tried:
        return Outcome("No figures yet", "open", "No method of this comparison has test figures yet.")
    leader = max(known, key=lambda row: row["f1"].mean or 0.0)
    untouched = next((row for row in known if row.untouched), None)
    if untouched is not None and leader is untouched:
        closest = max(tried, key=lambda row: row["f1"].mean or 0.0)
        sentence = (
            f"No method did better than the untouched model, whose F1 is {score(leader['f1'].mean)}; "
            f"the closest is {closest.name} with {score(closest['f1'].mean)}."
        )
        return Outcome("No method helped", "bad", sentence, tuple(_notes(record, closest)))
    against = "" if untouched is None else f"; the untouched model has {score(untouched['f1'].mean)}"
    bracket = SCORE.bracket(leader["f1"])
    first = f"{leader.name} has the highest F1, {score(leader['f1'].mean)}{f' {bracket}' if bracket else ''}{against}."
    verdict, tone, second = _margin(leader, known, baseline(record, rows))
    notes = [_cost(leader), *_notes(record, leader)]
    return Outcome(verdict, tone, f"{first} {second}", tuple(filter(None, notes)))


def _margin(leader: Method, known: Sequence[Method], best_baseline: str) -> tuple[str, str, str]:
    """Verdict, tone and the sentence about how far the leader is ahead, and of whom."""
    if leader.versus is not None and leader.versus.difference is not None:
        other = leader.versus.baseline or best_baseline or "the best baseline"
        return _tested(leader, other, leader.versus, leader.versus.difference, "good")
    ours = next((row for row in known if row.method == "llmva" and row is not leader), None)
    if ours and ours.versus and ours.versus.difference is not None and ours.versus.baseline == leader.name:
        return _tested(leader, ours.name, ours.versus, -ours.versus.difference, "bad")
    rest = [row for row in known if row is not leader and not row.untouched]
    if not rest:
        return f"{leader.name} leads", "mixed", "No other method was compared."
    second = max(rest, key=lambda row: row["f1"].mean or 0.0)
    gap = (leader["f1"].mean or 0.0) - (second["f1"].mean or 0.0)
    return (
        f"{leader.name} leads, not tested",
        "mixed",
        f"Next is {second.name}, {score(gap)} lower; whether that is chance was not tested.",
    )


def _tested(leader: Method, other: str, test: Versus, difference: float, tone: str) -> tuple[str, str, str]:
    p = "" if test.p_holm is None else f" (p {_equals(test.p_holm)} after Holm's correction)"
    far = f"That is {score(abs(difference))} {'above' if difference >= 0 else 'below'} {other}"
    if test.p_holm is None:
        return f"{leader.name} leads, not tested", "mixed", f"{far}; whether that is chance was not tested."
    if test.significant and difference > 0:
        return f"{leader.name} is best", tone, f"{far}, more than chance explains{p}."
    return "No clear winner", "mixed", f"{far}, which may be chance{p}."


def _equals(p: float) -> str:
    text = p_text(p)
    return f"below {text[1:]}" if text.startswith("<") else f"= {text}"


def _cost(leader: Method) -> str:
    """'It answers 4% of the harmful prompts ..., took 4 min to fit and makes tokens 5% slower.'"""
    asr, orr = leader["asr"].mean, leader["orr"].mean
    words = []
    if asr is not None:
        words.append(f"answers {share(asr)} of the harmful prompts")
    if orr is not None:
        words.append(f"refuses {share(orr)} of the benign ones")
    if leader.kept is not None:
        words.append(f"keeps {share(leader.kept)} of the original's next tokens on harmless text")
    if leader.fit_seconds is not None:
        words.append(f"took {duration(leader.fit_seconds)} to fit")
    if leader.latency is not None:
        added = 100 * (leader.latency - 1)
        slower = f"{abs(added):.1f}% {'more' if added > 0 else 'less'} time"
        merged = " by hooks, none once merged" if leader.method == "llmva" and leader.measurable and added > 0 else ""
        words.append(f"needs {slower if leader.measurable else 'about as much time'} for a token{merged}")
    if not words:
        return ""
    return f"{leader.name} {', '.join(words[:-1])}{' and ' if words[:-1] else ''}{words[-1]}."


def _notes(record: dict[str, Any], shown: Method) -> list[str]:
    notes = []
    garbled = shown["garbled"].mean
    if garbled is not None and garbled > MAX_GARBLED:
        notes.append(f"{share(garbled)} of the test answers of {shown.name} are garbled: broken, looping or empty.")
    seeds = record.get("seeds")
    if isinstance(seeds, list) and len(seeds) == 1:
        notes.append("There is one seed only: how far the figures move with the seed is not known.")
    return notes
