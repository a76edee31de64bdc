"""How the code is laid out: sizes, imports that go one way, and names that say what they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "llmva"
MAX_TOP_FILES = 12
MAX_FOLDER_FILES = 14
MAX_MODULE_LINES = 400
MAX_ALIGN_LINES, MAX_LOOP_LINES = 50, 20
MAX_PARAMETERS = 8
# The public functions, which have everything a run can be told.
MANY_PARAMETERS = {"align", "compare", "ablate", "load_model"}

# Names that left a reader guessing. Nothing in the package may be called so again.
UNCLEAR = {
    "Work", "Foresight", "foresee", "promise", "Search", "Seen", "Move", "Advance", "advance", "spares", "STRIDE",
    "stride", "influence", "_felt", "trusting", "causal", "Aim", "worth", "excess", "broken", "guarded", "emptied",
    "quick", "Quiet", "rivals", "bench", "found",
}  # fmt: skip

SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(text) for path, text in SOURCES.items()}


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    parts = ("llmva", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in TREES}


# -- sizes -------------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".pyc")


def test_the_top_level_is_small() -> None:
    assert len(files_in(PACKAGE)) <= MAX_TOP_FILES


def test_no_folder_is_crowded() -> None:
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    counts = {folder.relative_to(PACKAGE).as_posix(): len(files_in(folder)) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MAX_FOLDER_FILES} == {}


def test_no_module_is_long() -> None:
    lines = {place(path): len(text.splitlines()) for path, text in SOURCES.items()}
    assert {path: count for path, count in lines.items() if count > MAX_MODULE_LINES} == {}


def length(node: ast.FunctionDef | ast.While) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_align_is_read_on_one_screen() -> None:
    body = TREES[PACKAGE / "alignment.py"].body
    (align,) = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == "align")
    (loop,) = (node for node in ast.walk(align) if isinstance(node, ast.While))
    assert length(align) <= MAX_ALIGN_LINES
    assert length(loop) <= MAX_LOOP_LINES


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of all parameters, `*rest` and `**options` too, but self and cls."""
    given = node.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [argument.arg for argument in named if argument is not None and argument.arg not in ("self", "cls")]


def test_no_function_takes_many_parameters() -> None:
    many = {
        f"{place(path)}: {node.name}": len(parameters(node))
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and path.parent not in (PACKAGE / "cli", PACKAGE / "cli/experiments")  # an option each
        and node.name not in MANY_PARAMETERS
        and len(parameters(node)) > MAX_PARAMETERS
    }
    assert many == {}


# -- imports -----------------------------------------------------------------------------------------------------


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(tree: ast.AST, types: bool = True) -> Iterator[str]:
    """Modules of this package that a tree imports, inside functions too; under TYPE_CHECKING only with `types`."""
    for node in ast.iter_child_nodes(tree):
        if is_for_types(node) and not types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            for alias in node.names:
                for name in (f"{node.module}.{alias.name}", str(node.module)):
                    if name in MODULES:
                        yield name
                        break
        yield from imported(node, types)


IMPORTS = {
    # the package's own __init__ tells type checkers of names that it only imports when they are asked for
    name: set(imported(TREES[path], types=name != "llmva")) - {name}
    for name, path in MODULES.items()
}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Nodes along a circle; none in a graph without one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        nodes: list[str] = error.args[1]
        return nodes
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(IMPORTS) == []


def room(module: str) -> str:
    """The file or folder at the package's top level that a module belongs to."""
    return ".".join(module.split(".")[:2])


def test_rooms_import_one_way() -> None:
    rooms: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    assert {"llmva.method", "llmva.alignment", "llmva.cli"} <= rooms.keys()
    assert circle(rooms) == []


def test_imports_are_seen_wherever_they_stand() -> None:
    tree = ast.parse(
        "import llmva.files\n"
        "if TYPE_CHECKING:\n    from llmva.edit import Edit\n"
        "def f():\n    from llmva import errors, __version__\n"
    )
    assert sorted(imported(tree)) == ["llmva", "llmva.edit", "llmva.errors", "llmva.files"]
    assert sorted(imported(tree, types=False)) == ["llmva", "llmva.errors", "llmva.files"]


def test_circles_are_told() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


# -- names -------------------------------------------------------------------------------------------------------


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Every name that a module gives, uses or imports; not what stands in strings and comments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "advance" and ast.unparse(node).endswith("bars.advance"):
            continue  # a method of rich
        for field in ("id", "name", "attr", "arg", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield from value.split(".")
        if isinstance(node, ast.Global | ast.Nonlocal):
            yield from node.names


def unclear(tree: ast.AST) -> set[str]:
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return (UNCLEAR & set(identifiers(tree))) | ({"lengths"} & functions)


def test_names_say_what_they_are() -> None:
    assert {place(path): names for path, tree in TREES.items() if (names := unclear(tree))} == {}
    assert {place(path) for path in PACKAGE.rglob("*")} >= {"method", "alignment.py"}
    assert [place(path) for path in PACKAGE.rglob("*") if path.stem in UNCLEAR] == []


def test_the_method_has_no_class_change() -> None:
    classes = {
        node.name
        for path, tree in TREES.items()
        if path.parent == PACKAGE / "method"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert "LineSearch" in classes
    assert "Change" not in classes


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("found = 1", {"found"}),
        ("def f(worth): pass", {"worth"}),
        ("x.stride", {"stride"}),
        ("f(broken=1)", {"broken"}),
        ("from llmva.bench import x", {"bench"}),
        ("import a as Aim", {"Aim"}),
        ("class Search: pass", {"Search"}),
        ("def lengths(): pass", {"lengths"}),
        ("f'{excess}'", {"excess"}),
        ("def f():\n    global quick", {"quick"}),
        ("lengths = 1", set()),
        ("self.bars.advance(1)", set()),
        ("step.advance(1)", {"advance"}),
        ("'found'  # found", set()),
    ],
)
def test_unclear_names_are_told(line: str, told: set[str]) -> None:
    assert unclear(ast.parse(line)) == told
