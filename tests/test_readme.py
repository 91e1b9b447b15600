"""The README keeps its word: its map leads where it says, and what it tells one to type runs."""
import gzip
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from test_train import TINY

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\[`(\w+\.py):(\d+)`\]\((\w+\.py)#L(\d+)\) `([^`]+)`")


def test_every_line_that_the_readme_names_holds_what_it_says():
    links = LINK.findall(README)
    assert len(links) == 19
    for shown_file, shown_line, file, line, text in links:
        assert (shown_file, shown_line) == (file, line)
        found = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert text in found, f"README says {file}:{line} holds {text!r}; it holds {found.strip()!r}"


def test_every_picture_of_the_readme_is_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 7 and all((ROOT / p).read_bytes()[:4] in (b"\x89PNG", b"GIF8") for p in pictures)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_every_python_block_runs(block, tmp_path):
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_every_command_of_the_front_page_runs(tmp_path):
    """In the order of the page, train.py at a tiny size; installing and testing led here, and mine.fa.gz is the reader's."""
    (tmp_path / "mine.fa.gz").write_bytes(gzip.compress("".join(f">{i}\n{'ACGGT' * 20}\n" for i in range(9)).encode()))
    reward = re.search(r"^    echo '(def score.*)' > my_reward.py$", README, re.M)
    (tmp_path / "my_reward.py").write_text(reward[1] + "\n")
    lines = re.findall(r"^    (?:pip .*&& )?(python (?:train|sample)\.py.*)$", README, re.M)
    assert len(lines) == 8
    for line in lines:
        _, script, *args = shlex.split(line, comments=True)
        if script == "train.py" and "--resume" not in args:
            args += [flag for flag in TINY if not (flag.startswith("--pretrain") and "--init" in line)]
        done = subprocess.run([sys.executable, ROOT / script, *args], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "denoise.gif").exists() and (tmp_path / "rewards.png").exists()
