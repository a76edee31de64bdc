"""The method: align "will I answer" with "is this benign", sublayer by sublayer, iteration by iteration.

`align` reads like Algorithm 1 of the paper; every step in it is a public function that can be replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmva.edit import Edit
from llmva.errors import UsageError
from llmva.evaluation import final as figures
from llmva.evaluation.final import HARMLESS_TEXTS
from llmva.evaluation.skills import PROBE_TOKENS, Probe
from llmva.judges.base import Judge, Judgement, Label
from llmva.method.context import Context, VectorHook, fit, harmless_outputs
from llmva.method.first_token import FirstTokenClassifier
from llmva.method.identify import Vectors
from llmva.method.inner_loop import TRUST, run_inner_loop
from llmva.method.observe import Observation, missing_class, observe
from llmva.method.selection import papers_count
from llmva.metrics.objective import Objective
from llmva.metrics.rates import point_rates
from llmva.models.batching import first_guess
from llmva.models.chat import encode, render
from llmva.models.fingerprint import fingerprint
from llmva.models.generate import capture, check_rows
from llmva.models.sublayers import Decoder, find_decoder
from llmva.models.thinking import Thinking
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.runs.run import Run, harmless_texts, versions
from llmva.runs.warm_start import WarmStart, check_regression
from llmva.settings import Settings, check_seed, make_settings

SETBACK = 0.05  # an iteration that is worth so much less than the best is undone and tried again with half the step
MOST_SETBACKS = 3
SHALLOW = 0.1  # an iteration that is worth so much less than was foreseen changed how answers begin, not what they say


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
    change: VectorHook | None = None,
    test: bool = True,
    start: WarmStart | None = None,
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
        start: an earlier edit to go on from, which `llmva.extend` makes; None begins with the untouched model.
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
    thinking = Thinking.asked(tokenizer, chosen_settings.thinking, chosen_settings.thinking_tokens)
    _check_lengths(decoder, tokenizer, prompts, skills, chosen_settings)
    record = _describe(decoder, prompts, judge, seed, chosen_settings, count, name, command)
    if start is not None:
        record["extends"] = start.plain()
    folder, first = Path(out) if out is not None else None, start.edit if start else None
    run, resumed = Run.open(folder, record, prompts, restart=restart, start=first)
    if start is not None and not resumed:
        run.answers += [dict(row) for row in start.answers]
    if resumed:
        progress.note(f"going on with the run in {run.directory}, {run.done} iterations done")
    batching = first_guess(model, batch_tokens or run.record.get("batch_tokens"))
    benign = sum(prompt.benign for prompt in prompts.validation)
    objective = Objective.of(chosen_settings, benign, len(prompts.validation) - benign)
    context = Context(
        decoder, tokenizer, prompts, chosen_settings, objective, count, seed, batching, progress, change, thinking
    )
    foreseeing = chosen_settings.passes > 1 and thinking is None  # what a model will think no prefill tells

    while run.record["stopped"] is None:
        t = run.done
        train, validation = _answer(context, run, judge)
        entry: dict[str, Any] = {"iteration": t, **point_rates(validation.prompts, validation.labels)}
        entry |= _measure_harm(context, run) | check_regression(run.record, validation.prompts, validation.labels)
        classifier, entry["foretold"] = _learn(run, train, validation)
        measured = [*run.record["iterations"], entry]
        best, empty = objective.choose(measured), missing_class(train)

        edit, texts = run.edit, harmless_texts(run.answers, prompts, "train", HARMLESS_TEXTS)
        went_too_far = empty or objective.value(measured[best]) - objective.value(entry) > SETBACK
        use_gradients = not any(e.get("shallow") for e in measured)
        if (
            use_gradients and t < chosen_settings.iterations and _shallow(measured, objective)
        ):  # back, to write as in the paper
            entry["shallow"], use_gradients, best = True, False, 0
        elif best < t and went_too_far and foreseeing:  # back, to go on with half the step; the paper never does
            entry["setback"] = True
        if entry.get("shallow") or entry.get("setback"):
            for gone in measured[best + 1 :]:  # what lay between the two goes too
                gone["undone"] = True
            edit, (train, validation) = edit.at(best), _recall(context, run, best)
            empty = missing_class(train)
            if entry.get("shallow"):  # what such answers taught leads astray
                classifier = FirstTokenClassifier().learn(train).learn(validation)
        setbacks = sum(bool(e.get("setback")) for e in measured)
        stopped = stop_reason(measured, chosen_settings, objective) or empty
        if stopped is None:
            progress.stage(f"iteration {t}: fitting")
            trusted = classifier if foreseeing and (entry["foretold"] >= TRUST or entry.get("shallow")) else None
            step = chosen_settings.step / 2**setbacks
            forward = run_inner_loop(context, edit, train, validation, trusted, texts, t + 1, step, use_gradients)
            edit, entry["passes"], entry["foreseen"] = forward.edit, forward.passes, forward.foreseen
            entry |= _seen(forward.vectors, forward.chosen, validation, decoder)
            stopped = forward.stuck
        elif empty is None:  # the last vectors are wanted too: the report shows where the angles ended
            harmless = harmless_outputs(context, edit, texts, t + 1)
            entry |= _seen(fit(context, train, validation, harmless, t + 1), [], validation, decoder)
        run.record |= {
            "iterations": measured,
            "best_iteration": best,
            "stopped": stopped,
            "first_tokens": classifier.plain(),
            "batch_tokens": batching.tokens,
        }
        progress.iteration(entry, best, chosen_settings.iterations)
        run.commit(edit)

    cost = run.record["cost"]
    cost.setdefault("fit_seconds", cost["seconds"])
    cost.setdefault("fit_tokens", cost["generated_tokens"])
    if test:
        figures.finish(
            run,
            decoder,
            tokenizer,
            prompts,
            judge,
            skills,
            batching,
            progress,
            seed,
            chosen_settings,
            objective,
            thinking,
        )
    chosen = run.edit.at(run.record["best_iteration"]).scaled(run.record.get("best_strength", 1.0))
    return Result(chosen, run.edit, run.record, run.directory)


def stop_reason(iterations: Sequence[Mapping[str, Any]], settings: Settings, objective: Objective) -> str | None:
    """Why no further iteration is worth its cost, or None."""
    t, best = len(iterations) - 1, objective.choose(iterations)
    if settings.patience and iterations[best]["f1"] == 1.0 and not objective.violation(iterations[best]):
        return "validation F1 is 1"
    if settings.patience and t - best >= settings.patience:
        return f"validation F1 has not improved for {settings.patience} iterations"
    if t >= settings.iterations:
        return f"all {settings.iterations} iterations are done"
    if sum(bool(entry.get("setback")) for entry in iterations) > MOST_SETBACKS:
        return f"it went too far {MOST_SETBACKS + 1} times"
    return None


def _answer(context: Context, run: Run, judge: Judge) -> tuple[Observation, Observation]:
    """Steps 1 and 2 of an iteration: the training prompts drawn for it, and the validation prompts."""
    t = run.done
    draw = context.prompts.draw(context.settings.per_source, context.generator(t))
    everyone = [*draw, *context.prompts.validation]
    advance_bar = context.progress.stage(f"iteration {t}: answering", len(everyone))
    with run.edit.apply(context.decoder.model, check=False):
        seen = observe(
            context.decoder,
            context.tokenizer,
            everyone,
            judge,
            max_new_tokens=context.settings.max_new_tokens,
            thinking=context.thinking,
            batching=context.batching,
            on_progress=advance_bar,
        )
    train, validation = seen.part(0, len(draw)), seen.part(len(draw), len(everyone))
    run.log(t, "train", train)
    run.log(t, "validation", validation)
    run.record["cost"]["generated_tokens"] += seen.capture.tokens
    return train.judged(), validation.judged()  # of the others nobody knows what they show


def _learn(run: Run, train: Observation, validation: Observation) -> tuple[FirstTokenClassifier, float]:
    """What first tokens foretell, and how much of the validation labels that was before these were learnt."""
    classifier = FirstTokenClassifier.of(run.record.get("first_tokens", {})).faded().learn(train)
    return classifier.learn(validation), classifier.agreement(validation)


def _shallow(iterations: Sequence[Mapping[str, Any]], objective: Objective) -> bool:
    """Whether the last iteration's answers begin as they were foreseen to, and then say something else."""
    foreseen = iterations[-2].get("foreseen") if len(iterations) > 1 else None
    return foreseen is not None and foreseen - objective.value(iterations[-1]) > SHALLOW


