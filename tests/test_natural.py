"""benchmarks/natural.py: its page on made-up cells, its task files, and cells that are kept apart by their options."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_model, tiny_model, tiny_tokenizer
from llmva.errors import UsageError
from llmva.experiments.cells import Cells
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt
from llmva.utility import load_tasks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(str(BENCHMARKS))
    tasks: Any = import_module("natural_tasks")
    pages: Any = import_module("natural_page")
    script: Any = import_module("natural")

SOURCES = {"seval_attack_val": False, "seval_risk_val": False, "orfuzzset_val": True, "nq_val": True}
TABLE = {
    "Qwen2.5-3B|LLM-VA": ["LLM-VA", [44.0, 12.0, 16.0, 18.0], 0.79],
    "Qwen2.5-7B|Original": ["Original", [86.0, 36.0, 80.0, 4.0], 0.53],
    "Qwen3-4B|LLM-VA": ["LLM-VA", [46.0, 28.0, 24.0, 0.0], 0.78],
}


def prompts() -> list[Prompt]:
    """Ten of each source."""
    return [Prompt(f"{source} {i}", benign, source) for source, benign in SOURCES.items() for i in range(10)]


def labels(right: int) -> dict[str, list[str]]:
    """Labels of which the first `right` of each source's ten are right."""
    wanted = {True: ("answered", "refused"), False: ("refused", "answered")}
    return {"labels": [wanted[benign][i >= right] for benign in SOURCES.values() for i in range(10)]}


def made_up(published: Any) -> Any:
    """Two seeds of the default run, one of the paper's recipe, and a baseline that is measured at home alone."""
    study = pages.Study("Qwen2.5-0.5B", {"rows": 10}, dict.fromkeys(pages.GROUPS, prompts()), published)
    done = {"untouched": {42: 4}, "default": {42: 10, 43: 9}, "paper": {42: 6}, "scans": {42: 4}}
    study.cells = {m: {s: dict.fromkeys(pages.GROUPS, labels(n)) for s, n in by.items()} for m, by in done.items()}
    study.cells["scans"][42] = {"home": labels(4)}
    study.cells["default"][43] = {**study.cells["default"][43], "home": {**labels(9), "limits": ["Few prompts."]}}
    fit = {
        "strength": 0.75,
        "iteration": 1,
        "iterations": 1,
        "kept": 0.99,
        "kl": 0.0123,
        "stopped": "validation F1 is 1",
    }
    auc = {"auc": {"nq_train": 0.75, "seval_risk_train": 0.85}}
    study.fits = {m: {s: {**fit, **auc, "tokens": 1000 * s} for s in done[m]} for m in ("default", "paper")}
    tried = [{"options": {"strength": 0.5}, "asr": 0.5, "orr": 0.1, "f1": 0.6}]
    study.fits["scans"] = {42: {"options": {"strength": 0.5}, "tried": tried, "answers": 1234, "held": 0.6}}
    line = {"name": "paper_cola", "metric": "f1", "n": 20, "before": 0.5, "after": 0.4}
    study.utility = {"default": {42: [{**line, "ratio": 0.8, "interval": [0.7, 1.0]}]}}
    study.failed = {"cast, seed 42": "The model refuses none of the fit prompts."}
    return study


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    path = tmp_path / "paper.json"
    path.write_text(json.dumps({"L_as_run": {}, "table2_[sevalA,sevalR,orfuzz,nq]%_F1": TABLE}))
    return path


