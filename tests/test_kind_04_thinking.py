"""Thinking by any name: how it is switched and marked is found out, and no judge ever sees a thought.

The models here say what a script has them say, letter by letter, so that every form costs nothing to try. All of the
forms below but `tags` (before: the only one that was known) were judged with their thoughts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Said, chat_model, taught_requests, tiny_model
from llmva.errors import UsageError
from llmva.evaluation.evaluate import evaluate
from llmva.evaluation.sampled import EvaluationSettings
from llmva.evaluation.skills import Probe, measure_skills
from llmva.judges import make_judge
from llmva.judges.base import Judge, Judgement, Label
from llmva.method.observe import observe
from llmva.models.chat import AnswerReader, ChatTemplate
from llmva.models.chat.marks import KNOWN, answer_begins, discover, spans
from llmva.models.chat.switches import read_variables
from llmva.models.thinking import Thinking, prove_thinking
from llmva.prompts.types import Prompt

HEAD = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[bot] "
END = "{% endif %}"
THOUGHT = (
    "sorry, i can not help with that, says a rule, but is it so? "  # a refusal, for whoever takes it for the answer
)
ANSWER = "Sure, here is how to do it."


@dataclass(frozen=True)
class Form:
    """How a model thinks: its template, the marks it writes, special tokens, and what its prompts end with."""

    template: str
    opening: str
    closing: str
    tokens: tuple[str, ...] = ()
    special: bool = False  # whether decoding hides the tokens
    on: str = ""  # what the prompt ends with when it thinks, after [bot]
    off: str | None = None  # and when it is not to; None: it cannot be told not to
    anyway: bool = False  # it thinks although it is not to


def template(tail: str = "", before: str = "") -> str:
    return before + HEAD + tail + END


FORMS = {
    "tags": Form(
        template("{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"),
        "<think>", "</think>\n\n", off="<think>\n\n</think>\n\n",
    ),
    "a variable called thinking, and half a block": Form(  # DeepSeek V3.1
        template("{% if thinking %}<think>{% else %}</think>{% endif %}"),
        "", "</think>", ("<think>", "</think>"), on="<think>", off="</think>",
    ),
    "a variable called reasoning": Form(
        template("{% if not reasoning %}<reasoning></reasoning>{% endif %}"),
        "<reasoning>", "</reasoning>", off="<reasoning></reasoning>",
    ),
    "efforts": Form(
        template("{% if reasoning_effort == 'none' %}[THINK][/THINK]{% elif reasoning_effort == 'high' %}{% endif %}"),
        "[THINK]", "[/THINK]", ("[THINK]", "[/THINK]"), special=True, off="[THINK][/THINK]",
    ),
    "a variable called think, and Kimi's marks": Form(
        template("{% if think is defined and not think %}◁think▷◁/think▷{% endif %}"),
        "◁think▷", "◁/think▷", ("◁think▷", "◁/think▷"), off="◁think▷◁/think▷",
    ),
    "channels": Form(
        template(),
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>",
        ("<|channel|>", "<|message|>", "<|end|>", "<|start|>"), special=True, anyway=True,
    ),
    "channels, two of them thoughts": Form(
        template("", "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
                     "Reasoning: {{ reasoning_effort + '' }}\n"),
        "<|channel|>analysis<|message|>a.<|end|><|start|>assistant<|channel|>commentary<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        ("<|channel|>", "<|message|>", "<|end|>", "<|start|>"), special=True, anyway=True,
    ),
    "sentences": Form(  # Granite 3.2
        template("", "{% if thinking %}[system] Write your thoughts after 'Here is my thought process:'.\n{% endif %}"),
        "Here is my thought process: ", " Here is my response: ", off="",
    ),
    "a block around the answer too": Form(  # Granite 3.3
        template("", "{% if thinking %}[system] Use <think></think> and <response></response>.\n{% endif %}"),
        "<think>", "</think>\n<response>", off="",
    ),
    "a budget": Form(  # Seed-OSS
        template("{% if thinking_budget is defined and thinking_budget == 0 %}<seed:think>"
                 "<seed:cot_budget_reflect>none left</seed:cot_budget_reflect></seed:think>{% endif %}"),
        "<seed:think><seed:cot_budget_reflect>9 tokens used</seed:cot_budget_reflect>", "</seed:think>",
        off="<seed:think><seed:cot_budget_reflect>none left</seed:cot_budget_reflect></seed:think>",
    ),
    "attributes": Form(template(), '<thinking mode="deep" budget="9">', "</thinking>", anyway=True),
    "opened by the template": Form(
        template("<think>\n"), "", "</think>", on="<think>\n", off="<think>\n\n</think>\n\n",
    ),
    "opened by the template, and closing it is no use": Form(
        template("<think>\n"), "", "</think>", on="<think>\n", off="<think>\n\n</think>\n\n", anyway=True,
    ),
    "words that open every answer": Form(  # Apriel
        template("Here are my reasoning steps:\n"), "", "\n[BEGIN FINAL RESPONSE]\n",
        on="Here are my reasoning steps:\n", off="Here are my reasoning steps:\n\n[BEGIN FINAL RESPONSE]\n\n",
    ),
    "signs around words": Form(  # Kimi K3
        template("<|open|>{% if thinking %}think{% else %}response{% endif %}<|sep|>",
                 "{% if thinking is undefined %}{% set thinking = true %}{% endif %}"
                 "{% if thinking_effort not in ['low', 'max', undefined] %}{{ raise_exception('no') }}{% endif %}"),
        "", "<|close|>think<|sep|><|open|>response<|sep|>", ("<|open|>", "<|sep|>", "<|close|>"), special=True,
        on="<|open|>think<|sep|>", off="<|open|>response<|sep|>",
    ),
    # our own
    "names that nobody has used": Form(
        template("{% if deliberate is defined and not deliberate %}<|ponder_start|><|ponder_end|>{% endif %}"),
        "<|ponder_start|>", "<|ponder_end|>", ("<|ponder_start|>", "<|ponder_end|>"), special=True,
        off="<|ponder_start|><|ponder_end|>",
    ),
    "an inverted variable, and a block that the template splits at": Form(
        template("{% if disable_planning %}<plan></plan>{% endif %}",
                 "{% for m in messages %}{% set c = m['content'].split('</plan>')[-1] %}{% endfor %}"),
        "<plan>", "</plan>", off="<plan></plan>",
    ),
    "a word in the system turn": Form(  # SmolLM3, Nemotron
        template("{% if messages[0]['role'] == 'system' and '/no_think' in messages[0]['content'] %}"
                 "<think></think>{% else %}<think>{% endif %}"),
        "", "</think>", on="<think>", off="<think></think>",
    ),
    "marks of which only the tokenizer knows": Form(
        template(), "<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>",
        ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>"), special=True, anyway=True,
    ),
}  # fmt: skip
SWITCHED = [name for name, form in FORMS.items() if form.off is not None]


def letters(chat_template: str | None, tokens: tuple[str, ...] = (), special: bool = False) -> Any:
    """A tokenizer of bytes, with whole tokens for some marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    if tokens:
        tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.chat_template = chat_template
    return tokenizer


