"""Every unusable prompt source is one sentence that names the place and the mend, and nothing else."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from llmva.errors import UsageError
from llmva.prompts import PromptSet, load_prompts

GOOD = [f"a good prompt number {i}" for i in range(10)]
BAD = [f"a bad prompt number {i}" for i in range(10)]

# file name, its bytes, what follows the path in the spec, what the message must say
FILES = [
    ("p.txt", b"", "", "is empty"),
    ("p.txt", b" \n\n", "", "is empty"),
    ("p.csv", b"input\n", "", "holds no prompts"),
    ("p.json", b"[]", "", "holds no prompts"),
    ("p.txt", b"one\nsch\xf6n\n", "", r"not UTF-8 \(line 2\)"),
    ("p.csv", "input\nhi\n".encode("utf-16"), "", "not UTF-8"),
    ("p.txt", b"one\ntwo\nth\0ree\n", "", "NUL byte in line 3"),
    ("p.jsonl", b'{"text": "a\\u0000b"}\n', "", "line 1 of .* NUL byte"),
    ("p.jsonl", b'{"text": "\\ud83d half"}\n', "", "line 1 of .* surrogate"),
    ("p.xlsx", b"PK", "", "not a kind of prompt file.*use one of .csv"),
    ("p.csv", b"input,id\nhi,1\n", ":prompt", r"no column 'prompt'.*\(input, id\)"),
    ("p.csv", b"title,body\na,b\n", "", "column of .* is not clear.*title, body"),
    ("p.csv", b"input,input\na,b\n", "", "two columns of one name"),
    ("p.csv", b"input,id\nhi,1\nhow, are you,2\n", "", "line 3 of .* has 3 cells but the header has 2"),
    ("p.csv", b'input,id\n"hi\nthere",1\n,2\n', "", "line 4 of .* is an empty prompt.*another column .id"),
    ("p.csv", b"input\n" + b"x" * 200_000 + b"\n", "", "row from line 2 of .* cannot be read.*shorten"),
    ("p.txt", b"hi\n" + b"x" * 1_000_000 + b"\n", "", "line 2 of .* 1,000,000 characters long, the limit is 20,000"),
    ("p.jsonl", b'{"text": "a"}\n{"text": \n', "", "line 2 of .* is not JSON"),
    ("p.jsonl", b'{"text": "a"}\n["b"]\n', "", "line 2 of .* not a JSON object"),
    ("p.jsonl", b'{"text": "a"}\n\n{"text": null}\n', "", "line 3 of .* has no prompt"),
    ("p.jsonl", b'{"text": "a"}\n{"other": "b"}\n', "", "line 2 of .* has no prompt"),
    ("p.jsonl", b'{"text": "a"}\n{"text": 7}\n', "", "line 2 of .* not text but int"),
    ("p.jsonl", b'{"text": [{"role": "system", "content": "x"}]}\n', "", "line 1 of .* no user turn"),
    ("p.jsonl", b"[" * 100_000, "", "line 1 of .* is not JSON"),
    ("p.json", b'{"text": ["a"]}', "", "does not hold a JSON list"),
    ("p.json", b'{"text": "a"}\n{"text": "b"}\n', "", "not JSON .*name it .jsonl"),
    ("p.parquet", b"PAR1 but not really", "", "not a readable Parquet file"),
    ("p.txt", b"a\nb\n", "::test", r"no split 'test'.*\(train\)"),
    ("p.txt", b"a\nb\n", ":text:train[2:", "split 'train.2:' of .* cannot be read"),
    ("p.txt", b"a\nb\n", ":text:train[x:]", "cannot be read"),
    ("p.txt", b"a\nb\n", "::[5:]", "selects no prompts"),
    ("p.csv", b"text,split\na,train\nb,test\n", "::[1:]", r"several splits.*\(train, test\)"),
]


def check_is_one_sentence(message: str) -> None:
    assert message.endswith(".")
    assert "\n" not in message
    assert ":" in message  # what is wrong: how to mend it


@pytest.mark.parametrize(("name", "data", "rest", "says"), FILES)
def test_unusable_file(tmp_path: Path, name: str, data: bytes, rest: str, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UsageError, match=says) as caught:
        load_prompts([f"{path}{rest}"])
    check_is_one_sentence(str(caught.value))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "an empty prompt source"),
        ("  ", "an empty prompt source"),
        ("nothing.csv", "no file or folder 'nothing.csv'"),
        ("nothing.csv:input:train", "no file or folder 'nothing.csv'"),
        ("./nothing", "no file or folder"),
        ("/a/b/c/d", "no file or folder"),
        ("some words with spaces", "no file or folder"),
        ("x" * 5000 + ".csv", "no file or folder"),
        ("here/nothing", "no file or folder 'here/nothing'"),
    ],
)
def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UsageError, match=says) as caught:
        load_prompts([spec])
    check_is_one_sentence(str(caught.value))


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object) -> None:
        raise ConnectionError("could not be reached\nwith many\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match=r"'someone/some-set'.*could not be reached.*network") as caught:
        load_prompts(["someone/some-set:text:train[:10]"])
    check_is_one_sentence(str(caught.value))


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a data set that can be read") as caught:
        load_prompts([str(tmp_path)])
    check_is_one_sentence(str(caught.value))


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a")
    path.chmod(0)
    with pytest.raises(UsageError, match="cannot be read"):
        load_prompts([str(path)])


def test_null_in_parquet_names_the_row(tmp_path: Path) -> None:
    import pandas

    pandas.DataFrame({"prompt": ["a", None, "c"]}).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(UsageError, match=r"row 2 of .* has no prompt"):
        load_prompts([f"{tmp_path}/p.parquet"])
    assert len(load_prompts([f"{tmp_path}/p.parquet::[2:]"])) == 1


def test_parquet_whose_text_is_no_text(tmp_path: Path) -> None:
    import pandas

    pandas.DataFrame({"prompt": ["a first prompt", "a second prompt"]}).to_parquet(
        tmp_path / "p.parquet", compression=None, engine="pyarrow"
    )
    data = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(data.replace(b"a second prompt", b"a \xffecond prompt"))
    with pytest.raises(UsageError, match=r"p\.parquet is not a readable Parquet file"):
        load_prompts([f"{tmp_path}/p.parquet"])


@pytest.mark.parametrize(
    ("toxic", "benign", "says"),
    [
        (BAD, [], "no benign prompts: add --benign"),
        ([], GOOD, "no toxic prompts: add --toxic"),
        (BAD[:7], GOOD, "only 7 different toxic prompts: give at least 8"),
        (BAD, ["same"] * 20, "only 1 different benign prompts"),
        (BAD, [*GOOD, BAD[3].upper()], "'A BAD PROMPT NUMBER 3' is given both as toxic .* and as benign"),
        ({str(i): [text] for i, text in enumerate(BAD)}, GOOD, "the validation split has no toxic|the train split"),
        (BAD, [*GOOD, ""], "item 11 of benign is an empty prompt"),
        (BAD, [*GOOD, "x" * 20_001], "item 11 of benign is 20,001 characters long"),
        (BAD, [*GOOD, 5], "item 11 of benign is not text but int"),
        ("one string", GOOD, "toxic prompts are one string"),
    ],
)
def test_lists_that_make_no_set(toxic: list[str], benign: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        PromptSet.from_lists(toxic, benign)
    check_is_one_sentence(str(caught.value))


def test_one_side_of_files_only(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(BAD))
    with pytest.raises(UsageError, match="no benign prompts"):
        PromptSet.load([f"{tmp_path}/p.txt"], [])
    with pytest.raises(UsageError, match=r"given both as toxic .* in p and p-2"):
        PromptSet.load([f"{tmp_path}/p.txt"], [f"{tmp_path}/p.txt"])
    with pytest.raises(UsageError, match="no prompts were given"):
        load_prompts([], [])


ROW = {"text": "a", "benign": True, "source": "s", "split": "train"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**ROW, "split": "exam"}, "line 2 of .* split 'exam'"),
        ({**ROW, "benign": "yes"}, "line 2 of .* needs the fields"),
        ({"text": "a"}, "line 2 of .* needs the fields"),
        ({**ROW, "id": "0" * 12}, "line 2 of .* id that is not its text's"),
        ({**ROW, "text": "first", "split": "test"}, "line 2 of .* repeats a prompt of another split"),
        ({**ROW, "text": "first", "benign": False}, "both as toxic"),
        ({**ROW, "text": " "}, "line 2 of .* is an empty prompt"),
        ({**ROW, "text": "\ud83d"}, "line 2 of .* surrogate"),
    ],
)
def test_jsonl_that_is_no_prompt_set(tmp_path: Path, row: dict[str, object], says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({**ROW, "text": "first"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=says) as caught:
        PromptSet.from_jsonl(path)
    check_is_one_sentence(str(caught.value))
