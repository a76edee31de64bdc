"""What an edit does elsewhere: agreement against a direct computation, and outputs at the right positions."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import chat_model, tiny_model, tiny_tokenizer
from llmva.edit import Edit
from llmva.models import harmless
from llmva.models.batching import Batching
from llmva.models.chat import encode, render
from llmva.models.harmless import MAX_ANSWER, Agreement, agreement, outputs_on_text, random_messages
from llmva.models.sublayers import Decoder, find_decoder
from test_generate import CHANGES, hooks, sized

TEXTS = [
    ("please open the door", "sure here is how to do it"),
    ("trap", "no"),
    (
        "tell me how to fix the lamp and paint the fence for a song",
        "a table for the garden . please clean it",
    ),
    ("explain the kettle", ""),
]
ROOMY = 100_000


def random_edit(decoder: Decoder, size: float) -> Edit:
    """One map in every sublayer; `size` is how far it moves what it reads."""
    g = torch.Generator().manual_seed(0)
    edit = Edit()
    for name in decoder.names:
        v, u = torch.nn.functional.normalize(torch.randn(2, decoder.width, generator=g), dim=-1)
        edit = edit.then(name, size * v, u, 1)
    return edit


def tokens(prompt: str, answer: str) -> tuple[list[int], list[int]]:
    tokenizer = tiny_tokenizer()
    return encode(tokenizer, render(tokenizer, prompt)), tokenizer(answer, add_special_tokens=False)["input_ids"]


def applied(decoder: Decoder, edit: Edit) -> Any:
    return lambda: edit.apply(decoder.model, check=False)


def compare(decoder: Decoder, edit: Edit, **options: Any) -> Agreement:
    batching = options.pop("batching", Batching(ROOMY))
    return agreement(chat_model(decoder, tiny_tokenizer(), batching), TEXTS, applied(decoder, edit), **options)


def test_no_edit_changes_nothing() -> None:
    found = compare(find_decoder(sized(tiny_model())), Edit())
    assert found.kept == [1.0] * 4
    assert found.kl == [0.0] * 4
    assert (found.mean_kept, found.mean_kl) == (1.0, 0.0)


def test_larger_edits_agree_less() -> None:
    decoder = find_decoder(sized(tiny_model()))
    found = [compare(decoder, random_edit(decoder, size)) for size in (0.01, 0.3, 1.5, 6.0)]
    kept, kl = [f.mean_kept for f in found], [f.mean_kl for f in found]
    assert kept == sorted(kept, reverse=True)
    assert kl == sorted(kl)
    assert kept[0] > 0.9
    assert kept[-1] < 0.5
    assert 0 < kl[0] < 1e-2 < 0.3 < kl[-1]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.125), (torch.float32, 16 * 2.0**-23)])
def test_a_token_within_the_rounding_of_its_logit_is_kept(dtype: torch.dtype, rounding: float) -> None:
    """Around a logit of 16 numbers of bfloat16 are .125 apart: tokens that near are as likely."""
    model = sized(tiny_model()).to(dtype)
    chat = chat_model(model, tiny_tokenizer())
    head, tokens = model.get_output_embeddings(), 8

    def logits(best: int, by: float) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            fixed = torch.zeros_like(output)
            fixed[..., :tokens] = 16.0 - by
            fixed[..., best] = 16.0
            return fixed

        return head.register_forward_hook(hook)

    def kept(by: float) -> float:
        hooks = []

        @contextmanager
        def hooked(best: int) -> Any:
            hooks.append(logits(best, by))
            yield
            hooks.pop().remove()

        return agreement(chat, TEXTS[:2], lambda: hooked(1), against=lambda: hooked(0)).mean_kept

    assert kept(rounding / 2) == 1.0
    assert kept(2 * rounding) == 0.0


@pytest.mark.parametrize("config", CHANGES)
def test_agreement_equals_a_direct_computation(config: str) -> None:
    """Each text alone, unpadded: positions from the last prompt token to the answer's last."""
    model = sized(tiny_model(config, **CHANGES[config]))
    decoder = find_decoder(model)
    # experts of a mixture are chosen by a gate: hook the attention only, whatever the model
    edit = Edit({n: f for n, f in random_edit(decoder, 0.7).factors.items() if n in decoder.names[::2]})
    found = compare(decoder, edit)
    for i, (prompt, answer) in enumerate(TEXTS):
        p, a = tokens(prompt, answer)
        ids = torch.tensor([p + a])
        original = model(input_ids=ids).logits[0, len(p) - 1 :].double().log_softmax(-1)
        with edit.apply(model):
            edited = model(input_ids=ids).logits[0, len(p) - 1 :].double().log_softmax(-1)
        assert len(original) == len(a) + 1
        assert found.kept[i] == pytest.approx(float((original.argmax(-1) == edited.argmax(-1)).double().mean()))
        kl = torch.nn.functional.kl_div(edited, original, reduction="none", log_target=True).sum(-1).mean()
        assert found.kl[i] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        said = torch.tensor(a, dtype=torch.long)[:, None]
        rise = (original[:-1].gather(1, said) - edited[:-1].gather(1, said)).sum()
        assert found.rise[i] == pytest.approx(float(rise), rel=1e-3, abs=1e-5)
        assert found.tokens[i] == len(a)
    assert max(found.kl) > 1e-3
    assert found.perplexity_ratio == pytest.approx(math.exp(sum(found.rise) / sum(found.tokens)))
    assert hooks(model) == 0


def test_batches_of_any_size_agree() -> None:
    decoder = find_decoder(sized(tiny_model()))
    edit, done = random_edit(decoder, 0.7), list[int]()
    whole = compare(decoder, edit)
    one_by_one = compare(decoder, edit, batching=Batching(1), on_progress=done.append)
    assert one_by_one.kept == pytest.approx(whole.kept)
    assert one_by_one.kl == pytest.approx(whole.kl, rel=1e-3)
    assert done == [1, 1, 1, 1]


