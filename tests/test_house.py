"""The limits that keep the code readable: files in a room, lines of a file, lines of a function."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bvit_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted({file.parent for file in FILES})

FILES_IN_PACKAGE, FILES_IN_ROOM = 6, 14
LINES_OF_FILE, LINES_OF_FUNCTION, LINES_OF_LOOP = 400, 60, 100


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("room", ROOMS, ids=name)
def test_a_room_has_few_files(room):
    files = [file for file in FILES if file.parent == room]
    assert len(files) <= (FILES_IN_PACKAGE if room == PACKAGE else FILES_IN_ROOM)


@pytest.mark.parametrize("room", ROOMS, ids=name)
def test_a_room_says_what_it_is_for(room):
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES_OF_FILE
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds):
            limit = LINES_OF_LOOP if node.name == "train_and_evaluate" else LINES_OF_FUNCTION
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= limit, f"{node.name} has {length} lines"
