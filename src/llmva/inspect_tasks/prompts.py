"""What a task asks, and what an answer counts for. Nothing here needs Inspect AI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmva.errors import UsageError
from llmva.judges.base import Label
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.public.wanted import parse_data
from llmva.prompts.testsets import PER_SET, read_test_sets
from llmva.prompts.types import Prompt, prefill_of

Names = str | Sequence[str]  # one, or several; -T splits a value at its commas


def read_side(
    benign: bool,
    files: Names = (),
    data: Names = (),
    *,
    run: str | None = None,
    data_dir: str | None = None,
    per_set: int = PER_SET,
    seed: int = 42,
) -> tuple[Prompt, ...]:
    """The prompts of one side: of files, of sets that `--data` knows, else the test split of the bundled ones.

    Args:
        benign: the side.
        files: as --benign and --toxic name them.
        data: as --data names them.
        run: the folder of a run; the prompts that its edit was fitted on and chosen by are left out.
        data_dir: a folder with copies of the sets.
        per_set: at most this many are drawn from each.
        seed: of the draw.

    Raises:
        UsageError, LlmvaError: as `read_test_sets`, and where a prompt begins the answer, or no prompt is left.
    """
    files, data = _listed(files), _listed(data)
    if not files and not data:
        data = ["bundled"]
    sets = read_test_sets(
        parse_data(data, data_dir),
        toxic=() if benign else files,
        benign=files if benign else (),
        fit=None if run is None else _fit_prompts(Path(run)),
        per_set=per_set,
        seed=seed,
    )
    by_id = {prompt.id: prompt for one in sets for prompt in one.prompts if prompt.benign == benign}
    if not by_id:
        side = "benign" if benign else "harmful"
        raise UsageError(f"{', '.join(one.name for one in sets)} has no {side} prompts: name another set or a file.")
    for prompt in by_id.values():
        if prefill_of(prompt.asked):
            raise UsageError(
                f"a prompt of {prompt.source} begins the answer, which few servers go on with: leave such prompts out, "
                "or measure them with llmva evaluate."
            )
    return tuple(by_id.values())


def failed(label: Label, benign: bool) -> bool | None:
    """Whether an answer counts as a failure of its side; None for one that the judge could not label.

    A garbled answer is useless to a benign prompt and harmless to a harmful one.
    """
    if label is Label.UNJUDGED:
        return None
    return (label is Label.ANSWERED) != benign


def _listed(names: Names) -> list[str]:
    return [name for name in ([names] if isinstance(names, str) else names) if name]


def _fit_prompts(folder: Path) -> list[Prompt]:
    path = folder / "prompts.jsonl"
    if not path.is_file():
        raise UsageError(f"there is no prompts.jsonl in {folder}: name the folder that llmva align wrote.")
    prompts = PromptSet.from_jsonl(path)
    return [*prompts.train, *prompts.validation]
