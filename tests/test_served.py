"""verify --server tells a server with the edit from one without, whatever it computes in, and says what to mend.

The servers here are the tests' own: they speak the protocol, and answer by transformers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Said, taught_model, tiny_tokenizer
from judge_server import Body, JudgeServer
from llmva.edit import Edit, Factors
from llmva.errors import LlmvaError, UsageError
from llmva.export.served import probes as choosing
from llmva.export.served.asking import LIMITS, Server
from llmva.export.served.probes import TOKENS, Probe, as_sent, candidates, choose_probes
from llmva.export.served.verdict import judge, verify_server
from llmva.models.chat import ChatTemplate
from llmva.progress import Progress
from llmva.prompts.store import read_jsonl
from llmva.prompts.types import Message, Prompt, Splits
from llmva.servers.client import Limits

Command = Callable[..., Said]
FAST = Limits(concurrency=1, timeout=5.0, attempts=2, patience=2.0, first_wait=0.01, longest_wait=0.1)


@dataclass(frozen=True)
class Made:
    """The taught model, a run on it, and the probes that tell its edit from the base."""

    base: Path
    run: Path
    probes: list[Probe]


@pytest.fixture(scope="module")
def made(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    from llmva.cli.main import main

    out = tmp_path_factory.mktemp("served") / "run"
    words = [
        "align", str(taught_folder), "--out", str(out), "--iterations", "3", "--passes", "1", "--per-source", "32",
        "--max-new-tokens", "8", "--toxic", str(taught_folder / "toxic.txt"), "--benign",
        str(taught_folder / "benign.txt"), "--only", "--quiet",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert not caught.value.code
    prompts = candidates(read_jsonl(out / "prompts.jsonl"))
    edit = Edit.load(out).chosen
    assert edit.factors
    return Made(taught_folder, out, choose_probes(taught_model(), tiny_tokenizer(), edit, prompts, None, Progress()))


def answering(model: Any) -> Callable[[Body], str]:
    """What a server replies that serves `model`."""
    tokenizer = tiny_tokenizer()

    @torch.inference_mode()
    def reply(body: Body) -> str:
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert body["temperature"] == 0
        new = model.generate(ids, do_sample=False, max_new_tokens=body["max_tokens"])
        answer: str = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        return answer

    return reply


def served(edited: bool, run: Path, change: Callable[[Any], Any] = lambda model: model) -> Callable[[Body], str]:
    model = taught_model()
    if edited:
        Edit.load(run).chosen.bake(model)
    return answering(change(model))


def by_name(**replies: Callable[[Body], str]) -> Callable[[Body], str]:
    return lambda body: replies[body["model"]](body)


def quantised(bits: int) -> Callable[[Any], Any]:
    """Round every matrix to so many bits, row by row."""

    def change(model: Any) -> Any:
        for parameter in model.parameters():
            if parameter.ndim == 2:
                step = parameter.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                parameter.copy_((parameter / step).round() * step)
        return model

    return change


def shaken(seed: int) -> Callable[[Any], Any]:
    """Each weight moved by 1% of its size, as other kernels and roundings might."""

    def change(model: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))
        return model

    return change


CHANGES: list[Callable[[Any], Any]] = [
    lambda model: model,
    lambda model: model.to(torch.bfloat16),
    lambda model: model.to(torch.float16),
    quantised(8),
    quantised(6),
    *(shaken(seed) for seed in range(5)),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("edited", [True, False])
def test_no_error_in_20_trials_in_whatever_numbers(edited: bool, change: Callable[[Any], Any], made: Made) -> None:
    with JudgeServer(served(edited, made.run, change), names=["m"]) as server:
        answers = Server(server.url, FAST).answers("m", made.probes, Progress())
    assert judge(made.probes, answers, "m", ["m"])["verdict"] == ("edited" if edited else "base")


def test_probes_part_at_once_and_on_both_sides(made: Made) -> None:
    assert len(made.probes) == choosing.PROBES
    assert len({probe.prompt.benign for probe in made.probes}) == 2
    for probe in made.probes:
        assert probe.gap >= choosing.MIN_GAP
        assert (probe.agrees(f" {probe.base_answer}"), probe.agrees(probe.edited_answer)) == ("base", "edited")
        assert probe.agrees("") == probe.agrees(probe.base[:1]) == "neither"
        assert not probe.base.startswith(probe.edited)
        assert not probe.edited.startswith(probe.base)


def test_verify_server_says_edited(command: Command, made: Made) -> None:
    reply = by_name(base=served(False, made.run), edited=served(True, made.run))
    with JudgeServer(reply, names=["base", "edited"]) as server:
        ask = ("verify", made.base, made.run, "--server")
        said = command(*ask, server.url.removesuffix("v1"), "--served-name", "edited", "--json")
        assert said.code == 0, said.err
        record = json.loads(said.out)
        assert (record["verdict"], record["served_name"], record["serves"]) == ("edited", "edited", ["base", "edited"])
        assert record["edited"] == record["probes"] == len(record["answers"])
        assert server.bodies[-1]["max_tokens"] == TOKENS
        said = command(*ask, f"{server.url}/", "--served-name", "base", "--quiet")
        assert said.code == 1
        assert said.out == ""
        assert "answers as the base, without the edit" in said.err
        assert "--served-name (it serves edited too)" in said.err
        assert "--enable-lora" in said.err
        assert said.err.count("\n") == 1
        said = command(*ask, server.url, "--quiet")
        assert said.code == 2
        assert "serves several models (base, edited)" in said.err
        said = command(*ask, server.url, "--quiet", "--served-name", "other")
        assert said.code == 2
        assert "serves no 'other', but base, edited: give one of these with --served-name" in said.err


def test_a_server_started_without_the_adapter_is_caught(command: Command, made: Made) -> None:
    with JudgeServer(served(False, made.run), names=["model"]) as server:
        said = command("verify", made.base, made.run, "--server", server.url)
    assert said.code == 1
    assert "0 begin as the edited model's" in said.out
    assert "For example:" in said.out
    assert "'model' answers as the base, without the edit (16 of 16" in said.err


def test_another_model_is_neither(made: Made) -> None:
    with JudgeServer(lambda body: "The tide comes in.", names=["model"]) as server:
        record = verify_server(str(made.base), made.run, Server(server.url, FAST))
    assert (record["verdict"], record["neither"]) == ("neither", 16)
    assert "check that it serves this base" in record["sentence"]


def test_another_edit_is_not_the_edit(made: Made) -> None:
    edit, model = Edit.load(made.run).chosen, taught_model()
    others = {name: Factors(f.V.roll(7, 0), f.U.roll(3, 0), f.iteration) for name, f in edit.factors.items()}
    Edit(others, edit.base).bake(model)
    with JudgeServer(answering(model), names=["model"]) as server:
        answers = Server(server.url, FAST).answers("model", made.probes, Progress())
    assert judge(made.probes, answers, "model", ["model"])["verdict"] != "edited"


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_an_export_stands_for_the_run(form: str, command: Command, made: Made, tmp_path: Path) -> None:
    assert command("export", made.run, "--as", form, "--out", tmp_path / form, "--quiet").code == 0
    with JudgeServer(served(True, made.run), names=["model"]) as server:
        record = verify_server(str(made.base), tmp_path / form, Server(server.url, FAST))
    assert record["verdict"] == "edited"


TROUBLE: dict[str, tuple[str, str]] = {
    "no json": ("no json", "does not list its models (a reply that is no JSON)"),
    "a page that is not there": ("404", "does not serve this (HTTP 404"),
    "a key is wanted": ("401", "put a key into LLMVA_SERVER_KEY"),
    "overloaded": ("503", "is gone (HTTP 503"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_a_server_in_trouble_is_told_in_one_sentence(case: str, made: Made) -> None:
    kind, says = TROUBLE[case]
    with (
        JudgeServer(trouble=lambda number, tries: kind, names=["model"]) as server,
        pytest.raises(LlmvaError) as told,
    ):
        verify_server(str(made.base), made.run, Server(server.url, FAST))
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_a_server_that_is_not_there(made: Made) -> None:
    with JudgeServer() as server:
        pass
    for name in (None, "model"):
        with pytest.raises(LlmvaError, match=r"The server at 127.0.0.1:\d+ is gone \(no connection"):
            verify_server(str(made.base), made.run, Server(server.url, FAST), name=name)


def test_a_server_that_dies_half_way(made: Made) -> None:
    with JudgeServer(served(True, made.run), names=["model"]) as server:
        server.after_reply = lambda replies: server.stop() if replies == 9 else None  # one of them before the probes
        with pytest.raises(LlmvaError, match=r"is gone .* after 8 of 16 answers: start that server again"):
            verify_server(str(made.base), made.run, Server(server.url, FAST))


def test_a_server_that_lists_nothing_is_asked_by_name(made: Made) -> None:
    with JudgeServer(served(True, made.run)) as server:
        with pytest.raises(LlmvaError, match="does not serve this"):
            verify_server(str(made.base), made.run, Server(server.url, FAST))
        record = verify_server(str(made.base), made.run, Server(server.url, FAST), name="any")
        assert (record["verdict"], record["serves"]) == ("edited", [])
    with JudgeServer(served(True, made.run), names=[]) as server, pytest.raises(LlmvaError, match="lists no model"):
        verify_server(str(made.base), made.run, Server(server.url, FAST))


def test_a_replys_other_forms(made: Made) -> None:
    from llmva.servers.replies import names_of, written_by

    assert written_by({"choices": [{"message": {"content": None, "reasoning_content": "Hm"}}]}) == "Hm"
    assert written_by({"choices": [{"message": {"content": " so", "reasoning": "Hm"}}]}) == "Hm so"
    for reply in ([], {"choices": []}, {"choices": [{"text": "x"}]}, {"choices": [{"message": {"content": 3}}]}):
        with pytest.raises(ValueError, match="no "):
            written_by(reply)
    for listed in ([], {"data": "x"}, None):
        with pytest.raises(ValueError, match="no list of models"):
            names_of(listed)
    assert names_of({"data": [{"id": "a"}, {}, 3]}) == ["a"]


def test_some_answers_may_fail(made: Made) -> None:
    full = [probe.edited_answer for probe in made.probes]
    few: list[str | None] = [*full[:5], *[None] * 11]
    with pytest.raises(LlmvaError, match="answered 5 of 16 prompts"):
        judge(made.probes, few, "m", ["m"])
    record = judge(made.probes, [*full[:8], *[None] * 8], "m", ["m"])
    assert (record["verdict"], record["unanswered"]) == ("edited", 8)
    mixed = [probe.base_answer if i % 2 else probe.edited_answer for i, probe in enumerate(made.probes)]
    assert judge(made.probes, mixed, "m", ["m"])["verdict"] == "neither"
    strangers = judge(made.probes, full, "m:adapter", ["m"])
    assert "'m:adapter' (not among those that the server lists: m)" in strangers["sentence"]


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "http://", "http://user:word@localhost"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError, match=r"no URL of a server|put the key into LLMVA_SERVER_KEY"):
        Server(url)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("https://h/api/v3", "https://h/api/v3"),
        (" http://h/v1/chat/completions", "http://h/v1"),
        ("http://h/openai", "http://h/openai/v1"),
    ],
)
def test_urls_in_many_forms(url: str, asked: str) -> None:
    assert Server(url).address.url == asked


def test_a_key_of_its_own_is_sent(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMVA_SERVER_KEY", "secret")
    monkeypatch.setenv("LLMVA_JUDGE_KEY", "of another service")
    with JudgeServer(served(True, made.run), names=["model"]) as server:
        assert Server(server.url, FAST).choose(None) == ("model", ["model"])
    assert server.keys == {"Bearer secret"}
    assert LIMITS.concurrency == 1


def test_an_edit_without_effect_cannot_be_told(made: Made, tmp_path: Path) -> None:
    edit = Edit.load(made.run).chosen.scaled(1e-4)
    edit.save(tmp_path / "edit.safetensors")
    with (
        JudgeServer(served(True, made.run), names=["model"]) as server,
        pytest.raises(LlmvaError, match="changes the first words of 0 of 64 answers, too few"),
    ):
        verify_server(str(made.base), tmp_path / "edit.safetensors", Server(server.url, FAST))


def test_usage(command: Command, made: Made) -> None:
    said = command("verify", made.base, made.run, "--served-name", "x", "--quiet")
    assert (said.code, said.err.count("\n")) == (2, 1)
    said = command("verify", made.base, made.run, made.run, "--server", "http://localhost:1", "--quiet")
    assert said.code == 2
    assert "give one ARTEFACT" in said.err


def test_candidates_are_of_both_sides_and_leave_test_prompts_alone() -> None:
    toxic = [Prompt(f"t{i}", False, "s") for i in range(100)]
    benign = [Prompt(f"b{i}", True, "s") for i in range(10)]
    begun = Prompt.of((Message("user", "x"), Message("assistant", "Sure")), True, "s")
    splits = Splits((*toxic[:50], *benign, begun), tuple(toxic[50:80]), tuple(toxic[80:]))
    chosen = candidates(splits)
    assert len(chosen) == choosing.CANDIDATES
    assert set(benign) <= set(chosen)
    assert not {begun, *toxic[80:]} & set(chosen)


def test_what_a_server_is_sent_renders_to_what_is_read_here() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} {% endfor %}assistant :"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    for system in (None, "please help"):
        template = ChatTemplate.of(tokenizer, system)
        for asked in ("clean the door", (Message("system", "no trap"), Message("user", "clean the door"))):
            messages, variables = as_sent(template, asked, thinking=False)
            assert variables == {"enable_thinking": False}
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
            assert template.encode(rendered) == template.row(asked)
