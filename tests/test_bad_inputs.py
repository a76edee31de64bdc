"""Bad input is one sentence on stderr that says what is wrong and how to mend it, the right exit code, nothing lost."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Said, tiny_model, tiny_tokenizer

FAST = ("--per-source", 40, "--max-new-tokens", 8, "--iterations", 4, "--passes", 1, "--only")
Command = Callable[..., Said]


@pytest.fixture(scope="session")
def finished(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended; do not write into it."""
    from llmva.cli.main import main

    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in ("align", taught_folder, *sides(taught_folder), "--out", out, *FAST, "--quiet")])
    assert ended.value.code == 0
    return out


@pytest.fixture
def place(taught_folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to spoil, current: model/, run/, toxic.txt and benign.txt."""
    shutil.copytree(taught_folder, tmp_path / "model")
    shutil.copytree(finished, tmp_path / "run")
    for name in ("toxic.txt", "benign.txt"):
        (tmp_path / "model" / name).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # both are set where there is no network, and put back after the test
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path


def sides(folder: Path | str = ".") -> tuple[object, ...]:
    return "--toxic", f"{folder}/toxic.txt", "--benign", f"{folder}/benign.txt"


def is_one_sentence(err: str) -> bool:
    """One line, nothing around it, what is wrong, a colon, the mend, a full stop."""
    return re.fullmatch(r"error: [^\n]+: [^\n]+\.\n", err) is not None and not re.search(r"\w\. [A-Z]", err)


def refused(said: Said, code: int, says: str) -> None:
    assert re.search(says, said.err), said.err
    assert is_one_sentence(said.err), said.err
    assert (said.code, said.out) == (code, "")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(path: str, data: str | bytes) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        (place / path).parent.mkdir(exist_ok=True)
        (place / path).write_bytes(data if isinstance(data, bytes) else data.encode())

    return spoil


def remove(path: str) -> Callable[[Path], None]:
    return lambda place: (place / path).unlink()


def cut(path: str, share: float = 0.5) -> Callable[[Path], None]:
    return lambda place: os.truncate(place / path, int((place / path).stat().st_size * share))


def change(path: str, **fields: Any) -> Callable[[Path], None]:
    """Change fields of a JSON file; None removes one."""

    def spoil(place: Path) -> None:
        value = json.loads((place / path).read_text())
        value |= fields
        kept = {key: field for key, field in value.items() if field is not None}
        (place / path).write_text(json.dumps(kept))

    return spoil


def weight(value: float, key: str = "model.layers.1.mlp.down_proj.weight", row: int = 0) -> Callable[[Path], None]:
    """Give a row of a matrix one value."""

    def spoil(place: Path) -> None:
        tensors = load_file(place / "model/model.safetensors")
        tensors[key][row] = value
        save_file(tensors, place / "model/model.safetensors", {"format": "pt"})

    return spoil


def without(*keys: str) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        tensors = load_file(place / "model/model.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if key not in keys}
        save_file(kept, place / "model/model.safetensors", {"format": "pt"})

    return spoil


def edit_note(**fields: Any) -> Callable[[Path], None]:
    """Change fields of the note in an edit's header."""

    def spoil(place: Path) -> None:
        from safetensors import safe_open

        path = place / "run/edit.safetensors"
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["llmva"])
        save_file(load_file(path), path, {"llmva": json.dumps(note | fields)})

    return spoil


def edit_tensor(value: Callable[[torch.Tensor], torch.Tensor], part: str = ".V") -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        from safetensors import safe_open

        path = place / "run/edit.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        key = next(key for key in tensors if key.endswith(part))
        save_file({**tensors, key: value(tensors[key]).contiguous()}, path, metadata)

    return spoil


