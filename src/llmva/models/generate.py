"""Answers, and the sublayers' outputs at the last prompt token, from the same forward pass.

The prefill of generation computes every `o` already, so captures cost nothing. Generation of a row stops as soon as no
continuation could change the judge's label, and another prompt takes its place (`decoding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmva.errors import UsageError
from llmva.models.at_rest import at_rest, reads_model
from llmva.models.batching import longest_first
from llmva.models.chat import end_tokens, pad_token
from llmva.models.chat_model import ChatModel
from llmva.models.engines.base import CHECKED, written_by
from llmva.models.finding.tensors import hooked, last_states
from llmva.models.forward import check_numbers
from llmva.models.reading.cache import read_prefix
from llmva.models.reading.context import check_rows
from llmva.models.reading.decoding import End, decode
from llmva.models.reading.rows import read_rows
from llmva.models.reading.sampling import Choose, greedy
from llmva.models.sublayers import Decoder, contiguous_head
from llmva.prompts.types import Asked

T = TypeVar("T")
CHECK_EVERY = 4  # new tokens between two looks whether a row's answer is settled
LIKELY = 64  # most likely first tokens of an answer that a capture keeps
LOGIT_ROWS = 16  # rows whose chances are computed at once: a vocabulary may be large


@dataclass(frozen=True)
class Capture:
    """Answers to n prompts, in their order, and what the prefill computed."""

    answers: list[str]
    outputs: Tensor  # o of every sublayer at the last prompt token, [S, n, d], in the model's dtype, on the CPU
    final: Tensor  # final residual stream there, [n, d]
    tokens: int  # number of generated tokens
    likely: Tensor | None = None  # most likely first tokens of each answer, the likeliest first, int64 [n, k]
    chances: Tensor | None = None  # their probabilities, float32 [n, k]
    shares: Tensor | None = None  # chances that it answers and that it refuses, where labels were predicted, [n, 2]
    thoughts: list[str] | None = None  # before the answers, "" where there were none; None if all had none
    unclosed: list[bool] | None = None  # whether the model never closed those thoughts; None if it closed all

    @property
    def first(self) -> Tensor | None:
        """The most likely first token of each answer, int64 [n]."""
        return None if self.likely is None else self.likely[:, 0]

    def rows(self, index: list[int] | slice, tokens: int = 0) -> Capture:
        """The capture of some prompts; `tokens` is its number of generated tokens."""
        likely, chances, shares = (None if x is None else x[index] for x in (self.likely, self.chances, self.shares))
        return replace(
            self,
            answers=self.answers[index] if isinstance(index, slice) else [self.answers[i] for i in index],
            outputs=self.outputs[:, index],
            final=self.final[index],
            tokens=tokens,
            likely=likely,
            chances=chances,
            shares=shares,
            thoughts=_some(self.thoughts, index),
            unclosed=_some(self.unclosed, index),
        )

    def interleave(self, other: Capture, every: int) -> Capture:
        """The captures of n prompts of which `self` has one in `every`, the first included, and `other` the rest."""
        assert self.likely is not None
        assert self.chances is not None
        assert other.likely is not None
        assert other.chances is not None
        return Capture(
            [""] * (len(self.answers) + len(other.answers)),
            _interleaved(self.outputs, other.outputs, every, 1),
            _interleaved(self.final, other.final, every, 0),
            self.tokens + other.tokens,
            _interleaved(self.likely, other.likely, every, 0),
            _interleaved(self.chances, other.chances, every, 0),
        )


def _interleaved(one: Tensor, other: Tensor, every: int, dim: int) -> Tensor:
    n = one.shape[dim] + other.shape[dim]
    first = torch.arange(n) % every == 0
    shape = list(one.shape)
    shape[dim] = n
    both = torch.empty(shape, dtype=one.dtype)
    both.index_copy_(dim, first.nonzero()[:, 0], one)
    return both.index_copy_(dim, (~first).nonzero()[:, 0], other.to(one.dtype))


def _some(values: list[T] | None, index: list[int] | slice) -> list[T] | None:
    return values if values is None else values[index] if isinstance(index, slice) else [values[i] for i in index]


def capture(
    model: Any, tokenizer: Any, prompts: Sequence[Asked], *, max_new_tokens: int = 128, batch_tokens: int | None = None
) -> Capture:
    """Answer `prompts` greedily and capture the sublayers' outputs (method.md, step 1).

    Args:
        model: a transformers model, or a Decoder already found in one.
        prompts: user messages or conversations; the chat template is applied here.
        max_new_tokens: maximum length of an answer; 0 captures without answering.
        batch_tokens: maximum number of tokens in a batch; None guesses by free memory.

    Raises:
        UsageError: a prompt that does not fit into the model's context.
    """
    return answer_prompts(ChatModel.of(model, tokenizer, batch_tokens), prompts, max_new_tokens=max_new_tokens)


@reads_model
def answer_prompts(
    chat: ChatModel,
    prompts: Sequence[Asked],
    *,
    max_new_tokens: int,
    settled: Callable[[str], bool] = lambda answer: False,
    rows: list[list[int]] | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
    captures: bool = True,
    choose: Choose = greedy,
) -> Capture:
    """Answer `prompts`, greedily by default, and capture the sublayers' outputs at the last prompt token.

    Thoughts that the model writes before its answers, asked to or not, are kept apart from them.

    Args:
        prompts: user messages or conversations; the chat template is applied here.
        max_new_tokens: maximum length of an answer; 0 captures without answering.
        settled: a judge's `settled`: generation of a row stops once it is True of the answer so far.
        rows: token ids of each prompt; None renders the prompts.
        on_progress: called with the number of prompts that have been answered since the last call.
        captures: False if they are not needed, which spares a pass where an engine writes the answers.
        choose: says which token comes next.

    Raises:
        UsageError: a prompt that does not fit into the model's context.
    """
    rows = rows or chat.rows(prompts)
    check_rows(chat.model, prompts, rows, max_new_tokens)
    taken = Taken(chat.decoder, len(rows), wanted=captures or chat.engine is None)
    answers, thoughts, unclosed, tokens = [""] * len(rows), [""] * len(rows), [False] * len(rows), 0
    if max_new_tokens == 0:
        _read(chat, rows, taken, on_progress)
    else:
        for i, new in generate(chat, rows, [max_new_tokens] * len(rows), _settles(chat, settled), taken, choose):
            answers[i], thought = chat.reader.read(new)
            thoughts[i], unclosed[i] = thought or "", thought is not None and chat.reader.breaks_off(new)
            tokens += len(new)
            on_progress(1)
    return Capture(
        answers,
        taken.outputs,
        taken.final,
        tokens,
        taken.likely,
        taken.chances,
        thoughts=thoughts if any(thoughts) else None,
        unclosed=unclosed if any(unclosed) else None,
    )


def generate(
    chat: ChatModel,
    rows: Sequence[list[int]],
    budgets: Sequence[int],
    end: End = lambda new: None,
    taken: Taken | None = None,
    choose: Choose = greedy,
) -> Iterator[tuple[int, list[int]]]:
    """Yield `(row, its new tokens)` in the order in which rows end. What a row writes does not depend on the others.

    Args:
        rows: token ids of each prompt.
        budgets: maximum number of new tokens of each row, at least 1.
        end: takes a row's new tokens and returns how many of them count, or None to go on. A token that ends the turn
            ends the row in any case, and counts.
        taken: keeps what the pass over the prompts computes.
        choose: says which token comes next.

    Raises UsageError where an engine is to write tokens that are not the most likely ones.
    """
    ending = end_tokens(chat.model, chat.tokenizer)

    def ends(new: list[int]) -> int | None:
        return len(new) if new[-1] in ending else end(new)

    taken = taken or Taken(chat.decoder, len(rows), wanted=False)
    with at_rest(chat.model):
        if chat.engine is not None:
            if choose is not greedy:
                raise UsageError("Answers are sampled with transformers alone: leave --engine out, or --samples.")
            first = taken if taken.wanted else Taken(chat.decoder, min(CHECKED, len(rows)))
            _read(chat, rows[: first.n], first, lambda n: None)
            yield from written_by(chat.engine, chat.model, rows, budgets, sorted(ending), ends, first)
        else:
            yield from (_joining if chat.decodes() else _batch_by_batch)(chat, rows, budgets, ends, taken, choose)


def _joining(
    chat: ChatModel, rows: Sequence[list[int]], budgets: Sequence[int], end: End, taken: Taken, choose: Choose
) -> Iterator[tuple[int, list[int]]]:
    return decode(chat.model, chat.pad_id, chat.batching, rows, budgets, end, taking=taken, choose=choose)


def _batch_by_batch(
    chat: ChatModel, rows: Sequence[list[int]], budgets: Sequence[int], end: End, taken: Taken, choose: Choose
) -> Iterator[tuple[int, list[int]]]:
    lengths = [len(row) + budget for row, budget in zip(rows, budgets, strict=True)]
    # rows of a batch have the same budget, lest what one may write depend on the others
    for budget in sorted(set(budgets), reverse=True):
        work = partial(_whole_batch, chat, rows, budget, end, taken, choose)
        order = [i for i in longest_first(lengths) if budgets[i] == budget]
        for batch, written in chat.batching.over(order, lengths.__getitem__, work, decodes=True):
            yield from zip(batch, written, strict=True)


def _settles(chat: ChatModel, settled: Callable[[str], bool]) -> End:
    def end(new: list[int]) -> int | None:
        if len(new) % CHECK_EVERY:
            return None
        answer = chat.reader.so_far(new)
        return len(new) if answer is not None and settled(answer) else None

    return end


@torch.inference_mode()
def _read(chat: ChatModel, rows: Sequence[list[int]], taken: Taken, on_progress: Callable[[int], None]) -> None:
    """The pass over the prompts alone."""
    shared = read_prefix(chat.model, rows) if chat.decodes() else None
    lengths = [len(row) for row in rows]

    def work(batch: list[int]) -> None:
        with taken.watch(batch):
            logits = read_rows(chat.model, chat.pad_id, [rows[i] for i in batch], shared, below=chat.below)[:, -1]
        check_numbers(chat.model, logits)
        taken.take_logits(batch, logits)

    for batch, _ in chat.batching.over(longest_first(lengths), lengths.__getitem__, work):
        on_progress(len(batch))


@torch.inference_mode()
def _whole_batch(
    chat: ChatModel,
    rows: Sequence[list[int]],
    max_new_tokens: int,
    end: End,
    taken: Taken,
    choose: Choose,
    batch: list[int],
) -> list[list[int]]:
    """New tokens of each row of a batch, by transformers' own `generate`."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    ids, mask = chat.pad([rows[i] for i in batch])
    stop = _RowStop(ids.shape[1], len(batch), end)

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == stop.width:
            taken.take_logits(batch, scores)
        if choose is greedy:
            return scores
        tokens = torch.tensor(choose(batch, [ids.shape[1] - stop.width] * len(batch), scores), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)  # the only one for greedy search

    with taken.watch(batch), hooked([contiguous_head(chat.model)]):
        new = generate_greedily(
            chat.model,
            chat.tokenizer,
            ids,
            mask,
            max_new_tokens,
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList([note]),
        )
    return [row[:count] for row, count in zip(new.tolist(), stop.ends, strict=True)]


