"""Which files of a folder belong to its model, by the names that loaders read, and why each does.

A model's folder may hold anything else: answers of a run, data, notes, keys, other forms of the weights. So a file
belongs by its name or because a file that belongs names it, and whatever is not known stays where it is.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmva.errors import LlmvaError
from llmva.models.files.weights import Weights, find_weights, leaves_folder, read_object

CARD = "README.md"
OWN = "llmva"  # a folder of ours in a model's folder: an exported edit, or prompts and probes
CONFIGS = {
    "config.json": "the model's config",
    "generation_config.json": "how it generates by default",
    "preprocessor_config.json": "the processor's config",
    "processor_config.json": "the processor's config",
    "video_preprocessor_config.json": "the video processor's config",
    "audio_tokenizer_config.json": "the audio tokenizer's config",
    "tokenizer_config.json": "the tokenizer's config",
}
TEMPLATES = {"chat_template.jinja": "the chat template", "chat_template.json": "the chat template"}
TOKENIZER = re.compile(
    r"tokenizer(?:\.\d[\w.]*)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(?:json|txt|bpe)|merges\.txt"
    r"|bpe\.codes|[\w.-]+\.tiktoken|tiktoken\.model|tekken\.json|tokenizer\.model(?:\.v\d\w*)?"
    r"|(?:spiece|spm|sentencepiece|spm_char)(?:\.bpe)?\.model|(?:source|target)\.spm|vocab-(?:src|tgt)\.json"
    r"|target_vocab\.json|entity_vocab\.json|normalizer\.json|prophetnet\.tokenizer|word_(?:shape|pronunciation)\.json"
)
OLDER_CONFIG = re.compile(r"config\.\d[\w.]*\.json")  # for transformers of some version; config.json lists them
LICENCE = re.compile(  # no other words: LICENSE_KEYS.txt is a secret
    r"(?:model[ _-])?licen[cs]es?(?:[ ._-](?:agreement|model|weights|code|apache|mit|bsd|v?\d[\d.]*))*"
    r"|notices?|copying|copyright|(?:acceptable[ _-])?use[ _-]policy|usage[ _-]policy|terms[ _-]of[ _-]use"
    r"|third[ _-]party[ _-](?:notices?|licen[cs]es?)",
    re.IGNORECASE,
)
LICENCE_ENDS = (".md", ".txt", ".rst", ".pdf")
PARTS = (".safetensors", ".model", ".vocab", ".spm", ".tiktoken", ".bpe", ".jinja")  # nothing else has such names
TEXTS = (".json", ".txt")  # may be anything, so the name, or the field that holds it, must say that it is a part
OF_TOKENIZER = re.compile(r"vocab|merge|token|bpe|spm|sentencepiece|template|speaker|normali[sz]er|emoji|processor")
NO_FILES = ("model_type", "architectures", "_name_or_path", "name_or_path", "transformers_version")  # fields of config


def belonging(folder: Path, weights: Weights) -> dict[str, str]:
    """Path relative to `folder`, with slashes -> why the file belongs to the model; weights first, then by name."""
    reasons = dict.fromkeys(weights.shards, "weights")
    if weights.index is not None:
        reasons[weights.index] = "which weights lie in which file"
    beside = dict(sorted([*_by_name(folder), *_templates(folder), *_code(folder)]))
    for name, why in [*beside.items(), *_named(folder)]:
        reasons.setdefault(name, why)
    return reasons


def left_out(folder: Path, reasons: Iterable[str]) -> list[str]:
    """What else lies in the folder, by name: files, and folders with a slash; neither hidden ones nor llmva's own."""
    tops = {OWN, *(name.split("/")[0] for name in reasons)}
    others = [path for path in folder.iterdir() if path.name not in tops and not path.name.startswith(".")]
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in others)


