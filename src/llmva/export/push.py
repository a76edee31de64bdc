"""Upload an export to the Hugging Face hub, in one commit, with its card. Answers to prompts never go along."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.export.card import base_name, card, last_part, one_line, public_edit, strength, without_paths
from llmva.export.plan import Plan
from llmva.files import write_json, write_text
from llmva.progress import Progress

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# files of a run that hold prompts, or what a model said to harmful ones; a base's folder may contain them
HELD = ("answers.jsonl", "prompts.jsonl", "report.html")
CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")
LOGIN = "run `hf auth login` or set HF_TOKEN"
MENDS = {
    401: f"the token is missing or not valid: {LOGIN}",
    402: "the account's plan does not allow it: free space there, or choose another --repo",
    403: "the token may not write there: use one with write access, or another --repo",
    404: "the repository does not exist and could not be created: check --repo",
    409: "another client is changing the repository: run the command again",
    429: "too many requests: wait and run the command again",
}


def push(
    plan: Plan,
    repo: str,
    *,
    kind: str = "edit",
    private: bool = False,
    dry_run: bool = False,
    rank: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export `plan` as "edit", "lora" or "merged" and upload it to `repo` (USER/NAME), created if missing.

    Returns `{"repo", "private", "files": [{"path", "bytes"}], "card", "url", "warnings"}`; `url` is None after a dry
    run, which touches no network beyond what reading the base needs. `private` is what the hub says after a push.

    Raises:
        UsageError: `repo` is not a repository name, or `kind` is unknown.
        LlmvaError: the hub refuses or cannot be reached. No file is left on this machine or on the hub, though the
            repository may have been created.
    """
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".", "-")):
        raise UsageError(f"'{one_line(repo)}' is not a repository name: give --repo USER/NAME.")
    if kind not in ("edit", "lora", "merged"):
        raise UsageError(f"'{one_line(kind)}' cannot be pushed: use edit, lora or merged.")
    if not dry_run:
        _check_token()  # before the export, which may take long
    progress = progress or Progress()
    with tempfile.TemporaryDirectory(prefix="llmva-push-") as temporary:
        folder = Path(temporary) / "export"
        warnings = _export(plan, kind, folder, rank, progress)
        text = card(plan, kind, repo)
        write_text(folder / "README.md", text)
        paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and _ships(p.relative_to(folder))]
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        url = None
        if not dry_run:
            progress.stage(f"uploading to {repo}")
            with _explained(repo):
                url, private = _upload(files, repo, private, f"{base_name(plan)} with LLM-VA, as {kind}")
        listed = [{"path": name, "bytes": path.stat().st_size} for name, path in files.items()]
    return {"repo": repo, "private": private, "files": listed, "card": text, "url": url, "warnings": warnings}


def _export(plan: Plan, kind: str, folder: Path, rank: int | None, progress: Progress) -> list[str]:
    """Write what ships into the new folder `folder`, without this machine's paths; returns warnings."""
    if kind == "edit":
        folder.mkdir()
        public_edit(plan).save(folder)
        if plan.record is not None:
            write_json(folder / "run.json", _public_record(plan))
        return []
    from llmva.export.lora import export_lora
    from llmva.export.merged import export_merged

    try:
        if kind == "lora":
            facts = export_lora(plan, folder, rank=rank, progress=progress)
        else:
            facts = export_merged(plan, folder, progress=progress)
    except LlmvaError as error:  # there is no --out here: the export went to a temporary folder
        raise type(error)(str(error).replace("choose another --out", "set TMPDIR to a roomier folder")) from error
    for name, key, value in (
        ("adapter_config.json", "base_model_name_or_path", base_name(plan)),
        ("config.json", "_name_or_path", None),
        ("tokenizer_config.json", "name_or_path", None),
    ):
        _publish(folder / name, key, value)
    return list(facts["warnings"])


def _public_record(plan: Plan) -> dict[str, Any]:
    """run.json without this machine's folders, saying which iteration and strength went out."""
    record = dict(_without_folders(dict(plan.record or {})))
    record["base"]["model"] = base_name(plan)
    if plan.record is not None and isinstance(plan.record.get("command"), str):
        record["command"] = without_paths(plan.record["command"])
    return record | {"shipped": {"iteration": plan.iteration, "strength": strength(plan)}}


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return last_part(value)
    if isinstance(value, dict):
        return {last_part(str(key)): _without_folders(item) for key, item in value.items()}
    return [_without_folders(item) for item in value] if isinstance(value, (list, tuple)) else value


def _publish(path: Path, key: str, value: str | None) -> None:
    """Set a JSON file's field to its public value; None removes the folders from the path in it."""
    if not path.is_file():
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    old = fields.get(key) if isinstance(fields, dict) else None
    if isinstance(old, str) and (new := value or last_part(old)) != old:
        write_text(path, json.dumps(fields | {key: new}, indent=2, ensure_ascii=False) + "\n")


def _ships(path: Path) -> bool:
    """Whether a file goes up. Hidden files may hold a secret, and the hub makes its own .gitattributes."""
    return path.name not in HELD and not any(piece.startswith(".") for piece in path.parts)


def _check_token() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise LlmvaError(f"The hub needs a token and none is set: {LOGIN}.")


def _upload(files: dict[str, Path], repo: str, private: bool, message: str) -> tuple[str, bool]:
    """The commit's address, and whether the repository is private."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
    now_private = bool(api.repo_info(repo).private)
    if private and not now_private:  # create_repo does not change one that exists
        raise LlmvaError(f"'{repo}' exists and is public: make it private on the hub, or choose another --repo.")
    # upload_folder with Xet makes several commits, so a reader could load half of an upload
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
    return str(api.create_commit(repo, operations, commit_message=message).commit_url), now_private


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn errors of the hub and of the network into one sentence with its mend."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LlmvaError:
        raise
    except LocalTokenNotFoundError as error:
        raise LlmvaError(f"The hub needs a token and none is set: {LOGIN}.") from error
    except OfflineModeIsEnabled as error:
        raise LlmvaError(
            f"The hub cannot be reached for '{repo}', since there is no network or HF_HUB_OFFLINE is set: connect or "
            "unset it and run again."
        ) from error
    except Exception as error:
        refusal = next((e for e in _chain(error) if isinstance(e, HfHubHTTPError)), None)
        if refusal is not None:
            code = getattr(refusal.response, "status_code", None) or 0
            said = one_line(str(refusal.server_message or ""))[:200].strip(" .")
            mend = MENDS.get(code, "run the command again later" if code >= 500 else f"it says '{said}': fix that")
            raise LlmvaError(f"The hub refused the upload to '{repo}' (HTTP {code}): {mend}.") from error
        if any(type(e).__module__.split(".")[0] in CLIENTS for e in _chain(error)) or isinstance(error, OSError):
            raise LlmvaError(
                f"The hub cannot be reached for '{repo}' ({type(error).__name__}): check the network and run again."
            ) from error
        if isinstance(error, (ValueError, KeyError, RuntimeError)):  # as when a proxy answers for the hub
            raise LlmvaError(
                f"The upload to '{repo}' broke off ({type(error).__name__}: {one_line(str(error))[:150].strip(' .')}): "
                "check the network and HF_ENDPOINT, and run again."
            ) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes."""
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1
