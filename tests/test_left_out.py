"""What v_b reads: each source left out of its fit in turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmva.edit import Edit
from llmva.judges.base import Judgement, Label
from llmva.method.context import Context
from llmva.method.identify import Fit
from llmva.method.left_out import LeftOut, leave_out
from llmva.method.observe import Observation
from llmva.models.generate import Capture
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt
from llmva.settings import make_settings


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


def test_training_prompts_that_were_not_drawn_are_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """v_b needs no answers; what was answered is not read again, and nothing is read where no prompts are to read."""

    def of(count: int, name: str) -> tuple[Prompt, ...]:
        return tuple(Prompt(f"{name} {i}", name != "toxic", name) for i in range(count))

    own = (*of(50, "benign"), *of(50, "toxic"))
    answered = seen(1.0, 1.0).at(list(range(20)))
    answered = replace(answered, prompts=[*own[:10], *own[50:60]])
    monkeypatch.setattr(Context, "_captured", lambda self, edit, prompts: prompts)

    def read(more: tuple[Prompt, ...], per_source: int) -> list[Prompt] | None:
        made: list[Any] = [None] * 8
        made[1], made[3] = PromptSet(own, (), (), read=more), make_settings(per_source=per_source)
        made[6] = 42
        found: Any = Context(*made).read(Edit({}), answered, 1)
        return found  # type: ignore[no-any-return]

    few = read(of(40, "bundled"), 10)
    assert few is not None
    assert Counter(prompt.source for prompt in few) == {"bundled": 20, "benign": 10, "toxic": 10}
    every = read(of(40, "bundled"), 100)
    assert every is not None
    assert {prompt.id for prompt in every if prompt in own} == {p.id for p in own} - {p.id for p in answered.prompts}
    assert read((), 10) is None
