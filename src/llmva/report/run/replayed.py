"""What a replay found, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmva.report.values import counted


def replayed_sentences(alike: Mapping[str, Any], versions: Sequence[str]) -> list[str]:
    """The verdict; where the runs part and by how much; what may be the cause. `alike` is `Alike.as_record()`."""
    first, files = alike["first"], alike["same_bytes"]
    answers = counted(alike["answers"], "answer")
    computed = [f"Computed otherwise: {'; '.join(versions)}."] if versions else []
    if alike["equal"]:
        return [f"Equal: {' and '.join(files)} are the same bytes, and so are all figures ({answers}).", *computed]
    if first is None:
        other = " and ".join(name for name, same in files.items() if not same)
        return [f"Not the same bytes: {other}. All answers, figures and columns are equal.", *computed]
    where = "at the end" if first["iteration"] is None else f"in iteration {first['iteration']}"
    far = alike["largest"]
    edit = "of other shapes" if far is None else f"apart by up to {far:.1e} of the largest number"
    sentences = [
        f"Not equal: the runs part {where}: {first['sentence']}.",
        f"In all, {alike['other_answers']} of {answers} are others, {alike['other_labels']} with "
        f"another label; the edits are {edit}.",
    ]
    usual = "Versions are the same: another processor, number of threads or size of batches may round otherwise."
    return [*sentences, *(computed or [usual])]
