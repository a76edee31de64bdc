"""Gradient writers: along which direction an alignment is written, and with which length in each sublayer.

The paper writes along v_a, with equal strength in every selected sublayer. But v_a separates answers from refusals; it
need not cause them. A sublayer's output makes the model answer if it raises z = log P(answer) - log P(refusal). So each
sublayer writes along p, the mean gradient of z, and the lengths have a closed form. With alpha_s the length in
sublayer s, to first order

    z of a prompt moves by                      sum_s alpha_s A_s,   A_s = (u_s . o_s) (g_s . p_s)
    the log-probability of a next token by      sum_s alpha_s J_s,   J_s likewise, with the gradient of that

(u = r v_b - v_a is the reader, p the writer, g a gradient with respect to o). The lengths should correct wrong labels
with little divergence of next tokens on random messages, where nothing has to be decided:

    max over alpha >= 0 of   alpha . gain - 1/2 alpha^T K alpha,   gain = E[y sigmoid(-y z) A],   K = E[J J^T] + ridge

with y = +1 for benign prompts and -1 for toxic ones. K is taken over random messages and tokens drawn from the model's
own distribution, so alpha^T K alpha / 2 is the KL divergence to second order. Sublayers whose gain is not worth their
divergence get length 0. All lengths are then scaled so that the predicted change of z has the spread of z; in the
paper, r does the same for a single sublayer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmva.edit import Edit
from llmva.errors import LlmvaError
from llmva.method.context import Context
from llmva.method.first_token import FirstTokenClassifier, foretell
from llmva.method.identify import Vectors
from llmva.method.observe import Observation
from llmva.method.svm import unit
from llmva.metrics.objective import LEANS
from llmva.models.generate import Capture, Taken
from llmva.models.gradients import gradients
from llmva.models.harmless import random_messages
from llmva.prompts.types import Prompt

ALONG_V_A = "The edit is written along v_a, as in the paper"
MESSAGES = 128  # random messages, on which K is measured
TOKENS = 2  # next tokens drawn for each message
EVERY = 2  # gradients are computed for one training prompt in so many
RIDGE = 0.1  # times the mean of K's diagonal
FLOOR = 1e-9  # added to the chances of answer and refusal, so that z stays finite
MIN_CHANCE = 1e-4  # minimum chance in the spread of z, so that a few very sure prompts do not dominate it


@dataclass(frozen=True)
class Slopes:
    """How the decisions on m of n prompts depend on the sublayers' outputs."""

    prompts: list[Prompt]  # the m
    outputs: Tensor  # [S, m, d], in the model's dtype
    slopes: Tensor  # of z, [S, m, d]
    chances: Tensor  # of answered and refused, float32 [m, 2]


def measure_slopes(
    context: Context, edit: Edit, prompts: Sequence[Prompt], classifier: FirstTokenClassifier
) -> tuple[Slopes, Capture] | None:
    """The slopes on one in EVERY of `prompts`, for the model with `edit`, and the captures of the same prompts.

    Returns:
        None if gradients cannot pass through the model.
    """
    chat, some = context.chat, list(prompts)[::EVERY]
    if any(p.device.type == "meta" for p in chat.model.parameters()):
        context.progress.note(f"{ALONG_V_A}: a graph would hold all the weights that are offloaded.")
        return None
    table, chances = classifier.table(chat.decoder.vocabulary), torch.zeros(len(some), 2)
    taken = Taken(chat.decoder, len(some))

    def score(logits: Tensor, batch: list[int]) -> Tensor:
        shares = torch.softmax(logits, -1) @ table.to(logits)
        chances[batch] = shares.detach().cpu()
        taken.take_logits(batch, logits.detach())
        return _odds(shares)[:, None]

    try:
        with edit.apply(chat.model, check=False):
            parts = list(gradients(chat, [prompt.asked for prompt in some], score))
    except (RuntimeError, LlmvaError):  # weights that gradients cannot pass, or too little memory
        context.progress.note(f"{ALONG_V_A}: this model lets no gradients through, or there is no memory for them.")
        return None
    back = torch.tensor([row for part in parts for row in part.rows]).argsort()
    outputs = torch.cat([part.outputs for part in parts], 1)[:, back]
    slopes = torch.cat([part.slopes[:, :, 0] for part in parts], 1)[:, back]
    final = torch.cat([part.final for part in parts])[back]
    captured = Capture([""] * len(some), outputs, final, 0, taken.likely, taken.chances)
    return Slopes(some, outputs, slopes, chances), captured


def predict_with_slopes(
    context: Context, edit: Edit, prompts: Sequence[Prompt], classifier: FirstTokenClassifier
) -> tuple[Observation, Slopes | None]:
    """`Context.predict_labels` and `measure_slopes` of the same prompts, none of which is read twice."""
    measured = measure_slopes(context, edit, prompts, classifier)
    if measured is None:
        return context.predict_labels(edit, prompts, classifier), None
    slopes, captured = measured
    rest = [prompt for i, prompt in enumerate(prompts) if i % EVERY]
    if rest:
        captured = captured.interleave(context.predict_labels(edit, rest, classifier).capture, EVERY)
    return foretell(Observation(list(prompts), [], captured), classifier), slopes


