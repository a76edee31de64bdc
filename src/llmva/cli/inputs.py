"""From what the user typed to what the API takes."""

from __future__ import annotations

import math
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from llmva.edit import Edit
from llmva.edit_file import edit_file
from llmva.errors import UsageError
from llmva.evaluation.skills import Probe, load_probes
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt
from llmva.utility.tasks import PAPER, ChosenTask, load_tasks

DEMO = "demo"
DEMO_NAME = "llmva's organism"  # the bundled model in a run's record: its place differs by machine
BESIDE = "llmva"  # a model's folder may bring prompts and probes of its own in this folder


def demo_model() -> Path:
    """The model that ships with the package."""
    return Path(__file__).parent.parent / "organism" / "weights"


def model_place(model: str) -> str:
    """Where MODEL lies: "demo" is the bundled one, unless there is a folder of that name."""
    return str(demo_model()) if model == DEMO and not Path(model).exists() else model


def model_title(model: str) -> str:
    """What a record calls MODEL."""
    return DEMO_NAME if model_place(model) == str(demo_model()) else model


def model_stem(model: str) -> str:
    """What folders are called after MODEL."""
    return Path(model).name.removesuffix(".gguf") or "model"


def choose_prompts(
    model: str,
    toxic: Sequence[str],
    benign: Sequence[str],
    seed: int,
    data: Sequence[str] = (),
    per_set: int | None = None,
) -> PromptSet:
    """What the user named, else what lies in the model's folder, else the bundled set."""
    if per_set is not None and not data:
        raise UsageError("--per-set is about the sets of --data: add --data, or leave it out.")
    if toxic or benign or data:
        return PromptSet.load(toxic, benign, seed=seed, data=data, per_set=per_set)
    own = Path(model) / BESIDE / "prompts.jsonl"
    return PromptSet.from_jsonl(own) if own.is_file() else PromptSet.bundled()


def choose_probes(model: str, skills: Path | None) -> list[Probe]:
    """The probes that the user named, else those in the model's folder, else none."""
    own = Path(model) / BESIDE / "skills.jsonl"
    if skills is None and own.is_file():
        skills = own
    return [] if skills is None else load_probes(skills)


def test_prompts(model: str, edit: Path | None, toxic: Sequence[str], benign: Sequence[str], seed: int) -> list[Prompt]:
    """Exactly the prompts that the user named, else the test split of the edit's run, else of the model's prompts."""
    from llmva.prompts.load import load_prompts

    if toxic or benign:
        return list(load_prompts(toxic, benign))
    of_run = run_prompts(edit)
    return list((of_run or choose_prompts(model, (), (), seed)).test)


def run_prompts(edit: Path | None) -> PromptSet | None:
    """The prompts of an edit's run, None where they do not lie beside it."""
    path = edit_file(edit).parent / "prompts.jsonl" if edit is not None else None
    return PromptSet.from_jsonl(path) if path is not None and path.is_file() else None


def thinking_mode(edit: Path | None, mode: str | None, tokens: int | None) -> dict[str, Any]:
    """`thinking` and `thinking_tokens` as the user says, else as the edit's run was made, else off."""
    from llmva.runs.record import read_run
    from llmva.settings import make_settings

    folder = edit_file(edit).parent if edit is not None else None
    of_run = read_run(folder)["settings"] if folder is not None and (folder / "run.json").is_file() else {}
    given = {"thinking": mode or of_run.get("thinking"), "thinking_tokens": tokens or of_run.get("thinking_tokens")}
    chosen = make_settings(**{name: value for name, value in given.items() if value is not None})
    return {"thinking": chosen.thinking, "thinking_tokens": chosen.thinking_tokens}


def fit_prompts(edit: Path | None) -> list[Prompt] | None:
    """What an edit was fitted on and chosen by: the train and validation prompts of its run; None if not known."""
    found = run_prompts(edit)
    return None if found is None else [*found.train, *found.validation]


def seen_in_fit(prompts: Sequence[Prompt], edit: Path | None, named: bool) -> dict[str, Any]:
    """`contamination` and `limits` of a record: how many prompts that the user named the edit's fit has seen.

    They stay in the figures, for the user asked for exactly these.
    """
    fit = fit_prompts(edit) if named else None
    if fit is None:
        return {}
    from llmva.prompts.contamination import FitIndex

    found = FitIndex(fit).overlap(prompts)
    n = len(found.positions)
    said = [
        f"{n} of {len(prompts)} prompts were seen in the fit ({len(found.exact)} the same, {len(found.near)} nearly), "
        "which flatters the edit."
    ]
    return {"contamination": {**found.counts(), "of": len(prompts)}, "limits": said if n else []}


def places(data: Sequence[str]) -> list[str]:
    """The paths in values of --data, and the names of sets that have none."""
    return [term.partition("=")[2] or term for value in data for term in value.split(",")]


def load_edit(
    path: Path | None, iteration: int | None, strength: float | None, point: int | None = None
) -> Edit | None:
    """The edit of a run, at the iteration and strength that the run chose unless told."""
    check_strength(strength)
    if path is None:
        if iteration is not None or strength is not None or point is not None:
            raise UsageError("--iteration, --strength and --point need an edit: add --edit DIR.")
        return None
    edit = Edit.load(path)
    if point is not None:
        from llmva.metrics.pareto import find_point
        from llmva.runs.record import read_run

        if iteration is not None or strength is not None:
            raise UsageError("--point is an iteration and a strength: leave --iteration and --strength out.")
        folder = edit_file(path).parent
        record = read_run(folder) if (folder / "run.json").is_file() else None
        iteration, strength = find_point(record, point, path)
    if iteration is not None:
        if iteration == 0 and not edit.at(0).factors:  # asked for in so many words, so no mistake: the untouched model
            return edit.at(edit.iterations).scaled(0.0)
        edit = edit.asked(iteration, path)
    if strength is None:
        return edit
    return (edit if edit.best is None else edit.at(edit.best)).scaled(strength)


def choose_tasks(utility: Mapping[str, Any] | None, seed: int, progress: Progress) -> list[ChosenTask]:
    """The benchmarks that the user wants, else none; before the model, so that a wrong name costs no loading."""
    if utility is None:
        return []
    names = PAPER if utility["names"] is None else utility["names"]
    progress.note("finding benchmarks")
    return load_tasks(names, include_path=utility["include_path"], limit=utility["limit"], seed=seed)


def check_strength(strength: float | None) -> float | None:
    if strength is not None and not math.isfinite(strength):
        raise UsageError(f"--strength {strength} is no amount of an edit: give a number such as 0.5.")
    return strength


def default_out(model: str) -> Path:
    """`llmva-NAME` in the current folder."""
    return Path(f"llmva-{model_stem(model)}")


def typed_command() -> str:
    """The command as typed, to be repeated by a reader of the report; the program by its name alone."""
    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])  # noqa: PTH119 (a name, not a path)


def quiet_libraries(*names: str) -> None:
    """Keep transformers, datasets and the hub client from writing between our lines.

    `names` are what the user gave: models, data sets, files. Comes before the first import of those libraries.
    """
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    if not all(Path(name.split(":")[0]).expanduser().exists() for name in names):
        _stay_offline_without_network()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("huggingface_hub", "datasets", "httpx", "transformers", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _stay_offline_without_network() -> None:
    """Use what lies in the hub's cache if the hub's name is unknown here; its client would try for half a minute."""
    from huggingface_hub import constants

    if getproxies():  # then the proxy knows the name
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True  # for the module that has been imported already
