"""Models whose code comes with them: what they lack is done without or told in one sentence, before the first answer.

Before, whatever differed from transformers' own forward was a traceback in the middle of a run, but for `plain code`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

import llmva
from conftest import Said, taught_model, taught_requests, tiny_model, tiny_tokenizer
from llmva.errors import UsageError
from llmva.models.checkpoint import Checkpoint
from llmva.models.gradients import gradients
from llmva.models.harmless import agreement

CACHE = "cache" if "cache" in LlamaForCausalLM.forward.__wrapped__.__code__.co_varnames else "past_key_values"
REQUESTS = taught_requests()
SHORT: dict[str, Any] = {"iterations": 1, "per_source": 16, "max_new_tokens": 6, "endings_tokens": 0}


class Plain(LlamaForCausalLM):
    """Nothing is different but where the class comes from."""


class Bare(LlamaForCausalLM):
    """Neither logits_to_keep nor positions, and nothing else that it does not know."""

    def forward(  # type: ignore[no-untyped-def]
        self, input_ids=None, attention_mask=None, past_key_values=None, cache=None, use_cache=None, return_dict=None
    ):
        given = {CACHE: past_key_values if cache is None else cache, "use_cache": use_cache}
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)


class InTuples(LlamaForCausalLM):
    """As models were that return no named fields, but to generate()."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        result = super().forward(*args, **kwargs)
        return result if torch.is_inference_mode_enabled() and kwargs.get("use_cache") else (result.logits,)

    forward.__signature__ = __import__("inspect").signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


class NoMask(LlamaForCausalLM):
    """It takes a mask and ignores it, so padding changes what it says."""

    def forward(self, *args, attention_mask=None, position_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(*args, **kwargs)

    forward.__signature__ = __import__("inspect").signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


@cache
def teacher() -> Any:
    return taught_model()


def made(kind: type, taught: bool = True) -> Any:
    model = deepcopy(teacher()) if taught else tiny_model()
    model.__class__ = kind
    return model


def prompts() -> llmva.PromptSet:
    rows = REQUESTS[::5]
    return llmva.PromptSet.from_lists(*([text for text, benign, _ in rows if benign == side] for side in (False, True)))


def test_a_run_is_the_same_as_with_transformers_own_code() -> None:
    wanted, result = (
        llmva.align(made(kind), tiny_tokenizer(), prompts(), **SHORT) for kind in (LlamaForCausalLM, Bare)
    )
    assert result.record["test"] == wanted.record["test"]
    assert result.edit.factors.keys() == wanted.edit.factors.keys() != set()
    for name, f in result.edit.factors.items():
        torch.testing.assert_close(f.V, wanted.edit.factors[name].V, rtol=1e-3, atol=1e-4)
    assert result.record["limits"] == wanted.record["limits"]


@pytest.mark.parametrize("kind", [Bare, InTuples])
def test_gradients_and_harmless_text_are_the_same(kind: type) -> None:
    texts = [(text, answer) for text, _, answer in REQUESTS[:6]]
    found, right = [], []
    for where, one in ((found, kind), (right, LlamaForCausalLM)):
        chat = llmva.ChatModel.of(made(one), tiny_tokenizer())
        parts = gradients(chat, [text for text, _ in texts], lambda logits, batch: logits[:, :2])
        where.extend(x for part in parts for x in (part.scores, part.outputs, part.slopes))
        lens = agreement(chat, texts, lambda chat=chat: torch.no_grad())
        assert lens.kept == [1.0] * 6
        where.append(torch.tensor(lens.rise))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_head_sees_only_the_positions_that_are_wanted() -> None:
    """All logits of a batch of long prompts would be gigabytes."""
    chat = llmva.ChatModel.of(made(Bare, taught=False), tiny_tokenizer())
    widths = []
    handle = chat.model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    llmva.capture(chat.decoder, chat.tokenizer, ["open the door", "open the old door there"], max_new_tokens=0)
    handle.remove()
    assert widths[-1] == 1


def test_a_mask_that_is_ignored_is_seen() -> None:
    """Such a model is asked one prompt at a time, and the run says so."""
    model, tokenizer = made(NoMask), tiny_tokenizer()
    chat = llmva.ChatModel.of(model, tokenizer)
    assert chat.batching.tokens == 1
    assert "each prompt was answered alone" in chat.limits[0]
    texts = [text for text, _, _ in REQUESTS[:4]] + ["open"]
    from llmva.models.generate import answer_prompts

    found = answer_prompts(chat, texts, max_new_tokens=6).answers
    assert found == [answer_prompts(chat, [text], max_new_tokens=6).answers[0] for text in texts]


class NoGenerate(PreTrainedModel):
    pass


class NoHead(LlamaForCausalLM):
    def get_output_embeddings(self) -> Any:
        return None


class MaskByAnotherName(LlamaForCausalLM):
    def forward(self, input_ids=None, padding=None):  # type: ignore[no-untyped-def]
        return super().forward(input_ids=input_ids)


class FailsWithACache(LlamaForCausalLM):
    """Written for an older release: the cache has another form there."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, cache=None, **kwargs):  # type: ignore[no-untyped-def]
        if len(input_ids[0]) == 1 and (past_key_values or cache) is not None:
            (past_key_values or cache)[0][0].shape  # noqa: B018
            raise AttributeError("'DynamicCache' object has no attribute 'seen_tokens'")
        given = {CACHE: past_key_values if cache is None else cache}
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given, **kwargs)


class ForgetsItsCache(LlamaForCausalLM):
    """Every step sees its own token alone."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        if input_ids.shape[1] == 1:
            return super().forward(input_ids=input_ids)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class WantsMore(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, *, images, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class OnlyLoss(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        super().forward(input_ids=input_ids, attention_mask=attention_mask)
        return {"loss": torch.zeros(())}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NoHead, r"NoHead gives no output embedding by get_output_embeddings\(\)"),
        (MaskByAnotherName, "MaskByAnotherName takes no attention_mask"),
        (FailsWithACache, "FailsWithACache fails when it answers"),
        (ForgetsItsCache, "its cache is broken"),
        (WantsMore, "WantsMore fails when it answers"),
        (OnlyLoss, "gives no logits"),
    ],
)
def test_what_is_missing_is_one_sentence(kind: type, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        llmva.ChatModel.of(made(kind), tiny_tokenizer())
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)


