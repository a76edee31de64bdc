"""Adapters as .gguf hold exactly the edit, under names of llama.cpp, which answers with them as the edit does.

The last needs the package llama_cpp, and is skipped without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

import test_lora
from conftest import Said
from llmva.edit import Edit
from llmva.errors import LlmvaError
from llmva.export.adapters.gguf_reading import adding, read_additions
from llmva.export.adapters.gguf_writing import export_gguf
from llmva.export.adapters.tensor_names import ARCHITECTURES, tensor_names
from llmva.export.plan import make_plan
from llmva.export.verify import verify
from llmva.models.fingerprint import fingerprint
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder
from test_cli import finish_gguf, gguf_llama, write_gguf
from test_edit import far
from test_merged import made

Command = Callable[..., Said]
UNKNOWN = ("PhiConfig", "GPT2Config", "OPTConfig", "GPTNeoXConfig")  # of which such an adapter is not written
DENSE = {config: options for config, options in test_lora.DENSE.items() if config not in UNKNOWN}


def added(path: Path) -> dict[str, Tensor]:
    """What the adapter adds to each tensor, by llama.cpp's rule: alpha / rank * B A (get_scale of llama-adapter.h)."""
    file = gguf.GGUFReader(path)
    alpha = file.fields["adapter.lora.alpha"].contents()
    parts = {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in file.tensors}
    names = {name.rsplit(".lora_", 1)[0] for name in parts}
    found = {}
    for name in names:
        A, B = parts.pop(f"{name}.lora_a"), parts.pop(f"{name}.lora_b")
        found[name] = alpha / B.shape[1] * (B @ A)
    assert not parts
    return found


@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("config", DENSE)
def test_the_file_holds_exactly_the_edit(config: str, rank: int | None, tmp_path: Path) -> None:
    model = made(tmp_path, config, **DENSE[config])
    plan = make_plan(tmp_path, strength=0.7)
    facts = export_gguf(plan, tmp_path / "out", rank=rank)
    path = tmp_path / "out" / "adapter.gguf"
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == facts["architecture"] == ARCHITECTURES[model.config.model_type]
    assert len({f.V.shape[1] for f in plan.edit.factors.values()}) > 1  # ranks differ, and no module is scaled wrongly
    assert facts["warnings"] == []
    got = added(path)
    for name, f in plan.edit.factors.items():
        layer, kind = name.split(".")[2], "attn_output" if "attn" in name else "ffn_down"
        wanted = f.V.double() @ (f.U.double().T @ model.get_submodule(name).weight.double())
        assert far(got.pop(f"blk.{layer}.{kind}.weight"), wanted) < 1e-6, name
    assert not got
    record = verify(str(tmp_path / "base"), [tmp_path / "out"])
    assert record["same"], record
    assert record["artefacts"][0]["kind"] == "gguf"


def test_what_it_cannot_hold_is_refused_and_merged_is_offered(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("LlamaConfig", {"attention_bias": True}, "changes biases, which llama.cpp's adapters cannot hold"),
        ("MixtralConfig", {"num_local_experts": 4}, "stores the projections of mixtral models as they are"),
        ("GPT2Config", {}, "stores the projections of gpt2 models"),
    ]
    for number, (config, changes, says) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        made(folder, config, **changes)
        with pytest.raises(LlmvaError, match=says) as told:
            export_gguf(make_plan(folder), folder / "out")
        assert "--as merged" in str(told.value)
        assert not (folder / "out").exists()


def test_names_of_a_multimodal_models_text_part_and_names_that_are_none() -> None:
    names = tensor_names("gemma3", ["model.language_model.layers.11.mlp.down_proj"])
    assert names == {"model.language_model.layers.11.mlp.down_proj": "blk.11.ffn_down.weight"}
    with pytest.raises(LlmvaError, match=r"no name for model.layers.0.odd in llama models: export with --as merged"):
        tensor_names("llama", ["model.layers.0.odd"])


