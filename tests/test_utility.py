"""Benchmarks before and after: local tasks of every kind, the paired interval, F1, and what is refused."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ANSWERS, Said, taught_model, taught_requests, tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.models.chat import render
from llmva.models.sublayers import find_decoder
from llmva.utility import load_tasks, measure_tasks
from llmva.utility.quiet import quiet_harness, seeded
from llmva.utility.scores import (
    MACRO_F1,
    RESAMPLES,
    Metric,
    bounds,
    draw_counts,
    mean_preserved,
    preserved,
    score,
)
from test_harmless import random_edit

CHOICES = [answer for pair in ANSWERS for answer in pair]
SHARED = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
metadata:
  version: 2.0
"""
CHOICE = "output_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_target: label\ndoc_to_choice: choices\n"
TASKS = {
    "which_answer": CHOICE + "metric_list:\n  - metric: acc\n",
    "cola": CHOICE + "metric_list:\n  - metric: mcc\n",  # by its name one of GLUE, so F1
    "matthews": CHOICE + "metric_list:\n  - metric: mcc\n",
    "whole_answer": (
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{choices[label]}}'\n"
        "generation_kwargs:\n  until: ['<eos>']\n  max_gen_toks: 12\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n"
    ),
    "bits": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{choices[label]}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files over what the taught model was taught; half of the requests in each part of the group."""
    place = tmp_path_factory.mktemp("tasks")
    tokenizer = tiny_tokenizer()
    rows = [
        {"question": text, "prompt": render(tokenizer, text), "choices": CHOICES, "label": CHOICES.index(answer)}
        for text, _, answer in taught_requests()
    ]
    halves = {"rows": rows, "first": rows[:30], "second": rows[30:]}
    for name, part in halves.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, body in TASKS.items():
        (place / f"{name}.yaml").write_text(f"task: {name}\n" + body + SHARED.format(data=place / "rows.jsonl"))
    for name in ("first", "second"):
        shared = SHARED.format(data=place / f"{name}.jsonl")
        (place / f"{name}.yaml").write_text(f"task: part_{name}\n" + TASKS["which_answer"] + shared)
    (place / "both.yaml").write_text("group: both_parts\ntask:\n  - part_first\n  - part_second\n")
    asked = TASKS["which_answer"].replace("{{prompt}}", "{{question}}")
    (place / "asked.yaml").write_text("task: asked\n" + asked + SHARED.format(data=place / "rows.jsonl"))
    gone = SHARED.format(data=place / "nowhere.jsonl")
    (place / "gone.yaml").write_text("task: gone\n" + TASKS["which_answer"] + gone)
    long = TASKS["whole_answer"].replace("12", "400")
    (place / "long.yaml").write_text("task: long\n" + long + SHARED.format(data=place / "rows.jsonl"))
    return place


@pytest.fixture(scope="module")
def taught() -> Any:
    return taught_model()


@pytest.fixture(scope="module")
def breaking(taught: Any) -> Edit:
    return random_edit(find_decoder(taught), 30.0)


def lines(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["utility_tasks"]}


def test_no_edit_leaves_all_of_every_score(taught: Any, breaking: Edit, folder: Path) -> None:
    tasks = load_tasks([*TASKS, "both_parts"], include_path=folder, limit=40)
    found = measure_tasks(taught, tiny_tokenizer(), tasks, edit=breaking.scaled(0.0))
    assert [row["name"] for row in found["utility_tasks"]] == [*TASKS, "both_parts"]
    for row in found["utility_tasks"]:
        assert (row["ratio"], row["interval"]) == (1.0, [1.0, 1.0]), row["name"]
        assert row["before"] == row["after"] > 0.2
        assert row["version"] == "2.0"
    whole = found["utility_preserved"]
    assert (whole["ratio"], whole["interval"], whole["tasks"]) == (1.0, [1.0, 1.0], 6)


def test_an_edit_that_destroys_lowers_every_score(taught: Any, breaking: Edit, folder: Path) -> None:
    tasks = load_tasks(list(TASKS), include_path=folder, limit=60)
    found = measure_tasks(taught, tiny_tokenizer(), tasks, edit=breaking)
    rows = lines(found)
    assert {name: row["metric"] for name, row in rows.items()} == {
        "which_answer": "acc",
        "cola": MACRO_F1,
        "matthews": "mcc",
        "whole_answer": "exact_match",
        "bits": "bits_per_byte",
    }
    for row in rows.values():
        low, high = row["interval"]
        assert low <= row["ratio"] <= high < 1, row["name"]
        assert row["n"] == 60
    assert not rows["bits"]["higher_is_better"]
    assert rows["bits"]["after"] > rows["bits"]["before"]  # more bits are worse, and the ratio falls all the same
    assert rows["bits"]["ratio"] == pytest.approx(rows["bits"]["before"] / rows["bits"]["after"])
    assert found["utility_preserved"]["ratio"] == pytest.approx(np.mean([row["ratio"] for row in rows.values()]))
    assert not any(module._forward_hooks for module in taught.modules())


def test_without_an_edit_there_is_a_score_and_no_ratio(taught: Any, folder: Path) -> None:
    found = measure_tasks(taught, tiny_tokenizer(), load_tasks(["which_answer"], include_path=folder, limit=20))
    (row,) = found["utility_tasks"]
    assert row["n"] == 20
    assert row["before"] > 0.8
    assert not {"after", "ratio", "interval"} & row.keys()
    assert "ratio" not in found["utility_preserved"]


def test_scores_equal_those_of_a_direct_computation(taught: Any, folder: Path) -> None:
    """Log-likelihoods of the choices one by one, and scikit-learn's F1 and MCC on them."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    model, tokenizer = tiny_model(seed=5), tiny_tokenizer()
    right, given = [], []
    for text, _, answer in taught_requests():
        prompt = tokenizer(render(tokenizer, text), add_special_tokens=False)["input_ids"]
        totals = []
        for choice in CHOICES:
            said = tokenizer(choice, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            totals.append(float(logits.gather(1, torch.tensor(said)[:, None]).sum()))
        given.append(int(np.argmax(totals)))
        right.append(CHOICES.index(answer))
    tasks = load_tasks(["cola", "matthews", "which_answer"], include_path=folder)
    rows = lines(measure_tasks(model, tokenizer, tasks))
    assert 0 < rows["which_answer"]["before"] < 1
    assert rows["which_answer"]["before"] == pytest.approx(np.mean(np.array(right) == given))
    assert rows["cola"]["before"] == pytest.approx(f1_score(right, given, average="macro"))
    assert rows["matthews"]["before"] == pytest.approx(matthews_corrcoef(right, given))


def test_batches_of_any_size_agree(taught: Any, breaking: Edit, folder: Path) -> None:
    tasks = load_tasks(["which_answer", "whole_answer", "bits"], include_path=folder, limit=30)
    mild = breaking.scaled(0.1)
    found = [measure_tasks(taught, tiny_tokenizer(), tasks, edit=mild, batch_tokens=n) for n in (1, 100_000)]
    for one, other in zip(*(f["utility_tasks"] for f in found), strict=True):
        assert one["after"] == pytest.approx(other["after"], rel=1e-4)


def test_the_chat_template_is_put_around_questions_when_asked(taught: Any, folder: Path) -> None:
    tasks = load_tasks(["asked"], include_path=folder)
    bare, chat = (measure_tasks(taught, tiny_tokenizer(), tasks, chat=chat) for chat in (False, True))
    assert lines(chat)["asked"]["before"] > max(0.9, lines(bare)["asked"]["before"])
    assert [f["utility_preserved"]["chat"] for f in (bare, chat)] == [False, True]
    with pytest.raises(UsageError, match="no chat template"):
        measure_tasks(taught, tiny_tokenizer(template=False), tasks, chat=True)


def test_progress_counts_documents(taught: Any, breaking: Edit, folder: Path) -> None:
    from llmva.progress import Progress

    class Seen(Progress):
        stages: list[list[Any]] = []  # noqa: RUF012

        def stage(self, text: str, total: int = 0, unit: str = "prompts") -> Callable[[int], None]:
            stage = [text, total, 0]
            self.stages.append(stage)

            def on_progress(n: int) -> None:
                stage[2] += n

            return on_progress

    tasks = load_tasks(["which_answer", "whole_answer"], include_path=folder, limit=20)
    seen = Seen()
    measure_tasks(taught, tiny_tokenizer(), tasks, edit=breaking, batch_tokens=200, progress=seen)
    names = [f"{task}, {side}" for task in ("which_answer", "whole_answer") for side in ("original", "edited")]
    assert seen.stages == [[name, 20, 20] for name in names]


# -- documents -------------------------------------------------------------------------------------------------------


def test_the_draw_depends_on_task_and_seed_alone(folder: Path) -> None:
    def drawn(names: list[str], seed: int = 42) -> dict[str, Any]:
        return {task.name: task.documents for task in load_tasks(names, include_path=folder, limit=12, seed=seed)}

    alone = drawn(["which_answer"])["which_answer"]["which_answer"]
    assert alone == drawn(["bits", "which_answer"])["which_answer"]["which_answer"]
    assert alone != drawn(["which_answer"], seed=1)["which_answer"]["which_answer"]
    assert alone == sorted(set(alone))
    assert len(alone) == 12


def test_a_group_pools_its_parts(taught: Any, folder: Path) -> None:
    (pooled,) = load_tasks(["both_parts"], include_path=folder)
    assert (pooled.name, pooled.total, pooled.n) == ("both_parts", len(taught_requests()), len(taught_requests()))
    row = lines(measure_tasks(taught, tiny_tokenizer(), [pooled]))["both_parts"]
    whole = lines(measure_tasks(taught, tiny_tokenizer(), load_tasks(["which_answer"], include_path=folder)))
    assert row["parts"] == 2
    assert row["before"] == pytest.approx(whole["which_answer"]["before"])
    (few,) = load_tasks(["both_parts"], include_path=folder, limit=1)
    assert few.n == len(few.parts) == 1  # a part without documents is not run
    assert lines(measure_tasks(taught, tiny_tokenizer(), [few]))["both_parts"]["n"] == 1


def stand_in(path: str, name: str | None = None, **options: Any) -> Any:
    """Data of the default tasks' form: their columns and splits, with other contents."""
    from datasets import ClassLabel, Dataset, DatasetDict

    count = 8
    say = [f"please paint the {noun}" for noun in ("fence", "door", "table", "lamp") * 2]
    if path == "openai/gsm8k":
        rows: dict[str, Any] = {"question": say, "answer": ["here is how . #### 4"] * count}
        splits = ("train", "test")
    elif path == "cais/mmlu":
        rows = {"question": say, "choices": [["door", "lamp", "fence", "poem"]] * count, "answer": [0, 1, 2, 3] * 2}
        splits = ("dev", "test")
    else:
        assert path == "nyu-mll/glue"
        columns = {"sst2": ["sentence"], "cola": ["sentence"], "mnli": ["premise", "hypothesis"]}
        rows = dict.fromkeys(columns.get(str(name), ["sentence1", "sentence2"]), say)
        rows["label"] = [i % (3 if name == "mnli" else 2) for i in range(count)]
        splits = ("train", "validation_matched" if name == "mnli" else "validation")
    made = Dataset.from_dict(rows)
    if "label" in rows:
        made = made.cast_column("label", ClassLabel(num_classes=3 if name == "mnli" else 2))
    return DatasetDict(dict.fromkeys(splits, made))


def test_the_default_tasks_run_by_their_own_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their data is not at hand, so stand-ins have its columns; prompts, choices and filters are the harness's."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    tasks = load_tasks(limit=5)
    assert [task.total for task in tasks] == [8] * 6 + [57 * 8]
    model = tiny_model(max_position_embeddings=1024)
    found = measure_tasks(model, tiny_tokenizer(), tasks, edit=random_edit(find_decoder(model), 0.5))
    assert {name: (row["metric"], row["n"], row["shots"]) for name, row in lines(found).items()} == {
        **dict.fromkeys(("cola", "mnli", "rte", "mrpc", "sst2"), (MACRO_F1, 5, 0)),
        "gsm8k": ("exact_match", 5, 5),
        "mmlu": ("acc", 5, 0),
    }
    assert all(0 <= row[side] <= 1 for row in found["utility_tasks"] for side in ("before", "after"))


# -- what is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_named_with_near_ones() -> None:
    with pytest.raises(UsageError, match=r"no task 'gsm8kk': did you mean .*gsm8k"):
        load_tasks(["gsm8kk"])


def test_data_that_cannot_be_read_is_told_with_its_mend(folder: Path) -> None:
    with pytest.raises(LlmvaError, match=r"task 'gone' cannot be loaded .*--tasks") as caught:
        load_tasks(["gone"], include_path=folder)
    assert not isinstance(caught.value, UsageError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        ([" "], {}, "no tasks"),
        (["which_answer"], {"limit": 0}, "--utility-limit"),
        (["which_answer", "bits", "which_answer"], {}, "'which_answer' is named twice"),
        (["which_answer"], {"include_path": "nowhere"}, "no folder 'nowhere'"),
    ],
)
def test_bad_requests(names: list[str], options: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=words):
        load_tasks(names, **{"include_path": folder, **options})


