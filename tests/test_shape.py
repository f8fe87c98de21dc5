"""The programs can be read as they say, and run from their file alone."""

import ast
import re

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROGRAMS = {  # and how many details they have
    "ppo.py": 13,
    "ppo_continuous_action.py": 9,
    "ppo_atari.py": 9,
    "ppo_memory.py": 5,
    "ppo_multi_discrete.py": 2,
    "ppo_pixels.py": 0,
}


def read(name):
    return (ROOT / name).read_text()


def marked_details(source):
    """[(number, title), ...] of the comments that begin with a detail."""
    comments = re.findall(r"(?m)^ *# (Detail .*)$", source)
    return re.findall(r"Detail ([ACLM]?\d+): ([^.,]+)[.,]", "\n".join(comments))


def listed_details(source):
    """The same of the list in the docstring."""
    docstring = ast.get_docstring(ast.parse(source))
    return re.findall(r"(?m)(?:^| {2,})([ACLM]?\d+)\. (\S+(?: \S+)*)", docstring)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_detail_of_the_list_is_marked_once_where_it_happens(name):
    source = read(name)
    listed = listed_details(source)
    assert len(listed) == PROGRAMS[name]
    assert sorted(marked_details(source)) == sorted(listed)


def test_a_reader_of_part_one_meets_the_details_in_their_order():
    part_one, _ = read("ppo.py").split("\n# Part two")
    marks = re.findall(r"(?m)^ *# (Detail \d+|Bonus):", part_one)
    numbers = [1, 2, 13, 3, 4, 5, 6, 7, 8, 9, 10, 12, 11]  # as they come in the code
    assert marks == [*[f"Detail {number}" for number in numbers], "Bonus"]


def test_nothing_is_left_over():
    sources = [path.read_text() for path in ROOT.glob("*.py")]
    everything = "\n".join(sources)
    assert not re.search("mock|TODO|FIXME|XXX", everything)
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                uses = re.findall(rf"\b{node.name}\b", everything)
                assert len(uses) > 1, node.name


def packages(requirements):
    """{package: (its extras, its versions)}, from a list of requirements."""
    found = {}
    for requirement in map(Requirement, requirements):
        extras, versions = found.get(requirement.name, (set(), SpecifierSet()))
        extras = extras | requirement.extras
        versions = versions & requirement.specifier
        found[requirement.name] = (extras, versions)
    return found


@pytest.mark.parametrize(
    "name, extra",
    [
        ("ppo.py", None),
        ("ppo_continuous_action.py", "mujoco"),
        ("ppo_atari.py", "atari"),
    ],
)
def test_the_file_alone_asks_for_what_pyproject_does(name, extra):
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    pattern = r"(?m)^# /// script$\s((?:^#(?:| .*)$\s)+?)^# ///$"  # as PEP 723 has it
    (block,) = re.findall(pattern, read(name))
    script = tomllib.loads(re.sub(r"(?m)^# ?", "", block))

    project = tomllib.loads(read("pyproject.toml"))["project"]
    expected = project["dependencies"]
    if extra:
        expected = expected + project["optional-dependencies"][extra]
    assert packages(script["dependencies"]) == packages(expected)
    assert script["requires-python"] == project["requires-python"]
