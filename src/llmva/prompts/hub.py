"""Data sets that the `datasets` library reads: a local folder, one saved with save_to_disk, or an id on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmva.errors import UsageError
from llmva.prompts.tables import Table


def read_folder(path: Path) -> dict[str, Table]:
    """Split name -> table of a folder. Raises UsageError if `datasets` cannot make one of it."""
    import datasets

    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path))
    except Exception as error:  # the library has no common base for its errors
        raise UsageError(
            f"the folder {path} is not a data set that can be read ({_first_line(error)}): "
            "name a file in it, or put files of one kind (CSV, JSONL, Parquet, text) there."
        ) from error
    return _tables(found, str(path))


def read_hub(name: str) -> dict[str, Table]:
    """Split name -> table of `owner/name` or `owner/name/configuration`. Raises UsageError if it cannot be fetched."""
    import datasets

    owner_and_name, configuration = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        found = datasets.load_dataset(owner_and_name, configuration or None)
    except Exception as error:
        raise UsageError(
            f"{name!r} is no file here and could not be loaded as a data set ({_first_line(error)}): "
            "check the path or id and the network, and write a configuration as owner/name/configuration."
        ) from error
    return _tables(found, name)


def _tables(found: Any, where: str) -> dict[str, Table]:
    """`found` is a datasets.Dataset (from save_to_disk) or a DatasetDict."""
    splits = dict(found.items()) if hasattr(found, "items") else {"train": found}
    return {
        str(split): Table(
            f"{where} ({split})",
            tuple(rows.column_names),
            lambda name, rows=rows: list(rows[name]),  # type: ignore[misc]
            range(1, len(rows) + 1),
            "row",
        )
        for split, rows in splits.items()
    }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200].rstrip('. ')}" if lines else type(error).__name__
