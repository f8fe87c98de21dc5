"""ppo.py stays short enough to be read, in two parts, and one file that can be run alone."""

import ast
import re

import pytest
from conftest import ROOT

SOURCE = (ROOT / "ppo.py").read_text()
LINES = SOURCE.splitlines()
PART_TWO = next(i for i, line in enumerate(LINES) if line.startswith("# Part two"))


def test_parts_and_train_are_short():
    (train,) = (node for node in ast.parse(SOURCE).body if getattr(node, "name", "") == "train")
    counts = {"one": PART_TWO, "two": len(LINES) - PART_TWO, "train": train.end_lineno - train.lineno + 1}
    assert counts["one"] <= 340 and counts["two"] <= 340 and counts["train"] <= 105, counts
    assert max(map(len, LINES)) <= 120


def test_each_detail_is_marked_where_it_happens_in_part_one():
    marks = [re.findall(r"# (Detail \d+|Bonus|Debug variables)\b", line) for line in LINES]
    expected = {*(f"Detail {i}" for i in range(1, 12)), "Bonus", "Debug variables"}
    assert {mark for found in marks[:PART_TWO] for mark in found} == expected and not any(marks[PART_TWO:])


def test_nothing_is_left_over():
    assert not re.search("mock|TODO|XXX", SOURCE)
    programs = "\n".join(path.read_text() for path in (ROOT / "evaluate.py", *(ROOT / "variants").glob("*.py")))
    for node in ast.walk(ast.parse(SOURCE)):  # nor anything that tests alone would call
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__"):
            used = len(re.findall(rf"\b{node.name}\b", SOURCE)) - 1 + len(re.findall(rf"\b{node.name}\b", programs))
            assert used > 0, node.name


def test_the_file_alone_asks_for_what_pyproject_does():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    (block,) = re.findall(r"(?m)^# /// script$\s((?:^#(?:| .*)$\s)+?)^# ///$", SOURCE)  # as PEP 723 has it
    script = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert script == {name: project[name] for name in ("requires-python", "dependencies")}
