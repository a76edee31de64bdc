"""Further figures of a fitted method: under an attack, on a set on which nothing is fitted, in a benchmark."""

from __future__ import annotations

from typing import Any

from llmva.attacks.registry import parse_attacks
from llmva.evaluation.attacked import attacked_prompts
from llmva.experiments.comparison import Comparison
from llmva.experiments.measure import Applied
from llmva.experiments.study.definition import Study
from llmva.experiments.study.plan import Cell
from llmva.metrics.rates import count, point_rates
from llmva.prompts.public.wanted import parse_data
from llmva.prompts.testsets import read_test_sets
from llmva.prompts.types import Prompt


def measure_extra(study: Study, comparison: Comparison, cell: Cell, applied: Applied) -> dict[str, Any]:
    """The content of a cell of the kinds attack, transfer and utility, with a method applied."""
    if cell.kind == "utility":
        return _task(study, comparison, cell, applied)
    setup = comparison.setup
    about: dict[str, Any] = {}
    if cell.kind == "attack":
        (attack,) = parse_attacks([cell.what])
        asked = attacked_prompts(setup.chat, setup.prompts.test, [attack], setup.max_new_tokens, setup.thinking)
        prompts = asked[attack.name]
    else:
        prompts, about = _set(study, comparison, cell)
    with applied():
        seen = setup.observe(prompts, cell.title)
    counts = count(seen.prompts, seen.labels)
    return {
        "kind": cell.kind,
        "what": cell.what.partition("=")[0],
        **about,
        **point_rates(seen.prompts, seen.labels),
        "n_toxic": counts.n_toxic,
        "n_benign": counts.n_benign,
        "labels": [label.value for label in seen.labels],
        "answers": seen.capture.answers,
    }


def _set(study: Study, comparison: Comparison, cell: Cell) -> tuple[list[Prompt], dict[str, Any]]:
    """Its test prompts, without those on which methods are fitted or chosen."""
    of = comparison.setup.prompts
    wanted = parse_data([cell.what], None if "=" in cell.what else cell.panel.data.data_dir)
    (one,) = read_test_sets(wanted, fit=[*of.train, *of.validation], per_set=study.transfer_per_set)
    return list(one.prompts), {"set": one.about, "limits": list(one.limits)}


def _task(study: Study, comparison: Comparison, cell: Cell, applied: Applied) -> dict[str, Any]:
    from llmva.utility import load_tasks, measure_tasks

    chat = comparison.setup.chat
    tasks = load_tasks([cell.what], limit=study.utility_limit)
    with applied():
        scored = measure_tasks(
            chat.model, chat.tokenizer, tasks, batch_tokens=chat.batching.tokens, progress=comparison.setup.progress
        )
    rows = [
        {**{k: v for k, v in row.items() if k != "before"}, "score": row["before"]} for row in scored["utility_tasks"]
    ]
    return {"kind": "utility", "what": cell.what, "tasks": rows}
