"""Data sets from elsewhere: what the `datasets` library reads (a folder, an id on the hub), and files on GitHub."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.prompts.sources.tables import Table

_HASH = re.compile(r"[0-9a-f]{40}")


def read_folder(path: Path, configuration: str | None = None) -> dict[str, Table]:
    """Split name -> table of a folder. Raises UsageError if `datasets` cannot make one of it.

    `configuration` is one that the folder's README declares; a folder from save_to_disk has none and ignores it.
    """
    import datasets

    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path), configuration)
    except Exception as error:  # the library has no common base for its errors
        raise UsageError(
            f"the folder {path} is not a data set that can be read ({_first_line(error)}): "
            "name a file in it, or put files of one kind (CSV, JSONL, Parquet, text) there."
        ) from error
    return _tables(loaded, str(path))


def read_hub(name: str) -> dict[str, Table]:
    """Split name -> table of `owner/name` or `owner/name/configuration`. Raises UsageError if it cannot be fetched."""
    import datasets

    owner_and_name, configuration = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        loaded = datasets.load_dataset(owner_and_name, configuration or None)
    except Exception as error:
        raise UsageError(
            f"{name!r} is no file here and could not be loaded as a data set ({_first_line(error)}): "
            "check the path or id and the network, and write a configuration as owner/name/configuration."
        ) from error
    return _tables(loaded, name)


def read_pinned(
    name: str, home: str, configuration: str | None, revision: str | None, options: Mapping[str, Any], gated: bool
) -> dict[str, Table]:
    """Split name -> table of a registered data set `name` at its home on the hub, from the cache where offline.

    Raises UsageError if the set, its revision or its configuration is not there, needs a login, or if what the cache
    holds is another revision; LlmvaError if the hub cannot be reached.
    """
    try:
        loaded = load_from_hub(home, configuration, revision, options)
    except Exception as error:
        raise _explain(error, name, home, configuration, revision, gated) from error
    if revision and (other := _other_revision(loaded, revision)):
        # Offline, `datasets` takes the newest revision that it has, whatever was asked for.
        raise UsageError(
            f"the cache holds {home} at revision {other[:12]}, not at {revision[:12]} as the registry wants: "
            f"connect to the network once, or give a local copy as {name}=PATH."
        )
    return _tables(loaded, f"{name} ({home})")


def load_from_hub(home: str, configuration: str | None, revision: str | None, options: Mapping[str, Any]) -> Any:
    """What `datasets.load_dataset` makes of it, a DatasetDict. No code of the data set is run."""
    import datasets

    return datasets.load_dataset(home, configuration, revision=revision, **options)


def read_github(name: str, repository: str, file: str, revision: str | None, folder: Path) -> Path:
    """The path of one file of a repository at a revision, downloaded into `folder` unless it is there already.

    Raises UsageError if GitHub has no such file, LlmvaError if it cannot be reached or the folder not be written.
    """
    from llmva.files import write_bytes  # here, since it imports torch

    path = folder / "github" / repository / (revision or "HEAD") / file
    if path.is_file() and revision:  # a file at a pinned revision does not change
        return path
    url = f"https://raw.githubusercontent.com/{repository}/{revision or 'HEAD'}/{file}"
    try:
        data = download(url)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise UsageError(
                f"GitHub has no {file} of {repository} at revision {revision}: update llmva, or give a local copy as "
                f"{name}=PATH."
            ) from error
        raise _unreachable(name, f"GitHub ({repository})", error) from error
    except OSError as error:  # URLError and time-outs among them
        raise _unreachable(name, f"GitHub ({repository})", error) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmvaError(
            f"the cache folder '{path.parent}' cannot be written ({error.strerror}): set LLMVA_CACHE to another."
        ) from error
    write_bytes(path, data)
    return path


def download(url: str) -> bytes:
    """The bytes at an address. Raises OSError, also where HF_HUB_OFFLINE asks for no network."""
    if os.environ.get("HF_HUB_OFFLINE", "").casefold() in ("1", "true", "yes", "on"):
        raise OSError("there is no network, or HF_HUB_OFFLINE is set")
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def _explain(
    error: Exception, name: str, home: str, configuration: str | None, revision: str | None, gated: bool
) -> LlmvaError:
    """The error to raise for a failure of `datasets`, whose errors have no common base and change by version."""
    chain = list(_causes(error))
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    message = " ".join(str(one) for one in chain).casefold()
    copy = f"or give a local copy as {name}=PATH"
    if "gated" in message or kinds & {"GatedRepoError"} or (gated and "cannot be accessed" in message):
        return UsageError(
            f"{name} needs a login: accept its terms at https://huggingface.co/datasets/{home}, run `hf auth login`, "
            f"and try again, {copy}."
        )
    if "RevisionNotFoundError" in kinds or ("revision" in message and "doesn't exist" in message):
        return UsageError(f"the hub has no revision {revision} of {home}: update llmva, {copy}.")
    if "builderconfig" in message or ("config" in message and "not found" in message):
        return UsageError(f"{home} has no configuration {configuration!r} at {revision}: update llmva, {copy}.")
    # A missing data set comes before an unreachable hub, since both end in a kind of OSError.
    if "DatasetNotFoundError" in kinds or "RepositoryNotFoundError" in kinds:
        return UsageError(f"the hub has no data set {home} that can be read: update llmva, {copy}.")
    offline = {"ConnectionError", "TimeoutError", "ConnectError", "TimeoutException", "OfflineModeIsEnabled"}
    if kinds & offline or "couldn't reach" in message:
        return _unreachable(name, f"the hub ({home})", error)
    return UsageError(f"{name} could not be loaded from {home} ({_first_line(error)}): update llmva, {copy}.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _unreachable(name: str, where: str, error: Exception) -> LlmvaError:
    return LlmvaError(
        f"{name} is not in the cache and {where} cannot be reached ({_first_line(error)}): connect to the network, "
        f"or give a local copy as {name}=PATH."
    )


def _other_revision(dataset_dict: Any, revision: str) -> str | None:
    """The revision in the paths of the cached files, where that is another than the one asked for."""
    for rows in dataset_dict.values():
        for file in getattr(rows, "cache_files", []):
            hashes = [part for part in Path(file["filename"]).parts if _HASH.fullmatch(part)]
            if hashes and revision not in hashes:
                return hashes[-1]
    return None


def _tables(loaded: Any, where: str) -> dict[str, Table]:
    """`loaded` is a datasets.Dataset (from save_to_disk) or a DatasetDict."""
    splits = dict(loaded.items()) if hasattr(loaded, "items") else {"train": loaded}
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
