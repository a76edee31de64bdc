"""How a chat template turns thinking on and off: by which variable and value, or by which word in a system turn.

Templates agree on no name. So the variables that a template reads but never sets are tried, and what it renders with
them tells which value is which. Where that shows nothing, the name of the variable and the values that it is compared
with do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmva.models.chat.marks import THINKS

NEVER = frozenset(  # what templates read that is no switch, and is not to be tried
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception", "range",
     "namespace", "dict", "strftime_now", "bos_token", "eos_token", "pad_token", "unk_token")
)  # fmt: skip
OFF = ("off", "none", "no", "disabled", "disable", "false", "no_think", "nothink", "non_thinking", "non-thinking",
       "never", "chat", "instruct", "0")  # fmt: skip
ON = ("on", "think", "thinking", "enabled", "enable", "true", "yes", "always", "reasoning")
EFFORTS = ("medium", "high", "max", "full", "auto", "low")  # to a model that may also make none
INVERTED = re.compile(r"^(?:no|not|non|disable|skip|without|hide|suppress|omit|exclude)(?:_|(?=think|reason))", re.I)
AMOUNT = re.compile(r"budget|tokens|length|limit|effort|level", re.I)
OF_HISTORY = re.compile(r"history|past|previous|keep|preserve|clear|strip|truncate|content", re.I)  # earlier thoughts
WORDS = (("/think", "/no_think"), ("/think", "/nothink"), ("detailed thinking on", "detailed thinking off"))
# how much of a thought a generation prompt holds, by `State`: none that it asks for, unknown, one that it opens
CLOSED, SILENT, OPENED = 0, 1, 2
State = Callable[[Mapping[str, Any]], int | None]  # of the generation prompt under these variables; None if it raises


@dataclass(frozen=True)
class Switch:
    """What is given to the template: variables, and a system turn where it listens to one."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None


def find_switches(template: str, state: State) -> tuple[Switch, Switch]:
    """What turns thinking on, and what turns it off; both empty where the template knows no such thing."""
    on: dict[str, Any] = {}
    off: dict[str, Any] = {}
    for name, values in read_variables(template).items():
        thinks = THINKS.search(name) is not None
        chosen = _of_words(name, values, state) if thinks else {}
        if chosen is None or not thinks:
            chosen = _of_truth(name, thinks, state)
        for side, value in chosen.items():
            (on if side else off)[name] = value
    if state(on) is None:
        on = {}
    if state(off) is None:
        off = {}
    if not on and not off:
        for word, no_word in WORDS:
            if no_word in template:
                return Switch(system=word if word in template.replace(no_word, "") else None), Switch(system=no_word)
    return Switch(on), Switch(off)


def read_variables(template: str) -> dict[str, set[str | int]]:
    """The variables that a template takes from outside, each with the strings and numbers it is compared with."""
    from jinja2 import Environment, TemplateError, meta, nodes

    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)  # a tag of transformers'
    environment = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
    try:
        tree = environment.parse(plain)
        names = meta.find_undeclared_variables(environment.parse(plain))  # which changes the tree
    except TemplateError:
        return {}
    values: dict[str, set[str | int]] = {
        name: set() for name in sorted(names) if name not in NEVER and not OF_HISTORY.search(name)
    }
    other_names: dict[str, str] = {}  # {% set mode = thinking_mode or "on" %} makes mode another name
    for assigned in tree.find_all(nodes.Assign):
        for read in assigned.node.find_all(nodes.Name):
            if isinstance(assigned.target, nodes.Name) and read.name in values:
                other_names[assigned.target.name] = read.name
        if isinstance(assigned.node, nodes.Name) and isinstance(assigned.target, nodes.Name):
            other_names[assigned.target.name] = assigned.node.name
    for comparison in tree.find_all(nodes.Compare):
        constants = {c.value for c in comparison.find_all(nodes.Const) if type(c.value) in (str, int)}
        for read in comparison.find_all(nodes.Name):
            name = other_names.get(read.name, read.name)
            if name in values:
                values[name] |= constants
    return values


def _of_words(name: str, values: set[str | int], state: State) -> dict[bool, Any] | None:
    """The values, by side, of a variable that takes words or amounts; None for one that is true or false."""
    words = {value.lower(): value for value in sorted(str(v) for v in values if isinstance(v, str))}
    if not words:
        amount = AMOUNT.search(name) is not None or any(isinstance(value, int) for value in values)
        # an amount of zero may be anything to a template that does not compare it: only what renders is taken
        return ({False: 0} if 0 in values or "budget" in name.lower() else {}) if amount else None
    chosen = {}
    # of efforts alone the model's own default is best
    for side, order in ((True, (*ON, *EFFORTS) if words.keys() & set(OFF) else ON), (False, OFF)):
        value = next((words[word] for word in order if word in words), None)
        if value is not None and state({name: value}) is not None:
            chosen[side] = value
    return chosen


def _of_truth(name: str, thinks: bool, state: State) -> dict[bool, Any]:
    """The values, by side, of a variable that is true or false, read off what the template renders with each."""
    true, false = state({name: True}), state({name: False})
    if true is None or false is None:
        return {}
    if true != false:
        return {True: true > false, False: false > true}
    if not thinks:
        return {}
    inverted = INVERTED.search(name) is not None
    return {True: not inverted, False: inverted}
