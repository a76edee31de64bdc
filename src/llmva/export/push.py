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
from llmva.export.card import base_name, card, public_edit, without_paths
from llmva.export.plan import Plan
from llmva.files import write_json
from llmva.progress import Progress

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


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
    """Export `plan` as "edit", "lora" or "merged" and upload it to `repo` (USER/NAME), made if it is missing.

    Returns `{"repo", "private", "files": [{"path", "bytes"}], "card", "url"}`; `url` is None after a dry run, which
    touches no network beyond what reading the base needs.

    Raises:
        UsageError: a name that is none.
        LlmvaError: the hub refuses or cannot be reached; nothing is left on this machine.
    """
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UsageError(f"'{repo}' is no name of a repository: give --repo USER/NAME.")
    progress = progress or Progress()
    with tempfile.TemporaryDirectory(prefix="llmva-push-") as temporary:
        folder = Path(temporary) / "export"
        warnings = _export(plan, kind, folder, rank, progress)
        files = [
            {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        text = (folder / "README.md").read_text(encoding="utf-8")
        url = None
        if not dry_run:
            progress.stage(f"uploading to {repo}")
            with _explained(repo):
                url = _upload(folder, repo, private, f"{base_name(plan)} with LLM-VA, as {kind}")
    return {"repo": repo, "private": private, "files": files, "card": text, "url": url, "warnings": warnings}


def _export(plan: Plan, kind: str, folder: Path, rank: int | None, progress: Progress) -> list[str]:
    if kind == "lora":
        from llmva.export.lora import export_lora

        warnings = list(export_lora(plan, folder, rank=rank, progress=progress)["warnings"])
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": base_name(plan)})
        return warnings
    if kind == "merged":
        from llmva.export.merged import export_merged

        return list(export_merged(plan, folder, progress=progress)["warnings"])
    folder.mkdir()
    public_edit(plan).save(folder)
    (folder / "README.md").write_text(card(plan, "edit"), encoding="utf-8")
    if plan.record is not None:
        record = json.loads(json.dumps(plan.record))
        record["base"]["model"] = base_name(plan)
        if isinstance(record.get("command"), str):
            record["command"] = without_paths(record["command"])
        write_json(folder / "run.json", record)
    return []


def _upload(folder: Path, repo: str, private: bool, message: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
    return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Whatever the hub's client raises, as one sentence with its mend."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise LlmvaError("The hub wants a token and there is none: run `hf auth login` or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        mend = {
            401: "the token is missing or not valid: run `hf auth login` or set HF_TOKEN",
            403: "the token may not write there: use one with write access, or another --repo",
            404: "it is not there and could not be made: check --repo",
            429: "too many requests: wait and run the command again",
        }.get(code or 0, "run the command again later")
        raise LlmvaError(f"The hub refused the upload to '{repo}' (HTTP {code}): {mend}.") from error
    except Exception as error:  # the network fails by many classes of error
        if isinstance(error, LlmvaError):
            raise
        raise LlmvaError(
            f"The hub cannot be reached for '{repo}' ({type(error).__name__}): check the network and run again."
        ) from error
