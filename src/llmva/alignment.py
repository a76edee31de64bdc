"""The method: align "will I answer" with "is this benign", sublayer by sublayer, iteration by iteration.

`align` reads like Algorithm 1 of the paper; every step in it is a public function that can be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva import figures
from llmva.edit import Edit
from llmva.errors import UsageError
from llmva.judges.base import Judge
from llmva.metrics import quick
from llmva.models.batching import Batching, first_guess
from llmva.models.chat import encode, render
from llmva.models.fingerprint import fingerprint
from llmva.models.generate import capture, check_rows
from llmva.models.harmless import agreement, outputs_on_text, random_messages
from llmva.models.sublayers import Decoder, find_decoder
from llmva.observation import Observation, observe
from llmva.progress import Progress
from llmva.prompts.types import PromptSet
from llmva.run import Run, harmless_texts, versions
from llmva.selection import default_count, select
from llmva.settings import Settings, check_seed, make_settings
from llmva.skills import PROBE_TOKENS, Probe
from llmva.steps import Vectors, align_sublayers, identify

HARMLESS_TEXTS = 64  # per use: for the quiet readers, for the choice of the iteration, for the report
HARMLESS_POSITIONS = 512  # of those texts, for the quiet readers
RANDOM_MESSAGES = 256  # likewise
Change = Callable[[Vectors, Observation, int], Vectors]  # of the vectors, the training prompts and the iteration


@dataclass(frozen=True)
class Result:
    """`edit` is the chosen iteration's, `every` holds all of them; `record` is what run.json holds."""

    edit: Edit
    every: Edit
    record: Mapping[str, Any]
    directory: Path | None  # None for a run in memory


def align(
    model: Any,
    tokenizer: Any,
    prompts: PromptSet | None = None,
    *,
    judge: Judge | str = "phrases",
    seed: int = 42,
    out: str | Path | None = None,
    restart: bool = False,
    skills: Sequence[Probe] = (),
    name: str | None = None,
    command: str | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    change: Change | None = None,
    test: bool = True,
    **settings: Any,
) -> Result:
    """Align `model`, which is left as it was; the result's edit can be applied or baked.

    Args:
        model, tokenizer: as `load_model` gives them.
        prompts: None takes the bundled set.
        judge: a Judge, or the name of one.
        seed: draws of training prompts and of harmless positions, and bootstrap intervals.
        out: folder of the run; one killed there goes on where it was. None keeps everything in memory.
        skills: probes measured before and after; the run never looks at them otherwise.
        change: replaces every iteration's vectors, for ablations. Such a run is not told from another on disk.
        test: False leaves the test prompts alone, for a caller that measures them itself.
        settings: fields of `llmva.settings.Settings`.

    Raises:
        UsageError, LlmvaError: one sentence that names the mend.
    """
    from llmva.judges import make_judge

    judge = make_judge(judge) if isinstance(judge, str) else judge
    prompts = prompts or PromptSet.bundled()
    progress = progress or Progress()
    check_seed(seed)
    chosen_settings = make_settings(**settings)
    decoder = find_decoder(model)
    count = _layer_count(decoder, chosen_settings)
    _check_lengths(decoder, tokenizer, prompts, skills, chosen_settings)
    record = _describe(decoder, prompts, judge, seed, chosen_settings, count, name, command)
    run, resumed = Run.open(Path(out) if out is not None else None, record, prompts, restart=restart)
    if resumed:
        progress.note(f"going on with the run in {run.directory}, {run.done} iterations done")
    batching = first_guess(model, batch_tokens or run.record.get("batch_tokens"))

    while run.record["stopped"] is None:
        t = run.done
        draw = prompts.draw(chosen_settings.per_source, _generator(seed, t))
        everyone = [*draw, *prompts.validation]
        advance = progress.stage(f"iteration {t}: answering", len(everyone))
        with run.edit.apply(model, check=False):
            seen = observe(
                decoder,
                tokenizer,
                everyone,
                judge,
                max_new_tokens=chosen_settings.max_new_tokens,
                batching=batching,
                advance=advance,
            )
        train, validation = seen.part(0, len(draw)), seen.part(len(draw), len(everyone))
        run.log(t, "train", train)
        run.log(t, "validation", validation)
        train, validation = train.judged(), validation.judged()  # of the others nobody knows what they show
        run.record["cost"]["generated_tokens"] += seen.capture.tokens
        entry: dict[str, Any] = {"iteration": t, **quick(validation.prompts, validation.labels)}
        entry |= _measure_harm(run, decoder, tokenizer, prompts, batching, progress)

        measured = [*run.record["iterations"], entry]
        best, empty = choose(measured, chosen_settings.min_kept), figures.emptied(train)
        stopped = empty or stop_reason(measured, chosen_settings)

        edit = run.edit
        if empty is None:  # the last iteration's vectors are wanted too: the report shows where the angles ended
            progress.stage(f"iteration {t}: fitting")
            vectors = _fit(run, decoder, tokenizer, prompts, train, validation, chosen_settings, seed, batching)
            vectors = change(vectors, train, t) if change else vectors
            chosen = [] if stopped else select(vectors.scores, count)
            edit = align_sublayers(edit, decoder.sublayers, vectors, chosen, t + 1, chosen_settings.step)
            entry |= figures.of_vectors(vectors, chosen) | {
                "projection": figures.projection(vectors, validation, decoder)
            }
        run.record |= {
            "iterations": measured,
            "best_iteration": best,
            "stopped": stopped,
            "batch_tokens": batching.tokens,
        }
        progress.iteration(entry, best, chosen_settings.iterations)
        run.commit(edit)

    run.record["cost"].setdefault("fit_seconds", run.record["cost"]["seconds"])
    if test:
        figures.finish(run, decoder, tokenizer, prompts, judge, skills, batching, progress, seed, chosen_settings)
    return Result(run.edit.at(run.record["best_iteration"]), run.edit, run.record, run.directory)


