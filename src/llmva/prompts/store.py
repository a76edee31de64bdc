"""Prompt sets as JSON lines: the bundled one, and the form that runs store and model folders ship."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.sources.columns import short
from llmva.prompts.sources.conversations import is_list, read_conversation
from llmva.prompts.sources.tables import json_lines
from llmva.prompts.split import check_sides, normalise
from llmva.prompts.types import READ, Dialogue, Message, Prompt, Splits, as_splits, text_of

SPLITS = ("train", "validation", "test")
BENIGN_KINDS = {"harmful": False, "jailbreak": False, "alarming": True, "plain": True}


def read_bundled() -> Splits:
    """The set that ships with the package (docs/prompts.md)."""
    by_split: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
    text = (resources.files("llmva.prompts") / "data" / "prompts.jsonl").read_text(encoding="utf-8")
    for line in text.split("\n")[:-1]:
        row = json.loads(line)
        by_split[row["split"]].append(Prompt(row["text"], BENIGN_KINDS[row["kind"]], row["kind"]))
    return as_splits(by_split)


def write_jsonl(splits: Splits, path: Path) -> None:
    """Write one object a line with id, text, benign, source and split, through a temporary file.

    A conversation has `messages` too, as templates take them; a prompt under an attack those and the attack's name.
    """
    from llmva.files import write_lines  # here, since it imports torch

    rows = (
        {**prompt_row(p), "split": split} | ({"gold": list(p.gold)} if p.gold else {})
        for split, prompts in splits.parts()
        for p in prompts
    )
    write_lines(path, rows)


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as JSON has it, without its split and its gold answers."""
    row: dict[str, Any] = {"id": prompt.id, "text": prompt.text, "benign": prompt.benign, "source": prompt.source}
    if prompt.messages is not None:
        row["messages"] = [message._asdict() for message in prompt.messages]
    return row | ({"attack": prompt.attack} if prompt.attack else {})


def read_jsonl(path: Path) -> Splits:
    """Read what `write_jsonl` wrote. Raises UsageError naming the line that is not as it writes them."""
    by_split: dict[str, list[Prompt]] = {split: [] for split in (*SPLITS, READ)}
    split_of: dict[str, str] = {}  # normalised text -> split
    for number, row in json_lines(path):
        prompt, split = _read_row(row, f"line {number} of {path}")
        if split_of.setdefault(normalise(prompt.text), split) != split:
            raise UsageError(f"line {number} of {path} repeats a prompt of another split: remove one of the two.")
        by_split[split].append(prompt)
    check_sides([prompt for prompts in by_split.values() for prompt in prompts])
    return as_splits(by_split)


def _read_messages(row: dict[str, Any], where: str) -> Dialogue | None:
    """The messages of a row, None where it has none.

    Raises UsageError where its text is not theirs, unless an attack asks the text otherwise.
    """
    given, attack = row.get("messages"), row.get("attack", "")
    if not isinstance(attack, str) or (attack and not given):
        raise UsageError(f"{where} has an attack without the messages in which it asks: leave the attack out.")
    if given is None:
        return None
    asked = read_conversation(given, where, "mend or remove it") if is_list(given) else ""
    if attack and asked:
        return (Message("user", asked),) if isinstance(asked, str) else asked
    if isinstance(asked, str) or text_of(asked) != row["text"]:
        raise UsageError(f"{where} has messages that are not those of its text: make the text their transcript.")
    return asked


def _read_row(row: Any, where: str) -> tuple[Prompt, str]:
    prompt = read_prompt(row, where)
    split = row.get("split")
    if split not in (*SPLITS, READ):
        raise UsageError(f"{where} has the split {short(split)}: make it train, validation or test.")
    return prompt, str(split)


def read_prompt(row: Any, where: str, *, split: bool = True) -> Prompt:
    """The prompt of a row that `prompt_row` made. Raises UsageError, which names `where`, for any other.

    A row needs the field `split` too, unless `split` is False.
    """
    types = {"text": str, "benign": bool, "source": str} | ({"split": str} if split else {})
    if not isinstance(row, dict) or any(not isinstance(row.get(key), type_) for key, type_ in types.items()):
        needed = "text, benign (true or false), source and split" if split else "text, benign and source"
        raise UsageError(f"{where} needs the fields {needed}: add what is missing.")
    try:
        gold = _gold(row.get("gold", []), where)
        messages = _read_messages(row, where)
        attack = row.get("attack", "")
        prompt = Prompt(row["text"], row["benign"], row["source"], messages, gold=gold, attack=attack)
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} holds half a surrogate pair, which is no text: mend or remove it.") from error
    if not prompt.text.strip():
        raise UsageError(f"{where} is an empty prompt: mend or remove it.")
    if row.get("id", prompt.id) != prompt.id:
        raise UsageError(f"{where} has an id that is not its text's: leave the id out after changing a text.")
    return prompt


def _gold(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
        raise UsageError(f"{where} has gold answers that are no list of texts: mend or remove the field gold.")
    return tuple(value)
