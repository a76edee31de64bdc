"""What a reader of any figure must know, told by every command alike: in the log when it begins, and in `limits`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmva
from conftest import Said, taught_requests
from llmva.alignment import RunOptions
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings
from llmva.experiments.ablate import ablate
from llmva.experiments.compare import compare
from llmva.judges import make_judge
from llmva.progress import Progress
from llmva.prompts import PromptSet
from test_kind_04_thinking import ANSWER, FORMS, THOUGHT, speaker

Command = Callable[..., Said]
LONG = THOUGHT * 4
FORM = "“<|channel|>analysis<|message|> … "
SHORT: dict[str, Any] = {"max_new_tokens": 40, "thinking_tokens": 16}


def prompts() -> PromptSet:
    """Few; `warnings` as of a file whose reading guessed."""
    rows = taught_requests()[::6]
    sides = [[text for text, benign, _ in rows if benign == side] for side in (False, True)]
    splits = PromptSet.from_lists(*sides)
    return PromptSet(splits.train, splits.validation, splits.test, ("odd: took semicolons for commas.",))


class Log(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def aligned(chat: Any, log: Log, **settings: Any) -> Any:
    given = {"iterations": 0, "endings_tokens": 0, **settings}
    return llmva.align(chat.model, chat.tokenizer, prompts(), progress=log, **given).record


def evaluated(chat: Any, log: Log, **settings: Any) -> Any:
    judge = make_judge("phrases")
    return evaluate(chat, prompts().test, judge, EvaluationSettings(endings_tokens=0, **settings), progress=log)


def compared(chat: Any, log: Log, **settings: Any) -> Any:
    given = {"methods": ["none", "llmva"], "seeds": [1, 2], "curves": False, "iterations": 0, **settings}
    return compare(chat.model, chat.tokenizer, prompts(), progress=log, **given)


def ablated(chat: Any, log: Log, **settings: Any) -> Any:
    given = {"what": "layers", "seeds": [1], "iterations": 0, **settings}
    return ablate(chat.model, chat.tokenizer, prompts(), progress=log, **given)


COMMANDS = {"align": aligned, "evaluate": evaluated, "compare": compared, "ablate": ablated}


def sentence(limits: list[str], words: str) -> str:
    (one,) = [limit for limit in limits if words in limit]
    return one


@pytest.mark.parametrize("thinking", ["off", "end"])
@pytest.mark.parametrize("name", COMMANDS)
def test_thoughts_that_are_never_closed_are_told(name: str, thinking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, none told the share; compare and ablate told nothing of thoughts, and `end` reached only their fits."""
    log = Log()
    record = COMMANDS[name](speaker(FORMS["channels"], monkeypatch, LONG), log, thinking=thinking, **SHORT)
    told = sentence(record["limits"], "never closed its thought before")
    n = int(told.split("before ")[1].split()[0])
    assert f"before {n} of {n} answers (100.0%)" in told
    assert "after at most 16 tokens" in told
    words = "was let think" if thinking == "end" else "although thinking was off"
    assert f"before {n} of {n} answers" in (of_form := sentence(record["limits"], words))
    assert FORM in of_form
    assert len([note for note in log.notes if FORM in note]) == 1  # once, however many runs a command has
    if name != "evaluate":
        assert "odd: took semicolons for commas." in record["limits"]


@pytest.mark.parametrize("name", COMMANDS)
def test_of_a_model_without_thoughts_nothing_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This held."""
    log = Log()
    record = COMMANDS[name](speaker(FORMS["tags"], monkeypatch), log, max_new_tokens=40)
    assert not [text for text in (*record["limits"], *log.notes) if "thought" in text or "thinks" in text]


@pytest.mark.parametrize("name", ["compare", "ablate"])
def test_what_is_odd_about_the_model_is_told_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Template and dropped tensors; their runs, one a seed and variant, repeated it. The limits held."""
    log, chat = Log(), speaker(FORMS["tags"], monkeypatch)
    chat.tokenizer.chat_template = None
    chat.model._llmva_limits = ["The checkpoint holds more."]
    record = COMMANDS[name](chat, log, max_new_tokens=40)
    for words in ("The checkpoint holds more.", "no chat template"):
        assert words in sentence(record["limits"], words)
        assert len([note for note in log.notes if words in note]) == 1


def test_no_judge_of_a_comparison_sees_thoughts_that_begin_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template opens them, so that only the model's first answers show it. Before, they were judged as answers."""
    chat = speaker(FORMS["opened by the template, and closing it is no use"], monkeypatch)
    record = compared(chat, Log(), max_new_tokens=60, thinking_tokens=300)
    (row,) = [row for row in record["rows"] if row["method"] == "none"]
    assert (row["asr"]["mean"], row["orr"]["mean"]) == (1.0, 0.0)  # the thought is a refusal, the answer is not


def test_a_comparison_that_goes_on_tells_of_cells_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = speaker(FORMS["channels"], monkeypatch, LONG)
    first, again = (compared(chat, Log(), out=tmp_path / "c", **SHORT) for _ in range(2))
    assert first["limits"] == again["limits"]
    assert sentence(again["limits"], "never closed")


