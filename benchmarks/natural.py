"""A chat model that nobody made for us: untouched, the default run, the paper's recipe and baselines, side by side.

    python benchmarks/natural.py MODEL SHARED OUT [--methods default,paper,vectorsteer,alphasteer,scans,cast]
        [--seeds 1] [--per-source 128] [--rows 400] [--max-new-tokens 128] [--foreign 50] [--iterations 30]
        [--tuning 24] [--utility 0] [--judge phrases] [--system TEXT|FILE] [--bundled] [--only] [--restart]

SHARED is a folder with data/: the paper's four sets (S-Eval attack and risk, NQ, ORFuzz), data/transfer/ (XSTest-safe,
OKTest, AdvBench and attacks) and data/utility/ (rows of benchmarks), and with paper.json (published rates).

- Every fit uses the first --rows rows of the four training files, of which validation and test prompts are set aside,
  the same ones for all seeds; --bundled fits on the bundled prompts instead, and --only leaves those out that are read
  beside the files.
- Baselines are fitted on the training prompts of our first round and its labels, without prompts that are read. Their
  magnitudes are chosen as `llmva compare` does, once, on --tuning validation prompts of each source.
- All are measured on the run's test prompts, on the paper's validation files, and on --foreign rows of each transfer
  set, which no fit has seen. What the model's context does not hold is left out, and told.
- --utility N asks N documents of each of --tasks, before and after the edits of the default run and the paper's recipe.

What is done stays in OUT/cells, so the same command goes on after an interruption, and more --methods, --seeds and
--utility may be asked for later. Other settings are refused there. After every cell it writes OUT/natural.md, on what
the last call asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import llmva
from llmva.alignment import RunOptions
from llmva.baselines import BASELINES, make_baseline
from llmva.baselines.base import Steering
from llmva.cli.inputs import quiet_libraries
from llmva.cli.options import system_text
from llmva.errors import LlmvaError, UsageError
from llmva.experiments.cells import Cells, file_name, study_identity
from llmva.experiments.choice import Choices, Fitting
from llmva.experiments.measure import ExperimentSetup
from llmva.files import write_text
from llmva.judges import make_judge
from llmva.judges.base import Label
from llmva.method.observe import observe
from llmva.models.at_rest import at_rest
from llmva.models.chat_model import ChatModel
from llmva.models.fingerprint import fingerprint
from llmva.models.reading.context import context_length
from llmva.progress import Progress
from llmva.prompts.load import read_prompts
from llmva.prompts.prompt_set import draw
from llmva.prompts.types import Prompt
from llmva.runs.record import read_answers
from llmva.settings import make_settings
from llmva.utility import load_tasks, measure_tasks
from natural_page import Study, page, published
from natural_tasks import PREFIX, TASKS, write_tasks

HOME = {True: ("nq", "orfuzzset"), False: ("seval_attack", "seval_risk")}  # benign: names
FOREIGN = {True: ("xstest_safe", "oktest"), False: ("advbench", "attack_aim", "attack_jailbroken", "attack_pair")}
OURS = ("default", "paper")
UNTOUCHED = "untouched"
FIRST_SEED = 42
# options that change what a cell holds; the others may change from one call to the next
FIXED = ("per_source", "rows", "max_new_tokens", "foreign", "iterations", "tuning", "bundled", "only", "system")


class Notes(Progress):
    """Prints what a user must know, and nothing else."""

    def note(self, text: str) -> None:
        print(text, flush=True)


def home_prompts(args: argparse.Namespace) -> llmva.PromptSet:
    if args.bundled:
        return llmva.PromptSet.bundled()
    toxic, benign = (
        [f"{args.shared}/data/{name}_train.csv:input:train[0:{args.rows}]" for name in HOME[side]]
        for side in (False, True)
    )
    return llmva.PromptSet.load(toxic, benign, seed=FIRST_SEED, only=args.only)


def measured_prompts(chat: ChatModel, home: llmva.PromptSet, args: argparse.Namespace) -> dict[str, list[Prompt]]:
    """The prompts of each group, in order, that fit into the model's context; what does not is printed."""
    limit = (context_length(chat.model) or 10**9) - args.max_new_tokens
    groups = {"home": list(home.test)}
    for group, names, file in (("validation", HOME, "{}_val"), ("foreign", FOREIGN, "transfer/{}")):
        toxic, benign = (
            [f"{args.shared}/data/{file.format(name)}.csv:input:train[0:{args.foreign}]" for name in names[side]]
            for side in (False, True)
        )
        prompts = read_prompts(toxic, benign).prompts
        groups[group] = [prompt for prompt in prompts if len(chat.row(prompt.text)) <= limit]
        if left := len(prompts) - len(groups[group]):
            print(f"{left} of {len(prompts)} prompts ({group}) are longer than the model reads and were left out.")
    return groups


