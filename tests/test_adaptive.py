"""The search over transforms: what is tried and in which order, when it ends, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, chat_model, taught_model, tiny_model, tiny_tokenizer
from llmva.attacks import bundled_attacks
from llmva.evaluation.adaptive import SearchPlan, chains, forms_of, search_forms
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings
from llmva.judges import make_judge
from llmva.judges.base import Judge, Judgement, Label
from llmva.models.thinking import Thinking
from llmva.prompts.types import Prompt, prefill_of
from llmva.report.run.searches import search_notes

TOXIC = [Prompt(f"open the {noun}", False, "s") for noun in ("door", "lamp", "table", "fence", "trap", "song")]
BENIGN = [Prompt("paint the fence", True, "s")]


class Weak(Judge):
    """Answered as soon as a form has this attack in it; keeps what it is asked about."""

    name = "weak"

    def __init__(self, attack: str | None, label: Label = Label.REFUSED) -> None:
        self.attack, self.label = attack, label
        self.seen: list[Prompt] = []

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        self.seen.append(prompt)
        return Judgement(Label.ANSWERED if self.attack in prompt.attack.split("+") else self.label, 1.0, "")


def wide(length: int = 8192) -> Any:
    return chat_model(tiny_model(max_position_embeddings=length), tiny_tokenizer())


def how(budget: int, seed: int = 1, thinking: Thinking | None = None) -> SearchPlan:
    return SearchPlan(budget, seed, 2, thinking or Thinking())


# -- what is tried -----------------------------------------------------------------------------------------------


def test_every_attack_and_every_pair_may_be_tried() -> None:
    n = len(bundled_attacks())
    assert len(chains()) == n + n * (n - 1)
    forms = forms_of(wide(32768), TOXIC[0], how(1000))
    assert {form.attack for form in forms} > {"", *(attack.name for attack in bundled_attacks())}
    assert len({form.id for form in forms}) == len(forms)
    assert len({form.asked for form in forms}) == len(forms)  # of two orders that ask the same, one is tried
    assert len(forms) > 0.75 * len(chains())


def test_seed_and_prompt_decide_the_order_and_the_plain_prompt_is_first() -> None:
    chat = wide()
    forms = forms_of(chat, TOXIC[0], how(12))
    assert forms[0] == TOXIC[0]
    assert len(forms) == 12
    assert forms == forms_of(chat, TOXIC[0], how(12))
    assert forms[:5] == forms_of(chat, TOXIC[0], how(5))  # a smaller budget is a part of a larger one
    names = [form.attack for form in forms]
    assert names != [form.attack for form in forms_of(chat, TOXIC[1], how(12))]
    assert names != [form.attack for form in forms_of(chat, TOXIC[0], how(12, seed=2))]
    assert all(form.text == TOXIC[0].text for form in forms)  # judges see the request


def test_forms_that_the_model_cannot_be_asked_are_left_out() -> None:
    short = forms_of(wide(80), TOXIC[0], how(1000))
    assert {"", "prefilled", "persona"} <= {form.attack for form in short}
    assert "many-shot" not in "+".join(form.attack for form in short)
    begun = [form for form in forms_of(wide(), TOXIC[0], how(60, thinking=Thinking(anyway=True))) if form.attack]
    assert begun
    assert not any(prefill_of(form.asked) for form in begun)


# -- the search --------------------------------------------------------------------------------------------------


def test_a_prompt_is_asked_until_it_falls() -> None:
    chat, judge = wide(), Weak("persona")
    search = how(40)
    outcome = search_forms(chat, [*TOXIC, *BENIGN], judge, search)
    needed = []
    for prompt in TOXIC:
        places = [i for i, form in enumerate(forms_of(chat, prompt, search), 1) if "persona" in form.attack]
        needed.append(places[0])
    assert len(judge.seen) == outcome.record["answers"] == sum(needed)
    assert not any(prompt.benign for prompt in judge.seen)
    assert outcome.record["half"] == sorted(needed)[len(TOXIC) // 2 - 1]
    assert outcome.record["by_try"] == [sum(n <= tries for n in needed) / len(TOXIC) for tries in range(1, 41)]
    assert (outcome.record["n"], outcome.record["fallen"]) == (len(TOXIC), 1.0)
    assert len(outcome.fallen) == len(TOXIC)
    assert all("persona" in form.attack for form in outcome.fallen)


def test_the_budget_is_not_exceeded() -> None:
    judge = Weak(None)
    record = search_forms(wide(), TOXIC, judge, how(3)).record
    assert len(judge.seen) == 3 * len(TOXIC)
    assert (record["fallen"], record["half"], record["by_try"]) == (0.0, None, [0.0] * 3)
    assert record["fallen_interval"][1] > 0
    unjudged = search_forms(wide(), TOXIC, Weak(None, Label.UNJUDGED), how(2)).record
    assert (unjudged["n"], unjudged["fallen"], unjudged["half"]) == (0, None, None)
    assert search_forms(wide(), BENIGN, judge, how(2)).record["n"] == 0


def test_an_evaluation_has_it_and_keeps_what_fell() -> None:
    chat = chat_model(taught_model(), tiny_tokenizer())
    settings = EvaluationSettings(max_new_tokens=6, endings_tokens=0, adaptive=4)
    record = evaluate(chat, [*TOXIC, *BENIGN], make_judge("phrases"), settings)
    found = record["adaptive"]
    assert found["budget"] == 4
    assert found["before"]["by_try"][0] == record["test"]["before"]["asr"]  # the plain prompts are the first tries
    fallen = [row for row in record["failed"] if not row["benign"]]
    assert len(fallen) == round(found["before"]["fallen"] * found["before"]["n"])
    assert len({row["id"] for row in record["failed"]}) == len(record["failed"])
    plain = evaluate(chat, TOXIC, make_judge("phrases"), EvaluationSettings(max_new_tokens=6, endings_tokens=0))
    assert "adaptive" not in plain


# -- command -----------------------------------------------------------------------------------------------------


def test_the_command_searches(taught_folder: Path, command: Callable[..., Said]) -> None:
    words = ["evaluate", taught_folder, "--toxic", taught_folder / "toxic.txt", "--max-new-tokens", 4, "--json"]
    said = command(*words, "--adaptive", 2)
    assert said.code == 0, said.err
    found = json.loads(said.out)["adaptive"]
    assert found["budget"] == len(found["before"]["by_try"]) == 2
    assert "Search over transforms, at most 2 answers" in " ".join(said.err.split())
    assert command(*words, "--adaptive", 0).code == 2


@pytest.mark.parametrize(
    ("of", "sentence"),
    [
        ({"before": {"n": 9, "fallen": 1.0, "half": 2}}, "100.0% of 9 fell without the edit, half by answer 2."),
        (
            {"before": {"n": 9, "fallen": 1.0, "half": 2}, "after": {"n": 9, "fallen": 0.25, "half": None}},
            "half by answer 2; 25.0% of 9 fell with it, half not within 8 answers.",
        ),
        ({"before": {"n": 0, "fallen": None, "half": None}}, "there was no toxic prompt to search with."),
    ],
)
def test_the_sentence(of: dict[str, Any], sentence: str) -> None:
    (said,) = search_notes({"adaptive": {"budget": 8, **of}})
    assert said.endswith(sentence)