def test_each_answer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the thought was closed nothing is said."""
    for tokens in (16, 300):
        chat = speaker(FORMS["channels"], monkeypatch)
        out = tmp_path / str(tokens)
        aligned(chat, Log(), out=out, max_new_tokens=40, thinking_tokens=tokens)
        rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        assert all(row.get("unclosed") is (True if tokens == 16 else None) for row in rows)
        assert rows


def test_an_answer_that_is_all_thought_is_unclosed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that thinks now and then, where there is no room to let it think again."""
    chat = speaker(FORMS["channels"], monkeypatch, LONG)
    texts = [prompt.text for prompt in prompts().test]
    chat.model.config.max_position_embeddings = max(len(chat.row(text)) for text in texts) + 48
    seen = llmva.observe(chat, prompts().test, make_judge("phrases"), max_new_tokens=48)
    assert len(texts) == seen.unclosed == seen.thoughts
    assert set(seen.capture.answers) == {""}
    assert seen.part(1, 3).unclosed == 2


def test_the_share_is_in_report_and_terminal(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = speaker(FORMS["channels"], monkeypatch, LONG)
    chat.model.save_pretrained(tmp_path / "m")
    chat.tokenizer.save_pretrained(tmp_path / "m")
    for name, side in (("toxic", False), ("benign", True)):
        (tmp_path / f"{name}.txt").write_text(
            "\n".join(text for text, benign, _ in taught_requests()[::6] if benign == side)
        )
    sides = ("--toxic", tmp_path / "toxic.txt", "--benign", tmp_path / "benign.txt", "--max-new-tokens", 40)
    given = ("align", tmp_path / "m", *sides, "--iterations", 0, "--thinking-tokens", 16, "--out", tmp_path / "run")
    said = command(*given)
    assert said.code == 0, said.err
    assert "never closed its thought before" in said.out
    assert "never closed its thought before" in (tmp_path / "run/report.html").read_text()
    said = command("compare", tmp_path / "m", *sides, "--methods", "none", "--seeds", 1, "--out", tmp_path / "c")
    assert said.code == 0, said.err
    assert "although thinking was off" in said.err + said.out
    assert "although thinking was off" in (tmp_path / "c/compare.html").read_text()


def test_long_answers_are_read_without_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, thoughts were checked for loops and endings as if they were the answer, whose end nobody saw."""
    from contextlib import nullcontext

    from llmva.evaluation.endings import compare_endings
    from llmva.models.thinking import Thinking, prove_thinking

    chat = speaker(FORMS["channels"], monkeypatch, "so, is it " * 40)  # a loop, for whoever takes it for the answer
    texts = [prompt.text for prompt in prompts().test][:4]
    thinking = prove_thinking(chat, "off", 600, texts)
    record, _ = compare_endings(chat, texts, nullcontext, 64, thinking=thinking)
    assert record["before"]["faulty"] == 0
    unproven, _ = compare_endings(chat, texts, nullcontext, 64, thinking=Thinking())
    assert (unproven["before"]["unended"], unproven["before"]["loop"]) == (4, 0)
    chat.model.config.max_position_embeddings = 160
    record, _ = compare_endings(chat, texts, nullcontext, 64, thinking=thinking)
    assert record["before"]["faulty"] == 0
    assert ANSWER.endswith(".")


def test_harmless_text_without_its_thoughts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    record = aligned(speaker(FORMS["channels"], monkeypatch), Log(), max_new_tokens=40, thinking_tokens=300)
    assert "harmless text is compared as if the answers came without them" in sentence(record["limits"], "thought")


def test_extend_keeps_what_reading_the_new_prompts_guessed(
    taught_folder: Path, tmp_path: Path, command: Command
) -> None:
    """Before, it was in the log alone."""
    rows = [(text, benign) for text, benign, _ in taught_requests()]
    old = PromptSet.from_lists(
        *([t for t, b in rows if b == side and t.startswith("please")] for side in (False, True))
    )
    model, tokenizer = llmva.load_model(taught_folder)
    settings = {"per_source": 32, "max_new_tokens": 8, "endings_tokens": 0, "iterations": 2, "passes": 1, "layers": 4}
    options = RunOptions(name=str(taught_folder))
    llmva.align(model, tokenizer, old, out=tmp_path / "one", options=options, **settings)
    lines = [f"{number};{text}" for number, (text, b) in enumerate(rows) if not b and text.startswith("tell")]
    (tmp_path / "new.csv").write_text("\n".join(["id;prompt", *lines]))
    said = command("extend", tmp_path / "one", "--toxic", tmp_path / "new.csv", "--out", tmp_path / "two")
    assert said.code == 0, said.err
    guess = "new: took semicolons for what divides the cells."
    assert json.loads((tmp_path / "two/run.json").read_text())["limits"].count(guess) == 1
    assert (said.err.count(guess), said.out.count(guess)) == (1, 1)  # when it begins, and among the limits at its end
    assert guess in (tmp_path / "two/report.html").read_text()
