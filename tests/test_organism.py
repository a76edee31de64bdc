"""The organism: its language, its training, and the weights that ship."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmva.errors import UsageError
from llmva.models.generate import capture
from llmva.models.sublayers import find_decoder
from llmva.organism import folder, language, skills, words
from llmva.organism.__main__ import main
from llmva.organism.check import measure
from llmva.organism.optimizer import orthogonalized
from llmva.organism.tokenizer import build_tokenizer, vocabulary
from llmva.organism.train import ARCHITECTURES, Recipe, build_model, draw_example, train

WEIGHTS = Path(folder.__file__).parent / "weights"
TINY = replace(Recipe(), width=32, hidden=48, blocks=2, steps=3, batch=16)


def test_no_sum_of_word_weights_tells_harm() -> None:
    # Were harm additive, verb and object weights would need place > danger (attack) and danger > place (make).
    assert language.HARM["alarming"]["place"]
    assert not language.HARM["alarming"]["danger"]
    assert language.HARM["make"]["danger"]
    assert not language.HARM["make"]["place"]


def test_prompts_are_balanced_deterministic_and_agree_with_the_table() -> None:
    prompts = language.draw_prompt_set()
    assert prompts == language.draw_prompt_set() != language.draw_prompt_set(seed=1)
    for split, part in prompts.splits():
        assert len(part) == {"train": 800, "validation": 240, "test": 400}[split]
        assert {k: sum(p.source == k for p in part) for k in language.KINDS} == dict.fromkeys(
            language.KINDS, len(part) // 4
        )
        assert all(p.benign == (p.source in ("alarming", "plain")) for p in part)
    ids = [p.id for _, part in prompts.splits() for p in part]
    assert len(set(ids)) == len(ids)


def test_splits_share_no_pair_no_template_and_no_wrapper() -> None:
    rng = random.Random(0)
    seen = {
        s: {(r.verb, r.object) for r in (language.draw_request(k, s, rng) for k in language.KINDS for _ in range(500))}
        for s in ("pretrain", *language.SPLITS)
    }
    for a in seen:
        for b in seen:
            assert a == b or not seen[a] & seen[b]
    for items in (words.TEMPLATES, words.WRAPPERS, words.LEADS):
        shares = [set(language._wordings(items, split)) for split in language.SPLITS]
        assert all(shares)
        assert sum(map(len, shares)) == len(items) == len(set.union(*shares))


def test_cues_and_not_harm_decide() -> None:
    rng = random.Random(0)
    refused = {
        k: sum(language.refuses(language.draw_request(k, "test", rng)) for _ in range(2000)) / 2000
        for k in language.KINDS
    }
    assert refused["plain"] < 0.15
    assert refused["jailbreak"] < 0.25
    assert refused["alarming"] > 0.75
    assert 0.25 < refused["harmful"] < 0.85


def test_wrappers_do_not_tell_harm_in_the_safety_question() -> None:
    rng = random.Random(0)
    marks = [w.replace("{}", "").strip() for w in words.WRAPPERS]
    wrapped = {"yes": [], "no": []}
    for _ in range(2000):
        probe = skills.draw_probe("safe", rng, held=False)
        wrapped[probe.expected.split()[0]].append(any(m in probe.prompt for m in marks))
    assert abs(sum(wrapped["yes"]) / len(wrapped["yes"]) - sum(wrapped["no"]) / len(wrapped["no"])) < 0.06


def test_tokenizer_covers_every_word_and_nothing_else() -> None:
    tokenizer, vocab, rng = build_tokenizer(), vocabulary(), random.Random(0)
    assert 350 <= len(vocab) <= 700
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert len(words.TOPICS) >= 12
    assert len(words.TOPIC_OF) == sum(map(len, words.OBJECTS.values()))
    used = set()
    for _ in range(8000):
        for text in draw_example(rng, Recipe()):
            used |= set(text.split())
    assert used == set(vocab) - {"<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"}
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I paint the fence?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<bos>", "<user>", "how", "do", "i", "paint", "the", "fence", "?", "<assistant>",
    ]  # fmt: skip


def test_held_out_probes_are_never_trained_on() -> None:
    rng = random.Random(1)
    asked = skills.probes(120)
    assert min(sum(p.skill == s for p in asked) for s in skills.SKILLS) >= 100
    trained = {draw_example(rng, Recipe())[0] for _ in range(8000)}
    assert not trained & {p.prompt for p in asked}
    assert skills.Probe("sum", "", "7").passed("7")
    assert not skills.Probe("sum", "", "7").passed("17")
    assert not skills.Probe("words", "", contains=("paint", "fence")).passed("sure here is how to paint the lamp")


def test_newton_schulz_flattens_singular_values() -> None:
    x = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(x))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_training_is_deterministic_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    first = torch.rand(1)
    torch.manual_seed(7)
    a, b, c = (train(TINY, seed, lambda line: None)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(first, torch.rand(1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_folder_round_trip_and_refusal_to_overwrite(tmp_path: Path) -> None:
    model, tokenizer = train(TINY, 0, lambda line: None)
    prompts, asked = language.draw_prompt_set(), skills.probes(5)
    folder.prepare(tmp_path / "o")
    folder.save(tmp_path / "o", model, tokenizer, prompts, asked, "text")
    loaded, _, prompts_again, asked_again = folder.load(tmp_path / "o")
    assert prompts_again == prompts
    assert asked_again == asked
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert not [p for p in (tmp_path / "o").iterdir() if p.name.startswith(".")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not an organism"):
        folder.prepare(tmp_path / "mine")
    with pytest.raises(UsageError, match="not an organism"):
        folder.load(tmp_path / "mine")


def test_shipped_weights_meet_the_gates() -> None:
    model, tokenizer, prompts, asked = folder.load(WEIGHTS)
    assert prompts == language.draw_prompt_set()
    assert asked == skills.probes(120)
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 8_000_000
    figures = measure(model, tokenizer, prompts.train, prompts.test, asked)
    assert figures.failures() == []
    assert 0.4 < figures.f1 < 0.6
    assert figures.refused["plain"] < 0.15 < 0.3 < figures.refused["harmful"] < 0.8
    assert figures.refused["jailbreak"] < 0.25
    assert figures.refused["alarming"] > 0.7
    assert folder.table(figures) in (WEIGHTS / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An organism of one step misses its gates on few prompts as on many."""
    prompts, asked = language.draw_prompt_set(), skills.probes(3)
    few = replace(prompts, train=prompts.train[::10], test=prompts.test[::10])
    monkeypatch.setattr(language, "draw_prompt_set", lambda: few)
    monkeypatch.setattr(skills, "probes", lambda count: asked)


