"""Many requests to one server that may be slow, busy, unreliable, or gone for a while: threads, retries, limits.

It uses threads and no event loop, since callers are synchronous and may be notebooks, which run a loop of their own.
"""

from __future__ import annotations

import email.utils
import json
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

from llmva.errors import UsageError
from llmva.servers.address import Address

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
BUSY = frozenset({408, 425, 429, 502, 503, 504})  # status codes of a server or gateway that is busy
MAX_BYTES = 4 * 2**20  # of a reply


class Interrupted(Exception):  # noqa: N818 (no error by itself: whoever asked says how far it got)
    """Asking cannot go on. `reason` continues a sentence that begins "The server" or "The judge"; `mend` is what the
    user can do."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(reason)
        self.reason, self.mend = reason, mend


@dataclass(frozen=True)
class Limits:
    """Times are in seconds."""

    concurrency: int = 16  # requests under way at once
    timeout: float = 120.0  # for one whole reply
    attempts: int = 6  # failures after which one request is given up; failures of the whole server do not count
    patience: float = 120.0  # without any reply; then the server counts as gone
    first_wait: float = 0.5  # after the first failure; each further failure doubles it
    longest_wait: float = 30.0
    budget: int | None = None  # at most so many requests, retries included

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1 or min(self.timeout, self.patience) <= 0:
            raise UsageError("Concurrency, attempts, timeout and patience must be above 0: give larger ones.")
        if self.budget is not None and self.budget < 1:
            raise UsageError("A budget must be at least 1 request: give a larger one.")


@dataclass
class Request(Generic[T]):
    """One thing to ask: `body` is POSTed as JSON, None is a GET; `item` is handed back to the caller with the reply."""

    item: T
    body: Mapping[str, Any] | None
    failures: int = 0  # of this request, not of the whole server
    waits: int = 0  # after a failure of either kind
    replies_before: int = 0  # replies to other requests when this one was first sent


@dataclass
class _Health:
    """What the threads know of the server; `lock` guards it."""

    last_reply: float
    sent: int = 0
    replies: int = 0
    failed_since: int = 0  # failures of all requests since the last reply
    stopped: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)


class _Failure(Exception):  # noqa: N818 (a message between two functions)
    """One attempt failed.

    `of_server`: any request would have failed. `final`: another attempt would fail alike. `wait`: seconds until the
    next attempt, if the server asks for them.
    """

    def __init__(self, why: str, *, of_server: bool = False, final: bool = False, wait: float | None = None) -> None:
        super().__init__(why)
        self.why, self.of_server, self.final, self.wait = why, of_server, final, wait


class Client:
    """Asks at `path` below the address. The key is sent as a bearer token. `seed` is of the draws of waits."""

    def __init__(self, address: Address, path: str, limits: Limits, seed: int = 0) -> None:
        self.address, self.limits = address, limits
        self.sent = 0  # requests, over all calls: what `budget` limits
        self._url = f"{address.url}/{path}"
        self._headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
        self._random = random.Random(seed)

    def ask_all(
        self, requests: Iterable[Request[T]], done: Callable[[T, Any], None], failed: Callable[[T, str], None]
    ) -> None:
        """Send every request until it is answered or given up.

        Args:
            done: called with the item and the reply (JSON) as soon as it is there, by one thread at a time. It raises
                ValueError for a reply of a wrong form, which counts as a failure of the request.
            failed: called with the item and the reason for giving it up.

        Raises Interrupted if the server is gone or refuses all requests alike, or if the budget is spent; and what
        `done` and `failed` raise.
        """
        waiting = deque(requests)
        health = _Health(time.monotonic(), sent=self.sent)
        with _http(self._url, self._headers, self.limits) as http:
            arguments = (http, waiting, health, done, failed)
            threads = [
                threading.Thread(target=self._work, args=arguments, daemon=True)
                for _ in range(min(self.limits.concurrency, len(waiting)))
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)  # wakes up for Ctrl-C
            finally:
                health.stop.set()
                self.sent = health.sent
        if health.stopped is not None:
            raise health.stopped

    def _work(
        self,
        http: httpx.Client,
        waiting: deque[Request[T]],
        health: _Health,
        done: Callable[[T, Any], None],
        failed: Callable[[T, str], None],
    ) -> None:
        try:
            while not health.stop.is_set():
                try:
                    request = waiting.popleft()
                except IndexError:
                    return
                self._one(http, request, health, done, failed)
        except BaseException as error:  # ask_all raises it in its own thread
            with health.lock:
                health.stopped = health.stopped or error
            health.stop.set()

    def _one(
        self,
        http: httpx.Client,
        request: Request[T],
        health: _Health,
        done: Callable[[T, Any], None],
        failed: Callable[[T, str], None],
    ) -> None:
        """Send the request until it is answered or given up, or until all threads stop."""
        request.replies_before = health.replies
        while not health.stop.is_set():
            self._spend(health)
            try:
                reply = self._reply(http, request.body)
                with health.lock:
                    try:
                        done(request.item, reply)
                    except ValueError as error:
                        raise _Failure(f"a reply of another form ({error})") from error
                    health.last_reply, health.failed_since = time.monotonic(), 0
                    health.replies += 1
                return
            except _Failure as failure:
                if self._gives_up(request, failure, health):
                    with health.lock:
                        health.last_reply = time.monotonic() if failure.final else health.last_reply
                        failed(request.item, failure.why)
                    return
                health.stop.wait(self._wait(request, failure))

    def _spend(self, health: _Health) -> None:
        with health.lock:
            if self.limits.budget is not None and health.sent >= self.limits.budget:
                raise Interrupted(f"has spent its budget of {self.limits.budget} requests", "give it a larger one")
            health.sent += 1

    def _gives_up(self, request: Request[T], failure: _Failure, health: _Health) -> bool:
        """Whether to give up this request. Raises Interrupted if the server is gone.

        A request is given up for its own failures only: while the server answers others, or while too few requests
        failed to blame the server. If all requests fail, they all wait until `patience` is over.
        """
        if failure.final:
            return True
        with health.lock:
            health.failed_since += 1
            silent = time.monotonic() - health.last_reply
            others, in_a_row, ever = health.replies - request.replies_before, health.failed_since, health.replies > 0
        # A server that never answered is more often a wrong address than a server that is starting.
        patience = self.limits.patience if ever else self.limits.patience / 4
        if silent > patience + (0 if failure.of_server else self.limits.timeout):
            raise Interrupted(f"at {self.address.place} is gone ({failure.why})", "start that server again")
        if failure.of_server:
            return False
        request.failures += 1
        few = in_a_row < max(3 * self.limits.attempts, 2 * self.limits.concurrency)
        return request.failures >= self.limits.attempts and (others > 0 or few)

    def _wait(self, request: Request[T], failure: _Failure) -> float:
        """Seconds until the next attempt: what the server asks for, else doubled with each wait, and shortened at
        random, so that requests that failed together do not come back together."""
        doubled = self.limits.first_wait * 2.0 ** min(request.waits, 30)
        request.waits += 1
        wait = min(self.limits.longest_wait, doubled) * self._random.uniform(0.5, 1.0)
        if failure.wait is None:
            return wait
        return max(min(failure.wait, self.limits.patience), 0.1 * wait)

    def _reply(self, http: httpx.Client, body: Mapping[str, Any] | None) -> Any:
        """The reply as JSON. Raises _Failure, or Interrupted if every request would fail in the same way."""
        import httpx

        timeout = self.limits.timeout
        deadline = time.monotonic() + timeout
        data = bytearray()
        try:
            with http.stream("GET" if body is None else "POST", self._url, json=body) as response:
                for piece in response.iter_bytes():
                    data += piece
                    if time.monotonic() > deadline:  # httpx limits the time between two pieces
                        raise _Failure(f"no whole reply in {timeout:g} s")
                    if len(data) > MAX_BYTES:
                        raise _Failure(f"a reply of more than {MAX_BYTES:,} bytes")
                status, headers = response.status_code, response.headers
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Failure(f"no connection: {_first_line(error)}", of_server=True) from error
        except httpx.TimeoutException as error:
            raise _Failure(f"no reply in {timeout:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Failure(f"the connection broke: {_first_line(error)}") from error
        if status != 200:
            raise self._refusal(status, headers, bytes(data))
        try:
            return json.loads(data)
        except ValueError as error:
            raise _Failure("a reply that is no JSON") from error

    def _refusal(self, status: int, headers: Mapping[str, str], data: bytes) -> Exception:
        """What a reply of another status than 200 means."""
        message = " ".join(data.decode("utf-8", "replace").split())[:160].rstrip(". ")
        message = f"HTTP {status}: {message}" if message else f"HTTP {status}"
        place = f"at {self.address.place}"
        if status in BUSY:
            return _Failure(message, of_server=True, wait=asked_wait(headers, time.time()))
        if status in (401, 403):
            return Interrupted(f"{place} refuses access ({message})", f"put a key into {self.address.variable}")
        if status < 400 or status in (404, 405):
            return Interrupted(f"{place} does not serve this ({message})", self.address.advice)
        return _Failure(message, final=status < 500, wait=asked_wait(headers, time.time()))


def asked_wait(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a Retry-After header asks for, as seconds or as a date; None without one that can be read.

    `now` is the time in seconds since 1970.
    """
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError):
        return None


def _http(url: str, headers: Mapping[str, str], limits: Limits) -> httpx.Client:
    try:
        import httpx
    except ImportError as error:
        raise UsageError("Servers are asked by httpx, which is not installed: pip install httpx.") from error
    local = (urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")
    return httpx.Client(
        headers=dict(headers),
        timeout=limits.timeout,
        limits=httpx.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency),
        trust_env=not local,  # the user's proxy does not reach a server on this machine
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(". ")
