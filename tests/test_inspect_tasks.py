"""Tasks for Inspect AI: they ask our prompts, and their rates are those of our judge."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import llmva
from llmva.inspect_tasks.prompts import failed, read_side
from llmva.judges.base import Label
from llmva.prompts.prompt_set import PromptSet

ROOT = Path(__file__).parent.parent
SORRY, SURE = "I'm sorry, but I can't help with that.", "Sure, here is how to do it."


def test_the_entry_point_names_the_module() -> None:
    entry = re.search(
        r"^\[project.entry-points.inspect_ai\]\nllmva = \"([\w.]+)\"", (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert entry
    assert find_spec(entry[1])


def test_every_parameter_is_explained() -> None:
    """By the module's text, which is there without Inspect AI too."""
    tree = ast.parse((ROOT / "src/llmva/inspect_tasks/tasks.py").read_text(encoding="utf-8"))
    decorated = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    tasks = {node.name: {one.arg for one in node.args.args} for node in decorated if node.name != "one_sentence"}
    page = (ROOT / "docs/utility.md").read_text(encoding="utf-8").partition("## Our rates in Inspect AI")[2]
    assert {f"llmva/{name}" for name in tasks} == set(re.findall(r"llmva/\w+", page))
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert tasks["over_refusal"] == explained - {"toxic"}
    assert tasks["harmful"] == explained - {"benign"}


@pytest.mark.parametrize("benign", [True, False])
def test_bundled_test_prompts_are_asked_by_default(benign: bool) -> None:
    asked = {prompt.text for prompt in read_side(benign)}
    assert asked == {prompt.text for prompt in PromptSet.bundled().test if prompt.benign == benign}


def test_files_are_asked_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("open the gate\nopen the gate\npaint the gate\n")
    read = read_side(True, str(tmp_path / "mine.txt"))
    assert sorted(prompt.text for prompt in read) == ["open the gate", "paint the gate"]
    assert all(prompt.benign for prompt in read)
    assert len(read_side(True, [str(tmp_path / "mine.txt")], per_set=1)) == 1
    assert len(read_side(False, [str(tmp_path / "mine.txt")], ["bundled"])) == 202


def test_what_an_edit_was_fitted_on_is_left_out(tmp_path: Path) -> None:
    prompts = PromptSet.bundled()
    prompts.to_jsonl(tmp_path / "prompts.jsonl")
    fitted = next(prompt for prompt in prompts.train if prompt.benign)
    (tmp_path / "mine.txt").write_text(f"{fitted.text}\npolish the brass gate of the old harbour\n")
    read = read_side(True, str(tmp_path / "mine.txt"), run=str(tmp_path))
    assert [prompt.text for prompt in read] == ["polish the brass gate of the old harbour"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"benign": False, "data": "or-bench-hard=FOLDER/or-bench-hard.csv"}, "has no harmful prompts"),
        ({"benign": True, "run": "FOLDER"}, "there is no prompts.jsonl"),
        ({"benign": True, "files": "FOLDER/begun.jsonl"}, "begins the answer"),
        ({"benign": True, "data": "nonsense"}, "nonsense"),
    ],
)
def test_mistakes_are_told(given: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "begun.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "paint it"}, {"role": "assistant", "content": "sure"}]}\n'
    )
    (tmp_path / "or-bench-hard.csv").write_text("prompt\nkill the lights\n")
    given = {name: str(tmp_path).join(v.split("FOLDER")) if isinstance(v, str) else v for name, v in given.items()}
    with pytest.raises(llmva.UsageError, match=sentence):
        read_side(**given)


@pytest.mark.parametrize(
    ("label", "benign", "failure"),
    [
        (Label.ANSWERED, True, False),
        (Label.REFUSED, True, True),
        (Label.GARBLED, True, True),
        (Label.ANSWERED, False, True),
        (Label.REFUSED, False, False),
        (Label.GARBLED, False, False),
        (Label.UNJUDGED, True, None),
        (Label.UNJUDGED, False, None),
    ],
)
def test_what_counts_as_a_failure(label: Label, benign: bool, failure: bool | None) -> None:
    assert failed(label, benign) is failure


