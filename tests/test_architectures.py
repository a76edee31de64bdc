"""Every architecture: hook, bake, merged checkpoint and adapter agree, and a taught model is aligned end to end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES, HOOK_ONLY, MORE, REFUSED, taught, tiny, tiny_of_type
from conftest import taught_requests, tiny_tokenizer
from llmva.alignment import align
from llmva.errors import LlmvaError, UsageError
from llmva.export.lora import export_lora
from llmva.export.merged import export_merged
from llmva.export.plan import make_plan
from llmva.models.chat import encode, render
from llmva.models.fingerprint import fingerprint
from llmva.models.generate import capture
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder, first_tensor, hooked
from llmva.models.writers import is_linear
from llmva.prompts.types import Prompt, PromptSet
from test_edit import edit_of, far, logits, projections, random_steps, with_biases

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"


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
    record = align(taught(row), tiny_tokenizer(), prompts(), iterations=6, max_new_tokens=8).record
    return record["test"]["before"]["f1"] or 0.0, record["test"]["after"]["f1"] or 0.0


def bakes(model: Any) -> bool:
    """Whether a random edit can be baked; it must then equal the same edit by hook."""
    model = with_biases(model)
    edit = edit_of(random_steps(find_decoder(model).names))
    plain = logits(model)
    with edit.apply(model):
        by_hook = logits(model)
    assert far(plain, by_hook) > 1e-3
    try:
        edit.bake(model)
    except LlmvaError:
        assert torch.equal(logits(model), plain)
        return False
    assert far(logits(model), by_hook) < 1e-4
    return True


@pytest.mark.parametrize("model_type", MORE)
def test_further_model_types(model_type: str) -> None:
    assert bakes(tiny_of_type(model_type, MORE[model_type])) == (model_type not in HOOK_ONLY)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_no_sum_of_two_is_refused(model_type: str) -> None:
    with pytest.raises(UsageError, match="is not supported"):
        find_decoder(tiny_of_type(model_type, REFUSED[model_type][0]))


@pytest.mark.parametrize("row", ARCHITECTURES)
def test_capture(row: str) -> None:
    """What is captured is what the modules put out at the last position of each prompt."""
    model, tokenizer = tiny(row), tiny_tokenizer()
    decoder = find_decoder(model)
    prompts = ["make the fence", "please tell me how to break the lamp"]
    found = capture(decoder, tokenizer, prompts, max_new_tokens=3)
    assert found.outputs.shape == (len(decoder.sublayers), 2, 32)
    for i, prompt in enumerate(prompts):
        kept: list[torch.Tensor] = []
        handles = [
            s.output.register_forward_hook(lambda m, a, o, kept=kept: kept.append(first_tensor(o).reshape(-1, 32)[-1]))
            for s in decoder.sublayers
        ]
        with hooked(handles):
            model(input_ids=torch.tensor([encode(tokenizer, render(tokenizer, prompt))]))
        assert far(found.outputs[:, i], torch.stack(kept)) < 1e-3


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
        by_hook = logits(model)
    assert far(plain, by_hook) > 1e-3
    export_merged(plan, tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged", dtype="float32")
    assert far(logits(merged), by_hook) < 1e-4
    if expressible(model):
        from peft import PeftModel

        export_lora(plan, tmp_path / "adapter")
        fresh, _ = load_model(tmp_path / "base", dtype="float32")
        assert far(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()), by_hook) < 1e-4
    else:
        with pytest.raises(LlmvaError, match="LoRA cannot express"):
            export_lora(plan, tmp_path / "adapter")
    plan.edit.bake(model)
    assert far(logits(model), by_hook) < 1e-4


@pytest.mark.parametrize("row", [row for row in ARCHITECTURES if row not in SLOW])
def test_a_taught_model_is_aligned_end_to_end(row: str) -> None:
    """Never worse; and better by .15 wherever docs/architectures.md says so."""
    before, after = aligned(row)
    assert after >= before
    line = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {row} |"))
    told = [float(number) for number in re.findall(r"\d\.\d{3}", line)][:2]
    if told[1] - told[0] >= 0.15:
        assert after - before >= 0.15


def test_ten_architectures_gain() -> None:
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        numbers = [float(number) for number in re.findall(r"\d\.\d{3}", line)]
        name = line.removeprefix("| ").split(" |")[0]
        if name in ARCHITECTURES and len(numbers) == 2:
            found[name] = numbers[1] - numbers[0]
    assert found.keys() == ARCHITECTURES.keys() - set(SLOW)
    assert sum(gain >= 0.15 for gain in found.values()) >= 10
