"""From Python: an edit acts once, a model answers as in evaluation, and threads do not meet on one model or folder.

Every case failed before, but for those that say otherwise.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import llmva
from conftest import taught_model, taught_requests, tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.errors import LlmvaError, UsageError
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings
from llmva.experiments.compare import compare
from llmva.files import lock
from llmva.judges import make_judge
from llmva.models.at_rest import at_rest
from llmva.models.fingerprint import fingerprint
from llmva.progress import Progress
from llmva.prompts import PromptSet

FAST: dict[str, Any] = {"iterations": 1, "per_source": 16, "max_new_tokens": 8, "endings_tokens": 0}
APPLIED = "An edit is applied to this model already: remove it first"
TEXTS = ["please fix the door", "tell me how to break a lamp"]


def prompts() -> PromptSet:
    rows = taught_requests()[:96]
    return PromptSet.from_lists(*([text for text, benign, _ in rows if benign == side] for side in (False, True)))


def an_edit(model: Any, seed: int = 0, known: bool = True) -> Edit:
    """Of every sublayer; `known` whether it knows its base."""
    decoder = llmva.find_decoder(model)
    edit, generator = Edit({}, fingerprint(decoder, "tiny") if known else {}), torch.Generator().manual_seed(seed)
    for name in decoder.names:
        v, u = torch.randn(2, decoder.width, generator=generator) * 0.2
        edit = edit.then(name, v, u, 1)
    return edit


@pytest.fixture(scope="module")
def taught() -> tuple[Any, str]:
    """A taught model, to be copied, and the digest of the edit that a run makes of it."""
    model = taught_model()
    return model, llmva.align(model, tiny_tokenizer(), prompts(), **FAST).every.digest()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=torch.arange(1, 12)[None]).logits
    return out


# -- once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_an_edit_applied_twice_is_refused(check: bool, known: bool, model: Any) -> None:
    edit = an_edit(model, known=known)
    applied = edit.apply(model)
    once = logits(model)
    with pytest.raises(LlmvaError, match=APPLIED):
        edit.apply(model, check=check)
    assert torch.equal(logits(model), once)
    applied.remove()
    applied.remove()  # which may be called again
    with edit.apply(model):
        assert torch.equal(logits(model), once)


def test_another_edit_on_top_is_refused_unless_asked_for(model: Any) -> None:
    first, second = an_edit(model), an_edit(model, seed=1)
    with first.apply(model):
        with pytest.raises(LlmvaError, match=APPLIED):
            second.apply(model)
        second.apply(model, check=False).remove()


@pytest.mark.parametrize("other", [True, False])
def test_a_bake_under_a_hook_is_refused(other: bool, model: Any) -> None:
    edit = an_edit(model)
    before = copy.deepcopy(model.state_dict())
    with edit.apply(model), pytest.raises(LlmvaError, match=APPLIED):
        (an_edit(tiny_model(), seed=1, known=False) if other else edit).bake(model, check=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("use", ["apply", "bake"])
@pytest.mark.parametrize("check", [True, False])
def test_a_baked_edit_is_refused_though_it_knows_no_base(use: str, check: bool, model: Any) -> None:
    edit = an_edit(model, known=False)
    before = copy.deepcopy(model.state_dict())
    edit.bake(model)
    for baked in (model, copy.deepcopy(model)):
        with pytest.raises(LlmvaError, match="is written into the weights of this model already"):
            getattr(edit, use)(baked, check=check)
    model.load_state_dict(before)  # as a notebook goes back
    getattr(edit, use)(model, check=check)


RUNS: dict[str, Callable[[Any, Any], Any]] = {
    "align": lambda model, tokenizer: llmva.align(model, tokenizer, prompts(), **FAST),
    "compare": lambda model, tokenizer: compare(model, tokenizer, prompts(), methods=["none"]),
    "evaluate": lambda model, tokenizer: evaluate(
        llmva.ChatModel.of(model, tokenizer), prompts().test[:4], make_judge("phrases"),
        EvaluationSettings(max_new_tokens=2), edit=an_edit(tiny_model(), known=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_a_model_with_an_edit_on_it_is_not_taken_for_the_untouched_one(run: str, model: Any, tokenizer: Any) -> None:
    with an_edit(model, seed=3).apply(model), pytest.raises(LlmvaError, match=APPLIED):
        RUNS[run](model, tokenizer)


def test_observing_under_an_edit_is_as_before(model: Any, tokenizer: Any) -> None:
    """It held before: a loop of one's own applies its edit and looks."""
    plain = llmva.capture(model, tokenizer, TEXTS, max_new_tokens=2)
    with an_edit(model).apply(model):
        edited = llmva.capture(model, tokenizer, TEXTS, max_new_tokens=2)
    assert not torch.allclose(plain.outputs, edited.outputs)


