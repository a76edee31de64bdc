"""A run's identity covers all that its result depends on; an edit's, all weights of its base.

Every case of CHANGED and FOREIGN was accepted before all weights and belongings were compared, but for the edited
projections and the quantised model. The cases of SAME hold, and are to stay so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmva
from conftest import Said, chat_model, taught_requests
from llmva.alignment import RunOptions
from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.evaluation.skills import Probe
from llmva.experiments.cells import Cells, study_identity
from llmva.experiments.compare import compare
from llmva.export import base as export_base
from llmva.export.adapters.peft import export_lora
from llmva.export.diff import diff
from llmva.export.merged import export_merged
from llmva.export.plan import make_plan
from llmva.models.fingerprint import fingerprint, weight_hashes, whole_hash
from llmva.models.load import load_model
from llmva.progress import Progress
from llmva.prompts import PromptSet
from llmva.runs.identity import belongings

FAST: dict[str, Any] = {"iterations": 2, "per_source": 32, "max_new_tokens": 8, "endings_tokens": 0}
Change = Callable[[Path], None]


def prompts() -> PromptSet:
    rows = taught_requests()
    return PromptSet.from_lists(*([text for text, benign, _ in rows if benign == side] for side in (False, True)))


class Notes(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def align(model: Any, tokenizer: Any, out: Path, **more: Any) -> tuple[Any, list[str]]:
    notes = Notes()
    result = llmva.align(model, tokenizer, prompts(), out=out, progress=notes, **{**FAST, **more})
    return result, notes.said


@pytest.fixture(scope="module")
def finished(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a model and that of its finished run; copy before you change them."""
    base, run = (tmp_path_factory.mktemp("identity") / name for name in ("base", "run"))
    shutil.copytree(taught_folder, base)
    result, _ = align(*load_model(base), run, options=RunOptions(name=str(base)))
    assert result.edit.factors
    return base, run


def copied(finished: tuple[Path, Path], to: Path) -> tuple[Path, Path]:
    for place in finished:
        shutil.copytree(place, to / place.name)
    return to / "base", to / "run"


