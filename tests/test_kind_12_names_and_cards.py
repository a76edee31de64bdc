"""A card's code loads what was exported, and a base of this machine is never named as if it were on the hub.

Before, the code of all but plain text models failed (AutoModelForCausalLM, no trust_remote_code, no quantize), and a
base given by a relative path became a hub id as soon as an export was made from another folder.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from architectures import made_from, tiny
from conftest import Said, tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.export.adapters.peft import export_lora
from llmva.export.card import card, public_edit
from llmva.export.merged import export_merged
from llmva.export.plan import Plan, make_plan
from llmva.models.files.weights import findable
from llmva.models.fingerprint import fingerprint
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder
from test_edit import edit_of, far, logits, projections, random_steps

IMAGES = "AutoModelForImageTextToText"
KINDS = ("edit", "lora", "merged")
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def composite() -> Any:
    """Its CausalLM is the language model alone, under other names than in the whole."""
    import transformers

    text = {
        **tiny_model().config.to_dict(), "model_type": "qwen3_5_text", "num_hidden_layers": 4, "layer_types": None,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "rope_parameters": None,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config={**vision, "num_position_embeddings": 16})
    return transformers.AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)


MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {  # and the classes that load an adapter's base, and all of it
    "text": (tiny_model, "AutoModelForCausalLM", "AutoModelForCausalLM"),
    "qwen2_5_vl": (lambda: tiny("qwen2_5_vl"), IMAGES, IMAGES),
    "mistral3": (lambda: tiny("mistral3"), IMAGES, IMAGES),
    "gemma3": (lambda: tiny("gemma3"), "AutoModelForCausalLM", IMAGES),
    "qwen3_5": (composite, "AutoModelForCausalLM", IMAGES),
}


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def planned(base: Path, **loading: Any) -> tuple[Plan, Any]:
    """An edit of the model in `base`, beside it, and the model as align loads it."""
    model, _ = load_model(base, device="cpu", **loading)
    print_of = {**fingerprint(find_decoder(model), str(base)), "dtype": str(model.dtype).removeprefix("torch.")}
    edit_of(random_steps(list(projections(model))), print_of).save(base.parent)
    return make_plan(base.parent, trust_remote_code=bool(loading.get("trust_remote_code"))), model


def exported(plan: Plan, kind: str) -> Path:
    """The folder that a user has, with its README.md."""
    out = plan.directory / kind
    if kind == "edit":
        out.mkdir()
        public_edit(plan).save(out)
        (out / "README.md").write_text(card(plan, "edit"))
    else:
        (export_lora if kind == "lora" else export_merged)(plan, out)
    return out


def run_code(out: Path, base: Path) -> tuple[str, Any]:
    """The card's code with the places filled in, and the model that it makes."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert str(base.parent) not in code
    names: dict[str, Any] = {}
    filled = code.replace("path/to/this/repository", str(out)).replace(f"path/to/{base.name}", str(base))
    assert "path/to" not in filled
    exec(filled, names)
    assert names["tokenizer"]("make the door")["input_ids"]
    return code, names["model"].eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_cards_code_loads_what_was_exported(name: str, kind: str, tmp_path: Path) -> None:
    make, part, whole = MODELS[name]
    base = saved(tmp_path / "base", make())
    plan, model = planned(base)
    with plan.edit.apply(model):
        wanted = logits(model)
    assert far(logits(model), wanted) > 1e-3
    out = exported(plan, kind)
    code, loaded = run_code(out, base)
    assert far(logits(loaded), wanted) < 1e-4
    assert {"edit": "llmva.load_model", "lora": part, "merged": whole}[kind] in code
    fields = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert fields["pipeline_tag"] == ("image-text-to-text" if whole == IMAGES else "text-generation")
    assert "base_model" not in fields


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_of_a_model_with_code_of_its_own(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    base = saved(tmp_path / f"base_{kind}", tiny_model())
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": auto_map}
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_mine.py").write_text(CODE)
    plan, model = planned(base, trust_remote_code=True)
    with plan.edit.apply(model):
        wanted = logits(model)
    code, loaded = run_code(exported(plan, kind), base)
    assert "trust_remote_code=True" in code
    assert far(logits(loaded), wanted) < 1e-4


@pytest.mark.parametrize("kind", ["edit", "lora"])
def test_the_code_of_an_edit_of_packed_weights(kind: str, tmp_path: Path) -> None:
    """Such an edit refuses the unpacked model."""
    base = saved(tmp_path / "base", tiny_model())
    plan, model = planned(base, quantize="8bit")
    with plan.edit.apply(model):
        wanted = logits(model)
    code, loaded = run_code(exported(plan, kind), base)
    assert "quantize='8bit'" in code
    assert far(logits(loaded), wanted) < 0.05


def test_the_code_of_an_edit_of_float16_weights(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tiny_model())
    plan, _ = planned(base, dtype="float16")
    code, _ = run_code(exported(plan, "edit"), base)
    assert "dtype='float16'" in code


def test_the_class_is_known_without_the_base(tmp_path: Path) -> None:
    """A pushed edit has its base's type of model, though not its files."""
    base = saved(tmp_path / "base", tiny("qwen2_5_vl"))
    plan, _ = planned(base)
    (tmp_path / "base").rename(tmp_path / "gone")
    assert f"from transformers import {IMAGES}" in card(plan, "lora")


NAMES = {  # as align was told, and what a card may call it
    "relative": ("models/base", None),
    "relative with dots": ("./models/base", None),
    "relative with a slash": ("models/base/", None),
    "here": (".", None),
    "absolute": ("{here}/models/base", None),
    "on the hub": ("org/base", "org/base"),
    "in the hub's cache": ("hub/models--org--base/snapshots/0a1b2c", "org/base"),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_of_this_machine_is_none_of_the_hubs(
    case: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the export is made from another folder than the run."""
    given, wanted = NAMES[case]
    for place in ("models/base", "hub/models--org--base/snapshots/0a1b2c"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models/base" if given == "." else tmp_path)
    name = findable(given.format(here=tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    edit = Edit({}, {"model": name, "sha256": "ab" * 32, "model_type": "llama"})
    record = {"command": f"llmva align {given.format(here=tmp_path)} -q", "base": {"model": name}}
    text = card(Plan(Path("run"), edit, name, 1, 1.0, record, name), kind)
    fields = yaml.safe_load(text.split("---\n")[1])
    assert fields.get("base_model") == wanted
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if kind != "merged":
        assert repr(wanted or "path/to/base") in code
    assert str(tmp_path) not in text
    assert "models/base" not in text
    assert "snapshots" not in text
    if wanted is None:
        assert not re.search(r"[\"'`]base/|[\"'`]models/", text)


def test_an_adapter_says_where_its_base_is_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import AutoPeftModelForCausalLM

    saved(tmp_path / "base", tiny_model())
    plan, model = planned(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    export_lora(make_plan(tmp_path, base="base"), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path.parent)
    with plan.edit.apply(model):
        wanted = logits(model)
    assert far(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), wanted) < 1e-4


def test_align_export_and_push_by_a_relative_path(
    taught_folder: Path, command: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line, from one folder and then from another."""
    shutil.copytree(taught_folder, tmp_path / "models" / "taught")
    monkeypatch.chdir(tmp_path)
    words = ["align", "models/taught", "--toxic", "models/taught/toxic.txt", "--benign", "models/taught/benign.txt"]
    words += ["--iterations", "1", "--per-source", "16", "--max-new-tokens", "8", "-q", "--out", "run"]
    monkeypatch.setattr(sys, "argv", ["llmva", *words])  # what a run records of its command
    assert command(*words).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = command("push", "../run", "--as", "lora", "--repo", "me/x", "--dry-run", "--json", "-q")
    assert said.code == 0, said.err
    text = json.loads(said.out)["card"]
    assert "base_model" not in text.split("---\n")[1]
    assert "'path/to/taught'" in text
    assert "    llmva align taught --toxic toxic.txt --benign benign.txt" in text
    assert command("export", "../run", "--as", "merged", "--out", "merged", "-q").code == 0


def test_every_kind_of_config_finds_its_loader() -> None:
    """As load_model chooses: what is loaded for an adapter is what was aligned."""
    from llmva.export.loader import find_loader
    from llmva.models.load import auto_class

    for name in ("llama", "gemma3", "qwen2_5_vl", "mistral3", "mixtral", "opt"):
        model = made_from(tiny(name).config)
        edit = Edit({}, {"model": "org/x", "model_type": model.config.model_type})
        loader = find_loader(Plan(Path("run"), edit, "org/x", 1, 1.0, None, "org/x"))
        assert loader.part == auto_class(model.config).__name__


@pytest.mark.parametrize("place", ["the hub", "a folder of its cache"])
def test_an_adapter_names_the_commit_of_its_base(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch may move, and an adapter takes any weights of its shapes."""
    from dataclasses import replace

    commit = "0a1b2c3d"
    base = saved(tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit, tiny_model())
    model, _ = load_model(base, device="cpu")
    name = "org/tiny" if place == "the hub" else str(base)
    if place == "the hub":
        model.config._commit_hash = commit  # as transformers has it
    edit_of(random_steps(list(projections(model))), fingerprint(find_decoder(model), name)).save(tmp_path)
    plan = make_plan(tmp_path, base=str(base))
    plan = replace(plan, title=name)
    for kind in KINDS:
        out = exported(plan, kind)
        text = (out / "README.md").read_text()
        assert (f"revision='{commit}'" in text) == (kind != "merged")
    # of a folder it means nothing, and a push puts the hub's name in the folder's place
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["revision"] == commit


def test_a_base_of_no_hub_has_no_commit(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tiny_model())
    plan, _ = planned(base)
    assert "revision=" not in (exported(plan, "lora") / "README.md").read_text()
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["revision"] is None