def test_a_class_without_generate() -> None:
    with pytest.raises(UsageError, match=r"NoGenerate has no generate\(\)"):
        llmva.ChatModel.of(made(NoGenerate, taught=False), tiny_tokenizer())


def test_a_config_with_names_of_its_own() -> None:
    model = made(Plain, taught=False)
    config = model.config
    without = {"num_attention_heads": None, "num_key_value_heads": None, "head_dim": None}
    config.__class__ = type("NoHeads", (type(config),), without)
    vars(config).update(without)
    assert llmva.ChatModel.of(model, tiny_tokenizer()).batching.tokens > 0
    config.get_text_config = lambda **options: SimpleNamespace(num_hidden_layers=3)
    with pytest.raises(UsageError, match="names no hidden_size"):
        llmva.find_decoder(model)


# -- on disk -----------------------------------------------------------------------------------------------------

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with code of its own, prompts, a run and what was exported of it, all with the user's leave."""
    place = tmp_path_factory.mktemp("mine")
    model = place / "model"
    teacher().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": code}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_mine.py").write_text(CODE)
    for name, side in (("toxic", False), ("benign", True), ("new", False)):
        lines = [text for text, benign, _ in REQUESTS[::5] if benign == side]
        (place / f"{name}.txt").write_text("\n".join(f"{line} ?" if name == "new" else line for line in lines))
    return place


def test_every_command_takes_the_users_leave(
    mine: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those that read tensors alone need none, and the others say in one sentence that they do."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(mine)
    sides = ["--toxic", "toxic.txt", "--benign", "benign.txt"]
    short = ["--iterations", 1, "--per-source", 16, "--max-new-tokens", 6, "-q"]
    needing = [
        ("align", "model", *sides, *short, "--out", "run"),
        ("evaluate", "model", *sides, "--max-new-tokens", 4, "-q"),
        ("chat", "model", "-p", "open the door", "-q"),
        ("extend", "run", "--toxic", "new.txt", *short, "--out", "more"),
        ("verify", "model", "run", "merged", "lora", "-q"),
    ]
    free = [
        ("export", "run", "--as", "merged", "--out", "merged", "-q"),
        ("export", "run", "--as", "lora", "--out", "lora", "-q"),
        ("export", "run", "--as", "diff", "-q"),
        ("push", "run", "--repo", "me/mine", "--as", "lora", "--dry-run", "-q"),
    ]
    for words in [needing[0], *free, *needing[1:]]:
        if words in needing:
            said = command(*words)
            assert (said.code, "--trust-remote-code" in said.err, said.err.count("\n")) == (2, True, 1), words
        said = command(*words, *(["--trust-remote-code"] if words in needing else []))
        assert said.code == 0, (words, said.err)


def test_an_export_that_needs_the_code_says_so(
    mine: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of weights that are not the edit's own, names alone do not tell enough."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(mine)
    other = tmp_path / "other"
    other.mkdir()
    for path in (mine / "model").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    changed = {name: tensor * 1.5 if "proj" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    for kind, out in (("lora", ["--out", tmp_path / "a"]), ("merged", ["--out", tmp_path / "b"]), ("diff", [])):
        words = ["export", "run", "--as", kind, "--base", other, *out]
        said = command(*words)
        assert (said.code, "--trust-remote-code" in said.err) == (2, True), kind
        said = command(*words, "--trust-remote-code")
        assert (said.code, "belongs to the model" in said.err) == (1, True), kind
    with pytest.raises(UsageError, match="--trust-remote-code"):
        _ = Checkpoint.open(other).config