def weights(change: Callable[[str, torch.Tensor], None]) -> Change:
    """Change tensors of a checkpoint in place: same file, same size."""

    def changed(base: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        for name, tensor in tensors.items():
            change(name, tensor)
        save_file(tensors, base / "model.safetensors", {"format": "pt"})

    return changed


def rewritten(name: str, change: Callable[[Any], Any]) -> Change:
    """Change a JSON file of a model's folder."""

    def changed(base: Path) -> None:
        path = base / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return changed


def q_and_v(name: str, tensor: torch.Tensor) -> None:
    if name.endswith(("q_proj.weight", "v_proj.weight")):
        tensor += 0.5


def one_value_of_the_head(name: str, tensor: torch.Tensor) -> None:
    if name == "lm_head.weight":
        tensor[7, 3] += 1.0


def a_norm(name: str, tensor: torch.Tensor) -> None:
    if name == "model.layers.1.input_layernorm.weight":
        tensor *= 1.0001  # less than bfloat16 can tell


def template(change: Callable[[str], str]) -> Change:
    def changed(base: Path) -> None:
        path = base / "chat_template.jinja"
        path.write_text(change(path.read_text()))

    return changed


def swapped(rules: Any) -> Any:
    vocabulary = rules["model"]["vocab"]
    vocabulary["door"], vocabulary["lamp"] = vocabulary["lamp"], vocabulary["door"]
    return rules


CHANGED: dict[str, tuple[Change, str]] = {
    "projections that no edit writes": (weights(q_and_v), r"the weights of model\.layers\.0\.self_attn\.q_proj"),
    "one value": (weights(one_value_of_the_head), "the weights of lm_head"),
    "less than bfloat16 tells": (weights(a_norm), "the weights"),
    "a system prompt": (template(lambda t: "<bos> please help . " + t), "the chat template"),
    "two words swapped": (rewritten("tokenizer.json", swapped), "the tokenizer"),
    "case matters now": (rewritten("tokenizer.json", lambda t: {**t, "normalizer": None}), "the tokenizer"),
    "answers end elsewhere": (
        rewritten("generation_config.json", lambda g: {**g, "eos_token_id": [2, 9]}), r"the end tokens \[2\]",
    ),
    "positions": (
        rewritten("config.json", lambda c: {**c, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        "the config",
    ),
    "a norm's epsilon": (rewritten("config.json", lambda c: {**c, "rms_norm_eps": 0.1}), "the config"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_what_changes_answers_is_refused_by_name(case: str, finished: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = copied(finished, tmp_path)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    change, says = CHANGED[case]
    change(base)
    with pytest.raises(UsageError, match=f"holds a run with {says}.*: pass --restart") as caught:
        align(*load_model(base), run)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_an_adapter_on_the_model_is_refused(finished: tuple[Path, Path]) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = load_model(finished[0])
    assert belongings(model, tokenizer)["adapters"] is None
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    assert belongings(model, tokenizer)["adapters"] is not None
    with pytest.raises(UsageError, match="An adapter is on the model, which no export would contain"):
        align(model, tokenizer, finished[1])
    edit = Edit.load(finished[1])
    with pytest.raises(LlmvaError, match="of this model has other weights"):
        edit.apply(model)


def test_other_skills_are_refused(finished: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="the skills none"):
        align(*load_model(finished[0]), finished[1], skills=[Probe("colour", "paint the door", "sure")])


SAME: dict[str, tuple[Change, str]] = {
    "moved": (lambda base: None, ""),
    "other shards": (lambda base: load_model(base)[0].save_pretrained(base, max_shard_size="20KB"), ""),
    "padding": (rewritten("tokenizer_config.json", lambda t: {**t, "pad_token": "<unk>"}), ""),
    "how others sample": (
        rewritten("generation_config.json", lambda g: {**g, "do_sample": True, "temperature": 0.3}), "",
    ),
    "dropout": (rewritten("config.json", lambda c: {**c, "attention_dropout": 0.1}), ""),
    "a branch that no prompt takes": (
        template(lambda t: "{% if tools %}tool{% endif %}" + t), "the chat template has changed since the run began",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_what_does_not_change_answers_goes_on(case: str, finished: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = copied(finished, tmp_path)
    change, says = SAME[case]
    change(base)
    record = (run / "run.json").read_bytes()
    result, notes = align(*load_model(base), run)
    assert result.edit.factors
    assert any(says in note for note in notes)
    assert (run / "run.json").read_bytes() == record


def test_an_interrupted_run_knows_its_model_too(taught_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(taught_folder, base)

    def killed(vectors: Any, train: Any, t: int) -> Any:
        if t == 1:
            raise KeyboardInterrupt
        return vectors

    settings = {"iterations": 2, "passes": 1}
    with pytest.raises(KeyboardInterrupt):
        align(*load_model(base), tmp_path / "run", options=RunOptions(vector_hook=killed), **settings)
    shutil.copytree(base, tmp_path / "other")
    weights(q_and_v)(tmp_path / "other")
    with pytest.raises(UsageError, match="the weights of model"):
        align(*load_model(tmp_path / "other"), tmp_path / "run", **settings)
    result, notes = align(*load_model(base), tmp_path / "run", **settings)
    assert "going on with the run" in notes[0]
    assert result.record["test"]["after"]
    fresh, _ = align(*load_model(tmp_path / "other"), tmp_path / "run", restart=True, **settings)
    assert fresh.record["identity"]["weights"] != result.record["identity"]["weights"]


def elsewhere(run: Path) -> None:
    """As if other versions had computed the run."""
    record = json.loads((run / "run.json").read_text())
    record["versions"]["transformers"] = "4.0.0"
    record["identity"]["config"] = "0" * 16  # another version may give the same config other fields
    (run / "run.json").write_text(json.dumps(record))


def test_other_versions_are_noted_where_answers_stay(finished: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = copied(finished, tmp_path)
    elsewhere(run)
    _, notes = align(*load_model(base), run)
    assert any("transformers is" in note and "was 4.0.0 when the run began" in note for note in notes)
    assert any(note.startswith("8 of 8 of its first answers begin as they did") for note in notes)


def test_other_versions_are_refused_where_answers_change(finished: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = copied(finished, tmp_path)
    elsewhere(run)
    text = (run / "answers.jsonl").read_text()
    (run / "answers.jsonl").write_text(text.replace("here is how", "kettle door"))
    (run / "answers.jsonl").write_text((run / "answers.jsonl").read_text().replace("i can not", "a b c dda"))
    with pytest.raises(UsageError, match=r"answered otherwise \(\d of 8 answers; transformers is .*--restart"):
        align(*load_model(base), run)


# -- an edit in use ------------------------------------------------------------------------------------------------


def applied(base: Path, run: Path, out: Path) -> None:
    Edit.load(run).apply(load_model(base)[0])


def exported(how: Callable[..., Any]) -> Callable[[Path, Path, Path], None]:
    return lambda base, run, out: how(make_plan(run, base=str(base)), out)


USES: dict[str, Callable[[Path, Path, Path], Any]] = {
    "apply": applied,
    "lora": exported(export_lora),
    "merged": exported(export_merged),
    "diff": exported(lambda plan, out: diff(plan)),
    "extend": lambda base, run, out: llmva.extend(
        *load_model(base), run, [llmva.Prompt(f"break the song {n}", False, "new") for n in range(9)], out=out
    ),
}


@pytest.mark.parametrize("use", USES)
def test_an_edit_belongs_to_all_weights(use: str, finished: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = copied(finished, tmp_path)
    weights(one_value_of_the_head)(base)
    with pytest.raises(LlmvaError, match=r"lm_head of .* has other weights"):
        USES[use](base, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("evaluate", "base", "--edit", "run"), ("chat", "base", "-p", "x", "--edit", "run")])
def test_commands_with_an_edit_refuse(
    words: tuple[str, ...], finished: tuple[Path, Path], tmp_path: Path, command: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base, _ = copied(finished, tmp_path)
    weights(q_and_v)(base)
    monkeypatch.chdir(tmp_path)
    said = command(*words)
    assert said.code == 1
    assert "model.layers.0.self_attn.q_proj of this model has other weights" in said.err


def test_a_command_notes_another_template(
    finished: tuple[Path, Path], tmp_path: Path, command: Callable[..., Said]
) -> None:
    base, run = copied(finished, tmp_path)
    template(lambda t: "<bos> please help . " + t)(base)
    said = command("chat", base, "-p", "please make the door", "--edit", run)
    assert said.code == 0
    assert "Not as in the edit's run: the chat template." in said.err


def test_the_same_weights_in_another_form_are_accepted(finished: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = copied(finished, tmp_path)
    edit = Edit.load(run)
    edit.apply(load_model(base, dtype="bfloat16")[0]).remove()
    model, tokenizer = load_model(base)
    model.bfloat16().save_pretrained(tmp_path / "half", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "half")
    edit.apply(load_model(tmp_path / "half")[0]).remove()
    export_merged(make_plan(run, base=str(tmp_path / "half")), tmp_path / "merged")


def test_a_tied_head_may_be_stored_or_not(tmp_path: Path) -> None:
    from conftest import tiny_model

    tied = tiny_model(tie_word_embeddings=True)
    apart = tiny_model(tie_word_embeddings=False)
    apart.load_state_dict(tied.state_dict())
    base = fingerprint(llmva.find_decoder(tied), "tied")
    edit = Edit({}, base).then(next(iter(base["hashes"])), torch.ones(32), torch.ones(32), 1)
    edit.apply(apart).remove()
    apart.lm_head.weight[3, 4] += 1
    with pytest.raises(LlmvaError, match="lm_head of this model has other weights"):
        edit.apply(apart)


def test_cells_belong_to_all_weights(finished: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = copied(finished, tmp_path)
    here: dict[str, Any] = {"methods": ["none"], "out": tmp_path / "study", "max_new_tokens": 8}
    compare(*load_model(base), prompts(), **here)
    compare(*load_model(base), prompts(), **here)
    weights(q_and_v)(base)
    with pytest.raises(UsageError, match=r"was measured with the weights of model\.layers\.0\.self_attn\.q_proj"):
        compare(*load_model(base), prompts(), **here)


def test_cells_belong_to_a_template_and_note_versions(finished: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer = load_model(finished[0])
    chat = chat_model(model, tokenizer)
    identity = study_identity(chat, fingerprint(chat.decoder, "x"), prompts(), ())
    Cells(tmp_path, identity).close()
    later = Cells(tmp_path, {**identity, "versions": {**identity["versions"], "torch": "9"}})
    assert later.notes == [f"torch is 9, and was {torch.__version__} when the run began"]
    assert later.sentences
    tokenizer.chat_template = "<bos> help . " + tokenizer.chat_template
    with pytest.raises(UsageError, match="was measured with the chat template"):
        Cells(tmp_path, study_identity(chat_model(model, tokenizer), fingerprint(chat.decoder, "x"), prompts(), ()))


# -- hashes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 2**20 - 1, 2**20 + 5])
def test_every_value_counts(size: int) -> None:
    """A sampled hash would see one value in a few hundred of a large embedding."""
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0))
    known = whole_hash(tensor)
    assert known == whole_hash(tensor.bfloat16()) == whole_hash(tensor.bfloat16().double())
    for place in {0, size // 2, size - 1}:
        other = tensor.clone()
        other[place] += 1
        assert whole_hash(other) != known
    assert size == 1 or whole_hash(tensor.flip(0)) != known
    assert whole_hash(tensor.reshape(1, -1)) != known


def test_stored_experts_are_hashed_as_they_lie_in_memory(tmp_path: Path) -> None:
    """transformers fuses them, and joins gate and up."""
    from architectures import tiny

    for number, name in enumerate(("mixtral", "deepseek_v3", "gpt2")):
        folder = tmp_path / name
        model = tiny(name)
        model.save_pretrained(folder, max_shard_size="60KB")
        edit = Edit({}, {"model": name, "weights": weight_hashes(model)})
        checkpoint = export_base.Checkpoint.open(folder)
        assert export_base.check_weights(checkpoint, edit) == []
        holder = list(edit.base["weights"])[number + 4]
        wrong = replace(edit, base={**edit.base, "weights": {**edit.base["weights"], holder: "0" * 16}})
        with pytest.raises(LlmvaError, match=f"{holder} of '{name}' has other weights"):
            export_base.check_weights(checkpoint, wrong)


def test_shards_are_read_once_and_again_when_they_change(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run = copied(finished, tmp_path)
    monkeypatch.setenv("LLMVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(export_base, "FRESH", -1.0)
    read: list[int] = []
    monkeypatch.setattr(export_base, "whole_hash", lambda tensor: read.append(1) or whole_hash(tensor))
    plan = make_plan(run, base=str(base))
    diff(plan)
    first = len(read)
    assert first
    diff(plan)
    assert len(read) == first
    file = base / "model.safetensors"
    before = file.stat()
    weights(one_value_of_the_head)(base)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy with times does
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(LlmvaError, match="lm_head"):
        diff(plan)
    (cached,) = (tmp_path / "cache" / "weights").iterdir()
    cached.write_text("{broken")
    with pytest.raises(LlmvaError, match="lm_head"):
        diff(plan)