def test_every_listed_architecture_is_one_of_the_package() -> None:
    layer = ["model.layers.2.self_attn.o_proj", "model.layers.2.mlp.down_proj"]
    for architecture in ARCHITECTURES.values():
        assert list(tensor_names(architecture, layer).values()) == ["blk.2.attn_output.weight", "blk.2.ffn_down.weight"]


def rewritten(path: Path, change: Callable[[str, Tensor], Tensor], alpha: float | None = None) -> None:
    """Write an adapter's file again, with other tensors or another alpha."""
    file = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    own = file.fields["adapter.lora.alpha"].contents()
    other = gguf.GGUFWriter(path.with_suffix(".part"), file.fields["general.architecture"].contents())
    other.add_float32("adapter.lora.alpha", own if alpha is None else alpha)
    for name, tensor in tensors.items():
        other.add_tensor(name, change(name, tensor).numpy())
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    path.with_suffix(".part").replace(path)


def test_verify_tells_a_file_that_is_not_the_edit(tmp_path: Path) -> None:
    made(tmp_path)
    export_gguf(make_plan(tmp_path), tmp_path / "out")
    path, base = tmp_path / "out" / "adapter.gguf", str(tmp_path / "base")
    whole = path.read_bytes()
    rewritten(path, lambda name, tensor: tensor)
    assert verify(base, [tmp_path / "out"])["same"]
    rewritten(path, lambda name, tensor: tensor * (0.5 if name == "blk.0.ffn_down.weight.lora_b" else 1.0))
    (row,) = verify(base, [tmp_path / "out"])["artefacts"]
    assert row["problems"] == ["model.layers.0.mlp.down_proj is off by 50% of what the edit changes."]
    path.write_bytes(whole)
    rewritten(path, lambda name, tensor: tensor, alpha=1.0)
    assert not verify(base, [tmp_path / "out"])["same"]
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LlmvaError, match="is no adapter of"):
        verify(base, [tmp_path / "out"])


def test_the_command_and_the_modelfile(tmp_path: Path, command: Command) -> None:
    made(tmp_path)
    said = command("export", tmp_path, "--as", "gguf", "--out", tmp_path / "out", "--rank", "16", "--json")
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert (record["as"], record["architecture"], record["rank"]) == ("gguf", "llama", 16)
    assert record["files"] == ["Modelfile", "README.md", "adapter.gguf", "llmva/edit.safetensors"]
    assert (record["truncation"], record["warnings"]) == (0.0, [])
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[1:] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    assert str(tmp_path) not in "".join(lines)
    assert "llama-server -m base.gguf --lora adapter.gguf" in (tmp_path / "out" / "README.md").read_text()
    assert command("verify", tmp_path / "base", tmp_path / "out", "--quiet").code == 0


def test_an_edit_of_a_gguf_file(tmp_path: Path) -> None:
    base = tmp_path / "tiny.gguf"
    write_gguf(base)
    decoder = find_decoder(load_model(base)[0])
    u, v = torch.randn(2, decoder.width, generator=torch.Generator().manual_seed(0))
    edit = Edit({}, fingerprint(decoder, str(base))).then(decoder.names[1], v / v.norm(), u / u.norm(), 1)
    edit.save(tmp_path / "edit.safetensors")
    export_gguf(make_plan(tmp_path / "edit.safetensors"), tmp_path / "out")
    assert (tmp_path / "out" / "Modelfile").read_text() == f"FROM {base}\nADAPTER ./adapter.gguf\n"
    assert verify(str(base), [tmp_path / "out"])["same"]


# -- llama.cpp itself --------------------------------------------------------------------------------------------


