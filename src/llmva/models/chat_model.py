"""A chat model as the method uses it: sublayers, tokenizer, and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmva.models.batching import Batching, first_guess
from llmva.models.chat import encode, input_device, pad_left, render
from llmva.models.load import loading_limits
from llmva.models.sublayers import Decoder, find_decoder


@dataclass(frozen=True)
class ChatModel:
    """The model argument of every function that reads or answers prompts.

    `limits` are sentences about the model that a reader of any figure must know.
    """

    decoder: Decoder
    tokenizer: Any
    batching: Batching
    limits: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any, tokenizer: Any, batch_tokens: int | None = None) -> ChatModel:
        """Find the sublayers of `model`, unless it is a Decoder already, and guess the size of a batch.

        Args:
            batch_tokens: maximum number of tokens in a batch; None guesses by free memory.

        Raises:
            UsageError, LlmvaError: as for `find_decoder`.
        """
        decoder = model if isinstance(model, Decoder) else find_decoder(model)
        limits = loading_limits(decoder.model)
        return cls(decoder, tokenizer, first_guess(decoder.model, batch_tokens), tuple(limits))

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.decoder.model

    def row(self, text: str) -> list[int]:
        """Token ids of one user message in the chat template, generation prompt included."""
        return encode(self.tokenizer, render(self.tokenizer, text))

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """`row` of each text."""
        return [self.row(text) for text in texts]

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Left-padded `(ids, mask)`, both int64 [rows, longest], on the model's input device."""
        return pad_left(rows, self.tokenizer.pad_token_id, input_device(self.model))