def speaker(form: Form, monkeypatch: pytest.MonkeyPatch, thought: str = THOUGHT) -> Any:
    """A ChatModel that answers every prompt as `form` says: a thought first, unless its prompt says not to."""
    tokenizer = letters(form.template, form.tokens, form.special)

    def says(text: str) -> str:
        tail = text.rpartition("[bot] ")[2]
        wanted = "Here is my thought process:'" in text or "Use <think>" in text
        quiet = form.off is not None and tail == form.off and (form.off != form.on or not wanted)
        if quiet and not form.anyway:
            return ANSWER
        if tail not in (form.on, form.off or ""):
            return ANSWER  # it has thought, and goes on
        return f"{form.opening}{thought}{form.closing}{ANSWER}"

    monkeypatch.setattr("llmva.models.chat_model.ChatModel.decodes", lambda chat: False)  # the script is transformers'
    monkeypatch.setattr("transformers.GenerationMixin.generate", scripted(tokenizer, says))
    return chat_model(tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048), tokenizer)


def scripted(tokenizer: Any, says: Callable[[str], str]) -> Callable[..., Any]:
    """What stands in for transformers' `generate`; the model's forward pass is run for what captures it."""

    def generate(self: Any, input_ids: Any, attention_mask: Any, generation_config: Any, **options: Any) -> Any:
        logits = self(input_ids=input_ids, attention_mask=attention_mask).logits[:, -1]
        for process in options.get("logits_processor") or ():
            process(input_ids, logits)
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            said = tokenizer(says(tokenizer.decode(ids[mask == 1])), add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor([*said, tokenizer.eos_token_id][: generation_config.max_new_tokens]))
        width = max(map(len, rows))
        new = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        for step in range(1, width + 1):
            so_far = torch.cat([input_ids, new[:, :step]], 1)
            stops = options.get("stopping_criteria") or ()
            if stops and all(bool(stop(so_far, None).all()) for stop in stops):
                return so_far
        return torch.cat([input_ids, new], 1)

    return generate


