"""A folder of copies of public sets: where a set is looked for in it, and what is said of one that is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, taught_requests
from llmva.errors import UsageError
from llmva.prompts import PromptSet
from llmva.prompts.entries import read_entry
from llmva.prompts.public.mirror import find_copy
from llmva.prompts.public.registry import entries, find
from llmva.prompts.public.wanted import parse_data

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
MAX_CHARS = 20_000
SNAPSHOT = f"datasets--bench-llm--or-bench/snapshots/{find('or-bench-hard').home.revision}"


def write(path: Path, text: str = "goal\nhi\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "file", "copy"),
    [
        ("advbench", "advbench.csv", "advbench.csv"),
        ("advbench", "AdvBench.JSONL", "AdvBench.JSONL"),
        ("advbench", "advbench/any.csv", "advbench"),
        ("advbench", "deeper/advbench.parquet", "deeper/advbench.parquet"),
        ("advbench", "harmful_behaviors.csv", "harmful_behaviors.csv"),
        ("advbench", "deeper/harmful_behaviors.csv", "deeper/harmful_behaviors.csv"),
        ("advbench", "llm-attacks/data/advbench/harmful_behaviors.csv", "llm-attacks"),
        ("advbench", "llm-attacks/llm-attacks/data/advbench/harmful_behaviors.csv", "llm-attacks/llm-attacks"),
        ("or-bench-hard", "or_bench_hard.csv", "or_bench_hard.csv"),
        ("or-bench-hard", "or-bench-hard-1k.csv", "or-bench-hard-1k.csv"),
        ("or-bench-hard", "bench-llm/or-bench/or-bench-hard-1k.csv", "bench-llm/or-bench"),
        ("or-bench-hard", f"{SNAPSHOT}/or-bench-hard-1k.csv", SNAPSHOT),
        ("or-bench-hard", f"hub/{SNAPSHOT}/or-bench-hard-1k.csv", f"hub/{SNAPSHOT}"),
        ("jailbreakbench", "JBB-Behaviors/harmful-behaviors.csv", "JBB-Behaviors"),
        ("jailbreakbench", "jbb/harmful-behaviors.csv", "jbb"),
        ("nq", "nq_val.csv", "."),
        ("nq", "paper/nq_train.csv", "paper"),
        ("nq", "natural_questions.csv", "natural_questions.csv"),
        ("nq", "LLM-VA/dataset/split_dataset_1209/nq_train.csv", "LLM-VA"),
        ("xstest", "xstest_safe.csv", "xstest_safe.csv"),
        ("oktest", "data/OKTest.csv", "data/OKTest.csv"),
    ],
)
def test_where_a_copy_is_found(name: str, file: str, copy: str, tmp_path: Path) -> None:
    write(tmp_path / file)
    assert find_copy(find(name), tmp_path) == str(tmp_path / copy)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("falsereject", "train.jsonl"),  # a name of many sets
        ("advbench", "deeper/still/advbench.csv"),
        ("advbench", ".hidden/advbench.csv"),
        ("advbench", "advbench.csv/x.csv/y"),  # folders
        ("seval-risk", "LLM-VA/dataset/split_dataset_1209/nq_train.csv"),  # another set of the same home
        ("or-bench-hard", f"datasets--bench-llm--or-bench/snapshots/{'0' * 40}/or-bench-hard-1k.csv"),
    ],
)
def test_what_is_not_taken_for_a_copy(name: str, file: str, tmp_path: Path) -> None:
    write(tmp_path / file)
    with pytest.raises(UsageError, match=f"has no copy of {name}, neither a folder {name}, ") as caught:
        find_copy(find(name), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", [e for e in entries().values() if e.home.kind != "bundled"], ids=lambda e: e.name)
def test_a_missing_set_is_named_with_all_places(entry: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        parse_data([entry.name], tmp_path)
    said = str(caught.value)
    assert said.endswith(f"or name a copy as {entry.name}=PATH.")
    for place in (str(tmp_path), f"folder {entry.name},", str(entry.home.id), f"{entry.name}.csv", ".parquet"):
        assert place in said
    home = {"hub": f"snapshots/{entry.home.revision}", "github": entry.parts[0].files[0].rpartition("/")[2]}
    assert home[entry.home.kind] in said


def test_the_first_place_counts_and_two_of_a_kind_do_not(tmp_path: Path) -> None:
    write(tmp_path / "a" / "advbench.csv")
    write(tmp_path / "b" / "advbench.csv")
    with pytest.raises(
        UsageError, match=r"has several copies of advbench \(.*a/advbench.csv, .*b/advbench.csv\): name"
    ):
        find_copy(find("advbench"), tmp_path)
    for place in ("advbench.csv", "llm-attacks/harmful_behaviors.csv", "advbench/x.csv"):
        write(tmp_path / place)
        assert find_copy(find("advbench"), tmp_path).startswith(str(tmp_path / place.partition("/")[0]))


def test_a_path_of_its_own_and_the_bundled_set_need_no_copy(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv")
    found = parse_data([f"bundled,advbench={own}"], tmp_path)
    assert [one.local for one in found] == [None, str(own)]


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*: check the path given as --data-dir"):
        parse_data(["xstest"], tmp_path / "gone")
    with pytest.raises(UsageError, match="--data-dir applies to the sets of --data: add --data"):
        parse_data([], tmp_path)


def test_a_copy_of_one_side_is_told(tmp_path: Path) -> None:
    write(tmp_path / "xstest_safe.csv", "input,type\nhow do i kill a process,homonyms\n")
    ((benign, source),) = read_entry(find("xstest"), find_copy(find("xstest"), tmp_path), MAX_CHARS)
    assert (benign, source.name, source.all_texts()) == (True, "xstest (benign)", ["how do i kill a process"])
    (told,) = source.warnings
    assert told.endswith("xstest_safe.csv holds none of its toxic prompts.")


def test_the_nearest_of_equal_files_is_read(tmp_path: Path) -> None:
    write(tmp_path / "nq_train.csv", "input\none\n")
    write(tmp_path / "other" / "nq_train.csv", "input\ntwo\n")
    ((_, source),) = read_entry(find("nq"), find_copy(find("nq"), tmp_path), MAX_CHARS)
    assert source.texts == {"train": ["one"]}


def test_where_prompts_lie_does_not_change_them(tmp_path: Path) -> None:
    toxic = "goal\n" + "".join(f"break the lock {i}\n" for i in range(12))
    benign = "prompt\n" + "".join(f"paint the fence {i}\n" for i in range(12))
    for place in ("one", "two/deeper"):
        write(tmp_path / place / "advbench.csv", toxic)
        write(tmp_path / place / "OKTest.csv", benign)
    one, two = (PromptSet.load(data=["advbench,oktest"], data_dir=tmp_path / place) for place in ("one", "two"))
    named = PromptSet.load(data=[f"advbench={tmp_path}/one/advbench.csv", f"oktest={tmp_path}/one/OKTest.csv"])
    assert one.hashes() == two.hashes() == named.hashes()
    assert {name for name in one.hashes() if "bundled" not in name} == {"advbench", "oktest"}


def test_the_command_line(taught_folder: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    for name, column, side in (("advbench", "goal", False), ("oktest", "prompt", True)):
        rows = [text for text, benign, _ in taught_requests() if benign == side]
        write(tmp_path / "mirror" / f"{name}.csv", "\n".join([column, *rows]) + "\n")
    sets = ["--data", "advbench,oktest", "--data-dir", tmp_path / "mirror"]
    short = ["--max-new-tokens", 6, "--iterations", 1, "--per-source", 16]
    said = command("align", taught_folder, *sets, *short, "--out", tmp_path / "run", "-q")
    assert said.code == 0, said.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {name for name in record["prompts"]["hashes"] if "bundled" not in name} == {"advbench", "oktest"}
    said = command("evaluate", taught_folder, *sets, "--max-new-tokens", 4, "--json", "-q")
    assert [one["local"] for one in json.loads(said.out)["sets"]] == [
        str(tmp_path / "mirror" / f"{name}.csv") for name in ("advbench", "oktest")
    ]
    for words in (["align", taught_folder], ["evaluate", taught_folder], ["compare", taught_folder]):
        said = command(*words, "--data-dir", tmp_path)
        assert said.code == 2
        assert said.err.count("\n") == 1
        assert "--data-dir" in said.err
        assert "add --data" in said.err
    said = command("align", taught_folder, "--data", "xstest", "--data-dir", tmp_path / "mirror")
    assert said.code == 2
    assert "has no copy of xstest" in said.err.splitlines()[-1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the paper's prompts are not on this machine")
def test_the_papers_files_and_those_of_other_code() -> None:
    found = {one.entry.name: one for one in parse_data(["seval-attack,seval-risk,orfuzzset,nq"], SHARED)}
    assert {one.local for one in found.values()} == {str(SHARED)}
    prompts = PromptSet.load(data=["seval-attack,seval-risk,orfuzzset,nq"], data_dir=SHARED)
    assert set(prompts.counts()) == set(found)
    rows = {}
    for one in parse_data(["xstest,oktest,advbench"], SHARED):
        ((benign, source),) = read_entry(one.entry, one.local, MAX_CHARS)
        rows[source.name] = (benign, len(source.all_texts()))
    assert rows == {"xstest (benign)": (True, 250), "oktest": (True, 300), "advbench": (False, 100)}
