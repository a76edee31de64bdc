"""Harmless text: how an edit changes its next tokens, and the sublayers' outputs on it.

The text is the model's own answers to benign prompts before any edit. So it fits any model and any language, and
nothing has to be downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmva.errors import LlmvaError
from llmva.models.at_rest import reads_model
from llmva.models.batching import Batching, longest_first
from llmva.models.chat import decode, forward_inputs
from llmva.models.chat_model import ChatModel
from llmva.models.finding.tensors import first_tensor, hooked
from llmva.models.forward import run_forward
from llmva.models.reading.below import Below
from llmva.models.reading.cache import Prefix, read_prefix
from llmva.models.reading.rows import read_rows
from llmva.prompts.types import Asked

MAX_ANSWER = 48  # maximum number of compared tokens of an answer
MAX_LOGIT_BYTES = 64 * 2**20
KEPT_TOKENS = 1024  # most likely tokens of the original model that are kept at each position; the rest counts as one
TINY = 1e-30
MAX_RATIO = 1e12  # maximum ratio of perplexities; it would be infinite if the edited model excludes a token


@dataclass(frozen=True)
class Agreement:
    """The edited and the original model compared along the original's answers (teacher forcing); one entry per text."""

    kept: list[float]  # share of positions whose most likely next token is the same, up to rounding
    kl: list[float]  # mean KL divergence of the edited from the original distribution, in nats
    rise: list[float]  # of the negative log-likelihood of the text's tokens, summed over them, in nats
    tokens: list[int]  # number of tokens of the answer

    def as_record(self) -> dict[str, float | None]:
        """`kept`, `kl` in nats and `perplexity`, a ratio, as in run.json; all None if there was no text."""
        if not self.kept:
            return dict.fromkeys(("kept", "kl", "perplexity"))
        return {"kept": self.mean_kept, "kl": self.mean_kl, "perplexity": self.perplexity_ratio}

    @property
    def mean_kept(self) -> float:
        return sum(self.kept) / max(1, len(self.kept))

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / max(1, len(self.kl))

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the texts under the edited model divided by that under the original; at most MAX_RATIO."""
        mean = sum(self.rise) / max(1, sum(self.tokens))
        return math.exp(min(mean, math.log(MAX_RATIO)))


@dataclass(frozen=True)
class Original:
    """The original model's next tokens at the positions of a text: at those of its answer, and after it."""

    best: Tensor  # most likely token, int64 [answer + 1]
    said: Tensor  # log-probability of the answer's tokens, [answer]
    tokens: Tensor  # the most likely ones, int64 [answer + 1, k]
    logs: Tensor  # their log-probabilities, float32 [answer + 1, k]


Known = dict[tuple[Asked, str], Original]


