"""Steps 2 to 5 of an iteration: once as in the paper, or several times from one round of answers.

The paper generates new answers before every alignment. But if the first token predicts the judge's label
(`first_token`), a prefill gives the labels of the edited model, and the next alignment can start from them. In the
setting `passes`, a pass is one such alignment. Each pass fits vectors on the current model, so many small steps replace
a few large ones: the same F1 with a fraction of the harm (docs/research.md). A pass is accepted only if the predicted
labels of validation prompts improve, so no step goes too far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.method.align import align_sublayers
from llmva.method.context import Context, State
from llmva.method.first_token import foretell, predicted_f1
from llmva.method.gradients import Slopes, gradient_writers, measure_slopes, predict_with_slopes
from llmva.method.identify import Vectors, select
from llmva.method.left_out import LeftOut, leave_out, readable
from llmva.method.line_search import NEARLY_DONE, Candidate, LineSearch, Update, within_harm_limits
from llmva.method.observe import Observation, missing_class
from llmva.method.rollback import Plan

MARGIN_SCALE = 2.0  # factor of r in a last pass: labels are right by then, and a larger r makes them surer
Fit = Callable[[Observation, Candidate], Vectors]
SEARCH_PROMPTS = 256  # validation prompts on which steps are compared; answers then decide on all of them
WELL = 0.5  # share of what F lacks to 1; where passes gain less, the paper's writers are tried too
UNREAD = 0.5  # share of the sublayers, those where v_b reads worst, that gradient writers leave alone
READS_WELL = 0.95  # AUC of v_b from which a sublayer is never left alone
LOOK_AHEAD = 2  # maximum number of passes in a row without a predicted gain
NO_STEP = "no step is predicted to help"
FORBIDDEN = "every step that is predicted to help changes harmless text more than --min-kept and --max-kl allow"


@dataclass(frozen=True)
class InnerResult:
    """The edit after an iteration's passes, and the vectors of the first pass."""

    edit: Edit
    vectors: Vectors | None  # None if a class is missing, so that none could be fitted
    passes: int | None = None  # number of alignments added to the edit; None if none was tried
    predicted: float | None = None  # predicted F on validation prompts; None without predictions
    stuck: str | None = None  # why no alignment was added
    left_out: LeftOut | None = None  # what v_b of the untouched model reads
    auc: Tensor | None = None  # of v_b in each sublayer, on prompts that it was not fitted on, float64 [S]


def fit_select_align(context: Context, state: State, plan: Plan) -> InnerResult:
    """Steps 2 to 5 from `state`: identify the vectors, score and select sublayers, align them.

    If the run stops here, the vectors are fitted for the report, and nothing is written.
    """
    if plan.missing_class is not None:
        return InnerResult(state.edit, None)
    if plan.stop is None:
        context.progress.stage(f"iteration {state.iteration}: fitting")
    iteration = state.iteration + 1  # the number of the new columns
    harmless = context.harmless_outputs(state.edit, state.texts, iteration)
    read = context.read(state.edit, state.train, iteration)
    vectors = context.fit(state.train, state.validation, harmless, iteration, read)  # 2. Identify  3. Score
    auc = left_out = None
    if not state.edit.factors:
        left_out = leave_out([state.train, *([read] if read else [])], context.svm_fit)
    if plan.stop is None or left_out is not None:
        held = context.held_out(state.edit, iteration)
        auc = readable(vectors, [state.validation, *([held] if held else [])])
        del held
    del read  # the passes need its vectors alone, and it may be the largest thing of a run beside the weights
    if plan.stop is not None:
        return InnerResult(state.edit, vectors, left_out=left_out, auc=auc)
    chosen = select(vectors.scores, context.sublayer_count)  # 4. Select
    papers = align_sublayers(  # 5. Align
        state.edit, context.chat.decoder.sublayers, vectors, chosen, iteration, plan.step
    )
    result = InnerResult(papers, vectors, 1, left_out=left_out, auc=auc)
    return run_inner_loop(context, state, plan, result, harmless) if plan.use_classifier else result