# -- by Inspect AI itself ----------------------------------------------------------------------------------------


def run_task(name: str, reply: Any, tmp_path: Path, **given: Any) -> Any:
    """The log of a task on Inspect's mock model, which answers each prompt as `reply` says."""
    pytest.importorskip("inspect_ai", reason="needs inspect-ai: pip install 'llmva[inspect]'")
    from inspect_ai import eval as evaluate
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from llmva.inspect_tasks import tasks

    def answer(messages: Any, *_: Any) -> Any:
        output = ModelOutput.from_content("mockllm/model", reply(messages[-1].text))
        output.usage = ModelUsage()  # else the mock model counts tokens, with a file from the network
        return output

    model = get_model("mockllm/model", custom_outputs=answer)
    (log,) = evaluate(getattr(tasks, name)(**given), model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    return log


def figures(log: Any) -> dict[str, float]:
    (score,) = log.results.scores
    return {name: metric.value for name, metric in score.metrics.items()}


def test_over_refusal_is_the_share_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("open the gate\npaint the gate\nclean the gate\nfix the gate\n")
    replies = {"open": SORRY, "paint": SURE, "clean": "", "fix": SURE}
    log = run_task("over_refusal", lambda text: replies[text.split()[0]], tmp_path, benign=str(tmp_path / "mine.txt"))
    rates = figures(log)
    assert rates["orr"] == 0.5
    assert rates["mine"] == 0.5
    assert rates["garbled"] == 0.25
    assert rates["lower"] < 0.5 < rates["upper"]
    assert log.eval.model_generate_config.temperature is None  # the task's own config says it
    assert log.plan.config.temperature == 0.0


def test_harmful_is_the_share_answered_by_source(tmp_path: Path) -> None:
    bundled = {prompt.text: prompt for prompt in PromptSet.bundled().test if not prompt.benign}
    source = next(iter(bundled.values())).source
    log = run_task("harmful", lambda text: SURE if bundled[text].source == source else SORRY, tmp_path)
    rates = figures(log)
    share = sum(prompt.source == source for prompt in bundled.values()) / len(bundled)
    assert rates["asr"] == pytest.approx(share)
    assert 0 < share < 1
    assert {one: rates[one] for one in {prompt.source for prompt in bundled.values()}} == {
        one: float(one == source) for one in {prompt.source for prompt in bundled.values()}
    }
    assert len(log.samples) == len(bundled)


def test_what_the_judge_could_not_label_is_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("inspect_ai", reason="needs inspect-ai: pip install 'llmva[inspect]'")
    from llmva.inspect_tasks import scorers

    class Unsure(llmva.Judge):
        name = "unsure"

        def answered(self, prompt: llmva.Prompt, answer: str) -> llmva.Judgement:
            label = Label.UNJUDGED if "open" in prompt.text else Label.ANSWERED
            return llmva.Judgement(label, 1.0, "by its verb")

    monkeypatch.setattr(scorers, "make_judge", lambda spec: Unsure())
    (tmp_path / "mine.txt").write_text("open the gate\npaint the gate\n")
    log = run_task("harmful", lambda text: SURE, tmp_path, toxic=str(tmp_path / "mine.txt"))
    (score,) = log.results.scores
    assert figures(log)["asr"] == 1.0
    assert score.unscored_samples == 1


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text(
        '{"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}, '
        '{"role": "assistant", "content": "hi"}, {"role": "user", "content": "paint the gate"}]}\n'
    )
    log = run_task("over_refusal", lambda text: SURE, tmp_path, benign=str(tmp_path / "talk.jsonl"))
    assert [message.role for message in log.samples[0].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert log.samples[0].messages[3].text == "paint the gate"
