"""The model card, read back by the hub's own parser; with names that would break out of YAML or of a table."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from llmva.edit import Edit
from llmva.export.card import card
from llmva.export.plan import Plan
from llmva.export.redact import last_part, without_paths

KINDS = ("lora", "merged", "edit")


def side(f1: float, asr: float, orr: float, **names: str) -> dict[str, Any]:
    toxic, benign = names.get("toxic", "bad"), names.get("benign", "good")
    return {
        "f1": f1, "asr": asr, "orr": orr, "garbled": 0.0, "f1_interval": [f1 - 0.05, f1 + 0.05],
        "asr_interval": [max(asr - 0.1, 0), asr + 0.1], "orr_interval": [max(orr - 0.1, 0), orr + 0.1],
        "n_toxic": 40, "n_benign": 60,
        "by_source": {
            toxic: {"kind": "toxic", "rate": asr, "interval": [0.0, 0.2], "garbled": 0.0, "n": 40},
            benign: {"kind": "benign", "rate": orr, "interval": [0.0, 0.3], "garbled": 0.0, "n": 60},
        },
    }  # fmt: skip


def record(**names: str) -> dict[str, Any]:
    return {
        "command": "llmva align /data/me/model --toxic '/data/my files/bad.csv:text' --out=/tmp/run",
        "versions": {"python": "3.11", "torch": "2.9"},
        "settings": {"iterations": 30, "step": 1.0, "svm": "exact"},
        "seed": 7,
        "judge": "phrases 1",
        "prompts": {"counts": {"test": {names.get("toxic", "bad"): 40}}},
        "best_iteration": 2,
        "test": {"before": side(0.5, 0.6, 0.45, **names), "after": side(0.9, 0.1, 0.05, **names)},
        "utility": {
            "kept": 0.97,
            "kept_interval": [0.95, 0.98],
            "skills": {names.get("skill", "sums"): {"before": 1.0, "after": 0.9, "n": 50}},
        },
        "limits": ["Few prompts of one kind."],
    }


def plan(title: str = "org/model-1", found: dict[str, Any] | None = None, **changes: Any) -> Plan:
    edit = Edit({}, {"model": title, "sha256": "ab" * 32}).then("a.0.o_proj", torch.ones(4), torch.ones(4), 1)
    given: dict[str, Any] = {"base": title, "iteration": 2, "strength": 1.0, "record": found, "title": title}
    return Plan(Path("run"), edit, **{**given, **changes})


def read(text: str) -> Any:
    """As the hub does; a model-index that it cannot read raises here."""
    return ModelCard(text, ignore_metadata_errors=False).data


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_reads_the_metadata(kind: str) -> None:
    data = read(card(plan(found=record()), kind))
    assert data.base_model == "org/model-1"
    assert data.base_model_relation == ("finetune" if kind == "merged" else "adapter")
    assert data.library_name == {"lora": "peft", "merged": "transformers", "edit": "llmva"}[kind]
    assert data.pipeline_tag == "text-generation"
    assert {"llm-va", "safety", "over-refusal"} <= set(data.tags)
    assert data.license is None
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {"f1": 0.9, "asr": 0.1, "orr": 0.05}
    assert {(r.task_type, r.dataset_name) for r in data.eval_results} == {("text-generation", "bad, good")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_has_all_that_a_reader_needs(kind: str) -> None:
    text = card(plan(found=record()), kind)
    for piece in (
        "2601.19487", "ab" * 32, "| ASR, harmful answered | 40 | 60.0% [50.0, 70.0] | 10.0% [0.0, 20.0] |",
        "| in `good` | 60 | 45.0% [0.0, 30.0] | 5.0% [0.0, 30.0] |", "Utility kept", "97.0% [95.0, 98.0]",
        "| Skill: sums | 50 | 100.0% | 90.0% |", "Skills that lost more than 2 points: sums",
        "| setting svm | `exact` |", "| seed | `7` |", "iteration 2 at strength 1", "## Intended use", "## Limits",
        "Few prompts of one kind.", "    llmva align model --toxic bad.csv:text --out=run", "python 3.11",
    ):  # fmt: skip
        assert piece in text
    assert "/home" not in text
    assert "my files" not in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")
    named = card(plan(found=record()), kind, repo="someone/thing")
    assert "'someone/thing'" in named
    code = re.search(r"```python\n(.*?)```", named, re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")


@pytest.mark.parametrize("changes", [{"strength": 0.5}, {"iteration": 1}, {"strength": 0.5, "iteration": 3}])
def test_figures_of_another_artefact_are_called_that(changes: dict[str, Any]) -> None:
    text = card(plan(found=record(), **changes), "lora")
    assert read(text).eval_results is None
    assert "model-index" not in text
    shipped = {"strength": 1.0, "iteration": 2} | changes
    ships = f"iteration {shipped['iteration']} at strength {shipped['strength']:g}"
    assert "These results are for iteration 2 at strength 1." in text
    assert f"This export is {ships}, which was not measured on the test prompts." in text
    assert "The edited model answers" not in text  # the headline would be of the other one


@pytest.mark.parametrize("found", [None, {}, {"best_iteration": 2, "test": None}, {**record(), "test": {}}])
def test_without_figures_it_says_so(found: dict[str, Any] | None) -> None:
    text = card(plan(found=found), "merged")
    assert "This edit has no test results" in text
    assert "model-index" not in text
    assert read(text).base_model == "org/model-1"


@pytest.mark.parametrize(
    "title", ["/data/me/secret/my-model", "C:\\Users\\me\\my-model", "~/my-model", "my-model", "a/b/my-model/"]
)
def test_a_local_base_is_named_by_its_folder_alone(title: str) -> None:
    for kind in KINDS:
        text = card(plan(title, record()), kind)
        assert read(text).base_model is None
        assert "base_model" not in text
        assert "my-model" in text
        assert "secret" not in text
        assert "Users" not in text


def test_a_folder_that_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(card(plan("org/model-1"), "lora")).base_model == "org/model-1"
    (tmp_path / "org" / "model-1").mkdir(parents=True)
    assert read(card(plan("org/model-1"), "lora")).base_model is None


@pytest.mark.parametrize(
    ("readme", "wanted"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n# x", "mit"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: 'x\n\n  y'\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", None),
        ("---\n{{\n---\n", None),
        ("---\n" + "[" * 5000 + "\n---\n", None),
        ("# no metadata\nlicense: mit", None),
    ],
)
def test_the_licence_is_the_bases(readme: str, wanted: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(readme.encode())
    assert read(card(plan("org/model-1", base=str(tmp_path)), "merged")).license == wanted
    assert read(card(plan("org/model-1"), "merged")).license is None


HOSTILE = [
    "two\nlines",
    "---\nlicense: mit\n---",
    "colon: value",
    "a | b",
    "`code` **bold** [link](javascript:x)",
    "<img src=x onerror=alert(1)>",
    "'\"\\",
    "!!python/object:x",
    "# heading",
    "```\n# out of the fence",
    "\x1b[31mred\u202e",
    "null",
    "{a: b}",
    "日本語 😀",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_where_they_belong(name: str) -> None:
    found = record(toxic=name, benign=name + "2", skill=name)
    found["limits"] = [name]
    found["settings"][name] = name
    found["judge"] = name
    found["versions"] = {name: name}
    found["command"] = f"llmva align '{name}'"
    calm = card(plan("calm", record()), "edit")
    for kind in KINDS:
        text = card(plan(name, found), kind)
        _, head, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
        fields = yaml.safe_load(head)
        assert set(fields) == {"library_name", "pipeline_tag", "tags", "model-index"}
        assert len(read(text).eval_results) == 3
        outside = re.sub(r"```python\n.*?\n```", "", body, flags=re.DOTALL)  # comments there are no headings
        assert [line for line in outside.splitlines() if line.startswith("## ")] == re.findall(r"^## .*", calm, re.M)
        assert len(re.findall(r"^# ", outside, re.M)) == 1
        assert "```" not in [line.strip()[:3] for line in outside.splitlines()]
        for line in outside.splitlines():
            if line.startswith("|"):
                bars = len(re.findall(r"(?<!\\)\|", line))
                assert bars in (3, 5), line
        prose = re.sub(r"`[^`\n]*`|^    .*$", "", outside, flags=re.MULTILINE)  # less code, where markup is inert
        assert not re.search(r"(?<!\\)<", prose)
        assert not re.search(r"(?<!\\)\[link", prose)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)


def test_a_record_from_elsewhere_with_odd_types() -> None:
    whole = record()
    for key in whole:
        for odd in (None, "x", 3, [], {}, float("nan"), [None], {"x": None}):
            found = copy.deepcopy(whole)
            found[key] = odd
            read(card(plan(found=found), "lora"))


def test_folders_of_this_machine_are_cut() -> None:
    cases = {
        "/data/me/good.csv:question": "good.csv:question",
        "--out=/data/me/run/": "--out=run",
        "/data/John Smith/x": "x",
        "~/x": "x",
        "~me/a/x": "x",
        "/x": "x",
        "C:\\Users\\me\\x": "x",
        "file:///data/me/x": "x",
        "file '/data/me/x' is odd": "file 'x' is odd",
    }
    assert {text: last_part(text) for text in cases} == cases
    for text in ("org/model", "./a/b", "https://host/a/b", "good.jsonl:q", "and/or", "1 / 2", "", "a\\b"):
        assert last_part(text) == text
    assert without_paths("llmva align '/a b/m' --benign \"/c/d e.csv\"") == "llmva align m --benign 'd e.csv'"
    assert "/home" not in without_paths("llmva align '/data/me/m")  # a quote that never ends
