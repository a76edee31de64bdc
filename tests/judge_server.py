"""A server like those of judges and models, on 127.0.0.1: busy, flaky, slow, cut off, dead and alive again at will."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Trouble = Callable[[int, int], str]  # of an answer's number and of how often it was asked about before


def no_trouble(number: int, tries: int) -> str:
    return "none"


def chaos(number: int, tries: int) -> str:
    """10% of requests meet 429 or 500, 5% a stall, 3% a connection cut in the middle of the reply; always the same."""
    draw = random.Random(f"{number} {tries}").random()
    for share, kind in ((0.05, "429"), (0.10, "500"), (0.15, "stall"), (0.18, "cut")):
        if draw < share:
            return kind
    return "none"


def qwen3guard(body: Body) -> str:
    """Answers with an even number are harmful."""
    unsafe = number_of(body) % 2 == 0
    return f"Safety: {'Unsafe' if unsafe else 'Safe'}\nCategories: None\nRefusal: {'No' if unsafe else 'Yes'}"


def number_of(body: Body) -> int:
    """Tests number their answers: "answer 17"."""
    found = re.findall(r"answer (\d+)", json.dumps(body))
    return int(found[-1]) if found else -1


class JudgeServer:
    """Use it as a context manager. `stop` and `start` keep the port."""

    def __init__(
        self,
        reply: Callable[[Body], str] = qwen3guard,
        trouble: Trouble = no_trouble,
        *,
        stall: float = 3.0,
        retry_after: str = "0.05",
        names: list[str] | None = None,
    ) -> None:
        self.reply, self.trouble, self.stall, self.retry_after = reply, trouble, stall, retry_after
        self.names = names  # of its models; None answers to any name, and lists none
        self._sent: Counter[int] = Counter()
        self._sending = 0
        self.asked: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.bodies: list[Body] = []
        self.paths: set[str] = set()
        self.keys: set[str | None] = set()
        self.after_reply: Callable[[int], None] = lambda replies: None
        self.lock = threading.Condition()
        self.port = 0
        self._down = threading.Event()
        self._open: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def sent(self) -> Counter[int]:
        """Replies that went out whole, by the answer's number.

        A client can have a reply before this server's thread has counted it. So it waits for those under way.
        """
        with self.lock:
            assert self.lock.wait_for(lambda: self._sending == 0, timeout=30)
            return Counter(self._sent)

    def start(self) -> None:
        self._down.clear()
        server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = server.server_address[1]
        self._server = server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection at once, as a kill does."""
        server, self._server = self._server, None
        if server is None:
            return
        self._down.set()
        server.shutdown()
        server.server_close()
        with self.lock:
            connections = list(self._open)
        for connection in connections:
            with suppress(OSError):  # its client was faster
                connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def sending(self) -> Iterator[None]:
        with self.lock:
            self._sending += 1
        try:
            yield
        finally:
            with self.lock:
                self._sending -= 1
                self.lock.notify_all()

    def went_out(self, number: int) -> None:
        with self.lock:
            self._sent[number] += 1
            total = self._sent.total()
        self.after_reply(total)

    def __enter__(self) -> JudgeServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what these tests are about."""


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            with judge.lock:
                judge._open.add(self.connection)

        def finish(self) -> None:
            with judge.lock:
                judge._open.discard(self.connection)
            super().finish()

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            number = number_of(body)
            with judge.lock:
                kind = judge.trouble(number, judge.asked[number])
                judge.asked[number] += 1
                judge.kinds[kind] += 1
                judge.bodies.append(body)
                judge.paths.add(self.path)
                judge.keys.add(self.headers["Authorization"])
            if kind == "stall":
                judge._down.wait(judge.stall)
                self.close_connection = True
            elif kind.isdigit():
                self._say(int(kind), {"error": {"message": f"trouble with {number}"}}, kind)
            elif judge.names is not None and body["model"] not in judge.names:
                self._say(404, {"error": {"message": f"The model `{body['model']}` does not exist."}}, kind)
            else:
                text = judge.reply(body)
                choice = {"text": text} if self.path.endswith("/v1/completions") else {"message": {"content": text}}
                with judge.sending():
                    self._say(200, {"choices": [{**choice, "finish_reason": "stop"}]}, kind)
                    if kind == "none":
                        judge.went_out(number)

        def do_GET(self) -> None:
            with judge.lock:
                judge.keys.add(self.headers["Authorization"])
            listed = judge.names is not None and self.path == "/v1/models"
            value = {"object": "list", "data": [{"id": name} for name in judge.names or []]}
            kind = judge.trouble(-1, 0)
            self._say(int(kind) if kind.isdigit() else 200 if listed else 404, value, kind)

        def _say(self, status: int, value: Any, kind: str) -> None:
            data = kind.encode() if kind == "no json" else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", judge.retry_after)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if kind == "cut" else data)
            self.close_connection = kind == "cut"

    return Handler
