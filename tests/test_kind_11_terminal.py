"""The terminal: Ctrl-C, narrow tables, closed streams, ASCII and python -OO; and what used to go untold.

Each of these failed before, except where a comment says that it held.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from conftest import Said
from llmva.cli.terminal.console import Display
from llmva.cli.terminal.streams import Shown, safe_streams
from llmva.edit import Edit
from llmva.report.fitting import Fitting
from llmva.runs.run import Run

Command = Callable[..., Said]
PROGRAM = (sys.executable, "-c", "from llmva.cli import main; main()")


def arguments(folder: Path, out: Path, *more: object) -> tuple[object, ...]:
    sides = ("--toxic", folder / "toxic.txt", "--benign", folder / "benign.txt")
    return ("align", folder, *sides, "--per-source", 40, "--max-new-tokens", 8, "--iterations", 3, "--out", out, *more)


@pytest.fixture(scope="module")
def run(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; do not write into it."""
    from llmva.cli.main import main

    out = tmp_path_factory.mktemp("terminal") / "run"
    with pytest.raises(SystemExit):
        main([str(word) for word in arguments(taught_folder, out, "--quiet")])
    return out


# -- Ctrl-C


def press(*_: object, **__: object) -> None:
    """As a user does: the signal, not the exception."""
    os.kill(os.getpid(), signal.SIGINT)


def last(said: Said) -> str:
    assert (said.code, said.out) == (130, "")
    assert "Traceback" not in said.err
    return said.err.splitlines()[-1]


def stop_after(commits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, made = Run.commit, []

    def commit_and_press(self: Run, *edit: Any) -> None:
        commit(self, *edit)
        made.append(1)
        if len(made) == commits:
            press()

    monkeypatch.setattr(Run, "commit", commit_and_press)


def test_a_run_says_after_which_iteration_and_goes_on(
    taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commits in (1, 2):
        with monkeypatch.context() as patched:
            stop_after(1, patched)
            line = last(command(*arguments(taught_folder, tmp_path / "r", "--passes", 1)))
        assert line == f"Interrupted after iteration {commits - 1}: run the same command again to resume."
    assert command(*arguments(taught_folder, tmp_path / "r", "--passes", 1, "--quiet")) == Said(0, "", "")
    assert len(json.loads((tmp_path / "r/run.json").read_text())["iterations"]) > 2


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("llmva.models.load.load_model", "Interrupted before the work began, so nothing has changed"),
        ("llmva.alignment.observe_iteration", "Interrupted before iteration 0 was measured"),
        ("llmva.alignment.write_report", "Interrupted after the last measurement: .* to see the result"),
    ],
)
def test_ctrl_c_at_other_moments(
    where: str, says: str, taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, press)
    given = arguments(taught_folder, tmp_path / "r", "--iterations", 1)
    assert re.match(f"{says}.*: run the same command again.*\\.$|{says}.$", last(command(*given)))


