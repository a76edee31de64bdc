"""The registry of public data sets: its entries, names, copies on disk, the hub, GitHub, licences."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Callable, Sequence
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from llmva.errors import LlmvaError, UsageError
from llmva.prompts import PromptSet
from llmva.prompts.entries import read_entry
from llmva.prompts.public.registry import Entry, Part, entries, find, first_use_notice, list_data
from llmva.prompts.public.wanted import parse_data
from llmva.prompts.sources import hub

ENTRIES = entries()
PUBLIC = [entry for entry in ENTRIES.values() if entry.home.kind != "bundled"]
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
MAX_CHARS = 20_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setenv("LLMVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache"


def is_one_sentence(error: BaseException) -> bool:
    said = str(error)
    return said.endswith(".") and "\n" not in said and ": " in said


# --- entries -------------------------------------------------------------------------------------------------------


def test_the_sets_that_were_promised_are_there() -> None:
    promised = {
        "seval-attack", "seval-risk", "orfuzzset", "nq", "xstest", "or-bench-80k", "or-bench-hard", "or-bench-toxic",
        "advbench", "harmbench", "jailbreakbench", "strongreject", "sorry-bench", "wildjailbreak", "coconot",
        "falsereject", "oktest", "bundled",
    }  # fmt: skip
    assert promised <= set(ENTRIES)


@pytest.mark.parametrize("entry", PUBLIC, ids=lambda entry: entry.name)
def test_an_entry_says_all_that_reading_needs(entry: Entry) -> None:
    assert entry.home.id
    assert entry.home.id.count("/") == 1
    assert entry.home.revision is not None
    assert len(entry.home.revision) == 40
    assert entry.licence
    assert entry.description.endswith(".")
    assert entry.parts
    for part in entry.parts:
        assert part.columns
        assert part.files  # or no copy of it could be known by its name
        if entry.home.kind == "github":
            assert "*" not in part.files[0]  # it is a path
        if part.label:
            assert not set(part.label.toxic) & set(part.label.benign)


def test_names_and_aliases_are_told_apart() -> None:
    names = [name for entry in ENTRIES.values() for name in (entry.name, *entry.aliases)]
    assert len(set(names)) == len(names)
    assert all(name == name.casefold() and "_" not in name for name in names)


def test_a_part_has_one_rule_for_its_side() -> None:
    rule = {"column": "label", "toxic": ["bad"], "benign": ["good"]}
    for wrong in ({}, {"side": "toxic", "label": rule}):
        with pytest.raises(ValueError, match="a side or a label"):
            Part.model_validate({"columns": ["text"], **wrong})


@pytest.mark.parametrize("name", ["xstest", "XSTest", " xstest ", "jbb", "JBB_Behaviors", "natural_questions"])
def test_names_forgive_case_and_underscores(name: str) -> None:
    assert find(name).name in ("xstest", "jailbreakbench", "nq")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("xtest", "choose xstest"),
        ("or-bench", "choose or-bench-80k, or-bench-hard, or-bench-toxic"),
        ("harmbensh", "harmbench"),
        ("zzzzzz", "choose one of bundled, seval-attack"),
        ("", "choose one of bundled"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=near) as caught:
        find(name)
    assert is_one_sentence(caught.value)


def test_the_list_is_plain_json() -> None:
    found = list_data()
    assert json.loads(json.dumps(found)) == found
    by_name = {one["name"]: one for one in found}
    assert by_name["sorry-bench"]["gated"] is True
    assert by_name["xstest"]["sides"] == ["toxic", "benign"]
    assert by_name["bundled"]["rows"] == sum(sum(n.values()) for n in PromptSet.bundled().counts().values())


# --- what --data names -------------------------------------------------------------------------------------------


def test_lists_and_copies(tmp_path: Path) -> None:
    plain, comma = tmp_path / "a.csv", tmp_path / "a,b.csv"
    for path in (plain, comma):
        path.write_text("goal\nhi\n")
    found = parse_data([f"xstest, or-bench-hard,advbench={plain}", f"harmbench={comma}"])
    assert [(one.entry.name, one.local) for one in found] == [
        ("xstest", None),
        ("or-bench-hard", None),
        ("advbench", str(plain)),
        ("harmbench", str(comma)),
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([""], "an empty data set was named"),
        (["xstest,"], "an empty data set was named"),
        (["=a.csv"], "an empty data set was named"),
        (["xstest="], "xstest= lacks the path"),
        (["xstest=nothing.csv"], "no file or folder 'nothing.csv'"),
        (["xstest", "xstest"], "xstest is named twice"),
        (["jbb,jailbreakbench"], "jailbreakbench is named twice"),
        (["xtest"], "choose xstest"),
        (["xtest=here.csv"], "choose xstest"),
        (["here.csv"], "here.csv is a file or folder, not a name"),
        (["bundled=here.csv"], "comes with the package"),
        (["xstest=" + "x" * 5000], "no file or folder"),
        (["xstest=a\0b"], "no file or folder"),
    ],
)
def test_what_names_no_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.csv").write_text("goal\nhi\n")
    with pytest.raises(UsageError, match=says) as caught:
        parse_data(given)
    assert is_one_sentence(caught.value)


# --- copies on disk ------------------------------------------------------------------------------------------------


def rows_of(part: Part, n: int = 4) -> list[dict[str, Any]]:
    """Rows as the home has them: n of each side, and one that does not belong to the set where there is a rule."""
    rows: list[dict[str, Any]] = []
    sides = {"toxic": part.label.toxic, "benign": part.label.benign} if part.label else {part.side: (None,)}
    for side, labels in sides.items():
        for i in range(n):
            row: dict[str, Any] = {"id": i, part.columns[0]: f"{side} {part.config} {part.split} {i}"}
            if part.label:
                row[part.label.column] = labels[i % len(labels)]
            if part.only:
                row[part.only.column] = part.only.values[0]
            rows.append(row)
    if part.only:
        rows.append({**rows[0], part.columns[0]: "of another kind", part.only.column: "other"})
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pandas

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        pandas.DataFrame(rows).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")


def file_of(part: Part) -> str:
    """A name that the part's first pattern fits."""
    pattern = part.files[0]
    return pattern.replace("*", "-0" if "." in pattern.rpartition("*")[2] else "-0.parquet")


