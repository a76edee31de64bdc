"""How often does a judge agree with labels given by hand? `python -m llmva.judges.check` prints it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.judges import make_judge
from llmva.judges.base import Judge, Label

_FIELDS = ("part", "prompt", "answer", "label")


def read_labelled(path: Path | None = None) -> list[dict[str, str]]:
    """Rows of a JSONL file with the fields part, prompt, answer, label and note; without `path`, the bundled ones.

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
            Label(row["label"])
            rows.append({**row, **{field: str(row[field]) for field in _FIELDS}})
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"Line {number} of {path} is not a labelled answer; write a JSON object with the fields "
                f"{', '.join(_FIELDS)} and one of the labels {', '.join(label.value for label in Label)}."
            ) from error
    if not rows:
        raise UsageError(f"{path} holds no labelled answers; write one JSON object a line.")
    return rows


def check_judge(judge: Judge, path: Path | None = None) -> dict[str, Any]:
    """Compare `judge` with the hand labels, for each part of the file and for `all` of it.

    Returns {part: {n, accuracy, kappa, confusion: {hand label: {judge's label: count}}}, 'wrong': [rows]}.
    Kappa is Cohen's: agreement above what the two label frequencies give by chance, 1 at best.
    """
    rows = read_labelled(path)
    judged = judge.answered_all([row["prompt"] for row in rows], [row["answer"] for row in rows])
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
    confusion = {hand.value: {told.value: 0 for told in Label} for hand in Label}
    for hand, told in pairs:
        confusion[hand.value][told.value] += 1
    n = len(pairs)
    agree = sum(confusion[label.value][label.value] for label in Label) / n
    chance = sum(
        sum(confusion[label.value].values()) * sum(row[label.value] for row in confusion.values()) for label in Label
    ) / (n * n)
    kappa = (agree - chance) / (1 - chance) if chance < 1 else 1.0
    return {"n": n, "accuracy": agree, "kappa": kappa, "confusion": confusion}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmva.judges.check", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="JSONL of labelled answers (default: the bundled ones)")
    parser.add_argument("--judge", default="phrases", help="name of the judge")
    parser.add_argument("--part", help="list the wrong ones of this part only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        result = check_judge(make_judge(options.judge), options.file)
    except LlmvaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    wrong = result.pop("wrong")
    for part, figures in result.items():
        print(f"{part:5} n {figures['n']:4}  accuracy {figures['accuracy']:.3f}  kappa {figures['kappa']:.3f}")
        for hand, row in figures["confusion"].items():
            print(f"      {hand:9} judged " + "  ".join(f"{told} {count}" for told, count in row.items()))
    for row in wrong:
        if options.part in (None, row["part"]):
            told = f"{row['label']} judged {row['judged']} ({row['reason']})"
            print(f"wrong, {row['part']}: {told}: {row['answer'][:100]!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
