"""A .gguf file is unpacked once: the model that came out of it stays in a cache folder, by the file's hash.

To parse the file and unpack its weights takes minutes for a large model, and transformers parses it for the config, the
tokenizer and the weights each. The folder of an entry is an ordinary checkpoint in one dtype. It is written under
another name and renamed, so an entry is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmva.files import cache_folder

SAYS = "unpacked_from.json"
PARTLY = ".part-"  # begins the name of an entry that is being written
CHUNK = 2**24
TRIED = ("hello", "How many trees are there?\n\n  1. two  2. three", "Grüße, 你好, 🙂 <|x|> </s>")


@dataclass(frozen=True)
class Entry:
    """An unpacked .gguf file in the cache."""

    folder: Path
    name: str  # of the file
    dtype: str
    size: int  # bytes on disk


def entry_of(file: Path, dtype: str) -> Path:
    """Where the unpacked `file` is, or would be."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return cache_folder() / "gguf" / f"{digest.hexdigest()[:32]}-{dtype}"


def is_whole(entry: Path) -> bool:
    return (entry / SAYS).is_file()


def keep(entry: Path, file: Path, dtype: str, model: Any, tokenizer: Any) -> bool:
    """Write what came out of `file` to `entry`. Returns whether it is there now.

    It is not where the disk is full, or where the tokenizer would not come back as it is.
    """
    part = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=PARTLY, dir=entry.parent))
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if not _same(tokenizer, part):
            return False
        (part / SAYS).write_text(json.dumps({"file": file.name, "dtype": dtype}), encoding="utf-8")
        with suppress(OSError):  # another process was faster
            part.rename(entry)
        return is_whole(entry)
    except OSError:
        return False
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def entries() -> list[Entry]:
    """What the cache holds, by name."""
    whole = []
    for folder in cache_folder().glob(f"gguf/*/{SAYS}"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            says = json.loads(folder.read_text(encoding="utf-8"))
            size = sum(path.stat().st_size for path in folder.parent.rglob("*") if path.is_file())
            whole.append(Entry(folder.parent, str(says["file"]), str(says["dtype"]), size))
    return sorted(whole, key=lambda entry: (entry.name, entry.dtype))


def clean() -> int:
    """Remove the whole cache, with what an interrupted process left; returns the bytes that were freed."""
    root = cache_folder() / "gguf"
    freed = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) if root.is_dir() else 0
    shutil.rmtree(root, ignore_errors=True)
    return freed


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers parse each .gguf file once inside the block, however often it opens it."""
    import gguf

    module: Any = gguf
    originals = {name: getattr(module, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in originals.items():
        setattr(module, name, lru_cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def _same(tokenizer: Any, folder: Path) -> bool:
    """Whether the tokenizer that was written reads and renders as the one in memory."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    turns = [{"role": "user", "content": TRIED[1]}]

    def seen(one: Any) -> tuple[Any, ...]:
        template = getattr(one, "chat_template", None)
        rendered = one.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) if template else None
        ends = (one.eos_token_id, one.bos_token_id, one.pad_token_id, one.unk_token_id, len(one))
        return (*(one(text)["input_ids"] for text in TRIED), rendered, ends, one.convert_ids_to_tokens([0, 1, 2]))

    try:
        return seen(tokenizer) == seen(again)
    except Exception:  # a template is a program of the model's: one that fails here fails elsewhere, in a sentence
        return False
