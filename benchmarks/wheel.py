"""Build the wheel, install it in a fresh environment, and use it from an empty folder: help, demo, export, report.

    python benchmarks/wheel.py [--python PYTHON] [--borrow]

`--borrow` takes the dependencies of the Python that runs this script, which saves their download; without it pip
installs them. Prints one line a step with its seconds, by the clock and of the processor, and ends with exit code 1
where a step fails or help takes more than .3 s of the processor.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
HELP_SECONDS = 0.3  # of the processor
STEPS = (
    ("demo help", ["demo", "--help"]),
    ("data", ["data", "list", "--json"]),
    ("task files", ["data", "tasks", "--json"]),
    ("demo", ["demo", "--out", "run", "--quiet"]),
    ("inspect", ["inspect", "run", "--quiet"]),
    ("front", ["front", "run", "--quiet"]),
    ("figures", ["figures", "run", "--format", "pdf", "--quiet"]),
    ("export", ["export", "run", "--as", "lora", "--out", "adapter", "--quiet"]),
    ("chat", ["chat", "demo", "--edit", "run", "--prompt", "hello", "--quiet"]),
)
MADE = ("run/report.html", "run/front.svg", "run/figures/front.pdf", "adapter/adapter_model.safetensors")


def call(name: str, command: list[str], folder: Path) -> str:
    """Run a command in a folder without what this process was told of packages; end this script if it fails."""
    began, used = time.monotonic(), children_seconds()
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
    how = "done" if done.returncode == 0 else "FAILED"
    seconds = f"{time.monotonic() - began:.2f} s by the clock, {children_seconds() - used:.2f} s of the processor"
    print(f"{name}: {how}, {seconds}", flush=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}")
    return done.stdout


def children_seconds() -> float:
    """Processor time of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def check_help(program: str, folder: Path) -> None:
    """End this script if help takes long: the least of five calls, since other processes slow some of them down."""
    tries = []
    for _ in range(5):
        used = children_seconds()
        call("help", [program, "--help"], folder)
        tries.append(children_seconds() - used)
    if min(tries) >= HELP_SECONDS:
        sys.exit(f"help takes {min(tries):.2f} s of the processor, which should be less than {HELP_SECONDS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="make the environment with this Python")
    parser.add_argument("--borrow", action="store_true", help="use the dependencies of the Python that runs this")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        work = folder / "empty"
        work.mkdir()
        source = folder / "source"  # a build leaves folders behind
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info"))
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
        call("wheel", build, folder)
        (wheel,) = folder.glob("*.whl")
        call("environment", [given.python, "-m", "venv", str(folder / "venv")], folder)
        python = folder / "venv" / "bin" / "python"
        site = call(
            "its packages", [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder
        )
        if given.borrow:
            (Path(site.strip()) / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        install = [str(python), "-m", "pip", "install", "--quiet", *(["--no-deps"] if given.borrow else []), str(wheel)]
        call("install", [*install, "--force-reinstall"] if given.borrow else install, folder)
        there = call("where", [str(python), "-c", "import llmva; print(llmva.__file__)"], work)
        if not there.startswith(str(folder)):
            sys.exit(f"not the wheel's package but {there}")
        program = str(folder / "venv" / "bin" / "llmva")
        check_help(program, work)
        for name, words in STEPS:
            call(name, [program, *words], work)
        missing = [name for name in MADE if not (work / name).is_file()]
        if missing:
            sys.exit(f"not written: {', '.join(missing)}")


if __name__ == "__main__":
    main()
