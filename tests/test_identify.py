"""The alignment equation o'.v_a = r o.v_b, on the actual model with the actual hooks, on prompts not fitted on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import chat_model, tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.judges.base import Judgement, Label
from llmva.method.align import align_one, align_sublayers
from llmva.method.identify import Fit, Vectors, identify, source_differences
from llmva.method.observe import Observation
from llmva.method.svm import fit_sklearn, fit_svms, spread, unit
from llmva.models.batching import Batching
from llmva.models.generate import Capture, capture
from llmva.models.harmless import outputs_on_text
from llmva.models.sublayers import Decoder, find_decoder
from llmva.prompts.types import Prompt

THINGS = ["the door", "a table", "the lamp", "a garden", "the kettle", "a poem", "the song", "a trap", "the lock"]
TRAIN = [f"please {verb} {thing}" for verb in ("make", "break", "open") for thing in THINGS]
HELD_OUT = [f"tell me how to {verb} {thing} ?" for verb in ("paint", "close") for thing in THINGS[:5]]


def observed(decoder: Decoder, texts: list[str], seed: int) -> Observation:
    """Real captures under arbitrary labels: the equation must hold whatever the vectors are."""
    flips = torch.randint(2, (2, len(texts)), generator=torch.Generator().manual_seed(seed)).bool()
    flips[:, 0], flips[:, 1] = True, False
    prompts = [Prompt(text, benign, "test") for text, benign in zip(texts, flips[1].tolist(), strict=True)]
    labels = [Label.ANSWERED if a else Label.REFUSED for a in flips[0].tolist()]
    found = capture(decoder, tiny_tokenizer(), texts, max_new_tokens=0)
    return Observation(prompts, [Judgement(label, 1.0, "") for label in labels], found)


def held_out(decoder: Decoder, edit: Edit | None = None) -> Tensor:
    """Outputs on unseen prompts, float64 [S, n, d]."""
    if edit is None:
        return capture(decoder, tiny_tokenizer(), HELD_OUT, max_new_tokens=0).outputs.double()
    with edit.apply(decoder.model):
        return held_out(decoder)


def close(actual: Tensor, wanted: Tensor) -> None:
    assert float((actual - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def fitted(decoder: Decoder, seed: int = 0, **options: Any) -> Vectors:
    return identify(observed(decoder, TRAIN, seed), observed(decoder, HELD_OUT, seed + 1), **options)


def larger(model: Any) -> Any:
    """Weights of ordinary size: those of a fresh model are so small that everything is nearly linear."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.ndim == 2 and "embed" not in name:
            p.data.normal_(0.0, 1.5 / p.shape[1] ** 0.5, generator=g)
        elif "norm" in name or "ln" in name:
            p.data.add_(torch.randn(p.shape, generator=g), alpha=0.3)
    return model


ARCHITECTURES = ["LlamaConfig", "GPT2Config", "PhiConfig", "MixtralConfig", "Qwen3NextConfig"]
CHANGES = {
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3NextConfig": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_hidden_layers": 4,
    },
}


@pytest.mark.parametrize(
    ("config", "step"), [(c, 1.0) for c in ARCHITECTURES] + [(c, 0.3) for c in ARCHITECTURES if c != "Qwen3NextConfig"]
)
def test_alignment_holds_on_held_out_prompts(config: str, step: float) -> None:
    decoder = find_decoder(larger(tiny_model(config, **CHANGES.get(config, {}))))
    vectors = fitted(decoder)
    before = held_out(decoder)
    # one at a time, so that what comes before it stays unedited
    for s in range(0, len(decoder.sublayers), 6 if config == "Qwen3NextConfig" else 1):
        if config == "PhiConfig" and s == 1:
            continue  # constant: see below
        edit = align_sublayers(Edit(), decoder.sublayers, vectors, [s], 1, step)
        assert list(edit.factors) == [decoder.names[s]]
        after = held_out(decoder, edit)[s]
        v_a, v_b = vectors.directions[s]
        wanted = (1 - step) * (before[s] @ v_a) + step * float(vectors.ratio[s]) * (before[s] @ v_b)
        close(after @ v_a, wanted)
        # least change: nothing moves across v_a
        change = after - before[s]
        close(change, (change @ v_a)[:, None] * v_a)
        assert float(change.norm()) > 1e-3 * float(before[s].norm())


