"""Data sets to measure on: their test prompts without those that the fit has seen, and a draw from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.contamination import FitIndex
from llmva.prompts.entries import read_entry
from llmva.prompts.public.wanted import Wanted
from llmva.prompts.sources.source import Source, read_source, unique_name
from llmva.prompts.sources.spec import parse_spec
from llmva.prompts.split import draw, drop_repeats
from llmva.prompts.types import MAX_CHARS, Prompt, text_of

PER_SET = 200  # of a side: a 95% interval of at most 14 points, and minutes rather than days for the large sets


@dataclass(frozen=True)
class TestSet:
    """`about` is what a record says of it, in plain JSON types; `limits` are sentences that a reader must know.

    `notes` say what was read from a file, for the user's eyes alone.
    """

    __test__ = False  # pytest takes the name for a test's

    name: str
    prompts: tuple[Prompt, ...]
    about: dict[str, Any]
    limits: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_test_sets(
    data: Sequence[Wanted],
    toxic: Sequence[str] = (),
    benign: Sequence[str] = (),
    *,
    fit: Sequence[Prompt] | None = None,
    per_set: int = PER_SET,
    seed: int = 42,
    keep_duplicates: bool = False,
    max_chars: int = MAX_CHARS,
) -> list[TestSet]:
    """One set for each of `data`, then one for each source of `toxic` and `benign`.

    A set gives its test split, or all its prompts if it has none. Repeats are dropped, and so are prompts that the fit
    has seen unless `keep_duplicates`. Of each side at most `per_set` prompts are drawn. A draw depends on the seed and
    the texts alone, and a smaller draw is part of a larger one.

    Args:
        fit: the prompts that the edit was fitted on and chosen by; None if they are not known.

    Raises:
        UsageError: as the readers do, and for a set without any prompt left.
        LlmvaError: the home of a set cannot be reached, and no cache has it.
    """
    specs = [(False, parse_spec(given)) for given in toxic] + [(True, parse_spec(given)) for given in benign]
    read: list[tuple[str, Wanted | None, list[tuple[bool, Source]]]] = []
    for wanted in data:
        read.append((wanted.entry.name, wanted, read_entry(wanted.entry, wanted.local, max_chars)))
    for side, spec in specs:
        source = read_source(spec, side, max_chars)
        source.name = unique_name(source.name, {name for name, _, _ in read})
        read.append((source.name, None, [(side, source)]))
    fit_index = None if fit is None else FitIndex(fit)
    fit_sources = None if fit is None else {prompt.source for prompt in fit}
    return [
        _test_set(name, wanted, sources, fit_index, fit_sources, per_set, seed, keep_duplicates)
        for name, wanted, sources in read
    ]


def _test_set(
    name: str,
    wanted: Wanted | None,
    sources: Sequence[tuple[bool, Source]],
    fit: FitIndex | None,
    fit_sources: set[str] | None,
    per_set: int,
    seed: int,
    keep_duplicates: bool,
) -> TestSet:
    limits = [warning for _, source in sources for warning in source.warnings]
    own = any("test" in source.texts for _, source in sources)
    everything = [
        source.prompt(asked, side)
        for side, source in sources
        for asked in (source.texts.get("test", []) if own else source.all_texts())
    ]
    pool = [p for side in (False, True) for p in drop_repeats([p for p in everything if p.benign == side])]
    overlap = None if fit is None else fit.overlap(pool)
    known = frozenset(pool[i] for i in overlap.positions) if overlap is not None else frozenset()
    left = pool if keep_duplicates else [prompt for prompt in pool if prompt not in known]
    if not left:
        raise UsageError(
            f"the edit was fitted on every test prompt of {name}: leave the set out, or add --keep-duplicates."
        )
    chosen = [p for side in (False, True) for p in draw([p for p in left if p.benign == side], per_set, seed)]
    if overlap is not None and known:
        what = "kept among them" if keep_duplicates else "left out"
        limits.append(
            f"{name}: {len(known)} of {len(pool)} prompts were seen in the fit ({len(overlap.exact)} the same, "
            f"{len(overlap.near)} nearly) and {what}."
        )
    if len(chosen) < len(left):
        limits.append(f"{name}: {len(chosen)} of {len(left)} prompts were drawn (--per-set {per_set}, a side).")
    home = wanted.entry.home if wanted is not None else None
    about = {
        "name": name,
        "home": home.url if home else None,
        "revision": home.revision if home and wanted and wanted.local is None else None,
        "local": wanted.local if wanted is not None else None,
        "licence": wanted.entry.licence if wanted is not None else None,
        "licence_note": wanted.entry.licence_note if wanted is not None else None,
        "gated": home.gated if home else None,
        "split": "test" if own else "all",
        "available": _sides(pool),
        "drawn": _sides(chosen),
        "fitted_on": None
        if fit is None or fit_sources is None
        else any(_is_of(source, fit_sources, fit) for _, source in sources),
        "contamination": None
        if overlap is None
        else {**overlap.counts(), "of": len(pool), "kept": sum(prompt in known for prompt in chosen)},
    }
    notes = tuple(source.said for _, source in sources if source.said)
    return TestSet(name, tuple(chosen), about, tuple(limits), notes)


def _is_of(source: Source, fit_sources: set[str], fit: FitIndex) -> bool:
    """Whether the edit was fitted on this source, by its name and a shared text: either alone may be chance."""
    return source.name in fit_sources and any(text_of(asked) in fit for asked in source.all_texts())


def _sides(prompts: Sequence[Prompt]) -> dict[str, int]:
    benign = sum(prompt.benign for prompt in prompts)
    return {"toxic": len(prompts) - benign, "benign": benign}
