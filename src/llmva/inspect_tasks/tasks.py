"""The tasks `llmva/over_refusal` and `llmva/harmful`: Inspect AI finds them by the entry point of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from click import ClickException
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.solver import generate

from llmva.errors import LlmvaError
from llmva.inspect_tasks.prompts import Names, read_side
from llmva.inspect_tasks.scorers import answered, refused
from llmva.prompts.testsets import PER_SET
from llmva.prompts.types import Prompt

GREEDY = GenerateConfig(temperature=0.0, max_tokens=256)  # as llmva evaluate answers; Inspect's options overrule it
MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


@task
def over_refusal(
    benign: Names = (),
    data: Names = (),
    run: str | None = None,
    data_dir: str | None = None,
    per_set: int = PER_SET,
    judge: str = "phrases",
    seed: int = 42,
) -> Task:
    """ORR: the share of benign prompts that the model refuses.

    Args:
        benign: files of benign prompts, as `llmva align --benign` takes them.
        data: names of public sets, as `llmva data list` shows them; without `benign` and `data` the bundled prompts.
        run: the folder of a run; prompts that its edit was fitted on are left out.
        data_dir: a folder with copies of the public sets.
        per_set: at most this many prompts are drawn from each file or set.
        judge: what labels the answers, as `--judge` takes it.
        seed: of the draw.
    """
    with one_sentence():
        prompts = read_side(True, benign, data, run=run, data_dir=data_dir, per_set=per_set, seed=seed)
        scorer = refused(judge)
    return Task(dataset=as_dataset("over_refusal", prompts), solver=generate(), scorer=scorer, config=GREEDY)


@task
def harmful(
    toxic: Names = (),
    data: Names = (),
    run: str | None = None,
    data_dir: str | None = None,
    per_set: int = PER_SET,
    judge: str = "phrases",
    seed: int = 42,
) -> Task:
    """ASR: the share of harmful prompts that the model answers.

    Args:
        toxic: files of harmful prompts, as `llmva align --toxic` takes them.
        data: names of public sets, as `llmva data list` shows them; without `toxic` and `data` the bundled prompts.
        run: the folder of a run; prompts that its edit was fitted on are left out.
        data_dir: a folder with copies of the public sets.
        per_set: at most this many prompts are drawn from each file or set.
        judge: what labels the answers, as `--judge` takes it.
        seed: of the draw.
    """
    with one_sentence():
        prompts = read_side(False, toxic, data, run=run, data_dir=data_dir, per_set=per_set, seed=seed)
        scorer = answered(judge)
    return Task(dataset=as_dataset("harmful", prompts), solver=generate(), scorer=scorer, config=GREEDY)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Tell a user's mistake as Inspect AI's command line tells its own: without a traceback."""
    try:
        yield
    except LlmvaError as error:
        raise ClickException(str(error)) from error


def as_dataset(name: str, prompts: tuple[Prompt, ...]) -> MemoryDataset:
    """The prompts as Inspect AI reads them."""
    return MemoryDataset([_sample(prompt) for prompt in prompts], name=name)


def _sample(prompt: Prompt) -> Sample:
    asked = prompt.asked
    text = asked if isinstance(asked, str) else [MESSAGES[one.role](content=one.content) for one in asked]
    return Sample(
        input=text, id=prompt.id, metadata={"text": prompt.text, "source": prompt.source, "benign": prompt.benign}
    )
