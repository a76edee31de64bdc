"""What all pages share: how their record is read, the first lines, the templates, and files that appear whole.

Records and model answers are hostile text. Three walls: Jinja escapes every value, a content security policy forbids
all requests and every script but the page's own, told by its hash, and control characters (and halves of surrogate
pairs) are replaced.
"""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmva import files
from llmva.errors import UsageError
from llmva.report.values import DASH, count, finite, part, printable

TEMPLATES = Path(__file__).parent / "templates"
MAX_GARBLED = 0.02  # a share of garbled answers above this is named beside the headline


@dataclass(frozen=True)
class Outcome:
    """The first lines of a page.

    `verdict`: a few words; `tone`: 'good', 'mixed', 'bad' or 'open'; `notes`: what a reader must not miss.
    """

    verdict: str
    tone: str
    sentence: str
    notes: tuple[str, ...] = ()


def read_record(path: Path, command: str, what: str, mark: tuple[str, str], version: tuple[str, int]) -> dict[str, Any]:
    """The record in a file.

    Args:
        command: the `llmva` command that writes such files, for the messages.
        what: what the file is the record of, for the messages: "an llmva run".
        mark: a field and the value that it must have.
        version: the field with the format's version, and the newest version that this llmva reads.

    Raises:
        UsageError: no such file, not JSON, another kind of record, or one of a newer format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {path}: give the folder that 'llmva {command}' wrote.") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: run 'llmva {command}' again to rebuild it.") from error
    field, value = mark
    if not isinstance(record, dict) or record.get(field) != value:
        raise UsageError(f"{path} is not the record of {what}: give the folder that 'llmva {command}' wrote.")
    field, newest = version
    number = finite(record.get(field))
    if number is None or number > newest:
        raise UsageError(f"{path} has format version {record.get(field)}, newer than this llmva reads: update llmva.")
    return record


def title(record: dict[str, Any]) -> str:
    """The base model: a hub id as it is, a folder by its last name. Its whole path stands under "To reproduce"."""
    name = str(part(record, "base").get("model") or "Unnamed model")
    return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def judged_by(record: dict[str, Any]) -> str:
    """The first limit of every page."""
    judge = record.get("judge")
    return f"A program{f' ({judge})' if judge else ''} judged the answers, not a person."


def page(template: str, styles: tuple[str, ...], script: str | None = None, **values: object) -> str:
    """A template with style sheets and a script of `templates/` as printable HTML, every value escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(count=count, kind=lambda benign: "benign" if benign else "harmful")
    css = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in styles)
    if script is not None:
        code = (TEMPLATES / script).read_text(encoding="utf-8")
        digest = b64encode(sha256(code.encode("utf-8")).digest()).decode("ascii")
        values |= {"script": Markup(code), "script_hash": Markup(f"sha256-{digest}")}
    return printable(environment.get_template(template).render(css=Markup(css), dash=DASH, **values))


def write_text(path: Path, text: str, *, shared: bool = False) -> Path:
    """Write printable text so that the file appears whole or not at all; return its path.

    `shared` says that other processes may write the same file at the same time.

    Raises:
        LlmvaError: the file cannot be written.
    """
    files.write_text(path, printable(text), shared=shared)
    return path
