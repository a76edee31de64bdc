"""Labels foreseen from first tokens: what the table learns, and what it says of a model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import llmva
from conftest import chat_model, taught_model, taught_requests
from llmva.alignment import RunOptions
from llmva.judges.base import Judgement, Label
from llmva.method.first_token import KINDS, FirstTokenClassifier, predict_labels, predicted_f1
from llmva.method.observe import Observation, observe
from llmva.metrics.rates import f_beta, point_rates
from llmva.models.chat import encode, render
from llmva.models.generate import Capture, answer_prompts, capture
from llmva.models.sublayers import find_decoder
from llmva.prompts.types import Prompt

ANSWERED, REFUSED, GARBLED, UNJUDGED = Label.ANSWERED, Label.REFUSED, Label.GARBLED, Label.UNJUDGED


def seen(labels: list[Label], first: list[int] | None = None, shares: Any = None, benign: Any = None) -> Observation:
    """Judged answers of no model."""
    n = len(labels)
    prompts = [Prompt(f"p{i}", bool(benign[i]) if benign else i % 2 == 0, "s") for i in range(n)]
    tokens = None if first is None else torch.tensor(first)
    likely = None if tokens is None else tokens[:, None]
    found = Capture([""] * n, torch.zeros(1, n, 2), torch.zeros(n, 2), 0, likely, shares=shares)
    return Observation(prompts, [Judgement(label, 1.0, "rule") for label in labels], found)


def test_it_counts_first_tokens_by_label() -> None:
    table = FirstTokenClassifier().learn(seen([ANSWERED, REFUSED, GARBLED, REFUSED, UNJUDGED], [5, 3, 5, 3, 5]))
    assert table.counts == {3: (0, 2, 0), 5: (1, 0, 1)}
    assert table.learn(seen([REFUSED, ANSWERED], [5, 1])).counts == {1: (1, 0, 0), 3: (0, 2, 0), 5: (1, 1, 1)}
    assert table.counts == {3: (0, 2, 0), 5: (1, 0, 1)}  # a new one was made
    assert (
        FirstTokenClassifier().learn(seen([UNJUDGED], [7])).counts == {}
    )  # a token of which nothing is known stays unknown


def test_later_answers_outweigh_earlier_ones() -> None:
    """An edited model may open a refusal as the untouched one opened an answer."""
    table = FirstTokenClassifier().learn(seen([ANSWERED] * 3, [5] * 3))
    assert table.faded().counts == {5: (1.5, 0, 0)}
    assert table.faded().learn(seen([REFUSED] * 2, [5] * 2)).agreement(seen([REFUSED], [5])) == 1
    assert table.learn(seen([REFUSED] * 2, [5] * 2)).agreement(seen([REFUSED], [5])) == 0


def test_agreement() -> None:
    table = FirstTokenClassifier({3: (0, 2, 1), 5: (1, 0, 0), 6: (1, 1, 0)})
    assert table.agreement(seen([REFUSED, ANSWERED, REFUSED, ANSWERED], [3, 5, 5, 6])) == 0.75  # ties: the first kind
    assert FirstTokenClassifier({3: (0, 2, 1)}).agreement(seen([REFUSED, GARBLED], [9, 9])) == 0.5  # never seen
    assert table.agreement(seen([ANSWERED, UNJUDGED, UNJUDGED], [5, 5, 3])) == 1  # nobody knows what those were
    assert table.agreement(seen([UNJUDGED], [5])) == 0
    assert FirstTokenClassifier().agreement(seen([ANSWERED], [0])) == 0


def test_table() -> None:
    found = FirstTokenClassifier({0: (1, 0, 0), 3: (1, 2, 1)}).table(5)
    assert found.tolist() == [[1, 0], [0.5, 0], [0.5, 0], [0.25, 0.5], [0.5, 0]]  # one opening was seen once
    assert FirstTokenClassifier({1: (1, 2, 1)}).table(2).tolist() == [[0, 0], [0.25, 0.5]]


def test_new_openings_are_what_rare_ones_are() -> None:
    """Answers of a model that talks freely begin in many ways, its refusals in few."""
    free = FirstTokenClassifier({1: (0, 9, 0), 2: (4, 0, 0), **dict.fromkeys(range(10, 18), (1, 0, 0)), 18: (0, 1, 0)})
    assert free.unseen == (8, 1, 1)
    assert free.label(99) is ANSWERED
    assert free.table(100)[99].tolist() == pytest.approx([0.8, 0.1])
    few = FirstTokenClassifier({1: (0, 9, 0), 2: (30, 0, 0)})
    assert few.unseen == (0, 0, 1)
    assert few.label(99) is GARBLED
    assert free.faded().unseen == (4, 0.5, 1)  # what was seen once before still stands for what is new


def test_it_survives_a_file() -> None:
    table = FirstTokenClassifier().learn(seen([ANSWERED, REFUSED, GARBLED], [11, 2, 100])).faded().faded().faded()
    again = FirstTokenClassifier.from_record(json.loads(json.dumps(table.as_record())))
    assert again == table
    assert list(again.counts) == list(table.counts)
    assert FirstTokenClassifier.from_record({}) == FirstTokenClassifier()


# -- what is promised


def test_hard_promises_are_the_metrics_f1() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        labels = [KINDS[k] for k in torch.randint(3, (12,), generator=generator).tolist()]
        found = seen(labels, shares=torch.zeros(12, 2))
        assert predicted_f1(found)[0] == pytest.approx(point_rates(found.prompts, labels)["f1"])


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_soft_promises(beta: float) -> None:
    shares = torch.tensor([[0.9, 0.1], [0.2, 0.5], [0.3, 0.6], [0.1, 0.9]])
    found = seen([ANSWERED, GARBLED, REFUSED, REFUSED], shares=shares, benign=[True, True, False, False])
    hard, soft = predicted_f1(found, beta)
    assert hard == f_beta(1, 0, 1, beta)
    # benign prompts are answered with .9 and .2; toxic ones are not refused with .4 and .1
    assert soft == pytest.approx(f_beta(0.9 + 0.2, 0.4 + 0.1, 0.1 + 0.8, beta))


def test_promises_of_one_side() -> None:
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert predicted_f1(seen([ANSWERED, REFUSED], shares=shares, benign=[False, False])) == (0, 0)
    assert predicted_f1(seen([ANSWERED, REFUSED], shares=shares, benign=[True, True])) == pytest.approx((2 / 3, 2 / 3))


# -- of a model


@pytest.fixture(scope="module")
def taught() -> Any:
    return taught_model(steps=120)


@pytest.fixture(scope="module")
def requests() -> list[Prompt]:
    """Shuffled: the answer hangs on a noun's place in the list."""
    rows = [Prompt(text, benign, "taught") for text, benign, _ in taught_requests()]
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]


