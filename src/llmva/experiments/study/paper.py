"""`llmva study init`: a study file to begin with, and the study of the paper with its published figures.

`data/paper.jsonl` has a line for each of the twelve models (arXiv 2601.19487): the hub's id, how many sublayers were
edited, and what Tables 2 and 4 and Figure 5 (read off the drawing) say of each method. Its Table 3 names other numbers
of sublayers from Phi-4 on, because its columns are misplaced; these are as the figures were made. There is no row of
CAST in it. Its XSTest has 174 harmful and 181 benign prompts, fewer than the usual 200 and 250.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

HEAD = """\
# A study of llmva. `llmva study schema` prints all fields, `llmva study FILE --dry-run` what this one will take.
"""
SMALL = (
    HEAD
    + """\
title = "My study"
methods = ["none", "vectorsteer", "scans", "llmva"]
seeds = [42, 43]

[settings]
per_source = 64

[[models]]
name = "organism"
path = "demo"
# methods = ["adapter:PATH_OR_ID", "model:PATH_OR_ID"]  # what others have published for this model
"""
)


def paper_models() -> list[dict[str, Any]]:
    """name, path, parameters, layers and published figures of the paper's models."""
    text = (resources.files("llmva.experiments.study") / "data" / "paper.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def small_study() -> str:
    """The text of a study file to begin with."""
    return SMALL


def paper_study(data_dir: str | None = None) -> str:
    """The text of the paper's study.

    Args:
        data_dir: folder with copies of the data sets; None reads them from their homes.
    """
    lines = [
        HEAD,
        "# The paper (arXiv 2601.19487) has one seed and 50 test prompts of each set; give more seeds for intervals.",
        'title = "LLM-VA: the paper\'s study"',
        'methods = ["none", "alphasteer", "vectorsteer", "alphasteer+", "scans", "llmva"]',
        "seeds = [42]",
        'transfer = ["advbench", "or-bench-toxic", "xstest", "or-bench-hard"]',
        "transfer_per_set = 1319",
        'utility = ["cola", "mnli", "rte", "mrpc", "sst2", "gsm8k"]',
        "",
        "[settings]",
        'recipe = "paper"',
        "",
        "[[data]]",
        'name = "paper"',
        'data = ["seval-attack", "seval-risk", "orfuzzset", "nq"]',
        "only = true",
        *([f"data_dir = {json.dumps(data_dir)}"] if data_dir else []),
        "",
        "[[judges]]",
        'name = "Qwen3Guard-Gen-8B"',
        'judge = "qwen3guard-8b"',
    ]
    models = paper_models()
    for model in models:
        lines += [
            "",
            "[[models]]",
            *(f"{key} = {json.dumps(model[key])}" for key in ("name", "path", "parameters", "layers")),
            "# revision = the commit to measure; the paper names none",
        ]
        if model["name"].startswith(("Llama", "Qwen2.5")):
            lines.append(
                "# system = the authors' code gives this model a system prompt: write it here to reproduce its row"
            )
    for model in models:
        for method, figures in model["published"].items():
            lines += ["", f"[published.{json.dumps(model['name'])}.{json.dumps(method)}]"]
            lines += [f"{key} = {_inline(value)}" for key, value in figures.items()]
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_inline(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value)
