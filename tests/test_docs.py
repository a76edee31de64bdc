"""The documents say what the code does: links, commands, names, fields, settings, import order, and nothing private."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import llmva

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.ipynb")])
MADE_BY_A_RUN = ("docs/report.png", "docs/results.md")  # a clone may be without them while they are being made

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def _text(path: Path) -> str:
    """The file; of a notebook, the text between its cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def _cells(page: str) -> list[list[str]]:
    """Rows of the tables of a page of docs/."""
    lines = _text(ROOT / "docs" / page).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


# -- links -------------------------------------------------------------------------------------------------------


def _anchors(page: str) -> set[str]:
    """Anchors as a forge makes them: lower case, punctuation dropped, spaces as hyphens."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", _text(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() and target in [ROOT / name for name in MADE_BY_A_RUN]:
            continue
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        assert not anchor or anchor in _anchors(_text(target)), f"{page.name}: no heading for {link}"


# -- commands ----------------------------------------------------------------------------------------------------


def _commands(page: str) -> list[str]:
    """`llmva ...` of code blocks and of spans."""
    fenced = [body for _, body in FENCE.findall(page)]
    lines = [line.strip().removeprefix("$ ") for block in [page, *fenced] for line in block.splitlines()]
    found = [line for line in lines if line.startswith("llmva ") and line.isascii()] + SPAN.findall(page)
    return [re.split(r"\s#|\s>|\s\|", text)[0] for text in found if text.startswith("llmva ")]


def _program() -> Any:
    """The command line as click sees it; `llmva.cli` has a function of the module's name."""
    import typer

    return typer.main.get_command(import_module("llmva.cli.main").app)


def _check_command(command: str) -> str | None:
    """What is wrong with a command line, or None."""
    program = _program()
    known = dict(program.commands)
    words = shlex.split(re.sub(r"(?<!\S)\[|\](?!\S)", " ", command))[1:]
    if words and words[0].startswith("--"):
        return None if words[0] in [o for p in program.params for o in p.opts] + ["--help"] else f"no {words[0]}"
    if not words or words[0] not in known:
        return f"there is no such command: {command}"
    chosen, rest = known[words[0]], iter(words[1:])
    if hasattr(chosen, "commands"):  # a group, such as `llmva judge check`
        word = next(rest, "")
        if word not in chosen.commands and "run" in chosen.commands:  # which need not be named
            word, rest = "run", iter(words[1:])
        if word not in chosen.commands:
            return f"there is no such command: {command}"
        chosen = chosen.commands[word]
    options = {name: p for p in chosen.params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}
    arguments = [p for p in chosen.params if not any(name.startswith("-") for name in p.opts)]
    given = 0
    for word in rest:
        if word == "--help":
            continue
        if not word.startswith("-"):
            given += 1
        elif word not in options:
            return f"{words[0]} has no option {word}: {command}"
        elif not options[word].is_flag and next(rest, None) is None:
            return f"{word} lacks its value: {command}"
    most = 99 if any(p.nargs == -1 for p in arguments) else len(arguments)
    return f"{command} has {given} arguments, not {len(arguments)}" if given > most else None


def test_commands_shown_are_known() -> None:
    shown = {command: page.name for page in PAGES for command in _commands(_text(page))}
    assert {"llmva align MODEL", "llmva inspect DIR"} <= {" ".join(c.split()) for c in shown}
    wrong = {problem: page for command, page in shown.items() if (problem := _check_command(command))}
    assert not wrong


@pytest.mark.parametrize(
    ("command", "right"),
    [
        ("llmva align MODEL [--out DIR]", True),
        ("llmva --version", True),
        ("llmva align MODEL --layer 3", False),
        ("llmva aline MODEL", False),
        ("llmva align MODEL --out", False),
        ("llmva inspect DIR DIR", False),
        ("llmva judge check --judge NAME", True),
        ("llmva judge check --part x", False),
        ("llmva judge list", False),
        ("llmva study FILE --dry-run", True),
        ("llmva study FILE --dry", False),
        ("llmva study init --paper", True),
    ],
)
def test_the_check_of_commands_can_fail(command: str, right: bool) -> None:
    assert (_check_command(command) is None) == right


def test_options_named_in_text_exist() -> None:
    every = [m for c in _program().commands.values() for m in (c, *getattr(c, "commands", {}).values())]
    known = {o for c in every for p in c.params for o in p.opts} | {"--help", "--version"}
    for page in [page for page in PAGES if page.parent != ROOT or page.name == "README.md"]:
        for span in SPAN.findall(FENCE.sub("", _text(page))):
            if re.fullmatch(r"--[a-z-]+( [A-Z]+)?", span) and page.name != "judges.md":  # that one has a CLI of its own
                assert span.split()[0] in known, f"{page.name}: {span}"


def test_make_targets_named_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", _text(ROOT / "Makefile"), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"^ +make ([a-z]+)", _text(page), re.MULTILINE)) <= targets, page.name


