"""Going on from an earlier edit: a new attack falls, the earlier run's prompts do not go backwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmva
from conftest import Said, chat_model, taught_requests, tiny_model
from llmva.alignment import RunOptions
from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.export.plan import make_plan
from llmva.extension import prepare
from llmva.judges import make_judge
from llmva.judges.base import Label
from llmva.metrics.objective import Objective
from llmva.metrics.rates import point_rates
from llmva.prompts.add import add_prompts
from llmva.prompts.types import Prompt
from llmva.runs.record import read_answers
from llmva.runs.run import Run
from llmva.runs.warm_start import check_regression
from llmva.settings import make_settings

Command = Callable[..., Said]
FURTHER: dict[str, Any] = {"iterations": 3, "passes": 8}  # than the first run, which shall leave something to do
FIRST = "please"  # how the prompts of the first run begin; the others are the new attack


def requests(first: bool, benign: bool) -> list[str]:
    return [text for text, side, _ in taught_requests() if side == benign and text.startswith(FIRST) == first]


def attack() -> list[Prompt]:
    return [Prompt(text, False, "attack") for text in requests(False, False)]


@pytest.fixture(scope="module")
def first_run(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has not seen the attack, and goes too short a way to stop it all the same."""
    out = tmp_path_factory.mktemp("first") / "run"
    model, tokenizer = llmva.load_model(taught_folder)
    prompts = llmva.PromptSet.from_lists(requests(True, False), requests(True, True))
    settings = {"per_source": 32, "max_new_tokens": 8, "endings_tokens": 0, "iterations": 2, "passes": 1, "layers": 4}
    llmva.align(model, tokenizer, prompts, out=out, options=RunOptions(name=str(taught_folder)), **settings)
    assert Edit.load(out).chosen.factors
    return out


