"""Steps 3 to 6 of the method, several times over from one round of answers.

One alignment moves a model a part of the way, and the paper generates anew before the next. But where the first token
foretells the judge's label (`foresight`), a prefill tells what the edited model would do, and the next alignment can
start from there. Each such pass reads vectors that belong to the model as it then is, so many small steps take the
place of a few large ones: the same F1 at a fraction of the harm (docs/research.md). A pass counts only if validation
prompts are foreseen to fare better, which also keeps a step from going too far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.foresight import Foresight, foresee, promise
from llmva.models.batching import Batching
from llmva.models.generate import capture
from llmva.models.harmless import Agreement, agreement, outputs_on_text, random_messages
from llmva.models.sublayers import Decoder
from llmva.objective import LEANS, Aim
from llmva.observation import Observation
from llmva.progress import Progress
from llmva.prompts.types import Prompt, PromptSet
from llmva.selection import select
from llmva.settings import Settings
from llmva.steps import Vectors, align_sublayers, identify

HARMLESS_POSITIONS = 512  # of harmless texts, for the quiet readers
RANDOM_MESSAGES = 256  # likewise
HARMLESS_CHECKED = 16  # texts that an accepted pass is measured on
TRUST = 0.9  # share of validation labels that the first token must foretell
GAIN = 0.003  # of the F of chances, that a pass must bring where the foreseen labels stay the same
SLOW, NEARLY_DONE = 0.05, 0.95  # a rise of F below which, and an F up to which, a pass tries to reach further
MOST_REACH = 4.0  # most that r is raised by
HALVINGS = 2  # of a step that would make things worse
Change = Callable[[Vectors, Observation, int], Vectors]  # of the vectors, the training prompts and the iteration


@dataclass(frozen=True)
class Work:
    """What every iteration of a run works with."""

    decoder: Decoder
    tokenizer: Any
    prompts: PromptSet
    settings: Settings
    aim: Aim
    count: int  # sublayers edited in a pass
    seed: int
    batching: Batching
    progress: Progress
    change: Change | None = None

    def generator(self, iteration: int, number: int = 0) -> torch.Generator:
        """Draws depend on seed, iteration and pass alone, so a resumed run makes the same ones."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + iteration + number * 7919)

    def foresee(self, edit: Edit, prompts: Sequence[Prompt], foresight: Foresight) -> Observation:
        """What the model with `edit` would do."""
        with edit.apply(self.decoder.model, check=False):
            return foresee(self.decoder, self.tokenizer, prompts, foresight, self.batching)

    def harm(
        self, edit: Edit, texts: Sequence[tuple[str, str]], advance: Callable[[int], None] = lambda n: None
    ) -> Agreement:
        """What `edit` does to harmless (prompt, answer) texts."""
        applied = partial(edit.apply, self.decoder.model, check=False)
        return agreement(self.decoder, self.tokenizer, texts, applied, self.batching, advance)


@dataclass(frozen=True)
class Advance:
    """The edit after an iteration's passes, and what the first of them read off the model."""

    edit: Edit
    vectors: Vectors
    chosen: list[int]
    passes: int
    foreseen: float | None  # F on validation prompts, where it was foreseen


def advance(
    work: Work,
    edit: Edit,
    train: Observation,
    validation: Observation,
    foresight: Foresight | None,
    texts: Sequence[tuple[str, str]],
    iteration: int,
    step: float,
) -> Advance:
    """Follow `edit` by up to `settings.passes` alignments, or by one where nothing can be foreseen.

    Args:
        train, validation: the model with `edit`, answers generated and judged.
        foresight: None where it cannot be trusted.
        texts: harmless (prompt, answer) of the untouched model.
        iteration: the number that the new columns carry.
    """
    settings, beta = work.settings, work.aim.beta
    first: tuple[Vectors, list[int]] | None = None
    harmless = harmless_outputs(work, edit, texts, iteration)  # it moves little within an iteration, and costs a pass
    done, best = 0, (0.0, 0.0)
    if foresight is not None:
        best = promise(work.foresee(edit, validation.prompts, foresight), beta)
    while done < settings.passes:
        vectors = fit(work, train, validation, harmless, iteration)
        chosen = select(vectors.scores, work.count)
        first = first or (vectors, chosen)
        if foresight is None:
            edit = align_sublayers(edit, work.decoder.sublayers, vectors, chosen, iteration, step)
            done += 1
            break
        found = _search(work, edit, vectors, chosen, iteration, step, foresight, validation, best, texts)
        if found is None:
            break  # no step along these vectors is foreseen to help
        edit, validation, best = found
        done += 1
        if done == settings.passes:
            break
        draw = work.prompts.draw(settings.per_source, work.generator(iteration, done))
        train = work.foresee(edit, draw, foresight)
        if len(set(train.signs[0].tolist())) == 1:
            break  # everything answered, or nothing: no answer vector to be read
    assert first is not None
    return Advance(edit, *first, done, best[0] if foresight is not None else None)


