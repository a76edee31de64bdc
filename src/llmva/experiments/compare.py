"""The paper's Table 2 on any model: LLM-VA and the baselines on the same prompts, judge and seeds.

Every cell (method, setting, seed) is kept on disk, so an interrupted comparison resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmva.alignment import RunOptions, align
from llmva.baselines import BASELINES, make_baseline
from llmva.baselines.base import FACTORS, STRENGTH, Steering
from llmva.edit import Edit, check_untouched
from llmva.errors import UsageError
from llmva.evaluation.skills import Probe
from llmva.experiments.cells import Cells, file_name, study_identity
from llmva.experiments.choice import Choices, curve, note
from llmva.experiments.measure import HARMLESS_TEXTS, Applied, ExperimentSetup
from llmva.experiments.summary import NONE, OURS, method_rates, title, versus
from llmva.files import write_json
from llmva.judges.base import Judge, Label
from llmva.method.observe import harmless_answers
from llmva.models.at_rest import at_rest
from llmva.models.chat_model import ChatModel
from llmva.models.fingerprint import fingerprint
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt
from llmva.runs.environment import peak_bytes, versions
from llmva.runs.limits import Tally, limits_of
from llmva.settings import check_seed, make_settings

METHODS = (NONE, *BASELINES, OURS)
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)
BUDGET = 3000  # maximum number of answers for tuning a baseline if our own method is not compared


def compare(
    model: Any,
    tokenizer: Any,
    prompts: PromptSet | None = None,
    *,
    methods: Sequence[str] = METHODS,
    judge: Judge | str = "phrases",
    seeds: Sequence[int] = (42, 43, 44),
    out: str | Path | None = None,
    restart: bool = False,
    tuned: bool = True,
    curves: bool = True,
    skills: Sequence[Probe] = (),
    name: str | None = None,
    command: str | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure `methods` on the test prompts; returns the content of compare.json.

    Args:
        model, tokenizer: from `load_model`; the weights are not changed.
        methods: of METHODS.
        seeds: of the draws of fit prompts. Splits and test prompts are the same for all.
        out: folder for compare.json, the cells and our own runs. None keeps everything in memory.
        tuned: add a second row for each baseline. The first row has its paper's settings, with the magnitude chosen on
            validation prompts with the first seed. For the second, other options are tried too, with at most as many
            answers as our own run with that seed used.
        curves: also measure F1, ASR and ORR on validation prompts along the strength of each method.
        settings: of our own method, as `align` takes them.

    Raises:
        UsageError, LlmvaError: one sentence that names the mend.
    """
    from llmva.judges import make_judge

    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UsageError(f"There is no method '{unknown[0]}': choose among {', '.join(METHODS)}.")
    if not methods or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError("A comparison needs at least one method and different seeds: give some.")
    judge = make_judge(judge) if isinstance(judge, str) else judge
    prompts = prompts or PromptSet.bundled()
    progress = progress or Progress()
    chosen = make_settings(**settings)
    chat = ChatModel.of(model, tokenizer, batch_tokens, system=chosen.system)
    base = fingerprint(chat.decoder, name or getattr(model.config, "_name_or_path", "") or "unnamed")
    identity = {
        **study_identity(chat, base, prompts, skills),
        "judge": judge.name,
        "settings": chosen.model_dump(),
        "seed of tuning": check_seed(seeds[0]),
        "magnitudes of baselines": list(FACTORS),
    }
    directory = None if out is None else Path(out)
    check_untouched(chat.model)
    with at_rest(chat.model), closing(Cells(directory, identity, restart=restart)) as cells:
        for sentence in cells.notes:
            progress.note(sentence)
        setup = ExperimentSetup.of(chat, prompts, judge, chosen, skills, progress)
        comparison = _Comparison(
            setup, cells, directory, [check_seed(seed) for seed in seeds], chosen.model_dump(), restart
        )

        ours_first = sorted(dict.fromkeys(methods), key=lambda method: (method != NONE, method != OURS))
        for method in ours_first:  # its answers are the baselines' budget
            for row in comparison.rows_of(method, tuned):
                comparison.measure(row, curves)

        version = versions()
        rows = [
            comparison.summary(row) for method in dict.fromkeys(methods) for row in comparison.rows_of(method, tuned)
        ]
        tests = versus(rows, comparison.by_title, prompts.test)
        untouched = next((entry for entry in rows if entry["method"] == NONE), None)
        held = comparison.choices.untouched()["asr"] if set(methods) & set(BASELINES) else None
        for entry in rows:
            entry["versus"] = tests.get(title(entry))
            entry["note"] = note(entry, untouched, held)

    told = limits_of(chat, prompts.warnings, setup.thinking, comparison.tally())
    read = [WITHOUT_THOUGHTS] if setup.thinking.any and set(methods) & set(BASELINES) else []
    record: dict[str, Any] = {
        "format": 1,
        "kind": "comparison",
        "llmva": version.pop("llmva"),
        "versions": version,
        "command": command,
        "base": {key: value for key, value in base.items() if key not in ("hashes", "weights")},
        "judge": judge.name,
        "seeds": list(seeds),
        "settings": chosen.model_dump(),
        "sources": {prompt.source: "benign" if prompt.benign else "toxic" for prompt in prompts.test},
        "prompts": {split: len(members) for split, members in prompts.splits()},
        "rows": rows,
        "best_baseline": next(iter(tests.values()))["baseline"] if tests else None,
        "peak_bytes": peak_bytes(),
        "limits": [*told, *read, *cells.sentences, *LIMITS],
    }
    if directory is not None:
        write_json(directory / "compare.json", record)
    return record


LIMITS = (
    "The best baseline is the one with the highest F1 on these test prompts, a choice that flatters baselines.",
    "Latency is of methods applied by hooks; an edit written into the weights adds none by construction.",
    "Baselines' blocks are translated from the depth of their papers' models to this one's, and their magnitudes are "
    "those that do best on validation prompts; see docs/baselines.md.",
)
WITHOUT_THOUGHTS = "Baselines are fitted on prompts without thoughts, as their papers' models have none."


