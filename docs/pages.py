"""Hooks of the site: files outside docs/ become pages, links to them lead there, and nothing is loaded from elsewhere.

mkdocs calls the functions that begin with `on_`, by their names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "licence.md": "LICENSE",
    "align.ipynb": "examples/align.ipynb",
    "gpu.ipynb": "examples/gpu.ipynb",
    "organism.md": "src/llmva/organism/weights/README.md",
}
LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
METADATA = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # of a model card
LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*rel=\"?(?:stylesheet|preconnect)"
    r"\"?[^>]*href=\"?(?:https?:)?//"
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs/."""
    from mkdocs.structure.files import File

    for page, source in OUTSIDE.items():
        text = METADATA.sub("", (ROOT / source).read_text(encoding="utf-8"))
        content = f"# Licence\n\n```text\n{text}```\n" if source == "LICENSE" else text
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at pages, where they point at files."""
    place = page.file.src_uri
    parts = FENCE.split(markdown)
    fences = [*FENCE.findall(markdown), ""]
    return "".join(
        LINK.sub(lambda link: f"{link[1]}{target(place, link[2])}{link[3]}", part) + fence
        for part, fence in zip(parts, fences, strict=True)
    )


def target(place: str, link: str) -> str:
    """Where a link of the file behind the page `place` leads, as a path from that page."""
    home = (ROOT / OUTSIDE.get(place, f"docs/{place}")).parent
    path = Path(os.path.normpath(home / link))
    pages = {ROOT / source: page for page, source in OUTSIDE.items()}
    docs = ROOT / "docs"
    inside = path.relative_to(docs).as_posix() if path.is_relative_to(docs) else link
    return Path(os.path.relpath(pages.get(path, inside), Path(place).parent)).as_posix()


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that makes a browser load a script, a style or an image from another host."""
    from mkdocs.exceptions import PluginError

    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}: remove it.")
    return output
