"""What a wheel carries. `benchmarks/wheel.py` builds one and uses it, which takes minutes."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "llmva"


def left_out(files: list[str], patterns: list[str]) -> list[str]:
    """Files beside the modules that no pattern names; `*` stays within a folder, as in a build."""
    forms = [re.compile(re.escape(pattern).replace(r"\*", "[^/]*")) for pattern in patterns]
    return [file for file in files if not any(form.fullmatch(file) for form in forms)]


def test_the_wheel_carries_every_data_file() -> None:
    (listed,) = re.findall(r"^llmva = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    patterns = re.findall(r'"([^"]+)"', listed)
    paths = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    files = [path.relative_to(PACKAGE).as_posix() for path in paths]
    assert {"py.typed", "organism/weights/model.safetensors"} <= set(files)
    assert left_out(files, patterns) == []
    assert left_out(files, patterns[1:]) == ["py.typed"]


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