def run_inner_loop(
    context: Context, state: State, plan: Plan, papers: InnerResult, harmless: Tensor | None
) -> InnerResult:
    """Add up to `settings.passes` alignments to the edit of `state`.

    A pass without a predicted gain may lead to one with a gain, so up to LOOK_AHEAD of them are made in a row before
    the loop goes back. If no step helps and F is below NEARLY_DONE, the paper's step is taken, and the next answers
    decide.

    Args:
        papers: the single alignment that the paper would make, with its vectors.
        harmless: outputs [S, q, d] on harmless text. All passes reuse them: they change little within an iteration,
            and computing them costs a forward pass.
    """
    assert papers.vectors is not None
    assert papers.auc is not None
    # the answers' own pass over the prompts has the chances of first tokens already
    some = foretell(balanced(state.validation, SEARCH_PROMPTS), state.classifier)
    start = Candidate(state.edit, some, predicted_f1(some, context.objective.beta))
    enough = min(float(papers.auc.quantile(UNREAD)), READS_WELL) if context.reads else -1.0
    good = (papers.auc >= enough).nonzero().flatten().tolist()

    def passes(use_gradients: bool) -> tuple[LineSearch, Candidate]:
        on_pass = context.progress.stage(f"iteration {state.iteration}: passes", context.settings.passes, "passes")
        search = LineSearch(context, state.classifier, state.texts, state.iteration + 1, plan.step, on_pass)
        assert papers.vectors is not None
        return search, _follow(search, start, papers.vectors, state.train, harmless, use_gradients, good)

    search, best = passes(plan.use_gradients)
    well = start.value[0] + WELL * (1.0 - start.value[0])
    if plan.use_gradients and best.value[0] < min(NEARLY_DONE, well):  # the paper's writers may do better
        other_search, other = passes(use_gradients=False)
        if not best.passes or other.value[0] > best.value[0]:
            search, best = other_search, other
    if not best.passes and best.value[0] < NEARLY_DONE and within_harm_limits(context, papers.edit, state.texts):
        return replace(papers, passes=1, predicted=best.value[0])
    stuck = None if best.passes else (FORBIDDEN if search.forbidden else NO_STEP)
    return replace(papers, edit=best.edit, passes=best.passes, predicted=best.value[0], stuck=stuck)


def _follow(
    search: LineSearch,
    start: Candidate,
    vectors: Vectors,
    train: Observation,
    harmless: Tensor | None,
    use_gradients: bool,
    good: list[int],
) -> Candidate:
    """The best candidate that passes from `start` reach (perhaps `start`).

    Gradient writers choose among the sublayers `good`.
    """
    context, max_passes = search.context, search.context.settings.passes

    def fit(train: Observation, now: Candidate) -> Vectors:
        if use_gradients and context.reads:
            # what a prompt is hardly changes with an edit, and to read them all again would be half of a pass
            return context.fit(train, now.validation, harmless, search.iteration, benign=vectors)
        read = context.read(now.edit, train, search.iteration, now.passes)  # along v_a an edit moves o.v_b too
        return context.fit(train, now.validation, harmless, search.iteration, read)

    best = now = start
    measured = measure_slopes(context, start.edit, train.prompts, search.classifier) if use_gradients else None
    update = _update(search, start, vectors, measured[0] if measured else None, good)
    while now.passes < max_passes:
        if now.passes:
            train, slopes = _predicted_train(search, now, use_gradients)
            if torch.equal(*train.signs) or missing_class(train):
                break  # all labels are right, or no answer vector can be fitted
            update = _update(search, now, fit(train, now), slopes, good)
        ahead = now.passes - best.passes < LOOK_AHEAD and now.passes + 1 < max_passes
        step = search.best_step(now, update, best.value, accept_unimproved=ahead)
        if step is None:
            break
        now = step
        search.on_pass(1)
        if now.beats(best.value):
            best = now
        if best.value[0] == 1.0:
            break
    if 0 < best.passes < max_passes and best.value[0] >= NEARLY_DONE:
        best = _margin_step(search, best, fit, use_gradients, good) or best
    return best


def _margin_step(
    search: LineSearch, best: Candidate, fit: Fit, use_gradients: bool, good: list[int]
) -> Candidate | None:
    """One more pass with a larger r, after the labels are right: it makes decisions surer."""
    train, slopes = _predicted_train(search, best, use_gradients)
    if missing_class(train):
        return None
    vectors = fit(train, best).scale_ratio(MARGIN_SCALE)
    return search.best_step(best, _update(search, best, vectors, slopes, good), best.value)


def _update(search: LineSearch, now: Candidate, vectors: Vectors, slopes: Slopes | None, good: list[int]) -> Update:
    """The vectors, sublayers and writers of a pass: gradient writers, or without slopes v_a as in the paper."""
    context = search.context
    best = select(vectors.scores[good], min(context.settings.layers or len(good), len(good)))
    candidates = [good[i] for i in best]
    writers = None
    if slopes is not None:
        writers = gradient_writers(context, now.edit, vectors, candidates, slopes, search.iteration)
    if writers is None:
        return Update(vectors, select(vectors.scores, context.sublayer_count))
    return Update(vectors, [s for s in candidates if writers[s].any()], writers)


def _predicted_train(search: LineSearch, now: Candidate, use_gradients: bool) -> tuple[Observation, Slopes | None]:
    """A new draw of training prompts, with predicted labels of the model with the edit of `now`, and their slopes."""
    context = search.context
    draw = context.prompts.draw(context.settings.per_source, context.generator(search.iteration, now.passes))
    if use_gradients:
        return predict_with_slopes(context, now.edit, draw, search.classifier)
    return context.predict_labels(now.edit, draw, search.classifier), None


def balanced(seen: Observation, limit: int) -> Observation:
    """About `limit` of the prompts, spread evenly over each source, in their order; all if there are no more."""
    share = min(1.0, limit / len(seen.prompts)) if seen.prompts else 1.0
    counts: dict[str, int] = {}
    kept = []
    for i, prompt in enumerate(seen.prompts):
        rank = counts.get(prompt.source, 0)
        counts[prompt.source] = rank + 1
        if int((rank + 1) * share) > int(rank * share):
            kept.append(i)
    return seen.at(kept)
