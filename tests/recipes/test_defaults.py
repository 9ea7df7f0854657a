"""A value is said once: defaults by the dataclasses, what differs by YAML; and every field can be overridden all the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from recipes_composed import composed

from recipes.schema.command import RECIPES, dotted_keys
from recipes.schema.compress import CompressConfig
from recipes.schema.data import SourceConfig
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.run import RunConfig
from recipes.schema.typed import build, defaults_of, differing

FILES = sorted(path for path in RECIPES.rglob("*.yaml"))
DEFAULTS = {**defaults_of(Recipe), "compress": defaults_of(CompressConfig)}


def own(path: Path) -> dict[str, Any]:
    """What a file says, at its place in a recipe."""
    group = path.parent.name
    plain = yaml.safe_load(path.read_text()) or {}
    return plain if path.parent == RECIPES else {"defaults": plain.pop("defaults", []), group: plain}


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def default_at(key: str) -> Any:
    found: Any = DEFAULTS
    if key.startswith("data.sources.") and key.count(".") == 3:
        found, key = defaults_of(SourceConfig), key.rsplit(".", 1)[1]
    for name in key.split("."):
        found = found.get(name, KeyError) if isinstance(found, dict) else KeyError
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_no_yaml_repeats_a_default_or_its_own_group(path: Path) -> None:
    said = own(path)
    options = [
        (path.parent.name, one) if isinstance(one, str) else next(iter(one.items())) for one in said.pop("defaults")
    ]
    files = [RECIPES / group / f"{option}.yaml" for group, option in options]
    beneath = {key: value for file in files if file.exists() for key, value in leaves(own(file))}
    repeated = [key for key, value in leaves(said) if default_at(key) == value or beneath.get(key, KeyError) == value]
    assert not repeated, f"take these out of {path.name}: {repeated}"


def test_a_recipe_of_three_lines_inherits_every_default_and_takes_every_override(tmp_path: Path) -> None:
    """A user's own folder, with no list of groups at all."""
    (tmp_path / "mine.yaml").write_text(
        "run: {name: mine, steps: 3}\nmodel: {pattern: M-, hidden: 64, vocab: 512}\ndata: {sources: {mine: {path: words}}}\n"
    )
    plain = composed(f"--config-dir={tmp_path}", "-cn", "mine", "optim.lr=0.5", "launch.slurm.account=us")
    found = recipe_from_mapping(plain)
    assert found.optim.lr == 0.5 and found.launch.slurm.account == "us"
    assert found.run == RunConfig(name="mine", steps=3)
    assert {key for key, _ in leaves(plain)} >= {key for key, _ in leaves(defaults_of(Recipe))} - {"data.sources"}
    assert set(dotted_keys(Recipe)) <= {key for key, _ in leaves(plain)} | {
        key for leaf, _ in leaves(plain) for key in (leaf.rsplit(".", n)[0] for n in range(1, 4))
    }


def test_options_that_earlier_recipes_named_still_compose(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(
        "defaults: [run: standard, model: smoke, data: smoke, checkpoint: standard, evaluate: standard, telemetry: standard,"
        " launch: standard, compress: standard, _self_]\nrun: {name: old, steps: 3}\n"
    )
    plain = composed(f"--config-dir={tmp_path}", "-cn", "old")
    assert build(CompressConfig, plain["compress"], "compress") == CompressConfig()
    assert recipe_from_mapping(plain).data == recipe_from_mapping(composed("-cn", "smoke")).data


@given(
    st.builds(
        SourceConfig,
        path=st.text(),
        weight=st.just(0.0) | st.floats(1e-37, 9),
        max_bytes=st.none() | st.integers(1, 2**63 - 1),
    )
)
def test_what_differs_from_the_defaults_reads_back_as_the_whole(source: SourceConfig) -> None:
    assert build(SourceConfig, differing(source), "") == source


@pytest.mark.parametrize("name", ["smoke", "nemotron_nano_12b_v2", "gemma2_2b"])
def test_a_whole_recipe_reads_back_from_what_differs(name: str) -> None:
    recipe = recipe_from_mapping(composed("-cn", name))
    assert recipe_from_mapping(differing(recipe)) == recipe
