"""Docs agree with the code: generated pages are up to date, links work, and named tests exist."""

import re
import tomllib
from pathlib import Path

import yaml

from recipes.schema.reference import page

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_fields_is_up_to_date() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text() == page(), "run: stratum fields > docs/recipes.md"


def prose(path: Path) -> str:
    """A page without its fenced blocks and code spans."""
    text = re.sub(r"^(```+|~~~+).*?^\1", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule (MkDocs' is the same for these headings)."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_anchors_and_pictures_of_all_pages_exist() -> None:
    wrong = []
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
            file, _, anchor = target.partition("#")
            to = path.parent / file if file else path
            if "://" in target:
                continue
            if not to.exists() or (anchor and anchor not in anchors(to)):
                wrong.append(f"{path.relative_to(ROOT)}: {target}")
    assert not wrong, wrong


def test_the_site_has_every_page_once_and_every_module_it_names() -> None:
    site = yaml.safe_load((ROOT / "docs" / "site" / "mkdocs.yml").read_text())
    listed = [page for part in site["nav"] for pages in part.values() for page in pages]
    found = [page if isinstance(page, str) else next(iter(page.values())) for page in listed]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(found) == sorted(pages)
    assert site["theme"]["font"] is False  # fonts would be fetched when a page is opened
    modules = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(modules) > 5
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


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


def test_the_citation_names_the_version_and_licence_of_the_package() -> None:
    """Required keys: https://github.com/citation-file-format/citation-file-format/blob/main/schema-guide.md"""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


def test_the_readme_is_about_one_page() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000
