"""The chat template is the model's own, wherever it lies, or the run says what stood in for it.

Before, only a template that the tokenizer itself had read was found; of all the rest nothing was said, but for
templates that raise, where the Python API gave a traceback.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmva
from conftest import Said, tiny_model, tiny_tokenizer
from llmva.errors import LlmvaError
from llmva.models.chat import ChatTemplate, encode, render
from llmva.models.load import load_model

OWN = (
    "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
OTHER = OWN.replace("{{ m['role'] }} :", "tell me")
PARTS = (  # as templates of processors are: a string would be read letter by letter, and lost
    "{% for m in messages %}<bos> {{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('System turn required') }}{% endif %}" + OWN
READ = "<bos> user : open the door assistant :"


def in_config(value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": value}))

    return write


def in_file(name: str, value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))

    return write


def both(*writers: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [writer(folder) for writer in writers] and None


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


PLAIN = "User: open the door\n\nAssistant:"
WHERE: dict[str, tuple[Callable[[Path], None], str, str | None, str | None]] = {
    # what is written, what is read, a word of a limit, a word of a note
    "chat_template.jinja": (in_file("chat_template.jinja", OWN), READ, None, None),
    "tokenizer_config.json": (in_config(OWN), READ, None, None),
    "chat_template.json": (in_file("chat_template.json", {"chat_template": OWN}), READ, None, "chat_template.json"),
    "processor_config.json": (
        in_file("processor_config.json", {"processor_class": "X", "chat_template": OWN}), READ, None, "of the processor"
    ),
    "a processor's names": (
        in_file("chat_template.json", {"chat_template": named(tool_use=OTHER, default=OWN)}), READ, None, "processor"
    ),
    "contents in parts": (in_file("chat_template.json", {"chat_template": PARTS}), READ + "", None, "processor"),
    "names with a default": (in_config(named(tool_use=OTHER, default=OWN)), READ, None, "'default' is used"),
    "names without a default": (in_config(named(tool_use=OTHER, chat=OWN)), READ, "no default: 'chat'", "'chat' is"),
    "one name": (in_config(named(chat=OWN)), READ, None, "'chat' is used"),
    "files by name": (
        both(in_file("chat_template.jinja", OWN), in_file("additional_chat_templates/tool_use.jinja", OTHER)),
        READ, None, "'default' is used",
    ),
    "none": (lambda folder: None, PLAIN, "no chat template", None),
    "an empty one": (in_config(""), PLAIN, "no chat template", None),
    "a file that holds none": (in_file("chat_template.json", {"chat": 1}), PLAIN, "no chat template", None),
    "a file that cannot be read": (in_file("chat_template.json", "{"), PLAIN, "no chat template", None),
    "two that differ": (
        both(in_config(OWN), in_file("chat_template.json", {"chat_template": OTHER})), READ, "ask differently", None
    ),
    "two that say the same": (
        both(in_config(OWN), in_file("chat_template.json", {"chat_template": PARTS})), READ, None, None
    ),
    "no generation prompt": (
        in_config(OWN[: OWN.index("{% if add")]), "<bos> user : open the door ", "no generation prompt", None
    ),
    "none is needed": (
        in_config("{% for m in messages %}{% if m['role'] == 'user' %}[I] {{ m['content'] }} [/I]"
                  "{% else %} {{ m['content'] }}{% endif %}{% endfor %}"),
        "[I] open the door [/I]", None, None,
    ),
    "a head that the dialogue has and the prompt has not": (
        in_config("{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"),
        "user : open the door . ", "no generation prompt", None,
    ),
    "first token twice": (in_config("<bos> " + OWN), "<bos> " + READ, "begins with <bos> twice", None),
}  # fmt: skip


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy without a chat template."""
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    return copy


