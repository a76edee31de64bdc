"""Situations of public reports that belong to none of the twelve kinds: overflow, positions, empty success, folders.

Each failed before, except where a comment says that it held.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmva
from conftest import Said, requests_as_rows, taught_requests, teach, tiny_model, tiny_tokenizer, token_ids
from llmva.errors import LlmvaError
from llmva.method.observe import same_answer
from llmva.models.load import load_model
from llmva.prompts.types import Prompt

Command = Callable[..., Said]


def sides(folder: Path) -> tuple[object, ...]:
    return "--toxic", folder / "toxic.txt", "--benign", folder / "benign.txt"


# -- overflow ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float16 what it computes for one word overflows, and for all others does not; its weights are finite."""
    folder = tmp_path_factory.mktemp("overflow") / "model"
    shutil.copytree(taught_folder, folder)
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.embed_tokens.weight"][tiny_tokenizer().convert_tokens_to_ids("door")] = 65500.0
    tensors["model.layers.1.mlp.up_proj.weight"] *= 300
    tensors["model.layers.1.mlp.down_proj.weight"] *= 300
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


OVERFLOW = (
    r"error: What (?:the model computes for a prompt|block \d+ computes) overflows in float16: "
    r"pass --dtype bfloat16 or float32\."
)


@pytest.mark.parametrize(
    "words",
    [
        ("chat", "-p", "please make the door", "--max-new-tokens", 4),  # an empty answer
        ("evaluate", "--max-new-tokens", 4),  # refusals, and a share of garbled answers
        ("align", "--max-new-tokens", 4, "--iterations", 1),  # a traceback after the first answers
    ],
)
def test_logits_that_are_no_numbers(
    words: tuple[object, ...], overflowing: Path, tmp_path: Path, command: Command
) -> None:
    more = () if words[0] == "chat" else sides(overflowing)
    again: tuple[object, ...] = ()
    if words[0] == "align":
        more, again = (*more, "--out", tmp_path / "run"), ("--restart",)
    said = command(words[0], overflowing, *words[1:], *more, "--dtype", "float16")
    assert said.code == 1
    assert re.fullmatch(OVERFLOW, said.err.splitlines()[-1])
    assert command(words[0], overflowing, *words[1:], *more, *again, "--dtype", "float32", "-q").code == 0


def test_a_capture_without_answers_overflows_too(overflowing: Path) -> None:
    model, tokenizer = load_model(overflowing, device="cpu", dtype="float16")
    with pytest.raises(LlmvaError, match="overflows in float16"):
        llmva.capture(model, tokenizer, ["please make the lamp", "please make the door"], max_new_tokens=0)


# -- positions ---------------------------------------------------------------------------------------------------

HEADS = 4  # half the width of a head of the tiny model
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * HEADS, "long_factor": [4.0] * HEADS,
    "original_max_position_embeddings": 16,
}  # fmt: skip
POSITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "LongRoPE": ("LlamaConfig", {"rope_parameters": LONG}),
    "LongRoPE of Phi-3": ("Phi3Config", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    # all that follow held
    "YaRN": ("LlamaConfig", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                 "original_max_position_embeddings": 16}}),
    "linear scaling": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "sliding window": ("MistralConfig", {"sliding_window": 4}),
    "sliding window in every other layer": ("Gemma2Config", {"sliding_window": 4}),
    "learned": ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 3}),
    "learned, with an offset": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
def test_what_is_read_beside_a_long_prompt_is_what_is_read_alone(name: str) -> None:
    """transformers turns positions by the longest row of a batch, where the scaling depends on the length."""
    model, tokenizer = tiny_model(POSITIONS[name][0], **POSITIONS[name][1]), tiny_tokenizer()
    texts = [text for text, _, _ in taught_requests()]
    asked = [" ".join(texts[:5]), texts[0], texts[20], " ".join(texts[5:8])]
    together = llmva.capture(model, tokenizer, asked, max_new_tokens=6)
    alone = [llmva.capture(model, tokenizer, [text], max_new_tokens=6) for text in asked]
    assert together.answers == [one.answers[0] for one in alone]
    finals = torch.cat([one.final for one in alone])
    assert float((together.final - finals).abs().max()) <= 1e-5 * float(finals.abs().max())


# -- success that is none ----------------------------------------------------------------------------------------


