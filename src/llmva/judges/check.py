"""How often a judge agrees with labels given by hand: what `llmva judge check` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.judges.base import Judge, Judgement, Label
from llmva.prompts.types import Prompt
from llmva.statistics import kappa

_FIELDS = ("part", "prompt", "answer", "label")
_LABELS = (Label.ANSWERED, Label.REFUSED, Label.GARBLED)  # labels given by hand


def read_labelled(path: Path | None = None) -> list[dict[str, Any]]:
    """Rows of a JSONL file with the fields part, prompt, benign, answer, label and note; without `path`, the bundled
    rows. `benign` may be left out and is then true; `note` may be left out.

    Raises UsageError for a file that cannot be read, and for a line that lacks a field or has an unknown label.
    """
    source = path if path is not None else resources.files("llmva.judges").joinpath("data/labelled_answers.jsonl")
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read {path} as UTF-8 text; give a JSONL file of labelled answers.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _LABELS.index(row["label"])
            if not isinstance(row.setdefault("benign", True), bool):
                raise TypeError("benign is neither true nor false")
            rows.append({**row, **{field: str(row[field]) for field in _FIELDS}})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"Line {number} of {path} is not a labelled answer; write a JSON object with the fields "
                f"{', '.join(_FIELDS)}, one of the labels {', '.join(label.value for label in _LABELS)}, and benign as "
                "true or false or left out."
            ) from error
    if not rows:
        raise UsageError(f"{path} holds no labelled answers; write one JSON object a line.")
    return rows


def check_judge(judge: Judge, path: Path | None = None) -> dict[str, Any]:
    """Compare `judge` with the hand labels, for each part of the file and for `all` of it.

    Returns {part: {n, unjudged, accuracy, kappa, confusion: {hand label: {judge's label: count}}}, 'wrong': [rows]}.
    Accuracy and kappa (Cohen's: agreement beyond what the two label frequencies give by chance, 1 at best) are over the
    n - unjudged answers that the judge labelled, None if there are none. 'wrong' lists unjudged answers too.
    """
    rows = read_labelled(path)
    prompts = [Prompt(row["prompt"], row["benign"], row["part"]) for row in rows]
    judged: list[Judgement] = judge.answered_all(prompts, [row["answer"] for row in rows])
    parts: dict[str, list[tuple[Label, Label]]] = {"all": []}
    for row, judgement in zip(rows, judged, strict=True):
        pair = (Label(row["label"]), judgement.label)
        parts.setdefault(row["part"], []).append(pair)
        parts["all"].append(pair)
    result: dict[str, Any] = {part: _agreement(parts[part]) for part in sorted(parts)}
    result["wrong"] = [
        {**row, "judged": judgement.label.value, "reason": judgement.reason}
        for row, judgement in zip(rows, judged, strict=True)
        if judgement.label.value != row["label"]
    ]
    return result


def _agreement(pairs: Sequence[tuple[Label, Label]]) -> dict[str, Any]:
    known = [(hand, judged) for hand, judged in pairs if judged is not Label.UNJUDGED]
    confusion = {hand.value: {judged.value: 0 for judged in _LABELS} for hand in _LABELS}
    for hand, judged in known:
        confusion[hand.value][judged.value] += 1
    by_hand, by_judge = [hand for hand, _ in known], [judged for _, judged in known]
    return {
        "n": len(pairs),
        "unjudged": len(pairs) - len(known),
        "accuracy": sum(hand is judged for hand, judged in known) / len(known) if known else None,
        "kappa": kappa(by_hand, by_judge) if known else None,
        "confusion": confusion,
    }


def lines(result: Mapping[str, Any], part: str | None = None) -> list[str]:
    """The result of `check_judge` as lines of text; with `part`, wrong answers of that part only."""
    text = []
    for name, agreement in result.items():
        if name == "wrong":
            continue
        text.append(f"{name:5} n {agreement['n']:4}  {_rates(agreement)}")
        for hand, row in agreement["confusion"].items():
            text.append(f"      {hand:9} judged " + "  ".join(f"{judged} {count}" for judged, count in row.items()))
    for row in result["wrong"]:
        if part in (None, row["part"]):
            labels = f"{row['label']} judged {row['judged']} ({row['reason']})"
            text.append(f"wrong, {row['part']}: {labels}: {row['answer'][:100]!r}")
    return text


def _rates(agreement: Mapping[str, Any]) -> str:
    missing = f"  unjudged {agreement['unjudged']}" if agreement["unjudged"] else ""
    if agreement["accuracy"] is None:
        return f"none could be judged{missing}"
    return f"accuracy {agreement['accuracy']:.3f}  kappa {agreement['kappa']:.3f}{missing}"
