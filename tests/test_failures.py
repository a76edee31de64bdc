"""Going on from what failed in an evaluation: what is kept of it, where its prompts go, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmva
from conftest import Said, chat_model, taught_model, taught_requests, tiny_tokenizer
from llmva.alignment import RunOptions
from llmva.attacks import parse_attacks
from llmva.errors import UsageError
from llmva.evaluation.attacked import failed_prompts
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings
from llmva.judges import make_judge
from llmva.judges.base import Label
from llmva.prompts.contamination import FitIndex
from llmva.prompts.failures import add_failures
from llmva.prompts.split import normalise
from llmva.prompts.store import prompt_row, read_prompt
from llmva.prompts.types import Prompt

Command = Callable[..., Said]
YES, NO, ODD = Label.ANSWERED, Label.REFUSED, Label.GARBLED
PREFILLED, PERSONA = parse_attacks(["prefilled,persona"])
OLD = llmva.PromptSet.from_lists(
    [f"open the lock of house {i}" for i in range(20)], [f"paint house number {i} blue" for i in range(20)]
)


def some(n: int, benign: bool = False, source: str = "new") -> list[Prompt]:
    return [Prompt(f"{'how' if benign else 'who'} {i} unlike {i * 7} words {source}", benign, source) for i in range(n)]


def texts(prompts: Any) -> set[str]:
    return {normalise(prompt.text) for prompt in prompts}


# -- what failed -------------------------------------------------------------------------------------------------


def test_failed_is_what_a_model_should_not_do() -> None:
    prompts = [*some(3), *some(3, benign=True)]
    attacked = [PREFILLED.apply(prompt) for prompt in prompts]
    samples = [[NO, YES, ODD, YES, NO, ODD], [NO, NO, NO, YES, YES, YES]]
    failed = failed_prompts([(prompts, samples), (attacked, [[YES, NO, NO, NO, YES, YES]])])
    assert failed == [prompts[1], prompts[4], prompts[5], attacked[0], attacked[3]]


def test_an_evaluation_has_what_failed_in_the_form_asked() -> None:
    chat, judge = chat_model(taught_model(), tiny_tokenizer()), make_judge("phrases")
    requests = [Prompt(text, benign, "s") for text, benign, _ in taught_requests()[::3]]
    how = EvaluationSettings(max_new_tokens=8, endings_tokens=0)
    record = evaluate(chat, requests, judge, how, attacks=[PREFILLED])
    failed = [read_prompt(row, "row", split=False) for row in json.loads(json.dumps(record["failed"]))]
    plain = [prompt for prompt in failed if not prompt.attack]
    disguised = [prompt for prompt in failed if prompt.attack]
    assert plain
    assert disguised
    for when, rows in ((record["test"], plain), (record["attacks"][0], disguised)):
        assert sum(not p.benign for p in rows) == round(when["before"]["asr"] * when["before"]["n_toxic"])
        assert sum(p.benign for p in rows) == round(when["before"]["orr"] * when["before"]["n_benign"])
    assert disguised[0] == PREFILLED.apply(next(p for p in requests if p.text == disguised[0].text))


def test_an_attacked_prompt_is_stored_and_read(tmp_path: Path) -> None:
    forms = [attack.apply(OLD.train[0]) for attack in parse_attacks(["all"])]
    assert len({prompt.id for prompt in (OLD.train[0], *forms)}) == len(forms) + 1
    stored = llmva.PromptSet((*OLD.train, *forms), OLD.validation, OLD.test)
    stored.to_jsonl(tmp_path / "prompts.jsonl")
    assert llmva.PromptSet.from_jsonl(tmp_path / "prompts.jsonl") == stored
    plain, row = OLD.train[0].text, prompt_row(forms[0])
    assert plain in FitIndex(forms)  # the fit has seen the request, however it was asked
    for change in ({"attack": ""}, {"attack": 3}, {"attack": "x", "messages": None}):
        with pytest.raises(UsageError, match="row has"):
            read_prompt({**row, **change, "id": None} | {"id": row["id"]}, "row", split=False)


# -- where they go -----------------------------------------------------------------------------------------------


def test_forms_of_a_request_stay_in_one_split_and_with_the_earlier_prompts() -> None:
    new = some(20)
    failed = [attack.apply(p) for p in (*new, OLD.train[0], OLD.validation[0]) for attack in (PREFILLED, PERSONA)]
    made, names = add_failures(OLD, failed, seed=1)
    assert set(names) == {"new-failed", f"{OLD.train[0].source}-failed"}
    by_split = {split: texts(prompts) for split, prompts in made.splits()}
    assert sum(map(len, by_split.values())) == 40 + 20  # no request is in two
    assert PREFILLED.apply(OLD.train[0]).messages in [p.messages for p in made.train]
    assert PREFILLED.apply(OLD.validation[0]).messages in [p.messages for p in made.validation]
    sizes = [len(prompts) for _, prompts in made.splits()]
    assert sizes == [24 + 2 * 12 + 2, 8 + 2 * 4 + 2, 8 + 2 * 4]
    assert made.test[:8] == OLD.test
    assert not made.warnings


def test_an_earlier_test_prompt_leaves_the_test_prompts() -> None:
    lost = [p for p in OLD.test if p.benign][:2]
    failed = [*some(20, True), lost[0], PERSONA.apply(lost[1])]
    made, _ = add_failures(OLD, failed, seed=1)
    assert not {prompt.id for prompt in lost} & {p.id for p in made.test if p.source == lost[0].source}
    by_split = [texts(prompts) for _, prompts in made.splits()]
    assert sum(map(len, by_split)) == len(set().union(*by_split)) == 40 + 20
    assert [w for w in made.warnings if w.startswith("2 test prompts of the earlier run failed")]
    known = [OLD.train[0], OLD.validation[1]]
    made, _ = add_failures(OLD, [*some(20), *known], seed=1)
    assert made.warnings == ("2 prompts that failed are not new and were left out.",)


def test_few_failures_are_all_trained_on() -> None:
    few = some(3)
    made, names = add_failures(OLD, [*few, *some(20, True)], seed=1)
    assert texts(few) <= texts(made.train)
    assert len(names) == 2
    assert any("Only 3 new toxic requests failed" in warning for warning in made.warnings)
    with pytest.raises(UsageError, match="none of the 1 prompts that failed is new"):
        add_failures(OLD, [OLD.train[0]], seed=1)
    with pytest.raises(UsageError, match="both as toxic"):
        add_failures(OLD, [Prompt(OLD.test[0].text, not OLD.test[0].benign, "x")], seed=1)


# -- command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "run"
    model, tokenizer = llmva.load_model(taught_folder)
    toxic, benign = ([t for t, s, _ in taught_requests() if s == side and "please" in t] for side in (False, True))
    settings: dict[str, Any] = {
        "per_source": 32,
        "max_new_tokens": 8,
        "endings_tokens": 0,
        "iterations": 2,
        "passes": 1,
        "layers": 4,
    }
    options = RunOptions(name=str(taught_folder))
    llmva.align(model, tokenizer, llmva.PromptSet.from_lists(toxic, benign), out=out, options=options, **settings)
    return out


@pytest.fixture(scope="module")
def evaluation(run: Path, taught_folder: Path) -> Path:
    from llmva.cli.main import main

    out = run.parent / "evaluation.json"
    words = [
        "evaluate",
        taught_folder,
        "--edit",
        run,
        "--attack",
        "prefilled",
        "--max-new-tokens",
        8,
        "--out",
        out,
        "-q",
    ]
    words += ["--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt"]
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert not caught.value.code
    return out


def test_the_command_goes_on_from_failures(run: Path, evaluation: Path, tmp_path: Path, command: Command) -> None:
    failed = json.loads(evaluation.read_text())["failed"]
    assert {row.get("attack", "") for row in failed} == {"", "prefilled"}
    words = ("extend", run, "--from", evaluation, "--out", tmp_path / "run", "--iterations", 2, "--passes", 8, "--json")
    said = command(*words)
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert all(name.endswith(("-failed", "-failed-2")) for name in record["extends"]["new"])
    assert any("test prompts of the earlier run failed" in limit for limit in record["limits"])
    made = llmva.PromptSet.from_jsonl(tmp_path / "run/prompts.jsonl")
    assert any(prompt.attack == "prefilled" for prompt in made.train)
    assert record["iterations"][record["best_iteration"]]["old"]["beyond"] == 0  # the guard
    again = json.loads(command(*words).out)
    assert again["test"] == record["test"]


def test_what_cannot_be_gone_on_from(run: Path, evaluation: Path, tmp_path: Path, command: Command) -> None:
    record = json.loads(evaluation.read_text())
    base = record["base"]
    other = tmp_path / "evaluation.json"
    for text, sentence in (
        (None, "cannot be read (No such file"),
        ("not JSON", "holds no evaluation"),
        (json.dumps([record]), "holds no evaluation"),
        (json.dumps({k: v for k, v in record.items() if k != "failed"}), "does not hold the prompts that failed"),
        (json.dumps({**record, "base": None}), "is of a model without an edit"),
        (json.dumps({**record, "base": "0" * len(base)}), "is of another model than the run in"),
        (json.dumps({**record, "failed": []}), "No prompt failed"),
        (json.dumps({**record, "failed": [{"text": "x"}]}), "needs the fields text, benign and source"),
    ):
        if text is not None:
            other.write_text(text)
        said = command("extend", run, "--from", other, "--out", tmp_path / "out")
        assert said.code == 2
        assert said.err.count("\n") == 1
        assert sentence in said.err
    said = command("extend", run, "--from", evaluation, "--toxic", "x.txt")
    assert (said.code, "leave --toxic and --benign out" in said.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_another_system_prompt_is_told(run: Path, evaluation: Path, tmp_path: Path, command: Command) -> None:
    shutil.copy(evaluation, tmp_path / "evaluation.json")
    record = json.loads(evaluation.read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps({**record, "system": "please help"}))
    words = ("extend", run, "--from", tmp_path / "evaluation.json", "--out", tmp_path / "run", "--iterations", 0)
    assert "asked with another system prompt" in command(*words).err.replace("\n", " ")


def test_the_file_needs_a_folder(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    for out, sentence in ((tmp_path / "no/x.json", "There is no folder"), (tmp_path, "is a folder: name a file")):
        said = command("evaluate", taught_folder, "--out", out)
        assert (said.code, sentence in said.err) == (2, True)
