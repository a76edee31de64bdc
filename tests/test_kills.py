"""Killed at any moment, an export or a push leaves nothing that could be taken for a whole one, and then works again.

A moment is the n-th time that the process changes the file system or speaks to the hub; which ones is drawn. A write
may end in its middle.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import TOKEN, Hub, serving
from llmva.models.load import load_model
from test_merged import made

REPO = "someone/thing"
KILLS = 10
SCRIPT = """
import json, os, signal, socket, sys, threading, traceback
from pathlib import Path
import huggingface_hub.hf_api, httpx, torch
import llmva.export.diff, llmva.models.load
from llmva.export.adapters.peft import export_lora
from llmva.export.merged import export_merged
from llmva.export.plan import make_plan
from llmva.export.push import push

torch.set_num_threads(1)
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree"}

def arm(moment):
    seen, one_at_a_time = [0], threading.Lock()

    def step():
        with one_at_a_time:  # weights are hashed in threads, which write what they know
            seen[0] += 1
            if seen[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def heard(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or event == "socket.connect" or writes:
            step()

    def in_halves(call, at):
        def halved(*args):
            if seen[0] + 1 == moment:
                args = list(args)
                args[at] = args[at] // 2 if isinstance(args[at], int) else memoryview(args[at])[:len(args[at]) // 2]
                call(*args)
            step()
            return call(*args)
        return halved

    os.pwrite, os.copy_file_range = in_halves(os.pwrite, 1), in_halves(os.copy_file_range, 2)
    socket.socket.send = in_halves(socket.socket.send, 1)
    socket.socket.sendall = in_halves(socket.socket.sendall, 1)
    sys.addaudithook(heard)
    return seen

for line in sys.stdin:
    given = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        seen = arm(given["moment"])
        plan = make_plan(given["run"])
        try:
            if given["what"] == "push":
                push(plan, given["place"], kind=given["kind"])
            else:
                {"lora": export_lora, "merged": export_merged}[given["kind"]](plan, given["place"])
            said = {"moments": seen[0]}
        except BaseException:
            said = {"failed": traceback.format_exc()}
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    with open(read, "rb") as pipe:
        print(json.dumps({"killed": os.WIFSIGNALED(status), **json.loads(pipe.read() or b"{}")}), flush=True)
"""


class Worker:
    """A process that forks one for each piece of work, so that only the first pays for the imports."""

    def __init__(self, folder: Path, hub: str) -> None:
        self.cache = folder / "cache"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        inherited = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|.*proxy", k, re.IGNORECASE)}
        variables = {
            "HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "TMPDIR": str(self.temporary),
            "LLMVA_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",  # or the first of all has moments of its own
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=inherited | variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __call__(self, what: str, kind: str, run: Path, place: str, moment: int = 0) -> tuple[bool, int]:
        """Whether it was killed, and how many moments it had if not; moment 0 never comes.

        Hashes of weights are forgotten first, or some processes had moments that others have not.
        """
        if moment:
            shutil.rmtree(self.cache, ignore_errors=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        given = {"what": what, "kind": kind, "run": str(run), "place": place, "moment": moment}
        print(json.dumps(given), file=self._process.stdin, flush=True)
        said = json.loads(self._process.stdout.readline())
        assert "failed" not in said, said["failed"]
        return said["killed"], said.get("moments", 0)

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Worker]]:
    with serving() as hub:
        worker = Worker(tmp_path_factory.mktemp("worker"), hub.url)
        yield hub, worker
        worker.close()


def base_and_run(folder: Path) -> None:
    """Files that were not changed just now, whose hashes are kept: so it does not hang on the clock what is written."""
    made(folder)
    for path in (folder / "base").iterdir():
        os.utime(path, (1e9, 1e9))


def drawn(count: int) -> list[int]:
    """Ten of the moments 1 to `count`, the last among them."""
    assert count > KILLS
    return [*random.Random(0).sample(range(1, count), KILLS - 1), count]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_exports(kind: str, served: tuple[Hub, Worker], tmp_path: Path) -> None:
    _, work = served
    base_and_run(tmp_path)
    killed, count = work("export", kind, tmp_path, str(tmp_path / "whole"))
    assert not killed
    whole, out = content(tmp_path / "whole"), tmp_path / "out"
    last = {"lora": "adapter_config.json", "merged": "config.json"}[kind]
    before = sorted(tmp_path.iterdir())
    for moment in drawn(count):
        assert work("export", kind, tmp_path, str(out), moment)[0]
        if out.exists():
            assert content(out) == whole
            shutil.rmtree(out)
        for left in set(tmp_path.iterdir()) - set(before):
            files: Any = content(left)
            assert left.name == ".out.part"
            assert last not in files or files.keys() - {".lock"} == whole.keys()
    assert work("export", kind, tmp_path, str(out))[0] is False
    assert content(out) == whole
    assert sorted(tmp_path.iterdir()) == sorted([*before, out])
    if kind == "merged":
        load_model(out, device="cpu")
    print(f"export {kind}: {KILLS} kills of {count} moments: each ended with the same bytes")


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("config", ["adapter_config.json", "config.json"])
def test_what_a_kill_left_loses_its_config_first(
    config: str, backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the folder's own order decided; a second kill could leave a config whose weights were gone."""
    from llmva.export.folder import in_workplace

    names = ["README.md", "a.safetensors", config, "tokenizer.json", "z.safetensors"]
    order = names[::-1] if backwards else names
    left, gone, unlink = tmp_path / ".out.part", list[str](), Path.unlink
    left.mkdir()
    for name in names:
        (left / name).write_text("x")

    def noted(path: Path, missing_ok: bool = False) -> None:
        gone.append(path.name)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "iterdir", lambda path: iter([path / name for name in order]))
    monkeypatch.setattr(Path, "unlink", noted)
    with in_workplace(tmp_path / "out"):
        monkeypatch.undo()
    assert sorted(gone) == sorted(names)
    assert gone[0] == config


@pytest.mark.parametrize("kind", ["edit", "merged"])
def test_pushes(kind: str, served: tuple[Hub, Worker], tmp_path: Path) -> None:
    hub, work = served
    base_and_run(tmp_path)
    killed, count = work("push", kind, tmp_path, f"someone/{kind}")
    assert not killed
    whole = {
        k: v.replace(f"someone/{kind}".encode(), REPO.encode()) for k, v in hub.repos[f"someone/{kind}"].files.items()
    }
    assert whole
    hub.objects.clear()
    hub.repos.clear()
    arrived = 0
    for moment in drawn(count):
        assert work("push", kind, tmp_path, REPO, moment)[0]
        files = hub.repos[REPO].files if REPO in hub.repos else {}
        arrived += bool(files)
        assert files in ({}, whole)
        hub.repos.clear()
    assert arrived < KILLS
    assert work("push", kind, tmp_path, REPO)[0] is False
    assert hub.repos[REPO].files == whole
    assert list(work.temporary.iterdir()) == []  # nor what the killed ones had there
    print(f"push {kind}: {KILLS} kills of {count} moments: nothing or all arrived, and then the same bytes")


def test_two_exports_to_one_folder_do_not_disturb_each_other(served: tuple[Hub, Worker], tmp_path: Path) -> None:
    """The second is told to wait; it used to remove the first's files from under it."""
    import fcntl

    _, work = served
    made(tmp_path)
    (tmp_path / ".out.part").mkdir()
    with (tmp_path / ".out.part" / ".lock").open("ab") as held:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (tmp_path / ".out.part" / "mine").write_text("x")
        with pytest.raises(AssertionError, match="Another llmva is at work"):
            work("export", "merged", tmp_path, str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.part" / "mine").exists()
    work("export", "merged", tmp_path, str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").exists()
