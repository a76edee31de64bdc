"""The edit: hook, sequential bakes and one bake agree; it travels through files; broken files are refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import tiny_model
from llmva.edit import Edit, Factors
from llmva.errors import LlmvaError, UsageError
from llmva.models.fingerprint import fingerprint
from llmva.models.sublayers import find_decoder
from llmva.models.writers import left_map

Step = tuple[str, Tensor, Tensor, int]
IDS = torch.tensor([[5, 9, 11, 6, 20, 13, 30]])


def random_steps(names: list[str], count: int = 30, seed: int = 0, size: float = 0.5) -> list[Step]:
    """Rank-one maps at random sublayers, several of one iteration, as a run makes them."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            names[int(torch.randint(len(names), (), generator=g))],
            size * torch.nn.functional.normalize(torch.randn(32, generator=g, dtype=torch.float64), dim=0),
            torch.nn.functional.normalize(torch.randn(32, generator=g, dtype=torch.float64), dim=0),
            i // 3 + 1,
        )
        for i in range(count)
    ]


def edit_of(steps: list[Step], base: dict[str, Any] | None = None) -> Edit:
    edit = Edit(base=base or {})
    for name, v, u, iteration in steps:
        edit = edit.then(name, v, u, iteration)
    return edit


def projections(model: Any) -> dict[str, Any]:
    return {s.name: s.projection for s in find_decoder(model).sublayers}