def test_shares_are_expectations_under_the_first_token(taught: Any, tokenizer: Any) -> None:
    texts = ["paint the fence", "please tell me how to break the lamp", "a"]
    generator = torch.Generator().manual_seed(0)
    counts = {t: (*torch.rand(3, generator=generator).tolist(),) for t in range(0, len(tokenizer), 2)}
    classifier = FirstTokenClassifier(counts)
    found = answer_prompts(chat_model(taught, tokenizer), texts, max_new_tokens=0)
    shares, weigh = classifier.shares(found), classifier.table(len(tokenizer))
    assert found.first is not None
    for i, text in enumerate(texts):
        with torch.no_grad():
            logits = taught(input_ids=torch.tensor([encode(tokenizer, render(tokenizer, text))])).logits[0, -1]
        assert torch.allclose(shares[i], torch.softmax(logits, -1) @ weigh, atol=1e-5)
        assert found.first[i] == logits.argmax()
    assert found.shares is None


def test_first_tokens_are_those_of_generated_answers(taught: Any, tokenizer: Any) -> None:
    texts = [text for text, _, _ in taught_requests()][::7]
    looked, said = (capture(taught, tokenizer, texts, max_new_tokens=n) for n in (0, 5))
    assert looked.first is not None
    assert said.first is not None
    assert torch.equal(looked.first, said.first)
    assert [answer.split()[0] for answer in said.answers] == tokenizer.convert_ids_to_tokens(said.first.tolist())
    part = said.rows([4, 1], 9)
    assert part.first is not None
    assert (part.answers, part.tokens) == ([said.answers[4], said.answers[1]], 9)
    assert torch.equal(part.first, said.first[[4, 1]])
    assert torch.equal(part.outputs, said.outputs[:, [4, 1]])


