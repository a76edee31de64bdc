"""What ships holds the model's files, all of them, and nothing else; what is pushed tells nothing of this machine.

With the list of what is skipped that there was before, all of PRIVATE was exported but `.git`, and most was pushed.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, tiny_model, tiny_tokenizer
from hub_server import Hub
from llmva.edit import Edit
from llmva.export.merged import export_merged
from llmva.export.plan import make_plan
from llmva.export.push import push
from llmva.export.redact import public_config, public_text, without_hosts, without_paths
from llmva.models.files.belonging import belonging, left_out
from llmva.models.files.weights import find_weights
from llmva.models.load import load_model
from test_kind_02_same_files import edited, linked
from test_push import REPO, Client, client, hub, run, served

__all__ = ["client", "hub", "run", "served"]  # fixtures

SECRET = "nobody else may read this"
CARD = "---\nlicense: mit\n---\n# A model\n"
CODE = """from .inner import layer
from .helpers.more import thing
VOCAB_FILES_NAMES = {"vocab_file": "ice_text.model", "words": "my_vocab.txt"}
PROMPTS = "prompts.txt"
"""
MODEL = {  # every file that some loader reads, with what stands in it
    "special_tokens_map.json": "{}", "added_tokens.json": "{}", "vocab.json": "{}", "merges.txt": "x", "vocab.txt": "x",
    "tokenizer.model": "x", "tokenizer.model.v3": "x", "tekken.json": "{}", "qwen.tiktoken": "x", "spiece.model": "x",
    "sentencepiece.bpe.model": "x", "source.spm": "x", "tokenizer.4.0.json": "{}", "config.4.0.json": "{}",
    "chat_template.json": "{}", "additional_chat_templates/tools.jinja": "x", "preprocessor_config.json": "{}",
    "processor_config.json": "{}", "video_preprocessor_config.json": "{}", "LICENSE": "x", "LICENSE-2.0.txt": "x",
    "License Agreement.pdf": "x", "MODEL_LICENSE": "x", "NOTICE.txt": "x", "USE_POLICY.md": "x", "README.md": CARD,
    "modeling_mine.py": CODE, "inner.py": "from . import deeper\n", "deeper.py": "", "helpers/more.py": "",
    "tokenization_mine.py": "", "ice_text.model": "x", "my_vocab.txt": "x", "vision/config.json": "{}",
    "vision/model.safetensors": "x", "vision/preprocessor_config.json": "{}", "heads/extra.safetensors": "x",
    "custom_generate/generate.py": "from .own import f\n", "custom_generate/own.py": "",
    "custom_generate/requirements.txt": "x",
}  # fmt: skip
PRIVATE = (  # what may lie in the folder besides
    ".env", ".git/config", ".cache/x", ".netrc", "id_rsa", "toxic.txt", "benign.csv", "prompts.txt", "data/train.jsonl",
    "answers.jsonl", "prompts.jsonl", "report.html", "run.json", "notes.md", "contract.pdf", "secrets.json",
    "LICENSE_KEYS.txt", "license-server.json", "api_token.txt", "tokenizer_training.txt", "vocab_of_clients.json",
    "train.py", "modeling_old.py", "wandb/run/config.yaml", "runs/events.out", "checkpoint-9/config.json",
    "checkpoint-9/model.safetensors", "llmva-model/run.json", "llmva-model/answers.jsonl",
    "llmva-model/edit.safetensors",
    "llmva/prompts.jsonl", "llmva/run.json", "training_args.bin", "optimizer.pt", "trainer_state.json",
    "consolidated.safetensors", "params.json", "model.fp16.safetensors", "pytorch_model.bin", "model.Q4_0.gguf",
    "original/consolidated.00.pth", "onnx/model.onnx", "vision/notes.txt", "additional_chat_templates/notes.txt",
    "helpers/keys.py", "custom_generate/data.json",
)  # fmt: skip


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def full(folder: Path) -> set[str]:
    """A model with every kind of file, among private ones; returns the names of the model's own."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    own = {path.name for path in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModel": "modeling_mine.Mine", "AutoConfig": "org/other--modeling_old.Config"},
        "vision_tower": "vision", "parts": [{"head": "heads/extra.safetensors"}], "train_file": "secrets.json",
        "_name_or_path": "checkpoint-9", "note": "data",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization_mine.Slow", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name, text in MODEL.items():
        write(folder, name, text)
    for name in PRIVATE:
        write(folder, name, SECRET)
    return own | MODEL.keys()


