"""Where alignments are written and how much: against the definitions, on models small enough to compute them."""

# ruff: noqa: F811  (fixtures of test_inner_loop)
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from conftest import chat_model, taught_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.method import gradients as module
from llmva.method import inner_loop
from llmva.method.align import align_sublayers
from llmva.method.context import Context
from llmva.method.first_token import FirstTokenClassifier, foretell, predicted_f1
from llmva.method.gradients import FLOOR, RIDGE, gradient_writers, measure_slopes, predict_with_slopes, solve_lengths
from llmva.method.identify import Vectors
from llmva.method.observe import Observation
from llmva.models.batching import Batching
from llmva.models.chat import encode, forward_inputs, pad_left, render
from llmva.progress import Progress
from test_inner_loop import answered, make, prompts, run_inner_loop, taught, texts, told  # noqa: F401  (fixtures)

Answers = tuple[Observation, Observation]


def problem(seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=g, dtype=torch.float64), torch.randn(40, size, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scale", [(1.0, 1.0), (1e-6, 1e3), (1e4, 1e-5)])
def test_lengths_are_the_optimum(seed: int, scale: tuple[float, float]) -> None:
    """Up to one factor for all, which `gradient_writers` sets."""
    gain, felt = problem(seed)
    found = solve_lengths(scale[0] * gain, scale[1] * felt)
    K = felt.T @ felt / len(felt)
    K = K + RIDGE * K.diagonal().mean() * torch.eye(len(K), dtype=K.dtype)

    def loss(alpha: Any) -> float:
        a = torch.from_numpy(alpha)
        return float(0.5 * a @ K @ a - gain @ a)

    best = minimize(loss, [0.1] * len(gain), bounds=[(0, None)] * len(gain), options={"ftol": 1e-14, "gtol": 1e-10})
    wanted = torch.from_numpy(best.x)
    assert wanted.gt(0).any()
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum(), atol=1e-4, rtol=1e-3)
    assert (found >= 0).all()


def test_no_length_where_nothing_is_gained() -> None:
    gain, felt = problem(0)
    assert not solve_lengths(-gain.abs(), felt).any()
    assert not solve_lengths(gain, 0 * felt).any()


def test_of_two_sublayers_that_gain_alike_the_one_that_is_felt_less_gets_more() -> None:
    gain, felt = torch.ones(2, dtype=torch.float64), problem(0, 2)[1]
    found = solve_lengths(gain, felt / felt.pow(2).mean(0).sqrt() * torch.tensor([1.0, 5.0]))
    assert found[0] > 4 * found[1]


# -- the whole, on a taught model


def writers_of(
    work: Context,
    edit: Edit,
    vectors: Vectors,
    candidates: Any,
    some: Any,
    told: FirstTokenClassifier,
    iteration: int,
) -> Tensor | None:
    found = measure_slopes(work, edit, some, told)
    return None if found is None else gradient_writers(work, edit, vectors, candidates, found[0], iteration)


