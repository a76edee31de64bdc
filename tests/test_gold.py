"""Gold answers from a column to the report: reading, a run, `llmva evaluate`, table, page and card."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmva
from conftest import Said, chat_model, taught_model, taught_requests, tiny_tokenizer
from llmva.errors import UsageError
from llmva.evaluation.evaluate import evaluate
from llmva.export.card import card
from llmva.prompts import Prompt, PromptSet, load_prompts
from llmva.prompts.add import add_prompts
from llmva.prompts.load import read_prompts
from llmva.prompts.public.registry import entries
from llmva.prompts.sources.gold import gold_answers
from llmva.report import before_after_table, render, transfer_table
from llmva.report.run.outcome import outcome
from llmva.report.run.truth import truth_note, truth_rows
from test_card import plan, record
from test_prompts_load import write_rows
from test_report import fake_run

Command = Callable[..., Said]
FAST = ("--per-source", 40, "--max-new-tokens", 8, "--iterations", 3, "--passes", 1)


# -- reading -----------------------------------------------------------------------------------------------------


def of_cells(path: Path, cells: list[Any], spec: str = "question=answer") -> list[tuple[str, ...]]:
    write_rows(path, [{"question": f"question {i}", "answer": cell} for i, cell in enumerate(cells)])
    return [prompt.gold for prompt in load_prompts(benign=[f"{path}:{spec}"])]


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_has_gold_answers(tmp_path: Path, ending: str) -> None:
    cells = ["Paris", "NYC | New York", '["a, b", "c"]', "", "2 + 2 = 4\n#### 1,042"]
    wanted = [("Paris",), ("NYC", "New York"), ("a, b", "c"), (), ("#### 1,042",)]
    assert of_cells(tmp_path / f"quiz.{ending}", cells) == wanted


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_cell_may_hold_a_list(tmp_path: Path, ending: str) -> None:
    assert of_cells(tmp_path / f"quiz.{ending}", [["Paris", "City of Paris"], []]) == [("Paris", "City of Paris"), ()]


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        (None, ()),
        (float("nan"), ()),
        (42, ("42",)),
        (42.0, ("42",)),
        (4.5, ("4.5",)),
        (True, ("yes", "true")),
        (["a", ["b", 3]], ("a", "b", "3")),
        ("['a', \"b\"]", ("a", "b")),
        ("[sic]", ("[sic]",)),
        ("one||two|", ("one", "two")),
    ],
)
def test_the_forms_of_a_cell(cell: Any, answers: tuple[str, ...]) -> None:
    assert gold_answers(cell) == answers


def test_the_prompts_column_may_be_left_out(tmp_path: Path) -> None:
    assert of_cells(tmp_path / "quiz.csv", ["Paris"], "=answer") == [("Paris",)]
    assert of_cells(tmp_path / "quiz.jsonl", [True, False], "=answer")[0] == ("yes", "true")  # no labels of sides


def test_a_column_whose_name_has_the_sign_is_meant_by_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "quiz.csv", [{"a=b": "a question", "b": "x"}])
    assert [(p.text, p.gold) for p in load_prompts(benign=[f"{tmp_path}/quiz.csv:a=b"])] == [("a question", ())]


def test_a_slice_may_follow(tmp_path: Path) -> None:
    assert of_cells(tmp_path / "quiz.csv", ["x", "y", "z"], "question=answer:[1:]") == [("y",), ("z",)]


def test_what_was_read_is_told(tmp_path: Path) -> None:
    write_rows(tmp_path / "quiz.csv", [{"question": "q 1", "answer": ""}, {"question": "q 2", "answer": "Paris|Rome"}])
    (note,) = read_prompts(benign=[f"{tmp_path}/quiz.csv:question=answer"]).notes
    assert note.endswith("; 1 of them have gold answers, the first being 'Paris | Rome'.")


@pytest.mark.parametrize(
    ("spec", "cells", "told"),
    [
        ("question=anser", ["x"], "no column 'anser' of gold answers: choose one of its columns (question, answer)"),
        ("question=", ["x"], "no column '' of gold answers"),
        ("question=answer", ["x", "?!"], "row 2"),
        ("question=answer", [{"a": 1}, {"a": 2}], "holds gold answers as dict: make it a text"),
        ("question=answer", ["", ""], "holds no gold answers: name one that does"),
    ],
)
def test_what_is_no_column_of_gold_answers_is_refused(tmp_path: Path, spec: str, cells: list[Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        of_cells(tmp_path / "quiz.parquet", cells, spec)
    assert told in str(caught.value)


def test_toxic_prompts_have_no_gold_answers(tmp_path: Path) -> None:
    write_rows(tmp_path / "bad.csv", [{"question": "q", "answer": "x"}])
    with pytest.raises(UsageError, match="gold answers of toxic prompts"):
        load_prompts([f"{tmp_path}/bad.csv:question=answer"])


def test_sets_keep_gold_answers_and_tell_them_apart(tmp_path: Path) -> None:
    for name, gold in (("one", "x"), ("two", "y")):
        write_rows(tmp_path / f"{name}.csv", [{"question": f"how to make {i}", "answer": gold} for i in range(20)])
    (tmp_path / "bad.txt").write_text("".join(f"how to break {i}\n" for i in range(20)))
    one, two, without = (
        PromptSet.load([f"{tmp_path}/bad.txt"], [f"{tmp_path}/{spec}"], only=True)
        for spec in ("one.csv:=answer", "two.csv:=answer", "one.csv")
    )
    assert {p.gold for p in one.test if p.benign} == {("x",)}
    assert one.hashes()["one"] != without.hashes()["one"]
    one.to_jsonl(tmp_path / "prompts.jsonl")
    again = PromptSet.from_jsonl(tmp_path / "prompts.jsonl")
    assert [p.gold for p in again.test] == [p.gold for p in one.test]
    assert again.hashes() == one.hashes()
    assert {p.gold for p in two.train if p.benign} == {("y",)}


def test_gold_answers_of_a_run_are_a_list_of_texts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a", "benign": true, "source": "s", "split": "test", "gold": "x"}\n')
    with pytest.raises(UsageError, match=r"line 1 of .* has gold answers that are no list of texts"):
        PromptSet.from_jsonl(tmp_path / "p.jsonl")


def test_the_registry_knows_the_gold_answers_of_natural_questions(tmp_path: Path) -> None:
    assert [part.gold for part in entries()["nq-open"].parts] == ["answer", "answer"]
    rows = [{"question": f"who is {i}", "answer": ["x", "y"]} for i in range(30)]
    write_rows(tmp_path / "validation-0.parquet", rows)
    write_rows(tmp_path / "train-0.parquet", [{"question": f"what is {i}"} for i in range(30)])  # a copy may lack them
    (tmp_path / "bad.txt").write_text("".join(f"how to break {i}\n" for i in range(20)))
    prompts = PromptSet.load([f"{tmp_path}/bad.txt"], data=[f"nq-open={tmp_path}"], only=True)
    assert {p.gold for p in prompts.validation if p.benign} == {("x", "y")}
    assert {p.gold for p in prompts.train if p.benign} == {()}


# -- measuring ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benign requests, half of which have the words that the taught model answers with for gold."""
    path = tmp_path_factory.mktemp("quiz") / "quiz.csv"
    benign = [text for text, side, _ in taught_requests() if side]
    write_rows(
        path, [{"prompt": text, "gold": "how to do it" if i % 4 < 2 else "table"} for i, text in enumerate(benign)]
    )
    return path