def _recall(context: Context, run: Run, iteration: int) -> tuple[Observation, Observation]:
    """An earlier iteration's observations: captured anew, which costs a prefill, with the labels that it had."""
    found = []
    for split in ("train", "validation"):
        by_id = {prompt.id: prompt for prompt in getattr(context.prompts, split)}
        rows = [row for row in run.answers if row["iteration"] == iteration and row["split"] == split]
        texts = [by_id[row["id"]] for row in rows]
        with run.edit.at(iteration).apply(context.decoder.model, check=False):
            seen = capture(
                context.decoder, context.tokenizer, [p.text for p in texts], max_new_tokens=0, batching=context.batching
            )
        judgements = [Judgement(Label(row["label"]), row["confidence"], row["reason"]) for row in rows]
        found.append(Observation(texts, judgements, seen).judged())
    return found[0], found[1]


def _seen(vectors: Vectors, chosen: list[int], validation: Observation, decoder: Decoder) -> dict[str, Any]:
    """What an iteration's entry says of the vectors."""
    return figures.of_vectors(vectors, chosen) | {"projection": figures.projection(vectors, validation, decoder)}


def _measure_harm(context: Context, run: Run) -> dict[str, float | None]:
    """What the edit so far costs on harmless text of the validation split, beside the untouched model."""
    texts = harmless_texts(run.answers, context.prompts, "validation", HARMLESS_TEXTS)
    if not run.edit.factors or not texts:
        return {"kept": 1.0, "kl": 0.0, "perplexity": 1.0} if texts else {"kept": None, "kl": None, "perplexity": None}
    bar = context.progress.stage(f"iteration {run.done}: comparing harmless text", len(texts))
    found = context.harm(run.edit, texts, bar)
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
    return settings.layers or papers_count(most)


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