def test_predicting_with_slopes_reads_each_prompt_once_and_says_the_same(
    make: Any, answered: Answers, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, some = make(), answered[0].prompts[:31]
    plain = work.predict_labels(Edit(), some, told)
    slopes, _ = measure_slopes(work, Edit(), some, told) or (None, None)
    assert slopes is not None
    read: list[str] = []
    original = Context.predict_labels

    def noted(self: Context, edit: Edit, prompts: Any, classifier: Any) -> Any:
        read.extend(prompt.text for prompt in prompts)
        return original(self, edit, prompts, classifier)

    monkeypatch.setattr(Context, "predict_labels", noted)
    found, again = predict_with_slopes(work, Edit(), some, told)
    assert again is not None
    assert sorted([*read, *(prompt.text for prompt in again.prompts)]) == sorted(prompt.text for prompt in some)
    assert found.labels == plain.labels
    assert found.prompts == plain.prompts
    torch.testing.assert_close(found.capture.outputs, plain.capture.outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.capture.final, plain.capture.final, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.capture.shares, plain.capture.shares, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.slopes, slopes.slopes, rtol=1e-4, atol=1e-5)


def log_odds(work: Context, edit: Edit, some: Any, told: FirstTokenClassifier) -> Tensor:
    """z of prompts [n] under an edit, by a plain forward pass."""
    model, tokenizer = work.chat.model, tiny_tokenizer()
    rows = [encode(tokenizer, render(tokenizer, prompt.text)) for prompt in some]
    ids, mask = pad_left(rows, 0, torch.device("cpu"))
    with edit.apply(model, check=False), torch.no_grad():
        logits = model(**forward_inputs(model, ids, mask), use_cache=False).logits[:, -1]
    shares = torch.softmax(logits, -1) @ told.table(logits.shape[1])
    return (shares.double() + FLOOR).log() @ torch.tensor([1.0, -1.0], dtype=torch.float64)


@pytest.fixture
def read(make: Any, answered: Answers) -> tuple[Context, Vectors]:
    work = make()
    return work, work.fit(*answered, None, 1)


def test_writers_move_decisions_as_predicted(read: Any, answered: Answers, told: FirstTokenClassifier) -> None:
    """A small step moves the log-odds of answering by alpha (u.o)(g.p), summed; so by the sign of what is read."""
    work, vectors = read
    train = answered[0]
    everywhere = range(len(vectors.scores))
    writers = writers_of(work, Edit(), vectors, everywhere, train.prompts, told, 1)
    assert writers is not None
    chosen = [s for s in everywhere if writers[s].any()]
    assert chosen
    small = 1e-3
    edit = align_sublayers(Edit(), work.chat.decoder.sublayers, vectors, chosen, 1, small, writers)
    some = train.prompts[:: module.EVERY]
    before = log_odds(work, Edit(), some, told)
    moved = (log_odds(work, edit, some, told) - before) / small
    v_a, v_b = vectors.directions.unbind(1)
    readers = vectors.ratio[:, None] * v_b - v_a
    outputs = train.capture.outputs[:, :: module.EVERY].double()
    said = torch.einsum("snd,sd->sn", outputs, readers)[chosen]
    # the mean gradient stands for each prompt's own, so signs and size agree, not every number
    total = said.sum(0)
    assert torch.corrcoef(torch.stack([total, moved]))[0, 1] > 0.8
    shares = before.clamp(-9.2, 9.2)  # MIN_CHANCE is e^-9.2
    assert 0.2 < moved.std(correction=0) / shares.std(correction=0) < 5.0


def test_candidates_alone_are_written_to(read: Any, answered: Answers, told: FirstTokenClassifier) -> None:
    work, vectors = read
    args = (answered[0].prompts, told, 1)
    free = writers_of(work, Edit(), vectors, range(6), *args)
    assert free is not None
    one = next(s for s in range(6) if free[s].any())
    held = writers_of(work, Edit(), vectors, [one], *args)
    assert held is not None
    assert [bool(row.any()) for row in held] == [s == one for s in range(6)]
    torch.testing.assert_close(held[one] / held[one].norm(), free[one] / free[one].norm())


def test_it_is_deterministic_whatever_the_batches(read: Any, answered: Answers, told: FirstTokenClassifier) -> None:
    """Tokens are drawn by numbers that belong to the message, not to the batch."""
    work, vectors = read
    small = replace(work, chat=replace(work.chat, batching=Batching(64)))
    one, two = (writers_of(w, Edit(), vectors, range(6), answered[0].prompts, told, 1) for w in (work, small))
    assert one is not None
    assert two is not None
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("prefer", ["safety", "usefulness"])
def test_what_is_preferred_weighs_more(
    read: Any,
    answered: Answers,
    told: FirstTokenClassifier,
    prefer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gain is then that of toxic prompts, or of benign ones, four times over."""
    work, vectors = read
    gains: list[Tensor] = []
    original = solve_lengths

    def keep(gain: Tensor, felt: Tensor) -> Tensor:
        gains.append(gain)
        return original(gain, felt)

    monkeypatch.setattr(module, "solve_lengths", keep)
    everyone = answered[0].prompts
    args = (Edit(), vectors, range(6), everyone, told, 1)
    leaning = replace(work, settings=work.settings.model_copy(update={"prefer": prefer}))
    for one in (work, leaning):
        writers_of(one, *args)
    heavy = [p for p in everyone[:: module.EVERY] if p.benign == (prefer == "usefulness")]
    monkeypatch.setattr(module, "EVERY", 1)
    writers_of(work, Edit(), vectors, range(6), heavy, told, 1)
    # writers are unchanged only in direction of the mean over all prompts, so compare by sign of the difference
    assert not torch.allclose(gains[0], gains[1])
    assert torch.corrcoef(torch.stack([gains[1] - gains[0], gains[2]]))[0, 1] > 0.5


class Noting(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_without_gradients_the_papers_writer_is_used(
    read: Any,
    answered: Answers,
    texts: Any,
    told: FirstTokenClassifier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, vectors = read
    work = replace(work, progress=Noting())

    def fails(*args: Any) -> Any:
        raise RuntimeError("no backward")

    monkeypatch.setattr(module, "gradients", fails)
    assert writers_of(work, Edit(), vectors, range(6), answered[0].prompts, told, 1) is None
    assert len(work.progress.notes) == 1
    assert "along v_a" in work.progress.notes[0]
    found = run_inner_loop(work, Edit(), *answered, told, texts, 1, 1.0, use_gradients=True)
    chosen = inner_loop.select(found.vectors.scores, work.sublayer_count)
    assert {work.chat.decoder.names[s] for s in chosen} <= set(found.edit.written(1))


def test_offloaded_weights_are_not_held_by_a_graph(read: Any, answered: Answers, told: FirstTokenClassifier) -> None:
    work, vectors = read
    away = SimpleNamespace(parameters=lambda: iter([torch.empty(1), torch.empty(1, device="meta")]))
    work = replace(work, progress=Noting(), chat=replace(work.chat, decoder=replace(work.chat.decoder, model=away)))
    assert writers_of(work, Edit(), vectors, range(6), answered[0].prompts, told, 1) is None
    assert "offloaded" in work.progress.notes[0]


def test_where_much_is_left_to_do_the_papers_way_is_tried_too(
    make: Any, answered: Answers, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gradients gain little, what is foreseen to fare better is taken."""
    work, args = make(passes=4), (Edit(), *answered, told, texts, 1, 1.0)
    plain = run_inner_loop(work, *args, use_gradients=False)
    found = run_inner_loop(work, *args, use_gradients=True)
    assert plain.predicted is not None
    assert found.predicted is not None
    start = predicted_f1(foretell(answered[1], told))[0]
    assert found.predicted >= min(plain.predicted, inner_loop.NEARLY_DONE, start + inner_loop.WELL * (1 - start))
    assert run_inner_loop(make(max_kl=0), *args, use_gradients=True).stuck == inner_loop.FORBIDDEN
    monkeypatch.setattr(inner_loop, "NEARLY_DONE", -1.0)  # never much to do
    calls: list[Any] = []
    monkeypatch.setattr(inner_loop, "gradient_writers", lambda *args: calls.append(args))
    run_inner_loop(work, *args, use_gradients=True)
    assert calls


def test_weights_that_wanted_gradients_want_them_still(
    answered: Answers, told: FirstTokenClassifier, make: Any
) -> None:
    work = make()
    model = taught_model()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    model.lm_head.weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    other = replace(work, chat=chat_model(model, tiny_tokenizer()))
    assert writers_of(other, Edit(), other.fit(*answered, None, 1), range(6), answered[0].prompts, told, 1) is not None
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
