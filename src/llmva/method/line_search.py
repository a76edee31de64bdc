"""For a step along an iteration's vectors that is foreseen to help, and that leaves harmless text alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llmva.edit import Edit
from llmva.method.context import Context
from llmva.method.first_token import FirstTokenClassifier, predicted_f1
from llmva.method.identify import Vectors, align_sublayers
from llmva.method.observe import Observation

HARMLESS_CHECKED = 16  # texts that a step is measured on
GAIN = 0.003  # of the F of chances, that a step must bring where the foreseen labels stay the same
SLOW, NEARLY_DONE = 0.05, 0.95  # a rise of F below which, and an F up to which, a step that reaches further is tried
TRUST_RADIUS = 0.05  # nats that a step may move the answers to random messages by
MAX_RATIO_SCALE = 4.0  # most that r is raised by
HALVINGS = 2  # of a step that would make things worse, or that half of would do
NEARLY_ALL = 0.95  # of what a step brings, that half of it must bring to be made in its place


@dataclass(frozen=True)
class Candidate:
    """An edit, and what validation prompts are foreseen to meet with."""

    edit: Edit
    validation: Observation
    value: tuple[float, float]  # its `predicted_f1`
    passes: int = 0  # alignments of this iteration that it holds
    cut: bool = False  # whether the last of them would have gone further than TRUST_RADIUS
    length: float = 0.0  # of the last of them
    ratio_scale: float = 1.0  # what r was raised by for it

    def beats(self, value: tuple[float, float]) -> bool:
        """Whether it is worth another pass: more labels right, or as many and more surely."""
        return self.value[0] > value[0] or (self.value[0] == value[0] and self.value[1] >= value[1] + GAIN)


@dataclass(frozen=True)
class Update:
    """An alignment: what it reads, where it is made, and along what, if not along v_a (`steps.align_sublayers`)."""

    vectors: Vectors
    chosen: list[int]
    writers: Tensor | None = None


@dataclass
class LineSearch:
    """From one iteration's foreseen labels."""

    context: Context
    classifier: FirstTokenClassifier
    texts: Sequence[tuple[str, str]]  # harmless (prompt, answer) of the untouched model
    iteration: int
    step: float
    forbidden: bool = False  # whether a step that would have helped was left for what it did to harmless text

    def best(
        self, now: Candidate, move: Update, above: tuple[float, float], accept_unimproved: bool = False
    ) -> Candidate | None:
        """A step from `now` along `move` that is foreseen to be worth more than `above`, or None.

        The method's own step first, then shorter ones until one helps. Where it helps little and much is left to do, a
        step that was cut is tried whole, and then r is raised: sigma_a is small where nearly every prompt has the same
        answer, and r = sigma_a / sigma_b then asks for less than the decision needs. Of what helps, as little is made
        as brings nearly as much. `accept_unimproved`: where none helps, the method's own step is given all the same.
        """
        own = self._step(now, move, self.step)
        found = self._accept(own, above)
        for halving in range(1, HALVINGS + 1):
            found = found or self._accept(self._step(now, move, own.length / 2**halving, bounded=False), above)
        highest = found.value if found else above
        if own.cut and _slow(highest, above):
            found = self._accept(self._step(now, move, self.step, bounded=False), highest) or found
            highest = found.value if found else above
        ratio_scale = 1.0
        while ratio_scale < MAX_RATIO_SCALE and _slow(highest, above):
            ratio_scale *= 2.0
            further = self._accept(self._step(now, move, self.step, ratio_scale), highest)
            if further is None and found is not None:
                break
            found = further or found
            highest = found.value if found else above
        if found is not None:
            return self._shortened(now, move, found, above)
        if accept_unimproved and now.value[0] >= NEARLY_DONE:
            own = self._step(now, move, own.length / 2**HALVINGS, bounded=False)
        return self._accept(own) if accept_unimproved else None

    def _shortened(self, now: Candidate, move: Update, found: Candidate, above: tuple[float, float]) -> Candidate:
        """Halves of a step that helps, as long as they bring NEARLY_ALL of it: a divergence is quartered with each."""
        for _ in range(HALVINGS):
            half = self._step(now, move, found.length / 2, found.ratio_scale, bounded=False)
            part = 0 if found.value[0] > above[0] else 1  # by the labels, or by the chances where these stay the same
            least = above[part] + NEARLY_ALL * (found.value[part] - above[part])
            if half.value[part] < least or self._accept(half, above) is None:
                break
            found = half
        return found

    def _step(
        self, now: Candidate, move: Update, length: float, ratio_scale: float = 1.0, bounded: bool = True
    ) -> Candidate:
        """`now` and one alignment with r times `ratio_scale`; `bounded`: within TRUST_RADIUS on random messages."""
        scaled = replace(move, vectors=move.vectors.scale_ratio(ratio_scale))
        edit = self._align(now.edit, scaled, length)
        moved = self.context.first_token_kl(now.edit, edit, self.iteration) if bounded else 0.0
        if moved > TRUST_RADIUS:  # a divergence grows with the square of the step
            length *= math.sqrt(TRUST_RADIUS / moved)
            edit = self._align(now.edit, scaled, length)
        validation = self.context.predict_labels(edit, now.validation.prompts, self.classifier)
        value = predicted_f1(validation, self.context.objective.beta)
        return Candidate(edit, validation, value, now.passes + 1, moved > TRUST_RADIUS, length, ratio_scale)

    def _align(self, edit: Edit, move: Update, length: float) -> Edit:
        sublayers = self.context.decoder.sublayers
        return align_sublayers(edit, sublayers, move.vectors, move.chosen, self.iteration, length, move.writers)

    def _accept(self, seen: Candidate, above: tuple[float, float] | None = None) -> Candidate | None:
        """`seen` if it is worth more than `above` and harmless text is spared, else None."""
        if above is not None and not seen.beats(above):
            return None
        if within_harm_limits(self.context, seen.edit, self.texts):
            return seen
        self.forbidden = True
        return None


def within_harm_limits(context: Context, edit: Edit, texts: Sequence[tuple[str, str]]) -> bool:
    """Whether an edit leaves harmless text alone as far as the run's limits ask."""
    if not texts:
        return True
    some = texts[:: max(1, len(texts) // HARMLESS_CHECKED)][:HARMLESS_CHECKED]
    found = context.harm(edit, some)
    return found.mean_kl <= context.objective.max_kl and found.mean_kept >= context.objective.min_kept


def _slow(value: tuple[float, float], before: tuple[float, float]) -> bool:
    return value[0] < NEARLY_DONE and value[0] - before[0] < SLOW
