"""README.md and docs/ are true: commands run, numbers are saved ones, links lead on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, parse_episodes

import evaluate
import ppo

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
README = PAGES["README.md"]
DETAILS = PAGES["docs/details.md"]
EVERYTHING = "\n".join(PAGES.values())
CI = (ROOT / ".ci/run").read_text()
RESULTS = ROOT / "benchmark/results"

# Commands, flags and names

BLOCKS = re.findall(r"^```sh\n(.*?)^```$", EVERYTHING, re.MULTILINE | re.DOTALL)
# .ci/run runs those of the README that install everything, and test_change.py its page.
OF_CHANGE = PAGES["docs/change.md"]
BLOCKS = [
    block for block in BLOCKS if "-m venv" not in block and block not in OF_CHANGE
]
# Other tests run the line for job scripts, which needs a scheduler, and the lines that
# need EnvPool.
BLOCKS = [
    block for block in BLOCKS if not re.search("srun |my_envpool|my_atari", block)
]


def shortened(block):
    """The commands of a block, with fewer steps and without installing anything."""
    lines = []
    for line in block.splitlines():
        line = re.sub(
            r"(?<=--total-timesteps )\d+", lambda n: str(int(n[0]) // 50), line
        )
        if re.search(r"python ppo_\w+\.py", line):  # which train long by default
            line += " --total-timesteps 2048"
        if not line.startswith("pip install"):
            lines.append(line)
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_commands_run(block, workdir):
    if "LunarLander" in block:
        pytest.importorskip("Box2D")  # .ci/run installs it before it runs this
    for path in ROOT.glob("*.py"):
        os.symlink(path, path.name)
    folder = Path(sys.executable).parent
    result = subprocess.run(
        ["bash", "-euxc", shortened(block)],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert any(Path("runs").glob("*/checkpoint.pt"))


def test_every_benchmark_that_is_named_is_run_by_ci():
    named = set(re.findall(r"python -m (benchmark\.\w+)", EVERYTHING))
    assert named
    assert named <= set(re.findall(r"python -m (benchmark\.\w+)", CI))


def test_every_flag_that_is_named_exists(capsys):
    for parse_args in (ppo.parse_args, evaluate.parse_args):
        with pytest.raises(SystemExit):
            parse_args(["--help"])
    flags = set(re.findall(r"--[a-z-]+\b", capsys.readouterr().out.replace("-\n", "-")))
    of_other_programs = (
        "--all-extras --grep --logdir --nnodes --no-masks --nproc-per-node --reverse "
        "--signal --signals-to-handle --studies"
    )
    named = set(re.findall(r"(?<![\w-])--[a-z-]+\b", EVERYTHING))
    assert named <= flags | set(of_other_programs.split())


def test_every_program_that_is_named_exists():
    named = set(re.findall(r"(?<![\w./])(?:\w+/)*\w+\.py\b", EVERYTHING))
    assert "ppo_atari.py" in named
    of_readers = {"my_variant.py", "my_module.py", "my_ppo.py", "table.py"}
    of_readers |= {"my_envpool.py", "my_atari.py"}
    for name in named - of_readers:
        assert (ROOT / name).is_file(), name


def test_every_name_of_the_program_exists():
    for name in re.findall(r"\bppo\.([a-zA-Z]\w+)\(", EVERYTHING):
        assert hasattr(ppo, name), name
    first_table, *_ = tables_of(DETAILS)
    places = [row[3].strip("`") for row in first_table[2:]]
    assert len(places) == 13
    for name in places:
        assert hasattr(ppo, name), name
    for name in re.findall(r"`(get_\w+|evaluate_actions)`", EVERYTHING):
        assert hasattr(ppo.Agent, name), name


def test_episodes_shown_are_those_of_the_default_run():
    reference = (ROOT / "tests/cartpole_seed1_25k.csv").read_text().split()
    episodes = [f"{step},{r},{length}" for step, r, length in parse_episodes(README)]
    assert episodes
    assert set(episodes) <= set(reference)


# Numbers


def tables_of(text):
    """The tables in a text, as lists of rows of cells."""
    tables = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [line[1:-1].split("|") for line in table.splitlines()]
        tables.append([[cell.strip() for cell in row] for row in rows])
    return tables


def rows_of(text):
    """The rows of all tables in a text, without bold."""
    tables = tables_of(text.replace("**", ""))
    return [row for table in tables for row in table]


def section(page, heading):
    """The part of a page from this heading to the next one."""
    return PAGES[page][PAGES[page].index(heading) :].split("\n## ")[0]


def study_tables():
    """{heading: tables} of the sections of study.md."""
    sections = (RESULTS / "study.md").read_text().split("\n## ")[1:]
    return {text.split("\n")[0]: tables_of(text) for text in sections}


def test_effects_of_the_details_are_those_of_the_saved_table():
    cartpole, acrobot = (RESULTS / "ablations.md").read_text().split("## Acrobot-v1")
    saved = zip(rows_of(cartpole)[3:], rows_of(acrobot)[3:], strict=True)

    page = DETAILS.split("All details at the default shape")[1]
    rows = [row for table in tables_of(page) for row in table]
    shown = [row for row in rows if re.search(r"\d to [+-]\d", row[-1])]
    assert len(shown) == 13
    for (number, _, *effects), saved_rows in zip(shown, saved, strict=True):
        for effect, saved_row in zip(effects, saved_rows, strict=True):
            assert number == re.match(r"\d*", saved_row[0])[0]
            assert effect.replace("**", "") == saved_row[4]
            low, high = map(float, re.search(r"\((\S+) to (\S+)\)", effect).groups())
            excludes_zero = low > 0 or high < 0
            assert effect.startswith("**") == excludes_zero


def test_numbers_that_the_readme_gives_of_the_details_are_those_of_the_study():
    text = " ".join(section("README.md", "## Which detail").split())
    low, high = re.search(r"goes from (\d+) at .* to (\d+) at 30 times", text).groups()
    rows = rows_of((RESULTS / "study.md").read_text())
    returns = [row for row in rows if row[0] == "default" and low in row]
    assert any(high in row for row in returns)
    assert "five of ten runs end no better than untrained" in " ".join(DETAILS.split())


def test_tables_of_the_details_are_those_of_the_study():
    saved = study_tables()
    shown = tables_of(DETAILS)
    assert saved["CartPole-v1, rates"][2] in shown
    assert saved["Acrobot-v1, rates"][2] in shown
    assert saved["CartPole-v1, reuse"][2] in shown
    assert saved["CartPole-v1, shape"][0] in shown

    study = (RESULTS / "study.md").read_text()
    count, found = re.search(r"Chance: (\d+) .*\n.* (\d+) exclude", study).groups()
    words = " ".join(DETAILS.split())
    assert f" {count} intervals" in words
    assert f" {found} exclude 0" in words


@pytest.mark.parametrize(
    "page, heading, name",
    [
        ("README.md", "## Results", "learning"),
        ("README.md", "## Speed", "throughput"),
        ("docs/results.md", "## Returns", "learning"),
        ("docs/results.md", "## The variants", "learning"),
        ("docs/results.md", "## Memory", "learning"),
        ("docs/results.md", "## Speed", "throughput"),
        ("docs/scaling.md", "# Many", "scaling"),
        ("docs/scaling.md", "## The time", "scaling"),
    ],
)
def test_rows_of_results_are_those_of_the_saved_tables(page, heading, name):
    def numbers_of_rows(text):
        joined = [" ".join(row) for row in rows_of(text)]
        return [set(re.findall(r"-?\d[\d,.]*\d|\d", row)) for row in joined]

    saved = numbers_of_rows((RESULTS / f"{name}.md").read_text())
    shown = [numbers for numbers in numbers_of_rows(section(page, heading)) if numbers]
    assert len(shown) >= 3
    for numbers in shown:
        assert any(numbers <= row for row in saved), numbers


def test_settings_are_those_of_the_results():
    learning = (RESULTS / "learning.md").read_text()
    lander = re.search(r"ppo\.py\*\* (--num-envs [^|]*) \|", learning)[1]
    assert set(lander.split()) <= set(PAGES["docs/results.md"].split())

    scaling = (RESULTS / "scaling.md").read_text()
    solved = re.search(r"^`(python ppo\.py .*)`$", scaling, re.MULTILINE)[1]
    assert solved in PAGES["docs/scaling.md"]


# Links


def anchors(text):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_pictures_exist(page):
    text = PAGES[page].replace("\n", " ")
    links = re.findall(r"\]\(((?!http)[^)#]*)(?:#([^)]*))?\)", text)
    assert links
    for path, anchor in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), path
        if anchor:
            assert anchor in anchors(target.read_text()), anchor