class Measurement:
    """The cells of one study, and what they are measured with."""

    def __init__(
        self,
        args: argparse.Namespace,
        chat: ChatModel,
        home: llmva.PromptSet,
        groups: dict[str, list[Prompt]],
        cells: Cells,
    ) -> None:
        self.args, self.chat, self.home, self.cells = args, chat, home, cells
        self.judge = make_judge(args.judge)
        generator = torch.Generator().manual_seed(FIRST_SEED)
        tuning = tuple(draw(home.validation, args.tuning or len(home.validation), generator))
        settings = make_settings(max_new_tokens=args.max_new_tokens)
        self.setup = ExperimentSetup.of(chat, replace(home, validation=tuning), self.judge, settings, (), args.progress)
        self.choices = Choices(self.setup, cells, FIRST_SEED, lambda: self.fitting(FIRST_SEED), settings.min_kept)
        self.study = Study(
            Path(args.model).name,
            {**{name: getattr(args, name) for name in FIXED}, "judge": self.judge.name},
            groups,
            published(args.shared / "paper.json", args.published or Path(args.model).name),
        )
        self.steering = cache(self._fit)  # fits of this process

    # -- fits --------------------------------------------------------------------------------------------------------

    def run_folder(self, method: str, seed: int) -> Path:
        return Path(self.args.out / f"run-{method}-{seed}")

    def aligned(self, method: str, seed: int) -> dict[str, Any]:
        """Facts of a run of ours, the labels of its test prompts, and those of its first training prompts."""

        def align() -> dict[str, Any]:
            args, folder = self.args, self.run_folder(method, seed)
            result = llmva.align(
                self.chat.decoder,
                self.chat.tokenizer,
                self.home,
                judge=self.judge,
                seed=seed,
                out=folder,
                restart=args.restart,
                progress=args.progress,
                options=RunOptions(name=Path(args.model).name),
                recipe=method,
                iterations=args.iterations,
                per_source=args.per_source,
                max_new_tokens=args.max_new_tokens,
                system=args.system,
                endings_tokens=0,
            )
            record, rows = dict(result.record), read_answers(folder, result.record)
            best = record["best_iteration"]
            test = {row["id"]: row for row in rows if row["split"] == "test" and row["iteration"] == best}
            before = {row["id"]: row for row in rows if row["split"] == "test" and row["iteration"] == 0}
            train = {row["id"]: row["label"] for row in rows if row["split"] == "train" and row["iteration"] == 0}
            edited = set(result.edit.chosen.factors)
            places = [s for s, name in enumerate(record["sublayers"]) if name in edited]
            return {
                "fit": {
                    "strength": record.get("best_strength", 1.0) if best else 0.0,
                    "iteration": best,
                    "iterations": len(record["iterations"]) - 1,
                    "passes": [entry.get("passes") for entry in record["iterations"]],
                    "validation F1": [entry["f1"] for entry in record["iterations"]],
                    "kept": record["utility"].get("kept"),
                    "kl": record["utility"].get("kl"),
                    "sublayers": len(places),
                    "tokens": record["cost"]["fit_tokens"],
                    "seconds": record["cost"]["fit_seconds"],
                    "stopped": record["stopped"],
                    "auc": {
                        source: sum(one["auc"][s] for s in places) / len(places)
                        for source, one in record.get("left_out", {}).items()
                        if places
                    },
                },
                **self._of_test(test),
                "untouched": self._of_test(before),
                "train": train,
                "limits": record["limits"],
            }

        return self.cells.get(f"{method}-{seed}-home", align)

    def _of_test(self, rows: dict[str, Any]) -> dict[str, Any]:
        """What a run has of its test prompts, as a cell."""
        return {f"{key}s": [rows[prompt.id][key] for prompt in self.home.test] for key in ("label", "answer")}

    @property
    def ours(self) -> str | None:
        """A method whose runs tell what the untouched model answers."""
        return next((method for method in OURS if method in self.args.methods), None)

    def fitting(self, seed: int) -> Fitting:
        """The training prompts of our first round with this seed, and the untouched model's labels of them."""

        def answered() -> dict[str, Any]:
            generator = torch.Generator().manual_seed(seed * 1_000_003)  # as `align` has it in its first iteration
            seen = self.setup.observe(self.home.draw(self.args.per_source, generator), f"fit prompts, seed {seed}")
            return {"train": {p.id: label.value for p, label in zip(seen.prompts, seen.labels, strict=True)}}

        cell = self.aligned(self.ours, seed) if self.ours else self.cells.get(f"fit-{seed}", answered)
        train = cell["train"]
        by_id = {prompt.id: prompt for prompt in self.home.train}
        return [by_id[one] for one in train], [Label(label) for label in train.values()]

    def _fit(self, method: str, seed: int) -> Steering:
        prompts, labels = self.fitting(seed)
        options = self.choices.paper(method)["options"]
        return make_baseline(method, **options).fit(self.chat, prompts, labels, torch.Generator().manual_seed(seed))

    def edit(self, method: str, seed: int) -> llmva.Edit | None:
        """The edit of a run of ours; None if the untouched model was kept."""
        edit = llmva.Edit.load(self.run_folder(method, seed)).chosen
        return edit if edit.factors else None

    def applied(self, method: str, seed: int) -> AbstractContextManager[Any]:
        if method in OURS:
            edit = self.edit(method, seed)
            return nullcontext() if edit is None else edit.apply(self.chat.model)
        return nullcontext() if method == UNTOUCHED else self.steering(method, seed).applied(self.chat.decoder)

    # -- measurements ------------------------------------------------------------------------------------------------

    def measure(self, method: str, seed: int) -> None:
        """Every group of prompts, in a cell each, and the page after each."""
        study, known = self.study, dict[str, dict[str, Any]]()
        if method == UNTOUCHED and self.ours:  # our run asks it the same prompts
            known["home"] = self.aligned(self.ours, seed)["untouched"]
        if method in OURS:
            known["home"] = self.aligned(method, seed)
            study.fits.setdefault(method, {})[seed] = known["home"]["fit"]
        for group, prompts in study.prompts.items():
            name = method if method == UNTOUCHED else f"{file_name(method, None)}-{seed}"
            cell = known.get(group) or self.cells.get(f"{name}-{group}", partial(self._answers, method, seed, prompts))
            study.cells.setdefault(method, {}).setdefault(seed, {})[group] = cell
            self.write()
        if method in BASELINES:
            choice = self.choices.paper(method)
            held = self.choices.untouched()["asr"]
            answers = choice["answers"] + len(self.fitting(seed)[0])
            study.fits.setdefault(method, {})[seed] = {**choice, "answers": answers, "held": held}
            self.write()

    def _answers(self, method: str, seed: int, prompts: Sequence[Prompt]) -> dict[str, Any]:
        with self.applied(method, seed):
            seen = observe(
                self.chat,
                prompts,
                self.judge,
                max_new_tokens=self.args.max_new_tokens,
                thinking=self.setup.thinking,
                captures=False,
            )
        return {"labels": [label.value for label in seen.labels], "answers": seen.capture.answers}

    def utility(self, method: str, seed: int, task: str) -> None:
        def asked() -> dict[str, Any]:
            tasks = load_tasks(
                [f"{PREFIX}{task}"], include_path=self.args.out / "tasks", limit=self.args.utility, seed=FIRST_SEED
            )
            edit = self.edit(method, seed)
            found = measure_tasks(self.chat.model, self.chat.tokenizer, tasks, edit=edit, seed=FIRST_SEED)
            row = dict(found["utility_tasks"][0])
            known = row["before"] > 0
            same = {
                "after": row["before"],
                "ratio": 1.0 if known else None,
                "interval": [1.0, 1.0] if known else None,
            }
            return row if edit is not None else row | same

        cell = self.cells.get(f"utility-{method}-{seed}-{task}-{self.args.utility}", asked)
        self.study.utility.setdefault(method, {}).setdefault(seed, []).append(cell)
        self.write()

    def write(self) -> None:
        write_text(self.args.out / "natural.md", page(self.study))


