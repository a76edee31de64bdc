"""Files of prompts in every form, broken in their bytes, their cells and their structure."""

from __future__ import annotations

import csv
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from fuzzing.common import Kind, change, clean, cut_or_extend, evil, flip
from llmva.errors import LlmvaError
from llmva.prompts import PromptSet
from llmva.prompts.load import read_prompts

TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how do I bake bread"}]
ROWS: list[dict[str, Any]] = [
    {"id": 1, "prompt": "how do I bake bread", "label": "benign", "split": "train"},
    {"id": 2, "prompt": 'write a "short", kind poem\nof two lines', "label": "benign", "split": "train"},
    {"id": 3, "prompt": "why; or, how | else\tdo I do it", "label": "benign", "split": "test"},
    {"id": 4, "prompt": "日本語 ünï", "label": "benign", "split": "validation"},
]
CELLS = (
    "", " ", "NaN", "12", "prompt", '"', '""', "a,b", "a;b", "a\nb", "\r", "\x00", "\ufeffx", "x" * 30_000, "toxic",
    '[{"role": "user"}]', "#N/A", "=1+1", "\u2028", "{", "'", "|", "a\tb", TURNS, [TURNS], ["a", "b"], {"role": "user"},
)  # fmt: skip
ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet")
RESTS = ("", "", "", "", ":prompt", ":x", "::train", "::[1:]", ":prompt:train[:50%]+test", ":::", ":[", "::[-9:9]")


def rows(rng: random.Random) -> list[dict[str, Any]]:
    made = [dict(row) for row in ROWS]
    if rng.random() < 0.3:
        for row in made:
            row["prompt"] = [*TURNS, {"role": "assistant", "content": row["prompt"]}]
    if rng.random() < 0.3:
        name = rng.choice(("question", "text", "context", "input", "instruction", "is_safe", "benign", "a b c d e f"))
        for row in made:
            row[name] = rng.choice(CELLS)
    for _ in range(rng.choice((0, 1, 1, 2))):
        rng.choice(made)[rng.choice(("prompt", "label", "split", "id"))] = rng.choice((*CELLS, evil(rng)))
    return made


def spoil(folder: Path, rng: random.Random) -> None:
    ending = rng.choice(ENDINGS)
    made: Any = rows(rng)
    if ending in (".json", ".jsonl", ".ndjson"):
        made = change(made, rng, CELLS) if rng.random() < 0.6 else made
        data = _json(made, ending, rng)
    elif ending == ".parquet":
        data = _parquet()
    elif ending == ".txt":
        data = "\n".join(str(row["prompt"]) for row in made).encode("utf-8", "surrogatepass")
    else:
        data = _delimited(made, rng)
    kind = rng.random()
    if kind < 0.12 or ending == ".parquet":
        data = flip(data, rng) if data else data
    elif kind < 0.2:
        data = cut_or_extend(data, rng) if data else data
    elif kind < 0.3:
        text = data.decode("utf-8", "replace")
        data = text.encode(rng.choice(("utf-16", "utf-16-le", "latin-1", "utf-8-sig", "utf-32")), "replace")
    elif kind < 0.35:
        data = data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"")))
    (folder / "spec").write_text(f"{ending}\n{rng.choice(RESTS)}")
    (folder / f"p{ending}").write_bytes(data)


def _json(made: Any, ending: str, rng: random.Random) -> bytes:
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=rng.random() < 0.5)

    if ending == ".json" or not isinstance(made, list):
        text = dump({"data": made} if rng.random() < 0.05 else made)
    else:
        text = rng.choice(("\n", "\n", "\r\n", "\n\n", " ")).join(map(dump, made))
    return text.encode("utf-8", "surrogatepass")


def _delimited(made: list[dict[str, Any]], rng: random.Random) -> bytes:
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in made for name in row))
    style = {"delimiter": rng.choice(",,,;\t|"), "lineterminator": rng.choice(("\n", "\n", "\r\n", "\r"))}
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE))
    writer = csv.writer(text, quoting=quoting, escapechar="\\", **style)
    if rng.random() < 0.05:
        text.write(f"sep={style['delimiter']}\n")
    if rng.random() < 0.9:
        writer.writerow(names)
    for row in made:
        cells = [_cell(row.get(name)) for name in names]
        if rng.random() < 0.05:
            cells = cells[: rng.randrange(len(cells) + 1)]
        writer.writerow(cells)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


@cache
def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    made = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), made)
    return made.getvalue()


def check(folder: Path) -> str:
    ending, rest = (folder / "spec").read_text().split("\n")
    path = folder / f"p{ending}"
    try:
        reading = read_prompts(benign=[f"{path}{rest}"])
    except LlmvaError as error:
        return clean(error)
    for prompt in reading.prompts:
        assert prompt.text.strip(), "an empty prompt"
        prompt.text.encode()
    for sentence in (*reading.warnings, *reading.notes):
        assert len(sentence.splitlines()) == 1, f"not one line: {sentence!r}"
        sentence.encode()
    assert reading.notes
    return "read"


def spoil_set(folder: Path, rng: random.Random) -> None:
    """What runs store: text, benign, source and split."""
    made = [
        {"text": f"{row['prompt']}", "benign": i % 2 == 0, "source": "s", "split": row["split"]}
        for i, row in enumerate(ROWS * 2)
    ]
    data = _json(change(made, rng, CELLS), ".jsonl", rng)
    (folder / "prompts.jsonl").write_bytes(flip(data, rng) if rng.random() < 0.2 and data else data)


def check_set(folder: Path) -> str:
    try:
        PromptSet.from_jsonl(folder / "prompts.jsonl")
    except LlmvaError as error:
        return clean(error)
    return "read"


def kinds() -> list[Kind]:
    return [Kind("prompts", spoil, check), Kind("prompt-sets", spoil_set, check_set)]
