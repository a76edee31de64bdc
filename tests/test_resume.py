"""A run that is killed, at any moment, ends like one that was not when the same command is run again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import IO, Any

import pytest
import torch

import llmva
from conftest import Said
from llmva.alignment import RunOptions
from llmva.runs.run import Run

OPTIONS = ("--per-source", 12, "--max-new-tokens", 4, "--iterations", 2, "--passes", 2, "--seed", 2)
Command = Callable[..., Said]


def align(folder: Path, out: Path) -> tuple[str, ...]:
    prompts = ("--toxic", f"{folder}/toxic.txt::[:24]", "--benign", f"{folder}/benign.txt::[:24]")
    return tuple(str(part) for part in ("align", folder, *prompts, "--out", out, *OPTIONS, "--quiet"))


@pytest.fixture(scope="module")
def whole(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted; do not write into it."""
    from llmva.cli.main import main

    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.raises(SystemExit) as ended:
        main(list(align(taught_folder, out)))
    assert ended.value.code == 0
    return out


def test_the_run_has_something_to_lose(whole: Path) -> None:
    record = json.loads((whole / "run.json").read_text())
    assert len(record["iterations"]) == 3
    assert all(entry["selected"] for entry in record["iterations"][:-1])
    assert record["iterations"][-1]["selected"] == []  # nothing is edited that nothing would measure
    assert record["best_iteration"] > 0  # so the finish measures, and writes, the edited model too


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, one line each."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{where}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}/{i}")
    elif one != other:
        yield f"{where}: {str(one)[:60]} and {str(other)[:60]}"