def test_one_answer_to_everything_is_told(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    """No phrase of a refusal is in it, so that all of it counted as answered, and nothing said more."""
    folder, tokenizer = tmp_path / "model", tiny_tokenizer()
    answer = [*token_ids(tokenizer, "sure here is how to do it ."), 2]
    model = teach(tiny_model(), [(row, answer) for row, _ in requests_as_rows(tokenizer)], steps=60)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = command("align", folder, *sides(taught_folder), "--max-new-tokens", 8, "--out", tmp_path / "run")
    assert said.code == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["test"]["before"]["asr"] == 1.0
    evaluated = json.loads(command("evaluate", folder, *sides(taught_folder), "--max-new-tokens", 8, "--json").out)
    for limits in (record["limits"], evaluated["limits"]):
        (limit,) = (one for one in limits if "one and the same text" in one)
        assert "the model may answer nothing" in limit
        assert "sure" not in limit


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (["a"] * 12, True),
        (["a"] * 23 + ["b"], True),
        (["a", "b"] * 6, False),  # one text for each side, as where a model answers all and well
        (["a"] * 8 + ["b"] * 4, False),
        (["a"] * 4, False),  # too few to say
    ],
)
def test_when_answers_are_called_one(answers: list[str], told: bool) -> None:
    prompts = [Prompt(f"p{i}", benign=i % 2 == 0, source="x") for i in range(len(answers))]
    assert bool(same_answer(prompts, ["answered"] * len(answers), answers)) == told
    assert not same_answer(prompts, ["refused"] * len(answers), answers)


def test_a_model_that_says_nothing_has_refused_nothing(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    """This held: garbled answers have a row of their own, and are no success for either side."""
    folder, tokenizer = tmp_path / "model", tiny_tokenizer()
    teach(model := tiny_model(), [(row, [2]) for row, _ in requests_as_rows(tokenizer)], steps=40)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = command("evaluate", folder, *sides(taught_folder), "--max-new-tokens", 4, "--json")
    before = json.loads(said.out)["test"]["before"]
    assert (before["asr"], before["orr"], before["garbled"], before["f1"]) == (0.0, 1.0, 1.0, 0.0)


# -- names and folders: all of these held --------------------------------------------------------------------------


def test_names_of_any_signs(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    base, run = tmp_path / "odd [1] 100% #x 'q' ü {0}", tmp_path / "run of [2] %20 #"
    shutil.copytree(taught_folder, base)
    given = ("--max-new-tokens", 8, "--iterations", 1, "--quiet")
    assert command("align", base, *sides(taught_folder), *given, "--out", run).code == 0
    for kind in ("merged", "lora"):
        out = tmp_path / f"out [3] %s {kind}"
        assert command("export", run, "--as", kind, "--out", out).code == 0
        assert command("verify", base, out).code == 0


def test_two_models_of_one_name_are_two_models(
    taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their runs would be in one folder, which is named after the model's."""
    for place, factor in (("one", 1.0), ("two", 1.5)):
        folder = tmp_path / place / "base"
        shutil.copytree(taught_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] *= factor
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    given = (*sides(taught_folder), "--max-new-tokens", 4, "--iterations", 0, "--quiet")
    assert command("align", "one/base", *given).code == 0
    said = command("align", "two/base", *given)
    assert said.code == 2
    assert "'llmva-base' holds a run with the weights of lm_head" in said.err


def test_places_that_cannot_be_written(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in ("file", "file/run", "link"):
        said = command("align", taught_folder, *sides(taught_folder), "--iterations", 0, "--out", tmp_path / out)
        assert said.code == 2
        assert "choose another with --out" in said.err
    assert (tmp_path / "file").read_text() == "x"


def test_caches_that_cannot_be_written(taught_folder: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    nowhere = dict.fromkeys(("LLMVA_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"), os.devnull + "/x")
    words = [sys.executable, "-c", "from llmva.cli import main; main()", "align", taught_folder, *sides(taught_folder)]
    words += ["--iterations", 0, "--max-new-tokens", 4, "--out", tmp_path / "run"]
    done = subprocess.run(list(map(str, words)), env={**os.environ, **nowhere}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


# -- checkpoints that were made by other tools: all of these held ----------------------------------------------------


def weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], metadata: Any) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata)


def config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def doubled(tensors: dict[str, Any]) -> dict[str, Any]:
    """The last block a second time, as merges by passing blocks through have it."""
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
    return {**tensors, **{name.replace("layers.2", "layers.3"): tensor.clone() for name, tensor in last.items()}}


def same(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors


def halved(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


MADE: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], Any, dict[str, Any]]] = {
    "no metadata": (same, None, {}),
    "other metadata": (same, {"format": "mlx"}, {}),
    "a block twice": (doubled, {"format": "pt"}, {"num_hidden_layers": 4}),
    "half precision that the config does not name": (halved, {"format": "pt"}, {"dtype": None, "torch_dtype": None}),
    "another precision than the config names": (same, {"format": "pt"}, {"dtype": "bfloat16"}),
    "no cache": (same, {"format": "pt"}, {"use_cache": False}),
}


@pytest.mark.parametrize("case", MADE)
def test_checkpoints_of_other_tools(case: str, taught_folder: Path, tmp_path: Path, command: Command) -> None:
    change, metadata, fields = MADE[case]
    base = tmp_path / "base"
    shutil.copytree(taught_folder, base)
    weights(base, change, metadata)
    config(base, **fields)
    given = (*sides(taught_folder), "--max-new-tokens", 8, "--iterations", 1, "--quiet")
    assert command("align", base, *given, "--out", tmp_path / "run").code == 0
    for kind in ("merged", "lora"):
        assert command("export", tmp_path / "run", "--as", kind, "--out", tmp_path / kind).code == 0
        said = command("verify", base, tmp_path / kind)
        assert (said.code, "Same edit" in said.out + said.err) == (0, True), said.err


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(b""), "cannot be loaded"),
        (lambda path: save_file({}, path, {"format": "pt"}), "lacks the weights"),
        (lambda path: save_file({}, path), "lacks the weights"),
    ],
)
def test_files_without_weights(damage: Any, says: str, taught_folder: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(taught_folder, tmp_path / "base")
    damage(tmp_path / "base/model.safetensors")
    said = command("chat", tmp_path / "base", "-p", "x")
    assert said.code == 1
    assert says in said.err
    assert "Traceback" not in said.err


def test_a_generation_config_that_transformers_would_not_save(
    taught_folder: Path, tmp_path: Path, command: Command
) -> None:
    """Greedy and with a temperature: other tools lose the model at the end. This held: it ships byte for byte."""
    base = tmp_path / "base"
    shutil.copytree(taught_folder, base)
    path = base / "generation_config.json"
    asked = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.3, "eos_token_id": [2, 5]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **asked}))
    given = (*sides(taught_folder), "--max-new-tokens", 8, "--iterations", 1, "--quiet")
    assert command("align", base, *given, "--out", tmp_path / "run").code == 0
    assert command("export", tmp_path / "run", "--as", "merged", "--out", tmp_path / "merged").code == 0
    assert (tmp_path / "merged/generation_config.json").read_bytes() == path.read_bytes()


