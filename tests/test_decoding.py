"""Rows that share their beginning, join a running batch and leave it are answered as each alone."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch

from conftest import chat_model, tiny_model, tiny_tokenizer
from llmva.models.batching import Batching
from llmva.models.chat_model import ChatModel
from llmva.models.finding.tensors import hooked
from llmva.models.generate import answer_prompts, generate
from llmva.models.gradients import gradients
from llmva.models.reading import decoding
from llmva.models.reading.cache import plain_cache, read_prefix, shared_length
from llmva.models.reading.decoding import decode, decodes_well
from test_generate import CHANGES, PROMPTS, close, hooks, plain_answer, sized, words

PLAIN = ("LlamaConfig", "Gemma3TextConfig", "GPT2Config", "OPTConfig", "GPTNeoXConfig", "MixtralConfig")


def chat_of(config: str = "LlamaConfig", batching: Batching | None = None) -> ChatModel:
    return chat_model(sized(tiny_model(config, **CHANGES.get(config, {}))), tiny_tokenizer(), batching)


@pytest.mark.parametrize("config", PLAIN)
def test_these_models_are_proved(config: str) -> None:
    assert chat_of(config).decodes()


@pytest.mark.parametrize("tokens", [1, 60, 100, 10_000])
@pytest.mark.parametrize("config", PLAIN)
def test_answers_do_not_depend_on_the_batch(config: str, tokens: int) -> None:
    chat = chat_of(config, Batching(tokens))
    found = answer_prompts(chat, PROMPTS, max_new_tokens=10)
    for text, answer in zip(PROMPTS, found.answers, strict=True):
        assert answer == words(plain_answer(chat.model, text, 10))


@pytest.mark.parametrize("at_once", [1, 10, 25])
def test_prompts_are_read_few_at_once_and_decoded_many(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, groups = chat_of(batching=Batching(10_000, at_once=at_once)), list[int]()
    decoded: list[int] = []
    step, prefill = decoding._step, decoding._prefill

    def noting_step(model: Any, active: Any, *rest: Any) -> Any:
        decoded.append(len(active.rows))
        return step(model, active, *rest)

    def noting_prefill(model: Any, padding: int, rows: Any, group: list[int], prefix: Any, *rest: Any) -> Any:
        groups.append(len(group) * max(len(rows[i]) - prefix.length for i in group))
        return prefill(model, padding, rows, group, prefix, *rest)

    chat.decodes()  # the proof has passes of its own
    monkeypatch.setattr(decoding, "_step", noting_step)
    monkeypatch.setattr(decoding, "_prefill", noting_prefill)
    found = answer_prompts(chat, PROMPTS, max_new_tokens=10)
    assert [words(plain_answer(chat.model, text, 10)) for text in PROMPTS] == found.answers
    longest = max(map(len, chat.rows(PROMPTS)))
    assert len(groups) > 1
    assert max(groups) <= max(at_once, longest)
    assert decoded[0] == len(PROMPTS)  # all are read before the first of them goes on


def test_both_ways_of_answering_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of()
    joining = answer_prompts(chat, PROMPTS, max_new_tokens=10)
    monkeypatch.setattr(ChatModel, "decodes", lambda self: False)
    whole = answer_prompts(chat, PROMPTS, max_new_tokens=10)
    close(joining, whole)
    assert joining.tokens == whole.tokens
    assert joining.likely is not None
    assert whole.likely is not None
    assert torch.equal(joining.likely[:, :3], whole.likely[:, :3])
    torch.testing.assert_close(joining.chances, whole.chances, rtol=1e-3, atol=1e-6)


def test_a_row_that_has_ended_makes_room_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two rows and REFILL at nothing, a third prompt is read as soon as one of the two has ended."""
    chat, steps = chat_of(), list[tuple[int, ...]]()
    rows = chat.rows(PROMPTS[:3])
    monkeypatch.setattr(decoding, "REFILL", 0.0)
    forward = chat.model.forward

    @wraps(forward)
    def seen(*args: Any, **kwargs: Any) -> Any:
        steps.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    room = sum(len(row) + 8 for row in rows[:2])
    ended = {0: 2, 1: 8, 2: 8}
    monkeypatch.setattr(chat.model, "forward", seen)
    asked: dict[int, int] = {}

    def end(new: list[int]) -> int | None:
        asked[len(new)] = asked.get(len(new), 0) + 1
        return len(new) if len(new) == 2 and asked[2] == 1 else None

    written = dict(decode(chat.model, chat.pad_id, Batching(room), rows, [8, 8, 8], end))
    assert sorted(len(new) for new in written.values()) == sorted(ended.values())
    decoded = [shape[0] for shape in steps[1:] if shape[1] == 1]
    assert sum(decoded) == sum(len(new) - 1 for new in written.values())  # no token that nobody reads
    assert max(decoded) == 2


