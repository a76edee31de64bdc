"""Predict labels from the first token of an answer, without generating the rest.

The first token usually shows whether the model answers or refuses. The judged answers give a table: first token ->
how many answers that began with it were answered, refused or garbled. Every prefill computes the distribution of the
first token; with the table this becomes the chance of each label. Each iteration measures how often the prediction
agrees with the judge, on validation labels that the table has not yet seen. If they agree too rarely, predictions are
not used (`rollback.MIN_AGREEMENT`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from llmva.judges.base import Judgement, Label
from llmva.method.observe import Observation
from llmva.metrics.rates import f_beta
from llmva.models.chat_model import ChatModel
from llmva.models.generate import Capture, answer_prompts
from llmva.prompts.types import Prompt

KINDS = (Label.ANSWERED, Label.REFUSED, Label.GARBLED)
FADING = 0.5  # weight of earlier counts per iteration: an edited model may begin a refusal as it began an answer


@dataclass(frozen=True)
class FirstTokenClassifier:
    """`counts`: first token -> how many answers that began with it were answered, refused and garbled."""

    counts: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)

    def learn(self, seen: Observation) -> FirstTokenClassifier:
        """The classifier with the judged, generated answers of `seen` added to its counts."""
        assert seen.capture.first is not None
        counts = {token: list(old) for token, old in self.counts.items()}
        for token, label in zip(seen.capture.first.tolist(), seen.labels, strict=True):
            if label in KINDS:
                counts.setdefault(token, [0.0, 0.0, 0.0])[KINDS.index(label)] += 1.0
        return replace(self, counts={token: (a, r, g) for token, (a, r, g) in sorted(counts.items())})

    def faded(self) -> FirstTokenClassifier:
        """The classifier with its counts scaled by FADING, before it learns another iteration's answers."""
        faded = {t: (FADING * a, FADING * r, FADING * g) for t, (a, r, g) in self.counts.items()}
        return replace(self, counts=faded)

    def table(self, vocabulary: int) -> Tensor:
        """float32 [vocabulary, 2]: chances that an answer with this first token answers, and refuses."""
        chances = _chances(self.unseen).repeat(vocabulary, 1)
        for token, counts in self.counts.items():
            chances[token] = _chances(counts)
        return chances

    @cached_property
    def unseen(self) -> tuple[float, float, float]:
        """Counts that stand for first tokens that no answer began with.

        Answers of many models begin in ever new ways and their refusals in few. How it is with new ones, those show
        that were seen once (as in Good and Turing's estimate). One count says garbled: where there are no such
        openings, as in a model of few words, a new one is a sign of damage.
        """
        once = [counts for counts in self.counts.values() if sum(counts) <= 1.0]
        answered, refused, garbled = (sum(counts[k] for counts in once) for k in range(3))
        return answered, refused, garbled + 1.0

    def shares(self, captured: Capture) -> Tensor:
        """float32 [n, 2]: chances that each answer answers, and refuses, over all tokens that it may begin with."""
        assert captured.likely is not None
        assert captured.chances is not None
        tokens = torch.unique(captured.likely)
        each = torch.stack([_chances(self.counts.get(token, self.unseen)) for token in tokens.tolist()])
        known = captured.chances[:, :, None] * each[torch.searchsorted(tokens, captured.likely)]
        rest = (1.0 - captured.chances.sum(1, keepdim=True)).clamp_min(0.0)
        return known.sum(1) + rest * _chances(self.unseen)

    def agreement(self, seen: Observation) -> float:
        """Share of judged answers whose label the first token predicts."""
        assert seen.capture.first is not None
        predicted = [self.label(token) for token in seen.capture.first.tolist()]
        judged = [(one, label) for one, label in zip(predicted, seen.labels, strict=True) if label in KINDS]
        return sum(one is label for one, label in judged) / max(1, len(judged))

    def label(self, token: int) -> Label:
        """The most frequent label of answers that began with `token`, or of those whose beginning was seen once."""
        counts = self.counts.get(token, self.unseen)
        return KINDS[max(range(3), key=lambda k: (counts[k], -k))]

    # -- JSON

    def as_record(self) -> dict[str, list[float]]:
        return {str(token): list(counts) for token, counts in self.counts.items()}

    @classmethod
    def from_record(cls, plain: Mapping[str, Sequence[float]]) -> FirstTokenClassifier:
        return cls({int(token): (float(a), float(r), float(g)) for token, (a, r, g) in plain.items()})


def predict_labels(chat: ChatModel, prompts: Sequence[Prompt], classifier: FirstTokenClassifier) -> Observation:
    """Captures and predicted labels of `prompts` with the current model; nothing is generated.

    The label is that of the most likely first token, which greedy generation would take and which `agreement`
    measures. Its confidence is the chance of the label over all tokens.
    """
    captured = answer_prompts(chat, [prompt.asked for prompt in prompts], max_new_tokens=0)
    return foretell(Observation(list(prompts), [], captured), classifier)


def foretell(seen: Observation, classifier: FirstTokenClassifier) -> Observation:
    """`seen` with the labels that the first tokens predict, in place of its own."""
    assert seen.capture.first is not None
    labels = [classifier.label(token) for token in seen.capture.first.tolist()]
    shares = classifier.shares(seen.capture)
    judgements = [_judgement(label, row) for label, row in zip(labels, shares.tolist(), strict=True)]
    return replace(seen, judgements=judgements, capture=replace(seen.capture, shares=shares))


def _chances(counts: tuple[float, float, float]) -> Tensor:
    """Chances of answered and refused."""
    return torch.tensor(counts[:2]) / sum(counts)


def _judgement(label: Label, shares: list[float]) -> Judgement:
    chances = [*shares, max(0.0, 1.0 - sum(shares))]
    return Judgement(label, chances[KINDS.index(label)], "first token")


def predicted_f1(seen: Observation, beta: float = 1.0) -> tuple[float, float]:
    """F of the predicted labels, and F of their chances, which also shows how close a prompt is to another label."""
    assert seen.capture.shares is not None
    benign = torch.tensor([prompt.benign for prompt in seen.prompts])
    hard = torch.tensor([[label is Label.ANSWERED, label is Label.REFUSED] for label in seen.labels]).double()

    def of(shares: Tensor) -> float:
        answered, refused = shares.double().unbind(1)
        tp = float(answered[benign].sum())
        return f_beta(tp, float((1.0 - refused[~benign]).sum()), float(benign.sum()) - tp, beta)

    return of(hard), of(seen.capture.shares)
