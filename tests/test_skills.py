"""Probes: what counts as right, what a file of them must hold, and shares per skill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import chat_model, tiny_tokenizer
from llmva.errors import UsageError
from llmva.evaluation.skills import Probe, load_probes, measure_skills
from llmva.models.batching import Batching
from llmva.models.generate import capture
from llmva.models.sublayers import find_decoder
from test_generate import sized


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("7", "7", True),
        ("7", "7 is the sum.", True),
        ("7", "77", False),
        ("7", "the sum is 7", False),
        ("Yes", "yes, it is", True),
        ("yes it is", "Yes - it  IS!", True),
        ("yes it is", "yes it", False),
        ("Straße", "STRASSE", True),
        ("yes", "", False),
    ],
)
def test_expected_opens_the_answer(expected: str, answer: str, right: bool) -> None:
    assert Probe("s", "p", expected).right(answer) is right


@pytest.mark.parametrize(
    ("contains", "answer", "right"),
    [
        (("door", "lamp"), "A lamp, and a door.", True),
        (("door", "lamp"), "a door", False),
        (("door",), "doors", False),
        (("Paris",), "it is PARIS", True),
        (("New York",), "in new york city", True),
        (("New York",), "in york", False),
        (("door",), "", False),
    ],
)
def test_contains_is_every_word_in_any_case(contains: tuple[str, ...], answer: str, right: bool) -> None:
    assert Probe("s", "p", contains=contains).right(answer) is right


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    rows = [
        {"skill": "sum", "prompt": "2 and 5 ?", "expected": "7"},
        {"skill": "words", "prompt": "name them", "contains": ["door", "lamp"], "note": "other fields are ignored"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert load_probes(path) == [Probe("sum", "2 and 5 ?", "7"), Probe("words", "name them", None, ("door", "lamp"))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no probe"),
        ("[]", "no probe"),
        ("3", "no probe"),
        ('{"skill": "s", "expected": "a"}', "no probe"),
        ('{"prompt": "p", "expected": "a"}', "no probe"),
        ('{"skill": "s", "prompt": 4, "expected": "a"}', "no probe"),
        ('{"skill": ["s"], "prompt": "p", "expected": "a"}', "no probe"),
        ('{"skill": "s", "prompt": "p", "expected": 7}', "no probe"),
        ('{"skill": "s", "prompt": "p", "contains": "door"}', "no probe"),
        ('{"skill": "s", "prompt": "p", "contains": 3}', "no probe"),
        ('{"skill": "s", "prompt": "p", "contains": [3]}', "no probe"),
        ('{"skill": "s", "prompt": "p"}', "neither"),
        ('{"skill": "s", "prompt": "p", "contains": []}', "neither"),
        ('{"skill": "s", "prompt": "p", "expected": ""}', "neither"),  # every answer would be right
        ('{"skill": "s", "prompt": "p", "expected": "..."}', "neither"),
        ('{"skill": "s", "prompt": "p", "contains": ["?"]}', "neither"),
    ],
)
def test_bad_lines_are_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text('{"skill": "s", "prompt": "p", "expected": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=rf"Line 2 of .*{words}") as caught:
        load_probes(path)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"skill": "é"}'.encode("latin-1"))
    for path in (tmp_path / "none.jsonl", tmp_path, latin):
        with pytest.raises(UsageError, match="cannot be read"):
            load_probes(path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UsageError, match="holds no probes"):
        load_probes(empty)


def test_shares_per_skill(model: object) -> None:
    decoder, tokenizer = find_decoder(sized(model)), tiny_tokenizer()
    prompts = ["open the door", "trap", "fix a lamp"]
    answers = capture(decoder, tokenizer, prompts, max_new_tokens=32).answers
    probes = [
        Probe("first", prompts[0], answers[0]),
        Probe("first", prompts[1], "never said"),
        Probe("second", prompts[2], contains=tuple(answers[2].split()[:2])),
    ]
    found = measure_skills(chat_model(decoder, tokenizer, Batching(1000)), probes)
    assert found == {"first": {"right": 0.5, "n": 2}, "second": {"right": 1.0, "n": 1}}
    assert measure_skills(chat_model(decoder, tokenizer, Batching(1000)), []) == {}