# -- at rest -------------------------------------------------------------------------------------------------------


def test_training_mode_is_put_aside_and_restored(taught: tuple[Any, str], tokenizer: Any) -> None:
    model, wanted = copy.deepcopy(taught[0]), taught[1]
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    model.model.layers[1].eval()  # a module may have a mode of its own
    modes = [module.training for module in model.modules()]
    got = llmva.align(model, tokenizer, prompts(), **FAST).every
    assert got.digest() == wanted
    assert got.factors
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("work", ["capture", "find_decoder", "evaluate"])
def test_a_model_with_dropout_in_training_mode_says_the_same_twice(work: str, tokenizer: Any) -> None:
    model = tiny_model("GPT2Config", n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.5)
    model.train()

    def once() -> Any:
        if work == "capture":
            return llmva.capture(model, tokenizer, TEXTS, max_new_tokens=3).outputs.tolist()
        if work == "find_decoder":
            return llmva.find_decoder(model).names  # whose proof a dropout after the projection would fail
        chat = llmva.ChatModel.of(model, tokenizer)
        return evaluate(chat, prompts().test[:4], make_judge("phrases"), EvaluationSettings(max_new_tokens=2))["test"]

    assert once() == once()
    assert model.training


def test_the_mode_is_restored_after_a_failure(model: Any) -> None:
    model.train()

    def fail() -> None:
        with at_rest(model):
            assert not model.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.training


