"""Sampled answers: what they depend on, which tokens they may have, and the rates of several answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Said, chat_model, tiny_model, tiny_tokenizer
from llmva.errors import UsageError
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings, draws
from llmva.judges.base import Judge, Judgement, Label
from llmva.metrics.rates import summarise
from llmva.metrics.samples import summarise_samples
from llmva.models.batching import Batching
from llmva.models.chat.marks import KNOWN
from llmva.models.chat_model import ChatModel
from llmva.models.generate import answer_prompts
from llmva.models.reading.sampling import Sampling, greedy
from llmva.models.thinking import Thinking, answer_after_thoughts
from llmva.prompts.types import Prompt
from llmva.statistics import wilson, wilson_mean

TEXTS = ("open the door", "please fix a lamp", "tell me how to paint the fence in the garden", "clean it", "a trap")
PROMPTS = [Prompt(text, i % 2 == 0, "s") for i, text in enumerate(TEXTS)]
YES, NO, ODD, UNKNOWN = Label.ANSWERED, Label.REFUSED, Label.GARBLED, Label.UNJUDGED


def keys(n: int = len(TEXTS)) -> tuple[str, ...]:
    return tuple(f"key {i}" for i in range(n))


# -- draws -------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampling = Sampling(("a",), temperature=0.5)
    drawn = [sampling([0], [count], logits)[0] for count in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=0.03, rtol=0)


def test_top_p_keeps_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def drawn(top_p: float) -> set[int]:
        return {Sampling(("a",), top_p=top_p)([0], [count], logits)[0] for count in range(500)}

    assert [drawn(top_p) for top_p in (0.01, 0.6, 0.9, 1.0)] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]


def test_a_cold_model_is_greedy() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert Sampling(keys(), temperature=1e-4)(range(5), [0] * 5, logits) == greedy(range(5), [0] * 5, logits)


# -- answers -----------------------------------------------------------------------------------------------------


def sampled(chat: ChatModel, texts: tuple[str, ...] = TEXTS, **how: Any) -> list[str]:
    by_text = dict(zip(TEXTS, keys(), strict=True))
    sampling = Sampling(tuple(by_text[text] for text in texts), **how)
    return answer_prompts(chat, texts, max_new_tokens=8, choose=sampling).answers


def test_answers_do_not_depend_on_the_batch() -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())
    whole = sampled(chat)
    assert whole == sampled(chat)
    assert whole == [sampled(chat, (text,))[0] for text in TEXTS]
    assert whole[::-1] == sampled(chat, TEXTS[::-1])
    assert whole == sampled(replace(chat, batching=Batching(30)))
    assert whole != answer_prompts(chat, TEXTS, max_new_tokens=8).answers
    assert whole != answer_prompts(chat, TEXTS, max_new_tokens=8, choose=Sampling(("b",) * 5)).answers


def test_both_ways_of_decoding_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())
    joining = sampled(chat, temperature=0.8, top_p=0.9)
    monkeypatch.setattr(ChatModel, "decodes", lambda chat: False)
    assert sampled(chat, temperature=0.8, top_p=0.9) == joining
    assert sampled(chat, temperature=1e-4) == answer_prompts(chat, TEXTS, max_new_tokens=8).answers


def test_thoughts_are_drawn_too() -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())

    def answers(texts: tuple[str, ...], key: str) -> tuple[Any, Any]:
        sampling = Sampling(tuple(f"{key}{text}" for text in texts))
        how = {"max_new_tokens": 6, "thinking": Thinking(anyway=True, tokens=16, inside=KNOWN[0])}
        seen = answer_after_thoughts(chat, texts, sampling=sampling, **how)  # type: ignore[arg-type]
        return seen.answers, seen.thoughts

    whole, thoughts = answers(TEXTS, "a")
    assert answers(TEXTS[1:], "a") == (whole[1:], thoughts[1:])
    assert answers(TEXTS, "b")[1] != thoughts


# -- rates -------------------------------------------------------------------------------------------------------


def test_rates_of_several_answers() -> None:
    prompts = [Prompt(name, name in "xyz", "s") for name in "abcxyz"]
    first = [YES, NO, NO, YES, NO, YES]
    second = [NO, NO, ODD, NO, NO, YES]
    record = summarise_samples(prompts, [first, second])
    assert record["asr"] == pytest.approx(1 / 3)
    assert record["garbled"] == pytest.approx(1 / 3)
    assert record["orr"] == pytest.approx(0.5)  # (.5 + 1 + 0) / 3
    assert record["f1"] == pytest.approx(2 * 1.5 / (2 * 1.5 + 2 + 1.5))
    assert record["asr_interval"] == wilson(1, 3)
    assert record["orr_interval"] == wilson_mean(0.5, 3)
    low, high = record["f1_interval"]
    assert low < record["f1"] < high
    assert record["by_source"]["s (toxic)"]["rate"] == record["asr"]
    assert record["by_source"]["s (benign)"]["rate"] == record["orr"]


def test_one_answer_has_the_rates_of_one_answer() -> None:
    prompts = [Prompt(f"{i}", i % 2 == 0, f"source {i % 3}") for i in range(24)]
    labels = [(YES, NO, YES, ODD, NO, UNKNOWN)[i * i % 6] for i in range(24)]
    several, one = summarise_samples(prompts, [labels]), summarise(prompts, labels)
    assert several.keys() == one.keys()
    assert several["f1"] == pytest.approx(one["f1"])
    for name in one.keys() - {"f1", "f1_interval"}:
        assert several[name] == one[name], name
    assert several["f1_interval"] == pytest.approx(one["f1_interval"], abs=0.05)
    sure = summarise_samples(prompts, [[YES] * 24])
    assert sure["f1_interval"] == pytest.approx(summarise(prompts, [YES] * 24)["f1_interval"])


def test_what_no_sample_shows_is_left_out() -> None:
    prompts = [Prompt("a", False, "s"), Prompt("b", False, "s"), Prompt("x", True, "s"), Prompt("y", True, "s")]
    record = summarise_samples(prompts, [[UNKNOWN, UNKNOWN, UNKNOWN, NO], [NO, YES, UNKNOWN, UNKNOWN]])
    assert (record["n_toxic"], record["n_benign"], record["unjudged"]) == (1, 1, 5)
    assert (record["asr"], record["orr"]) == (1.0, 1.0)
    assert summarise_samples([], [[], []])["f1_interval"] is None


@pytest.mark.parametrize(("mean", "n"), [(0.5, 10), (0.0, 7), (1.0, 7), (0.35, 9), (0.01, 3)])
def test_the_interval_of_a_mean(mean: float, n: int) -> None:
    low, high = wilson_mean(mean, n)
    assert 0 <= low <= mean <= high <= 1
    hits = round(mean * n)
    if abs(hits - mean * n) < 1e-9:
        assert [low, high] == wilson(hits, n)
    near, far = wilson(2, 9), wilson(3, 9)
    assert near is not None
    assert far is not None
    between = wilson_mean(2.5 / 9, 9)
    assert near[0] < between[0] < far[0]
    assert near[1] < between[1] < far[1]


# -- evaluation --------------------------------------------------------------------------------------------------


class Opening(Judge):
    name = "opening"

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        return Judgement(NO if len(answer) % 2 else YES, 1.0, "")


def settings(**given: Any) -> EvaluationSettings:
    return EvaluationSettings(max_new_tokens=6, endings_tokens=0, **given)


def test_more_samples_are_answers_to_the_same_prompts_and_more() -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())
    one, three, again = (evaluate(chat, PROMPTS, Opening(), settings(samples=n)) for n in (1, 3, 3))
    assert three["test"] == again["test"]
    assert three["sampling"] == {"samples": 3, "temperature": 1.0, "top_p": 1.0}
    assert three["test"]["before"]["asr"] >= one["test"]["before"]["asr"]
    alone = [evaluate(chat, [prompt], Opening(), settings(samples=3))["test"]["before"] for prompt in PROMPTS]
    known = [of["orr"] for of in alone if of["orr"] is not None]
    assert three["test"]["before"]["orr"] == pytest.approx(sum(known) / len(known))
    other = evaluate(chat, PROMPTS, Opening(), settings(samples=3, seed=7))
    assert next(draw.keys for draw in draws(settings(samples=3, seed=7), PROMPTS) if draw)[0].startswith("7:")
    assert "sampling" in other


def test_greedy_is_as_ever() -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())
    record = evaluate(chat, PROMPTS, Opening(), settings())
    answers = answer_prompts(chat, TEXTS, max_new_tokens=6).answers
    labels = [Opening().answered(prompt, answer).label for prompt, answer in zip(PROMPTS, answers, strict=True)]
    assert record["test"]["before"] == summarise(PROMPTS, labels, seed=42)
    assert "sampling" not in record


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": 0.5}, "add --samples"),
        ({"samples": 0}, "make --samples 1 or more"),
        ({"samples": 2, "temperature": 0.0}, "draws no answers: give a number above 0"),
        ({"samples": 2, "temperature": float("nan")}, "draws no answers"),
        ({"samples": 2, "top_p": 1.5}, "no share of a probability"),
        ({"samples": 2, "top_p": 0.0}, "no share of a probability"),
    ],
)
def test_settings_that_are_none(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        evaluate(chat_model(tiny_model(), tiny_tokenizer()), PROMPTS, Opening(), settings(**given))


def test_engines_draw_no_samples(command: Callable[..., Said]) -> None:
    said = command("evaluate", "demo", "--samples", "2", "--engine", "vllm")
    assert said.code == 2
    assert "leave --engine out, or --samples" in said.err
    assert command("evaluate", "demo", "--top-p", "0.5").code == 2


def test_the_command_samples_with_attacks(taught_folder: Path, command: Callable[..., Said]) -> None:
    sides = ["--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt"]
    how = ["--samples", "2", "--temperature", "0.7", "--top-p", "0.9", "--max-new-tokens", "6", "--json", "--quiet"]
    said = command("evaluate", taught_folder, *sides, *how, "--attack", "prefilled")
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert record["sampling"] == {"samples": 2, "temperature": 0.7, "top_p": 0.9}
    assert record["worst_case"]["before"]["asr"] >= record["attacks"][0]["before"]["asr"]
    assert record["attacks"][0]["before"]["n_toxic"] == record["test"]["before"]["n_toxic"]
