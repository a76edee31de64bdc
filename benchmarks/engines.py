"""The same prompts answered by transformers and by vLLM, in turns in one run: throughput, and how many answers agree.

    python benchmarks/engines.py MODEL [--prompts 100] [--max-new-tokens 40] [--rounds 2] [--dtype auto] [--edited]
                                 [--engines transformers vllm:merged vllm:lora]

Answers are greedy and end at the end token or after the maximum, never because a judge's label is settled. With
--edited every second sublayer has a small random edit, and how long an engine takes to get it is given apart. Starting
an engine and its first answers are not timed. Captures are not read, except in the line "with captures", which is what
an iteration of align costs. Engines run one after the other, each in a process that has ended before the next begins.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import torch

import llmva
from llmva.cli.inputs import demo_model, quiet_libraries
from llmva.edit import Edit
from llmva.models.chat_model import ChatModel
from llmva.models.engines.choose import make_engine
from llmva.models.generate import answer_prompts, generate

SIZE = 0.05  # of the random edit, beside the identity


def random_edit(chat: ChatModel, columns: int = 4) -> Edit:
    generator, edit = torch.Generator().manual_seed(0), Edit()
    for name in chat.decoder.names[::2]:
        for iteration in range(1, columns + 1):
            v, u = torch.randn(2, chat.model.config.get_text_config().hidden_size, generator=generator)
            edit = edit.then(name, SIZE * v / v.norm(), u / u.norm(), iteration)
    return edit


def answers(chat: ChatModel, rows: list[list[int]], tokens: int) -> list[list[int]]:
    return [new for _, new in sorted(generate(chat, rows, [tokens] * len(rows)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(demo_model()))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--edited", action="store_true")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    args = parser.parse_args()
    quiet_libraries(args.model)
    model, tokenizer = llmva.load_model(args.model, dtype=args.dtype)
    prompts = llmva.PromptSet.bundled()
    texts = [p.text for p in [*prompts.train, *prompts.validation, *prompts.test]][: args.prompts]
    own = ChatModel.of(model, tokenizer)
    rows, edit = own.rows(texts), random_edit(own)
    read = sum(map(len, rows))
    print(
        f"{args.model}: {len(rows)} prompts of {read} tokens, {str(model.dtype)[6:]}, {torch.get_num_threads()} threads"
    )
    first: dict[str, Any] = {}
    for number in range(1, args.rounds + 1):
        for name in args.engines:
            started = time.perf_counter()
            with closing(replace(own, engine=make_engine(name, model))) as chat:
                answers(chat, rows[:2], 2)
                ready = time.perf_counter() - started
                with edit.apply(model, check=False) if args.edited else nullcontext():
                    started = time.perf_counter()
                    answers(chat, rows[:2], 2)
                    given = time.perf_counter() - started
                    started = time.perf_counter()
                    new = answers(chat, rows, args.max_new_tokens)
                    seconds = time.perf_counter() - started
                    started = time.perf_counter()
                    answer_prompts(chat, texts, max_new_tokens=args.max_new_tokens)
                    captured = time.perf_counter() - started
            count = sum(map(len, new))
            same = sum(a == b for a, b in zip(new, first.setdefault("new", new), strict=True))
            print(
                f"round {number}  {name:13} {seconds:7.1f} s  {count / seconds:7.1f} new tokens/s  {count} new tokens  "
                f"{same} of {len(new)} answers as the first engine's; ready in {ready:.1f} s, two prompts with the "
                f"edit {given:.1f} s, with captures {captured:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