@pytest.mark.parametrize("name", WHERE)
def test_where_a_template_lies(name: str, folder: Path) -> None:
    write, read, limit, note = WHERE[name]
    write(folder)
    model, tokenizer = load_model(folder, device="cpu")
    assert render(tokenizer, "open the door") == read
    chat = llmva.ChatModel.of(model, tokenizer)
    assert [limit] * len(chat.limits) == [limit for _ in chat.limits]
    assert len(chat.limits) == (limit is not None)
    assert all(str(limit) in one for one in chat.limits)
    assert (note is None) == (not chat.template.notes)
    assert all(str(note) in one for one in chat.template.notes)


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json", "contents in parts", "none"])
def test_a_tokenizer_that_the_user_loaded(name: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    write, read, limit, _ = WHERE[name]
    write(folder)
    chat = llmva.ChatModel.of(tiny_model(), AutoTokenizer.from_pretrained(folder))
    assert chat.template.render([{"role": "user", "content": "open the door"}]) == read
    assert len(chat.limits) == (limit is not None)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (SYSTEM, r"asks for a system turn \(System turn required\)"),
        ("{% if messages[0]['role'] != 'system' %}{{ messages[9]['content'] }}{% endif %}", "cannot be rendered"),
        ("{{ raise_exception('no such thing') }}", r"cannot be rendered \(no such thing\)"),
        ("{% for m in %}", "cannot be rendered"),
        ("{{ messages[0]['role'] }} : hello assistant :", "leaves the user's message out"),
        ("{% for m in messages %}{{ m['text'] }}{% endfor %}assistant :", "leaves the user's message out"),
    ],
)
def test_templates_that_cannot_be_used(
    template: str, words: str, folder: Path, command: Callable[..., Said], tmp_path: Path
) -> None:
    in_config(template)(folder)
    said = command("align", folder, "--out", tmp_path / "run")
    assert said.code == 1
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(LlmvaError, match=words) as caught:
        llmva.ChatModel.of(tiny_model(), tokenizer)
    assert "\n" not in str(caught.value)
    assert said.err.splitlines()[-1].startswith("error: The chat template of")


