"""Imports go one way: a file imports only from rooms above its own, and no file, directly or not, itself."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.rooms import ROOMS, imported, modules, room

TESTS = Path(__file__).parent


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
