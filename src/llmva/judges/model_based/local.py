"""A generative guard run here with transformers: greedy, in left-padded batches sorted by length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmva.errors import LlmvaError
from llmva.judges.base import Judge, Judgement, Label
from llmva.judges.model_based.asking import AskingJudge, Keep, Question
from llmva.judges.model_based.guards import Guard, fill, read_template, turns

if TYPE_CHECKING:
    from llmva.models.batching import Batching

_SAMPLE, _SAMPLES = 4096, 64  # bytes of a sample; samples read from each file


class LocalGuard(AskingJudge):
    """`place` is a folder or a hub id. The model is loaded when the first answer is judged, and stays.

    Args:
        device, dtype: as `load_model` takes them.
        batch_tokens: tokens in a batch; None takes what the memory holds.
        options: of `AskingJudge`.
    """

    def __init__(
        self,
        title: str,
        guard: Guard,
        place: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int | None = None,
        stand_in: Judge | None = None,
        **options: Any,
    ) -> None:
        self._template = read_template(guard.template) if guard.template else None
        parts = [place_digest(place), self._template, guard.max_new_tokens]
        super().__init__(title, parts, knows_refusals=guard.knows_refusals, stand_in=stand_in, **options)
        self._guard, self._place = guard, place
        self._loading: dict[str, Any] = {"device": device, "dtype": dtype}
        self._batch_tokens = batch_tokens
        self._loaded: tuple[Any, Any, Batching] | None = None

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        from llmva.models.batching import longest_first

        model, tokenizer, batching = self._load()
        rows = [self._encode(tokenizer, question) for question in questions]
        maximum = longest_input(model) - self._guard.max_new_tokens
        fitting = [i for i, row in enumerate(rows) if len(row) <= maximum]
        for i in sorted(set(range(len(rows))) - set(fitting)):
            keep(questions[i], too_long(len(rows[i]), maximum))
        lengths = [len(rows[i]) + self._guard.max_new_tokens for i in fitting]
        for batch, replies in batching.over(
            longest_first(lengths),
            lengths.__getitem__,
            lambda batch: self._replies(model, tokenizer, [rows[fitting[i]] for i in batch]),
            decodes=True,
        ):
            for i, reply in zip(batch, replies, strict=True):
                question = questions[fitting[i]]
                keep(question, self._guard.parse(reply, question.prompt.benign))

    def _load(self) -> tuple[Any, Any, Batching]:
        if self._loaded is None:
            from llmva.models.batching import first_guess
            from llmva.models.load import load_model

            model, tokenizer = load_model(self._place, **self._loading)
            if self._template is None and not getattr(tokenizer, "chat_template", None):
                raise LlmvaError(
                    f"'{self._place}' has no chat template, which this guard needs: download the whole guard."
                )
            self._loaded = model, tokenizer, first_guess(model, self._batch_tokens)
        return self._loaded

    def _encode(self, tokenizer: Any, question: Question) -> list[int]:
        """Token ids. A chat template writes the first special token itself; ours are written without it."""
        if self._template is None:
            dialogue = turns(question.prompt.text, question.answer)
            text = tokenizer.apply_chat_template(dialogue, tokenize=False)
        else:
            text = fill(self._template, question.prompt.text, question.answer)
        ids: list[int] = tokenizer(text, add_special_tokens=self._template is not None)["input_ids"]
        return ids

    def _replies(self, model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
        import torch

        from llmva.models.chat import input_device, pad_left, pad_token
        from llmva.models.generate import generate_greedily

        with torch.inference_mode():
            ids, mask = pad_left(rows, pad_token(model, tokenizer), input_device(model))
            new = generate_greedily(model, tokenizer, ids, mask, self._guard.max_new_tokens)
        replies: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
        return replies


def longest_input(model: Any) -> int:
    """The maximum number of tokens that the model reads; 10**9 if its config does not say."""
    from llmva.models.sublayers import text_config

    return int(getattr(text_config(model), "max_position_embeddings", None) or 10**9)


def too_long(length: int, maximum: int) -> Judgement:
    """The judgement of an answer whose question has more tokens than the judge reads."""
    return Judgement(Label.UNJUDGED, 0.0, f"{length} tokens, and the judge reads {maximum}")


def place_digest(place: str) -> str:
    """What identifies a model: a hub id itself; for a folder, a hash of its small files and of samples of its weights.

    Trained weights differ everywhere, so 64 pieces of each file are enough, and 16 GB take less than a minute.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return place
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".jinja", ".safetensors", ".model", ".txt") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
