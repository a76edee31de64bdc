"""Train the organism from scratch: loss on completions only, a cosine schedule. Deterministic on one machine."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from llmva.errors import UsageError
from llmva.organism.language import KINDS, answer, draw_request, refuses
from llmva.organism.optimizer import Muon, block_matrices
from llmva.organism.skills import draw_probe
from llmva.organism.tokenizer import build_tokenizer, vocabulary

# model_type -> what its config needs in addition to the sizes; all have `model.layers` and a plain `lm_head`
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "olmo2": {},
    "gemma2": {"final_logit_softcapping": None, "attn_logit_softcapping": None, "sliding_window": 256},
}


@dataclass(frozen=True)
class Recipe:
    """Size and training of the organism; the defaults are the shipped ones."""

    architecture: str = "llama"  # of ARCHITECTURES
    width: int = 160
    blocks: int = 4
    heads: int = 4
    hidden: int = 448
    steps: int = 600
    batch: int = 128
    parts: int = 4
    rate: float = 2e-3
    warmup: int = 40
    decay: float = 0.1
    shares: tuple[tuple[str, float], ...] = (
        ("chat", 0.42),
        ("safe", 0.28),
        ("repeat", 0.14),
        ("sum", 0.11),
        ("opposite", 0.05),
    )


def draw_example(rng: random.Random, recipe: Recipe) -> tuple[str, str]:
    """One (prompt, completion) of the training text."""
    names, weights = zip(*recipe.shares, strict=True)
    skill = rng.choices(names, weights)[0]
    if skill != "chat":
        probe = draw_probe(skill, rng, held=False)
        return probe.prompt, probe.expected
    kind = rng.choice(KINDS)
    # Harmless requests come in wrappers too, or a wrapper alone would mark harm.
    wrapped = True if kind in ("alarming", "plain") and rng.random() < 0.3 else None
    request = draw_request(kind, "pretrain", rng, wrapped)
    return request.text, answer(request, refuses(request, rng))


def draw_batch(rng: random.Random, recipe: Recipe, vocab: dict[str, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch in `recipe.parts` parts of similar length, which wastes less on padding: token ids and labels, each
    [rows, longest of the part]; labels are -100 where there is no loss."""
    rows = []
    for _ in range(recipe.batch):
        prompt, completion = draw_example(rng, recipe)
        head = [vocab[w] for w in ("<bos>", "<user>", *prompt.split(), "<assistant>")]
        rows.append((head, [vocab[w] for w in (*completion.split(), "<eos>")]))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    batch = []
    for start in range(0, recipe.batch, size := -(-recipe.batch // recipe.parts)):
        part = rows[start : start + size]
        longest = len(part[-1][0]) + len(part[-1][1])
        ids = torch.full((len(part), longest), vocab["<pad>"])
        labels = torch.full((len(part), longest), -100)
        for i, (head, tail) in enumerate(part):
            ids[i, : len(head) + len(tail)] = torch.tensor(head + tail)
            labels[i, len(head) : len(head) + len(tail)] = torch.tensor(tail)
        batch.append((ids, labels))
    return batch


def build_model(recipe: Recipe, seed: int) -> Any:
    """An untrained model; the global random state is left as it was. Raises UsageError for an unknown architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if recipe.architecture not in ARCHITECTURES:
        raise UsageError(f"There is no organism of {recipe.architecture!r}: choose {', '.join(ARCHITECTURES)}.")
    vocab, head = vocabulary(), recipe.width // recipe.heads
    config = AutoConfig.for_model(
        recipe.architecture,
        vocab_size=len(vocab),
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=vocab["<bos>"],
        eos_token_id=vocab["<eos>"],
        pad_token_id=vocab["<pad>"],
        **({} if recipe.architecture == "llama" else {"head_dim": head, "attention_dropout": 0.0}),
        **ARCHITECTURES[recipe.architecture],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    settings: Any = GenerationConfig
    model.generation_config = settings(
        do_sample=False, bos_token_id=vocab["<bos>"], eos_token_id=vocab["<eos>"], pad_token_id=vocab["<pad>"]
    )
    return model


def train(recipe: Recipe, seed: int, say: Callable[[str], None] = print) -> tuple[Any, Any]:
    """Train and return (model, tokenizer). The same seed gives the same bytes on the same machine and thread count."""
    vocab, rng = vocabulary(), random.Random(seed)
    model = build_model(recipe, seed).train()
    inside, rest = block_matrices(model.named_parameters())
    muon = Muon(inside, decay=recipe.decay)
    adam = torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.decay)
    started, mean = time.monotonic(), 0.0
    for step in range(recipe.steps):
        done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        factor = (step + 1) / recipe.warmup if done < 0 else 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
        for group in adam.param_groups:
            group["lr"] = recipe.rate * factor
        parts = draw_batch(rng, recipe, vocab)
        asked = sum(int((labels != -100).sum()) for _, labels in parts)
        model.zero_grad(set_to_none=True)
        loss = 0.0
        for ids, labels in parts:
            # Right padding needs no mask: causal attention never looks at what comes after.
            hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
            learned = labels[:, 1:] != -100
            share = cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned], reduction="sum") / asked
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        muon.step(recipe.rate * factor)
        mean = loss if step == 0 else 0.95 * mean + 0.05 * loss
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            say(f"step {step + 1}/{recipe.steps}  loss {mean:.4f}  {time.monotonic() - started:.0f} s")
    return model.eval(), build_tokenizer()
