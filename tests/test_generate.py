"""Captures and answers of a batch equal those of each prompt alone; batches shrink; nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import chat_model, tiny_model, tiny_tokenizer
from llmva.errors import LlmvaError, UsageError
from llmva.judges.base import Judge, Judgement, Label
from llmva.method.observe import observe
from llmva.models import generate
from llmva.models.batching import LEAST_AT_ONCE, MAX_ROWS, Batching, first_guess, longest_first
from llmva.models.chat import encode, pad_left, render, render_dialogue
from llmva.models.chat_model import ChatModel
from llmva.models.forward import run_forward
from llmva.models.generate import CHECK_EVERY, Capture, answer_prompts, capture
from llmva.models.reading import decoding
from llmva.models.sublayers import find_decoder
from llmva.prompts.types import Prompt

PROMPTS = [
    "please tell me how to make a table",
    "open the door",
    "explain how to clean the kettle and paint the fence for the garden please",
    "trap",
    "will you fix the lamp ?",
    "tell me a poem of fire",
    "close the lock and break a tool",
]
CHANGES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Gemma2Config": {},
    "Gemma3TextConfig": {},
    "GPT2Config": {},  # learned positions: padding must not shift them
    "OPTConfig": {"word_embed_proj_dim": 32},
    "GPTNeoXConfig": {},
    "PhiConfig": {},
    "MixtralConfig": {"num_local_experts": 4},
    "MptConfig": {},  # takes no position_ids
}


def sized(model: Any) -> Any:
    """Weights of ordinary size, so that prompts matter to the answers."""
    g = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.data.normal_(0.0, 1.0 / p.shape[-1] ** 0.5, generator=g)
        if "lm_head" in name or "embed" in name or "wte" in name or "wpe" in name:
            p.data.mul_(3.0)
    return model


def plain_outputs(model: Any, text: str) -> tuple[Tensor, Tensor]:
    """The outputs and the final residual stream of one prompt, from an ordinary forward pass."""
    tokenizer, decoder = tiny_tokenizer(), find_decoder(model)
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        o = output[0] if isinstance(output, tuple) else output
        found.append(o.reshape(-1, o.shape[-1])[-1])

    modules = [s.output for s in decoder.sublayers] + [decoder.last_block]
    handles = [module.register_forward_hook(keep) for module in modules]
    model(input_ids=torch.tensor([encode(tokenizer, render(tokenizer, text))]))
    for handle in handles:
        handle.remove()
    return torch.stack(found[:-1]), found[-1]


def plain_answer(model: Any, text: str, count: int) -> list[int]:
    """Greedy search written out: no cache, no padding, one prompt."""
    tokenizer = tiny_tokenizer()
    ids = encode(tokenizer, render(tokenizer, text))
    start = len(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[start:]


def words(ids: list[int]) -> str:
    text: str = tiny_tokenizer().decode(ids, skip_special_tokens=True)
    return text


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def close(a: Capture, b: Capture) -> None:
    assert a.answers == b.answers
    torch.testing.assert_close(a.outputs, b.outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.final, b.final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_new_tokens", [0, 6])
@pytest.mark.parametrize("config", CHANGES)
def test_captures_equal_a_plain_forward_of_each_prompt_alone(config: str, max_new_tokens: int) -> None:
    model = sized(tiny_model(config, **CHANGES[config]))
    found = capture(model, tiny_tokenizer(), PROMPTS, max_new_tokens=max_new_tokens)
    assert found.outputs.shape == (6, len(PROMPTS), 32)
    assert found.final.shape == (len(PROMPTS), 32)
    for i, text in enumerate(PROMPTS):
        outputs, final = plain_outputs(model, text)
        torch.testing.assert_close(found.outputs[:, i], outputs, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found.final[i], final, rtol=1e-4, atol=2e-5)
        if max_new_tokens:
            assert found.answers[i] == words(plain_answer(model, text, max_new_tokens))
    assert hooks(model) == 0


def test_answers_equal_transformers_one_by_one() -> None:
    model, tokenizer = sized(tiny_model()), tiny_tokenizer()
    found = capture(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert len(set(found.answers)) > 3  # else order would not matter
    for text, answer in zip(PROMPTS, found.answers, strict=True):
        ids = torch.tensor([encode(tokenizer, render(tokenizer, text))])
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert answer == words(alone[0, ids.shape[1] :].tolist())


def test_batches_of_any_size_give_the_same(model: Any) -> None:
    sized(model)
    whole = capture(model, tiny_tokenizer(), PROMPTS, max_new_tokens=8)
    for tokens in (1, 40, 100):
        done: list[int] = []
        found = answer_prompts(
            chat_model(model, tiny_tokenizer(), Batching(tokens)), PROMPTS, max_new_tokens=8, on_progress=done.append
        )
        close(found, whole)
        assert sum(done) == len(PROMPTS)
        assert found.tokens == whole.tokens
        assert len(done) == (7 if tokens == 1 else len(done))


def test_bfloat16_is_captured_as_it_is(model: Any) -> None:
    found = capture(model.to(torch.bfloat16), tiny_tokenizer(), PROMPTS[:2], max_new_tokens=0)
    assert found.outputs.dtype == torch.bfloat16
    assert found.answers == ["", ""]
    assert found.tokens == 0


@pytest.mark.parametrize("where", ["generation config", "tokenizer"])
def test_answers_end_at_any_end_token_and_tokens_count_it(where: str) -> None:
    model, tokenizer = sized(tiny_model()), tiny_tokenizer()
    full = [plain_answer(model, text, 10) for text in PROMPTS]
    end = full[0][4]  # a token that the first answer gives at some point becomes an end token
    if where == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    else:
        model.generation_config.eos_token_id = [2, end]
    found = capture(model, tokenizer, PROMPTS, max_new_tokens=10)
    count = 0
    for ids, answer in zip(full, found.answers, strict=True):
        kept = ids[: ids.index(end) + 1] if end in ids else ids
        count += len(kept)
        assert answer == tokenizer.decode(kept, skip_special_tokens=True)
    assert found.tokens == count < sum(map(len, full))


def test_settled_rows_stop_and_keep_their_label() -> None:
    model, tokenizer = sized(tiny_model()), tiny_tokenizer()
    full = capture(model, tokenizer, PROMPTS, max_new_tokens=16)
    firsts = sorted({answer.split()[0] for answer in full.answers})
    decided = firsts[: len(firsts) // 2]

    def label(answer: str) -> bool:
        return answer.split()[0] in decided

    def settled(answer: str) -> bool:
        return bool(answer.split()) and label(answer)

    found = answer_prompts(chat_model(model, tokenizer), PROMPTS, max_new_tokens=16, settled=settled)
    assert [label(a) for a in found.answers] == [label(a) for a in full.answers]
    assert {label(a) for a in full.answers} == {True, False}
    for short, whole in zip(found.answers, full.answers, strict=True):
        assert whole.startswith(short)
        assert len(short.split()) == (CHECK_EVERY if label(whole) else len(whole.split()))
    assert found.tokens < full.tokens
    torch.testing.assert_close(found.outputs, full.outputs)


def test_decoding_stops_once_all_rows_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = sized(tiny_model()), 0
    forward = model.forward

    @wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return forward(*args, **kwargs)

    chat = chat_model(find_decoder(model), tiny_tokenizer())
    assert chat.decodes()
    monkeypatch.setattr(model, "forward", counted)
    answer_prompts(chat, PROMPTS, max_new_tokens=60, settled=lambda answer: True)
    assert steps == 1 + CHECK_EVERY  # one for what all prompts begin with


# -- the model's own wishes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wishes",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 50},
        {"repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"min_new_tokens": 9},
        {"suppress_tokens": list(range(4, 30))},
        {"max_length": 3},
        {"forced_eos_token_id": 2},
        {"stop_strings": "the"},
    ],
    ids=lambda wishes: next(iter(wishes)),
)
def test_greedy_whatever_the_models_generation_config_asks(wishes: dict[str, Any]) -> None:
    model = sized(tiny_model())
    plain = capture(model, tiny_tokenizer(), PROMPTS, max_new_tokens=9)
    for name, value in wishes.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    kept = own.to_dict()
    assert capture(model, tiny_tokenizer(), PROMPTS, max_new_tokens=9).answers == plain.answers
    assert model.generation_config is own
    assert own.to_dict() == kept


# -- chat ------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_template_gets_a_plain_dialogue() -> None:
    tokenizer = tiny_tokenizer(template=False)
    assert render(tokenizer, "open the door") == "User: open the door\n\nAssistant:"
    assert capture(tiny_model(), tokenizer, ["open the door"], max_new_tokens=2).outputs.shape == (6, 1, 32)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert render_dialogue(tokenizer, turns) == "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"


def test_special_tokens_come_once() -> None:
    """A template writes its own; the tokenizer's are added only where there is no template."""
    tokenizer = tiny_tokenizer()
    assert encode(tokenizer, render(tokenizer, "open")).count(1) == 1
    from tokenizers.processors import TemplateProcessing

    for template, count in ((True, 1), (False, 1)):
        tokenizer = tiny_tokenizer(template)
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        assert encode(tokenizer, render(tokenizer, "open")).count(1) == count


