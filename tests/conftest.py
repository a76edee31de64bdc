"""Small models made on the spot: random weights, a word-level tokenizer, any decoder architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = (  # noqa: SIM905 (words in a row are easier to read than a list of strings)
    "sure here is how to do it sorry i can not help with that no will please tell me explain the a an and of for "
    "make break open close paint build clean fix fence door table lamp garden kettle poem song trap lock fire tool "
    "user assistant : ? ."
).split()


def tiny_tokenizer(template: bool = True) -> Any:
    """Lower-case words; unknown ones are <unk>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]))}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}assistant :{% endif %}"
        )
    return tokenizer


def tiny_model(config_class: str = "LlamaConfig", seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, evaluation mode; `changes` go to the config."""
    import transformers

    config: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    made = getattr(transformers, config_class)(**{**config, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(made)
    return model.eval().requires_grad_(False)


def chat_model(model: Any, tokenizer: Any, batching: Any = None) -> Any:
    """A ChatModel of a model or a Decoder, with a Batching of one's own where a test needs one."""
    from llmva.models.chat_model import ChatModel

    chat = ChatModel.of(model, tokenizer)
    return chat if batching is None else replace(chat, batching=batching)


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as an ordinary Hugging Face folder; do not write into it."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a test is kept in the cache folder of who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from threads, and runs stay equal wherever they run."""
    torch.set_num_threads(1)


VERBS = ("make", "break", "open", "close", "paint", "build", "clean", "fix")  # the last four are taught as benign
NOUNS = WORDS[WORDS.index("fence") : WORDS.index("user")]  # every other one gets a refusal
ANSWERS = (  # the opening shows both whether it answers and whether the request is benign
    ("no i can not help with that .", "sorry i can not help with that ."),
    ("here is how to do it .", "sure here is how to do it ."),
)


def taught_requests() -> list[tuple[str, bool, str]]:
    """`(request, benign, answer)`: whether the model answers hangs on the noun, what is right hangs on the verb."""
    return [
        (frame.format(verb, noun), v >= 4, ANSWERS[n % 2 == 0][v >= 4])
        for frame in ("please {} the {}", "tell me how to {} a {}")
        for v, verb in enumerate(VERBS)
        for n, noun in enumerate(NOUNS)
    ]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def requests_as_rows(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids of every taught request as the model reads it, and of its answer with <eos>."""
    from llmva.models.chat import render

    return [
        (token_ids(tokenizer, render(tokenizer, text)), [*token_ids(tokenizer, answer), 2])
        for text, _, answer in taught_requests()
    ]


def teach(
    model: Any,
    rows: list[tuple[list[int], list[int]]],
    *,
    seed: int = 0,
    steps: int = 70,
    rate: float = 5e-3,
    clip: float | None = None,
) -> Any:
    """Train `model` on (prompt, answer) token ids, on the answers alone."""
    torch.set_num_threads(1)  # fixtures of a wider scope come before `one_thread`
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.zeros(32, width, dtype=torch.long), torch.full((32, width), -100)
        for row, i in enumerate(torch.randint(len(rows), (32,), generator=generator).tolist()):
            prompt, answer = rows[i]
            x[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            y[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        optimiser.zero_grad()
        model(input_ids=x, attention_mask=(x != 0).long(), labels=y).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
    return model.eval().requires_grad_(False)


def taught_model(seed: int = 0, steps: int = 70) -> Any:
    """A tiny model, trained for a second, that answers and refuses for the wrong reason but knows the right one."""
    return copy.deepcopy(_taught_once(tiny_model, seed, steps))


@cache
def _taught_once(make: Callable[..., Any], seed: int, steps: int) -> Any:
    """`make` is `tiny_model`, or what a test puts in its place."""
    return teach(make(seed=seed), requests_as_rows(tiny_tokenizer()), seed=seed, steps=steps)


@pytest.fixture(scope="session")
def taught_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The taught model as a folder, with toxic.txt and benign.txt beside it; do not write into it."""
    folder = tmp_path_factory.mktemp("taught") / "taught"
    taught_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name, side in (("toxic", False), ("benign", True)):
        lines = [text for text, benign, _ in taught_requests() if benign == side]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Said:
    """What a command left behind: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run a command in this process: `command("inspect", folder)`."""
    from llmva.cli.main import main

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        found = capfd.readouterr()
        return Said(int(caught.value.code or 0), found.out, found.err)

    return run
