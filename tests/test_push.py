"""Pushing against a stand-in of the hub over real HTTP, with the hub's own client in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_server import TOKEN, Hub, Repo, serving
from llmva.edit import Edit
from llmva.models.fingerprint import fingerprint
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder

REPO = "someone/thing"
SECRET = "what the model said to a harmful prompt"
SCRIPT = """
import json, sys, traceback
from llmva.errors import LlmvaError
from llmva.export.plan import make_plan
from llmva.export.push import push

for line in sys.stdin:
    given = json.loads(line)
    code, found, err = 0, {}, ""
    try:
        plan = make_plan(given.pop("run"), strength=given.pop("strength", 1.0))
        found = push(plan, given.pop("repo"), **given)
    except LlmvaError as error:
        code, err = error.exit_code, str(error)
    except Exception:
        code, err = 99, traceback.format_exc()
    print(json.dumps({"code": code, "found": found, "err": err}), flush=True)
"""


@dataclass(frozen=True)
class Pushed:
    code: int
    found: dict[str, Any]
    err: str


class Client:
    """A process with the hub's client in it, which reads its variables when it is imported."""

    def __init__(self, hub: str, folder: Path, token: str | None = TOKEN, **env: str) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        inherited = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|.*proxy", k, re.IGNORECASE)}
        variables = {
            "HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1", **({} if token is None else {"HF_TOKEN": token}), **env,
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=inherited | variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def push(self, run: Path, **given: Any) -> Pushed:
        """Call `push`; nothing may stay behind in the temporary folder."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"run": str(run), "repo": REPO, **given}), file=self._process.stdin, flush=True)
        said = Pushed(**json.loads(self._process.stdout.readline()))
        assert said.code != 99, said.err
        assert list(self.temporary.glob("llmva-push-*")) == []
        return said

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Client]]:
    """One stand-in and one client process for all tests, since starting a process takes seconds."""
    with serving() as hub, Client(hub.url, tmp_path_factory.mktemp("client")) as client:
        yield hub, client


@pytest.fixture
def hub(served: tuple[Hub, Client]) -> Hub:
    """The stand-in, empty and whole."""
    hub, _ = served
    for state in (hub.repos, hub.objects, hub.fail, hub.requests):
        state.clear()
    hub.html = False
    return hub


@pytest.fixture
def client(served: tuple[Hub, Client]) -> Client:
    return served[1]


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Path:
    """A run folder as `align` leaves it, with one edited sublayer of each kind."""
    folder = tmp_path / "private place" / "run"
    folder.mkdir(parents=True)
    model, _ = load_model(model_folder)
    decoder = find_decoder(model)
    base = fingerprint(decoder, str(model_folder))
    edit = Edit({}, base)
    generator = torch.Generator().manual_seed(0)
    for iteration in (1, 2, 3):
        for sublayer in decoder.sublayers[:2]:
            v, u = torch.randn(2, 32, generator=generator)
            edit = edit.then(sublayer.name, v / 8, u / 8, iteration)
    Edit(edit.factors, base, best=2).save(folder)
    side = {"f1": 0.5, "asr": 0.5, "orr": 0.25, "n_toxic": 4, "n_benign": 4, "by_source": {}}
    record = {
        "format": "llmva-run", "version": 1, "llmva": "0.1.0", "versions": {"python": "3.11"},
        "command": f"llmva align {model_folder} --toxic '{tmp_path}/private place/bad.csv:text' --out '{folder}'",
        "base": {**base, "dtype": "float32"}, "settings": {"iterations": 3}, "seed": 0, "judge": "phrases 1",
        "prompts": {"counts": {"test": {"bad": 4, "good": 4}}, "hashes": {"bad": "1", "good": "2"}},
        "sublayers": [s.name for s in decoder.sublayers], "kinds": ["attention", "mlp"] * 3,
        "iterations": [{"iteration": t, "f1": 0.5, "asr": 0.5, "orr": 0.2} for t in range(4)],
        "best_iteration": 2, "stopped": "done", "answers_bytes": 1, "batch_tokens": None,
        "test": {"before": side, "after": {**side, "f1": 0.9, "asr": 0.1, "orr": 0.0}}, "utility": {"kept": 0.97},
        "projections": {"before": None, "after": None},
        "cost": {"seconds": 1.0, "peak_bytes": 1, "generated_tokens": 1}, "limits": [],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    for name in ("answers.jsonl", "prompts.jsonl", "report.html"):
        (folder / name).write_text(SECRET)
    return folder


def one_sentence(pushed: Pushed, *pieces: str, code: int = 1) -> None:
    assert pushed.code == code
    assert re.fullmatch(r"[^\n]+\.", pushed.err), pushed.err
    for piece in pieces:
        assert piece in pushed.err


def no_trace(files: dict[str, bytes], *places: Path) -> None:
    """Neither answers nor this machine's folders are in any byte that went out."""
    for name, data in files.items():
        assert SECRET.encode() not in data, name
        for place in places:
            assert str(place).encode() not in data, name


@pytest.mark.parametrize("private", [True, False])
def test_the_edit_arrives_whole_and_without_answers(
    private: bool, hub: Hub, run: Path, client: Client, model_folder: Path, tmp_path: Path
) -> None:
    pushed = client.push(run, private=private)
    assert pushed.code == 0, pushed.err
    repo = hub.repos[REPO]
    assert repo.private is private
    assert pushed.found["private"] is private
    assert set(repo.files) == {"README.md", "edit.safetensors", "run.json"}
    assert {f["path"]: f["bytes"] for f in pushed.found["files"]} == {k: len(v) for k, v in repo.files.items()}
    assert len(repo.commits) == 1
    assert pushed.found["url"].startswith(f"{hub.url}/{REPO}/commit/")
    no_trace(repo.files, tmp_path, model_folder.parent)
    assert repo.files["README.md"].decode() == pushed.found["card"]
    assert f"snapshot_download('{REPO}')" in pushed.found["card"]

    # what arrived is the run's best iteration, and can be shipped again
    got = tmp_path / "got"
    got.mkdir()
    for name, data in repo.files.items():
        (got / name).write_bytes(data)
    mine, theirs = Edit.load(run).chosen, Edit.load(got).chosen
    assert set(mine.factors) == set(theirs.factors)
    for name, f in mine.factors.items():
        assert torch.equal(f.V, theirs.factors[name].V)
        assert torch.equal(f.U, theirs.factors[name].U)
        assert f.V.shape[1] == 2
    theirs.apply(load_model(model_folder)[0]).remove()  # its hashes are that base's
    record = json.loads((got / "run.json").read_text())
    assert record["test"] == json.loads((run / "run.json").read_text())["test"]
    assert record["command"] == f"llmva align {model_folder.name} --toxic bad.csv:text --out run"


def test_an_edit_pushed_at_half_strength_never_claims_the_figures(
    hub: Hub, run: Path, client: Client, tmp_path: Path, model_folder: Path
) -> None:
    from llmva.export.card import card
    from llmva.export.plan import make_plan

    assert client.push(run, strength=0.5).code == 0
    got = tmp_path / "got"
    got.mkdir()
    for name, data in hub.repos[REPO].files.items():
        (got / name).write_bytes(data)
    assert "model-index" not in (got / "README.md").read_text()
    again = card(make_plan(got, base=str(model_folder)), "edit")
    assert "model-index" not in again
    assert "at strength 0.5, which was not measured" in again
    assert "model-index" in card(make_plan(run), "edit")


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_adapter_and_merged_model_arrive_as_exported(
    kind: str, hub: Hub, run: Path, client: Client, model_folder: Path, tmp_path: Path
) -> None:
    from llmva.export.adapters.peft import export_lora
    from llmva.export.merged import export_merged
    from llmva.export.plan import make_plan

    out = tmp_path / "out"
    (export_lora if kind == "lora" else export_merged)(make_plan(run), out)
    pushed = client.push(run, kind=kind)
    assert pushed.code == 0, pushed.err
    files = hub.repos[REPO].files
    wanted = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert set(files) == set(wanted)
    for name in wanted.keys() - {"README.md", "adapter_config.json", "config.json", "tokenizer_config.json"}:
        assert files[name] == wanted[name], name
    weights = {"lora": "adapter_model.safetensors", "merged": "model.safetensors"}[kind]
    assert hashlib.sha256(files[weights]).hexdigest() in hub.objects  # it went the way of large files
    no_trace(files, tmp_path, model_folder.parent)
    assert f"from_pretrained({'model, ' if kind == 'lora' else ''}'{REPO}')" in files["README.md"].decode()


def test_what_lies_in_the_base_folder_by_accident_stays(
    hub: Hub, run: Path, client: Client, model_folder: Path, tmp_path: Path
) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    shutil.copytree(run, base / "my-run")
    (base / ".env").write_text("KEY=secret")
    (base / "LICENSE").write_text("a licence")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": str(base)}))
    edit = Edit.load(run)
    Edit(edit.factors, {**edit.base, "model": str(base)}, edit.best).save(run)
    pushed = client.push(run, kind="merged")
    assert pushed.code == 0, pushed.err
    files = hub.repos[REPO].files
    assert files["LICENSE"] == b"a licence"
    assert not [name for name in files if name.startswith(".") or name.endswith(("answers.jsonl", "report.html"))]
    assert b"KEY=secret" not in b"".join(files.values())
    assert SECRET.encode() not in b"".join(files.values())
    assert json.loads(files["config.json"]) == {**config, "_name_or_path": "base"}


@pytest.mark.parametrize("kind", ["edit", "lora", "merged"])
def test_a_dry_run_lists_what_a_push_uploads_and_asks_nobody(kind: str, hub: Hub, run: Path, client: Client) -> None:
    dry = client.push(run, kind=kind, dry_run=True, private=True)
    assert dry.code == 0, dry.err
    assert hub.requests == []
    assert dry.found["url"] is None
    real = client.push(run, kind=kind, private=True)
    assert real.found["url"]
    assert {**dry.found, "url": None} == {**real.found, "url": None}
    assert {f["path"]: f["bytes"] for f in dry.found["files"]} == {k: len(v) for k, v in hub.repos[REPO].files.items()}


def test_a_second_push_updates(hub: Hub, run: Path, client: Client) -> None:
    assert client.push(run).code == 0
    first = dict(hub.repos[REPO].files)
    assert client.push(run, strength=0.5).code == 0
    assert len(hub.repos[REPO].commits) == 2
    assert hub.repos[REPO].files["edit.safetensors"] != first["edit.safetensors"]


def test_private_never_goes_to_a_repository_that_is_public(hub: Hub, run: Path, client: Client) -> None:
    hub.repos[REPO] = Repo(private=False)
    one_sentence(client.push(run), "is public", "--public", "--repo")
    assert hub.repos[REPO].files == {}
    assert hub.objects == {}


def test_a_private_repository_stays_private(hub: Hub, run: Path, client: Client) -> None:
    hub.repos[REPO] = Repo(private=True)
    pushed = client.push(run, private=False)
    assert pushed.found["private"] is True
    assert hub.repos[REPO].private


def test_private_is_the_default(hub: Hub, run: Path, client: Client) -> None:
    assert client.push(run).found["private"] is True
    assert hub.repos[REPO].private


@pytest.mark.parametrize(
    ("where", "status", "mend"),
    [
        ("/api/repos/create", 401, "HF_TOKEN"),
        ("/api/repos/create", 403, "write access"),
        ("/api/repos/create", 500, "later"),
        ("/api/models/", 404, "--repo"),
        ("/preupload/", 403, "write access"),
        ("/lfs/", 403, "write access"),
        ("/commit/", 503, "later"),
        ("/commit/", 429, "wait"),
        ("/commit/", 422, "broken on purpose at /commit/"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    where: str, status: int, mend: str, hub: Hub, run: Path, client: Client
) -> None:
    hub.fail[where] = status
    one_sentence(client.push(run), f"HTTP {status}", REPO, mend)
    assert all(not repo.files for repo in hub.repos.values())


def test_a_wrong_token(hub: Hub, run: Path, tmp_path: Path) -> None:
    with Client(hub.url, tmp_path, "hf_other") as client:
        one_sentence(client.push(run), "HTTP 401", "HF_TOKEN")
    assert hub.repos == {}


def test_no_token_is_told_before_the_network_and_a_dry_run_needs_none(hub: Hub, run: Path, tmp_path: Path) -> None:
    with Client(hub.url, tmp_path, None) as client:
        one_sentence(client.push(run), "HF_TOKEN", "hf auth login")
        assert client.push(run, dry_run=True).code == 0
    assert hub.requests == []


def test_a_closed_port(run: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: nothing answers there, and nobody else can take it
        taken.bind(("127.0.0.1", 0))
        with Client(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path) as client:
            one_sentence(client.push(run), "cannot be reached", "network")


def test_offline_is_told_as_that(hub: Hub, run: Path, tmp_path: Path) -> None:
    with Client(hub.url, tmp_path, HF_HUB_OFFLINE="1") as client:
        one_sentence(client.push(run), "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_a_login_page_in_the_hubs_place(hub: Hub, run: Path, client: Client) -> None:
    hub.html = True
    one_sentence(client.push(run), "broke off", "HF_ENDPOINT")


BAD = [
    "thing",
    "a/b/c",
    "some one/thing",
    "../thing",
    "a/..",
    "a/b--c",
    "/thing",
    "someone/",
    "a/b.git",
    "a/b\n",
    "é/b",
]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_is_none(name: str, run: Path) -> None:
    from llmva.errors import UsageError
    from llmva.export.plan import make_plan
    from llmva.export.push import push as called

    with pytest.raises(UsageError, match="USER/NAME") as caught:
        called(make_plan(run), name, dry_run=True)
    assert "\n" not in str(caught.value)