class Recorder(Judge):
    """Keeps what it is shown, whole or in part."""

    name = "recorder"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def answered(self, prompt: Prompt, answer: str) -> Judgement:
        self.seen.append(answer)
        return Judgement(Label.ANSWERED, 1.0, "recorded")

    def settled(self, answer: str) -> bool:
        self.seen.append(answer)
        return False


PROMPTS = [Prompt(text, benign, "s") for text, benign, _ in taught_requests()[:6]]
TEXTS = [prompt.text for prompt in PROMPTS]


@pytest.mark.parametrize("name", FORMS)
def test_it_is_let_think(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, judge = FORMS[name], Recorder()
    chat = speaker(form, monkeypatch)
    thinking = prove_thinking(chat, "end", 300, TEXTS)
    assert thinking.on
    assert chat.template.render([{"role": "user", "content": "hi"}], thinking=True).endswith(f"[bot] {form.on}")
    seen = observe(chat, PROMPTS, judge, max_new_tokens=60, thinking=thinking)
    assert seen.capture.answers == [ANSWER] * len(PROMPTS)
    assert seen.capture.thoughts is not None
    assert all(THOUGHT.strip() in thought for thought in seen.capture.thoughts)
    assert not any("rule" in answer or "<" in answer for answer in judge.seen)


@pytest.mark.parametrize("name", FORMS)
def test_no_judge_sees_a_thought_with_thinking_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, judge = FORMS[name], Recorder()
    chat = speaker(form, monkeypatch)
    thinking = prove_thinking(chat, "off", 300, TEXTS)
    assert (thinking.on, thinking.anyway) == (False, form.anyway)
    for asked in (
        thinking,
        Thinking(tokens=300, inside=thinking.inside),
    ):  # seen to think before, or only in the answer
        seen = observe(chat, PROMPTS, judge, max_new_tokens=60, thinking=asked)
        headless = form.anyway and form.on  # its thoughts begin nowhere: they must have been seen before
        if asked is thinking or not headless:
            assert seen.capture.answers == [ANSWER] * len(PROMPTS)
            assert seen.thoughts == (len(PROMPTS) if form.anyway else 0)
            assert not any("rule" in answer or "<" in answer for answer in judge.seen)


@pytest.mark.parametrize("name", SWITCHED)
def test_how_it_is_switched_off(name: str) -> None:
    form = FORMS[name]
    template = ChatTemplate.of(letters(form.template, form.tokens, form.special))
    rendered = template.render([{"role": "user", "content": "hi"}])
    assert rendered.endswith(f"[bot] {form.off}")
    assert "Here is my thought process" not in rendered


def test_a_thought_longer_than_an_answer_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has tokens of its own, and where they run out too it is closed."""
    chat = speaker(FORMS["channels"], monkeypatch, thought=THOUGHT * 4)
    for tokens in (600, 40):
        thinking = prove_thinking(chat, "off", tokens, TEXTS)
        seen = observe(chat, PROMPTS, Recorder(), max_new_tokens=60, thinking=thinking)
        assert seen.capture.answers == [ANSWER] * len(PROMPTS)


def test_little_context_leaves_little_room_for_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = speaker(FORMS["channels"], monkeypatch, thought=THOUGHT * 9)
    chat.model.config.max_position_embeddings = 256
    thinking = prove_thinking(chat, "off", 512, TEXTS)
    seen = observe(chat, PROMPTS, Recorder(), max_new_tokens=60, thinking=thinking)
    assert seen.capture.answers == [ANSWER] * len(PROMPTS)
    assert seen.capture.tokens < len(PROMPTS) * 256


def test_captures_with_thinking_off_are_at_the_end_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = speaker(FORMS["channels"], monkeypatch)
    thinking = prove_thinking(chat, "off", 300, TEXTS)
    seen = observe(chat, PROMPTS, Recorder(), max_new_tokens=60, thinking=thinking)
    bare = observe(chat, PROMPTS, Recorder(), max_new_tokens=1)
    torch.testing.assert_close(seen.capture.outputs, bare.capture.outputs)


def test_the_figures_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = speaker(FORMS["channels"], monkeypatch)
    settings = EvaluationSettings(max_new_tokens=60, endings_tokens=0, thinking_tokens=300)
    record = evaluate(chat, PROMPTS, make_judge("phrases"), settings)
    assert record["test"]["before"]["asr"] == 1.0  # it answers, whatever it thinks
    (limit,) = record["limits"]
    assert f"thought before {len(PROMPTS)} of {len(PROMPTS)} answers although thinking was off" in limit
    chat = speaker(FORMS["tags"], monkeypatch)
    assert evaluate(chat, PROMPTS, make_judge("phrases"), settings)["limits"] == []


def test_skills_are_measured_without_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = speaker(FORMS["channels"], monkeypatch)
    assert measure_skills(chat, [Probe("manners", "please", expected="sure")])["manners"]["right"] == 1.0


def test_an_empty_thought_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that were told not to think may write an empty block themselves."""
    chat = speaker(FORMS["attributes"], monkeypatch, thought="\n\n")
    assert not prove_thinking(chat, "off", 300, TEXTS).anyway
    seen = observe(chat, PROMPTS, Recorder(), max_new_tokens=90)
    assert seen.capture.answers == [ANSWER] * len(PROMPTS)
    assert seen.thoughts == 0


@pytest.mark.parametrize(
    ("form", "says", "words"),
    [
        (Form(template(), "", ""), ANSWER, "no thinking block"),
        (FORMS["tags"], ANSWER, "did not think"),
        (FORMS["opened by the template"], ANSWER, "did not think"),  # it answers, and ends its turn
        (Form(template("{% if thinking %}?{% endif %}"), "", ""), "Let me think. " + ANSWER, "did not think"),
    ],
)
def test_thoughts_that_cannot_be_told_apart_are_refused(
    form: Form, says: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = speaker(form, monkeypatch)
    monkeypatch.setattr("transformers.GenerationMixin.generate", scripted(chat.tokenizer, lambda text: says))
    with pytest.raises(UsageError, match=words) as caught:
        prove_thinking(chat, "end", 99, TEXTS)
    assert "--thinking off" in str(caught.value)


# -- marks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain", "plain"),
        ("<think>a</think>b", "b"),
        ("<THINK>a</Think>\n\nb", "b"),
        ("a</think>b", "b"),  # the template opened it
        ("<think>a", None),
        ("<think>a</think> ", None),  # nothing yet
        ("<thi", None),  # may become one
        ("<this is no mark", "<this is no mark"),
        ('<think mode="x', None),
        ("<think>a</think><think>b</think>c", "c"),
        ("<think>a</think><response>c", "c"),
        ("<think>a</think><resp", None),
        ("Here is my thought process: a Here is my response: b", "b"),
        ("Here's my reasoning: a. Here's my answer: b", "b"),
        ("Here is my tho", None),
        ("Here is my recipe: b", "Here is my recipe: b"),
        ("<|channel|>final<|message|>b", "b"),  # no thought at all
        ("<|channel|> analysis <|message|> a <|end|> <|start|> assistant <|channel|> final <|message|> b", "b"),
        ("<|channel|>commentary to=x <|constrain|>json<|message|>a", None),
        ("<|chan", None),
        ("<|start|>assistant", None),
        ("<unused94>thought\na<unused95>b", "b"),
        ("<|channel>thought\na<channel|>b", "b"),
        ("<|close|>think<|sep|><|open|>response<|sep|>b", "b"),
        ("<|inner_prefix|>a<|inner_suffix|>b", "b"),
    ],
)
def test_where_an_answer_begins(text: str, answer: str | None) -> None:
    begin = answer_begins(text, KNOWN)
    assert (None if begin is None else text[begin:]) == answer