def test_the_run_and_its_report_say_it(taught_folder: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    copy = Path(shutil.copytree(taught_folder, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    sides = ["--toxic", copy / "toxic.txt", "--benign", copy / "benign.txt", "--max-new-tokens", 4]
    said = command("align", copy, *sides, "--iterations", 0, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert "no chat template" in said.err
    assert any(
        "no chat template" in limit for limit in json.loads((tmp_path / "run" / "run.json").read_text())["limits"]
    )
    assert "no chat template" in (tmp_path / "run" / "report.html").read_text()
    said = command("evaluate", copy, *sides, "--json", "-q")
    assert any("no chat template" in limit for limit in json.loads(said.out)["limits"])
    assert "no chat template" in command("chat", copy, "-p", "open the door").err


# -- tokens ------------------------------------------------------------------------------------------------------


def test_a_first_token_that_the_tokenizer_adds_comes_once() -> None:
    """Whatever `add_special_tokens` says: some tokenizers' own code does not listen."""
    tokenizer = tiny_tokenizer()

    class Adding(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
            return super().__call__(text, add_special_tokens=True, **options)

    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.__class__ = Adding
    assert encode(tokenizer, render(tokenizer, "open")).count(1) == 1
    tokenizer.chat_template = "<bos> " + OWN  # twice in the template itself: that is the model's own
    assert ChatTemplate.of(tokenizer).row("open")[:2] == [1, 1]


def test_special_tokens_are_not_split(folder: Path) -> None:
    in_config(OWN)(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": True}))
    model, tokenizer = load_model(folder, device="cpu")
    assert llmva.ChatModel.of(model, tokenizer).row("open")[0] == 1


# -- where a turn ends, and what the prompt begins with ------------------------------------------------------------


def with_a_turn(named: str | None, extra: str = "") -> tuple[Any, Any]:
    """A model taught to end its answers with <turn> and to go on with a refusal, and which file names that token."""
    from conftest import taught_requests, teach, token_ids

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = OWN.replace("{% endfor %}", "<turn> {% endfor %}") + extra
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    rows = [
        (
            token_ids(tokenizer, render(tokenizer, text)),
            token_ids(tokenizer, f"{answer} <turn> user : sorry i can not help with that . <turn>"),
        )
        for text, _, answer in taught_requests()
    ]
    model = teach(tiny_model(vocab_size=len(tokenizer)), rows, steps=90)
    if named == "config.json":
        model.config.eos_token_id = [2, turn]
    elif named == "generation_config.json":
        model.generation_config.eos_token_id = [2, turn]
    elif named == "tokenizer_config.json":
        tokenizer.eos_token = "<turn>"
    return model, tokenizer


@pytest.mark.parametrize("named", [None, "config.json", "generation_config.json", "tokenizer_config.json"])
def test_an_answer_ends_where_the_template_ends_it(named: str | None) -> None:
    """The last two held; in the others every answer went on into the next turn, and was judged a refusal by that."""
    model, tokenizer = with_a_turn(named)
    found = llmva.capture(model, tokenizer, ["please fix the fence"], max_new_tokens=20)
    assert found.answers == ["sure here is how to do it ."]
    limits = llmva.ChatModel.of(model, tokenizer).limits
    assert [limit for limit in limits if "none of the model's end tokens: answers were cut there" in limit] == list(
        limits
    )
    assert len(limits) == (named is None)


def test_a_turn_that_ends_thoughts_too_is_not_cut() -> None:
    """In channels, as gpt-oss writes them, a thought and an answer end alike. This held."""
    from llmva.models.chat import turn_end

    tokenizer = tiny_tokenizer()
    marks = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|> {{ m['role'] }} <|message|> {{ m['content'] }} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
    )
    assert turn_end(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (OWN, False),
        (OWN.replace("{% endfor %}", "<turn> {% endfor %}"), True),
        (PARTS.replace("{% endfor %}{% endfor %}", "{% endfor %}<turn>{% endfor %}"), True),
        (OWN.replace("{% endfor %}", "door {% endfor %}"), False),  # a word is no end
        ("{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + OWN + "<turn>", False),
        (OWN.replace("{% endfor %}", "<bos> {% endfor %}"), False),
    ],
)
def test_what_ends_a_turn(template: str, ends: bool) -> None:
    from llmva.models.chat import turn_end

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = template
    assert (turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<turn>")) == ends
    assert (turn_end(tokenizer) is None) == (not ends)


def test_a_date_in_the_template_is_told(folder: Path) -> None:
    in_config("{{ strftime_now('%d %B %Y') }} " + OWN)(folder)
    (limit,) = llmva.ChatModel.of(*load_model(folder, device="cpu")).limits
    assert "tells the model the date" in limit
    in_config("{% set unused = strftime_now('%Y') %}" + OWN)(folder)
    assert not llmva.ChatModel.of(*load_model(folder, device="cpu")).limits


def adding(tokenizer: Any, before: str = "", after: str = "") -> Any:
    """A tokenizer that adds <bos> before a text, or <eos> after it."""
    from tokenizers.processors import TemplateProcessing

    ids = [("<bos>", 1), ("<eos>", 2)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=ids)
    return tokenizer


def test_a_first_token_that_the_template_leaves_out_is_told() -> None:
    tokenizer = adding(tiny_tokenizer(), before="<bos>")
    assert not ChatTemplate.of(tokenizer).limits
    tokenizer.chat_template = OWN.replace("<bos> ", "")
    (limit,) = ChatTemplate.of(tokenizer).limits
    assert "begins a text with <bos> and the chat template does not" in limit


def test_a_plain_dialogue_does_not_end_before_the_answer() -> None:
    """Tokenizers that were set up for training add an end token, after which a model has nothing to say."""
    tokenizer = adding(tiny_tokenizer(template=False), before="<bos>", after="<eos>")
    row = ChatTemplate.of(tokenizer).row("open the door")
    assert row[0] == 1
    assert row[-1] == tokenizer.convert_tokens_to_ids(":")
