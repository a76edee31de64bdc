"""From what the user typed to what the API takes."""

from __future__ import annotations

import math
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from llmva.cli.options import Choice, Loading, Sides, Sources
from llmva.edit import Edit
from llmva.edit_file import edit_file
from llmva.errors import UsageError
from llmva.evaluation.skills import Probe, load_probes
from llmva.prompts.load import Reading, read_prompts
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt

if TYPE_CHECKING:
    from llmva.cli.terminal.console import Display
    from llmva.prompts.public.wanted import Wanted

DEMO = "demo"
DEMO_NAME = "llmva's organism"  # the bundled model in a run's record: its place differs by machine
# oneDNN keeps the code of a product for every number of rows, 1,024 of them: hundreds of MB after some answers
KEPT_PRODUCTS = "32"
BESIDE = "llmva"  # a model's folder may bring prompts and probes of its own in this folder


def demo_model() -> Path:
    """The model that ships with the package."""
    return Path(__file__).parent.parent / "organism" / "weights"


def model_place(model: str) -> str:
    """Where MODEL is: "demo" is the bundled one, unless there is a folder of that name."""
    return str(demo_model()) if model == DEMO and not Path(model).exists() else model


def typed_model(place: str) -> str:
    """What to type for the model at a place."""
    return DEMO if place == str(demo_model()) and not Path(DEMO).exists() else place


def model_title(place: str) -> str:
    """What a record calls the model at a place."""
    return DEMO_NAME if place == str(demo_model()) else place


def base_place(title: str, base: str | None) -> str:
    """Where the base of a run is, from what its record calls it (`model_title`), or where the user says."""
    known = str(demo_model()) if title == DEMO_NAME else title
    return known if base is None else model_place(base)


def model_stem(model: str) -> str:
    """What folders are called after MODEL."""
    return Path(model).name.removesuffix(".gguf") or "model"


def show_licences(sources: Sources, display: Display) -> list[Wanted]:
    """The sets of --data. Their licences are shown before the first use, with --quiet too: terms must be seen once.

    Raises UsageError as `parse_data`.
    """
    from llmva.prompts.public.registry import first_use_notice
    from llmva.prompts.public.wanted import parse_data

    wanted = parse_data(sources.data, sources.data_dir)
    for one in wanted:
        notice = first_use_notice(one.entry.name)
        if notice:
            display.line(notice)
    return wanted


def note_engine(engine: str, display: Display) -> None:
    """Tell what a user would wait for in silence."""
    if engine != "transformers":
        display.note(f"{engine.partition(':')[0]} starts with the first prompts, which takes about a minute")


@contextmanager
def load(
    place: str, sources: Sources, judge: str, seed: int, loading: Loading, quiet: bool
) -> Iterator[tuple[Any, Any, PromptSet, Display]]:
    """Model, tokenizer, prompts and the display, which is on until the end of the block.

    Prompts and judge are read before the model, so that a mistake in them costs no loading.
    """
    quiet_libraries(place, *sources.places)
    from llmva.cli.terminal.console import Display
    from llmva.judges import make_judge
    from llmva.models.load import load_model

    make_judge(judge)
    show_licences(sources, Display(quiet))
    prompts = choose_prompts(place, sources, seed)
    with Display(quiet) as display:
        for sentence in (*prompts.notes, *prompts.warnings):
            display.note(sentence)
        display.note(f"loading {model_title(place)}")
        yield *load_model(place, **asdict(loading), note=display.note), prompts, display


def choose_prompts(place: str, sources: Sources, seed: int) -> PromptSet:
    """What the user named, with the bundled set to read, else what lies in the model's folder, else the bundled set."""
    if sources.per_set is not None and not sources.data:
        raise UsageError("--per-set applies to the sets of --data: add --data, or leave it out.")
    if sources.toxic or sources.benign or sources.data:
        return PromptSet.load(
            sources.toxic,
            sources.benign,
            seed=seed,
            data=sources.data,
            per_set=sources.per_set,
            data_dir=sources.data_dir,
            only=sources.only,
        )
    if sources.only:
        raise UsageError("--only leaves the bundled prompts out: name others with --toxic and --benign, or --data.")
    own = Path(place) / BESIDE / "prompts.jsonl"
    return PromptSet.from_jsonl(own) if own.is_file() else PromptSet.bundled()


def choose_probes(model: str, skills: Path | None) -> list[Probe]:
    """The probes that the user named, else those in the model's folder, else none."""
    own = Path(model) / BESIDE / "skills.jsonl"
    if skills is None and own.is_file():
        skills = own
    return [] if skills is None else load_probes(skills)


def test_prompts(model: str, edit: Path | None, sides: Sides, seed: int) -> Reading:
    """Exactly the prompts that the user named, else the test split of the edit's run, else of the model's prompts."""
    if sides.toxic or sides.benign:
        return read_prompts(sides.toxic, sides.benign)
    of_run = run_prompts(edit)
    return Reading((of_run or choose_prompts(model, Sources(), seed)).test)


def run_prompts(edit: Path | None) -> PromptSet | None:
    """The prompts of an edit's run, None where they do not lie beside it."""
    path = edit_file(edit).parent / "prompts.jsonl" if edit is not None else None
    return PromptSet.from_jsonl(path) if path is not None and path.is_file() else None


