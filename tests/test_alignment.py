"""The loop: when it stops, what it keeps, and that the same run gives the same result."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llmva
from conftest import chat_model, taught_model, taught_requests, tiny_tokenizer
from llmva.alignment import RunOptions, make_context
from llmva.evaluation.final import finish
from llmva.evaluation.sampled import EvaluationSettings
from llmva.method.first_token import FirstTokenClassifier, predict_labels
from llmva.method.rollback import stop_reason
from llmva.metrics.objective import Objective
from llmva.metrics.rates import point_rates
from llmva.models.batching import Batching
from llmva.progress import Progress
from llmva.prompts.types import Prompt
from llmva.settings import make_settings

FAST = {"per_source": 40, "max_new_tokens": 8}
FASTER = {"per_source": 24, "passes": 2, "seed": 1}  # where it does not matter how good the run is


class Stub(llmva.Judge):
    """Labels by a rule given; says that no answer is ever settled."""

    name = "stub"

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.asked = 0

    def answered(self, prompt: Prompt, answer: str) -> llmva.Judgement:
        self.asked += 1
        found = self.rule(prompt.text, answer)
        label = found if isinstance(found, llmva.Label) else llmva.Label.ANSWERED if found else llmva.Label.REFUSED
        return llmva.Judgement(label, 1.0, "rule")


def by_words(prompt: str, answer: str) -> bool:
    return "here is" in answer


def by_chance(prompt: str, answer: str) -> bool:
    """A label that no edit can improve."""
    return zlib.crc32(prompt.encode()) % 2 == 0


@pytest.fixture(scope="module")
def prompts() -> llmva.PromptSet:
    rows = taught_requests()
    return llmva.PromptSet.from_lists(*([text for text, benign, _ in rows if benign == side] for side in (False, True)))


@pytest.fixture(scope="module")
def taught() -> Any:
    return taught_model()


def align(model: Any, tokenizer: Any, prompts: llmva.PromptSet, **options: Any) -> llmva.Result:
    return llmva.align(model, tokenizer, prompts, **{"judge": Stub(by_words), **FAST, **options})


@pytest.fixture(scope="module")
def memory(taught: Any, prompts: llmva.PromptSet) -> llmva.Result:
    """A run that several tests look at."""
    return align(taught, tiny_tokenizer(), prompts, iterations=3)


@pytest.fixture(scope="module")
def disk(taught: Any, prompts: llmva.PromptSet, tmp_path_factory: pytest.TempPathFactory) -> llmva.Result:
    """The same again, in a folder; do not write into it."""
    return align(taught, tiny_tokenizer(), prompts, iterations=3, out=tmp_path_factory.mktemp("disk") / "run")


# -- when it stops


def test_it_stops_when_nothing_improves(taught: Any, tokenizer: Any, prompts: llmva.PromptSet) -> None:
    result = align(taught, tokenizer, prompts, judge=Stub(by_chance), patience=2)
    assert result.record["stopped"] == "validation F1 has not improved for 2 iterations"
    assert len(result.record["iterations"]) == 3
    assert result.record["best_iteration"] == 0


@pytest.mark.parametrize("most", [0, 1, 3])
def test_it_stops_after_the_iterations_asked_for(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet, most: int
) -> None:
    result = align(taught, tokenizer, prompts, judge=Stub(by_chance), iterations=most, patience=9)
    assert result.record["stopped"] == f"all {most} iterations are done"
    assert len(result.record["iterations"]) == most + 1  # the untouched model is iteration 0


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (llmva.Label.ANSWERED, "every training prompt was answered"),
        (llmva.Label.REFUSED, "no training prompt was answered"),
        (llmva.Label.GARBLED, "no training prompt was answered"),
    ],
)
def test_it_stops_when_a_class_is_empty(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet, label: llmva.Label, reason: str
) -> None:
    result = align(taught, tokenizer, prompts, judge=Stub(lambda prompt, answer: label))
    assert result.record["stopped"].startswith(reason)
    assert len(result.record["iterations"]) == 1
    assert not result.edit.factors
    garbled = result.record["test"]["after"]["garbled"]
    assert garbled == (label is llmva.Label.GARBLED)


def test_it_stops_when_a_class_empties_later(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llmva.method.first_token.FirstTokenClassifier.agreement", lambda self, seen: 0.0
    )  # else it foresees as much
    seen: dict[str, int] = {}

    def tires(prompt: str, answer: str) -> bool:
        seen[prompt] = seen.get(prompt, 0) + 1
        return seen[prompt] == 1 and by_chance(prompt, answer)

    train = llmva.PromptSet(prompts.train, prompts.validation, prompts.test)
    result = align(taught, tokenizer, train, judge=Stub(tires), per_source=200, patience=9)
    # each time it goes back to the untouched model and tries half the step
    assert result.record["stopped"] == "it went too far 4 times"
    assert [entry.get("undone") for entry in result.record["iterations"]] == [None, True, True, True, True]
    assert result.record["best_iteration"] == 0
    assert not result.every.factors


def test_one_alignment_at_a_time_is_the_papers_loop(taught: Any, tokenizer: Any, prompts: llmva.PromptSet) -> None:
    """It never goes back: what each iteration did stays in the edit, also after it went too far."""
    seen: dict[str, int] = {}

    def wavers(prompt: str, answer: str) -> bool:
        """Well at first, and the other way round afterwards."""
        seen[prompt] = seen.get(prompt, 0) + 1
        right = ("paint build clean fix".find(prompt.split()[-3]) >= 0) != (zlib.crc32(prompt.encode()) % 8 == 0)
        return right == (seen[prompt] == 1)

    options = {"per_source": 200, "iterations": 3, "patience": 9, "options": RunOptions(measure_test=False)}
    entries = align(taught, tokenizer, prompts, judge=Stub(wavers), passes=1, **options)
    assert entries.record["iterations"][1]["f1"] < entries.record["iterations"][0]["f1"] - 0.3
    assert [(e.get("undone"), e.get("passes")) for e in entries.record["iterations"]] == [(None, 1)] * 3 + [
        (None, None)
    ]
    assert entries.every.held == [1, 2, 3]
    seen.clear()
    entries = align(taught, tokenizer, prompts, judge=Stub(wavers), **options)
    assert [e.get("undone") for e in entries.record["iterations"]] == [None, True, True, True]
    assert entries.every.held == []


def test_what_lies_between_the_best_and_a_setback_goes_too(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet, tmp_path: Path
) -> None:
    """A slightly worse iteration is gone on from; when the next is far worse the columns of both are dropped."""
    from llmva.metrics.pareto import find_front

    entries: list[dict[str, Any]] = []

    def figures(prompts: Any, labels: Any) -> dict[str, Any]:
        t = len(entries) % 4
        f1 = [0.5, 0.8, 0.77, 0.6][t]
        entries.append({})
        return {"f1": f1, "asr": 1 - f1, "orr": 0.0, "garbled": 0.0, "unjudged": 0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmva.alignment.point_rates", figures)
        result = align(taught, tokenizer, prompts, iterations=3, patience=9, judge=Stub(by_chance), out=tmp_path)
    measured = result.record["iterations"]
    assert [e.get("undone") for e in measured] == [None, None, True, True]
    assert [e.get("setback") for e in measured] == [None, None, None, True]
    assert result.every.held == [1]
    assert {row["iteration"] for row in find_front(result.record)} == {0, 1}
    with pytest.raises(llmva.UsageError, match="holds iterations 0 to 1"):
        llmva.Edit.load(tmp_path).asked(2, tmp_path)


def test_it_stops_when_it_is_perfect(taught: Any, tokenizer: Any, prompts: llmva.PromptSet) -> None:
    texts = {prompt.text: prompt.benign for _, found in prompts.splits() for prompt in found}
    result = align(taught, tokenizer, prompts, judge=Stub(lambda prompt, answer: texts[prompt]))
    assert result.record["stopped"] == "validation F1 is 1"
    assert result.record["best_iteration"] == 0


# -- what it keeps


def objective(**settings: Any) -> Objective:
    return Objective.of(make_settings(**settings), 50, 50)


def entry(iteration: int, f1: float | None, kept: float | None = 1.0) -> dict[str, Any]:
    return {"iteration": iteration, "f1": f1, "asr": 0.5, "orr": 0.5, "kept": kept}


@pytest.mark.parametrize(
    ("entries", "best"),
    [
        ([entry(0, 0.5)], 0),
        ([entry(0, 0.5), entry(1, 0.7)], 1),
        ([entry(0, 0.5), entry(1, 0.4)], 0),  # the untouched model is a candidate
        ([entry(0, 0.5), entry(1, 0.9, 0.89), entry(2, 0.6, 0.9)], 2),  # below the floor it does not count
        ([entry(0, 0.5, None), entry(1, 0.7, None)], 1),  # no harmless text to measure on
        ([entry(0, None), entry(1, 0.0)], 0),
        ([entry(0, None), entry(1, 0.1)], 1),
    ],
)
def test_choose(entries: list[dict[str, Any]], best: int) -> None:
    assert objective(min_kept=0.9).choose(entries) == best


@pytest.mark.parametrize(
    ("f1", "reason"),
    [
        ([0.5, 0.6], None),
        ([0.5, 0.4, 0.4], "validation F1 has not improved for 2 iterations"),
        ([0.5, 0.6, 0.6], None),
        ([0.5, 0.6, 0.6, 0.6], "validation F1 has not improved for 2 iterations"),
        ([0.5, 0.6, 0.7, 0.8], None),
        ([0.5, 0.6, 0.7, 0.8, 0.9], "all 4 iterations are done"),
        ([0.5, 1.0], "validation F1 is 1"),
        ([1.0], "validation F1 is 1"),
    ],
)
def test_stop_reason(f1: list[float], reason: str | None) -> None:
    entries = [entry(t, value) for t, value in enumerate(f1)]
    assert stop_reason(entries, make_settings(patience=2, iterations=4), objective()) == reason


def test_a_collapsed_iteration_does_not_stop_the_run_as_perfect() -> None:
    entries = [entry(0, 0.5), entry(1, 1.0, 0.2)]
    assert stop_reason(entries, make_settings(patience=2, iterations=4), objective()) is None


def test_the_untouched_model_is_kept_if_nothing_is_better(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet, tmp_path: Path
) -> None:
    result = align(taught, tokenizer, prompts, judge=Stub(by_chance), iterations=2, out=tmp_path / "run")
    record = result.record
    assert record["best_iteration"] == 0
    assert any("the untouched model, which was kept" in limit for limit in record["limits"])
    assert record["test"]["after"] == record["test"]["before"]
    assert "strengths" not in record
    assert (record["utility"]["kept"], record["utility"]["kl"]) == (1, 0)
    assert not result.edit.factors
    stored = llmva.Edit.load(tmp_path / "run")
    assert stored.best == 0
    assert not stored.chosen.factors


def test_the_floor_holds(taught: Any, tokenizer: Any, prompts: llmva.PromptSet) -> None:
    for floor in (0.0, 1.0):
        record = align(taught, tokenizer, prompts, iterations=3, passes=1, min_kept=floor).record
        assert record["iterations"][0]["kept"] == 1
        assert all(0 <= e["kept"] <= 1 and e["kl"] >= 0 for e in record["iterations"])
        assert record["iterations"][record["best_iteration"]]["kept"] >= floor


# -- the model


def test_the_model_is_left_as_it_was(tokenizer: Any, prompts: llmva.PromptSet) -> None:
    model = taught_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    align(model, tokenizer, prompts, iterations=2, **FASTER)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not model.training


def test_the_model_is_left_as_it_was_by_a_failure(tokenizer: Any, prompts: llmva.PromptSet) -> None:
    model = taught_model(steps=1)
    calls = 0

    def fails(prompt: str, answer: str) -> bool:
        nonlocal calls
        calls += 1
        if calls > 200:
            raise RuntimeError("judge")
        return by_chance(prompt, answer)

    with pytest.raises(RuntimeError, match="judge"):
        align(model, tokenizer, prompts, judge=Stub(fails))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- the same again


def same_edit(one: llmva.Edit, other: llmva.Edit) -> bool:
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(a, b)
        for name in one.factors
        for a, b in zip(vars(one.factors[name]).values(), vars(other.factors[name]).values(), strict=True)
    )


def test_the_seed_decides(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet, memory: llmva.Result, disk: llmva.Result
) -> None:
    one, two, other = memory, disk, align(taught, tokenizer, prompts, iterations=3, seed=2)
    assert one.edit.factors
    assert same_edit(one.edit, two.edit)
    assert one.record["iterations"] == two.record["iterations"]
    assert one.record["test"] == two.record["test"]
    assert not same_edit(one.edit, other.edit)


def test_in_memory_as_on_disk(memory: llmva.Result, disk: llmva.Result) -> None:
    assert memory.directory is None
    assert disk.directory is not None
    assert disk.directory.name == "run"
    assert same_edit(memory.edit, disk.edit)
    stored = llmva.Edit.load(disk.directory)
    assert stored.best == disk.record["best_iteration"]
    assert same_edit(stored.chosen, memory.edit)
    assert json.loads((disk.directory / "run.json").read_text()) == disk.record
    ignored = ("cost", "answers_bytes")
    assert {k: v for k, v in memory.record.items() if k not in ignored} == {
        k: v for k, v in disk.record.items() if k not in ignored
    }


def test_the_edit_gives_the_figures_of_its_iteration(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet, memory: llmva.Result
) -> None:
    judge, result = Stub(by_words), memory
    best = result.record["iterations"][result.record["best_iteration"]]
    assert best["iteration"] > 0

    def figures() -> dict[str, Any]:
        from llmva.evaluation.evaluate import evaluate

        found: dict[str, Any] = evaluate(
            chat_model(taught, tokenizer), prompts.validation, judge, EvaluationSettings(max_new_tokens=8)
        )["test"]
        return {name: found["before"][name] for name in ("f1", "asr", "orr", "garbled")}

    with result.edit.apply(taught):
        assert figures() == {name: best[name] for name in ("f1", "asr", "orr", "garbled")}
    first = result.record["iterations"][0]
    assert figures() == {name: first[name] for name in ("f1", "asr", "orr", "garbled")}
    assert best["f1"] > first["f1"]


def test_strengths_give_the_figures_of_the_scaled_edit(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet, disk: llmva.Result
) -> None:
    result = disk
    rows = {row["strength"]: row for row in result.record["strengths"]}
    assert list(rows) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    names = ("f1", "asr", "orr", "garbled")
    for strength, iteration in ((0.0, 0), (1.0, result.record["best_iteration"])):
        known = result.record["iterations"][iteration]
        assert {name: rows[strength][name] for name in names} == {name: known[name] for name in names}
    classifier = FirstTokenClassifier.from_record(result.record["first_tokens"])
    for strength in (0.25, 1.25):
        with result.edit.scaled(strength).apply(taught):
            seen = predict_labels(chat_model(taught, tokenizer), prompts.validation, classifier)
        rates = point_rates(seen.prompts, seen.labels)
        assert {name: rows[strength][name] for name in names} == {name: rates[name] for name in names}
        assert rows[strength]["predicted"] is True
    assert len({row["f1"] for row in rows.values()}) > 1
    assert disk.directory is not None
    splits = [json.loads(line) for line in (disk.directory / "answers.jsonl").read_text().splitlines()]
    measured = len(result.record["iterations"]) * len(prompts.validation)
    assert sum(row["split"] == "validation" for row in splits) == measured  # no answers of other strengths


def test_strengths_go_on_where_they_were(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet, disk: llmva.Result, tmp_path: Path
) -> None:
    class Dies(Progress):
        def stage(self, text: str, total: int = 0, unit: str = "prompts") -> Any:
            if text == "strength 0.75":
                raise KeyboardInterrupt
            return super().stage(text, total)

    with pytest.raises(KeyboardInterrupt):
        align(taught, tokenizer, prompts, iterations=3, out=tmp_path / "run", progress=Dies())
    kept = json.loads((tmp_path / "run/run.json").read_text())["strengths"]
    assert kept == disk.record["strengths"][:3]
    told: list[str] = []

    class Listens(Progress):
        def stage(self, text: str, total: int = 0, unit: str = "prompts") -> Any:
            told.append(text)
            return super().stage(text, total)

    again = align(taught, tokenizer, prompts, iterations=3, out=tmp_path / "run", progress=Listens())
    assert [text for text in told if text.startswith("strength")] == ["strength 0.75", "strength 1.25"]
    assert again.record["strengths"] == disk.record["strengths"]
    assert again.record["cost"]["generated_tokens"] == disk.record["cost"]["generated_tokens"]


def test_the_size_of_batches_does_not_decide(taught: Any, tokenizer: Any, prompts: llmva.PromptSet) -> None:
    sizes: list[int] = []
    original, unmeasured = Batching.over, RunOptions(measure_test=False)

    def over(self: Batching, *arguments: Any) -> Any:
        for batch, result in original(self, *arguments):
            sizes.append(len(batch))
            yield batch, result

    def labels(tokens: int | None) -> tuple[list[float], int]:
        sizes.clear()
        small = {"iterations": 0, "per_source": 12, "max_new_tokens": 4, "options": unmeasured}
        record = align(taught, tokenizer, prompts, batch_tokens=tokens, **small).record
        return [record["iterations"][0][name] for name in ("f1", "asr", "orr")], max(sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batching, "over", over)
        (small, one), (middle, some), (large, many) = labels(1), labels(200), labels(None)
    assert one == 1 < some < many
    assert small == middle == large


# -- who takes part


def test_a_judge_of_ones_own(taught: Any, tokenizer: Any, prompts: llmva.PromptSet) -> None:
    judge = Stub(by_words)
    result = align(taught, tokenizer, prompts, judge=judge, iterations=1, **FASTER)
    assert result.record["judge"] == "stub"
    measured = 2 * (48 + len(prompts.validation)) + len(prompts.test) * (1 + (result.record["best_iteration"] > 0))
    assert judge.asked == measured  # strengths are looked at by first tokens


def test_an_unknown_judge_or_setting(taught: Any, tokenizer: Any, prompts: llmva.PromptSet) -> None:
    with pytest.raises(llmva.UsageError, match="no judge called 'oracle'"):
        align(taught, tokenizer, prompts, judge="oracle")
    with pytest.raises(llmva.UsageError, match="itterations"):
        align(taught, tokenizer, prompts, itterations=3)
    with pytest.raises(llmva.UsageError, match="seed -1"):
        align(taught, tokenizer, prompts, seed=-1)
    with pytest.raises(llmva.UsageError, match="6 sublayers"):
        align(taught, tokenizer, prompts, layers=7)


def test_progress_is_told(taught: Any, tokenizer: Any, prompts: llmva.PromptSet) -> None:
    told: list[tuple[str, int]] = []
    done: dict[str, int] = {}

    class Listener(Progress):
        def stage(self, text: str, total: int = 0, unit: str = "prompts") -> Any:
            told.append((text, total))
            done[text] = 0

            def on_progress(n: int) -> None:
                done[text] += n

            return on_progress

        def iteration(self, record: Any, best: int, limit: int) -> None:
            told.append((f"measured {record['iteration']}", best))

    result = align(taught, tokenizer, prompts, iterations=1, progress=Listener(), **FASTER)
    names = [name for name, _ in told]
    assert list(dict.fromkeys(names))[:4] == [
        "iteration 0: answering",
        "iteration 0: fitting",
        "iteration 0: passes",
        "measured 0",
    ]
    assert ("test prompts, before", len(prompts.test)) in told
    whole = {
        name: total for name, total in told if name in done and total and "passes" not in name
    }  # passes end when none helps
    assert {name: done[name] for name in whole} == whole
    assert ("measured 1", result.record["best_iteration"]) in told


@pytest.mark.parametrize("svm", ["exact", "sklearn"])
def test_it_aligns(taught: Any, tokenizer: Any, prompts: llmva.PromptSet, memory: llmva.Result, svm: str) -> None:
    default = memory.record["settings"]["svm"]
    record = memory.record if svm == default else align(taught, tokenizer, prompts, iterations=3, svm=svm).record
    before, after = record["test"]["before"], record["test"]["after"]
    assert after["f1"] > before["f1"] + 0.2
    assert after["asr"] <= before["asr"]
    assert after["orr"] <= before["orr"]


@pytest.mark.parametrize(("share", "point"), [(0.9, (1, 0.75)), (1e-9, (0, 1.0))])
def test_a_better_iteration_that_breaks_a_limit_is_used_weaker(
    share: float,
    point: tuple[int, float],
    taught: Any,
    tokenizer: Any,
    prompts: llmva.PromptSet,
    memory: llmva.Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its harm falls with the square of the strength; the untouched model is no answer to that."""
    limit = share * memory.record["iterations"][1]["kl"]

    def finish_under_the_limit(context: Any, run: Any, skills: Any) -> None:
        """As of a run whose training texts kept the limit that validation texts break."""
        context = replace(context, objective=replace(context.objective, max_kl=limit))
        run.record["best_iteration"] = context.objective.choose(run.record["iterations"])
        assert run.record["best_iteration"] == 0
        finish(context, run, skills)

    monkeypatch.setattr("llmva.alignment.finish", finish_under_the_limit)
    record = align(taught, tokenizer, prompts, iterations=3).record
    assert (record["best_iteration"], record["best_strength"]) == point
    if point[0] == 0:
        assert "strengths" not in record
        return
    used = next(row for row in record["strengths"] if row["strength"] == 0.75)
    assert used["kl"] <= limit
    assert "predicted" not in used  # its answers were measured
    assert used["f1"] > record["iterations"][0]["f1"]
    assert record["test"]["after"]["f1"] > record["test"]["before"]["f1"]
    assert any("is used at strength 0.75" in sentence for sentence in record["limits"])


def test_prompts_to_read_that_the_context_does_not_hold_are_left_out_and_told(
    taught: Any, tokenizer: Any, prompts: llmva.PromptSet
) -> None:
    class Notes(Progress):
        def note(self, text: str) -> None:
            told.append(text)

    told: list[str] = []
    short = replace(prompts.train[0], source="read")
    long = replace(short, text=short.text + " here" * taught.config.max_position_embeddings)
    given = replace(prompts, read=(short, long))
    settings = make_settings(**FAST)
    context = make_context(chat_model(taught, tokenizer), given, "phrases", 0, settings, Notes(), RunOptions())
    assert context.prompts.read == (short,)
    assert context.prompts.warnings == (*prompts.warnings, *told)
    assert told[0].startswith("1 of the 2 prompts that are only read are longer than the model's context")
