"""Merged checkpoints equal a bake bit for bit, keep all else byte for byte, and never load when half written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.errors import LlmvaError
from llmva.export.diff import diff
from llmva.export.merged import export_merged
from llmva.export.plan import Plan, make_plan
from llmva.models.checkpoint import Checkpoint
from llmva.models.files.headers import read_header
from llmva.models.fingerprint import fingerprint
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder
from test_edit import EXPERTS, edit_of, far, logits, projections, random_steps, with_biases

CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Phi3Config": {},
    "GPT2Config": {},
    "OPTConfig": {"word_embed_proj_dim": 32},
    "PhiConfig": {},
    "GPTNeoXConfig": {},
    "Gemma2Config": {},
    "Olmo2Config": {},
    "Cohere2Config": {},
    **EXPERTS,
}


def made(folder: Path, config: str = "LlamaConfig", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A sharded base in `folder`/base and an edit of it in `folder`; returns the model."""
    model = with_biases(tiny_model(config, **changes)).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder / "base")
    base = fingerprint(find_decoder(model), str(folder / "base"))
    edit_of(random_steps(list(projections(model))), base).save(folder)
    return model


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    made(tmp_path)
    return make_plan(tmp_path)


@pytest.mark.parametrize("config", CONFIGS)
def test_merged_is_the_baked_model_bit_for_bit(config: str, tmp_path: Path) -> None:
    model = made(tmp_path, config, **CONFIGS[config])
    plan = make_plan(tmp_path)
    export_merged(plan, tmp_path / "out")
    got, _ = load_model(tmp_path / "out", dtype="float32")
    with plan.edit.apply(model):
        hooked = logits(model)
    assert far(logits(got), hooked) < 1e-5
    plan.edit.bake(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, got.state_dict()[name]), name


@pytest.mark.parametrize("config", ["LlamaConfig", "MixtralConfig", "GptOssConfig"])
def test_bfloat16_is_rounded_once(config: str, tmp_path: Path) -> None:
    model = made(tmp_path, config, torch.bfloat16, **CONFIGS[config])
    plan = make_plan(tmp_path)
    export_merged(plan, tmp_path / "out")
    plan.edit.bake(model)
    got, _ = load_model(tmp_path / "out", dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, got.state_dict()[name]), name


