"""The house keeps its form: rooms with faces, arrows that point down only, no files that import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

HOUSE = Path(__file__).parent.parent / "src" / "taskzip"

FLOORS: list[set[str]] = [
    {"errors"},
    {"copying", "files", "naming", "randomness"},
    {"algebra", "datasets", "models", "tasks"},
    {"graph"},
    {"observing", "zipped"},
    {"planning", "training"},
    {"zipping"},
    {"export", "factoring", "pruning", "report"},
    {"experiments"},
    {"cli"},
]
"""Rooms, and the files that belong to none, from the ground up: what is on one floor does not know of each other."""

ROOMS = {path.parent.name for path in HOUSE.glob("*/__init__.py")}
FILES = {".".join(path.relative_to(HOUSE.parent).with_suffix("").parts): path for path in HOUSE.rglob("*.py")}
MODULES = {module.removesuffix(".__init__") for module in FILES}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """What a file imports from taskzip: module and name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "taskzip":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "taskzip")


def place(module: str) -> str:
    """The room of a module, or the file that belongs to none."""
    return (*module.split("."), "")[1]


def floor(name: str) -> int:
    return next(k for k, names in enumerate(FLOORS) if name in names)


def test_everything_has_its_floor() -> None:
    ground = {path.stem for path in HOUSE.glob("*.py")}
    assert set().union(*FLOORS) == ROOMS | ground - {"__init__", "__main__"}
    assert len(ground) <= 8


def test_arrows_point_down_and_go_through_faces() -> None:
    faults = []
    for module, path in FILES.items():
        here = place(module)
        if here in ("__init__", "__main__"):
            continue
        for source, name in imports(path):
            there = place(source)
            if there == here:
                continue
            if not there and floor(here) > floor("export"):
                continue  # they use taskzip as users do
            if not there or floor(there) >= floor(here):
                faults.append(f"{module} imports {source}, which is not below it")
            elif there in ROOMS and source != f"taskzip.{there}":
                faults.append(f"{module} reaches past the face of {there} for {name}")
    assert not faults


def test_no_files_import_each_other() -> None:
    """Not in a wider circle either; faces only pass on."""
    needs: dict[str, set[str]] = {}
    for module, path in FILES.items():
        if not module.endswith("__init__"):
            each = {f"{source}.{name}" if f"{source}.{name}" in MODULES else source for source, name in imports(path)}
            needs[module] = each - {f"taskzip.{room}" for room in ROOMS}
    list(TopologicalSorter(needs).static_order())


def test_faces_list_what_others_use_and_nothing_else() -> None:
    """But for the rooms that users import from themselves."""
    for room in ROOMS - {"datasets", "models", "cli"}:
        tree = ast.parse((HOUSE / room / "__init__.py").read_text())
        listed = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
        used = {
            name
            for module, path in FILES.items()
            if place(module) != room
            for source, name in imports(path)
            if source == f"taskzip.{room}"
        }
        assert used == set(listed), room
