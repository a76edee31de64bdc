"""Steps 3 to 6 of the method, several times over from one round of answers.

One alignment moves a model a part of the way, and the paper generates anew before the next. But where the first token
foretells the judge's label (`foresight`), a prefill tells what the edited model would do, and the next alignment can
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
from llmva.figures import emptied
from llmva.foresight import Foresight, promise
from llmva.influence import influence
from llmva.observation import Observation
from llmva.search import NEARLY_DONE, Move, Search, Seen, spares
from llmva.selection import select
from llmva.steps import Vectors, align_sublayers
from llmva.work import Work, fit, harmless_outputs

TRUST = 0.9  # share of validation labels that the first token must foretell
SURER = 2.0  # times r in a last pass, once labels are right: then o.v_a is r o.v_b already, and the margin is left
LOOK_AHEAD = 2  # passes in a row that need not be foreseen to help
NO_STEP = "no step is foreseen to bring it nearer"
FORBIDDEN = "every step that is foreseen to help changes harmless text more than --min-kept and --max-kl allow"


@dataclass(frozen=True)
class Advance:
    """The edit after an iteration's passes, and what the first of them read off the model."""

    edit: Edit
    vectors: Vectors
    chosen: list[int]
    passes: int  # alignments that the edit gained
    foreseen: float | None = None  # F on validation prompts, where it was foreseen
    stuck: str | None = None  # why the edit gained none


def advance(
    work: Work,
    edit: Edit,
    train: Observation,
    validation: Observation,
    foresight: Foresight | None,
    texts: Sequence[tuple[str, str]],
    iteration: int,
    step: float,
    causal: bool = True,
) -> Advance:
    """Follow `edit` by up to `settings.passes` alignments, or by one where nothing can be foreseen.

    A pass that is not foreseen to help may lead to one that does: up to LOOK_AHEAD of them are made in a row before
    going back. Where none helps at all and much is left to do, the method's own step is made, and the next round of
    answers tells what it was worth.

    Args:
        train, validation: the model with `edit`, answers generated and judged.
        foresight: None where it cannot be trusted.
        texts: harmless (prompt, answer) of the untouched model.
        iteration: the number that the new columns carry.
        causal: whether passes are written where the next token's gradients say (`influence`), or as in the paper.
    """
    harmless = harmless_outputs(work, edit, texts, iteration)  # it moves little within an iteration, and costs a pass
    vectors = fit(work, train, validation, harmless, iteration)
    chosen = select(vectors.scores, work.count)
    plain = align_sublayers(edit, work.decoder.sublayers, vectors, chosen, iteration, step)
    if foresight is None:
        return Advance(plain, vectors, chosen, 1)

    start = Seen(edit, validation, promise(work.foresee(edit, validation.prompts, foresight), work.aim.beta))
    search = Search(work, foresight, texts, iteration, step)
    best, selected = _follow(search, start, vectors, train, harmless, causal)
    if causal and best.value[0] < NEARLY_DONE:  # much is left to do: the paper's way may get further
        papers = Search(work, foresight, texts, iteration, step)
        other, others = _follow(papers, start, vectors, train, harmless, causal=False)
        if not best.passes or other.value[0] > best.value[0]:
            search, best, selected = papers, other, others
    if not best.passes and best.value[0] < NEARLY_DONE and spares(work, plain, texts):
        return Advance(plain, vectors, chosen, 1, best.value[0])
    stuck = None if best.passes else (FORBIDDEN if search.forbidden else NO_STEP)
    return Advance(best.edit, vectors, selected, best.passes, best.value[0], stuck)


def _follow(
    search: Search, start: Seen, vectors: Vectors, train: Observation, harmless: Tensor | None, causal: bool
) -> tuple[Seen, list[int]]:
    """The best that passes from `start` lead to, perhaps itself; and the sublayers of the first of them."""
    work, most = search.work, search.work.settings.passes
    best = now = start
    move = first = _move(search, start, vectors, train, causal)
    while now.passes < most:
        if now.passes:
            train = _foreseen(search, now)
            if torch.equal(*train.signs) or emptied(train):
                break  # nothing is wrong any more; or no answer vector to be read
            move = _move(search, now, fit(work, train, now.validation, harmless, search.iteration), train, causal)
        ahead = now.passes - best.passes < LOOK_AHEAD and now.passes + 1 < most
        found = search.best(now, move, best.value, trusting=ahead)
        if found is None:
            break
        now = found
        if now.beats(best.value):
            best = now
    if 0 < best.passes < most and best.value[0] >= NEARLY_DONE and not emptied(train := _foreseen(search, best)):
        surer = fit(work, train, best.validation, harmless, search.iteration).raised(SURER)
        best = search.best(best, _move(search, best, surer, train, causal), best.value) or best
    return best, first.chosen


def _move(search: Search, now: Seen, vectors: Vectors, train: Observation, causal: bool) -> Move:
    """What is written where in a pass: as the next token's gradients say, or as in the paper without them."""
    work = search.work
    candidates = select(vectors.scores, work.settings.layers or len(vectors.scores))
    writers = None
    if causal:
        writers = influence(work, now.edit, vectors, candidates, train.prompts, search.foresight, search.iteration)
    if writers is None:
        return Move(vectors, select(vectors.scores, work.count))
    return Move(vectors, [s for s in candidates if writers[s].any()], writers)


def _foreseen(search: Search, now: Seen) -> Observation:
    """A fresh draw of training prompts, as the model after `now` is foreseen to meet them."""
    work = search.work
    draw = work.prompts.draw(work.settings.per_source, work.generator(search.iteration, now.passes))
    return work.foresee(now.edit, draw, search.foresight)