def identity(
    args: argparse.Namespace, chat: ChatModel, home: llmva.PromptSet, groups: dict[str, list[Prompt]]
) -> dict[str, Any]:
    """What all cells share. The options come first, so that a refusal names them rather than a hash."""
    texts = json.dumps([[prompt.text for prompt in prompts] for prompts in groups.values()])
    base = fingerprint(chat.decoder, Path(args.model).name)
    return {
        **{f"--{name.replace('_', '-')}": getattr(args, name) for name in FIXED},
        "judge": make_judge(args.judge).name,
        "measured prompts": hashlib.sha256(texts.encode()).hexdigest()[:12],
        **study_identity(chat, base, home, ()),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default="default,paper,vectorsteer,alphasteer,scans,cast")
    parser.add_argument("--seeds", type=int, default=1, help=f"how many, from {FIRST_SEED} on")
    parser.add_argument("--per-source", type=int, default=128)
    parser.add_argument("--rows", type=int, default=400, help="of each training file at most")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--foreign", type=int, default=50, help="rows of each validation file and transfer set at most")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--tuning", type=int, default=24, help="validation prompts a source for magnitudes; 0 is all")
    parser.add_argument("--utility", type=int, default=0, help="documents of each benchmark; 0 asks none")
    parser.add_argument("--tasks", default=",".join(TASKS), help="benchmarks of --utility")
    parser.add_argument("--judge", default="phrases")
    parser.add_argument("--system", default=None, help="system prompt: a text or a file")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--published", help="a model or family of paper.json to show; by default MODEL's family")
    parser.add_argument("--bundled", action="store_true", help="fit on the bundled prompts")
    parser.add_argument("--only", action="store_true", help="leave the bundled prompts out")
    parser.add_argument("--restart", action="store_true", help="discard what OUT holds")
    args = parser.parse_args()
    args.methods, args.tasks = args.methods.split(","), args.tasks.split(",")
    for given, known in ((args.methods, (*OURS, *BASELINES)), (args.tasks, TASKS)):
        if wrong := [one for one in given if one not in known]:
            parser.error(f"there is no '{wrong[0]}': choose among {', '.join(known)}")
    args.progress = Notes()
    return args


