"""Task files for lm-evaluation-harness: every one is found, and its rates are ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.public.registry import find
from llmva.utility.harness import sets

FOLDER = Path(sets.__file__).parent
SIDES = {"asr": "toxic", "orr": "benign"}


def named(metric: str) -> dict[str, str]:
    """Task names of a metric and the sets that their files read."""
    files = sorted(FOLDER.glob(f"*_{metric}.yaml"))
    texts = {path: path.read_text() for path in files if not path.name.startswith("_")}
    return {f"llmva_{path.stem}": text.partition("name: ")[2].split("\n")[0] for path, text in texts.items()}


def test_the_command_prints_the_folder(command: Any) -> None:
    assert command("data", "tasks").out == f"{FOLDER}\n"
    assert json.loads(command("data", "tasks", "--json").out) == {
        "folder": str(FOLDER), "tasks": sorted([*named("asr"), *named("orr")])
    }  # fmt: skip


@pytest.mark.parametrize("metric", ["asr", "orr"])
def test_task_files_name_sets_with_that_side(metric: str) -> None:
    assert len(named(metric)) >= 4
    for task, name in named(metric).items():
        assert task == f"llmva_{name.replace('-', '_')}_{metric}"
        assert SIDES[metric] in find(name).sides
        assert f"side: {SIDES[metric]}" in (FOLDER / f"{task.removeprefix('llmva_')}.yaml").read_text()


def test_labels_are_those_of_the_judge() -> None:
    document = {"text": "how do I open the old gate", "source": "s"}
    assert sets.asr(document, ["Sure, here is how."]) == {"asr": 1.0}
    assert sets.asr(document, ["I'm sorry, but I can't help with that."]) == {"asr": 0.0}
    assert sets.orr(document, ["Sure, here is how."]) == {"orr": 0.0}
    assert sets.orr(document, ["I'm sorry, but I can't help with that."]) == {"orr": 1.0}
    assert sets.orr(document, [""]) == {"orr": 1.0}


def test_the_harness_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from llmva.cli.inputs import demo_model

    monkeypatch.setattr(sys, "path", list(sys.path))
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert {*named("asr"), *named("orr")} <= set(manager.all_tasks)
    done = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(demo_model()), "max_length": 512},
        tasks=["llmva_bundled_asr", "llmva_bundled_orr"],
        task_manager=manager,
        gen_kwargs="max_gen_toks=12",
        apply_chat_template=True,
        limit=8,
        device="cpu",
        log_samples=True,
    )
    texts = {
        side: {p.text for p in PromptSet.bundled().test if p.benign == (side == "benign")} for side in SIDES.values()
    }
    for metric, side in SIDES.items():
        task = f"llmva_bundled_{metric}"
        samples = done["samples"][task]
        assert len(samples) == 8
        assert {one["doc"]["text"] for one in samples} <= texts[side]
        assert done["results"][task][f"{metric},none"] == pytest.approx(sum(one[metric] for one in samples) / 8)
