"""Every decoder type of the installed transformers has been looked at, and what the page says of a sample is so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from llmva.models.sublayers import find_decoder  # noqa: E402
from sweep import BEGIN, END, all_types, holds, looked_at  # noqa: E402
from sweep_models import BESIDE, tiny_of  # noqa: E402

SAMPLE = (
    "falcon_h1", "gemma3n_text", "gemma4_text", "granitemoehybrid", "granitemoeshared", "jamba", "jetmoe", "mamba",
    "mamba2", "minimax", "nemotron_h", "qwen4_exp_text", "recurrent_gemma", "zamba2",
)  # fmt: skip


def told() -> dict[str, tuple[bool, str]]:
    """What the page says of each type: whether it is proved, and its sublayers or why not."""
    section = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    rows = [line.strip("| ").split(" | ", 2) for line in section.splitlines() if line.startswith("| ")][2:]
    return {name: (proved == "yes", what) for name, proved, what in rows}


def test_somebody_looked_at_every_type() -> None:
    """Fails where transformers brings a type, or drops one: run benchmarks/sweep.py and read what it says."""
    assert told().keys() == set(all_types())


def test_nothing_is_found_wrongly() -> None:
    assert [name for name, (_, what) in told().items() if what.startswith("WRONG")] == []


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_of_the_page(model_type: str) -> None:
    """Proved in float64 by other hooks, tokens and pushes than llmva's."""
    assert looked_at(model_type) == told()[model_type]


def test_types_beside_decoders_are_of_the_mappings() -> None:
    assert BESIDE.keys() <= set(all_types())


def test_the_second_proof_can_fail() -> None:
    model = tiny_of("llama")
    decoder = find_decoder(model)
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda m, a, o: torch.tanh(50.0 * o))
    assert holds(model, decoder) == [name for name in decoder.names if name.endswith("down_proj")]
