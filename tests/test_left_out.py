"""What v_b reads: each source left out of its fit in turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmva.judges.base import Judgement, Label
from llmva.method.identify import Fit
from llmva.method.left_out import LeftOut, leave_out
from llmva.method.observe import Observation
from llmva.models.generate import Capture
from llmva.prompts.types import Prompt


def seen(side: float, style: float, sources: str = "abcd") -> Observation:
    """Four sources with the side along axis 0 and a style of their own along axes 1 to 4; one sublayer of noise."""
    g = torch.Generator().manual_seed(0)
    prompts, rows = [], []
    for k, source in enumerate(sources):
        benign = source in "ab"
        for i in range(60):
            prompts.append(Prompt(f"{source} {i}", benign, source))
            x = torch.randn(2, 8, generator=g, dtype=torch.float64)
            x[0, 0] += side if benign else -side
            x[0, 1 + k] += style
            rows.append(x)
    outputs = torch.stack(rows, 1)
    labels = [Judgement(Label.ANSWERED, 1.0, "")] * len(prompts)
    return Observation(prompts, labels, Capture([""] * len(prompts), outputs, outputs[0], 0))


def test_sources_that_share_what_is_harmful_are_told_apart_when_left_out() -> None:
    left = leave_out([seen(2.0, 0.5)], Fit())
    assert set(left.auc) == set("abcd")
    for source in "abcd":
        assert left.auc[source][0] > 0.95
        assert left.accuracy[source][0] > 0.9
        assert abs(float(left.auc[source][1]) - 0.5) < 0.15  # the sublayer of noise
    assert left.as_record()["a"]["auc"][0] == pytest.approx(float(left.auc["a"][0]), abs=1e-4)


def test_style_alone_is_at_chance_and_the_run_says_so() -> None:
    left = leave_out([seen(0.0, 6.0)], Fit())
    assert all(float(auc[0]) < 0.65 for auc in left.auc.values())
    alone = LeftOut({name: auc[:1] for name, auc in left.auc.items()}, left.accuracy)
    assert alone.mean_auc is not None
    assert alone.mean_auc < 0.7
    (sentence,) = alone.warning()
    assert "style of their sources" in sentence
    assert f"{alone.mean_auc:.2f}" in sentence
    assert leave_out([seen(4.0, 0.5)], Fit()).auc["a"][0] > 0.95  # and not where there is something to read


def test_the_only_source_of_a_side_cannot_be_left_out() -> None:
    left = leave_out([seen(2.0, 0.5, "ac")], Fit())
    assert left.auc == {}
    assert left.mean_auc is None
    assert left.warning() == []


def test_prompts_that_are_read_count_as_sources() -> None:
    whole = seen(2.0, 0.5)
    answered, read = whole.part(0, 120), whole.part(120, 240)
    left, same = leave_out([answered, read], Fit()), leave_out([whole], Fit())
    for source in "abcd":
        torch.testing.assert_close(left.auc[source], same.auc[source])


def test_what_a_sublayer_reads_on_other_prompts() -> None:
    from llmva.method.identify import identify
    from llmva.method.left_out import readable

    train, other = seen(1.0, 0.5), seen(1.0, 0.5)
    train = replace(
        train, judgements=[Judgement(Label.ANSWERED if i % 2 else Label.REFUSED, 1.0, "") for i in range(240)]
    )
    auc = readable(identify(train, train), [other, other.part(0, 120)])  # the second part has no toxic prompt
    assert auc.shape == (2,)
    assert auc[0] > 0.7
    assert abs(float(auc[1]) - 0.5) < 0.1 or auc[1] < auc[0]