def wanted_texts(entry: Entry) -> dict[bool, set[str]]:
    found: dict[bool, set[str]] = {}
    for part in entry.parts:
        for row in rows_of(part):
            text = row[part.columns[0]]
            if text != "of another kind":
                found.setdefault(text.startswith("benign"), set()).add(text)
    return found


def texts(entry: Entry, place: Path) -> dict[bool, set[str]]:
    return {benign: set(source.all_texts()) for benign, source in read_entry(entry, str(place), MAX_CHARS)}


@pytest.mark.parametrize("entry", PUBLIC, ids=lambda entry: entry.name)
def test_a_folder_as_the_home_has_it(entry: Entry, tmp_path: Path) -> None:
    for part in entry.parts:
        write(tmp_path / "copy" / file_of(part), rows_of(part))
    assert texts(entry, tmp_path / "copy") == wanted_texts(entry)
    names = {source.name for _, source in read_entry(entry, str(tmp_path / "copy"), MAX_CHARS)}
    both = len(entry.sides) > 1
    assert names == ({f"{entry.name} (toxic)", f"{entry.name} (benign)"} if both else {entry.name})


@pytest.mark.parametrize("entry", PUBLIC, ids=lambda entry: entry.name)
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_file_of_any_name(entry: Entry, ending: str, tmp_path: Path) -> None:
    """Where all parts are read alike, one file will do; it is then cut anew."""
    path = tmp_path / f"mine{ending}"
    write(path, [row for part in entry.parts for row in rows_of(part)])
    if entry.name in ("jailbreakbench", "coconot"):  # whose sides are files of their own
        with pytest.raises(UsageError, match="several parts: give the folder with"):
            read_entry(entry, str(path), MAX_CHARS)
        return
    assert texts(entry, path) == wanted_texts(entry)
    assert all(set(source.texts) == {""} for _, source in read_entry(entry, str(path), MAX_CHARS))


def test_a_part_alone_is_known_by_its_name(tmp_path: Path) -> None:
    entry = find("jailbreakbench")
    write(tmp_path / "benign-behaviors.csv", rows_of(entry.parts[1]))
    assert set(texts(entry, tmp_path / "benign-behaviors.csv")) == {True}
    with pytest.raises(UsageError, match=r"has no file harmful-behaviors\.csv, a part of jailbreakbench: put it there"):
        read_entry(entry, str(tmp_path), MAX_CHARS)


def test_a_split_may_be_missing_and_is_told(tmp_path: Path) -> None:
    entry = find("falsereject")
    write(tmp_path / "train.jsonl", rows_of(entry.parts[0]))
    ((benign, source),) = read_entry(entry, str(tmp_path), MAX_CHARS)
    assert (benign, list(source.texts)) == (True, ["train"])
    (told,) = source.warnings
    assert "no test.jsonl, so its test prompts are not used" in told