def test_code_and_pictures_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.task import ConfigurableTask

    for name, words in (("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "more than text")):
        with monkeypatch.context() as patch:
            patch.setattr(ConfigurableTask, name, True, raising=False)
            with pytest.raises(UsageError, match=words):
                load_tasks(["bits"], include_path=folder)


def test_answers_longer_than_the_model_reads_are_refused(taught: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"'long' asks for answers of 400 tokens and the model reads 256"):
        measure_tasks(taught, tiny_tokenizer(), load_tasks(["long"], include_path=folder, limit=2))


def test_without_the_harness_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'llmva\[eval\]'"):
        load_tasks(["cola"])


# -- leaving nothing behind ------------------------------------------------------------------------------------------


def test_nothing_stays_changed(taught: Any, folder: Path) -> None:
    from tqdm import tqdm

    tokenizer = tiny_tokenizer()
    side, make = tokenizer.padding_side, tqdm.__init__
    level, drawn = logging.getLogger("lm_eval").level, random.getstate()
    arrays, numbers = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[union-attr, index]
    measure_tasks(taught, tokenizer, load_tasks(["whole_answer"], include_path=folder, limit=4))
    assert tokenizer.padding_side == side
    assert tqdm.__init__ is make
    assert logging.getLogger("lm_eval").level == level
    assert random.getstate() == drawn
    assert (np.random.get_state()[1] == arrays).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), numbers)