@dataclass
class Taken:
    """What the pass over n prompts computes at the last token of each."""

    decoder: Decoder
    n: int
    wanted: bool = True  # False keeps nothing
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))  # [S, n, d]
    final: Tensor = field(default_factory=lambda: torch.empty(0))  # [n, d]
    likely: Tensor | None = None
    chances: Tensor | None = None

    @contextmanager
    def watch(self, batch: list[int]) -> Iterator[None]:
        """Keep the sublayers' outputs of the first forward pass inside the block, over these prompts."""
        if not self.wanted:
            yield
            return
        count = len(self.decoder.sublayers)
        seen: set[int] = set()

        def take(index: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                if index in seen:
                    return
                seen.add(index)
                last = last_states(output, len(batch), self.decoder.width).detach()  # experts get a flat list of tokens
                if not self.final.numel():
                    self.outputs = torch.empty(count, self.n, last.shape[-1], dtype=last.dtype)
                    self.final = torch.empty(self.n, last.shape[-1], dtype=last.dtype)
                (self.final if index == count else self.outputs[index])[batch] = last.to("cpu", self.final.dtype)

            return hook

        modules = [s.output for s in self.decoder.sublayers] + [self.decoder.last_block]
        with hooked([module.register_forward_hook(take(i)) for i, module in enumerate(modules)]):
            yield

    def take_logits(self, batch: list[int], logits: Tensor) -> None:
        """Keep the most likely first tokens of these prompts' answers; `logits` [len(batch), V]."""
        if not self.wanted:
            return
        if self.likely is None or self.chances is None:
            k = min(LIKELY, logits.shape[1])
            self.likely, self.chances = torch.zeros(self.n, k, dtype=torch.long), torch.zeros(self.n, k)
        for start in range(0, len(batch), LOGIT_ROWS):
            part, some = batch[start : start + LOGIT_ROWS], logits[start : start + LOGIT_ROWS].float()
            top, tokens = some.topk(self.likely.shape[1])
            first = some.argmax(-1, keepdim=True)  # of equal logits the first, as greedy search takes it
            tokens = torch.where(tokens == first, tokens[:, :1], tokens)
            tokens[:, :1] = first
            self.likely[part] = tokens.cpu()
            self.chances[part] = (top - some.logsumexp(-1, keepdim=True)).exp().cpu()


class _RowStop:
    """A transformers stopping criterion for each row; `ends` says how many of each row's new tokens count."""

    def __init__(self, width: int, rows: int, end: End) -> None:
        """`end` takes a row's new tokens and returns how many of them count, or None to continue."""
        self.width, self.end = width, end
        self.ends: list[int | None] = [None] * rows

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
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
    Raises LlmvaError where logits are no numbers.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    def checked(ids: Tensor, scores: Tensor) -> Tensor:
        check_numbers(model, scores)
        return scores

    options["logits_processor"] = LogitsProcessorList([checked, *options.get("logits_processor", ())])
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