def bake_one_by_one(model: Any, steps: list[Step]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weights, as (out, in), and biases in float64 after every step was written into them in turn."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, module in projections(model).items():
        W = module.weight.double().T if type(module).__name__ == "Conv1D" else module.weight.double()
        bias = getattr(module, "bias", None)
        found[name] = W, None if bias is None else bias.double()
    for name, v, u, _ in steps:
        W, b = found[name]
        found[name] = W + torch.outer(v, u @ W), None if b is None else b + v * (u @ b)
    return found


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def with_biases(model: Any) -> Any:
    """Fresh biases are zero, which would hide a bias that is not edited."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("config", ["LlamaConfig", "GPT2Config", "PhiConfig", "Gemma2Config", "OPTConfig"])
def test_hook_sequential_bakes_and_one_bake_agree(config: str) -> None:
    changes = {"word_embed_proj_dim": 32} if config == "OPTConfig" else {}
    model, twin = (with_biases(tiny_model(config, **changes)) for _ in range(2))
    steps = random_steps(list(projections(model)))
    edit = edit_of(steps)
    exact = bake_one_by_one(model, steps)
    untouched = logits(model)

    with edit.apply(model):
        hooked = logits(model)
    edit.bake(twin)
    edited = set(edit.factors)
    assert 2 <= len(edited) <= 6
    for name, module in projections(twin).items():
        W, b = exact[name]
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        assert far(weight, W) < 1e-5
        if b is not None:
            assert far(module.bias, b) < 1e-5
    assert far(untouched, hooked) > 1e-2
    assert far(logits(twin), hooked) < 1e-5

    for name, module in projections(model).items():  # the float64 weights, put in place, give the same logits
        W, b = exact[name]
        module.weight.data.copy_(W.T if type(module).__name__ == "Conv1D" else W)
        if b is not None:
            module.bias.data.copy_(b)
    assert far(logits(model), hooked) < 1e-5


def test_one_bake_in_bfloat16_rounds_once() -> None:
    """The baked bfloat16 weights are the exact ones rounded, not the sum of thirty roundings."""
    model = tiny_model().to(torch.bfloat16)
    steps = random_steps(list(projections(model)))
    exact = bake_one_by_one(model, steps)
    edit_of(steps).bake(model)
    for name, module in projections(model).items():
        assert module.weight.dtype == torch.bfloat16
        wanted = exact[name][0]
        assert float((module.weight.double() - wanted).abs().max()) <= float(wanted.abs().max()) * 2**-8


def test_hook_keeps_the_models_dtype() -> None:
    model = tiny_model().to(torch.bfloat16)
    edit = edit_of(random_steps(list(projections(model))))
    with edit.apply(model):
        assert logits(model).dtype == torch.bfloat16


def test_at_gives_every_earlier_model(model: Any) -> None:
    steps = random_steps(list(projections(model)))
    edit = edit_of(steps)
    assert edit.iterations == 10
    for k in (0, 1, 4, 10, 99):
        part = edit.at(k)
        with part.apply(model, check=False):
            found = logits(model)
        with edit_of([s for s in steps if s[3] <= k]).apply(model, check=False):
            assert torch.equal(logits(model), found)
        assert part.iterations == min(k, 10)
        for name, f in part.factors.items():
            assert torch.equal(f.V, edit.factors[name].V[:, : f.V.shape[1]])
            assert torch.equal(f.U, edit.factors[name].U[:, : f.U.shape[1]])
    assert edit.at(0).factors == {}
    with pytest.raises(UsageError, match="no iteration -1"):
        edit.at(-1)


def test_best_is_what_applies(model: Any) -> None:
    edit = edit_of(random_steps(list(projections(model))))
    best = replace(edit, best=3)
    assert edit.chosen is edit
    with best.apply(model):
        found = logits(model)
    with edit.at(3).apply(model):
        assert torch.equal(logits(model), found)
    assert best.at(7).best is None
    assert best.at(7).iterations == 7


@pytest.mark.parametrize("use", ["apply", "bake"])
def test_an_edit_that_changes_nothing_is_an_error(model: Any, use: str) -> None:
    edit = edit_of(random_steps(list(projections(model))))
    for empty in (Edit(), edit.at(0), replace(edit, best=0)):
        with pytest.raises(LlmvaError, match="changes nothing"):
            getattr(empty, use)(model)
    assert hooks(model) == 0


@pytest.mark.parametrize("use", ["apply", "bake"])
def test_an_edit_of_another_width_is_an_error(model: Any, use: str) -> None:
    edit = Edit().then("model.layers.0.mlp.down_proj", torch.ones(48), torch.ones(48), 1)
    with pytest.raises(LlmvaError, match=r"48 wide at model.layers.0.mlp.down_proj, and this model is 32"):
        getattr(edit, use)(model)


EXPERTS: dict[str, dict[str, Any]] = {
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "DeepseekV3Config": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "Qwen3NextConfig": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "num_hidden_layers": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("config", EXPERTS)
def test_mixtures_of_experts_are_baked_expert_by_expert(config: str) -> None:
    model = with_biases(tiny_model(config, **EXPERTS[config]))
    edit = edit_of(random_steps(list(projections(model))))
    untouched = logits(model)
    with edit.apply(model):
        hooked = logits(model)
    edit.bake(model)
    assert far(untouched, hooked) > 1e-2
    assert far(logits(model), hooked) < 1e-5


def test_experts_whose_outputs_pass_through_something_else_are_refused() -> None:
    """The names fit, but what they put out is not linear in them: a bake would be wrong without a word."""
    model = tiny_model("MixtralConfig", num_local_experts=4)
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x).softmax(-1)
    edit = edit_of(random_steps(["model.layers.1.mlp"]))
    with pytest.raises(LlmvaError, match="cannot be edited in place"):
        edit.bake(model)


@pytest.mark.parametrize(
    ("shape", "axis"), [((32,), -1), ((32, 48), -2), ((48, 32), -1), ((3, 32, 8), -2), ((3, 8, 32), -1)]
)
def test_left_map_is_exact_in_parts(shape: tuple[int, ...], axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    weight, V, U = (torch.randn(s, generator=g) for s in (shape, (32, 5), (32, 5)))
    M = torch.eye(32, dtype=torch.float64) + V.double() @ U.double().T
    wanted = M @ weight.double() if axis == -2 or len(shape) == 1 else weight.double() @ M.T
    monkeypatch.setattr("llmva.models.writers.CHUNK", 96)  # three columns at a time
    assert far(left_map(weight, axis, V, U), wanted) < 1e-6
    narrow = left_map(weight.bfloat16(), axis, V, U)
    assert narrow.dtype == torch.bfloat16
    assert narrow.shape == weight.shape


def test_strength(model: Any) -> None:
    name = list(projections(model))[3]
    edit = edit_of(random_steps([name]))
    base = logits(model)
    outputs = {}
    for strength in (0.0, 0.5, 1.0):
        kept: list[Tensor] = []
        with edit.scaled(strength).apply(model):
            handle = projections(model)[name].register_forward_hook(lambda m, a, o, kept=kept: kept.append(o))
            found = logits(model)
            handle.remove()
        outputs[strength] = kept[0]
        if strength == 0:
            assert torch.equal(found, base)
    torch.testing.assert_close(outputs[0.5], (outputs[0.0] + outputs[1.0]) / 2)
    assert far(outputs[1.0], outputs[0.0]) > 0.1
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="strength"):
            edit.scaled(bad)


# -- hooks -----------------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_go_at_the_end_on_remove_and_on_an_exception(model: Any) -> None:
    edit = edit_of(random_steps(list(projections(model))))
    base = logits(model)
    with edit.apply(model):
        assert hooks(model) == len(edit.factors)
    assert hooks(model) == 0

    def stumble() -> None:
        with edit.apply(model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stumble()
    assert hooks(model) == 0
    applied = edit.apply(model)
    assert not torch.equal(logits(model), base)
    applied.remove()
    applied.remove()
    assert torch.equal(logits(model), base)


def test_a_missing_sublayer_leaves_no_hooks(model: Any) -> None:
    steps = [
        *random_steps(list(projections(model))),
        ("model.layers.9.mlp.down_proj", torch.ones(32), torch.ones(32), 1),
    ]
    for use in ("apply", "bake"):
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(LlmvaError, match=r"no sublayer model.layers.9.mlp.down_proj"):
            getattr(edit_of(steps), use)(model)
        assert hooks(model) == 0
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class Packed(nn.Module):
    """Stands for a quantised linear: it computes, but its weight is integers in a layout of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8).reshape(-1))
        self.shape = linear.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor)
        return x @ (self.weight.reshape(self.shape) * self.scale).T