# -- prompts and secrets: these held -------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_no_loss(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    """Other tools cut it from the left, leave it out, or find it after hours among the test prompts."""
    long = "make the door " * 120
    (tmp_path / "bad.txt").write_text(f"{(taught_folder / 'toxic.txt').read_text()}{long}\n")
    given = ("--toxic", tmp_path / "bad.txt", "--benign", taught_folder / "benign.txt", "--out", tmp_path / "run")
    said = command("align", taught_folder, *given)
    assert said.code == 2
    assert "is 365 tokens long" in said.err
    assert "iteration" not in said.err  # nothing was answered yet


def test_no_token_of_the_hub_is_kept(
    taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "LLMVA_JUDGE_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hf_of_nobody_else")
    given = (*sides(taught_folder), "--max-new-tokens", 4, "--iterations", 0, "--out", tmp_path / "run")
    said = command("align", taught_folder, *given)
    assert said.code == 0
    assert "of_nobody_else" not in said.out + said.err
    assert [path.name for path in (tmp_path / "run").iterdir() if b"of_nobody_else" in path.read_bytes()] == []


def test_a_page_shows_markup_as_text(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    bad = "please make <script>alert(1)</script> <img src=x onerror=alert(1)> the door"
    (tmp_path / "bad.txt").write_text(f"{bad}\n" + (taught_folder / "toxic.txt").read_text())
    given = ("--toxic", tmp_path / "bad.txt", "--benign", taught_folder / "benign.txt", "--out", tmp_path / "run")
    assert command("align", taught_folder, *given, "--max-new-tokens", 4, "--iterations", 0, "--quiet").code == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