def study(args: argparse.Namespace) -> None:
    args.system = None if args.system is None else system_text(args.system)
    home = home_prompts(args)
    model, tokenizer = llmva.load_model(args.model, dtype=args.dtype)
    chat = ChatModel.of(model, tokenizer, system=args.system or None)
    groups = measured_prompts(chat, home, args)
    cells = Cells(args.out, identity(args, chat, home, groups), restart=args.restart)
    with closing(cells), at_rest(chat.model):
        for sentence in cells.notes:
            print(sentence, flush=True)
        if args.utility:
            write_tasks(args.out / "tasks", args.shared / "data/utility")
        measurement = Measurement(args, chat, home, groups, cells)
        measurement.measure(UNTOUCHED, FIRST_SEED)
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
            for method in sorted(args.methods, key=lambda method: method not in OURS):
                try:
                    measurement.measure(method, seed)
                except UsageError:
                    raise
                except LlmvaError as error:  # a baseline that cannot be fitted, as without refusals; the others can
                    if method in OURS:
                        raise
                    measurement.study.failed[f"{method}, seed {seed}"] = str(error)
                    print(f"{method}, seed {seed}: {error}", flush=True)
                print(f"{method}, seed {seed}: done", flush=True)
            for task in args.tasks if args.utility else ():
                for method in (method for method in args.methods if method in OURS):
                    measurement.utility(method, seed, task)
        measurement.write()
    print((args.out / "natural.md").read_text(encoding="utf-8"))


def main() -> None:
    args = arguments()
    quiet_libraries(args.model)
    try:
        study(args)
    except LlmvaError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
