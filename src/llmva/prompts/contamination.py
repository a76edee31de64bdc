"""Which test prompts the fit has seen: the same text, or nearly the same words on the same side.

Exact is what `split.normalise` makes equal. Near is a test prompt that shares more than NEAR of its word trigrams with
one fit prompt of its side. That is the line which the bundled prompts keep between their splits, and it is where one
word changed in the middle of a prompt still counts from ten words on (3 of 8 trigrams go), one changed at an end from
five words on (1 of 3). It is counted as a share of the test prompt: a request that was fitted on inside a longer
prompt has been seen, while a short fit prompt inside a new wrapper leaves the wrapper to be tested. Across the sides
only equal texts count, since data sets put contrasts that differ in one word on the two sides by design.
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
    """Positions of test prompts that the fit has seen; a prompt that is exact is not near as well."""

    exact: tuple[int, ...]
    near: tuple[int, ...]

    @property
    def positions(self) -> frozenset[int]:
        return frozenset((*self.exact, *self.near))

    def counts(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"exact": len(self.exact), "near": len(self.near)}


class FitIndex:
    """The prompts of a fit, ready to be looked up in.

    Each trigram knows the prompts that hold it, so a lookup takes time with the prompts that share rare trigrams, not
    with all of them: a hundred thousand test prompts against some thousands take seconds.
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
        """Is there a prompt of exactly this text, by `normalise`?"""
        return normalise(text) in self._texts

    def overlap(self, test: Sequence[Prompt]) -> Overlap:
        """Which of `test` are in here."""
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
        # A prompt with `needed` of the known ones lacks at most the rest, so it has one of this many rarest.
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
    """Sentences for readers of test figures, one a source with test prompts that are nearly training prompts."""
    overlap = FitIndex([*splits.train, *splits.validation]).overlap(splits.test)
    near = [splits.test[i].source for i in overlap.near]
    sizes = {source: sum(prompt.source == source for prompt in splits.test) for source in set(near)}
    return [
        f"{source}: {near.count(source)} of {sizes[source]} test prompts share most of their words with a train or "
        "validation prompt, which flatters the figures."
        for source in dict.fromkeys(near)
    ]