def gradient_writers(
    context: Context, edit: Edit, vectors: Vectors, candidates: Sequence[int], slopes: Slopes, iteration: int
) -> Tensor | None:
    """Writers alpha_s p_s of one alignment of the model with `edit`, float64 [S, d]; zero in unedited sublayers.

    Args:
        vectors: of the model with `edit`.
        candidates: indices of the sublayers that may be edited.
        slopes: of training prompts, for the model with `edit`.

    Returns:
        None if no sublayer has a positive gain, or memory does not hold the gradients.
    """
    v_a, v_b = vectors.directions.unbind(1)
    readers = vectors.ratio[:, None] * v_b - v_a
    decision = _decision(v_a, readers, slopes)
    try:
        with edit.apply(context.chat.model, check=False):
            J = jacobian(context, readers, decision.writers, iteration)
    except (RuntimeError, LlmvaError):
        context.progress.note(f"{ALONG_V_A}: this model lets no gradients through, or there is no memory for them.")
        return None
    y = torch.tensor([1.0 if prompt.benign else -1.0 for prompt in slopes.prompts], dtype=torch.float64)
    lean = LEANS[context.settings.prefer]  # as in the benign vectors: above 1, toxic prompts weigh more
    weight = torch.where(y < 0, max(lean, 1.0), max(1.0 / lean, 1.0)) * torch.sigmoid(-y * decision.z)
    gain = (decision.moves * weight * y).mean(1)
    alpha = torch.zeros_like(gain)
    chosen = list(candidates)
    alpha[chosen] = solve_lengths(gain[chosen], J[:, chosen])
    reached = float(alpha @ decision.z_scale)
    return decision.writers * (alpha / reached)[:, None] if reached > 0 else None


def solve_lengths(gain: Tensor, J: Tensor) -> Tensor:
    """argmax over alpha >= 0 of alpha . gain - 1/2 alpha^T K alpha, float64 [S], from gain [S] and J [m, S].

    All zeros if no gain is positive.
    """
    from scipy.optimize import nnls

    K = J.T @ J / len(J)
    mean = float(K.diagonal().mean())
    if not mean > 0 or not bool((gain > 0).any()):
        return torch.zeros_like(gain)
    # K and gain are scaled to about 1, because the solver's tolerances are absolute
    factor = torch.linalg.cholesky(K / mean + RIDGE * torch.eye(len(K), dtype=K.dtype))
    target = torch.linalg.solve_triangular(factor, (gain / gain.abs().max())[:, None], upper=False)[:, 0]
    return torch.from_numpy(nnls(factor.T.contiguous().numpy(), target.numpy())[0])


@dataclass(frozen=True)
class _Decision:
    """How the S sublayers influence the decisions on n prompts; float64."""

    z: Tensor  # [n]
    writers: Tensor  # p, unit, [S, d]
    moves: Tensor  # A, [S, n]
    z_scale: Tensor  # spread of z that a length of 1 brings, divided by the spread of z, [S]


def _decision(answers: Tensor, readers: Tensor, slopes: Slopes) -> _Decision:
    """`answers`: v_a [S, d]; `readers`: u [S, d]."""
    chances = slopes.chances
    answered, refused = chances.double().unbind(1)
    spread = (answered.clamp_min(MIN_CHANCE).log() - refused.clamp_min(MIN_CHANCE).log()).std(correction=0)
    writers, moves, z_scale = [], [], []
    for v_a, u, o, g in zip(
        answers, readers, slopes.outputs, slopes.slopes, strict=True
    ):  # one sublayer at a time, to save memory
        o, g = o.double(), g.double()
        p = unit(g.mean(0))
        read = o @ u
        moved = read * (g @ p)
        writers.append(p)
        moves.append(moved)
        # the least-squares change of z if u.o changes by sigma_a
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
        tokens = torch.stack([_drawn(row, draws[i]) for row, i in zip(logs.detach(), batch, strict=True)])
        return logs.gather(1, tokens)

    J = torch.zeros(len(messages), TOKENS, len(readers), dtype=torch.float64)
    for part in gradients(context.chat, messages, score):
        for s, u in enumerate(readers):
            read = part.outputs[s].double() @ u
            J[part.rows, :, s] = read[:, None] * (part.slopes[s].double() @ writers[s])
    return J.flatten(0, 1)


def _drawn(logs: Tensor, draws: Tensor) -> Tensor:
    """The tokens at the quantiles `draws` [k] of the distribution with log-probabilities `logs` [V], int64 [k]."""
    heaped = logs.cpu().double().exp().cumsum(0)
    return torch.searchsorted(heaped, draws * heaped[-1]).clamp_max(len(logs) - 1).to(logs.device)