def same_end(whole: Path, resumed: Path) -> None:
    """Equal in all but what the clock and the machine say."""
    for name in ("edit.safetensors", "answers.jsonl", "prompts.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    records = []
    for folder in (whole, resumed):
        record = json.loads((folder / "run.json").read_text())
        for name in ("seconds", "fit_seconds", "peak_bytes"):
            assert record["cost"].pop(name, 1) > 0  # no fit_seconds where no test prompts are measured
        del record["command"]  # it names the folder
        for entry in record["iterations"]:
            entry.pop("seconds", None)
        records.append(record)
    assert list(differences(*records)) == []
    assert sorted(path.name for path in resumed.iterdir()) == sorted(path.name for path in whole.iterdir())


# -- at every write: the moments at which the files change


class KilledError(BaseException):
    """It passes by everything that handles errors, as a kill does."""


@dataclass(frozen=True)
class Unsafe:
    """A file that was written and not flushed to disk yet; only its first `kept` bytes survive."""

    name: str
    kept: int


class Moments:
    """Counts the moments at which the files change, and tells `act` of each before the change.

    A kill there may lose half of what a file holds beyond what was flushed before; `act` learns which.
    """

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[int, Unsafe | None], None]) -> None:
        self.count, self.act = 0, act
        self.names: dict[int, str] = {}  # of open files
        self.safe: dict[str, int] = {}  # bytes of a file that are on disk for good
        for owner, name in ((os, "truncate"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
            patch.setattr(owner, name, self.counted(getattr(owner, name)))
        self.fsync, self.open = os.fsync, Path.open
        patch.setattr(os, "fsync", self.sync)
        patch.setattr(Path, "open", lambda path, *rest, **options: self.named(self.open(path, *rest, **options)))

    def moment(self, unsafe: Unsafe | None = None) -> None:
        self.count += 1
        self.act(self.count, unsafe)

    def counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.moment()
            return original(*arguments, **options)

        return call

    def named(self, file: IO[Any]) -> IO[Any]:
        self.names[file.fileno()] = file.name
        return file

    def sync(self, descriptor: int) -> None:
        name, size = self.names[descriptor], os.fstat(descriptor).st_size
        old = 0 if name.endswith(".part") else self.safe.get(name, 0)
        self.moment(Unsafe(name, (old + size) // 2))
        self.fsync(descriptor)
        self.safe[name] = size


def kill_at(chosen: int, die: Callable[[], None]) -> Callable[[int, Unsafe | None], None]:
    """For `Moments`: die before the chosen one."""
    truncate = os.truncate  # not the counted one

    def act(moment: int, unsafe: Unsafe | None) -> None:
        if moment == chosen:
            if unsafe is not None:
                truncate(unsafe.name, unsafe.kept)
            die()

    return act


def leave_at_each(out: Path, left: Path) -> Callable[[int, Unsafe | None], None]:
    """For `Moments`: copy what a kill before each moment leaves of `out` to left/1, left/2 and so on."""
    truncate = os.truncate

    def act(moment: int, unsafe: Unsafe | None) -> None:
        copy = left / f"{moment}"
        if out.exists():
            shutil.copytree(out, copy)
            if unsafe is not None:
                truncate(copy / Path(unsafe.name).relative_to(out), unsafe.kept)

    return act


def killed() -> None:
    raise KilledError


class Strict(llmva.Judge):
    """Finds most answers right that are as they were, and every other wrong: so a run soon goes too far."""

    name = "strict"

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def answered(self, prompt: llmva.Prompt, answer: str) -> llmva.Judgement:
        right = answer == self.answers[prompt.text] and zlib.crc32(prompt.text.encode()) % 4 > 0
        label = llmva.Label.ANSWERED if right == prompt.benign else llmva.Label.REFUSED
        return llmva.Judgement(label, 1.0, "rule")


SCENARIOS: dict[str, tuple[str, dict[str, Any]]] = {  # which prompts, and the run
    "as it comes": ("::[:20]", {"iterations": 1, "passes": 2, "per_source": 24, "endings_tokens": 4}),
    "one alignment at a time": (
        "::[:40]",
        {"iterations": 2, "passes": 1, "per_source": 24, "layers": 4, "options": RunOptions(measure_test=False)},
    ),
    "an iteration is undone": (
        "",
        {"iterations": 3, "per_source": 40, "layers": 6, "options": RunOptions(measure_test=False)},
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_before_every_write(taught_folder: Path, tmp_path: Path, scenario: str) -> None:
    model, tokenizer = llmva.load_model(taught_folder)
    undone, (some, settings) = "undone" in scenario, SCENARIOS[scenario]
    files = [f"{taught_folder}/toxic.txt{some}"], [f"{taught_folder}/benign.txt{some}"]
    prompts = llmva.PromptSet.load(*files, only=True)
    judge: llmva.Judge | str = "phrases"
    if undone:
        texts = [prompt.text for _, split in prompts.splits() for prompt in split]
        judge = Strict(dict(zip(texts, llmva.capture(model, tokenizer, texts, max_new_tokens=4).answers, strict=True)))

    def run(out: Path) -> None:
        llmva.align(model, tokenizer, prompts, judge=judge, out=out, max_new_tokens=4, **settings)

    # of the run that goes back only the commits around that are killed: the others are as in any run
    whole, commits = tmp_path / "whole", list[int]()
    with pytest.MonkeyPatch.context() as patch:
        moments, commit = Moments(patch, leave_at_each(whole, tmp_path)), Run.commit
        patch.setattr(Run, "commit", lambda self, *edit: commits.append(moments.count) or commit(self, *edit))
        run(whole)
    entries = json.loads((whole / "run.json").read_text())["iterations"]
    assert any(entry.get("undone") for entry in entries) == undone
    assert all(entry["passes"] for entry in entries[:-1])
    assert len(entries) == settings["iterations"] + 1
    first, last = 1, moments.count
    if undone:
        t = next(entry["iteration"] for entry in entries if entry.get("setback"))
        first, last = commits[t] + 1, commits[t + 1] + 2
    assert last - first > (5 if undone else 20)
    for moment in range(first, last + 1):
        assert (tmp_path / f"{moment}").exists() == (moment > 1)  # the first makes the folder
        run(tmp_path / f"{moment}")
        same_end(whole, tmp_path / f"{moment}")


# -- at random moments, by SIGKILL


def die_at(moment: int, arguments: tuple[str, ...], count: Any) -> None:
    """Run the command in a process of its own that kills itself before a write or a pass through the model."""

    from llmva.cli.main import main
    from llmva.models import load

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch, kill_at(moment, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        original = load.load_model

        def load_model(*names: Any, **options: Any) -> tuple[Any, Any]:
            model, tokenizer = original(*names, **options)
            forward = model.forward

            @wraps(forward)  # no hook: those who see whole batches are answered batch by batch
            def counted(*args: Any, **kwargs: Any) -> Any:
                moments.moment()
                return forward(*args, **kwargs)

            model.forward = counted
            return model, tokenizer

        patch.setattr(load, "load_model", load_model)
        try:
            main(list(arguments))
        finally:
            count.value = moments.count


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[int, tuple[str, ...]], tuple[int | None, int]]]:
    """Run `die_at` in a fork of a process that has imported everything; gives exit code and moments counted."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmva.alignment", "llmva.cli.inputs", "transformers.models.llama.modeling_llama"])

    def run(moment: int, arguments: tuple[str, ...]) -> tuple[int | None, int]:
        count = context.Value("i", 0)
        process = context.Process(target=die_at, args=(moment, arguments, count))
        process.start()
        process.join()
        return process.exitcode, count.value

    return run


@pytest.mark.parametrize("more", [(), ("--passes", "1", "--layers", "4")], ids=["as it comes", "one at a time"])
def test_killed_at_five_random_moments(
    taught_folder: Path, whole: Path, tmp_path: Path, start: Any, more: tuple[str, ...]
) -> None:
    """In the passes through the model too: all that was foreseen there has to come again."""
    code, moments = start(0, (*align(taught_folder, tmp_path / "never" / "run"), *more))
    assert code == 0
    if more:
        whole = tmp_path / "never" / "run"
    same_end(whole, tmp_path / "never" / "run")
    for moment in random.Random(7).sample(range(1, moments + 1), 5):
        out = tmp_path / f"{moment}" / "run"
        assert start(moment, (*align(taught_folder, out), *more))[0] == -signal.SIGKILL
        assert start(0, (*align(taught_folder, out), *more))[0] == 0
        same_end(whole, out)


def test_killed_again_and_again(taught_folder: Path, whole: Path, tmp_path: Path, start: Any) -> None:
    """No process lives long enough for the whole run; together they finish."""
    out, lives, code = tmp_path / "run", 0, None
    _, needed = start(0, align(taught_folder, tmp_path / "alone" / "run"))
    moments = random.Random(8)
    while code != 0:
        lives += 1
        assert lives < 60
        code, _ = start(moments.randint(needed // 3, needed * 2 // 3), align(taught_folder, out))
        assert code in (0, -signal.SIGKILL)
    assert lives > 1
    same_end(whole, out)


# -- running the same command again


def test_a_finished_run_is_not_run_again(
    taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    first = command(*align(taught_folder, out), "--json")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("transformers.GenerationMixin.generate", None)
    second = command(*align(taught_folder, out), "--json")
    assert (first.code, second.code, second.err) == (0, 0, "")
    assert json.loads(second.out) == json.loads(first.out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_restart_starts_over(taught_folder: Path, whole: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "run"
    assert command(*align(taught_folder, out), "--layers", 1).code == 0
    assert (out / "edit.safetensors").read_bytes() != (whole / "edit.safetensors").read_bytes()
    assert command(*align(taught_folder, out), "--restart").code == 0
    same_end(whole, out)


def test_a_restart_that_is_killed_never_mixes_two_runs(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    out, whole, short = tmp_path / "run", tmp_path / "whole", ("--iterations", 1)
    assert command(*align(taught_folder, whole), *short).code == 0
    assert command(*align(taught_folder, out), *short, "--layers", 1).code == 0
    old = {path.name: path.read_bytes() for path in out.iterdir()}
    for moment in range(1, 12):
        for name, data in old.items():
            (out / name).write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            moments = Moments(patch, kill_at(moment, killed))
            with pytest.raises(KilledError):
                command(*align(taught_folder, out), *short, "--restart")
            assert moments.count == moment
        replaced = (out / "run.json").read_bytes() != old["run.json"]
        said = command(*align(taught_folder, out), *short)
        if replaced:  # the new run goes on
            assert (said.code, said.err) == (0, "")
            same_end(whole, out)
        else:  # the old one is still whole
            assert "holds a run with the setting layers 1" in said.err
            assert (out / "edit.safetensors").read_bytes() == old["edit.safetensors"]


def test_answers_with_odd_line_ends_are_read_again(whole: Path, tmp_path: Path) -> None:
    """JSON may hold U+2028 and its like as they are; Python's splitlines would cut there."""
    from llmva.edit import Edit
    from llmva.prompts import PromptSet
    from llmva.runs.run import Run

    prompts = PromptSet.from_jsonl(whole / "prompts.jsonl")
    known = json.loads((whole / "run.json").read_text())
    fields = ("base", "settings", "seed", "judge", "prompts")
    run, _ = Run.open(tmp_path / "run", {name: known[name] for name in fields}, prompts)
    row = {"iteration": 0, "split": "train", "id": "0", "answer": "a\u2028b\u0085c\x0bd\ne", "label": "answered"}
    run.answers.append(row)
    run.record["iterations"].append({"iteration": 0, "f1": 0.5, "asr": 0.5, "orr": None})
    run.record["stopped"] = "enough"
    run.commit(Edit({}, known["base"]))
    again, resumed = Run.open(tmp_path / "run", {name: known[name] for name in fields}, prompts)
    assert resumed
    assert again.answers == [row]


# -- two at once


def test_two_processes_do_not_share_a_folder(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    assert command(*align(taught_folder, out)).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(out / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        for more in ((), ("--restart",)):
            said = command(*align(taught_folder, out), *more)
            assert (said.code, said.out) == (1, "")
            assert said.err.startswith(f"error: Another llmva is at work in '{out}': ")
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    finally:
        holder.kill()
        holder.wait()
        for stream in (holder.stdin, holder.stdout):
            if stream is not None:
                stream.close()
    assert command(*align(taught_folder, out)).code == 0  # a lock dies with its process
