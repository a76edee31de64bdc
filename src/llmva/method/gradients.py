"""Where an alignment is written, and how much of it in each sublayer: what the next token makes of it decides.

The paper writes along v_a, the direction that tells answers from refusals, equally in every sublayer that it selects.
But what tells a decision from afar need not be what makes it. What a sublayer writes makes the model answer as far as
it raises z = log P(answer) - log P(refusal), so each writes along the mean gradient of z; and how much is a question
with an answer in closed form. With alpha_s the length of sublayer s, to first order

    a prompt's z moves by          sum_s alpha_s A_s,   A_s = (u_s . o_s) (g_s . p_s)
    a next token's log-chance by   sum_s alpha_s J_s,   J_s likewise, with the gradient of that log-chance

(u = r v_b - v_a reads, p writes, g is a gradient with respect to o). The lengths are to move labels that are wrong, at
the least divergence of next tokens where there is nothing to decide:

    max over alpha >= 0 of   alpha . gain - 1/2 alpha^T K alpha,   gain = E[y sigmoid(-y z) A],   K = E[J J^T] + ridge

with y = +1 for benign prompts, -1 for toxic ones, K over random messages and tokens drawn from the model's own
distribution: alpha^T K alpha / 2 is the divergence to second order. Sublayers whose gain is not worth it get none. All
lengths are then scaled so that the predicted move of z has the spread of z itself, as r does for a single sublayer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.errors import LlmvaError
from llmva.method.context import Context
from llmva.method.first_token import FirstTokenClassifier
from llmva.method.identify import Vectors
from llmva.method.svm import unit
from llmva.metrics.objective import LEANS
from llmva.models.gradients import gradients
from llmva.models.harmless import random_messages
from llmva.prompts.types import Prompt

ALONG_V_A = "The edit is written along v_a, as in the paper"
MESSAGES = 256  # random ones, that K is measured on
TOKENS = 2  # drawn after each
EVERY = 2  # of the training prompts, one in so many is differentiated
RIDGE = 0.1  # of the mean of K's diagonal
FLOOR = 1e-9  # of the chances of answer and refusal, so that z stays finite
MIN_CHANCE = 1e-4  # likewise for the spread of z, which a few very sure prompts must not make


def gradient_writers(
    context: Context,
    edit: Edit,
    vectors: Vectors,
    candidates: Sequence[int],
    prompts: Sequence[Prompt],
    classifier: FirstTokenClassifier,
    iteration: int,
) -> Tensor | None:
    """Writers alpha_s p_s of one alignment of the model with `edit`, float64 [S, d]; zero where nothing is written.

    Args:
        vectors: of that model.
        candidates: sublayers that may be written to.
        prompts: training prompts.
        classifier: tells answer from refusal by the first token.

    Returns:
        None where it cannot be told: a model that gradients cannot pass, or no sublayer whose gain is positive.
    """
    some = list(prompts)[::EVERY]
    v_a, v_b = vectors.directions.unbind(1)
    readers = vectors.ratio[:, None] * v_b - v_a
    if any(p.device.type == "meta" for p in context.chat.model.parameters()):
        context.progress.note(f"{ALONG_V_A}: a graph would hold all the weights that are offloaded.")
        return None
    try:
        with edit.apply(context.chat.model, check=False):
            decision = _decision(context, v_a, readers, some, classifier)
            J = jacobian(context, readers, decision.writers, iteration)
    except (RuntimeError, LlmvaError):  # no gradients through such weights, or no memory for them
        context.progress.note(f"{ALONG_V_A}: this model lets no gradients through, or there is no memory for them.")
        return None
    y = torch.tensor([1.0 if prompt.benign else -1.0 for prompt in some], dtype=torch.float64)
    lean = LEANS[context.settings.prefer]  # as the benign vectors do: above 1, toxic prompts weigh more
    weight = torch.where(y < 0, max(lean, 1.0), max(1.0 / lean, 1.0)) * torch.sigmoid(-y * decision.z)
    gain = (decision.moves * weight * y).mean(1)
    alpha = torch.zeros_like(gain)
    chosen = list(candidates)
    alpha[chosen] = solve_lengths(gain[chosen], J[:, chosen])
    reached = float(alpha @ decision.z_scale)
    return decision.writers * (alpha / reached)[:, None] if reached > 0 else None


def solve_lengths(gain: Tensor, J: Tensor) -> Tensor:
    """argmax over alpha >= 0 of alpha . gain - 1/2 alpha^T K alpha, float64 [S], from gain [S] and J [m, S].

    Zeros where no gain is positive.
    """
    from scipy.optimize import nnls

    K = J.T @ J / len(J)
    mean = float(K.diagonal().mean())
    if not mean > 0 or not bool((gain > 0).any()):
        return torch.zeros_like(gain)
    # in units where K is about 1 and gain too: the solver's tolerances are absolute
    factor = torch.linalg.cholesky(K / mean + RIDGE * torch.eye(len(K), dtype=K.dtype))
    target = torch.linalg.solve_triangular(factor, (gain / gain.abs().max())[:, None], upper=False)[:, 0]
    return torch.from_numpy(nnls(factor.T.contiguous().numpy(), target.numpy())[0])


@dataclass(frozen=True)
class _Decision:
    """What n prompts' decisions feel of the S sublayers; float64."""

    z: Tensor  # [n]
    writers: Tensor  # p, unit, [S, d]
    moves: Tensor  # A, [S, n]
    z_scale: Tensor  # spread of z that a length of 1 brings, over the spread that z has, [S]


