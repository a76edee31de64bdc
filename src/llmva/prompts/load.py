"""From specs or lists of texts to checked prompts, as they are or in splits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmva.errors import UsageError
from llmva.prompts.contamination import near_repeats
from llmva.prompts.entries import read_entry
from llmva.prompts.public.wanted import parse_data
from llmva.prompts.sources.source import Source, read_source, unique_name
from llmva.prompts.sources.spec import parse_spec
from llmva.prompts.sources.texts import check_prompt
from llmva.prompts.split import (
    MIN_PER_SIDE,
    BySplit,
    check_sides,
    cut,
    draw_splits,
    drop_repeats,
    join,
    normalise,
    require_prompts,
)
from llmva.prompts.types import MAX_CHARS, Prompt, Splits, text_of

Given = Sequence[str | Sequence[Mapping[str, str]]]  # texts, or lists of messages with role and content
Lists = Given | Mapping[str, Given]  # of one source, or by source
SidedSource = tuple[bool, Source]  # benign?, source
PER_SET = 500  # prompts of a side of a registered set in a run, as many as the paper drew from each of its sets


@dataclass(frozen=True)
class Reading:
    """Prompts that were not cut, with `warnings` and `notes` as `Splits` has them."""

    prompts: tuple[Prompt, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_prompts(
    toxic: Sequence[str] = (), benign: Sequence[str] = (), max_chars: int = MAX_CHARS
) -> tuple[Prompt, ...]:
    """Exactly the prompts that the specs name, repeats included, in order (toxic first), without cutting them.

    A source with splits of its own gives all of them. Raises UsageError as `PromptSet.load`; one side alone will do.
    """
    return read_prompts(toxic, benign, max_chars).prompts


def read_prompts(toxic: Sequence[str] = (), benign: Sequence[str] = (), max_chars: int = MAX_CHARS) -> Reading:
    """As `load_prompts`, with what reading them guessed or left out."""
    sources = _read_all(toxic, benign, max_chars)
    prompts = [source.prompt(asked, side) for side, source in sources for asked in source.all_texts()]
    if not prompts:
        raise UsageError("no prompts were given: add --toxic or --benign with a file or a data set.")
    check_sides(prompts)
    warnings = tuple(warning for _, source in sources for warning in source.warnings)
    return Reading(tuple(prompts), warnings, tuple(source.said for _, source in sources))


def load_splits(
    toxic: Sequence[str],
    benign: Sequence[str],
    seed: int = 0,
    max_chars: int = MAX_CHARS,
    data: Sequence[str] = (),
    per_set: int | None = None,
    data_dir: str | Path | None = None,
) -> Splits:
    """What `PromptSet.load` makes a set of, with the same arguments and errors."""
    wanted = parse_data(data, data_dir)
    sides = {side for one in wanted for side in one.entry.sides}
    require_prompts("toxic", len(toxic) + ("toxic" in sides))
    require_prompts("benign", len(benign) + ("benign" in sides))
    own = _read_all(toxic, benign, max_chars)
    public = [sided for one in wanted for sided in read_entry(one.entry, one.local, max_chars)]
    _drop_conflicts(public, own)
    sources = _with_unique_names([*public, *own])
    return _assemble(sources, seed, {source.name for _, source in public}, per_set or PER_SET)


def splits_from_lists(toxic: Lists, benign: Lists, seed: int = 0, max_chars: int = MAX_CHARS) -> Splits:
    """What `PromptSet.from_lists` makes a set of, with the same arguments and errors."""
    sources: list[SidedSource] = []
    for side, lists in (("toxic", toxic), ("benign", benign)):
        if isinstance(lists, str):
            raise UsageError(f"{side} prompts are one string: give a list of strings, or PromptSet.load a file.")
        for name, texts in (lists if isinstance(lists, Mapping) else {side: lists}).items():
            checked = [check_prompt(text, f"item {i} of {name}", max_chars) for i, text in enumerate(texts, 1)]
            sources.append((side == "benign", Source(name, {"": checked})))
    return _assemble(_with_unique_names(sources), seed)


def _read_all(toxic: Sequence[str], benign: Sequence[str], max_chars: int) -> list[SidedSource]:
    # All specs are parsed before any is read, so that a misspelt path is reported before minutes of downloading.
    specs = [(False, parse_spec(given)) for given in toxic] + [(True, parse_spec(given)) for given in benign]
    return _with_unique_names([(side, read_source(spec, side, max_chars)) for side, spec in specs])


def _with_unique_names(sources: list[SidedSource]) -> list[SidedSource]:
    taken: set[str] = set()
    for _, source in sources:
        source.name = unique_name(source.name, taken)
        taken.add(source.name)
    return sources


def _drop_conflicts(public: Sequence[SidedSource], own: Sequence[SidedSource]) -> None:
    """Drop texts of published sets that are given on the other side too, and say so, since nobody can mend a set."""
    sides: dict[str, set[bool]] = {}
    for benign, source in [*public, *own]:
        for asked in source.all_texts():
            sides.setdefault(normalise(text_of(asked)), set()).add(benign)
    for _, source in public:
        before = len(source.all_texts())
        for split, texts in source.texts.items():
            source.texts[split] = [asked for asked in texts if len(sides[normalise(text_of(asked))]) == 1]
        if lost := before - len(source.all_texts()):
            source.warnings.append(f"{source.name}: {lost} left out, the same text being given on the other side.")


def _assemble(sources: list[SidedSource], seed: int, drawn: Collection[str] = (), per_set: int = PER_SET) -> Splits:
    """Cut and join; of the sources named in `drawn` at most `per_set` prompts are taken."""
    cuts: list[tuple[str, BySplit]] = []
    warnings: list[str] = []
    everything: list[Prompt] = []
    for benign, source in sources:
        warnings += source.warnings
        given = {split: [source.prompt(asked, benign) for asked in texts] for split, texts in source.texts.items()}
        kept = {split: drop_repeats(prompts) for split, prompts in given.items()}
        repeats = sum(len(given[split]) - len(kept[split]) for split in given)
        if repeats:
            warnings.append(f"{source.name}: {repeats} left out, repeats of an earlier prompt.")
        if source.name in drawn:
            available = sum(map(len, kept.values()))
            kept = draw_splits(kept, per_set, seed)
            if available > per_set:
                warnings.append(
                    f"{source.name}: {per_set} of {available} prompts were drawn (--per-set {per_set}, a side)."
                )
        everything += [prompt for prompts in kept.values() for prompt in prompts]
        cuts.append((source.name, cut(kept, seed)))
    check_sides(everything)
    unique = drop_repeats(everything)
    require_prompts("toxic", sum(not prompt.benign for prompt in unique), MIN_PER_SIDE)
    require_prompts("benign", sum(prompt.benign for prompt in unique), MIN_PER_SIDE)
    splits = join(cuts, warnings)
    notes = tuple(source.said for _, source in sources if source.said)
    return replace(splits, warnings=(*splits.warnings, *near_repeats(splits)), notes=notes)