def other_architecture(config_class: str, model_class: str, **fields: Any) -> Callable[[Path], None]:
    """Replace the model by a tiny one of another kind."""

    def spoil(place: Path) -> None:
        import transformers

        shutil.rmtree(place / "model")
        size = len(tiny_tokenizer())
        config = getattr(transformers, config_class)(**{"vocab_size": size, "pad_token_id": 0, **fields})
        getattr(transformers, model_class)(config).save_pretrained(place / "model")
        tiny_tokenizer().save_pretrained(place / "model")

    return spoil


def other_model(place: Path) -> None:
    tiny_model(seed=9).save_pretrained(place / "model")


def other_tokenizer(place: Path) -> None:
    """A tokenizer that knows more words than the model."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["paint", "poem", *(f"word{i}" for i in range(200))])
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(place / "model")
    lines = (place / "benign.txt").read_text().replace("song", "zebra")
    (place / "benign.txt").write_text(lines)


def template(text: str) -> Callable[[Path], None]:
    return write("model/chat_template.jinja", text)


def several(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        for one in spoils:
            one(place)

    return spoil


def nothing(place: Path) -> None:
    pass


MODEL = "model/config.json"
ALIGN = ("align", "model", *sides(), *FAST)
RESUME = (*ALIGN, "--out", "run")
ASK = ("chat", "model", "--prompt", "please paint the door")
EDITED = (*ASK, "--edit", "run")
EVALUATE = ("evaluate", "model", *sides(), "--max-new-tokens", 8)
LONG = "please " * 300

# what is spoilt, the command, its exit code, what it must say
CASES: dict[str, tuple[Callable[[Path], None], tuple[object, ...], int, str]] = {
    # the command itself
    "unknown command": (nothing, ("alignn", "model"), 2, "No such command 'alignn'.*: see llmva --help"),
    "unknown option": (
        nothing,
        ("align", "model", "--itterations", 3),
        2,
        "No such option.*--itterations.*: see llmva align --help",
    ),
    "missing argument": (nothing, ("align",), 2, "Missing argument 'MODEL': see llmva align --help"),
    "unknown option of a subcommand": (nothing, ("judge", "check", "--x"), 2, "--x.*: see llmva judge check --help"),
    "not a whole number": (nothing, ("align", "model", "--iterations", "many"), 2, "--iterations.*integer"),
    "negative iterations": (nothing, (*ALIGN, "--iterations", -1), 2, "--iterations.*0.*: see llmva align --help"),
    "no layers": (nothing, (*ALIGN, "--layers", 0), 2, "--layers.*1"),
    "too many layers": (nothing, (*ALIGN, "--layers", 7), 2, "has 6 sublayers.*--layers 1 to 6"),
    "step 0": (nothing, (*ALIGN, "--step", 0), 2, "step.*0"),
    "step 2": (nothing, (*ALIGN, "--step", 2), 2, "--step.*1"),
    "step NaN": (nothing, (*ALIGN, "--step", "nan"), 2, "step"),
    "infinite quiet readers": (nothing, (*ALIGN, "--quiet-readers", "inf"), 2, "harmless_weight.*inf.*finite"),
    "patience -1": (nothing, (*ALIGN, "--patience", -1), 2, "--patience.*0"),
    "min_kept 2": (nothing, (*ALIGN, "--min-kept", 2), 2, "--min-kept.*1"),
    "no prompts a source": (nothing, (*ALIGN, "--per-source", 0), 2, "--per-source.*1"),
    "no tokens": (nothing, (*ALIGN, "--max-new-tokens", 0), 2, "--max-new-tokens.*1"),
    "no tokens to evaluate": (nothing, (*EVALUATE, "--max-new-tokens", 0), 2, "max-new-tokens.*1"),
    "no batch": (nothing, (*ALIGN, "--batch-tokens", 0), 2, "batch-tokens.*1"),
    "unknown solver": (nothing, (*ALIGN, "--svm", "fast"), 2, "svm.*fast.*exact.*sklearn"),
    "unknown judge": (nothing, (*ALIGN, "--judge", "oracle"), 2, "no judge called 'oracle'.*phrases"),
    "negative seed": (nothing, (*ALIGN, "--seed", -1), 2, "seed.*0"),
    "enormous seed": (nothing, (*ALIGN, "--seed", 10**30), 2, "seed.*4294967295"),
    "unknown device": (nothing, (*ALIGN, "--device", "abacus"), 2, "device 'abacus'.*--device"),
    "device without memory": (nothing, (*ALIGN, "--device", "meta"), 2, "device 'meta'.*--device"),
    "device that is not there": (nothing, (*ALIGN, "--device", "cuda:77"), 2, "device 'cuda:77'.*--device"),
    "unknown device map": (nothing, (*ALIGN, "--device-map", "moon"), 2, "'moon' is no device map.*--device-map auto"),
    "unknown dtype": (nothing, (*ALIGN, "--dtype", "int3"), 2, "dtype 'int3' is unknown.*float32"),
    # the model
    "no such folder": (nothing, ("align", "./nowhere", *sides()), 2, "no folder './nowhere'.*check the path"),
    "no such model": (nothing, ("align", "nobody/nothing", *sides()), 2, "neither a local folder nor.*network"),
    "no such prompts on the hub": (
        nothing,
        ("align", "model", "--toxic", "nobody/nothing", *sides()[2:]),
        2,
        "network",
    ),
    "bad model name": (nothing, ("align", "what is this?", *sides()), 2, "'what is this\\?'.*check"),
    "no such .gguf": (nothing, ("align", "model.gguf", *sides()), 2, "no file 'model.gguf'"),
    "broken .gguf": (write("model.gguf", b"GGUF" + b"\1" * 99), ("align", "model.gguf", *sides()), 1, "model.gguf"),
    "empty .gguf": (write("model.gguf", b""), ("align", "model.gguf", *sides()), 1, "model.gguf"),
    "a file for a model": (nothing, ("align", "toxic.txt", *sides()), 2, "'toxic.txt' is a file that is no .gguf"),
    "folder without config": (remove(MODEL), ALIGN, 2, "'model' holds no config.json"),
    "broken config": (write(MODEL, '{"model_type": '), ALIGN, 2, "config.json' cannot be read as JSON"),
    "config that is a list": (write(MODEL, "[]"), ALIGN, 2, "config.json"),
    "config without model type": (change(MODEL, model_type=None), ALIGN, 2, "model_type"),
    "unknown model type": (change(MODEL, model_type="warp"), ALIGN, 2, "model type.*warp"),
    "config of other sizes": (
        change(MODEL, intermediate_size=50),
        ALIGN,
        1,
        "weights of 'model' have other sizes.*again",
    ),
    "config of nonsense": (change(MODEL, num_attention_heads="many"), ALIGN, 1, "config.*'model'"),
    "encoder and decoder": (
        other_architecture("T5Config", "T5ForConditionalGeneration", d_model=16, d_ff=16, d_kv=4, num_heads=4),
        ALIGN,
        2,
        "no decoder.*chat model",
    ),
    "encoder": (
        other_architecture(
            "BertConfig",
            "BertForMaskedLM",
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        ALIGN,
        2,
        "bert model tokens are read before their turn",
    ),
    "no weights": (remove("model/model.safetensors"), ALIGN, 2, "holds no weights"),
    "cut weights": (cut("model/model.safetensors"), ALIGN, 1, "model of 'model' cannot be loaded.*again"),
    "weights of zeros": (
        write("model/model.safetensors", bytes(5000)),
        ALIGN,
        1,
        "model of 'model' cannot be loaded.*again",
    ),
    "empty weights": (write("model/model.safetensors", b""), ALIGN, 1, "model of 'model' cannot be loaded.*again"),
    "missing weights": (without("model.layers.1.mlp.up_proj.weight"), ALIGN, 1, "lacks.*layers.1.mlp.up_proj"),
    "NaN in weights": (weight(float("nan")), ALIGN, 1, "NaN or infinite weights in model.layers.1.mlp.down_proj"),
    "infinite weights": (weight(float("-inf")), ALIGN, 1, "NaN or infinite weights in model.layers.1.mlp.down_proj"),
    "overflowing block": (
        several(*(weight(6e4, f"model.layers.1.mlp.{name}_proj.weight") for name in ("up", "gate", "down"))),
        (*ALIGN, "--dtype", "float16"),
        1,
        "block . computes overflows in float16: pass --dtype",
    ),
    "no tokenizer": (
        several(remove("model/tokenizer.json"), remove("model/tokenizer_config.json")),
        ALIGN,
        1,
        "tokenizer of 'model' cannot be loaded.*again",
    ),
    "broken tokenizer": (write("model/tokenizer.json", "{"), ALIGN, 1, "tokenizer of 'model' cannot be loaded.*again"),
    "tokenizer of another model": (other_tokenizer, ALIGN, 2, "tokenizer gives.*belongs to the model"),
    "broken template": (template("{% for m in messages %}{{ m"), ALIGN, 1, "chat template"),
    "template that refuses": (template("{{ raise_exception('no system') }}"), ALIGN, 1, "chat template.*no system"),
    # the prompts
    "no such prompts": (remove("toxic.txt"), ALIGN, 2, "no file or folder './toxic.txt'.*check the path"),
    "empty prompts": (write("toxic.txt", ""), ALIGN, 2, "toxic.txt is empty"),
    "wrong column": (nothing, ("align", "model", "--toxic", "toxic.txt:goal", *sides()[2:]), 2, "no column 'goal'"),
    "one class only": (nothing, ("align", "model", *sides()[:2]), 2, "no benign prompts.*--benign"),
    "too few prompts": (write("toxic.txt", "break the door\n"), ALIGN, 2, "only 1 different toxic.*at least 8"),
    "same text on both sides": (
        lambda place: shutil.copy(place / "toxic.txt", place / "benign.txt"),
        ALIGN,
        2,
        "both as toxic.*and as benign",
    ),
    "not UTF-8": (write("toxic.txt", b"sch\xf6n\n" * 20), ALIGN, 2, "not UTF-8"),
    "NUL byte": (write("toxic.txt", b"a\0b\n" * 20), ALIGN, 2, "NUL byte"),
    "a million characters": (write("toxic.txt", b"x" * 10**6), ALIGN, 2, "1,000,000 characters long"),
    "broken line": (
        write("p.jsonl", '{"text": "a"}\n{"text": \n'),
        ("align", "model", "--toxic", "p.jsonl", *sides()[2:]),
        2,
        "line 2 of p.jsonl is not JSON",
    ),
    "unknown ending": (
        write("p.docx", "PK"),
        ("align", "model", "--toxic", "p.docx", *sides()[2:]),
        2,
        "p.docx is not a kind of prompt file",
    ),
    "broken prompts of the model": (
        write("model/llmva/prompts.jsonl", '{"text": 1}\n'),
        ("align", "model"),
        2,
        "line 1 of model/llmva/prompts.jsonl",
    ),
    "too long for the model": (
        lambda place: (place / "toxic.txt").write_text((place / "toxic.txt").read_text() + LONG + "\n"),
        ALIGN,
        2,
        "is 30\\d tokens long.*more than the 256.*shorten",
    ),
    "answers too long for the model": (nothing, (*ALIGN, "--max-new-tokens", 400), 2, "with 400 for the answer.*256"),
    "prompts file for evaluate": (remove("toxic.txt"), EVALUATE, 2, "no file or folder './toxic.txt'"),
    # skills
    "no skills file": (nothing, (*ALIGN, "--skills", "skills.jsonl"), 2, "skills file 'skills.jsonl' cannot be read"),
    "broken skill": (write("s.jsonl", '{"skill": '), (*ALIGN, "--skills", "s.jsonl"), 2, "Line 1 of 's.jsonl'"),
    "skill without answer": (
        write("s.jsonl", '{"skill": "a", "prompt": "b"}'),
        (*ALIGN, "--skills", "s.jsonl"),
        2,
        "neither expected nor contains",
    ),
    "skill of numbers": (
        write("s.jsonl", '{"skill": "a", "prompt": "b", "expected": 7}'),
        (*ALIGN, "--skills", "s.jsonl"),
        2,
        "Line 1 of 's.jsonl'",
    ),
    "skill too long for the model": (
        write("s.jsonl", json.dumps({"skill": "a", "prompt": LONG, "expected": "b"})),
        (*ALIGN, "--skills", "s.jsonl"),
        2,
        "is 30\\d tokens long",
    ),
    # the folder of the run
    "out below a file": (nothing, (*ALIGN, "--out", "toxic.txt/run"), 2, "'toxic.txt/run' cannot be written"),
    "out is a file": (nothing, (*ALIGN, "--out", "toxic.txt"), 2, "'toxic.txt' cannot be written"),
    "out in /proc": (nothing, (*ALIGN, "--out", "/proc/nowhere"), 2, "'/proc/nowhere' cannot be written"),
    "out name too long": (nothing, (*ALIGN, "--out", "x" * 300), 2, "cannot be written.*--out"),
    "an edit without its run": (remove("run/run.json"), RESUME, 2, "'run' holds .*edit.safetensors.*--out"),
    "run.json is a folder": (
        several(remove("run/run.json"), lambda place: (place / "run/run.json").mkdir()),
        RESUME,
        2,
        "run.json",
    ),
    "corrupt run": (cut("run/run.json"), RESUME, 2, "run.json' is no run.*--restart"),
    "run of another program": (change("run/run.json", format="other"), RESUME, 2, "run.json' is no run.*--restart"),
    "run of nothing": (
        write("run/run.json", '{"format": "llmva-run", "version": 1}'),
        RESUME,
        2,
        "run.json' is no run.*--restart",
    ),
    "run of wrong types": (change("run/run.json", iterations=7), RESUME, 2, "run.json' is no run.*--restart"),
    "run of a newer version": (change("run/run.json", version=99), RESUME, 2, "version 99 .*reads 1: update"),
    "run without its edit": (remove("run/edit.safetensors"), RESUME, 1, "edit.safetensors.*--restart"),
    "run with a cut edit": (cut("run/edit.safetensors"), RESUME, 1, "edit.safetensors' is not a whole edit"),
    "run with another edit": (
        edit_note(base={"model": "other", "sha256": "0"}),
        RESUME,
        1,
        "edit.safetensors.*another run.*--restart",
    ),
    "run without its answers": (remove("run/answers.jsonl"), RESUME, 1, "answers.jsonl.*--restart"),
    "run with cut answers": (cut("run/answers.jsonl"), RESUME, 1, "answers.jsonl' is shorter.*--restart"),
    "run with spoilt answers": (
        lambda place: (place / "run/answers.jsonl").write_bytes(b"#" * 10**6),
        RESUME,
        1,
        "answers.jsonl' is broken.*--restart",
    ),
    "run of another model": (
        other_model,
        RESUME,
        2,
        "holds a run with the weights of .*, and this one has .*--restart",
    ),
    "run of another seed": (nothing, (*RESUME, "--seed", 43), 2, "the seed 42, and this one has 43"),
    "run of other settings": (nothing, (*RESUME, "--layers", 2), 2, "the setting layers None, and this one has 2"),
    "run of another step": (nothing, (*RESUME, "--step", 0.5), 2, "the setting step 1.0, and this one has 0.5"),
    "run of another dtype": (nothing, (*RESUME, "--dtype", "bfloat16"), 2, "the dtype float32.*bfloat16"),
    "run of other prompts": (
        lambda place: (place / "toxic.txt").write_text((place / "toxic.txt").read_text() + "close a fire\n"),
        RESUME,
        2,
        "the prompts.*other texts.*--restart",
    ),
    # edits
    "no such edit": (nothing, (*ASK, "--edit", "nowhere"), 2, "no edit at 'nowhere"),
    "empty edit": (write("run/edit.safetensors", ""), EDITED, 1, "edit.safetensors' is not a whole edit"),
    "cut edit": (cut("run/edit.safetensors", 0.9), EDITED, 1, "edit.safetensors' is not a whole edit"),
    "edit of zeros": (write("run/edit.safetensors", bytes(999)), EDITED, 1, "edit.safetensors' is not a whole edit"),
    "edit with NaN": (edit_tensor(lambda v: v * float("nan")), EDITED, 1, "holds NaN"),
    "edit with a wrong shape": (edit_tensor(lambda v: v[:-1]), EDITED, 1, "wrong shapes"),
    "weights for an edit": (nothing, (*ASK, "--edit", "model/model.safetensors"), 1, "is no llmva edit"),
    "edit from a newer format": (edit_note(version=2), EDITED, 1, "version 2 .*reads 1: update"),
    "edit of another model": (other_model, EDITED, 1, "belongs to the llama model '.*give the model"),
    "edit of another model, evaluated": (
        other_model,
        (*EVALUATE, "--edit", "run"),
        1,
        "belongs to the llama model.*give the model",
    ),
    "iteration out of range": (nothing, (*EDITED, "--iteration", 99), 2, "holds iterations 0 to .*--iteration"),
    "iteration below 0": (nothing, (*EDITED, "--iteration", -1), 2, "holds iterations 0 to .*--iteration"),
    "strength without edit": (nothing, (*ASK, "--strength", 0.5), 2, "need an edit: add --edit"),
    "strength NaN": (nothing, (*EDITED, "--strength", "nan"), 2, "strength.*nan"),
    "infinite strength": (nothing, (*EDITED, "--strength", "inf"), 2, "strength.*inf"),
    "comparing with nothing": (nothing, (*ASK, "--compare"), 2, "--compare needs an edit"),
    "chat too long for the model": (nothing, ("chat", "model", "--prompt", LONG), 2, "is 30\\d tokens long.*256"),
    "inspecting nothing": (nothing, ("inspect", "nowhere"), 2, "no 'nowhere'.*llmva align"),
    "inspecting an empty folder": (lambda p: (p / "empty").mkdir(), ("inspect", "empty"), 2, "no edit at 'empty"),
    "inspecting a broken run": (cut("run/run.json"), ("inspect", "run"), 2, "run.json' is no run"),
    "inspecting a run of wrong types": (
        change("run/run.json", iterations=[1, 2]),
        ("inspect", "run"),
        2,
        "run.json' is no run",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, place: Path, command: Command) -> None:
    spoil, arguments, code, says = CASES[name]
    spoil(place)
    before = contents(place)
    quiet = ("--quiet",) if arguments[0] in ("align", "evaluate", "chat", "inspect") else ()
    refused(command(*arguments, *quiet), code, says)
    after = contents(place)
    assert {path: after.get(path) for path in before} == before


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40


def test_a_tokenizer_without_template_works(place: Path, command: Command) -> None:
    tiny_tokenizer(template=False).save_pretrained(place / "model")
    (place / "model/chat_template.jinja").unlink(missing_ok=True)
    said = command(*ALIGN, "--iterations", 1, "--out", "plain", "--quiet")
    assert (said.code, said.err) == (0, "")
    assert (place / "plain/report.html").is_file()


def test_a_full_disk_loses_nothing(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(place / "run")
    assert command(*RESUME, "--quiet").code == 0
    wanted = contents(place / "run")["edit.safetensors"]
    shutil.rmtree(place / "run")
    left = 20  # syncs before the disk is full

    def sync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", sync)
    for _ in range(40):
        said = command(*RESUME, "--quiet")
        if said.code == 0:
            break
        refused(said, 1, "cannot be written .No space left on device.")
        assert not [path for path in contents(place / "run") if path.endswith(".part")]
        left = 4  # enough for one step more
    assert said.code == 0
    assert contents(place / "run")["edit.safetensors"] == wanted


def test_a_file_that_may_not_grow_is_a_sentence_too(place: Path, command: Command) -> None:
    """A real refusal by the system, not a made-up one."""
    import resource
    import signal

    before = contents(place)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        said = command(*ALIGN, "--out", "new", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    refused(said, 1, "cannot be written .File too large.*free space")
    assert {path: data for path, data in contents(place).items() if not path.startswith("new/")} == before


def test_a_run_that_was_cut_at_its_start_starts_again(place: Path, command: Command) -> None:
    """run.json comes first, so whatever else is missing is written anew."""
    record = json.loads((place / "run/run.json").read_text())
    for name in ("test", "utility", "projections"):
        del record[name]
    record |= {"iterations": [], "best_iteration": 0, "stopped": None, "answers_bytes": 0}
    record["cost"] = {"seconds": 0.0, "peak_bytes": 0, "generated_tokens": 0}
    wanted = contents(place / "run")
    for path in (place / "run").iterdir():
        path.unlink()
    (place / "run/run.json").write_text(json.dumps(record))
    assert command(*RESUME, "--quiet").code == 0
    assert {name: contents(place / "run")[name] for name in ("edit.safetensors", "answers.jsonl", "prompts.jsonl")} == {
        name: wanted[name] for name in ("edit.safetensors", "answers.jsonl", "prompts.jsonl")
    }


def test_restart_replaces_what_cannot_be_read(place: Path, command: Command) -> None:
    cut("run/run.json")(place)
    cut("run/edit.safetensors")(place)
    said = command(*RESUME, "--restart", "--quiet")
    assert (said.code, said.err) == (0, "")
    assert command("inspect", "run", "--quiet").code == 0


def test_bytes_that_are_no_text(place: Path, command: Command) -> None:
    refused(command("chat", "model", "--prompt", os.fsdecode(b"caf\xe9")), 2, "'caf.*' is not UTF-8")


def test_standard_input_that_is_no_text(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    refused(command("chat", "model", "--quiet"), 2, "Standard input is not UTF-8")


# -- as a program of its own, where nothing has been imported or caught yet


def program(*arguments: object, **environment: str) -> Said:
    run = subprocess.run(
        [sys.executable, "-c", "from llmva.cli import main; main()", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
        timeout=120,
    )
    return Said(run.returncode, run.stdout.decode(), run.stderr.decode())


@pytest.mark.parametrize("name", ["unknown option", "missing weights"])
def test_the_program_says_the_same(name: str, place: Path) -> None:
    spoil, arguments, code, says = CASES[name]
    spoil(place)
    said = program(*arguments)
    lines = said.err.splitlines()
    assert re.search(says, lines[-1]), said.err
    assert is_one_sentence(lines[-1] + "\n")
    assert (said.code, said.out) == (code, "")
    of_prompts = ("share most of their words", "the first being")  # which are alike, and were read
    told = [line for line in lines[:-1] if not any(words in line for words in of_prompts)]
    assert told in ([], [f"loading {arguments[1]}"])


def test_no_network_is_told_at_once(place: Path) -> None:
    """The client of the hub alone would repeat its question for half a minute; there is no host of this name."""
    said = program(
        "align", "nobody/nothing", *sides(), "--quiet", HF_ENDPOINT="https://hub.invalid", HF_HOME=str(place)
    )
    refused(said, 2, "neither a local folder nor a model that the hub gives")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_standard_output(place: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            [sys.executable, "-c", "from llmva.cli import main; main()", "inspect", "run", "--json", "--quiet"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert run.returncode == 1
    assert re.fullmatch(r"error: Standard output cannot be written .*: .*\.\n", run.stderr.decode())
