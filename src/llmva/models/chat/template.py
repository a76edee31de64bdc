"""The chat template of a model: which it is, what it makes of a user's message, and how it switches thinking.

It is looked for where models keep it: in the tokenizer, and in the files of the processor that multimodal models have.
What is not as it should be is told: `limits` are sentences for whoever reads a run's figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from llmva.errors import LlmvaError
from llmva.models.chat.dialogues import as_turns, check_shown, no_conversation, space_before, split_prefill
from llmva.models.chat.failures import first_line, panicked
from llmva.models.chat.marks import KNOWN, Marks, discover, spans
from llmva.models.chat.places import TOKENIZER_FILE, find_in_files, of_names
from llmva.models.chat.switches import CLOSED, OPENED, SILENT, Switch, find_switches
from llmva.models.chat.system import in_message_limit, shows, with_system

QUESTION, REPLY = "What colour is the sky at noon?", "It is blue, unless it rains."  # to see where a template puts them
CLOCK = re.compile(r"strftime_now\(\s*['\"]([^'\"]+)['\"]")  # with the form in which a template asks for the date
MAX_ADDED = 100_000  # characters of a template's own; lists of tools have some thousands
SYSTEM = "You are a helpful assistant."  # to see whether a template asks for a system turn
PLAIN_LIMIT = (
    "The model has no chat template, so it was asked in a plain dialogue (User: ... Assistant:): if it has a template, "
    "put it into the model's folder as chat_template.jinja."
)


class SystemTurnError(LlmvaError):
    """A template that cannot be used without a system prompt."""


@dataclass(frozen=True)
class ChatTemplate:
    """`text` is the Jinja source, None where there is none and a plain dialogue takes its place.

    `system` is the system prompt of every dialogue; None leaves the system turn to the template.
    """

    tokenizer: Any
    text: str | None
    source: str = "the tokenizer"  # where the text was found
    in_parts: bool = False  # contents are given as lists of parts, as processors' templates expect them
    marks: tuple[Marks, ...] = KNOWN  # of thoughts, that this model may use
    switches: tuple[Switch, Switch] = (Switch(), Switch())  # thinking on, and off
    opened: tuple[Marks | None, Marks | None] = (None, None)  # the thought that the template leaves open, likewise
    closes: bool = False  # the template ends with a closed thought where thinking is off, or it is closed for it
    notes: tuple[str, ...] = ()  # for the log
    limits: tuple[str, ...] = ()
    system: str | None = None
    system_in_message: bool = False  # where the template has no system turn: before the user's first message

    @classmethod
    def of(cls, tokenizer: Any, system: str | None = None) -> ChatTemplate:
        """Find and try the template.

        Args:
            system: the system prompt, without white space around it.

        Raises:
            LlmvaError: it cannot be rendered, or loses the message or the system prompt.
        """
        text, source, notes, limits = _find(tokenizer)
        added: dict[str, int] = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
        marks = discover(text or "", added, getattr(tokenizer, "response_template", None))
        plain = cls(tokenizer, text, source, marks=(*marks, *KNOWN), notes=notes, limits=limits)
        if text is None:
            return replace(plain, limits=(*limits, PLAIN_LIMIT), system=system)
        tried = replace(plain, in_parts=_takes_parts(plain)) if system is None else _with_place(plain, system)
        tried = replace(tried, switches=find_switches(text, tried._state))
        on, off = (tried._tail(switch) for switch in tried.switches)
        opened = tried._left_open(on), tried._left_open(off)
        closes = opened[1] is not None or any(one.close.search(off) for one in tried.marks)
        tried = replace(tried, opened=opened, closes=closes)
        _check_system(tried)
        return replace(tried, limits=(*tried.limits, *_faults(tried)))

    @classmethod
    def loaded(cls, tokenizer: Any, system: str | None = None) -> ChatTemplate:
        """As `of`, where the system prompt may not be known yet: a template that asks for one is tried with some."""
        try:
            return cls.of(tokenizer, system)
        except SystemTurnError:
            return cls.of(tokenizer, SYSTEM)

    def render(self, messages: Sequence[Mapping[str, str]], thinking: bool = False) -> str:
        """A dialogue with the generation prompt; thinking is off, where the template offers that, unless asked.

        A first message of the system takes the place of the system prompt. A last message of the assistant is the
        beginning of the answer, and what is rendered ends with it.

        Raises:
            UsageError: the model is to think, and the answer has begun.
            LlmvaError: the template cannot render the dialogue, or leaves a user's turn out.
        """
        if messages[0]["role"] == "system":
            return self.with_own_system(messages[0]["content"]).render(messages[1:], thinking)
        messages, prefill = split_prefill(messages, thinking)
        if self.text is None:
            messages = with_system(messages, self.system, None, in_message=False)
            turns = "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages)
            return f"{turns}Assistant:{f' {prefill}' if prefill else ''}"
        try:
            rendered = self._fill(messages, self.switches[0 if thinking else 1])
        except Exception as error:  # a template is a program of the model's: it may fail in any way
            if len(messages) < 2:
                raise
            raise no_conversation(_name(self), messages, first_line(error)) from error
        given = [self.system or "", *(message["content"] for message in messages)]
        limit = MAX_ADDED + 10 * sum(map(len, given))
        if len(rendered) > limit:
            raise LlmvaError(
                f"The chat template makes {len(rendered):,} characters of {messages[-1]['content'][:40]!r}: mend it, "
                "or remove it for a plain dialogue."
            )
        opened = self.opened[1]
        if not thinking and opened is not None:  # some templates always open the block: close it at once
            rendered = f"{rendered.rstrip()}\n\n{opened.closing}{opened.after}"
        if len(messages) > 1:
            check_shown(rendered, messages)
        return f"{rendered}{self._space(rendered)}{prefill}" if prefill else rendered

    def with_own_system(self, system: str) -> ChatTemplate:
        """The template for a conversation that brings a system message of its own."""
        return replace(self, system=system) if self.text is None else _with_place(self, system)

    def encode(self, rendered: str) -> list[int]:
        """Token ids. A template writes its own special tokens; the plain dialogue needs the tokenizer's.

        Raises LlmvaError where the tokenizer fails, as one without a token for unknown letters does.
        """
        # some tokenizers are set up to split special tokens, which a template's are not meant to be
        options = {"split_special_tokens": False} if getattr(self.tokenizer, "split_special_tokens", False) else {}
        try:
            ids: list[int] = self.tokenizer(rendered, add_special_tokens=self.text is None, **options)["input_ids"]
        except BaseException as error:
            if not isinstance(error, Exception) and not panicked(error):
                raise
            raise LlmvaError(
                f"The tokenizer cannot encode text that begins with {rendered[:40]!r} ({type(error).__name__}): put "
                "the tokenizer that belongs to the model into its folder, or remove that prompt."
            ) from error
        end = getattr(self.tokenizer, "eos_token_id", None)
        while self.text is None and len(ids) > 1 and ids[-1] == end:  # some tokenizers add it, as for training
            ids = ids[:-1]
        bos = getattr(self.tokenizer, "bos_token_id", None)
        doubled = bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos
        return ids[1:] if doubled and not self._doubles(rendered) else ids

    def row(self, asked: str | Sequence[tuple[str, str]], thinking: bool = False) -> list[int]:
        """Token ids of one user message, or of `(role, content)` of each message, up to where the model goes on."""
        return self.encode(self.render(as_turns(asked), thinking))

    def _space(self, rendered: str) -> str:
        """What stands between the generation prompt and an answer in a whole dialogue."""
        if rendered[-1:].isspace():
            return ""
        dialogue = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
        try:
            return space_before(self._fill(dialogue, self.switches[1], prompted=False), REPLY)
        except Exception:  # as before: it may refuse answers
            return ""

    def _doubles(self, rendered: str) -> bool:
        """Whether the template itself writes the first token twice."""
        bos = getattr(self.tokenizer, "bos_token", None)
        return bool(bos) and rendered.lstrip().removeprefix(str(bos)).lstrip().startswith(str(bos))

    def _fill(self, messages: Sequence[Mapping[str, Any]], switch: Switch, *, prompted: bool = True) -> str:
        messages = with_system(messages, self.system, switch.system, in_message=self.system_in_message)
        if self.in_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        # only what the tokenizer does not know itself: its own code may take less than transformers' does
        known = self.text == getattr(self.tokenizer, "chat_template", None)
        given = dict(switch.variables) if known else {**switch.variables, "chat_template": self.text}
        rendered: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompted, **given
        )
        return rendered

    def _tail(self, switch: Switch) -> str:
        """The generation prompt: what the template adds for it, or all after the message where it adds nothing."""
        question = [{"role": "user", "content": QUESTION}]
        whole, bare = (self._fill(question, switch, prompted=prompted) for prompted in (True, False))
        if whole != bare and whole.startswith(bare):
            return whole[len(bare) :]
        return whole.rpartition(QUESTION)[2]

    def _left_open(self, tail: str) -> Marks | None:
        last = spans(tail, self.marks)[-1:]
        if last and not last[0].closed:
            return last[0].marks
        of_words = (one for one in self.marks if one.only_first)  # which here stand at the end, before the answer
        return next((m for m in of_words if any(not tail[o.end() :].strip() for o in m.open.finditer(tail))), None)

    def _state(self, variables: Mapping[str, Any]) -> int | None:
        try:
            tail = self._tail(Switch(variables))
        except Exception:  # a template is a program of the model's: it may refuse a value in any way
            return None
        if self._left_open(tail) is not None:
            return OPENED
        return CLOSED if any(one.close.search(tail) for one in self.marks) else SILENT


# -- where the template is ---------------------------------------------------------------------------------------


def _find(tokenizer: Any) -> tuple[str | None, str, tuple[str, ...], tuple[str, ...]]:
    """The text, its source, notes and limits."""
    own: Any = getattr(tokenizer, "chat_template", None)
    named = isinstance(own, dict) and len(own) > 0
    text: str | None = of_names(own) if named else own
    in_files = list(find_in_files(str(getattr(tokenizer, "name_or_path", "") or ""), local_files_only=True))
    if not text:
        if not in_files:
            return None, "nowhere", (), ()
        file, of_processor = in_files[0]
        return of_processor, file, (f"the chat template is that of the processor, in {file}",), ()
    source, notes, limits = "the tokenizer", [], []
    if named:
        names = ", ".join(f"'{name}'" for name in own)
        used = next(name for name in own if own[name] == text)
        notes.append(f"the model has the chat templates {names}: '{used}' is used")
        if used != "default" and len(own) > 1:
            limits.append(f"The model has the chat templates {names} and no default: '{used}' was used.")
    elif [file for file, held in in_files if held == text] and TOKENIZER_FILE not in dict(in_files):
        source = next(file for file, held in in_files if held == text)
        notes.append(f"the chat template is that of the processor, in {source}")
    other = next((file for file, held in in_files if held != text and _differ(tokenizer, text, held)), None)
    if other is not None:
        limits.append(
            f"The chat templates of the tokenizer and of the processor ({other}) ask differently: the tokenizer's was "
            "used."
        )
    return text, source, tuple(notes), tuple(limits)


def _differ(tokenizer: Any, text: str, other: str) -> bool:
    """Whether two templates render a user's message differently, whichever form of content each of them takes."""
    try:
        rendered = []
        for template in (ChatTemplate(tokenizer, text), ChatTemplate(tokenizer, other)):
            right = replace(template, in_parts=_takes_parts(template))
            rendered.append(right._fill([{"role": "user", "content": QUESTION}], Switch()).strip())
    except Exception:  # the other one may need what a tokenizer does not have
        return False
    return rendered[0] != rendered[1]


