"""The guides' files and commands, read from docs/guides and README.md.

<!-- file: PATH -->        the next block is written to PATH
<!-- run: WORDS -->        its commands are run in order, with WORDS added, which make them small
<!-- check -->             its commands are only parsed, as are those of all other blocks
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ROOT / "docs" / "guides"
STORY = ("cluster.md", "continue.md", "spike.md", "overnight.md")
"""Guides with commands to run, in the order in which one needs the files of another."""
_BLOCK = re.compile(r"(?:^<!-- (file|run|check):? ?(.*?) ?-->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    mark: str
    """`file`, `run`, `check` or empty."""
    argument: str
    """The text after the mark: a path, or words."""
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of its `stratum` commands. In a console, the lines after `$ `; the others are output."""
        text = self.text.replace("\\\n", " ")
        if self.language == "console":
            text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
        elif self.language != "bash":
            return []
        lines = (shlex.split(line, comments=True) for line in text.splitlines())
        return [words[1:] for words in lines if words[:1] == ["stratum"]]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*found) for found in _BLOCK.findall(page.read_text())]


def pages() -> list[Path]:
    """The pages whose commands are checked."""
    return [ROOT / "README.md", *sorted(GUIDES.glob("*.md"))]


def write_files(folder: Path) -> None:
    """Write the files that the guides show into a folder."""
    for page in pages():
        for block in blocks(page):
            if block.mark == "file":
                path = folder / block.argument
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
