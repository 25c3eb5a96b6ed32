"""The import graph of the package: no cycles, and imports from higher to lower floors only.

Imports inside functions count; those under `TYPE_CHECKING` do not.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Graph = dict[str, set[str]]

GROUND = {"llava", "constants", "errors"}
BASE = {"arguments", "conversation", "download", "files", "images", "mm_utils", "openai_protocol"}
BASE |= {"parent_process", "placement", "provenance", "utils"}
TOP = {"__main__", "check", "cli", "doctor", "self_test"}
# What the modules of a room may import besides each other, from the lowest floor to the highest.
ALLOWED: dict[str, set[str]] = dict.fromkeys(GROUND, GROUND)
ALLOWED |= dict.fromkeys(BASE, GROUND | BASE)
ALLOWED["data"] = GROUND | BASE
ALLOWED["model"] = ALLOWED["data"] | {"data"}
ALLOWED["engine"] = ALLOWED["model"] | {"model"}
ALLOWED |= dict.fromkeys(("eval", "train", "serve"), ALLOWED["engine"] | {"engine"})
ALLOWED |= {name: {*ALLOWED, *TOP} for name in TOP}


def imports_of(source: str, package: str, modules: Set[str]) -> set[str]:
    """The `modules` that a module of `package` imports, by statements or `import_module`, anywhere in it."""
    found: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            for child in node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else [*node.body, *node.orelse]:
                self.visit(child)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            parents = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names = (f"{base}.{alias.name}" for alias in node.names)
            found.update(name if name in modules else base for name in names)

        def visit_Call(self, node: ast.Call) -> None:
            if ast.unparse(node.func).endswith("import_module") and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
            self.generic_visit(node)

    Visitor().visit(ast.parse(source))
    return found & modules


def import_graph() -> Graph:
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "llava").rglob("*.py")
    }
    graph = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = imports_of(path.read_text(encoding="utf-8"), package, paths.keys()) - {name}
    return graph


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def arrows_up(graph: Graph) -> list[str]:
    return sorted(
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in targets
        if room(target) not in ALLOWED[room(module)] | {room(module)}
    )


def find_cycle(graph: Graph) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph()


def test_every_room_has_a_floor(graph: Graph) -> None:
    assert {room(module) for module in graph} <= set(ALLOWED)


def test_imports_go_down(graph: Graph) -> None:
    assert arrows_up(graph) == []


def test_no_cycle(graph: Graph) -> None:
    assert find_cycle(graph) == []


def test_utils_stands_on_the_ground(graph: Graph) -> None:
    assert graph["llava.utils"] <= {"llava.constants", "llava.errors", "llava.files"}


def test_the_graph_sees_lazy_imports_but_not_type_checking() -> None:
    source = """
import llava.a
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import llava.never
else:
    import llava.b
def run():
    from llava import c, attribute
    from . import d
    from ..e import name
    importlib.import_module("llava.f")
"""
    names = {"llava", "llava.never", *(f"llava.{letter}" for letter in "abcef"), "llava.p.d"}
    assert imports_of(source, "llava.p", names) == names - {"llava.never"}


def test_the_measures_see_an_arrow_up_and_a_cycle() -> None:
    graph = {"llava.utils": {"llava.data.x"}, "llava.data.x": {"llava.errors"}, "llava.eval.y": {"llava.train.z"}}
    assert arrows_up(graph) == ["llava.eval.y -> llava.train.z", "llava.utils -> llava.data.x"]
    assert find_cycle(graph) == []
    graph["llava.errors"] = {"llava.utils"}
    assert len(find_cycle(graph)) == 4