# -- what a template does ----------------------------------------------------------------------------------------


def _takes_parts(template: ChatTemplate) -> bool:
    """Whether contents must be lists of parts to come through. Raises LlmvaError where neither form does."""
    raised: Exception | None = None
    for in_parts in (False, True):
        try:
            rendered = replace(template, in_parts=in_parts)._fill([{"role": "user", "content": QUESTION}], Switch())
        except Exception as error:  # a template is a program of the model's: it may fail in any way
            raised = raised or error
            continue
        if shows(rendered, QUESTION):
            return in_parts
    name = _name(template)
    if raised is None:
        raise LlmvaError(
            f"The chat template of {name} leaves the user's message out: mend it, or remove it for a plain dialogue."
        )
    if _needs_a_system_turn(template):
        raise SystemTurnError(
            f"The chat template of {name} asks for a system turn ({first_line(raised)}): give its text with --system, "
            "or let the template write its own where there is none."
        ) from raised
    raise LlmvaError(
        f"The chat template of {name} cannot be rendered ({first_line(raised)}): mend it, or remove it for a plain "
        "dialogue."
    ) from raised


def _needs_a_system_turn(template: ChatTemplate) -> bool:
    try:
        return QUESTION in replace(template, system=SYSTEM)._fill([{"role": "user", "content": QUESTION}], Switch())
    except Exception:  # as before
        return False


