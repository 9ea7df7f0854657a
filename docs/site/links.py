"""A hook of MkDocs: links from a page to files outside docs/ become plain text, because the site does not contain them."""

import re
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """markdown: text of a page. -> the text, in which links that leave docs/ are only their words."""
    above = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]*)\]\({re.escape(above)}[^)]*\)", r"\1", markdown)