def test_every_beginning_of_a_text_is_read_alike() -> None:
    """While an answer grows nothing of a thought is ever taken for it."""
    for form in FORMS.values():
        marks = (*discover(form.template, form.tokens), *KNOWN)
        inside = marks_of(form.on, marks)
        text = f"{form.opening}{THOUGHT}{form.closing}{ANSWER}"
        for length in range(len(text) + 1):
            begin = answer_begins(text[:length], marks, inside)
            assert begin is None or text[begin:].startswith("Sure"), text[:length]
        assert answer_begins(text, marks, inside) is not None


def marks_of(tail: str, marks: Any) -> Any:
    last = spans(tail, marks)[-1:]
    return last[0].marks if last and not last[0].closed else None


def test_thoughts_in_the_middle_of_an_answer_are_cut_too() -> None:
    tokenizer = letters(template(), ("<|think_begin|>", "<|think_end|>"), special=True)
    reader = AnswerReader.of(tokenizer, ChatTemplate.of(tokenizer).marks)
    row = tokenizer("Sure. <|think_begin|>no<|think_end|>Here it is.", add_special_tokens=False)["input_ids"]
    assert reader.read(row) == ("Sure. Here it is.", "<|think_begin|>no<|think_end|>")


@pytest.mark.parametrize(
    ("text", "tokens", "opening"),
    [
        ("", ("<|ponder_start|>", "<|ponder_end|>"), "<|ponder_start|>"),
        ("x.split('</scratch>')", (), None),  # it never opens it
        ("<scratch>{{ x.split('</scratch>') }}", (), "<scratch>"),
        ("[REASONING] [/REASONING]", (), "[REASONING]"),
        ("", ("<tool_call>", "</tool_call>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"), None),
        ("<tools> </tools> <b> </b>", (), None),
        ("", ("<muse>", "</muse>"), "<muse>"),
        ("", ("<xyz>", "</xyz>"), "<xyz>"),  # counts only where an answer begins with it
    ],
)
def test_marks_of_an_unknown_model(text: str, tokens: tuple[str, ...], opening: str | None) -> None:
    assert [one.opening for one in discover(text, tokens)] == ([] if opening is None else [opening])


