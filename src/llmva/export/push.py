"""Upload an export to the Hugging Face hub, in one commit, with its card.

Nothing goes along but what the export gives a reason for. Answers to prompts never do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError, UsageError
from llmva.export.card import base_name, card, hub_id, public_edit, strength, system_of
from llmva.export.plan import Plan
from llmva.export.redact import machine_roots, one_line, public_config, public_prompt, public_value, without_paths
from llmva.files import lock, write_bytes, write_json, write_text
from llmva.models.files.belonging import CARD
from llmva.models.files.weights import read_object
from llmva.progress import Progress

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
TEMPORARY = "llmva-push-"
MAX_TEXT = 2**22  # bytes of a file that is searched for folders of this machine
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
    private: bool = True,
    dry_run: bool = False,
    rank: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export `plan` as "edit", "lora" or "merged" and upload it to `repo` (USER/NAME), created if missing.

    With `private`, nothing goes to a repository that everyone can see; without, one that is created is public.

    Returns `{"repo", "private", "files": [{"path", "bytes", "why"}], "left_out", "card", "url", "warnings"}`; `url` is
    None after a dry run, which touches no network beyond what reading the base needs. `private` is what the hub says
    after a push; `left_out` names what lies in the base's folder and is no part of the model.

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
    with _workplace() as work:
        folder = work / "export"
        reasons, left_out, warnings = _export(plan, kind, folder, rank, progress)
        write_text(folder / CARD, card(plan, kind, repo))
        warnings += _redact(plan, folder, reasons)
        text = (folder / CARD).read_text(encoding="utf-8")
        files = {name: folder / name for name in sorted(reasons)}
        url = None
        if not dry_run:
            progress.stage(f"uploading to {repo}")
            with _explained(repo):
                url, private = _upload(files, repo, private, f"{base_name(plan)} with LLM-VA, as {kind}")
        listed = [{"path": name, "bytes": path.stat().st_size, "why": reasons[name]} for name, path in files.items()]
    return {
        "repo": repo,
        "private": private,
        "files": listed,
        "left_out": left_out,
        "card": text,
        "url": url,
        "warnings": warnings,
    }


@contextmanager
def _workplace() -> Iterator[Path]:
    """A temporary folder, gone at the end; those that killed pushes left are removed too."""
    for pattern in (f"{TEMPORARY}*", f".{TEMPORARY}*"):
        for other in Path(tempfile.gettempdir()).glob(pattern):
            _remove_if_left(other)
    made = Path(tempfile.mkdtemp(prefix=f".{TEMPORARY}{os.getpid()}-"))
    held = lock(made)
    work = made.rename(made.with_name(made.name.removeprefix(".")))  # locked before others look at it
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if held is not None:
            held.close()


def _remove_if_left(folder: Path) -> None:
    """Remove the folder of a push whose process is gone."""
    match = re.fullmatch(rf"\.?{TEMPORARY}(\d+)-.*", folder.name)
    if match is None or os.name != "posix" or _alive(int(match[1])):
        return
    try:
        held = lock(folder)  # a process of another container that shares the folder has a number of its own
    except LlmvaError:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if held is not None:
        held.close()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _export(
    plan: Plan, kind: str, folder: Path, rank: int | None, progress: Progress
) -> tuple[dict[str, str], list[str], list[str]]:
    """Write what ships into the new folder `folder`; why each file is there, what was left out, and warnings."""
    if kind == "edit":
        folder.mkdir()
        public_edit(plan).save(folder)
        reasons = {CARD: "the model card", "edit.safetensors": "the edit"}
        if plan.record is not None:
            write_json(folder / "run.json", _public_record(plan))
            reasons["run.json"] = "the run's settings and figures, without prompts, answers and folders"
        return reasons, [], []
    from llmva.export.adapters.peft import export_lora
    from llmva.export.merged import export_merged

    try:
        if kind == "lora":
            facts = export_lora(plan, folder, rank=rank, progress=progress)
        else:
            facts = export_merged(plan, folder, progress=progress)
    except LlmvaError as error:  # there is no --out here: the export went to a temporary folder
        raise type(error)(str(error).replace("choose another --out", "set TMPDIR to a roomier folder")) from error
    return dict(facts["why"]), list(facts.get("left_out", [])), list(facts["warnings"])


def _public_record(plan: Plan) -> dict[str, Any]:
    """run.json without this machine's folders and without texts, saying which iteration and strength went out."""
    whole = dict(plan.record or {})
    command = whole.pop("command", None)
    whole.pop("judge_spec", None)  # may name folders and computers
    record = dict(public_value(whole))
    record["base"]["model"] = base_name(plan)
    if (system := system_of(plan)) is not None:
        record["settings"]["system"] = public_prompt(system)
    record["command"] = without_paths(command, plan.title, base_name(plan)) if isinstance(command, str) else None
    utility = record.get("utility")
    if isinstance(utility, dict) and isinstance(utility.get("endings"), dict):
        utility["endings"].pop("examples", None)  # prompts, and what the model answered
    return record | {"shipped": {"iteration": plan.iteration, "strength": strength(plan)}}


def _redact(plan: Plan, folder: Path, reasons: dict[str, str]) -> list[str]:
    """Take this machine's folders out of the configs; returns a warning for other texts that hold them."""
    roots = machine_roots(plan.directory, *([Path(plan.base).expanduser()] if Path(plan.base).exists() else []))
    if (folder / "adapter_config.json").is_file():
        _rewrite(folder / "adapter_config.json", lambda f: {**f, "base_model_name_or_path": hub_id(plan)})
    telling = []
    for name in sorted(reasons):
        path = folder / name
        if name.endswith("config.json") or path.name == "special_tokens_map.json":
            _rewrite(path, lambda fields: public_config(fields, roots))
        if path.suffix in (".md", ".txt"):
            _without_roots(path, roots)
        if path.suffix != ".safetensors" and path.stat().st_size <= MAX_TEXT:
            data = path.read_bytes()
            telling += [name] if any(root.encode() in data for root in roots) else []
    if not telling:
        return []
    return [f"Folders of this machine are named in {', '.join(telling)}: look at them before others do."]


def _without_roots(path: Path, roots: list[str]) -> None:
    data = path.read_bytes()
    new = data
    for root in roots:
        new = new.replace(f"{root}/".encode(), b"").replace(root.encode(), Path(root).name.encode())
    if new != data:
        write_bytes(path, new)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a JSON file anew if `change` changes its object."""
    fields = read_object(path)
    new = change(fields)
    if new != fields:
        write_text(path, json.dumps(new, indent=2, ensure_ascii=False) + "\n")


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
        raise LlmvaError(f"'{repo}' exists and is public: pass --public, or choose another --repo.")
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
