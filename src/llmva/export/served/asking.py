"""Ask an OpenAI-compatible server which models it serves, and how one of them answers: one request after another.

Requests at the same time would share a batch, and some servers compute otherwise in another batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from llmva.errors import LlmvaError, UsageError
from llmva.export.served.probes import TOKENS, Probe
from llmva.progress import Progress
from llmva.servers.address import Address
from llmva.servers.client import Client, Interrupted, Limits, Request
from llmva.servers.replies import names_of, written_by

KEY = "LLMVA_SERVER_KEY"
ADVICE = "give the URL of an OpenAI-compatible server, such as http://localhost:8000/v1, and a name that it serves"
LIMITS = Limits(concurrency=1, attempts=3, patience=40.0)
ENDPOINTS = ("/chat/completions", "/completions", "/models")
VERSION = re.compile(r"/v\d+(?:beta)?$")


class Server:
    """The server at `url`, with or without the /v1 at its end. Raises UsageError for what is no URL."""

    def __init__(self, url: str, limits: Limits = LIMITS) -> None:
        plain = url.strip().rstrip("/")
        for endpoint in ENDPOINTS:
            plain = plain.removesuffix(endpoint)
        if urlsplit(plain).scheme and not VERSION.search(plain):
            plain += "/v1"
        self.address = Address.of(plain, owner="a server", variable=KEY, advice=ADVICE)
        self._limits = limits

    def names(self) -> list[str]:
        """The names of the models that it serves. Raises LlmvaError if it does not say."""
        listed: list[list[str]] = []
        refused: list[str] = []
        client = Client(self.address, "models", self._limits)
        try:
            client.ask_all(
                [Request("models", None)],
                lambda item, reply: listed.append(names_of(reply)),
                lambda item, why: refused.append(why),
            )
        except Interrupted as stopped:
            raise LlmvaError(f"The server {stopped.reason}: {stopped.mend}.") from stopped
        if not listed:
            raise LlmvaError(f"The server at {self.address.place} does not list its models ({refused[0]}): {ADVICE}.")
        return listed[0]

    def choose(self, name: str | None) -> tuple[str, list[str]]:
        """The name to ask for, of a model that has answered; and all names that the server lists, if it does.

        Raises UsageError where a name has to be given, and LlmvaError where the server does not answer.
        """
        try:
            names = self.names()
        except LlmvaError:
            if name is None:
                raise
            names = []  # not every server lists them
        if name is None and not names:
            raise LlmvaError(f"The server at {self.address.place} lists no model: load one, or give --served-name.")
        if name is None and len(names) > 1:
            raise UsageError(
                f"The server at {self.address.place} serves several models ({', '.join(names)}): say which of them has "
                "the edit with --served-name."
            )
        name = name or names[0]
        try:
            self._ask(name, [_body(name, [{"role": "user", "content": "Hello."}], {})], lambda n: None)
        except LlmvaError as error:
            if not names or name in names:
                raise
            raise UsageError(
                f"The server at {self.address.place} serves no '{name}', but {', '.join(names)}: give one of these "
                "with --served-name."
            ) from error
        return name, names

    def answers(self, name: str, probes: Sequence[Probe], progress: Progress) -> list[str | None]:
        """How its model `name` answers each probe; None where it failed to. Raises LlmvaError if the server is gone."""
        tick = progress.stage(f"asking {self.address.place}", len(probes))
        return self._ask(name, [_body(name, probe.messages, probe.variables) for probe in probes], tick)

    def _ask(self, name: str, bodies: Sequence[Mapping[str, Any]], tick: Callable[[int], None]) -> list[str | None]:
        answers: list[str | None] = [None] * len(bodies)

        def done(i: int, reply: Any) -> None:
            answers[i] = written_by(reply)
            tick(1)

        def failed(i: int, why: str) -> None:
            if all(answer is None for answer in answers):
                raise Interrupted(f"at {self.address.place} does not answer as '{name}' ({why})", ADVICE)
            tick(1)

        client = Client(self.address, "chat/completions", self._limits)
        try:
            client.ask_all([Request(i, body) for i, body in enumerate(bodies)], done, failed)
        except Interrupted as stopped:
            came = sum(answer is not None for answer in answers)
            told = f" after {came} of {len(bodies)} answers" if came else ""
            raise LlmvaError(f"The server {stopped.reason}{told}: {stopped.mend}.") from stopped
        return answers


def _body(name: str, messages: Sequence[Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """A request for a greedy answer; the chat template gets `variables`."""
    body = {"model": name, "messages": list(messages), "temperature": 0, "max_tokens": TOKENS, "stream": False}
    return {**body, "chat_template_kwargs": dict(variables)} if variables else body
