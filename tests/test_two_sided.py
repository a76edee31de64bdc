"""Baselines that mend both failures: surgical removes and adds, adasteer lets each prompt decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import chat_model, tiny_model, tiny_tokenizer
from llmva.baselines import make_baseline
from llmva.baselines.adasteer import TOWARDS_ANSWER, TOWARDS_REFUSAL, AdaSteering, fit_chance
from llmva.baselines.base import Steering, block_at
from llmva.baselines.states import last_token, read_states
from llmva.baselines.surgical import SurgicalSteering
from llmva.errors import UsageError
from llmva.judges.base import Label
from llmva.models.batching import Batching
from llmva.models.sublayers import Decoder, find_decoder
from test_baselines import PROMPTS, ROWS, TEXTS, logits, plainly, seeded, sized

LABELS = [Label.REFUSED if i in (0, 1, 3, 6) else Label.ANSWERED for i in range(len(TEXTS))]  # two of each side


def fitted(name: str, decoder: Decoder, labels: list[Label] = LABELS, **options: Any) -> Steering:
    chat = chat_model(decoder, tiny_tokenizer(), Batching(4096))
    return make_baseline(name, **options).fit(chat, PROMPTS, labels, seeded())


def states_of(decoder: Decoder) -> Tensor:
    """[blocks, prompts, d] at the last prompt token at the blocks' outputs."""
    chat = chat_model(decoder, tiny_tokenizer(), Batching(4096))
    return read_states(chat, ROWS, last_token, blocks=range(3), place="output")


def mean(states: Tensor, benign: bool, label: Label) -> Tensor:
    return torch.stack(
        [h for h, p, one in zip(states, PROMPTS, LABELS, strict=True) if (p.benign, one) == (benign, label)]
    ).mean(0)


def test_depth_as_a_share() -> None:
    assert [block_at(share, 28) for share in (0.0, 5 / 28, 0.5, 1.0)] == [0, 5, 14, 27]


# ---- surgical


