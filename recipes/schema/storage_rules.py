"""Addresses of object storage (`s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`) and the rules of `run.storage`."""

import re

from recipes.schema.credentials import without_credentials
from recipes.schema.errors import Problem
from recipes.schema.recipe import Recipe

_ADDRESS = re.compile(r"(s3|gs)://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[^/?#\\\x00-\x1f]+)*/?")
"""Scheme, bucket (AWS: 3 to 63 characters; Google: with dots up to 222) and folders, without a query."""


def is_storage(place: str) -> bool:
    """Whether a user means object storage by a place, and not a folder."""
    return place.startswith(("s3://", "gs://"))


def address_problem(address: str) -> str:
    """What is wrong with an address of object storage; empty if nothing is. The text contains no password."""
    if _ADDRESS.fullmatch(address) and "/../" not in f"{address}/" and "/./" not in f"{address}/":
        return ""
    what = "contains credentials" if without_credentials(address) != address else "is not an address of object storage"
    return f"{without_credentials(address)!r} {what}."


def storage_of(recipe: Recipe) -> str | None:
    """Address at which a run is stored; None without storage."""
    return f"{recipe.run.storage.rstrip('/')}/{recipe.run.name}" if recipe.run.storage else None


def storage_problems(recipe: Recipe) -> list[Problem]:
    """Addresses that cannot be used, and copies that exclude each other."""
    run, checkpoint, found = recipe.run, recipe.checkpoint, []
    if run.storage is not None and (wrong := address_problem(run.storage)):
        remedy = (
            "Write s3://BUCKET/PREFIX or gs://BUCKET/PREFIX. Credentials come from the environment (docs/storage.md)."
        )
        found.append(Problem("run.storage", f"run.storage={wrong}", remedy))
    elif run.storage is not None and (wrong := address_problem(f"s3://bucket/{run.name}")):
        text = f"run.name={run.name!r} cannot be part of an address in run.storage."
        found.append(Problem("run.name", text, "Use letters, digits, blanks, and - _ . = , +"))
    if checkpoint.keep_local is not None and checkpoint.keep_local > checkpoint.keep_last:
        text = (
            f"checkpoint.keep_local={checkpoint.keep_local} is more than checkpoint.keep_last={checkpoint.keep_last}."
        )
        found.append(Problem("checkpoint.keep_local", text, f"Use 1 to {checkpoint.keep_last}, or raise keep_last."))
    return found


def storage_notes(recipe: Recipe) -> list[Problem]:
    """Fields that have no effect without `run.storage`."""
    checkpoint = recipe.checkpoint
    if recipe.run.storage is not None or (
        checkpoint.keep_local is None and checkpoint.on_storage_failure == "continue"
    ):
        return []
    text = "checkpoint.keep_local and checkpoint.on_storage_failure have no effect, because run.storage=null."
    return [Problem("checkpoint.keep_local", text)]
