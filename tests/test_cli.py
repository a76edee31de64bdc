"""What the commands print, and where: results on stdout, all else on stderr, one JSON object when asked."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer

import llmva
from conftest import Said, tiny_model
from llmva.cli.options import Choice, SettingOptions, expand
from llmva.models.fingerprint import fingerprint

Command = Callable[..., Said]
FAST = ("--per-source", 40, "--max-new-tokens", 8, "--iterations", 3)
FASTER = (*FAST, "--passes", 1)  # where it does not matter how good the run is
SKILLS = [
    {"skill": "politeness", "prompt": "please paint the fence", "contains": ["sure", "here"]},
    {"skill": "politeness", "prompt": "please paint the poem", "contains": ["sure"]},
    {"skill": "arithmetic", "prompt": "tell me how to fix a lamp", "expected": "sure here is"},
]


def sides(folder: Path) -> tuple[object, ...]:
    return "--toxic", folder / "toxic.txt", "--benign", folder / "benign.txt"


@pytest.fixture(scope="module")
def run(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with skills; do not write into it."""
    from llmva.cli.main import main

    place = tmp_path_factory.mktemp("cli")
    (place / "skills.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SKILLS))
    arguments = ("align", taught_folder, *sides(taught_folder), *FAST, "--skills", place / "skills.jsonl")
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in (*arguments, "--out", place / "run", "--quiet")])
    assert ended.value.code == 0
    return place / "run"


@pytest.fixture(scope="module")
def record(run: Path) -> dict[str, Any]:
    run_record: dict[str, Any] = json.loads((run / "run.json").read_text())
    return run_record


def one_object(said: Said) -> dict[str, Any]:
    assert (said.code, said.err) == (0, "")
    assert said.out.count("\n") == 1
    value = json.loads(said.out)
    assert isinstance(value, dict)
    return value


# -- align