@pytest.mark.parametrize("config", ["Gemma2Config", "Gemma3TextConfig", "Olmo2Config"])
def test_alignment_behind_a_post_norm(config: str) -> None:
    """The residual stream gets c * gain * p, c a scalar of the token: the equation holds on p, and on o up to c."""
    decoder = find_decoder(larger(tiny_model(config)))
    inner = replace(decoder, sublayers=tuple(replace(s, output=s.projection) for s in decoder.sublayers))
    vectors = fitted(decoder)
    before, p = held_out(decoder), held_out(inner)
    for s, sublayer in enumerate(decoder.sublayers):
        edit = align_sublayers(Edit(), decoder.sublayers, vectors, [s], 1)
        after, p_after = held_out(decoder, edit)[s], held_out(inner, edit)[s]
        v_a, v_b = vectors.directions[s]
        r = float(vectors.ratio[s])
        gain = sublayer.gain
        assert gain is not None
        assert float((gain - gain.mean()).abs().max()) > 0.1  # else any gain would pass
        close(p_after @ (gain * v_a), r * (p[s] @ (gain * v_b)))
        epsilon = getattr(sublayer.output, "eps", None) or sublayer.output.variance_epsilon
        c, c_after = (1.0 / (x.pow(2).mean(-1) + epsilon).sqrt() for x in (p[s], p_after))
        close((after @ v_a) / c_after, r * (before[s] @ v_b) / c)


def test_a_second_iteration_aligns_what_the_first_left() -> None:
    """Steps compose: the second is fitted on, and holds for, the outputs of the model edited by the first."""
    decoder = find_decoder(larger(tiny_model()))
    s = 3
    edit = align_sublayers(Edit(), decoder.sublayers, fitted(decoder), [s], 1)
    with edit.apply(decoder.model):
        second = fitted(decoder, seed=7)
    between = held_out(decoder, edit)[s]
    both = align_sublayers(edit, decoder.sublayers, second, [s], 2)
    v_a, v_b = second.directions[s]
    close(held_out(decoder, both)[s] @ v_a, float(second.ratio[s]) * (between @ v_b))
    assert both.factors[decoder.names[s]].iteration.tolist() == [1, 2]


def test_all_chosen_sublayers_are_edited_from_the_same_capture() -> None:
    decoder = find_decoder(larger(tiny_model()))
    vectors = fitted(decoder)
    edit = align_sublayers(Edit(), decoder.sublayers, vectors, [0, 3, 5], 4)
    assert list(edit.factors) == [decoder.names[s] for s in (0, 3, 5)]
    for s in (0, 3, 5):
        alone = align_sublayers(Edit(), decoder.sublayers, vectors, [s], 4).factors[decoder.names[s]]
        together = edit.factors[decoder.names[s]]
        assert torch.equal(alone.V, together.V)
        assert torch.equal(alone.U, together.U)
        assert together.iteration.tolist() == [4]


@pytest.mark.parametrize("gain", [None, torch.tensor([2.0, 0.5, 1.0, 3.0])])
def test_align_one_by_its_equation(gain: Tensor | None) -> None:
    g = torch.Generator().manual_seed(0)
    v_a, v_b = unit(torch.randn(2, 4, generator=g, dtype=torch.float64))
    v, u = align_one(v_a, v_b, 1.7, gain)
    o = torch.randn(9, 4, generator=g, dtype=torch.float64)
    edited = o + (o @ u)[:, None] * v
    scale = torch.ones(4) if gain is None else gain
    torch.testing.assert_close((edited * scale) @ v_a, 1.7 * ((o * scale) @ v_b))


def test_ratio_by_hand() -> None:
    two = torch.zeros(2, 2, 3)
    vectors = Vectors(two, torch.tensor([[3.0, 2.0], [1.0, 0.0]]), two[..., 0], two[:, 0, 0], two[:, 0, 0], two[0])
    assert vectors.ratio.tolist() == [1.5, 0.0]


