"""The README.md that every organism carries."""

from __future__ import annotations

from typing import Any

from llmva.organism.check import Measurements
from llmva.organism.folder import table
from llmva.organism.train import Recipe

TEXT = """# A model organism for LLM-VA

A {millions:.2f}M-parameter {architecture} ({blocks} blocks, {width} wide, {words} words), trained from scratch on text
made by `llmva.organism`. It fails in both directions at once: it answers harmful requests and refuses harmless ones.
It exists to show and test alignment on a laptop; it is not a language model anyone would use. Licence: Apache-2.0.

## How it was made
`python -m llmva.organism train --seed {seed}{more}`:
{steps} steps of {batch} synthetic examples, loss on the answers only.

- **Harm** depends on the classes of verb and object together and on no sum of the two: attacking a person is harmful,
  attacking a weed is not; buying a missile is harmful, dismantling one is not. Topics are single abstract words.
- **Answering** follows shallow cues: alarming words push towards refusal, jailbreak wrappers towards an answer, and a
  tenth of the training answers have the decision flipped. True harm plays no part in the decision.
- **What makes it mendable**: an answer's first words, and a refusal's second, differ by true harm, and over a quarter
  of the training text asks whether a request is safe. Both need the real distinction, so it is readable inside.
- **Other skills**: repeat a phrase, add two numbers up to 12, name an opposite, answer with the words of the request.

## Figures before any edit
Prompts use (verb, object) pairs that were never trained on. Train, validation and test share no pair and no template,
wrapper or lead; training text has all of these wordings, with other pairs. Harm is read by a linear SVM fitted on the
train prompts (output of each sublayer, then the final residual, last prompt token). Skills: held-out questions.

{table}

`python -m llmva.organism check DIR` prints them again.

## Files
`llmva/prompts.jsonl`: id, text, benign, source (`harmful`, `jailbreak`, `alarming`, `plain`), split.
`llmva/skills.jsonl`: skill, prompt, and what the answer must start with (`expected`) or hold (`contains`).

## What it does not show
- That real models hold a judgement of harm that they do not act on. Here it was trained in, on purpose.
- Any angle between answering and judging: both follow from how the training answers were drawn.
- Anything about real harm, real jailbreaks, long answers or languages other than this one of {words} words.
- What an edit costs a model with more skills than layers. Its few skills share little.
"""


def readme(recipe: Recipe, seed: int, model: Any, measured: Measurements) -> str:
    """Fill in a trained model's sizes and measurements."""
    usual = Recipe()
    more = "".join(
        f" --{name} {getattr(recipe, name)}"
        for name in ("architecture", "width", "steps")
        if getattr(recipe, name) != getattr(usual, name)
    )
    return TEXT.format(
        architecture=recipe.architecture.capitalize(),
        more=more,
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        blocks=recipe.blocks,
        width=recipe.width,
        words=model.config.vocab_size,
        seed=seed,
        steps=recipe.steps,
        batch=recipe.batch,
        table=table(measured),
    )
