"""What every iteration of a run works with: the model, the prompts, the settings, and what they are used for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.method.first_token import FirstTokenClassifier, predict_labels
from llmva.method.identify import Vectors, identify
from llmva.method.observe import Observation
from llmva.metrics.objective import LEANS, Objective
from llmva.models.batching import Batching
from llmva.models.generate import capture
from llmva.models.harmless import Agreement, agreement, outputs_on_text, random_messages
from llmva.models.sublayers import Decoder
from llmva.models.thinking import Thinking
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt
from llmva.settings import Settings

HARMLESS_POSITIONS = 512  # of harmless texts, for the quiet readers
RANDOM_MESSAGES = 256  # likewise
TRUST_MESSAGES = 48  # that the length of a step is measured on
VectorHook = Callable[[Vectors, Observation, int], Vectors]  # of the vectors, the training prompts and the iteration


@dataclass(frozen=True)
class Context:
    """What every iteration of a run works with."""

    decoder: Decoder
    tokenizer: Any
    prompts: PromptSet
    settings: Settings
    objective: Objective
    count: int  # sublayers edited in a pass
    seed: int
    batching: Batching
    progress: Progress
    change: VectorHook | None = None
    thinking: Thinking | None = None

    def generator(self, iteration: int, number: int = 0) -> torch.Generator:
        """Draws depend on seed, iteration and pass alone, so a resumed run makes the same ones."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + iteration + number * 7919)

    def predict_labels(self, edit: Edit, prompts: Sequence[Prompt], classifier: FirstTokenClassifier) -> Observation:
        """What the model with `edit` would do."""
        with edit.apply(self.decoder.model, check=False):
            return predict_labels(self.decoder, self.tokenizer, prompts, classifier, self.batching)

    def harm(
        self, edit: Edit, texts: Sequence[tuple[str, str]], on_progress: Callable[[int], None] = lambda n: None
    ) -> Agreement:
        """What `edit` does to harmless (prompt, answer) texts."""
        applied = partial(edit.apply, self.decoder.model, check=False)
        return agreement(self.decoder, self.tokenizer, texts, applied, self.batching, on_progress)

    def first_token_kl(self, before: Edit, after: Edit, iteration: int) -> float:
        """How far `after` moves the model from `before` where nothing is to be decided.

        The KL divergence of the first tokens of answers to random messages, in nats.
        """
        messages = random_messages(self.tokenizer, TRUST_MESSAGES, self.generator(iteration, -1))
        one, other = (partial(edit.apply, self.decoder.model, check=False) for edit in (before, after))
        texts = [(message, "") for message in messages]
        return agreement(self.decoder, self.tokenizer, texts, other, self.batching, against=one).mean_kl


def fit(
    context: Context, train: Observation, validation: Observation, harmless: Tensor | None, iteration: int
) -> Vectors:
    """Both vectors of every sublayer, with readers that are quiet on harmless text."""
    settings = context.settings
    vectors = identify(
        train,
        validation,
        harmless=harmless,
        harmless_weight=settings.harmless_weight,
        svm=settings.svm,
        C=settings.C,
        lean=LEANS[settings.prefer],
        seed=context.seed,
    )
    return context.change(vectors, train, iteration - 1) if context.change else vectors


def harmless_outputs(context: Context, edit: Edit, texts: Sequence[tuple[str, str]], iteration: int) -> Tensor | None:
    """Sublayers' outputs where nothing is to be decided, [S, q, d]: ends of random messages, and harmless text.

    None where the settings ask for no quiet readers.
    """
    if context.settings.harmless_weight == 0 or context.settings.svm != "exact":
        return None
    generator = context.generator(iteration - 1)
    messages = random_messages(context.tokenizer, RANDOM_MESSAGES, generator)
    with edit.apply(context.decoder.model, check=False):
        found = capture(
            context.decoder, context.tokenizer, messages, max_new_tokens=0, batching=context.batching
        ).outputs
        if not texts:
            return found
        said = outputs_on_text(
            context.decoder, context.tokenizer, texts, HARMLESS_POSITIONS, generator, context.batching
        )
    return torch.cat([found, said], 1)