def test_with_restart_the_same_command_would_discard_what_is_kept(
    run: Path, taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r"
    out.mkdir()
    for path in run.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    before = (out / "run.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("llmva.models.load.load_model", press)
        assert "nothing has changed" in last(command(*arguments(taught_folder, out, "--restart")))
    assert (out / "run.json").read_bytes() == before
    stop_after(1, monkeypatch)
    line = last(command(*arguments(taught_folder, out, "--restart")))
    assert line == "Interrupted after iteration 0: run the same command again without --restart to resume."


@pytest.mark.parametrize("swallowed", [False, True])
def test_libraries_may_not_hide_it(
    swallowed: bool, taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As imports of C extensions do, and transformers' lazy ones: they raise something else, or go on."""
    from llmva.models.load import load_model

    def hide(*given: Any, **options: Any) -> Any:
        try:
            press()
            signal.sigtimedwait([], 0)
        except KeyboardInterrupt:
            if not swallowed:
                raise ImportError("Could not import module 'LlamaConfig'") from None
        return load_model(*given, **options)

    monkeypatch.setattr("llmva.models.load.load_model", hide)
    assert "before" in last(command(*arguments(taught_folder, tmp_path / "r")))


@pytest.mark.parametrize(
    ("words", "where", "says"),
    [
        (("export", "RUN", "--as", "merged", "--out", "OUT/m"), "llmva.export.merged._finish", "there is no '.*m'"),
        (
            ("export", "RUN", "--as", "lora", "--out", "OUT/m"),
            "llmva.export.adapters.peft.describe",
            "there is no '.*m'",
        ),
        (("evaluate", "MODEL", "--edit", "RUN"), "llmva.models.load.load_model", "nothing was written"),
        (("chat", "MODEL", "-p", "hello"), "llmva.models.load.load_model", "nothing was written"),
        (("inspect", "RUN"), "llmva.edit_file.read_edit", "nothing was written"),
        (("push", "RUN", "--repo", "me/it"), "llmva.export.push.push", "look whether me/it has the new commit"),
        (("judge", "check"), "llmva.judges.check.check_judge", "nothing was written"),
    ],
)
def test_commands_that_keep_nothing(
    words: tuple[str, ...],
    where: str,
    says: str,
    run: Path,
    taught_folder: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, press)
    places = {"RUN": str(run), "MODEL": str(taught_folder)}
    given = [places.get(word, word.replace("OUT", str(tmp_path))) for word in words]
    line = last(command(*given))
    assert re.fullmatch(f"Interrupted.*{says}.*run the same command again.*\\.", line)
    assert list(tmp_path.iterdir()) == []  # no half of an export


LONG: dict[str, tuple[tuple[str, ...], str, str]] = {
    "align": (("align", "MODEL", "SIDES", "--out", "OUT/r"), "llmva.alignment.fit_select_align", "iteration 0 was"),
    "demo": (("demo", "--out", "OUT/r"), "llmva.alignment.observe_iteration", "iteration 0 was measured"),
    "extend": (("extend", "RUN", "NEW", "--out", "OUT/r"), "llmva.alignment.observe_iteration", "iteration 0 was"),
    "compare": (
        ("compare", "MODEL", "SIDES", "--out", "OUT/r"),
        "llmva.experiments.measure.ExperimentSetup.measure",
        "anything was",
    ),
    "ablate": (
        ("ablate", "MODEL", "SIDES", "--what", "layers", "--out", "OUT/r"),
        "llmva.experiments.measure.ExperimentSetup.observe",
        "anything was",
    ),
    "evaluate": (("evaluate", "MODEL", "--edit", "RUN"), "llmva.evaluation.evaluate.observe", "nothing was written"),
    "export": (("export", "RUN", "--as", "merged", "--out", "OUT/r"), "llmva.export.merged._finish", "there is no"),
    "verify": (("verify", "MODEL", "RUN"), "llmva.export.verify.load_model", "nothing was written"),
    "push": (("push", "RUN", "--repo", "me/it"), "llmva.export.push.push", "look whether me/it has"),
}


@pytest.mark.parametrize("name", LONG)
def test_every_command_that_runs_long_says_one_sentence(
    name: str, run: Path, taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These held."""
    words, where, says = LONG[name]
    monkeypatch.setattr(where, press)
    sides = ["--toxic", str(taught_folder / "toxic.txt"), "--benign", str(taught_folder / "benign.txt")]
    new = [f"paint a {noun} for {place}" for noun in ("door", "fence", "lamp") for place in ("me", "us", "all", "you")]
    (tmp_path / "new.txt").write_text("\n".join(new))
    several = {"SIDES": sides, "NEW": ["--benign", str(tmp_path / "new.txt")]}
    one = {"RUN": str(run), "MODEL": str(taught_folder)}
    given = [part for word in words for part in several.get(word, [one.get(word, word.replace("OUT", str(tmp_path)))])]
    said = command(*given, "--quiet")
    assert (said.code, said.out) == (130, "")
    (line,) = said.err.splitlines()
    assert re.fullmatch(f"Interrupted.*{says}.*run the same command again.*\\.", line)


def test_a_comparison_says_how_much_is_kept(
    taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmva.experiments.cells import Cells

    def keep_one(self: Cells, name: str, measure: Any) -> Any:
        assert self.directory is not None
        (self.directory / "cells" / f"{name}.json").write_text("{}")
        press()

    monkeypatch.setattr(Cells, "get", keep_one)
    sides = ("--toxic", taught_folder / "toxic.txt", "--benign", taught_folder / "benign.txt")
    said = command("compare", taught_folder, *sides, "--methods", "none,cast", "--seeds", 1, "--out", tmp_path / "c")
    assert last(said) == "Interrupted with 1 measurement kept: run the same command again to resume."


def test_the_programs_own_start(tmp_path: Path) -> None:
    """Ctrl-C while the command line itself is imported."""
    code = (
        "import builtins, os, signal\nold = builtins.__import__\n"
        "def slow(name, *rest):\n    name == 'typer' and os.kill(os.getpid(), signal.SIGINT)\n"
        "    return old(name, *rest)\n"
        "builtins.__import__ = slow\nfrom llmva.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "Interrupted before the command began: run the same command again.\n"


def test_an_ignored_signal_stays_ignored(command: Command) -> None:
    """As under nohup. This held."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert command("data", "list", "--quiet").code == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert command("data", "list", "--quiet").code == 0
    assert signal.getsignal(signal.SIGINT) is before


# -- tables


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("words", [("front",), ("inspect",), ("export", "--as", "diff")])
def test_tables_hold(
    words: tuple[str, ...], width: int, run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = command(words[0], run, *words[1:])
    assert said.code == 0
    assert "…" not in said.out
    drawn = [
        line for line in said.out.splitlines() if not re.match("base sha256|edit of|\\d+ iter|Wrote|  iteration", line)
    ]
    assert max(map(len, drawn)) <= width
    record = json.loads((run / "run.json").read_text())
    wanted = {
        "front": [f"{100 * row['orr']:.1f}%" for row in record["front"]] + ["chosen"],
        "inspect": [f"{record['test'][side]['f1']:.3f}" for side in ("before", "after")] + ["Utility kept"],
        "export": [str(name.split(".")[2]) for name in Edit.load(run).chosen.factors],
    }
    text = "\n".join(drawn)
    assert all(word in text for word in wanted[words[0]])
    assert ("Left out at this width: intervals" in text) == (
        width < {"front": 100, "inspect": 70, "export": 0}[words[0]]
    )


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100])
def test_every_other_table_holds(width: int) -> None:
    from llmva.report import ablation_table, tasks_table, transfer_table

    rate = {"asr": 1.0, "asr_interval": [0.9, 1.0], "n_toxic": 1000, "orr": 0.123, "orr_interval": [0.1, 0.2]}
    sides = {"before": {**rate, "n_benign": 900, "f1": 0.5}, "after": {**rate, "n_benign": 900, "f1": 0.987}}
    task = {"name": "a_benchmark_with_a_name", "metric": "acc_norm", "n": 14042, "before": 0.5, "after": 0.4}
    mean = {"mean": 0.987, "spread": 0.012, "interval": [0.95, 0.99]}
    point = {"x": 1, "label": "without the quiet readers", **dict.fromkeys(("f1", "asr", "orr"), mean), "runs": []}
    tables: list[Fitting] = [
        transfer_table({"sets": [{"name": "a-set-with-a-long-name", **sides}], "test": sides}),
        tasks_table({"utility_tasks": [{**task, "ratio": 0.812, "interval": [0.78, 0.84]}]}),
        ablation_table({"series": [{"name": "one step changed", "points": [point]}], "x_label": "what was varied"}),
    ]
    for table, numbers in zip(tables, (("98.7", "0.987", "1000"), ("81.2%", "14042"), ("0.987", "98.7%")), strict=True):
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        assert any(number in text for number in numbers)


@pytest.mark.parametrize(("width", "there"), [(60, ""), (80, "login"), (200, "home"), (None, "home")])
def test_data_list_fits_a_terminal_and_is_whole_in_a_pipe(
    width: int | None, there: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    said = command("data", "list")
    lines = said.out.splitlines()
    assert (said.code, said.err) == (0, "")
    assert max(map(len, lines)) <= (width or 999)
    assert lines[0].endswith(there or "licence")
    assert "…" not in said.out
    assert ("Left out" in said.out) == ((width or 200) < 150)
    assert "100,000" in said.out


# -- streams that are closed, or cannot show every letter


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("data list >&-", {0}),
        ("data list --json >&-", {0}),
        ("align --help >&-", {0}),
        ("data list 2>&-", {0}),
        ("inspect nowhere 2>&-", {2}),
        ("data list <&- >&- 2>&-", {0}),
        ("data list | true", {0, 1}),
        ("align --help | true", {0, 1}),
        ("--version > /dev/full", {0, 1}),
    ],
)
def test_closed_streams_end_quietly(words: str, code: set[int], tmp_path: Path) -> None:
    script = f"{' '.join(map(repr, PROGRAM[:2]))} '{PROGRAM[2]}' {words}; echo ${{PIPESTATUS[0]}} > code"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert int((tmp_path / "code").read_text()) in code
    assert "Traceback" not in done.stderr + done.stdout
    assert "Exception ignored" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_a_terminal_of_ascii_letters(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmva.report import before_after_table

    kept = io.BytesIO()
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(kept, "ascii"))
    with safe_streams():
        with Display() as display:
            display.line("angle 90°, perplexity ×1.1, “so” ± 1 – and schön …")
            display.console.print(before_after_table(json.loads((run / "run.json").read_text())))
        print("日本", file=sys.stderr)
    lines = kept.getvalue().decode("ascii").splitlines()
    assert lines[0] == 'angle 90 deg, perplexity x1.1, "so" ~ 1 - and sch\\xf6n ...'
    assert lines[-1] == "\\u65e5\\u672c"
    table = [line for line in lines if "|" in line]
    assert len({len(line) for line in table}) == 1  # columns stay in line
    assert any("- | 100.0%" in line for line in table)


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("TERM", "dumb")
    assert not Display().live
    monkeypatch.setenv("TERM", "xterm")
    assert Display().live


def test_a_log_on_a_full_disk_does_not_end_the_work() -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        shown = Shown(full)
        assert shown.write("a line\n") == 7
        shown.flush()
        assert shown.write("more\n") == 5


def test_without_docstrings_there_is_help_all_the_same() -> None:
    for words in ([], ["align", "--help"], ["data", "list", "--help"]):
        said = [
            subprocess.run([python, *flags, *PROGRAM[1:], *words], capture_output=True, text=True, check=True).stdout
            for python, flags in ((sys.executable, []), (sys.executable, ["-OO"]))
        ]
        assert said[0] == said[1]
        assert len(said[0]) > 200


def test_transformers_may_not_complete_docstrings_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails then, and no model loads. In a process of its own this takes half a minute: nothing is compiled yet."""
    from transformers import utils

    from llmva.cli.inputs import quiet_libraries

    monkeypatch.setattr(utils, "auto_docstring", utils.auto_docstring)
    monkeypatch.setattr("llmva.cli.inputs.sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    quiet_libraries()
    bare: Any = type("Bare", (), {"__doc__": None})
    assert utils.auto_docstring(bare) is bare
    assert utils.auto_docstring(custom_intro="so")(bare) is bare


# -- what used to go untold


def test_what_rust_code_prints_is_no_result() -> None:
    """As tokenizers does of a field that it does not know."""
    code = (
        "import os\nfrom llmva.prompts.public import registry\nold = registry.list_data\n"
        "registry.list_data = lambda: (os.write(1, b'noise\\n'), old())[1]\n"
        "from llmva.cli import main\nmain(['data', 'list', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["data"]
    assert done.stderr == "noise\n"


@pytest.fixture
def unfinished(taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was ended after iteration 1: the columns of iteration 2 are made and not measured."""
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        assert command(*arguments(taught_folder, tmp_path / "r", "--passes", 1, "--quiet")).code == 130
    return tmp_path / "r"


def set_best(folder: Path, best: int) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"best_iteration": best}))


