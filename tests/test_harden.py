"""Training prompts in several settings: which are changed, that a run says so, and that it resumes to equal bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmva
from conftest import Said, chat_model, taught_requests, tiny_model, tiny_tokenizer
from llmva.alignment import RunOptions
from llmva.attacks import bundled_attacks
from llmva.extension import prepare
from llmva.method.harden import FITTED, SHARE, SYSTEM, SYSTEM_TEXT, count_forms, harden, harden_generator, with_system
from llmva.progress import Progress
from llmva.prompts.types import Message, Prompt
from llmva.settings import make_settings

PROMPTS = llmva.PromptSet.bundled()
HOW = make_settings(max_new_tokens=8)


def wide_chat(**changes: Any) -> Any:
    return chat_model(tiny_model(**{"max_position_embeddings": 4096, **changes}), tiny_tokenizer())


def hardened(chat: Any = None, prompts: llmva.PromptSet = PROMPTS, seed: int = 1, **how: Any) -> llmva.PromptSet:
    return harden(chat or wide_chat(), prompts, make_settings(max_new_tokens=8, **how), harden_generator(seed))


# -- which prompts -----------------------------------------------------------------------------------------------


def test_a_share_of_both_sides_is_asked_in_other_settings() -> None:
    made = hardened()
    assert made.test == PROMPTS.test
    for split in ("train", "validation"):
        before, after = getattr(PROMPTS, split), getattr(made, split)
        assert [(p.text, p.benign, p.source) for p in after] == [(p.text, p.benign, p.source) for p in before]
        for benign in (False, True):
            other = [p for p in after if p.benign == benign and p.attack]
            side = [p for p in after if p.benign == benign]
            assert len(other) / len(side) == pytest.approx(SHARE, abs=0.1)
    forms = Counter(prompt.attack for prompt in made.train if prompt.attack)
    assert set(forms) == {*FITTED, SYSTEM}
    assert min(forms.values()) > 0.7 * max(forms.values())
    assert len({prompt.id for prompt in made.train}) == len(made.train)
    attacks = {attack.name: attack for attack in bundled_attacks()}
    for prompt in (p for p in made.train if p.attack):
        if prompt.attack == SYSTEM:
            assert prompt.messages == (Message("system", SYSTEM_TEXT), Message("user", prompt.text))
        else:
            assert attacks[prompt.attack].read_back(prompt) == prompt.text


def test_some_attacks_stay_unseen() -> None:
    names = {attack.name for attack in bundled_attacks()}
    assert set(FITTED) < names
    assert len(names - set(FITTED)) >= 2 * len(FITTED)


def test_the_generator_alone_decides() -> None:
    assert hardened() == hardened()
    assert hardened(seed=2).train != hardened().train


def test_prompts_to_read_are_asked_so_too() -> None:
    named = llmva.PromptSet.from_lists([f"open lock {i}" for i in range(9)], [f"fix lamp {i}" for i in range(9)])
    assert any(prompt.attack for prompt in hardened(prompts=named.with_bundled()).read)


def test_a_form_that_does_not_fit_gives_way() -> None:
    short = llmva.PromptSet.from_lists([f"open the door {i}" for i in range(99)],
                                       [f"fix the lamp {i}" for i in range(99)])  # fmt: skip
    room = 8 + len(wide_chat().row("open the door 10"))
    systems = 8 + len(wide_chat().row(with_system(short.train[0]).asked))
    made = hardened(wide_chat(max_position_embeddings=systems), short)
    assert {prompt.attack for prompt in made.train} == {"", SYSTEM}
    assert {prompt.attack for prompt in hardened(wide_chat(max_position_embeddings=room), short).train} == {""}
    told = hardened(wide_chat(max_position_embeddings=room), short).warnings[-1]
    assert told.startswith("--harden changed nothing")


def test_what_a_prompt_has_of_its_own_stays() -> None:
    own = (Message("system", "please help"), Message("user", "open the door"))
    chats = tuple(Prompt(f"{i}", i % 2 == 0, "s", own) for i in range(200))
    made = hardened(prompts=llmva.PromptSet(chats, chats[:1], chats[:1]))
    assert {p.attack for p in made.train} == {"", *FITTED}
    assert all(p.messages and p.messages[0] == own[0] for p in made.train)
    again = hardened(prompts=made, seed=5)
    assert all(after == before for before, after in zip(made.train, again.train, strict=True) if before.attack)
    assert {p.attack for p in hardened(system="please help").train} == {"", *FITTED}
    kept = harden(wide_chat(), PROMPTS, HOW, harden_generator(1), keep=("harmful",))
    assert all(not p.attack for p in kept.train if p.source == "harmful")
    assert any(p.attack for p in kept.train)


# -- a run -------------------------------------------------------------------------------------------------------


SMALL: dict[str, Any] = {"per_source": 16, "max_new_tokens": 8, "endings_tokens": 0, "iterations": 2, "passes": 2}


class Stopping(Progress):
    """Ends the program after an iteration."""

    def iteration(self, entry: Any, best: int, maximum: int) -> None:
        if entry["iteration"] == 1:
            raise KeyboardInterrupt


def taught_prompts() -> llmva.PromptSet:
    toxic, benign = ([text for text, side, _ in taught_requests() if side == wanted] for wanted in (False, True))
    return llmva.PromptSet.from_lists(toxic, benign)


@pytest.fixture(scope="module")
def run(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("harden") / "run"
    align(taught_folder, out)
    return out


def align(folder: Path, out: Path, progress: Progress | None = None, **changes: Any) -> Any:
    model, tokenizer = llmva.load_model(folder)
    options = RunOptions(name=str(folder))
    settings = {**SMALL, "harden": True, **changes}
    return llmva.align(model, tokenizer, taught_prompts(), out=out, progress=progress, options=options, **settings)


def test_a_run_says_what_it_was_fitted_on(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    stored = llmva.PromptSet.from_jsonl(run / "prompts.jsonl")
    assert record["settings"]["harden"] is True
    assert record["hardened"] == count_forms(stored)
    assert record["hardened"]["train"]["persona"] > 0
    assert sum(record["hardened"]["validation"].values()) == len(stored.validation)
    assert any(limit.startswith("--harden: ") and "persona" in limit for limit in record["limits"])
    assert "--harden: " in (run / "report.html").read_text()
    assert stored.test == taught_prompts().test


def test_a_resumed_run_ends_with_the_same_bytes(run: Path, taught_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        align(taught_folder, tmp_path / "run", Stopping())
    assert not json.loads((tmp_path / "run/run.json").read_text()).get("test")
    align(taught_folder, tmp_path / "run")
    for name in ("edit.safetensors", "answers.jsonl", "prompts.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes(), name


def test_a_run_from_before_the_setting_goes_on(taught_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        align(taught_folder, tmp_path / "run", Stopping(), harden=False)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert "hardened" not in record
    del record["settings"]["harden"]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(llmva.UsageError, match="the setting harden False, and this one has True"):
        align(taught_folder, tmp_path / "run")
    assert align(taught_folder, tmp_path / "run", harden=False).record["test"]["after"]


def test_an_extension_leaves_the_earlier_prompts_as_they_are(run: Path, taught_folder: Path, tmp_path: Path) -> None:
    new = [Prompt(f"explain {i} how to break {i * 3} locks", False, "new") for i in range(40)]
    model, tokenizer = llmva.load_model(taught_folder)
    start, earlier, _ = prepare(run, new)
    llmva.extend(model, tokenizer, run, new, out=tmp_path / "run", iterations=0)
    made = llmva.PromptSet.from_jsonl(tmp_path / "run/prompts.jsonl")
    assert [p for p in made.train if p.source in start.old] == [p for p in earlier.train if p.source in start.old]
    assert any(p.attack for p in made.train if p.source == "new")


def test_an_evaluation_says_which_attacks_were_fitted_on(
    run: Path, taught_folder: Path, command: Callable[..., Said]
) -> None:
    words = ("evaluate", taught_folder, "--edit", run, "--max-new-tokens", 4, "--json", "--attack")
    limits = json.loads(command(*words, "persona,prefix-injection").out)["limits"]
    assert any(limit.startswith("The fit of the edit has seen prompts under persona") for limit in limits)
    seen = next(limit for limit in limits if limit.startswith("The fit of the edit has seen prompts under"))
    assert "prefix-injection" not in seen
    limits = json.loads(command(*words, "prefix-injection").out)["limits"]
    assert not any(limit.startswith("The fit of the edit has seen prompts under") for limit in limits)