def test_every_file_of_a_model_belongs_to_it_and_nothing_else(tmp_path: Path) -> None:
    own = full(tmp_path)
    reasons = belonging(tmp_path, find_weights(tmp_path))
    assert set(reasons) == own
    assert all(reasons.values())
    others = left_out(tmp_path, reasons)
    assert others == sorted(others)
    assert {"toxic.txt", "secrets.json", "checkpoint-9/", "onnx/", "LICENSE_KEYS.txt"} <= set(others)
    assert not {".env", "llmva/", "vision/"} & set(others)


@pytest.mark.parametrize("text", ["# Notes of a client\n", "---\nno field\n", "---\n---\ntitle: x", "", "\x00\xff"])
def test_a_readme_that_is_no_model_card_stays(text: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(text)
    assert "README.md" not in belonging(tmp_path, find_weights(tmp_path))


@pytest.mark.parametrize("code", ["from .. import x\n", "from ..other.thing import y\n", "def (", "\x00"])
def test_code_that_reaches_out_or_cannot_be_read_brings_nothing(code: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    write(tmp_path, "x.py", SECRET)
    write(tmp_path, "other/thing.py", SECRET)
    write(folder, "mine.py", code)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "mine.M", "x": "../x.M"}}))
    assert {name for name in belonging(folder, find_weights(folder)) if name.endswith(".py")} == {"mine.py"}