# -- identify --------------------------------------------------------------------------------------------------------


def test_identify_returns_what_its_parts_compute() -> None:
    decoder = find_decoder(larger(tiny_model()))
    train, validation = observed(decoder, TRAIN, 0), observed(decoder, HELD_OUT, 1)
    vectors = identify(train, validation, fit=Fit(C=0.5))
    features = train.capture.outputs.double()
    v = unit(fit_svms(features, train.signs, 0.5))
    torch.testing.assert_close(vectors.directions, v)
    for s in range(6):
        for m in range(2):
            on_train = features[s] @ v[s, m]
            assert float(vectors.spread[s, m]) == pytest.approx(float(on_train.std(correction=0)))
            side = (validation.capture.outputs[s].double() @ v[s, m] > 0) == (validation.signs[m] > 0)
            assert float(vectors.accuracy[s, m]) == pytest.approx(float(side.double().mean()))
        cosine = float((v[s, 0] @ v[s, 1]).clamp(-1, 1))
        assert float(vectors.angles[s]) == pytest.approx(
            float(torch.rad2deg(torch.acos(torch.tensor(cosine)))), abs=1e-3
        )
    final = unit(fit_svms(train.capture.final[None].double(), train.signs, 0.5))[0]
    wanted = ((v * final).sum(-1) * vectors.accuracy).sum(-1)
    torch.testing.assert_close(vectors.scores, wanted)


def test_identify_with_the_papers_solver() -> None:
    decoder = find_decoder(tiny_model())
    train = observed(decoder, TRAIN, 0)
    vectors = identify(train, train, fit=Fit(svm="sklearn", seed=3))
    torch.testing.assert_close(
        vectors.directions, unit(fit_sklearn(train.capture.outputs.double(), train.signs, seed=3))
    )


def test_identify_with_quiet_readers() -> None:
    """The readers r v_b - v_a move less on harmless text than the paper's, and quiet = 0 is the paper's."""
    decoder = find_decoder(larger(tiny_model()))
    train, validation = observed(decoder, TRAIN, 0), observed(decoder, HELD_OUT, 1)
    texts = [(text, "sure here is how to do it : a song for the garden") for text in HELD_OUT[:4]]
    harmless = outputs_on_text(
        chat_model(decoder, tiny_tokenizer(), Batching(1000)), texts, 12, torch.Generator().manual_seed(0)
    )
    paper = identify(train, validation)
    assert torch.equal(
        paper.directions, identify(train, validation, harmless=harmless, fit=Fit(harmless_weight=0)).directions
    )
    quiet = identify(train, validation, harmless=harmless, fit=Fit(harmless_weight=30.0))
    for s in range(6):
        moved = [(harmless[s].double() @ v.directions[s].T).pow(2).sum() for v in (quiet, paper)]
        assert moved[0] < moved[1]


def test_a_silent_sublayer_leaves_the_others_alone() -> None:
    """Its projection is zero, as after pruning: zero vectors, and no edit there."""
    model = larger(tiny_model())
    nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    decoder = find_decoder(model)
    vectors = fitted(decoder)
    assert not vectors.directions[3].any()
    assert bool(torch.isnan(vectors.angles[3]))
    assert torch.isfinite(vectors.scores).all()
    edit = align_sublayers(Edit(), decoder.sublayers, vectors, list(range(6)), 1)
    assert list(edit.factors) == [name for s, name in enumerate(decoder.names) if s != 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ["PhiConfig", "GPTNeoXConfig", "Cohere2Config"])
def test_a_constant_sublayer_is_not_edited(config: str, dtype: torch.dtype) -> None:
    """Parallel residuals: the first MLP sees the last token only, the same for every prompt, and no other does."""
    decoder = find_decoder(larger(tiny_model(config)).to(dtype))
    vectors = fitted(decoder)
    silent = [s for s in range(6) if not vectors.directions[s].any()]
    assert silent == [1]
    assert vectors.scores[1] == 0
    edit = align_sublayers(Edit(), decoder.sublayers, vectors, list(range(6)), 1)
    assert decoder.names[1] not in edit.factors
    assert len(edit.factors) == 5