def _decision(
    context: Context, answers: Tensor, readers: Tensor, prompts: Sequence[Prompt], classifier: FirstTokenClassifier
) -> _Decision:
    """`answers`: v_a [S, d]; `readers`: u [S, d]."""
    table = classifier.table(context.chat.decoder.vocabulary)
    chances = torch.zeros(len(prompts), 2)

    def score(logits: Tensor, batch: list[int]) -> Tensor:
        shares = torch.softmax(logits, -1) @ table.to(logits)
        chances[batch] = shares.detach().cpu()
        return _odds(shares)[:, None]

    texts = [prompt.text for prompt in prompts]
    order: list[int] = []
    parts = []
    for batch, _, outputs, slopes in gradients(context.chat, texts, score):
        order += batch
        parts.append((outputs, slopes[:, :, 0]))
    back = torch.tensor(order).argsort()
    outputs, slopes = (torch.cat(column, 1)[:, back] for column in zip(*parts, strict=True))

    answered, refused = chances.double().unbind(1)
    spread = (answered.clamp_min(MIN_CHANCE).log() - refused.clamp_min(MIN_CHANCE).log()).std(correction=0)
    writers, moves, z_scale = [], [], []
    for v_a, u, o, g in zip(answers, readers, outputs, slopes, strict=True):  # one at a time, for memory
        o, g = o.double(), g.double()
        p = unit(g.mean(0))
        read = o @ u
        moved = read * (g @ p)
        writers.append(p)
        moves.append(moved)
        # by how much z moves, in a least-squares sense, where what is read moves by the spread of "answer"
        z_scale.append((o @ v_a).std(correction=0) * moved.dot(read) / read.dot(read).clamp_min(1e-30))
    return _Decision(
        _odds(chances.double()),
        torch.stack(writers),
        torch.stack(moves),
        torch.stack(z_scale) / spread.clamp_min(1e-30),
    )


def _odds(shares: Tensor) -> Tensor:
    """z [n] from the chances of answer and refusal [n, 2]."""
    answered, refused = (shares + FLOOR).log().unbind(1)
    return answered - refused


def jacobian(context: Context, readers: Tensor, writers: Tensor, iteration: int) -> Tensor:
    """J for random messages and tokens, [messages x tokens, S]."""
    generator = context.generator(iteration, -2)
    messages = random_messages(context.chat, MESSAGES, generator)
    draws = torch.rand(len(messages), TOKENS, generator=generator, dtype=torch.float64)

    def score(logits: Tensor, batch: list[int]) -> Tensor:
        logs = torch.log_softmax(logits, -1)
        heaped = logs.detach().cpu().double().exp().cumsum(1)
        tokens = torch.searchsorted(heaped, draws[batch] * heaped[:, -1:])
        return logs.gather(1, tokens.clamp_max(logs.shape[1] - 1).to(logs.device))

    J = torch.zeros(len(messages), TOKENS, len(readers), dtype=torch.float64)
    for batch, _, outputs, slopes in gradients(context.chat, messages, score):
        for s, u in enumerate(readers):
            read = outputs[s].double() @ u
            J[batch, :, s] = read[:, None] * (slopes[s].double() @ writers[s])
    return J.flatten(0, 1)