def _by_name(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.iterdir():
        if not path.is_file():
            continue
        name = path.name
        known = CONFIGS | TEMPLATES
        if name in known:
            yield name, known[name]
        elif OLDER_CONFIG.fullmatch(name):
            yield name, "the model's config for other versions of transformers"
        elif TOKENIZER.fullmatch(name):
            yield name, "the tokenizer"
        elif _is_licence(name):
            yield name, "the licence"
        elif name == CARD and _is_card(path):
            yield name, "the base's model card"


def _is_licence(name: str) -> bool:
    stem, dot, end = name.rpartition(".")
    return LICENCE.fullmatch(stem if f"{dot}{end.lower()}" in LICENCE_ENDS else name) is not None


def _is_card(path: Path) -> bool:
    """Whether a README.md is a model card, which begins with metadata as the hub reads it, and no note of a project."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = file.read(2**20).splitlines()
    except (OSError, ValueError):
        return False
    marks = [number for number, line in enumerate(lines) if line.rstrip() == "---"][:2]
    return len(marks) == 2 and marks[0] == 0 and any(re.match(r"[\w-]+:", line) for line in lines[1 : marks[1]])


def _templates(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.glob("additional_chat_templates/*.jinja"):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), "a further chat template"


def _code(folder: Path) -> Iterator[tuple[str, str]]:
    """The modules that `auto_map` of a config names, what they import from beside them, and the data that they name."""
    folder = Path(os.path.normpath(folder))
    begin = []
    for name in CONFIGS:
        begin += _modules(read_object(folder / name).get("auto_map"))
    begin += ["custom_generate/generate.py"]  # which transformers looks for in every model with code of its own
    waiting, seen = [name for name in begin if (folder / name).is_file()], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        yield name, "code that the config names"
        tree = _parsed(folder / name)
        parent = (folder / name).parent
        for part in _imported(tree, parent):
            waiting += [part.relative_to(folder).as_posix()] if part.is_relative_to(folder) else []
        for text in _texts(tree):
            if _is_part(folder, text, text):
                yield Path(text).as_posix(), f"named in {name}"
    if "custom_generate/generate.py" in seen and (folder / "custom_generate/requirements.txt").is_file():
        yield "custom_generate/requirements.txt", "packages that custom_generate needs"


def _modules(auto_map: Any) -> list[str]:
    """Files of an auto_map's values: "module.Class" or a list of such and nulls; "repo--module.Class" is elsewhere."""
    if not isinstance(auto_map, dict):
        return []
    values = [v for value in auto_map.values() for v in (value if isinstance(value, list) else [value])]
    names = [v.rpartition(".")[0] for v in values if isinstance(v, str) and "--" not in v]
    return [f"{name.replace('.', '/')}.py" for name in names if re.fullmatch(r"[\w.]+", name)]


def _parsed(path: Path) -> ast.AST:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):  # code that cannot be read imports nothing
        return ast.Module([], [])


def _imported(tree: ast.AST, parent: Path) -> Iterator[Path]:
    """Files beside a module, or in folders there, that it imports relatively."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        start = parent.joinpath(*[".."] * (node.level - 1), *(node.module or "").split("."))
        names = [] if node.module is None else [start]
        for place in [*names, *(start / alias.name for alias in node.names)]:
            for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
                if file.is_file():
                    yield Path(os.path.normpath(file))  # resolve() would follow the links of the hub's cache


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 256:
            yield node.value


def _named(folder: Path) -> Iterator[tuple[str, str]]:
    """Files that a config names by a path relative to the folder, and what belongs to a model in a folder so named."""
    for config in CONFIGS:
        for key, value in _strings(read_object(folder / config)):
            if key in NO_FILES or leaves_folder(value):
                continue
            if _is_part(folder, value, f"{key} {value}"):
                yield Path(value).as_posix(), f"named in {config}"
            elif (folder / value / "config.json").is_file():
                yield from _of_part(folder, folder / value, config)


def _is_part(folder: Path, name: str, said: str) -> bool:
    """Whether `name` is a file in the folder that is, by what is `said` of it, a part of a model."""
    known = name.endswith(PARTS) or (name.endswith(TEXTS) and OF_TOKENIZER.search(said.lower()) is not None)
    return known and not leaves_folder(name) and (folder / name).is_file()


def _of_part(folder: Path, part: Path, config: str) -> Iterator[tuple[str, str]]:
    """The files of a model in a folder of its own, such as a vision tower."""
    try:
        weights = find_weights(part)
    except LlmvaError:  # its config and processor alone
        weights = Weights((), None)
    reasons = [*dict.fromkeys(weights.shards, ""), *([weights.index] if weights.index else [])]
    reasons += [name for name, _ in [*_by_name(part), *_templates(part), *_code(part)] if name != CARD]
    for name in reasons:
        yield (part.relative_to(folder) / name).as_posix(), f"of a part of the model that {config} names"


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in nested JSON that could be a path, with the nearest key."""
    if isinstance(value, str):
        if 0 < len(value) < 256 and "\n" not in value and "\0" not in value:
            yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