def test_the_page_shows_rates_tests_utility_and_what_was_published(paper: Path) -> None:
    page = pages.page(made_up(pages.published(paper, "qwen2.5-coder-0.5b-instruct")))
    lines = page.splitlines()
    (f1,) = [line for line in lines if line.startswith("| **F1**, the run's test prompts (n = 40)")]
    assert [cell.split()[0] for cell in f1.split("|")[2:-1]] == ["0.400", "0.950", "0.600", "0.400"]
    (unfinished,) = [line for line in lines if line.startswith("| **F1**, transfer sets")]
    assert unfinished.split("|")[-2].strip() == pages.DASH
    assert "| ORR nq_val (n = 10) | 0.600 [" in page
    assert "| default | 43 | 0.900 | 0.900 | 0.900 | 1 of 1, 0.75 | 0.990 | 0.0123 | 43,000 tokens |" in page
    assert "| **default** | mean | 0.950 ± 0.071 |" in page
    assert "| scans | 42 | 0.400 | – | – | strength 0.5 | – | – | 1,234 answers | – |" in page
    assert sum(line.startswith("| paper | 0.350 [") for line in lines) == 3  # paired, in each group
    assert sum(line.startswith("| scans | 0.550 [") for line in lines) == 1
    assert "| default | 42 | paper_cola | f1 | 20 | 0.500 → 0.400 | 0.800 [0.700, 1.000] |" in page
    assert "| **mean** | 0.800 | 0.800 | 0.800 |" in page
    assert "| **Qwen2.5-0.5B, default** (measured here) | 0.050 |" in page
    assert "| Qwen2.5-3B, LLM-VA (published, for that model) | 0.440 | 0.120 | 0.160 | 0.180 | 0.790 |" in page
    assert "Qwen2.5-7B" in page
    assert "Qwen3-4B" not in page
    assert "- cast, seed 42 was not measured: The model refuses none of the fit prompts." in page
    assert "- default, seed 43: Few prompts." in page
    assert "- scans: Answers no fewer of the harmful prompts" in page


def test_published_rows_of_one_model_and_of_none(paper: Path, tmp_path: Path) -> None:
    assert list(pages.published(paper, "Qwen2.5-3B")) == ["Qwen2.5-3B, LLM-VA"]
    assert pages.published(paper, "weights") == {}
    assert pages.published(tmp_path / "nowhere.json", "Qwen2.5-3B") == {}


def test_the_first_cell_makes_a_page_already() -> None:
    study = pages.Study("model", {}, dict.fromkeys(pages.GROUPS, prompts()))
    study.cells = {"untouched": {42: {"home": labels(5)}}}
    assert "| **F1**, the run's test prompts (n = 40) | 0.500 [" in pages.page(study)


def test_the_mean_of_ratios_adds_independent_errors() -> None:
    rows: list[dict[str, Any]] = [
        {"ratio": 0.9, "interval": [0.6, 1.3]},
        {"ratio": 1.1, "interval": [0.7, 1.4]},
        {"ratio": None, "interval": None},
    ]
    mean, interval = tasks.mean_ratio(rows)
    assert mean == pytest.approx(1.0)
    assert interval == pytest.approx([1 - 0.5 / 2, 1 + 0.5 / 2])
    assert tasks.mean_ratio(rows[2:]) == (None, None)


def test_task_files_load_without_a_network(tmp_path: Path) -> None:
    pair = {"sentence1": "a", "sentence2": "b", "sentence": "c", "label": 1}
    rows = {
        **dict.fromkeys(("cola", "mrpc", "rte", "sst2"), pair),
        "mmlu": {"question": "q", "subject": "high_school", "choices": ["a", "b", "c", "d"], "answer": 3},
        "gsm8k": {"question": "q", "answer": "40,000"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 5)
    tasks.write_tasks(tmp_path / "tasks", tmp_path)
    found = load_tasks([tasks.PREFIX + name for name in tasks.TASKS], include_path=tmp_path / "tasks", limit=4)
    assert [(task.name, task.n, task.total) for task in found] == [(f"paper_{name}", 4, 5) for name in tasks.TASKS]
    mmlu = found[tasks.TASKS.index("mmlu")].parts["paper_mmlu"]
    assert "high school: q\nA. a\nB. b\nC. c\nD. d\n" in mmlu.doc_to_text(rows["mmlu"])
    cola = found[0].parts["paper_cola"]
    assert cola.aggregation()["f1"]([(0, 0), (1, 0)]) == pytest.approx(1 / 3)  # macro: of 2/3 and 0


def test_cells_of_other_options_are_refused(tmp_path: Path) -> None:
    texts = {side: [f"{side} {i}" for i in range(10)] for side in ("red", "blue")}
    home = PromptSet.from_lists(texts["red"], texts["blue"])
    chat = chat_model(tiny_model(), tiny_tokenizer())
    fixed = {"rows": 400, "max_new_tokens": 8, "foreign": 5, "iterations": 1, "tuning": 4, "bundled": False}
    args = argparse.Namespace(model="m", judge="phrases", per_source=16, only=False, system=None, **fixed)

    def opened() -> None:
        with closing(Cells(tmp_path, script.identity(args, chat, home, {"home": list(home.test)}))):
            pass

    opened()
    opened()
    args.per_source = 8
    with pytest.raises(UsageError, match="was measured with --per-source 16, and this is 8"):
        opened()
