"""The loop of the method: `align` observes, identifies, scores, selects and aligns, iteration by iteration.

docs/method.md explains the steps, docs/architecture.md the loop. The module is not called `align`, because importing it
would then hide the public function `llmva.align`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmva.edit import Edit, check_untouched
from llmva.errors import UsageError
from llmva.evaluation.final import HARMLESS_TEXTS, finish
from llmva.evaluation.skills import PROBE_TOKENS, Probe
from llmva.export.exportable import export_notes
from llmva.judges.base import Judge, Judgement, Label
from llmva.method import rollback
from llmva.method.context import Context, State, VectorHook
from llmva.method.first_token import FirstTokenClassifier
from llmva.method.harden import count_forms, harden, harden_generator
from llmva.method.identify import papers_count
from llmva.method.inner_loop import InnerResult, fit_select_align
from llmva.method.observe import Observation, missing_class
from llmva.method.rollback import Plan
from llmva.metrics.objective import Objective
from llmva.metrics.rates import point_rates
from llmva.models.at_rest import at_rest
from llmva.models.chat_model import ChatModel
from llmva.models.engines.base import Engine
from llmva.models.engines.choose import make_engine
from llmva.models.files.weights import findable
from llmva.models.fingerprint import fingerprint
from llmva.models.generate import answer_prompts
from llmva.models.gradients import check_graph
from llmva.models.reading.context import check_rows, context_length
from llmva.models.sublayers import Decoder
from llmva.models.thinking import Thinking
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.report import before_after_html, write_report
from llmva.report.run.outcome import outcome
from llmva.report.values import counted
from llmva.runs.entries import projection_record, vectors_record
from llmva.runs.environment import versions
from llmva.runs.identity import identity
from llmva.runs.limits import limits_of, notes_on_prompts, prove_model
from llmva.runs.record import is_finished
from llmva.runs.resumed import check_resumed
from llmva.runs.run import Run
from llmva.runs.warm_start import WarmStart, check_regression
from llmva.settings import Settings, check_seed, make_settings


@dataclass(frozen=True, repr=False)
class Result:
    """`edit` is that of the chosen iteration, `every` that of all iterations; `record` is the content of run.json."""

    edit: Edit
    every: Edit
    record: Mapping[str, Any]
    directory: Path | None  # None for a run in memory

    def __repr__(self) -> str:
        return f"Result({outcome(dict(self.record)).sentence} {self.edit!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return before_after_html(dict(self.record))


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that commands and experiments use; other callers of `align` rarely need them."""

    name: str | None = None  # of the model, in the record
    command: str | None = None  # as typed, in the record
    vector_hook: VectorHook | None = None  # changes the vectors of every iteration; run.json does not record it
    warm_start: WarmStart | None = None  # an earlier edit from which the run starts; `llmva.extend` makes it
    thinking: Thinking | None = None  # what `prove` found, where a caller has told the user already
    measure_test: bool = True  # False does not use the test prompts, for a caller that measures them itself
    hardened: bool = False  # the prompts are a run's own, which are in the forms of --harden already


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
    batch_tokens: int | None = None,
    engine: Engine | str = "transformers",
    progress: Progress | None = None,
    options: RunOptions | None = None,
    **settings: Any,
) -> Result:
    """Align `model` without changing its weights; the result's edit can be applied or baked.

    Args:
        model, tokenizer: as `load_model` gives them. A model in training mode is in evaluation mode meanwhile.
        prompts: None takes the bundled set.
        judge: a Judge, or a value of `--judge`.
        seed: of the draws of training prompts and harmless positions, and of bootstrap intervals.
        out: folder of the run and its report; what is in it is resumed, or with `restart` discarded. None: in memory.
        skills: probes measured before and after; they influence nothing.
        batch_tokens: maximum number of tokens in a batch; None chooses by free memory.
        engine: what writes answers: a value of `--engine`, or an Engine.
        settings: fields of `llmva.settings.Settings`.

    Raises:
        UsageError, LlmvaError: one sentence that names the mend; also where the model has an edit or another reader.
    """
    options, chosen = options or RunOptions(), make_settings(**settings)
    chat = ChatModel.of(model, tokenizer, batch_tokens, make_engine(engine, model), chosen.system)
    context = make_context(chat, prompts, judge, seed, chosen, progress, options)
    directory = None if out is None else Path(out)
    with at_rest(chat.model), closing(chat):
        if directory is None or restart or not is_finished(directory):
            context = replace(context, thinking=options.thinking or prove(context))
        with closing(open_run(context, directory, restart, skills, options)) as run:
            if batch_tokens is None:
                chat.batching.tokens = run.record.get("batch_tokens", chat.batching.tokens)  # as an interrupted run had
            while run.stopped is None:
                state = observe_iteration(context, run)  # 1. Observe
                history = [*run.iterations, measure(context, run, state)]
                plan = rollback.decide(context, history, missing_class(state.train))
                state = restore(context, run, state, plan)  # ours; nothing unless the iteration is undone
                update = fit_select_align(context, state, plan)  # 2. Identify  3. Score  4. Select  5. Align
                record_iteration(context, run, state, plan, update)
            return end_run(context, run, skills, options)


