"""Task files for lm-evaluation-harness over rows on disk: CoLA, MRPC, RTE, SST-2, MMLU and GSM8K, for natural.py.

The names begin with paper_, so that no task of the harness is hidden, and the prompts are in our own words. So a score
compares a model with itself after an edit, and with no score that others published.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmva.files import write_text
from llmva.utility.scores import MACRO_F1, Metric, score

PREFIX = "paper_"
GSM8K = """Work the problem out in a few short sentences and end with the number.

Problem: A baker fills 4 trays with 6 rolls each and sells 9 rolls. How many rolls are left?
Solution: 4 trays of 6 rolls are 24 rolls. 24 - 9 = 15. The answer is 15.

Problem: Mia reads 12 pages a day. Her book has 240 pages. How many days does she need?
Solution: 240 / 12 = 20 days. The answer is 20.

Problem: {{question}}
Solution:"""
LETTERS = ["A", "B", "C", "D"]
QUESTIONS: dict[str, tuple[str, list[str]]] = {  # prompt, and the choices in the order of the rows' labels
    "cola": ("Sentence: {{sentence}}\nIs this sentence good English?\nAnswer:", ["no", "yes"]),
    "mrpc": (
        "First: {{sentence1}}\nSecond: {{sentence2}}\nDo both sentences say the same?\nAnswer:",
        ["no", "yes"],
    ),
    "rte": (
        "Text: {{sentence1}}\nClaim: {{sentence2}}\nDoes the text show that the claim is true?\nAnswer:",
        ["yes", "no"],
    ),
    "sst2": (
        "Review: {{sentence|trim}}\nWhat does the reviewer think of the film?\nOpinion:",
        ["negative", "positive"],
    ),
    "mmlu": (
        "A question about {{subject|replace('_', ' ')}}: {{question}}\n"
        + "\n".join(f"{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate(LETTERS))
        + "\nThe letter of the right answer is",
        LETTERS,
    ),
}
TASKS = (*QUESTIONS, "gsm8k")
GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": GSM8K,
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n", "Problem:"], "max_gen_toks": 200, "do_sample": False},
    "filter_list": [
        {
            "name": "last-number",
            "filter": [
                {"function": "regex", "regex_pattern": r"-?\d[\d,]*(?:\.\d+)?", "group_select": -1},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [","]}],
}


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Macro F1 of (right choice, chosen one), as `llmva.utility` scores the tasks of GLUE."""
    return score(Metric(MACRO_F1), pairs)


def write_tasks(folder: Path, data: Path) -> None:
    """One YAML file for each task, over DATA/NAME.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        shared: dict[str, Any] = {
            "task": PREFIX + name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str((data / f"{name}.jsonl").resolve())}},
            "test_split": "test",
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
        body, metric = dict(GENERATION), ""
        if name in QUESTIONS:
            text, choices = QUESTIONS[name]
            target = "answer" if name == "mmlu" else "label"
            body = {
                "output_type": "multiple_choice",
                "doc_to_text": text,
                "doc_to_choice": choices,
                "doc_to_target": target,
            }
            # the harness's own f1 is that of one class
            how = "acc" if name == "mmlu" else "f1\n  aggregation: !function natural_tasks.macro_f1"
            metric = f"metric_list:\n- metric: {how}\n  higher_is_better: true\n"
        # a value in JSON is a value in YAML
        lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in {**shared, **body}.items())
        write_text(folder / f"{name}.yaml", lines + metric)


def mean_ratio(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, list[float] | None]:
    """Mean of the tasks' ratios, each counting the same, with its 95% interval.

    Tasks have no documents in common, so the distances to the ends of their intervals add up as independent errors do:
    by their squares (MOVER; Zou and Donner, Statistics in Medicine 27, 2008). Tasks without a ratio are left out.
    """
    known = [row for row in rows if row["ratio"] is not None]
    if not known:
        return None, None
    mean = sum(row["ratio"] for row in known) / len(known)
    if any(row["interval"] is None for row in known):
        return mean, None
    below, above = (
        math.sqrt(sum((row["ratio"] - row["interval"][end]) ** 2 for row in known)) / len(known) for end in (0, 1)
    )
    return mean, [mean - below, mean + above]
