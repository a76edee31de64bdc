"""Prompts that are conversations: what templates make of them, what the model reads, what files may hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

import llmva
from conftest import Said, chat_model, taught_model, tiny_model, tiny_tokenizer
from llmva.errors import LlmvaError, UsageError
from llmva.models.chat import ChatTemplate
from llmva.models.generate import answer_prompts
from llmva.models.thinking import Thinking, answer_after_thoughts
from llmva.prompts.contamination import FitIndex
from llmva.prompts.load import read_prompts
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Message, Prompt
from llmva.runs.limits import notes_on_prompts

OWN = (
    "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turn') }}{% endif %}" + OWN
ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + OWN
LAST_ONLY = "<bos> user : {{ messages[-1]['content'] }} assistant :"
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + OWN
)
MARKED = "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"
HEADED = MARKED + "{% if add_generation_prompt %}<assistant>\n{% endif %}"
WHOLE = (
    Message("system", "please help"),
    Message("user", "open the door"),
    Message("assistant", "sure"),
    Message("user", "paint it"),
    Message("assistant", "here is how"),
)


def template(text: str | None, system: str | None = None) -> ChatTemplate:
    tokenizer = tiny_tokenizer(template=False)
    tokenizer.chat_template = text
    return ChatTemplate.of(tokenizer, system)


def rendered(text: str | None, messages: tuple[Message, ...] = WHOLE, system: str | None = None) -> str:
    return template(text, system).render([message._asdict() for message in messages])


# -- rendering ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (OWN, "<bos> system : please help <bos> user : open the door <bos> assistant : sure <bos> user : paint it "
            "assistant : here is how"),
        (HEADED, "<system>\nplease help\n<user>\nopen the door\n<assistant>\nsure\n<user>\npaint it\n<assistant>\n"
            "here is how"),
        (NO_SYSTEM, "<bos> user : please help\n\nopen the door <bos> assistant : sure <bos> user : paint it "
            "assistant : here is how"),
        (ALTERNATING, "<bos> user : please help\n\nopen the door <bos> assistant : sure <bos> user : paint it "
            "assistant : here is how"),
        (None, "System: please help\n\nUser: open the door\n\nAssistant: sure\n\nUser: paint it\n\n"
            "Assistant: here is how"),
    ],
)  # fmt: skip
def test_a_template_renders_all_of_it_up_to_where_the_model_goes_on(text: str | None, wanted: str) -> None:
    assert rendered(text) == wanted


def test_its_own_system_message_takes_the_place_of_the_system_prompt() -> None:
    assert "please help" in rendered(OWN, system="no .")
    assert "no ." not in rendered(OWN, system="no .")
    assert "no ." in rendered(OWN, WHOLE[1:], system="no .")
    assert "no ." not in rendered(NO_SYSTEM, system="no .")


def test_a_template_that_cannot_says_so_in_a_sentence() -> None:
    with pytest.raises(LlmvaError, match=r"conversation of 3 turns \(one turn only\): mend the template, or give"):
        rendered(ONE_TURN)
    with pytest.raises(LlmvaError, match=r"leaves out turn 1 of a conversation \('open the door'\)"):
        rendered(LAST_ONLY, WHOLE[1:])


def test_a_template_without_a_system_turn_is_told() -> None:
    prompt = Prompt.of(WHOLE, benign=True, source="s")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    (said,) = notes_on_prompts(chat_model(tiny_model(), tokenizer), [prompt])
    assert "takes no system turn (No system turn)" in said
    assert notes_on_prompts(chat_model(tiny_model(), tiny_tokenizer()), [prompt]) == []
    chat = llmva.ChatModel.of(tiny_model(), tiny_tokenizer(), system="no .")
    (said,) = notes_on_prompts(chat, [prompt, Prompt("a lamp", benign=True, source="s")])
    assert said.startswith("1 prompts have a system message of their own")


def test_thoughts_cannot_come_before_an_answer_that_has_begun() -> None:
    with pytest.raises(UsageError, match=r"'here is how'.*--thinking off"):
        template(OWN).render([message._asdict() for message in WHOLE], thinking=True)
    chat = chat_model(tiny_model(), tiny_tokenizer())
    with pytest.raises(UsageError, match="no beginning of an answer"):
        answer_after_thoughts(chat, [WHOLE], max_new_tokens=4, thinking=Thinking(anyway=True))


# -- what the model reads ----------------------------------------------------------------------------------------


def test_captures_are_read_at_the_last_token_before_the_model_goes_on() -> None:
    tokenizer, model = tiny_tokenizer(), taught_model()
    chat = chat_model(model, tokenizer)
    seen = answer_prompts(chat, [WHOLE, "open the door"], max_new_tokens=6)
    ids = torch.tensor([tokenizer(rendered(OWN), add_special_tokens=False)["input_ids"]])
    assert chat.row(WHOLE) == ids[0].tolist()
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist())[-3:] == ["here", "is", "how"]
    kept: list[Any] = []
    handle = chat.decoder.sublayers[0].output.register_forward_hook(lambda m, a, o: kept.append(o))
    with torch.inference_mode():
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    handle.remove()
    torch.testing.assert_close(seen.outputs[0, 0], kept[0][0, -1])
    assert seen.answers[0] == tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_one_message_is_as_ever() -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())
    assert chat.row((Message("user", "open the door"),)) == chat.row("open the door")


def test_a_beginning_longer_than_the_context_is_refused() -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())
    long = (Message("user", "open the door"), Message("assistant", "sure " * 300))
    with pytest.raises(UsageError, match=r"beginning 'User: open the door.* is 3\d\d tokens long.*shorten or remove"):
        answer_prompts(chat, [long], max_new_tokens=4)


# -- prompts -----------------------------------------------------------------------------------------------------


def test_the_text_is_the_whole_conversation() -> None:
    prompt = Prompt.of(WHOLE, benign=False, source="s")
    assert prompt.text == rendered(None)
    assert prompt.asked == prompt.messages == WHOLE
    assert Prompt.of("a lamp", benign=True, source="s") == Prompt("a lamp", benign=True, source="s")
    other = Prompt.of((*WHOLE[:-1], Message("assistant", "no")), benign=False, source="s")
    assert other.id != prompt.id


# -- files -------------------------------------------------------------------------------------------------------


def turns(*given: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in given]


def shares(*given: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"from": who, "value": value} for who, value in given]


TWO = (Message("user", "open the door"), Message("assistant", "sure"), Message("user", "paint it"))
FORMS = {
    "messages": ({"messages": turns(*TWO), "id": 7}, TWO, ""),
    "ShareGPT": ({"conversations": shares(("human", "open the door"), ("gpt", "sure"), ("human", "paint it"))},
        TWO, ""),
    "other names of roles": ({"conversation": turns(("Human", TWO[0][1]), ("model", "sure"), ("USER", "paint it"))},
        TWO, ""),
    "a column of turns": ({"turns": turns(*TWO), "text_length": 40}, TWO, ""),
    "the instructions of a developer": ({"messages": turns(("developer", "please help"), *TWO)},
        (WHOLE[0], *TWO), ""),
    "a beginning of the answer": ({"messages": turns(*WHOLE)}, WHOLE, "beginnings of the answer.*goes on: 1"),
    "an empty system message": ({"messages": turns(("system", " "), *TWO)}, TWO, "left out empty system messages: 1"),
    "no system message": ({"messages": turns(("system", None), ("user", "hi"))}, "hi", "empty system messages: 1"),
    "parts": ({"messages": turns(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))},
        "a\nb", ""),
    "keys without a value": ({"messages": [{**one, "tool_calls": None} for one in turns(*TWO)]}, TWO, ""),
    "one text in a list": ({"turns": ["open the door"]}, "open the door", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_forms_of_conversations(name: str, ending: str, tmp_path: Path) -> None:
    row, asked, says = FORMS[name]
    path = tmp_path / f"p.{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    reading = read_prompts([str(path)])
    assert [prompt.asked for prompt in reading.prompts] == [asked]
    assert re.search(says, " ".join(reading.warnings)) if says else not reading.warnings


MALFORMED = {
    "two of one role": (turns(("user", "a"), ("user", "b")), "message 2 of line 2 .* the user's where the assistant's"),
    "the assistant first": (turns(("assistant", "a"), ("user", "b")), "message 1 of .* assistant's where the user's"),
    "the assistant after the system": (turns(("system", "s"), ("assistant", "a")), "message 2 of .* assistant's where"),
    "a later system message": (turns(("user", "a"), ("system", "s"), ("user", "b")),
        "a system message after its first"),
    "only a system message": (turns(("system", "s")), "line 2 of .* has no user turn"),
    "no messages": ([], "line 2 of .* a conversation without messages"),
    "empty content": (turns(("user", "a"), ("assistant", "  ")), "message 2 of line 2 .* is empty"),
    "null content": (turns(("user", None)), "message 1 of line 2 .* has no text"),
    "no content": ([{"role": "user"}], "message 1 of line 2 .* has no text"),
    "a number": (turns(("user", 7)), "message 1 of line 2 .* is not text but int"),
    "only a picture": (turns(("user", [{"type": "image"}])), "message 1 of line 2 .* has no text"),
    "an unknown role": (turns(("user", "a"), ("narrator", "b")), "message 2 of .* has the role 'narrator': make it"),
    "a role that is no text": (turns((["user"], "a")), "message 1 of .* has the role"),
    "no role": (turns((None, "a")), "message 1 of line 2 .* does not say whose it is"),
    "a tool's turn": (turns(("user", "a"), ("tool", "b")), "message 2 of .* about the call of a tool"),
    "a call of a tool": ([*turns(("user", "a")), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
        "message 2 of .* about the call of a tool"),
    "a list in a list": ([turns(("user", "a"))], "line 2 of .* holds a list in a list"),
    "texts without speakers": (["a", "b"], "line 2 of .* holds 2 texts that do not say who speaks"),
    "a text among messages": ([*turns(("user", "a")), "b"], "message 2 of .* is not an object but str"),
    "too long": (turns(("user", "a" * 15_000), ("assistant", "b" * 9_000)), "line 2 of .* 24,.* characters long"),
    "half a letter": (turns(("user", "\ud83d")), "half a surrogate pair"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_conversations_are_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    cell, says = MALFORMED[name]
    rows = [{"messages": turns(("user", "hi"))}, {"messages": cell}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UsageError, match=says) as caught:
        read_prompts([f"{tmp_path}/p.jsonl"])
    assert "p.jsonl" in str(caught.value)
    assert ": " in str(caught.value)
    assert str(caught.value).count(". ") == 0


def test_the_last_of_several_columns_is_told(tmp_path: Path) -> None:
    row = {"conversations": shares(("human", "b")), "messages": turns(("user", "a"))}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    reading = read_prompts([f"{tmp_path}/p.jsonl"])
    assert [prompt.text for prompt in reading.prompts] == ["a"]
    assert "took 'messages' for the prompts, not 'conversations'" in reading.warnings[0]


def dialogues(word: str, n: int = 12) -> list[list[dict[str, Any]]]:
    return [turns(("user", f"{word} {i}"), ("assistant", "sure"), ("user", "go on with it")) for i in range(n)]


def test_duplicates_and_contamination_work_on_the_whole() -> None:
    prompts = PromptSet.from_lists({"t": [*dialogues("door"), *dialogues("DOOR", 2)]}, {"b": dialogues("lamp")})
    assert "t: 2 left out, repeats of an earlier prompt." in prompts.warnings
    assert sum(prompts.counts()["t"].values()) == 12  # all end with the same message
    fit = FitIndex(prompts.train)
    assert prompts.train[0].text in fit
    assert "go on with it" not in fit


def test_a_set_of_conversations_comes_back_from_its_file(tmp_path: Path) -> None:
    prompts = PromptSet.from_lists({"t": [*dialogues("door"), "a lamp"]}, {"b": dialogues("lamp")})
    prompts.to_jsonl(tmp_path / "prompts.jsonl")
    again = PromptSet.from_jsonl(tmp_path / "prompts.jsonl")
    assert again == prompts
    assert again.hashes() == prompts.hashes()
    assert any(prompt.messages for prompt in again.train)
    text = (tmp_path / "prompts.jsonl").read_text(encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(text.replace('"content": "sure"', '"content": "no"', 1), encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 1 of .* has messages that are not those of its text"):
        PromptSet.from_jsonl(tmp_path / "prompts.jsonl")


def test_a_run_on_conversations(taught_folder: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    """Fit, resume-proof storage and evaluation, with earlier turns, beginnings of answers and plain prompts mixed."""
    for side in ("toxic", "benign"):
        lines = (taught_folder / f"{side}.txt").read_text(encoding="utf-8").splitlines()
        rows = [
            turns(("user", "open a door"), ("assistant", "sure"), ("user", text)) if i % 2 else turns(("user", text))
            for i, text in enumerate(lines)
        ]
        rows[3].append({"role": "assistant", "content": "sure here"})
        path = tmp_path / f"{side}.jsonl"
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    sides = ["--toxic", tmp_path / "toxic.jsonl", "--benign", tmp_path / "benign.jsonl"]
    how = ["--iterations", "1", "--max-new-tokens", "6", "--only", "--quiet"]
    said = command("align", taught_folder, *sides, *how, "--out", tmp_path / "run", "--json")
    assert said.code == 0, said.err
    said = command("evaluate", taught_folder, "--edit", tmp_path / "run", "--max-new-tokens", "6", "--json", "-q")
    assert said.code == 0, said.err
    record = json.loads(said.out)
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["test"]["before"] == run["test"]["before"]
    assert any("beginnings of the answer" in limit for limit in run["limits"])
