"""Greedy answers, and the sublayers' outputs at the last prompt token, from the same forward pass.

The prefill of generation computes every `o` already, so captures cost nothing. Prompts run sorted by length in
left-padded batches. Generation of a row stops as soon as no continuation could change the judge's label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmva.errors import UsageError
from llmva.models.at_rest import at_rest, reads_model
from llmva.models.batching import longest_first
from llmva.models.chat import forward_inputs, pad_token
from llmva.models.chat_model import ChatModel
from llmva.models.forward import logits_of, run_forward
from llmva.models.sublayers import contiguous_head, first_tensor, hooked, text_config

CHECK_EVERY = 4  # decoding steps between two checks which rows have ended


@dataclass(frozen=True)
class Capture:
    """Answers to n prompts, in their order, and what the prefill computed."""

    answers: list[str]
    outputs: Tensor  # o of every sublayer at the last prompt token, [S, n, d], in the model's dtype, on the CPU
    final: Tensor  # final residual stream there, [n, d]
    tokens: int  # number of generated tokens
    first: Tensor | None = None  # most likely first token of each answer, int64 [n]
    shares: Tensor | None = None  # expectation of `weigh` under the first token's distribution, [n, k]
    thoughts: list[str] | None = None  # before the answers, "" where there were none; None if all had none

    def rows(self, index: list[int] | slice, tokens: int = 0) -> Capture:
        """The capture of some prompts; `tokens` is its number of generated tokens."""
        answers = self.answers[index] if isinstance(index, slice) else [self.answers[i] for i in index]
        first, shares = (None if x is None else x[index] for x in (self.first, self.shares))
        thoughts = self.thoughts
        if thoughts is not None:
            thoughts = thoughts[index] if isinstance(index, slice) else [thoughts[i] for i in index]
        return replace(
            self,
            answers=answers,
            outputs=self.outputs[:, index],
            final=self.final[index],
            tokens=tokens,
            first=first,
            shares=shares,
            thoughts=thoughts,
        )


def capture(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 128, batch_tokens: int | None = None
) -> Capture:
    """Answer `prompts` greedily and capture the sublayers' outputs (method.md, step 1).

    Args:
        model: a transformers model, or a Decoder already found in one.
        prompts: user messages; the chat template is applied here.
        max_new_tokens: maximum length of an answer; 0 captures without answering.
        batch_tokens: maximum number of tokens in a batch; None guesses by free memory.

    Raises:
        UsageError: a prompt that does not fit into the model's context.
    """
    return answer_prompts(ChatModel.of(model, tokenizer, batch_tokens), prompts, max_new_tokens=max_new_tokens)


@reads_model
def answer_prompts(
    chat: ChatModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    settled: Callable[[str], bool] = lambda answer: False,
    weigh: Tensor | None = None,
    rows: list[list[int]] | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Capture:
    """Answer `prompts` greedily and capture the sublayers' outputs at the last prompt token.

    Thoughts that the model writes before its answers, asked to or not, are kept apart from them.

    Args:
        prompts: user messages; the chat template is applied here.
        max_new_tokens: maximum length of an answer; 0 captures without answering.
        settled: a judge's `settled`: generation of a row stops once it is True of the answer so far.
        weigh: [vocabulary, k]; the expectation of its rows under the first token's distribution comes back as
            `shares`. Only without answering, since generation keeps no distributions.
        rows: token ids of each prompt; None renders the prompts.
        on_progress: called after every batch with its number of prompts.

    Raises:
        UsageError: a prompt that does not fit into the model's context.
    """
    rows = rows or chat.rows(prompts)
    check_rows(chat.model, prompts, rows, max_new_tokens)
    lengths = [len(row) + max_new_tokens for row in rows]

    answers, thoughts = [""] * len(rows), [""] * len(rows)
    outputs: Tensor | None = None
    final: Tensor | None = None
    first = torch.zeros(len(rows), dtype=torch.long)
    shares = None if weigh is None else torch.zeros(len(rows), weigh.shape[1])
    tokens = 0
    for batch, (texts, o, x, n, token, share) in chat.batching.over(
        longest_first(lengths),
        lengths.__getitem__,
        lambda batch: _run(chat, [rows[i] for i in batch], max_new_tokens, settled, weigh),
    ):
        if outputs is None or final is None:
            outputs = torch.empty(o.shape[0], len(rows), o.shape[2], dtype=o.dtype)
            final = torch.empty(len(rows), x.shape[1], dtype=x.dtype)
        outputs[:, batch], final[batch], first[batch] = o, x, token
        if shares is not None and share is not None:
            shares[batch] = share
        for i, (answer, thought) in zip(batch, texts, strict=True):
            answers[i], thoughts[i] = answer, thought or ""
        tokens += n
        on_progress(len(batch))
    assert outputs is not None
    assert final is not None
    return Capture(answers, outputs, final, tokens, first, shares, thoughts if any(thoughts) else None)


@torch.inference_mode()
def _run(
    chat: ChatModel,
    rows: list[list[int]],
    max_new_tokens: int,
    settled: Callable[[str], bool],
    weigh: Tensor | None = None,
) -> tuple[list[tuple[str, str | None]], Tensor, Tensor, int, Tensor, Tensor | None]:
    from transformers import StoppingCriteriaList

    decoder, tokenizer, model = chat.decoder, chat.tokenizer, chat.model
    ids, mask = chat.pad(rows)
    width = ids.shape[1]
    taken: dict[int, Tensor] = {}

    def take(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if index not in taken:  # the first call is the prefill
                taken[index] = first_tensor(output).reshape(len(rows), width, -1)[:, -1].clone().cpu()

        return hook

    def settles(row: list[int]) -> int | None:
        answer = chat.reader.so_far(row)
        return len(row) if answer is not None and settled(answer) else None

    modules = [s.output for s in decoder.sublayers] + [decoder.last_block]
    stop = RowStop(width, len(rows), settles)
    handles = [module.register_forward_hook(take(i)) for i, module in enumerate(modules)]
    share: Tensor | None = None
    with hooked([*handles, contiguous_head(model)]):
        if max_new_tokens == 0:
            logits = logits_of(run_forward(model, forward_inputs(model, ids, mask), keep=1), 1)[:, -1].float()
            new, first = ids[:, width:], logits.argmax(-1)
            if weigh is not None:
                share = (torch.softmax(logits, -1) @ weigh.to(logits)).cpu()
        else:
            criteria = StoppingCriteriaList([stop])
            new = generate_greedily(model, tokenizer, ids, mask, max_new_tokens, stopping_criteria=criteria)
            first = new[:, 0]
    ends = _ends(new, end_tokens(model, tokenizer), stop.ends)
    texts = [chat.reader.read(row[:end]) for row, end in zip(new.tolist(), ends, strict=True)]
    last = len(decoder.sublayers)
    return texts, torch.stack([taken[i] for i in range(last)]), taken[last], sum(ends), first.cpu(), share


class RowStop:
    """A transformers stopping criterion for each row; `ends` says how many of each row's new tokens count."""

    def __init__(self, width: int, rows: int, end: Callable[[list[int]], int | None]) -> None:
        """`end` takes a row's new tokens and returns how many of them count, or None to continue."""
        self.width, self.end = width, end
        self.ends: list[int | None] = [None] * rows

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if (ids.shape[1] - self.width) % CHECK_EVERY == 0:
            for i, row in enumerate(ids[:, self.width :].tolist()):
                if self.ends[i] is None:
                    self.ends[i] = self.end(row)
        return torch.tensor([end is not None for end in self.ends], device=ids.device)