THINKING = "{% for m in messages %}user : {{ m['content'] }} {% endfor %}assistant : "


def test_thinking_is_off_where_the_template_offers_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    assert render(tokenizer, "open") == "user : open assistant : "


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<think>\n\n"])
def test_a_template_that_always_opens_thinking_is_closed(opening: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING + opening
    assert render(tokenizer, "open") == "user : open assistant : <think>\n\n</think>\n\n"


def test_pad_left_by_hand() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]], 3, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# -- unusable prompts ------------------------------------------------------------------------------------------------


def test_no_prompts_are_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="no prompts"):
        capture(model, tiny_tokenizer(), [])


def test_a_prompt_beyond_the_context_is_named(model: Any) -> None:
    long = "open the door " * 90
    with pytest.raises(UsageError, match=r"'open the door.* 2\d\d tokens long.*256"):
        capture(model, tiny_tokenizer(), ["trap", long], max_new_tokens=0)
    nearly = "open the door " * 80  # fits, but not with its answer
    capture(model, tiny_tokenizer(), [nearly], max_new_tokens=0)
    with pytest.raises(UsageError, match="with 128 for the answer"):
        capture(model, tiny_tokenizer(), [nearly])


def test_an_empty_prompt_is_named(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UsageError, match="has no tokens"):
        capture(model, tokenizer, ["trap", ""], max_new_tokens=0)