def _with_place(plain: ChatTemplate, system: str) -> ChatTemplate:
    """The template with the system prompt where it comes through, and with the form of contents for that."""
    reason: str | None = None
    for in_parts in (False, True):
        tried = replace(plain, in_parts=in_parts, system=system)
        try:
            rendered = tried._fill([{"role": "user", "content": QUESTION}], Switch())
        except Exception as error:  # as before
            reason = reason or first_line(error)
            continue
        if shows(rendered, QUESTION) and shows(rendered, system):
            return tried
    limits = (*plain.limits, in_message_limit(reason))
    return replace(plain, in_parts=_takes_parts(plain), system=system, system_in_message=True, limits=limits)


def _check_system(template: ChatTemplate) -> None:
    """Raises LlmvaError where a prompt is rendered without the system prompt."""
    for thinking in (False, True) if template.system is not None else ():
        if not shows(template.render([{"role": "user", "content": QUESTION}], thinking), str(template.system)):
            raise LlmvaError(
                f"The chat template of {_name(template)} leaves the system prompt out or changes it: mend the "
                "template, or put the text into the prompts and leave --system out."
            )


def _name(template: ChatTemplate) -> str:
    place = getattr(template.tokenizer, "name_or_path", "")
    return f"'{place}'" if place else "this model"


