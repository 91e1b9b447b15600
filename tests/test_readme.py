"""The README's map from equation to line leads where it says."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`(\w+\.py):(\d+)`\]\((\w+\.py)#L(\d+)\) `([^`]+)`")


def test_every_line_that_the_readme_names_holds_what_it_says():
    links = LINK.findall((ROOT / "README.md").read_text())
    assert len(links) == 13
    for shown_file, shown_line, file, line, text in links:
        assert (shown_file, shown_line) == (file, line)
        found = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert text in found, f"README says {file}:{line} holds {text!r}; it holds {found.strip()!r}"


def test_every_picture_of_the_readme_is_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(pictures) == 2 and all((ROOT / p).read_bytes()[:4] == b"\x89PNG" for p in pictures)