# -- memory ----------------------------------------------------------------------------------------------------------


def fails_above(most: int, error: Callable[[], Exception], seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of more than `most` rows fails, as it does on a small device, however it is answered."""
    prefill, whole_batch = decoding._prefill, generate._whole_batch

    def check(rows: int) -> None:
        seen.append(rows)
        if rows > most:
            raise error()

    def joining(model: Any, padding: int, rows: Any, group: list[int], *rest: Any) -> Any:
        check(len(group))
        return prefill(model, padding, rows, group, *rest)

    def at_once(chat: Any, rows: Any, budget: int, end: Any, taken: Any, choose: Any, batch: list[int]) -> Any:
        check(len(batch))
        return whole_batch(chat, rows, budget, end, taken, choose, batch)

    monkeypatch.setattr(decoding, "_prefill", joining)
    monkeypatch.setattr(generate, "_whole_batch", at_once)


@pytest.fixture(params=["joining", "batch by batch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "batch by batch":
        monkeypatch.setattr(ChatModel, "decodes", lambda self: False)
    return str(request.param)


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory"),
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        lambda: RuntimeError("MPS backend out of memory"),
    ],
)
def test_out_of_memory_halves_the_batch_and_changes_nothing(
    error: Callable[[], Exception], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = sized(tiny_model()), list[int]()
    whole = capture(model, tiny_tokenizer(), PROMPTS, max_new_tokens=8)
    batching = Batching(10_000)
    chat = chat_model(model, tiny_tokenizer(), batching)
    chat.decodes()
    fails_above(2, error, seen, monkeypatch)
    found = answer_prompts(chat, PROMPTS, max_new_tokens=8)
    close(found, whole)
    assert seen[:2] == [7, 3]
    assert batching.tokens < 100
    assert hooks(model) == 0
    seen.clear()
    answer_prompts(chat, PROMPTS, max_new_tokens=8)
    assert seen[0] <= 2  # learned


def test_memory_for_not_even_one_prompt_is_one_sentence(model: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_model(model, tiny_tokenizer())
    chat.decodes()
    fails_above(0, lambda: torch.OutOfMemoryError("CUDA out of memory"), [], monkeypatch)
    with pytest.raises(LlmvaError, match="not hold even one prompt"):
        answer_prompts(chat, PROMPTS, max_new_tokens=8)


def test_other_errors_pass_and_leave_no_hooks(model: Any) -> None:
    decoder = find_decoder(model)
    model.model.norm.register_forward_pre_hook(lambda m, a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture(decoder, tiny_tokenizer(), PROMPTS)
    assert hooks(model) == 1

    def other(*args: Any) -> Any:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(Batching(5).over([0, 1], lambda i: 1, other))


def test_over_takes_items_in_order_and_bounds_their_tokens() -> None:
    lengths = [9, 3, 3, 3, 2, 1]
    order = longest_first(lengths)
    assert order == [0, 1, 2, 3, 4, 5]
    assert longest_first([1, 5, 5, 7]) == [3, 1, 2, 0]
    batches = [batch for batch, _ in Batching(6).over(order, lengths.__getitem__, lambda batch: None)]
    assert batches == [[0], [1, 2], [3, 4], [5]]
    few = Batching(1000, at_once=6)
    assert [batch for batch, _ in few.over(order, lengths.__getitem__, lambda batch: None)] == batches
    assert [batch for batch, _ in few.over(order, lengths.__getitem__, lambda batch: None, decodes=True)] == [order]
    many = list(Batching(10**9).over(list(range(600)), lambda i: 1, len))
    assert [n for _, n in many] == [MAX_ROWS, MAX_ROWS, 600 - 2 * MAX_ROWS]


def test_first_guess_is_positive_and_falls_with_the_caches_size() -> None:
    small, deep = first_guess(tiny_model()), first_guess(tiny_model(num_hidden_layers=40))
    assert small.tokens > deep.tokens > 1000
    wide = first_guess(tiny_model(intermediate_size=40_000))
    assert small.at_once is not None
    assert wide.at_once is not None
    assert small.at_once > wide.at_once >= LEAST_AT_ONCE


def test_attention_of_long_rows_counts_by_their_square() -> None:
    batching = Batching(1000, square=0.01)
    assert batching.cost(100) == 200
    batches = [batch for batch, _ in batching.over(list(range(12)), lambda i: 100, lambda batch: None)]
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert first_guess(tiny_model()).square > 0
    assert first_guess(tiny_model(), 77).tokens == 77


# -- observe ---------------------------------------------------------------------------------------------------------


class Longer(Judge):
    name = "longer"

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        label = Label.ANSWERED if "the" in answer.split() else Label.REFUSED
        return Judgement(Label.GARBLED if prompt.text == "trap" else label, 1.0, answer)


def test_observe_keeps_prompts_answers_and_captures_together() -> None:
    decoder = find_decoder(sized(tiny_model()))
    prompts = [Prompt(text, i % 2 == 0, "s") for i, text in enumerate(PROMPTS)]
    seen = observe(chat_model(decoder, tiny_tokenizer()), prompts, Longer(), max_new_tokens=12)
    plain = capture(decoder, tiny_tokenizer(), PROMPTS, max_new_tokens=12)
    close(seen.capture, plain)
    assert [j.reason for j in seen.judgements] == plain.answers
    answered = ["the" in a.split() and p != "trap" for a, p in zip(plain.answers, PROMPTS, strict=True)]
    assert seen.labels[3] is Label.GARBLED
    assert seen.signs.tolist() == [[1 if a else -1 for a in answered], [1, -1, 1, -1, 1, -1, 1]]
    part = seen.part(2, 5)
    assert part.prompts == prompts[2:5]
    assert part.capture.answers == plain.answers[2:5]
    assert torch.equal(part.capture.outputs, seen.capture.outputs[:, 2:5])
    assert torch.equal(part.signs, seen.signs[:, 2:5])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["LlamaConfig", "MptConfig"])
def test_the_head_is_shown_states_of_their_own(name: str, rows: int) -> None:
    """torch's linear copies its whole matrix for a slice, also where one row lets the slice count as contiguous."""
    model = tiny_model(name).eval()
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: seen.append((args[0].stride(), args[0].shape)))
    ids = torch.arange(5).expand(rows, -1)
    with torch.inference_mode():
        run_forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, keep=1)
    handle.remove()
    width = model.config.hidden_size
    assert seen == [((width, width, 1), (rows, 1, width))]