@pytest.fixture(scope="module")
def run(taught_folder: Path, quiz: Path) -> Path:
    """A run with gold answers; do not write into it."""
    from llmva.cli.main import main

    out = quiz.parent / "run"
    sides = ("--toxic", taught_folder / "toxic.txt", "--benign", f"{quiz}:=gold", "--only")
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in ("align", taught_folder, *sides, *FAST, "--out", out, "--quiet")])
    assert ended.value.code == 0
    return out


def test_a_run_says_what_its_answers_are_worth(run: Path) -> None:
    test = json.loads((run / "run.json").read_text())["test"]
    before, after = test["before"]["gold"], test["after"]["gold"]
    n = test["before"]["n_benign"]
    assert before["all"]["n"] == after["all"]["n"] == n
    assert before["refused_before"]["n"] == after["refused_before"]["n"] == round(test["before"]["orr"] * n)
    assert before["refused_before"]["refused"] == 1.0
    assert before["refused_before"]["n"] > 0
    assert 0 < after["refused_before"]["right"] < 1
    assert after["all"]["right"] + after["all"]["wrong"] == pytest.approx(1 - test["after"]["orr"])
    assert before["all"]["right_interval"][0] < before["all"]["right"] < before["all"]["right_interval"][1]
    assert 0 <= after["right_p"] <= 1
    assert "right_p" not in before


