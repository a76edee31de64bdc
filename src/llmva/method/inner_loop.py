"""Steps 3 to 6 of the method, several times over from one round of answers.

One alignment moves a model a part of the way, and the paper generates anew before the next. But where the first token
foretells the judge's label (`classifier`), a prefill tells what the edited model would do, and the next alignment can
start from there. Each such pass reads vectors that belong to the model as it then is, so many small steps take the
place of a few large ones: the same F1 at a fraction of the harm (docs/research.md). A pass counts only if validation
prompts are foreseen to fare better, which also keeps a step from going too far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.method.context import Context, fit, harmless_outputs
from llmva.method.first_token import FirstTokenClassifier, predicted_f1
from llmva.method.gradients import gradient_writers
from llmva.method.identify import Vectors, align_sublayers
from llmva.method.line_search import NEARLY_DONE, Candidate, LineSearch, Update, within_harm_limits
from llmva.method.observe import Observation, missing_class
from llmva.method.selection import select

TRUST = 0.9  # share of validation labels that the first token must foretell
MARGIN_SCALE = (
    2.0  # times r in a last pass, once labels are right: then o.v_a is r o.v_b already, and the margin is left
)
LOOK_AHEAD = 2  # passes in a row that need not be foreseen to help
NO_STEP = "no step is foreseen to bring it nearer"
FORBIDDEN = "every step that is foreseen to help changes harmless text more than --min-kept and --max-kl allow"


@dataclass(frozen=True)
class InnerResult:
    """The edit after an iteration's passes, and what the first of them read off the model."""

    edit: Edit
    vectors: Vectors
    chosen: list[int]
    passes: int  # alignments that the edit gained
    foreseen: float | None = None  # F on validation prompts, where it was foreseen
    stuck: str | None = None  # why the edit gained none


def run_inner_loop(
    context: Context,
    edit: Edit,
    train: Observation,
    validation: Observation,
    classifier: FirstTokenClassifier | None,
    texts: Sequence[tuple[str, str]],
    iteration: int,
    step: float,
    use_gradients: bool = True,
) -> InnerResult:
    """Follow `edit` by up to `settings.passes` alignments, or by one where nothing can be foreseen.

    A pass that is not foreseen to help may lead to one that does: up to LOOK_AHEAD of them are made in a row before
    going back. Where none helps at all and much is left to do, the method's own step is made, and the next round of
    answers tells what it was worth.

    Args:
        train, validation: the model with `edit`, answers generated and judged.
        classifier: None where it cannot be trusted.
        texts: harmless (prompt, answer) of the untouched model.
        iteration: the number that the new columns carry.
        use_gradients: whether passes are written where the next token's gradients say (`gradient_writers`), or as in
            the paper.
    """
    harmless = harmless_outputs(
        context, edit, texts, iteration
    )  # it moves little within an iteration, and costs a pass
    vectors = fit(context, train, validation, harmless, iteration)
    chosen = select(vectors.scores, context.count)
    plain = align_sublayers(edit, context.decoder.sublayers, vectors, chosen, iteration, step)
    if classifier is None:
        return InnerResult(plain, vectors, chosen, 1)

    start = Candidate(
        edit,
        validation,
        predicted_f1(context.predict_labels(edit, validation.prompts, classifier), context.objective.beta),
    )
    search = LineSearch(context, classifier, texts, iteration, step)
    best, selected = _follow(search, start, vectors, train, harmless, use_gradients)
    if use_gradients and best.value[0] < NEARLY_DONE:  # much is left to do: the paper's way may get further
        papers = LineSearch(context, classifier, texts, iteration, step)
        other, others = _follow(papers, start, vectors, train, harmless, use_gradients=False)
        if not best.passes or other.value[0] > best.value[0]:
            search, best, selected = papers, other, others
    if not best.passes and best.value[0] < NEARLY_DONE and within_harm_limits(context, plain, texts):
        return InnerResult(plain, vectors, chosen, 1, best.value[0])
    stuck = None if best.passes else (FORBIDDEN if search.forbidden else NO_STEP)
    return InnerResult(best.edit, vectors, selected, best.passes, best.value[0], stuck)


def _follow(
    search: LineSearch,
    start: Candidate,
    vectors: Vectors,
    train: Observation,
    harmless: Tensor | None,
    use_gradients: bool,
) -> tuple[Candidate, list[int]]:
    """The best that passes from `start` lead to, perhaps itself; and the sublayers of the first of them."""
    context, most = search.context, search.context.settings.passes
    best = now = start
    move = first = _update(search, start, vectors, train, use_gradients)
    while now.passes < most:
        if now.passes:
            train = _foreseen(search, now)
            if torch.equal(*train.signs) or missing_class(train):
                break  # nothing is wrong any more; or no answer vector to be read
            move = _update(
                search, now, fit(context, train, now.validation, harmless, search.iteration), train, use_gradients
            )
        ahead = now.passes - best.passes < LOOK_AHEAD and now.passes + 1 < most
        found = search.best(now, move, best.value, accept_unimproved=ahead)
        if found is None:
            break
        now = found
        if now.beats(best.value):
            best = now
    if 0 < best.passes < most and best.value[0] >= NEARLY_DONE and not missing_class(train := _foreseen(search, best)):
        wider = fit(context, train, best.validation, harmless, search.iteration).scale_ratio(MARGIN_SCALE)
        best = search.best(best, _update(search, best, wider, train, use_gradients), best.value) or best
    return best, first.chosen


def _update(search: LineSearch, now: Candidate, vectors: Vectors, train: Observation, use_gradients: bool) -> Update:
    """What is written where in a pass: as the next token's gradients say, or as in the paper without them."""
    context = search.context
    candidates = select(vectors.scores, context.settings.layers or len(vectors.scores))
    writers = None
    if use_gradients:
        writers = gradient_writers(
            context, now.edit, vectors, candidates, train.prompts, search.classifier, search.iteration
        )
    if writers is None:
        return Update(vectors, select(vectors.scores, context.count))
    return Update(vectors, [s for s in candidates if writers[s].any()], writers)


def _foreseen(search: LineSearch, now: Candidate) -> Observation:
    """A fresh draw of training prompts, as the model after `now` is foreseen to meet them."""
    context = search.context
    draw = context.prompts.draw(context.settings.per_source, context.generator(search.iteration, now.passes))
    return context.predict_labels(now.edit, draw, search.classifier)