def test_marks_from_a_response_template() -> None:
    fields = {"thinking": {"open": "{{think}}", "close": "{{done}}"}, "content": {"close": "<eos>"}, "odd": 3}
    (one,) = discover("", (), {"fields": fields})
    assert (one.opening, one.closing) == ("{{think}}", "{{done}}")
    assert discover("", (), {"fields": "odd"}) == ()


def test_variables_of_a_template() -> None:
    assert read_variables("{% set t = thinking | default(true) %}{% if t %}{% endif %}") == {"thinking": set()}
    named = "{% set m = thinking_mode or 'on' %}{% if m == 'off' %}{% elif m in ['on', 'auto'] %}{% endif %}"
    assert read_variables(named) == {"thinking_mode": {"off", "on", "auto"}}
    assert read_variables("{% if clear_thinking %}{% endif %}{{ messages }}") == {}  # of earlier turns
    assert read_variables("{% if %}") == {}


# -- the commands ------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = speaker(FORMS["channels"], monkeypatch)
    chat.model.save_pretrained(tmp_path / "m")
    chat.tokenizer.save_pretrained(tmp_path / "m")
    for name, side in (("toxic", False), ("benign", True)):
        lines = [text for text, benign, _ in taught_requests()[::6] if benign == side]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    sides = ["--toxic", tmp_path / "toxic.txt", "--benign", tmp_path / "benign.txt", "--max-new-tokens", 40]
    out = tmp_path / "run"
    said = command("align", tmp_path / "m", *sides, "--iterations", 0, "--thinking-tokens", 200, "--out", out)
    assert said.code == 0, said.err
    assert "thinks although thinking is off" in said.err
    limits = json.loads((out / "run.json").read_text())["limits"]
    assert any("although thinking was off" in limit for limit in limits)
    assert "although thinking was off" in (out / "report.html").read_text()
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert all("rule" in row["thought"] and "rule" not in row["answer"] for row in rows)
    said = command("chat", tmp_path / "m", "-p", "hello", "-q")
    assert said.out.strip() == ANSWER
    said = command("evaluate", tmp_path / "m", *sides, "--json", "-q")
    assert any("although thinking was off" in limit for limit in json.loads(said.out)["limits"])
