"""Run benchmarks on a model in memory, without and with an edit on it, and compute what is left of each score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.models.batching import Batching, first_guess, longest_first
from llmva.progress import Progress
from llmva.utility.quiet import quiet_harness, seeded
from llmva.utility.scores import MACRO_F1, Metric, Preserved, mean_preserved, preserved, score
from llmva.utility.tasks import GLUE, ChosenTask, main_metric

LOGIT_BYTES = 2**30  # of a batch's log-probabilities, which the harness holds at every position
ANSWER_TOKENS = 256  # the harness's own number, where a task does not say how long an answer may be
Sample = Mapping[str, Any]  # what the harness logs of a document


def measure_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[ChosenTask],
    *,
    edit: Edit | None = None,
    chat: bool = False,
    seed: int = 42,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score of every task before and after: `{"utility_tasks": [...], "utility_preserved": {...}}`.

    Args:
        model, tokenizer: as `load_model` gives them; the model is left as it was.
        tasks: as `load_tasks` gives them.
        edit: None measures the model as it is; then there is no "after", ratio or interval.
        chat: put every question into the model's chat template; the harness's default, and so ours, is not to.
        seed: of the examples shown before a question, and of the intervals.

    Raises:
        UsageError: the model has no chat template, or does not read enough tokens for a task.
    """
    import lm_eval

    if chat and not getattr(tokenizer, "chat_template", None):
        raise UsageError("The model has no chat template: leave --utility-chat out.")
    progress = progress or Progress()
    if edit is not None:
        edit.apply(model).remove()  # raises on an edit of another model before the original is measured
    batching = first_guess(model, batch_tokens)
    rows, kept = [], list[Preserved]()
    for task in tasks:
        on_progress = progress.stage(f"{task.name}, original", task.n)
        before = _answers(model, tokenizer, task, chat, seed, batching, on_progress)
        metric = _metric(task, before)
        row = _describe(task, metric)
        if edit is None:
            values = _values(task, metric, before)
            row |= {"n": len(values), "before": score(metric, list(values.values()))}
            rows.append(row)
            continue
        on_progress = progress.stage(f"{task.name}, edited", task.n)
        with edit.apply(model, check=False):
            after = _answers(model, tokenizer, task, chat, seed, batching, on_progress)
        first, second = _values(task, metric, before), _values(task, metric, after)
        both = [place for place in first if place in second]
        if not both:
            raise LlmvaError(f"The task '{task.name}' scored no document with both models: leave it out.")
        result = preserved(metric, [first[p] for p in both], [second[p] for p in both], seed, task.name)
        kept.append(result)
        row |= {"n": len(both), "before": result.before, "after": result.after}
        rows.append({**row, "ratio": result.ratio, "interval": result.interval})
    how = {"lm_eval": lm_eval.__version__, "chat": chat, "seed": seed}
    if edit is None:
        return {"utility_tasks": rows, "utility_preserved": how}
    ratio, interval = mean_preserved(kept)
    known = sum(one.ratio is not None for one in kept)
    return {"utility_tasks": rows, "utility_preserved": {"ratio": ratio, "interval": interval, "tasks": known, **how}}


