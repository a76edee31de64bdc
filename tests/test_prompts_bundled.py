"""The bundled prompts: as large, balanced and cleanly split as docs/prompts.md says."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

import pytest

from llmva.prompts import PromptSet
from llmva.prompts.build import DATA, render

KINDS = ("harmful", "jailbreak", "alarming", "plain")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def trigrams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + 3]) for i in range(max(1, len(found) - 2))}


def test_the_file_is_what_build_writes() -> None:
    assert (DATA / "prompts.jsonl").read_text(encoding="utf-8") == render()


def test_every_kind_has_the_same_share_of_every_split(rows: list[dict[str, str]]) -> None:
    found = Counter((row["kind"], row["split"]) for row in rows)
    sizes = {"train": 300, "validation": 60, "test": 100}
    assert found == {(kind, split): n for kind in KINDS for split, n in sizes.items()}


def test_topics(rows: list[dict[str, str]]) -> None:
    splits = defaultdict(set)
    for row in rows:
        splits[row["topic"]].add(row["split"])
    assert len(splits) >= 50
    assert sum(found == {"test"} for found in splits.values()) == 14
    for kind in KINDS:
        assert len({row["topic"] for row in rows if row["kind"] == kind}) >= 12


def test_a_template_is_small_and_in_one_split(rows: list[dict[str, str]]) -> None:
    splits, sizes = defaultdict(set), Counter(row["template"] for row in rows)
    for row in rows:
        splits[row["template"]].add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert max(sizes.values()) <= 12
    own = Counter(row["kind"] for row in rows if row["template"].startswith("own-"))
    assert own == {"harmful": 153, "jailbreak": 25, "alarming": 198, "plain": 247}
    wrapped = Counter(row["kind"] for row in rows if row["template"].startswith("wrapper-"))
    assert wrapped == {"jailbreak": 435, "alarming": 30}
    assert len({name for name in sizes if name.startswith("wrapper-")}) == 82


def test_frames_are_shared_by_harmful_and_benign(rows: list[dict[str, str]]) -> None:
    kinds = defaultdict(set)
    for row in rows:
        if row["template"].startswith("frame-"):
            kinds[row["template"]].add(row["kind"] in ("harmful", "jailbreak"))
    assert len(kinds) == 117
    assert all(found == {True, False} for found in kinds.values())


def test_tasks_quote_harmful_requests_of_their_split(rows: list[dict[str, str]]) -> None:
    """And the same request is asked for itself, so that only the task makes it harmless."""
    quoted = [row for row in rows if row["template"].startswith("task-")]
    assert Counter(row["split"] for row in quoted) == {"train": 72, "validation": 14, "test": 16}
    lines = (DATA / "requests_harmful.txt").read_text(encoding="utf-8").splitlines()
    requests = [f" {' '.join(words(line))} " for line in lines if line and not line.startswith("# ")]
    for row in quoted:
        text = f" {' '.join(words(row['text']))} "
        asked = [r for r in requests if r in text]
        assert asked, row["text"]
        others = [r for r in rows if r["kind"] in ("harmful", "jailbreak") and r["split"] == row["split"]]
        same = sum(any(a.strip() in " ".join(words(other["text"])) for a in asked) for other in others)
        assert same or row["split"] != "train", row["text"]


def test_no_text_twice(rows: list[dict[str, str]]) -> None:
    found = Counter(" ".join(words(row["text"])) for row in rows)
    assert [text for text, n in found.items() if n > 1] == []


def test_no_request_of_test_is_asked_elsewhere(rows: list[dict[str, str]]) -> None:
    requests = defaultdict(set)
    texts = [(f" {' '.join(words(row['text']))} ", row["split"] == "test") for row in rows]
    for name in ("harmful", "alarming", "plain"):
        for line in (DATA / f"requests_{name}.txt").read_text(encoding="utf-8").splitlines():
            if not line.startswith("# "):
                key = f" {' '.join(words(line))} "
                for text, in_test in texts:
                    if key in text:
                        requests[line].add(in_test)
    assert len(requests) > 700
    assert [line for line, found in requests.items() if len(found) > 1] == []


def test_test_prompts_are_no_near_copies(rows: list[dict[str, str]]) -> None:
    before = defaultdict(set)  # trigram -> rows outside test
    for i, row in enumerate(rows):
        if row["split"] != "test":
            for gram in trigrams(row["text"]):
                before[gram].add(i)
    for row in rows:
        if row["split"] == "test":
            grams = trigrams(row["text"])
            shared = Counter(i for gram in grams for i in before[gram])
            assert max(shared.values(), default=0) <= 0.6 * len(grams), row["text"]


def test_lengths(rows: list[dict[str, str]]) -> None:
    lengths = [len(row["text"].split()) for row in rows]
    assert min(lengths) >= 4
    assert max(lengths) >= 50


def test_single_words_do_not_give_the_side_away(rows: list[dict[str, str]]) -> None:
    """A linear model on words and word pairs of train is wrong on more than one test prompt in ten."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = {split: [row["text"] for row in rows if row["split"] == split] for split in ("train", "test")}
    sides = {
        split: [row["kind"] in ("alarming", "plain") for row in rows if row["split"] == split]
        for split in ("train", "test")
    }
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=1000).fit(vectorizer.fit_transform(texts["train"]), sides["train"])
    assert 0.6 < model.score(vectorizer.transform(texts["test"]), sides["test"]) < 0.9


def test_bundled_reads_it(rows: list[dict[str, str]]) -> None:
    prompts = PromptSet.bundled()
    assert prompts.counts() == {kind: {"train": 300, "validation": 60, "test": 100} for kind in KINDS}
    assert {p.source for _, found in prompts.splits() for p in found if p.benign} == {"alarming", "plain"}
    assert [p.text for p in prompts.test] == [row["text"] for row in rows if row["split"] == "test"]