Found = tuple[Edit, Observation, tuple[float, float]]  # an edit, what validation prompts would then do, its promise


def _search(
    work: Work,
    edit: Edit,
    vectors: Vectors,
    chosen: list[int],
    iteration: int,
    step: float,
    foresight: Foresight,
    validation: Observation,
    best: tuple[float, float],
    texts: Sequence[tuple[str, str]],
) -> Found | None:
    """The step along `vectors` that is foreseen to help, or None.

    The method's own step first, then shorter ones until one helps. Where it helps little and much is left to do, r is
    raised: sigma_a is small where nearly every prompt has the same answer, and r = sigma_a / sigma_b then asks for less
    than the decision needs.
    """

    def attempt(length: float, reach: float, above: tuple[float, float]) -> Found | None:
        scaled = replace(vectors, spread=vectors.spread * torch.tensor([reach, 1.0]).to(vectors.spread))
        tried = align_sublayers(edit, work.decoder.sublayers, scaled, chosen, iteration, length)
        seen = work.foresee(tried, validation.prompts, foresight)
        value = promise(seen, work.aim.beta)
        return (tried, seen, value) if _better(value, above) and _spares(work, tried, texts) else None

    found: Found | None = None
    for halving in range(HALVINGS + 1):
        found = attempt(step / 2**halving, 1.0, best)
        if found is not None:
            break
    reach = 1.0
    while reach < MOST_REACH and _slow(best if found is None else found[2], best):
        reach *= 2.0
        further = attempt(step, reach, best if found is None else found[2])
        if further is None and found is not None:
            break
        found = further or found
    return found


def _slow(value: tuple[float, float], before: tuple[float, float]) -> bool:
    return value[0] < NEARLY_DONE and value[0] - before[0] < SLOW


def _better(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether foreseen (F, F of the chances) are worth another pass: more labels right, or as many and more surely."""
    return one[0] > other[0] or (one[0] == other[0] and one[1] >= other[1] + GAIN)


def fit(work: Work, train: Observation, validation: Observation, harmless: Tensor | None, iteration: int) -> Vectors:
    """Both vectors of every sublayer, with readers that are quiet on harmless text."""
    settings = work.settings
    vectors = identify(
        train,
        validation,
        harmless=harmless,
        quiet=settings.quiet,
        svm=settings.svm,
        C=settings.C,
        lean=LEANS[settings.prefer],
        seed=work.seed,
    )
    return work.change(vectors, train, iteration - 1) if work.change else vectors


def harmless_outputs(work: Work, edit: Edit, texts: Sequence[tuple[str, str]], iteration: int) -> Tensor | None:
    """Sublayers' outputs where nothing is to be decided, [S, q, d]: ends of random messages, and harmless text.

    None where the settings ask for no quiet readers.
    """
    if work.settings.quiet == 0 or work.settings.svm != "exact":
        return None
    generator = work.generator(iteration - 1)
    messages = random_messages(work.tokenizer, RANDOM_MESSAGES, generator)
    with edit.apply(work.decoder.model, check=False):
        found = capture(work.decoder, work.tokenizer, messages, max_new_tokens=0, batching=work.batching).outputs
        if not texts:
            return found
        said = outputs_on_text(work.decoder, work.tokenizer, texts, HARMLESS_POSITIONS, generator, work.batching)
    return torch.cat([found, said], 1)


def _spares(work: Work, edit: Edit, texts: Sequence[tuple[str, str]]) -> bool:
    """Whether an edit leaves harmless text alone as far as the run's limits ask."""
    if not texts:
        return True
    some = texts[:: max(1, len(texts) // HARMLESS_CHECKED)][:HARMLESS_CHECKED]
    found = work.harm(edit, some)
    return found.mean_kl <= work.aim.max_kl and found.mean_kept >= work.aim.min_kept