def test_logits_held_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = find_decoder(sized(tiny_model()))
    edit, done = random_edit(decoder, 0.7), list[int]()
    whole = compare(decoder, edit)
    monkeypatch.setattr(harmless, "MAX_LOGIT_BYTES", 4 * 55 * 12)
    assert compare(decoder, edit, on_progress=done.append).kept == pytest.approx(whole.kept)
    assert len(done) > 1


def test_long_answers_are_cut() -> None:
    decoder = find_decoder(sized(tiny_model()))
    edit = random_edit(decoder, 0.7)
    words = "a song for the garden " * 20
    cut = " ".join(words.split()[:MAX_ANSWER])
    hooks_on = applied(decoder, edit)
    both = [
        agreement(chat_model(decoder, tiny_tokenizer(), Batching(ROOMY)), [("trap", a)], hooks_on) for a in (words, cut)
    ]
    assert both[0] == both[1]


def test_mean_of_nothing() -> None:
    assert Agreement([], [], [], []).mean_kept == 0.0
    assert Agreement([], [], [], []).mean_kl == 0.0


# -- outputs ---------------------------------------------------------------------------------------------------------


def all_outputs(decoder: Decoder) -> list[Tensor]:
    """Per text, outputs at every position but the last prompt token: [S, positions, d]."""
    found = []
    for prompt, answer in TEXTS:
        p, a = tokens(prompt, answer)
        seen: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
            o = output[0] if isinstance(output, tuple) else output
            seen.append(o.reshape(-1, o.shape[-1]))

        handles = [s.output.register_forward_hook(keep) for s in decoder.sublayers]
        decoder.model(input_ids=torch.tensor([p + a]))
        for handle in handles:
            handle.remove()
        positions = [t for t in range(len(p) + len(a)) if t != len(p) - 1]
        found.append(torch.stack(seen)[:, positions])
    return found


def on_text(decoder: Decoder, limit: int, seed: int = 0, tokens: int = ROOMY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return outputs_on_text(chat_model(decoder, tiny_tokenizer(), Batching(tokens)), TEXTS, limit, generator)


@pytest.mark.parametrize("config", CHANGES)
def test_outputs_at_all_positions_but_the_decision(config: str) -> None:
    model = sized(tiny_model(config, **CHANGES[config]))
    decoder = find_decoder(model)
    wanted = torch.cat(all_outputs(decoder), 1)
    for size in (ROOMY, 1):
        found = on_text(decoder, 10_000, tokens=size)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    assert hooks(model) == 0


def test_a_limited_draw_is_even_and_repeatable() -> None:
    decoder = find_decoder(sized(tiny_model()))
    every = torch.cat(all_outputs(decoder), 1)
    first = on_text(decoder, 12, seed=3)
    assert first.shape == (6, 12, 32)
    assert torch.equal(first, on_text(decoder, 12, seed=3))
    assert not torch.equal(first, on_text(decoder, 12, seed=4))
    torch.testing.assert_close(first, on_text(decoder, 12, seed=3, tokens=1), rtol=1e-4, atol=1e-5)

    def places(found: Tensor) -> set[int]:
        """Which of all positions were drawn, by their outputs."""
        return set(torch.cdist(found[3], every[3]).argmin(-1).tolist())

    assert len(places(first)) == 12
    drawn = set().union(*(places(on_text(decoder, 12, seed=seed)) for seed in range(30)))
    assert len(drawn) > 0.9 * len(torch.unique(every[3], dim=0))


def test_random_messages_are_repeatable_and_free_of_special_tokens() -> None:
    chat = chat_model(tiny_model(), tiny_tokenizer())
    drawn = [random_messages(chat, 50, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 50
    for message in drawn[0]:
        assert 3 <= len(message.split()) <= 14
        assert "<" not in message
    assert len({word for message in drawn[0] for word in message.split()}) > 40


def test_what_the_original_says_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = find_decoder(sized(tiny_model()))
    chat, known = chat_model(decoder, tiny_tokenizer()), harmless.Known()
    edit, rows = random_edit(decoder, 0.7), list[int]()
    whole = agreement(chat, TEXTS, applied(decoder, edit))
    agreement(chat, TEXTS[:2], applied(decoder, Edit()), known=known)
    assert set(known) == set(TEXTS[:2])
    read = harmless.read_rows

    def noted(model: Any, padding: int, some: Any, *rest: Any) -> Tensor:
        rows.append(len(some))
        return read(model, padding, some, *rest)

    monkeypatch.setattr(harmless, "read_rows", noted)
    found = agreement(chat, TEXTS, applied(decoder, edit), known=known)
    assert sum(rows) == 2 + 4  # two originals were missing
    assert found.kept == whole.kept
    assert found.kl == pytest.approx(whole.kl, rel=1e-3)
    assert found.rise == pytest.approx(whole.rise, rel=1e-3, abs=1e-5)


def test_tokens_that_are_hardly_ever_said_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence is that of a coarser look: never more, and nearly all of it."""
    decoder = find_decoder(sized(tiny_model()))
    edit = random_edit(decoder, 0.7)
    whole = compare(decoder, edit)
    for kept, share in ((40, 0.95), (3, 0.3)):
        monkeypatch.setattr(harmless, "KEPT_TOKENS", kept)
        found = compare(decoder, edit)
        assert found.kept == whole.kept
        assert found.rise == pytest.approx(whole.rise)
        assert share * whole.mean_kl < found.mean_kl < whole.mean_kl
