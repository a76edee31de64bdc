"""Long answers: loops and broken endings are told from healthy ones, on texts and on models that an edit breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from conftest import chat_model, taught_model, taught_requests, tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.evaluation import endings
from llmva.evaluation.endings import PROMPTS, LongAnswer, breaks_off, compare_endings, fault, loops
from llmva.evaluation.sampled import EvaluationSettings
from llmva.models.batching import Batching
from llmva.models.sublayers import find_decoder
from llmva.report import before_after_table, render
from test_harmless import random_edit

ROOMY = 100_000
ASKED = [text for text, benign, _ in taught_requests() if benign][:PROMPTS]


def answer(text: str, tokens: Sequence[int] = (), ended: bool = True) -> LongAnswer:
    return LongAnswer(text, tuple(tokens or range(len(text.split()))), ended)


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([*range(10), *[7] * 24], True),
        ([*range(10), *[7] * 23], False),  # a row of dots
        ([*range(10), *[1, 2, 3] * 8], True),
        ([*[1, 2, 3] * 20, *range(10)], False),  # it came out of it
        ([*range(100), *[*range(30)] * 4], True),
        ([*range(100), *[*range(30)] * 3], False),
        ([5, *range(13), 6, *range(13), 7, *range(13), 8, *range(13)], False),  # a list whose numbers rise
        ([*range(10), *[1, 2, 3] * 9, 1], True),  # the limit fell into a turn
        ([], False),
    ],
)
def test_loops_of_tokens(tokens: list[int], looping: bool) -> None:
    assert loops(tokens) == looping


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("First loosen the nut. Then take off the whe", True),
        ("You need three things: flour, water,", True),
        ("Here is the code:\n```python\nprint(1)", True),
        ("Here is the list:", True),
        ("Look (at the", False),  # no finished sentence, so it may be a title
        ("It is called (", True),
        ("Paris", False),
        ("42", False),
        ("The capital is Paris", False),
        ("First loosen the nut. Then take off the wheel.", False),
        ('He said: "It is done."', False),
        ("Steps. In order:\n1. Loosen the nut\n2. Take off the wheel", False),
        ("Here it is. Enjoy.\n```python\nprint(1)\n```", False),
        ("まず外します。次に洗い", True),
        ("まず外します。次に洗います。", False),
        ("I like it! \N{GRINNING FACE}", False),
        ("This is **bold. And this is it.**", False),
        ("", False),
    ],
)
def test_endings_of_texts(text: str, broken: bool) -> None:
    assert breaks_off(text) == broken


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (answer("", ended=True), "empty"),
        (answer(" ... "), "empty"),
        (answer("and then we go on " * 20, ended=False), "loop"),  # by its words
        (answer("soup", [1, 2] * 20, ended=False), "loop"),  # by its tokens
        (answer("A long story that goes on and", ended=False), "unended"),
        (answer("It starts well. Then it sto"), "broken_off"),
        (answer("It starts well. Then it ends."), None),
    ],
)
def test_faults(given: LongAnswer, found: str | None) -> None:
    assert fault(given) == found


def compare(model: Any, applied: Callable[[], AbstractContextManager[Any]], **options: Any) -> tuple[Any, int]:
    batching = Batching(options.pop("tokens", ROOMY))
    return compare_endings(
        chat_model(find_decoder(model), tiny_tokenizer(), batching), ASKED, applied, options.pop("most", 64), **options
    )


def test_a_model_without_an_edit_ends_as_it_did() -> None:
    done: list[int] = []
    found, tokens = compare(taught_model(), nullcontext, on_progress=done.append)
    assert found["before"] == found["after"]
    assert (found["n"], found["tokens"], found["before"]["faulty"], found["examples"]) == (PROMPTS, 64, 0, [])
    assert found["before"]["faulty_interval"][0] == 0.0
    assert sum(done) == 2 * PROMPTS
    assert PROMPTS * 2 < tokens < PROMPTS * 2 * 20  # they end long before the limit


def test_an_edit_that_makes_answers_loop_is_told() -> None:
    """It pushes one word at every position, so that no answer ends any more."""
    model = taught_model()
    decoder = find_decoder(model)
    word = model.get_output_embeddings().weight[tiny_tokenizer().convert_tokens_to_ids("garden")].clone()
    last = decoder.sublayers[-1].output

    class Pushed:
        def __enter__(self) -> None:
            self.handle = last.register_forward_hook(lambda module, args, output: output + 1000 * word)

        def __exit__(self, *error: object) -> None:
            self.handle.remove()

    found, _ = compare(model, Pushed)
    assert found["before"]["faulty"] == 0
    assert found["after"]["faulty"] == found["after"]["loop"] == PROMPTS
    assert found["after"]["faulty_interval"] == [pytest.approx(0.806, abs=1e-3), 1.0]
    assert [one["fault"] for one in found["examples"]] == ["loop"] * 3
    example = found["examples"][0]
    assert example["prompt"] == ASKED[0]
    assert "how to do it" in example["before"]
    assert len(set(example["after"].split())) == 1
    assert len(example["after"]) <= endings.SHOWN_LETTERS + 1


def test_a_broken_edit_is_told() -> None:
    model = taught_model()
    edit = random_edit(find_decoder(model), 30.0)
    found, _ = compare(model, lambda: edit.apply(model))
    assert found["after"]["faulty"] > PROMPTS / 2
    same = compare(model, lambda: edit.apply(model), tokens=1)[0]
    assert same["after"]["faulty"] == pytest.approx(found["after"]["faulty"], abs=1)
    healthy, _ = compare(model, lambda: edit.scaled(0.01).apply(model))
    assert healthy["after"]["faulty"] == 0


def test_running_into_the_limit_counts_only_where_the_original_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    story = answer("A long story that goes on and", ended=False)
    end = answer("A short story.")
    rows = iter([[end, story, end, story], [story, story, end, end]])
    monkeypatch.setattr(endings, "_long_answers", lambda *arguments: next(rows))
    model = tiny_model()
    found, _ = compare_endings(
        chat_model(find_decoder(model), tiny_tokenizer(), Batching(ROOMY)), ASKED[:4], nullcontext, 8
    )
    assert (found["before"]["unended"], found["before"]["faulty"]) == (2, 0)
    assert (found["after"]["unended"], found["after"]["faulty"]) == (2, 1)
    assert [one["fault"] for one in found["examples"]] == ["unended"]


def test_answers_are_no_longer_than_the_model_reads() -> None:
    model = tiny_model(max_position_embeddings=40)
    found, _ = compare(model, nullcontext, most=256)
    assert 20 < found["tokens"] < 40


def test_runs_and_evaluations_hold_it(tmp_path: Any) -> None:
    import llmva
    from llmva.evaluation.evaluate import evaluate
    from llmva.judges import make_judge

    model, tokenizer = taught_model(), tiny_tokenizer()
    sides = [[text for text, benign, _ in taught_requests() if benign == side] for side in (False, True)]
    prompts = llmva.PromptSet.from_lists(*sides)
    how: dict[str, Any] = {"iterations": 1, "passes": 1, "max_new_tokens": 8, "per_source": 40}
    found = llmva.align(model, tokenizer, prompts, endings_tokens=32, out=tmp_path, **how).record
    assert found["utility"]["endings"]["tokens"] == 32
    assert found["utility"]["perplexity"] > 0
    assert found["iterations"][0]["perplexity"] == 1.0
    assert all(entry["perplexity"] > 0 for entry in found["iterations"])
    without = llmva.align(model, tokenizer, prompts, endings_tokens=0, **how).record
    assert "endings" not in without["utility"]
    assert without["cost"]["generated_tokens"] < found["cost"]["generated_tokens"]

    edit = Edit.load(tmp_path).at(1)
    for most, there in ((16, True), (0, False)):
        after = evaluate(
            chat_model(model, tokenizer),
            prompts.test,
            make_judge("phrases"),
            EvaluationSettings(max_new_tokens=8, endings_tokens=most),
            edit=edit,
        )
        assert ("endings" in after["utility"]) == there


def test_tables_and_pages_show_it() -> None:
    from rich.console import Console

    tally = {"empty": 0, "broken_off": 0, "unended": 0}
    utility = {
        "kept": 0.98,
        "perplexity": 1.034,
        "endings": {
            "n": 16,
            "tokens": 256,
            "before": {"faulty": 0, "faulty_interval": [0.0, 0.194], "loop": 0, **tally},
            "after": {"faulty": 4, "faulty_interval": [0.102, 0.495], "loop": 4, **tally},
            "examples": [{"prompt": "<b>tell</b>", "fault": "loop", "before": "fine", "after": "so so so"}],
        },
    }
    run = {"utility": utility, "iterations": [{"iteration": 0, "f1": 0.5, "perplexity": 1.25}]}
    console = Console(width=80)
    with console.capture() as caught:
        console.print(before_after_table(run))
    text = caught.get()
    assert "25.0% [10.2, 49.5]" in text
    assert "1.034" in text
    page = render(run, [], {})
    assert "1.034 times the original's" in page
    assert "<td>1.250</td>" in page
    assert "After: repeats itself" in page
    assert "&lt;b&gt;tell" in page
    bare = render({"utility": {"kept": 0.98, "endings": {"examples": "no list", "n": None}}}, [], {})
    assert "times the original" not in bare


@pytest.mark.parametrize("rise", [float("inf"), 1e6])
def test_perplexity_stays_a_number(rise: float) -> None:
    from llmva.models.harmless import MAX_RATIO, Agreement

    assert Agreement([1.0], [0.0], [rise], [2]).perplexity_ratio == pytest.approx(MAX_RATIO)


def test_tokens_that_the_original_rules_out_do_not_spoil_perplexity() -> None:
    from llmva.models.harmless import _compare, _original

    original = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    assert _compare(_original(original, [2]), original.clone(), [2], torch.zeros(2))[2] == 0.0
    edited = torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.3, 0.5]]).log()
    assert _compare(_original(original, [0]), edited, [0], torch.zeros(2))[2] == pytest.approx(0.6931, abs=1e-4)
