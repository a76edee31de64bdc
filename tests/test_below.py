"""Passes over the same rows with many edits begin at the first block that the edits change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from conftest import chat_model, tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.models.generate import answer_prompts
from llmva.models.harmless import agreement
from llmva.models.reading.below import Below

PROMPTS = ["open the gate", "close the door", "paint a fence and a door", "break it", "make the door", "fix the user"]
FIRST, LOWER = 2, slice(0, 4)  # of four blocks; the sublayers below


def upper_edit(chat: Any, seed: int) -> Edit:
    """An edit of the last two blocks."""
    g = torch.Generator().manual_seed(seed)
    edit = Edit({}, {"model": "tiny"})
    for sublayer in chat.decoder.sublayers[LOWER.stop :]:
        edit = edit.then(sublayer.name, *torch.randn(2, chat.decoder.width, generator=g), 1)
    return edit


@contextmanager
def calls(module: Any) -> Iterator[list[int]]:
    counted: list[int] = []
    handle = module.register_forward_hook(lambda *_: counted.append(1))
    try:
        yield counted
    finally:
        handle.remove()


def read(chat: Any, edit: Edit) -> Any:
    with edit.apply(chat.model, check=False):
        return answer_prompts(chat, PROMPTS, max_new_tokens=0)


@pytest.mark.parametrize("kind", ["LlamaConfig", "Gemma2Config", "Qwen3Config"])
def test_what_lies_below_the_edits_is_computed_once(kind: str) -> None:
    chat = chat_model(tiny_model(kind, num_hidden_layers=4), tiny_tokenizer())
    edits = [upper_edit(chat, seed) for seed in range(4)]
    plain = [read(chat, edit) for edit in edits]
    below = Below.of(chat.decoder, FIRST)
    assert below is not None
    with calls(chat.decoder.sublayers[0].projection) as whole:
        read(chat, edits[0])
    with chat.sharing(below):
        shared = [read(chat, edit) for edit in edits[:2]]  # kept, then begun there and compared with a whole pass
        with (
            calls(chat.decoder.sublayers[0].projection) as lower,
            calls(chat.decoder.sublayers[-1].projection) as upper,
        ):
            shared += [read(chat, edit) for edit in edits[2:]]
    assert below.proven
    prefixes = len(whole) - 1  # passes over the beginning that all rows share, which are whole
    assert (len(lower), len(upper)) == (2 * prefixes, 2 * len(whole))
    for one, other in zip(plain, shared, strict=True):
        torch.testing.assert_close(one.outputs[LOWER.stop :], other.outputs[LOWER.stop :])
        torch.testing.assert_close(one.final, other.final)
        torch.testing.assert_close(one.chances, other.chances)
        assert torch.equal(one.likely, other.likely)
    assert not torch.allclose(plain[2].final, plain[3].final)  # the edits differ
    assert "forward" not in vars(below.blocks[0])
    torch.testing.assert_close(read(chat, edits[0]).outputs, plain[0].outputs)  # and all is as before


def test_harm_is_compared_with_what_the_untouched_model_says() -> None:
    """`agreement` reads the model to compare with too, whose lower blocks may be others."""
    chat = chat_model(tiny_model(num_hidden_layers=4), tiny_tokenizer())
    lower = Edit({}, {"model": "tiny"}).then(chat.decoder.names[0], *torch.ones(2, chat.decoder.width), 1)
    edits = []
    for seed in range(3):
        edit = lower
        for name, f in upper_edit(chat, seed).factors.items():
            edit = edit.then(name, f.V[:, 0], f.U[:, 0], 1)
        edits.append(edit)
    texts = [(prompt, "the door") for prompt in PROMPTS]
    plain = [agreement(chat, texts, partial(edit.apply, chat.model, check=False)) for edit in edits]
    with chat.sharing(Below.of(chat.decoder, FIRST)):
        shared = [agreement(chat, texts, partial(edit.apply, chat.model, check=False)) for edit in edits]
    for one, other in zip(plain, shared, strict=True):
        torch.testing.assert_close(torch.tensor(one.kl), torch.tensor(other.kl), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(one.rise), torch.tensor(other.rise), atol=1e-5, rtol=1e-4)
    assert max(plain[0].kl) > 1e-3


def test_blocks_that_hand_on_more_than_the_stream_are_read_whole() -> None:
    chat = chat_model(tiny_model(num_hidden_layers=4), tiny_tokenizer())
    blocks = chat.model.model.layers
    passes: list[int] = []
    blocks[0].mlp.register_forward_hook(lambda *_: passes.append(1))
    # an upper block adds what only a pass through the lower one brings
    blocks[3].register_forward_hook(lambda m, a, output: output + 5.0 * len(passes) if passes else output)
    chat.model.register_forward_hook(lambda *_: passes.clear())
    chat = chat_model(chat.decoder, tiny_tokenizer())
    edits = [upper_edit(chat, seed) for seed in range(3)]
    plain = [read(chat, edit) for edit in edits]
    below = Below.of(chat.decoder, FIRST)
    assert below is not None
    with chat.sharing(below):
        shared = [read(chat, edit) for edit in edits]
    assert not below.proven
    assert below.first == 0
    for one, other in zip(plain, shared, strict=True):
        torch.testing.assert_close(one.final, other.final)
        torch.testing.assert_close(one.chances, other.chances)


def test_nothing_is_shared_where_the_first_block_is_edited(model: Any, tokenizer: Any) -> None:
    assert Below.of(chat_model(model, tokenizer).decoder, 0) is None
