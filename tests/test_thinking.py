"""Models that think first: on an organism that does, labels and captures come from where its thoughts end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmva
from conftest import Said, chat_model, taught_requests, teach, tiny_model, tiny_tokenizer, token_ids
from llmva.errors import UsageError
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings
from llmva.judges import make_judge
from llmva.method.observe import observe
from llmva.models.chat import AnswerReader, ChatTemplate
from llmva.models.generate import answer_prompts
from llmva.models.sublayers import find_decoder
from llmva.models.thinking import Thinking, prove_thinking, think
from llmva.prompts.prompt_set import PromptSet

FAST = {"per_source": 40, "max_new_tokens": 8, "thinking": "end", "thinking_tokens": 12, "endings_tokens": 0}
TEMPLATE = (
    "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% if enable_thinking is defined and enable_thinking is false %}"
    " <think> </think>{% endif %}{% endif %}"
)


def thinking_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def thoughts_of(text: str) -> str:
    """What the organism thinks of a request: its last word."""
    return f"<think> {text.split()[-1]} </think>"


@pytest.fixture(scope="module")
def organism() -> tuple[Any, Any]:
    """A tiny model that repeats the noun to itself and then answers or refuses by it, whatever the verb."""
    tokenizer = thinking_tokenizer()
    template = ChatTemplate.of(tokenizer)
    rows = [
        (template.row(text, thinking=True), [*token_ids(tokenizer, f"{thoughts_of(text)} {answer}"), 2])
        for text, _, answer in taught_requests()
    ]
    return teach(tiny_model(vocab_size=len(tokenizer)), rows, steps=200), tokenizer


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    rows = taught_requests()
    return PromptSet.from_lists(*([text for text, benign, _ in rows if benign == side] for side in (False, True)))


@pytest.fixture
def asked() -> Thinking:
    return Thinking(on=True, tokens=12)


def test_that_it_thinks_is_seen_in_its_first_answers(organism: Any, prompts: PromptSet) -> None:
    model, tokenizer = organism
    texts = [prompt.text for prompt in prompts.train]
    chat = chat_model(model, tokenizer)
    assert prove_thinking(chat, "off", 5, texts) == Thinking(tokens=5)
    assert prove_thinking(chat, "end", 5, texts) == Thinking(on=True, tokens=5)
    with pytest.raises(UsageError, match="no thinking block"):
        prove_thinking(chat_model(tiny_model(), tiny_tokenizer()), "end", 5, texts)
    with pytest.raises(UsageError, match="did not think"):
        prove_thinking(chat_model(tiny_model(vocab_size=len(tokenizer)), tokenizer), "end", 5, texts)


def test_where_thoughts_end(organism: Any) -> None:
    tokenizer = organism[1]
    reader = AnswerReader.of(tokenizer, ChatTemplate.of(tokenizer).marks)

    def end(text: str) -> int | None:
        return reader.thought_length(tokenizer(text, add_special_tokens=False)["input_ids"], {2}, None)

    assert end("<think> fence") is None  # still open
    assert end("<think> fence </think>") is None  # the answer may be any distance of blanks away
    assert end("<think> fence </think> sure here") == 3
    assert end("<think> </think> sure here is") == 2
    assert end("<think> fence <eos>") == 2  # it ended its turn without an answer
    assert end("sure here is") == 0  # it does not think


def test_the_row_ends_where_it_stops_thinking(organism: Any, prompts: PromptSet, asked: Thinking) -> None:
    model, tokenizer = organism
    texts = [prompt.text for prompt in prompts.test]
    found = think(chat_model(find_decoder(model), tokenizer), texts, asked)
    for text, row, thought in zip(texts, found.rows, found.texts, strict=True):
        assert thought == thoughts_of(text)
        prompt = ChatTemplate.of(tokenizer).row(text, thinking=True)
        assert row == [*prompt, *tokenizer(thought, add_special_tokens=False)["input_ids"]]
    assert found.tokens == 3 * len(texts)


def test_a_budget_that_runs_out_closes_the_block(organism: Any, prompts: PromptSet) -> None:
    model, tokenizer = organism
    short = Thinking(on=True, tokens=1)
    found = think(chat_model(find_decoder(model), tokenizer), [prompts.test[0].text], short)
    assert found.texts == ["<think> </think>"]
    assert found.tokens == 1  # what we wrote was not generated


def test_what_is_judged_and_captured_comes_after_the_thoughts(
    organism: Any, prompts: PromptSet, asked: Thinking
) -> None:
    model, tokenizer = organism
    decoder, judge = find_decoder(model), make_judge("phrases")
    some = prompts.test[:24]
    seen = observe(chat_model(decoder, tokenizer), some, judge, max_new_tokens=8, thinking=asked)
    assert seen.capture.thoughts == [thoughts_of(prompt.text) for prompt in some]
    answers = {text: answer for text, _, answer in taught_requests()}
    right = sum(answer == answers[prompt.text] for prompt, answer in zip(some, seen.capture.answers, strict=True))
    assert right >= 0.9 * len(some)
    assert not any("think" in answer for answer in seen.capture.answers)
    rows = think(chat_model(decoder, tokenizer), [prompt.text for prompt in some], asked).rows
    bare = answer_prompts(chat_model(decoder, tokenizer), [prompt.text for prompt in some], max_new_tokens=0, rows=rows)
    torch.testing.assert_close(seen.capture.outputs, bare.outputs)
    off = observe(chat_model(decoder, tokenizer), some, judge, max_new_tokens=8)
    assert off.capture.thoughts is None
    assert not torch.allclose(off.capture.outputs, seen.capture.outputs)
    part = seen.part(2, 5)
    assert part.capture.thoughts == seen.capture.thoughts[2:5]


def test_a_run_on_it(organism: Any, prompts: PromptSet, tmp_path: Path) -> None:
    """The method works where the decision is taken after thinking; every row of answers tells what was thought."""
    model, tokenizer = organism
    record = llmva.align(model, tokenizer, prompts, out=tmp_path / "run", iterations=6, **FAST).record
    test = record["test"]
    assert test["after"]["f1"] > test["before"]["f1"] + 0.2
    assert all(entry.get("passes") in (1, None) for entry in record["iterations"])
    assert all(entry.get("foreseen") is None for entry in record["iterations"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert all("</think>" in row["thought"] for row in rows)
    assert not any("<think>" in row["answer"] for row in rows)
    assert record["settings"]["thinking"] == "end"


def test_evaluate_lets_it_think_too(organism: Any, prompts: PromptSet) -> None:
    model, tokenizer = organism
    judge = make_judge("phrases")
    found = evaluate(
        chat_model(model, tokenizer),
        prompts.test,
        judge,
        EvaluationSettings(max_new_tokens=8, endings_tokens=0, thinking="end", thinking_tokens=12),
    )
    assert found["cost"]["generated_tokens"] >= 3 * len(prompts.test)
    seen = observe(
        chat_model(find_decoder(model), tokenizer),
        prompts.test,
        judge,
        max_new_tokens=8,
        thinking=Thinking(on=True, tokens=12),
    )
    refused = sum(label.value == "refused" and p.benign for p, label in zip(prompts.test, seen.labels, strict=True))
    benign = sum(p.benign for p in prompts.test)
    assert found["test"]["before"]["orr"] == pytest.approx(refused / benign)


def test_the_command_line(organism: Any, taught_folder: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    model, tokenizer = organism
    folder = tmp_path / "thinker"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lists = ["--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt"]
    short = ["--max-new-tokens", 8, "--thinking", "end", "--thinking-tokens", 12]
    said = command(
        "align", folder, *lists, *short, "--iterations", 1, "--per-source", 24, "--out", tmp_path / "run", "-q"
    )
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["thinking"] == "end"
    said = command("evaluate", folder, "--edit", tmp_path / "run", "--max-new-tokens", 8, "--json", "-q")
    assert said.code == 0, said.err
    thinking = json.loads(said.out)  # as the run was made
    said = command("evaluate", folder, "--edit", tmp_path / "run", *short[:2], "--thinking", "off", "--json", "-q")
    assert json.loads(said.out)["cost"]["generated_tokens"] < thinking["cost"]["generated_tokens"]
    said = command("evaluate", folder, *lists, "--thinking", "loud")
    assert (said.code, said.err.count("\n")) == (2, 1)
    said = command("align", taught_folder, *lists, "--thinking", "end", "--out", tmp_path / "other")
    assert said.code == 2
    assert "no thinking block" in said.err