class _Model:
    """The harness's own wrapper of a model, with batches sized by our memory budget and progress reported.

    It stands in front of the wrapper rather than inheriting from it, since the harness may not be installed.
    """

    def __init__(
        self, wrapped: Any, batching: Batching, on_progress: Callable[[int], None], each: float, name: str
    ) -> None:
        self._wrapped, self._batching, self._advance, self._each, self._name = (
            wrapped,
            batching,
            on_progress,
            each,
            name,
        )
        self._requests, self._reported = 0, 0
        vocabulary = int(wrapped.model.get_output_embeddings().weight.shape[0])
        tokens = min(batching.tokens, max(1, LOGIT_BYTES // (4 * vocabulary)))
        self._scoring = replace(batching, tokens=tokens, row=0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        return self._run("loglikelihood", requests, [self._tokens("".join(r.args)) for r in requests], self._scoring)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        lengths = [min(self._tokens(r.args[0]), self._wrapped.max_length) for r in requests]
        return self._run("loglikelihood_rolling", requests, lengths, self._scoring)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        limit = self._wrapped.max_length
        lengths = []
        for request in requests:
            text, options = request.args
            room = int(options.get("max_gen_toks", ANSWER_TOKENS))
            if room >= limit:
                raise UsageError(
                    f"The task '{self._name}' asks for answers of {room} tokens and the model reads {limit} in all: "
                    "leave the task out."
                )
            lengths.append(min(self._tokens(text), limit - room) + room)
        return self._run("generate_until", requests, lengths, self._batching)

    def _tokens(self, text: str) -> int:
        return len(self._wrapped.tokenizer(text, add_special_tokens=True)["input_ids"])

    def _run(self, kind: str, requests: Sequence[Any], lengths: list[int], batching: Batching) -> list[Any]:
        replies: list[Any] = [None] * len(requests)
        decodes = kind == "generate_until"

        def work(batch: list[int]) -> list[Any]:
            self._wrapped.batch_size_per_gpu = len(batch)
            answers: list[Any] = getattr(self._wrapped, kind)([requests[i] for i in batch], disable_tqdm=True)
            return answers

        for batch, answers in batching.over(longest_first(lengths), lengths.__getitem__, work, decodes=decodes):
            for i, answer in zip(batch, answers, strict=True):
                replies[i] = answer
            self._report(len(batch))
        return replies

    def _report(self, requests: int) -> None:
        """Report progress in documents, each of which makes several requests, one for each choice."""
        self._requests += requests
        done = int(self._requests / self._each)
        self._advance(done - self._reported)
        self._reported = done


def _answers(
    model: Any,
    tokenizer: Any,
    task: ChosenTask,
    chat: bool,
    seed: int,
    batching: Batching,
    on_progress: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """What the harness reports for each part: its scores under "results", its "samples", versions and shots."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    side = tokenizer.padding_side
    for part in task.parts.values():
        part.set_fewshot_seed(seed=seed)  # so that both models are shown the same examples
    try:
        with quiet_harness(), seeded(seed):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, enable_thinking=False if chat else None)
            each = _requests_of(task)
            answers: dict[str, dict[str, Any]] = evaluate(
                lm=_Model(wrapped, batching, on_progress, each, task.name),
                task_dict={"tasks": dict(task.parts)},
                samples={part: list(places) for part, places in task.documents.items()},
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
    finally:
        tokenizer.padding_side = side
    return answers


def _requests_of(task: ChosenTask) -> float:
    """About how many requests a document makes: only the progress bar depends on it."""
    part = next(iter(task.parts.values()))
    if part.get_config("output_type") != "multiple_choice":
        return 1.0
    try:
        return float(len(part.doc_to_choice(part.eval_docs[0])))
    except Exception:  # a task's own code may raise anything; a wrong guess only makes the bar wrong
        return 2.0


def _metric(task: ChosenTask, answers: Mapping[str, Mapping[str, Any]]) -> Metric:
    """F1 for GLUE, as in the paper; else what the task lists first, or reports first if it lists nothing."""
    name, part = next(iter(task.parts.items()))
    if name in GLUE and part.get_config("output_type") == "multiple_choice":
        return Metric(MACRO_F1)
    reported = answers["samples"][name][0]["metrics"]
    listed = main_metric(part)
    chosen = str(listed if listed in reported else reported[0])
    higher = part.higher_is_better().get(chosen)
    aggregate = part.aggregation().get(chosen)
    plain = getattr(aggregate, "__name__", "") == "mean"
    return Metric(chosen, higher is not False, None if plain else aggregate)


def _values(task: ChosenTask, metric: Metric, answers: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, int], Any]:
    """What the metric needs of each document, by part and number."""
    values = {}
    for name, part in task.parts.items():
        samples: Sequence[Sample] = answers["samples"][name]
        wanted = samples[0]["filter"]  # a task may read one answer in several ways; its first is its main one
        for sample in samples:
            if sample["filter"] != wanted:
                continue
            if metric.name == MACRO_F1:
                values[name, sample["doc_id"]] = _choices(part, sample)
            elif metric.name in sample:
                values[name, sample["doc_id"]] = sample[metric.name]
    return values


def _choices(part: Any, sample: Sample) -> tuple[int, int]:
    """The right choice and the most likely one."""
    target = sample["target"]
    right = target if isinstance(target, int) else part.doc_to_choice(sample["doc"]).index(target)
    likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"]]
    return int(right), likelihoods.index(max(likelihoods))


def _describe(task: ChosenTask, metric: Metric) -> dict[str, Any]:
    """What a reader needs to repeat the line: the metric, the documents, the examples shown, the task's version."""
    part = next(iter(task.parts.values()))
    return {
        "name": task.name,
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "documents": task.total,
        "parts": len(task.parts),
        "shots": part.get_config("num_fewshot"),
        "version": str(part.VERSION),
    }