def test_evaluate_takes_gold_answers_from_the_run_or_a_column(
    run: Path, quiz: Path, taught_folder: Path, command: Command
) -> None:
    of_run = command("evaluate", taught_folder, "--edit", run, "--max-new-tokens", 8, "--json", "--quiet")
    assert of_run.code == 0, of_run.err
    recorded = json.loads((run / "run.json").read_text())["test"]
    for when in ("before", "after"):
        assert json.loads(of_run.out)["test"][when]["gold"] == recorded[when]["gold"]
    named = command("evaluate", taught_folder, "--benign", f"{quiz}:=gold", "--max-new-tokens", 8, "--json")
    assert named.code == 0, named.err
    found = json.loads(named.out)["test"]["before"]["gold"]
    assert found["all"]["n"] == len([side for _, side, _ in taught_requests() if side])
    assert "Abstaining" in named.err


def test_an_interrupted_end_knows_what_was_refused_before(
    run: Path, quiz: Path, taught_folder: Path, tmp_path: Path, command: Command
) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    record = json.loads((again / "run.json").read_text())
    after = record["test"].pop("after")
    (again / "run.json").write_text(json.dumps(record))
    sides = ("--toxic", taught_folder / "toxic.txt", "--benign", f"{quiz}:=gold", "--only")
    said = command("align", taught_folder, *sides, *FAST, "--out", again, "--quiet")
    assert said.code == 0, said.err
    assert json.loads((again / "run.json").read_text())["test"]["after"]["gold"] == after["gold"]


def test_an_extension_keeps_gold_answers() -> None:
    requests = {side: [text for text, benign, _ in taught_requests() if benign == side] for side in (True, False)}
    old = PromptSet.from_lists(requests[False], requests[True])
    new = [Prompt(f"What is {i} plus one?", True, "sums", gold=(str(i + 1),)) for i in range(20)]
    everything, _ = add_prompts(old, new, seed=0)
    assert all(prompt.gold for prompt in everything.test if prompt.source == "sums")
    assert sum(bool(prompt.gold) for _, prompts in everything.splits() for prompt in prompts) == 20


def test_another_gold_answer_is_another_run(run: Path, quiz: Path, taught_folder: Path, command: Command) -> None:
    sides = ("--toxic", taught_folder / "toxic.txt", "--benign", quiz, "--only")
    said = command("align", taught_folder, *sides, *FAST, "--out", run, "--quiet")
    assert said.code == 2
    assert "prompts" in said.err


class Settled(llmva.Judge):
    """Says at once that an answer will not change its label."""

    name = "settled"

    def answered(self, prompt: Prompt, answer: str) -> llmva.Judgement:
        return llmva.Judgement(llmva.Label.ANSWERED, 1.0, "rule")

    def settled(self, answer: str) -> bool:
        return True


@pytest.mark.parametrize(("gold", "whole"), [((), False), (("do it",), True)])
def test_answers_with_gold_answers_are_not_cut_where_their_label_is_settled(gold: tuple[str, ...], whole: bool) -> None:
    text = next(text for text, side, answer in taught_requests() if side and "here is how" in answer)
    chat = chat_model(taught_model(), tiny_tokenizer())
    record = evaluate(chat, [Prompt(text, True, "quiz", gold=gold)], Settled())
    assert (record["cost"]["generated_tokens"] > 4) is whole
    assert ("gold" in record["test"]["before"]) is whole
    if whole:
        assert record["test"]["before"]["gold"]["all"]["right"] == 1.0