def make_context(
    chat: ChatModel,
    prompts: PromptSet | None,
    judge: Judge | str,
    seed: int,
    settings: Settings,
    progress: Progress | None,
    options: RunOptions,
) -> Context:
    """What all iterations share. Raises UsageError for settings that do not fit the model."""
    from llmva.judges import make_judge

    progress = progress or Progress()
    prompts = _readable(chat, prompts or PromptSet.bundled(), progress)
    if settings.harden and not options.hardened:
        start = options.warm_start
        prompts = harden(chat, prompts, settings, harden_generator(check_seed(seed)), start.old if start else ())
        progress.note(prompts.warnings[-1])
    benign = sum(prompt.benign for prompt in prompts.validation)
    return Context(
        chat=chat,
        prompts=prompts,
        judge=make_judge(judge) if isinstance(judge, str) else judge,
        settings=settings,
        objective=Objective.of(settings, benign, len(prompts.validation) - benign),
        sublayer_count=_sublayer_count(chat.decoder, settings),
        seed=check_seed(seed),
        progress=progress,
        vector_hook=options.vector_hook,
    )


def _readable(chat: ChatModel, prompts: PromptSet, progress: Progress) -> PromptSet:
    """The set without prompts to read that are longer than the model's context, as those of toy models may be."""
    limit = context_length(chat.model) if prompts.read else None
    if limit is None:
        return prompts
    read = tuple(prompt for prompt in prompts.read if len(chat.row(prompt.asked)) <= limit)
    if read == prompts.read:
        return prompts
    left = len(prompts.read) - len(read)
    sentence = (
        f"{left} of the {len(prompts.read)} prompts that are only read are longer than the model's context of {limit} "
        "tokens, and were left out."
    )
    progress.note(sentence)
    return replace(prompts, read=read, warnings=(*prompts.warnings, sentence))


def prove(context: Context) -> Thinking:
    """How the model thinks, seen in its first answers; the user is told what is odd about the model."""
    chat, settings = context.chat, context.settings
    texts = [prompt.asked for prompt in context.prompts.train]
    return prove_model(chat, settings.thinking, settings.thinking_tokens, texts, context.progress)


def open_run(
    context: Context, directory: Path | None, restart: bool, skills: Sequence[Probe], options: RunOptions
) -> Run:
    """A new run, or the interrupted one in `directory`.

    What the model cannot read, and a base that no export could write, are refused first.
    """
    check_untouched(context.chat.model)
    check_graph(context.chat.model)
    rows = _check_lengths(context, skills)
    record, start = _describe(context, options), options.warm_start
    notes = export_notes(context.chat.decoder, record["base"])
    record["identity"] = identity(context.chat, record["base"], rows, skills)
    if start is not None:
        record["extends"] = start.as_record()
    first_edit = start.edit if start else None
    run, resumed = Run.open(directory, record, context.prompts, restart=restart, start=first_edit)
    notes += notes_on_prompts(context.chat, [p for _, split in context.prompts.splits() for p in split])
    if start is not None and not resumed:
        run.answers += [dict(row) for row in start.answers]
        notes += start.notes
    for note in notes:
        context.progress.note(note)
        run.record["limits"] += [note] if note not in run.record["limits"] else []
    if resumed:
        context.progress.note(f"going on with the run in {run.directory}, {counted(run.done, 'iteration')} done")
        try:
            for sentence in check_resumed(context, run):
                context.progress.note(sentence)
        except BaseException:
            run.close()
            raise
    return run