def test_every_row_has_a_budget_of_its_own() -> None:
    chat = chat_of()
    budgets = [1, 2, 3, 4, 5, 6, 7]
    written = dict(generate(chat, chat.rows(PROMPTS), budgets))
    for i, text in enumerate(PROMPTS):
        assert written[i] == plain_answer(chat.model, text, budgets[i])


def test_what_all_rows_begin_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, tokens = chat_of(), [0]
    rows = chat.rows(PROMPTS)
    shared = shared_length(rows)
    assert shared > 0
    chat.decodes()
    forward = chat.model.forward

    @wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :]
        tokens[0] += int(mask.sum())
        return forward(*args, **kwargs)

    monkeypatch.setattr(chat.model, "forward", counted)
    answer_prompts(chat, PROMPTS, max_new_tokens=0)
    assert tokens[0] == sum(map(len, rows)) - (len(rows) - 1) * shared


def test_shared_length() -> None:
    assert shared_length([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert shared_length([[1, 2], [1, 2, 3]]) == 1  # the last token of every row is left
    assert shared_length([[7], [7, 8]]) == 0
    assert shared_length([[1, 2], [3, 4]]) == 0
    assert read_prefix(chat_of().model, [[5, 6, 7]]) is None  # one row shares nothing with another


# -- models that cannot be read so ---------------------------------------------------------------------------------


def test_a_model_whose_distances_count_padding_is_answered_batch_by_batch() -> None:
    chat = chat_of("MptConfig")  # its biases grow with the distance in columns, padding included
    assert not chat.decodes()
    found = answer_prompts(chat, PROMPTS, max_new_tokens=6)
    assert found.answers == [words(plain_answer(chat.model, text, 6)) for text in PROMPTS]


def test_a_recurrent_model_has_no_plain_cache() -> None:
    assert plain_cache(tiny_model("Qwen3NextConfig", **QWEN3_NEXT)) is None


QWEN3_NEXT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def test_a_hook_on_the_model_itself_sees_whole_batches() -> None:
    chat, widths = chat_of(), list[tuple[int, ...]]()
    assert chat.decodes()

    def look(module: Any, args: Any, kwargs: Any) -> None:
        widths.append(tuple(kwargs["input_ids"].shape))

    with hooked([chat.model.register_forward_pre_hook(look, with_kwargs=True)]):
        assert not chat.decodes()
        answer_prompts(chat, PROMPTS, max_new_tokens=0)
    assert widths == [(len(PROMPTS), max(map(len, chat.rows(PROMPTS))))]
    assert chat.decodes()


def test_a_model_that_fails_in_the_proof_is_not_proved() -> None:
    chat = chat_of()
    rows = chat.rows(PROMPTS[:3])
    assert decodes_well(chat.model, chat.pad_id, rows)
    attention = chat.decoder.model.model.layers[0].self_attn

    def forget(module: Any, args: Any, kwargs: Any) -> Any:
        kwargs["attention_mask"] = None  # padding is attended to
        return args, kwargs

    with hooked([attention.register_forward_pre_hook(forget, with_kwargs=True)]):
        assert not decodes_well(chat.model, chat.pad_id, rows)


# -- gradients and memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", PLAIN)
def test_gradients_are_those_without_sharing(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of(config)

    def score(logits: Any, batch: list[int]) -> Any:
        return logits[:, :2]

    def slopes() -> tuple[Any, Any, Any]:
        parts = list(gradients(chat, PROMPTS, score))
        order = torch.tensor([row for part in parts for row in part.rows]).argsort()
        return (
            torch.cat([part.slopes for part in parts], 1)[:, order],
            torch.cat([part.outputs for part in parts], 1)[:, order],
            torch.cat([part.final for part in parts])[order],
        )

    shared = slopes()
    monkeypatch.setattr(ChatModel, "decodes", lambda self: False)
    for one, other in zip(shared, slopes(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_memory_that_ends_in_the_middle_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of(batching=Batching(10_000))
    whole = answer_prompts(chat, PROMPTS, max_new_tokens=8)
    step, failures = decoding._step, [0]

    def scarce(model: Any, active: Any, *choose: Any) -> Any:
        if len(active.rows) > 3 and len(active.new[0]) == 3:
            failures[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(model, active, *choose)

    monkeypatch.setattr(decoding, "_step", scarce)
    found = answer_prompts(chat, PROMPTS, max_new_tokens=8)
    assert failures[0] >= 1
    close(found, whole)
    assert found.tokens == whole.tokens
    assert hooks(chat.model) == 0
