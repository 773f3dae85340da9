"""The rooms of the package: imports go one way, and no file is long."""

import ast
from pathlib import Path

import pytest

import fact_peft

PACKAGE = Path(fact_peft.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# A room may use those before it, never those behind it.
ROOMS = ["method", "architecture", "adapter", "tuner", "operations", "sharing", "converters", "serving"]
WITHOUT_PEFT = {"method"}
TOP = {"__init__.py", "__main__.py", "upstream.py"}  # the last imports nothing of the package


def imported(file):
    """Absolute names of what a file of the package imports, wherever the import stands."""
    package = ["fact_peft", *file.parts[:-1]]
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            yield ".".join([*above, node.module or ""])


def test_every_file_has_a_room():
    assert {file.parts[0] for file in FILES if len(file.parts) > 1} == set(ROOMS)
    assert {str(file) for file in FILES if len(file.parts) == 1} == TOP


@pytest.mark.parametrize("file", [file for file in FILES if len(file.parts) > 1], ids=str)
def test_imports_go_one_way(file):
    room = file.parts[0]
    for name in imported(file):
        package, _, rest = name.partition(".")
        if package == "fact_peft" and rest != "upstream":
            assert rest.partition(".")[0] in ROOMS[: ROOMS.index(room) + 1], f"{file} imports {name}"
        assert not (room in WITHOUT_PEFT and package in ("peft", "transformers")), f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_file_is_long(file):
    assert len((PACKAGE / file).read_text().splitlines()) <= 300