def write_base(model: Any, words: list[str], path: Path) -> None:
    """A Llama of transformers as llama.cpp stores it: the rows of q and k in the order of its rotary embedding."""
    c = model.config
    file = gguf_llama(path, c, words)  # its merges are not used: token ids are given
    file.add_rope_freq_base(c.rope_parameters["rope_theta"])
    file.add_key_length(c.head_dim)
    file.add_value_length(c.head_dim)
    file.add_tokenizer_pre("default")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if part in key:
                halves = tensor.reshape(heads, 2, -1, tensor.shape[1])  # cosine and sine come in turns there
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        file.add_tensor(names.get_name(key, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    finish_gguf(file)


def greedy_here(model: Any, rows: list[list[int]], count: int) -> list[list[int]]:
    with torch.inference_mode():
        return [
            model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=count)[0, len(row) :].tolist()
            for row in rows
        ]


def greedy_there(base: Path, rows: list[list[int]], count: int, adapter: Path | None, ends: int) -> list[list[int]]:
    import llama_cpp

    llm = llama_cpp.Llama(
        str(base), lora_path=None if adapter is None else str(adapter), n_ctx=256, n_threads=1, verbose=False
    )
    found = []
    for row in rows:
        llm.reset()
        new: list[int] = []
        for token in llm.generate(row, temp=0.0, repeat_penalty=1.0):
            new.append(token)
            if len(new) == count or token == ends:
                break
        found.append(new)
    llm.close()
    return found


@dataclass(frozen=True)
class Demo:
    """The bundled model, prompts as it reads them, its greedy answers without and with an edit, and that as .gguf."""

    model: Any
    tokenizer: Any
    edit: Edit
    rows: list[list[int]]
    plain: list[list[int]]
    wanted: list[list[int]]
    adapter: Path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    from llmva.cli.inputs import demo_model
    from llmva.models.chat import ChatTemplate
    from llmva.prompts.store import read_jsonl

    folder, place = tmp_path_factory.mktemp("demo"), demo_model()
    model, tokenizer = load_model(place, dtype="float32")
    decoder, generator = find_decoder(model), torch.Generator().manual_seed(0)
    edit = Edit({}, fingerprint(decoder, str(place)))
    for iteration, name in enumerate((*decoder.names, *decoder.names[::3]), start=1):
        v, u = torch.randn(2, decoder.width, generator=generator)
        edit = edit.then(name, v / v.norm(), 20 * u / u.norm(), iteration)  # less changes few answers
    edit.save(folder / "edit.safetensors")
    export_gguf(make_plan(folder / "edit.safetensors"), folder / "out")
    template = ChatTemplate.of(tokenizer)
    rows = [template.row(prompt.text) for prompt in read_jsonl(place / "llmva" / "prompts.jsonl").test[::4][:50]]
    plain = greedy_here(model, rows, 16)
    with edit.apply(model):
        wanted = greedy_here(model, rows, 16)
    assert len(rows) == 50
    assert sum(one != other for one, other in zip(plain, wanted, strict=True)) > 25  # the edit is seen
    return Demo(model, tokenizer, edit, rows, plain, wanted, folder / "out" / "adapter.gguf")


def equal(one: list[list[int]], other: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


def test_by_llama_cpps_rule_the_file_gives_the_edits_answers(demo: Demo) -> None:
    additions = read_additions(demo.adapter, "llama", list(demo.edit.factors))
    with adding(demo.model, additions):
        assert equal(greedy_here(demo.model, demo.rows, 16), demo.wanted) >= 48


def test_llama_cpp_answers_with_the_file_as_the_edit_does(demo: Demo, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    words = [demo.tokenizer.convert_ids_to_tokens(i) for i in range(demo.model.config.vocab_size)]
    base, end = tmp_path / "base.gguf", demo.tokenizer.eos_token_id
    write_base(demo.model, words, base)
    assert equal(greedy_there(base, demo.rows, 16, None, end), demo.plain) >= 48
    assert equal(greedy_there(base, demo.rows, 16, demo.adapter, end), demo.wanted) >= 48
