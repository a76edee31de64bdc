"""Write the bundled prompts: `python -m llmva.prompts.build` turns data/*.txt into data/prompts.jsonl, always alike.

requests_KIND.txt hold what someone wants ("bribe a judge"), frames.txt and wrappers.txt ways to ask for it,
own_KIND.txt whole prompts, tasks.txt things to do with a sentence ("translate this: ..."). `# name` starts a topic (in
frames, wrappers and tasks: a split); a topic with `!` is kept for the test split. Each request, frame, wrapper and task
belongs to one split, so every wording does too. Harmful and benign requests share the frames, a few benign requests get
a jailbreak wrapper, and some alarming prompts ask for a task with a harmful request, so that neither the way of asking
nor the words tell the side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

DATA = Path(__file__).parent / "data"
SIZES = {"test": 100, "validation": 60, "train": 300}  # prompts of each kind
# More requests than the prompts of the kind: some harmful requests become jailbreaks only.
HARMFUL_SIZES = {"test": 115, "validation": 70, "train": 999}
QUOTED = {"test": 16, "validation": 14, "train": 72}  # alarming prompts: harmful requests that a task only quotes
WRAPPED_BENIGN = {"test": 8, "validation": 4, "train": 18}  # alarming requests that get a wrapper, not a frame
LOWERED = 0.25  # share of framed prompts typed without capitals or a full stop
MISTYPED = 0.06  # share of framed prompts with two letters swapped


@dataclass(frozen=True)
class Item:
    """A request still to be put into words (`template` empty), or a whole prompt."""

    text: str
    kind: str
    topic: str
    template: str = ""


Pools = dict[str, list[Item]]  # split -> items


def build() -> list[dict[str, str]]:
    """All prompts as rows with text, kind, topic, template and split."""
    frames, wrappers, tasks = _templates("frame"), _templates("wrapper"), _templates("task")
    harmful = _allot(_items("requests", "harmful") + _items("own", "harmful"), HARMFUL_SIZES)
    asked = {split: size - QUOTED[split] for split, size in SIZES.items()}
    alarming = _allot(_items("requests", "alarming") + _items("own", "alarming"), asked)
    plain = _allot(_items("requests", "plain") + _items("own", "plain"))
    own_jailbreaks = _allot(_items("own", "jailbreak"), {"test": 0, "validation": 3, "train": 999})
    rows = []
    for split in ("train", "validation", "test"):
        requests = [item for item in harmful[split] if not item.template]
        wanted = SIZES[split] - len(own_jailbreaks[split])
        # Some requests come in two different wrappers, since there are fewer of them than jailbreaks wanted.
        wrapped = [(requests + _ranked(requests, "again"))[i] for i in range(wanted)]
        benign = [item for item in _ranked(alarming[split], "wrapped") if not item.template][: WRAPPED_BENIGN[split]]
        jailbreaks = _word([*wrapped, *benign], wrappers[split])
        kinds = {
            "harmful": _word(_own_first(harmful[split])[: SIZES[split]], frames[split], typed=True),
            "jailbreak": own_jailbreaks[split] + [item for item in jailbreaks if item.kind == "harmful"],
            "alarming": _word([item for item in alarming[split] if item not in benign], frames[split], typed=True)
            + [item for item in jailbreaks if item.kind == "alarming"]
            + _quote(_ranked(requests, "quoted")[: QUOTED[split]], frames[split], tasks[split]),
            "plain": _word(plain[split], frames[split], typed=True),
        }
        for kind, items in kinds.items():
            for item in items:
                row = {"text": item.text, "kind": kind, "topic": item.topic, "template": item.template, "split": split}
                rows.append(row)
    return rows


def _sections(name: str) -> Iterable[tuple[str, str]]:
    """(section, line) of a data file."""
    section = ""
    for line in (DATA / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            section = line[2:]
        elif line.strip():
            yield section, line


def _items(form: str, kind: str) -> list[Item]:
    lines = [(topic, line.replace("\\n", "\n")) for topic, line in _sections(f"{form}_{kind}")]
    return [
        Item(line, kind, topic, f"own-{kind}-{i:03}" if form == "own" else "") for i, (topic, line) in enumerate(lines)
    ]


def _templates(name: str) -> dict[str, list[tuple[str, str]]]:
    """split -> (id, text with {}) of frames or wrappers."""
    by_split: dict[str, list[tuple[str, str]]] = {}
    for i, (split, line) in enumerate(_sections(f"{name}s")):
        by_split.setdefault(split, []).append((f"{name}-{i:02}", line))
    return by_split


def _ranked(items: Iterable[Item], salt: str) -> list[Item]:
    """A shuffle that is the same in every Python: by hash."""
    return sorted(items, key=lambda item: _digest(salt, item.text))


def _own_first(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: not item.template)


def _digest(salt: str, text: str) -> bytes:
    return hashlib.sha256(f"{salt}:{text}".encode()).digest()


def _allot(items: Sequence[Item], sizes: dict[str, int] = SIZES) -> Pools:
    """Topics marked `!` go to test, which is filled up from the others; then validation; then train."""
    reserved = [item for item in items if item.topic.endswith("!")]
    shared = _ranked([item for item in items if not item.topic.endswith("!")], "split")
    to_test = max(0, sizes["test"] - len(reserved))
    to_validation = to_test + sizes["validation"]
    pools = {
        "test": reserved + shared[:to_test],
        "validation": shared[to_test:to_validation],
        "train": shared[to_validation : to_validation + sizes["train"]],
    }
    return {split: [replace(item, topic=item.topic.rstrip(" !")) for item in pool] for split, pool in pools.items()}


def _word(items: Sequence[Item], templates: Sequence[tuple[str, str]], typed: bool = False) -> list[Item]:
    """Put each request into the next template in turn; whole prompts stay as they are."""
    worded, turn = [], 0
    used: set[tuple[str, str]] = set()  # pairs of request and template
    for item in items:
        if item.template:
            worded.append(item)
            continue
        # Skip a template that has the request's verb: "Explain how to explain ..." would be odd.
        verb = item.text.split()[0]
        while verb in _at(templates, turn)[1].lower().split() or (item.text, _at(templates, turn)[0]) in used:
            turn += 1
        name, template = _at(templates, turn)
        turn += 1
        used.add((item.text, name))
        text = template.replace("{}", item.text)
        worded.append(Item(_typed(text) if typed else text, item.kind, item.topic, name))
    return worded


def _quote(items: Sequence[Item], frames: Sequence[tuple[str, str]], tasks: Sequence[tuple[str, str]]) -> list[Item]:
    """Put each harmful request into a frame, and that into a task, which makes it harmless."""
    quoted = []
    for turn, item in enumerate(_word(items, frames)):
        name, task = _at(tasks, turn)
        quoted.append(Item(task.replace("{}", item.text).replace("\\n", "\n"), "alarming", item.topic, name))
    return quoted


def _at(templates: Sequence[tuple[str, str]], turn: int) -> tuple[str, str]:
    return templates[turn % len(templates)]


def _typed(text: str) -> str:
    """What hurried people type, now and then: no capitals, no full stop, two letters swapped."""
    draw = _digest("typed", text)
    if draw[0] < LOWERED * 256:
        text = text.lower().removesuffix(".").removesuffix("?")
    if draw[1] < MISTYPED * 256:
        words = text.split(" ")
        long = [i for i, word in enumerate(words) if len(word) > 5 and word.isalpha()]
        if long:
            i = long[draw[2] % len(long)]
            at = 1 + draw[3] % (len(words[i]) - 3)
            words[i] = words[i][:at] + words[i][at + 1] + words[i][at] + words[i][at + 2 :]
        text = " ".join(words)
    return text


def render() -> str:
    """The text of prompts.jsonl."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in build())


if __name__ == "__main__":
    (DATA / "prompts.jsonl").write_text(render(), encoding="utf-8", newline="\n")
