"""What all iterations of a run share (`Context`), and where one alignment starts (`State`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.judges.base import Judge, ToTheEnd
from llmva.method.first_token import FirstTokenClassifier, predict_labels
from llmva.method.identify import Fit, Vectors, identify
from llmva.method.observe import Observation, observe
from llmva.metrics.objective import LEANS, Objective
from llmva.models.chat_model import ChatModel
from llmva.models.generate import answer_prompts
from llmva.models.harmless import Agreement, Known, agreement, outputs_on_text, random_messages
from llmva.models.thinking import Thinking
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet, draw
from llmva.prompts.types import Asked, Prompt
from llmva.settings import Settings

HARMLESS_POSITIONS = 512  # maximum number of positions of harmless texts, for the harmless metric
RANDOM_MESSAGES = 256  # messages of random tokens, for the same metric
SCALED_C = 0.3  # times C, in units of the outputs' mean squared deviation, where prompts are read
SOURCE_WEIGHT = 1.0  # of differences between sources in the metric of v_b, likewise
READ_SHARE = 0.8  # of each of these sources at most: the others show how well v_b reads what it was not fitted on
HELD_OUT = 64  # of each source at most
READ_TIMES = 2  # times per_source: prompts of each source on which v_b is fitted; to read costs no generated token
TRUST_MESSAGES = 48  # random messages on which the length of a step is measured
VectorHook = Callable[[Vectors, Observation, int], Vectors]  # vectors, training observation, iteration -> vectors
Texts = Sequence[tuple[Asked, str]]  # harmless (prompt, answer) of the untouched model


@dataclass(frozen=True)
class Context:
    """The model, the prompts, the judge and the settings of a run."""

    chat: ChatModel
    prompts: PromptSet
    judge: Judge
    settings: Settings
    objective: Objective
    sublayer_count: int  # how many sublayers the paper's alignment edits
    seed: int
    progress: Progress
    thinking: Thinking = field(default_factory=Thinking)
    vector_hook: VectorHook | None = None
    untouched: Known = field(default_factory=dict)  # what the untouched model says on harmless texts

    @property
    def predicts_labels(self) -> bool:
        """Whether an iteration may predict labels by first tokens. A prefill cannot predict reasoning."""
        return self.settings.passes > 1 and not self.thinking.any

    @property
    def svm_fit(self) -> Fit:
        """How the SVMs are fitted."""
        settings, lean = self.settings, LEANS[self.settings.prefer]
        if not self.reads:
            return Fit(settings.svm, settings.C, False, settings.harmless_weight, 0.0, lean, self.seed)
        C = SCALED_C * settings.C
        return Fit(settings.svm, C, True, settings.harmless_weight, SOURCE_WEIGHT, lean, self.seed)

    @property
    def reads(self) -> bool:
        """Whether there are prompts that are read and not answered. The paper has none, so its recipe reads none."""
        return bool(self.prompts.read) and self.settings.recipe != "paper"

    def generator(self, iteration: int, number: int = 0) -> torch.Generator:
        """A generator that depends only on seed, iteration and pass `number`, so a resumed run draws the same."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + iteration + number * 7919)

    def observe(self, prompts: Sequence[Prompt], stage: str, captures: bool = True, whole: bool = False) -> Observation:
        """Judged answers of the current model; `stage` is the text of the progress bar.

        `captures` is False if only labels are needed, `whole` true if answers are compared with gold answers.
        """
        return observe(
            self.chat,
            prompts,
            ToTheEnd(self.judge) if whole else self.judge,
            max_new_tokens=self.settings.max_new_tokens,
            thinking=self.thinking,
            on_progress=self.progress.stage(stage, len(prompts)),
            captures=captures,
        )

    def predict_labels(self, edit: Edit, prompts: Sequence[Prompt], classifier: FirstTokenClassifier) -> Observation:
        """The labels that the first token predicts for the model with `edit`, and its captures."""
        with edit.apply(self.chat.model, check=False):
            return predict_labels(self.chat, prompts, classifier)

    def read(self, edit: Edit, train: Observation, iteration: int, number: int = 0) -> Observation | None:
        """Captures of prompts that are read and not answered, for the model with `edit`; None without such.

        They are a draw of those under `prompts.read`, and of training prompts that are not in `train`: v_b needs no
        answers, so it is fitted on more prompts than are answered.
        """
        if not self.reads:
            return None
        answered = {prompt.id for prompt in train.prompts}
        rest = [prompt for prompt in self.prompts.train if prompt.id not in answered]
        more = draw(rest, (READ_TIMES - 1) * self.settings.per_source, self.generator(iteration, number))
        return self._captured(edit, [*self._drawn(iteration, number), *more])

    def held_out(self, edit: Edit, iteration: int) -> Observation | None:
        """Captures of prompts to read that are not in the first draw of the iteration; None without such."""
        if not self.reads:
            return None
        drawn = {prompt.id for prompt in self._drawn(iteration, 0)}
        rest = [prompt for prompt in self.prompts.read if prompt.id not in drawn]
        return self._captured(edit, draw(rest, HELD_OUT, self.generator(iteration, -3)))

    def _drawn(self, iteration: int, number: int) -> list[Prompt]:
        sizes = Counter(prompt.source for prompt in self.prompts.read)
        count = min(READ_TIMES * self.settings.per_source, int(READ_SHARE * min(sizes.values())))
        return draw(self.prompts.read, count, self.generator(iteration, number))

    def _captured(self, edit: Edit, prompts: list[Prompt]) -> Observation | None:
        if not prompts:
            return None
        with edit.apply(self.chat.model, check=False):
            captured = answer_prompts(self.chat, [prompt.asked for prompt in prompts], max_new_tokens=0)
        return Observation(prompts, [], captured)

    def harm(self, edit: Edit, texts: Texts, on_progress: Callable[[int], None] = lambda n: None) -> Agreement:
        """Agreement of the model with `edit` with the untouched model, on harmless texts."""
        applied = partial(edit.apply, self.chat.model, check=False)
        return agreement(self.chat, texts, applied, on_progress, known=self.untouched)

    def first_token_kl(self, before: Edit, after: Edit, iteration: int, known: Known | None = None) -> float:
        """Mean KL divergence between `before` and `after` of the first tokens of answers to random messages, in nats.

        Random messages ask for nothing, so a step should not change what follows them. `known` keeps what the model
        says with `before`.
        """
        messages = random_messages(self.chat, TRUST_MESSAGES, self.generator(iteration, -1))
        one, other = (partial(edit.apply, self.chat.model, check=False) for edit in (before, after))
        return agreement(self.chat, [(message, "") for message in messages], other, against=one, known=known).mean_kl

    def fit(
        self,
        train: Observation,
        validation: Observation,
        harmless: Tensor | None,
        iteration: int,
        read: Observation | None = None,
        benign: Vectors | None = None,
    ) -> Vectors:
        """Both vectors of every sublayer, in the metric of the outputs `harmless` [S, q, d]; None means M = I.

        `read` are prompts without answers, on which benign vectors are fitted too; `benign` gives these instead.
        """
        vectors = identify(train, validation, read=read, harmless=harmless, fit=self.svm_fit, benign=benign)
        return self.vector_hook(vectors, train, iteration - 1) if self.vector_hook else vectors

    def harmless_outputs(self, edit: Edit, texts: Texts, iteration: int) -> Tensor | None:
        """Outputs of the sublayers at harmless positions, [S, q, d]: ends of random messages, and harmless text.

        None if the settings give harmless text no weight, or fit with scikit-learn.
        """
        if self.settings.harmless_weight == 0 or self.settings.svm != "exact":
            return None
        generator = self.generator(iteration - 1)
        messages = random_messages(self.chat, RANDOM_MESSAGES, generator)
        with edit.apply(self.chat.model, check=False):
            ends = answer_prompts(self.chat, messages, max_new_tokens=0).outputs
            if not texts:
                return ends
            return torch.cat([ends, outputs_on_text(self.chat, texts, HARMLESS_POSITIONS, generator)], 1)


@dataclass(frozen=True)
class State:
    """Where the next alignment starts: an edit, and the observations of the model with it."""

    edit: Edit
    iteration: int  # the observed one
    train: Observation
    validation: Observation
    classifier: FirstTokenClassifier
    agreement: float  # share of validation labels that the classifier predicted before it learnt them
    texts: Texts  # harmless texts of the training split