def _faults(template: ChatTemplate) -> list[str]:
    """What a reader must know of a template that can be rendered."""
    faults = []
    if not _prompts_for_an_answer(template):
        faults.append(
            "The chat template has no generation prompt, so nothing tells the model that an answer is to begin: let "
            "the template write the head of the assistant's turn for add_generation_prompt."
        )
    rendered = template.render([{"role": "user", "content": QUESTION}])
    if _tells_the_time(template):
        faults.append(
            "The chat template tells the model the date, so its answers to the same prompt may differ from day to day."
        )
    if (first := _first_token_missing(template, rendered)) is not None:
        faults.append(
            f"The tokenizer begins a text with {first} and the chat template does not, so prompts were read without "
            "it: if the model was trained with it, let the template write it."
        )
    if template._doubles(rendered):
        faults.append(
            f"The chat template begins with {template.tokenizer.bos_token} twice, and was used so: if that is a "
            "mistake, mend the template."
        )
    return faults


def _tells_the_time(template: ChatTemplate) -> bool:
    """Whether the prompt shows what transformers' clock for templates says in a form that the template asks for."""
    forms = CLOCK.findall(template.text or "")
    if not forms:
        return False
    told = [datetime.now().strftime(form) for form in forms]
    rendered = template.render([{"role": "user", "content": QUESTION}])
    told += [datetime.now().strftime(form) for form in forms]  # a second may have passed
    return any(date and date in rendered for date in told)


def _first_token_missing(template: ChatTemplate, rendered: str) -> str | None:
    """The first token that the tokenizer gives every text and the prompt does not begin with; None without one."""
    tokenizer = template.tokenizer
    bos, name = (getattr(tokenizer, what, None) for what in ("bos_token_id", "bos_token"))
    if bos is None:
        return None
    try:
        ids: list[int] = tokenizer(QUESTION)["input_ids"]
        return str(name) if ids[:1] == [bos] and template.encode(rendered)[:1] != [bos] else None
    except BaseException as error:  # such a tokenizer is told of where prompts are read
        if not isinstance(error, Exception) and not panicked(error):
            raise
        return None


def _prompts_for_an_answer(template: ChatTemplate) -> bool:
    """Whether what is rendered goes up to where an answer begins in a whole dialogue."""
    switch, question = template.switches[1], {"role": "user", "content": QUESTION}
    whole, bare = (template._fill([question], switch, prompted=prompted) for prompted in (True, False))
    if whole != bare:
        return True
    if not whole.rpartition(QUESTION)[2].strip():
        return False
    try:
        dialogue = template._fill([question, {"role": "assistant", "content": REPLY}], switch, prompted=False)
    except Exception:  # a template may refuse answers
        return True
    before, answer, _ = dialogue.partition(REPLY)
    return not answer or not before.startswith(whole.rstrip()) or before.rstrip() == whole.rstrip()


def template_text(tokenizer: Any) -> str | None:
    """The Jinja source of the template that is used, wherever it was found; None where there is none."""
    return _find(tokenizer)[0]