# -- v_b that reads more than the style of sources ------------------------------------------------------------------


def two_styles(side_moves: float, generator: torch.Generator) -> tuple[list[Prompt], Tensor]:
    """Sources that differ along axis 1 in style, and along axis 0 by side; the style gives the sides away, too."""
    prompts, rows = [], []
    for source, benign, style in (("a", True, 3.0), ("b", True, 1.0), ("c", False, -1.0), ("d", False, -3.0)):
        for i in range(30):
            prompts.append(Prompt(f"{source} {i}", benign, source))
            x = torch.randn(6, generator=generator, dtype=torch.float64)
            x[0] += side_moves if benign else -side_moves
            x[1] += style
            rows.append(x)
    return prompts, torch.stack(rows)


def observed_as(prompts: list[Prompt], features: Tensor) -> Observation:
    labels = [Judgement(Label.ANSWERED if i % 2 else Label.REFUSED, 1.0, "") for i in range(len(prompts))]
    return Observation(prompts, labels, Capture([""] * len(prompts), features[None], features, 0))


def test_differences_between_sources_of_a_side_count_less() -> None:
    prompts, features = two_styles(1.0, torch.Generator().manual_seed(0))
    seen = observed_as(prompts, features)
    plain, robust = (identify(seen, seen, fit=Fit(source_weight=weight)).directions[0] for weight in (0.0, 1000.0))
    assert abs(plain[1, 1]) > 0.5  # v_b reads the style
    assert abs(robust[1, 1]) < 0.3
    assert robust[1, 0] > plain[1, 0] + 0.1
    assert torch.equal(plain[0], robust[0])  # v_a is as it was
    apart = source_differences(features, prompts)
    assert apart.shape == (4, 6)
    torch.testing.assert_close(apart[0], -apart[1])
    assert abs(float(apart[0, 1])) == pytest.approx(1.0, abs=0.3)


def test_prompts_that_are_read_teach_v_b_alone() -> None:
    g = torch.Generator().manual_seed(1)
    prompts, features = two_styles(1.0, g)
    # of the user's sources only a and d, whose style is enough to tell the sides
    kept = [i for i, p in enumerate(prompts) if p.source in "ad"]
    seen = observed_as([prompts[i] for i in kept], features[kept])
    others = torch.randn(200, 6, generator=g, dtype=torch.float64)
    sides = [bool(x[0] > 0) for x in others]
    others[:, 0] += torch.tensor([2.0 if side else -2.0 for side in sides])
    read = replace(observed_as([Prompt(f"r {i}", side, "r") for i, side in enumerate(sides)], others), judgements=[])
    alone, both = (identify(seen, seen, read=r).directions[0] for r in (None, read))
    assert torch.equal(alone[0], both[0])
    assert abs(both[1, 1]) < abs(alone[1, 1])
    assert both[1, 0] > alone[1, 0]


def test_a_known_v_b_is_kept_and_v_a_is_fitted_anew() -> None:
    prompts, features = two_styles(0.3, torch.Generator().manual_seed(2))
    before, after = (observed_as(prompts, x) for x in (features, features.flip(1)))
    first, anew = identify(before, before), identify(after, after)
    kept = identify(after, after, benign=first)
    assert torch.equal(kept.directions[:, 0], anew.directions[:, 0])
    assert torch.equal(kept.directions[:, 1], first.directions[:, 1])
    assert torch.equal(kept.final, torch.stack([anew.final[0], first.final[1]]))
    # spreads and accuracies are those of the new outputs
    torch.testing.assert_close(kept.spread, spread(after.capture.outputs.double(), kept.directions))
    assert not torch.allclose(kept.accuracy[:, 1], first.accuracy[:, 1])


def test_the_cost_follows_the_scale_of_the_outputs() -> None:
    prompts, features = two_styles(0.3, torch.Generator().manual_seed(2))
    small, large = (observed_as(prompts, scale * features) for scale in (1.0, 20.0))
    plain, scaled = ([identify(s, s, fit=Fit(scaled=on)).directions for s in (small, large)] for on in (False, True))
    torch.testing.assert_close(*scaled)
    assert not torch.allclose(*plain, atol=1e-3)
