"""Imports go one way: a file imports only from rooms above its own, and no file, directly or not, itself."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import dtrain

ROOT = Path(dtrain.__file__).parent
TESTS = Path(__file__).parent

# From the ground up, as docs/architecture.md draws it. Files of one room import each other; no file is in two.
ROOMS = [
    [
        *("errors", "terminal", "files", "credentials", "addresses", "randomness", "position", "lock", "faults"),
        *("distributed", "launcher", "rendezvous", "interrupt", "plugins", "draws", "batch"),
    ],
    ["config"],
    ["run"],
    ["data.shards"],
    ["data.order"],
    ["data.fields", "data.declared"],
    ["data.pack"],
    ["data"],
    ["models"],
    ["diffusion"],
    ["first_stage"],
    ["conditions"],
    ["objectives"],
    ["tracking"],
    ["checkpoint"],
    ["evaluation"],
    ["trained"],
    ["training"],
    ["proposal"],
    ["report"],
    ["cluster"],
    ["chaos"],
    ["cli"],
]


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """What a file imports of dtrain, at its top, within functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dtrain":
            module = node.module.removeprefix("dtrain").lstrip(".")
            for name in node.names:
                below = f"{module}.{name.name}".lstrip(".")
                found.add(below if below in known else module)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("dtrain.") for a in node.names if a.name.startswith("dtrain.")}
    return found - {""}  # of the package itself: its version


def room(module: str) -> int:
    """The room whose name is the longest that the module begins with."""
    fitting = [(len(name), i) for i, names in enumerate(ROOMS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert fitting, f"{module} is in no room"
    return max(fitting)[1]


def test_a_file_imports_only_from_rooms_above_its_own():
    known = modules()
    upward = {
        f"{module} imports {other}"
        for module, path in known.items()
        if module
        for other in imported(path, known)
        if room(other) > room(module)
    }
    assert upward == set()


def test_no_file_imports_itself_in_a_circle():
    known = modules()
    graph = {module: imported(path, known) - {module} for module, path in known.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as e:
        raise AssertionError(" → ".join(e.args[1])) from None


def test_only_the_ground_is_free_of_rooms_and_every_room_stands():
    known = modules()
    assert {name for names in ROOMS for name in names} <= set(known)


def test_no_file_of_tests_imports_from_a_test_file():
    """What several of them need stands in modules that hold no tests."""
    found = {
        f"{path.relative_to(TESTS)} imports {module}"
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for module in [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        if re.fullmatch(r"tests\b.*\.test_\w+", module)
    }
    assert found == set()
