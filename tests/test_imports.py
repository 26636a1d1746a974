"""The rooms of the package: what each may import, how many files it has, and what stays free of torch.

A room is a folder of spmd/, or a file at its top. Imports run downward in FLOORS or stay within a room, so there is no
circle between rooms; within one, files don't import each other in a circle either.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import spmd

ROOT = Path(spmd.__file__).parent
FLOORS = (
    ("bench", "generate", "preflight"),
    ("worker", "run_files"),
    ("engine",),
    ("leader", "runtime"),
    ("stage",),
    ("settings", "processes"),
    ("backend", "api"),
    ("sampling", "report", "model", "journal", "formats", "guard"),
    ("parallel", "trace"),
    ("schedule", "config_checks"),
    ("config", "topology", "signals", "messages", "integers"),
)
APART = ("demo", "__init__")  # the model that ships with the project, and how it was made
MOST_FILES = 13
MAINS_OF_LAUNCH = ("spmd.runtime.compose", "spmd.runtime.slurm", "spmd.config_checks", "spmd.signals")
HEAVY = {"torch", "transformers", "numpy", "triton", "flashinfer"}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def test_the_page_on_architecture_shows_the_floors() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    assert "```\n" + "\n".join(", ".join(floor) for floor in FLOORS) + "\n```" in page


def floor_of(room: str) -> int:
    """Counted from the ground."""
    return next(number for number, rooms in enumerate(reversed(FLOORS)) if room in rooms)


def room_of(module: str) -> str:
    """The room of a module called `spmd.<room>` or `spmd.<room>.<file>`; of `spmd` itself, `__init__`."""
    return [*module.split("."), "__init__"][1]


@cache
def imports(file: Path) -> frozenset[str]:
    """Modules that a file imports, at its top or in a function; those of this package by the file they are in."""
    return frozenset(_imports(ast.parse((ROOT / file).read_text())))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _file_of(inner) in FILES else node.module


def _file_of(module: str) -> Path:
    return Path(*module.split(".")[1:]).with_suffix(".py") if "." in module else Path("__init__.py")


def module_of(file: Path) -> str:
    parts = ("spmd", *file.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_downward(file: Path) -> None:
    room = room_of(module_of(file))
    if room in APART:
        assert not {name for name in imports(file) if name.startswith("spmd.") and room_of(name) not in APART}
        return
    others = {room_of(name) for name in imports(file) if name.split(".")[0] == "spmd"} - {room, "__init__"}
    above = {other for other in others if floor_of(other) >= floor_of(room)}
    assert not above, f"{file} imports {above}, which stand no lower"


def test_no_files_of_a_room_import_each_other_in_a_circle() -> None:
    left = {module_of(file): {name for name in imports(file) if name.startswith("spmd.")} for file in FILES}
    while free := {module for module, needed in left.items() if not needed & left.keys() - {module}}:
        left = {module: needed for module, needed in left.items() if module not in free}
    assert not left, f"circles among {sorted(left)}"


def test_rooms_have_about_a_dozen_files_at_most() -> None:
    counts: dict[Path, int] = {}
    for file in FILES:
        counts[file.parent] = counts.get(file.parent, 0) + (file.name != "__init__.py")
    assert max(counts.values()) <= MOST_FILES, counts


def test_the_scheduler_is_free_of_tensors_and_the_launchers_of_torch() -> None:
    for file in FILES:
        if file.parts[0] == "schedule":
            assert not {name.split(".")[0] for name in imports(file)} & HEAVY, file
    reached, waiting = set(), set(MAINS_OF_LAUNCH)
    while waiting:
        module = waiting.pop()
        reached.add(module)
        names = imports(_file_of(module))
        assert not {name.split(".")[0] for name in names} & HEAVY, module
        waiting |= {name for name in names if name.startswith("spmd.")} - reached
