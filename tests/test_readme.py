"""README.md says what is so: its commands run, and its numbers are those of the result files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[2:]  # .ci/run runs the first two
RESULTS = ROOT / "benchmark" / "results"


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if "ppo.py" in b and "box2d" not in b])
def test_commands_run(block, workdir):
    """Each block runs line by line in a shell, in one folder, with a tenth of the steps."""
    for name in ("ppo.py", "evaluate.py"):
        os.symlink(ROOT / name, name)
    commands = re.sub(r"(--total-timesteps \d+0)0000\b", r"\g<1>000", block)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-euxc", commands], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    assert any(Path("runs").glob("*/checkpoint.pt"))


def test_every_benchmark_that_is_named_is_run_by_ci():
    named = set(re.findall(r"python -m (benchmark\.\w+)", README))
    assert named and named <= set(re.findall(r"python -m (benchmark\.\w+)", (ROOT / ".ci" / "run").read_text()))


def cells(text):
    """The cells of all table rows, without bold."""
    return [
        [c.strip().replace("**", "") for c in row.strip("|").split("|")] for row in re.findall(r"^\|.*", text, re.M)
    ]


def test_effects_of_the_details_are_those_of_the_saved_table():
    cartpole, acrobot = (RESULTS / "ablations.md").read_text().split("## Acrobot-v1")
    saved = [cells(part) for part in (cartpole, acrobot)]
    rows = [row for row in cells(README) if len(row) == 7 and re.fullmatch(r"[+-]\d.*", row[-1])]
    assert len(rows) == 13
    for row, *others in zip(rows, *(table[3:] for table in saved), strict=True):
        assert row[0] == re.match(r"\d*", others[0][0])[0]
        assert row[-2:] == [other[4] for other in others]
        bold = re.search(rf"^\| {row[0]} *\| {re.escape(row[1])} .*", README, re.MULTILINE)[0]
        for effect in row[-2:]:
            low, high = map(float, re.search(r"\((\S+) to (\S+)\)", effect).groups())
            assert (f"**{effect}**" in bold) == (low > 0 or high < 0)


@pytest.mark.parametrize("name", ["learning", "throughput", "scaling"])
def test_rows_of_results_are_those_of_the_saved_tables(name):
    numbers = re.compile(r"-?\d[\d,.]*\d|\d")
    saved = [set(numbers.findall(" ".join(row))) for row in cells((RESULTS / f"{name}.md").read_text())]
    section = {"learning": "## Results beside", "throughput": "## Speed", "scaling": "## Many environments"}[name]
    text = README[README.index(section) :].split("\n## ")[0]
    rows = [set(numbers.findall(" ".join(row))) for row in cells(text)]
    assert sum(map(bool, rows)) >= 4
    for row in rows:
        assert any(row <= one for one in saved), row


def test_pictures_exist():
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert len(pictures) >= 5 and all((ROOT / picture).is_file() for picture in pictures)
