"""What align reads, export reads: one rule for which files are the model, and a refusal before a run, not after it.

Before `models/files` each of these was read differently by the two, or by nobody.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import Said, chat_model, tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.export.adapters.peft import export_lora
from llmva.export.exportable import export_notes
from llmva.export.merged import export_merged
from llmva.export.plan import make_plan
from llmva.models.checkpoint import Checkpoint
from llmva.models.files.weights import INDEX, SINGLE, Weights, find_weights
from llmva.models.fingerprint import fingerprint
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder
from test_edit import edit_of, far, logits, projections, random_steps

Work = Callable[[Path], object]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model in several shards, to be changed."""
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edited(base: Path) -> Any:
    """The model as align loads it, with an edit of it saved beside its folder."""
    model, _ = load_model(base, device="cpu")
    edit_of(random_steps(list(projections(model))), fingerprint(find_decoder(model), str(base))).save(base.parent)
    return model


def index(base: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads((base / INDEX).read_text())
    change(fields)
    (base / INDEX).write_text(json.dumps(fields))


def rename(base: Path, new: Callable[[str], str]) -> None:
    """The index's names of the shards, without moving the shards."""
    index(base, lambda fields: fields.update(weight_map={k: new(v) for k, v in fields["weight_map"].items()}))


def shards(base: Path) -> list[Path]:
    return sorted(base.glob("model-*.safetensors"))


def one_file(base: Path, name: str = SINGLE, factor: float = 1.0, of: str = "") -> None:
    """All tensors in one file more, those whose name contains `of` scaled; the shards stay."""
    tensors = {name: tensor for shard in shards(base) for name, tensor in load_file(shard).items()}
    scaled = {key: tensor * (factor if of in key else 1.0) for key, tensor in tensors.items()}
    save_file(scaled, base / name, {"format": "pt"})


def without_shards(base: Path) -> None:
    for path in [*shards(base), base / INDEX]:
        path.unlink()


def adapter(base: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config: Any = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(base)


def adapter_alone(base: Path) -> None:
    adapter(base)
    without_shards(base)
    (base / "config.json").unlink()


def pickle_alone(base: Path) -> None:
    """Whoever opens it leaves a file behind."""
    without_shards(base)
    code = f"cbuiltins\nopen\n(V{base.parent / 'opened'}\nVw\ntR."
    (base / "pytorch_model.bin").write_bytes(code.encode())


def pickled_shards(base: Path) -> None:
    without_shards(base)
    (base / "pytorch_model.bin.index.json").write_text("{}")


def variant_alone(base: Path) -> None:
    one_file(base, "model.fp16.safetensors")
    without_shards(base)


def sharded_variant_alone(base: Path) -> None:
    (base / INDEX).rename(base / "model.safetensors.index.fp16.json")
    for shard in shards(base):
        shard.rename(base / shard.name.replace("model-", "model.fp16-"))


def other_form_alone(name: str) -> Work:
    def work(base: Path) -> None:
        without_shards(base)
        (base / name).write_bytes(b"x")

    return work


def in_a_subfolder(base: Path) -> None:
    inside = base / "snapshots" / "abc"
    inside.mkdir(parents=True)
    for path in [path for path in base.iterdir() if path.is_file()]:
        path.rename(inside / path.name)


def to_nowhere(base: Path) -> None:
    shard = shards(base)[0]
    shard.unlink()
    shard.symlink_to(base / "gone")


def pointer(base: Path) -> None:
    shards(base)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def set_field(name: str, value: Any) -> Work:
    def work(base: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return work


REFUSED: dict[str, tuple[Work, str]] = {
    "an adapter beside the model": (adapter, "holds an adapter beside the model.*merge_and_unload"),
    "an adapter alone": (adapter_alone, "is an adapter and no model: merge it.*or give its base model"),
    "an index with whole paths": (lambda b: rename(b, lambda n: f"{b}/{n}"), "is not in this folder: write the shard"),
    "an index that leaves the folder": (lambda b: rename(b, lambda n: f"../other/{n}"), "is not in this folder"),
    "an index that leaves it on the way": (lambda b: rename(b, lambda n: f"x/../../{n}"), "is not in this folder"),
    "an index of another system's paths": (lambda b: rename(b, lambda n: f"C:\\models\\{n}"), "is not in this folder"),
    "an index of what is not there": (lambda b: shards(b)[1].unlink(), "lacks model-00002.* which model.safeten"),
    "an index of pickles": (lambda b: rename(b, lambda n: n.replace("safetensors", "bin")), "no safetensors file"),
    "an index without names": (lambda b: index(b, lambda f: f.update(weight_map={})), "read as an index"),
    "an index without metadata": (lambda b: index(b, lambda f: f.pop("metadata")), "read as an index"),
    "an index that is no JSON": (lambda b: (b / INDEX).write_text("{"), "read as an index"),
    "an index that is a list": (lambda b: (b / INDEX).write_text("[]"), "read as an index"),
    "shards without their index": (lambda b: (b / INDEX).unlink(), "holds shards but no model.safetensors.index"),
    "a pickle alone": (pickle_alone, r"only pytorch_model\.bin, a pickle.*from_pretrained"),
    "pickled shards alone": (pickled_shards, r"only pytorch_model\.bin\.index\.json, a pickle"),
    "a variant alone": (variant_alone, r"only the variant 'fp16'.*variant='fp16'"),
    "a variant in shards": (sharded_variant_alone, "only the variant 'fp16'"),
    "a .gguf in a folder": (other_form_alone("m.Q4_0.gguf"), r"but m\.Q4_0\.gguf: give '.*/m\.Q4_0\.gguf'"),
    "Mistral's own form": (other_form_alone("consolidated.safetensors"), r"only consolidated\.safetensors"),
    "weights of TensorFlow": (other_form_alone("tf_model.h5"), r"only tf_model\.h5"),
    "a distributed checkpoint": (
        lambda b: shutil.copy(shards(b)[0], b / "shard-00000-model-00000-of-00002.safetensors"),
        "distributed checkpoint",
    ),
    "weights named outside": (set_field("transformers_weights", "../model.safetensors"), "transformers_weights"),
    "weights named that are a pickle": (set_field("transformers_weights", "model.bin"), "transformers_weights"),
    "weights named that are missing": (set_field("transformers_weights", "w.safetensors"), "lacks w.safetensors"),
    "a link to nowhere": (to_nowhere, "model-00001.* is a link to a file that is not there"),
    "a pointer of Git LFS": (pointer, "model-00001.*is a pointer of Git LFS.*git lfs pull"),
    "a cache's outer folder": (in_a_subfolder, "holds no config.json: give '.*snapshots/abc'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_before_the_run(case: str, base: Path) -> None:
    """By align's loading and by export's reading, in the same words; and no pickle is opened."""
    work, words = REFUSED[case]
    edited(base)
    work(base)
    said = []
    out = base.parent / "out"
    for read in (lambda: load_model(base, device="cpu"), lambda: export_merged(make_plan(base.parent), out)):
        with pytest.raises(LlmvaError) as caught:
            read()
        said.append(str(caught.value))
        assert "\n" not in said[-1]
        assert said[-1].endswith(".")
    assert re.search(words, said[0]), said[0]
    if (base / "config.json").is_file():
        assert said[0] == said[1]
    assert not out.exists()
    assert not (base.parent / "opened").exists()


def test_align_says_it_before_anything_else(base: Path, command: Callable[..., Said], tmp_path: Path) -> None:
    adapter(base)
    said = command("align", base, "--out", tmp_path / "run")
    assert said.code == 2
    assert "merge_and_unload" in said.err
    assert not (tmp_path / "run").exists()


def weights_in_a_subfolder(base: Path) -> None:
    (base / "weights").mkdir()
    for shard in shards(base):
        shard.rename(base / "weights" / shard.name)
    rename(base, lambda name: f"weights/{name}")


def weights_with_a_name(base: Path) -> None:
    one_file(base, "mine.safetensors")
    without_shards(base)
    set_field("transformers_weights", "mine.safetensors")(base)


def linked(base: Path) -> None:
    """As in the hub's cache: every file is a link to a blob elsewhere."""
    blobs = base.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))


READ: dict[str, tuple[Work, set[str]]] = {  # and what of the folder no export holds
    "shards": (lambda b: None, set()),
    "one file beside other shards": (lambda b: one_file(b, factor=1.5), {INDEX, "model-00001-of-00003.safetensors"}),
    "a variant beside": (lambda b: one_file(b, "model.fp16.safetensors", 2.0), {"model.fp16.safetensors"}),
    "a pickle beside": (lambda b: (b / "pytorch_model.bin").write_bytes(b"x"), {"pytorch_model.bin"}),
    "Mistral's form beside": (
        lambda b: [one_file(b, "consolidated.safetensors", 2.0), (b / "params.json").write_text("{}")],
        {"consolidated.safetensors", "params.json"},
    ),
    "a shard that the index does not name": (
        lambda b: shutil.copy(shards(b)[0], b / "model-00009-of-00009.safetensors"),
        {"model-00009-of-00009.safetensors"},
    ),
    "shards in a subfolder": (weights_in_a_subfolder, set()),
    "weights that the config names": (weights_with_a_name, set()),
    "links": (linked, set()),
    "an adapter in a subfolder": (lambda b: adapter(b / "checkpoint-7"), {"checkpoint-7/adapter_config.json"}),
}


@pytest.mark.parametrize("case", READ)
def test_what_was_loaded_is_what_is_exported(case: str, base: Path) -> None:
    work, not_there = READ[case]
    work(base)
    model = edited(base)
    plan, out = make_plan(base.parent), base.parent / "out"
    facts = export_merged(plan, out)
    with plan.edit.apply(model):
        wanted = logits(model)
    assert far(logits(load_model(out, device="cpu")[0]), wanted) < 1e-5
    held = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert held == set(facts["files"]) == set(facts["why"])
    assert not held & not_there
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert {name.rstrip("/") for name in facts["left_out"]} == {
        name.split("/")[0] for name in not_there if "model-0000" not in name
    } | {path.name for path in shards(base) if path.name not in held}
    export_lora(plan, base.parent / "adapter")


def notes(base: Path, **options: Any) -> list[str]:
    model, _ = load_model(base, device="cpu", **options)
    decoder = find_decoder(model)
    print_of = fingerprint(decoder, str(base))
    return export_notes(decoder, {**print_of, "dtype": str(model.dtype).removeprefix("torch.")})


def test_two_sets_of_weights_are_noted(base: Path) -> None:
    assert notes(base) == []
    one_file(base, factor=1.5)
    (note,) = notes(base)
    assert f"holds {SINGLE}, which is read and exported, and {INDEX}" in note


def test_a_tensor_in_two_shards_is_noted_before_and_refused_after(base: Path) -> None:
    """Whichever of the two a loader takes, an edit of one leaves the other as it was."""
    name = "model.layers.1.mlp.down_proj.weight"
    place = Checkpoint.open(base).stored[name].file
    other = next(shard for shard in shards(base) if shard != place)
    save_file({**load_file(other), name: load_file(place)[name]}, other, {"format": "pt"})
    (note,) = notes(base)
    assert "can be exported --as lora and not --as merged" in note
    assert f"{name} in more than one file" in note
    edited(base)
    with pytest.raises(LlmvaError, match=f"holds {name} in more than one file: download"):
        export_merged(make_plan(base.parent), base.parent / "out")


def test_forms_that_an_edit_cannot_have_are_told_before_the_run(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    tiny_model("MixtralConfig", num_local_experts=4).save_pretrained(sparse)
    tiny_tokenizer().save_pretrained(sparse)
    (note,) = notes(sparse)
    assert "--as merged and not --as lora, since it has fused experts" in note


def test_weights_that_changed_in_memory_are_told_before_the_run(base: Path) -> None:
    model, _ = load_model(base, device="cpu")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    decoder = find_decoder(model)
    (note,) = export_notes(decoder, {**fingerprint(decoder, str(base)), "dtype": "float32"})
    assert "model.layers.1.mlp.down_proj differs" in note
    assert "--base" in note


def test_an_adapter_that_is_on_the_model_is_refused_before_the_run(base: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = load_model(base, device="cpu")
    print_of = fingerprint(find_decoder(model), str(base))
    config: Any = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(model, config)
    with pytest.raises(UsageError, match=r"An adapter is on the model.*merge_and_unload"):
        export_notes(find_decoder(model), print_of)
    assert export_notes(find_decoder(tuned.merge_and_unload()), print_of) == []


def test_float16_of_other_weights_is_refused_before_the_run(base: Path) -> None:
    """It rounds small weights, so an export would find another model's hash in the folder."""
    one_file(base, factor=1e-5, of="down_proj")
    with pytest.raises(UsageError, match=r"float16 rounds the weights.*--dtype bfloat16 or float32"):
        notes(base, dtype="float16")
    assert notes(base, dtype="bfloat16") == notes(base)


def test_a_model_made_in_memory_has_no_folder_to_be_checked() -> None:
    decoder = chat_model(tiny_model(), tiny_tokenizer()).decoder
    assert export_notes(decoder, fingerprint(decoder, "unnamed")) == []


def test_a_run_remembers_where_its_model_is_and_what_export_cannot_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name relative to where align was called leads export elsewhere, and looks like a hub id on a card."""
    import llmva

    one_file(base, factor=1.5)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model("base", device="cpu")
    prompts = llmva.PromptSet.from_lists([f"break {i}" for i in range(12)], [f"paint {i}" for i in range(12)])
    record = llmva.align(model, tokenizer, prompts, out="run", iterations=1, max_new_tokens=2).record
    assert record["base"]["model"] == str(base)
    assert any(INDEX in limit for limit in record["limits"])


def test_weights_are_found_without_reading_them(base: Path) -> None:
    for shard in shards(base):
        shard.write_bytes(b"")
    assert find_weights(base) == Weights(tuple(shard.name for shard in shards(base)), INDEX)


def both_embeddings(base: Path) -> None:
    """The config ties them, and the files hold two."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


def test_embeddings_that_the_config_ties_and_the_files_do_not_are_told(base: Path) -> None:
    model, tokenizer = load_model(base, device="cpu")
    plain = logits(model)
    both_embeddings(base)
    model, tokenizer = load_model(base, device="cpu")
    assert far(logits(model), plain) == 0.0
    (limit,) = chat_model(model, tokenizer).limits
    assert "ties the output embedding" in limit


def test_a_head_alone_is_the_embedding_of_a_model_that_ties_them(base: Path) -> None:
    """This held: transformers reads either name."""
    tied = tiny_model(tie_word_embeddings=True)
    tied.save_pretrained(base)
    for path in (base / INDEX, *shards(base)):
        path.unlink(missing_ok=True)
    tensors = load_file(base / SINGLE) if (base / SINGLE).is_file() else dict(tied.state_dict())
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, base / SINGLE, {"format": "pt"})
    model, _ = load_model(base, device="cpu")
    assert far(logits(model), logits(tied)) == 0.0


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_is_not_here_is_named(name: str, base: Path) -> None:
    """The sentence asked for a package of a name that does not exist."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, name: "flash_attention_2"}))
    with pytest.raises(UsageError, match=r"remove attn_implementation and _attn_implementation"):
        load_model(base, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SINGLE])
def test_a_link_to_a_file_that_is_gone_is_named(name: str, base: Path) -> None:
    """A copy of the hub's cache without its blobs: there was no config, no tokenizer, or only model.safetensors."""
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to("../../blobs/0a1b2c")
    with pytest.raises(UsageError, match=rf"{re.escape(name)}' is a link to a file that is not there.*cp -rL"):
        load_model(base, device="cpu")


def test_shards_are_read_and_not_believed(base: Path, tmp_path: Path) -> None:
    """An index that names another shard for a tensor, and leaves one out. This held."""
    model = edited(base)
    name = "model.layers.1.mlp.down_proj.weight"
    index(base, lambda fields: fields["weight_map"].update({name: min(fields["weight_map"].values())}))
    index(base, lambda fields: fields["weight_map"].pop("model.layers.0.mlp.down_proj.weight"))
    found, _ = load_model(base, device="cpu")
    assert far(logits(found), logits(model)) == 0.0
    export_merged(make_plan(base.parent, base=str(base)), tmp_path / "out")
    merged, _ = load_model(tmp_path / "out", device="cpu")
    with Edit.load(base.parent).apply(model):
        assert far(logits(merged), logits(model)) < 1e-4


@pytest.mark.parametrize("more", [-100, 100])
def test_a_shard_of_another_length_is_refused(more: int, base: Path) -> None:
    """This held: nothing is read beyond its end, and nothing is left over."""
    shard = shards(base)[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:more] if more < 0 else data + bytes(more))
    with pytest.raises(LlmvaError, match="download or convert the model again"):
        load_model(base, device="cpu")
