"""Several alignments from one round of answers: which are accepted, and what they are when nothing can be foreseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import llmva
from conftest import chat_model, taught_model, taught_requests, tiny_tokenizer
from llmva import alignment
from llmva.alignment import RunOptions, _recall
from llmva.edit import Edit
from llmva.judges.base import Label
from llmva.method import inner_loop, line_search, rollback
from llmva.method.align import align_sublayers
from llmva.method.context import Context, State
from llmva.method.first_token import FirstTokenClassifier, predict_labels, predicted_f1
from llmva.method.identify import select
from llmva.method.inner_loop import FORBIDDEN, NO_STEP, InnerResult
from llmva.method.line_search import MIN_GAIN
from llmva.method.observe import Observation, observe
from llmva.method.rollback import Plan
from llmva.metrics.objective import Objective
from llmva.models.batching import Batching
from llmva.models.harmless import agreement
from llmva.models.sublayers import find_decoder
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.runs.run import Run
from llmva.settings import make_settings
from test_resume import Strict

UNTESTED = RunOptions(measure_test=False)
JUDGE = llmva.judges.make_judge("phrases")
FAST = {"per_source": 40, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    rows = taught_requests()
    return PromptSet.from_lists(*([text for text, benign, _ in rows if benign == side] for side in (False, True)))


@pytest.fixture(scope="module")
def taught() -> Any:
    return taught_model()


@pytest.fixture
def make(taught: Any, prompts: PromptSet) -> Callable[..., Context]:
    def work(**settings: Any) -> Context:
        chosen = make_settings(**{**FAST, **settings})
        benign = sum(prompt.benign for prompt in prompts.validation)
        objective = Objective.of(chosen, benign, len(prompts.validation) - benign)
        return Context(chat_model(taught, tiny_tokenizer()), prompts, JUDGE, chosen, objective, 4, 0, Progress())

    return work


@pytest.fixture(scope="module")
def answered(taught: Any, prompts: PromptSet) -> tuple[Observation, Observation]:
    """The untouched model's answers to training and validation prompts, judged."""
    decoder, tokenizer = find_decoder(taught), tiny_tokenizer()
    train, validation = (
        observe(chat_model(decoder, tokenizer), split, JUDGE, max_new_tokens=8)
        for split in (prompts.train, prompts.validation)
    )
    return train, validation


@pytest.fixture(scope="module")
def texts(answered: tuple[Observation, Observation]) -> list[tuple[str, str]]:
    """What the untouched model answered benign prompts."""
    train, _ = answered
    rows = zip(train.prompts, train.capture.answers, train.labels, strict=True)
    return [(prompt.text, answer) for prompt, answer, label in rows if prompt.benign and label is Label.ANSWERED][:16]


@pytest.fixture(scope="module")
def told(answered: tuple[Observation, Observation]) -> FirstTokenClassifier:
    return FirstTokenClassifier().learn(answered[0]).learn(answered[1])


def promised(work: Context, edit: Edit, told: FirstTokenClassifier, validation: Observation) -> tuple[float, float]:
    with edit.apply(work.chat.model, check=False):
        return predicted_f1(predict_labels(work.chat, validation.prompts, told))


def equal(one: Edit, other: Edit) -> bool:
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(a, b)
        for name in one.factors
        for a, b in zip(vars(one.factors[name]).values(), vars(other.factors[name]).values(), strict=True)
    )


def columns(edit: Edit) -> set[int]:
    return {f.V.shape[1] for f in edit.factors.values()}


def run_inner_loop(
    context: Context,
    edit: Edit,
    train: Observation,
    validation: Observation,
    classifier: FirstTokenClassifier | None,
    texts: Any,
    iteration: int,
    step: float,
    use_gradients: bool = False,
) -> InnerResult:
    """Written as in the paper: this file tests how passes are chosen, test_gradient_writers how they are written."""
    known = classifier or FirstTokenClassifier()
    state = State(edit, iteration - 1, train, validation, known, 1.0, texts)
    plan = Plan([], 0, None, False, step, use_gradients, classifier is not None, None, None)
    return inner_loop.fit_select_align(context, state, plan)