def test_bars_and_seeds_come_back_after_an_error() -> None:
    from tqdm import tqdm

    make, drawn = tqdm.__init__, random.getstate()

    def fail() -> None:
        with quiet_harness(), seeded(3):
            assert tqdm([1]).disable
            raise KeyError(random.random())

    with pytest.raises(KeyError):
        fail()
    assert tqdm.__init__ is make
    assert random.getstate() == drawn


# -- intervals -------------------------------------------------------------------------------------------------------


def test_the_paired_bootstrap_equals_a_direct_one() -> None:
    generator = np.random.default_rng(0)
    before, after = (generator.random((2, 50)) < [[0.8], [0.6]]).astype(float)
    found = preserved(Metric("acc"), before.tolist(), after.tolist(), seed=7, name="task")
    counts = draw_counts(50, RESAMPLES, 7, "task").astype(int)
    ratios = []
    for row in counts:
        picked = [i for i, times in enumerate(row) for _ in range(times)]
        assert len(picked) == 50
        ratios.append(after[picked].mean() / before[picked].mean())
    assert found.ratio == pytest.approx(after.mean() / before.mean())
    assert found.resampled == pytest.approx(np.array(ratios))
    ordered = sorted(ratios)
    assert found.interval == pytest.approx([ordered[RESAMPLES // 40 - 1], ordered[RESAMPLES - RESAMPLES // 40 - 1]])


def test_pairing_narrows_the_interval_and_covers_the_truth() -> None:
    """Documents right before stay right nine times in ten: the ratio's truth is 0.9 of the score, plus what is won."""
    generator = np.random.default_rng(1)
    hits, widths = 0, []
    for trial in range(60):
        before = generator.random(150) < 0.5
        after = np.where(before, generator.random(150) < 0.9, generator.random(150) < 0.05)
        low, high = preserved(Metric("acc"), before.tolist(), after.tolist(), trial).interval or (0.0, 0.0)
        hits += low <= 0.95 <= high
        widths.append(high - low)
        alone = preserved(Metric("acc"), before.tolist(), generator.permutation(after).tolist(), trial).interval
        assert alone is not None
        widths.append(alone[0] - alone[1])
    assert 52 <= hits <= 60
    assert sum(widths) < 0  # the unpaired ones, counted with a minus, are wider


def test_macro_f1_equals_scikit_learn_on_every_resample() -> None:
    from sklearn.metrics import f1_score

    generator = np.random.default_rng(2)
    right = generator.integers(0, 3, 40)
    given = np.where(generator.random(40) < 0.6, right, generator.integers(0, 4, 40))
    pairs = list(zip(right.tolist(), given.tolist(), strict=True))
    assert score(Metric(MACRO_F1), pairs) == pytest.approx(f1_score(right, given, average="macro"))
    found = preserved(Metric(MACRO_F1), pairs, pairs[::-1], 5)
    for row, ratio in list(zip(draw_counts(40, RESAMPLES, 5).astype(int), found.resampled, strict=True))[:25]:
        once, again = (
            f1_score(np.repeat(r, row), np.repeat(g, row), average="macro")
            for r, g in ((right, given), (right[::-1], given[::-1]))
        )
        assert ratio == pytest.approx(again / once)


def test_a_metric_that_is_no_mean_is_computed_anew_on_resamples() -> None:
    spread = Metric("spread", aggregate=lambda values: max(values) - min(values))
    found = preserved(spread, [1.0, 2.0, 5.0, 9.0], [1.0, 2.0, 5.0, 5.0], 0)
    assert found.ratio == 0.5
    assert set(np.round(found.resampled[np.isfinite(found.resampled)], 3)) > {0.5, 1.0}


def test_a_score_of_nothing_has_no_ratio() -> None:
    none = preserved(Metric("acc"), [0.0] * 10, [1.0] * 10, 0)
    assert (none.before, none.after, none.ratio, none.interval) == (0.0, 1.0, None, None)
    rare = preserved(Metric("acc"), [1.0] + [0.0] * 9, [1.0] + [0.0] * 9, 0)  # a third of the resamples have none
    assert (rare.ratio, rare.interval) == (1.0, None)
    assert mean_preserved([none]) == (None, None)
    good = preserved(Metric("acc"), [1.0] * 10, [1.0] * 5 + [0.0] * 5, 0)
    assert mean_preserved([none, good])[0] == 0.5
    assert bounds(np.array([1.0, np.inf])) is None


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(taught_folder: Path, breaking: Edit, tmp_path: Path) -> tuple[object, ...]:
    breaking.save(tmp_path / "edit.safetensors")
    sides = ("--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt")
    return ("evaluate", taught_folder, *sides, "--edit", tmp_path, "--max-new-tokens", 4)


def test_the_command_as_one_object_and_for_people(
    evaluated: tuple[object, ...], folder: Path, command: Callable[..., Said]
) -> None:
    utility = ("--utility", "--tasks", "which_answer, cola", "--include-path", folder, "--utility-limit", 25)
    said = command(*evaluated, *utility, "--json", "--quiet")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert [(row["name"], row["n"]) for row in found["utility_tasks"]] == [("which_answer", 25), ("cola", 25)]
    assert found["utility_preserved"]["lm_eval"]
    assert found["utility"]["endings"]["n"] == 16
    said = command(*evaluated, *utility)
    assert said.code == 0
    assert all(words in said.err for words in ("which_answer, original, 25", "which_answer, edited, 25"))
    assert all(words in said.out for words in ("f1_macro", "mean of tasks"))
    assert "it/s" not in said.err  # no bars of other programs


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--tasks", "cola"), "--tasks applies to benchmarks: add --utility"),
        (("--utility-limit", 5), "add --utility"),
        (("--utility", "--tasks", ","), "no tasks"),
    ],
)
def test_the_command_refuses(
    evaluated: tuple[object, ...], command: Callable[..., Said], given: tuple[object, ...], words: str
) -> None:
    said = command(*evaluated, *given)
    assert said.code == 2
    assert words in said.err
