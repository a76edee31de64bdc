"""Steps 3 to 6 of the method, several times over from one round of answers.

One alignment moves a model a part of the way, and the paper generates anew before the next. But where the first token
foretells the judge's label (`foresight`), a prefill tells what the edited model would do, and the next alignment can
start from there. Each such pass reads vectors that belong to the model as it then is, so many small steps take the
place of a few large ones: the same F1 at a fraction of the harm (docs/research.md). A pass counts only if validation
prompts are foreseen to fare better, which also keeps a step from going too far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llmva.edit import Edit
from llmva.foresight import Foresight, promise
from llmva.influence import influence
from llmva.observation import Observation
from llmva.prompts.types import Prompt
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
    settings = work.settings
    harmless = harmless_outputs(work, edit, texts, iteration)  # it moves little within an iteration, and costs a pass
    vectors = fit(work, train, validation, harmless, iteration)
    chosen = select(vectors.scores, work.count)
    plain = align_sublayers(edit, work.decoder.sublayers, vectors, chosen, iteration, step)
    if foresight is None:
        return Advance(plain, vectors, chosen, 1)

    search = Search(work, foresight, texts, iteration, step)
    value = promise(work.foresee(edit, validation.prompts, foresight), work.aim.beta)
    generated = train
    best = now = Seen(edit, validation, value)
    move = first = _move(work, edit, vectors, train, foresight, iteration, causal)
    while now.passes < settings.passes:
        if now.passes:
            train = work.foresee(now.edit, _draw(work, iteration, now.passes), foresight)
            said, right = train.signs
            if torch.equal(said, right) or len(set(said.tolist())) == 1:
                break  # nothing is wrong any more; or everything answered, or nothing: no answer vector to be read
            read = fit(work, train, now.validation, harmless, iteration)
            move = _move(work, now.edit, read, train, foresight, iteration, causal)
        ahead = now.passes - best.passes < LOOK_AHEAD and now.passes + 1 < settings.passes
        found = search.best(now, move, best.value, trusting=ahead)
        if found is None:
            break
        now = found
        if now.beats(best.value):
            best = now
    if 0 < best.passes < settings.passes and best.value[0] >= NEARLY_DONE:
        train = work.foresee(best.edit, _draw(work, iteration, best.passes), foresight)
        if len(set(train.signs[0].tolist())) == 2:
            read = fit(work, train, best.validation, harmless, iteration)
            surer = replace(read, spread=read.spread * torch.tensor([SURER, 1.0]).to(read.spread))
            move = _move(work, best.edit, surer, train, foresight, iteration, causal)
            best = search.best(best, move, best.value) or best
    if causal and best.value[0] < NEARLY_DONE:  # much is left to do: the paper's way may get further
        other = advance(work, edit, generated, validation, foresight, texts, iteration, step, causal=False)
        if not best.passes or other.foreseen is None or other.foreseen > best.value[0]:
            return other
    if not best.passes and best.value[0] < NEARLY_DONE and spares(work, plain, texts):
        return Advance(plain, vectors, chosen, 1, best.value[0])
    stuck = None if best.passes else (FORBIDDEN if search.forbidden else NO_STEP)
    return Advance(best.edit, vectors, first.chosen, best.passes, best.value[0], stuck)


def _move(
    work: Work, edit: Edit, vectors: Vectors, train: Observation, foresight: Foresight, iteration: int, causal: bool
) -> Move:
    """What is written where in a pass: as the next token's gradients say, or as in the paper without them."""
    asked = work.settings.layers
    candidates = select(vectors.scores, asked or len(vectors.scores))
    writers = influence(work, edit, vectors, candidates, train.prompts, foresight, iteration) if causal else None
    if writers is None:
        return Move(vectors, select(vectors.scores, work.count))
    return Move(vectors, [s for s in candidates if writers[s].any()], writers)


def _draw(work: Work, iteration: int, number: int) -> list[Prompt]:
    return work.prompts.draw(work.settings.per_source, work.generator(iteration, number))
