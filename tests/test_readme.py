"""README.md and docs/ say what is so: commands run, numbers are those of the result files, and links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, parse_episodes

import evaluate
import ppo

PATHS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
README, EVERYTHING = PAGES["README.md"], "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", EVERYTHING, re.MULTILINE | re.DOTALL)[2:]  # .ci/run runs the first two
RESULTS = ROOT / "benchmark" / "results"


def test_readme_is_a_page():
    assert len(README.encode()) <= 11_000


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"--(\S+)", block)[-1])
def test_commands_run(block, workdir):
    """Each block runs line by line in a shell, in one folder, with fewer steps, and installs nothing."""
    if "box2d" in block:
        pytest.importorskip("Box2D")  # not among the test's dependencies: .ci/run installs it, and runs this block
    for name in ("ppo.py", "evaluate.py", "variants"):
        os.symlink(ROOT / name, name)
    commands = re.sub(r"(--total-timesteps \d+0)0000\b", r"\g<1>000", block)
    commands = re.sub(r"^python -m variants\..*", r"\g<0> --total-timesteps 2048", commands, flags=re.MULTILINE)
    commands = re.sub(r"^pip install .*", "", commands, flags=re.MULTILINE)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-euxc", commands], capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    assert any(Path("runs").glob("*/checkpoint.pt"))


def test_every_benchmark_that_is_named_is_run_by_ci():
    named = set(re.findall(r"python -m (benchmark\.\w+)", EVERYTHING))
    assert named and named <= set(re.findall(r"python -m (benchmark\.\w+)", (ROOT / ".ci" / "run").read_text()))


def test_every_flag_that_is_named_exists(capsys):
    for parse_args in (ppo.parse_args, evaluate.parse_args):
        with pytest.raises(SystemExit):
            parse_args(["--help"])
    flags = set(re.findall(r"--[a-z-]+\b", capsys.readouterr().out.replace("-\n", "-")))
    others = "--all-extras --grep --logdir --nnodes --nproc-per-node --reverse --signal --signals-to-handle --studies"
    assert set(re.findall(r"(?<![\w-])--[a-z-]+\b", EVERYTHING)) <= flags | set(others.split())


def test_episodes_shown_are_those_of_the_default_run():
    reference = (ROOT / "tests" / "cartpole_seed1_25k.csv").read_text().split()
    episodes = [f"{step},{r},{length}" for step, r, length in parse_episodes(README)]
    assert episodes and set(episodes) <= set(reference)


def tables_of(text):
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[[c.strip() for c in row[1:-1].split("|")] for row in table.splitlines()] for table in tables]


def cells(text):
    """The cells of all table rows, without bold."""
    return [[cell.replace("**", "") for cell in row] for table in tables_of(text) for row in table]


def test_effects_of_the_details_are_those_of_the_saved_table():
    cartpole, acrobot = (RESULTS / "ablations.md").read_text().split("## Acrobot-v1")
    saved = [cells(part) for part in (cartpole, acrobot)]
    page = PAGES["docs/details.md"].split("All details at the default shape")[1]
    rows = [row for row in cells(page) if re.fullmatch(r"[+-]\d.*", row[-1])]
    assert len(rows) == 13
    for row, *others in zip(rows, *(table[3:] for table in saved), strict=True):
        assert row[0] == re.match(r"\d*", others[0][0])[0]
        assert row[-2:] == [other[4] for other in others]
        bold = re.search(rf"^\| {row[0]} *\| {re.escape(row[1])} .*", page, re.MULTILINE)[0]
        for effect in row[-2:]:
            low, high = map(float, re.search(r"\((\S+) to (\S+)\)", effect).groups())
            assert (f"**{effect}**" in bold) == (low > 0 or high < 0)


def study_tables():
    """{heading: tables, each a list of rows of cells} of study.md."""
    sections = (RESULTS / "study.md").read_text().split("\n## ")[1:]
    return {text.split("\n")[0]: tables_of(text) for text in sections}


def test_what_the_readme_says_of_each_detail_is_what_the_study_found():
    saved, (shown,) = study_tables(), tables_of(README[README.index("## The details") :].split("\n## ")[0])
    summaries = [saved[f"{env_id}, rates"][2] for env_id in ("CartPole-v1", "Acrobot-v1")]
    assert len(shown) == 16
    for row, *found in list(zip(shown, *summaries, strict=True))[2:]:
        expected = []
        for header, line in zip((summaries[0][0], summaries[1][0]), found, strict=True):
            shares = zip(header[5:], line[5:], strict=True)
            working = [name.split()[-1] for name, share in shares if share.startswith("**")]
            expected += [re.sub(r" \([^)]*\)", "", line[3]), ", ".join(working) or "none"]
        assert row[0] == re.match(r"\d*", found[0][0])[0] and row[3:] == expected


def test_tables_of_the_details_are_those_of_the_study():
    page, saved = PAGES["docs/details.md"].replace("\n", " "), study_tables()
    shown = tables_of(PAGES["docs/details.md"])
    assert saved["CartPole-v1, rates"][2] in shown and saved["Acrobot-v1, rates"][2] in shown
    assert saved["CartPole-v1, reuse"][2] in shown and saved["CartPole-v1, shape"][0] in shown
    count, found = re.search(r"Chance: (\d+) .*\n.* (\d+) exclude", (RESULTS / "study.md").read_text()).groups()
    assert f" {count} intervals" in page and f" {found} exclude 0" in page


@pytest.mark.parametrize(
    "page, section, name",
    [
        ("README.md", "## Results", "learning"),
        ("README.md", "## Speed", "throughput"),
        ("docs/results.md", "## Returns", "learning"),
        ("docs/results.md", "## The variants", "learning"),
        ("docs/results.md", "## Speed", "throughput"),
        ("docs/scaling.md", "# Many", "scaling"),
        ("docs/scaling.md", "## The time", "scaling"),
    ],
)
def test_rows_of_results_are_those_of_the_saved_tables(page, section, name):
    numbers = re.compile(r"-?\d[\d,.]*\d|\d")
    saved = [set(numbers.findall(" ".join(row))) for row in cells((RESULTS / f"{name}.md").read_text())]
    text = PAGES[page][PAGES[page].index(section) :].split("\n## ")[0]
    rows = [set(numbers.findall(" ".join(row))) for row in cells(text)]
    assert sum(map(bool, rows)) >= 3
    for row in rows:
        assert any(row <= one for one in saved), row


def test_settings_are_those_of_the_results():
    lander = re.search(r"ppo\.py\*\* (--num-envs [^|]*) \|", (RESULTS / "learning.md").read_text())[1]
    solved = re.search(r"^`(python ppo\.py .*)`$", (RESULTS / "scaling.md").read_text(), re.MULTILINE)[1]
    assert set(lander.split()) <= set(PAGES["docs/results.md"].split()) and solved in PAGES["docs/scaling.md"]


def anchors(text):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_pictures_exist(page):
    targets = re.findall(r"\]\(((?!http)[^)#]*)(?:#([^)]*))?\)", PAGES[page].replace("\n", " "))
    assert targets
    for path, anchor in targets:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target.read_text()), anchor