def generate_greedily(
    model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, max_new_tokens: int, **options: Any
) -> Tensor:
    """New tokens after the left-padded `ids` [rows, width] by plain greedy search: [rows, at most max_new_tokens].

    For options that a given config leaves open, transformers uses the model's own: repetition penalties, beams, forced
    or suppressed tokens. So the model's own config is replaced during the call. `options` go to `generate`.
    """
    from transformers import GenerationConfig

    plain = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None,
        pad_token_id=pad_token(model, tokenizer),
    )
    with at_rest(model):
        own = model.generation_config
        model.generation_config = plain
        try:
            sequences: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=plain, **options)
        finally:
            model.generation_config = own
    return sequences[:, ids.shape[1] :]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a turn, from the model's generation config and the tokenizer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    known = set(ids) if isinstance(ids, list | tuple) else {ids}
    return {i for i in known | {tokenizer.eos_token_id} if i is not None}


def _ends(new: Tensor, eos: set[int], settled: list[int | None]) -> list[int]:
    """How many new tokens of each row count, the end token included."""
    ends = []
    for row, limit in zip(new.tolist(), settled, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        ends.append(end if limit is None else min(end, limit))
    return ends


def context_length(model: Any) -> int | None:
    """Maximum number of tokens of prompt and answer together; None if the config does not say."""
    config = text_config(model)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


def check_rows(model: Any, prompts: Sequence[str], rows: list[list[int]], max_new_tokens: int) -> None:
    """Raises UsageError for the first prompt whose token ids (`rows`) the model cannot read."""
    if not rows:
        raise UsageError("There are no prompts to answer: give at least one.")
    limit = context_length(model)
    known = int(model.get_input_embeddings().weight.shape[0])
    for text, row in zip(prompts, rows, strict=True):
        if not row:
            raise UsageError(f"The prompt {text[:40]!r} has no tokens for this model: remove it.")
        if max(row) >= known:
            raise UsageError(
                f"The tokenizer gives the prompt beginning {text[:40]!r} the token {max(row)}, and the model knows "
                f"{known}: put the tokenizer that belongs to the model into its folder."
            )
        if limit is not None and len(row) + max_new_tokens > limit:
            raise UsageError(
                f"The prompt beginning {text[:40]!r} is {len(row)} tokens long, which with {max_new_tokens} for the "
                f"answer is more than the {limit} that the model reads: shorten or remove it."
            )
