"""A chat model as the method uses it: sublayers, chat template, and batch size."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from llmva.models.at_rest import plain_torch, told_hooks
from llmva.models.batching import Batching, first_guess
from llmva.models.chat import AnswerReader, ChatTemplate, ending_limits, input_device, pad_left, pad_token
from llmva.models.engines.base import Engine
from llmva.models.forward import batches_well, check_features, is_of_transformers
from llmva.models.load import loading_limits
from llmva.models.reading.below import Below
from llmva.models.reading.cache import cache_name
from llmva.models.reading.decoding import decodes_well
from llmva.models.sublayers import Decoder, find_decoder
from llmva.prompts.types import Asked

UNEVEN = ("yes", "What colour is the sky at noon, and what is it at night?")  # prompts of different lengths
DECODED = ("yes", "What colour is the sky?", "Name a tree that grows by the sea.")
ALONE = (
    "The model's own code gives other answers to prompts in a batch than to the same prompts alone, so each prompt was "
    "answered alone."
)
UNSTEADY = (
    "The model gives other numbers each time that it reads the same tokens, though it is in evaluation mode, as with a "
    "dropout that ignores eval() or a hook that draws at random: a run that is repeated, or goes on after an "
    "interruption, ends otherwise."
)


@dataclass(frozen=True)
class ChatModel:
    """The model argument of every function that reads or answers prompts.

    `limits` are sentences about the model and its template that a reader of any figure must know. `engine` writes its
    answers, where that is not transformers.
    """

    decoder: Decoder
    tokenizer: Any
    batching: Batching
    template: ChatTemplate
    limits: tuple[str, ...] = ()
    engine: Engine | None = field(default=None, repr=False, compare=False)
    _rows: dict[tuple[Asked, bool], array[int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _shared: list[Below] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        batch_tokens: int | None = None,
        engine: Engine | None = None,
        system: str | None = None,
    ) -> ChatModel:
        """Find the sublayers of `model`, unless it is a Decoder already, check it, and guess the size of a batch.

        Args:
            batch_tokens: maximum number of tokens in a batch; None guesses by free memory.
            engine: what writes answers; None is transformers. See `llmva.models.engines`.
            system: the system prompt of every prompt; None leaves the system turn to the chat template.

        Raises:
            UsageError, LlmvaError: as `find_decoder` and `ChatTemplate.of`, and where a model with code of its own
                lacks what answering prompts needs.
        """
        known = model.model if isinstance(model, Decoder) else model
        check_features(known)
        template = ChatTemplate.of(tokenizer, system)
        limits = [*loading_limits(known), *template.limits, *ending_limits(known, tokenizer)]
        if hooks := told_hooks(known):
            limits.append(f"The model has {hooks}: what they do is part of every figure, and no export has it.")
        with plain_torch():
            alone = False
            if not is_of_transformers(known):
                last = int(known.get_input_embeddings().weight.shape[0]) - 1
                rows = [[min(i, last) for i in template.row(text)] or [0] for text in UNEVEN]
                alone = not batches_well(known, pad_token(known, tokenizer), rows)
            decoder = model if isinstance(model, Decoder) else find_decoder(model)
        batching = Batching(1) if alone else first_guess(known, batch_tokens)
        limits += [sentence for sentence, holds in ((ALONE, alone), (UNSTEADY, not decoder.steady)) if holds]
        return cls(decoder, tokenizer, batching, template, tuple(limits), engine)

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.decoder.model

    def close(self) -> None:
        """End the engine's program, if there is one."""
        if self.engine is not None:
            self.engine.close()

    @cached_property
    def reader(self) -> AnswerReader:
        """Reads answers, without thoughts, off what the model wrote."""
        return AnswerReader.of(self.tokenizer, self.template.marks)

    @cached_property
    def _decodes(self) -> bool:
        return decodes_well(self.model, self.pad_id, [self.template.row(text) for text in DECODED])

    def decodes(self) -> bool:
        """Whether rows may share, leave and join a batch (`decoding`). Proved once on the model.

        A hook on the model itself, as steering methods have, sees whole batches and must not be shown such ones. Where
        positions depend on a batch's longest row, no row may share one with others.
        """
        if self.batching.alone_above is not None:
            return False
        return not self.model._forward_pre_hooks and self._decodes and cache_name(self.model) is not None

    @contextmanager
    def sharing(self, below: Below | None) -> Iterator[None]:
        """Inside, passes over prompts alone begin where `below` says. Captures of what lies below it are undefined."""
        self._shared[:] = [below] if below else []
        try:
            yield
        finally:
            self._shared.clear()

    @property
    def below(self) -> Below | None:
        """What `sharing` has set."""
        return self._shared[0] if self._shared else None

    @property
    def pad_id(self) -> int:
        """The token that fills rows up."""
        return pad_token(self.model, self.tokenizer)

    def row(self, asked: Asked, thinking: bool = False) -> list[int]:
        """Token ids of one user message or conversation in the chat template, up to where the model goes on.

        They are kept: a run reads each prompt some fifty times, and a template costs as much as a small model's pass.
        """
        if (asked, thinking) not in self._rows:
            self._rows[asked, thinking] = array("q", self.template.row(asked, thinking))
        return self._rows[asked, thinking].tolist()

    def rows(self, prompts: Sequence[Asked], thinking: bool = False) -> list[list[int]]:
        """`row` of each prompt."""
        return [self.row(asked, thinking) for asked in prompts]

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Left-padded `(ids, mask)`, both int64 [rows, longest], on the model's input device."""
        return pad_left(rows, self.pad_id, input_device(self.model))