class PackedLinear(nn.Linear):
    """As some libraries do it: a Linear by class, whose weight is in float8 and means nothing without its scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter((linear.weight * 100).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() / 100).T


@pytest.mark.parametrize("packed", [Packed, PackedLinear])
def test_packed_weights_work_by_hook_and_refuse_a_bake(model: Any, packed: Callable[[Any], nn.Module]) -> None:
    mlp = model.model.layers[1].mlp
    mlp.down_proj = packed(mlp.down_proj)
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    edit = edit_of(random_steps(names))
    kept: list[Tensor] = []
    with edit.apply(model):
        mlp.down_proj.register_forward_hook(lambda m, a, o: kept.append((m.forward(a[0]), o)))
        logits(model)
    plain, edited = kept[0]
    f = edit.factors[names[1]]
    torch.testing.assert_close(edited, plain + (plain @ f.U) @ f.V.T)
    first = model.model.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(LlmvaError, match=r"weights of model.layers.1.mlp.down_proj cannot be edited in place.*hook"):
        edit.bake(model)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, first)  # all or nothing


# -- base model ------------------------------------------------------------------------------------------------------


def fingerprinted(model: Any, name: str = "tiny") -> Edit:
    return edit_of(random_steps(list(projections(model))), fingerprint(find_decoder(model), name))


@pytest.mark.parametrize("use", ["apply", "bake"])
def test_another_model_is_refused_and_both_hashes_named(model: Any, use: str) -> None:
    edit = fingerprinted(model)
    other = tiny_model(seed=1)
    name = next(iter(edit.factors))
    hashes = [fingerprint(find_decoder(m), "")["hashes"][name] for m in (model, other)]
    with pytest.raises(LlmvaError) as caught:
        getattr(edit, use)(other)
    text = str(caught.value)
    assert all(h in text for h in hashes)
    assert "tiny" in text
    assert "\n" not in text
    assert hooks(other) == 0
    edit.apply(other, check=False).remove()
    getattr(edit, use)(model)


def test_a_baked_model_is_another_model(model: Any) -> None:
    edit = fingerprinted(model)
    edit.bake(model)
    with pytest.raises(LlmvaError, match="hash"):
        edit.bake(model)


def test_another_dtype_of_the_same_checkpoint_is_the_same_model(model_folder: Path) -> None:
    from llmva.models.load import load_model

    wide, _ = load_model(model_folder, dtype="float32")
    narrow, _ = load_model(model_folder, dtype="bfloat16")
    assert narrow.dtype == torch.bfloat16
    fingerprinted(wide).apply(narrow).remove()
    fingerprinted(narrow).apply(wide).remove()


def test_fingerprint_sees_every_hashed_part(model: Any) -> None:
    first = fingerprint(find_decoder(model), "a")
    assert fingerprint(find_decoder(tiny_model()), "b")["sha256"] == first["sha256"]
    assert len(first["hashes"]) == 6
    model.model.layers[2].mlp.down_proj.weight[3, 4] += 1.0
    second = fingerprint(find_decoder(model), "a")
    changed = [name for name in first["hashes"] if first["hashes"][name] != second["hashes"][name]]
    assert changed == ["model.layers.2.mlp.down_proj"]
    assert first["sha256"] != second["sha256"]


# -- files -----------------------------------------------------------------------------------------------------------


def same(a: Edit, b: Edit) -> bool:
    return (
        a.base == b.base
        and a.best == b.best
        and sorted(a.factors) == sorted(b.factors)
        and all(
            torch.equal(getattr(a.factors[n], part), getattr(b.factors[n], part))
            for n in a.factors
            for part in ("V", "U", "iteration")
        )
    )


def test_save_and_load(model: Any, tmp_path: Path) -> None:
    edit = replace(fingerprinted(model), best=4)
    path = edit.save(tmp_path)
    assert path == tmp_path / "edit.safetensors"
    loaded = Edit.load(tmp_path)
    assert same(edit, loaded)
    assert same(loaded, Edit.load(path))
    again = loaded.save(tmp_path / "other.safetensors")
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edit.safetensors", "other.safetensors"]


def test_bytes_do_not_depend_on_the_order_of_fitting(model: Any, tmp_path: Path) -> None:
    edit = fingerprinted(model)
    turned = replace(
        edit,
        factors=dict(reversed(edit.factors.items())),
        base=dict(reversed(edit.base.items())),
    )
    a, b = edit.save(tmp_path / "a.safetensors"), turned.save(tmp_path / "b.safetensors")
    assert a.read_bytes() == b.read_bytes()


def test_an_empty_edit_travels_too(tmp_path: Path) -> None:
    Edit(base={"model": "m"}).save(tmp_path)
    assert same(Edit.load(tmp_path), Edit(base={"model": "m"}))


def written(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    """A file in the edit's format with something changed."""
    f = Factors(torch.ones(4, 2), torch.ones(4, 2), torch.tensor([1, 3], dtype=torch.int32))
    whole = {"a.b.V": f.V, "a.b.U": f.U, "a.b.iteration": f.iteration}
    note = {"format": "llmva-edit", "version": 1, "best": None, "base": {}, **changes}
    save_file({**whole, **(tensors or {})}, path, {"llmva": json.dumps(note)})