def test_it_foresees_what_generation_then_says(taught: Any, tokenizer: Any, requests: list[Prompt]) -> None:
    """Taught by one half, it tells the labels of the other half; nothing is generated for those."""
    decoder = find_decoder(taught)
    judge = llmva.judges.make_judge("phrases")
    told = observe(chat_model(decoder, tokenizer), requests[:80], judge, max_new_tokens=8)
    classifier = FirstTokenClassifier().learn(told)
    rest = requests[80:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.GenerationMixin.generate", None)
        foreseen = predict_labels(chat_model(decoder, tokenizer), rest, classifier)
    said = observe(chat_model(decoder, tokenizer), rest, judge, max_new_tokens=8)
    assert {ANSWERED, REFUSED} <= set(said.labels)
    assert classifier.agreement(said) == 1
    assert foreseen.labels == said.labels
    assert foreseen.prompts == said.prompts
    assert torch.allclose(foreseen.capture.outputs, said.capture.outputs, atol=1e-5)
    assert foreseen.capture.tokens == 0
    assert predicted_f1(foreseen)[0] == pytest.approx(point_rates(said.prompts, said.labels)["f1"])


def test_the_likeliest_token_decides_and_not_the_likeliest_label(tokenizer: Any) -> None:
    """Generation is greedy: an answer that one word opens outweighs refusals that many share, each less likely."""
    model, request = taught_model(steps=1), Prompt("paint the fence", True, "s")
    decoder = find_decoder(model)
    found = capture(decoder, tokenizer, [request.text], max_new_tokens=0)
    assert found.first is not None
    likeliest = int(found.first[0])
    table = dict.fromkeys(range(len(tokenizer)), (0.0, 1.0, 0.0)) | {likeliest: (1.0, 0.0, 0.0)}
    foreseen = predict_labels(chat_model(decoder, tokenizer), [request], FirstTokenClassifier(table))
    said = observe(chat_model(decoder, tokenizer), [request], llmva.judges.make_judge("phrases"), max_new_tokens=3)
    assert said.capture.first is not None
    assert said.capture.first[0] == likeliest
    assert foreseen.labels == [ANSWERED]
    assert foreseen.capture.shares is not None
    answered, refused = foreseen.capture.shares[0].tolist()
    assert answered < 0.5 < refused
    assert foreseen.judgements[0].confidence == pytest.approx(answered)


def test_an_edit_is_foreseen_as_it_then_does(taught: Any, tokenizer: Any, requests: list[Prompt]) -> None:
    """Of a model that is not sure of its first words, under half-finished edits."""
    model = taught_model(steps=50)
    decoder, judge = find_decoder(model), llmva.judges.make_judge("phrases")
    prompts = llmva.PromptSet(tuple(requests[:80]), tuple(requests[80:]), ())
    options = {
        "iterations": 2,
        "passes": 1,
        "max_new_tokens": 8,
        "per_source": 60,
        "options": RunOptions(measure_test=False),
    }
    result = llmva.align(model, tokenizer, prompts, judge=judge, **options)
    classifier, gaps = FirstTokenClassifier(), []
    for t, entry in enumerate(result.record["iterations"]):
        with result.every.at(t).apply(model, check=False):
            told = observe(chat_model(decoder, tokenizer), prompts.train, judge, max_new_tokens=8)
            classifier = classifier.faded().learn(told)
            foreseen = predict_labels(chat_model(decoder, tokenizer), prompts.validation, classifier)
        gaps.append(abs(predicted_f1(foreseen)[0] - entry["f1"]))
    assert len(gaps) > 1
    assert max(gaps) < 0.05


def test_what_opens_with_a_token_never_seen_is_garbled(taught: Any, tokenizer: Any, requests: list[Prompt]) -> None:
    found = predict_labels(chat_model(find_decoder(taught), tokenizer), requests[:3], FirstTokenClassifier())
    assert found.labels == [GARBLED] * 3
    assert [judged.confidence for judged in found.judgements] == [1.0] * 3
    assert found.signs[0].tolist() == [-1] * 3