class Counted:
    """A method that keeps what it returned."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.returned: list[Any] = []

    def __get__(self, owner: Any, kind: Any) -> Any:
        def call(*args: Any) -> Any:
            self.returned.append(self.method(owner, *args))
            return self.returned[-1]

        return call


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No alignment is shortened."""
    monkeypatch.setattr(line_search.LineSearch, "_shortened", lambda self, now, move, found, above: found)


# -- without a classifier


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_what_cannot_be_foreseen_is_one_step_of_the_paper(
    make: Any, answered: Any, texts: Any, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make(passes=8)
    monkeypatch.setattr(Context, "predict_labels", None)  # nothing is asked that cannot be answered
    found = run_inner_loop(work, Edit(), *answered, None, texts, 1, step)
    vectors = work.fit(*answered, work.harmless_outputs(Edit(), texts, 1), 1)
    chosen = select(vectors.scores, work.sublayer_count)
    names = [work.chat.decoder.names[s] for s in chosen]
    assert (found.passes, found.predicted, found.edit.written(1)) == (1, None, names)
    assert torch.equal(found.vectors.directions, vectors.directions)
    paper = align_sublayers(Edit(), work.chat.decoder.sublayers, vectors, chosen, 1, step)
    assert equal(found.edit, paper)
    assert found.edit.held == [1]


def test_one_pass_with_foresight_is_that_step_too_if_it_helps(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly(monkeypatch)
    monkeypatch.setattr(line_search, "MAX_RATIO_SCALE", 1.0)
    monkeypatch.setattr(line_search, "TRUST_RADIUS", 1e9)
    work = make(passes=1)
    found = run_inner_loop(work, Edit(), *answered, told, texts, 1, 1.0)
    assert found.passes == 1
    assert equal(found.edit, run_inner_loop(work, Edit(), *answered, None, texts, 1, 1.0).edit)
    assert found.predicted == promised(work, found.edit, told, answered[1])[0]


# -- with it


def test_passes_go_on_as_long_as_they_are_foreseen_to_help(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier
) -> None:
    """Every pass reads vectors of the model as it then is, and is worth more than the one before."""
    ends: list[InnerResult] = []
    for most in (1, 2, 3):
        ends.append(run_inner_loop(make(passes=most), Edit(), *answered, told, texts, 1, 0.3))
    assert [end.passes for end in ends] == [1, 2, 3]
    assert columns(ends[0].edit) == {1}
    assert all(end.edit.held == [1] for end in ends)  # all of them are of one iteration
    values = [promised(make(), edit, told, answered[1]) for edit in (Edit(), *(end.edit for end in ends))]
    assert values == sorted(set(values))
    for fewer, more in pairwise(ends):
        for name, f in fewer.edit.factors.items():
            k = f.V.shape[1]
            assert torch.equal(more.edit.factors[name].V[:, :k], f.V)
    assert torch.equal(ends[0].vectors.directions, ends[2].vectors.directions)  # what is shown is of the first


def test_it_is_deterministic(make: Any, answered: Any, texts: Any, told: FirstTokenClassifier) -> None:
    one, two = (run_inner_loop(make(passes=4), Edit(), *answered, told, texts, 1, 0.3) for _ in range(2))
    assert equal(one.edit, two.edit)
    assert one.predicted == two.predicted


def test_steps_begin_at_the_first_block_that_they_edit(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a third of the work of a pass spared, the edit is the same."""
    last = range(4, 6)  # sublayers of the last of three blocks
    monkeypatch.setattr(line_search.LineSearch, "_below", counted := Counted(line_search.LineSearch._below))
    for module in (inner_loop, line_search):
        monkeypatch.setattr(module, "select", lambda scores, count: list(last), raising=False)
    shared = run_inner_loop(make(passes=3), Edit(), *answered, told, texts, 1, 0.3)
    assert shared.passes
    assert all(below.first == 2 and below.proven for below in counted.returned)
    assert len(set(map(id, counted.returned))) == 1  # all passes share the same
    monkeypatch.setattr(line_search.Below, "of", lambda decoder, first: None)
    whole = run_inner_loop(make(passes=3), Edit(), *answered, told, texts, 1, 0.3)
    assert shared.passes == whole.passes
    for name, f in whole.edit.factors.items():
        torch.testing.assert_close(shared.edit.factors[name].V, f.V, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shared.edit.factors[name].U, f.U, atol=1e-5, rtol=1e-4)


def scripted(
    monkeypatch: pytest.MonkeyPatch, values: list[tuple[float, float]], ratio_scale: float = 1.0, ahead: int = 0
) -> list[float]:
    """`predicted_f1` says `values` one after the other; the steps that are tried come back."""
    plainly(monkeypatch)
    monkeypatch.setattr(line_search, "MAX_RATIO_SCALE", ratio_scale)
    monkeypatch.setattr(line_search, "TRUST_RADIUS", 1e9)
    monkeypatch.setattr(inner_loop, "LOOK_AHEAD", ahead)
    steps: list[float] = []
    left = iter(values)
    original = align_sublayers

    def align(*args: Any) -> Edit:
        steps.append(args[5])
        return original(*args)

    monkeypatch.setattr(line_search, "align_sublayers", align)
    for module in (inner_loop, line_search):
        monkeypatch.setattr(module, "predicted_f1", lambda seen, beta=1.0: next(left))
    return steps


def test_a_step_that_is_foreseen_to_go_too_far_is_halved(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = scripted(monkeypatch, [(0.5, 0.5), (0.4, 0.9), (0.5, 0.5), (0.5, 0.6), (0.8, 0.1), (0.9, 0.2)])
    found = run_inner_loop(make(passes=3), Edit(), *answered, told, texts, 1, 0.8)
    # worse; no better; better by the chances; then two whole steps, better by the labels
    assert steps == [0.8, 0.4, 0.2, 0.8, 0.8]
    assert (found.passes, found.predicted) == (3, 0.9)


def test_after_a_quarter_of_the_step_it_gives_up(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = scripted(monkeypatch, [(0.5, 0.5), (0.6, 0.5), *[(0.6, 0.5)] * 3])
    found = run_inner_loop(make(passes=8), Edit(), *answered, told, texts, 1, 1.0)
    assert steps == [1.0, 1.0, 0.5, 0.25]
    assert (found.passes, found.predicted) == (1, 0.6)
    assert columns(found.edit) == {1}  # what did not help left nothing


def test_where_a_pass_brings_little_r_is_raised_until_that_helps_no_more(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = scripted(monkeypatch, [(0.5, 0.5), (0.51, 0.5), (0.53, 0.5), (0.52, 0.9)], ratio_scale=4.0)
    found = run_inner_loop(make(passes=1, min_kept=0.0, max_kl=99.0), Edit(), *answered, told, texts, 1, 1.0)
    assert steps == [1.0, 1.0, 1.0]  # r as it is, twice, four times: the step's length stays
    assert (found.passes, found.predicted) == (1, 0.53)
    monkeypatch.undo()
    work = make(passes=1)
    vectors = work.fit(*answered, work.harmless_outputs(Edit(), texts, 1), 1)
    doubled = replace(vectors, spread=vectors.spread * torch.tensor([2.0, 1.0], dtype=vectors.spread.dtype))
    chosen = select(vectors.scores, work.sublayer_count)
    wanted = align_sublayers(Edit(), work.chat.decoder.sublayers, doubled, chosen, 1)
    assert equal(found.edit, wanted)


def test_a_pass_that_brings_much_is_taken_as_it_is(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = scripted(monkeypatch, [(0.5, 0.5), (0.6, 0.5)], ratio_scale=4.0)
    assert run_inner_loop(make(passes=1), Edit(), *answered, told, texts, 1, 1.0).predicted == 0.6
    assert steps == [1.0]


def test_a_pass_that_does_not_help_is_kept_if_the_next_ones_do(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = [(0.5, 0.5)] * 3
    scripted(monkeypatch, [(0.5, 0.5), (0.6, 0.5), *worse, *worse, (0.7, 0.5), *worse, *worse, *worse], ahead=2)
    found = run_inner_loop(make(passes=8), Edit(), *answered, told, texts, 1, 1.0)
    assert (found.passes, found.predicted) == (4, 0.7)
    assert max(columns(found.edit)) == 4


@pytest.mark.parametrize(("whole", "taken"), [(0.6, True), (0.51, False)])
def test_a_step_that_was_cut_and_brings_little_is_tried_whole(
    make: Any,
    answered: Any,
    texts: Any,
    told: FirstTokenClassifier,
    whole: float,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(monkeypatch, [(0.5, 0.5), (0.52, 0.5), (whole, 0.5)])
    monkeypatch.setattr(line_search, "TRUST_RADIUS", 1e-4)
    found = run_inner_loop(make(passes=1), Edit(), *answered, told, texts, 1, 1.0)
    assert found.predicted == max(0.52, whole)
    monkeypatch.undo()
    assert equal(found.edit, run_inner_loop(make(), Edit(), *answered, None, texts, 1, 1.0).edit) == taken


def test_passes_that_lead_nowhere_are_taken_back(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [(0.5, 0.5), (0.6, 0.5), *[(0.5, 0.5)] * 9], ahead=2)
    found = run_inner_loop(make(passes=8), Edit(), *answered, told, texts, 1, 1.0)
    assert (found.passes, found.predicted) == (1, 0.6)
    assert columns(found.edit) == {1}


def test_nothing_is_looked_ahead_to_when_no_pass_is_left(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = scripted(monkeypatch, [(0.5, 0.5), (0.6, 0.5), *[(0.5, 0.5)] * 3], ahead=2)
    found = run_inner_loop(make(passes=2), Edit(), *answered, told, texts, 1, 1.0)
    assert (found.passes, steps) == (1, [1.0, 1.0, 0.5, 0.25])


def test_where_nothing_is_foreseen_to_help_and_much_is_left_the_papers_step_is_made(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [(0.5, 0.5)] * 4)
    found = run_inner_loop(make(passes=8), Edit(), *answered, told, texts, 1, 0.6)
    assert (found.passes, found.predicted, found.stuck) == (1, 0.5, None)
    monkeypatch.undo()
    assert equal(found.edit, run_inner_loop(make(), Edit(), *answered, None, texts, 1, 0.6).edit)


def test_where_little_is_left_no_step_is_made(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [(0.96, 0.5)] * 4)
    found = run_inner_loop(make(passes=8), Edit(), *answered, told, texts, 1, 1.0)
    assert (found.passes, found.predicted, found.stuck) == (0, 0.96, NO_STEP)
    assert found.edit.factors == {}
    assert found.vectors is not None  # they are shown all the same


def test_a_run_without_a_step_ends(taught: Any, tokenizer: Any, prompts: PromptSet, monkeypatch: Any) -> None:
    for module in (inner_loop, line_search):
        monkeypatch.setattr(module, "predicted_f1", lambda seen, beta=1.0: (0.97, 0.5))
    record = llmva.align(taught, tokenizer, prompts, options=UNTESTED, **FAST).record
    assert record["stopped"] == "no step is predicted to help"
    assert [entry["passes"] for entry in record["iterations"]] == [0]


def test_a_run_says_that_its_limits_forbid_every_step(taught: Any, tokenizer: Any, prompts: PromptSet) -> None:
    record = llmva.align(taught, tokenizer, prompts, max_kl=0.0, options=UNTESTED, **FAST).record
    assert record["stopped"] == FORBIDDEN
    assert "--max-kl" in record["stopped"]


def test_a_step_moves_what_is_not_to_be_decided_no_further_than_its_stride(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make(passes=1)
    whole = run_inner_loop(work, Edit(), *answered, None, texts, 1, 1.0).edit
    moved = work.first_token_kl(Edit(), whole, 1)
    assert moved > 0
    assert work.first_token_kl(whole, whole, 1) == pytest.approx(0, abs=1e-6)
    plainly(monkeypatch)
    monkeypatch.setattr(line_search, "SLOW", -1.0)
    monkeypatch.setattr(line_search, "TRUST_RADIUS", moved / 9)
    held = run_inner_loop(work, Edit(), *answered, told, texts, 1, 1.0).edit
    for name, f in whole.factors.items():
        torch.testing.assert_close(held.factors[name].V, f.V / 3)
        torch.testing.assert_close(held.factors[name].U, f.U)
    monkeypatch.setattr(line_search, "TRUST_RADIUS", moved * 1.01)
    assert equal(run_inner_loop(work, Edit(), *answered, told, texts, 1, 1.0).edit, whole)


def test_chances_must_gain_enough_to_be_worth_a_pass(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all labels are foreseen to be right: they may become surer."""
    short = MIN_GAIN * 0.99
    steps = scripted(
        monkeypatch, [(1.0, 0.7), (1.0, 0.7 + 1.01 * MIN_GAIN), *[(1.0, 0.7 + 1.01 * MIN_GAIN + short)] * 6]
    )
    found = run_inner_loop(make(passes=8), Edit(), *answered, told, texts, 1, 1.0)
    # all labels are right after a whole step; in the pass towards surer decisions three steps gain too little
    assert (found.passes, found.predicted, steps) == (1, 1.0, [1.0, 1.0, 0.5, 0.25])


def test_once_labels_are_right_one_more_pass_makes_them_surer(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads twice r benign, and counts like any other: only if more labels, or surer ones, are foreseen."""
    given = [(0.5, 0.5), (1.0, 0.7)]
    ratios: list[float] = []
    for scale in (1.0, inner_loop.MARGIN_SCALE):
        scripted(monkeypatch, [*given, (1.0, 0.7 + 2 * MIN_GAIN)])
        monkeypatch.setattr(inner_loop, "MARGIN_SCALE", scale)
        original = line_search.align_sublayers

        def align(*args: Any, original: Any = original) -> Edit:
            ratios.append(float(args[2].ratio.max()))
            return original(*args)

        monkeypatch.setattr(line_search, "align_sublayers", align)
        found = run_inner_loop(make(passes=8), Edit(), *answered, told, texts, 1, 1.0)
        assert (found.passes, found.predicted) == (2, 1.0)
    assert ratios[-1] == pytest.approx(inner_loop.MARGIN_SCALE * ratios[1])
    scripted(monkeypatch, [*given, *[(1.0, 0.7)] * 3])
    assert run_inner_loop(make(passes=8), Edit(), *answered, told, texts, 1, 1.0).passes == 1
    scripted(monkeypatch, [(0.5, 0.5), (0.9, 0.7), *[(0.9, 0.7)] * 3])  # much is left to do: no such pass
    assert run_inner_loop(make(passes=8), Edit(), *answered, told, texts, 1, 1.0).passes == 1


def test_harmless_text_is_left_alone(make: Any, answered: Any, texts: Any, told: FirstTokenClassifier) -> None:
    """The limits hold for every pass, so they hold at the end."""

    def harm(edit: Edit, work: Context) -> float:
        batching = Batching(10_000)
        applied = lambda: edit.apply(work.chat.model, check=False)  # noqa: E731
        return agreement(replace(work.chat, batching=batching), texts, applied).mean_kl

    free = run_inner_loop(make(passes=8, min_kept=0, max_kl=99), Edit(), *answered, told, texts, 1, 1.0)
    cost = harm(free.edit, make())
    assert cost > 0
    bound = cost / 2
    held = run_inner_loop(make(passes=8, min_kept=0, max_kl=bound), Edit(), *answered, told, texts, 1, 1.0)
    assert harm(held.edit, make()) <= bound
    assert not equal(free.edit, held.edit)
    none = run_inner_loop(make(passes=8, min_kept=0, max_kl=0), Edit(), *answered, told, texts, 1, 1.0)
    assert (none.passes, none.edit.factors, none.stuck) == (0, {}, FORBIDDEN)
    # where there is no such text nothing can be said about it
    assert run_inner_loop(make(passes=1, max_kl=0), Edit(), *answered, told, [], 1, 1.0).passes == 1


@pytest.mark.parametrize("label", [Label.ANSWERED, Label.REFUSED, Label.GARBLED])
def test_a_class_that_empties_ends_the_passes(
    make: Any, answered: Any, texts: Any, told: FirstTokenClassifier, label: Label, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer vector can be read where everything is answered, or nothing: the next round of answers decides."""
    work = make(passes=8)
    scripted(monkeypatch, [(0.1 * i, 0.5) for i in range(1, 9)])
    original, validation = Context.predict_labels, answered[1].prompts

    def all_alike(self: Context, edit: Edit, asked: Any, classifier: FirstTokenClassifier) -> Observation:
        seen = original(self, edit, asked, classifier)
        if list(asked) == list(validation):
            return seen
        return replace(seen, judgements=[replace(judged, label=label) for judged in seen.judgements])

    monkeypatch.setattr(Context, "predict_labels", all_alike)
    found = run_inner_loop(work, Edit(), *answered, told, texts, 1, 0.5)
    assert found.passes == 1
    assert columns(found.edit) == {1}


# -- when it is trusted


@pytest.mark.parametrize(("agrees", "settings", "trusted"), [
    (0.9, {}, True), (0.89, {}, False), (1.0, {"passes": 1}, False), (0.9, {"passes": 2}, True),
])  # fmt: skip
def test_foresight_that_does_not_agree_with_the_judge_is_not_used(
    taught: Any, tokenizer: Any, prompts: PromptSet, agrees: float, settings: Any, trusted: bool, monkeypatch: Any
) -> None:
    given: list[Plan] = []

    def listens(context: Context, state: State, plan: Plan) -> InnerResult:
        given.append(plan)
        return inner_loop.fit_select_align(context, state, plan)

    monkeypatch.setattr(alignment, "fit_select_align", listens)
    monkeypatch.setattr(FirstTokenClassifier, "agreement", lambda self, seen: agrees)
    record = llmva.align(taught, tokenizer, prompts, iterations=1, options=UNTESTED, **FAST, **settings).record
    assert [plan.use_classifier for plan in given[:1]] == [trusted]
    assert record["iterations"][0]["foretold"] == agrees
    assert (record["iterations"][0]["foreseen"] is not None) == trusted


def test_what_was_foretold_is_measured_before_it_is_learnt(taught: Any, tokenizer: Any, prompts: PromptSet) -> None:
    """A table that had learnt the validation answers would always agree with them."""

    class Own(llmva.Judge):
        """One label for training prompts, another for those of validation."""

        name = "own"

        def answered(self, prompt: llmva.Prompt, answer: str) -> llmva.Judgement:
            known = prompt in prompts.train
            label = Label.GARBLED if known and "open" not in prompt.text else Label.ANSWERED
            return llmva.Judgement(label, 1.0, "rule")

    record = llmva.align(taught, tokenizer, prompts, judge=Own(), iterations=0, options=UNTESTED, **FAST).record
    assert record["iterations"][0]["foretold"] < 0.5


# -- setbacks


def test_a_setback_goes_on_from_the_best_with_half_the_step(
    taught: Any, tokenizer: Any, prompts: PromptSet, monkeypatch: Any
) -> None:
    everyone = [prompt.text for _, split in prompts.splits() for prompt in split]
    found = llmva.capture(taught, tokenizer, everyone, max_new_tokens=4)
    judge = Strict(dict(zip(everyone, found.answers, strict=True)))
    given: list[tuple[Edit, list[str], list[Label], torch.Tensor, float]] = []

    def listens(context: Context, state: State, plan: Plan) -> InnerResult:
        train = state.train
        if plan.stop is None:
            given.append((state.edit, [p.id for p in train.prompts], train.labels, train.capture.outputs, plan.step))
        return inner_loop.fit_select_align(context, state, plan)

    monkeypatch.setattr(alignment, "fit_select_align", listens)
    options = {"iterations": 3, "per_source": 40, "max_new_tokens": 4, "layers": 6, "options": UNTESTED}
    result = llmva.align(taught, tokenizer, prompts, judge=judge, **options)
    entries = result.record["iterations"]
    t = next(entry["iteration"] for entry in entries if entry.get("setback"))
    assert t < 3
    assert entries[t]["f1"] < entries[0]["f1"] - rollback.SETBACK
    assert t not in result.every.held
    first, after = given[0], given[t]
    assert [step for *_, step in given[: t + 1]] == [*[1.0] * t, 0.5]
    assert given[t - 1][0].factors or t == 1
    assert after[0].factors == {}  # the untouched model was the best
    assert after[1:3] == first[1:3]
    assert torch.allclose(after[3], first[3], atol=1e-5)


def test_answers_that_begin_as_foreseen_and_say_something_else_begin_the_run_anew(
    taught: Any, tokenizer: Any, prompts: PromptSet, monkeypatch: Any
) -> None:
    """Written by the next token's gradients an edit may change the first token alone: "Sure, I can't help"."""
    given: list[tuple[set[int], Any, bool]] = []

    def promises(context: Context, state: State, plan: Plan) -> InnerResult:
        if plan.stop is not None:
            return inner_loop.fit_select_align(context, state, plan)
        given.append((set(state.edit.held), state.classifier, plan.use_gradients))
        v = torch.full((32,), 1e-4)  # which changes no answer
        iteration = state.iteration + 1
        vectors = context.fit(state.train, state.validation, None, iteration)
        return InnerResult(state.edit.then(context.chat.decoder.names[0], v, v, iteration), vectors, 1, 1.0)

    monkeypatch.setattr(alignment, "fit_select_align", promises)
    options = {"iterations": 3, "patience": 9, "options": UNTESTED, **FAST}
    record = llmva.align(taught, tokenizer, prompts, **options).record
    entries = record["iterations"]
    assert [entry.get("shallow") for entry in entries] == [None, True, None, None]
    assert [entry.get("undone") for entry in entries] == [None, True, None, None]
    assert [(held, use_gradients) for held, _, use_gradients in given] == [(set(), True), (set(), False), ({2}, False)]
    assert given[1][1].counts.keys() <= given[0][1].counts.keys() | {0}  # what that iteration taught is forgotten
    one = llmva.align(taught, tokenizer, prompts, **{**options, "iterations": 1}).record["iterations"]
    assert not any("shallow" in entry for entry in one)  # where no iteration is left to begin anew with


def test_recall(taught: Any, make: Any, tokenizer: Any, prompts: PromptSet, tmp_path: Any) -> None:
    """An earlier iteration's prompts, labels and captures, from what a run keeps on disk; unjudged ones left out."""

    class Doubts(llmva.Judge):
        name = "doubts"

        def answered(self, prompt: llmva.Prompt, answer: str) -> llmva.Judgement:
            if "lamp" in prompt.text:
                return llmva.Judgement(Label.UNJUDGED, 0.0, "who knows")
            return JUDGE.answered(prompt, answer)

    options = {"judge": Doubts(), "iterations": 2, "passes": 1, "options": UNTESTED, "out": tmp_path, **FAST}
    result = llmva.align(taught, tokenizer, prompts, **options)
    run, resumed = Run.open(tmp_path, result.record, prompts)
    assert resumed
    work = make()
    for t in (0, 1):
        train, validation = (_recall(work, run, t, split) for split in ("train", "validation"))
        with result.every.at(t).apply(taught, check=False):
            seen = observe(work.chat, prompts.validation, Doubts(), max_new_tokens=8).judged()
        assert 0 < len(seen.prompts) < len(prompts.validation)
        assert validation.prompts == seen.prompts
        assert validation.labels == seen.labels
        assert torch.allclose(validation.capture.outputs, seen.capture.outputs, atol=1e-5)
        draw = prompts.draw(40, replace(work, seed=42).generator(t))
        assert train.prompts == [prompt for prompt in draw if "lamp" not in prompt.text]
