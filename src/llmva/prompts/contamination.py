"""Which test prompts the fit has seen: the same text, or nearly the same words on the same side.

A test prompt is exact if `split.normalise` makes it equal to a fit prompt. It is near if more than the share NEAR of
its word trigrams are in one fit prompt of its side; the bundled prompts keep the same threshold between their splits.
With one word changed in the middle, a prompt is near from ten words on (3 of 8 trigrams change); with one word changed
at an end, from five words on (1 of 3). The share is of the test prompt's trigrams: a request that was fitted on inside
a longer prompt is near, while a fitted request inside a new wrapper is new, since the wrapper is still to be tested.
Across the sides only equal texts count, since data sets put pairs that differ in one word on the two sides by design.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmva.prompts.split import normalise
from llmva.prompts.types import Prompt, Splits

NEAR = (3, 5)  # more than 60% of the trigrams; as a fraction, so that no rounding decides
# Scripts written without spaces (kana, ideographs, Thai, Lao, Khmer, Burmese): a letter counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class Overlap:
    """Positions of test prompts that the fit has seen; an exact prompt is not in `near`."""

    exact: tuple[int, ...]
    near: tuple[int, ...]

    @property
    def positions(self) -> frozenset[int]:
        return frozenset((*self.exact, *self.near))

    def counts(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"exact": len(self.exact), "near": len(self.near)}


class FitIndex:
    """The prompts of a fit, for finding test prompts among them.

    Each trigram maps to the prompts that hold it, so a lookup compares only prompts that share rare trigrams, not all
    of them: a hundred thousand test prompts against some thousands take seconds.
    """

    def __init__(self, fit: Iterable[Prompt]) -> None:
        self._texts: set[str] = set()
        self._grams: list[frozenset[int]] = []
        self._holders: dict[bool, dict[int, list[int]]] = {False: {}, True: {}}  # by side: trigram -> prompts
        for prompt in fit:
            text = normalise(prompt.text)
            grams = trigrams(prompt.text)
            self._texts.add(text)
            for gram in grams:
                self._holders[prompt.benign].setdefault(gram, []).append(len(self._grams))
            self._grams.append(grams)

    def __contains__(self, text: str) -> bool:
        """Whether the fit has a prompt of this text, by `normalise`."""
        return normalise(text) in self._texts

    def overlap(self, test: Sequence[Prompt]) -> Overlap:
        """Which prompts of `test` the fit has seen."""
        exact, near = [], []
        for i, prompt in enumerate(test):
            if prompt.text in self:
                exact.append(i)
            elif self._is_near(trigrams(prompt.text), self._holders[prompt.benign]):
                near.append(i)
        return Overlap(tuple(exact), tuple(near))

    def _is_near(self, grams: frozenset[int], holders: dict[int, list[int]]) -> bool:
        needed = len(grams) * NEAR[0] // NEAR[1] + 1
        known = sorted((holders[gram] for gram in grams if gram in holders), key=len)
        if len(known) < needed:
            return False
        # A fit prompt with `needed` of the known trigrams lacks at most len(known) - needed of them, so it has one of
        # the len(known) - needed + 1 rarest.
        tried: set[int] = set()
        for members in known[: len(known) - needed + 1]:
            for i in members:
                if i not in tried:
                    tried.add(i)
                    if len(grams & self._grams[i]) >= needed:
                        return True
        return False


def trigrams(text: str) -> frozenset[int]:
    """Hashes of the runs of three words, case and punctuation aside; of all words where they are fewer."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) < 3:
        return frozenset({hash(tuple(words))} if words else ())
    return frozenset(map(hash, zip(words, words[1:], words[2:], strict=False)))


def near_repeats(splits: Splits) -> list[str]:
    """One sentence for each source whose test prompts nearly repeat train or validation prompts."""
    overlap = FitIndex([*splits.train, *splits.validation]).overlap(splits.test)
    near = [splits.test[i].source for i in overlap.near]
    sizes = {source: sum(prompt.source == source for prompt in splits.test) for source in set(near)}
    return [
        f"{source}: {near.count(source)} of {sizes[source]} test prompts share most of their words with a train or "
        "validation prompt, which flatters the figures."
        for source in dict.fromkeys(near)
    ]