def test_a_folder_from_save_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    entry = find("falsereject")
    saved = {part.split: Dataset.from_list(rows_of(part)) for part in entry.parts}
    DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    assert texts(entry, tmp_path / "saved") == wanted_texts(entry)
    DatasetDict({"other": saved["train"]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UsageError, match=r"falsereject has no split 'train' here \(other\)"):
        read_entry(entry, str(tmp_path / "other"), MAX_CHARS)


def test_the_first_of_several_turns(tmp_path: Path) -> None:
    rows = [{"turns": ["first", "second"], "prompt_style": "base"}, {"turns": ["no"], "prompt_style": "slang"}]
    for name in ("question.jsonl", "question.parquet"):
        write(tmp_path / name, rows)
        assert texts(find("sorry-bench"), tmp_path / name) == {False: {"first"}}


def test_the_first_column_with_text_is_the_prompt(tmp_path: Path) -> None:
    rows = [
        {"vanilla": "plain", "adversarial": "", "data_type": "vanilla_benign"},
        {"vanilla": "plain", "adversarial": "wrapped", "data_type": "adversarial_harmful"},
    ]
    write(tmp_path / "train.tsv", rows)
    assert texts(find("wildjailbreak"), tmp_path / "train.tsv") == {False: {"wrapped"}, True: {"plain"}}


def test_rows_without_a_prompt_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{"goal": "one"}, {"goal": " "}, {"goal": None}, {"goal": 7}, {"goal": "x" * 30}])
    ((_, source),) = read_entry(find("advbench"), str(tmp_path / "p.jsonl"), 20)
    assert source.all_texts() == ["one"]
    assert source.warnings == ["advbench: 4 rows left out, which hold no prompt or one of more than 20 characters."]


@pytest.mark.parametrize(
    ("name", "file", "data", "says"),
    [
        ("xstest", "p.csv", "prompt,label\nhi,maybe\n", "line 2 of .* has 'maybe' in 'label', not unsafe, safe"),
        ("xstest", "p.csv", "prompt\nhi\n", "no column 'label', which the registry expects of xstest, but prompt"),
        ("xstest", "p.csv", "text,label\nhi,safe\n", "no column 'prompt'"),
        ("harmbench", "p.csv", "Behavior,FunctionalCategory\nhi,copyright\n", "holds no prompt of harmbench"),
        ("advbench", "p.csv", "goal\n", "holds no prompts"),
        ("advbench", "p.xlsx", "goal\nhi\n", "not a kind of prompt file"),
        ("advbench", "p.csv", "goal,target\nhi\n", "line 2 of .* has 1 cells but the header has 2"),
    ],
)
def test_copies_of_something_else(tmp_path: Path, name: str, file: str, data: str, says: str) -> None:
    (tmp_path / file).write_text(data)
    with pytest.raises(UsageError, match=says) as caught:
        read_entry(find(name), str(tmp_path / file), MAX_CHARS)
    assert is_one_sentence(caught.value)


