"""Tokenizers as they come: what they lack, have too much of, or have preset, changes nothing that a run does.

Before, padding beyond the embedding was a traceback, as was none at all through the Python API; so were random messages
drawn beyond the embedding, and answers of tokens that a tokenizer without a fast form does not know. Those marked
`held` gave the right result already.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmva
from conftest import Said, taught_model, taught_requests, tiny_model, tiny_tokenizer
from llmva.errors import UsageError
from llmva.models.chat import decode, pad_token
from llmva.models.harmless import random_messages
from llmva.models.load import load_model

SIZE = len(tiny_tokenizer())
TEXTS = [text for text, _, _ in taught_requests()[::9]] + ["open"]


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / name
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def token(content: str, number: int, special: bool = True) -> dict[str, Any]:
    rest = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **rest}


def padded_with(content: str | None, number: int | None = None, **more: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if number is not None and content is not None:
            edit_json(folder, "tokenizer.json", lambda t: t["added_tokens"].append(token(content, number)))
        edit_json(folder, "tokenizer_config.json", lambda t: t.update(pad_token=content, **more))

    return write


def preset(**parts: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, "tokenizer.json", lambda t: t.update(parts))


CUT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
FIXED = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
         "pad_token": "<pad>"}  # fmt: skip
CASES: dict[str, Callable[[Path], None]] = {
    "padding beyond the embedding": padded_with("[PAD]", SIZE),
    "padding far beyond it": padded_with("[PAD]", SIZE + 1000),
    "no padding": padded_with(None),
    "no padding and no end": padded_with(None, eos_token=None),
    "padding and end beyond it": padded_with("[PAD]", SIZE, eos_token="[PAD]"),
    "padding is the end": padded_with("<eos>"),  # held
    "padding is a word": padded_with("door"),  # held
    "padding on the right": lambda folder: edit_json(  # held
        folder, "tokenizer_config.json", lambda t: t.update(padding_side="right", truncation_side="left")
    ),
    "a preset truncation": preset(truncation=CUT),  # held
    "a preset padding": preset(padding=FIXED),  # held
    "both": preset(truncation=CUT, padding=FIXED),  # held
    "a short preset length": lambda folder: edit_json(  # held
        folder, "tokenizer_config.json", lambda t: t.update(model_max_length=4)
    ),
    "more tokens than embeddings": lambda folder: edit_json(
        folder,
        "tokenizer.json",
        lambda t: t["added_tokens"].extend(token(f"more{i}", SIZE + i, special=False) for i in range(200)),
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    taught_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(plain: Path) -> tuple[list[str], torch.Tensor]:
    return read(*load_model(plain, device="cpu"))


def read(model: Any, tokenizer: Any) -> tuple[list[str], torch.Tensor]:
    """Answers, which end themselves, and captures."""
    found = llmva.capture(model, tokenizer, TEXTS, max_new_tokens=14)
    return [answer.strip() for answer in found.answers], found.outputs


@pytest.mark.parametrize("name", CASES)
def test_answers_and_captures_are_the_same(
    name: str, plain: Path, wanted: tuple[list[str], torch.Tensor], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    CASES[name](folder)
    from transformers import AutoTokenizer

    model, tokenizer = load_model(folder, device="cpu")
    for one in (tokenizer, AutoTokenizer.from_pretrained(folder)):  # as loaded by us, and by a user
        answers, outputs = read(model, one)
        assert answers == wanted[0]
        torch.testing.assert_close(outputs, wanted[1])
        chat = llmva.ChatModel.of(model, one)
        messages = random_messages(chat, 60, torch.Generator().manual_seed(0))
        assert max(max(row) for row in chat.rows(messages)) < SIZE
    assert 0 <= tokenizer.pad_token_id < SIZE  # what else pads, as benchmarks do


def test_a_run_with_padding_beyond_the_embedding(plain: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    CASES["padding beyond the embedding"](folder)
    for name, side in (("toxic", False), ("benign", True)):
        lines = [text for text, benign, _ in taught_requests()[::5] if benign == side]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    sides = ["--toxic", tmp_path / "toxic.txt", "--benign", tmp_path / "benign.txt", "--max-new-tokens", 6]
    runs = []
    for model, out in ((plain, "a"), (folder, "b")):
        said = command("align", model, *sides, "--per-source", 16, "--iterations", 1, "--out", tmp_path / out, "-q")
        assert said.code == 0, said.err
        runs.append(json.loads((tmp_path / out / "run.json").read_text()))
    assert runs[0]["test"]["before"] == runs[1]["test"]["before"]


def test_a_prompt_with_a_token_beyond_the_embedding_is_named() -> None:
    """Held: the sentence was there; through the Python API too."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["beyond"])
    with pytest.raises(UsageError, match=f"gives the prompt beginning 'go beyond' the token {SIZE}"):
        llmva.capture(tiny_model(), tokenizer, ["go beyond"], max_new_tokens=2)


def test_fewer_tokens_than_embeddings(plain: Path) -> None:
    """An embedding is often padded to a round size, and a model may write what stands for nothing."""
    model = tiny_model(vocab_size=SIZE + 40)
    with torch.no_grad():
        model.lm_head.weight[:SIZE] = 0.0  # it writes nothing else
    found = llmva.capture(model, tiny_tokenizer(), TEXTS, max_new_tokens=4)
    assert found.answers == [""] * len(TEXTS)


class Slow:
    """What transformers gives for tokenizers without a fast form: unknown tokens raise."""

    def __init__(self, inner: Any, error: Exception) -> None:
        self.inner, self.error = inner, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)

    def decode(self, ids: Any, **options: Any) -> str:
        if any(i >= len(self.inner) for i in ids):
            raise self.error
        return str(self.inner.decode(ids, **options))


@pytest.mark.parametrize("error", [TypeError("NoneType"), ValueError("bytes"), KeyError(99), IndexError("range")])
def test_tokens_that_a_tokenizer_does_not_know_are_left_out(error: Exception) -> None:
    tokenizer = Slow(tiny_tokenizer(), error)
    door = tokenizer("open the door")["input_ids"]
    assert decode(tokenizer, [*door, SIZE + 7]) == "open the door"
    model = tiny_model(vocab_size=SIZE + 40)
    with torch.no_grad():
        model.lm_head.weight[:SIZE] = 0.0
    assert llmva.capture(model, tokenizer, TEXTS[:3], max_new_tokens=4).answers == [""] * 3


def test_a_tokenizer_without_a_fast_form() -> None:
    """One of transformers' own: bytes, in plain Python."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}\n{% if add_generation_prompt %}bot:{% endif %}"
    model = tiny_model(vocab_size=512)
    found = llmva.capture(model, tokenizer, TEXTS, max_new_tokens=4)
    assert found.outputs.shape[1] == len(TEXTS)
    messages = random_messages(llmva.ChatModel.of(model, tokenizer), 9, torch.Generator().manual_seed(0))
    assert all(messages)


def test_what_pads() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert pad_token(model, tokenizer) == 0
    for pad, end, wanted in ((None, "<eos>", 2), ("more", "<eos>", 2), ("more", "more", 0), (None, None, 0)):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["more"])
        tokenizer.pad_token, tokenizer.eos_token = pad, end
        assert pad_token(model, tokenizer) == wanted


def test_no_end_token_anywhere_is_told(plain: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert not llmva.ChatModel.of(model, tokenizer).limits
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token = None
    (limit,) = llmva.ChatModel.of(model, tokenizer).limits
    assert "names an end token, so that every answer is as long as it may be" in limit
