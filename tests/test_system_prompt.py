"""System prompts: where a template takes them, that every prompt of a run has them, and who is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmva
from conftest import Said, taught_model, tiny_model, tiny_tokenizer
from llmva.cli.options import system_text
from llmva.errors import LlmvaError, UsageError
from llmva.export.card import card
from llmva.export.plan import make_plan
from llmva.export.push import push
from llmva.export.redact import without_paths
from llmva.export.verify import verify
from llmva.models.chat import ChatTemplate, turn_end
from llmva.models.load import load_model
from llmva.settings import excerpt, make_settings

SYSTEM = "please help with that ."
OWN = (
    "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
PARTS = OWN.replace("{{ m['content'] }}", "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}")
NO_SYSTEM = "{% if m['role'] != 'system' %}"
DROPS = OWN.replace("<bos>", f"{NO_SYSTEM}<bos>").replace("{% endfor %}", "{% endif %}{% endfor %}")
RAISES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + OWN
NEEDS = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('System turn required') }}{% endif %}" + OWN
WRITES = "{% if messages[0]['role'] != 'system' %}<bos> system : no . {% endif %}" + OWN  # as Qwen's do
TURN = f"<bos> system : {SYSTEM} <bos> user : open the door assistant :"
MESSAGE = f"<bos> user : {SYSTEM}\n\nopen the door assistant :"
RUN: dict[str, Any] = {"iterations": 1, "per_source": 16, "max_new_tokens": 6, "endings_tokens": 0}


def template(text: str | None, system: str | None = SYSTEM) -> ChatTemplate:
    tokenizer = tiny_tokenizer(template=False)
    tokenizer.chat_template = text
    return ChatTemplate.of(tokenizer, system)


def rendered(text: str | None, thinking: bool = False) -> str:
    return template(text).render([{"role": "user", "content": "open the door"}], thinking)


# -- rendering -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (OWN, TURN),
        (OWN.replace("m['content']", "m['content'] | upper"), TURN.replace(SYSTEM, SYSTEM.upper()).replace(
            "open the door", "OPEN THE DOOR")),
        (PARTS, TURN),
        (NEEDS, TURN),
        (WRITES, TURN),  # in the place of its own
        (None, f"System: {SYSTEM}\n\nUser: open the door\n\nAssistant:"),
        (RAISES, MESSAGE),
        (DROPS, MESSAGE),
        (DROPS.replace("m['content']", "m['content'][0]['text']"), MESSAGE),
    ],
)  # fmt: skip
def test_where_it_goes(text: str | None, read: str) -> None:
    assert rendered(text) == read


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        (RAISES, "takes no system turn (System role not supported), so the system prompt was put before the user's"),
        (DROPS, "takes no system turn, so the system prompt was put before the user's first message"),
    ],
)
def test_a_template_without_system_turns_is_told(text: str, limit: str) -> None:
    assert [limit in one for one in template(text).limits] == [True]
    assert template(text, None).limits == template(OWN).limits == ()


def test_without_one_the_template_writes_its_own() -> None:
    messages = [{"role": "user", "content": "open the door"}]
    assert template(WRITES, None).render(messages).startswith("<bos> system : no . <bos> user")
    assert "system" not in template(OWN, None).render(messages)


def test_it_stands_in_the_first_message_of_a_dialogue() -> None:
    dialogue = [{"role": role, "content": "door"} for role in ("user", "assistant", "user")]
    for text in (RAISES, OWN):
        assert template(text).render(dialogue).count(SYSTEM) == 1
    assert template(RAISES).render(dialogue).index(SYSTEM) < template(RAISES).render(dialogue).index("door")


def test_it_stands_beside_the_word_that_turns_thinking_off() -> None:
    slash, sentence = "{# /think /no_think #}" + OWN, "{# detailed thinking on detailed thinking off #}" + OWN
    assert f"system : {SYSTEM}\n\n/no_think <bos> user" in rendered(slash)
    assert f"system : {SYSTEM}\n\n/think <bos> user" in rendered(slash, thinking=True)
    assert f"system : detailed thinking off\n\n{SYSTEM} <bos> user" in rendered(sentence)
    assert f"system : detailed thinking on\n\n{SYSTEM} <bos> user" in rendered(sentence, thinking=True)


def test_it_stands_beside_a_variable_that_turns_thinking_off() -> None:
    block = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    assert rendered(OWN + block) == f"{TURN}<think>\n\n</think>\n\n"
    assert rendered(OWN + block, thinking=True) == TURN


def test_a_template_that_loses_it_with_thinking_off_is_refused() -> None:
    kept = "{% if m['role'] != 'system' or enable_thinking is not defined or enable_thinking %}"
    text = (
        DROPS.replace(NO_SYSTEM, kept)
        + "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    )
    with pytest.raises(LlmvaError, match=r"leaves the system prompt out or changes it: mend the template, or put"):
        template(text)


def test_a_template_that_asks_for_one(model_folder: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text(NEEDS)
    model, tokenizer = load_model(copy, device="cpu")  # before it is known whether there will be one
    with pytest.raises(
        LlmvaError, match=r"asks for a system turn \(System turn required\): give its text with --system"
    ):
        llmva.ChatModel.of(model, tokenizer)
    assert llmva.ChatModel.of(model, tokenizer, system=SYSTEM).row("door") == template(OWN).row("door")
    assert "--system" in command("chat", copy, "-p", "open the door").err.splitlines()[-1]
    assert command("chat", copy, "-p", "open the door", "--system", SYSTEM, "--max-new-tokens", 2).code == 0
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = NEEDS.replace("{% endfor %}", "<turn> {% endfor %}")
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<turn>")


# -- the setting -----------------------------------------------------------------------------------------------------


def test_the_setting_is_trimmed() -> None:
    assert make_settings(system=f" {SYSTEM}\n").system == SYSTEM
    assert make_settings(system=" ").system is None
    with pytest.raises(UsageError, match="The setting system=7 is not usable"):
        make_settings(system=7)


def test_a_value_of_the_option_is_a_text_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("\ufeffYou help.\nAlways.\n", encoding="utf-8")
    assert system_text(str(path)) == "You help.\nAlways."
    assert system_text(" You help. ") == "You help."
    assert system_text("x" * 5000) == "x" * 5000
    assert system_text("Read notes.txt") == "Read notes.txt"
    assert system_text("none") == ""


@pytest.mark.parametrize(
    ("given", "content", "says"),
    [
        ("", None, r"--system holds no text: write"),
        ("empty.txt", b" \n", r"The file 'empty.txt' of --system holds no text"),
        ("latin.txt", b"caf\xe9", r"'latin.txt' of --system cannot be read \(not UTF-8\)"),
        ("gone.txt", None, r"'gone.txt' of --system cannot be read \(No such file"),
        (".", None, r"'.' of --system cannot be read \(Is a directory"),
    ],
)
def test_values_that_are_no_system_prompt(
    given: str, content: bytes | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(given).write_bytes(content)
    with pytest.raises(UsageError, match=says) as caught:
        system_text(given)
    assert "\n" not in str(caught.value)


def test_an_excerpt_is_one_line() -> None:
    assert excerpt("a\n b") == "a b"
    assert excerpt("x" * 1300) == f"{'x' * 200} ... (1,300 characters)"


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a system prompt on a model whose template has system turns."""
    out = tmp_path_factory.mktemp("system") / "run"
    align(taught_folder, out, SYSTEM)
    return out