def observe_iteration(context: Context, run: Run) -> State:
    """Step 1: the model answers the training prompts drawn for this iteration, and the validation prompts."""
    t = run.done
    draw = context.prompts.draw(context.settings.per_source, context.generator(t))
    with run.edit.apply(context.chat.model, check=False):
        everything = context.observe([*draw, *context.prompts.validation], f"iteration {t}: answering")
    train, validation = everything.part(0, len(draw)), everything.part(len(draw), len(everything.prompts))
    run.log(t, "train", train)
    run.log(t, "validation", validation)
    run.record["cost"]["generated_tokens"] += everything.capture.tokens
    train, validation = train.judged(), validation.judged()  # vectors and rates need a label
    classifier = FirstTokenClassifier.from_record(run.record.get("first_tokens", {})).faded().learn(train)
    texts = run.harmless_texts(context.prompts, "train", HARMLESS_TEXTS)
    agreement = classifier.agreement(validation)
    return State(run.edit, t, train, validation, classifier.learn(validation), agreement, texts)


def measure(context: Context, run: Run, state: State) -> dict[str, Any]:
    """The iteration's entry of run.json: rates on validation prompts, and harm to harmless text of that split."""
    validation = state.validation
    texts = run.harmless_texts(context.prompts, "validation", HARMLESS_TEXTS)
    if run.edit.factors and texts:
        stage = f"iteration {state.iteration}: comparing harmless text"
        harm = context.harm(run.edit, texts, context.progress.stage(stage, len(texts))).as_record()
    else:  # the untouched model is compared with itself, or nothing can be
        harm = {"kept": 1.0, "kl": 0.0, "perplexity": 1.0} if texts else {"kept": None, "kl": None, "perplexity": None}
    return {
        "iteration": state.iteration,
        **point_rates(validation.prompts, validation.labels),
        **harm,
        **check_regression(run.record, validation.prompts, validation.labels),
        "foretold": state.agreement,
    }


def restore(context: Context, run: Run, state: State, plan: Plan) -> State:
    """`state`, or the state of the iteration to which the plan goes back: new captures, labels from the run."""
    if plan.restore_to is None:
        return state
    edit = run.edit.at(plan.restore_to)
    train, validation = (_recall(context, run, plan.restore_to, split) for split in ("train", "validation"))
    classifier = state.classifier
    if plan.relearn:  # shallow answers taught the classifier wrong labels
        classifier = FirstTokenClassifier().learn(train).learn(validation)
    return replace(state, edit=edit, train=train, validation=validation, classifier=classifier)


def record_iteration(context: Context, run: Run, state: State, plan: Plan, update: InnerResult) -> None:
    """Add the iteration to the run and write it to disk."""
    entry, decoder = plan.iterations[-1], context.chat.decoder
    if update.passes is not None:
        entry["passes"], entry["foreseen"] = update.passes, update.predicted
    if update.vectors is not None:  # also of the last iteration: the report shows its angles
        entry |= vectors_record(update.vectors, update.edit, state.iteration + 1, decoder)
        entry["projection"] = projection_record(update.vectors, state.validation, decoder, plan.iterations[:-1])
    if update.left_out is not None and update.auc is not None:
        run.record |= {"left_out": update.left_out.as_record(), "benign_auc": update.auc.tolist()}
        run.record["limits"] += [one for one in update.left_out.warning() if one not in run.record["limits"]]
    run.record |= {
        "iterations": plan.iterations,
        "best_iteration": plan.best,
        "stopped": plan.stop or update.stuck,
        "first_tokens": state.classifier.as_record(),
        "batch_tokens": context.chat.batching.tokens,
    }
    context.progress.iteration(entry, plan.best, context.settings.iterations)
    run.commit(update.edit)


