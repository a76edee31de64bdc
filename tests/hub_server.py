"""A stand-in of the Hugging Face hub's HTTP API: as much as an upload asks for, over real sockets.

It keeps what a client commits, as the hub would after a push: `hub.repos[name].files` is path -> bytes. Written after
what huggingface_hub 2.4 sends; a request that it does not know is answered with 404 and fails the test that sent it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_standin"  # what the stand-in lets write


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """State, and what to break: `fail` maps a piece of a path to the status that a request for it gets."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    fail: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    html: bool = False  # answer as a proxy's login page does


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {"error": message}


@contextmanager
def serving() -> Iterator[Hub]:
    """The stand-in on a free port of this machine, until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            try:
                body = self._body()
            except (ValueError, OSError):  # the client is gone in the middle of its request
                self.close_connection = True
                return None
            path = self.path.split("?")[0]
            hub.requests.append(f"{self.command} {path}")
            if hub.html:
                return self._send(200, b"<html>please log in</html>", "text/html")
            try:
                for piece, status in hub.fail.items():
                    if piece in path:
                        raise RefusedError(status, f"broken on purpose\nat {piece}")
                if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise RefusedError(401, "Invalid credentials in Authorization header")
                answer = _answer(hub, self.command, path, body)
                return self._send(200, json.dumps(answer).encode())
            except RefusedError as error:
                extra = {"X-Error-Message": str(error).replace("\n", " ")}
                if error.code:
                    extra["X-Error-Code"] = error.code
                return self._send(error.status, json.dumps(error.body).encode(), extra=extra)

        do_GET = do_POST = do_PUT = _serve  # noqa: N815 (names of http.server)

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self._whole(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self._whole(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _whole(self, size: int) -> bytes:
            data = self.rfile.read(size)
            if len(data) < size:
                raise ConnectionError("a request that was cut off")
            return data

        def _send(
            self, status: int, body: bytes, kind: str = "application/json", extra: dict[str, str] | None = None
        ) -> None:
            with suppress(ConnectionError):  # the client may be gone
                self.send_response(status)
                for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def _answer(hub: Hub, method: str, path: str, body: bytes) -> Any:
    if (method, path) == ("POST", "/api/repos/create"):
        return _create(hub, json.loads(body))
    if (method, path) == ("POST", "/api/validate-yaml"):
        return _validate(json.loads(body)["content"])
    if (method, path) == ("POST", "/lfs/verify"):
        if json.loads(body)["oid"] not in hub.objects:
            raise RefusedError(404, "no such object")
        return {}
    if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
        if method != "PUT" or hashlib.sha256(body).hexdigest() != found[1]:
            raise RefusedError(400, "these are not the bytes that were announced")
        hub.objects[found[1]] = body
        return {}
    if method == "POST" and (found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path)):
        _repo(hub, found[1])
        return {"transfer": "basic", "objects": [_batch(hub, one) for one in json.loads(body)["objects"]]}
    if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(preupload|commit)/main)?", path):
        repo = _repo(hub, found[1])
        if (method, found[2]) == ("GET", None):
            return {"id": found[1], "private": repo.private, "sha": "0" * 40, "siblings": [], "tags": []}
        if (method, found[2]) == ("POST", "preupload"):
            return {"files": [_mode(one["path"]) for one in json.loads(body)["files"]]}
        if (method, found[2]) == ("POST", "commit"):
            _commit(hub, repo, [json.loads(line) for line in body.splitlines()])
            oid = hashlib.sha1(body).hexdigest()
            return {"commitUrl": f"{hub.url}/{found[1]}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}
    raise RefusedError(404, f"the stand-in does not know {method} {path}")


def _repo(hub: Hub, name: str) -> Repo:
    if name not in hub.repos:
        raise RefusedError(404, "Repository not found", "RepoNotFound")
    return hub.repos[name]


def _create(hub: Hub, wanted: dict[str, Any]) -> Any:
    """`visibility` is how a client of 2.x says it, `private` how one before did."""
    name = f"{wanted['organization']}/{wanted['name']}"
    url = f"{hub.url}/{name}"
    if name in hub.repos:
        raise RefusedError(409, "You already created this model repo", body={"error": "exists", "url": url})
    hub.repos[name] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return {"url": url, "name": name, "id": "1"}


def _validate(text: str) -> Any:
    try:
        fields = yaml.safe_load(text.split("---\n")[1])
        model_index = fields.get("model-index", [])
        assert all(
            r["task"]["type"] and r["dataset"]["type"] and r["metrics"] for m in model_index for r in m["results"]
        )
    except Exception as error:
        raise RefusedError(400, "bad metadata", body={"errors": [{"message": repr(error)}], "warnings": []}) from error
    return {"errors": [], "warnings": []}


def _mode(path: str) -> dict[str, Any]:
    large = path.endswith((".safetensors", ".bin"))
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}


def _batch(hub: Hub, one: dict[str, Any]) -> dict[str, Any]:
    if one["oid"] in hub.objects:  # no actions: it is there
        return dict(one)
    actions = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}, "verify": {"href": f"{hub.url}/lfs/verify"}}
    return {**one, "actions": actions}


def _commit(hub: Hub, repo: Repo, lines: list[dict[str, Any]]) -> None:
    """All of it or, where a large file was never uploaded, nothing."""
    files = {}
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                raise RefusedError(400, "a large file is missing")
            files[value["path"]] = hub.objects[value["oid"]]
        elif line["key"] != "header":
            raise RefusedError(400, f"an operation that a push should not need: {line['key']}")
    repo.files.update(files)
    repo.commits.append(next(line["value"]["summary"] for line in lines if line["key"] == "header"))
