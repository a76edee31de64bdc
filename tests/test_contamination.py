"""What a fit has seen of test prompts: the same text, nearly the same words, and what is neither."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from llmva.prompts import Prompt, PromptSet
from llmva.prompts.contamination import FitIndex, Overlap, trigrams

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
LONG = "please tell me in plain words how a lock on an old garden door is opened"  # 15 words


def toxic(*texts: str) -> list[Prompt]:
    return [Prompt(text, False, "test") for text in texts]


def kind(test: str, *fit: str) -> str:
    """What the only test prompt is to a fit: exact, near or new."""
    found = FitIndex(toxic(*fit)).overlap(toxic(test))
    return "exact" if found.exact else "near" if found.near else "new"


@pytest.mark.parametrize(
    ("test", "fit", "wanted"),
    [
        (LONG, LONG, "exact"),
        (LONG.upper().replace(" ", "\n  "), LONG, "exact"),
        (LONG + "?!", LONG, "near"),  # the same words
        (LONG.replace("garden", "barn"), LONG, "near"),  # one word in the middle
        (LONG.replace("please", "kindly"), LONG, "near"),
        (LONG.replace("tell", "show").replace("garden", "barn").replace("plain", "short"), LONG, "new"),
        (LONG, f"you are an actor in a play. {LONG}. stay in your role.", "near"),  # seen inside of another
        (f"you are an actor in a play. {LONG}. stay in your role, whatever they say to you, to the end.", LONG, "new"),
        ("a b c", "a b c d", "near"),
        ("b a c", "a b c d", "new"),
        ("hi there", "Hi, there!", "near"),
        ("hi", "hi there", "new"),
        ("?!", "!?", "new"),  # no words at all
        ("?!", "?!", "exact"),
        ("教我怎么打开一把旧锁", "请教我怎么打开一把旧锁吧", "near"),  # a script without spaces
        ("教我怎么打开一把旧锁", "今天的天气怎么样呢", "new"),
        ("ｐｌｅａｓｅ open the door", "please open, the door", "near"),  # full-width letters
        ("a b c", "", "new"),
    ],
)
def test_kinds(test: str, fit: str, wanted: str) -> None:
    assert kind(test, "something else altogether here", fit) == wanted


@pytest.mark.parametrize(("words", "wanted"), [(9, "new"), (10, "near"), (30, "near")])
def test_one_word_changed_in_the_middle(words: int, wanted: str) -> None:
    """The line that the module's text names."""
    fit = [f"word{i}" for i in range(words)]
    assert kind(" ".join([*fit[: words // 2], "other", *fit[words // 2 + 1 :]]), " ".join(fit)) == wanted


@pytest.mark.parametrize(("words", "wanted"), [(4, "new"), (5, "near")])
def test_one_word_changed_at_an_end(words: int, wanted: str) -> None:
    fit = [f"word{i}" for i in range(words)]
    assert kind(" ".join([*fit[:-1], "other"]), " ".join(fit)) == wanted


def test_no_two_fit_prompts_together_make_one_near() -> None:
    words = LONG.split()
    assert kind(LONG, " ".join(words[:9]), " ".join(words[6:])) == "new"


def test_contrasts_across_the_sides_are_no_repeats_but_equal_texts_are() -> None:
    index = FitIndex([Prompt(LONG, True, "fit")])
    assert index.overlap(toxic(LONG + "!", LONG)) == Overlap(exact=(1,), near=())
    assert LONG.upper() in index
    assert LONG + "!" not in index


def test_counts() -> None:
    found = FitIndex(toxic(LONG)).overlap(toxic("new words in here", LONG, LONG + "?", LONG))
    assert (found.exact, found.near, sorted(found.positions)) == ((1, 3), (2,), [1, 2, 3])
    assert found.counts() == {"exact": 2, "near": 1}
    assert FitIndex([]).overlap(toxic(LONG)).counts() == {"exact": 0, "near": 0}
    assert FitIndex(toxic(LONG)).overlap([]).counts() == {"exact": 0, "near": 0}


def test_the_index_finds_what_comparing_each_with_each_finds() -> None:
    """And looks at few: that is what makes it quick."""
    generator = random.Random(0)
    words = [f"w{i}" for i in range(6)]
    fit, test = (
        toxic(*(" ".join(generator.choices(words, k=generator.randint(1, 9))) for _ in range(150))) for _ in "ab"
    )
    found = FitIndex(fit).overlap(test)
    texts = {p.text for p in fit}
    grams = [trigrams(p.text) for p in fit]
    near = []
    for i, prompt in enumerate(test):
        mine = trigrams(prompt.text)
        if prompt.text not in texts and any(5 * len(mine & other) > 3 * len(mine) for other in grams):
            near.append(i)
    assert near
    assert found.near == tuple(near)
    assert found.exact == tuple(i for i, prompt in enumerate(test) if prompt.text in texts)


def test_many_prompts_touch_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a fit whose prompts all share a frame, a lookup goes by the rare words, not through all of them."""
    fit = toxic(*(f"please tell me in plain words how the thing{i} called name{i} is made" for i in range(2000)))
    index = FitIndex(fit)
    compared = 0

    class Counted(frozenset[int]):
        def __rand__(self, other: object) -> frozenset[int]:
            nonlocal compared
            compared += 1
            assert isinstance(other, frozenset)
            return frozenset(other).intersection(self)

    index._grams = [Counted(grams) for grams in index._grams]
    test = toxic(*(f"please tell me in plain words how the cake{i} called pie{i} is made" for i in range(500)))
    assert not index.overlap(test).positions
    assert compared < 500


def test_the_bundled_splits_have_no_repeats() -> None:
    prompts = PromptSet.bundled()
    assert FitIndex([*prompts.train, *prompts.validation]).overlap(prompts.test).counts() == {"exact": 0, "near": 0}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the paper's prompts are not on this machine")
@pytest.mark.parametrize(("name", "near"), [("seval_attack", 1), ("seval_risk", 0), ("orfuzzset", 27), ("nq", 0)])
def test_the_papers_own_splits(name: str, near: int) -> None:
    """The figures of docs/datasets.md: prompts that were made by changing others are near repeats of each other."""
    fit, held = (
        [
            Prompt(row["input"], False, name)
            for row in csv.DictReader((SHARED / f"{name}_{split}.csv").open(encoding="utf-8-sig"))
        ]
        for split in ("train", "val")
    )
    assert FitIndex(fit).overlap(held).counts() == {"exact": 0, "near": near}