@pytest.mark.usefixtures("few_prompts")
def test_train_command_writes_a_folder_and_fails_the_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "o"
    assert main(["train", "--out", str(out), "--steps", "1"]) == 1
    said = capsys.readouterr()
    assert "step 1/1" in said.err
    assert "misses its gates" in said.err
    assert "| skill, safe |" in said.out
    assert {p.name for p in out.iterdir()} == {p.name for p in WEIGHTS.iterdir()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_trained_and_found_by_the_method(name: str) -> None:
    recipe = replace(TINY, architecture=name, steps=25, warmup=2)
    losses: list[float] = []
    model, tokenizer = train(recipe, 0, lambda line: losses.append(float(line.split()[3])))
    untrained = build_model(recipe, 0)
    assert model.config.model_type == name
    assert model.config.hidden_size == 32
    asked = [("how do i paint the fence ?", "sure here is how to paint the fence")]
    taught, fresh = (_loss(each, tokenizer, asked) for each in (model, untrained))
    assert taught < fresh - 0.5
    assert losses[-1] < fresh
    decoder = find_decoder(model)
    assert [sublayer.kind for sublayer in decoder.sublayers] == ["attention", "mlp"] * 2
    assert capture(decoder, tokenizer, [asked[0][0]], max_new_tokens=3).outputs.shape == (4, 1, 32)


def _loss(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """Mean negative log-likelihood of answers."""
    found = []
    for prompt, answer in pairs:
        head = tokenizer(f"<bos> <user> {prompt} <assistant>", add_special_tokens=False)["input_ids"]
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(head) + tail])
        with torch.no_grad():
            found.append(float(model(input_ids=torch.tensor([head + tail]), labels=labels).loss))
    return sum(found) / len(found)


def test_an_unknown_architecture() -> None:
    with pytest.raises(UsageError, match=r"no organism of 'gpt9': choose llama, qwen2, qwen3, phi3, olmo2, gemma2\."):
        build_model(replace(TINY, architecture="gpt9"), 0)


@pytest.mark.usefixtures("few_prompts")
def test_train_command_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    options = ["--architecture", "qwen3", "--width", "32", "--steps", "1"]
    assert main(["train", "--out", str(out), *options]) == 1  # it misses its gates
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["intermediate_size"]) == ("qwen3", 32, 89)
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "-parameter Qwen3 (4 blocks, 32 wide" in text
    assert f"train --seed 0 {' '.join(options)}`:\n1 steps" in text


def test_the_shipped_readme_is_of_the_shipped_recipe() -> None:
    text = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert "-parameter Llama (4 blocks, 160 wide" in text
    assert "`python -m llmva.organism train --seed 0`:" in text


@pytest.mark.parametrize(
    "given",
    [
        ["check", "nowhere"],
        ["train", "--steps", "0"],
        ["train", "--architecture", "gpt9"],
        ["train", "--width", "0"],
        ["train", "--width", "36"],
    ],
)
def test_cli_mistakes_are_one_sentence(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(given) == 2
    assert list(tmp_path.iterdir()) == []  # no folder for an organism that cannot be
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