def test_what_is_removed_is_of_no_use_to_true_refusal() -> None:
    decoder = find_decoder(sized(tiny_model()))
    steering = fitted("surgical", decoder)
    assert isinstance(steering, SurgicalSteering)
    assert (steering.block, steering.blocks) == (2, (0, 1, 2))
    h = states_of(decoder)[2]
    false = mean(h, True, Label.REFUSED) - mean(h, True, Label.ANSWERED)
    true = mean(h, False, Label.REFUSED) - mean(h, True, Label.ANSWERED)
    torch.testing.assert_close(steering.refusal, 0.2 * true, rtol=1e-3, atol=1e-5)
    assert abs(float(steering.removed @ true)) < 1e-4 * float(true.norm())
    assert float(steering.removed.norm()) == pytest.approx(1, abs=1e-5)
    rest = false - (false @ true) / (true @ true) * true
    assert float(torch.cosine_similarity(rest, steering.removed, dim=0)) == pytest.approx(1, abs=1e-4)
    whole = fitted("surgical", decoder, overlap=0.0)
    assert isinstance(whole, SurgicalSteering)
    assert float(torch.cosine_similarity(false, whole.removed, dim=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_surgical_removes_everywhere_and_adds_at_its_block(strength: float) -> None:
    """A removal is never more than whole, whatever the strength."""
    model = sized(tiny_model())
    decoder = find_decoder(model)
    steering = fitted("surgical", decoder, addition=0.4).scaled(strength)
    assert isinstance(steering, SurgicalSteering)
    e, share = steering.removed, min(strength, 1.0)

    def removed(h: Tensor) -> Tensor:
        return h - share * (h @ e)[..., None] * e

    with steering.applied(decoder):
        found = logits(model, TEXTS[:1])
    layers = model.model.layers
    with (
        plainly(layers[0], removed, "output"),
        plainly(layers[1], removed, "output"),
        plainly(layers[2], lambda h: removed(h) + strength * steering.refusal, "output"),
    ):
        torch.testing.assert_close(logits(model, TEXTS[:1]), found, rtol=1e-4, atol=1e-4)


def test_surgical_says_what_it_lacks() -> None:
    decoder = find_decoder(sized(tiny_model()))
    never = fitted("surgical", decoder, [Label.ANSWERED] * len(TEXTS))
    assert isinstance(never, SurgicalSteering)
    assert [note.partition(": ")[2] for note in never.notes] == [
        "the model refuses no harmful prompt, so its refusal vector is of harmful ones.",
        "the model refuses none of the benign fit prompts, so no direction is removed.",
    ]
    assert not never.removed.any()
    assert never.refusal.any()
    always = fitted("surgical", decoder, [Label.REFUSED] * len(TEXTS))
    assert "answers none" in always.notes[0]


# ---- adasteer


def test_a_chance_orders_prompts_and_gives_both_sides_the_same_weight() -> None:
    generator = np.random.default_rng(0)
    numbers = np.concatenate([generator.normal(2.0, 1.0, 400), generator.normal(0.0, 1.0, 40)])
    states = torch.zeros(440, 3)
    states[:, 1] = torch.from_numpy(numbers).float()
    chance = fit_chance(5, states, torch.tensor([0.0, 7.0, 0.0]), range(400), range(400, 440))
    # two normal distributions of one width: the log odds are 2 x - 2
    assert chance.slope == pytest.approx(2.0, rel=0.2)
    assert chance.offset == pytest.approx(-2.0, rel=0.3)
    found = chance.of(torch.tensor([[0.0, -9.0, 3.0], [0.0, 1.0, 0.0], [0.0, 9.0, 0.0]]))
    assert found[0] < 0.01
    assert float(found[1]) == pytest.approx(0.5, abs=0.1)
    assert found[2] > 0.99


def test_adasteer_lets_each_prompt_decide() -> None:
    model = sized(tiny_model())
    decoder = find_decoder(model)
    steering = fitted("adasteer", decoder)
    assert isinstance(steering, AdaSteering)
    assert (steering.needed.block, steering.harmful.block, steering.blocks) == (1, 1, (0, 1, 2))
    alpha, beta = steering.coefficients(decoder, ROWS)
    scale = 0.2 * (28 / 3) ** 0.5
    assert bool(((alpha >= 0) & (alpha <= scale)).all())
    assert bool(((beta >= TOWARDS_ANSWER * scale) & (beta <= TOWARDS_REFUSAL * scale)).all())
    benign = torch.tensor([prompt.benign for prompt in PROMPTS])
    assert float(beta[~benign].mean()) > float(beta[benign].mean())
    along = torch.cosine_similarity(steering.rejection, steering.harmfulness, dim=-1)
    assert along.tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)  # never away from refusal

    with steering.applied(decoder):
        found = logits(model, TEXTS)
        answered = logits(model, TEXTS[:1], "sure here")
    layers, i = model.model.layers, 0
    added = [alpha[i] * v + beta[i] * w for v, w in zip(steering.rejection, steering.harmfulness, strict=True)]
    length = len(ROWS[i])

    def moved(by: Tensor) -> Any:
        return lambda h: torch.cat([h[:, :length] + by, h[:, length:]], 1)

    with (
        plainly(layers[0], moved(added[0]), "output"),
        plainly(layers[1], moved(added[1]), "output"),
        plainly(layers[2], moved(added[2]), "output"),
    ):
        torch.testing.assert_close(logits(model, TEXTS[:1])[0], found[i], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logits(model, TEXTS[:1], "sure here"), answered, rtol=1e-3, atol=1e-3)


def test_adasteer_says_what_it_lacks() -> None:
    decoder = find_decoder(sized(tiny_model()))
    one = [Label.REFUSED if i == 0 else Label.ANSWERED for i in range(len(TEXTS))]
    for labels, kind in ((one, "the refused and answered prompts"), ([Label.ANSWERED] * len(TEXTS), "harmful and")):
        steering = fitted("adasteer", decoder, labels)
        assert f"so its v is of {kind}" in steering.notes[0]
        assert isinstance(steering, AdaSteering)
        assert steering.rejection.any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("surgical", {"overlap": 1.5}),
        ("surgical", {"addition": -0.1}),
        ("surgical", {"at": 2}),
        ("adasteer", {"rejection_at": "early"}),
        ("adasteer", {"harmfulness_at": -1.0}),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=name):
        make_baseline(name, **options)
