"""Many requests to one server that may be slow, busy, flaky, or gone for a while: threads, retries, limits.

Threads rather than an event loop, since callers are synchronous and may be notebooks, which have a loop of their own.
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
from llmva.judges.model_based.asking import Interrupted

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
BUSY = frozenset({408, 425, 429, 502, 503, 504})  # the server, or what stands before it, has no time for anybody
MOST_BYTES = 4 * 2**20  # of a reply


@dataclass(frozen=True)
class Limits:
    """Times are in seconds."""

    concurrency: int = 16  # requests under way at once
    timeout: float = 120.0  # for one whole reply
    attempts: int = 6  # failures of one request, not counting those that are the whole server's, before it is given up
    patience: float = 120.0  # without any reply, after which the server counts as gone
    first_wait: float = 0.5  # after a failure; doubled with each
    longest_wait: float = 30.0
    budget: int | None = None  # requests at most, tries included

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1 or min(self.timeout, self.patience) <= 0:
            raise UsageError(
                "Concurrency, attempts, timeout and patience of a judge must be above 0: give larger ones."
            )
        if self.budget is not None and self.budget < 1:
            raise UsageError("A judge's budget must be 1 request or more: give a larger one.")


@dataclass
class Request(Generic[T]):
    """One thing to ask: `body` is sent as JSON, `item` is the caller's."""

    item: T
    body: Mapping[str, Any]
    failures: int = 0  # its own
    waits: int = 0  # of any kind
    seen: int = 0  # replies that the server had given to others when this one was first tried


@dataclass
class _Health:
    """What the threads know together of the server."""

    last_reply: float
    sent: int = 0
    replies: int = 0
    failed_since: int = 0  # failures in a row, of all requests, since the last reply
    stopped: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)


class _Failure(Exception):  # noqa: N818 (a message between two functions)
    """One try failed. `whole`: it is the server's failure rather than this request's."""

    def __init__(self, said: str, *, whole: bool = False, final: bool = False, wait: float | None = None) -> None:
        super().__init__(said)
        self.said, self.whole, self.final, self.wait = said, whole, final, wait


class Client:
    """POSTs to `url`. `key` is sent as a bearer token. Waits are drawn by a generator seeded with `seed`."""

    def __init__(self, url: str, key: str | None, limits: Limits, seed: int = 0) -> None:
        self.url, self.limits = url, limits
        self.sent = 0  # requests, over all calls: what `budget` limits
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._random = random.Random(seed)

    def ask_all(
        self, requests: Iterable[Request[T]], done: Callable[[T, Any], None], failed: Callable[[T, str], None]
    ) -> None:
        """Send every request until it is answered or given up.

        Args:
            done: told the item and the reply (JSON) as soon as it is there, from one thread at a time. Raises
                ValueError for a reply of a wrong form, which counts as a failure of the request.
            failed: told the item and why it was given up.

        Raises Interrupted if the server is gone, refuses all requests alike, or the budget is spent; and whatever
        else `done` or `failed` raise.
        """
        waiting = deque(requests)
        health = _Health(time.monotonic(), sent=self.sent)
        with _http(self.url, self._headers, self.limits) as http:
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
        except BaseException as error:  # belongs to the thread that called ask_all
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
        """Try until the request is answered, given up, or everything stops."""
        request.seen = health.replies
        while not health.stop.is_set():
            self._spend(health)
            try:
                reply = _post(http, self.url, request.body, self.limits.timeout)
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
                        failed(request.item, failure.said)
                    return
                health.stop.wait(self._wait(request, failure))

    def _spend(self, health: _Health) -> None:
        with health.lock:
            if self.limits.budget is not None and health.sent >= self.limits.budget:
                raise Interrupted(f"has spent its budget of {self.limits.budget} requests", "give it a larger one")
            health.sent += 1

    def _gives_up(self, request: Request[T], failure: _Failure, health: _Health) -> bool:
        """Whether this request is beyond hope. Raises Interrupted if the server is.

        A request is given up for its own failures alone: while the server answers others, or too few tries have failed
        to tell. When everybody fails, it waits with the others until the patience is at its end.
        """
        if failure.final:
            return True
        with health.lock:
            health.failed_since += 1
            silent = time.monotonic() - health.last_reply
            others, in_a_row, ever = health.replies - request.seen, health.failed_since, health.replies > 0
        # a server that never answered is a wrong address more often than one that is starting
        patience = self.limits.patience if ever else self.limits.patience / 4
        if silent > patience + (0 if failure.whole else self.limits.timeout):
            raise Interrupted(f"at {place_of(self.url)} is gone ({failure.said})", "start its server again")
        if failure.whole:
            return False
        request.failures += 1
        few = in_a_row < max(3 * self.limits.attempts, 2 * self.limits.concurrency)
        return request.failures >= self.limits.attempts and (others > 0 or few)

    def _wait(self, request: Request[T], failure: _Failure) -> float:
        """Seconds until the next try: what the server asks for, else doubled with each try, and shortened by chance so
        that requests that failed together do not come back together."""
        doubled = self.limits.first_wait * 2.0 ** min(request.waits, 30)
        request.waits += 1
        wait = min(self.limits.longest_wait, doubled) * self._random.uniform(0.5, 1.0)
        if failure.wait is None:
            return wait
        return max(min(failure.wait, self.limits.patience), 0.1 * wait)


def place_of(url: str) -> str:
    """Host and port of a URL, for messages."""
    return urlsplit(url).netloc.rsplit("@", 1)[-1]


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
        raise UsageError("A judge at a URL needs httpx, which is not installed: pip install httpx.") from error
    local = (urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")
    return httpx.Client(
        headers=dict(headers),
        timeout=limits.timeout,
        limits=httpx.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency),
        trust_env=not local,  # a proxy of the user's does not know what runs on this machine
    )


def _post(http: httpx.Client, url: str, body: Mapping[str, Any], timeout: float) -> Any:
    """The reply as JSON. Raises _Failure, or Interrupted where every request would meet the same."""
    import httpx

    deadline = time.monotonic() + timeout
    data = bytearray()
    try:
        with http.stream("POST", url, json=body) as response:
            for piece in response.iter_bytes():
                data += piece
                if time.monotonic() > deadline:  # httpx limits the time between two pieces
                    raise _Failure(f"no whole reply in {timeout:g} s")
                if len(data) > MOST_BYTES:
                    raise _Failure("a reply without end")
            status, headers = response.status_code, response.headers
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise _Failure(f"no connection: {_first_line(error)}", whole=True) from error
    except httpx.TimeoutException as error:
        raise _Failure(f"no reply in {timeout:g} s") from error
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise _Failure(f"the connection broke: {_first_line(error)}") from error
    if status != 200:
        _raise_for(status, headers, bytes(data), url)
    try:
        return json.loads(data)
    except ValueError as error:
        raise _Failure("a reply that is no JSON") from error


def _raise_for(status: int, headers: Mapping[str, str], data: bytes, url: str) -> None:
    said = " ".join(data.decode("utf-8", "replace").split())[:160].rstrip(". ")
    said = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if status in BUSY:
        raise _Failure(said, whole=True, wait=asked_wait(headers, time.time()))
    if status in (401, 403):
        raise Interrupted(f"at {place_of(url)} lets nobody in ({said})", "put a key into LLMVA_JUDGE_KEY")
    if status < 400 or status in (404, 405):
        raise Interrupted(
            f"at {place_of(url)} does not serve this ({said})", "give the URL that ends in /v1 and a served #MODEL"
        )
    raise _Failure(said, final=status < 500, wait=asked_wait(headers, time.time()))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(". ")
