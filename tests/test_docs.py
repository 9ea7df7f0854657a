"""Pages that are made from the code say what the code says."""

from pathlib import Path

from launch.fields import page

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_fields_is_up_to_date() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text() == page(), "run: python -m launch.fields > docs/recipes.md"


def test_links_between_pages_lead_somewhere() -> None:
    import re

    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
