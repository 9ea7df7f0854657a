"""The recipe that an import writes: one file that composes, for training, evaluation and generation from the weights."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.foreign import printable
from recipes.schema.model import ModelConfig
from recipes.schema.read import recipe_from_mapping, recipe_yaml
from recipes.schema.recipe import Recipe
from recipes.schema.run import RunConfig
from recipes.schema.typed import differing

_GROUPS = ("parallel: single", "optim: adamw", "schedule: wsd", "launch: standard")


@dataclass(frozen=True)
class Imported:
    """Everything the recipe is written from."""

    name: str
    source: str
    """Where the weights came from, for the comment at the top."""
    checkpoint: Path
    """Path of the imported checkpoint, as written in the recipe."""
    model: ModelConfig
    params: str
    """`fp32` or `bf16`: the recipe's precision group."""
    tokenizer: Path | None
    end_of_document: str | None
    begin_of_document: str | None
    row_tokens: int


def recipe_text(imported: Imported) -> str:
    """The recipe as YAML with Hydra's defaults list."""
    name, folder = shlex.quote(printable(imported.name)), imported.checkpoint.parent
    own = (f"objective: {_objective(imported)}", f"precision: {imported.params}")
    groups = "\n".join(f"  - {group}" for group in (*_GROUPS, *own))
    source, place = (shlex.quote(printable(text)) for text in (imported.source, str(folder)))
    return f"""# Made by `stratum hf import {source}`.
# It continues the imported weights. data.sources are an example: put your own text there.
#   stratum prepare  --config-dir {place} -cn {name}
#   stratum train    --config-dir {place} -cn {name}
{_use(imported, place, name)}
defaults:
{groups}
  - _self_

{recipe_yaml(_body(imported))}"""


def imported_recipe(imported: Imported) -> Recipe:
    """The same recipe, composed with the defaults of every group."""
    groups = {"precision": {"params": imported.params}, "objective": {"kind": _objective(imported)}}
    return recipe_from_mapping({**_body(imported), **groups})


def _objective(imported: Imported) -> str:
    return "reward" if imported.model.head == "scalar" else "next_token"


def _use(imported: Imported, place: str, name: str) -> str:
    """A comment with the command that uses the model."""
    if imported.model.head == "scalar":
        return f"#   stratum evaluate {shlex.quote(str(imported.checkpoint))} --heldout 64"
    return f'#   stratum generate --config-dir {place} -cn {name} --prompt "Once"'


def _body(imported: Imported) -> dict[str, Any]:
    """The values that differ from the defaults, by group."""
    run = RunConfig(
        name=imported.name, steps=100, start_from=str(imported.checkpoint), global_rows=8, microbatch_rows=1
    )
    sources = {
        "shakespeare": SourceConfig(path="package:shakespeare", weight=0.6),
        "python": SourceConfig(path="python-stdlib", weight=0.4, max_bytes=3_000_000),
    }
    if imported.model.head == "scalar":
        sources = {"preferences": SourceConfig(path="preferences.jsonl", kind="preference")}
    tokenizer = TokenizerConfig(path=None if imported.tokenizer is None else str(imported.tokenizer))
    if imported.end_of_document is not None:
        tokenizer = replace(
            tokenizer, end_of_document=imported.end_of_document, begin_of_document=imported.begin_of_document
        )
    data = DataConfig(
        folder=f"runs/data/{imported.name}",
        sources=sources,
        tokenizer=tokenizer,
        row_tokens=imported.row_tokens,
        heldout_fraction=0.03,
        reset_at_documents=imported.model.head == "scalar",
    )
    groups = {"run": differing(run), "model": differing(imported.model), "data": differing(data)}
    return {**groups, "optim": {"lr": 1e-5}, "schedule": {"warmup": 10, "decay": 20}}
