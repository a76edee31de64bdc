"""Every architecture: hook, bake, merged checkpoint and adapter agree, and a taught model is aligned end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES, tiny, train
from conftest import taught_requests, tiny_tokenizer
from llmva.alignment import align
from llmva.errors import LlmvaError
from llmva.export.lora import export_lora
from llmva.export.merged import export_merged
from llmva.export.plan import make_plan
from llmva.models.fingerprint import fingerprint
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder
from llmva.models.writers import is_linear
from llmva.prompts.types import Prompt, PromptSet
from test_edit import edit_of, far, logits, projections, random_steps, with_biases

SLOW = ("qwen3_next",)  # its linear attention without kernels takes minutes to train


def prompts() -> PromptSet:
    """The taught requests in a fixed shuffle: half to train, a quarter each to validate and test."""
    rows = [Prompt(text, benign, "benign" if benign else "toxic") for text, benign, _ in taught_requests()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows, n = [rows[i] for i in order], len(rows)
    return PromptSet(tuple(rows[: n // 2]), tuple(rows[n // 2 : 3 * n // 4]), tuple(rows[3 * n // 4 :]))


def expressible(model: Any) -> bool:
    """Whether LoRA can express an edit of every sublayer."""
    return all(is_linear(projection) for projection in projections(model).values())


def aligned(row: str) -> tuple[float, float]:
    """Test F1 of a taught model of that row, before and after a short run under the defaults."""
    record = align(train(tiny(row)), tiny_tokenizer(), prompts(), iterations=6, max_new_tokens=8).record
    return record["test"]["before"]["f1"] or 0.0, record["test"]["after"]["f1"] or 0.0


@pytest.mark.parametrize("row", ARCHITECTURES)
def test_every_form_of_the_edit_agrees(row: str, tmp_path: Path) -> None:
    model = with_biases(tiny(row))
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = fingerprint(find_decoder(model), str(tmp_path / "base"))
    edit_of(random_steps(list(projections(model))), base).save(tmp_path)
    plan = make_plan(tmp_path)
    plain = logits(model)
    with plan.edit.apply(model):
        hooked = logits(model)
    assert far(plain, hooked) > 1e-3
    export_merged(plan, tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged", dtype="float32")
    assert far(logits(merged), hooked) < 1e-4
    if expressible(model):
        from peft import PeftModel

        export_lora(plan, tmp_path / "adapter")
        fresh, _ = load_model(tmp_path / "base", dtype="float32")
        assert far(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()), hooked) < 1e-4
    else:
        with pytest.raises(LlmvaError, match="LoRA cannot express"):
            export_lora(plan, tmp_path / "adapter")
    plan.edit.bake(model)
    assert far(logits(model), hooked) < 1e-4
