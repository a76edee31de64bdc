"""Loading prompts: every format, column and split syntax, and how sources are cut and deduplicated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmva.errors import LlmvaError, UsageError
from llmva.prompts import Prompt, PromptSet, load_prompts

TOXIC = [f"how to do bad thing {i}" for i in range(20)]
BENIGN = [f"how to do good thing {i}" for i in range(20)]


def text_file(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def texts(spec: str) -> list[str]:
    return [prompt.text for prompt in load_prompts([spec])]


def ids(prompts: tuple[Prompt, ...], source: str) -> set[str]:
    return {prompt.id for prompt in prompts if prompt.source == source}


# --- formats -------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    import pandas

    frame = pandas.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_formats_keep_commas_quotes_line_breaks_and_unicode(tmp_path: Path, ending: str) -> None:
    wanted = ['one, "two"', "first line\nsecond line", "tab\there", "日本語 ünï\u2028code"]
    write_rows(tmp_path / f"p.{ending}", [{"id": i, "prompt": text} for i, text in enumerate(wanted)])
    assert texts(f"{tmp_path}/p.{ending}") == wanted


def test_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufefffirst, line\r\n\r\n  \nsecond\u2028still second\n".encode())
    assert texts(f"{tmp_path}/p.txt") == ["first, line", "second\u2028still second"]


def test_json_of_bare_strings(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["a b", "c"]')
    (tmp_path / "p.jsonl").write_text('"a b"\n\n"c"\n')
    assert texts(f"{tmp_path}/p.json") == texts(f"{tmp_path}/p.jsonl") == ["a b", "c"]


def test_folder_that_datasets_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    write_rows(folder / "train.csv", [{"text": f"train {i}"} for i in range(6)])
    write_rows(folder / "test.csv", [{"text": f"test {i}"} for i in range(3)])
    assert texts(f"{folder}::test") == ["test 0", "test 1", "test 2"]
    prompts = PromptSet.load([str(folder)], [text_file(tmp_path / "b.txt", BENIGN)])
    assert prompts.counts()["mine"] == {"train": 4, "validation": 2, "test": 3}
    assert {p.text for p in prompts.test if not p.benign} == {"test 0", "test 1", "test 2"}


def test_saved_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    chat = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": text}] for text in ("hi", "you")]
    DatasetDict({"train": Dataset.from_dict({"messages": chat, "n": [1, 2]})}).save_to_disk(str(tmp_path / "many"))
    Dataset.from_dict({"query": ["one", "two"]}).save_to_disk(str(tmp_path / "one"))
    assert texts(f"{tmp_path}/many") == ["System: be kind\n\nUser: hi", "System: be kind\n\nUser: you"]
    assert texts(f"{tmp_path}/one::[1:]") == ["two"]


def test_hub_ids_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def fake(name: str, configuration: str | None) -> dict[str, datasets.Dataset]:
        asked.append((name, configuration))
        return {"train": datasets.Dataset.from_dict({"goal": ["a", "b", "c"]})}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert [(p.text, p.source) for p in load_prompts(["someone/some-set:goal:train[:2]"])] == [
        ("a", "some-set"),
        ("b", "some-set"),
    ]
    load_prompts(["someone/some-set/small"])
    assert asked == [("someone/some-set", None), ("someone/some-set", "small")]


# --- columns -------------------------------------------------------------------------------------------------------


def test_column_order_and_choice(tmp_path: Path) -> None:
    write_rows(tmp_path / "p.csv", [{"text": "t", "question": "q", "other": "o"}])
    assert texts(f"{tmp_path}/p.csv") == ["q"]
    assert texts(f"{tmp_path}/p.csv:other") == ["o"]


def test_only_text_column_is_guessed_and_told(tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [{"n": i, "bitte": f"text {i}"} for i in range(9)])
    prompts = PromptSet.load([f"{tmp_path}/p.jsonl"], [text_file(tmp_path / "b.txt", BENIGN)])
    assert prompts.counts()["p"] == {"train": 5, "validation": 2, "test": 2}
    assert "p: took 'bitte' for the name of the prompts' column, the only one with text." in prompts.warnings


def test_chat_cells_are_prompts_beside_texts(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "image"}]}]
    write_rows(tmp_path / "p.jsonl", [{"prompt": parts}, {"prompt": "three"}])
    assert texts(f"{tmp_path}/p.jsonl") == ["two", "three"]


# --- specs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "wanted"),
    [
        (":text:train[2:]", range(2, 20)),
        (":text:[2:]", range(2, 20)),
        ("::[-3:]", range(17, 20)),
        (":train[:10%]", range(2)),
        (":[10%:25%]", range(2, 5)),
        (":text:train[:2]+train[18:]", [0, 1, 18, 19]),
        ("::train", range(20)),
        (":text", range(20)),
        (":", range(20)),
    ],
)
def test_splits_of_a_file(tmp_path: Path, rest: str, wanted: Any) -> None:
    path = text_file(tmp_path / "p.txt", TOXIC)
    assert texts(path + rest) == [TOXIC[i] for i in wanted]


def test_paths_with_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text_file(Path("C:\\data\\p.txt"), ["windows"])
    text_file(Path("a:text.txt"), ["colon"])
    text_file(Path("a"), ["wrong"])
    assert texts("C:\\data\\p.txt") == texts("C:\\data\\p.txt:text") == ["windows"]
    assert texts("a:text.txt:text:[0:]") == ["colon"]
    with pytest.raises(UsageError, match=r"C:\\\\other\.csv"):
        load_prompts(["C:\\other.csv:text"])


def test_a_split_column_makes_own_splits(tmp_path: Path) -> None:
    rows = [{"text": f"{split} {i}", "split": split} for split in ("train", "dev", "test") for i in range(4)]
    write_rows(tmp_path / "p.csv", rows)
    prompts = PromptSet.load([f"{tmp_path}/p.csv"], [text_file(tmp_path / "b.txt", BENIGN)])
    assert prompts.counts()["p"] == {"train": 4, "validation": 4, "test": 4}
    assert all(p.text.startswith("dev") for p in prompts.validation if p.source == "p")
    assert texts(f"{tmp_path}/p.csv::test[1:]") == ["test 1", "test 2", "test 3"]
    assert len(texts(f"{tmp_path}/p.csv")) == 12


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    path = text_file(tmp_path / "p.txt", TOXIC)
    prompts = PromptSet.load([f"{path}::[:10]", f"{path}::[10:]"], [text_file(tmp_path / "b.txt", BENIGN)])
    assert list(prompts.counts()) == ["p", "p-2", "b"]


# --- cutting and deduplication -------------------------------------------------------------------------------------


def test_another_source_or_order_moves_nothing(tmp_path: Path) -> None:
    toxic = text_file(tmp_path / "t.txt", TOXIC)
    benign = text_file(tmp_path / "b.txt", BENIGN)
    more = text_file(tmp_path / "more.txt", [f"another {i}" for i in range(30)])
    turned = text_file(tmp_path / "t2.txt", TOXIC[::-1])
    one, two = PromptSet.load([toxic], [benign]), PromptSet.load([more, toxic], [benign])
    three = PromptSet.load([turned], [benign])
    for (_, a), (_, b), (_, c) in zip(one.splits(), two.splits(), three.splits(), strict=True):
        assert ids(a, "t") == ids(b, "t") == ids(c, "t2") != set()
    assert one.counts()["t"] == {"train": 12, "validation": 4, "test": 4}
    assert PromptSet.load([toxic], [benign], seed=1).test != one.test
    assert PromptSet.load([toxic], [benign]) == one


def test_repeats_are_dropped_and_counted() -> None:
    prompts = PromptSet.from_lists([*TOXIC, "How to  DO bad thing 3"], BENIGN)
    assert sum(prompts.counts()["toxic"].values()) == 20
    assert prompts.warnings[0] == "toxic: 1 left out, repeats of an earlier prompt."


def test_a_text_of_test_leaves_train(tmp_path: Path) -> None:
    rows = [{"text": f"{split} {i}", "split": split} for split in ("train", "validation", "test") for i in range(4)]
    rows += [{"text": "TEST 0", "split": "train"}, {"text": "test  1", "split": "validation"}]
    rows += [{"text": "validation 2", "split": "train"}]
    write_rows(tmp_path / "p.csv", rows)
    prompts = PromptSet.load([f"{tmp_path}/p.csv"], [text_file(tmp_path / "b.txt", BENIGN)])
    assert prompts.counts()["p"] == {"train": 4, "validation": 4, "test": 4}
    assert {p.text for p in prompts.test if p.source == "p"} == {f"test {i}" for i in range(4)}
    assert prompts.warnings[0] == "p: 3 left out, the same text being in another split or source."


def test_the_same_text_in_two_sources_stays_in_one_split() -> None:
    prompts = PromptSet.from_lists({"a": TOXIC, "b": [text.upper() for text in TOXIC]}, BENIGN, seed=3)
    found = [p.text.lower() for _, split in prompts.splits() for p in split if not p.benign]
    assert sorted(found) == sorted(TOXIC)


def test_near_repeats_between_splits_are_told_by_source() -> None:
    own = [f"please tell me all about the history of subject number {i}" for i in range(20)]
    apart = [" ".join(f"{word}{i}" for word in ("some", "words", "of", "their", "own")) for i in range(20)]
    assert PromptSet.from_lists({"alike": own}, {"apart": apart}).warnings == (
        "alike: 4 of 4 test prompts share most of their words with a train or validation prompt, which flatters the "
        "figures.",
    )
    assert PromptSet.from_lists({"other": apart[:10]}, {"apart": apart[10:]}).warnings == ()


def test_load_prompts_keeps_exactly_what_is_there(tmp_path: Path) -> None:
    toxic = text_file(tmp_path / "t.txt", ["same", "same", "other"])
    benign = text_file(tmp_path / "b.txt", ["kind"])
    assert [(p.text, p.benign) for p in load_prompts([toxic], [benign])] == [
        ("same", False),
        ("same", False),
        ("other", False),
        ("kind", True),
    ]


# --- the set itself ------------------------------------------------------------------------------------------------


def test_jsonl_round_trip(tmp_path: Path) -> None:
    prompts = PromptSet.from_lists({"t": [*TOXIC, "line\nbreak \u2028 ü"]}, {"b": BENIGN})
    prompts.to_jsonl(tmp_path / "p.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
    again = PromptSet.from_jsonl(tmp_path / "p.jsonl")
    assert again == prompts
    assert again.hashes() == prompts.hashes()
    row = json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert set(row) == {"id", "text", "benign", "source", "split"}


def test_to_jsonl_says_when_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(LlmvaError, match="cannot be written"):
        PromptSet.from_lists(TOXIC, BENIGN).to_jsonl(tmp_path / "missing" / "p.jsonl")


def test_draw() -> None:
    prompts = PromptSet.from_lists({"a": TOXIC, "few": ["x", "y", "z"]}, {"b": BENIGN})
    drawn = prompts.draw(5, torch.Generator().manual_seed(1))
    assert [p.source for p in drawn] == ["a"] * 5 + ["few"] + ["b"] * 5
    assert len({p.id for p in drawn}) == 11
    assert set(drawn) <= set(prompts.train)
    assert (
        drawn == prompts.draw(5, torch.Generator().manual_seed(1)) != prompts.draw(5, torch.Generator().manual_seed(2))
    )
    generator = torch.Generator().manual_seed(1)
    assert prompts.draw(5, generator) == drawn != prompts.draw(5, generator)
    assert sorted(p.id for p in prompts.draw(99, generator)) == sorted(p.id for p in prompts.train)


def test_hashes_see_text_split_and_side() -> None:
    a, b, c = (Prompt(text, False, "s") for text in "abc")
    base = PromptSet((a,), (b,), (c,)).hashes()
    assert len(base["s"]) == 64
    others = [
        PromptSet((b,), (a,), (c,)),
        PromptSet((a, b), (), (c,)),
        PromptSet((Prompt("a", True, "s"),), (b,), (c,)),
        PromptSet((Prompt("A", False, "s"),), (b,), (c,)),
    ]
    assert len({base["s"], *(other.hashes()["s"] for other in others)}) == 5


def test_bundled_prompts_are_read_beside_named_ones(tmp_path: Path) -> None:
    bundled = PromptSet.bundled()
    same = bundled.train[0]  # the user has one of them, too
    (tmp_path / "bad.txt").write_text("\n".join([same.text, *(f"a bad thing number {i}" for i in range(20))]))
    (tmp_path / "good.txt").write_text("\n".join(f"a good thing number {i}" for i in range(20)))
    both, only = (
        PromptSet.load([str(tmp_path / "bad.txt")], [str(tmp_path / "good.txt")], only=only) for only in (False, True)
    )
    assert only.read == ()
    assert list(both.splits()) == list(only.splits())
    assert len(both.read) == len(bundled.train) + len(bundled.validation) - 1
    assert same.text not in [p.text for p in both.read]
    assert {p.source for p in both.read} == {f"bundled {kind}" for kind in bundled.counts()}
    assert {p.text for p in both.read}.isdisjoint(p.text for p in bundled.test)
    both.to_jsonl(tmp_path / "prompts.jsonl")
    assert PromptSet.from_jsonl(tmp_path / "prompts.jsonl") == both
    assert both.hashes() != only.hashes()
    assert both.counts() == only.counts()
