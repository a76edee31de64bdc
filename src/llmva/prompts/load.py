"""Specs or lists of texts -> a checked PromptSet."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from llmva.errors import UsageError
from llmva.prompts.contamination import FitIndex
from llmva.prompts.sources import Source, read_source
from llmva.prompts.spec import parse_spec
from llmva.prompts.split import LEAST, check_sides, cut, draw_splits, drop_repeats, join, normalise
from llmva.prompts.texts import check_text
from llmva.prompts.types import MAX_CHARS, Lists, Prompt, PromptSet

Sided = tuple[bool, Source]  # benign?, source
PER_SET = 500  # prompts of a side of a registered set in a run, as many as the paper drew from each of its sets


def load_prompts(
    toxic: Sequence[str] = (), benign: Sequence[str] = (), max_chars: int = MAX_CHARS
) -> tuple[Prompt, ...]:
    """Exactly the prompts that the specs name, repeats included, in order (toxic first), without cutting them.

    A source with splits of its own gives all of them. Raises UsageError as `PromptSet.load`; one side alone will do.
    """
    sources = _read_all(toxic, benign, max_chars)
    prompts = [Prompt(text, side, source.name) for side, source in sources for text in source.all_texts()]
    if not prompts:
        raise UsageError("no prompts were given: add --toxic or --benign with a file or a data set.")
    check_sides(prompts)
    return tuple(prompts)


def load_prompt_set(
    toxic: Sequence[str],
    benign: Sequence[str],
    seed: int = 0,
    max_chars: int = MAX_CHARS,
    data: Sequence[str] = (),
    per_set: int | None = None,
) -> PromptSet:
    """See `PromptSet.load`."""
    from llmva.prompts.entries import read_entry  # here, so that the registry can be run as a program
    from llmva.prompts.wanted import parse_data

    wanted = parse_data(data)
    sides = {side for one in wanted for side in one.entry.sides}
    _need("toxic", len(toxic) + ("toxic" in sides))
    _need("benign", len(benign) + ("benign" in sides))
    own = _read_all(toxic, benign, max_chars)
    public = [sided for one in wanted for sided in read_entry(one.entry, one.local, max_chars)]
    _drop_conflicts(public, own)
    sources = _with_unique_names([*public, *own])
    return _assemble(sources, seed, {source.name for _, source in public}, per_set or PER_SET)


def prompt_set_from_lists(toxic: Lists, benign: Lists, seed: int = 0, max_chars: int = MAX_CHARS) -> PromptSet:
    """See `PromptSet.from_lists`."""
    sources: list[Sided] = []
    for side, lists in (("toxic", toxic), ("benign", benign)):
        if isinstance(lists, str):
            raise UsageError(f"{side} prompts are one string: give a list of strings, or PromptSet.load a file.")
        for name, texts in (lists if isinstance(lists, Mapping) else {side: lists}).items():
            checked = [check_text(text, f"item {i} of {name}", max_chars) for i, text in enumerate(texts, 1)]
            sources.append((side == "benign", Source(name, {"": checked})))
    return _assemble(_with_unique_names(sources), seed)


def _read_all(toxic: Sequence[str], benign: Sequence[str], max_chars: int) -> list[Sided]:
    # Parsed all at once first: a misspelt path is told before minutes of downloading.
    specs = [(False, parse_spec(given)) for given in toxic] + [(True, parse_spec(given)) for given in benign]
    return _with_unique_names([(side, read_source(spec, max_chars)) for side, spec in specs])


def _with_unique_names(sources: list[Sided]) -> list[Sided]:
    taken = set()
    for _, source in sources:
        name, n = source.name, 1
        while source.name in taken:
            n += 1
            source.name = f"{name}-{n}"
        taken.add(source.name)
    return sources


def _drop_conflicts(public: Sequence[Sided], own: Sequence[Sided]) -> None:
    """Take out of published sets what stands on the other side too, and say so: nobody can mend them."""
    sides: dict[str, set[bool]] = {}
    for benign, source in [*public, *own]:
        for text in source.all_texts():
            sides.setdefault(normalise(text), set()).add(benign)
    for _, source in public:
        before = len(source.all_texts())
        for split, texts in source.texts.items():
            source.texts[split] = [text for text in texts if len(sides[normalise(text)]) == 1]
        if lost := before - len(source.all_texts()):
            source.warnings.append(f"{source.name}: {lost} left out, the same text being given on the other side.")


def _assemble(sources: list[Sided], seed: int, drawn: Collection[str] = (), per_set: int = PER_SET) -> PromptSet:
    """Cut and join; of the sources named in `drawn` at most `per_set` prompts are taken."""
    cuts, warnings, everything = [], [], []
    for benign, source in sources:
        warnings += source.warnings
        prompts = {
            split: [Prompt(text, benign, source.name) for text in texts] for split, texts in source.texts.items()
        }
        kept = {split: drop_repeats(found) for split, found in prompts.items()}
        repeats = sum(len(prompts[split]) - len(kept[split]) for split in prompts)
        if repeats:
            warnings.append(f"{source.name}: {repeats} left out, repeats of an earlier prompt.")
        if source.name in drawn:
            there = sum(map(len, kept.values()))
            kept = draw_splits(kept, per_set, seed)
            if there > per_set:
                warnings.append(
                    f"{source.name}: {per_set} of {there} prompts were drawn (--per-set {per_set}, a side)."
                )
        everything += [prompt for found in kept.values() for prompt in found]
        cuts.append((source.name, cut(kept, seed)))
    check_sides(everything)
    unique = drop_repeats(everything)
    _need("toxic", sum(not prompt.benign for prompt in unique), LEAST)
    _need("benign", sum(prompt.benign for prompt in unique), LEAST)
    found = join(cuts, warnings)
    return replace(found, warnings=(*found.warnings, *_near_repeats(found)))


def add_prompts(old: PromptSet, new: Sequence[Prompt], seed: int) -> tuple[PromptSet, tuple[str, ...]]:
    """`old` with its splits as they are, and each source of `new` cut 60/20/20; and the names of the new sources.

    A new prompt that `old` has already is left out, and told. A source whose name is taken gets another. Raises
    UsageError for prompts that stand on both sides, and where nothing is new or too little to be cut.
    """
    before = [prompt for _, found in old.splits() for prompt in found]
    check_sides([*before, *new])
    seen = FitIndex(before)
    fresh = drop_repeats([prompt for prompt in new if prompt.text not in seen])
    if not fresh:
        raise UsageError(f"none of the {len(new)} prompts is new, the earlier run has them all: give others.")
    for side, found in (("toxic", [p for p in fresh if not p.benign]), ("benign", [p for p in fresh if p.benign])):
        _need(f"new {side}", len(found), LEAST) if found else None
    warnings = [f"{len(new) - len(fresh)} prompts are not new and were left out."] if len(fresh) < len(new) else []
    if near := len(seen.overlap(fresh).near):
        warnings.append(f"{near} of {len(fresh)} new prompts share most of their words with one of the earlier run.")
    taken, splits, names = {prompt.source for prompt in before}, dict(old.splits()), []
    added: dict[str, list[Prompt]] = {split: [] for split in splits}
    for source, benign in dict.fromkeys((prompt.source, prompt.benign) for prompt in fresh):
        name, n = source, 1
        while name in taken:
            n += 1
            name = f"{source}-{n}"
        taken.add(name)
        names.append(name)
        mine = [Prompt(p.text, benign, name) for p in fresh if (p.source, p.benign) == (source, benign)]
        for split, found in cut({"": mine}, seed).items():
            added[split] += found
    for split, found in added.items():
        for benign in {prompt.benign for prompt in fresh}:
            if all(prompt.benign != benign for prompt in found):
                raise UsageError(f"the {split} split gets no new {'benign' if benign else 'toxic'} prompts: give more.")
    train, validation, test = ((*splits[split], *added[split]) for split in ("train", "validation", "test"))
    warnings += _near_repeats(PromptSet(train, validation, tuple(added["test"])))
    return PromptSet(train, validation, test, tuple(warnings)), tuple(names)


def _near_repeats(prompts: PromptSet) -> list[str]:
    """What a reader of test figures must know of test prompts that are nearly training prompts, by source."""
    overlap = FitIndex([*prompts.train, *prompts.validation]).overlap(prompts.test)
    near = [prompts.test[i].source for i in overlap.near]
    sizes = {source: sum(prompt.source == source for prompt in prompts.test) for source in set(near)}
    return [
        f"{source}: {near.count(source)} of {sizes[source]} test prompts share most of their words with a train or "
        "validation prompt, which flatters the figures."
        for source in dict.fromkeys(near)
    ]


def _need(side: str, found: int, least: int = 1) -> None:
    if not found:
        raise UsageError(f"there are no {side} prompts: add --{side} with a file or a data set.")
    if found < least:
        raise UsageError(
            f"there are only {found} different {side} prompts: give at least {least} with --{side}, so that train, "
            "validation and test all get some."
        )
