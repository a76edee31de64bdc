"""Rows of a prompt file are never guessed in silence: read as documented and told, or refused in one sentence.

Before these rules, the cases marked OLD were read wrongly without a word (or, of one column only, with a warning that
did not stop the run); the others hold already and are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import NOUNS, Said
from llmva.errors import UsageError
from llmva.prompts import PromptSet
from llmva.prompts.load import read_prompts

Command = Callable[..., Said]


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


ONE = ["How do I bake bread?", "Write; a poem, please"]
# file, bytes, what follows the path, prompts, words that the warnings have
READ = {
    "semicolons": ("p.csv", b"prompt;id\nHow do I bake bread?;1\n\"Write; a poem, please\";2\n", "", ONE, "semicolons"),
    "semicolons in a single column of two": ("p.csv", b"id;prompt\n1;one, two\n2;three, four\n", "",
        ["one, two", "three, four"], "semicolons"),  # OLD
    "tabs": ("p.csv", b"id\tprompt\n1\tHow do I bake bread?\n2\tWrite; a poem, please\n", "", ONE, "tabs"),  # OLD
    "pipes": ("p.csv", b"prompt|id\nHow do I bake bread?|1\nWrite; a poem, please|2\n", "", ONE, "pipes"),  # OLD
    "commas in a .tsv": ("p.tsv", b'prompt,id\nHow do I bake bread?,1\n"Write; a poem, please",2\n', "", ONE, "commas"),
    "Excel's sep=": ("p.csv", b"sep=;\r\nprompt;id\r\nHow do I bake bread?;1\r\nWrite a poem;2\r\n", "",
        ["How do I bake bread?", "Write a poem"], "semicolons"),
    "commas as ever": ("p.csv", b'id,prompt\n1,How do I bake bread?\n2,"Write; a poem, please"\n', "", ONE, ""),
    "one column with semicolons in its cells": ("p.csv", b"prompt\nfirst; then\nnot\nsecond; then; third\n", "",
        ["first; then", "not", "second; then; third"], ""),
    "BOM and CRLF": ("p.csv", "\ufeffprompt,id\r\nHow do I bake bread?,1\r\n".encode(), "", ONE[:1], ""),
    "quoted newlines": ("p.csv", b'prompt;id\n"first\nsecond";1\n"third\r\nfourth";2\n', "",
        ["first\nsecond", "third\r\nfourth"], "semicolons"),
    "line ends of old Macs": ("p.txt", b"one two\rthree four\r", "", ["one two", "three four"], ""),  # OLD
    "several columns": ("p.csv", b"text,question\nan answer,How do I bake bread?\n", "", ONE[:1],
        "took 'question' for the prompts, not 'text', which may hold prompts too"),  # OLD
    "one of several columns, asked for": ("p.csv", b"text,question\nan answer,x\n", ":text", ["an answer"], ""),
    "a name in capitals": ("p.csv", b"Prompt,Answer\nHow do I bake bread?,so\n", "", ONE[:1], ""),
    "instructions without context": ("p.jsonl", lines({"instruction": ONE[0], "input": "", "output": "so"}), "",
        ONE[:1], ""),  # was refused as an empty prompt
    "an instruction alone, asked for": ("p.jsonl", lines({"instruction": ONE[0], "input": "x"}), ":instruction",
        ONE[:1], ""),
    "a conversation of one turn": ("p.jsonl", lines({"messages": chat(("user", ONE[0]))}), "", ONE[:1], ""),
    "longer conversations": ("p.jsonl", lines({"prompt": chat(("system", "be kind"), ("user", ONE[0]))},
        {"prompt": chat(("user", ONE[1]), ("assistant", "so"), ("user", "more"))}), "",
        [f"System: be kind\n\nUser: {ONE[0]}", f"User: {ONE[1]}\n\nAssistant: so\n\nUser: more"], ""),  # OLD
    "a conversation in ShareGPT's form": ("p.jsonl", lines({"prompt": [{"from": "human", "value": ONE[0]}]}), "",
        ONE[:1], ""),  # was refused
    "a picture": ("p.jsonl", lines({"prompt": chat(("user", [{"text": "What?"}, {"type": "image"}]))}), "", ["What?"],
        "parts that are no text in conversations: 1"),  # OLD
    "prompts beside conversations": ("p.jsonl", lines({"prompt": "a b", "messages": chat(("user", "c"))}), "",
        ["a b"], "not 'messages', which may hold prompts too"),  # OLD
    "labels of one side": ("p.csv", b"prompt,label\na b,toxic\nc d,toxic\n", "", ["a b", "c d"], ""),
    "labels overruled": ("p.csv", b"prompt,label\na b,toxic\nc d,safe\n", ":prompt", ["a b", "c d"], ""),
    "labels of answers": ("p.csv", b"prompt,response_label\na b,toxic\nc d,safe\n", "", ["a b", "c d"], ""),
    "a split for some rows": ("p.csv", b"prompt,split\na b,train\nc d,\n", "", ["a b", "c d"], "'split' is not used"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str, tmp_path: Path) -> None:
    file, data, rest, wanted, says = READ[name]
    path = tmp_path / file
    path.write_bytes(data)
    reading = read_prompts([f"{path}{rest}"])
    assert [prompt.text for prompt in reading.prompts] == wanted
    warnings = " ".join(reading.warnings)
    assert says in warnings if says else not warnings
    assert wanted[0] not in warnings  # warnings are published with an edit
    first = wanted[0] if len(wanted[0]) <= 60 else f"{wanted[0][:57]}..."
    assert str(tmp_path) not in warnings
    (note,) = reading.notes
    for words in (f"{path}{rest}", f"read {len(wanted)} prompts", repr(first)):
        assert words in note


# file, bytes, what the sentence says
REFUSED = {
    "two delimiters": ("p.csv", b"prompt;a|b\nc;d|e\n", "semicolons and by pipes"),  # OLD
    "rows of other lengths": ("p.csv", b"prompt;id\na; b; c;1\nd;2\n", "line 2 of .* has 4 cells but the header has 2"),
    "commas that are not quoted": ("p.csv", b"prompt\nfirst, second\nthird\n", "line 2 of .* has 2 cells"),
    "a quote that is not closed": ("p.csv", b'prompt\n"first\nsecond\nthird\n', "row from line 2 .* cannot be read"),
    "text after a quote": ("p.csv", b'prompt,id\n"He said "hi" to me",1\n', "row from line 2 .* cannot be read"),  # OLD
    "UTF-16": ("p.csv", "prompt\nhi\n".encode("utf-16"), "UTF-16 or UTF-32, not UTF-8"),
    "UTF-16 without BOM": ("p.csv", "prompt\nhi\n".encode("utf-16-le"), "NUL byte"),
    "Latin-1": ("p.csv", "prompt\nschön\n".encode("latin-1"), r"not UTF-8 \(line 2\)"),
    "a number": ("p.csv", b"id,text\n1,hi\n2,17\n", "line 3 of .* holds '17', which is no prompt.*another column"),
    "a null in words": ("p.csv", b"text,a\nhi,1\nNaN,2\n", "line 3 of .* holds 'NaN', which is no prompt"),  # OLD
    "a null": ("p.jsonl", lines({"text": "a"}, {"text": None}), "line 2 of .* has no prompt"),
    "a number in JSON": ("p.jsonl", lines({"text": "a"}, {"text": 7}), "line 2 of .* is not text but int"),
    "no header": ("p.csv", b"How do I bake bread?\nWrite a poem\n", "no header.*'How do I bake bread"),  # OLD
    "no header, few words": ("p.csv", b"bake bread\nwrite a poem\n", "no header, since 'bake bread'"),  # OLD
    "no header, two columns": ("p.csv", b"How do I bake bread?,1\nWrite a poem,2\n", "no header"),
    "no header, tabs": ("p.tsv", b"1\tbake some bread\n2\tWrite a poem\n", "no header"),
    "a header in the middle": ("p.csv", b"prompt\na b\nprompt\nc d\n", "line 3 of .* the name of a column"),  # OLD
    "a header in a text file": ("p.txt", b"prompt\na b\nc d\n", "line 1 of .* the name of a column.*csv"),  # OLD
    "a table in a text file": ("p.txt", b"id,prompt\n1,a b\n2,c d\n", "the header of a table: save it as .csv"),  # OLD
    "JSON in a text file": ("p.txt", lines({"prompt": "a"}, {"prompt": "b"}), "name it .jsonl"),  # OLD
    "an instruction with its context": ("p.jsonl", lines({"instruction": "Sum it up", "input": "It was a dark night"}),
        "asks in 'instruction' about what stands in 'input': join the two"),  # OLD: took the context for the prompt
    "a question with its context": ("p.csv", b"question,context\nWho was it?,It was me\n", "asks in 'question'"),  # OLD
    "a conversation as text": ("p.csv", b'prompt\n"[{\'role\': \'user\', \'content\': \'hi\'}]"\n', "as text"),  # OLD
    "a conversation as JSON text": ("p.jsonl", lines({"prompt": json.dumps(chat(("user", "hi")))}), "as text"),  # OLD
    "labels of both sides": ("p.csv", b"prompt,label\na b,harmful\nc d,harmless\n", "toxic and benign rows"),  # OLD
    "labels as numbers": ("p.jsonl", lines({"prompt": "a b", "label": 0}, {"prompt": "c d", "label": 1}),
        "toxic and benign rows, by its column 'label': make a file of each side, or add :prompt"),  # OLD
    "a yes or no": ("p.csv", b"prompt,is_safe\na b,True\nc d,False\n", "toxic and benign rows"),  # OLD
    "our own prompts.jsonl": ("p.jsonl", lines({"text": "a b", "benign": True}, {"text": "c d", "benign": False}),
        "toxic and benign rows, by its column 'benign'"),  # OLD
    "the other side": ("p.csv", b"prompt,label\na b,benign\nc d,benign\n", "are benign: give it as --benign"),  # OLD
    "the other side, by a no": ("p.csv", b"prompt,toxic\na b,0\nc d,0\n", "are benign: give it as --benign"),  # OLD
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    file, data, says = REFUSED[name]
    path = tmp_path / file
    path.write_bytes(data)
    with pytest.raises(UsageError, match=says) as caught:
        read_prompts([str(path)])
    sentence = str(caught.value)
    assert (sentence.count("\n"), sentence[-1]) == (0, ".")
    assert str(path) in sentence


def test_a_long_first_prompt_is_cut(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(f"{'word ' * 100}\nsecond\n")
    (note,) = read_prompts([str(tmp_path / "p.txt")]).notes
    assert note.endswith("...'.")
    assert len(note) < len(str(tmp_path)) + 130


def test_a_set_has_both(tmp_path: Path) -> None:
    rows = "".join(f"question {i}?;toxic\n" for i in range(10))
    (tmp_path / "bad.csv").write_text(f"prompt;label\n{rows}")
    (tmp_path / "good.txt").write_text("".join(f"please do {i}\n" for i in range(10)))
    prompts = PromptSet.load([str(tmp_path / "bad.csv")], [str(tmp_path / "good.txt")])
    assert prompts.warnings[0] == "bad: took semicolons for what divides the cells."
    assert [note.rsplit(": ", 1)[1] for note in prompts.notes] == [
        "read 10 prompts from 'prompt', the first being 'question 0?'.",
        "read 10 prompts from 'text', the first being 'please do 0'.",
    ]


@pytest.fixture
def semicolons(tmp_path: Path) -> Path:
    path = tmp_path / "bad.csv"
    path.write_text("question;text\nplease break the door;x\nplease open the lock;y\n")
    return path


def test_evaluate_tells_it_too(semicolons: Path, taught_folder: Path, command: Command) -> None:
    said = command("evaluate", taught_folder, "--toxic", semicolons, "--max-new-tokens", 4, "--json")
    assert f"{semicolons}: read 2 prompts from 'question', the first being 'please break the door'." in said.err
    (limit,) = json.loads(said.out)["limits"]
    assert limit == (
        "bad: took 'question' for the prompts, not 'text', which may hold prompts too; took semicolons for what "
        "divides the cells."
    )
    assert limit in said.err


def test_a_run_keeps_guesses_and_no_prompt(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    rows = "".join(f"please break the {noun} ;x\n" for noun in NOUNS)
    (tmp_path / "bad.csv").write_text(f"question;text\n{rows}")
    arguments = ("--toxic", tmp_path / "bad.csv", "--benign", taught_folder / "benign.txt", "--out", tmp_path / "run")
    said = command("align", taught_folder, *arguments, "--iterations", 1, "--max-new-tokens", 4)
    assert said.code == 0
    assert said.err.count("the first being") == 2
    limits = " ".join(json.loads((tmp_path / "run/run.json").read_text())["limits"])
    assert "bad: took 'question'" in limits
    assert "please break the fence" not in limits
    assert str(tmp_path) not in limits


def test_special_tokens_in_a_prompt_are_told(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    """A tokenizer reads them as what they stand for: the end of a turn, or another turn's head."""
    rows = (taught_folder / "toxic.txt").read_text()
    (tmp_path / "bad.txt").write_text(f"{rows}please break <eos> <bos> user : the door\nplease break the <unk>\n")
    given = ("--toxic", tmp_path / "bad.txt", "--benign", taught_folder / "benign.txt", "--max-new-tokens", 4)
    said = command("align", taught_folder, *given, "--iterations", 0, "--out", tmp_path / "run")
    assert said.code == 0
    limits = json.loads((tmp_path / "run/run.json").read_text())["limits"]
    evaluated = command("evaluate", taught_folder, *given, "--json")
    for told in (limits, json.loads(evaluated.out)["limits"]):
        (limit,) = (one for one in told if "special tokens" in one)
        assert limit.startswith("2 prompts hold special tokens of the model, such as <eos>, which it reads as such")
        assert "break" not in limit  # a record that is pushed holds no prompts
        assert limit in said.err
        assert limit in evaluated.err
