"""Imports run downwards and in no circle: read from the source, nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "twolevel"
# Each room may import from those that follow it, and from itself; what stands on one line, only from itself.
ORDER = [
    "cli",
    "grids",
    "training",
    "analysis",
    "distributed.strategies",
    "models",
    "distributed",
    "nn",
    "ops",
]
# Beside the order: everything may import these, and they import nothing of the order.
BESIDE = {"data", "durable", "settings", "errors", "host", "launchers", "streams", "terminal"}
MOST_LINES = 300
# These wait to load torch until it is needed, and what they import does too.
LIGHT = ["errors", "settings", "launchers", "data.config", "data.registry", "training.config", "cli"]


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `twolevel`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, inside: bool) -> Iterator[str]:
    """What a module imports, by full names; with `inside` also what its functions import."""
    tree = ast.parse(path.read_text())
    for node in _nodes(tree, inside=inside):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("twolevel.") in MODULES else node.module


def _nodes(tree: ast.AST, *, inside: bool) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported, or with `inside` at any time; not what is for a type checker."""
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not typing_only and (inside or not function):
            yield node
            yield from _nodes(node, inside=inside)


def ours(path: Path, *, inside: bool) -> set[str]:
    return {
        name.removeprefix("twolevel.")
        for name in imports(path, inside=inside)
        if name.startswith("twolevel.") and name.removeprefix("twolevel.") in MODULES
    }


def room(module: str) -> str:
    within = [name for name in ORDER if module == name or module.startswith(f"{name}.")]
    return max(within, key=len) if within else module.split(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards(module):
    here = room(module)
    for other in ours(MODULES[module], inside=here not in ("cli", "")):
        there = room(other)
        if here in ORDER and there in ORDER:
            assert ORDER.index(there) >= ORDER.index(here), f"{module} imports {other}"
        if here in BESIDE:
            assert there in BESIDE, f"{module} imports {other}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every module of a circle, one list for each circle found."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_there_is_no_circle():
    """Imports inside functions count, but for the command line's, which wait so that help comes at once."""
    graph = {m: ours(path, inside=room(m) != "cli") - {m} for m, path in MODULES.items()}
    assert circles(graph) == []


def test_every_room_has_its_place():
    at_the_top = {"", "__main__", "torchrun"}
    assert {room(module) for module in MODULES} == {*ORDER, *BESIDE} | at_the_top


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_file_is_small(module):
    assert len(MODULES[module].read_text().splitlines()) < MOST_LINES


def light_modules() -> list[str]:
    return [m for m in sorted(MODULES) if any(m == name or m.startswith(f"{name}.") for name in LIGHT)]


@pytest.mark.parametrize("module", light_modules())
def test_what_help_needs_does_not_import_torch(module):
    seen, ahead = set(), [module]
    while ahead:
        current = ahead.pop()
        # A package runs when a module of it is imported.
        packages = [current.rsplit(".", number)[0] for number in range(1, current.count(".") + 1)]
        for name in (current, *packages):
            if name in MODULES and name not in seen:
                seen.add(name)
                heavy = [
                    n for n in imports(MODULES[name], inside=False) if n.split(".")[0].startswith("torch")
                ]
                assert not heavy, f"{module} imports torch by way of {name}"
                ahead += ours(MODULES[name], inside=False)