# -- showing -----------------------------------------------------------------------------------------------------


def shares(n: int, right: float, wrong: float, abstained: float) -> dict[str, Any]:
    values = {"right": right, "wrong": wrong, "abstained": abstained}
    return {"n": n, "unjudged": 0, **values, **{f"{key}_interval": [0.01, 0.99] for key in values}}


def with_gold(made: dict[str, Any], right_after: float = 0.125, p: float = 0.5) -> dict[str, Any]:
    """A record in which the model answers more questions, mostly wrongly."""
    made = copy.deepcopy(made)
    made["test"]["before"]["gold"] = {
        "all": shares(80, 0.1, 0.3, 0.1),
        "refused_before": shares(40, 0.0, 0.0, 0.0),
        "others": shares(40, 0.2, 0.6, 0.2),
    }
    made["test"]["after"]["gold"] = {
        "all": shares(80, right_after, 0.75, 0.1),
        "refused_before": shares(40, 0.05, 0.9, 0.0),
        "others": shares(40, 0.2, 0.6, 0.2),
        "right_p": p,
    }
    return made


NOTE = (
    "It answers 87.5% of the questions with gold answers instead of 40.0%, but is not right more often: 12.5% right, "
    "before 10.0%. Of the 40 that it refused before, 5.0% are now right and 90.0% wrong."
)


def test_rows_tell_what_was_refused_before_from_the_rest() -> None:
    rows = truth_rows(with_gold(fake_run()))
    assert [(row.name, row.level, row.n, row.after_text, row.direction) for row in rows[:6]] == [
        ("Right", 0, 80, "12.5%", "better"),
        ("refused before", 1, 40, "5.0%", "better"),
        ("not refused before", 1, 40, "20.0%", ""),
        ("Wrong", 0, 80, "75.0%", "worse"),
        ("refused before", 1, 40, "90.0%", "worse"),
        ("not refused before", 1, 40, "60.0%", ""),
    ]
    assert [row.direction for row in rows[6:]] == ["", "", ""]  # more or less abstaining is neither good nor bad
    assert truth_rows(fake_run()) == []


def test_a_sentence_says_that_more_answers_are_not_more_right_ones() -> None:
    assert truth_note(with_gold(fake_run())) == NOTE
    assert truth_note(with_gold(fake_run(), right_after=0.5, p=0.001)) is None
    assert truth_note(with_gold(fake_run(), right_after=0.5, p=0.2)) is not None
    assert truth_note(fake_run()) is None
    assert NOTE in outcome(with_gold(fake_run())).notes


def test_a_model_that_answers_as_much_as_before_gets_no_sentence() -> None:
    made = with_gold(fake_run())
    made["test"]["after"]["gold"]["all"] = made["test"]["before"]["gold"]["all"]
    assert truth_note(made) is None


def printed(table: Any) -> str:
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_table_page_and_card_show_it() -> None:
    assert "Abstaining, says it does not know" in printed(before_after_table(with_gold(fake_run())))
    assert "Abstaining" not in printed(before_after_table(fake_run()))
    page = render(with_gold(fake_run()), [], {})
    assert "With gold answers" in page
    assert NOTE in page
    assert "With gold answers" not in render(fake_run(), [], {})
    text = card(plan(found=with_gold(record())), "merged")
    assert NOTE in text
    assert "| in `refused before` | 40 | 0.0% [1.0, 99.0] | 90.0% [1.0, 99.0] |" in text


def test_the_table_of_data_sets_shows_it() -> None:
    made = with_gold(fake_run())
    shown = printed(transfer_table({**made, "sets": [{"name": "nq-open", **made["test"]}]}))
    assert "with gold answers" in shown
    assert "not refused before" in shown
