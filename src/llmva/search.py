"""For a step along an iteration's vectors that is foreseen to help, and that leaves harmless text alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llmva.edit import Edit
from llmva.foresight import Foresight, promise
from llmva.observation import Observation
from llmva.steps import Vectors, align_sublayers
from llmva.work import Work

HARMLESS_CHECKED = 16  # texts that a step is measured on
GAIN = 0.003  # of the F of chances, that a step must bring where the foreseen labels stay the same
SLOW, NEARLY_DONE = 0.05, 0.95  # a rise of F below which, and an F up to which, a step that reaches further is tried
STRIDE = 0.05  # nats that a step may move the answers to random messages by
MOST_REACH = 4.0  # most that r is raised by
HALVINGS = 2  # of a step that would make things worse, or that half of would do
NEARLY_ALL = 0.95  # of what a step brings, that half of it must bring to be made in its place


@dataclass(frozen=True)
class Seen:
    """An edit, and what validation prompts are foreseen to meet with."""

    edit: Edit
    validation: Observation
    value: tuple[float, float]  # its `promise`
    passes: int = 0  # alignments of this iteration that it holds
    cut: bool = False  # whether the last of them would have gone further than STRIDE
    length: float = 0.0  # of the last of them
    reach: float = 1.0  # what r was raised by for it

    def beats(self, value: tuple[float, float]) -> bool:
        """Whether it is worth another pass: more labels right, or as many and more surely."""
        return self.value[0] > value[0] or (self.value[0] == value[0] and self.value[1] >= value[1] + GAIN)


@dataclass(frozen=True)
class Move:
    """An alignment: what it reads, where it is made, and along what, if not along v_a (`steps.align_sublayers`)."""

    vectors: Vectors
    chosen: list[int]
    writers: Tensor | None = None


@dataclass
class Search:
    """From one iteration's foreseen labels."""

    work: Work
    foresight: Foresight
    texts: Sequence[tuple[str, str]]  # harmless (prompt, answer) of the untouched model
    iteration: int
    step: float
    forbidden: bool = False  # whether a step that would have helped was left for what it did to harmless text

    def best(self, now: Seen, move: Move, above: tuple[float, float], trusting: bool = False) -> Seen | None:
        """A step from `now` along `move` that is foreseen to be worth more than `above`, or None.

        The method's own step first, then shorter ones until one helps. Where it helps little and much is left to do, a
        step that was cut is tried whole, and then r is raised: sigma_a is small where nearly every prompt has the same
        answer, and r = sigma_a / sigma_b then asks for less than the decision needs. Of what helps, as little is made
        as brings nearly as much. `trusting`: where none helps, the method's own step is given all the same.
        """
        own = self._step(now, move, self.step)
        found = self._accept(own, above)
        for halving in range(1, HALVINGS + 1):
            found = found or self._accept(self._step(now, move, own.length / 2**halving, bounded=False), above)
        highest = found.value if found else above
        if own.cut and _slow(highest, above):
            found = self._accept(self._step(now, move, self.step, bounded=False), highest) or found
            highest = found.value if found else above
        reach = 1.0
        while reach < MOST_REACH and _slow(highest, above):
            reach *= 2.0
            further = self._accept(self._step(now, move, self.step, reach), highest)
            if further is None and found is not None:
                break
            found = further or found
            highest = found.value if found else above
        if found is not None:
            return self._shortened(now, move, found, above)
        if trusting and now.value[0] >= NEARLY_DONE:
            own = self._step(now, move, own.length / 2**HALVINGS, bounded=False)
        return self._accept(own) if trusting else None

    def _shortened(self, now: Seen, move: Move, found: Seen, above: tuple[float, float]) -> Seen:
        """Halves of a step that helps, as long as they bring NEARLY_ALL of it: a divergence is quartered with each."""
        for _ in range(HALVINGS):
            half = self._step(now, move, found.length / 2, found.reach, bounded=False)
            part = 0 if found.value[0] > above[0] else 1  # by the labels, or by the chances where these stay the same
            least = above[part] + NEARLY_ALL * (found.value[part] - above[part])
            if half.value[part] < least or self._accept(half, above) is None:
                break
            found = half
        return found

    def _step(self, now: Seen, move: Move, length: float, reach: float = 1.0, bounded: bool = True) -> Seen:
        """`now` and one alignment with r times `reach`; `bounded`: cut where it moves random messages past STRIDE."""
        scaled = replace(move, vectors=move.vectors.raised(reach))
        edit = self._align(now.edit, scaled, length)
        moved = self.work.stride(now.edit, edit, self.iteration) if bounded else 0.0
        if moved > STRIDE:  # a divergence grows with the square of the step
            length *= math.sqrt(STRIDE / moved)
            edit = self._align(now.edit, scaled, length)
        validation = self.work.foresee(edit, now.validation.prompts, self.foresight)
        value = promise(validation, self.work.aim.beta)
        return Seen(edit, validation, value, now.passes + 1, moved > STRIDE, length, reach)

    def _align(self, edit: Edit, move: Move, length: float) -> Edit:
        sublayers = self.work.decoder.sublayers
        return align_sublayers(edit, sublayers, move.vectors, move.chosen, self.iteration, length, move.writers)

    def _accept(self, seen: Seen, above: tuple[float, float] | None = None) -> Seen | None:
        """`seen` if it is worth more than `above` and harmless text is spared, else None."""
        if above is not None and not seen.beats(above):
            return None
        if spares(self.work, seen.edit, self.texts):
            return seen
        self.forbidden = True
        return None


def spares(work: Work, edit: Edit, texts: Sequence[tuple[str, str]]) -> bool:
    """Whether an edit leaves harmless text alone as far as the run's limits ask."""
    if not texts:
        return True
    some = texts[:: max(1, len(texts) // HARMLESS_CHECKED)][:HARMLESS_CHECKED]
    found = work.harm(edit, some)
    return found.mean_kl <= work.aim.max_kl and found.mean_kept >= work.aim.min_kept


def _slow(value: tuple[float, float], before: tuple[float, float]) -> bool:
    return value[0] < NEARLY_DONE and value[0] - before[0] < SLOW
