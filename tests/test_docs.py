"""Docs agree with the code: generated pages are up to date, links work, and named tests exist."""

import re
from pathlib import Path

from recipes.schema.reference import page

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_fields_is_up_to_date() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text() == page(), "run: stratum fields > docs/recipes.md"


def test_links_between_pages_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_fault_in_the_table_is_shown_by_a_test_there_is() -> None:
    """docs/checkpoints.md: each row's last column names a file by its letter, and parts of its tests' names."""
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    files = dict(re.findall(r"\b([A-Z]) `([a-z]+/test_\w+\.py)`", page))
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.count("|") == 4][2:]
    assert len(files) >= 9 and len(rows) >= 12
    for fault, _outcome, shown in rows:
        letters = re.findall(r"\b([A-Z])\b(?: ((?:`\w+`(?:, )?)+))?", shown)
        assert letters, fault
        for letter, names in letters:
            tests = re.findall(r"def (test_\w+)\(", next((ROOT / "tests").rglob(files[letter])).read_text())
            for name in re.findall(r"\w+", names):
                assert any(name in test for test in tests), f"{fault}: no test of {files[letter]} is called {name}"