@reads_model
def agreement(
    chat: ChatModel,
    texts: Sequence[tuple[Asked, str]],
    applied: Callable[[], AbstractContextManager[Any]],
    on_progress: Callable[[int], None] = lambda n: None,
    against: Callable[[], AbstractContextManager[Any]] = nullcontext,
    known: Known | None = None,
) -> Agreement:
    """Compare next tokens along each `(prompt, answer)` with and without an edit or other hooks.

    `applied()` is a context in which the hooks are on the model; outside they must not be. `against` is the same for
    the model to compare with, by default the untouched one; what it says is looked up in `known`, and kept there, so a
    caller gives the same dict as long as it compares with the same model. An empty answer compares only the first
    token.
    """
    known = {} if known is None else known
    pairs = [_tokens(chat, prompt, answer) for prompt, answer in texts]
    rows_compared = [(0.0, 0.0, 0.0)] * len(pairs)
    asked = [prompt for prompt, _ in pairs]
    missing = [i for i, text in enumerate(texts) if text not in known]
    # logits of all compared positions are held at once: a row counts by its tokens, or by its share of these positions
    positions = max(1, MAX_LOGIT_BYTES // (chat.model.dtype.itemsize * chat.decoder.vocabulary))
    small = Batching(chat.batching.tokens, alone_above=chat.batching.alone_above)
    lengths = [
        max(len(prompt) + len(answer), math.ceil((len(answer) + 1) * small.tokens / positions))
        for prompt, answer in pairs
    ]

    def look(batch: list[int]) -> list[Original]:
        rows = [pairs[i] for i in batch]
        return [_original(logs, row[1]) for (logs, _), row in zip(_logs(chat, rows, shared), rows, strict=True)]

    def compare(batch: list[int]) -> list[tuple[float, float, float]]:
        rows = [pairs[i] for i in batch]
        return [
            _compare(known[texts[i]], logs, row[1], rounding)
            for i, (logs, rounding), row in zip(batch, _logs(chat, rows, shared, chat.below), rows, strict=True)
        ]

    def by_length(of: Sequence[int]) -> list[int]:
        return [of[k] for k in longest_first([lengths[i] for i in of])]

    with against():
        shared = read_prefix(chat.model, asked) if missing and chat.decodes() else None
        for batch, originals in small.over(by_length(missing), lengths.__getitem__, look):
            known.update(zip([texts[i] for i in batch], originals, strict=True))
    with applied():
        shared = read_prefix(chat.model, asked) if pairs and chat.decodes() else None
        for batch, results in small.over(by_length(range(len(pairs))), lengths.__getitem__, compare):
            for i, result in zip(batch, results, strict=True):
                rows_compared[i] = result
            on_progress(len(batch))
    kept, kl, rise = ([result[column] for result in rows_compared] for column in range(3))
    return Agreement(kept, kl, rise, [len(answer) for _, answer in pairs])


@reads_model
@torch.inference_mode()
def outputs_on_text(
    chat: ChatModel, texts: Sequence[tuple[Asked, str]], limit: int, generator: torch.Generator
) -> Tensor:
    """Sublayers' outputs [S, q, d] at up to `limit` random positions of `(prompt, answer)` texts, in the model's dtype.

    The last prompt token is left out, because the decision is made and the edit should act there.
    """
    pairs = [_tokens(chat, prompt, answer) for prompt, answer in texts]
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    places = [(i, t) for i, (p, _) in enumerate(pairs) for t in range(lengths[i]) if t != len(p) - 1]
    chosen = torch.randperm(len(places), generator=generator)[:limit].tolist()
    wanted: dict[int, list[int]] = {}
    for k in sorted(chosen):
        wanted.setdefault(places[k][0], []).append(places[k][1])
    parts: dict[int, Tensor] = {}

    def work(batch: list[int]) -> dict[int, Tensor]:
        rows = [[*pairs[i][0], *pairs[i][1]] for i in batch]
        ids, mask = chat.pad(rows)
        shifts = [ids.shape[1] - len(row) for row in rows]
        columns = [[shift + t for t in wanted.get(i, [])] for i, shift in zip(batch, shifts, strict=True)]
        taken: dict[int, Tensor] = {}

        def take(index: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                o = first_tensor(output).reshape(*ids.shape, -1)
                taken[index] = torch.cat([o[b, c] for b, c in enumerate(columns)]).cpu()

            return hook

        handles = [s.output.register_forward_hook(take(i)) for i, s in enumerate(chat.decoder.sublayers)]
        with hooked(handles):
            run_forward(chat.model, forward_inputs(chat.model, ids, mask), keep=1)
        stacked = torch.stack([taken[i] for i in range(len(taken))])  # [S, positions of this batch, d]
        return dict(zip(batch, torch.split(stacked, [len(c) for c in columns], 1), strict=True))

    for _, batch_parts in chat.batching.over(longest_first(lengths), lengths.__getitem__, work):
        parts.update(batch_parts)
    return torch.cat([parts[i] for i in range(len(pairs))], 1)


def random_messages(chat: ChatModel, count: int, generator: torch.Generator) -> list[str]:
    """User messages of 3 to 14 random tokens of the vocabulary, which ask for nothing.

    No decision about harm is made on them, in any language. So they show the harmless metric what vectors should ignore
    without examples of any skill.
    """
    tokenizer, known = chat.tokenizer, int(chat.model.get_input_embeddings().weight.shape[0])
    special = set(tokenizer.all_special_ids)
    # a tokenizer may have more tokens than the model has embeddings of
    ids = torch.tensor([i for i in range(min(len(tokenizer), known)) if i not in special])
    messages = []
    for _ in range(count):
        length = int(torch.randint(3, 15, (), generator=generator))
        picks = ids[torch.randint(len(ids), (length,), generator=generator)]
        messages.append(decode(tokenizer, picks.tolist()).strip() or "?")
    return messages


def _tokens(chat: ChatModel, prompt: Asked, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of the rendered prompt, and of the first MAX_ANSWER tokens of the answer."""
    return chat.row(prompt), chat.tokenizer(answer, add_special_tokens=False)["input_ids"][:MAX_ANSWER]


@torch.inference_mode()
def _logs(
    chat: ChatModel, rows: list[tuple[list[int], list[int]]], shared: Prefix | None, below: Below | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each row, at the positions that predict its answer and the next token: log-probabilities, and rounding.

    [answer + 1, V] and [answer + 1]. The rounding is that of the most likely token's logit in the model's dtype: two
    tokens that are no further apart are as likely. In bfloat16 that is .125 for a logit of 16. Rows come one by one,
    because in float32 those of a batch would take several times the memory of its logits.
    """
    keep = max(len(a) for _, a in rows) + 1
    logits = read_rows(chat.model, chat.pad_id, [[*p, *a] for p, a in rows], shared, keep, below)
    eps = torch.finfo(chat.model.dtype).eps
    for i, (_, answer) in enumerate(rows):
        own = logits[i, keep - len(answer) - 1 :].float()
        yield torch.log_softmax(own, -1), eps * own.amax(-1).abs()


def _original(logs: Tensor, answer: list[int]) -> Original:
    top, tokens = logs.topk(min(KEPT_TOKENS, logs.shape[1]))
    return Original(logs.argmax(-1), _said(logs, answer), tokens, top)


def _said(logs: Tensor, answer: list[int]) -> Tensor:
    tokens = torch.tensor(answer, device=logs.device, dtype=torch.long)[:, None]
    return logs[:-1].gather(1, tokens).double()


def _compare(original: Original, edited: Tensor, answer: list[int], rounding: Tensor) -> tuple[float, float, float]:
    """Share of next tokens kept, mean KL divergence, and the rise of the answer's negative log-likelihood.

    A token is kept if no other is more likely by more than `rounding` [answer + 1]. The tokens that the original
    hardly ever says count as one.
    """
    own = edited.gather(1, original.best[:, None])[:, 0]
    same = (own >= edited.amax(-1) - rounding).double().mean()
    there = edited.gather(1, original.tokens)
    terms = _divergence(original.logs, there)
    if original.logs.shape[1] < edited.shape[1]:
        rest, other = ((1.0 - logs.double().exp().sum(-1)).clamp_min(0.0) for logs in (original.logs, there))
        terms = torch.cat([terms, _divergence(rest.log(), other.clamp_min(TINY).log())[:, None]], 1)
    kl = terms.double().sum(-1).mean()
    if not kl.isfinite():
        raise LlmvaError("The model's logits overflow: pass --dtype bfloat16 or float32, or a smaller --step.")
    said = original.said
    rises = said - _said(edited, answer)
    rise = torch.where(said.isinf(), 0.0, rises).sum()  # tokens that the original excludes cannot become less likely
    return float(same), float(kl), float(rise)


def _divergence(original: Tensor, edited: Tensor) -> Tensor:
    p = original.exp()
    return torch.where(p == 0, 0.0, p * (original - edited))  # some models exclude tokens, at minus infinity