def test_align_as_one_object(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    said = command("align", taught_folder, *sides(taught_folder), *FASTER, "--out", tmp_path / "r", "--json", "--quiet")
    assert one_object(said) == json.loads((tmp_path / "r/run.json").read_text())


@pytest.mark.parametrize("passes", [(), ("--passes", 1, "--only")])
def test_align_for_people(
    taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: Any, passes: tuple[Any, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("align", taught_folder, *sides(taught_folder), *FAST, *passes)
    assert said.code == 0
    measured = json.loads((tmp_path / "llmva-taught/run.json").read_text())["iterations"]
    # one alignment at a time takes all the iterations it may; several from one round of answers are through before
    assert len(measured) == 4 if passes else 1 < len(measured) < 4
    lines = said.err.splitlines()
    first = lines[: lines.index(f"loading {taught_folder}")]
    assert sum("prompts from 'text', the first being" in line for line in first) == 2
    assert all("share most of their words" in line for line in first[2:])
    assert [line.split(":")[0] for line in lines if line.startswith("iteration") and "validation" in line] == [
        f"iteration {t}" for t in range(len(measured))
    ]
    for words in ("ASR", "ORR", "F1", "toxic", "benign", "Utility kept", "peak memory", "The edited model"):
        assert words in said.out
    assert lines[-3:] == [
        "Report: llmva-taught/report.html",
        f"Try it: llmva chat {taught_folder} --edit llmva-taught --compare",
        "Ship it: llmva export llmva-taught --as lora --out llmva-taught-lora",
    ]
    assert {path.name for path in (tmp_path / "llmva-taught").iterdir()} == {
        ".lock",
        "answers.jsonl",
        "edit.safetensors",
        "prompts.jsonl",
        "report.html",
        "run.json",
    }


def test_the_live_display(taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: Any) -> None:
    """On a terminal every stage is drawn, also those without a number of prompts."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    said = command("align", taught_folder, *sides(taught_folder), *FASTER, "--out", tmp_path / "r")
    assert said.code == 0
    assert "F1, both at once" in said.out
    for words in ("iteration 0: answering", "iteration 0: fitting", "skills, before", "0/38"):
        assert words in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.err)


def test_quiet_says_nothing(taught_folder: Path, run: Path, tmp_path: Path, command: Command) -> None:
    for arguments in (
        ("align", taught_folder, *sides(taught_folder), *FASTER, "--out", tmp_path / "r"),
        ("evaluate", taught_folder, *sides(taught_folder), "--edit", run),
        ("inspect", run),
    ):
        assert command(*arguments, "--quiet") == Said(0, "", "")


def test_what_the_record_holds(record: dict[str, Any], run: Path, taught_folder: Path) -> None:
    """The fields that programs may rely on."""
    assert record["base"]["model"] == str(taught_folder)
    assert re.fullmatch("[0-9a-f]{64}", record["base"]["sha256"])
    assert record["settings"] | {"iterations": 3, "layers": None, "per_source": 40} == record["settings"]
    assert record["seed"] == 42
    assert record["command"].split()[0]
    assert {"llmva", "versions", "judge", "prompts"} <= record.keys()
    assert [entry["iteration"] for entry in record["iterations"]] == list(range(len(record["iterations"])))
    for entry in record["iterations"]:
        assert all(0 <= entry[name] <= 1 for name in ("f1", "asr", "orr", "garbled"))
    for entry in record["iterations"][:-1]:
        assert 1 <= len(entry["selected"]) <= 6  # each pass chooses, unless told
        assert 0 <= entry["mean_angle"] <= 180
    best = record["best_iteration"]
    assert 0 <= best < len(record["iterations"])
    kept = [entry for entry in record["iterations"] if entry["iteration"] < best and not entry.get("undone")]
    selected = {record["sublayers"][s] for entry in kept for s in entry["selected"]}
    assert selected == set(llmva.Edit.load(run).chosen.factors)  # of all passes, not the first alone
    assert record["projections"]["before"]["sublayer"] == record["projections"]["after"]["sublayer"]
    for side in ("before", "after"):
        metrics = record["test"][side]
        for name in ("f1", "asr", "orr"):
            low, high = metrics[f"{name}_interval"]
            assert 0 <= low <= metrics[name] <= high <= 1
        assert {name: source["n"] for name, source in metrics["by_source"].items()} == {"toxic": 19, "benign": 19}
        assert all(0 <= source["rate"] <= 1 for source in metrics["by_source"].values())
    assert record["test"]["after"]["f1"] > record["test"]["before"]["f1"]
    assert 0 < record["utility"]["kept"] <= 1
    assert record["utility"]["kl"] >= 0
    skills = record["utility"]["skills"]
    assert {name: skill["n"] for name, skill in skills.items()} == {"politeness": 2, "arithmetic": 1}
    assert all(0 <= skill[side] <= 1 for skill in skills.values() for side in ("before", "after"))
    assert record["cost"]["seconds"] > 0
    assert record["cost"]["peak_bytes"] > 10**7
    assert record["cost"]["generated_tokens"] > 100
    assert str(taught_folder) in (run / "report.html").read_text(encoding="utf-8")


def test_the_answers_that_are_kept(record: dict[str, Any], run: Path) -> None:
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").split("\n") if line]
    prompts = [json.loads(line) for line in (run / "prompts.jsonl").read_text(encoding="utf-8").split("\n") if line]
    ids = {prompt["id"] for prompt in prompts}
    assert all(row["id"] in ids and row["label"] in ("answered", "refused", "garbled") for row in rows)
    counts = {(t, split): 0 for t in range(len(record["iterations"])) for split in ("train", "validation")}
    for row in rows:
        counts[row["iteration"], row["split"]] = counts.get((row["iteration"], row["split"]), 0) + 1
    best = record["best_iteration"]
    assert counts == {
        key: {"train": 80, "validation": 38, "test": 38}[key[1]] for key in [*counts, (0, "test"), (best, "test")]
    }


def test_a_model_brings_its_prompts_and_skills(
    taught_folder: Path, run: Path, tmp_path: Path, command: Command, monkeypatch: Any
) -> None:
    """As the model that ships with the package does, which is all that `demo` is."""
    model = tmp_path / "organism"
    shutil.copytree(taught_folder, model)
    (model / "llmva").mkdir()
    shutil.copy(run / "prompts.jsonl", model / "llmva/prompts.jsonl")
    (model / "llmva/skills.jsonl").write_text(json.dumps(SKILLS[0]))
    monkeypatch.setattr("llmva.cli.inputs.demo_model", lambda: model)
    monkeypatch.chdir(tmp_path)
    run_record = one_object(command("demo", "--json", "--quiet", "--out", tmp_path / "demo"))
    assert run_record["prompts"]["counts"]["test"] == {"toxic": 19, "benign": 19}
    assert list(run_record["utility"]["skills"]) == ["politeness"]
    assert str(tmp_path) not in run_record["base"]["model"]


# -- evaluate


def test_evaluate_takes_exactly_the_prompts_given(taught_folder: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "few.txt").write_text("break a door\nbreak a door\nopen the lock\n")
    (tmp_path / "one.txt").write_text("please paint the door\n")
    both = ("--toxic", tmp_path / "few.txt", "--benign", tmp_path / "one.txt")
    evaluation = one_object(command("evaluate", taught_folder, *both, "--json", "--quiet"))
    assert evaluation["prompts"] == {"few": 3, "one": 1}
    assert (evaluation["test"]["before"]["n_toxic"], evaluation["test"]["before"]["n_benign"]) == (3, 1)
    assert evaluation["edit"] is None
    assert "after" not in evaluation["test"]
    evaluation = one_object(command("evaluate", taught_folder, *both[2:], "--json", "--quiet"))
    assert (evaluation["test"]["before"]["asr"], evaluation["test"]["before"]["f1"]) == (None, None)


@pytest.mark.parametrize("name", ["", "edit.safetensors"])
def test_evaluate_repeats_the_metrics_of_the_run(
    taught_folder: Path, run: Path, record: dict[str, Any], command: Command, name: str
) -> None:
    said = command("evaluate", taught_folder, "--edit", run / name, "--max-new-tokens", 8, "--json", "--quiet")
    evaluation = one_object(said)
    assert evaluation["prompts"] == {"toxic": 19, "benign": 19}
    assert evaluation["test"] == record["test"]
    for metric in ("kept", "kl"):
        assert evaluation["utility"][metric] == pytest.approx(record["utility"][metric], abs=1e-5)


@pytest.mark.parametrize("option", [("--iteration", 0), ("--strength", 0)])
def test_no_edit_changes_nothing(taught_folder: Path, run: Path, command: Command, option: tuple[object, ...]) -> None:
    said = command("evaluate", taught_folder, "--edit", run, *option, "--max-new-tokens", 8, "--json", "--quiet")
    evaluation = one_object(said)
    assert evaluation["test"]["after"] == evaluation["test"]["before"]
    assert (evaluation["utility"]["kept"], evaluation["utility"]["kl"]) == (1, 0)


def test_evaluate_for_people(taught_folder: Path, run: Path, command: Command) -> None:
    said = command("evaluate", taught_folder, "--edit", run, "--max-new-tokens", 8)
    assert said.code == 0
    assert all(words in said.err for words in ("answering, original", "answering, edited"))
    assert all(words in said.out for words in ("ASR", "ORR", "F1"))


# -- notebooks


def test_what_a_prompt_and_a_notebook_show(taught_folder: Path, tmp_path: Path) -> None:
    assert set(dir(llmva)) == {*llmva.__all__, "__version__"}
    prompts = llmva.PromptSet.from_lists([f"break {i}" for i in range(10)], [f"paint {i}" for i in range(10)])
    assert repr(prompts) == "PromptSet(12 train, 4 validation, 4 test; toxic, benign)"
    model, tokenizer = llmva.load_model(taught_folder)
    result = llmva.align(model, tokenizer, prompts, out=tmp_path / "run", iterations=1, max_new_tokens=2)
    assert len(repr(result)) < 400
    assert repr(result.edit).startswith("Edit(")
    assert len(repr(result.edit)) < 200
    assert (tmp_path / "run/report.html").is_file()
    shown = result._repr_html_()
    assert "<table>" in shown
    assert f"{100 * result.record['test']['after']['asr']:.1f}%" in shown


# -- chat


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def put(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))

    return put


def changed(run: Path, record: dict[str, Any]) -> tuple[str, str, str]:
    """A test prompt whose answer the edit changes, and both answers."""
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").split("\n") if line]
    texts = {json.loads(line)["id"]: json.loads(line)["text"] for line in (run / "prompts.jsonl").open()}
    by_id: dict[str, dict[int, str]] = {}
    for row in rows:
        if row["split"] == "test":
            by_id.setdefault(row["id"], {})[row["iteration"]] = row["answer"].strip()
    best = record["best_iteration"]
    return next((texts[key], a[0], a[best]) for key, a in by_id.items() if a[0] != a[best])


def test_chat_shows_both(taught_folder: Path, run: Path, record: dict[str, Any], command: Command) -> None:
    prompt, original, edited = changed(run, record)
    ask = ("chat", taught_folder, "--prompt", prompt, "--max-new-tokens", 8, "--quiet")
    assert command(*ask) == Said(0, f"{original}\n", "")
    assert command(*ask, "--edit", run) == Said(0, f"{edited}\n", "")
    assert command(*ask, "--edit", run, "--iteration", 0) == Said(0, f"{original}\n", "")
    assert command(*ask, "--edit", run, "--compare") == Said(0, f"original: {original}\nedited: {edited}\n", "")
    dialogue = one_object(command(*ask, "--edit", run, "--compare", "--json"))
    assert dialogue["turns"] == [{"prompt": prompt, "original": original, "edited": edited}]


def test_chat_reads_lines(taught_folder: Path, command: Command, typed: Callable[[str], None]) -> None:
    typed("please paint the fence\nplease break the door\n\nnever read\n")
    said = command("chat", taught_folder, "--max-new-tokens", 8, "--quiet")
    assert (said.code, said.err) == (0, "")
    assert len(said.out.splitlines()) == 2
    assert said.out.startswith("sure here is")


def test_chat_remembers_the_dialogue(
    taught_folder: Path, command: Command, typed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmva.models.chat import ChatTemplate

    heard: list[list[str]] = []
    original = ChatTemplate.render

    def render(self: ChatTemplate, dialogue: list[dict[str, str]], *more: Any) -> str:
        heard.append([turn["role"] for turn in dialogue])
        return original(self, dialogue, *more)

    monkeypatch.setattr(ChatTemplate, "render", render)
    typed("please paint the fence\nplease paint the door")
    assert command("chat", taught_folder, "--max-new-tokens", 8).code == 0
    assert heard[-2:] == [["user"], ["user", "assistant", "user"]]


@pytest.mark.parametrize("more", [(), ("--turns",)])
def test_chat_compares_single_turns(
    more: tuple[str, ...],
    taught_folder: Path,
    run: Path,
    command: Command,
    typed: Callable[[str], None],
    monkeypatch: Any,
) -> None:
    """What both said before would answer for the model: a harmful prompt was answered after a benign one."""
    from llmva.models.chat import ChatTemplate

    heard: list[list[str]] = []
    original = ChatTemplate.render

    def render(self: ChatTemplate, dialogue: list[dict[str, str]], *rest: Any) -> str:
        heard.append([turn["role"] for turn in dialogue])
        return original(self, dialogue, *rest)

    monkeypatch.setattr(ChatTemplate, "render", render)
    typed("please paint the fence\n/help\nplease paint the door")
    given = ("--edit", run, "--compare", "--max-new-tokens", 8, *more)
    said = command("chat", taught_folder, *given)
    assert said.code == 0
    assert "/reset forgets" in said.err
    assert heard[-4:-2] == [["user"], ["user"]]
    assert heard[-2:] == [["user", "assistant", "user"] if more else ["user"]] * 2


def test_reset_forgets_the_dialogue(taught_folder: Path, command: Command, typed: Callable[[str], None]) -> None:
    typed("please paint the door\n/reset\nplease paint the door")
    turns = one_object(command("chat", taught_folder, "--max-new-tokens", 8, "--json", "--quiet"))["turns"]
    assert turns[0] == turns[1]


def test_an_answer_is_streamed_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmva.cli.terminal import answer as module

    shown: list[str] = []
    monkeypatch.setattr(module, "write", shown.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = ["", "sure", "sure here\N{REPLACEMENT CHARACTER}", "sure here is"]
    reader: Any = type("Reader", (), {"so_far": lambda self, row: words[len(row) - 1]})()
    answer = module.Answer(reader, "edited: ", shown=True)
    for k in range(5):  # the prompt first
        answer.put(torch.tensor([[1, 2, 3]] if k == 0 else [k]))
    answer.finish("sure here is how")
    assert shown == ["edited: sure", " here", " is", " how", "\n"]


def test_chat_ends_when_the_dialogue_no_longer_fits(
    taught_folder: Path, command: Command, typed: Callable[[str], None]
) -> None:
    typed("please paint the fence and the door\n" * 40)
    said = command("chat", taught_folder, "--quiet")
    assert said.code == 2
    assert "grown beyond the 256 tokens" in said.err
    assert len(said.out.splitlines()) > 5


def test_chat_without_a_word(taught_folder: Path, command: Command, typed: Callable[[str], None]) -> None:
    typed("")
    assert command("chat", taught_folder).err.splitlines()[-1] == "nothing was asked"
    typed("")
    assert one_object(command("chat", taught_folder, "--json", "--quiet"))["turns"] == []


# -- a model in one file


def gguf_llama(path: Path, c: Any, words: list[str]) -> Any:
    """A writer of a Llama with the config `c` and these tokens, to which weights are still to be added."""
    import gguf

    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(c.max_position_embeddings)
    file.add_embedding_length(c.hidden_size)
    file.add_block_count(c.num_hidden_layers)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_head_count(c.num_attention_heads)
    file.add_head_count_kv(c.num_key_value_heads)
    file.add_layer_norm_rms_eps(c.rms_norm_eps)
    file.add_rope_dimension_count(c.head_dim)
    file.add_vocab_size(c.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(words)
    file.add_token_types([1] * len(words))
    file.add_token_merges(["a b"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    return file


def finish_gguf(file: Any) -> None:
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def write_gguf(path: Path) -> None:
    """A tiny random model, with letters for tokens."""
    model = tiny_model()
    c = model.config
    words = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz\u0120", "ab", *map(str, range(99))][: c.vocab_size]
    file = gguf_llama(path, c, words)
    file.add_pad_token_id(0)
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {"o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"{x}_proj": f"attn_{x}" for x in "qkv"} | {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for key, tensor in model.state_dict().items():
        name = next(new for old, new in names.items() if key.endswith(f"{old}.weight"))
        block = f"blk.{key.split('.')[2]}." if ".layers." in key else ""
        file.add_tensor(f"{block}{name}.weight", tensor.numpy())
    finish_gguf(file)


def test_a_gguf_file(tmp_path: Path, command: Command, monkeypatch: Any) -> None:
    """It has no chat template and needs none; its run is named after it."""
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    for side in ("toxic", "benign"):
        (tmp_path / f"{side}.txt").write_text("".join(f"{side} {letter}\n" for letter in "abcdefghij"))
    said = command("align", "tiny.gguf", *sides(tmp_path), "--max-new-tokens", 8, "--json", "--quiet")
    assert "error" not in said.err  # a bar that the program turns off before its import is drawn in this process
    record = json.loads(said.out)
    assert (record["base"]["model"], record["base"]["dtype"]) == (str(tmp_path / "tiny.gguf"), "float32")
    assert (tmp_path / "llmva-tiny/report.html").is_file()


def test_an_edit_of_a_gguf_file_ships(tmp_path: Path, command: Command, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    model, _ = llmva.load_model("tiny.gguf")
    decoder = llmva.find_decoder(model)
    edit = llmva.Edit({}, fingerprint(decoder, "tiny.gguf"))
    width = model.config.hidden_size
    v, u = torch.randn(2, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / width**0.5
    edit.then(decoder.sublayers[0].name, v, u, 1).save("edit.safetensors")
    for kind in ("lora", "merged"):
        assert not command("export", "edit.safetensors", "--as", kind, "--out", kind, "--quiet").code
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert not command("verify", "tiny.gguf", "edit.safetensors", "lora", "merged", "--quiet").code


# -- inspect


def test_inspect_a_run(run: Path, record: dict[str, Any], command: Command) -> None:
    summary = one_object(command("inspect", run, "--json", "--quiet"))
    assert summary["base"]["sha256"] == record["base"]["sha256"]
    assert summary["best_iteration"] == record["best_iteration"]
    assert set(summary["sublayers"]) <= set(record["sublayers"])
    aligned = sum(entry.get("passes", 0) for entry in record["iterations"])
    assert aligned >= len(record["iterations"]) - 1
    assert all(0 < rank <= aligned for rank in summary["sublayers"].values())
    assert summary["run"]["test"] == record["test"]
    assert [entry["f1"] for entry in summary["run"]["iterations"]] == [entry["f1"] for entry in record["iterations"]]
    said = command("inspect", run)
    edited = len(llmva.Edit.load(run).chosen.factors)
    entry, kept = record["iterations"][0], f"{edited} sublayer{'s' * (edited != 1)} edited, "
    assert re.search(kept + r"\d[\d.]* (B|kB|MB)\n", said.out)  # it said 0.0 MB
    assert f"ASR {100 * entry['asr']:.1f}%, ORR {100 * entry['orr']:.1f}%" in said.out  # digits and unit of the table
    assert (said.code, said.err) == (0, "")
    for words in (record["base"]["sha256"], f"iteration {record['best_iteration']} chosen", "iteration 0: F1", "ASR"):
        assert words in said.out


def test_inspect_an_edit_alone(run: Path, tmp_path: Path, command: Command) -> None:
    shutil.copy(run / "edit.safetensors", tmp_path)
    for place in (tmp_path, tmp_path / "edit.safetensors"):
        summary = one_object(command("inspect", place, "--json", "--quiet"))
        assert summary["bytes"] == (run / "edit.safetensors").stat().st_size
        assert "run" not in summary
        assert command("inspect", place).code == 0


def test_inspect_a_run_that_goes_on(taught_folder: Path, tmp_path: Path, command: Command, monkeypatch: Any) -> None:
    """Its folder is read while it works, after each of its commits."""
    from llmva.runs.run import Run

    commit, seen = Run.commit, []

    def commit_and_look(self: Run, *edit: Any) -> None:
        commit(self, *edit)
        summary = one_object(command("inspect", tmp_path / "r", "--json", "--quiet"))
        seen.append((summary["run"]["stopped"], len(summary["run"]["iterations"]), summary["best_iteration"]))

    monkeypatch.setattr(Run, "commit", commit_and_look)
    arguments = (taught_folder, *sides(taught_folder), *FAST, "--passes", 1, "--out", tmp_path / "r", "--quiet")
    assert command("align", *arguments).code == 0
    assert [(stopped, n) for stopped, n, _ in seen][:3] == [(None, 1), (None, 2), (None, 3)]
    assert [best is None for *_, best in seen] == [True] * (len(seen) - 1) + [False]


# -- the program


def test_version(command: Command) -> None:
    import llmva

    assert command("--version") == Said(0, f"llmva {llmva.__version__}\n", "")


@pytest.mark.parametrize("name", ["align", "demo", "evaluate", "chat", "inspect"])
def test_help_lists_the_options_of_every_command(name: str, command: Command) -> None:
    said = command(name, "--help")
    assert (said.code, said.err) == (0, "")
    assert all(option in said.out for option in ("--json", "--quiet"))
    assert ("--seed" in said.out) == (name not in ("chat", "inspect"))  # where something is drawn
    assert "\nOutput:\n" in said.out
    assert command(name, "-h") == said


@pytest.mark.parametrize("group", ["data", "judge"])
def test_a_group_alone_shows_its_help(group: str, command: Command) -> None:
    assert command(group) == command(group, "--help")
    assert command(group).code == 0


def test_data_show_tells_of_one_set(command: Command) -> None:
    said = command("data", "show", "xstest")
    assert (said.code, said.err) == (0, "")
    assert "name: xstest\n" in said.out
    assert "licence: " in said.out
    assert one_object(command("data", "show", "xstest", "--json"))["name"] == "xstest"
    assert command("data", "show", "nothing-of-this-name").code == 2


def test_summaries_fit_a_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in command("-h").out.split("Commands:")[1]


@pytest.mark.parametrize("name", ["front", "inspect"])
def test_a_run_is_read_without_torch(name: str, run: Path) -> None:
    code = (
        "import sys\nfrom llmva.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    assert not end.code\nassert not {'torch', 'scipy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, name, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "F1" in done.stdout


def test_the_bundled_model_is_called_demo_everywhere(command: Command, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert one_object(command("chat", "demo", "-p", "hello", "--json", "--quiet"))["model"] == "demo"
    assert command("align", "demo", "--iterations", 0, "--out", "run", "--quiet").code == 0
    assert json.loads(Path("run/run.json").read_text())["base"]["model"] == "llmva's organism"


@pytest.mark.parametrize("name", ["align", "extend"])
def test_settings_are_options(name: str) -> None:
    """With names, help and default of their fields; `extend` takes what is not given from the earlier run.

    Its system prompt it keeps in any case.
    """
    from llmva.settings import Settings

    program: Any = typer.main.get_command(import_module("llmva.cli.main").app)
    options = {param.name: param for param in program.commands[name].params}
    assert options["min_kept"].opts == ["--min-kept", "--min-utility"]
    assert options["harmless_weight"].opts == ["--harmless-weight", "--quiet-readers"]
    assert options.keys() & {"C", "endings_tokens"} == set()
    assert ("system" in options) == (name == "align")
    for setting in Settings.model_fields.keys() - {"C", "endings_tokens", *(["system"] if name == "extend" else [])}:
        field = Settings.model_fields[setting]
        assert f"--{setting.replace('_', '-')}" in options[setting].opts
        assert options[setting].help == field.description
        assert options[setting].default is None  # only what is given wins over --recipe


def test_a_group_of_options_reaches_its_command_as_one_value() -> None:
    taken: list[object] = []

    def command(
        name: str, *, choice: Choice, settings: Annotated[dict[str, Any], SettingOptions("layers", "passes")]
    ) -> None:
        taken.extend([name, choice, settings])

    app = typer.Typer()
    app.command()(expand(command))
    app(["x", "--point", "3", "--passes", "2"], standalone_mode=False)
    assert taken == ["x", Choice(point=3), {"passes": 2}]


def test_help_is_quick() -> None:
    """It imports neither torch nor transformers."""
    code = (
        "import sys\nfrom llmva.cli import main\nfor words in [], ['--help'], ['align', '--help']:\n"
        "    try:\n        main(words)\n    except SystemExit as ended:\n        assert not ended.code\n"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets', 'numpy', 'sklearn'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("llmva demo") == 2
