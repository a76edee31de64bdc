"""The site has every page and every public name, and loads nothing from elsewhere. `make docs` builds it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import llmva

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    """The hooks of the site, which are no part of the package."""
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(nav: Any) -> Iterator[str]:
    """The pages of the menu."""
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from entries(entry)


def test_every_page_is_in_the_menu_once(pages: ModuleType) -> None:
    written = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    made = [page for page in pages.OUTSIDE if page.endswith(".md")]
    assert sorted(entries(CONFIG["nav"])) == sorted([*written, *made])
    assert all((ROOT / source).is_file() for source in pages.OUTSIDE.values())


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: llmva\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(llmva.__all__)


@pytest.mark.parametrize(
    ("place", "link", "leads_to"),
    [
        ("index.md", "docs/method.md", "method.md"),
        ("index.md", "CHANGELOG.md", "changes.md"),
        ("index.md", "docs/howto/index.md", "howto/index.md"),
        ("index.md", "examples/align.ipynb", "align.ipynb"),
        ("results.md", "../src/llmva/organism/weights/README.md", "organism.md"),
        ("method.md", "prompts.md", "prompts.md"),
        ("howto/csv.md", "../prompts.md", "../prompts.md"),
        ("howto/csv.md", "vllm.md", "vllm.md"),
        ("api.md", "../README.md", "index.md"),
        ("howto/index.md", "../../examples/align.ipynb", "../align.ipynb"),
    ],
)
def test_links_to_files_lead_to_pages(place: str, link: str, leads_to: str, pages: ModuleType) -> None:
    assert pages.target(place, link) == leads_to


def test_links_in_code_stay(pages: ModuleType) -> None:
    class Page:
        class file:  # noqa: N801
            src_uri = "index.md"

    text = "[a](docs/method.md#idea)\n\n```text\n[b](docs/method.md)\n```\n\n[c](https://example.com/docs) [d](#here)\n"
    assert pages.on_page_markdown(text, Page) == text.replace("docs/method.md#idea", "method.md#idea")


@pytest.mark.parametrize(
    ("html", "refused"),
    [
        ('<script src="https://example.com/x.js">', True),
        ('<link rel="stylesheet" href="//example.com/x.css">', True),
        ("<link rel=preconnect href=https://example.com>", True),
        ('<img alt="a" src="http://example.com/x.png">', True),
        ('<script src="assets/x.js">', False),
        ('<link rel="stylesheet" href="assets/x.css">', False),
        ('<a href="https://example.com">', False),
    ],
)
def test_what_a_browser_would_load_from_elsewhere_is_seen(html: str, refused: bool, pages: ModuleType) -> None:
    assert bool(pages.LOADED.search(html)) == refused


def test_no_host_is_named() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not re.search(r"\w+://", text)
    assert CONFIG["theme"]["font"] is False
    assert not CONFIG["site_url"]


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs mkdocs: make docs installs it, and builds the site as this does")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "llmva.align" in (tmp_path / "api.html").read_text(encoding="utf-8")
    assert (tmp_path / "align.ipynb").is_file()
    assert not (tmp_path / "pages.py").exists()
