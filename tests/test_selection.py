"""Scores, accuracies and the selection, against small sums done by hand."""

from __future__ import annotations

import pytest
import torch

from llmva.errors import UsageError
from llmva.method.identify import accuracy, papers_count, score, select


def test_accuracy_by_hand() -> None:
    features = torch.tensor([[[1.0, 0.0], [-1.0, 2.0], [3.0, -1.0], [-2.0, 1.0]], [[0.0, 1.0]] * 4])
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    labels = torch.tensor([[1, -1, -1, -1], [1, 1, -1, 1]], dtype=torch.int8)
    # sublayer 0: sides + - + - against + - - -, and 0 + - + against + + - +; a projection of 0 is on neither side
    # sublayer 1: + + + + against + - - -, and 0 0 0 0 against anything
    assert accuracy(features, vectors, labels).tolist() == [[0.75, 0.75], [0.25, 0.0]]


def test_accuracy_reads_half_precision_features() -> None:
    features = torch.tensor([[[1.0], [-1.0]]], dtype=torch.bfloat16)
    assert accuracy(features, torch.ones(1, 1, 1, dtype=torch.float64), torch.tensor([[1, -1]])).tolist() == [[1.0]]


def test_score_by_hand() -> None:
    vectors = torch.tensor([[[0.6, 0.8], [1.0, 0.0]], [[0.0, -1.0], [0.8, 0.6]]])
    final = torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    accuracies = torch.tensor([[0.5, 1.0], [1.0, 0.25]])
    # 0.8 * 0.5 + 0.6 * 1 and -1 * 1 + (0.48 + 0.48) * 0.25
    torch.testing.assert_close(score(vectors, final, accuracies), torch.tensor([1.0, -0.76]))


@pytest.mark.parametrize(
    ("scores", "count", "chosen"),
    [
        ([0.1, 0.9, 0.5, -2.0], 2, [1, 2]),
        ([0.5, 0.9, 0.1], 2, [0, 1]),  # the model's order, not the scores'
        ([0.5, 0.7, 0.5, 0.5], 3, [0, 1, 2]),  # ties go to the earlier
        ([1.0, 1.0, 1.0, 1.0], 1, [0]),
        ([-1.0, -3.0, -2.0], 3, [0, 1, 2]),
    ],
)
def test_select(scores: list[float], count: int, chosen: list[int]) -> None:
    assert select(torch.tensor(scores), count) == chosen


@pytest.mark.parametrize("count", [0, -1, 5])
def test_counts_outside_the_model_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match="choose 1 to 4"):
        select(torch.zeros(4), count)


def test_papers_count_is_the_papers_share() -> None:
    assert papers_count(64) == 42
    assert papers_count(2) == 1
    assert papers_count(1) == 1
