"""The front of a run: its points, the choice among them under limits, and that any of them ships."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import llmva
from conftest import Said, chat_model
from llmva.alignment import RunOptions
from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.export.card import measured
from llmva.export.plan import make_plan
from llmva.judges import make_judge
from llmva.metrics.objective import Objective
from llmva.metrics.pareto import find_front, find_point
from llmva.metrics.rates import point_rates
from llmva.settings import make_settings

Command = Callable[..., Said]


def entry(iteration: int, asr: float | None, orr: float, kl: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"iteration": iteration, "f1": 0.5, "asr": asr, "orr": orr, "garbled": 0.0, "kept": 1.0, "kl": kl, **more}


def objective(**settings: Any) -> Objective:
    return Objective.of(make_settings(**settings), 50, 50)


# -- which points there are, and which are on the front


def test_points_are_iterations_and_strengths_of_the_chosen_one() -> None:
    rows = [{**entry(2, 0.1, 0.1), "strength": s} for s in (0.0, 0.5, 1.0, 1.25)]
    record = {
        "best_iteration": 2,
        "iterations": [entry(0, 0.6, 0.4), entry(1, 0.9, 0.9, undone=True), entry(2, 0.1, 0.1), entry(3, 0.2, 0.2)],
        "strengths": rows,
    }
    found = find_front(record)
    assert [(row["iteration"], row["strength"]) for row in found] == [(0, 1), (2, 0.5), (2, 1), (2, 1.25), (3, 1)]
    assert [row["point"] for row in found] == [0, 1, 2, 3, 4]
    assert [row["point"] for row in found if row["chosen"]] == [2]
    chosen = find_front({**record, "best_strength": 0.5})
    assert [row["point"] for row in chosen if row["chosen"]] == [1]
    # strength 0 of a run that began with an edit is another model than its iteration 0
    assert (2, 0.0) in [(r["iteration"], r["strength"]) for r in find_front({**record, "extends": {"old": []}})]


@pytest.mark.parametrize(
    ("entries", "on_front"),
    [
        ([entry(0, 0.6, 0.4), entry(1, 0.1, 0.1, 0.02)], [0, 1]),  # the untouched model costs nothing
        ([entry(0, 0.6, 0.4), entry(1, 0.1, 0.2, 0.02), entry(2, 0.2, 0.1, 0.02)], [0, 1, 2]),
        ([entry(0, 0.6, 0.4), entry(1, 0.1, 0.1, 0.02), entry(2, 0.1, 0.1, 0.03)], [0, 1]),
        ([entry(0, 0.6, 0.4), entry(1, 0.6, 0.4, 0.0)], [0, 1]),  # equals do not beat each other
        ([entry(0, None, 0.4), entry(1, 0.6, 0.4)], [1]),  # nothing known of a side
        ([entry(0, 0.6, 0.4), entry(1, 0.0, 0.4, garbled=0.7)], [0]),  # broken is not safe
    ],
)
def test_what_is_on_the_front(entries: list[dict[str, Any]], on_front: list[int]) -> None:
    found = find_front({"best_iteration": 0, "iterations": entries})
    assert [row["point"] for row in found if row["on_front"]] == on_front


@pytest.mark.parametrize("number", [-1, 2])
def test_unknown_points_are_refused(number: int) -> None:
    record = {"front": find_front({"best_iteration": 0, "iterations": [entry(0, 0.5, 0.5), entry(1, 0.1, 0.1)]})}
    assert find_point(record, 1, "run") == (1, 1.0)
    with pytest.raises(UsageError, match="points 0 to 1"):
        find_point(record, number, "run")
    for nothing in (None, {}):
        with pytest.raises(UsageError, match="has no points"):
            find_point(nothing, 0, "run")


# -- the choice under limits


def test_another_strength_is_chosen_only_where_it_keeps_limits_that_the_iteration_breaks() -> None:
    rows = [{**entry(1, asr, 0.1), "strength": s} for s, asr in ((0.0, 0.6), (0.5, 0.4), (1.0, 0.2), (1.25, 0.04))]
    assert objective(max_asr=0.05).choose_strength(entry(1, 0.2, 0.1), rows) == 1.25
    assert objective(max_asr=0.3).choose_strength(entry(1, 0.2, 0.1), rows) == 1.0
    assert objective().choose_strength(entry(1, 0.2, 0.1), rows) == 1.0
    assert objective(max_asr=0.01).choose_strength(entry(1, 0.2, 0.1), rows) == 1.0  # none keeps it
    assert (
        objective(max_orr=0.05).choose_strength(entry(1, 0.2, 0.1), [{**rows[0], "orr": 0.0}]) == 1.0
    )  # that is no edit


def test_limits_are_told_in_words() -> None:
    strict = objective(max_asr=0.05, max_orr=0.02, min_kept=0.99, max_kl=0.01)
    words = strict.violations(entry(1, 0.1, 0.03, 0.02, kept=0.9))
    assert [re.findall(r"--[a-z-]+", one)[0] for one in words] == ["--max-asr", "--max-orr", "--min-kept", "--max-kl"]
    assert "10.0%" in words[0]
    assert "5.0%" in words[0]
    assert objective(max_asr=0.1).violations(entry(1, 0.1, 0.9)) == []
    assert strict.violations(entry(0, 0.0, 0.0, 9.0, kept=0.0)) == []  # what the run began with harms nothing


def test_a_limit_is_missed_on_test_prompts_only_beyond_its_interval() -> None:
    strict = objective(max_asr=0.05, min_kept=0.99, max_kl=0.01)
    test = {"asr": 0.06, "asr_interval": [0.04, 0.09], "orr": 1.0, "orr_interval": [0.9, 1.0]}
    assert strict.missed(test, {}) == []
    (word,) = strict.missed({**test, "asr_interval": [0.051, 0.09]}, {})
    assert "--max-asr" in word
    harm = {"kept": 0.97, "kept_interval": [0.96, 0.98], "kl": 0.02, "kl_interval": [0.015, 0.03]}
    assert len(strict.missed(test, harm)) == 2
    assert strict.missed({**test, "asr": None, "asr_interval": None}, {}) == []


# -- the strength that a run chose


def small_edit(tmp_path: Path, strength: float) -> Edit:
    edit = Edit({}, {"model": "org/base"}).then("a", torch.ones(4), torch.ones(4), 1)
    edit = edit.then("a", torch.ones(4), torch.ones(4), 2)
    replace(edit, best=1, strength=strength).save(tmp_path)
    return Edit.load(tmp_path)


def test_the_chosen_strength_is_stored_and_used(tmp_path: Path) -> None:
    edit = small_edit(tmp_path, 0.5)
    assert (edit.best, edit.strength) == (1, 0.5)
    assert torch.equal(edit.chosen.factors["a"].V, 0.5 * torch.ones(4, 1))
    assert edit.at(1).strength == 1.0
    plan = make_plan(tmp_path)
    assert (plan.iteration, plan.strength) == (1, 0.5)
    assert torch.equal(plan.edit.chosen.factors["a"].V, edit.chosen.factors["a"].V)
    assert make_plan(tmp_path, iteration=1).strength == 1.0
    assert make_plan(tmp_path, strength=1.0).strength == 1.0
    record = {"best_iteration": 1, "best_strength": 0.5, "test": {"after": {"f1": 1.0}}}
    assert measured(replace(plan, record=record))
    assert not measured(replace(plan, record=record, strength=1.0))


def test_only_another_strength_is_written(tmp_path: Path) -> None:
    """An edit as fitted has the bytes that it always had."""
    from safetensors import safe_open

    for strength in (1.0, 0.5):
        small_edit(tmp_path, strength)
        with safe_open(tmp_path / "edit.safetensors", framework="pt") as file:
            note = json.loads(file.metadata()["llmva"])
        assert ("strength" in note) == (strength != 1.0)


@pytest.mark.parametrize("strength", [-1.0, "much", True, 1e999])
def test_a_broken_strength_is_refused(tmp_path: Path, strength: Any) -> None:
    from safetensors.torch import save_file

    note = {"format": "llmva-edit", "version": 1, "best": 1, "base": {}, "strength": strength}
    tensors = {"a.V": torch.ones(4, 1), "a.U": torch.ones(4, 1), "a.iteration": torch.ones(1, dtype=torch.int32)}
    save_file(tensors, tmp_path / "edit.safetensors", {"llmva": json.dumps(note)})
    with pytest.raises(LlmvaError, match="not a whole edit"):
        Edit.load(tmp_path)


# -- a whole run


@pytest.fixture(scope="module")
def run_folder(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose limits cannot be kept."""
    out = tmp_path_factory.mktemp("front") / "run"
    from llmva.cli.main import main

    words = [
        "align", str(taught_folder), "--out", str(out), "--iterations", "2", "--per-source", "32", "--passes", "2",
        "--max-new-tokens", "8", "--toxic", str(taught_folder / "toxic.txt"), "--benign",
        str(taught_folder / "benign.txt"), "--max-asr", "0", "--max-kl", "0", "--quiet",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert not caught.value.code
    return out


EASY: dict[str, Any] = {
    "iterations": 2,
    "per_source": 32,
    "passes": 1,
    "max_new_tokens": 8,
    "min_kept": 0.0,
    "max_kl": 9.0,
    "endings_tokens": 0,
}


@pytest.fixture(scope="module")
def easy_folder(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that chose an iteration, and so measured strengths."""
    out = tmp_path_factory.mktemp("front") / "easy"
    model, tokenizer = llmva.load_model(taught_folder)
    prompts = llmva.PromptSet.load([str(taught_folder / "toxic.txt")], [str(taught_folder / "benign.txt")])
    llmva.align(model, tokenizer, prompts, out=out, options=RunOptions(name=str(taught_folder)), **EASY)
    return out


def test_a_run_keeps_its_front(easy_folder: Path) -> None:
    record = json.loads((easy_folder / "run.json").read_text())
    front = record["front"]
    (chosen,) = [row for row in front if row["chosen"]]
    assert (chosen["iteration"], chosen["strength"]) == (record["best_iteration"], record["best_strength"])
    assert record["best_iteration"] > 0
    assert len(front) == len(record["iterations"]) + 4
    assert all(0 <= row["kept"] <= 1 and row["kl"] >= 0 for row in front)
    assert any(row["on_front"] for row in front)
    assert record["validation"]["n_toxic"] > 0
    half = next(row for row in front if row["strength"] == 0.5)
    model, tokenizer = llmva.load_model(record["base"]["model"])
    prompts = llmva.PromptSet.from_jsonl(easy_folder / "prompts.jsonl")
    with make_plan(easy_folder, point=half["point"]).edit.apply(model):
        decoder, judge = llmva.find_decoder(model), make_judge("phrases")
        seen = llmva.observe(chat_model(decoder, tokenizer), prompts.validation, judge, max_new_tokens=8)
    assert point_rates(seen.prompts, seen.labels)["asr"] == half["asr"]


def test_limits_that_cannot_be_kept_are_told(run_folder: Path, command: Command) -> None:
    record = json.loads((run_folder / "run.json").read_text())
    (sentence,) = [limit for limit in record["limits"] if limit.startswith("The limits could not be kept")]
    chosen = next(row for row in record["front"] if row["chosen"])
    assert f"point {chosen['point']} " in sentence
    assert re.search(r"--max-(asr|kl)", sentence)
    assert "--max-asr" in command("inspect", run_folder, "--json").out


def test_a_strength_that_was_chosen_is_what_is_measured_and_shipped(
    taught_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(Objective, "choose_strength", lambda *given: 0.5)
    model, tokenizer = llmva.load_model(taught_folder)
    prompts = llmva.PromptSet.load([str(taught_folder / "toxic.txt")], [str(taught_folder / "benign.txt")])
    options = RunOptions(name=str(taught_folder))
    result = llmva.align(model, tokenizer, prompts, out=tmp_path / "run", options=options, **EASY)
    assert result.record["best_strength"] == 0.5
    assert any("at strength 0.5" in limit for limit in result.record["limits"])
    stored = Edit.load(tmp_path / "run").chosen
    name, factors = next(iter(stored.factors.items()))
    assert torch.equal(factors.V, result.edit.factors[name].V)
    assert torch.equal(factors.V, 0.5 * result.every.at(result.record["best_iteration"]).factors[name].V)
    said = command("evaluate", taught_folder, "--edit", tmp_path / "run", "--max-new-tokens", 8, "--json")
    assert json.loads(said.out)["test"]["after"] == result.record["test"]["after"]
    assert make_plan(tmp_path / "run").strength == 0.5


def test_front_shows_and_draws_the_points(
    run_folder: Path, easy_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    for folder in (run_folder, easy_folder):
        said = command("front", folder, "--json")
        assert said.code == 0
        found = json.loads(said.out)
        assert found["front"] == json.loads((folder / "run.json").read_text())["front"]
        drawing = ET.parse(folder / "front.svg").getroot()
        marks = [node.get("class", "") for node in drawing.iter() if "mark" in node.get("class", "")]
        assert len(marks) == len(found["front"]) + 1 + 3  # one more around the chosen one; the legend
        assert [k for k, name in enumerate(marks) if "star" in name] == [2, len(marks) - 1]  # the legend, and on top
        words = [node.text for node in drawing.iter() if node.tag.endswith("text")]
        assert {"on the front", "another is better in all", "chosen"} <= set(words)
        assert not [node for node in drawing.iter() if node.tag.endswith("polyline")]  # nothing lies between points
        assert "http" not in re.sub(r'xmlns="[^"]*"', "", (folder / "front.svg").read_text())
        assert "chosen" in said.err
        assert "[" in said.err  # intervals
    assert "Points of the run" in (run_folder / "report.html").read_text()


def test_points_of_one_place_share_a_name() -> None:
    from llmva.report.run.front import front_panel

    row = {"iteration": 1, "strength": 1, "on_front": True, "chosen": False}
    places = [(0.5, 0.4), (0.0, 0.0), (0.0, 0.001), (0.02, 0.0)]
    rows = [{**row, "point": k, "asr": asr, "orr": orr} for k, (asr, orr) in enumerate(places)]
    (panel,) = front_panel({"front": rows})
    named = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="named"[^>]*>([^<]*)<', str(panel))
    assert sorted(text for *_, text in named) == ["0", "1, 2", "3"]
    spots = [(float(x), float(y)) for x, y, _ in named]
    assert all(abs(a[0] - b[0]) > 20 or abs(a[1] - b[1]) > 12 for a in spots for b in spots if a != b)


def test_any_point_ships(easy_folder: Path, taught_folder: Path, command: Command, tmp_path: Path) -> None:
    front = json.loads((easy_folder / "run.json").read_text())["front"]
    row = next(row for row in front if row["strength"] == 1.25)
    adapter = tmp_path / "adapter"
    words = ("export", easy_folder, "--as", "lora", "--out", adapter, "--point", row["point"], "--json")
    found = json.loads(command(*words).out)
    assert (found["iteration"], found["strength"]) == (row["iteration"], 1.25)
    pushed = json.loads(
        command("push", easy_folder, "--repo", "a/b", "--dry-run", "--json", "--point", row["point"]).out
    )
    assert "at strength 1.25" in pushed["card"]
    said = command(
        "evaluate", taught_folder, "--edit", easy_folder, "--point", row["point"], "--max-new-tokens", 8, "--json",
        "--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt",
    )  # fmt: skip
    assert said.code == 0, said.err
    same = command(
        "evaluate", taught_folder, "--edit", easy_folder, "--iteration", row["iteration"], "--strength", "1.25",
        "--max-new-tokens", 8, "--json", "--toxic", taught_folder / "toxic.txt", "--benign",
        taught_folder / "benign.txt",
    )  # fmt: skip
    assert json.loads(said.out)["test"] == json.loads(same.out)["test"]


BAD: dict[str, tuple[str, ...]] = {
    "unknown": ("export", "RUN", "--as", "diff", "--point", "99"),
    "negative": ("export", "RUN", "--as", "diff", "--point", "-1"),
    "no number": ("export", "RUN", "--as", "diff", "--point", "best"),
    "untouched": ("export", "RUN", "--as", "diff", "--point", "0"),
    "with iteration": ("export", "RUN", "--as", "diff", "--point", "1", "--iteration", "1"),
    "with strength": ("export", "RUN", "--as", "diff", "--point", "1", "--strength", "1"),
    "evaluate both": ("evaluate", "MODEL", "--edit", "RUN", "--point", "1", "--strength", "1"),
    "evaluate unknown": ("evaluate", "MODEL", "--edit", "RUN", "--point", "99"),
    "chat unknown": ("chat", "MODEL", "--prompt", "hello", "--edit", "RUN", "--point", "99"),
    "evaluate without an edit": ("evaluate", "MODEL", "--point", "1"),
    "front of nothing": ("front", "NOWHERE"),
    "push": ("push", "RUN", "--repo", "a/b", "--dry-run", "--point", "99"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, command: Command, easy_folder: Path, taught_folder: Path) -> None:
    places = {"RUN": str(easy_folder), "MODEL": str(taught_folder), "NOWHERE": str(easy_folder / "nowhere")}
    said = command(*(places.get(word, word) for word in BAD[case]))
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")


def test_a_run_without_points_says_so(command: Command, easy_folder: Path, tmp_path: Path) -> None:
    record = json.loads((easy_folder / "run.json").read_text())
    del record["front"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "edit.safetensors").write_bytes((easy_folder / "edit.safetensors").read_bytes())
    for words in (("front", tmp_path), ("export", tmp_path, "--as", "diff", "--point", "1")):
        said = command(*words)
        assert said.code == 2
        assert "has no points" in said.err


def test_the_picture_takes_whatever_a_record_holds() -> None:
    from llmva.report.run.front import front_panel, front_table

    for hostile in (None, 3, [None], [{"point": "x"}], [{"point": 0, "strength": float("nan"), "asr": 0, "orr": 0}]):
        assert front_panel({"front": hostile}) == []
        Console(file=io.StringIO()).print(front_table({"front": hostile, "validation": "none"}))
    one = [{"point": 0, "strength": 1.0, "asr": 0.0, "orr": 0.0}]
    assert len(front_panel({"front": one})) == 1


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What a person types on a terminal."""
    text = io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), "utf-8")
    monkeypatch.setattr(text, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", text)


def test_a_picked_point_is_tried_and_shipped(
    easy_folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = json.loads((easy_folder / "run.json").read_text())["front"]
    point = next(row for row in front if row["strength"] == 1.25)["point"]
    picked, whole = tmp_path / "picked", tmp_path / "whole"
    typed(
        monkeypatch, "99", "best", "0", str(point), "fly", str(point), "e", "lora", str(picked), str(point), "chat",
        "open the gate", "", str(point), "export", "diff", "",
    )  # fmt: skip
    said = command("front", easy_folder, "--pick")
    assert said.code == 0, said.err
    told = [
        "There is no point 99", "There is no point best", "the untouched model", "fly is none of these",
        f"Wrote {picked}",
        "error: --as diff writes nothing",
    ]  # fmt: skip
    places = [said.err.index(words) for words in told]
    assert places == sorted(places)
    assert "original: " in said.out
    assert "edited: " in said.out
    assert command("export", easy_folder, "--as", "lora", "--out", whole, "--point", point).code == 0
    name = "adapter_model.safetensors"
    assert (picked / name).read_bytes() == (whole / name).read_bytes()


def test_a_picked_point_is_pushed_for_oneself_unless_told(
    easy_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[Any, ...]] = []

    def push(plan: Any, repo: str, **how: Any) -> dict[str, Any]:
        pushed.append((plan.strength, repo, how["private"]))
        return {"files": [], "warnings": []}

    monkeypatch.setattr("llmva.export.push.push", push)
    front = json.loads((easy_folder / "run.json").read_text())["front"]
    point = str(next(row for row in front if row["strength"] == 1.25)["point"])
    typed(monkeypatch, point, "push", "a/b", "", point, "push", "a/c", "everyone")
    assert command("front", easy_folder, "--pick").code == 0
    assert pushed == [(1.25, "a/b", True), (1.25, "a/c", False)]


def test_nothing_is_asked_where_nobody_answers(easy_folder: Path, command: Command) -> None:
    for words in ((), ("--json",)):
        said = command("front", easy_folder, "--pick", *words)
        assert said.code == 2
        assert "give --point K" in said.err