# -- Python ------------------------------------------------------------------------------------------------------


def _examples() -> list[tuple[str, str]]:
    return [(p.name, body) for p in PAGES for language, body in FENCE.findall(_text(p)) if language == "python"]


def test_there_is_a_python_example() -> None:
    assert "README.md" in [page for page, _ in _examples()]


@pytest.mark.parametrize("example", _examples(), ids=lambda e: e[0])
def test_python_examples_fit_the_library(example: tuple[str, str]) -> None:
    """It compiles, its `llmva.` names exist, and its calls have arguments that these names accept."""
    tree = ast.parse(example[1])
    compile(tree, example[0], "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            home = import_module(str(node.module))
            assert all(hasattr(home, name.name) for name in node.names)
        if isinstance(node, ast.Attribute) and (path := _path(node)):
            _resolve(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and (path := _path(node.func)):
            keywords = {k.arg: None for k in node.keywords if k.arg}
            inspect.signature(_resolve(path)).bind(*[None] * len(node.args), **keywords)


def test_the_loop_is_quoted_as_it_stands() -> None:
    from llmva import alignment

    body = inspect.getsource(alignment.align).split('"""')[2].strip("\n")
    assert body in _text(ROOT / "docs" / "architecture.md")


def test_no_public_name_is_hidden_by_a_module() -> None:
    """Importing llmva.x binds the module to the attribute x of llmva, in place of a function x from __getattr__."""
    modules = {path.stem for path in (ROOT / "src" / "llmva").iterdir()}
    assert sorted(modules & set(llmva.__all__)) == []


def _path(node: ast.expr) -> list[str] | None:
    """['Edit', 'load'] of `llmva.Edit.load`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return names if isinstance(node, ast.Name) and node.id == "llmva" and names else None


def _resolve(path: list[str]) -> Any:
    found: Any = llmva
    for name in path:
        found = getattr(found, name)
    return found


# -- settings, dependencies, imports -----------------------------------------------------------------------------


def test_settings_table_is_complete_and_true() -> None:
    from llmva.settings import Settings

    options = {name: p for p in _program().commands["align"].params for name in p.opts}
    rows = {row[1].strip("`"): row for row in _cells("method.md") if len(row) == 4 and row[1].startswith("`")}
    assert set(rows) == set(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        option, _, default, _ = rows[name]
        assert default == str(field.default).lower()
        if option != "none":
            assert options[option.strip("`")].default is None  # only what is given wins over --recipe
            shown = options[option.strip("`")].show_default
            assert shown == (field.default is not None and str(field.default))


def test_the_tables_of_data_sets_are_those_of_the_registry() -> None:
    """`python -m llmva.prompts.public.markdown` prints them."""
    from llmva.prompts.public.markdown import markdown_table

    assert _text(ROOT / "docs" / "datasets.md").endswith("\n\n" + markdown_table())


def _table_of(toml: str) -> list[str]:
    """Names in the lists of requirements of pyproject.toml (Python 3.10 has no tomllib)."""
    lists = re.findall(r"^(?:dependencies|\w+) = (\[\n.*?^\]|\[.*?\]$)", toml, re.MULTILINE | re.DOTALL)
    return [m for part in lists for m in re.findall(r'"([A-Za-z0-9_.-]+)(?:\[.*?\])?>=', part)]


def test_every_dependency_has_its_reason() -> None:
    toml = _text(ROOT / "pyproject.toml")
    project = toml[toml.index("[project]") : toml.index("[project.scripts]")]
    wanted = _table_of(project)
    assert {"torch", "typer", "pytest"} <= set(wanted)
    assert sorted(wanted) == sorted(row[0] for row in _cells("dependencies.md") if row[0] not in ("package", "---"))


def _unit(module: str) -> str:
    """The name by which docs/architecture.md lists a module."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:1] == ["models"] else (parts or [""])[0]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(_text(path))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "llmva":
            whole = node.module in ("llmva", "llmva.models")
            found |= {_unit(f"{node.module}.{n.name}") for n in node.names} if whole else {_unit(str(node.module))}
    return found - {"", "__version__"}


def test_imports_go_one_way() -> None:
    ((_, order),) = [f for f in FENCE.findall(_text(ROOT / "docs" / "architecture.md")) if f[0] == "text"]
    line = {name: number for number, names in enumerate(order.splitlines()) for name in names.split()}
    package = ROOT / "src" / "llmva"
    seen = set()
    for path in package.rglob("*.py"):
        unit = _unit(".".join(["llmva", *path.relative_to(package).with_suffix("").parts]).removesuffix(".__init__"))
        if unit in ("", "__init__", "models"):
            continue
        assert unit in line, f"docs/architecture.md does not list {unit}"
        seen.add(unit)
        for other in _imports(path) - {unit}:
            assert line[other] < line[unit], f"{unit} imports {other}, which docs/architecture.md lists later"
    assert seen == set(line)


# -- files of a run ----------------------------------------------------------------------------------------------


def _keys(value: Any, free: Sequence[str]) -> set[str]:
    """Field names in nested JSON; below a name in `free` keys are data (sources, sublayers, skills)."""
    if isinstance(value, list):
        return set().union(*(_keys(v, free) for v in value)) if value else set()
    if not isinstance(value, dict):
        return set()
    found = set(value)
    for key, inner in value.items():
        inside = list(inner.values()) if key in free and isinstance(inner, dict) else inner
        found |= _keys(inside, free)
    return found


def test_every_field_of_a_run_is_explained(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    from safetensors import safe_open

    from llmva.evaluation.skills import Probe
    from llmva.prompts.types import Prompt

    class Fixed(llmva.Judge):
        """Labels by the prompt's last digit, so that both vectors can be fitted."""

        name = "fixed"

        def answered(self, prompt: Prompt, answer: str) -> llmva.Judgement:
            yes = int(prompt.text[-1]) % 2 == 0
            return llmva.Judgement(llmva.Label.ANSWERED if yes else llmva.Label.REFUSED, 1.0, "digit")

    prompts = llmva.PromptSet.from_lists(
        [f"break the lock {i}" for i in range(15)], [f"paint the fence {i}" for i in range(15)]
    )
    probe = Probe("colour", "paint the door", contains=("paint",))
    llmva.align(
        model, tokenizer, prompts, judge=Fixed(), out=tmp_path, skills=[probe], iterations=1, max_new_tokens=2,
        min_kept=0.0,
    )  # fmt: skip
    explained = set(re.findall(r"`(\w+)`", _text(ROOT / "docs" / "format.md")))
    free = ("hashes", "weights", "by_source", "skills", "first_tokens")
    record = json.loads(_text(tmp_path / "run.json"))
    settings = record.pop("settings")
    assert set(record["prompts"].pop("counts")) == {"train", "validation", "test"}
    fields = {"settings", "counts"} | _keys(record, free)
    assert {"selected", "kept_interval", "by_source", "stopped"} <= fields  # the run went all the way
    with safe_open(tmp_path / "edit.safetensors", framework="pt") as file:
        fields |= _keys(json.loads(file.metadata()["llmva"]), free)
    for name in ("answers.jsonl", "prompts.jsonl"):
        fields |= _keys([json.loads(line) for line in _text(tmp_path / name).splitlines()], free)
    assert sorted(fields - explained) == []
    assert set(settings) <= {name.strip("`") for row in _cells("method.md") if len(row) == 4 for name in row[1:2]}


# -- nothing private ---------------------------------------------------------------------------------------------


def _tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def _private() -> list[str]:
    """Package indexes by name, what this machine installs from, and where it keeps this checkout.

    Put together here, so that this file does not hold what it looks for.
    """
    dot = "."
    hosts = [("pypi", "org"), ("pythonhosted", "org"), ("pytorch", "org"), ("anaconda", "org"), ("hf-mirror", "com")]
    found = [dot.join(pair) for pair in hosts] + ["--index" + "-url", "--extra-index" + "-url"]
    for name, value in os.environ.items():
        if re.search(r"INDEX_URL|ENDPOINT|_REGISTRY|GOPROXY|_PROXY$", name.upper()):
            found += re.findall(r"//(?:[^/@\s]*@)?([\w.-]+\.[\w.-]+)", value)
    home = [str(Path.home()), str(ROOT), str(ROOT.parent)]
    found += [path + "/" for path in home if path.count("/") >= 1 and len(path) > 4]
    return [*found, "/wo" + "rk/", "/ho" + "me/", "/Us" + "ers/"]


def _leaks(text: str) -> list[str]:
    return [pattern for pattern in _private() if re.search(rf"(?<![\w.]){re.escape(pattern)}", text)]


def test_no_host_of_a_registry_and_no_path_of_this_machine() -> None:
    for path in _tracked():
        data = path.read_bytes()
        if b"\0" not in data:  # text
            assert _leaks(data.decode("utf-8", "replace")) == [], path.relative_to(ROOT)


def test_the_check_for_private_things_can_fail() -> None:
    assert _leaks("see " + "https://" + "py" + "pi.org/simple")
    assert _leaks(f"in {ROOT}/src")
    assert not _leaks("the framework/parts of homes")


# -- cases -------------------------------------------------------------------------------------------------------


def test_every_case_names_tests_that_exist() -> None:
    tests: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        kind = re.match(r"test_kind_(\d\d)", path.name)
        tests[kind[1] if kind else f"`tests/{path.name}`"] = set(re.findall(r"^def test_(\w+)", _text(path), re.M))
    rows = [row for row in _cells("cases.md") if row[0] not in ("situation", "---")]
    assert len(rows) > 80
    for situation, report, _, test in rows:
        file, _, names = test.partition(":")
        assert file in tests, situation
        assert {name.strip() for name in names.split(",") if name.strip()} <= tests[file], situation
        assert re.search(r"\w#\d+|own|first look", report), situation