def test_an_unfinished_run_ships_what_it_measured(unfinished: Path, tmp_path: Path, command: Command) -> None:
    assert Edit.load(unfinished).iterations == 2
    set_best(unfinished, 1)
    said = command("export", unfinished, "--as", "lora", "--out", tmp_path / "one", "--json")
    assert json.loads(said.out)["iteration"] == 1
    assert "unfinished: this is iteration 1, the best on validation prompts of the 2 measured so far." in said.err
    said = command("export", unfinished, "--as", "lora", "--out", tmp_path / "two", "--iteration", 2, "--json")
    (note,) = json.loads(said.out)["notes"]
    assert note == "Iteration 2 was made by the run and never measured, so nothing is known of what it does."
    assert note in said.err
    set_best(unfinished, 0)
    said = command("export", unfinished, "--as", "lora", "--out", tmp_path / "three")
    assert said.code == 2
    assert "is unfinished, and nothing that it measured is better than the untouched model: finish it" in said.err


def test_an_unfinished_run_is_told_where_it_is_used(unfinished: Path, taught_folder: Path, command: Command) -> None:
    set_best(unfinished, 1)
    given = ("evaluate", taught_folder, "--edit", unfinished, "--max-new-tokens", 4, "--json")
    limits = json.loads(command(*given).out)["limits"]
    assert any("unfinished: this is iteration 1" in limit for limit in limits)
    said = command("chat", taught_folder, "--edit", unfinished, "--iteration", 2, "-p", "paint the door")
    assert said.err.startswith("Iteration 2 was made by the run and never measured")


