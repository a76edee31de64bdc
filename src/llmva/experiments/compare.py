"""The paper's Table 2 on any model: LLM-VA and the baselines on the same prompts, judge and seeds.

Every cell (method, setting, seed) is kept on disk, so an interrupted comparison resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from llmva.baselines import BASELINES
from llmva.baselines.base import FACTORS
from llmva.edit import check_untouched
from llmva.errors import UsageError
from llmva.evaluation.skills import Probe
from llmva.experiments.cells import Cells, study_identity
from llmva.experiments.choice import note
from llmva.experiments.comparison import METHODS, Comparison, rows_of
from llmva.experiments.measure import ExperimentSetup
from llmva.experiments.published import is_published
from llmva.experiments.summary import NONE, OURS, title, versus
from llmva.files import write_json
from llmva.judges.base import Judge
from llmva.models.at_rest import at_rest
from llmva.models.chat_model import ChatModel
from llmva.models.fingerprint import fingerprint
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.runs.environment import peak_bytes, versions
from llmva.runs.limits import limits_of
from llmva.settings import Settings, check_seed, make_settings


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
        methods: of METHODS, or `adapter:PATH_OR_ID[@REVISION]` and `model:PATH_OR_ID[@REVISION]`, which others have
            published for the same base.
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

    check_methods(methods)
    if not methods or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError("A comparison needs at least one method and different seeds: give some.")
    judge = make_judge(judge) if isinstance(judge, str) else judge
    prompts = prompts or PromptSet.bundled()
    progress = progress or Progress()
    chosen = make_settings(**settings)
    chat = ChatModel.of(model, tokenizer, batch_tokens, system=chosen.system)
    base = fingerprint(chat.decoder, name or getattr(model.config, "_name_or_path", "") or "unnamed")
    identity = comparison_identity(chat, base, prompts, judge, chosen, seeds[0], skills)
    directory = None if out is None else Path(out)
    check_untouched(chat.model)
    with at_rest(chat.model), closing(Cells(directory, identity, restart=restart)) as cells:
        for sentence in cells.notes:
            progress.note(sentence)
        setup = ExperimentSetup.of(chat, prompts, judge, chosen, skills, progress)
        comparison = Comparison(
            setup, cells, directory, [check_seed(seed) for seed in seeds], chosen.model_dump(), restart, base["model"]
        )

        record = record_of(comparison, methods, base, tuned=tuned, curves=curves, command=command)
    if directory is not None:
        write_json(directory / "compare.json", record)
    return record


def check_methods(methods: Sequence[str]) -> None:
    """Raises UsageError for a method that is none of METHODS and not published either."""
    for method in methods:
        if method not in METHODS and not is_published(method):
            raise UsageError(
                f"There is no method '{method}': choose among {', '.join(METHODS)}, or name what is published as "
                "adapter:PATH or model:PATH."
            )


def comparison_identity(
    chat: ChatModel,
    base: Mapping[str, Any],
    prompts: PromptSet,
    judge: Judge,
    settings: Settings,
    seed: int,
    skills: Sequence[Probe],
) -> dict[str, Any]:
    """What all cells of a comparison share; `base` is the model's `fingerprint`, `seed` the first one."""
    return {
        **study_identity(chat, base, prompts, skills),
        "judge": judge.name,
        "settings": settings.model_dump(),
        "seed of tuning": check_seed(seed),
        "magnitudes of baselines": list(FACTORS),
    }


def record_of(
    comparison: Comparison,
    methods: Sequence[str],
    base: Mapping[str, Any],
    *,
    tuned: bool,
    curves: bool,
    command: str | None,
) -> dict[str, Any]:
    """The content of compare.json. Cells that are not there yet are measured."""
    setup = comparison.setup
    chat, prompts = setup.chat, setup.prompts
    comparison.begin()
    ours_first = sorted(dict.fromkeys(methods), key=lambda method: (method != NONE, method != OURS))
    for method in ours_first:  # its answers are the baselines' budget
        for row in rows_of(method, tuned):
            comparison.measure(row, curves)

    version = versions()
    rows = [comparison.summary(row) for method in dict.fromkeys(methods) for row in rows_of(method, tuned)]
    tests = versus(rows, comparison.by_title, prompts.test)
    untouched = next((entry for entry in rows if entry["method"] == NONE), None)
    held = comparison.choices.untouched()["asr"] if set(methods) & set(BASELINES) else None
    for entry in rows:
        entry["versus"] = tests.get(title(entry))
        entry["note"] = note(entry, untouched, held)

    told = limits_of(chat, prompts.warnings, setup.thinking, comparison.tally())
    published = [
        sentence for method in methods if is_published(method) for sentence in comparison.published(method).notes
    ]
    read = [WITHOUT_THOUGHTS] if setup.thinking.any and set(methods) & set(BASELINES) else []
    return {
        "format": 1,
        "kind": "comparison",
        "llmva": version.pop("llmva"),
        "versions": version,
        "command": command,
        "base": {key: value for key, value in base.items() if key not in ("hashes", "weights")},
        "judge": setup.judge.name,
        "seeds": list(comparison.seeds),
        "settings": comparison.settings,
        "sources": {prompt.source: "benign" if prompt.benign else "toxic" for prompt in prompts.test},
        "prompts": {split: len(members) for split, members in prompts.splits()},
        "rows": rows,
        "best_baseline": next(iter(tests.values()))["baseline"] if tests else None,
        "peak_bytes": peak_bytes(),
        "limits": [*told, *read, *published, *comparison.cells.sentences, *LIMITS],
    }


LIMITS = (
    "The best baseline is the one with the highest F1 on these test prompts, a choice that flatters baselines.",
    "Latency is of methods applied by hooks; an edit written into the weights adds none by construction.",
    "Baselines' blocks are translated from the depth of their papers' models to this one's, and their magnitudes are "
    "those that do best on validation prompts; see docs/baselines.md.",
)
WITHOUT_THOUGHTS = "Baselines are fitted on prompts without thoughts, as their papers' models have none."