def thinking_mode(edit: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """`thinking` and `thinking_tokens` as given, else as in the edit's run, else by default."""
    from llmva.settings import make_settings

    of_run = _settings_of_run(edit) or {}
    both = {name: given.get(name) or of_run.get(name) for name in ("thinking", "thinking_tokens")}
    settings = make_settings(**{name: value for name, value in both.items() if value is not None})
    return {"thinking": settings.thinking, "thinking_tokens": settings.thinking_tokens}


def system_prompt(edit: Path | None, given: Mapping[str, Any]) -> tuple[str | None, list[str], list[str]]:
    """The system prompt as given, else as in the edit's run, else None; with notes on it, and limits."""
    from llmva.settings import excerpt, make_settings

    of_run = _settings_of_run(edit)
    fitted = None if of_run is None else make_settings(system=of_run.get("system")).system
    if "system" not in given:
        note = "the system prompt is that of the edit's run, unless --system says otherwise: "
        return fitted, [f"{note}{excerpt(fitted)}"] if fitted else [], []
    system = make_settings(system=given["system"]).system
    if of_run is None or system == fitted:
        return system, [], []
    return system, [], ["Not as in the edit's run: the system prompt. That run's figures need not hold here."]


def _settings_of_run(edit: Path | None) -> dict[str, Any] | None:
    """The settings of an edit's run, None where no run lies beside it."""
    from llmva.runs.record import read_run

    folder = edit_file(edit).parent if edit is not None else None
    return dict(read_run(folder)["settings"]) if folder is not None and (folder / "run.json").is_file() else None


def changes_since_fit(edit: Path | None, model: Any, tokenizer: Any) -> list[str]:
    """Sentences on what of the model, beside its weights, is not as in the edit's run; [] where that is not known."""
    from llmva.runs.identity import notes_on_edit
    from llmva.runs.record import read_run

    folder = edit_file(edit).parent if edit is not None else None
    if folder is None or not (folder / "run.json").is_file():
        return []
    return notes_on_edit(read_run(folder), model, tokenizer)


def fit_prompts(edit: Path | None) -> list[Prompt] | None:
    """What an edit was fitted on and chosen by: the train and validation prompts of its run; None if not known."""
    prompts = run_prompts(edit)
    return None if prompts is None else [*prompts.train, *prompts.validation]


def fitted_under(edit: Path | None, attacks: Sequence[str]) -> list[str]:
    """A sentence, as a list of one, where the fit of an edit has seen prompts under some of these attacks."""
    seen = {prompt.attack.partition(":")[0] for prompt in fit_prompts(edit) or ()}  # of a suffix, the kind alone
    names = [name for name in attacks if name in seen]
    if not names:
        return []
    return [
        f"The fit of the edit has seen prompts under {', '.join(names)}: on these it should hold better than on others."
    ]


def overlap_with_fit(prompts: Sequence[Prompt], edit: Path | None) -> dict[str, Any]:
    """`contamination` and `limits` of a record: how many prompts that the user named were seen in the edit's fit.

    They stay in the metrics, because the user asked for exactly these.
    """
    fit = fit_prompts(edit)
    if fit is None:
        return {}
    from llmva.prompts.contamination import FitIndex

    overlap = FitIndex(fit).overlap(prompts)
    n = len(overlap.positions)
    limit = (
        f"{n} of {len(prompts)} prompts were seen in the fit ({len(overlap.exact)} the same, {len(overlap.near)} "
        "nearly), which flatters the edit."
    )
    return {"contamination": {**overlap.counts(), "of": len(prompts)}, "limits": [limit] if n else []}


def load_edit(path: Path | None, choice: Choice, note: Callable[[str], None] = lambda sentence: None) -> Edit | None:
    """The edit of a run, at the iteration and strength that the run chose unless `choice` says otherwise.

    `note` is told what the user should know of that iteration.
    """
    check_strength(choice.strength)
    if path is None:
        if choice != Choice():
            raise UsageError("--iteration, --strength and --point need an edit: add --edit DIR.")
        return None
    from llmva.runs.record import best_so_far, read_run, unmeasured

    edit, folder = Edit.load(path), edit_file(path).parent
    record = read_run(folder) if (folder / "run.json").is_file() else None
    iteration, strength = choice.iteration, choice.strength
    if choice.point is not None:
        from llmva.metrics.pareto import find_point

        if iteration is not None or strength is not None:
            raise UsageError("--point stands for an iteration and a strength: leave --iteration and --strength out.")
        iteration, strength = find_point(record, choice.point, path)
    if iteration is None and edit.best is None and record is not None and "shipped" not in record:
        iteration, said = best_so_far(record, path)
        note(said)
    if iteration is not None and record is not None and (missing := unmeasured(record, iteration)):
        note(missing)
    if iteration is not None:
        if iteration == 0 and not edit.at(0).factors:  # asked for explicitly, so no mistake: the untouched model
            return edit.at(edit.iterations).scaled(0.0)
        edit = edit.asked(iteration, path)
    if strength is None:
        return edit
    return (edit if edit.best is None else edit.at(edit.best)).scaled(strength)


def check_strength(strength: float | None) -> float | None:
    if strength is not None and not math.isfinite(strength):
        raise UsageError(f"--strength {strength} is not a finite number: give one such as 0.5.")
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
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KEPT_PRODUCTS)  # read at the first product on a CPU
    warnings.filterwarnings("ignore")
    if not all(Path(name.split(":")[0]).expanduser().exists() for name in names):
        _stay_offline_without_network()
    from transformers.utils import logging as transformers_logging

    if sys.flags.optimize > 1:
        _without_docstrings()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("huggingface_hub", "datasets", "httpx", "transformers", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _without_docstrings() -> None:
    """Leave transformers' classes as python -OO makes them: it completes docstrings, and fails where there are none."""
    from transformers import utils

    utils.auto_docstring = lambda target=None, **_: (lambda one: one) if target is None else target  # type: ignore[attr-defined]


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