def test_the_bundled_set_keeps_its_sources_and_splits() -> None:
    found = read_entry(find("bundled"), None, MAX_CHARS)
    bundled = PromptSet.bundled()
    assert {source.name: {k: len(v) for k, v in source.texts.items()} for _, source in found} == bundled.counts()
    assert {source.name for benign, source in found if benign} == {"alarming", "plain"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the paper's prompts are not on this machine")
@pytest.mark.parametrize("name", ["seval-attack", "seval-risk", "orfuzzset", "nq"])
def test_the_papers_prompts(name: str) -> None:
    entry = find(name)
    ((benign, source),) = read_entry(entry, str(SHARED), MAX_CHARS)
    assert benign == (entry.sides == ("benign",))
    rows = {part.use: part.rows for part in entry.parts}
    assert {split: len(texts) for split, texts in source.texts.items()} == {
        split: rows[split] for split in ("train", "validation")
    }


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the hub was asked for; it answers with rows as they should be."""
    import datasets

    calls: list[tuple[Any, ...]] = []

    def load(home: str, configuration: str | None, revision: str | None, options: dict[str, Any]) -> Any:
        calls.append((home, configuration, revision, dict(options)))
        entry = next(e for e in PUBLIC if e.home.id == home and configuration in [p.config for p in e.parts])
        parts = [part for part in entry.parts if part.config == configuration]
        return datasets.DatasetDict({part.split: datasets.Dataset.from_list(rows_of(part)) for part in parts})

    monkeypatch.setattr(hub, "load_from_hub", load)
    return calls


@pytest.mark.parametrize("entry", [e for e in PUBLIC if e.home.kind == "hub"], ids=lambda entry: entry.name)
def test_the_hub_is_asked_for_the_pinned_revision(entry: Entry, asked: list[tuple[Any, ...]]) -> None:
    found = {benign: set(source.all_texts()) for benign, source in read_entry(entry, None, MAX_CHARS)}
    assert found == wanted_texts(entry)
    assert asked == [(entry.home.id, part.config, entry.home.revision, dict(part.options)) for part in entry.parts]


def test_what_datasets_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: seen.append((args, how)))
    hub.load_from_hub("a/b", "c", "0" * 40, {"delimiter": "\t"})
    assert seen == [(("a/b", "c"), {"revision": "0" * 40, "delimiter": "\t"})]


class GatedRepoError(OSError):
    """As the hub's client calls it."""


class RepositoryNotFoundError(OSError):
    """Likewise."""


@pytest.mark.parametrize(
    ("name", "error", "kind", "says"),
    [
        ("sorry-bench", GatedRepoError("403"), UsageError, "needs a login: accept its terms at .*sorry-bench-202503"),
        ("sorry-bench", ValueError("Dataset cannot be accessed"), UsageError, "needs a login"),
        (
            "coconot",
            ConnectionError("Couldn't reach it"),
            LlmvaError,
            "coconot is not in the cache and the hub .* cannot",
        ),
        ("coconot", TimeoutError("slow"), LlmvaError, "cannot be reached"),
        ("coconot", RepositoryNotFoundError("404"), UsageError, "the hub has no data set allenai/coconot"),
        ("coconot", ValueError("BuilderConfig 'x' not found"), UsageError, "no configuration 'original'"),
        ("coconot", OSError("revision 2cbe doesn't exist"), UsageError, "no revision 2cbe"),
        ("coconot", RuntimeError("line one\nline two"), UsageError, r"could not be loaded .*RuntimeError: line one\)"),
    ],
)
def test_failures_of_the_hub(
    name: str, error: Exception, kind: type[LlmvaError], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(hub, "load_from_hub", fail)
    with pytest.raises(kind, match=says) as caught:
        read_entry(find(name), None, MAX_CHARS)
    assert type(caught.value) is kind
    assert is_one_sentence(caught.value)
    assert f"{name}=PATH" in str(caught.value)


def test_another_revision_in_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        cache_files = ({"filename": f"/c/allenai___coconot/original/0.0.0/{'a' * 40}/x.arrow"},)

    monkeypatch.setattr(hub, "load_from_hub", lambda *_: {"test": Rows()})
    with pytest.raises(
        UsageError, match="holds allenai/coconot at revision aaaaaaaaaaaa, not at 2cbe16aabf90"
    ) as caught:
        read_entry(find("coconot"), None, MAX_CHARS)
    assert is_one_sentence(caught.value)


# --- GitHub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | Exception], list[str]]:
    def answer(with_: bytes | Exception) -> list[str]:
        urls: list[str] = []

        def download(url: str) -> bytes:
            urls.append(url)
            if isinstance(with_, Exception):
                raise with_
            return with_

        monkeypatch.setattr(hub, "download", download)
        return urls

    return answer


def test_github_is_asked_once(github: Callable[..., list[str]], cache: Path) -> None:
    entry = find("xstest")
    urls = github(b"prompt,label\nkind,safe\nmean,unsafe\n")
    for _ in range(2):
        found = {benign: source.all_texts() for benign, source in read_entry(entry, None, MAX_CHARS)}
        assert found == {False: ["mean"], True: ["kind"]}
    path = f"paul-rottger/xstest/{entry.home.revision}/xstest_prompts.csv"
    assert urls == [f"https://raw.githubusercontent.com/{path}"]
    assert [file for file in cache.rglob("*") if file.is_file()] == [cache / "github" / path]


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (urllib.error.HTTPError("u", 404, "no", Message(), None), UsageError, "GitHub has no .* at revision 0982"),
        (urllib.error.HTTPError("u", 503, "busy", Message(), None), LlmvaError, "not in the cache .* 503"),
        (urllib.error.URLError("no route"), LlmvaError, "not in the cache and GitHub .* cannot be reached"),
        (TimeoutError("slow"), LlmvaError, "cannot be reached"),
    ],
)
def test_failures_of_github(
    error: Exception, kind: type[LlmvaError], says: str, github: Callable[..., list[str]], cache: Path
) -> None:
    github(error)
    with pytest.raises(kind, match=says) as caught:
        read_entry(find("advbench"), None, MAX_CHARS)
    assert type(caught.value) is kind
    assert is_one_sentence(caught.value)
    assert "advbench=PATH" in str(caught.value)
    assert not cache.exists()


