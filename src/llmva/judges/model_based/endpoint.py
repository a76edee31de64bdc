"""A guard, or a general model with a short question of ours, behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmva.judges.base import Judgement, Label
from llmva.judges.model_based.asking import AskingJudge, Keep, Question
from llmva.judges.model_based.guards import Guard, fill, parse_word, plain_question, read_template, turns
from llmva.servers.address import Address
from llmva.servers.client import Client, Interrupted, Limits, Request
from llmva.servers.replies import text_of

KEY = "LLMVA_JUDGE_KEY"
ADVICE = "give the URL that ends in /v1 and a served #MODEL"
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
        address = Address.of(url, owner="a judge's server", variable=KEY, advice=ADVICE)
        self._client = Client(address, "chat/completions" if self._chat else "completions", limits or Limits())

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