@pytest.mark.parametrize("links", [False, True], ids=["files", "links into a cache"])
def test_an_export_holds_the_models_files_as_files(links: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    own = full(base)
    edited_among(base)
    if links:
        linked_deep(base)
    facts = export_merged(make_plan(tmp_path), tmp_path / "out")
    held = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert held == own | {"README-base.md", "llmva/edit.safetensors"}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert (tmp_path / "out" / "README-base.md").read_text() == CARD
    for name in own - {"README.md", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    (warning,) = facts["warnings"]
    assert "Left out what loaders do not read as part of the model: " in warning
    assert {"toxic.txt", "data/"} <= set(facts["left_out"])


def edited_among(base: Path) -> None:
    """An edit of a model whose config names code that is not there to be run."""
    config = (base / "config.json").read_text()
    plain = {k: v for k, v in json.loads(config).items() if k not in ("auto_map", "parts")}
    (base / "config.json").write_text(json.dumps(plain))
    tokenizer = (base / "tokenizer_config.json").read_text()
    (base / "tokenizer_config.json").write_text(json.dumps({**json.loads(tokenizer), "auto_map": {}}))
    edited(base)
    (base / "config.json").write_text(config)
    (base / "tokenizer_config.json").write_text(tokenizer)


def linked_deep(base: Path) -> None:
    """Every file, in subfolders too, is a link to a blob beside the model's folder."""
    blobs = base.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


def test_a_folder_of_the_hubs_cache_is_the_hubs(tmp_path: Path) -> None:
    """Its links are resolved, and the card names the model and not the folder."""
    base = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "0a1b2c"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    linked(base)
    edited(base)
    facts = export_merged(make_plan(base.parent), tmp_path / "out")
    assert facts["left_out"] == []
    assert "base_model: org/tiny" in (tmp_path / "out" / "README.md").read_text()
    assert load_model(tmp_path / "out", device="cpu")


# -- pushed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["edit", "lora", "merged"])
def test_a_push_from_a_folder_full_of_private_files(
    kind: str, hub: Hub, client: Client, run: Path, tmp_path: Path
) -> None:
    """The run lies in the model's folder, as after `cd MODEL && llmva align .`, and was named by that."""
    base = tmp_path / "a private place" / "base"
    own = full(base)
    edited_among(base)
    (base / "special_tokens_map.json").write_text(json.dumps({"pad_token": "/think", "file": f"{Path.home()}/x"}))
    edit = Edit.load(base.parent)
    inside = base / "llmva-model"
    record = json.loads((run / "run.json").read_text())
    record["base"] |= {"model": str(base)}
    record["limits"] = [f"'{base}/toxic.txt' has few prompts."]
    record["utility"]["endings"] = {"n": 1, "examples": [{"prompt": SECRET, "before": SECRET}]}
    record["judge"] = "llm@http://me:key@node-7.corp:8000/v1#x"
    record["command"] = f"llmva align . --toxic '{base}/toxic.txt' --benign ../data/benign.csv --out runs/acme/first"
    (inside / "run.json").write_text(json.dumps(record))
    Edit(edit.factors, {**edit.base, "model": str(base)}, best=2).save(inside)
    pushed = client.push(inside, kind=kind)
    assert pushed.code == 0, pushed.err
    files = hub.repos[REPO].files
    for name, data in files.items():
        for private in (SECRET, str(tmp_path), "a private place", str(Path.home()) + "/", "node-7", "acme"):
            assert private.encode() not in data, (name, private)
    assert (
        set(files)
        == {
            "edit": {"README.md", "run.json", "edit.safetensors"},
            "lora": {"README.md", "adapter_config.json", "adapter_model.safetensors", "llmva/edit.safetensors"},
            "merged": own | {"README-base.md", "llmva/edit.safetensors"},
        }[kind]
    )
    assert {file["path"]: file["bytes"] for file in pushed.found["files"]} == {k: len(v) for k, v in files.items()}
    assert all(file["why"] for file in pushed.found["files"])
    if kind == "edit":
        sent = json.loads(files["run.json"])
        assert sent["command"] == "llmva align . --toxic toxic.txt --benign benign.csv --out first"
        assert sent["judge"] == "llm@http://HOST/v1#x"
        assert sent["utility"]["endings"] == {"n": 1}
    if kind == "lora":
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    if kind == "merged":
        assert json.loads(files["special_tokens_map.json"]) == {"pad_token": "/think", "file": "x"}
        assert "toxic.txt" in pushed.found["left_out"]


def test_a_dry_run_says_of_every_file_why_it_is_there(command: Callable[..., Said], tmp_path: Path) -> None:
    base = tmp_path / "base"
    own = full(base)
    edited_among(base)
    said = command("push", tmp_path, "--as", "merged", "--repo", "me/x", "--dry-run")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    for name in {*own, "llmva/edit.safetensors"} - {"README.md"}:
        (line,) = [line for line in lines if line.startswith(f"  {name}  ")]
        assert line.split("  ")[2].split(" ")[1] in ("B", "kB", "MB")
        assert line.split("  ")[3]
    assert any(line.startswith("Left out what loaders do not read") for line in lines)


def test_commands_and_sentences_tell_nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "jane-laptop")
    long = "llmva align models/base --toxic clients/acme.csv:q --data xstest=clients/x.csv,sorry --judge guard=my/guard"
    assert without_paths(long, "/data/jane/models/base") == (
        "llmva align base --toxic acme.csv:q --data xstest=x.csv,sorry --judge guard=guard"
    )
    same = "llmva align org/base --toxic org/set:text:train --judge llama-guard -q"
    assert without_paths(same, "org/base") == same
    assert without_paths("llmva align ../base --out=../runs/acme", "/x/base") == "llmva align base --out=acme"
    assert without_paths("llmva align ~/base --skills a/s.jsonl") == "llmva align base --skills s.jsonl"
    assert public_text("between '/a b/c.txt' and '/d/e.txt'") == "between 'c.txt' and 'e.txt'"
    assert without_hosts("see https://huggingface.co/a/b on jane-laptop") == "see https://huggingface.co/a/b on HOST"
    assert without_hosts("http://u:p@10.0.0.7:80/v1 and http://[::1]:8/x") == "http://HOST/v1 and http://HOST/x"


def test_configs_keep_all_that_is_no_path_of_this_machine() -> None:
    config: dict[str, Any] = {
        "_name_or_path": "/data/me/base", "tokenizer_file": "/a/b/tokenizer.json", "vocab_file": "vocab.json",
        "chat_template": "{{ x }}</think>/a/b", "added": {"15": {"content": "/usr/x"}}, "base": "org/model",
        "other": ["/ours/cache/x", 3, None, 0.5], "text": "/ours/y\n/ours/z",
    }  # fmt: skip
    assert public_config(config, ["/ours"]) == {
        **config, "_name_or_path": "base", "tokenizer_file": "tokenizer.json", "other": ["x", 3, None, 0.5],
    }  # fmt: skip


def test_a_pushed_edits_base_is_never_a_path(run: Path) -> None:
    found = push(make_plan(run), "me/x", dry_run=True)
    assert {file["path"] for file in found["files"]} == {"README.md", "edit.safetensors", "run.json"}
    assert str(run) not in found["card"]