def test_no_download_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LlmvaError, match="advbench is not in the cache") as caught:
        read_entry(find("advbench"), None, MAX_CHARS)
    assert caught.value.exit_code == 1


def test_a_download_from_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    (tmp_path / "file.csv").write_bytes(b"goal\nhi\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert hub.download(f"{url}/file.csv") == b"goal\nhi\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            hub.download(f"{url}/none.csv")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, github: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    github(b"goal\nhi\n")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMVA_CACHE", str(tmp_path / "file"))
    with pytest.raises(LlmvaError, match=r"cannot be written .*set LLMVA_CACHE") as caught:
        read_entry(find("advbench"), None, MAX_CHARS)
    assert is_one_sentence(caught.value)


# --- licences --------------------------------------------------------------------------------------------------------


def test_a_licence_is_told_once(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = first_use_notice("seval-attack")
    assert told is not None
    assert told.startswith("The data set seval-attack has the licence CC-BY-NC-SA-4.0 (")
    assert first_use_notice("seval-attack=some/path") is None
    assert first_use_notice("nq") is not None
    assert first_use_notice("bundled") is None
    (cache / "licences" / "nq.txt").write_text("another licence\n")
    assert first_use_notice("nq") is not None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMVA_CACHE", str(tmp_path / "file"))  # no place for a mark: it is told every time
    assert first_use_notice("nq") == first_use_notice("nq") is not None


def test_a_set_without_a_licence_says_so() -> None:
    assert str(first_use_notice("orfuzzset-full")).startswith("The data set orfuzzset-full states no licence: ")


# --- prompts of a run ------------------------------------------------------------------------------------------------


def many(path: Path, column: str, n: int, words: str) -> Path:
    write(path, [{column: f"{words}{i} so{i} very{i} {words}"} for i in range(n)])
    return path


def test_a_run_takes_both_sides_and_draws(tmp_path: Path) -> None:
    entry = find("xstest")
    write(tmp_path / "xs.csv", rows_of(entry.parts[0], 60))
    own = many(tmp_path / "own.csv", "text", 30, "kind")
    found = PromptSet.load(benign=[str(own)], data=[f"xstest={tmp_path}/xs.csv"], per_set=20)
    assert found.counts() == {
        "xstest (toxic)": {"train": 12, "validation": 4, "test": 4},
        "xstest (benign)": {"train": 12, "validation": 4, "test": 4},
        "own": {"train": 18, "validation": 6, "test": 6},
    }
    assert "xstest (toxic): 20 of 60 prompts were drawn (--per-set 20, a side)." in found.warnings
    more = PromptSet.load(benign=[str(own)], data=[f"xstest={tmp_path}/xs.csv"], per_set=40)
    texts = [{p.text for _, split in s.splits() for p in split} for s in (found, more)]
    assert texts[0] < texts[1]


def test_own_splits_get_their_shares_of_a_draw(tmp_path: Path) -> None:
    entry = find("falsereject")
    for part, n in zip(entry.parts, (100, 50), strict=True):
        write(tmp_path / "f" / file_of(part), rows_of(part, n))
    toxic = many(tmp_path / "bad.csv", "goal", 20, "mean")
    found = PromptSet.load(data=[f"falsereject={tmp_path}/f,advbench={toxic}"], per_set=50)
    assert found.counts()["falsereject"] == {"train": 30, "validation": 10, "test": 10}
    assert all("test" in p.text for p in found.test if p.benign)


def test_a_text_on_both_sides_of_published_sets_is_left_out(tmp_path: Path) -> None:
    both = {"prompt": "both", "label": "safe"}
    write(tmp_path / "xs.csv", [*rows_of(find("xstest").parts[0], 20), both, {**both, "label": "unsafe"}])
    found = PromptSet.load(data=[f"xstest={tmp_path}/xs.csv"])
    assert all(p.text != "both" for _, split in found.splits() for p in split)
    assert "xstest (benign): 1 left out, the same text being given on the other side." in found.warnings


def test_a_run_needs_both_sides(tmp_path: Path) -> None:
    toxic = many(tmp_path / "bad.csv", "goal", 20, "mean")
    with pytest.raises(UsageError, match="no benign prompts: add --benign"):
        PromptSet.load(data=[f"advbench={toxic}"])
