"""Where a server is, and the key that it wants."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from llmva.errors import UsageError


@dataclass(frozen=True)
class Address:
    """`url` ends without a slash.

    `variable` is the environment variable that holds the key: one for each purpose, so that no key for another service
    is sent. `advice` is what a user can do where the server does not know what it is asked for.
    """

    url: str
    key: str | None
    variable: str
    advice: str

    @classmethod
    def of(cls, url: str, *, owner: str, variable: str, advice: str) -> Address:
        """Check the URL and read the key. Raises UsageError for either; `owner` is whose URL it is, in that message."""
        key = os.environ.get(variable, "").strip()
        if not key.isascii() or any(not char.isprintable() for char in key):
            raise UsageError(f"{variable} holds characters that no key has: set it again.")
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(f"'{url}' is no URL of {owner}: give one such as http://localhost:8000/v1.")
        if parts.username or parts.password:
            raise UsageError(f"The URL of {owner} holds a name or password: put the key into {variable} instead.")
        return cls(url.rstrip("/"), key or None, variable, advice)

    @property
    def place(self) -> str:
        """Host and port, for messages."""
        return urlsplit(self.url).netloc
