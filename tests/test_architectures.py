"""Every architecture: hook, bake, merged checkpoint and adapter agree, and a taught model is aligned end to end."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES, HOOK_ONLY, MORE, REFUSED, taught, tiny, tiny_of_type, train
from conftest import taught_requests, tiny_tokenizer
from llmva.alignment import align
from llmva.errors import LlmvaError, UsageError
from llmva.export.adapters.peft import export_lora
from llmva.export.merged import export_merged
from llmva.export.plan import make_plan
from llmva.models.chat import encode, render
from llmva.models.finding.tensors import first_tensor, hooked
from llmva.models.fingerprint import fingerprint
from llmva.models.generate import capture
from llmva.models.load import load_model
from llmva.models.sublayers import find_decoder
from llmva.models.writers import is_linear
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt
from test_edit import edit_of, far, logits, projections, random_steps, with_biases

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"


def prompts() -> PromptSet:
    """The taught requests in a fixed shuffle: half to train, a quarter each to validate and test."""
    rows = [Prompt(text, benign, "benign" if benign else "toxic") for text, benign, _ in taught_requests()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows, n = [rows[i] for i in order], len(rows)
    return PromptSet(tuple(rows[: n // 2]), tuple(rows[n // 2 : 3 * n // 4]), tuple(rows[3 * n // 4 :]))


def expressible(model: Any) -> bool:
    """Whether LoRA can express an edit of every sublayer."""
    return all(is_linear(projection) for projection in projections(model).values())


def aligned(row: str, iterations: int = 6) -> tuple[float, float]:
    """Test F1 of a taught model of that row, before and after a short run under the defaults."""
    record = align(taught(row), tiny_tokenizer(), prompts(), iterations=iterations, max_new_tokens=8, patience=3).record
    return record["test"]["before"]["f1"] or 0.0, record["test"]["after"]["f1"] or 0.0


def bakes(model: Any) -> bool:
    """Whether a random edit can be baked; it must then equal the same edit by hook."""
    model = with_biases(model)
    edit = edit_of(random_steps(find_decoder(model).names))
    plain = logits(model)
    with edit.apply(model):
        by_hook = logits(model)
    change = far(plain, by_hook)
    assert change > 1e-4
    try:
        edit.bake(model)
    except LlmvaError:
        assert torch.equal(logits(model), plain)
        return False
    assert far(logits(model), by_hook) < min(1e-4, change / 10)
    return True


@pytest.mark.parametrize("model_type", MORE)
def test_further_model_types(model_type: str) -> None:
    assert bakes(tiny_of_type(model_type, MORE[model_type])) == (model_type not in HOOK_ONLY)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_normalises_the_stream_is_refused(model_type: str) -> None:
    with pytest.raises(UsageError, match="is not supported"):
        find_decoder(with_biases(tiny_of_type(model_type, REFUSED[model_type])))


@pytest.mark.parametrize("row", ARCHITECTURES)
def test_capture(row: str) -> None:
    """What is captured is what the modules put out at the last position of each prompt."""
    model, tokenizer = tiny(row), tiny_tokenizer()
    decoder = find_decoder(model)
    texts = ["make the fence", "please tell me how to break the lamp"]
    found = capture(decoder, tokenizer, texts, max_new_tokens=3)
    assert found.outputs.shape == (len(decoder.sublayers), 2, 32)
    for i, text in enumerate(texts):
        kept: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: Any, kept: list[torch.Tensor] = kept) -> None:
            kept.append(first_tensor(output).reshape(-1, 32)[-1])

        with hooked([s.output.register_forward_hook(keep) for s in decoder.sublayers]):
            model(input_ids=torch.tensor([encode(tokenizer, render(tokenizer, text))]))
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
        with pytest.raises(LlmvaError, match="no adapter for fused experts"):
            export_lora(plan, tmp_path / "adapter")
    plan.edit.bake(model)
    assert far(logits(model), hooked) < 1e-4


def test_lessons_do_not_hang_on_what_ran_before() -> None:
    """OPT trains with dropout."""
    torch.manual_seed(1)
    one, after = train(tiny("opt"), steps=2).state_dict(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # and leave it as it was
    other = train(tiny("opt"), steps=2).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("row", ARCHITECTURES)
def test_a_taught_model_is_aligned_end_to_end(row: str) -> None:
    """Never worse; and better by .15 wherever docs/architectures.md says so."""
    before, after = aligned(row, iterations=3)
    assert after >= before
    told = gains()[row]
    assert after - before >= 0.15 or told < 0.15


def test_ten_architectures_gain() -> None:
    found = gains()
    assert found.keys() == ARCHITECTURES.keys()
    assert sum(gain >= 0.15 for gain in found.values()) >= 10


def gains() -> dict[str, float]:
    """What the page says that each row's F1 gained."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        numbers = [float(number) for number in re.findall(r"\b\d\.\d{3}\b", line)]
        name = line.removeprefix("| ").split(" |")[0]
        if name in ARCHITECTURES and len(numbers) == 2:
            found[name] = numbers[1] - numbers[0]
    return found


# -- the paper's models, by their real shapes ------------------------------------------------------------------------

# parameters, as the models' safetensors indices tell: the shapes cannot all be wrong and give these
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "gemma-2-9b": 9_241_705_984,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Phi-3.5-mini": 3_821_079_552,
    "Phi-4-mini": 3_836_021_760,
    "Phi-4": 14_659_507_200,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
}


def script() -> Any:
    """benchmarks/architectures.py as a module; tests/architectures.py has its plain name."""
    spec = importlib.util.spec_from_file_location(
        "architectures_page", PAGE.parent.parent / "benchmarks/architectures.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_papers_models(name: str) -> None:
    page = script()
    assert page.PAPER.keys() == PARAMETERS.keys()
    model = page.on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    found = page.measure(name, model)
    blocks, width = model.config.num_hidden_layers, model.config.hidden_size
    assert found.sublayers == 2 * blocks
    assert found.outputs == ("post-norms" if name.startswith("gemma") else "projections")
    assert [end for end, _ in found.tensors] == ["self_attn.o_proj.weight", "mlp.down_proj.weight"]
    count = model.config.num_attention_heads
    mixed = count * (getattr(model.config, "head_dim", None) or width // count)
    assert [shape for _, shape in found.tensors] == [(width, mixed), (width, model.config.intermediate_size)]
    assert found.edit_bytes < (100e6 if blocks <= 36 else 150e6)
    assert found.adapter_bytes < (150e6 if blocks <= 36 else 300e6)
    assert found.merge_bytes < 1e9
