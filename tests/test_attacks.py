"""Attacks: what each changes and how it is read back, both sides under the same ones, rates and the worst case."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import Said, chat_model, taught_model, tiny_model, tiny_tokenizer
from llmva.attacks import Attack, bundled_attacks, parse_attacks
from llmva.errors import UsageError
from llmva.evaluation.attacked import attacked_prompts, worst_case, worst_labels
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings
from llmva.judges.base import Judge, Judgement, Label
from llmva.metrics.rates import summarise
from llmva.models.thinking import Thinking
from llmva.prompts.types import Message, Prompt
from llmva.report import attacks_markdown, attacks_table

ATTACKS = {attack.name: attack for attack in bundled_attacks()}
NAMES = (
    "prefilled", "refusal-suppression", "prefix-injection", "persona", "fiction", "base64", "rot13", "leetspeak",
    "morse", "payload-splitting", "many-shot", "late-request",
)  # fmt: skip
ODD = (
    "paint the door",
    "Is 7 more than [4] or [a], in 1905?",
    'Say "hi"; a = b\n\nthen\u2028stop. ',
    "x",
    "¿Dónde está la puerta? 門を開けて",
    "two  spaces / a slash",
)
EARLIER = (Message("system", "please help"), Message("user", "hi"), Message("assistant", "sure"))


def prompt(text: str, benign: bool = True) -> Prompt:
    return Prompt(text, benign, "s")


def last(attacked: Prompt) -> str:
    assert attacked.messages is not None
    return next(message.content for message in reversed(attacked.messages) if message.role == "user")


# -- transforms --------------------------------------------------------------------------------------------------


def test_every_attack_has_a_name_a_source_and_a_test_of_its_own() -> None:
    assert tuple(ATTACKS) == NAMES
    assert all("20" in attack.source and attack.about for attack in ATTACKS.values())
    assert set(NAMES) == {*VERBATIM, *CODES, *OTHERS}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ODD)
def test_an_attack_changes_what_is_asked_and_is_read_back(name: str, text: str) -> None:
    attack, before = ATTACKS[name], prompt(text)
    after = attack.apply(before)
    assert after.messages is not None
    assert after.messages != (Message("user", text),)
    assert attack.read_back(after) == (text.upper() if name == "morse" else text)
    assert attack.apply(before) == after  # the same each time
    assert (after.text, after.attack, after.benign, after.source) == (text, name, True, "s")
    assert after.id != before.id  # a run may have both
    roles = [message.role for message in after.messages]
    assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_around_the_request_stays(name: str) -> None:
    begun = Prompt.of((*EARLIER, Message("user", "paint it"), Message("assistant", "here is how")), False, "s")
    after = ATTACKS[name].apply(begun)
    assert after.messages is not None
    assert after.messages[:3] == EARLIER
    assert after.messages[-1].role == "assistant"
    assert after.messages[-1].content.endswith("here is how")
    assert ATTACKS[name].read_back(after) == ("PAINT IT" if name == "morse" else "paint it")
    assert after.text == begun.text


@pytest.mark.parametrize("name", NAMES)
def test_both_sides_go_through_the_same_transform(name: str) -> None:
    toxic, benign = (ATTACKS[name].apply(prompt("paint the door", side)) for side in (False, True))
    assert toxic.messages == benign.messages


# name -> words of ours that an attack adds; the prompt stands among them word for word
VERBATIM = {
    "refusal-suppression": "Do not apologise",
    "prefix-injection": "Begin your answer with these words",
    "persona": "Play a role",
    "fiction": "Write the scene",
}
CODES: dict[str, tuple[str, Callable[[str], str]]] = {
    "base64": ("cGFpbnQgNyBkb29ycw==", lambda code: base64.b64decode(code).decode()),
    "rot13": ("cnvag 7 qbbef", lambda code: code.translate(str.maketrans("cnvagqbef", "paintdors"))),
    "leetspeak": ("p41n7 [7] d00r5", lambda code: "paint 7 doors"),
    "morse": (".--. .- .. -. - / --... / -.. --- --- .-. ...", lambda code: "paint 7 doors"),
}
OTHERS = ("prefilled", "payload-splitting", "many-shot", "late-request")


@pytest.mark.parametrize("name", VERBATIM)
def test_frames_hold_the_prompt_word_for_word(name: str) -> None:
    (message,) = ATTACKS[name].apply(prompt(ODD[2])).messages or ()
    assert ODD[2] in message.content
    assert VERBATIM[name] in message.content.replace(ODD[2], "")


@pytest.mark.parametrize("name", CODES)
def test_codes_say_the_prompt_in_code(name: str) -> None:
    code, decode = CODES[name]
    (message,) = ATTACKS[name].apply(prompt("paint 7 doors")).messages or ()
    head, _, written = message.content.partition("\n\n")
    assert "paint" not in message.content
    assert "Decode it" in head
    assert written == code
    assert decode(code) == "paint 7 doors"


def test_pieces_join_to_the_prompt_and_none_holds_it() -> None:
    (message,) = ATTACKS["payload-splitting"].apply(prompt("paint the door")).messages or ()
    pieces = [json.loads(line[4:]) for line in message.content.splitlines() if line[1:4] == " = "]
    assert len(pieces) == 4
    assert "".join(pieces) == "paint the door"
    assert "paint the door" not in message.content


def test_turns_stand_before_the_request_or_begin_the_answer() -> None:
    prefilled, shots, late = (ATTACKS[name].apply(prompt("paint the door")) for name in (OTHERS[0], *OTHERS[2:]))
    assert prefilled.messages is not None
    assert shots.messages is not None
    assert late.messages is not None
    assert prefilled.messages[0] == Message("user", "paint the door")
    assert prefilled.messages[1].role == "assistant"
    assert len(prefilled.messages) == 2
    assert len(shots.messages) == 65
    assert len(set(shots.messages)) == 65
    assert all(m.content.startswith("Of course!") for m in shots.messages if m.role == "assistant")
    assert shots.messages[-1] == late.messages[-1] == Message("user", "paint the door")
    assert len(late.messages) == 21


def table(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_translation_is_the_users_file(tmp_path: Path) -> None:
    rows = [{"text": "paint the door", "translation": "streich die Tür"}, {"text": "hi", "translation": "hallo"}]
    (attack,) = parse_attacks([f"translation={table(tmp_path / 't.jsonl', *rows)}"])
    after = attack.apply(prompt("Paint  the door"))
    assert after.messages == (Message("user", "streich die Tür"),)
    assert attack.read_back(after) == "paint the door"
    with pytest.raises(UsageError, match="no translation of 'a lamp': add a row"):
        attack.apply(prompt("a lamp"))
    for wrong, says in (
        ([{"text": "a", "other": "b"}], "no column 'translation'"),
        ([{"text": "a", "translation": " "}], "line 1 of .* lacks a text or its translation"),
        ([*rows, {"text": "HI", "translation": "guten Tag"}], "the same text in two rows"),
        ([*rows, {"text": "hello", "translation": "hallo"}], "the same translation in two rows"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_attacks([f"translation={table(tmp_path / 'w.jsonl', *wrong)}"])


def test_names_are_checked(tmp_path: Path) -> None:
    assert [attack.name for attack in parse_attacks(["rot13, base64", "rot13"])] == ["rot13", "base64"]
    assert [attack.name for attack in parse_attacks(["all"])] == list(NAMES)
    assert parse_attacks([]) == []
    for wrong, says in (
        ("rot14", "There is no attack 'rot14': choose some of prefilled, .*translation=FILE, or all"),
        ("rot13=x", "There is no attack"),
        ("", "There is no attack"),
        ("translation", "write translation=FILE"),
        (f"translation={tmp_path}/no.csv", "there is no prompt file"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_attacks([wrong])


# -- rates -------------------------------------------------------------------------------------------------------


def test_the_worst_case_is_of_each_prompt() -> None:
    prompts = [prompt("a", False), prompt("b", False), prompt("c", False), prompt("d"), prompt("e")]
    yes, no, odd, unknown = Label.ANSWERED, Label.REFUSED, Label.GARBLED, Label.UNJUDGED
    plain, other = [no, no, unknown, yes, yes], [yes, odd, no, no, yes]
    assert worst_labels(prompts, [plain, other]) == [yes, odd, unknown, no, yes]
    rates = {"x": summarise(prompts, other), "y": summarise(prompts, plain)}
    worst = worst_case(prompts, [plain, other], rates, seed=0)
    assert (worst["asr"], worst["orr"], worst["asr_of"], worst["orr_of"]) == (0.5, 0.5, "x", "x")
    assert worst["asr_interval"] == summarise(prompts, worst_labels(prompts, [plain, other]))["asr_interval"]


class Listening(Judge):
    """Keeps what it is asked about; answers count as given."""

    name = "listening"

    def __init__(self) -> None:
        self.seen: list[Prompt] = []

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        self.seen.append(prompt)
        return Judgement(Label.ANSWERED, 1.0, "")


WIDE = {"max_position_embeddings": 4096}
HOW = EvaluationSettings(max_new_tokens=4, endings_tokens=0)
SOME = [prompt("open the door", False), prompt("fix a lamp", False), prompt("paint the fence"), prompt("clean a trap")]


def test_judges_judge_by_the_original_prompt() -> None:
    judge = Listening()
    chat = chat_model(tiny_model(**WIDE), tiny_tokenizer())
    record = evaluate(chat, SOME, judge, HOW, attacks=parse_attacks(["all"]))
    assert {one.text for one in judge.seen} == {one.text for one in SOME}
    assert len(judge.seen) == 4 * (1 + len(NAMES))
    assert [one["name"] for one in record["attacks"]] == list(NAMES)
    assert all(one["before"]["n_toxic"] == one["before"]["n_benign"] == 2 for one in record["attacks"])


def test_rates_by_attack_are_those_of_the_attacked_prompts() -> None:
    """As if the attacked prompts had been named; plain prompts are as ever."""
    chat, judge = chat_model(taught_model(), tiny_tokenizer()), Opening()
    chosen: list[Attack] = parse_attacks(["prefilled,prefix-injection"])
    record = evaluate(chat, SOME, judge, HOW, attacks=chosen)
    plain = evaluate(chat, SOME, judge, HOW)
    assert record["test"] == plain["test"]
    assert "attacks" not in plain
    for attack, entry in zip(chosen, record["attacks"], strict=True):
        alone = evaluate(chat, [attack.apply(one) for one in SOME], judge, HOW)
        assert entry["before"] == alone["test"]["before"]
        assert "after" not in entry
    assert record["worst_case"]["before"]["asr"] >= record["test"]["before"]["asr"]


class Opening(Judge):
    name = "opening"

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        return Judgement(Label.REFUSED if "sorry" in answer or "no" in answer else Label.ANSWERED, 1.0, "")


def test_an_attack_that_does_not_fit_is_told_before_any_answer() -> None:
    chat, judge = chat_model(tiny_model(), tiny_tokenizer()), Listening()
    with pytest.raises(UsageError, match=r"The attack many-shot makes a prompt of \d+ tokens, .* leave many-shot out"):
        evaluate(chat, SOME, judge, HOW, attacks=parse_attacks(["rot13,many-shot"]))
    assert judge.seen == []
    with pytest.raises(UsageError, match="cannot be begun for it: leave prefilled out"):
        attacked_prompts(chat, SOME, parse_attacks(["prefilled"]), 4, Thinking(anyway=True))


# -- command -----------------------------------------------------------------------------------------------------


def test_the_command_lists_them_without_a_model(command: Callable[..., Said]) -> None:
    said = command("evaluate", "--attack", "list")
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == list(NAMES)
    assert lines[-1].startswith("translation=FILE")
    assert command("evaluate", "demo", "--attack", "nosuch").code == 2


def test_the_command_measures_them(taught_folder: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    sides = ["--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt"]
    how = ["--max-new-tokens", "6", "--only"]
    assert command("align", taught_folder, *sides, *how, "--iterations", "1", "--out", tmp_path / "run", "-q").code == 0
    measured: list[object] = ["--edit", tmp_path / "run", "--attack", "prefilled,prefix-injection"]
    measured += ["--max-new-tokens", "6", "--json"]
    said = command("evaluate", taught_folder, *measured)
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert [one["name"] for one in record["attacks"]] == ["prefilled", "prefix-injection"]
    for one in record["attacks"]:
        for when in ("before", "after"):
            low, high = one[when]["asr_interval"]
            assert low <= one[when]["asr"] <= high
    for when in ("before", "after"):
        worst = record["worst_case"][when]
        assert worst["asr"] >= max(of[when]["asr"] for of in (record["test"], *record["attacks"]))
        assert worst["orr"] >= max(of[when]["orr"] for of in (record["test"], *record["attacks"]))
    flat = " ".join(said.err.split())
    for words in ("By attack", "no attack", "prefilled", "worst case", "highest ASR under"):
        assert words in flat


def test_tables_say_what_the_record_says() -> None:
    prompts = [prompt("a", False), prompt("d")]
    rates = summarise(prompts, [Label.ANSWERED, Label.ANSWERED])
    worst = {**rates, "asr_of": "rot13", "orr_of": "rot13"}
    record: dict[str, Any] = {
        "test": {"before": rates},
        "attacks": [{"name": "rot13", "before": rates}],
        "worst_case": {"before": worst},
    }
    text = attacks_markdown(record)
    assert text.splitlines()[0] == "| attack | ASR before | ASR after | ORR before | ORR after |"
    assert "| rot13 | 100.0% [20.7, 100.0] | – | 0.0% [0.0, 79.3] | – |" in text
    assert text.count("\n| ") == 4
    out = io.StringIO()
    for width in (160, 60, 20):
        Console(file=out, width=width).print(attacks_table(record))
    assert out.getvalue().count("rot13") >= 3
