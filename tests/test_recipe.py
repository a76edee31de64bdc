"""`--recipe paper` does what the paper's equations say: against them written out plainly."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

import llmva
from conftest import taught_model, taught_requests, tiny_tokenizer
from llmva.alignment import RunOptions
from llmva.models.chat import encode, render
from llmva.prompts.types import Prompt
from llmva.settings import PAPER, Settings, make_settings

SEED, ITERATIONS, SUBLAYERS, TOKENS = 3, 2, 3, 8


@pytest.fixture(scope="module")
def prompts() -> llmva.PromptSet:
    rows = [Prompt(text, benign, "taught") for text, benign, _ in taught_requests()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    some = [rows[i] for i in order[:120]]
    return llmva.PromptSet(tuple(some[:80]), tuple(some[80:]), ())


def read(model: Any, decoder: llmva.Decoder, text: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """Every o and the final residual stream at the last prompt token, and whether the answer is one."""
    tokenizer, seen = tiny_tokenizer(), list[torch.Tensor]()
    ids = torch.tensor([encode(tokenizer, render(tokenizer, text))])
    places = [s.output for s in decoder.sublayers] + [decoder.last_block]

    def keep(module: Any, args: Any, output: Any) -> None:
        o = output[0] if isinstance(output, tuple) else output
        seen.append(o[0, -1].double())

    handles = [place.register_forward_hook(keep) for place in places]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    answer = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    return torch.stack(seen[:-1]).numpy(), seen[-1].numpy(), not answer.startswith(("no i can", "sorry"))


def normal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    w = LinearSVC(C=1.0, fit_intercept=False, max_iter=2000, random_state=SEED).fit(x, y).coef_[0]
    return w / np.linalg.norm(w)


def iteration(model: Any, train: list[Prompt], validation: list[Prompt]) -> list[int]:
    """Observe, identify, score, select and align `model` in place, as the paper says; returns the sublayers."""
    decoder = llmva.find_decoder(model)
    seen, held = ([read(model, decoder, p.text) for p in some] for some in (train, validation))
    labels = [np.array([1 if s[2] else -1 for s in seen]), np.array([1 if p.benign else -1 for p in train])]
    truth = [np.array([1 if s[2] else -1 for s in held]), np.array([1 if p.benign else -1 for p in validation])]
    final = [normal(np.stack([s[1] for s in seen]), y) for y in labels]
    scores, vectors = [], []
    for k in range(len(decoder.sublayers)):
        x, z = np.stack([s[0][k] for s in seen]), np.stack([s[0][k] for s in held])
        v = [normal(x, y) for y in labels]
        accuracy = [float(np.mean(np.sign(z @ v[m]) == truth[m])) for m in range(2)]
        scores.append(sum(float(final[m] @ v[m]) * accuracy[m] for m in range(2)))
        vectors.append((v[0], v[1], (x @ v[0]).std() / (x @ v[1]).std()))
    chosen = sorted(np.argsort(-np.array(scores), kind="stable")[:SUBLAYERS].tolist())
    for k in chosen:
        v_a, v_b, r = vectors[k]
        weight = decoder.sublayers[k].projection.weight
        edited = weight.double().numpy() + np.outer(v_a, (r * v_b - v_a) @ weight.double().numpy())
        weight.data.copy_(torch.from_numpy(edited))
    return chosen


def test_the_paper_written_out(prompts: llmva.PromptSet) -> None:
    model = taught_model(steps=60)
    plain = copy.deepcopy(model)
    options = RunOptions(measure_test=False)
    settings: dict[str, Any] = {"iterations": ITERATIONS, "layers": SUBLAYERS, "max_new_tokens": TOKENS}
    result = llmva.align(
        model, tiny_tokenizer(), prompts, seed=SEED, recipe="paper", options=options, per_source=99, **settings
    )
    assert result.record["settings"]["svm"] == "sklearn"
    for t in range(ITERATIONS):
        entry = result.record["iterations"][t]
        assert iteration(plain, list(prompts.train), list(prompts.validation)) == sorted(entry["selected"])
    ours = copy.deepcopy(model)
    result.every.at(ITERATIONS).bake(ours)
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    untouched = model.named_parameters()
    assert any((a != b).any() for (_, a), (_, b) in zip(plain.named_parameters(), untouched, strict=True))


def test_what_is_given_wins_over_the_recipe() -> None:
    assert make_settings(recipe="paper").model_dump() == {**Settings().model_dump(), **PAPER, "recipe": "paper"}
    assert make_settings(recipe="paper", svm="exact").svm == "exact"
    assert Settings.paper(iterations=3) == make_settings(recipe="paper", iterations=3)
    assert Settings().passes > 1
    again = make_settings(**Settings.paper(passes=2).model_dump())
    assert again == Settings.paper(passes=2)