def test_the_file_that_the_tests_below_break_is_whole(tmp_path: Path) -> None:
    written(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path).factors["a.b"].V.shape == (4, 2)


def dropped(path: Path) -> None:
    f = torch.ones(4, 2)
    note = {"format": "llmva-edit", "version": 1, "best": None, "base": {}}
    save_file({"a.b.V": f, "a.b.U": f.clone()}, path, {"llmva": json.dumps(note)})


def cut(path: Path) -> None:
    written(path)
    path.write_bytes(path.read_bytes()[:-7])


ONES = torch.ones(4, 2)
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "not a whole edit"),
    "truncated header": (lambda p: p.write_bytes(b'\x80\x00\x00\x00\x00\x00\x00\x00{"__meta'), "not a whole edit"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole edit"),
    "random bytes": (lambda p: p.write_bytes(bytes(range(256)) * 9), "not a whole edit"),
    "huge header": (lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), "not a whole edit"),
    "a pickle": (lambda p: torch.save({"a": ONES}, p), "not a whole edit"),
    "another safetensors": (lambda p: save_file({"weight": ONES}, p), "no llmva edit"),
    "another format": (lambda p: written(p, format="other"), "no llmva edit"),
    "broken note": (lambda p: save_file({"a.V": ONES}, p, {"llmva": "{"}), "not a whole edit"),
    "deep note": (lambda p: save_file({"a.V": ONES}, p, {"llmva": "[" * 100000}), "not a whole edit"),
    "note of another kind": (lambda p: save_file({"a.V": ONES}, p, {"llmva": "[1]"}), "no llmva edit"),
    "newer": (lambda p: written(p, version=2), r"version 2 .* reads 1.*update"),
    "no version": (lambda p: written(p, version=None), "version None"),
    "no base": (lambda p: written(p, base=None), "no base model"),
    "hashes of another kind": (lambda p: written(p, base={"hashes": [1]}), "no base model"),
    "NaN": (lambda p: written(p, {"a.b.V": ONES * float("nan")}), "a.b holds NaN"),
    "infinity": (lambda p: written(p, {"a.b.U": ONES * float("inf")}), "a.b holds NaN"),
    "lacking factor": (dropped, "a.b lacks a factor"),
    "wrong dtype": (lambda p: written(p, {"a.b.V": ONES.double()}), "a.b has wrong shapes or dtypes"),
    "wrong iteration dtype": (lambda p: written(p, {"a.b.iteration": torch.tensor([1, 2])}), "wrong shapes or dtypes"),
    "wrong shape": (lambda p: written(p, {"a.b.U": torch.ones(4, 3)}), "wrong shapes"),
    "a vector": (lambda p: written(p, {"a.b.U": torch.ones(4)}), "wrong shapes"),
    "columns out of order": (
        lambda p: written(p, {"a.b.iteration": torch.tensor([3, 1], dtype=torch.int32)}),
        "out of order",
    ),
    "iteration below zero": (
        lambda p: written(p, {"a.b.iteration": torch.tensor([-1, 1], dtype=torch.int32)}),
        "out of order",
    ),
    "tensor of another name": (lambda p: written(p, {"a.b.W": ONES.clone()}), "unexpected tensor a.b.W"),
    "tensor without a dot": (lambda p: written(p, {"weight": ONES.clone()}), "weight lacks a factor"),
    "negative best": (lambda p: written(p, best=-1), "best iteration -1"),
    "best of another kind": (lambda p: written(p, best="3"), "best iteration '3'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    make, words = BROKEN[name]
    path = tmp_path / "edit.safetensors"
    make(path)
    with pytest.raises(LlmvaError, match=words) as caught:
        Edit.load(tmp_path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


def test_no_file_is_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "x.safetensors"):
        with pytest.raises(UsageError, match="There is no edit at"):
            Edit.load(path)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_bytes_never_escape_as_other_errors(seed: int, model: Any, tmp_path: Path) -> None:
    """Bytes changed at random, mostly in the header, where they do most harm."""
    path = fingerprinted(model).at(1).save(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    g = torch.Generator().manual_seed(seed)
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(int(torch.randint(1, 4, (), generator=g))):
            data[int(torch.randint(header, (), generator=g))] = int(torch.randint(256, (), generator=g))
        path.write_bytes(data)
        try:
            Edit.load(path)
        except LlmvaError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_a_full_disk_leaves_the_old_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = edit_of(random_steps(["a"]))
    path = edit.at(2).save(tmp_path)
    old = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        opened = Path.open

        def open_full(self: Path, *args: Any, **kwargs: Any) -> Any:
            file = opened(self, *args, **kwargs)
            return Full(file)

        class Full:
            def __init__(self, file: Any) -> None:
                self.file = file

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *args: Any) -> None:
                self.file.close()

            write = staticmethod(full)

        monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(LlmvaError, match=r"cannot be written \(No space left on device\)"):
        edit.save(tmp_path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["edit.safetensors"]


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LlmvaError, match="cannot be written"):
        Edit().save(tmp_path / "file" / "edit.safetensors")


def test_a_sublayer_that_is_never_called_is_an_error(model: Any) -> None:
    """A hook on a list of modules would sit there for ever: the edit would do nothing without a word."""
    edit = Edit().then("model.layers", torch.ones(32), torch.ones(32), 1)
    with pytest.raises(LlmvaError, match=r"no sublayer model\.layers"):
        edit.apply(model)


def test_an_iteration_that_was_undone_cannot_be_had() -> None:
    """at() would give what the run went back to, under the name of another iteration's figures."""
    v = torch.ones(8, dtype=torch.float64)
    edit = Edit().then("layer", v, v, 1).then("layer", v, v, 4)
    assert edit.held == [1, 4]
    assert edit.asked(0, "run").factors == {}
    assert [edit.asked(t, "run").factors["layer"].V.shape[1] for t in (1, 4)] == [1, 2]
    for t in (2, 3):
        with pytest.raises(UsageError, match=f"Iteration {t} of 'run' was undone: choose --iteration among 0, 1, 4"):
            edit.asked(t, "run")
    for t in (-1, 5):
        with pytest.raises(UsageError, match="holds iterations 0 to 4"):
            edit.asked(t, "run")
