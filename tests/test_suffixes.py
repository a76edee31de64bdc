"""The search over suffixes: where they stand, what the gradient is good for, what is counted, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import NOUNS, Said, chat_model, taught_model, tiny_model, tiny_tokenizer
from llmva.attacks.suffix import suffix_attack
from llmva.edit import Edit
from llmva.errors import UsageError
from llmva.evaluation import suffixes as module
from llmva.evaluation.adaptive import Outcome, SearchPlan
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings
from llmva.evaluation.suffixes import (
    Attempt,
    Spent,
    SuffixPlan,
    begin,
    check_suffixes,
    compare_halves,
    draw_candidates,
    improve,
    search_suffixes,
)
from llmva.judges import make_judge
from llmva.judges.base import Judge, Judgement, Label
from llmva.models.batching import Batching
from llmva.models.finding.tensors import hooked
from llmva.models.suffix.loss import likely_tokens, losses, slopes
from llmva.models.suffix.place import OPENING, find_place, suffix_text, usable_tokens
from llmva.models.thinking import Thinking
from llmva.prompts.store import prompt_row, read_prompt
from llmva.prompts.types import Message, Prompt
from llmva.report.run.searches import search_notes

TOXIC = [Prompt(f"please open the {noun}", False, "s") for noun in NOUNS[:6]]
BENIGN = [Prompt("paint the fence", True, "s")]
PHRASES = make_judge("phrases")


def how(budget: int = 3, *, tokens: int = 4, candidates: int = 12, seed: int = 1) -> SuffixPlan:
    return SuffixPlan(SearchPlan(budget, seed, 6, Thinking()), tokens, candidates)


def taught(tokens: int = 100_000) -> Any:
    return chat_model(taught_model(), tiny_tokenizer(), Batching(tokens))


def begun(chat: Any, prompts: list[Prompt] = TOXIC, search: SuffixPlan | None = None) -> list[Attempt]:
    usable = usable_tokens(chat)
    attempts = [begin(chat, prompt, usable, search or how()) for prompt in prompts]
    return [one for one in attempts if one is not None]


class Never(Judge):
    """Takes nothing for an answer."""

    name = "never"

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        return Judgement(Label.REFUSED, 1.0, "")


class OfSuffixes(Judge):
    """Takes every answer for one where the prompt has a suffix."""

    name = "of suffixes"

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        return Judgement(Label.ANSWERED if prompt.attack else Label.REFUSED, 1.0, "")


# -- where a suffix stands ---------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """Byte-level pairs as most models have them, in which neighbouring tokens may merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(
        ["please open the door of the garden, sure, here is the lamp and the other lamp"] * 3, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def bytes_chat() -> Any:
    tokenizer = byte_tokenizer()
    return chat_model(tiny_model(vocab_size=len(tokenizer)), tokenizer)


def test_the_model_is_asked_what_was_scored(bytes_chat: Any) -> None:
    dialogue = Prompt.of((Message("system", "be brief"), Message("user", "open it"), Message("assistant", "ok")),
                         False, "s")  # fmt: skip
    for chat, prompts in ((taught(), TOXIC), (bytes_chat, [*TOXIC, dialogue])):
        for one in begun(chat, prompts):
            row = chat.row(one.form(chat).asked)
            assert row == one.place.row(one.suffix)[: -one.place.opening]
            opening = chat.tokenizer.decode(one.place.tail[-one.place.opening :]).strip()
            assert chat is not bytes_chat or opening == OPENING
            assert one.place.comes_back(chat, one.suffix)
            assert len(one.suffix) == 4
            attack = suffix_attack(suffix_text(chat, one.suffix))
            assert attack.read_back(one.form(chat)) == one.prompt.asked if one.prompt.messages is None else "open it"
            assert one.form(chat).text == one.prompt.text  # judges see the request


def test_tokens_that_merge_are_left_out(bytes_chat: Any) -> None:
    (drawn,) = begun(bytes_chat, TOXIC[:1])
    ids = {bytes_chat.tokenizer.convert_ids_to_tokens(i): i for i in range(len(bytes_chat.tokenizer))}
    words = [ids[word] for word in ("Ġlamp", "Ġthe", "Ġother", "Ġgarden")]
    place = find_place(bytes_chat, lambda text: suffix_attack(text).apply(TOXIC[0]).asked, words)
    assert place is not None
    one = replace(drawn, place=place, suffix=words)
    assert one.place.comes_back(bytes_chat, [ids["Ġthe"]] * 4)
    assert not one.place.comes_back(bytes_chat, [ids["Ġ"], ids["t"], ids["h"], ids["e"]])
    likely = likely_tokens(bytes_chat, torch.randn(4, 32), usable_tokens(bytes_chat), 30)
    others = draw_candidates(bytes_chat, one, likely, 1000)
    assert 0 < len(others) < likely.numel()
    assert all(one.place.comes_back(bytes_chat, other) for other in others)
    assert all(sum(a != b for a, b in zip(other, one.suffix, strict=True)) == 1 for other in others)
    assert len({tuple(other) for other in others}) == len(others)


def test_special_added_and_unprintable_tokens_are_not_used(bytes_chat: Any) -> None:
    texts = [bytes_chat.tokenizer.decode([i]) for i in usable_tokens(bytes_chat)]
    assert "the" in [text.strip() for text in texts]
    assert not {"<pad>", "<s>", "</s>", "<think>", "\n", " ", "\N{REPLACEMENT CHARACTER}"} & set(texts)
    wider = chat_model(tiny_model(vocab_size=9), tiny_tokenizer())
    assert max(usable_tokens(wider)) < 9  # no token that the model has no embedding of


# -- the gradient ------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_loss() -> None:
    chat = taught()
    attempts = begun(chat)
    sloping, read = slopes(chat, [one.place for one in attempts], [one.suffix for one in attempts])
    assert read == sum(len(one.place.row(one.suffix)) for one in attempts)
    for one, slope in zip(attempts[:3], sloping, strict=False):
        step = 1e-3 * torch.randn(slope.gradient.shape, generator=torch.Generator().manual_seed(3))
        start, end = len(one.place.head), len(one.place.head) + len(one.suffix)

        def moved(sign: int, one: Attempt = one, step: Any = step, start: int = start, end: int = end) -> float:
            def add(inner: Any, args: Any, output: Any) -> Any:
                return output.clone().index_add_(1, torch.arange(start, end), sign * step[None])

            with hooked([chat.model.get_input_embeddings().register_forward_hook(add)]):
                (value,), _ = losses(chat, one.place, [one.suffix])
            return value

        assert (moved(1) - moved(-1)) / 2 == pytest.approx(float((slope.gradient * step).sum()), rel=0.05, abs=1e-4)
        assert slope.loss == pytest.approx(losses(chat, one.place, [one.suffix])[0][0], abs=1e-5)


def test_the_gradient_picks_better_tokens_than_chance() -> None:
    chat, usable = taught(), usable_tokens(taught())
    attempts = begun(chat)
    sloping, _ = slopes(chat, [one.place for one in attempts], [one.suffix for one in attempts])
    means = []
    for one, slope in zip(attempts, sloping, strict=True):
        picked = likely_tokens(chat, slope.gradient, usable, 5)
        anything = torch.tensor(usable).expand(4, -1)
        both = [losses(chat, one.place, draw_candidates(chat, one, t, 1000))[0] for t in (picked, anything)]
        means.append([sum(one) / len(one) for one in both])
    better = sum(by_gradient < by_chance for by_gradient, by_chance in means)
    assert better >= len(means) - 1
    assert sum(a for a, _ in means) < sum(b for _, b in means) - 0.05 * len(means)


def test_likely_tokens_are_the_best_of_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = taught()
    gradients = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    usable = usable_tokens(chat)
    whole = likely_tokens(chat, gradients, usable, 7)
    gain = -(gradients @ chat.model.get_input_embeddings().weight[usable].T)
    assert whole.tolist() == torch.tensor(usable)[gain.topk(7).indices].tolist()
    monkeypatch.setattr("llmva.models.suffix.loss.CHUNK", 10)
    assert torch.equal(likely_tokens(chat, gradients, usable, 7), whole)


def test_the_loss_falls_and_never_rises() -> None:
    chat = taught()
    attempts = begun(chat)
    usable, spent = usable_tokens(chat), Spent()
    for _ in range(4):
        before = [list(one.suffix) for one in attempts]
        changed = improve(chat, attempts, usable, 12, spent)
        assert changed == [one.suffix != old for one, old in zip(attempts, before, strict=True)]
    for one in attempts:
        assert len(one.trace) == 5
        assert one.trace == sorted(one.trace, reverse=True)
        assert one.trace[-1] < one.trace[0] - 0.2
        assert losses(chat, one.place, [one.suffix])[0][0] == pytest.approx(one.trace[-1], abs=1e-5)


# -- the search --------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_batch() -> None:
    wide, narrow = (search_suffixes(taught(tokens), TOXIC, Never(), how()) for tokens in (100_000, 30))
    assert wide.record["loss"] == pytest.approx(narrow.record["loss"], abs=1e-5)
    assert [p for one in wide.seen for p in one.prompts] == [p for one in narrow.seen for p in one.prompts]
    again = search_suffixes(taught(), TOXIC, Never(), how())
    assert again.record == wide.record
    other = search_suffixes(taught(), TOXIC, Never(), how(seed=2))
    assert other.seen[2].prompts != wide.seen[2].prompts


def test_a_smaller_budget_is_a_part_of_a_larger_one() -> None:
    chat = taught()
    short, long = (search_suffixes(chat, TOXIC, PHRASES, how(budget)) for budget in (1, 4))
    assert long.record["by_step"][:2] == short.record["by_step"]
    assert {i: at for i, at in long.fell_at.items() if at <= 1} == short.fell_at


def test_prompts_are_asked_until_they_fall() -> None:
    chat = taught()
    outcome = search_suffixes(chat, [*BENIGN, *TOXIC], PHRASES, how(6, candidates=16))
    record = outcome.record
    assert not any(prompt.benign for one in outcome.seen for prompt in one.prompts)
    assert outcome.seen[0].prompts == TOXIC  # as they stand
    assert record["n"] == len(TOXIC)
    assert 0 < record["by_step"][0] < record["fallen"] == record["by_step"][-1]  # the search does something
    assert record["censored"] == len(TOXIC) - len(outcome.fallen)
    assert record["half"] == next(step for step, share in enumerate(record["by_step"]) if share >= 0.5)
    for prompt in outcome.fallen:
        (answer,) = chat_answers(chat, prompt)
        assert PHRASES.answered(prompt, answer).label is Label.ANSWERED  # the judge decides, on what was asked
        assert read_prompt(prompt_row(prompt), "here", split=False) == prompt  # as extend reads it
    assert {prompt.attack.partition(":")[0] for prompt in outcome.fallen} == {"", "suffix"}


def chat_answers(chat: Any, prompt: Prompt) -> list[str]:
    from llmva.models.generate import answer_prompts

    return answer_prompts(chat, [prompt.asked], max_new_tokens=6).answers


def test_what_is_spent_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = taught()
    read = {"rows": 0, "losses": 0}

    def counting_losses(chat: Any, place: Any, tried: Any) -> Any:
        assert tried[0] not in tried[1:]
        shared = min(i for i in range(99) if len({tuple(place.row(one)[: i + 1]) for one in tried}) > 1)
        read["losses"] += shared + len(tried) * (len(place.row(tried[0])) - shared)
        return losses(chat, place, tried)

    def counting_slopes(chat: Any, places: Any, suffixes: Any) -> Any:
        read["rows"] += sum(len(place.row(one)) for place, one in zip(places, suffixes, strict=True))
        return slopes(chat, places, suffixes)

    monkeypatch.setattr(module, "losses", counting_losses)
    monkeypatch.setattr(module, "slopes", counting_slopes)
    assert chat.decodes()
    outcome = search_suffixes(chat, TOXIC, Never(), how(3))
    cost = outcome.record["cost"]
    assert cost["gradient_steps"] == 3 * len(TOXIC)  # nothing fell
    assert cost["forward_tokens"] == read["losses"] + read["rows"]
    assert cost["generated_tokens"] == sum(one.capture.tokens for one in outcome.seen) > 0
    assert (outcome.record["half"], outcome.record["censored"]) == (None, len(TOXIC))


def test_an_unchanged_suffix_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw_candidates", lambda *args: [])
    outcome = search_suffixes(taught(), TOXIC, Never(), how(3))
    assert len(outcome.seen) == 2  # as they stand, and with the drawn suffixes
    assert outcome.record["cost"]["gradient_steps"] == 3 * len(TOXIC)


def test_the_drawn_suffix_is_asked_for_comparison_and_counts_for_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = taught()
    monkeypatch.setattr(module, "improve", lambda chat, attempts, *rest: [False] * len(attempts))
    outcome = search_suffixes(chat, TOXIC, OfSuffixes(), how(1))
    drawn = outcome.seen[1]
    assert [prompt.text for prompt in drawn.prompts] == [prompt.text for prompt in TOXIC]
    assert all(prompt.attack.startswith("suffix:") for prompt in drawn.prompts)
    assert outcome.record["drawn"] == {"n": len(TOXIC), "fallen": 1.0}
    assert (outcome.record["by_step"], outcome.fallen) == ([0.0, 0.0], [])
    plainly = search_suffixes(chat, TOXIC, PHRASES, how(1)).record
    assert plainly["drawn"]["n"] == len(TOXIC) - round(plainly["by_step"][0] * len(TOXIC))  # those refused so far


def test_prompts_without_room_are_told() -> None:
    chat = taught()
    room = len(chat.row(TOXIC[0].asked)) + 6 + 4 + 4
    chat.model.config.max_position_embeddings = room
    assert search_suffixes(chat, TOXIC, Never(), how(1)).record["too_long"] == 0
    chat.model.config.max_position_embeddings = room - 1
    record = search_suffixes(chat, TOXIC, Never(), how(1)).record
    assert (record["too_long"], record["n"], record["loss"]) == (len(TOXIC), len(TOXIC), None)
    assert record["cost"]["forward_tokens"] == 0


def test_the_edit_is_searched_by_hook() -> None:
    """Loss and gradient with the hooks on are those of weights that have the edit, not of the untouched."""
    chat = taught()
    name = chat.decoder.names[3]
    generator = torch.Generator().manual_seed(0)
    v, u = (0.4 * torch.randn(32, generator=generator) for _ in range(2))
    edit = Edit().then(name, v, u, 1)
    attempts = begun(chat)
    places, words = [one.place for one in attempts], [one.suffix for one in attempts]
    untouched, _ = slopes(chat, places, words)
    with edit.apply(chat.model, check=False):
        hooked_on, _ = slopes(chat, places, words)
        by_losses = [losses(chat, place, [word])[0][0] for place, word in zip(places, words, strict=True)]
    baked = taught()
    edit.bake(baked.model, check=False)
    inside, _ = slopes(baked, places, words)
    for one, other, first, loss in zip(hooked_on, inside, untouched, by_losses, strict=True):
        torch.testing.assert_close(one.gradient, other.gradient, atol=1e-5, rtol=1e-3)
        assert one.loss == pytest.approx(other.loss, abs=1e-5) == pytest.approx(loss, abs=1e-5)
        assert abs(one.loss - first.loss) > 1e-3


# -- before and after --------------------------------------------------------------------------------------------


def outcome(fell_at: dict[int, int], n: int, budget: int) -> Outcome:
    shares = [sum(at <= step for at in fell_at.values()) / n for step in range(budget + 1)]
    half = next((step for step, share in enumerate(shares) if share >= 0.5), None)
    return Outcome({"half": half}, [], [], fell_at, set(range(n)))


@pytest.mark.parametrize(
    ("before", "after", "of_all", "refused"),
    [
        ({0: 0, 1: 2, 2: 2, 3: 3}, {1: 8, 2: 9}, (2, 9, 4.5, False), (3, 2, 9, 4.5, False)),
        ({0: 0, 1: 0, 2: 1, 3: 2}, {2: 6}, (0, None, None, False), (2, 1, 6, 6.0, False)),
        ({0: 2, 1: 2, 2: 2}, {0: 4}, (2, None, 5.5, True), (4, 2, None, 5.5, True)),
        ({0: 9}, {0: 3, 1: 4}, (None, 4, None, False), (4, None, 4, None, False)),
        ({0: 0, 1: 0, 2: 0, 3: 0}, {}, (0, None, None, False), (0, None, None, None, False)),
    ],
)
def test_steps_compare(before: Any, after: Any, of_all: Any, refused: Any) -> None:
    first, second = outcome(before, 4, 10), outcome(after, 4, 10)
    compared = compare_halves(first, second, 10)
    assert (first.record["half"], second.record["half"], compared["ratio"], compared["at_least"]) == of_all
    assert tuple(compared["refused"].values()) == refused


def test_sentences_say_what_fell_and_what_did_not() -> None:
    sides: dict[str, Any] = {
        "before": {"n": 9, "fallen": 1.0, "half": 0, "censored": 0},
        "after": {"n": 9, "fallen": 1 / 3, "half": None, "censored": 6},
    }
    refused = {"n": 4, "before": 2, "after": None, "ratio": 4.5, "at_least": True}
    (said,) = search_notes({"suffix": {"budget": 8, **sides, "refused": refused}})
    assert said == (
        "Search over suffixes, at most 8 steps to a toxic prompt: 100.0% of 9 fell without the edit, half as they "
        "stand; 33.3% of 9 fell with it, half not within 8 steps, 6 never did. Of the 4 that are refused as they stand "
        "by both: half by step 2 without the edit, half not within 8 steps with it, at least 4.5 times the steps."
    )
    (said,) = search_notes({"suffix": {"budget": 8, **sides, "refused": {"n": 4, "before": None, "after": None}}})
    assert said.endswith("so the budget is too small for a factor.")
    sides["before"]["drawn"], sides["after"]["drawn"] = {"n": 4, "fallen": 0.25}, {"n": 9, "fallen": 1.0}
    (said,) = search_notes({"suffix": {"budget": 8, **sides, "refused": {"n": 0}}})
    assert "before any step, makes it answer 25.0% without the edit, 100.0% with it. No prompt" in said
    assert said.endswith("so no steps compare.")


def test_an_evaluation_has_both_searches_and_keeps_what_fell() -> None:
    settings = EvaluationSettings(
        max_new_tokens=6, endings_tokens=0, adaptive=2, search="both", suffix_tokens=4, candidates=12
    )
    record = evaluate(taught(), [*TOXIC, *BENIGN], PHRASES, settings)
    assert record["adaptive"]["budget"] == record["suffix"]["budget"] == 2
    about = {key: record["suffix"][key] for key in ("tokens", "candidates", "opening")}
    assert about == {"tokens": 4, "candidates": 12, "opening": OPENING}
    assert record["suffix"]["before"]["by_step"][0] == record["test"]["before"]["asr"]
    kinds = {row.get("attack", "").partition(":")[0] for row in record["failed"]}
    assert "suffix" in kinds
    assert "ratio" not in record["suffix"]  # without an edit there is nothing to compare
    plain = evaluate(taught(), TOXIC, PHRASES, replace(settings, search="transforms", suffix_tokens=10, candidates=64))
    assert "suffix" not in plain


# -- what is refused ---------------------------------------------------------------------------------------------


@contextmanager
def without_gradients(model: Any) -> Iterator[None]:
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = torch.no_grad()(own)
    try:
        yield
    finally:
        layer.forward = own


def test_a_model_without_gradients_is_refused_before_any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = taught()
    settings = EvaluationSettings(max_new_tokens=6, adaptive=2, search="suffix", suffix_tokens=4)
    monkeypatch.setattr("llmva.evaluation.evaluate.observe", lambda *a, **k: pytest.fail("an answer was generated"))
    with without_gradients(chat.model), pytest.raises(UsageError, match="No gradient passes the weights"):
        evaluate(chat, TOXIC, PHRASES, settings)
    thinks = SuffixPlan(replace(how().plan, thinking=Thinking(anyway=True)), 4, 12)
    with pytest.raises(UsageError, match="thinks before it answers"):
        check_suffixes(chat, TOXIC, thinks)
    check_suffixes(chat, BENIGN, how())  # nothing to search, nothing to refuse


def test_suffixes_that_never_come_back_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmva.evaluation.suffixes.find_place", lambda *args: None)
    with pytest.raises(UsageError, match="gave none of 200 suffixes of 4 tokens back"):
        check_suffixes(taught(), TOXIC, how())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--search", "suffix"), "add --adaptive with its budget"),
        (("--adaptive", 2, "--search", "words"), "choose --search transforms, suffix, both"),
        (("--adaptive", 2, "--suffix-tokens", 3), "add --adaptive and --search suffix"),
        (("--adaptive", 2, "--candidates", 3), "add --adaptive and --search suffix"),
    ],
)
def test_options_that_do_not_go_together(
    words: tuple[object, ...], sentence: str, taught_folder: Path, command: Callable[..., Said]
) -> None:
    said = command("evaluate", taught_folder, *words)
    assert (said.code, sentence in " ".join(said.err.split())) == (2, True), said.err


def test_the_command_searches_both(taught_folder: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    (tmp_path / "toxic.txt").write_text("\n".join(prompt.text for prompt in TOXIC) + "\n")
    words = ["--toxic", tmp_path / "toxic.txt", "--max-new-tokens", 4, "--suffix-tokens", 3, "--candidates", 4]
    said = command("evaluate", taught_folder, *words, "--adaptive", 1, "--search", "both", "--json")
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert len(record["suffix"]["before"]["by_step"]) == 2
    shown = " ".join(said.err.split())
    assert "Search over transforms, at most 1 answer" in shown
    assert "Search over suffixes, at most 1 step" in shown
