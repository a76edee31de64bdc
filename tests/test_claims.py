"""Claims: of any number of processes one measures a cell, and a dead one's claim is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llmva.experiments.cells import Cells
from llmva.experiments.claims import Claimed, Claims, owner
from llmva.files import write_new

HOLD = """
import sys, time
from pathlib import Path
from llmva.experiments.claims import Claims
with Claims(Path(sys.argv[1])).hold("cell"):
    print("held", flush=True)
    time.sleep(600)
"""
TAKE = """
import sys
from pathlib import Path
from llmva.experiments.cells import Cells
from llmva.experiments.claims import Claimed
cells = Cells(Path(sys.argv[1]), {"model": "m"}, shared=True)
for number in range(40):
    while True:
        try:
            cells.get(f"cell-{number}", lambda: {"by": sys.argv[2]})
            break
        except Claimed:
            pass
print(" ".join(cells.measured))
"""


def process(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True)


def test_a_file_is_made_once(tmp_path: Path) -> None:
    made = []
    together = threading.Barrier(8)

    def make(number: int) -> None:
        together.wait()
        made.append(write_new(tmp_path / "x", str(number).encode()))

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_held_cell_is_left_to_its_holder(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    with first.hold("cell"):
        with pytest.raises(Claimed), second.hold("cell"):
            pass
        assert (second.holder("cell") or {})["pid"] == os.getpid()
        with second.hold("cell.1"), second.hold("other"):  # a name that begins alike
            pass
    assert second.holder("cell") is None
    with second.hold("cell"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    other = process(HOLD, tmp_path)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(Claimed), claims.hold("cell"):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with claims.hold("cell"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cell.1", "cell.2"]
    assert list(tmp_path.iterdir()) == []


def test_a_pid_that_is_used_again_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "cell.1").write_text(json.dumps({**owner(), "began": 1.0}))
    with Claims(tmp_path).hold("cell"):
        pass


def test_a_silent_process_of_another_machine_is_taken_for_dead(tmp_path: Path) -> None:
    path = tmp_path / "cell.1"
    path.write_text(json.dumps({**owner(), "host": "elsewhere", "pid": 1}))
    claims = Claims(tmp_path, silence=60)
    with pytest.raises(Claimed), claims.hold("cell"):
        pass
    before = time.time() - 61
    os.utime(path, (before, before))
    with claims.hold("cell"):
        pass


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmva.experiments.claims.BEAT", 0.01)
    with Claims(tmp_path).hold("cell"):
        path = tmp_path / "cell.1"
        os.utime(path, (1.0, 1.0))
        until = time.monotonic() + 10
        while path.stat().st_mtime == 1.0 and time.monotonic() < until:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1.0


def test_every_cell_is_measured_by_one_of_several_processes(tmp_path: Path) -> None:
    others = [process(TAKE, tmp_path, number) for number in range(3)]
    measured = [other.communicate(timeout=120)[0].split() for other in others]
    assert [other.returncode for other in others] == [0, 0, 0]
    assert sorted(name for names in measured for name in names) == sorted(f"cell-{number}" for number in range(40))
    for number, names in enumerate(measured):
        for name in names:
            assert json.loads((tmp_path / "cells" / f"{name}.json").read_text()) == {"by": str(number)}
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_shared_folder_refuses_another_study(tmp_path: Path) -> None:
    from llmva.errors import UsageError

    Cells(tmp_path, {"model": "m"}, shared=True)
    with pytest.raises(UsageError, match="model m, and this is n"):
        Cells(tmp_path, {"model": "n"}, shared=True)


def test_an_interrupted_cell_is_free_again(tmp_path: Path) -> None:
    cells = Cells(tmp_path, {"model": "m"}, shared=True)

    def interrupted() -> dict[str, object]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells.get("cell", interrupted)
    assert cells.get("cell", lambda: {"f1": 0.5}) == {"f1": 0.5}
    assert cells.measured == ["cell"]
