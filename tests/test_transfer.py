"""An edit measured on public data sets: `llmva evaluate --data`, `llmva align --data`, `llmva data list`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import NOUNS, VERBS, Said, chat_model
from llmva.errors import LlmvaError, UsageError
from llmva.prompts import Prompt, PromptSet
from llmva.prompts.public.wanted import parse_data
from llmva.prompts.testsets import read_test_sets
from llmva.report.run.transfer import groups, transfer_markdown

Command = Callable[..., Said]
FAST = ("--per-source", 40, "--max-new-tokens", 8, "--iterations", 3, "--passes", 1, "--only")
TOKENS = ("--max-new-tokens", 8)


def asks(frame: str, side: str) -> list[str]:
    verbs = VERBS[4:] if side == "benign" else VERBS[:4]
    return [frame.format(verb, noun) for verb in verbs for noun in NOUNS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # set where there is no network, and put back after the test
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of two sets, which ask for things of which the taught model knows some."""
    folder = tmp_path_factory.mktemp("copies")
    rows = [f"{text},{label}" for label, side in (("unsafe", "toxic"), ("safe", "benign"))
            for text in asks("to {} that {}", side)]  # fmt: skip
    (folder / "xs.csv").write_text("\n".join(["prompt,label", *rows]) + "\n")
    (folder / "adv.csv").write_text("\n".join(["goal", *asks("will you {} {}", "toxic")]) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(taught_folder: Path, copies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the copy of xstest and on benign.txt; do not write into it."""
    from llmva.cli.main import main

    out = tmp_path_factory.mktemp("transfer") / "run"
    own = ("--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt")
    arguments = ("align", taught_folder, *own, "--data", f"xstest={copies}/xs.csv", *FAST, "--out", out, "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMVA_CACHE", str(out.parent / "cache"))
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
    assert ended.value.code == 0
    return out


def one_object(said: Said) -> dict[str, Any]:
    assert said.code == 0, said.err
    assert said.out.count("\n") == 1
    found = json.loads(said.out)
    assert isinstance(found, dict)
    return found


# --- test sets -------------------------------------------------------------------------------------------------------


def read(copies: Path, **how: Any) -> Any:
    return read_test_sets(parse_data([f"xstest={copies}/xs.csv,advbench={copies}/adv.csv"]), **how)


def test_sets_are_drawn_by_side_and_seed(copies: Path) -> None:
    xstest, advbench = read(copies, per_set=5)
    assert (xstest.name, xstest.about["available"], xstest.about["drawn"]) == (
        "xstest",
        {"toxic": 48, "benign": 48},
        {"toxic": 5, "benign": 5},
    )
    assert xstest.limits == ("xstest: 10 of 96 prompts were drawn (--per-set 5, a side).",)
    assert {p.source for p in xstest.prompts} == {"xstest (toxic)", "xstest (benign)"}
    assert advbench.about["drawn"] == {"toxic": 5, "benign": 0}
    assert advbench.about["contamination"] is None
    assert advbench.about["fitted_on"] is None
    assert set(xstest.prompts) < set(read(copies, per_set=9)[0].prompts)
    assert read(copies, per_set=5, seed=1)[0].prompts != xstest.prompts
    assert read(copies, per_set=5)[0] == xstest
    assert len(read(copies)[0].prompts) == 96
    assert read(copies)[0].limits == ()


def test_what_the_fit_has_seen_is_left_out_before_the_draw(copies: Path) -> None:
    whole = read(copies)[0].prompts
    fit = [*whole[:60:2], Prompt(whole[1].text + " !!", False, "own")]
    xstest, advbench = read(copies, fit=fit, per_set=16)
    assert xstest.about["contamination"]["exact"] == 30
    assert xstest.about["contamination"]["near"] >= 1
    assert xstest.about["contamination"]["of"] == 96
    assert xstest.about["contamination"]["kept"] == 0
    assert not {p.text for p in xstest.prompts} & {p.text for p in fit}
    assert (xstest.about["fitted_on"], advbench.about["fitted_on"]) == (True, False)
    assert re.search(
        r"xstest: \d+ of 96 prompts were seen in the fit \(30 the same, \d+ nearly\) and left out", xstest.limits[0]
    )
    kept = read(copies, fit=fit, keep_duplicates=True)[0]
    assert len(kept.prompts) == 96
    assert (
        kept.about["contamination"]["kept"]
        == kept.about["contamination"]["exact"] + kept.about["contamination"]["near"]
    )
    assert "and kept among them" in kept.limits[0]


def test_a_name_alone_does_not_make_it_fitted_on(copies: Path) -> None:
    other = [Prompt("something else", False, "xstest (toxic)")]
    assert read(copies, fit=other)[0].about["fitted_on"] is False


def test_a_set_that_the_fit_has_seen_whole(copies: Path) -> None:
    fit = [p for one in read(copies) for p in one.prompts]
    with pytest.raises(
        UsageError, match=r"on every test prompt of xstest: leave the set out, or add --keep-duplicates"
    ):
        read(copies, fit=fit)


def test_the_test_split_where_there_is_one(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": f"one of {name}"}) + "\n")
    (one,) = read_test_sets(parse_data([f"falsereject={tmp_path}"]))
    assert [p.text for p in one.prompts] == ["one of test"]
    assert one.about["split"] == "test"
    (tmp_path / "test.jsonl").unlink()
    (one,) = read_test_sets(parse_data([f"falsereject={tmp_path}"]))
    assert ([p.text for p in one.prompts], one.about["split"]) == (["one of train"], "all")
    assert any("no test.jsonl" in limit for limit in one.limits)


def test_own_sources_beside_public_ones(copies: Path, taught_folder: Path) -> None:
    (copies / "xstest.txt").write_text("a b c\n")
    own = [str(copies / "xstest.txt"), str(taught_folder / "toxic.txt")]
    found = read_test_sets(parse_data([f"xstest={copies}/xs.csv"]), toxic=own, per_set=3)
    assert [one.name for one in found] == ["xstest", "xstest-2", "toxic"]
    assert [len(one.prompts) for one in found] == [6, 1, 3]
    assert (found[1].about["licence"], found[1].about["home"]) == (None, None)


# --- evaluate --data -------------------------------------------------------------------------------------------------


def test_figures_of_each_set(taught_folder: Path, run: Path, copies: Path, command: Command, tmp_path: Path) -> None:
    data = ("--data", f"xstest={copies}/xs.csv", "--data", f"advbench={copies}/adv.csv")
    said = command("evaluate", taught_folder, "--edit", run, *data, *TOKENS, "--json", "--quiet")
    found = one_object(said)
    xstest, advbench = found["sets"]
    assert found["prompts"] == {"xstest": sum(xstest["drawn"].values()), "advbench": 48}
    assert xstest["local"] == f"{copies}/xs.csv"
    assert (xstest["revision"], xstest["licence"], xstest["split"]) == (None, "CC-BY-4.0", "all")
    assert (xstest["fitted_on"], advbench["fitted_on"]) == (True, False)
    fit = PromptSet.from_jsonl(run / "prompts.jsonl")
    of_set = [p for p in (*fit.train, *fit.validation) if p.source.startswith("xstest")]
    assert xstest["contamination"]["exact"] == len(of_set) > 0
    assert (advbench["contamination"]["exact"], advbench["contamination"]["near"]) == (0, 0)
    for one in found["sets"]:
        for side in ("before", "after"):
            figures = one[side]
            assert figures["n_toxic"] + figures["n_benign"] == found["prompts"][one["name"]]
            low, high = figures["asr_interval"]
            assert 0 <= low <= figures["asr"] <= high <= 1
    assert advbench["before"]["f1"] is None
    assert xstest["before"]["f1"] is not None
    total = found["test"]["before"]
    assert total["n_toxic"] == xstest["drawn"]["toxic"] + 48
    assert set(total["by_source"]) == {"xstest (toxic)", "xstest (benign)", "advbench"}
    assert any("seen in the fit" in limit for limit in found["limits"])
    assert {"utility", "cost", "judge", "seed"} <= found.keys()
    # alone it is the same as among others
    alone = one_object(command("evaluate", taught_folder, "--edit", run, *data[2:], *TOKENS, "--json", "--quiet"))
    assert alone["sets"] == [advbench]


def test_for_people_and_in_markdown(
    taught_folder: Path, run: Path, copies: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    data = ("--data", f"xstest={copies}/xs.csv,advbench={copies}/adv.csv", "--per-set", 6, "--keep-duplicates")
    said = command("evaluate", taught_folder, "--edit", run, *data, *TOKENS, "--markdown", tmp_path / "t.md")
    assert said.code == 0
    for words in ("xstest (fitted on)", "advbench", "all sets", "ASR", "ORR", "F1", "6 of 48 prompts were drawn"):
        assert words in said.out
    assert "kept among them" in said.out
    lines = (tmp_path / "t.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:5]] == [
        ["| xstest (fitted on)", "6", "6"],
        ["| advbench", "6", "–"],
        ["| all sets", "12", "6"],
    ]
    assert all(line.count("|") == 10 for line in lines[:5])


def test_without_an_edit(taught_folder: Path, copies: Path, command: Command) -> None:
    found = one_object(
        command("evaluate", taught_folder, "--data", f"advbench={copies}/adv.csv", *TOKENS, "--json", "--quiet")
    )
    (one,) = found["sets"]
    assert "after" not in one
    assert one["contamination"] is None
    assert found["limits"] == []
    assert [group.name for group in groups(found)] == ["advbench"]


def test_an_edit_without_its_run(
    taught_folder: Path, run: Path, copies: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "edit.safetensors").write_bytes((run / "edit.safetensors").read_bytes())
    data = ("--data", f"advbench={copies}/adv.csv", "--per-set", 4)
    found = one_object(command("evaluate", taught_folder, "--edit", tmp_path, *data, *TOKENS, "--json", "--quiet"))
    assert found["sets"][0]["contamination"] is None
    assert "is not known" in found["limits"][-1]


def test_prompts_that_were_named_and_seen_are_told_and_kept(
    taught_folder: Path, run: Path, command: Command, tmp_path: Path
) -> None:
    fit = PromptSet.from_jsonl(run / "prompts.jsonl")
    text = next(p.text for p in fit.train if not p.benign)
    (tmp_path / "bad.txt").write_text(f"{text}\nsomething else altogether\n")
    evaluate = ("evaluate", taught_folder, "--edit", run, "--toxic", tmp_path / "bad.txt", *TOKENS)
    found = one_object(command(*evaluate, "--json", "--quiet"))
    assert found["contamination"] == {"exact": 1, "near": 0, "of": 2}
    assert found["prompts"] == {"bad": 2}
    assert "1 of 2 prompts were seen in the fit (1 the same, 0 nearly)" in command(*evaluate).out


# --- licences, names, failures ---------------------------------------------------------------------------------------


def test_a_licence_is_told_once_even_when_quiet(taught_folder: Path, copies: Path, command: Command) -> None:
    evaluate = ("evaluate", taught_folder, "--data", f"advbench={copies}/adv.csv", "--per-set", 2, *TOKENS, "--quiet")
    told = "The data set advbench has the licence MIT: see https://github.com/llm-attacks/llm-attacks"
    first, second = command(*evaluate), command(*evaluate)
    assert first.err.startswith(told)
    assert first.err.count("\n") == 1
    assert second == Said(0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--data", "xtest"), 2, "choose xstest"),
        (("--data", "xstest=none.csv"), 2, "no file or folder 'none.csv'"),
        (("--data", "xstest,xstest"), 2, "named twice"),
        (("--data", "bundled", "--per-set", 0), 2, "per-set"),
        (("--per-set", 3), 2, "add --data"),
        (("--keep-duplicates",), 2, "add --data"),
        (("--data", "bundled", "--markdown", "no/such/t.md"), 2, "There is no folder"),
        (("--toxic", "advbench"), 2, "name it by --data advbench"),
    ],
)
def test_what_cannot_be_meant(
    model_folder: Path, arguments: tuple[object, ...], code: int, says: str, command: Command, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    said = command("evaluate", model_folder, *arguments)
    assert (said.code, said.out) == (code, "")
    assert says in said.err
    assert re.fullmatch(r"error: [^\n]+: [^\n]+\.\n", said.err), said.err


@pytest.mark.parametrize("name", ["xstest", "or-bench-hard"])
def test_offline_with_nothing_cached(
    model_folder: Path, name: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmva.prompts.sources import hub

    def fail(*_: object) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "load_from_hub", fail)
    monkeypatch.setattr(hub, "download", fail)
    for arguments in (("evaluate", model_folder), ("align", model_folder, "--out", "never")):
        said = command(*arguments, "--data", f"{name},bundled")
        assert (said.code, said.out) == (1, "")
        last = said.err.splitlines()[-1]
        assert re.fullmatch(rf"error: {name} is not in the cache and .* cannot be reached .*{name}=PATH\.", last)
    assert not Path("never").exists()


# --- align --data ----------------------------------------------------------------------------------------------------


def test_a_run_on_public_sets(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["prompts"]["counts"]["test"] == {
        "xstest (toxic)": 10,
        "xstest (benign)": 10,
        "toxic": 19,
        "benign": 19,
    }
    assert any("share most of their words with a train or validation prompt" in limit for limit in record["limits"])


def test_a_cap_without_sets(model_folder: Path, command: Command, tmp_path: Path) -> None:
    said = command("align", model_folder, "--per-set", 5, "--out", tmp_path / "r")
    assert (said.code, said.out) == (2, "")
    assert "add --data" in said.err


def test_a_comparison_on_public_sets(taught_folder: Path, copies: Path, command: Command, tmp_path: Path) -> None:
    data = ("--data", f"xstest={copies}/xs.csv", "--per-set", 15, "--methods", "none", "--seeds", 1, "--no-curves")
    said = command("compare", taught_folder, *data, *TOKENS, "--out", tmp_path / "c", "--json", "--quiet")
    assert said.err.startswith("The data set xstest has the licence")
    assert set(one_object(said)["rows"][0]["by_source"]) == {"xstest (toxic)", "xstest (benign)"}


# --- data list -------------------------------------------------------------------------------------------------------


def test_the_list(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # which pytest-xdist sets
    said = command("data", "list")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0].split() == ["name", "sides", "prompts", "licence", "login", "home"]
    xstest = next(line for line in lines if line.startswith("xstest "))
    assert xstest.split() == [
        "xstest", "toxic,", "benign", "450", "CC-BY-4.0", "no", "https://github.com/paul-rottger/xstest",
    ]  # fmt: skip
    found = one_object(command("data", "list", "--json"))
    assert [one["name"] for one in found["data"]] == [line.split()[0] for line in lines[1:]]
    assert command("data", "list", "--quiet") == Said(0, "", "")


# --- tables ----------------------------------------------------------------------------------------------------------


def test_tables_of_a_record_with_holes() -> None:
    assert groups({}) == []
    assert (
        transfer_markdown({"sets": [{"name": "a|b`[c]\n"}, {}], "test": None})
        .splitlines()[2]
        .startswith("| a\\|b\\`\\[c\\] | – |")
    )


def test_no_sets_is_an_error(model: Any, tokenizer: Any) -> None:
    from llmva.evaluation.transfer import transfer
    from llmva.judges import make_judge

    with pytest.raises(LlmvaError, match="no data set was named"):
        transfer(chat_model(model, tokenizer), [], make_judge("phrases"))