def align(folder: Path, out: Path, system: str | None) -> Any:
    from llmva.alignment import RunOptions

    model, tokenizer = load_model(folder)
    prompts = llmva.PromptSet.load([str(folder / "toxic.txt")], [str(folder / "benign.txt")])
    options = RunOptions(name=str(folder))
    return llmva.align(model, tokenizer, prompts, out=out, system=system, options=options, **RUN)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that is rendered and becomes token ids."""
    texts: list[str] = []
    encode = ChatTemplate.encode

    def keep(self: ChatTemplate, text: str) -> list[int]:
        texts.append(text)
        return encode(self, text)

    monkeypatch.setattr(ChatTemplate, "encode", keep)
    return texts


@pytest.mark.parametrize("text", [None, RAISES])
def test_every_prompt_of_a_run_has_it(text: str | None, encoded: list[str]) -> None:
    """Prompts of all splits, random messages, skills, and what is asked of the model before the run."""
    from llmva.evaluation.skills import Probe

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text or tokenizer.chat_template
    prompts = llmva.PromptSet.from_lists(
        [f"break the lock {i}" for i in range(9)], [f"paint the fence {i}" for i in range(9)]
    )
    probe = Probe("colour", "clean the lamp", contains=("paint",))
    result = llmva.align(taught_model(), tokenizer, prompts, skills=[probe], system=SYSTEM, **RUN)
    assert len(encoded) > 256  # random messages are as many
    assert any("clean the lamp" in one for one in encoded)
    assert [one for one in encoded if SYSTEM not in one] == []
    assert result.record["settings"]["system"] == SYSTEM
    assert any("takes no system turn" in limit for limit in result.record["limits"]) == (text is not None)


def test_comparisons_ask_with_it(encoded: list[str], tmp_path: Path) -> None:
    from llmva.experiments.compare import compare

    prompts = llmva.PromptSet.from_lists(
        [f"break the lock {i}" for i in range(9)], [f"paint the fence {i}" for i in range(9)]
    )
    how: dict[str, Any] = {"methods": ["none", "vectorsteer"], "seeds": [1], "tuned": False, "curves": False}
    record = compare(taught_model(), tiny_tokenizer(), prompts, out=tmp_path, system=SYSTEM, **how, **RUN)
    assert record["settings"]["system"] == SYSTEM
    assert [one for one in encoded if SYSTEM not in one] == []
    with pytest.raises(UsageError, match="was measured with settings"):
        compare(taught_model(), tiny_tokenizer(), prompts, out=tmp_path, **how, **RUN)


@pytest.mark.parametrize("other", [None, "no ."])
def test_another_system_prompt_is_another_run(other: str | None, finished: Path, taught_folder: Path) -> None:
    new = "None" if other is None else f"'{other}'"
    with pytest.raises(UsageError, match=f"a run with the setting system '{SYSTEM}', and this one has {new}: pass"):
        align(taught_folder, finished, other)
    assert align(taught_folder, finished, SYSTEM).record["settings"]["system"] == SYSTEM


def test_an_extension_keeps_it(finished: Path, taught_folder: Path) -> None:
    from llmva.prompts.types import Prompt

    new = [Prompt(f"please break the song for me {i}", False, "new") for i in range(9)]
    model, tokenizer = load_model(taught_folder)
    with pytest.raises(UsageError, match="An extension keeps the system prompt of the run"):
        llmva.extend(model, tokenizer, finished, new, system="no .")


def test_report_and_card_show_it(finished: Path) -> None:
    from llmva.report import write_report

    assert SYSTEM in write_report(finished).read_text()
    plan = make_plan(finished, iteration=1)
    text = card(plan, "lora")
    assert f"fitted with this system prompt, so serve the model with it:\n\n    {SYSTEM}\n" in text
    assert f"| setting system | `{SYSTEM}` |" in text


def test_a_card_shows_its_beginning_without_this_machine(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    long = f"You answer and/or ask; see {Path.home()}/notes and https://build.corp.example/x. " + "Be kind. " * 60
    record["settings"]["system"] = long
    (run / "run.json").write_text(json.dumps(record))
    text = card(make_plan(run, iteration=1), "edit")
    assert "    You answer and/or ask; see notes and https://HOST/x. Be kind." in text
    assert str(Path.home()) not in text
    assert "corp" not in text
    assert "characters)" in text
    push(make_plan(run, iteration=1), "me/it", dry_run=True)


def test_a_command_line_on_a_card_names_no_folder_of_it() -> None:
    assert without_paths("llmva align m --system notes/private/system") == "llmva align m --system system"
    same = "llmva align m --system 'Answer and/or ask.'"
    assert without_paths(same) == same


def test_verify_asks_with_it(finished: Path, taught_folder: Path, encoded: list[str]) -> None:
    edit = llmva.Edit.load(finished)
    if edit.best == 0:
        pytest.skip("the run kept the untouched model")
    verify(str(taught_folder), [finished])
    assert [one for one in encoded if SYSTEM not in one and "hello" not in one] == []  # a tokenizer is tried with hello


# -- commands ----------------------------------------------------------------------------------------------------------


def test_commands_take_it(taught_folder: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    """From a file into the run, from there into evaluate and chat, unless they are told otherwise."""
    (tmp_path / "system.txt").write_text(f"{SYSTEM}\n")
    lists = ["--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt"]
    short = ["--iterations", 1, "--per-source", 16, "--max-new-tokens", 6]
    run = tmp_path / "run"
    aligned = ["align", taught_folder, *lists, *short, "--out", run]
    said = command(*aligned, "--system", tmp_path / "system.txt", "-q")
    assert said.code == 0, said.err
    assert json.loads((run / "run.json").read_text())["settings"]["system"] == SYSTEM
    said = command(*aligned, "-q")
    assert said.code == 2
    assert f"the setting system '{SYSTEM}', and this one has None: pass --restart" in said.err

    asked = ["evaluate", taught_folder, "--edit", run, "--iteration", 1, "--max-new-tokens", 4, "--json"]
    said = command(*asked)
    assert json.loads(said.out)["system"] == SYSTEM, said.err
    assert f"the system prompt is that of the edit's run, unless --system says otherwise: {SYSTEM}" in said.err
    said = command(*asked, "--system", "none")
    record = json.loads(said.out)
    assert record["system"] is None
    assert any("Not as in the edit's run: the system prompt." in limit for limit in record["limits"])
    said = command("evaluate", taught_folder, *lists, "--max-new-tokens", 4, "--json", "--system", SYSTEM)
    assert json.loads(said.out)["system"] == SYSTEM

    said = command("chat", taught_folder, "--edit", run, "--iteration", 1, "-p", "open the door", "--json")
    assert json.loads(said.out)["system"] == SYSTEM
    assert "the system prompt is that of the edit's run" in said.err
    said = command("chat", taught_folder, "-p", "open the door", "--json", "--system", "")
    assert said.code == 2
    assert "--system holds no text" in said.err


def test_an_unknown_model_costs_nothing_where_the_file_is_gone(command: Callable[..., Said]) -> None:
    said = command("align", "nowhere", "--system", "gone.txt")
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "gone.txt" in said.err


def test_the_plain_model_takes_one_from_python() -> None:
    chat = llmva.ChatModel.of(tiny_model(), tiny_tokenizer(), system=SYSTEM)
    assert tiny_tokenizer().decode(chat.row("open the door")) == TURN.replace("system", "<unk>")
