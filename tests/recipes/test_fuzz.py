"""Recipe files under random input: one message and exit status 2, or success; never a traceback."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.plan.command import main as plan
from recipes.schema.command import dotted_keys
from recipes.schema.recipe import Recipe

HEAD = "# @package _global_\ndefaults: [smoke, _self_]\n"
KEYS = st.sampled_from(
    [*dotted_keys(Recipe), "hydra", "hydra.callbacks.x", "_target_", "stages", "compress", "nope", ""]
)
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["null", ".inf", "-1", "1e-40", "1e400", str(2**63), "true", "[", "{a: b", "${run.folder}", "${oc.env:HOME}", "${", "..", "/",
     "1,2", "range(1,5)", "glob(*)", "\x1b[2J", "a\nb", "[[1]]", "{_target_: x}", "'", '"', "\\", "~", "!!python/name:os.system"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


def says(words: list[str]) -> None:
    """Run `stratum plan` on words: no exception but SystemExit, and an error in one message without control characters."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = plan(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 2
    assert status in (0, 1, 2), (status, words)
    assert status != 2 or err.getvalue().startswith("error: "), (words, err.getvalue())
    assert "Traceback" not in err.getvalue() and "\x1b" not in err.getvalue(), words


def recipe_file(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mine.yaml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
        says(["--config-dir", folder, "-cn", "mine"])


def as_file(key: str, value: Any) -> str:
    """A recipe that gives one field a value; JSON is YAML."""
    first, *rest = key.split(".")
    for name in reversed(rest):
        value = {name: value}
    return f"{HEAD}{json.dumps({first: value})[1:-1]}\n"


FILES = st.builds(as_file, KEYS, VALUES) | st.builds(lambda text: HEAD + text, st.text(max_size=60))


@settings(max_examples=150, **ANY)
@given(FILES)
def test_random_recipes_give_no_traceback(text: str) -> None:
    recipe_file(text)


@pytest.mark.slow
@settings(max_examples=2500, **ANY)
@given(FILES)
def test_many_random_recipes_give_no_traceback(text: str) -> None:
    recipe_file(text)
