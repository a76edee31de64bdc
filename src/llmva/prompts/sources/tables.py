"""Files and data sets as tables: named columns of cells, each row with the number that its file gives it."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.sources.delimited import DELIMITERS, divide

_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True)
class Table:
    """`cells(column)` gives n cells of any type; `numbers` are n line or row numbers, counted from 1, for errors.

    `note` says how the file was read where its ending alone does not tell; it is empty otherwise. `headed` tables have
    their columns' names from the first row, which may be missing.
    """

    where: str
    columns: tuple[str, ...]
    cells: Callable[[str], Sequence[Any]]
    numbers: Sequence[int]
    unit: str  # what `numbers` count: "line" or "row"
    note: str = ""
    headed: bool = False

    def at(self, rows: Sequence[int], where: str) -> Table:
        """The table of these rows only (positions from 0); they keep their numbers."""

        def cells(column: str) -> list[Any]:
            everything = self.cells(column)
            return [everything[i] for i in rows]

        return replace(self, where=where, cells=cells, numbers=[self.numbers[i] for i in rows])


def read_file(path: Path) -> Table:
    """Read one local file by its ending. Raises UsageError naming the line for anything unreadable."""
    reader = {
        ".csv": _read_delimited,
        ".tsv": _read_delimited,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".txt": _read_text,
    }[path.suffix.lower()]
    table = reader(path)
    if not table.numbers:
        raise UsageError(f"{path} holds no prompts: put at least one row into it.")
    return table


def read_utf8(path: Path) -> str:
    """The whole text of a file. Raises UsageError if it is unreadable, not UTF-8, empty or holds a NUL byte."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from error
    if data.startswith(_WIDE):
        raise UsageError(f"{path} is UTF-16 or UTF-32, not UTF-8: save it again as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path} is not UTF-8 (line {line}): save it again as UTF-8.") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UsageError(f"{path} has a NUL byte in line {line}: save it again as plain UTF-8 text.")
    if not text.strip():
        raise UsageError(f"{path} is empty: put at least one prompt into it.")
    return text


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and value of each line that is not blank. Raises UsageError naming a line of no JSON."""
    # Not splitlines(): JSON strings may hold U+2028 and its like, which splitlines() takes for ends of lines.
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"line {number} of {path} is not JSON ({error}): mend or remove that line.") from error


def _read_text(path: Path) -> Table:
    # Not splitlines(): prompts may hold U+2028 and its like. A carriage return alone ends the lines of old Macs.
    lines = list(enumerate(re.split(r"\r\n|\n|\r", read_utf8(path)), 1))
    rows = [(number, line) for number, line in lines if line.strip()]
    if all(line.strip().startswith("{") and _is_json(line) for _, line in rows):
        raise UsageError(f"{path} holds JSON objects, a line each: name it .jsonl.")
    return Table(str(path), ("text",), lambda _: [line for _, line in rows], [number for number, _ in rows], "line")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_delimited(path: Path) -> Table:
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    divided = divide(read_utf8(path), usual, str(path))
    (_, names), *rows = divided.rows
    header = tuple(name.strip() for name in names)
    if len(set(header)) < len(header):
        raise UsageError(f"{path} has two columns of one name ({', '.join(header)}): rename one.")
    columns = {name: [cells[i] for _, cells in rows] for i, name in enumerate(header)}
    note = "" if divided.delimiter == usual else f"took {DELIMITERS[divided.delimiter]} for what divides the cells"
    return Table(str(path), header, columns.__getitem__, [number for number, _ in rows], "line", note, headed=True)


def _read_jsonl(path: Path) -> Table:
    return _from_objects(list(json_lines(path)), path, "line")


def _read_json(path: Path) -> Table:
    try:
        value = json.loads(read_utf8(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is not JSON ({error}): mend it, or name it .jsonl if it has one object a line."
        ) from error
    if not isinstance(value, list):
        raise UsageError(f"{path} does not hold a JSON list: make it a list of strings or of objects.")
    return _from_objects(list(enumerate(value, 1)), path, "row")


def _from_objects(rows: list[tuple[int, Any]], path: Path, unit: str) -> Table:
    """Rows are JSON objects, or all of them bare strings."""
    if rows and all(isinstance(value, str) for _, value in rows):
        rows = [(number, {"text": value}) for number, value in rows]
    for number, value in rows:
        if not isinstance(value, dict):
            raise UsageError(
                f"{unit} {number} of {path} is not a JSON object: make every {unit} an object (or a string)."
            )
    columns = tuple(dict.fromkeys(name for _, value in rows for name in value))
    return Table(
        str(path), columns, lambda name: [value.get(name) for _, value in rows], [number for number, _ in rows], unit
    )


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    unreadable = UsageError(f"{path} is not a readable Parquet file: write it again or use another format.")

    def cells(name: str) -> list[Any]:
        try:
            return list(table.column(name).to_pylist())
        except (pyarrow.ArrowException, ValueError) as error:  # text that is no UTF-8 among them
            raise unreadable from error

    try:
        table = pyarrow.parquet.read_table(path)
        columns = tuple(table.column_names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise unreadable from error
    if len(set(columns)) < len(columns):
        raise UsageError(f"{path} has two columns of one name ({', '.join(columns)}): rename one.")
    return Table(str(path), columns, cells, range(1, table.num_rows + 1), "row")
