"""The fields of run.json about an iteration's vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmva.edit import Edit
from llmva.method.identify import Vectors
from llmva.method.observe import Observation
from llmva.models.sublayers import Decoder


def vectors_record(vectors: Vectors, edit: Edit, iteration: int, decoder: Decoder) -> dict[str, Any]:
    """Scores, accuracies, angles and ratios by sublayer, and which of them the passes wrote.

    `iteration` is that of their columns in `edit`. An angle that is not defined is None.
    """
    degrees = _numbers(vectors.angles)
    known = [d for d in degrees if d is not None]
    return {
        "selected": sorted(decoder.names.index(name) for name in edit.written(iteration)),
        "scores": _numbers(vectors.scores),
        "accuracy_answer": _numbers(vectors.accuracy[:, 0]),
        "accuracy_benign": _numbers(vectors.accuracy[:, 1]),
        "angles": degrees,
        "mean_angle": sum(known) / len(known) if known else None,
        "ratio": _numbers(vectors.ratio),
    }


def projection_record(
    vectors: Vectors, observation: Observation, decoder: Decoder, entries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """o.v_a and o.v_b of each prompt, in one sublayer (the paper's Figure 2).

    It is that of the earlier `entries`, so that iterations can be compared; at first the one with the highest score.
    """
    shown = next((entry["projection"]["sublayer"] for entry in entries if entry.get("projection")), None)
    s = int(vectors.scores.argmax()) if shown is None else decoder.names.index(shown)
    points = (observation.capture.outputs[s].double() @ vectors.directions[s].T).tolist()
    rows = [
        [round(a, 5), round(b, 5), prompt.benign, label.value]
        for (a, b), prompt, label in zip(points, observation.prompts, observation.labels, strict=True)
    ]
    return {"sublayer": decoder.sublayers[s].name, "points": rows}


def _numbers(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 6) for v in values.tolist()]
