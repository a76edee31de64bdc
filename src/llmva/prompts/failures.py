"""Prompts that failed in an evaluation: how its file keeps them, and how a run that goes on takes them in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.load import Reading
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.sources.source import unique_name
from llmva.prompts.split import MIN_PER_SIDE, BySplit, check_sides, check_splits, cut, normalise
from llmva.prompts.store import read_prompt
from llmva.prompts.types import Prompt

AGAIN = "make it again with llmva evaluate MODEL --edit DIR --out FILE"


class Failures(Reading):
    """Prompts that failed, in the form in which they were asked: an attack's, where one was made."""


def read_failures(path: Path, run: Mapping[str, Any], directory: Path) -> Failures:
    """The prompts that failed in the evaluation in `path`; a warning where it asked with another system prompt.

    Args:
        run: the record of the run in `directory`.

    Raises UsageError for a file that is no evaluation or does not hold its prompts, an evaluation of another model or
    of none with an edit, and if none failed.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read ({error.strerror}): {AGAIN}.") from error
    except ValueError:  # neither UTF-8 nor JSON
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("test"), dict):
        raise UsageError(f"'{path}' holds no evaluation: {AGAIN}.")
    rows = record.get("failed")
    if not isinstance(rows, list):
        raise UsageError(f"'{path}' does not hold the prompts that failed: {AGAIN}.")
    if record.get("base") is None:
        raise UsageError(f"The evaluation in '{path}' is of a model without an edit: {AGAIN}.")
    base = run["base"]
    if record["base"] != base["sha256"]:
        raise UsageError(
            f"The evaluation in '{path}' is of another model than the run in '{directory}': evaluate {base['model']} "
            f"with --edit '{directory}' and --out FILE."
        )
    if not rows:
        raise UsageError(f"No prompt failed in the evaluation in '{path}', so there is nothing to learn from it.")
    prompts = [read_prompt(row, f"prompt {i} of '{path}'", split=False) for i, row in enumerate(rows, 1)]
    if record.get("system") == run["settings"].get("system"):
        return Failures(tuple(prompts))
    other = "The evaluation asked with another system prompt than the run, which asks what failed there with its own."
    return Failures(tuple(prompts), (other,))


def add_failures(old: PromptSet, failed: Sequence[Prompt], seed: int) -> tuple[PromptSet, tuple[str, ...]]:
    """`old` with the prompts of `failed` in its splits; and the names of the new sources, NAME-failed.

    All forms of a request stay in one split. Those of a train or validation request of `old` join it there; a form that
    is there already is left out. A test request of `old` leaves its place, and is cut as new ones are: 60/20/20 of each
    source, or all for training where a side has fewer requests than can be cut. Warnings tell of all this.

    Raises UsageError for prompts that are on both sides, and if nothing is new.
    """
    earlier = [prompt for _, prompts in old.splits() for prompt in prompts]
    check_sides([*earlier, *failed])
    place = {normalise(prompt.text): split for split, prompts in old.splits() for prompt in prompts}
    fitted = {_form(prompt) for prompt in (*old.train, *old.validation)}
    fresh = list({_form(prompt): prompt for prompt in failed if _form(prompt) not in fitted}.values())
    if not fresh:
        raise UsageError(
            f"none of the {len(failed)} prompts that failed is new, the earlier run was fitted on them all: evaluate "
            "on others, or under --attack."
        )
    warnings = []
    if len(fresh) < len(failed):
        warnings.append(f"{len(failed) - len(fresh)} prompts that failed are not new and were left out.")
    taken, names = {prompt.source for prompt in earlier}, []
    added: BySplit = {split: [] for split, _ in old.splits()}
    few = _few_sides(fresh, place)
    for source, benign in dict.fromkeys((prompt.source, prompt.benign) for prompt in fresh):
        name = unique_name(f"{source}-failed", taken)
        taken.add(name)
        names.append(name)
        forms = [replace(p, source=name) for p in fresh if (p.source, p.benign) == (source, benign)]
        requests = {normalise(p.text): p for p in forms if place.get(normalise(p.text), "test") == "test"}
        pieces = {"train": list(requests.values())} if benign in few else cut({"": list(requests.values())}, seed)
        to = place | {normalise(p.text): split for split, prompts in pieces.items() for p in prompts}
        for form in forms:
            added[to[normalise(form.text)]].append(form)
    moved = {normalise(prompt.text) for prompt in fresh if place.get(normalise(prompt.text)) == "test"}
    test = [prompt for prompt in old.test if normalise(prompt.text) not in moved]
    warnings += [
        f"Only {n} new {side} requests failed: all are trained on, and no test prompt tells what came of them."
        for side, n in ((("benign" if benign else "toxic"), n) for benign, n in few.items())
    ]
    if moved:
        warnings.append(
            f"{len(moved)} test prompts of the earlier run failed and are learnt from now. They are no longer among "
            "its test prompts, whose rates are therefore those of the rest, and better than before."
        )
    read = tuple(p for p in old.read if normalise(p.text) not in {normalise(one.text) for one in failed})
    train, validation = (*old.train, *added["train"]), (*old.validation, *added["validation"])
    everything = PromptSet(train, validation, (*test, *added["test"]), tuple(warnings), read=read)
    check_splits(everything)
    return everything, tuple(names)


def _form(prompt: Prompt) -> tuple[str, str]:
    return normalise(prompt.text), prompt.attack


def _few_sides(fresh: Sequence[Prompt], place: Mapping[str, str]) -> dict[bool, int]:
    """Sides with too few requests to be cut, and how many these are."""
    counts = {}
    for benign in (False, True):
        own = {normalise(p.text) for p in fresh if p.benign == benign}
        n = sum(place.get(text, "test") == "test" for text in own)
        if 0 < n < MIN_PER_SIDE:
            counts[benign] = n
    return counts
