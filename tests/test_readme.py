"""The README keeps its word: its commands and code run, what it names exists, its figures agree."""
import gzip
import os
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import sample
import train
from helpers import TINY, finished

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXPERIMENTS = ROOT / "tests" / "experiments"
RESULTS = (EXPERIMENTS / "RESULTS.md").read_text()


def test_every_function_of_the_map_exists():
    walk = README.split("| function | question |")[1].split("\n\n")[0]
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("diffusion", "sepo", "train"))
    names = [name for row in walk.splitlines()[2:] for name in re.findall(r"`(\w+)`", row)]
    assert len(names) >= 9
    for name in names:
        assert re.search(rf"def {name}\b", source), name


def test_every_file_and_picture_exists():
    for text, folder in ((README, ROOT), (RESULTS, EXPERIMENTS)):
        links = re.findall(r"\]\(([^)#]+)\)", text)
        links = [link for link in links if not link.startswith("http")]
        assert links and all((folder / link).exists() for link in links), links


def test_every_flag_of_the_readme_exists():
    known = {field.name for flags in (train.Flags, sample.Flags) for field in fields(flags)}
    flags = set(re.findall(r"--(\w+)", README)) - {"nproc_per_node"}
    assert len(flags) > 20 and flags <= known, flags - known


def rows_of(text):
    """{task: the numbers of its first row}."""
    rows = re.findall(r"^\| `(\w+)` \| (.*\d.*) \|$", text, re.M)
    return {name: set(re.findall(r"[\d,.]*\d", cells)) for name, cells in reversed(rows)}


def test_figures_of_the_readme_are_those_of_the_results():
    found, known = rows_of(README), rows_of(RESULTS)
    assert found.keys() == train.TASKS.keys()
    for name, numbers in found.items():
        assert len(numbers) >= 4 and numbers <= known[name], name


def test_the_front_page_is_short():
    assert len(README.split()) <= 1500
    prose = re.sub(r"```.*?```|^(    |\||!).*?$", "", README, flags=re.S | re.M)
    assert max(map(len, prose.splitlines())) <= 100


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_every_python_block_runs_from_any_folder(block, tmp_path):
    printed = finished(tmp_path, begin_in, tmp_path, block)
    assert printed and "Traceback" not in printed
    assert "train.main" not in block or "--overwrite" in block      # it can be run again


def begin_in(folder, block):
    os.chdir(folder)
    exec(block, {})


def test_every_command_of_the_front_page_runs(tmp_path, monkeypatch, capsys):
    """In the order of the page, train.py at a tiny size; installing and testing led here."""
    monkeypatch.chdir(tmp_path)
    fasta = "".join(f">{i}\n{'ACGGT' * 20}\n" for i in range(9))
    Path("mine.fa.gz").write_bytes(gzip.compress(fasta.encode()))
    reward = re.search(r"^    echo '(def score.*)' > my_reward.py$", README, re.M)
    Path("my_reward.py").write_text(reward[1] + "\n")
    commands = re.findall(r"^    (?:pip .*&& )?python ((?:train|sample)\.py.*)$", README, re.M)
    assert len(commands) >= 5
    for command in commands:
        script, *args = shlex.split(command, comments=True)
        main = train.main if script == "train.py" else sample.main
        if script == "train.py" and "--resume" not in args:
            args += [flag for flag in TINY if "--pretrain" not in flag or "--init" not in command]
        main(args)
    assert Path("denoise.gif").exists() and Path("rewards.png").exists()