def choose(iterations: Sequence[Mapping[str, Any]], min_kept: float) -> int:
    """The iteration with the best validation F1 among those that keep harmless text; the earliest of equals."""
    kept = [e for e in iterations if e.get("kept") is None or e["kept"] >= min_kept or e["iteration"] == 0]
    return int(max(kept, key=lambda e: (e["f1"] or 0.0, -e["iteration"]))["iteration"])


def stop_reason(iterations: Sequence[Mapping[str, Any]], settings: Settings) -> str | None:
    """Why no further iteration is worth its cost, or None."""
    t, best = len(iterations) - 1, choose(iterations, settings.min_kept)
    if iterations[best]["f1"] == 1.0:
        return "validation F1 is 1"
    if t - best >= settings.patience:
        return f"validation F1 has not improved for {settings.patience} iterations"
    if t >= settings.iterations:
        return f"all {settings.iterations} iterations are done"
    return None


def _fit(
    run: Run,
    decoder: Decoder,
    tokenizer: Any,
    prompts: PromptSet,
    train: Observation,
    validation: Observation,
    settings: Settings,
    seed: int,
    batching: Batching,
) -> Vectors:
    """Both vectors of every sublayer, with readers that are quiet on harmless text."""
    harmless: Tensor | None = None
    if settings.quiet > 0 and settings.svm == "exact":
        generator = _generator(seed, run.done)
        messages = random_messages(tokenizer, RANDOM_MESSAGES, generator)
        texts = harmless_texts(run.answers, prompts, "train", HARMLESS_TEXTS)
        with run.edit.apply(decoder.model, check=False):
            harmless = capture(decoder, tokenizer, messages, max_new_tokens=0, batching=batching).outputs
            if texts:
                said = outputs_on_text(decoder, tokenizer, texts, HARMLESS_POSITIONS, generator, batching)
                harmless = torch.cat([harmless, said], 1)
    return identify(
        train, validation, harmless=harmless, quiet=settings.quiet, svm=settings.svm, C=settings.C, seed=seed
    )


def _measure_harm(
    run: Run, decoder: Decoder, tokenizer: Any, prompts: PromptSet, batching: Batching, progress: Progress
) -> dict[str, float | None]:
    """What the edit so far costs on harmless text of the validation split."""
    texts = harmless_texts(run.answers, prompts, "validation", HARMLESS_TEXTS)
    if run.done == 0 or not texts:
        return {"kept": 1.0, "kl": 0.0, "perplexity": 1.0} if texts else {"kept": None, "kl": None, "perplexity": None}
    advance = progress.stage(f"iteration {run.done}: comparing harmless text", len(texts))
    found = agreement(decoder, tokenizer, texts, lambda: run.edit.apply(decoder.model, check=False), batching, advance)
    return {"kept": found.mean_kept, "kl": found.mean_kl, "perplexity": found.perplexity_ratio}


def _check_lengths(
    decoder: Decoder, tokenizer: Any, prompts: PromptSet, skills: Sequence[Probe], settings: Settings
) -> None:
    """Refuse what the model cannot read before the run rather than at its end."""
    texts = [prompt.text for _, split in prompts.splits() for prompt in split]
    for asked, tokens in ((texts, settings.max_new_tokens), ([p.prompt for p in skills], PROBE_TOKENS)):
        if asked:
            check_rows(decoder.model, asked, [encode(tokenizer, render(tokenizer, text)) for text in asked], tokens)


def _layer_count(decoder: Decoder, settings: Settings) -> int:
    most = len(decoder.sublayers)
    if settings.layers is not None and settings.layers > most:
        raise UsageError(
            f"The model has {most} sublayers, so {settings.layers} cannot be edited: choose --layers 1 to {most}."
        )
    return settings.layers or default_count(most)


def _describe(
    decoder: Decoder,
    prompts: PromptSet,
    judge: Judge,
    seed: int,
    settings: Settings,
    count: int,
    name: str | None,
    command: str | None,
) -> dict[str, Any]:
    """The part of run.json that is known before the run."""
    model = decoder.model
    found = versions()
    by_split = {split: {source: n[split] for source, n in prompts.counts().items()} for split, _ in prompts.splits()}
    return {
        "llmva": found.pop("llmva"),
        "versions": found,
        "command": command,
        "base": {
            **fingerprint(decoder, name or getattr(model.config, "_name_or_path", "") or "unnamed"),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "settings": {**settings.model_dump(), "layers": count},
        "seed": seed,
        "prompts": {"counts": by_split, "hashes": prompts.hashes()},
        "judge": judge.name,
        "sublayers": decoder.names,
        "kinds": [sublayer.kind for sublayer in decoder.sublayers],
    }


def _generator(seed: int, iteration: int) -> torch.Generator:
    """Draws depend on seed and iteration alone, so a resumed run makes the same ones."""
    return torch.Generator().manual_seed(seed * 1_000_003 + iteration)