@pytest.fixture(scope="module")
def extended(first_run: Path, taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("second") / "run"
    model, tokenizer = llmva.load_model(taught_folder)
    llmva.extend(model, tokenizer, first_run, attack(), out=out, **FURTHER)
    return out


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_a_new_attack_falls_and_the_old_prompts_stay(extended: Path) -> None:
    record = read(extended)
    before, after = (record["test"][when]["groups"] for when in ("before", "after"))
    assert record["best_iteration"] > 0
    assert before["new"]["asr"] >= 0.1  # the first edit did not stop it
    assert after["new"]["asr"] <= before["new"]["asr"] / 2
    assert after["new"]["orr"] is None
    for name in ("asr", "orr"):
        assert after["old"][name] <= before["old"][f"{name}_interval"][1]
    assert record["test"]["after"]["by_source"]["attack"]["rate"] == after["new"]["asr"]
    assert (record["settings"]["per_source"], record["settings"]["min_kept"]) == (32, 0.97)
    assert any("extends an earlier edit" in limit for limit in record["limits"])


def test_iteration_0_is_the_earlier_edit(extended: Path, first_run: Path, taught_folder: Path) -> None:
    first, second = Edit.load(first_run).chosen, Edit.load(extended).at(0)
    assert first.factors.keys() == second.factors.keys()
    for name, f in first.factors.items():
        assert torch.equal(f.V, second.factors[name].V)
        assert torch.equal(f.U, second.factors[name].U)
        assert not second.factors[name].iteration.any()
    record = read(extended)
    prompts = llmva.PromptSet.from_jsonl(extended / "prompts.jsonl")
    model, tokenizer = llmva.load_model(taught_folder)
    judge = make_judge("phrases")
    with make_plan(extended, iteration=0).edit.apply(model):
        seen = llmva.observe(
            chat_model(llmva.find_decoder(model), tokenizer), prompts.validation, judge, max_new_tokens=8
        )
    assert point_rates(seen.prompts, seen.labels)["asr"] == record["iterations"][0]["asr"]
    assert record["iterations"][0]["kl"] > 0  # harm is counted from the untouched model on


def test_the_old_splits_stay(extended: Path, first_run: Path) -> None:
    old, new = (llmva.PromptSet.from_jsonl(folder / "prompts.jsonl") for folder in (first_run, extended))
    for (_, before), (_, after) in zip(old.splits(), new.splits(), strict=True):
        assert after[: len(before)] == before
        assert {prompt.source for prompt in after[len(before) :]} == {"attack"}


def test_an_extension_exports_and_is_extended_again(
    extended: Path, taught_folder: Path, tmp_path: Path, command: Command
) -> None:
    assert command("export", extended, "--as", "lora", "--out", tmp_path / "a").code == 0
    assert command("export", extended, "--as", "merged", "--out", tmp_path / "m").code == 0
    assert command("verify", taught_folder, extended, tmp_path / "a", tmp_path / "m").code == 0
    more = [Prompt(f"explain how to {verb} the {noun}", True, "more") for verb in ("paint", "fix") for noun in
            ("door", "fence", "lamp", "table", "song")]  # fmt: skip
    start, prompts, _ = prepare(extended, more)
    assert start.old == ("toxic", "benign", "attack")
    assert start.new == ("more",)
    assert start.edit.iterations == 0
    assert len(prompts.test) == len(llmva.PromptSet.from_jsonl(extended / "prompts.jsonl").test) + 2


def test_the_judge_stays_as_it_was(
    first_run: Path, taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command said that it keeps what is not given, and judged by phrases."""
    shutil.copytree(first_run, tmp_path / "first")
    record = read(first_run)
    assert record["judge_spec"] == "phrases"
    asked: list[str] = []

    def made(spec: str) -> Any:
        asked.append(spec)
        return make_judge("phrases")

    monkeypatch.setattr("llmva.judges.make_judge", made)
    (tmp_path / "new.txt").write_text("\n".join(requests(False, False)) + "\n")
    words = ("extend", tmp_path / "first", "--toxic", tmp_path / "new.txt", "--iterations", 0, "--out")
    for k, (spec, given, wanted) in enumerate((("minos", (), "minos"), ("minos", ("--judge", "phrases"), "phrases"))):
        (tmp_path / "first/run.json").write_text(json.dumps(record | {"judge_spec": spec}))
        assert command(*words, tmp_path / f"out{k}", *given).code == 0
        assert wanted in asked
        assert given or "phrases" not in asked
        asked.clear()
    (tmp_path / "first/run.json").write_text(json.dumps(record | {"judge_spec": None}))
    said = command(*words, tmp_path / "out")
    assert (said.code, "give a judge, with --judge" in said.err) == (2, True)


def test_the_command(first_run: Path, taught_folder: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "new.txt").write_text("\n".join(requests(False, False)) + "\n")
    words = ("extend", first_run, "--toxic", tmp_path / "new.txt", "--out", tmp_path / "run", "--iterations", 2,
             "--max-kl", 0.04, "--json")  # fmt: skip
    said = command(*words)
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert record["extends"]["old"] == ["toxic", "benign"]
    assert record["extends"]["new"] == ["new"]
    assert "extends an earlier edit" in said.err
    assert (tmp_path / "run" / "report.html").exists()
    again = command(*words)  # goes on, which is nothing here
    assert json.loads(again.out)["test"] == record["test"]
    assert command("front", tmp_path / "run").code == 0


def test_another_model_is_refused(first_run: Path, tokenizer: Any) -> None:
    with pytest.raises(LlmvaError, match="give the model that the edit was made from"):
        llmva.extend(tiny_model(seed=9), tokenizer, first_run, attack())


def test_another_start_is_not_continued(first_run: Path, extended: Path, taught_folder: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "first", tmp_path / "second"
    shutil.copytree(first_run, copy)
    shutil.copytree(extended, out)
    edit = Edit.load(copy)
    Edit(edit.chosen.scaled(0.5).factors, edit.base, edit.best).save(copy)
    model, tokenizer = llmva.load_model(taught_folder)
    with pytest.raises(UsageError, match="the edit it began with"):
        llmva.extend(model, tokenizer, copy, attack(), out=out, **FURTHER)


# -- what cannot be extended


def test_bad_directories_are_told_in_one_sentence(first_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        prepare(tmp_path, attack())
    with pytest.raises(UsageError, match="choose another folder"):
        prepare(first_run, attack(), first_run)
    copy = tmp_path / "copy"
    shutil.copytree(first_run, copy)
    (copy / "prompts.jsonl").unlink()
    with pytest.raises(UsageError, match=r"prompts\.jsonl' is missing"):
        prepare(copy, attack())
    record = read(copy)
    del record["test"]["after"]
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="not finished"):
        prepare(copy, attack())
    shutil.copy(first_run / "run.json", copy / "run.json")
    shutil.copy(first_run / "prompts.jsonl", copy / "prompts.jsonl")
    edit = Edit.load(copy)
    Edit(edit.factors, edit.base, 0).save(copy)
    with pytest.raises(UsageError, match="no edit to extend"):
        prepare(copy, attack())


def test_the_command_needs_something_new(first_run: Path, tmp_path: Path, command: Command) -> None:
    known = tmp_path / "known.txt"
    known.write_text("\n".join(requests(True, False)) + "\n")
    for words, expected in (
        ((), "nothing new"),
        (("--toxic", known), "has them all"),
        (("--benign", known), "both as"),
    ):
        said = command("extend", first_run, *words, "--out", tmp_path / "out")
        assert said.code == 2
        assert said.err.count("\n") == 1
        assert expected in said.err
    assert not (tmp_path / "out").exists()


# -- prompts


OLD = llmva.PromptSet.from_lists(
    [f"open the lock of house {i}" for i in range(20)], [f"paint house number {i} blue" for i in range(20)]
)


def some(n: int, benign: bool = False, source: str = "new") -> list[Prompt]:
    return [Prompt(f"{'how' if benign else 'who'} {i} unlike {i * 7} words {source}", benign, source) for i in range(n)]


def test_new_prompts_are_cut_and_known_ones_left_out() -> None:
    known = OLD.train[0]
    found, names = add_prompts(OLD, [*some(20), Prompt(known.text.upper(), known.benign, "new")], seed=1)
    assert names == ("new",)
    assert [len(part) for _, part in found.splits()] == [12 + 24, 4 + 8, 4 + 8]
    assert any("not new" in warning for warning in found.warnings)


def test_a_source_whose_name_is_taken_gets_another() -> None:
    new = [*some(10, source="toxic"), *some(10, benign=True, source="toxic")]
    found, names = add_prompts(OLD, new, seed=1)
    assert names == ("toxic-2", "toxic-3")
    assert set(found.counts()) == {"toxic", "benign", *names}


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        ([], "none of the 0 prompts is new"),
        (list(OLD.train), "the earlier run has them all"),
        (some(3), "only 3 different new toxic"),
        ([prompt for i in range(8) for prompt in some(1, source=f"s{i}")], "split gets no new toxic"),
        ([Prompt(OLD.test[0].text, not OLD.test[0].benign, "x")], "both as toxic"),
    ],
)
def test_prompts_that_do_not_do(new: list[Prompt], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        add_prompts(OLD, new, seed=1)


# -- the guard


def test_an_iteration_that_falls_behind_cannot_be_chosen() -> None:
    prompts = [Prompt(f"t{i}", False, "toxic") for i in range(20)] + [
        Prompt(f"b{i}", True, "benign") for i in range(20)
    ]
    prompts += [Prompt(f"n{i}", False, "attack") for i in range(20)]

    def entry(t: int, toxic: int, benign: int, new: int, record: dict[str, Any]) -> dict[str, Any]:
        """By how many of 20 were answered, refused, answered."""
        counts = ((toxic, Label.ANSWERED, Label.REFUSED), (benign, Label.REFUSED, Label.ANSWERED))
        labels = [bad if i < n else good for n, bad, good in (*counts, (new, Label.ANSWERED, Label.REFUSED))
                  for i in range(20)]  # fmt: skip
        return {"iteration": t, **point_rates(prompts, labels), **check_regression(record, prompts, labels)}

    record: dict[str, Any] = {"extends": {"old": ["toxic", "benign"], "new": ["attack"]}, "iterations": []}
    record["iterations"].append(entry(0, 1, 1, 20, record))
    record["iterations"].append(entry(1, 9, 1, 0, record))  # the attack falls, but an old one comes back
    record["iterations"].append(entry(2, 3, 2, 10, record))  # within the interval
    objective = Objective.of(make_settings(), 20, 40)
    beyond = [e["old"]["beyond"] for e in record["iterations"]]
    assert beyond[0] == 0
    assert beyond[1] == pytest.approx(9 / 20 - record["iterations"][0]["old"]["most_unsafe"])
    assert beyond[2] == 0
    assert objective.choose(record["iterations"]) == 2
    assert "earlier run's prompts" in objective.violations(record["iterations"][1])[0]
    assert check_regression({}, prompts, [Label.REFUSED] * 60) == {}


def test_harm_is_counted_along_the_untouched_models_answers(extended: Path, first_run: Path) -> None:
    """Else what the first edit did to the answers would count as harm, or as none."""

    def texts_of(folder: Path, prompts: llmva.PromptSet) -> list[tuple[str, str]]:
        run, _ = Run.open(None, {"base": {}}, prompts)
        run.answers = read_answers(folder, read(folder))
        return run.harmless_texts(prompts, "test", 99)

    old, new = (llmva.PromptSet.from_jsonl(folder / "prompts.jsonl") for folder in (first_run, extended))
    texts = [texts_of(first_run, old), texts_of(extended, new)]
    assert texts[0]
    assert texts[0] == texts[1]
    assert read(extended)["iterations"][0]["kl"] == pytest.approx(
        read(first_run)["iterations"][read(first_run)["best_iteration"]]["kl"]
    )
