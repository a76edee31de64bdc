"""A guard, or a general model with a short question of ours, behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from llmva.errors import UsageError
from llmva.judges.base import Judgement, Label
from llmva.judges.model_based.asking import AskingJudge, Interrupted, Keep, Question
from llmva.judges.model_based.client import Client, Limits, Request
from llmva.judges.model_based.guards import Guard, fill, parse_word, plain_question, read_template, turns

KEY = "LLMVA_JUDGE_KEY"  # environment variable of its own, so that no key for another service is sent
GENERAL = Guard(None, "llm.txt", 1024, parse_word)  # room for models that think before they speak
STOP_AFTER = 10  # answers given up with none judged: then the requests are wrong, not the answers


class EndpointJudge(AskingJudge):
    """Asks `model` at `url`, such as http://localhost:8000/v1.

    Guards with a chat template, and general models, are asked at /chat/completions; guards with a template of their own
    at /completions, which takes it as it is. The URL is no part of the judge's name, since the same model gives the
    same judgements on another server.
    """

    def __init__(
        self,
        title: str,
        guard: Guard,
        url: str,
        model: str,
        *,
        limits: Limits | None = None,
        **options: Any,
    ) -> None:
        self._template = read_template(guard.template) if guard.template else None
        self._guard, self._model = guard, model
        self._chat = guard.template is None or guard is GENERAL
        super().__init__(
            title, [model, self._template, guard.max_new_tokens], knows_refusals=guard.knows_refusals, **options
        )
        place = f"{_checked(url)}/{'chat/completions' if self._chat else 'completions'}"
        self._client = Client(place, _key(), limits or Limits())

    @property
    def requests(self) -> int:
        """Requests sent so far, retries included."""
        return self._client.sent

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        given_up: list[str] = []
        judged = 0

        def done(question: Question, reply: Any) -> None:
            nonlocal judged
            keep(question, self._guard.parse(text_of(reply, self._chat), question.prompt.benign))
            judged += 1

        def failed(question: Question, why: str) -> None:
            given_up.append(why)
            keep(question, Judgement(Label.UNJUDGED, 0.0, why))
            if not judged and len(given_up) >= STOP_AFTER:
                raise Interrupted(f"judges nothing ({why})", "mend its server or its options")

        self._client.ask_all([Request(question, self.body(question)) for question in questions], done, failed)

    def body(self, question: Question) -> dict[str, Any]:
        """The JSON that is sent: greedy decoding of at most `max_new_tokens` of the guard."""
        common = {"model": self._model, "temperature": 0, "max_tokens": self._guard.max_new_tokens}
        prompt, answer = question.prompt.text, question.answer
        if self._template is None:
            return {**common, "messages": turns(prompt, answer)}
        if self._chat:
            return {**common, "messages": plain_question(self._template, prompt, answer)}
        return {**common, "prompt": fill(self._template, prompt, answer)}


def text_of(reply: Any, chat: bool) -> str:
    """The text of the first choice. Raises ValueError for a reply of another form."""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("no choices") from error
    if text is not None and not isinstance(text, str):
        raise ValueError("no text")
    return text or ""


def _key() -> str | None:
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or any(not char.isprintable() for char in key):
        raise UsageError(f"{KEY} holds characters that no key has: set it again.")
    return key or None


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"'{url}' is no URL of a judge's server: give one such as http://localhost:8000/v1.")
    if parts.username or parts.password:
        raise UsageError(f"A judge's URL holds a name or password: put the key into {KEY} instead.")
    return url.rstrip("/")