def test_untouched_tensors_headers_and_files_are_the_bases(plan: Plan, tmp_path: Path) -> None:
    base = Path(plan.base)
    (base / "LICENSE").write_text("free")
    (base / "README.md").write_text("---\nlicense: mit\n---\nthe base's")
    found = export_merged(plan, tmp_path / "out")
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    changed = {place.name for places in before.writers_of(plan.edit.factors).values() for place in places}
    assert len(before.files) > 1
    assert len(changed) == found["changed"] == len(plan.edit.factors)
    for name in before.names:
        assert torch.equal(before.tensor(name), after.tensor(name)) == (name not in changed)
    for file in before.files:
        size, _ = read_header(file)
        assert file.read_bytes()[:size] == (tmp_path / "out" / file.name).read_bytes()[:size]
    names = {path.name for path in base.iterdir()}
    assert names <= set(found["files"])
    assert (tmp_path / "out" / "README-base.md").read_text().endswith("the base's")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def rewrite(base: Path, end: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> str:
    """Change, or without `change` remove, the first tensor whose name ends so; returns the name."""
    from safetensors.torch import load_file, save_file

    for file in sorted(base.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(end)][:1]:
            if change is None:
                del tensors[name]
            else:
                tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors or {"unused": torch.zeros(1)}, file, {"format": "pt"})
            return name
    raise AssertionError(end)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize(
    ("config", "end", "count"),
    [("LlamaConfig", "mlp.down_proj.weight", "0"), ("MixtralConfig", "experts.1.w2.weight", "3"),
     ("GptOssConfig", "experts.down_proj_bias", "0")],
)  # fmt: skip
def test_a_missing_tensor_is_named(config: str, end: str, count: str, hashed: bool, tmp_path: Path) -> None:
    """Also the expert that an edit without hashes would leave as it was."""
    made(tmp_path, config, **CONFIGS[config])
    if not hashed:
        edit = Edit.load(tmp_path)
        replace(edit, base={"model": edit.base["model"]}).save(tmp_path)
    rewrite(tmp_path / "base", end, None)
    for use in (diff, lambda plan: export_merged(plan, tmp_path / "out")):
        with pytest.raises(LlmvaError, match=f"holds {count} tensors of model.layers"):
            use(make_plan(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_packed_tensor_is_no_other_model(plan: Plan, tmp_path: Path) -> None:
    rewrite(Path(plan.base), "mlp.down_proj.weight", lambda t: t.to(torch.float8_e4m3fn))
    with pytest.raises(LlmvaError, match="is packed as F8_E4M3"):
        export_merged(plan, tmp_path / "out")


def test_an_edit_of_another_width_is_refused(plan: Plan, tmp_path: Path) -> None:
    """Where the edit has no hashes to tell by."""
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "wide")
    bare = replace(plan, edit=replace(plan.edit, base={}), base=str(tmp_path / "wide"))
    with pytest.raises(LlmvaError, match="32 wide"):
        export_merged(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("inner", "turned"), [(16, False), (16, True), (32, False)])
def test_fused_experts_stored_either_way_round(inner: int, turned: bool, tmp_path: Path) -> None:
    """qwen3_vl_moe's own checkpoints are turned, those that transformers writes are not: loading goes by the shape."""
    import transformers

    text = {
        **tiny_model().config.to_dict(), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": inner,
        "model_type": "qwen3_vl_moe_text", "decoder_sparse_step": 1, "mlp_only_layers": [],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    model = transformers.AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = fingerprint(find_decoder(model), str(tmp_path / "base"))
    edit_of(random_steps(list(projections(model))), base).save(tmp_path)
    if turned:
        name = rewrite(tmp_path / "base", "layers.0.mlp.experts.down_proj", lambda t: t.mT)
        assert Checkpoint.open(tmp_path / "base").stored[name].shape == (4, inner, 32)
    plan = make_plan(tmp_path)
    export_merged(plan, tmp_path / "out")
    got, _ = load_model(tmp_path / "out", dtype="float32")
    plan.edit.bake(model)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, got.state_dict()[name], rtol=0, atol=1e-6), name


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    made(tmp_path, tie_word_embeddings=True)
    export_merged(make_plan(tmp_path), tmp_path / "out")
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "out").names
    got, _ = load_model(tmp_path / "out")
    assert got.lm_head.weight.data_ptr() == got.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("config", ["LlamaConfig", "GPT2Config", "MixtralConfig", "GptOssConfig"])