def end_run(context: Context, run: Run, skills: Sequence[Probe], options: RunOptions) -> Result:
    """Measure the chosen iteration on test prompts, unless the caller does that itself."""
    cost = run.record["cost"]
    cost.setdefault("fit_seconds", cost["seconds"])
    cost.setdefault("fit_tokens", cost["generated_tokens"])
    if options.measure_test:
        finish(context, run, skills)
        if run.directory is not None:
            write_report(run.directory)
    chosen = run.edit.at(run.record["best_iteration"]).scaled(run.record.get("best_strength", 1.0))
    return Result(chosen, run.edit, run.record, run.directory)


def _recall(context: Context, run: Run, iteration: int, split: str) -> Observation:
    """The observation of a split in an earlier iteration: its labels from the run, its captures from a new prefill."""
    by_id = {prompt.id: prompt for prompt in getattr(context.prompts, split)}
    rows = [row for row in run.answers if row["iteration"] == iteration and row["split"] == split]
    prompts = [by_id[row["id"]] for row in rows]
    with run.edit.at(iteration).apply(context.chat.model, check=False):
        captured = answer_prompts(context.chat, [prompt.asked for prompt in prompts], max_new_tokens=0)
    judgements = [Judgement(Label(row["label"]), row["confidence"], row["reason"]) for row in rows]
    return Observation(prompts, judgements, captured).judged()


def _check_lengths(context: Context, skills: Sequence[Probe]) -> list[list[int]]:
    """Token ids of all prompts. Refuses prompts and probes that the model cannot read before the run starts."""
    chat, thinking = context.chat, context.thinking
    texts = [prompt.asked for _, split in context.prompts.splits() for prompt in split]
    probes = [probe.prompt for probe in skills]
    rows = chat.rows(texts)
    for asked, read, tokens in (
        (texts, rows, context.settings.max_new_tokens + thinking.room),
        (probes, chat.rows(probes), PROBE_TOKENS),
    ):
        if asked:
            check_rows(chat.model, asked, read, tokens)
    return [*rows, *chat.rows(texts, thinking=True)] if thinking.on else rows


def _sublayer_count(decoder: Decoder, settings: Settings) -> int:
    """How many sublayers the paper's alignment edits: the setting `layers`, otherwise the paper's share."""
    available = len(decoder.sublayers)
    if settings.layers is not None and settings.layers > available:
        raise UsageError(
            f"The model has {available} sublayers, so {settings.layers} cannot be edited: choose --layers 1 to "
            f"{available}."
        )
    return settings.layers or papers_count(available)


def _describe(context: Context, options: RunOptions) -> dict[str, Any]:
    """The part of run.json that is known before the run starts."""
    decoder, prompts = context.chat.decoder, context.prompts
    model, computed_by = decoder.model, versions(context.chat.engine)
    by_split = {split: {source: n[split] for source, n in prompts.counts().items()} for split, _ in prompts.splits()}
    name = findable(options.name or getattr(model.config, "_name_or_path", "") or "unnamed")
    return {
        "llmva": computed_by.pop("llmva"),
        "versions": computed_by,
        "command": options.command,
        "base": {**fingerprint(decoder, name), "dtype": str(model.dtype).removeprefix("torch.")},
        "settings": context.settings.model_dump(),
        "seed": context.seed,
        "prompts": {"counts": by_split, "hashes": prompts.hashes()},
        "judge": context.judge.name,
        "judge_spec": context.judge.spec,
        "sublayers": decoder.names,
        "kinds": [sublayer.kind for sublayer in decoder.sublayers],
        "limits": limits_of(context.chat, prompts.warnings),
        **({"hardened": count_forms(prompts)} if context.settings.harden else {}),
    }
