"""How many tokens a model reads, and which prompts it cannot read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmva.errors import UsageError
from llmva.models.sublayers import text_config
from llmva.prompts.types import Asked, text_of


def context_length(model: Any) -> int | None:
    """Maximum number of tokens of prompt and answer together; None if the config does not say."""
    config = text_config(model)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


def check_rows(model: Any, prompts: Sequence[Asked], rows: list[list[int]], max_new_tokens: int) -> None:
    """Raises UsageError for the first prompt whose token ids (`rows`) the model cannot read."""
    if not rows:
        raise UsageError("There are no prompts to answer: give at least one.")
    limit = context_length(model)
    known = int(model.get_input_embeddings().weight.shape[0])
    for asked, row in zip(prompts, rows, strict=True):
        begin = repr(text_of(asked)[:40])
        if not row:
            raise UsageError(f"The prompt {begin} has no tokens for this model: remove it.")
        if max(row) >= known:
            raise UsageError(
                f"The tokenizer gives the prompt beginning {begin} the token {max(row)}, and the model knows "
                f"{known}: put the tokenizer that belongs to the model into its folder."
            )
        if limit is not None and len(row) + max_new_tokens > limit:
            raise UsageError(
                f"The prompt beginning {begin} is {len(row)} tokens long, which with {max_new_tokens} for the "
                f"answer is more than the {limit} that the model reads: shorten or remove it."
            )