def test_the_list_of_changes_is_what_the_export_changes(config: str, tmp_path: Path) -> None:
    made(tmp_path, config, **CONFIGS[config])
    plan = make_plan(tmp_path)
    export_merged(plan, tmp_path / "out")
    before, after = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "out")
    rows = {row["tensor"]: row for row in diff(plan)}
    assert set(rows) == {n for n in before.names if not torch.equal(before.tensor(n), after.tensor(n))}
    for name, row in rows.items():
        weight = before.tensor(name).double()
        assert row["norm"] == pytest.approx(float((after.tensor(name).double() - weight).norm()), rel=1e-4)
        assert row["base_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
    ranks = {int(torch.linalg.matrix_rank(f.V.double() @ f.U.double().T)) for f in plan.edit.factors.values()}
    assert {row["rank"] for row in rows.values()} == ranks


@pytest.mark.parametrize("use", ["merged", "diff"])
def test_a_base_that_differs_in_one_tensor_is_refused(use: str, tmp_path: Path) -> None:
    """The tensors are checked when they are read, one by one: each of them must be."""
    from llmva.export.diff import diff

    model = made(tmp_path)
    plan = make_plan(tmp_path)
    for name in plan.edit.factors:
        other = tiny_model()
        other.load_state_dict(model.state_dict())
        other.get_submodule(name).weight[3, 5] += 0.5
        other.save_pretrained(tmp_path / "other", max_shard_size="40KB")
        changed = make_plan(tmp_path, base=str(tmp_path / "other"))
        with pytest.raises(LlmvaError, match=f"whose {name} has hash"):
            diff(changed) if use == "diff" else export_merged(changed, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.part").exists()


def test_names_alone_and_the_model_itself_tell_the_same_tensors(tmp_path: Path) -> None:
    made(tmp_path)
    plan = make_plan(tmp_path)
    checkpoint = Checkpoint.open(plan.base)
    asked = checkpoint.writers_of(plan.edit.factors)
    assert {m: checkpoint.plain(m, 32) for m in plan.edit.factors} == asked
    assert checkpoint.plain(next(iter(plan.edit.factors)), 48) is None
    assert checkpoint.plain("model.layers.0.mlp", 32) is None


def test_an_export_that_fails_leaves_nothing(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmva.export.merged as merged

    plain, calls = merged._write_shard, []

    def stumble(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        plain(*given)

    monkeypatch.setattr(merged, "_write_shard", stumble)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LlmvaError, match="No space left"):
        export_merged(plan, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_killed_export_left_does_not_load_and_does_not_disturb(plan: Plan, tmp_path: Path) -> None:
    import os
    import signal
    import subprocess
    import sys

    code = (
        "import sys, os, signal, llmva.export.merged as m\n"
        "from llmva.export.plan import make_plan\n"
        "plain, seen = m._write_shard, []\n"
        "def die(*given):\n"
        "    plain(*given); seen.append(1)\n"
        "    if len(seen) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "m._write_shard = die\n"
        "m.export_merged(make_plan(sys.argv[1]), sys.argv[2])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tmp_path / "out")], env={**os.environ})
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.part" / "config.json").exists()
    export_merged(plan, tmp_path / "out")
    load_model(tmp_path / "out")
    assert not (tmp_path / ".out.part").exists()


def test_too_little_disk_is_told_before_the_first_byte(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(LlmvaError, match="free space"):
        export_merged(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.part").exists()


def test_another_base_is_refused(plan: Plan, tmp_path: Path) -> None:
    tiny_model(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(LlmvaError, match="hash"):
        export_merged(make_plan(tmp_path, base=str(tmp_path / "other")), tmp_path / "out")


def test_packed_weights_are_refused(plan: Plan, tmp_path: Path) -> None:
    path = Path(plan.base) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(LlmvaError, match="packed"):
        export_merged(plan, tmp_path / "out")


@pytest.mark.parametrize("damage", ["length", "json", "offsets", "short", "overlap", "shape"])
def test_a_broken_shard_is_refused(damage: str, plan: Plan, tmp_path: Path) -> None:
    file = Checkpoint.open(plan.base).files[0]
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])

    def with_entry(**changes: Any) -> bytes:
        """The file with other fields for its last tensor; a shorter header is filled up with spaces."""
        header = json.loads(data[8 : 8 + length])
        header[list(header)[-1]].update(changes)
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    first = next(e for n, e in json.loads(data[8 : 8 + length]).items() if n != "__metadata__")
    broken = {
        "length": struct.pack("<Q", 2**60) + data[8:],
        "json": data[:8] + b"[" + data[9:],
        "offsets": data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        "short": data[: 8 + length + 16],
        "overlap": with_entry(**first),
        "shape": with_entry(shape="ab"),
    }[damage]
    file.write_bytes(broken)
    with pytest.raises(LlmvaError, match="no whole safetensors file"):
        export_merged(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
