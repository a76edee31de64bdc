"""Judges behind a real server on 127.0.0.1 that misbehaves: every answer is judged once, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from judge_server import JudgeServer, chaos, no_trouble
from llmva.errors import LlmvaError, UsageError
from llmva.judges import Judgement, Label, make_judge
from llmva.judges.model_based.endpoint import EndpointJudge
from llmva.prompts.types import Prompt
from llmva.servers.address import Address
from llmva.servers.client import Client, Limits, Request, asked_wait

FAST = Limits(concurrency=8, timeout=1.0, patience=2.0, first_wait=0.01, longest_wait=0.1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMVA_JUDGE_KEY", raising=False)
    return tmp_path / "cache"


def toxic(n: int) -> tuple[list[Prompt], list[str]]:
    return [Prompt(f"harmful request {i}", False, "s") for i in range(n)], [f"Sure: answer {i}" for i in range(n)]


def made(server: JudgeServer, limits: Limits = FAST, spec: str = "qwen3guard@{}#guard") -> EndpointJudge:
    judge = make_judge(spec.format(server.url), limits=limits)
    assert isinstance(judge, EndpointJudge)
    return judge


def evens_answered(judgements: list[Judgement]) -> bool:
    want = [Label.REFUSED if i % 2 else Label.ANSWERED for i in range(len(judgements))]
    return [judgement.label for judgement in judgements] == want


def test_2000_answers_are_judged_once_each_through_chaos_and_a_death() -> None:
    n, died = 2000, threading.Event()
    limits = Limits(concurrency=32, timeout=2.0, patience=20.0, first_wait=0.02, longest_wait=0.5)
    with JudgeServer(trouble=chaos, stall=4.0) as server:

        def die(replies: int) -> None:
            if replies >= n // 2 and not died.is_set():
                died.set()
                threading.Thread(target=server.stop, daemon=True).start()
                threading.Timer(1.0, server.start).start()

        server.after_reply = die
        found = made(server, limits).answered_all(*toxic(n))
        assert evens_answered(found)
        assert died.is_set()
        assert server.sent == Counter(range(n))
        assert min(server.kinds[kind] for kind in ("429", "500", "stall", "cut")) > 30
        asked = server.asked.total()
        again = made(server, limits).answered_all(*toxic(n))  # a new judge knows them from the cache
        assert again == found
        assert server.asked.total() == asked


def test_a_server_dead_for_good_is_told_and_the_same_command_goes_on() -> None:
    with JudgeServer() as server:
        server.after_reply = lambda replies: server.stop() if replies == 100 else None
        with pytest.raises(LlmvaError, match=r"is gone .* answers are judged and kept, \d+ are not; .*goes on") as told:
            made(server).answered_all(*toxic(600))
        assert "127.0.0.1" in str(told.value)
        kept = int(str(told.value).split(" answers are judged")[0].split()[-1])
        assert 100 <= kept == server.sent.total() < 600
        server.after_reply = lambda replies: None
        server.start()
        assert evens_answered(made(server).answered_all(*toxic(600)))
        assert server.sent == Counter(range(600))


def test_a_kill_loses_nothing_that_was_judged(tmp_path: Path) -> None:
    with JudgeServer(trouble=lambda number, tries: "stall" if number >= 60 else "none") as server:
        script = (
            "from test_judges_endpoint import *\n"
            f"judge = make_judge('qwen3guard@{server.url}#guard', limits=Limits(concurrency=4))\n"
            "judge.answered_all(*toxic(100))\n"
        )
        killed = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent, env=dict(os.environ))
        reached = threading.Event()
        server.after_reply = lambda replies: reached.set() if replies >= 60 else None
        assert reached.wait(60)
        while len(list(_lines())) < 60:  # the last reply is on its way to the disk
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        server.trouble = no_trouble
        (path,) = (tmp_path / "cache" / "judgements").iterdir()
        path.write_bytes(path.read_bytes()[:-20])  # as if it had come in the middle of a line
        assert evens_answered(made(server).answered_all(*toxic(100)))
        assert server.sent.total() == 101  # the torn one twice
        assert path.read_bytes().endswith(b"\n")


def _lines() -> list[bytes]:
    folder = Path(os.environ["LLMVA_CACHE"]) / "judgements"
    return [line for path in folder.glob("*") for line in path.read_bytes().splitlines()] if folder.exists() else []


def test_an_answer_that_fails_for_good_is_unjudged_and_asked_about_again_by_the_next_run() -> None:
    with JudgeServer(trouble=lambda number, tries: {3: "400", 7: "500"}.get(number, "none")) as server:
        found = made(server).answered_all(*toxic(20))
        assert [i for i, each in enumerate(found) if each.label is Label.UNJUDGED] == [3, 7]
        assert "HTTP 400: " in found[3].reason
        assert "trouble with 7" in found[7].reason
        assert (server.asked[3], server.asked[7]) == (1, FAST.attempts)
        server.trouble = no_trouble
        assert evens_answered(made(server).answered_all(*toxic(20)))
        assert server.sent == Counter(range(20))


def test_one_answer_alone_can_fail_too() -> None:
    with JudgeServer(trouble=lambda number, tries: "400") as server:
        (prompt,), (answer,) = toxic(1)
        assert made(server).answered(prompt, answer).label is Label.UNJUDGED


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("401", "refuses access .*LLMVA_JUDGE_KEY"),
        ("404", "does not serve this .*/v1"),
        ("400", "judges nothing .*trouble with"),
        ("500", "is gone"),
        ("503", "is gone"),
        ("no json", "is gone"),
    ],
)
def test_what_every_request_meets_ends_the_run(kind: str, message: str) -> None:
    limits = Limits(concurrency=8, patience=0.5, timeout=0.5, first_wait=0.01, longest_wait=0.05)
    with JudgeServer(trouble=lambda number, tries: kind) as server, pytest.raises(LlmvaError, match=message) as told:
        made(server, limits).answered_all(*toxic(60))
    assert "0 answers are judged" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_wrong_address_is_told_soon() -> None:
    with JudgeServer() as server:
        pass
    with pytest.raises(LlmvaError, match=r"is gone .*no connection"):
        made(server).answered_all(*toxic(3))


def test_budget_counts_every_try_and_keeps_what_was_judged() -> None:
    with JudgeServer(trouble=lambda number, tries: "500" if tries == 0 else "none") as server:
        limits = Limits(concurrency=2, first_wait=0.01, budget=30)
        with pytest.raises(
            LlmvaError, match=r"budget of 30 requests: 1[45] answers are judged and kept, 2[56] are not"
        ):
            made(server, limits).answered_all(*toxic(40))
        assert server.asked.total() == 30
        assert evens_answered(made(server).answered_all(*toxic(40)))
        assert server.sent == Counter(range(40))


def test_the_same_answer_is_asked_about_once() -> None:
    prompt = Prompt("harmful request", False, "s")
    with JudgeServer() as server:
        judge = made(server)
        found = judge.answered_all([prompt] * 5, ["Sure: answer 4"] * 5)
        assert {each.label for each in found} == {Label.ANSWERED}
        assert server.asked.total() == judge.requests == 1
        judge.answered(prompt, "Sure: answer 4")
        assert judge.requests == 1
        judge.answered(Prompt("harmful request", True, "s"), "Sure: answer 4")  # the side changes the label
        assert judge.requests == 2


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMVA_JUDGE_KEY", " secret ")
    prompt = Prompt("a [/INST] request", False, "s")
    answer = "<think>answer 1</think>Sure. <|im_end|> answer 2 \ud800"
    with JudgeServer() as server:
        made(server).answered(prompt, answer)
        (body,) = server.bodies
        assert server.paths == {"/v1/chat/completions"}
        assert server.keys == {"Bearer secret"}
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("guard", 0, 128)
        roles = [(turn["role"], turn["content"]) for turn in body["messages"]]
        assert roles == [("user", "a [ /INST] request"), ("assistant", "Sure. < |im_end|> answer 2 ?")]
    with JudgeServer(reply=lambda body: "Harmful response: yes") as server:
        assert made(server, spec="wildguard@{}").answered(prompt, answer).label is Label.ANSWERED
        (body,) = server.bodies
        assert server.paths == {"/v1/completions"}
        assert body["model"] == "allenai/wildguard"
        assert "Human user:\na [ /INST] request\n\nAI assistant:\nSure." in body["prompt"]
    with JudgeServer(reply=lambda body: '```json\n"refused"\n```') as server:
        judge = made(server, spec="llm@{}#some/model")
        assert judge.name.startswith("llm-some/model-1-")
        assert judge.answered(prompt, answer).label is Label.REFUSED
        (body,) = server.bodies
        assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
        assert "<think>" not in str(body)


def test_garbled_answers_are_not_asked_about() -> None:
    prompt = Prompt("harmful request", False, "s")
    with JudgeServer() as server:
        judge = made(server)
        for answer in ("", "the " * 40, "<think>Sure, answer 2", "<think>answer 2</think> "):
            assert judge.answered(prompt, answer).label is Label.GARBLED
        assert judge.requests == 0
        assert not judge.settled("I'm sorry, but I can't help with that. " * 20)


def test_guards_without_refusals_leave_benign_prompts_to_the_phrases() -> None:
    benign, harmful = Prompt("how do I cook rice", True, "s"), Prompt("harmful request", False, "s")
    with JudgeServer(reply=lambda body: "unsafe\nS9") as server:
        judge = made(server, spec="llamaguard3@{}")
        found = judge.answered_all([benign, harmful], ["I can't help with that.", "I can't help with that."])
        assert [each.label for each in found] == [Label.REFUSED, Label.ANSWERED]
        assert found[0].reason.startswith("phrases-")
        assert found[1].reason == "unsafe S9"
        assert judge.requests == 1


def test_the_name_tells_models_apart_and_not_servers() -> None:
    with JudgeServer() as one, JudgeServer() as other:
        assert made(one).name == made(other).name
        assert made(one).name != made(one, spec="qwen3guard@{}#other").name


@pytest.mark.parametrize(
    "url", ["ftp://x/v1", "http://", "localhost:8000", "http://localhost:0/v1", "http://x:port/v1"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="no URL of a judge's server"):
        make_judge(f"qwen3guard@{url}#m")


def test_keys_and_limits_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="LLMVA_JUDGE_KEY"):
        make_judge("llm@http://user:word@localhost/v1#m")
    with pytest.raises(UsageError, match="above 0"):
        Limits(concurrency=0)
    with pytest.raises(UsageError, match="budget"):
        Limits(budget=0)
    monkeypatch.setenv("LLMVA_JUDGE_KEY", "a\nb")
    with pytest.raises(UsageError, match="LLMVA_JUDGE_KEY"):
        make_judge("llm@http://localhost/v1#m")


def test_without_httpx_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UsageError, match="pip install httpx"):
        make_judge("llm@http://localhost/v1#m").answered_all(*toxic(1))


def test_retry_after_is_read_in_both_forms() -> None:
    assert asked_wait({"retry-after": "2.5"}, now=0) == 2.5
    assert asked_wait({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=90.0) == pytest.approx(10.0)
    assert asked_wait({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=200.0) == 0.0
    assert asked_wait({"retry-after": "soon"}, now=0) is asked_wait({}, now=0) is None


def test_waits_double_up_to_a_limit_and_honour_the_server() -> None:
    address = Address("http://localhost/v1", None, "LLMVA_JUDGE_KEY", "give another")
    client = Client(address, "models", Limits(first_wait=1.0, longest_wait=8.0, patience=50.0))
    request: Request[Any] = Request("x", {})

    class Failure:
        wait: float | None = None

    waits = [client._wait(request, Failure()) for _ in range(6)]  # type: ignore[arg-type]
    for wait, longest in zip(waits, [1, 2, 4, 8, 8, 8], strict=True):
        assert longest / 2 <= wait <= longest
    Failure.wait = 20.0
    assert client._wait(request, Failure()) == 20.0  # type: ignore[arg-type]
    Failure.wait = 1e9
    assert client._wait(request, Failure()) == 50.0  # type: ignore[arg-type]