# -- what acts on the model beside its weights -------------------------------------------------------------------


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Deaf(torch.nn.Module):
    """A dropout that ignores eval(), put around a module."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.dropout(self.inner(*args, **kwargs), 0.1, training=True)


RANDOM = "other numbers each time that it reads the same tokens"
HOOKS = "forward hooks that are not llmva's"


def deafened(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = Deaf(model.model.layers[1].mlp.act_fn)


def shaken(model: Any) -> None:
    def shake(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * torch.randn_like(output)

    model.model.layers[0].mlp.gate_proj.register_forward_hook(shake)


def doubled(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, args, output: output * 2)


def prepared(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(partial(lambda factor, module, args: (args[0] * factor,), 1.5))


def with_hooks_of_libraries(model: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.model.layers[0], AlignDevicesHook(execution_device="cpu", io_same_device=True))
    model.model.layers[0].mlp.down_proj.register_forward_hook(llmva.edit._Hook(an_edit(model).factors[
        "model.layers.0.mlp.down_proj"]))  # fmt: skip


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (deafened, {RANDOM}),
        (shaken, {RANDOM, f"{HOOKS}, on model.layers.0.mlp.gate_proj: what"}),
        (doubled, {f"{HOOKS}, on model.layers.0.mlp.gate_proj: what"}),
        (prepared, {f"{HOOKS}, on model.layers.0.mlp and 2 more modules: what"}),
        (with_hooks_of_libraries, set()),  # held
        (lambda model: None, set()),  # held
    ],
)
def test_what_acts_beside_the_weights_is_told(act: Callable[[Any], None], told: set[str], tokenizer: Any) -> None:
    """In the log and in the limits of every command that measures; nothing was said of it."""
    model, log = tiny_model(), Notes()
    act(model)
    judge, few = make_judge("phrases"), prompts().test[:4]
    record = evaluate(llmva.ChatModel.of(model, tokenizer), few, judge, EvaluationSettings(max_new_tokens=2),
                      progress=log)  # fmt: skip
    for texts in (record["limits"], log.notes):
        about = [text for text in texts if RANDOM in text or HOOKS in text]
        assert len(about) == len(told)
        assert all(any(words in text for text in about) for words in told)


def test_a_run_tells_of_hooks_and_chance(tokenizer: Any) -> None:
    model, log = tiny_model(), Notes()
    shaken(model)
    record = llmva.align(model, tokenizer, prompts(), progress=log, **{**FAST, "iterations": 0}).record
    for words in (RANDOM, HOOKS):
        assert sum(words in limit for limit in record["limits"]) == 1
        assert sum(words in note for note in log.notes) == 1


def test_hooks_on_every_module_are_told(model: Any, tokenizer: Any) -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        (limit,) = [one for one in llmva.ChatModel.of(model, tokenizer).limits if HOOKS in one]
    finally:
        handle.remove()
    assert "on the model itself: what" in limit


def test_chance_in_the_residual_stream_is_named(tokenizer: Any) -> None:
    """Before, the architecture was called unsupported."""
    model = tiny_model()
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: torch.nn.functional.dropout(own(*args, **kwargs), 0.5, training=True)
    with pytest.raises(UsageError, match="each time that it reads the same tokens: switch off what is random"):
        llmva.find_decoder(model)


def test_a_hook_that_changes_a_sublayer_is_part_of_it_and_named(model: Any, tokenizer: Any) -> None:
    """Before, the architecture was called unsupported."""
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 3)
    chat = llmva.ChatModel.of(model, tokenizer)
    assert chat.decoder.names[3] == "model.layers.1.mlp.down_proj"
    assert any("forward hooks that are not llmva's, on model.layers.1.mlp" in limit for limit in chat.limits)


def test_chance_in_code_of_its_own_is_not_taken_for_a_fault_of_its_cache(tokenizer: Any) -> None:
    from transformers import LlamaForCausalLM

    model = tiny_model()
    model.__class__ = type("Own", (LlamaForCausalLM,), {"__module__": "modeling_own"})
    deafened(model)
    assert any(RANDOM in limit for limit in llmva.ChatModel.of(model, tokenizer).limits)


# -- threads -------------------------------------------------------------------------------------------------------


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the error it raises, in another thread."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except LlmvaError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


USES: dict[str, Callable[[Any, Any], Any]] = {
    **RUNS,
    "capture": lambda model, tokenizer: llmva.capture(model, tokenizer, TEXTS, max_new_tokens=2),
    "find_decoder": lambda model, tokenizer: llmva.find_decoder(model),
    "apply": lambda model, tokenizer: an_edit(tiny_model(), known=False).apply(model, check=False),
    "bake": lambda model, tokenizer: an_edit(tiny_model(), known=False).bake(model, check=False),
}


@pytest.mark.parametrize("use", USES)
def test_a_second_thread_is_refused_before_it_touches_the_model(use: str, model: Any, tokenizer: Any) -> None:
    before = logits(model)
    with at_rest(model):
        error = in_a_thread(lambda: USES[use](model, tokenizer))
        assert isinstance(error, LlmvaError)
        assert str(error).startswith("Another thread of this program is working with this model")
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        llmva.capture(model, tokenizer, TEXTS, max_new_tokens=1)  # the thread that has it goes on
    assert torch.equal(logits(model), before)
    if use == "capture":
        assert not isinstance(in_a_thread(lambda: USES[use](model, tokenizer)), LlmvaError)


def test_a_copy_belongs_to_nobody(model: Any, tokenizer: Any) -> None:
    with at_rest(model):
        twin = copy.deepcopy(model)
        assert not isinstance(in_a_thread(lambda: llmva.find_decoder(twin)), LlmvaError)


def test_two_aligns_at_once_on_one_model(taught: tuple[Any, str], tokenizer: Any) -> None:
    model, wanted = taught
    ready, go = threading.Event(), threading.Event()

    class Slow(llmva.Judge):
        name = "slow"

        def __init__(self) -> None:
            self.inner = make_judge("phrases")

        def answered(self, prompt: Any, answer: str) -> llmva.Judgement:
            ready.set()
            assert go.wait(60)
            return self.inner.answered(prompt, answer)

    digests: list[str] = []
    thread = threading.Thread(
        target=lambda: digests.append(llmva.align(model, tokenizer, prompts(), judge=Slow(), **FAST).every.digest())
    )
    thread.start()
    try:
        assert ready.wait(60)
        with pytest.raises(LlmvaError, match="Another thread of this program"):
            llmva.align(model, tokenizer, prompts(), **FAST)
    finally:
        go.set()
        thread.join()
    assert digests == [wanted]


def test_two_models_in_two_threads_share_a_tokenizer(taught: tuple[Any, str], tokenizer: Any) -> None:
    """It held before."""
    models = [copy.deepcopy(taught[0]) for _ in range(2)]
    digests: list[str] = []
    threads = [
        threading.Thread(
            target=lambda model=model: digests.append(llmva.align(model, tokenizer, prompts(), **FAST).every.digest())
        )
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [taught[1]] * 2


def test_a_folder_is_held_against_other_threads(tmp_path: Path) -> None:
    held = lock(tmp_path)
    again = lock(tmp_path)  # a notebook's next try, which held before
    error = in_a_thread(lambda: lock(tmp_path / "."))
    assert isinstance(error, LlmvaError)
    assert "Another llmva is at work in" in str(error)
    held.close()
    assert isinstance(in_a_thread(lambda: lock(tmp_path)), LlmvaError)
    again.close()
    again.close()
    mine = in_a_thread(lambda: lock(tmp_path))
    lock(tmp_path).close()  # what a thread held ends with it
    mine.close()


def test_two_aligns_into_one_folder(tmp_path: Path) -> None:
    held = lock(tmp_path / "run")
    error = in_a_thread(lambda: llmva.align(tiny_model(), tiny_tokenizer(), prompts(), out=tmp_path / "run", **FAST))
    assert "Another llmva is at work" in str(error)
    held.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


# -- several devices -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two kinds of devices, by which a hook sees other outputs")
def test_blocks_on_other_devices_are_hashed_and_edited_as_one() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, spread, tokenizer = taught_model(), taught_model(), tiny_tokenizer()
    spread.to("cuda")
    for number, layer in enumerate(spread.model.layers):
        device = "cpu" if number == 1 else "cuda"
        add_hook_to_module(layer.to(device), AlignDevicesHook(execution_device=device, io_same_device=True))
    one, other = (fingerprint(llmva.find_decoder(m), "x") for m in (model, spread))
    assert one == other
    edit = an_edit(model)
    plain = llmva.capture(model, tokenizer, TEXTS, max_new_tokens=4)
    with edit.apply(model):
        wanted = llmva.capture(model, tokenizer, TEXTS, max_new_tokens=4)
    with edit.apply(spread):
        got = llmva.capture(spread, tokenizer, TEXTS, max_new_tokens=4)
    assert got.answers == wanted.answers
    torch.testing.assert_close(got.outputs, wanted.outputs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain.outputs, wanted.outputs, rtol=0.1)
    result = llmva.align(spread, tokenizer, prompts(), **FAST)
    assert result.every.factors
    edit.bake(spread)
    assert {p.device.type for p in spread.parameters()} == {"cpu", "cuda"}


# -- what a program has set for itself -----------------------------------------------------------------------------


@contextmanager
def of_default(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    """As libraries leave it after an error, or programs set it."""
    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    if device is not None:
        torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], Any]] = {
    "bfloat16 by default": lambda: of_default(torch.bfloat16),
    "float64 by default": lambda: of_default(torch.float64),
    "the meta device by default": lambda: of_default(device="meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,  # the edit was a poorer one, without gradients
    "no gradients": torch.no_grad,  # held
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_program_has_set_changes_nothing(setting: str, taught: tuple[Any, str]) -> None:
    model, digest = copy.deepcopy(taught[0]), taught[1]
    with SETTINGS[setting]():
        before = (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"))
        assert llmva.align(model, tiny_tokenizer(), prompts(), **FAST).every.digest() == digest
        assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu")) == before


def test_a_model_that_was_loaded_in_inference_mode_is_refused(taught: tuple[Any, str]) -> None:
    """The edit was a poorer one: no gradients pass such weights, and none were used."""
    with torch.inference_mode():
        model = copy.deepcopy(taught[0])
    with pytest.raises(UsageError, match=r"loaded inside torch\.inference_mode\(\)"):
        llmva.align(model, tiny_tokenizer(), prompts(), **FAST)


def test_deterministic_algorithms_are_no_obstacle(taught: tuple[Any, str]) -> None:
    """This held."""
    torch.use_deterministic_algorithms(True)
    try:
        found = llmva.align(copy.deepcopy(taught[0]), tiny_tokenizer(), prompts(), **FAST)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.every.digest() == taught[1]


UNREADABLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "compiled": (torch.compile, r"wrapped in OptimizedModule.*give what it holds, model\._orig_mod"),
    "data parallel": (torch.nn.DataParallel, r"wrapped in DataParallel.*give what it holds, model\.module"),
    "without numbers": (lambda model: model.to("meta"), "on the meta device.*load_model"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_models_that_cannot_be_read_as_they_are(case: str, model: Any) -> None:
    change, words = UNREADABLE[case]
    with pytest.raises(UsageError, match=words):
        llmva.align(change(model), tiny_tokenizer(), prompts(), **FAST)


def test_hooks_of_other_programs_are_told(model: Any) -> None:
    """Steering by another library is in every figure and in no export."""
    assert not llmva.ChatModel.of(model, tiny_tokenizer()).limits
    with an_edit(model).apply(model):
        assert not llmva.ChatModel.of(model, tiny_tokenizer()).limits
    model.model.embed_tokens.register_forward_hook(partial(lambda bias, module, args, out: out + bias, 0.5))
    (limit,) = llmva.ChatModel.of(model, tiny_tokenizer()).limits
    assert "forward hooks that are not llmva's, on model.embed_tokens" in limit


def test_weights_that_two_modules_share_are_not_baked(model: Any) -> None:
    """Both projections were changed by both edits, and the baked model was another than the hooked one."""
    blocks = model.model.layers
    edit = an_edit(model)
    blocks[2].mlp.down_proj.weight = blocks[1].mlp.down_proj.weight
    edit.apply(model, check=False).remove()
    before = logits(model)
    with pytest.raises(LlmvaError, match=r"layers\.1\.mlp\.down_proj and .*layers\.2\.mlp\.down_proj share"):
        edit.bake(model, check=False)
    assert torch.equal(before, logits(model))
