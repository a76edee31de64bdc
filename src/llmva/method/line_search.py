"""The length of a step: predicted labels must improve, and harmless text must stay within the limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.method.align import align_sublayers
from llmva.method.context import Context, Texts
from llmva.method.first_token import FirstTokenClassifier, predicted_f1
from llmva.method.identify import Vectors
from llmva.method.observe import Observation
from llmva.models.harmless import Known
from llmva.models.reading.below import Below

MIN_GAIN = 0.003  # minimum gain in F of the chances, if F of the predicted labels stays the same
SLOW, NEARLY_DONE = 0.05, 0.95  # larger steps are tried if the gain in F is below the first and F below the second
TRUST_RADIUS = 0.05  # maximum KL divergence of a step on random messages, in nats
MAX_RATIO_SCALE = 4.0
HALVINGS = 2  # how often a step is halved, to find one that helps or a shorter one that helps as much
NEARLY_ALL = 0.95  # share of the gain that half a step must bring to be preferred


@dataclass(frozen=True)
class Candidate:
    """An edit with the predicted labels of validation prompts."""

    edit: Edit
    validation: Observation
    value: tuple[float, float]  # its `predicted_f1`
    passes: int = 0  # alignments of this iteration in the edit
    cut: bool = False  # whether the last alignment was shortened to TRUST_RADIUS
    length: float = 0.0  # of the last alignment
    ratio_scale: float = 1.0  # factor of r in the last alignment
    known: Known = field(default_factory=dict, repr=False, compare=False)  # what it says on random messages

    def beats(self, value: tuple[float, float]) -> bool:
        """Whether it is better: F of the labels is higher, or equal with F of the chances MIN_GAIN higher."""
        return self.value[0] > value[0] or (self.value[0] == value[0] and self.value[1] >= value[1] + MIN_GAIN)


@dataclass(frozen=True)
class Update:
    """The vectors, sublayers and writers of an alignment; without writers it writes along v_a."""

    vectors: Vectors
    chosen: list[int]
    writers: Tensor | None = None


@dataclass
class LineSearch:
    """The search of one iteration."""

    context: Context
    classifier: FirstTokenClassifier
    texts: Texts
    iteration: int
    step: float
    on_pass: Callable[[int], None] = lambda n: None  # told of every pass
    forbidden: bool = False  # whether a step that would have helped was rejected for its harm to harmless text
    below: tuple[object, Below | None] = (None, None)  # what the steps share, and for which edit below them

    def best_step(
        self, now: Candidate, update: Update, above: tuple[float, float], accept_unimproved: bool = False
    ) -> Candidate | None:
        """A step from `now` along `update` whose predicted value is greater than `above`, or None.

        The full step, shortened to the trust radius, is tried first, then shorter ones until one helps. If the gain is
        small and F low, larger ones are tried: the step without the trust radius, then r doubled and quadrupled. If
        nearly all prompts have the same label, sigma_a is small, and r = sigma_a / sigma_b asks for too little. A
        shorter step is preferred if it brings NEARLY_ALL of the gain. With `accept_unimproved`, the full step is
        returned if none helps.
        """
        with self.context.chat.sharing(self._below(now, update)):
            return self._searched(now, update, above, accept_unimproved)

    def _below(self, now: Candidate, update: Update) -> Below | None:
        """All steps along `update` compute the same below its first sublayer, and those of later passes may too."""
        sublayers = self.context.chat.decoder.sublayers
        first = sublayers[update.chosen[0]].block if update.chosen else 0
        lower = {sublayer.name for sublayer in sublayers if sublayer.block < first}
        known = (first, {name: f.digest() for name, f in now.edit.factors.items() if name in lower})
        if known != self.below[0]:
            self.below = known, Below.of(self.context.chat.decoder, first)
        return self.below[1]

    def _searched(
        self, now: Candidate, update: Update, above: tuple[float, float], accept_unimproved: bool
    ) -> Candidate | None:
        own = full = self._step(now, update, self.step)
        best = self._accept(own, above)
        for halving in range(1, HALVINGS + 1):
            if best is None:
                own = self._step(now, update, full.length / 2**halving, bounded=False)
                best = self._accept(own, above)
        highest = best.value if best else above
        if full.cut and _is_slow(highest, above):
            best = self._accept(self._step(now, update, self.step, bounded=False), highest) or best
            highest = best.value if best else above
        ratio_scale = 1.0
        while ratio_scale < MAX_RATIO_SCALE and _is_slow(highest, above):
            ratio_scale *= 2.0
            further = self._accept(self._step(now, update, self.step, ratio_scale), highest)
            if further is None and best is not None:
                break
            best = further or best
            highest = best.value if best else above
        if best is not None:
            return self._shortened(now, update, best, above)
        if not accept_unimproved:
            return None
        return self._accept(own if now.value[0] >= NEARLY_DONE else full)

    def _shortened(self, now: Candidate, update: Update, best: Candidate, above: tuple[float, float]) -> Candidate:
        """Halve a step that helps while half brings NEARLY_ALL of the gain: that quarters the divergence."""
        for _ in range(HALVINGS):
            half = self._step(now, update, best.length / 2, best.ratio_scale, bounded=False)
            part = 0 if best.value[0] > above[0] else 1  # by the labels, or by the chances if these stay the same
            enough = above[part] + NEARLY_ALL * (best.value[part] - above[part])
            if half.value[part] < enough or self._accept(half, above) is None:
                break
            best = half
        return best

    def _step(
        self, now: Candidate, update: Update, length: float, ratio_scale: float = 1.0, bounded: bool = True
    ) -> Candidate:
        """`now` with one more alignment, r times `ratio_scale`; `bounded` keeps it within TRUST_RADIUS."""
        scaled = replace(update, vectors=update.vectors.scale_ratio(ratio_scale))
        edit = self._align(now.edit, scaled, length)
        moved = self.context.first_token_kl(now.edit, edit, self.iteration, now.known) if bounded else 0.0
        if moved > TRUST_RADIUS:  # the divergence grows with the square of the length
            length *= math.sqrt(TRUST_RADIUS / moved)
            edit = self._align(now.edit, scaled, length)
        validation = self.context.predict_labels(edit, now.validation.prompts, self.classifier)
        if self.context.chat.below is not None:
            validation = _with_lower(validation, now.validation, update.chosen[0])
        value = predicted_f1(validation, self.context.objective.beta)
        return Candidate(edit, validation, value, now.passes + 1, moved > TRUST_RADIUS, length, ratio_scale)

    def _align(self, edit: Edit, update: Update, length: float) -> Edit:
        sublayers = self.context.chat.decoder.sublayers
        return align_sublayers(edit, sublayers, update.vectors, update.chosen, self.iteration, length, update.writers)

    def _accept(self, candidate: Candidate, above: tuple[float, float] | None = None) -> Candidate | None:
        """`candidate` if its value is greater than `above` and harmless text stays within the limits, else None."""
        if above is not None and not candidate.beats(above):
            return None
        if within_harm_limits(self.context, candidate.edit, self.texts):
            return candidate
        self.forbidden = True
        return None


def within_harm_limits(context: Context, edit: Edit, texts: Texts) -> bool:
    """Whether an edit keeps harmless text within the run's limits."""
    if not texts:
        return True
    harm = context.harm(edit, texts)
    return harm.mean_kl <= context.objective.max_kl and harm.mean_kept >= context.objective.min_kept


def _with_lower(seen: Observation, before: Observation, first: int) -> Observation:
    """`seen` with the outputs of `before`, of the same prompts, in the sublayers below `first`: these were not read."""
    outputs = torch.cat([before.capture.outputs[:first], seen.capture.outputs[first:]])
    return replace(seen, capture=replace(seen.capture, outputs=outputs))


def _is_slow(value: tuple[float, float], before: tuple[float, float]) -> bool:
    return value[0] < NEARLY_DONE and value[0] - before[0] < SLOW
