"""Answers by an engine are those of transformers; what an engine cannot have is refused. With a vLLM of our own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_vllm
import llmva
from conftest import Said, taught_model, taught_requests, tiny_model, tiny_tokenizer
from fake_vllm import LLM
from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.models import generate
from llmva.models.chat_model import ChatModel
from llmva.models.engines import base
from llmva.models.engines import vllm as by_vllm
from llmva.models.engines.applied import applied_maps, digest
from llmva.models.engines.base import Growing
from llmva.models.engines.choose import check_engine, make_engine
from llmva.models.generate import Capture, answer_prompts

PROMPTS = [text for text, _, _ in taught_requests()][::9]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(by_vllm, "version", lambda name: "9.9")


def loaded(folder: Path) -> tuple[Any, Any]:
    return llmva.load_model(folder, device="cpu")


def some_edit(model: Any, columns: int = 2, seed: int = 0, size: float = 1.0) -> Edit:
    """A large one, of attention and MLP halves."""
    generator, edit = torch.Generator().manual_seed(seed), Edit()
    for name in (f"model.layers.{i}.{part}" for i in (0, 2) for part in ("self_attn.o_proj", "mlp.down_proj")):
        for iteration in range(1, columns + 1):
            v, u = torch.randn(2, model.config.hidden_size, generator=generator) * size
            edit = edit.then(name, v, u, iteration)
    return edit


def answered(model: Any, tokenizer: Any, engine: Any = None, **how: Any) -> Capture:
    chat = ChatModel.of(model, tokenizer, engine=make_engine(engine, model))
    try:
        return answer_prompts(chat, PROMPTS, **{"max_new_tokens": 12, **how})
    finally:
        chat.close()


def check_same(one: Capture, other: Capture) -> None:
    assert one.answers == other.answers
    assert one.tokens == other.tokens
    assert torch.allclose(one.outputs, other.outputs, atol=1e-5)
    assert one.likely is not None
    assert other.likely is not None
    assert torch.equal(one.likely[:, 0], other.likely[:, 0])


# -- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["vllm", "vllm:merged", "vllm:lora"])
def test_answers_are_those_of_transformers_with_and_without_an_edit(
    installed: None, taught_folder: Path, way: str
) -> None:
    model, tokenizer = loaded(taught_folder)
    chat = ChatModel.of(model, tokenizer)
    by_engine = replace(chat, engine=make_engine(way, model))
    seen = []
    for edit in (
        Edit(),
        some_edit(model),
        some_edit(model),
        some_edit(model, 3, seed=1, size=2.0),
        Edit(),
        some_edit(model),
    ):
        with edit.apply(model, check=False):
            wanted = answer_prompts(chat, PROMPTS, max_new_tokens=12)
            check_same(answer_prompts(by_engine, PROMPTS, max_new_tokens=12), wanted)
        seen.append(tuple(wanted.answers))
    assert len(set(seen)) == 3  # the edits do something
    (engine,) = LLM.log  # it is started once
    if way == "vllm:lora":
        assert engine.reloads == 0
        assert len({lora.number for lora in engine.loras}) == len({lora.path for lora in engine.loras}) == 3
    else:
        assert engine.reloads == 4  # not for an edit that it has
        assert engine.cached_by == engine.weights  # no keys and values of other weights are used
    by_engine.close()
    assert engine.ended


def test_settled_answers_are_cut_where_transformers_stops(installed: None, taught_folder: Path) -> None:
    model, tokenizer = loaded(taught_folder)

    def settled(answer: str) -> bool:
        return "how to" in answer

    wanted = answered(model, tokenizer, settled=settled)
    whole = answered(model, tokenizer)
    assert wanted.tokens < whole.tokens  # some are settled
    check_same(answered(model, tokenizer, "vllm", settled=settled), wanted)
    assert LLM.log[-1].aborted > 0


def test_nothing_stays_in_the_engine_when_answers_are_no_longer_wanted(installed: None, taught_folder: Path) -> None:
    model, tokenizer = loaded(taught_folder)
    engine = make_engine("vllm", model)
    assert engine is not None
    rows = ChatModel.of(model, tokenizer).rows(PROMPTS)
    writing = engine.write(rows, [12] * len(rows), [2], {}, lambda new: None)
    next(writing)
    writing.close()  # type: ignore[attr-defined]
    assert LLM.log[-1]._asked == {}


def test_the_end_is_asked_after_every_token_once() -> None:
    asked = []

    def end(new: list[int]) -> int | None:
        asked.append(list(new))
        return 2 if len(new) == 3 else None

    growing = Growing(end)
    assert growing.count([5]) is None
    assert growing.count([5, 6, 7, 8]) == 2
    assert asked == [[5], [5, 6], [5, 6, 7]]


def test_longer_rows_start_it_anew(installed: None, taught_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_vllm, "LEAST_LENGTH", 40)
    model, tokenizer = loaded(taught_folder)
    engine = make_engine("vllm", model)
    chat = ChatModel.of(model, tokenizer, engine=engine)
    with some_edit(model).apply(model, check=False):
        for tokens in (4, 5, 120):
            check_same(
                answer_prompts(chat, PROMPTS, max_new_tokens=tokens),
                answered(model, tokenizer, max_new_tokens=tokens),
            )
    assert [one.options["max_model_len"] == 40 for one in LLM.log] == [True, False]
    assert [one.ended for one in LLM.log] == [True, False]


def test_an_engine_without_the_edit_is_told(installed: None, taught_folder: Path) -> None:
    model, tokenizer = loaded(taught_folder)
    LLM.deaf = True
    answered(model, tokenizer, "vllm")
    with (
        some_edit(model, size=2.0).apply(model, check=False),
        pytest.raises(LlmvaError, match=r"vllm 9\.9 \(merged\) begins \d+ of \d+ answers"),
    ):
        answered(model, tokenizer, "vllm")


def test_without_captures_no_more_is_read_than_shows_that_it_has_the_edit(
    installed: None, taught_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded(taught_folder)
    read = list[int]()
    reading = generate._read

    def noted(chat: ChatModel, rows: list[list[int]], *others: Any) -> None:
        read.append(len(rows))
        reading(chat, rows, *others)

    monkeypatch.setattr(generate, "_read", noted)
    whole = answered(model, tokenizer, "vllm")
    labels = answered(model, tokenizer, "vllm", captures=False)
    assert labels.answers == whole.answers
    assert len(PROMPTS) > base.CHECKED
    assert read == [len(PROMPTS), base.CHECKED]
    LLM.deaf = True
    with some_edit(model, size=2.0).apply(model, check=False), pytest.raises(LlmvaError, match="of 16 answers"):
        answered(model, tokenizer, "vllm", captures=False)


def test_its_errors_are_one_sentence(installed: None, taught_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded(taught_folder)

    def fail(self: Any, *args: Any, **how: Any) -> None:
        raise RuntimeError("Engine core\nfailed")

    monkeypatch.setattr(LLM, "step", fail)
    with pytest.raises(LlmvaError, match=r"vLLM broke off with 'taught' \(RuntimeError: Engine core;"):
        answered(model, tokenizer, "vllm")
    monkeypatch.setattr(LLM, "__init__", fail)
    with pytest.raises(LlmvaError, match=r"vLLM cannot run with 'taught'.*leave --engine out"):
        answered(model, tokenizer, "vllm")


def test_the_environment_is_put_back(installed: None, taught_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded(taught_folder)
    seen: dict[str, str] = {}
    start = LLM.__init__

    def starting(self: Any, *args: Any, **how: Any) -> None:
        seen.update(os.environ)
        os.environ["OF_VLLM"] = os.environ["HOME"] = "changed"
        start(self, *args, **how)

    monkeypatch.setenv("HOME", "mine")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setattr(LLM, "__init__", starting)
    before = dict(os.environ)
    answered(model, tokenizer, "vllm", max_new_tokens=2)
    assert dict(os.environ) == before
    assert seen["VLLM_NO_USAGE_STATS"] == "1"
    assert seen["VLLM_LOGGING_LEVEL"] == "INFO"  # what the user sets counts
    assert int(seen["VLLM_CPU_KVCACHE_SPACE"]) >= 1


# -- what it cannot have -----------------------------------------------------------------------------------------


def test_without_vllm_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise by_vllm.PackageNotFoundError(name)

    monkeypatch.setattr(by_vllm, "version", missing)
    with pytest.raises(UsageError, match=r"not installed: pip install 'llmva\[vllm\]'"):
        check_engine("vllm:lora")
    with pytest.raises(UsageError, match="use transformers, vllm, vllm:merged, vllm:lora"):
        check_engine("tgi")
    check_engine("transformers")


def test_a_command_names_the_mend_before_it_loads(command: Callable[..., Said], tmp_path: Path) -> None:
    said = command("align", tmp_path / "none", "--engine", "tgi")
    assert said.code == 2
    assert "engine 'tgi' is unknown" in said.err


def test_models_that_it_would_not_load_as_they_are_are_refused(installed: None, taught_folder: Path) -> None:
    def refused(model: Any, reason: str) -> None:
        with pytest.raises(UsageError, match=reason):
            make_engine("vllm", model)

    refused(tiny_model(), "in memory only")
    model, _ = loaded(taught_folder)
    model.config._name_or_path = "somewhere/model.gguf"
    refused(model, "'model.gguf' is a .gguf file")
    model, _ = loaded(taught_folder)
    model.config.quantization_config = {"bits": 4}
    refused(model, "are packed")
    model, _ = loaded(taught_folder)
    some_edit(model).bake(model, check=False)
    refused(model, "an edit has been written into the weights in memory")
    model, _ = loaded(taught_folder)
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    refused(model, "positions depend on the longest row that vLLM may read")
    model, _ = loaded(taught_folder)
    model.hf_device_map = {"model": "cuda:0", "lm_head": "cuda:1"}
    refused(model, "is on cuda:0 and cuda:1")
    model, _ = loaded(taught_folder)
    model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    refused(model, r"forward hooks that are not llmva's.*remove them")


def test_a_vllm_for_another_device_is_refused(
    taught_folder: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in fake_vllm.modules("cuda").items():
        monkeypatch.setitem(sys.modules, name, module)
    model, tokenizer = loaded(taught_folder)
    with pytest.raises(UsageError, match="This vLLM runs on cuda and the model is on cpu"):
        answered(model, tokenizer, "vllm")


def test_steering_by_hooks_cannot_be_given(installed: None, taught_folder: Path) -> None:
    from llmva.baselines import hooks

    model, tokenizer = loaded(taught_folder)

    def steer(module: Any, args: Any, output: Any) -> None: ...

    steer.__module__ = hooks.__name__
    handle = model.model.layers[1].register_forward_hook(steer)
    with pytest.raises(UsageError, match=r"a steering method's hook on model\.layers\.1, which vLLM cannot be given"):
        answered(model, tokenizer, "vllm")
    handle.remove()
    assert answered(model, tokenizer, "vllm").tokens


def test_two_edits_on_one_module_are_one_map(taught_folder: Path) -> None:
    model, _ = loaded(taught_folder)
    one, other = some_edit(model, 1), some_edit(model, 2, seed=1)
    o = torch.randn(5, model.config.hidden_size)
    with one.apply(model, check=False), other.apply(model, check=False):
        (V, U) = applied_maps(model)["model.layers.0.mlp.down_proj"]
        hooks = list(model.model.layers[0].mlp.down_proj._forward_hooks.values())
        wanted = o
        for hook in hooks:
            wanted = hook(None, (), wanted)
        assert torch.allclose(o + (o @ U) @ V.T, wanted, atol=1e-4)
        assert digest(applied_maps(model)) != ""
    assert digest(applied_maps(model)) == ""


def test_what_no_adapter_holds_is_merged(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "biased"
    tiny_model(attention_bias=True, mlp_bias=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model, tokenizer = loaded(folder)
    edit = some_edit(model)
    with edit.apply(model, check=False):
        with pytest.raises(UsageError, match="choose --engine vllm:merged"):
            answered(model, tokenizer, "vllm:lora")
        engine = make_engine("vllm", model)
        assert isinstance(engine, by_vllm.VllmEngine)
        engine._lora = True  # as on CUDA
        chat = ChatModel.of(model, tokenizer, engine=engine)
        check_same(answer_prompts(chat, PROMPTS, max_new_tokens=8), answered(model, tokenizer, max_new_tokens=8))
    assert engine.title == "vllm 9.9 (merged)"
    assert LLM.log[-1].reloads == 1


# -- memory ------------------------------------------------------------------------------------------------------


def of_size(weights: int, cached: float) -> by_vllm.Loaded:
    device = torch.device("cuda")
    return by_vllm.Loaded(None, torch.float32, device, None, weights, cached, own_code=False)  # type: ignore[arg-type]


def test_on_cuda_it_takes_its_weights_and_half_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 10**9, 80 * 10**9))
    assert by_vllm.cuda_share(of_size(20 * 10**9, 1.0)) == 0.5
    with pytest.raises(UsageError, match=r"60\.0 GB free.*needs 60\.0"):
        by_vllm.cuda_share(of_size(60 * 10**9, 1.0))


def test_on_the_cpu_it_takes_what_a_batch_needs_within_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"available": 20 * 2**30})
    monkeypatch.setattr(by_vllm.psutil, "virtual_memory", lambda: memory)
    assert by_vllm.cpu_gigabytes(of_size(4 * 2**30, 2.0**20), 2048) == 4
    assert by_vllm.cpu_gigabytes(of_size(4 * 2**30, 2.0**13), 1024) == 2
    assert by_vllm.cpu_gigabytes(of_size(40 * 2**30, 2.0**20), 2048) == 1


# -- commands ----------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_by_either_engine(
    installed: None, taught_folder: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    prompts = ("--toxic", f"{taught_folder}/toxic.txt::[:24]", "--benign", f"{taught_folder}/benign.txt::[:24]")
    few = ("--per-source", 12, "--max-new-tokens", 4, "--iterations", 2, "--passes", 2, "--seed", 2, "--quiet")
    records = {}
    for engine in ("transformers", "vllm"):
        out = tmp_path / engine
        said = command("align", taught_folder, *prompts, *few, "--out", out, "--engine", engine)
        assert said.code == 0, said.err
        records[engine] = json.loads((out / "run.json").read_text())
    answers = [(tmp_path / engine / "answers.jsonl").read_text() for engine in records]
    assert answers[0] == answers[1]
    assert records["transformers"]["versions"]["engine"] == "transformers"
    assert records["vllm"]["versions"]["engine"] == "vllm 9.9 (merged)"
    assert LLM.log
    assert all(one.ended for one in LLM.log)
    one, other = (Edit.load(tmp_path / engine) for engine in records)
    for name, factors in one.factors.items():
        assert torch.allclose(factors.V, other.factors[name].V, atol=1e-5)
    said = command("evaluate", taught_folder, "--edit", tmp_path / "vllm", "--engine", "vllm", "--json", "--quiet")
    assert said.code == 0, said.err
    by_other = command("evaluate", taught_folder, "--edit", tmp_path / "vllm", "--json", "--quiet")
    assert json.loads(said.out)["engine"] == "vllm"
    assert json.loads(said.out)["test"] == json.loads(by_other.out)["test"]


def test_a_run_that_goes_on_with_another_engine_says_so() -> None:
    from llmva.runs.identity import other_versions

    before = {"llmva": "1", "versions": {"python": "3"}}  # of a run before there was a choice
    assert other_versions(before, {"llmva": "1", "versions": {"engine": "transformers"}}) == []
    now = {"llmva": "1", "versions": {"engine": "vllm 9.9 (merged)"}}
    assert other_versions(before, now) == ["engine is vllm 9.9 (merged), and was transformers when the run began"]


def test_a_taught_model_in_memory_needs_no_engine() -> None:
    assert make_engine("transformers", taught_model()) is None