@pytest.fixture
def with_more(taught_folder: Path, tmp_path: Path) -> Path:
    """The taught model with a bias that its config denies, and a head that its type does not have."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "more"
    shutil.copytree(taught_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"model.layers.0.self_attn.o_proj.bias": torch.ones(32), "mtp.head.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_tensors_that_are_left_out_are_told(with_more: Path, tmp_path: Path, command: Command) -> None:
    says = (
        "The checkpoint of 'more' holds tensors that its model type does not use and that no figure knows of: "
        "model.layers.0.self_attn.o_proj.bias and 1 more."
    )
    said = command(*arguments(with_more, tmp_path / "r", "--iterations", 1))
    assert (said.err.count(says), said.out.count(says)) == (1, 1)  # when it begins, and among the limits at its end
    assert json.loads((tmp_path / "r/run.json").read_text())["limits"][0] == says
    given = ("evaluate", with_more, "--toxic", with_more / "toxic.txt", "--max-new-tokens", 2, "--json", "--quiet")
    assert json.loads(command(*given).out)["limits"] == [says]


def test_tensors_that_are_not_there_are_refused(with_more: Path, command: Command) -> None:
    """transformers makes them up and goes on. This held."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(with_more / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, with_more / "model.safetensors", {"format": "pt"})
    said = command("chat", with_more, "-p", "hello")
    assert (said.code, said.out) == (1, "")
    assert "lacks the weights model.layers.2.mlp.down_proj.weight: download" in said.err


@pytest.mark.parametrize(
    ("name", "says"),
    [("grün".encode(), "is UTF-8, and the locale names another"), (b"gr\xfcn", "is not UTF-8")],  # the second held
)
def test_a_locale_of_another_encoding_is_not_taken_for_another_file(name: bytes, says: str, tmp_path: Path) -> None:
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [os.fsencode(word) for word in PROGRAM]
    done = subprocess.run([*words, b"chat", name, b"-p", b"x"], env=plain, capture_output=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr.decode()
