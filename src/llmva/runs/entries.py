"""The fields of run.json about an iteration's vectors."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from llmva.method.identify import Vectors
from llmva.method.observe import Observation
from llmva.models.sublayers import Decoder


def vectors_record(vectors: Vectors, chosen: list[int]) -> dict[str, Any]:
    """Scores, accuracies, angles and ratios by sublayer; an angle that is not defined is None."""
    degrees = _numbers(vectors.angles)
    known = [d for d in degrees if d is not None]
    return {
        "selected": chosen,
        "scores": _numbers(vectors.scores),
        "accuracy_answer": _numbers(vectors.accuracy[:, 0]),
        "accuracy_benign": _numbers(vectors.accuracy[:, 1]),
        "angles": degrees,
        "mean_angle": sum(known) / len(known) if known else None,
        "ratio": _numbers(vectors.ratio),
    }


def projection_record(vectors: Vectors, observation: Observation, decoder: Decoder) -> dict[str, Any]:
    """o.v_a and o.v_b of each prompt, in the sublayer with the highest score (the paper's Figure 2)."""
    s = int(vectors.scores.argmax())
    points = (observation.capture.outputs[s].double() @ vectors.directions[s].T).tolist()
    rows = [
        [round(a, 5), round(b, 5), prompt.benign, label.value]
        for (a, b), prompt, label in zip(points, observation.prompts, observation.labels, strict=True)
    ]
    return {"sublayer": decoder.sublayers[s].name, "points": rows}


def _numbers(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 6) for v in values.tolist()]
