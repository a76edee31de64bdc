"""What may leave this machine in a text or a record: no folders, no home, no name of a computer."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmva.report.values import printable

ABSOLUTE = re.compile(r"(?:file:(?=/))?(?<![\w.~/\\-])(?:~[^/\\\s]*|[A-Za-z]:)?[/\\](?!\s)(?:.*[/\\])?", re.DOTALL)
SLASHES, SLASH = "/\\", r"[/\\]"
QUOTED = re.compile(r"(['\"`])((?:file:)?(?:~[^/\\\s]*|[A-Za-z]:)?[/\\][^'\"`]+)\1")  # a path between quotes
WEB = r"\b(?!file:)\w{2,}://[^\s'\"`]*"
URL = re.compile(r"(?!file:)(\w{2,}://)(?:[^\s/@]*@)?(\[[^\]\s]*\]|[^\s/:#?'\"@]+)(:\d+)?")
PUBLIC_HOSTS = ("huggingface.co", "hf.co", "github.com", "arxiv.org", "doi.org")
HOST = "HOST"  # in the place of a computer's name
DATA = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet", ".gguf", ".safetensors", ".yaml", ".yml", ".html")
# options whose value is a path, never an id
PLACES = ("--out", "-o", "--skills", "--edit", "--data-dir", "--judge-cache", "--cache")


def last_part(text: str) -> str:
    """'DIR/good.csv:question' -> 'good.csv:question', '--out=DIR/run/' -> '--out=run'; else, and in URLs, unchanged."""
    pieces = re.split(rf"({WEB})", text)
    return "".join(piece if i % 2 else _cut(piece) for i, piece in enumerate(pieces))


def _cut(text: str) -> str:
    text = QUOTED.sub(lambda match: f"{match[1]}{re.split(SLASH, match[2].rstrip(SLASHES))[-1]}{match[1]}", text)
    return ABSOLUTE.sub("", text.rstrip(SLASHES) if ABSOLUTE.search(text) else text)


def without_paths(command: str, base: str = "", called: str | None = None) -> str:
    """A command line without folders of this machine, absolute or relative, and without names of computers.

    Args:
        base: the model's name in the record, a whole path if it is local: then the command's name of it is one too.
        called: the base's public name, which stands for it; None takes the last part of the path.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    shown, before = [], ""
    for word in words:
        if _is_base(word, base):
            shown.append(called or last_part(base))
            continue
        # NAME=PATH,NAME=PATH of --data, NAME=FOLDER of --judge
        pieces = [word] if "://" in word else re.split(r"([=,])", word)
        named = before in ("--judge", "--data")
        place = before in PLACES or (before == "--system" and len(word.split()) == 1)  # a file, or a text
        cut = [
            piece if i % 2 else _without_folder(piece, place or (named and i > 0 and pieces[i - 1] == "="))
            for i, piece in enumerate(pieces)
        ]
        shown.append(without_hosts("".join(cut)))
        before = word
    return shlex.join(shown)


def without_hosts(text: str) -> str:
    """URLs without credentials, and HOST for this computer and for any in a URL that is not a public site."""

    def hidden(match: re.Match[str]) -> str:
        known = match[2].lower() in PUBLIC_HOSTS or match[2].lower().endswith(tuple(f".{h}" for h in PUBLIC_HOSTS))
        return match[1] + (match[2] + (match[3] or "") if known else HOST)

    text = URL.sub(hidden, text)
    name = socket.gethostname()
    # a name that is an ordinary word would be taken out of sentences
    if len(name) > 3 and re.search(r"[\d.-]", name):
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", HOST, text)
    return text


def public_text(text: str) -> str:
    """A sentence or a name, without folders and computers."""
    return without_hosts(last_part(text))


def public_prompt(text: str) -> str:
    """A system prompt: whole, since a model is served with it, but for folders of this machine and computers."""
    for root in machine_roots():
        text = text.replace(f"{root}/", "").replace(root, Path(root).name)
    return without_hosts(text)


def public_value(value: Any) -> Any:
    """Nested JSON with `public_text` for every string, keys included."""
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, dict):
        return {public_text(str(key)): public_value(item) for key, item in value.items()}
    return [public_value(item) for item in value] if isinstance(value, (list, tuple)) else value


def public_config(value: Any, roots: Iterable[str], key: str = "") -> Any:
    """Nested JSON of a model's config, in which nothing changes but paths of this machine.

    A token may look like a path. So a string is a path if its field is called that, or if it begins with one of the
    `roots`, folders of this machine.
    """
    if isinstance(value, str):
        path = re.search(r"(?:name_or_path|_path|_file|_dir|_folder)$", key) or value.startswith(tuple(roots))
        return last_part(value) if path and "\n" not in value else value
    if isinstance(value, dict):
        return {name: public_config(item, roots, str(name)) for name, item in value.items()}
    return [public_config(item, roots, key) for item in value] if isinstance(value, list) else value


def machine_roots(*others: Path) -> list[str]:
    """Folders that tell of this machine: the home folder, where we are, and `others`."""
    places = [Path.home(), Path.cwd(), *others]
    return sorted({str(place.absolute()) for place in places} - {"/"}, key=len, reverse=True)


def one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _is_base(word: str, base: str) -> bool:
    """Whether a word of a command is the local model of the record, by its whole path or the end of it."""
    word = word.removeprefix("./").rstrip("/")
    return Path(base).is_absolute() and word not in ("", ".") and f"/{base.strip('/')}".endswith(f"/{word.lstrip('/')}")


def _without_folder(word: str, is_place: bool) -> str:
    shown = last_part(word)
    path, colon, rest = shown.partition(":")
    relative = path.startswith(("./", "../", ".\\", "..\\")) or path.count("/") > 1 or path.endswith(DATA)
    if "://" in shown or not (is_place or relative):
        return shown
    return re.split(SLASH, path.rstrip(SLASHES))[-1] + colon + rest
